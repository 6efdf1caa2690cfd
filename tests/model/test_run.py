"""run: taps see what the model used, padding changes nothing, gradients are true, and nothing is left or computed in vain."""

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import patchbay as pb
from patchbay.jacks.session import Session, attention
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError, Port
from patchbay.tiny.twins import FAMILY_CONFIGS, N_VOCAB, twin
from tests.given import unhooked as lent
from tests.shares import by_turns
from tests.tolerance import NOISE, close


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, N_VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [tokens(11, 1), tokens(4, 2), tokens(1, 3), tokens(8, 4)]


def clean(model: Model) -> bool:
    hooks = any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.hf.modules())
    return not hooks and not attention._ACTIVE and not model.hf.config._attn_implementation.startswith(attention.PREFIX)


# ---- padding and batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", by_turns(FAMILY_CONFIGS, of=6))
def test_padding_changes_nothing_and_is_nan(name: str) -> None:
    model = lent(name)
    ports = model.ports()
    noise = 16 * NOISE if name == "qwen3_next" else NOISE  # the gated norm of its linear attention magnifies rounding
    edits = [
        pb.scale(model.layers[0].attn.out, -0.5, positions=-1),
        pb.add(model.layers[1].resid_in, 0.3, positions="last"),
    ]
    together = pb.run(model, PROMPTS, taps=ports, edits=edits)
    for i, prompt in enumerate(PROMPTS):
        alone = pb.run(model, [prompt], taps=ports, edits=edits)
        n = len(prompt)
        assert close(together.logits[i, :n], alone.logits[0], noise=noise)
        assert close(together.last_logits[i], alone.last_logits[0], noise=noise)
        assert bool(together.logits[i, n:].isnan().all())
        for port in ports:
            axes = list(port.axes[1:])
            mine, own = together[port][i], alone[port][0]
            inside = tuple(slice(n) if axis in ("position", "query", "key") else slice(None) for axis in axes)
            assert close(mine[inside], own, noise=noise), port
            at_last = together.last(port)[i][..., : n if axes[-1] == "key" else None]
            assert close(at_last, alone.last(port)[0], noise=noise), port
            beyond = mine.narrow(axes.index(whole_position(port)), n, mine.shape[axes.index(whole_position(port))] - n)
            assert bool((beyond == -1).all() if not mine.is_floating_point() else beyond.isnan().all()), port
        if "attn.pattern" in model.signals(1):
            assert float(together[Port("attn.pattern", 1)][i, :, :n, n:].abs().sum()) == 0
    assert together.lengths.tolist() == [len(prompt) for prompt in PROMPTS]
    assert together.touched == [[(len(prompt) - 1,) for prompt in PROMPTS]] * 2


def whole_position(port: Port) -> str:
    return Port(port.signal, port.layer).axes[port.position_axis]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_batches_equal_one_run(name: str, logits: str, size: int) -> None:
    model = lent(name)
    ports = [*model.ports(), model.layers[1].heads[2].pattern.rows(-1, 0), model.layers[1].heads[1].k]
    edits = [pb.zero(model.layers[0].attn.out, positions=-1)]
    whole = pb.run(model, PROMPTS, taps=ports, edits=edits, logits=logits)
    parts = pb.run(model, PROMPTS, taps=ports, edits=edits, logits=logits, batch_size=size)
    assert parts.touched == whole.touched
    assert torch.equal(parts.ids, whole.ids)
    assert torch.equal(parts.lengths, whole.lengths)
    assert close(parts.logits, whole.logits, equal_nan=True)
    assert close(parts.last_logits, whole.last_logits)
    for port in ports:
        assert close(parts[port].double(), whole[port].double(), equal_nan=True), port


