"""AtP*: saturated keys are seen; the paper's closed softmax and dropped gradients as loops; exact where what follows is linear; a null."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchbay as pb
from patchbay.tiny import planted
from patchbay.tiny.twins import twin
from tests.given import chain, pairs
from tests.lenses import D, blocks
from tests.shared import SHARED
from tests.tolerance import close

STORIES = SHARED / "models" / "stories260K"


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """The induction head's keys carry what comes before the answer, through attention so sharp that its gradient is 0."""
    model, truth, task = chain(form, 4)
    found = pb.prove.atp_star(model, task, site="key", exact=True)
    best = found.table()[0]
    layer, index = truth["induction"].removeprefix("L").split(".H")
    group = int(index) * model.n_groups(int(layer)) // model.n_heads(int(layer))
    assert str(best["part"]) == f"L{layer}.KV{group}"
    assert abs(best["effect"]) > 5
    assert abs(best["plain"]) < 0.2 * abs(best["effect"])  # what one gradient says of them
    assert best["exact"] > 5


class Gpt2:
    """The forward pass of a GPT-2 written out, one prompt at a time, with a handle at every pattern."""

    def __init__(self, hf: Any) -> None:
        self.hf, self.body = hf, hf.transformer

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block = self.body.h[layer]
        split = block.attn.c_attn(block.ln_1(x)).split(x.shape[-1], -1)
        return tuple(y.reshape(len(x), 4, -1).transpose(0, 1) for y in split)  # type: ignore[return-value]

    def run(self, ids: tuple[int, ...], held: int | None = None) -> tuple[Tensor, list[Any], list[Tensor]]:
        """Last logits; q, k, v and the stream of each layer; patterns as leaves of the graph. `held`: a layer whose additions carry no gradient."""
        x = self.body.wte(torch.tensor(ids)) + self.body.wpe(torch.arange(len(ids)))
        seen, patterns = [], []
        mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
        for layer, block in enumerate(self.body.h):
            q, k, v = self.qkv(layer, x)
            pattern = (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1)
            pattern = pattern if pattern.requires_grad else pattern.requires_grad_()
            patterns.append(pattern)
            seen.append((q, k, v))
            z = (pattern @ v).transpose(0, 1).reshape(len(ids), -1)
            added = block.attn.c_proj(z)
            added = added + block.mlp(block.ln_2(x + added))
            x = x + (added.detach() if layer == held else added)
        return self.hf.lm_head(self.body.ln_f(x[-1])), seen, patterns


def changed_key(pattern: Tensor, q: Tensor, old: Tensor, new: Tensor, t: int) -> Tensor:
    """The paper's closed form: key t of one head alone is another one, p' = p e^d / (1 - p + p e^d), the others shrink."""
    out = pattern.double().clone()
    for i in range(t, len(pattern)):
        whole = (q[i].double() @ old[: i + 1].double().mT / q.shape[-1] ** 0.5).softmax(
            -1
        )  # in double: 1 - p may be tiny
        rise = (q[i].double() @ (new[t] - old[t]).double() / q.shape[-1] ** 0.5).exp()
        total = 1 - whole[t] + whole[t] * rise
        out[i, : i + 1] = whole / total
        out[i, t] = whole[t] * rise / total
    return out


@pytest.mark.parametrize("site", ["key", "query"])
def test_reference(site: Any) -> None:
    """Closed softmax, times the pattern's gradient with the additions of each layer held in turn, prompt by prompt."""
    hf, n = twin("gpt2", n_layer=3), 3
    with torch.no_grad():
        for layer in hf.transformer.h:
            layer.attn.c_attn.weight[:, :64] *= 2  # uneven patterns
    task, own = pairs(2, 5), Gpt2(hf)
    found = pb.prove.atp_star(pb.load(hf), task, site=site, positions="each")
    effect, score = torch.zeros(4 * n, 5), torch.zeros(4 * n, 5)
    for ids, other, right, wrong in zip(task.clean, task.corrupted or (), task.right, task.wrong, strict=True):
        there, here = own.run(other)[1], own.run(ids)
        changes = {}
        for layer, head, t in itertools.product(range(n), range(4), range(5)):
            (q, k, _), pattern = (x.detach()[head] for x in here[1][layer]), here[2][layer].detach()[head]
            other_q, other_k, _ = (x.detach()[head] for x in there[layer])
            after = pattern.double().clone()
            if site == "key":
                after = changed_key(pattern, q, k, other_k, t)
            else:
                after[t, : t + 1] = (other_q[t] @ k[: t + 1].mT / q.shape[-1] ** 0.5).softmax(-1)
            changes[layer, head, t] = after - pattern
        for held in (None, *range(n)):
            logits, _, patterns = own.run(ids, held)
            gradients = torch.autograd.grad(logits[right] - logits[list(wrong)].mean(), patterns, allow_unused=True)
            for (layer, head, t), change in changes.items():
                gradient = gradients[layer]
                term = 0.0 if gradient is None or held == layer else -float((gradient[head] * change).sum()) / len(task)
                if held is None:
                    effect[layer * 4 + head, t] += term
                else:
                    score[layer * 4 + head, t] += abs(term) / (n - 1)
    assert close(found["effect"], effect, noise=256)
    assert close(found["score"], score, noise=256)
    assert effect.abs().max() > 0.01


