"""Attribution patching: planted heads rank first; the formula by plain hooks; exact where the score is linear; a null."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchbay as pb
from patchbay.tiny import planted
from patchbay.tiny.twins import twin
from tests.given import chain, pairs
from tests.shares import by_turns
from tests.tolerance import close

SITES = ("resid_in", "resid_mid", "resid_out", "attn_out", "mlp_out", "head", "neuron")


class One(nn.Module):
    """An activation that is 1 whatever it is given: a gated MLP is then linear."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


@torch.no_grad()
def linear(family: str) -> pb.Model:
    """A twin without norms, with even attention and linear MLPs: every effect is its first-order effect."""
    hf = twin(family)
    if family == "gpt2":
        hf.transformer.ln_f = nn.Identity()
        for layer in hf.transformer.h:
            layer.ln_1, layer.ln_2, layer.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
            layer.attn.c_attn.weight[:, :32] = layer.attn.c_attn.bias[:32] = 0.0  # the query
    else:
        hf.model.norm = nn.Identity()
        for layer in hf.model.layers:
            layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
            layer.self_attn.q_proj.weight.zero_()
            layer.mlp.act_fn = One()
    return pb.load(hf)


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    model, truth, task = chain(form, 6)
    heads = [truth["induction"], truth["previous_token"]]
    result = pb.prove.attribution_patching(model, task, steps=20, exact=True)
    assert {str(part) for part in result.top(2)} == set(heads)
    rows = {str(row["part"]): row for row in result.table()}
    assert min(rows[head]["low"] for head in heads) > 5
    assert max(abs(row["value"]) for head, row in rows.items() if head not in heads) < 0.2
    assert max(rows[head]["p_adjusted"] for head in heads) < 0.15  # of 6 prompts: 2 / 64 times 8 cells / 2
    assert result["overlap"] == 1.0
    assert rows[heads[1]]["exact"] > 8
    one = pb.prove.attribution_patching(model, task)  # saturated attention hides the first head from one gradient
    assert str(one.top(1)[0]) == heads[0]
    assert abs({str(row["part"]): row for row in one.table()}[heads[1]]["value"]) < 1


@pytest.mark.parametrize("way", ["noising", "denoising"])
@pytest.mark.parametrize("steps", [1, 3])
def test_reference(way: str, steps: int) -> None:
    """(clean - corrupted) . gradient, prompt by prompt, with hooks on Hugging Face's GPT-2."""
    hf = twin("gpt2")
    task = pairs()
    result = pb.prove.attribution_patching(pb.load(hf), task, way=way, steps=steps)  # type: ignore[arg-type]

    def run(embeds: Tensor) -> tuple[list[Tensor], Tensor]:
        seen: list[Tensor] = []
        hooks = [
            layer.attn.c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            for layer in hf.transformer.h
        ]
        logits = hf(inputs_embeds=embeds).logits[0, -1]
        for hook in hooks:
            hook.remove()
        return seen, logits

    expected = torch.zeros(2, 4)
    for i in range(len(task)):
        ends = [hf.transformer.wte(torch.tensor([side[i]])).detach() for side in (task.clean, task.corrupted or ())]
        z = [run(end)[0] for end in ends]
        here, there = ends if way == "noising" else ends[::-1]
        for k in range(1, steps + 1):
            seen, logits = run(there + k / steps * (here - there))
            score = logits[task.right[i]] - logits[list(task.wrong[i])].mean()
            for layer, gradient in enumerate(torch.autograd.grad(score, seen)):
                for head in range(4):
                    at = slice(8 * head, 8 * head + 8)
                    change = (z[0][layer] - z[1][layer])[..., at]
                    expected[layer, head] += float((change.detach() * gradient[..., at]).sum()) / steps / len(task)
    assert close(result.values, expected)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("site", SITES)
def test_exact_where_the_score_is_linear(family: str, site: Any) -> None:
    model = linear(family)
    result = pb.prove.attribution_patching(model, pairs(), site=site, exact=True)
    scale = float(result["exact"].abs().max())
    assert scale > 0.1
    assert close(result.values, result["exact"], noise=256)  # scores of logits that are larger
    assert result["spearman"] > 0.98
    assert result["overlap"] == 1.0


@pytest.mark.parametrize("family", by_turns(["gpt2", "gemma2", "phi", "bloom", "mamba2"], of=2))
def test_effects_at_the_embedding_sum_to_the_gap_as_steps_grow(family: str) -> None:
    model, task = pb.load(twin(family)), pairs(metric="log_probability")
    gaps = []
    for steps in (1, 50):
        result = pb.prove.attribution_patching(model, task, site="resid_in", positions="all", steps=steps)
        gap = float(result["clean"] - result["corrupted"])
        gaps.append(abs(float(result.values[0]) - gap))
    assert gaps[1] < 0.05 < gaps[0]


