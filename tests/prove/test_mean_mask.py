"""prove.mean_mask: the planted circuit and hardly more; losses and counts of weights by plain loops; nothing where nothing is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.train._sparse import only_largest
from tests import given
from tests.tolerance import close


@pytest.mark.parametrize("form", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])  # as much again
def test_planted(form: Any) -> None:
    """Of an induction circuit both heads are kept, and few others; as many random heads and neurons do not do it."""
    model, truth, task = given.chain(form, 24)
    found = pb.prove.mean_mask(model, task, steps=40, draws=9)
    kept = {str(part) for part in found.highlights}
    heads = {value for value in truth.values() if isinstance(value, str) and ".H" in value}
    assert heads <= kept
    assert float(found["share"]) < 0.1
    whole, circuit, none = found["loss"].tolist()
    assert circuit < whole + 0.3
    assert none > circuit + 1.0
    assert float(found["random"].min()) > circuit + 0.5
    assert float(found["p"]) == pytest.approx(0.1)


def sparse() -> Any:
    """A random Llama whose matrices keep a twentieth of their entries."""
    hf = given.llama(3, sharpness=3.0)
    with torch.no_grad():
        for name, one in hf.named_parameters():
            if one.ndim == 2 and "embed" not in name and "lm_head" not in name:
                one.mul_(20.0)
                only_largest(one, one.numel() // 20)
    return hf


def looked_at(
    hf: Any, rows: list[list[int]], keep: dict[tuple[str, int], set[int]] | None, means: dict[tuple[str, int], Tensor]
) -> Tensor:
    """Last logits [prompt, vocab]; where `keep` is given all other neurons and heads give their mean. Fills `means` where it is empty."""
    seen: dict[tuple[str, int], list[Tensor]] = {}
    hooks, sites = [], {}
    for i, layer in enumerate(hf.model.layers):
        sites |= {("head", i): layer.self_attn.o_proj, ("neuron", i): layer.mlp.down_proj}
    for at, module in sites.items():

        def put(_: Any, args: Any, at: tuple[str, int] = at) -> Any:
            x = args[0].clone()
            wide = x.view(*x.shape[:-1], 4, -1) if at[0] == "head" else x[..., None]
            seen.setdefault(at, []).append(wide[0].detach())
            if keep is not None:
                for node in range(wide.shape[-2]):
                    if node not in keep.get(at, set()):
                        wide[..., node, :] = means[at][node]
            return (x,)

        hooks.append(module.register_forward_pre_hook(put))
    with torch.no_grad():
        logits = torch.stack([hf(torch.tensor([row])).logits[0, -1] for row in rows])
    for hook in hooks:
        hook.remove()
    if not means:
        means |= {at: torch.cat(one).mean(0) for at, one in seen.items()}
    return logits


def test_reference() -> None:
    """Losses of the circuit, of none and of random sets by hooks; entries and paths counted weight by weight."""
    hf = sparse()
    model, task = pb.load(hf), given.pairs(12)
    dev, test = task.split(0.5, 0)
    means: dict[tuple[str, int], Tensor] = {}
    own_logits = looked_at(hf, [list(ids) for ids in dev.clean], None, means).double().log_softmax(-1)
    bound = 0.02 - float(sum(own_logits[i, right] for i, right in enumerate(dev.right))) / len(dev)
    found = pb.prove.mean_mask(model, task, loss=bound, steps=2, draws=2)
    rows = [list(ids) for ids in test.clean]

    def loss(keep: dict[tuple[str, int], set[int]] | None) -> float:
        likely = looked_at(hf, rows, keep, means).double().log_softmax(-1)
        return -float(sum(likely[i, right] for i, right in enumerate(test.right))) / len(test)

    own: dict[tuple[str, int], set[int]] = {}
    for part in found.highlights:
        own.setdefault((part.kind, part.layer), set()).add(part.index)
    assert close(found["loss"], [loss(None), loss(own), loss({})])
    order = [(kind, i) for i in range(2) for kind in ("head", "neuron")]
    generator = torch.Generator().manual_seed(0)
    for draw in range(2):
        drawn = {}
        for at in order:
            n = 4 if at[0] == "head" else 48
            drawn[at] = set(torch.randperm(n, generator=generator)[: len(own.get(at, set()))].tolist())
        assert close(float(found["random"][draw]), loss(drawn))
    reads: list[set[int]] = []
    writes: list[set[int]] = []
    entries, places = 0, []
    for part in found.highlights:
        layer, i = hf.model.layers[part.layer], part.index
        if part.kind == "neuron":
            rows_of = [layer.mlp.gate_proj.weight[i], layer.mlp.up_proj.weight[i]]
            columns = [layer.mlp.down_proj.weight[:, i]]
        else:
            attn, group = layer.self_attn, i // 2
            rows_of = [attn.q_proj.weight[8 * i + c] for c in range(8)]
            rows_of += [one.weight[8 * group + c] for one in (attn.k_proj, attn.v_proj) for c in range(8)]
            columns = [attn.o_proj.weight[:, 8 * i + c] for c in range(8)]
        entries += sum(int((one != 0).sum()) for one in (*rows_of, *columns))
        reads.append({c for one in rows_of for c in range(32) if one[c] != 0})
        writes.append({c for one in columns for c in range(32) if one[c] != 0})
        places.append(2 * part.layer + (part.kind == "neuron"))
    assert float(found["entries"]) == entries
    joined = sum(
        bool(writes[a] & reads[b]) for a in range(len(reads)) for b in range(len(reads)) if places[a] < places[b]
    )
    assert float(found["paths"]) == joined
    assert 0 < joined < len(reads) ** 2
    assert float(found["n_nodes"]) == len(found.highlights)


def test_the_number_is_the_least_by_halving() -> None:
    """One node fewer, by the same ranking, is outside the bound on the half that chose, or was not tried."""
    model, task = pb.load(sparse()), given.pairs(12)
    module = __import__("importlib").import_module("patchbay.prove.mean_mask")
    dev = task.split(0.5, 0)[0]
    sites = module._sites(model, [list(ids) for ids in dev.clean], 32)
    order = torch.arange(104)
    bound = float(module._loss(model, dev, sites, module._mask(order[:60], 104), 32).mean())
    n = module._fewest(model, dev, sites, order, bound, 32)
    losses = [float(module._loss(model, dev, sites, module._mask(order[:k], 104), 32).mean()) for k in (n - 1, n)]
    assert losses[1] <= bound < losses[0]


def test_null() -> None:
    """Answers that a random model does not know need no node: as many random ones, none, do as well."""
    model = given.lent("llama")
    found = pb.prove.mean_mask(model, given.pairs(12), loss=20.0, steps=3, draws=5)
    assert float(found["n_nodes"]) == 0.0
    assert float(found["p"]) == 1.0
    assert float(found["entries"]) == float(found["paths"]) == 0.0


def test_what_is_refused() -> None:
    model, task = given.lent("gpt2"), given.pairs(6)
    with pytest.raises(pb.PatchbayError, match="the whole model's own is"):
        pb.prove.mean_mask(model, task, loss=0.01)
    for options in ({"steps": 0}, {"draws": 0}):
        with pytest.raises(pb.PatchbayError, match="4 prompts or more"):
            pb.prove.mean_mask(model, task, **options)
    with pytest.raises(pb.PatchbayError, match="4 prompts or more"):
        pb.prove.mean_mask(model, given.pairs(3))
    with pytest.raises(pb.PatchbayError, match="has heads or neurons"):
        pb.prove.mean_mask(given.lent("mamba2"), task)
