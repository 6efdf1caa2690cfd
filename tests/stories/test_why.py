"""Why: the planted token and head come first, sums and cuts equal plain loops, and what a model has nothing for says so."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import patchbay as pb
from patchbay.cli import cli
from patchbay.results.result import load_result
from patchbay.signal.port import Part, PatchbayError
from patchbay.stories import _why_causal, _why_tokens
from patchbay.stories._why_causal import Chosen, _row
from patchbay.stories._why_tokens import _agreement
from patchbay.stories._why_told import Section, listening
from patchbay.tiny import planted
from patchbay.tiny.twins import twin
from tests.shared import SHARED
from tests.tolerance import close

why = importlib.import_module("patchbay.stories.why")
IDS = [11, 3, 42, 7, 11, 5, 23, 11]
PROMPT = "The capital of Lolavia is Grerum. Emma asked Kate about the violin. The capital of Lolavia is"
SECTIONS = [
    "next tokens",
    "tokens",
    "parts",
    "sums",
    "neurons",
    "lens",
    "heads read",
    "causal check",
    "one by one",
    "in short",
    "not shown",
]


@pytest.fixture(scope="module")
def answered() -> pb.Result:
    return pb.why(pb.load("tiny"), PROMPT)


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """The induction head writes most, reads the token after the earlier occurrence, and is missed more than random heads."""
    built = planted.induction(form=form, seed=1)
    model = pb.load(built.model, built.tokenizer)
    prompt, answer = built.truth["prompts"][0], built.truth["answers"][0]
    ids = model.encode(prompt)[0]
    copied = ids.index(ids[-1]) + 1
    result = pb.why(model, prompt, answer=answer, draws=5)
    assert str(result.top(1)[0]) == built.truth["induction"]
    assert int(result["cut_from_last"].nan_to_num(0.0).argmax()) == copied
    head = result.tables["heads read"][0]
    assert (head["head"], head["position"]) == (built.truth["induction"], copied)
    assert head["attention"] > 0.9
    together = result.tables["causal check"][0]
    assert together["without"] == built.truth["induction"]
    assert together["lost"] > together["highest"]
    assert together["p"] == pytest.approx(1 / (1 + together["sets"]))


def differences(hf: Any, ids: list[int], mask: torch.Tensor, right: int, wrong: int) -> float:
    with torch.no_grad():
        logits = hf(torch.tensor([ids]), attention_mask=mask[None, None]).logits[0, -1].double()
    return float(logits[right] - logits[wrong])


def test_reference_of_cuts() -> None:
    """Every cut is the difference of two runs of the model itself under a mask that lacks the cut places."""
    hf = twin("gpt2")
    result = pb.why(pb.load(hf), IDS, answer=9, against=4, draws=1)
    n = len(IDS)
    causal = torch.ones(n, n).tril() > 0
    whole = differences(hf, IDS, torch.where(causal, 0.0, -torch.inf), 9, 4)
    assert close(float(result["difference"]), whole, of=10.0)
    for key in range(n - 1):
        for name, first in (("cut_from_last", n - 1), ("cut_from_all", key + 1)):
            seen = causal.clone()
            seen[first:, key] = False
            cut = differences(hf, IDS, torch.where(seen, 0.0, -torch.inf), 9, 4)
            assert close(float(result[name][key]), whole - cut, of=10.0), (name, key)
    assert result["cut_from_last"][-1].isnan()
    assert result["cut_from_all"][-1].isnan()


def test_reference_of_parts() -> None:
    """A head's part by the formula, and all parts with embedding and biases sum to the model's own difference."""
    hf, kept = twin("gpt2"), {}
    result = pb.why(pb.load(hf), IDS, answer=9, against=4, draws=1)
    projection = hf.transformer.h[1].attn.c_proj
    hook = projection.register_forward_pre_hook(lambda module, given: kept.update(z=given[0][0, -1].double()))
    with torch.no_grad():
        stream = hf(torch.tensor([IDS]), output_hidden_states=True)
    hook.remove()
    last = [None]
    hook = hf.transformer.ln_f.register_forward_pre_hook(
        lambda module, given: last.__setitem__(0, given[0][0, -1].double())
    )
    with torch.no_grad():
        hf(torch.tensor([IDS]))
    hook.remove()
    norm, n_heads = hf.transformer.ln_f, hf.config.n_head
    rate = 1.0 / (last[0].var(unbiased=False) + norm.eps).sqrt()
    reads = (hf.lm_head.weight[9] - hf.lm_head.weight[4]).double() * norm.weight.double()
    width = len(kept["z"]) // n_heads
    for head in range(n_heads):
        at = slice(head * width, (head + 1) * width)
        write = kept["z"][at] @ projection.weight[at].double()
        by_hand = float(((write - write.mean()) * rate @ reads).detach())
        place = [str(part) for part in result.parts or ()].index(f"L1.H{head}")
        assert close(float(result["attribution"][place]), by_hand, of=10.0)
    own = float(stream.logits[0, -1, 9] - stream.logits[0, -1, 4])
    summed = {row["what"]: row["logits"] for row in result.tables["sums"]}
    pieces = [value for name, value in summed.items() if name not in ("sum", "the model's own difference", "remainder")]
    assert close(sum(pieces), own, of=10.0)
    assert summed["remainder"] == pytest.approx(summed["the model's own difference"] - sum(pieces))
    heads = sum(
        float(v) for part, v in zip(result.parts or (), result["attribution"], strict=True) if part.kind == "head"
    )
    assert close(summed[f"{n_heads * hf.config.n_layer} heads"], heads, of=10.0)


def test_null() -> None:
    """Where attention writes nothing, no token and no head is said to matter; unrelated numbers do not agree over positions."""
    hf = twin("gpt2")
    with torch.no_grad():
        for block in hf.transformer.h:
            block.attn.c_proj.weight.zero_()
    result = pb.why(pb.load(hf), IDS, draws=3)
    assert float(result["cut_from_last"][:-1].abs().max()) < 1e-5
    assert float(result["cut_from_all"][:-1].abs().max()) < 1e-5
    assert not [row for row in result.tables["causal check"] if row["kind"].startswith("heads")]
    generator = torch.Generator().manual_seed(0)
    ps = [_agreement(*torch.randn(2, 12, generator=generator).double(), seed)[1] for seed in range(16)]
    assert sum(p <= 0.05 for p in ps) <= 4
    assert _agreement(torch.arange(12).double(), torch.arange(12).double() ** 3, 0)[1] == pytest.approx(1 / 1000)


def test_sections_print_in_order_and_the_result_is_like_every_other(answered: pb.Result, tmp_path: Path) -> None:
    assert list(answered.tables) == SECTIONS
    printed = str(answered)
    places = [printed.index(f"{title}\n") for title in SECTIONS]
    assert places == sorted(places)
    assert answered.unit == "logits"
    assert answered.provenance["method"] == "stories.why"
    assert answered.provenance["options"]["prompt"] == PROMPT
    assert abs(float(answered["remainder"])) < 1e-4
    answered.save(tmp_path / "saved")
    again = load_result(tmp_path / "saved")
    assert again.equal(answered)
    assert str(again) == printed
    assert pb.replay(again).agrees
    assert answered._repr_html_().count("<table>") == sum(bool(rows) for rows in answered.tables.values())


def test_what_is_heard_is_what_is_returned(answered: pb.Result) -> None:
    heard: list[Section] = []
    with listening(heard.append):
        again = pb.why(pb.load("tiny"), PROMPT)
    assert heard[0].title == "cost"
    assert re.search(r"19 tokens; one run takes .* 36 cuts of attention", heard[0].said[0])
    assert [section.title for section in heard[1:]] == SECTIONS
    assert {section.title: section.rows for section in heard[1:]} == again.tables
    assert again.equal(answered)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2"])
def test_it_stays_under_twelve_forward_passes_beside_its_sweeps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens through the layers, a graph counted thrice, without the rows of cuts and removals; and the cost that is said first."""
    model, paused, tokens = pb.load(twin(name)), [0], [0.0]

    def counted(module: Any, given: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        if not paused[0]:
            tokens[0] += x.numel() / x.shape[-1] * (3 if torch.is_grad_enabled() else 1)

    def resting(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            paused[0] += 1
            try:
                return function(*args, **kwargs)
            finally:
                paused[0] -= 1

        return call

    monkeypatch.setattr(_why_tokens, "sweep", resting(_why_tokens.sweep))
    monkeypatch.setattr(_why_causal, "measured", resting(_why_causal.measured))
    hooks = [at.layer.register_forward_hook(counted) for at in model.modules]
    heard: list[Section] = []
    with listening(heard.append):
        pb.why(model, IDS, draws=3)
    for hook in hooks:
        hook.remove()
    passes = tokens[0] / (len(IDS) * model.n_layers)
    assert 3 <= passes <= 12
    assert passes <= why.PASSES
    assert f"About {why.PASSES} forward passes" in heard[0].said[0]


def test_two_prompts_of_one_answer_differ_by_what_is_asked() -> None:
    model = pb.load("tiny")
    whole, turned = (
        pb.why(model, PROMPT, answer=a, against=b, draws=1) for a, b in ((" Grerum", " Budurg"), (" Budurg", " Grerum"))
    )
    assert float(whole["difference"]) == pytest.approx(-float(turned["difference"]))
    assert close(whole["attribution"], -turned["attribution"])
    assert whole.tables["next tokens"][0]["role"] == "against"


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("llama", set()),
        ("qwen3_moe", {"neurons"}),
        ("gemma2", set()),
        ("mamba", {"neurons", "heads read"}),
        ("bloom", set()),
    ],
)
def test_families_make_every_section_or_say_why_not(name: str, lacking: set[str]) -> None:
    result = pb.why(pb.load(twin(name)), IDS, draws=2)
    refused = {note.split(": ")[0] for note in result.notes if ": not made: " in note}
    assert refused == lacking
    assert abs(float(result["remainder"])) < 1e-3 * max(1.0, float(result["attribution"].abs().max()))
    assert ("experts" in result.tables) == (name == "qwen3_moe")
    cut = "mamba" not in name
    assert bool(result["cut_from_last"].isnan().all()) != cut
    if not cut:
        assert any("cannot be cut token by token" in note for note in result.notes)
        assert not result["gradient_x_input"].isnan().any()
        assert result.tables["causal check"][0]["kind"].startswith("mixers")