def test_agreement_is_that_of_the_two_maps() -> None:
    model, task = pb.load(twin("llama")), pairs(6)
    result = pb.prove.attribution_patching(model, task, site="neuron", positions="all", exact=True)
    exact = pb.prove.activation_patching(model, task, site="neuron", parts=result.top(96), way="noising")
    by_part = dict(zip(map(str, exact.parts or []), exact["effect"].tolist(), strict=True))
    rows = result.table()
    assert close([row["exact"] for row in rows], [by_part[str(row["part"])] for row in rows], of=1.0)
    ours = {str(row["part"]) for row in result.table(10, by="abs")}
    true = {name for name, _ in sorted(by_part.items(), key=lambda item: -abs(item[1]))[:10]}
    assert float(result["overlap"]) == pytest.approx(len(ours & true) / 10)
    order = {name: i for i, (name, _) in enumerate(sorted(by_part.items(), key=lambda item: item[1]))}
    mine = [order[str(row["part"])] for row in rows][::-1]
    n = len(mine)
    rho = 1 - 6 * sum((a - b) ** 2 for a, b in enumerate(mine)) / (n * (n * n - 1))
    assert float(result["spearman"]) == pytest.approx(rho, abs=1e-3)


def test_null() -> None:
    """Random answers of a random model: p values as even as they should be, and nothing left after adjusting."""
    built = planted.null(seed=3)
    model = pb.load(built.model)
    ps = []
    for seed in range(4):
        result = pb.prove.attribution_patching(model, pairs(12, seed=seed, n_wrong=1))
        assert result["p_adjusted"].min() > 0.02
        ps.append(result["p"].flatten())
    every = torch.cat(ps)
    assert 0.3 < float(every.mean()) < 0.7
    assert float((every < 0.1).double().mean()) < 0.3


def test_prompts_of_different_length_are_counted_from_the_end() -> None:
    model = pb.load(twin("llama"))
    long, short = pairs(2, 9, seed=1), pairs(2, 6, seed=2)
    both = pb.Task("both", *([*getattr(long, n), *getattr(short, n)] for n in ("clean", "right", "wrong", "corrupted")))
    result, alone = (pb.prove.attribution_patching(model, t, site="resid_in", positions="each") for t in (both, long))
    joint = pb.prove.attribution_patching(model, both, site="resid_in")
    assert joint.coords["position"] == ["earlier", *map(str, range(-6, 0))]
    other = pb.prove.attribution_patching(model, short, site="resid_in")
    assert result.coords["position"] == list(range(-9, 0))
    assert close(result.values[:, 3:], (alone.values[:, 3:] + other.values) / 2)
    assert close(result.values[:, :3], alone.values[:, :3])
    assert close(joint.values[:, 1:], result.values[:, 3:])
    assert close(joint.values[:, 0], alone.values[:, :3].sum(1))  # of those that reach there


def test_a_function_of_ones_own_has_the_effects_of_the_metric_that_it_spells() -> None:
    """Over the last position or over all; one that leaves the graph is refused by name."""
    model, task = linear("llama"), pairs()
    right, wrong = torch.tensor(task.right), torch.tensor(task.wrong)

    def difference(logits: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        rows = logits[:, -1] if logits.ndim == 3 else logits
        return rows.gather(1, right[prompts, None])[:, 0] - rows.gather(1, wrong[prompts]).mean(1)

    def everywhere(logits: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        assert logits.shape[1] == len(task.clean[0])
        return (
            difference(logits, prompts) + logits[:, 0, 7]
        )  # a position before those that are patched is no effect of theirs

    everywhere.positions = "all"  # type: ignore[attr-defined]
    named = pb.prove.attribution_patching(model, task, site="resid_out", positions="last", batch_size=2)
    for metric in (difference, everywhere):
        own = pb.prove.attribution_patching(
            model, task.with_metric(metric), site="resid_out", positions="last", batch_size=2
        )
        assert close(own.values, named.values)
        assert named.values.abs().max() > 0.01
    with pytest.raises(pb.PatchbayError, match="the metric <lambda> has no gradient: .*argmax"):
        pb.prove.attribution_patching(model, task.with_metric(lambda logits, prompts: logits.argmax(-1).float()))
    with pytest.raises(pb.PatchbayError, match="everywhere reads all positions and this reads the last"):
        pb.prove.edge_attribution(model, task.with_metric(everywhere))
    edges = [pb.prove.edge_attribution(model, some) for some in (task, task.with_metric(difference))]
    assert close(edges[0].values, edges[1].values, equal_nan=True)


def test_kl_and_errors() -> None:
    model, task = pb.load(twin("llama")), pairs()
    result = pb.prove.attribution_patching(model, task.with_metric("kl"), steps=200, site="resid_in", positions="all")
    assert float(result.values[0]) == pytest.approx(float(result["corrupted"]), rel=0.1)
    cases: list[tuple[str, dict[str, Any], pb.Task]] = [
        ("take steps=5 or more", {}, task.with_metric("kl")),
        ("rank has no gradient; possible are logit_diff", {}, task.with_metric("rank")),
        ("steps=0", {"steps": 0}, task),
        ("did you mean 'mlp_out'", {"site": "mlp"}, task),
        ("possible are denoising, noising", {"way": "up"}, task),
        ("no group 'subject'", {"positions": "subject"}, task),
        ("no corrupted twins", {}, pb.Task("own", task.clean, task.right, task.wrong)),
    ]
    for message, options, given in cases:
        with pytest.raises(pb.PatchbayError, match=message):
            pb.prove.attribution_patching(model, given, **options)
    with pytest.raises(pb.PatchbayError, match="no layer of this mamba model has it"):
        pb.prove.attribution_patching(pb.load(twin("mamba2")), task)