@pytest.mark.parametrize("size", [1, 2, 3])
def test_edits_by_row_and_mask_count_in_all_prompts_whatever_the_batches(size: int) -> None:
    model = lent("llama")
    out, z = model.layers[0].resid_out, model.layers[0].attn.z
    plain = pb.run(model, PROMPTS).logits.nan_to_num()
    mask = torch.zeros(4, 2, dtype=torch.bool)
    mask[0], mask[2, 0] = True, True
    numbers = torch.randn(4, 1, model.d_model, generator=torch.Generator().manual_seed(3))
    own = next(token for token in PROMPTS[0] if not any(token in prompt for prompt in PROMPTS[1:]))
    for edits in (
        [pb.zero(z, rows=[3, 1])],
        [pb.scale(out, 0.5, positions=mask)],
        [pb.add(out, numbers)],
        [pb.replace(out, numbers[:2], rows=[2, 0], positions=-1)],
        [pb.add(out, numbers[0, 0], positions=pb.Token(own))],  # in no prompt of a later batch
        [pb.zero(z, rows=1), pb.add(out, numbers), pb.scale(out, 2.0, rows=[0, 3])],
    ):
        whole = pb.run(model, PROMPTS, taps=[out], edits=edits)
        parts = pb.run(model, PROMPTS, taps=[out], edits=edits, batch_size=size)
        assert close(parts.logits, whole.logits, equal_nan=True)
        assert close(parts[out], whole[out], equal_nan=True)
        assert (parts.touched, parts.edits) == (whole.touched, edits)
        assert not torch.allclose(whole.logits.nan_to_num(), plain, atol=1e-3)
    with pytest.raises(PatchbayError, match=r"row 4 asked, the batch has prompts 0\.\.3"):
        pb.run(model, PROMPTS, edits=[pb.zero(z, rows=4)], batch_size=size)


def test_a_trace_prints_what_it_holds() -> None:
    model = lent("llama")
    pattern, z = model.layers[1].heads[2].pattern.rows(-1), model.layers[0].attn.z
    trace = pb.run(model, PROMPTS, taps=[pattern, z], edits=[pb.zero(z, rows=[0, 3], positions=-1)])
    assert str(trace).splitlines() == [
        f"Trace of 4 prompts of 1 to 11 tokens: logits [4, 11, {N_VOCAB}]",
        "  L0.attn.z [prompt, position, head, d_head] [4, 11, 4, 8]",
        "  L1.H2.pattern[-1] [prompt, query, key] [4, 1, 11]",
        "  zero(L0.attn.z, positions=-1, rows=[0, 3]) touched 2 positions of 2 prompts",
    ]
    assert str(pb.run(model, PROMPTS[2:3], logits="last")) == f"Trace of 1 prompt of 1 tokens: logits [1, 1, {N_VOCAB}]"


def test_last_logits_are_those_of_each_prompts_end() -> None:
    for name in ("gpt2", "mamba2", "gemma2", "opt", "gptj", "bloom", "falcon"):
        model = lent(name)
        everything = pb.run(model, PROMPTS).logits
        expected = torch.stack([everything[i, len(prompt) - 1] for i, prompt in enumerate(PROMPTS)])
        ragged = pb.run(model, PROMPTS, logits="last")
        assert tuple(ragged.logits.shape) == (4, 1, N_VOCAB)
        assert torch.equal(ragged.last_logits, expected)
        even = pb.run(model, [PROMPTS[0], PROMPTS[0]], logits="last")
        assert close(even.last_logits, expected[:1].expand(2, -1))
        assert tuple(even.logits.shape) == (2, 1, N_VOCAB)


