"""Function vectors: the one head that tells a task, the paper's formula by hooks, nothing in a random network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from tests import given
from tests.tolerance import close

SIGN, OTHER, SAID = 7, 8, 9  # what shows the task, what stands there without it, and the answer


def told() -> tuple[pb.Model, pb.Task]:
    """A GPT-2 in which one head averages over how many tokens are SIGN, and writes the answer; all else writes nothing."""
    hf = given.gpt2(0)
    with torch.no_grad():
        for block in hf.transformer.h:
            for module in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_proj):
                module.weight.zero_()
                module.bias.zero_()
        wte, attn = hf.transformer.wte.weight, hf.transformer.h[0].attn
        x = torch.nn.functional.layer_norm(wte[SIGN], (32,))
        attn.c_attn.weight[:, 64 + 16] = x / x.norm()  # of v, the first number of head 2
        attn.c_proj.weight[16] = 40.0 * wte[SAID]
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(10, 40, (24, 8), generator=generator)
    clean[:, [1, 3, 5]] = SIGN
    twins = clean.clone()
    twins[:, [1, 3, 5]] = OTHER
    task = pb.Task("signs", clean.tolist(), [SAID] * 24, [[2, 3]] * 24, twins.tolist())  # type: ignore[arg-type]
    return pb.load(hf), task


def test_planted() -> None:
    model, task = told()
    found = pb.find.function_vectors(model, task, top=1)
    assert [str(part) for part in found.top(1)] == ["L0.H2"]
    assert float(found["p_adjusted"][0, 2]) < 0.05
    assert float(found["null"][0, 2].abs()) < 0.2 * float(found["effect"][0, 2])
    assert float(found["gain_low"]) > float(found["random"].max())
    assert float(found["p_gain"]) < 0.05
    said = model.hf.get_output_embeddings().weight[SAID].detach().double()
    assert close(float(torch.cosine_similarity(found["vector"], said, dim=0)), 1.0)


def test_reference() -> None:
    """Every head's gain, the vector and its gain by plain hooks on GPT-2, prompt by prompt."""
    model, task = given.lent("gpt2"), given.pairs(6)
    hf: Any = model.hf
    found = pb.find.function_vectors(model, task, top=3, layer=1, draws=1)
    dev, test = task.split(seed=0)
    d, blocks = model.d_model // 4, list(hf.transformer.h)

    def last_z(ids: Any) -> list[Tensor]:
        seen: list[Tensor] = []
        hooks = [
            b.attn.c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1].clone())) for b in blocks
        ]
        with torch.no_grad():
            hf(torch.tensor([list(ids)]))
        for hook in hooks:
            hook.remove()
        return seen

    def score(task: pb.Task, i: int, module: Any = None, change: Any = None, before: bool = True) -> float:
        hook = None
        if module is not None:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            hook = register(change)
        with torch.no_grad():
            logits = hf(torch.tensor([list((task.corrupted or ())[i])])).logits[0, -1].double()
        if hook is not None:
            hook.remove()
        return float(logits[task.right[i]] - logits[list(task.wrong[i])].mean())

    zs = [last_z(ids) for ids in dev.clean]
    means = [torch.stack([one[layer] for one in zs]).mean(0) for layer in range(2)]
    effect = torch.zeros(2, 4).double()
    outs = {}
    for layer in range(2):
        for head in range(4):
            own = slice(head * d, head * d + d)

            def put(_: Any, args: Any, own: slice = own, layer: int = layer) -> Any:
                x = args[0].clone()
                x[0, -1, own] = means[layer][own]
                return (x, *args[1:])

            module = blocks[layer].attn.c_proj
            effect[layer, head] = sum(score(dev, i, module, put) - score(dev, i) for i in range(3)) / 3
            outs[layer, head] = (means[layer][own] @ module.weight[own]).detach()
    assert close(found["effect"], effect, of=1.0)
    best = sorted(outs, key=lambda at: -float(effect[at]))[:3]
    vector = torch.stack([outs[at] for at in best]).sum(0)
    assert close(found["vector"], vector.double(), of=1.0)

    def add(_: Any, __: Any, out: Any) -> Any:
        x = (out[0] if isinstance(out, tuple) else out).clone()
        x[0, -1] += vector
        return (x, *out[1:]) if isinstance(out, tuple) else x

    def gain(layer: int) -> float:
        return sum(score(test, i, blocks[layer], add, before=False) - score(test, i) for i in range(3)) / 3

    assert close(float(found["gain"]), gain(1), of=1.0)
    assert close(found["gain_by_layer"], torch.tensor([gain(0), gain(1)]).double(), of=1.0)
    assert close(found["random_by_layer"][1], found["random"].mean(), of=1.0)


def test_null() -> None:
    """Random prompts with random answers: no head's mean raises them, and the best heads no more than random ones."""
    found = pb.find.function_vectors(given.lent("gpt2"), given.pairs(16, seed=1), top=2)
    assert float(found["p_adjusted"].min()) > 0.05
    assert float(found["p_gain"]) > 0.05


def test_the_vector_is_the_heads_mean_output_however_wide_a_head_is(tmp_path: Any) -> None:
    model, task = given.lent("qwen3"), given.pairs(4)
    found = pb.find.function_vectors(model, task, top=3, draws=1)
    assert model.W_O(0).shape[1] * model.n_heads(0) != model.d_model
    dev = task.split(seed=0)[0]
    ports = [pb.Port("attn.head_out", i) for i in range(model.n_layers)]
    trace = pb.run(model, dev, taps=ports)
    total = sum(trace.last(ports[part.layer or 0])[:, part.index].double().mean(0) for part in found.highlights)
    assert close(found["vector"], total, of=1.0)
    knob = pb.Knob("task", [pb.add("L1.resid_out", found["vector"], positions="last")], 1.0)
    assert pb.load_knob(knob.save(tmp_path / "task.knob")) == knob


def test_what_is_refused() -> None:
    with pytest.raises(pb.PatchbayError, match="no corrupted twins"):
        pb.find.function_vectors(given.lent("gpt2"), pb.Task("one", [[5, 6]] * 4, [7] * 4, [[8]] * 4))  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="layers are 0 to 1"):
        pb.find.function_vectors(given.lent("gpt2"), given.pairs(4), layer=2)