def test_a_prompt_of_one_token_is_explained_but_not_cut() -> None:
    result = pb.why(pb.load(twin("llama")), [7], draws=2)
    assert "tokens: not cut: the prompt is one token, which nothing else looks at" in result.notes
    assert any("zero in their place" in note for note in result.notes)
    assert abs(float(result["remainder"])) < 1e-4


def test_an_answer_of_several_tokens_is_its_first_and_said() -> None:
    result = pb.why(pb.load("tiny"), PROMPT, answer=" Budurg is", draws=1)
    assert (
        "next tokens: answer ' Budurg is' is 2 tokens (' Budurg', ' is'): what is explained is the first, ' Budurg'"
        in result.notes
    )


@pytest.mark.parametrize(
    ("prompt", "given", "says"),
    [
        ("", {}, "prompt 0 is empty"),
        ([PROMPT, PROMPT], {}, "why takes one prompt, got 2"),
        (PROMPT, {"answer": " Xqzt"}, "the tokenizer does not know"),
        (PROMPT, {"answer": ""}, "leave it out for the most likely token"),
        (PROMPT, {"answer": 10**6}, "ids of this model are 0 to"),
        (PROMPT, {"answer": " Budurg", "against": " Budurg"}, "nothing stands between them"),
        (PROMPT, {"draws": 0}, "at least 1"),
        (PROMPT, {"answr": "x"}, "did you mean"),
    ],
)
def test_refusals(prompt: Any, given: dict[str, Any], says: str) -> None:
    with pytest.raises(PatchbayError, match=says):
        pb.why(pb.load("tiny"), prompt, **given)


