"""inspect_ai itself, with a model under a knob from a file: equal to direct calls; log-probabilities of prompts; its samples as items."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.measure.words import reader
from tests.tolerance import close

pytest.importorskip("inspect_ai", reason="inspect_ai is an extra, and is not installed here")
ours: Any = pytest.importorskip("patchbay.measure.inspect_ai")
pytestmark = pytest.mark.filterwarnings("ignore")  # of packages of others


def api(knob: Any = None) -> Any:
    return ours.PatchbayAPI("reader", patchbay_model=reader("characters", "gpt2"), knob=knob)


def said(one: Any, text: str, **config: Any) -> Any:
    from inspect_ai.model import ChatMessageUser, GenerateConfig

    return asyncio.run(one.generate([ChatMessageUser(content=text)], [], "none", GenerateConfig(**config)))


def test_it_writes_what_the_model_writes_under_the_knob_of_a_file(tmp_path: Path) -> None:
    model = reader("characters", "gpt2")
    knob = pb.turn.scale(["L1.H1"], -4.0, model=model)
    file = knob.save(tmp_path / "k.knob")
    assert said(api(), "the cat", max_tokens=10).completion == model.generate("the cat", 10)[7:]
    with model.edited(knob.at(-8.0)):
        expected = model.generate("the cat", 10)[7:]
    assert said(api(f"{file}@-8"), "the cat", max_tokens=10).completion == expected
    assert said(api(), "the cat", max_tokens=10, temperature=1.0, seed=3).completion == said(api(), "the cat", max_tokens=10, temperature=1.0, seed=3).completion  # fmt: skip


def test_a_text_ends_where_it_is_asked_to_and_says_why() -> None:
    """At the stop that comes first, whatever their order; a text that had no more room is not one that stopped."""
    whole = said(api(), "the cat", max_tokens=30)
    letters = whole.completion
    assert whole.stop_reason == "max_tokens"
    assert letters == reader("characters", "gpt2").generate("the cat", 30)[len("the cat") :], (
        "special tokens are no text"
    )
    early, late = letters[1], next(letter for letter in letters[2:] if letter not in letters[:2])
    for stops in ([early, late], [late, early]):
        cut = said(api(), "the cat", max_tokens=30, stop_seqs=stops)
        assert (cut.stop_reason, cut.completion) == ("stop", letters[: letters.index(early)])


def test_epochs_of_a_sample_are_draws_of_their_own() -> None:
    one = api()
    drawn = [said(one, "the cat", max_tokens=10, temperature=1.0).completion for _ in range(3)]
    assert len(set(drawn)) == 3
    again = api()
    assert [said(again, "the cat", max_tokens=10, temperature=1.0).completion for _ in range(3)] == drawn


def test_log_probabilities_of_a_prompt_are_those_of_the_text() -> None:
    model = reader("characters", "gpt2")
    found = said(api(), "the cat sat", max_tokens=1, prompt_logprobs=1).choices[0].prompt_logprobs.content
    [ids] = model.encode(["the cat sat"])
    assert len(found) == len(ids) - 1
    loss = float(pb.measure.text_loss(model, ["the cat sat"], unit="token")["per_item"][0])
    assert close(-sum(one.logprob for one in found), loss, of=10.0)
    assert asyncio.run(api().tokenize("the cat")) == model.encode(["the cat"])[0]


def test_it_is_found_by_name_and_runs_an_evaluation(tmp_path: Path) -> None:
    import inspect_ai
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate

    model = reader("characters", "gpt2")
    text = model.generate("the cat", 6)[7:]
    task = inspect_ai.Task(
        dataset=[Sample(input="the cat", target=text), Sample(input="the cat", target="zzzz")],
        solver=generate(),
        scorer=includes(ignore_case=False),
    )
    lent = inspect_ai.model.get_model(
        "patchbay/reader", config=inspect_ai.model.GenerateConfig(max_tokens=6), memoize=False, patchbay_model=model
    )
    [log] = inspect_ai.eval(task, model=lent, log_dir=str(tmp_path), display="none")
    assert log.status == "success"
    assert log.results.scores[0].metrics["accuracy"].value == 0.5


def test_samples_are_items_and_what_cannot_be_taken_is_refused() -> None:
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig

    rows = ours.items(
        [
            Sample(input="the cat", choices=["sat", "ran"], target="B", id=1),
            Sample(input="a dog", choices=["is", "it"], target="is", id=2),
        ]
    )
    found = pb.measure.answer_choices(reader("characters", "gpt2"), rows)
    assert torch.isfinite(found.values)
    assert [row["answer"] for row in rows] == [1, 0]
    for config, lost in (({"frequency_penalty": 1.0, "num_choices": 2}, "frequency_penalty, num_choices: not heard"), ({"top_p": 0.5}, "top_p without temperature"), ({"logprobs": True}, "logprobs")):  # fmt: skip
        with pytest.raises(pb.PatchbayError, match=lost):
            said(api(), "the cat", **config)
    talk = [ChatMessageSystem(content="be brief"), ChatMessageUser(content="the cat")]
    with pytest.raises(pb.PatchbayError, match="messages of system, user need a chat template"):
        asyncio.run(api().generate(talk, [], "none", GenerateConfig()))
    with pytest.raises(pb.PatchbayError, match="model arguments port: not taken"):
        ours.PatchbayAPI("reader", patchbay_model=reader("characters", "gpt2"), port=1)
