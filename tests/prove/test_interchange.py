"""Interchange: each mechanism where it was built in; equals hooks put on by hand; nothing in a random model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.tiny import planted
from tests.tolerance import close

OUTCOMES = ["positional", "lexical", "reflexive", "none", "other"]


def test_planted(pointer_model: Any, binding: Any) -> None:
    """Entering block 0 nothing, block 1 the key, block 2 the place, and at the end the answer itself; each clear of chance."""
    model, task = pointer_model(), binding()
    result = pb.prove.interchange(model, task)
    assert result.coords["condition"] == OUTCOMES
    expected = torch.tensor([[0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0]])
    assert torch.equal(result.values, expected.double())
    assert torch.allclose(result["probability"], expected.double(), atol=0.01)
    assert result["base"].tolist() == [0, 0, 0, 1, 0]
    for depth, mechanism in ((1, 1), (2, 0), (3, 2)):
        assert result["p_adjusted"][depth, mechanism] < 1e-3
        assert result["control"][depth, mechanism] < 0.5
        assert result["low"][depth, mechanism] == 1.0
    assert result["p_adjusted"][0, :3].min() == 1.0
    assert [note.split(":")[0] for note in result.notes] == ["positional", "lexical", "reflexive"]


def by_hand(model: pb.Model, task: pb.Task, depth: int) -> Tensor:
    """Distribution over the candidates, plain hooks: the twin's hidden state at the last token, put in before a block."""
    hf: Any = model.hf
    gpt2 = hasattr(hf, "transformer")
    blocks, norm = (hf.transformer.h, hf.transformer.ln_f) if gpt2 else (hf.model.layers, hf.model.norm)
    out = []
    for i, (clean, twin) in enumerate(zip(task.clean, task.corrupted or (), strict=True)):
        module = blocks[depth] if depth < len(blocks) else norm  # what enters the final norm left the last block
        seen: list[Tensor] = []

        def keep(_: Any, args: Any, kwargs: Any, seen: list[Tensor] = seen) -> None:
            seen.append((args[0] if args else kwargs["hidden_states"])[0, -1].clone())

        def put(_: Any, args: Any, kwargs: Any, seen: list[Tensor] = seen) -> Any:
            x = (args[0] if args else kwargs["hidden_states"]).clone()
            x[0, -1] = seen[0]
            return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

        for hook, ids_ in ((keep, twin), (put, clean)):
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            with torch.no_grad():
                logits = hf(torch.tensor([list(ids_)])).logits[0, -1].double()
            handle.remove()
        order = list(task.wrong[i])
        order.insert(task.labels["asked"][i], task.right[i])
        out.append(logits[order].softmax(0))
    return torch.stack(out)


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_reference(form: Any, binding: Any) -> None:
    built = planted.null(form=form, seed=2)
    model, task = pb.load(built.model, built.tokenizer), binding(8, boxes=4)
    result = pb.prove.interchange(model, task, batch_size=3)
    for depth in range(model.n_layers + 1):
        distribution = by_hand(model, task, depth)
        assert close(result["distribution"][depth], distribution)
        for m, name in enumerate(("positional", "lexical", "reflexive", "asked")):
            hits = [float(row.argmax() == place) for row, place in zip(distribution, task.labels[name], strict=True)]
            assert float(result["share"][depth, m]) == pytest.approx(sum(hits) / 8)
            own = [float(row[place]) for row, place in zip(distribution, task.labels[name], strict=True)]
            assert close(float(result["probability"][depth, m]), sum(own) / 8, of=result["probability"])
    assert result["share"][0, 3] == result["base"][3]
    assert close(result["share"].sum(1), 1.0)


