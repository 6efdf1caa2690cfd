"""Attention kinds: the formulas as loops, their limits, patterns as edits and blocks see them, and what a family's own terms refuse."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as with_sinks

import patchbay as pb
from patchbay.blocks import kinds
from patchbay.signal.port import PatchbayError
from patchbay.tiny.twins import twin
from tests.blocks.given import IDS, built
from tests.given import lent
from tests.tolerance import close


def given(
    seed: int = 0, n: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    """A module with a null, and q of four heads beside k and v of two groups."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    module: Any = nn.Module()
    module.null_key, module.null_value, module.sigmoid_bias, module.is_causal = draw(2, 4), draw(2, 4), -0.7, True
    return module, (draw(2, 4, n, 4), draw(2, 2, n, 4), draw(2, 2, n, 4))


def by_loops(kind: str, module: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """z and the pattern, query by query, key by key, as the paper writes them."""
    n_prompts, n_heads, n, d = q.shape
    z, pattern = (
        torch.zeros(n_prompts, n, n_heads, d, dtype=q.dtype),
        torch.zeros(n_prompts, n_heads, n, n, dtype=q.dtype),
    )
    for b in range(n_prompts):
        for h in range(n_heads):
            group = h // 2
            for i in range(n):
                scores = [float(q[b, h, i] @ k[b, group, j]) / math.sqrt(d) for j in range(i + 1)]
                null = {"softmax1": 0.0}.get(kind, float(q[b, h, i] @ module.null_key[group]) / math.sqrt(d))
                if "sigmoid" in kind:
                    weights = [1 / (1 + math.exp(-(s + module.sigmoid_bias))) for s in scores]
                    total = sum(weights) if kind == "normalised_sigmoid" else 1.0
                else:
                    weights = [math.exp(s) for s in scores]
                    total = math.exp(null) + sum(weights)
                for j, weight in enumerate(weights):
                    pattern[b, h, i, j] = weight / total
                    z[b, i, h] += weight / total * v[b, group, j]
                if kind == "kv_bias":
                    z[b, i, h] += math.exp(null) / total * module.null_value[group]
    return z, pattern


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_reference(kind: str) -> None:
    """What attends and what is shown are the formula; so are their gradients, which the fused kernel makes by itself."""
    module, qkv = given()
    z, pattern = by_loops(kind, module, *qkv)
    numbers = torch.full((7, 7), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)[None, None]
    made, shown = kinds.show(kind, module, *qkv, numbers)
    for mask in (None, numbers > -1, numbers):
        assert close(kinds.attend(kind, module, *qkv, mask), z, dtype=torch.float64)
    assert close(made, z, dtype=torch.float64)
    assert close(shown, pattern, dtype=torch.float64)
    grads = []
    for function in (
        lambda *t: kinds.attend(kind, module, *t, None),
        lambda *t: kinds.show(kind, module, *t, numbers)[0],
    ):
        leaves = [t.clone().requires_grad_() for t in qkv]
        grads.append(torch.autograd.grad((function(*leaves) * z.cos()).sum(), leaves))
    assert all(close(a, b, dtype=torch.float64) for a, b in zip(*grads, strict=True))


def test_softmax1_is_a_null_key_of_score_0_and_a_sink_logit_of_0() -> None:
    module, (q, k, v) = given(dtype=torch.float32)
    module.null_key = torch.zeros(2, 4)  # type: ignore[assignment]
    one = kinds.attend("softmax1", module, q, k, v, None)
    assert torch.equal(one, kinds.attend("k_bias", module, q, k, v, None))
    sinks: Any = SimpleNamespace(sinks=torch.zeros(4), num_key_value_groups=2, training=False)
    mask = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)[None, None]
    z, _ = with_sinks(sinks, q, k, v, mask, scaling=0.5)
    assert close(one, z)


def test_a_null_far_below_is_the_softmax_and_row_mass_is_what_it_leaves() -> None:
    module, (q, k, _) = given()
    numbers = torch.full((7, 7), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)[None, None]
    q = q.abs()
    module.null_key = torch.full((2, 4), -1e4, dtype=torch.float64)  # type: ignore[assignment]
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) / 2 + numbers
    assert close(kinds.pattern("k_bias", module, q, k, numbers), scores.softmax(-1), dtype=torch.float64)
    module.null_key = torch.full((2, 4), 0.3, dtype=torch.float64)  # type: ignore[assignment]
    null = (q.sum(-1) * 0.15).exp()
    mass = kinds.pattern("k_bias", module, q, k, numbers).sum(-1)
    assert close(mass, 1 - null / (null + scores.exp().sum(-1)), dtype=torch.float64)


