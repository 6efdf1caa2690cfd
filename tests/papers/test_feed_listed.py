"""By what two listings are known to be of one paper."""

from __future__ import annotations

import pytest

from patchbay.errors import PatchbayError
from patchbay.papers.feed.listed import Listed, arxiv_id, title_key


def test_titles_are_one_whatever_their_case_accents_signs_and_latex() -> None:
    same = [
        r"QwenLong-CPRS: Towards $\infty$-LLMs",
        "qwenlong cprs – towards ∞ LLMs",
        " QwenLong-CPRS:  Towards ∞-LLMs.",
    ]
    assert len({title_key(title) for title in same}) == 1
    assert title_key("Café au lait") == title_key("CAFE AU LAIT")
    assert title_key("Attention I") != title_key("Attention II")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2410.12999", ("2410.12999", None)),
        ("2410.12999v2", ("2410.12999", 2)),
        ("https://arxiv.org/abs/2410.12999v10", ("2410.12999", 10)),
        ("http://arxiv.org/pdf/1301.3781.pdf", ("1301.3781", None)),
        ("arXiv:cs/0112017", ("cs/0112017", None)),
    ],
)
def test_ids_are_read_from_what_people_paste(text: str, found: tuple[str, int | None]) -> None:
    assert arxiv_id(text) == found


def test_what_names_no_paper_is_refused() -> None:
    for text in ("", "2410", "2410.12999 and more", "../../etc", "2410.12999v"):
        with pytest.raises(PatchbayError, match="no arXiv id"):
            arxiv_id(text)
    for title in ("", "  ", "…"):
        with pytest.raises(PatchbayError, match="needs a title"):
            Listed(title)
