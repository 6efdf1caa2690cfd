"""Causal tracing: the way of a planted fact through the layers, the paper's formula as loops, no cell clear where nothing is known."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.prove.causal_tracing import together
from patchbay.tiny import planted
from tests import given
from tests.tolerance import close


def facts(form: Any = "gpt2", metric: str = "logit_diff") -> tuple[pb.Model, pb.Task]:
    """Names whose day and month a layer-0 head fetches to the last token, and a last-layer neuron chooses between."""
    built = planted.relation_neuron(form=form, seed=0)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    task = pb.Task.from_prompts(model, truth["prompts"], truth["answers"], truth["wrong"], metric=metric)
    return model, replace(task, marks={"subject": [[1]] * len(task)})


def marked(n: int = 3) -> pb.Task:
    return replace(given.pairs(n), marks={"subject": [[2, 3]] * n})


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """Before layer 0 the name's own token brings the answer back, after it only the last token does, where the head put it."""
    model, task = facts(form, "log_probability")
    before = pb.prove.causal_tracing(model, task, site="resid_in", draws=1)
    after = pb.prove.causal_tracing(model, task, draws=1)
    assert float(before["clean"] - before["noised"]) > 1.0
    assert close(float(before.values[0, 1]), 1.0)
    assert after.values[0].tolist() == pytest.approx([0.0, 0.0, 1.0], abs=0.1)
    assert after["p_adjusted"][0, 2] < 0.05
    assert float(after["control"][0, 2].abs()) < 0.6 * float(after["effect"][0, 2])


def drawn(ids: Any, draw: int, seed: int, d: int) -> Tensor:
    own = zlib.crc32(f"{seed} {draw} {list(ids)}".encode())
    return torch.randn(len(ids), d, generator=torch.Generator().manual_seed(own))


@pytest.mark.parametrize("window", [1, 2])
def test_reference(window: int) -> None:
    """Every cell by plain hooks on GPT-2, prompt by prompt and draw by draw, and the control likewise; a window puts back the layer before too."""
    model, task = given.lent("gpt2"), marked(2)
    hf: Any = model.hf
    site = "mlp_out" if window == 1 else f"mlp_out x {window}"
    found = pb.prove.causal_tracing(model, task, site=site, draws=2, noise=2.0, seed=3)
    blocks = list(hf.transformer.h)

    def score(
        i: int, noise: Tensor | None, put: dict[int, Tensor], at: int | None, keep: list[Tensor] | None = None
    ) -> float:
        def noised(_: Any, args: Any) -> Any:
            return (args[0] + noise, *args[1:])

        def patched(layer: int) -> Any:
            def hook(_: Any, __: Any, out: Tensor) -> Tensor:
                out = out.clone()
                if layer in put and at is not None:
                    out[0, at] = put[layer][at]
                if keep is not None:
                    keep.append(out[0].clone())
                return out

            return hook

        hooks = [block.mlp.register_forward_hook(patched(layer)) for layer, block in enumerate(blocks)]
        hooks += [blocks[0].register_forward_pre_hook(noised)] if noise is not None else []
        with torch.no_grad():
            logits = hf(torch.tensor([list(task.clean[i])])).logits[0, -1].double()
        for hook in hooks:
            hook.remove()
        return float(logits[task.right[i]] - logits[list(task.wrong[i])].mean())

    with torch.no_grad():
        embedded = [hf.transformer.wte.weight[list(ids)] + hf.transformer.wpe.weight[: len(ids)] for ids in task.clean]
    sd = float(torch.cat([rows[[2, 3]] for rows in embedded]).double().std())
    assert close(float(found["sd"]), sd, of=1.0)
    effect, control = torch.zeros(2, 2, 8).double(), torch.zeros(2, 2, 8).double()
    for i in range(2):
        clean: list[Tensor] = []
        score(i, None, {}, None, clean)
        for draw in range(2):
            noises = []
            for one in (draw, draw + 1):
                whole = torch.zeros(8, model.d_model)
                whole[[2, 3]] = 2.0 * sd * drawn(task.clean[i], one, 3, model.d_model)[[2, 3]]
                noises.append(whole)
            other: list[Tensor] = []
            score(i, noises[1], {}, None, other)
            base = score(i, noises[0], {}, None)
            for layer in range(2):
                for at in range(8):
                    for into, donor in ((effect, clean), (control, other)):
                        put = {one: donor[one] for one in range(max(0, layer - window + 1), layer + 1)}
                        into[i, layer, at] += (score(i, noises[0], put, at) - base) / 2
    assert close(found["effect"], effect.mean(0), of=1.0)
    assert close(found["control"], control.mean(0), of=1.0)


def test_windows_are_those_of_the_papers_code() -> None:
    """range(max(0, layer - window // 2), min(n, layer - (-window // 2))) of the layers that have the signal."""
    ports = [pb.Port("mlp.out", layer) for layer in (0, 1, 2, 3, 5, 6, 7)]
    for window in (1, 2, 3, 4, 8):
        for at, port in enumerate(ports):
            layer = port.layer or 0
            expected = range(max(0, layer - window // 2), min(8, layer - (-window // 2)))
            assert [one.layer for one in together(ports, at, window)] == [i for i in expected if i != 4]


def test_null() -> None:
    """A random network knows nothing of the subject's answer: no cell is clear of its control."""
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    found = pb.prove.causal_tracing(model, marked(8), draws=1)
    assert found["p_adjusted"].min() > 0.05
    assert any("mean little" in note for note in found.notes)


def test_noise_belongs_to_the_prompt_and_the_seed() -> None:
    model, task = given.lent("gpt2"), marked(3)
    whole, cut = (pb.prove.causal_tracing(model, task, draws=1, batch_size=size, positions="last") for size in (32, 1))
    assert close(whole["effect"], cut["effect"], of=1.0)
    other = pb.prove.causal_tracing(model, task, draws=1, positions="last", seed=1)
    assert not close(whole["effect"], other["effect"], of=1.0)


def test_what_is_refused() -> None:
    model = given.lent("gpt2")
    with pytest.raises(pb.PatchbayError, match="marks no positions"):
        pb.prove.causal_tracing(model, given.pairs(2))
    with pytest.raises(pb.PatchbayError, match=r"prompts \[1\] of task pairs have no such position"):
        pb.prove.causal_tracing(model, replace(given.pairs(2), marks={"subject": [[1], []]}))
    with pytest.raises(pb.PatchbayError, match="above 0"):
        pb.prove.causal_tracing(model, marked(2), noise=0.0)
    for site in ("mlp_out x 3", "mlp_out x 0", "mlp_out x ", "mlp_out x two"):
        with pytest.raises(pb.PatchbayError, match="neighbouring layers are put back together, 1 to 2"):
            pb.prove.causal_tracing(model, marked(2), site=site)
    with pytest.raises(pb.PatchbayError, match="site='head'"):
        pb.prove.causal_tracing(model, marked(2), site="head")
