"""Task probability: planted dependence on the output is found, probabilities equal Hugging Face's, ciphers are undone by their inverse."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.measure import _ciphers as ciphers
from patchbay.measure import _estimates as estimates
from tests.measure.words import NAMES, by_hand, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.task_probability")
WORDS = ["cat", "dog", "hat", "sun", "man", "hen", "mat", "on", "ran", "see", "red", "big"]


def items() -> list[dict[str, Any]]:
    return [
        {"prompt": f"what is {i}?", "choices": [f" {word}", " no"], "answer": i % 2, "share": 0.9 if i % 3 else 0.1}
        for i, word in enumerate(WORDS)
    ]


def test_planted() -> None:
    """Right with logit 1.5 output - input: both coefficients come back, and the p of the first is small."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(800, 2, generator=generator, dtype=torch.float64)
    p = (1.5 * x[:, 0] - x[:, 1]).sigmoid()
    right = (torch.rand(800, generator=generator, dtype=torch.float64) < p).double()
    table = torch.cat([right[:, None], x * torch.tensor([3.0, 0.2]) + 7.0], 1)
    _, output, given = estimates.standardised_logistic(table).tolist()
    assert output == pytest.approx(1.5, abs=0.25)
    assert given == pytest.approx(-1.0, abs=0.25)
    assert pb.maths.draws_p(output, module._dealt(table, 0), two_sided=True) < 0.01
    assert [row["accuracy"] for row in module._terciles(right, x[:, 0])] == sorted(row["accuracy"] for row in module._terciles(right, x[:, 0]))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model = reader(name)
    found = pb.measure.task_probability(model, items())
    start = model.tokenizer.bos_token_id
    for i, row in enumerate(items()):
        [own] = model.encode([row["prompt"]])
        logp = [by_hand(model, model.encode([row["prompt"] + c])[0], len(own)) for c in row["choices"]]
        assert float(found["right"][i]) == float(logp.index(max(logp)) == row["answer"])
        for which, text in (("output", row["choices"][row["answer"]]), ("input", row["prompt"])):
            ids = [start, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]
            assert close(float(found[which][i]), by_hand(model, ids, 1), noise=64)
    assert len(found.tables["coefficients"]) == 3
    table = torch.stack([found[name] for name in ("right", "output", "input", "share")], 1)
    assert float(found.values) == float(estimates.standardised_logistic(table)[1])


def test_null() -> None:
    """A coin is right whatever is likely: the coefficient's interval holds 0, in nearly all of forty draws."""
    generator = torch.Generator().manual_seed(1)
    outside = 0
    for _ in range(40):
        table = torch.cat([torch.randint(2, (60, 1), generator=generator).double(), torch.randn(60, 2, generator=generator, dtype=torch.float64)], 1)  # fmt: skip
        ends = module._interval(table, 0)
        outside += not ends.low <= 0.0 <= ends.high
    assert outside <= 6
    always = torch.cat([torch.ones(20, 1), torch.randn(20, 2)], 1).double()
    assert estimates.standardised_logistic(always).isnan().all()


def test_ciphers() -> None:
    """What is asked gives back what is answered; 26 shifts come round."""
    text = "The cat's hat, and An Apple!"
    for k in range(1, 26):
        given, answer = ciphers.ciphered(text, f"shift_{k}")
        assert given != text
        assert ciphers.shift(given, 26 - k) == text == answer
    assert ciphers.shift("xyz AB", 3) == "abc DE"
    assert ciphers.pig_latin("the apple tree") == "ethay appleway eetray"
    assert ciphers.ciphered("a b c", "reversal") == ("c b a", "a b c")
    assert ciphers.article_swap("see the cat on a mat") == "the see cat a on mat"
    assert ciphers.ciphered("read the text", "acronym") == ("read the text", "RTT")
    assert ciphers.ciphered("read the text", "counting") == ("read the text", "3")
    with pytest.raises(pb.PatchbayError, match="no task 'shift_26'; possible are shift_1"):
        ciphers.ciphered("a", "shift_26")


def test_tasks_of_texts_and_bad_input() -> None:
    model = reader("characters")
    rows: list[dict[str, Any]] = [{"task": "shift_3", "text": word} for word in WORDS]
    found = pb.measure.task_probability(model, rows)
    assert float(found["accuracy"]) == 0.0  # a random twin
    assert any("there is nothing to fit" in note for note in found.notes)
    for change, said in (
        ({"share": 2.0}, r"items, row 0: share lies in \(0, 1\], got 2.0"),
        ({"share": None}, "share is given for every item or for none"),
    ):
        wrong = items()
        wrong[0].update(change)
        with pytest.raises(pb.PatchbayError, match=said):
            pb.measure.task_probability(model, wrong)
    with pytest.raises(pb.PatchbayError, match="3 items and frame="):
        pb.measure.task_probability(model, items()[:3])
    with pytest.raises(pb.PatchbayError, match="row 0 lacks the field 'answer'"):
        pb.measure.task_probability(model, [{"prompt": "a"}] * 12)