def invoke(*args: str) -> Any:
    return CliRunner().invoke(cli, ["why", *args], prog_name="patchbay")


def test_the_command_prints_the_sections_and_writes_page_and_folder(answered: pb.Result, tmp_path: Path) -> None:
    page, folder = tmp_path / "why.html", tmp_path / "why"
    done = invoke("tiny", PROMPT, "--report", str(page), "--out", str(folder))
    assert done.exit_code == 0, done.output
    assert [line.strip() for line in done.stdout.splitlines() if line.strip() in SECTIONS] == SECTIONS
    assert "forward passes" in done.stderr
    assert load_result(folder).equal(answered)
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    for row in answered.tables["parts"]:
        shown = re.search(rf"<td[^>]*>{row['part']}</td><td class=\"number\">(-?[\d.e-]+)</td>", text)
        assert shown is not None, row
        assert float(shown[1]) == pytest.approx(row["logits"], rel=1e-3, abs=1e-3)
    again = invoke("tiny", PROMPT, "--report", str(page))
    assert again.exit_code == 2
    assert "--overwrite replaces it" in again.output


def test_the_command_as_json_and_its_refusals(answered: pb.Result, tmp_path: Path) -> None:
    done = invoke("tiny", PROMPT, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["tables"]["parts"] == answered.tables["parts"]
    assert invoke("tiny", PROMPT, "--answer", "#132", "--draws", "1").exit_code == 0
    for args in ([""], [PROMPT, "--answer", " Xqzt"], [PROMPT, "--draws", "0"], [PROMPT, "--report", str(tmp_path / "page.pdf")],
                 [PROMPT, "--out", str(tmp_path / "none" / "here")], []):  # fmt: skip
        refused = invoke("tiny", *args)
        assert refused.exit_code == 2, (args, refused.output)
        assert "Traceback" not in refused.output


@pytest.mark.parametrize("name", ["gpt2-sp512-tinystories-0.28m", "gpt2-char-tinystories-0.2m", "stories260K"])
def test_checkpoints_of_others(name: str) -> None:
    if not (SHARED / "models" / name).is_dir():
        pytest.skip(f"{SHARED / 'models' / name} is not there")
    result = pb.why(pb.load(SHARED / "models" / name), "Once upon a time there was a", draws=5)
    assert abs(float(result["remainder"])) < 1e-3
    assert not [note for note in result.notes if ": not made: " in note]


def test_the_page_says_what_tiny_says(answered: pb.Result) -> None:
    page = (Path(__file__).parents[2] / "docs" / "why.md").read_text(encoding="utf-8")
    [said] = re.findall(r"```text\n(.*?)\n```", page, re.DOTALL)
    assert said.splitlines() == {title: lines for title, _, lines in answered.sections()}["in short"]


def test_parts_against_are_ranked_from_the_other_end() -> None:
    """What speaks against the answer is missed where the difference rises: its p counts random sets that raise it as much."""
    against = _row(
        Chosen("head", {Part(1, "head", 0): -3.0}), -5.0, torch.tensor([-1.0, 0.0, 6.0], dtype=torch.float64)
    )
    assert (against["kind"], against["p"]) == ("heads against", 1 / 4)
    towards = _row(Chosen("head", {Part(1, "head", 0): 3.0}), 5.0, torch.tensor([-1.0, 0.0, 6.0], dtype=torch.float64))
    assert (towards["kind"], towards["p"]) == ("heads for", 2 / 4)