@torch.no_grad()
def straight() -> pb.Model:
    """A twin in which all that follows a pattern of the last layer is linear."""
    hf = twin("gpt2")
    hf.transformer.ln_f = nn.Identity()
    for layer in hf.transformer.h:
        layer.ln_1, layer.ln_2, layer.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
        layer.attn.c_attn.weight[:, :64] *= 20
    return pb.load(hf)


@pytest.mark.parametrize("site", ["key", "query", "value", "head", "mlp_out"])
def test_exact_where_what_follows_is_linear(site: Any) -> None:
    """In the last layer, changed keys and queries too, one key alone and all together; plain attribution is off there."""
    for positions in ("all", "each"):
        found = pb.prove.atp_star(straight(), pairs(), site=site, positions=positions, exact=True)
        last = [i for i, row in enumerate(found.parts or []) if row.layer == 1] if found.parts else slice(1, None)
        assert close(found["effect"][last], found["exact"][last], of=1.0, noise=256)
        assert float(found["pearson"][1]) > 0.99
        if site in ("key", "query"):
            assert (found["plain"][last] - found["exact"][last]).abs().max() > 0.05


def test_effects_that_cancel_keep_their_score() -> None:
    """What the first MLP writes, the second takes back: the effect is 0, and without the second's gradient the direct one is left."""
    half, low, high = D // 2, torch.zeros(D, D), torch.zeros(D, D)
    low[:half, half:] = torch.eye(
        half
    )  # the first reads one half of the stream and writes the other, which the second wipes
    high[half:, half:] = -torch.eye(half)
    model = blocks(low, high)
    rows, others = ([[a, b, a] for a, b in pairs_] for pairs_ in ([(3, 4), (5, 6)], [(7, 8), (9, 10)]))
    task = pb.Task("cancel", rows, [1, 2], [[3], [4]], others)
    found = pb.prove.atp_star(model, task, site="mlp_out")
    assert close(found["effect"][0], 0.0, of=1.0)
    embed, unembed = model.hf.transformer.wte.weight, model.hf.lm_head.weight
    direct = [
        abs(
            float(
                (embed.detach()[a[-1]] - embed.detach()[b[-1]])[:half]
                @ (unembed.detach()[r] - unembed.detach()[w[0]])[half:]
            )
        )
        for a, b, r, w in zip(rows, others, task.right, task.wrong, strict=True)
    ]
    assert close(float(found["score"][0]), sum(direct) / 2)
    assert found["score"][0] > 0.1


def test_null() -> None:
    """Random answers of a random model: p values as even as they should be, and nothing left after adjusting."""
    model = pb.load(planted.null(seed=3).model)
    ps = []
    for seed in range(4):
        found = pb.prove.atp_star(model, pairs(12, seed=seed, n_wrong=1), site="query")
        assert found["p_adjusted"].min() > 0.02
        ps.append(found["p"].flatten())
    every = torch.cat(ps)
    assert 0.3 < float(every.mean()) < 0.7


def test_what_cannot_be_estimated_is_refused() -> None:
    model, task = pb.load(twin("llama")), pairs()
    cases: list[tuple[str, dict[str, Any], pb.Task]] = [
        ("kl is at its lowest in the clean run", {}, task.with_metric("kl")),
        ("rank has no gradient", {}, task.with_metric("rank")),
        ("possible are query, key", {"site": "pattern"}, task),
        ("no corrupted twins", {}, pb.Task("own", task.clean, task.right, task.wrong)),
    ]
    for message, options, asked in cases:
        with pytest.raises(pb.PatchbayError, match=message):
            pb.prove.atp_star(model, asked, **options)
    with pytest.raises(pb.PatchbayError, match="no layer of this mamba model has it"):
        pb.prove.atp_star(pb.load(twin("mamba2")), task)
    assert pb.prove.atp_star(model, task.with_metric("kl"), way="denoising")["score"].max() > 0


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs the shared model {STORIES}")
def test_early_layers_need_the_exact_check() -> None:
    """An honest negative, on a trained model: MLP outputs of the first layers are estimated far worse than those of the last."""
    model = pb.load(str(STORIES))
    starts = [
        "Once upon a time",
        "There was a dog",
        "Lily had a red",
        "One day, Tom",
        "The sun was",
        "A cat and a",
        "Mom said",
        "In the park",
    ]
    rows = [ids[:16] for ids in pb.run(model, starts, max_new_tokens=20).ids.tolist()]
    said = pb.run(model, rows).last_logits
    wrong = [[int(row.topk(2).indices[1])] for row in said]
    task = pb.Task("stories", rows, said.argmax(-1).tolist(), wrong, rows[1:] + rows[:1])
    found = pb.prove.atp_star(model, task, site="mlp_out", positions="each", exact=True)
    pearson = found["pearson"]
    assert float(pearson[:2].max()) < 0.5
    assert float(pearson[-1]) > 0.85
    assert any(note.startswith("correlation with exact patching by layer") for note in found.notes)