def test_null(binding: Any) -> None:
    """In random models no mechanism is clear of a random twin's stream."""
    for seed in (0, 1, 2):
        built = planted.null(seed=seed, d_model=64, d_mlp=16, n_positions=32)
        model = pb.load(built.model, built.tokenizer)
        result = pb.prove.interchange(model, binding(40, seed=seed))
        assert result["p_adjusted"][:, :3].min() > 0.05
        assert (result["share"] - result["control"])[:, :3].abs().max() < 0.35
        assert "no mechanism is clear" in result.notes[0]


def test_the_three_identities(pointer_model: Any, binding: Any) -> None:
    """The twin itself as twin changes nothing; the embedding is the same word; after the last block the twin answers."""
    model, task = pointer_model(seed=1), binding(6)
    same = pb.Task("self", task.clean, task.right, task.wrong, task.clean, labels=task.labels)
    itself = pb.prove.interchange(model, same)
    assert torch.equal(itself["distribution"], itself["clean_distribution"].expand(4, -1, -1))
    result = pb.prove.interchange(model, task, layers=[3, 0])
    assert result.labels_of("layer") == [0, 3]
    assert torch.equal(result["distribution"][0], result["clean_distribution"])
    twins = pb.run(model, [list(row) for row in task.corrupted or ()], logits="last").last_logits.double()
    for i in range(len(task)):
        order = list(task.wrong[i])
        order.insert(task.labels["asked"][i], task.right[i])
        assert close(result["distribution"][1, i], twins[i, order].softmax(0))


def test_errors_say_what_is_missing(pointer_model: Any, binding: Any) -> None:
    model, task = pointer_model(), binding(4)
    with pytest.raises(
        pb.PatchbayError, match=r"lacks the labels positional, lexical, reflexive, asked.*binding_counterfactuals"
    ):
        pb.prove.interchange(model, pb.Task("own", task.clean, task.right, task.wrong, task.corrupted))
    with pytest.raises(pb.PatchbayError, match=r"layers=\[4\]: possible are 0 to 3"):
        pb.prove.interchange(model, task, layers=[4])
    labels = {**task.labels, "lexical": task.labels["positional"]}
    with pytest.raises(pb.PatchbayError, match=r"prompt 0.*different places"):
        pb.prove.interchange(model, pb.Task("own", task.clean, task.right, task.wrong, task.corrupted, labels=labels))
    with pytest.raises(pb.PatchbayError, match="2 candidates"):
        pb.prove.interchange(
            model,
            pb.Task("own", task.clean, task.right, [w[:1] for w in task.wrong], task.corrupted, labels=task.labels),
        )


def test_at_another_token_equals_hooks_by_hand(binding: Any) -> None:
    """With at="query" the twin's stream at the question's key is put in, wherever that stands in each prompt."""
    model = pb.load("tiny-llama")
    task = pb.tasks.binding_counterfactuals(model, 6, boxes=4)
    result = pb.prove.interchange(model, task, at="query", batch_size=4)
    for depth in range(model.n_layers + 1):
        port = pb.Port("resid_in", depth) if depth < model.n_layers else pb.Port("resid_out", depth - 1)
        for i in range(len(task)):
            (place,) = task.marks["query"][i]
            stream = pb.run(model, [list((task.corrupted or ())[i])], taps=[port])[port][0, place]
            put = pb.replace(port, stream[None], positions=place)
            logits = pb.run(model, [list(task.clean[i])], edits=[put]).last_logits[0].double()
            order = list(task.wrong[i])
            order.insert(task.labels["asked"][i], task.right[i])
            # a share carries the rounding of its logits, which are larger
            assert close(result["distribution"][depth, i], logits[order].softmax(0), of=logits)
    assert torch.equal(result["share"][-1], result["base"])  # after the last block that token is read by nobody
    with pytest.raises(pb.PatchbayError, match=r"at='key'.*no mark of that name; possible: last, .*query"):
        pb.prove.interchange(model, task, at="key")
    with pytest.raises(pb.PatchbayError, match=r"at='objects'.*not one position"):
        pb.prove.interchange(model, task, at="objects")