def test_a_sigmoid_grows_with_the_text_unless_its_bias_holds_it() -> None:
    """Scores of 0 weigh 1/2 each: z of equal values grows as T / 2; -log T leaves it near 1."""
    for n in (16, 256):
        q, one = torch.zeros(1, 1, n, 4), torch.ones(1, 1, n, 4)
        module: Any = SimpleNamespace(training=False, is_causal=True)
        assert float(kinds.attend("sigmoid", module, q, one, one, None)[0, -1, 0, 0]) == n / 2
        module.sigmoid_bias = -math.log(n)
        held = float(kinds.attend("sigmoid", module, q, one, one, None)[0, -1, 0, 0])
        assert 0.9 < held < 1.0


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_model_of_each_kind(kind: str) -> None:
    """Logits under taps are its own to the last bit, pattern edits are what they are by hand, a block is the mask's, the cache repeats."""
    model = pb.load(built(attention=kind))
    attn, head = model.layers[1].attn, model.layers[1].heads[1]
    with torch.no_grad():
        plain = model.hf(IDS, use_cache=False).logits
    trace = pb.run(model, IDS, taps=[attn.pattern, attn.v, attn.q, attn.k, attn.z, head.pattern.rows(-1)])
    assert torch.equal(trace.logits, plain)
    assert torch.equal(trace[head.pattern.rows(-1)][:, 0], trace[attn.pattern][:, 1, -1])
    mixed = torch.einsum("bhqk,bhkd->bqhd", trace[attn.pattern], trace[attn.v].repeat_interleave(2, 1))
    assert bool(close(mixed, trace[attn.z])) == (kind != "kv_bias")
    half = pb.run(model, IDS, edits=[pb.scale(head.pattern, 0.5)], taps=[attn.z])[attn.z]
    assert close(half[:, :, 1], trace[attn.z][:, :, 1] - 0.5 * mixed[:, :, 1])  # a null's value stays
    assert close(half[:, :, [0, 2, 3]], trace[attn.z][:, :, [0, 2, 3]])
    block = pb.block(attn.pattern, key=2, query=slice(4, None))
    cut = pb.run(model, IDS, edits=[block], taps=[attn.pattern, attn.z])
    module: Any = model.modules[1].attn
    hidden = torch.zeros(IDS.shape[1], IDS.shape[1]).masked_fill(
        torch.ones(IDS.shape[1], IDS.shape[1]).triu(1).bool(), -1e30
    )
    hidden[4:, 2] = -1e30
    z, pattern = kinds.show(
        kind, module, *(trace[port] for port in (attn.q, attn.k, attn.v)), hidden[None, None], scaling=module.scaling
    )
    assert close(cut[attn.pattern], pattern)
    assert close(cut[attn.z], z)
    short = [ids[:6] for ids in IDS.tolist()]
    assert model.generate(short, 5) == [list(map(int, row)) for row in _greedy(model.hf, torch.tensor(short), 5)]