def test_what_a_run_refuses() -> None:
    model = lent("llama")
    z = model.layers[0].attn.z
    for options, says in (
        ({"logits": "first"}, "logits='first': 'all' or 'last'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2, "grad": True}, "cannot be combined with grad"),
        ({"edits": ["zero"]}, "expected edits or knobs, got str"),
        ({"taps": [Port("attn.pattern", 0, None, (4,))]}, r"rows \[4\] asked, the shortest prompt has 1"),
        ({"taps": [Port("attn.pattern", 0, None, (-2,))]}, r"rows \[-2\] asked, the shortest prompt has 1"),
    ):
        with pytest.raises(PatchbayError, match=says):
            pb.run(model, PROMPTS, **options)
    with pytest.raises(PatchbayError, match="cannot be combined"), model.edited(pb.zero(z, rows=3)):
        pb.run(model, PROMPTS, batch_size=2)  # rows of an enclosing block count too
    trace = pb.run(model, PROMPTS, taps=[z, model.layers[0].heads[1].pattern.rows(0)])
    with pytest.raises(PatchbayError, match=r"L1.attn.z was not tapped; tapped were L0.H1.pattern\[0\], L0.attn.z"):
        trace[model.layers[1].attn.z]
    with pytest.raises(PatchbayError, match="was not tapped"):
        trace[model.layers[0].heads[1].pattern]
    with pytest.raises(PatchbayError, match="query rows are chosen by the port"):
        trace.last(model.layers[0].heads[1].pattern.rows(0))
    with pytest.raises(PatchbayError, match="carries no gradient"):
        trace.gradient(trace.logits.sum(), z)
    assert clean(model)


# ---- what taps see ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "mixtral", "bloom", "falcon", "deepseek_v3"])
def test_one_head_neuron_or_expert_is_its_slice_of_the_whole(name: str) -> None:
    model = lent(name)
    layer = model.layers[1]
    parts = [port for view in (layer.heads[2], layer.groups[-1], layer.heads[0]) for port in view.ports()]
    parts += [n.act for n in layer.mlp.neurons[3:5]] + [port for e in layer.experts[:2] for port in e.ports()]
    wholes = list(dict.fromkeys(Port(port.signal, port.layer) for port in parts))
    together = pb.run(model, PROMPTS, taps=wholes)
    for tapped in (parts, [*wholes, *parts]):
        trace = pb.run(model, PROMPTS, taps=tapped)
        for port in parts:
            at = Port(port.signal, 1).axes.index(port.index_axis)
            expected = together[Port(port.signal, 1)].select(at, port.index)
            assert close(trace[port], expected, equal_nan=True), port
            assert torch.equal(together[port].nan_to_num(), expected.nan_to_num())
            assert trace[port].ndim == len(port.axes)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gptj", "bloom", "falcon", "falcon alibi", "mistral"])
def test_chosen_query_rows_equal_those_of_the_whole_pattern(name: str) -> None:
    model = lent(name)
    prompts = [tokens(9), tokens(6, 1)]
    layer = model.layers[1]
    whole = pb.run(model, prompts, taps=[layer.attn.pattern])[layer.attn.pattern]
    rows = [layer.attn.pattern.rows(-1, 2), layer.heads[2].pattern.rows(4), layer.heads[0].pattern.rows(2, -1)]
    for edits in ([], [pb.scale(layer.attn.pattern, 1.0)]):
        for taps in (rows, [*rows, layer.attn.pattern]):
            trace = pb.run(model, prompts, taps=taps, edits=edits)
            for i, n in enumerate((9, 6)):
                assert close(trace[rows[0]][i], whole[i][:, [n - 1, 2]])
                assert close(trace[rows[1]][i], whole[i, 2, [4]])
                assert close(trace[rows[2]][i], whole[i, 0, [2, n - 1]])
    assert close(
        trace[layer.heads[3].pattern.rows(-1, 2)], whole[:, 3][torch.arange(2)[:, None], torch.tensor([[8, 2], [5, 2]])]
    )


def test_router_logits_of_deepseek_go_through_sigmoid_correction_and_groups() -> None:
    model = lent("deepseek_v3")
    router, port = model.modules[1].router, Port("router.logits", 1)
    base = pb.run(model, PROMPTS[:1], taps=[port])[port]
    new = base.flip(-1) * 2
    trace = pb.run(
        model,
        PROMPTS[:1],
        taps=[Port("router.weights", 1), Port("router.experts", 1), port],
        edits=[pb.replace(port, new)],
    )
    assert torch.equal(trace[port], new)
    for place in range(
        len(PROMPTS[0])
    ):  # two groups of four: the group whose best two are best, then its best two experts
        scores = [float(torch.sigmoid(x)) for x in new[0, place]]
        choice = [s + float(c) for s, c in zip(scores, router.e_score_correction_bias, strict=True)]
        group = max((0, 4), key=lambda g: sum(sorted(choice[g : g + 4])[-2:]))
        best = sorted(range(group, group + 4), key=lambda e: choice[e])[-2:]
        assert sorted(trace[Port("router.experts", 1)][0, place].tolist()) == sorted(best)
        total = sum(scores[e] for e in best)
        for e in range(8):
            expected = scores[e] / total * router.routed_scaling_factor if e in best else 0.0
            assert close(float(trace[Port("router.weights", 1)][0, place, e]), expected, of=1.0)


def test_router_logits_of_gpt_oss_choose_first_and_normalise_the_chosen() -> None:
    model, port = lent("gpt_oss"), Port("router.logits", 0)
    base = pb.run(model, PROMPTS[:1], taps=[port])[port]
    trace = pb.run(model, PROMPTS[:1], taps=[Port("router.weights", 0)], edits=[pb.scale(port, -1.0)])
    values, chosen = (-base).topk(2, dim=-1)
    expected = torch.zeros_like(base).scatter(-1, chosen, values.softmax(-1))
    assert close(trace[Port("router.weights", 0)], expected)


def test_an_expert_that_is_given_weight_where_it_was_not_chosen_really_runs() -> None:
    for name in ("mixtral", "gpt_oss", "qwen3_next"):
        model = lent(name)
        layer = model.layers[0]
        weights, out = layer.router.weights, layer.attn.part.port()
        base = pb.run(model, PROMPTS[:1], taps=[weights, layer.experts[1].out])
        idle = int((base[weights][0, :, 1] == 0).nonzero()[0, 0])
        assert float(base[layer.experts[1].out][0, idle].abs().max()) == 0
        trace = pb.run(
            model,
            PROMPTS[:1],
            taps=[layer.experts[1].out, weights],
            edits=[pb.add(layer.experts[1].weight, 0.5, positions=idle)],
        )
        twice = pb.run(
            model,
            PROMPTS[:1],
            taps=[layer.experts[1].out],
            edits=[pb.add(layer.experts[1].weight, 1.0, positions=idle)],
        )
        assert float(trace[layer.experts[1].out][0, idle].abs().max()) > 1e-3
        assert close(2 * trace[layer.experts[1].out][0, idle], twice[layer.experts[1].out][0, idle])
        assert float(trace[weights][0, idle, 1]) == 0.5
        assert out is not None


# ---- attention stays causal, and costs only where asked --------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma2", "qwen3_next", "falcon", "gptj"])
def test_a_later_token_changes_nothing_before_it_under_attention_taps(name: str) -> None:
    """Registered without a mask of its own, the attention function would turn bidirectional."""
    model = lent(name)
    ports = [port for port in model.ports() if port.signal.startswith("attn.")]
    one, two = [tokens(10), tokens(10)]
    two = two[:6] + tokens(4, 9)
    found, changed = (pb.run(model, [ids], taps=ports) for ids in (one, two))
    assert close(found.logits[0, :6], changed.logits[0, :6])
    assert not torch.allclose(found.logits[0, 6:], changed.logits[0, 6:], atol=1e-3)
    plain = model.hf(torch.tensor([one]), use_cache=False).logits
    assert close(found.logits, plain)
    fused = [port for port in ports if port.signal != "attn.pattern"] + [model.layers[1].attn.pattern.rows(-1, 0)]
    assert torch.equal(pb.run(model, [one], taps=fused).logits, plain)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bloom"])
def test_rows_of_a_pattern_are_those_of_the_whole(name: str) -> None:
    """Also where attention has a soft cap or sinks, whose rows no plain softmax gives."""
    model = lent(name)
    pattern = model.layers[1].attn.pattern
    whole = pb.run(model, PROMPTS[:1], taps=[pattern])[pattern]
    rows = pattern.rows(-1, 3)
    assert close(pb.run(model, PROMPTS[:1], taps=[rows])[rows], whole[..., [10, 3], :], of=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_whole_pattern_is_what_the_model_used_where_rounding_allows_it(dtype: torch.dtype) -> None:
    hf = copy.deepcopy(lent("llama").hf).to(dtype)
    model = pb.load(hf)
    layer = model.layers[1]
    trace = pb.run(model, [tokens(10)], taps=[layer.attn.pattern, layer.attn.v, layer.attn.z])
    value = trace[layer.attn.v].repeat_interleave(model.n_heads(1) // model.n_groups(1), 1)
    from_pattern = (trace[layer.attn.pattern] @ value).transpose(1, 2)
    plain = hf(torch.tensor([tokens(10)]), use_cache=False).logits
    if dtype == torch.bfloat16:  # there the fused kernel stays, and the logits are its own
        assert torch.equal(trace.logits, plain)
        assert torch.allclose(trace[layer.attn.z], from_pattern, atol=0.02)
    else:
        assert torch.equal(trace[layer.attn.z], from_pattern)
        assert close(trace.logits, plain)


def test_the_mask_of_the_attention_that_is_wrapped_is_registered_with_it() -> None:
    model = lent("llama")
    pb.run(model, PROMPTS[:1], taps=[model.layers[0].attn.q])
    assert ALL_MASK_ATTENTION_FUNCTIONS[attention.PREFIX + "sdpa"] is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records how many query rows each pattern has that is computed."""
    calls: list[int] = []
    own, plain = attention.eager_of, attention.plain_pattern

    def spied(module: nn.Module):
        def eager(module: nn.Module, query: Tensor, *args: object, **kwargs: object):
            calls.append(query.shape[2])
            return own(module)(module, query, *args, **kwargs)

        return eager

    def spied_plain(query: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append(query.shape[2])
        return plain(query, *args, **kwargs)

    monkeypatch.setitem(attention.SHOWN, "sdpa", spied)
    monkeypatch.setattr(attention, "plain_pattern", spied_plain)
    return calls


def test_patterns_are_computed_only_in_the_layers_and_rows_that_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lent("llama")
    calls = computed(monkeypatch)
    layer = model.layers[1]
    for taps, expected in (
        ([], []),
        ([port for port in model.ports() if port.signal != "attn.pattern"], []),
        ([layer.attn.pattern], [11]),
        ([layer.heads[2].pattern.rows(-1)], [1]),
        ([layer.heads[2].pattern.rows(-1), layer.heads[0].pattern.rows(0, -1)], [2]),
        ([model.layers[0].attn.pattern.rows(-1), layer.attn.pattern], [1, 11]),
    ):
        calls.clear()
        pb.run(model, PROMPTS[:1], taps=taps)
        assert calls == expected
    for edits, expected in (
        ([pb.zero(layer.heads[0].pattern)], [11]),
        ([pb.block(layer.attn.pattern, query=5, key=1)], []),
    ):
        calls.clear()
        pb.run(model, PROMPTS[:1], edits=edits)
        assert calls == expected


def test_a_tap_of_one_head_does_not_keep_the_others_in_memory() -> None:
    model = lent("llama")
    for port in (model.layers[0].heads[1].z, model.layers[0].heads[1].pattern, model.layers[0].mlp.neurons[3].act):
        value = pb.run(model, PROMPTS[:1], taps=[port])[port]
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), port


def test_an_untapped_run_touches_no_module_and_is_the_models_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lent("llama")
    plain = model.hf(torch.tensor(PROMPTS[:1]), use_cache=False).logits

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a hook was placed")

    for name in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        monkeypatch.setattr(nn.Module, name, refuse)
    monkeypatch.setattr(attention, "listen", refuse)
    assert torch.equal(pb.run(model, PROMPTS[:1]).logits, plain)
    model.generate(PROMPTS[:1], 2)
    with pytest.raises(AssertionError, match="a hook was placed"):  # the guard does guard
        pb.run(model, PROMPTS[:1], taps=[model.layers[0].resid_in])


def test_a_tap_hooks_only_what_it_needs() -> None:
    model = lent("llama")
    with model.session([model.layers[1].resid_out, model.layers[0].attn.q]):
        touched = [
            name
            for name, m in model.hf.named_modules()
            if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__
        ]
        assert touched == ["", "model", "model.layers.1"]  # where runs begin, and the one signal
        assert list(attention._ACTIVE) == [id(model.modules[0].attn)]
    assert clean(model)


def test_hooks_of_others_are_heard_and_stay() -> None:
    """What another hook changes is what the model used: a tap sees it, an edit acts on it, on this layer as on others."""
    model, port = lent("llama"), pb.Port("resid_out", 1)
    plain = pb.run(model, PROMPTS[:1], taps=[port])[port]
    with model.edited(pb.scale(port, 3.0)):
        inside = model.modules[1].layer.register_forward_hook(lambda *given: given[-1] * 2)  # placed after the edit
        assert torch.equal(pb.run(model, PROMPTS[:1], taps=[port])[port], plain * 2 * 3)
    assert torch.equal(pb.run(model, PROMPTS[:1], taps=[port])[port], plain * 2)
    seen = pb.run(model, PROMPTS[:1], taps=[port], edits=[pb.add(port, 1.0)])
    assert torch.equal(seen[port], plain * 2 + 1)
    assert inside.id in model.modules[1].layer._forward_hooks
    inside.remove()
    own = model.modules[1].layer.forward
    model.modules[1].layer.forward = lambda *args, **kwargs: (
        own(*args, **kwargs) * 2
    )  # an instance's own, as accelerate's
    replaced = model.modules[1].layer.forward
    assert torch.equal(pb.run(model, PROMPTS[:1], taps=[port])[port], plain * 2)
    assert model.modules[1].layer.forward is replaced
    del model.modules[1].layer.forward
    assert clean(model)


# ---- nothing is left -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", by_turns(["llama", "mixtral", "gptj", "falcon", "gemma2", "mamba2", "opt"], of=2))
def test_no_hook_is_left_after_an_error_at_any_port(name: str) -> None:
    model = lent(name)
    before = pb.run(model, PROMPTS).logits
    for port in model.ports():
        if port.editable:
            with pytest.raises((PatchbayError, RuntimeError)):
                pb.run(model, PROMPTS, taps=model.ports(), edits=[pb.add(port, torch.zeros(2, 3, 4, 5, 6, 7))])
            assert clean(model), port
    with pytest.raises(KeyboardInterrupt), model.session(model.ports()):
        raise KeyboardInterrupt
    assert clean(model)
    assert torch.equal(pb.run(model, PROMPTS).logits.nan_to_num(), before.nan_to_num())


def test_an_error_while_hooks_are_placed_takes_them_away(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lent("llama")

    def fail(self: Session, layer: int) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(Session, "_attach_attention", fail)
    with pytest.raises(RuntimeError, match="no room"):
        pb.run(model, PROMPTS, taps=model.ports())
    assert clean(model)


def test_a_trace_does_not_keep_the_session_or_the_graph() -> None:
    model = lent("llama")
    trace = pb.run(model, PROMPTS, taps=model.ports())
    assert not any(trace[port].requires_grad for port in trace.ports)
    assert not trace.logits.requires_grad
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is Session]


def test_edited_blocks_nest_in_order_and_end_where_they_end() -> None:
    model = lent("llama")
    port = model.layers[0].resid_out
    value = torch.randn(32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(PROMPTS[:1])
    plain = model.hf(ids).logits
    set_, add, scale = pb.replace(port, value), pb.add(port, value), pb.scale(port, -1.0)
    with model.edited(set_):
        first = model.hf(ids).logits
        with model.edited(add):
            second = model.hf(ids).logits
            third = pb.run(model, ids, edits=[scale], taps=[port])
        assert torch.equal(model.hf(ids).logits, first)
        with pytest.raises(RuntimeError, match="stop"), model.edited(add):
            raise RuntimeError("stop")
        assert torch.equal(model.hf(ids).logits, first)
        with pytest.raises(PatchbayError, match="layers 0..1"), model.edited(pb.zero(Port("attn.z", 7))):
            pass
        assert torch.equal(model.hf(ids).logits, first)
    assert clean(model)
    assert torch.equal(model.hf(ids).logits, plain)
    assert torch.equal(first, pb.run(model, ids, edits=[set_]).logits)
    assert torch.equal(second, pb.run(model, ids, edits=[set_, add]).logits)
    assert close(third[port], (-2 * value).expand_as(third[port]))
    assert [str(edit) for edit in model.active_edits([add])] == [str(add)]


class Strong:
    """What a knob is to `edited`: something that gives its edits at a strength."""

    def __init__(self, port: Port) -> None:
        self.port = port

    def edits_at(self, strength: float | None) -> list[pb.Edit]:
        return [pb.scale(self.port, 1.0 if strength is None else strength)]


def test_knobs_and_lists_of_edits_are_taken_too() -> None:
    model = lent("llama")
    port = model.layers[0].heads[1].z
    with model.edited([Strong(port)], strength=0.0):
        found = model.hf(torch.tensor(PROMPTS[:1])).logits
    assert torch.equal(found, pb.run(model, PROMPTS[:1], edits=[pb.scale(port, 0.0)]).logits)
    assert torch.equal(pb.run(model, PROMPTS[:1], edits=[[Strong(port)]]).logits, pb.run(model, PROMPTS[:1]).logits)


def test_left_padding_is_exact() -> None:
    model = lent("llama")
    ids, mask = torch.tensor([[0, 0, *PROMPTS[1]]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    port = model.layers[0].attn.out
    each = pb.add(port, torch.randn(4, 32, generator=torch.Generator().manual_seed(0)))
    for edit in (pb.zero(port), pb.zero(port, positions=1), each):
        with model.edited(edit):
            found = model.hf(ids, attention_mask=mask, position_ids=torch.tensor([[0, 0, 0, 1, 2, 3]])).logits
        expected = pb.run(model, PROMPTS[1:2], edits=[edit]).logits
        assert close(found[:, 2:], expected)


# ---- gradients -------------------------------------------------------------------------------------------------------

GRADIENT = (
    "llama",
    "gpt2",
    "opt",
    "bloom",
    "gptj",
    "falcon",
    "falcon alibi",
    "gemma2",
    "olmo2",
    "granite",
    "phi",
    "mixtral",
)
GRADIENT += ("gpt_oss", "deepseek_v3", "qwen3_next", "mamba2", "lfm2", "flex_olmo")


def score(logits: Tensor) -> Tensor:
    """A number that depends on every logit of the last position."""
    return (logits * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)).sum()


def in_double(name: str, frozen: bool = False) -> Model:
    hf = twin(name).double().requires_grad_(not frozen)
    if any("experts" in part for part, _ in hf.named_modules()):
        hf.set_experts_implementation("eager")  # the grouped kernel takes no float64
    return pb.load(hf)


@pytest.mark.parametrize(
    ("name", "frozen"), [*((name, False) for name in GRADIENT), ("llama", True), ("falcon", True), ("phi", True)]
)
def test_the_gradient_at_every_port_is_the_slope_of_an_edit_there(name: str, frozen: bool) -> None:
    """trace.gradient against (f(x + e d) - f(x - e d)) / 2e, d random, the step made by an edit of that port.

    Several steps: a large one crosses corners (ReLU, other experts), a small one drowns where a family rounds to float32.
    """
    model = in_double(name, frozen)
    prompt = [tokens(7, 5)]
    ports = [
        p for p in model.ports() if p.editable and not (p.signal.startswith("router") and "logits" not in p.signal)
    ]
    trace = pb.run(model, prompt, taps=ports, grad=True)
    plain = pb.run(model, prompt)
    assert close(trace.logits, plain.logits)
    gradients = trace.gradient(score(trace.last_logits[0]), *ports)
    generator = torch.Generator().manual_seed(0)
    sizes, slopes, edits = (1e-3, 1e-4, 1e-5), [], []
    for port, gradient in zip(ports, gradients, strict=True):
        assert gradient.shape == trace[port].shape
        value = trace[port].detach().movedim(port.position_axis, 1)[0]
        step = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        step = step * (value != 0) if port.signal in ("attn.pattern", "experts.out") else step
        slopes.append(float((gradient.movedim(port.position_axis, 1)[0] * step).sum()))
        moves = torch.stack([sign * size * step for size in sizes for sign in (1, -1)])  # [row, position, ...]
        edits.append(pb.add(port, moves, rows=range(len(edits) * len(moves), (len(edits) + 1) * len(moves))))
    moved = pb.run(model, prompt * len(edits) * 2 * len(sizes), edits=edits).last_logits.unflatten(
        0, (-1, len(sizes), 2)
    )
    for port, slope, pairs in zip(ports, slopes, moved, strict=True):
        found = [float(score(up) - score(down)) / (2 * size) for size, (up, down) in zip(sizes, pairs, strict=True)]
        assert min(abs(slope - other) for other in found) < 1e-2 * max(abs(slope), 0.3), (port, slope, found)
    assert max(map(abs, slopes)) > 1
    assert all(p.grad is None for p in model.hf.parameters())


@pytest.mark.parametrize("kept", ["all", "last"])
def test_a_graph_is_kept_where_the_caller_keeps_none(kept: str) -> None:
    """Prompts of several lengths: the logits that are read of the batch belong to the graph under torch.no_grad() too."""
    model = lent("llama")
    port = model.layers[0].resid_out
    grads = []
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            trace = pb.run(model, PROMPTS, taps=[port], logits=kept, grad=True)
            assert trace.logits.requires_grad
        with torch.enable_grad():
            grads.append(trace.gradient(trace.last_logits[:, 5].sum(), port)[0].nan_to_num())
    assert torch.equal(*grads)


def test_gradients_of_parts_rows_and_padded_prompts() -> None:
    model = lent("llama")
    layer = model.layers[0]
    ports = [
        layer.heads[2].z,
        layer.heads[1].pattern.rows(-1),
        layer.attn.pattern,
        layer.attn.z,
        layer.mlp.neurons[4].act,
        layer.resid_mid,
    ]
    together = pb.run(model, PROMPTS, taps=ports, grad=True)
    gradients = dict(zip(ports, together.gradient(together.last_logits.pow(2).sum(), *ports), strict=True))
    assert torch.equal(gradients[layer.heads[2].z].nan_to_num(), gradients[layer.attn.z][:, :, 2].nan_to_num())
    for i, prompt in enumerate(PROMPTS):
        n = len(prompt)
        row = gradients[layer.heads[1].pattern.rows(-1)][i, 0]
        assert torch.equal(row, gradients[layer.attn.pattern][i, 1, n - 1])
        alone = pb.run(model, [prompt], taps=ports, grad=True)
        own = dict(zip(ports, alone.gradient(alone.last_logits.pow(2).sum(), *ports), strict=True))
        for port in (layer.heads[2].z, layer.attn.z, layer.mlp.neurons[4].act, layer.resid_mid):
            assert close(gradients[port][i, :n], own[port][0], noise=4 * NOISE), port  # there and back
            assert bool(gradients[port][i, n:].isnan().all())
            assert float(own[port].abs().max()) > 1e-4
            assert close(together[port][i, :n], alone[port][0])
            assert bool(together[port][i, n:].isnan().all())


def test_gradients_flow_through_edits_of_single_parts_and_to_their_values() -> None:
    """An edit of one head or expert must not cut the gradient through the others."""
    for name, signal in (("llama", "attn.head_out"), ("mixtral", "experts.out")):
        model = in_double(name)
        edit = pb.scale(Port(signal, 1, 1), 0.5)
        port, prompt = model.layers[0].resid_in, [tokens(6, 5)]
        trace = pb.run(model, prompt, taps=[port], edits=[edit], grad=True)
        (gradient,) = trace.gradient(score(trace.last_logits[0]), port)
        step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=gradient.dtype)[0]
        up, down = (pb.run(model, prompt, edits=[edit, pb.add(port, s * 1e-3 * step)]).last_logits for s in (1, -1))
        slope = (score(up[0]) - score(down[0])) / 2e-3
        assert float((gradient[0] * step).sum().detach()) == pytest.approx(float(slope), rel=1e-2)
    value = torch.zeros(32, requires_grad=True)
    model = lent("llama")
    trace = pb.run(model, PROMPTS[:1], edits=[pb.add(model.layers[0].resid_out, value, positions=3)], grad=True)
    (by_value,) = torch.autograd.grad(score(trace.last_logits[0]), [value])
    tapped = pb.run(model, PROMPTS[:1], taps=[model.layers[0].resid_out], grad=True)
    (by_tap,) = tapped.gradient(score(tapped.last_logits[0]), model.layers[0].resid_out)
    assert close(by_value, by_tap[0, 3])


def test_gradients_of_the_dense_weights_of_a_router() -> None:
    model = in_double("mixtral")
    port = model.layers[0].router.weights
    prompt = [tokens(6, 5)]
    trace = pb.run(model, prompt, taps=[port], grad=True)
    (gradient,) = trace.gradient(score(trace.last_logits[0]), port)
    chosen = (trace[port].detach() != 0).double()
    step = torch.randn(chosen.shape, generator=torch.Generator().manual_seed(0), dtype=torch.double) * chosen
    up, down = (pb.run(model, prompt, edits=[pb.add(port, s * 1e-4 * step[0])]).last_logits for s in (1, -1))
    slope = (score(up[0]) - score(down[0])) / 2e-4
    assert float((gradient * step).sum().detach()) == pytest.approx(float(slope), rel=1e-2)


def test_a_gradient_that_cannot_be_is_refused() -> None:
    model = lent("mixtral")
    port = model.layers[0].router.experts
    trace = pb.run(model, PROMPTS[:1], taps=[port], grad=True)
    with pytest.raises(PatchbayError, match=r"L0.router.experts holds torch.int64 and carries no gradient"):
        trace.gradient(trace.logits.sum(), port)
    with pytest.raises(PatchbayError, match="run with grad=True"):
        trace.gradient(torch.tensor(1.0), port)


@torch.inference_mode()
def test_inference_mode_edits_and_keeps_no_gradient() -> None:
    model, edit = lent("llama"), pb.scale(Port("attn.pattern", 1), 0.3, positions="last")
    ids = torch.tensor([[5, 9, 40, 2, 11, 3]])
    found = pb.run(model, ids, edits=[edit]).logits
    with model.edited(edit):
        assert close(model.hf(ids).logits, found)
    with torch.inference_mode(False):
        assert close(pb.run(model, ids, edits=[edit]).logits, found)
    with pytest.raises(PatchbayError, match="gradients were asked under torch.inference_mode"):
        pb.run(model, ids, taps=[Port("resid_in", 0)], grad=True)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_is_proved_without_the_callers_autocast(name: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = pb.load(twin(name))
    assert model.check.heads < 1e-5
