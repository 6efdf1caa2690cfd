"""turn.block: cut weights are 0 and rows add up to 1, as a softmax over what is left; a query keeps its own position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.tiny import planted, twins
from tests.tolerance import close


def ids(n: int = 2, length: int = 8) -> Tensor:
    return torch.randint(3, 60, (n, length), generator=torch.Generator().manual_seed(0))


def patterns(model: pb.Model, tokens: Any, *edits: Any) -> list[Tensor]:
    ports = [pb.Port("attn.pattern", layer) for layer in range(model.n_layers)]
    trace = pb.run(model, tokens, taps=ports, edits=edits)
    return [trace[port] for port in ports]


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """The planted copy head cannot copy what it cannot see; blocked from another word it copies on."""
    built = planted.copy(form=form, seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    prompts = [model.tokenizer.encode(prompt) for prompt in truth["prompts"]]  # type: ignore[union-attr]
    right = [model.token_id(word) for word in truth["answers"]]
    task = pb.Task("copy", prompts, right, metric="log_probability", marks={"marked": [[n] for n in range(12)]})

    def said(*knobs: Any) -> Tensor:
        return pb.run(model, prompts, edits=list(knobs)).last_logits.gather(1, torch.tensor(right)[:, None])[:, 0]

    assert said().min() > 5
    assert said(pb.turn.block(model, "marked", of=task)).abs().max() < 1.0
    head = pb.turn.block(model, "marked", queries="last", parts=[truth["copy"]], of=task)
    assert said(head).abs().max() < 1.0
    assert (said(pb.turn.block(model, [13, 14], queries="last")) - said()).abs().max() < 0.5


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mistral", "gpt_neo", "bloom", "gpt_oss"])
def test_reference(name: str) -> None:
    """Layer 0: the plain pattern with the cut entries set to 0 and each row divided by its sum (sinks: by what is left)."""
    model, tokens = pb.load(twins.twin(name)), ids()
    knob = pb.turn.block(model, "1:4", parts=["L0"])  # type: ignore[list-item]
    plain, cut = patterns(model, tokens)[0], patterns(model, tokens, knob)[0]
    expected = plain.clone()
    for query in range(tokens.shape[1]):
        for key in range(1, 4):
            if key != query:
                expected[:, :, query, key] = 0.0
    left = expected.sum(-1, keepdim=True)
    if (
        name == "gpt_oss"
    ):  # the sink takes part in the softmax and is no key: what the row lacks to 1, with the rounding of 1
        left = left + 1.0 - plain.sum(-1, keepdim=True)
        assert close(cut, expected / left, of=1.0 / left.min(), noise=4)
    else:
        assert close(cut, expected / left)
        assert close(cut.sum(-1), 1)
    assert (cut[:, :, 5, 1:4] == 0).all()
    assert all((one.diagonal(0, -2, -1) > 0).all() for one in patterns(model, tokens, knob))


def test_cut_from_all_the_span_is_as_if_it_were_not_there() -> None:
    """Keys cut from every other query in every layer: the last logits do not depend on the words that stood there."""
    model, tokens = pb.load(twins.twin("llama")), ids()
    other = tokens.clone()
    other[:, 2:4] = (other[:, 2:4] + 7) % 60
    knob = pb.turn.block(model, "2:4")
    a, b = (pb.run(model, one, edits=[knob]).last_logits for one in (tokens, other))
    assert torch.equal(a, b)
    direct = pb.turn.block(model, "2:4", queries="last")
    a, b = (pb.run(model, one, edits=[direct]).last_logits for one in (tokens, other))
    assert (a - b).abs().max() > 1e-3  # by way of the others


def test_places_and_marks_mean_the_same() -> None:
    model, tokens = pb.load(twins.twin("llama")), ids(2, 8).tolist()
    alike = pb.Task("own", tokens, [1, 1], metric="log_probability", marks={"span": [[2, 3], [2, 3]]})
    apart = pb.Task("own", tokens, [1, 1], metric="log_probability", marks={"span": [[2, 3], [4]]})
    logits = [
        pb.run(model, tokens, edits=[knob]).logits
        for knob in (
            pb.turn.block(model, "2:4"),
            pb.turn.block(model, [2, 3], queries="0:8"),
            pb.turn.block(model, [2, 3], queries=list(range(8))),
            pb.turn.block(model, "span", of=alike),
        )
    ]
    assert all(close(one, logits[0]) for one in logits)
    mixed = pb.run(model, tokens, edits=[pb.turn.block(model, "span", of=apart)]).logits
    assert close(mixed[0], logits[0][0])
    alone = pb.run(model, tokens[1:], edits=[pb.turn.block(model, 4)]).logits
    assert close(mixed[1], alone[0])


def test_null() -> None:
    """At 0 nothing is cut, bit for bit; a key that comes after the query was never seen."""
    model, tokens = pb.load(twins.twin("llama")), ids()
    plain = pb.run(model, tokens).logits
    knob = pb.turn.block(model, [6], queries=[7])
    assert torch.equal(pb.run(model, tokens, edits=[knob.at(0.0)]).logits, plain)
    cut = pb.run(model, tokens, edits=[knob]).logits
    assert close(cut[:, :7], plain[:, :7])
    assert not torch.allclose(cut[:, 7], plain[:, 7], atol=1e-4)


def test_errors() -> None:
    model = pb.load(twins.twin("llama"))
    task = pb.Task("own", [[3, 4, 5]], [1], metric="log_probability", marks={"span": [[1]]})

    def block(keys: Any, **options: Any) -> Any:
        return pb.turn.block(model, keys, **options)

    for keys, options, message in (
        ("spam", {"of": task}, r"marks of task own are span.*did you mean 'span'"),
        ("spam", {}, "written"),
        (None, {}, "which keys"),
        ("2:", {}, "both ends"),
        ([-1], {}, "counted from the start"),
        ([3], {"queries": "0:3"}, "nothing to cut"),
        ([1], {"parts": ["L0.N3"]}, "no attention of its own"),
        ([1], {"parts": ["L0.H9"]}, r"L0\.H9"),
        ([1], {"parts": []}, "no parts"),
        ([1.5], {}, "whole number"),
        ("span", {"queries": "generated", "of": task}, "beside a mark"),
    ):
        with pytest.raises(pb.PatchbayError, match=message):
            block(keys, **options)
    with pytest.raises(pb.PatchbayError, match="pattern"):
        pb.turn.block(pb.load(twins.twin("mamba2")), [1])
    with pytest.raises(pb.PatchbayError, match="no key to attend to"):
        pb.run(
            model,
            [[3, 4, 5]],
            edits=[
                pb.turn.block(model, "0:3", queries="last").edits[0],
                pb.block(pb.Port("attn.pattern", 0), query=-1, key=[2]),
            ],
        )