def _greedy(hf: Any, ids: Tensor, n: int) -> Tensor:
    """Token by token without a cache."""
    for _ in range(n):
        with torch.no_grad():
            ids = torch.cat([ids, hf(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def test_sweeps_and_gradients() -> None:
    """A sweep restarts where a kind's keys and values are in a cache, and is brute force; gradients at patterns are differences."""
    model = pb.load(built(attention=["sigmoid", "kv_bias"]))
    heads = [head for layer in model.layers for head in layer.heads]
    edits = [pb.zero(head.z) for head in heads] + [pb.scale(heads[5].pattern, 0.3, positions=slice(4, None))]
    table = pb.sweep(model, IDS, edits, metric=lambda logits, _: logits[:, 7])
    brute = torch.stack([pb.run(model, IDS, edits=[edit]).last_logits[:, 7] for edit in edits])
    assert close(table["value"], brute)
    assert table.notes == ()  # restarted, not run whole
    port, whole = heads[5].pattern, model.layers[1].attn.pattern
    trace = pb.run(model, IDS, taps=[whole], grad=True)
    grad = torch.autograd.grad(trace.last_logits[:, 7].double().sum(), trace[whole])[0][:, 1]
    step = torch.zeros(IDS.shape[1], IDS.shape[1])
    step[5, 3] = 0.02
    ends = [
        pb.run(model, IDS, edits=[pb.add(port, sign * step[None])]).last_logits[:, 7].double().sum() for sign in (1, -1)
    ]
    assert abs(float(ends[0] - ends[1]) / 0.04 - float(grad[:, ..., 5, 3].sum())) < 2e-2 * float(
        grad.abs().max()
    ) * len(IDS)


@pytest.mark.parametrize("family", ["gpt_neox", "opt"])
def test_learned_keys_are_as_many_as_the_maps_make(family: str) -> None:
    """Also where a config carries a number of groups that its family does not read: a group each, of the key's width; the pattern times the values, and the null's, is z."""
    model = pb.load(built(family, attention="kv_bias"))
    attn, module = model.layers[1].attn, model.modules[1].attn
    trace = pb.run(model, IDS, taps=[attn.pattern, attn.k, attn.v, attn.z])
    assert module.null_key.shape == (trace[attn.k].shape[1], trace[attn.k].shape[3])
    heads = trace[attn.pattern].shape[1]
    v, null = (
        t.repeat_interleave(heads // len(module.null_value), d) for t, d in ((trace[attn.v], 1), (module.null_value, 0))
    )
    z = trace[attn.pattern] @ v + (1 - trace[attn.pattern].sum(-1))[..., None] * null[None, :, None].detach()
    assert close(trace[attn.z].reshape(z.transpose(1, 2).shape), z.transpose(1, 2))


def test_a_layer_without_a_kind_is_its_familys_own_also_where_it_has_sinks() -> None:
    """Beside a mixer, whose implementation the config then names for all layers."""
    plain = twin("gpt_oss")
    hf = pb.blocks.build(plain, mixer=["attention", *["gla"] * (len(plain.model.layers) - 1)])
    with torch.no_grad():
        one, other = (m.model(IDS, output_hidden_states=True).hidden_states[1] for m in (hf, plain))
        assert close(one, other)
        plain.model.layers[0].self_attn.sinks.add_(2.0)
        assert not close(plain.model(IDS, output_hidden_states=True).hidden_states[1], other)


def test_any_model_takes_a_kind_without_weights_by_name() -> None:
    """softmax1 in a model that was trained with a softmax: rows of less than 1, and the first token's attention beside their mass."""
    model, plain = pb.load("tiny", attn_implementation="softmax1"), pb.load("tiny")
    texts = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(0)).tolist()
    found, usual = (pb.find.attention_sinks(m, texts) for m in (model, plain))
    assert float(found["mass"].max()) < 1.0
    assert close(usual["mass"], torch.ones_like(usual["mass"]))


def test_what_a_kind_cannot_be_is_refused() -> None:
    with pytest.raises(PatchbayError, match=r"no attention 'sigmiod'; kinds are softmax, .* did you mean 'sigmoid'"):
        built(attention="sigmiod")
    with pytest.raises(PatchbayError, match="attention 'softmax1' has no bias; only the sigmoids"):
        built(attention={"kind": "softmax1", "bias": 1.0})
    with pytest.raises(PatchbayError, match="attention: 3 given for 2 layers"):
        built(attention=["sigmoid"] * 3)
    with pytest.raises(
        PatchbayError, match="attention cannot be put into gpt_neo, which computes its attention itself"
    ):
        built("gpt_neo", attention="sigmoid")
    with pytest.raises(PatchbayError, match="attention 'sigmoid' has no s_aux"):
        built("gpt_oss", attention="sigmoid")(IDS)
    for family in ("jamba", "mamba"):
        with pytest.raises(PatchbayError, match=f"layer 0 of this {family} has no attention to put blocks into"):
            built(family, attention="sigmoid")
    with pytest.raises(
        PatchbayError, match="a learned key cannot be put into deepseek_v3, which makes keys of a latent"
    ):
        built("deepseek_v3", attention="k_bias")
    hf = built(attention="sigmoid")
    hf.set_attn_implementation("sdpa")
    with pytest.raises(
        PatchbayError,
        match="attention 'sdpa' was named for a model whose blocks are attention: it would compute a plain softmax",
    ):
        hf(IDS)


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ({"attention": {"kind": "sigmoid", "bias": float("nan")}}, "bias=nan: a number, and a finite one"),
        ({"attention": {"kind": "sigmoid", "bias": "low"}}, "bias='low': a number"),
        ({"gate": float("inf")}, "gate=inf: a number, and a finite one"),
        ({"convolution": 10**6}, r"convolution=1000000: this model reads at most \d+ tokens"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(blocks: dict[str, Any], says: str) -> None:
    with pytest.raises(PatchbayError, match=says):
        pb.blocks.build(lent("llama").hf.config, **blocks)


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ({"attention": {"kind": "softmax", "bias": 1.0}}, "attention 'softmax' has no bias; only the sigmoids"),
        ({"attention": ["sigmoid", {"kind": "softmax", "temperature": 2}]}, "attention 'softmax' has no temperature; only"),
        ({"attention": {"kind": "kv_bias", "width": 2, "bias": 0.0}}, "attention 'kv_bias' has no bias, width; only"),
        ({"feedforward": {"kind": "dense", "rank": 4}}, "feedforward 'dense' has no rank: it is the family's own"),
        ({"feedforward": [{"kind": "low_rank", "rank": 4}, {"kind": "dense", "blocks": 2, "guided": True}]}, "'dense' has no blocks, guided"),
    ],
)  # fmt: skip
def test_settings_of_what_is_the_family_s_own_are_refused(blocks: dict[str, Any], says: str) -> None:
    with pytest.raises(PatchbayError, match=says):
        pb.blocks.build(lent("llama").hf.config, **blocks)


def test_the_family_s_own_named_by_layer_is_the_plain_model() -> None:
    plain = lent("llama")
    named = pb.blocks.build(plain.hf, attention=["softmax"] * plain.n_layers, feedforward=["dense"] * plain.n_layers)
    assert torch.equal(named(IDS).logits, plain.hf(IDS).logits)
