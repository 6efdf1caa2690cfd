"""Fact heads: planted context and memory heads, slopes and attributions as plain loops, nothing in a random model."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay import maths
from patchbay.tiny import planted
from patchbay.tiny.planted_canvas import Canvas, Form
from patchbay.tiny.planted_vocabulary import TOKEN_IDS, ids, tokenizer
from tests.given import gpt2
from tests.tolerance import close


def conflicting(form: Form, seed: int) -> tuple[pb.Model, str, str, pb.Task]:
    """Last layer: one head copies the object that the text states, one writes the number that the name stands for.

    Each fact is remembered with a strength of its own around that of the copy, so that answers differ from prompt to prompt.
    """
    canvas = Canvas(form, seed)
    words, flags = canvas.take(canvas.n_vocab), canvas.take(2)
    objects, names, numbers = ids("object"), ids("name")[:10], ids("number")
    marked = torch.zeros(canvas.n_vocab, 2)
    marked[objects, 0] = marked[names, 1] = 1.0
    canvas.embed(words + marked @ flags)
    context, memory = canvas.pick_head(1), canvas.pick_head(1)
    slot = canvas.slots(1)
    q = 25.0 * canvas.one[:, None] * slot
    canvas.set_head(1, context, q=q, k=flags[:1].T @ slot, v=words[objects].T, o=2.0 * words[objects])
    strength = torch.linspace(1.4, 2.6, len(names))[:, None]
    canvas.set_head(1, memory, q=q, k=flags[1:].T @ slot, v=words[names].T, o=strength * words[numbers])
    canvas.unembed(6.0 * words)
    rows = [(objects[(3 * n) % 8], names[n], numbers[n]) for n in range(10)] + [
        (objects[(5 * n + 1) % 8], names[n], numbers[n]) for n in range(10)
    ]
    end = [TOKEN_IDS["."], TOKEN_IDS[" the"]]
    clean = [[TOKEN_IDS[" a"], thing, *end, name, TOKEN_IDS[" is"]] for thing, name, _ in rows]
    task = pb.Task("conflict", clean, [r[0] for r in rows], [[r[2]] for r in rows])
    return pb.load(canvas.model, tokenizer()), f"L1.H{context}", f"L1.H{memory}", task


@pytest.mark.parametrize("form", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted(form: Form, seed: int) -> None:
    model, context, memory, task = conflicting(form, seed)
    result = pb.find.fact_heads(model, task)
    rows = {str(row["part"]): row for row in result.table()}
    assert str(result.top(1)[0]) == context
    assert str(result.bottom(1)[0]) == memory
    assert {str(p) for p in result.highlights} == {context, memory}
    assert (rows[context]["label"], rows[memory]["label"]) == (1.0, -1.0)
    assert rows[context]["attribution"] > 0 > rows[memory]["attribution"]
    assert rows[context]["value"] > 0.3
    assert rows[memory]["memory_slope"] > 0.3
    assert 0.2 < float(result["stated_without"]) < 0.8
    assert float(result["disagreements"]) == 0
    curve = result["stated"][1, int(context[-1])]
    assert curve[0] < curve[1] < curve[2]
    assert {row["label"] for row in result.tables["labels"]} == {"context", "memory"}


def test_the_label_never_follows_attribution_alone() -> None:
    """Where a head has no say in the answers it gets no label, however large its attribution."""
    model, context, _, task = conflicting("gpt2", 0)
    sure = task[
        [i for i in range(20) if i % 10 < 3]
    ]  # remembered weakly: the stated fact wins whatever one head does by half
    result = pb.find.fact_heads(model, sure, strengths=[0.9, 1.1])
    row = next(r for r in result.table() if str(r["part"]) == context)
    assert row["attribution"] > 5.0
    assert row["label"] == 0.0
    assert float(result["disagreements"]) == 0
    assert not result.highlights


def test_reference() -> None:
    """Slopes: every head's values multiplied in the weights of a copy, answers by argmax. Attribution: z W_O U by hand."""
    hf = gpt2(3, vocab_size=24, n_positions=32, start=0)
    with torch.no_grad():
        for block in hf.transformer.h:
            block.attn.c_attn.weight.mul_(8)
            block.attn.c_proj.weight.mul_(12)
    rows = [torch.randint(2, 24, (n,)).tolist() for n in (9, 12, 9, 10, 12, 8, 11, 9)]
    with torch.no_grad():
        logits = [hf(torch.tensor([ids])).logits[0, -1] for ids in rows]
    order = [row.argsort(descending=True).tolist() for row in logits]
    right = [o[int(n % 3 == 0)] for n, o in enumerate(order)]  # five of eight are said as they are
    wrong = [[o[int(n % 3 != 0)], o[2]] for n, o in enumerate(order)]
    steps = [0.0, 1.0, 1.5, 3.0]
    task = pb.Task("any", rows, right, wrong)
    result = pb.find.fact_heads(pb.load(hf), task, strengths=steps, batch_size=3)
    mean = sum(steps) / 4
    spread = sum((s - mean) ** 2 for s in steps)
    each = torch.zeros(len(rows), 2, 4, 2, dtype=torch.float64)  # [prompt, layer, head, stated or remembered]
    for layer in range(2):
        weight = hf.transformer.h[layer].attn.c_proj.weight
        for head in range(4):
            for step in steps:
                kept = weight.detach().clone()
                with torch.no_grad():
                    weight[8 * head : 8 * head + 8] *= step
                    for n, (ids, r, w) in enumerate(zip(rows, right, wrong, strict=True)):
                        said = int(hf(torch.tensor([ids])).logits[0, -1].argmax())
                        each[n, layer, head] += (step - mean) / spread * torch.tensor([said == r, said in w]).double()
                    weight.copy_(kept)
    assert close(result.values, each[..., 0].mean(0), of=each)
    assert close(result["memory_slope"], each[..., 1].mean(0), of=each)
    adjusted = maths.benjamini_hochberg(maths.sign_flip_p(each, floor=1e-6))  # both slopes of all heads together
    assert close(result["p_adjusted"], adjusted[..., 0])
    assert close(result["memory_p_adjusted"], adjusted[..., 1])
    best = int(each[::2, ..., 0].mean(0).argmax())
    assert close(float(result["held_out"]), float(each[1::2, ..., 0].mean(0).flatten()[best]), of=each)
    assert (float(result["stated_without"]), float(result["remembered_without"])) == (5 / 8, 3 / 8)
    assert result.values.abs().max() > 0
    seen: dict[object, torch.Tensor] = {}
    places = [block.attn.c_proj for block in hf.transformer.h] + [hf.transformer.ln_f]
    handles = [m.register_forward_pre_hook(lambda module, args: seen.update({module: args[0][0, -1]})) for m in places]
    total = torch.zeros(2, 4, dtype=torch.float64)
    for ids, r, w in zip(rows, right, wrong, strict=True):
        with torch.no_grad():
            hf(torch.tensor([ids]))
            scale = (seen[hf.transformer.ln_f].var(unbiased=False) + hf.transformer.ln_f.eps).sqrt()
            towards = hf.transformer.ln_f.weight * (hf.lm_head.weight[r] - hf.lm_head.weight[w].mean(0))
            for i, block in enumerate(hf.transformer.h):
                for h in range(4):
                    some = slice(8 * h, 8 * h + 8)
                    written = seen[block.attn.c_proj][some] @ block.attn.c_proj.weight[some]
                    total[i, h] += float((written - written.mean()) / scale @ towards) / len(rows)
    for handle in handles:
        handle.remove()
    assert close(result["attribution"], total)


def test_null() -> None:
    """In a random model, answers that it is torn between are moved by no head in one direction."""
    built = planted.null(seed=2)
    model = pb.load(built.model, built.tokenizer)
    rows = torch.randint(3, 60, (24, 10), generator=torch.Generator().manual_seed(0)).tolist()
    top = pb.run(model, rows, logits="last").last_logits.topk(2).indices.tolist()
    task = pb.Task("torn", rows, [t[n % 2] for n, t in enumerate(top)], [[t[1 - n % 2]] for n, t in enumerate(top)])
    result = pb.find.fact_heads(model, task)
    assert result["p_adjusted"].min() > 0.05
    assert (result["label"] == 0).all()
    assert not result.highlights


def test_errors() -> None:
    model, _, _, task = conflicting("gpt2", 0)
    for strengths in ([1.0], [1.0, 1.0], [0.0, float("inf")]):
        with pytest.raises(pb.PatchbayError, match="two or more different numbers"):
            pb.find.fact_heads(model, task, strengths=strengths)
    alone = pb.Task("alone", task.clean, task.right, metric="probability")
    with pytest.raises(pb.PatchbayError, match=r"prompt 0 of task alone has no wrong answer.*facts_in_context"):
        pb.find.fact_heads(model, alone)
