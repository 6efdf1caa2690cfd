"""Retrieval heads: the planted copying head, the positional trap, the definition as loops, nothing in a random model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.find.retrieval_heads import _dealt
from patchbay.tiny import planted
from patchbay.tiny.planted_canvas import Canvas, Form
from patchbay.tiny.planted_vocabulary import tokenizer
from tests.given import gpt2
from tests.tolerance import close


def repeats(model: pb.Model, n: int, **options: Any) -> pb.Task:
    """Repeated tokens with the needle where the answer stood the first time."""
    task = pb.tasks.repeated_tokens(model, n, **options)
    return pb.Task("copy", task.clean, task.right, marks={"needle": task.marks["source"]}, metric="probability")


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """The induction head attends to the very token that is said, in every run; so does its set, and nobody else."""
    built = planted.induction(form=form, seed=0)
    model = pb.load(built.model, built.tokenizer)
    result = pb.find.retrieval_heads(model, repeats(model, 12))
    best, second = result.table(2)
    assert str(best["part"]) == built.truth["induction"]
    assert best["value"] == best["count"] == best["activation"] == best["without_first"] == 1.0
    assert best["p_adjusted"] <= 0.05 < second["p_adjusted"]
    assert best["null"] < 0.5
    assert second["value"] <= 0.35
    assert float(result["success"]) == 1.0
    assert result.tables["grid"][0]["best_score"] == 1.0


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted_positional_head_is_exposed(form: Form) -> None:
    """A head that looks 6 back copies every needle that lies 6 back: score 1, and its null is 1 too."""
    canvas = Canvas(form, 0)
    words = canvas.take(canvas.n_vocab)
    canvas.embed(words)
    head = canvas.pick_head(1)
    q, k = canvas.offset_maps(6, 25.0)
    canvas.set_head(1, head, q=q, k=k, v=words.T, o=4.0 * words)
    canvas.unembed(6.0 * words)
    model = pb.load(canvas.model, tokenizer())
    rows = [torch.randperm(60, generator=torch.Generator().manual_seed(i))[: 10 + i].add(3).tolist() for i in range(8)]
    task = pb.Task(
        "fixed", rows, [row[-7] for row in rows], marks={"needle": [[len(row) - 7] for row in rows]}, metric="rank"
    )
    row = pb.find.retrieval_heads(model, task).table(1)[0]
    assert str(row["part"]) == f"L1.H{head}"
    assert row["value"] == row["null"] == row["p"] == 1.0


def test_permuting_the_haystack_changes_nothing() -> None:
    built = planted.induction(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = repeats(model, 6)
    source = [places[0] for places in task.marks["needle"]]
    mixed = []
    for ids, place in zip(task.clean, source, strict=True):
        free = [i for i in range(len(ids) - 1) if i not in (place, place - 1)]
        moved = dict(zip(free, reversed(free), strict=True))
        mixed.append([ids[moved.get(i, i)] for i in range(len(ids))])
    other = pb.Task("mixed", mixed, task.right, marks=task.marks, metric="probability")
    a, b = (pb.find.retrieval_heads(model, t).table(1)[0] for t in (task, other))
    assert (a["part"], a["value"]) == (b["part"], b["value"])


def test_equal_attention_counts_as_the_first() -> None:
    """Even attention is attention to the first position: nothing is copied, unless the needle stands there."""
    built = planted.induction(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = repeats(model, 4)
    with model.edited(*(pb.zero(layer.attn.k) for layer in model.layers)):
        result = pb.find.retrieval_heads(model, task, all_runs=True)
    said = [int(model.hf(torch.tensor([ids])).logits[0, -1].argmax()) for ids in task.clean]
    at_first = [
        float(places == (0,) and ids[0] == token)
        for ids, places, token in zip(task.clean, task.marks["needle"], said, strict=True)
    ]
    assert close(result.values, torch.full((2, 4), sum(at_first) / 4))


@pytest.mark.parametrize("mode", ["set", "count"])
def test_reference(mode: Any) -> None:
    """The paper's definition as loops over Hugging Face's own greedy steps and attentions, in both modes."""
    hf = gpt2(0, vocab_size=12, start=0)
    with torch.no_grad():
        hf.transformer.wpe.weight.mul_(20)  # so that what is said and looked at varies
        for block in hf.transformer.h:
            block.attn.c_attn.weight.mul_(6)
    rows = [torch.randint(2, 12, (n,)).tolist() for n in (14, 10, 18, 12, 16, 11)]
    needles = [[2, 3, 5], [1, 4, 7], [9, 10, 11], [3, 4, 6], [8, 2, 12], [5, 6, 9]]
    task = pb.Task("any", rows, [3] * 6, marks={"needle": needles}, metric="rank")
    result = pb.find.retrieval_heads(pb.load(hf), task, mode=mode, n_tokens=4, all_runs=True, batch_size=4)
    hf.set_attn_implementation("eager")
    score, fired, bare, n_good = torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 4), 0
    for row, places in zip(rows, needles, strict=True):
        ids, needle = list(row), [row[p] for p in places]
        copied: dict[tuple[int, int], list[int]] = {(i, h): [] for i in range(2) for h in range(4)}
        copied_bare: dict[tuple[int, int], list[int]] = {key: [] for key in copied}
        for _ in range(4):
            with torch.no_grad():
                out = hf(torch.tensor([ids]), output_attentions=True)
            token = int(out.logits[0, -1].argmax())
            for i, h in copied:
                last = out.attentions[i][0, h, -1]
                for found, start in ((copied, 0), (copied_bare, 1)):
                    top = max(range(start, len(ids)), key=lambda j, last=last: float(last[j]))
                    if top in places and ids[top] == token:
                        found[i, h].append(token)
            ids.append(token)
        for (i, h), tokens in copied.items():
            size = (len(set(tokens)) / len(set(needle))) if mode == "set" else len(tokens) / len(needle)
            other = copied_bare[i, h]
            score[i, h] += size / 6
            fired[i, h] += bool(tokens) / 6
            bare[i, h] += (len(set(other)) / len(set(needle)) if mode == "set" else len(other) / len(needle)) / 6
        left = list(needle)
        for token in ids[len(row) :]:
            if token in left:
                left.remove(token)
        n_good += len(left) < len(needle) / 2
    assert score.max() > 0
    assert close(result.values, score)
    assert close(result["activation"], fired)
    assert close(result["without_first"], bare)
    assert float(result["success"]) == pytest.approx(n_good / 6)
    assert (result["set"] <= 1.0).all()


def test_null() -> None:
    """In a random model no head copies more than it copies of needles dealt to other runs."""
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    result = pb.find.retrieval_heads(model, repeats(model, 30), all_runs=True)
    assert (result["p_adjusted"] > 0.05).all()
    assert result.values.max() < 0.2


def test_a_grid_of_lengths_and_depths() -> None:
    model = pb.load("tiny-llama")
    task = pb.Task.joined(
        [pb.tasks.needle_retrieval(model, 3, length=n, depth=d) for n in (12, 30) for d in (0.0, 1.0)]
    )
    result = pb.find.retrieval_heads(model, task, batch_size=16)
    grid = {(row["length"], row["depth"]): row for row in result.tables["grid"]}
    assert set(grid) == {(12, 0.0), (12, 1.0), (30, 0.0), (30, 1.0)}
    assert all(row["runs"] == 3 for row in grid.values())
    assert float(result["n_runs"]) == sum(row["success"] for row in grid.values())


def test_errors() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    plain = pb.tasks.repeated_tokens(model, 3)
    with pytest.raises(pb.PatchbayError, match="needs the mark needle.*needle_retrieval"):
        pb.find.retrieval_heads(model, plain)
    said = pb.run(model, plain, logits="last").last_logits.argmax(-1).tolist()
    places = [
        [next(i for i, token in enumerate(ids) if token != own)] for ids, own in zip(plain.clean, said, strict=True)
    ]
    task = pb.Task("never", plain.clean, plain.right, marks={"needle": places}, metric="rank")
    with pytest.raises(pb.PatchbayError, match="in none of 3 runs.*all_runs=True"):
        pb.find.retrieval_heads(model, task)
    for options, words in (
        ({"mode": "bag"}, "mode='bag'"),
        ({"n_tokens": 0}, "n_tokens=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ):
        with pytest.raises(pb.PatchbayError, match=words):
            pb.find.retrieval_heads(model, task, **options)


def test_the_null_is_of_other_runs_needles() -> None:
    """Needles 3, 4 and 5 tokens back; the head looks 3, 4 and 3 back: two runs are right, one of six others is."""
    runs: list[Any] = [
        SimpleNamespace(
            distances=torch.tensor([[back]]),
            query=torch.tensor([10]),
            top=torch.full((2, 1, 1, 1), 10 - looks),
            needle=[0],
        )
        for back, looks in ((3, 3), (4, 4), (5, 3))
    ]
    null, p = _dealt(runs, 0)
    assert close(float(null), 1 / 6, of=1.0)
    assert close(float(p) * 1001, float(round(float(p) * 1001)), of=1001.0), "a thousand deals and the true one"
    assert 0.28 < float(p) < 0.39  # of the six ways to deal three needles two are as good
