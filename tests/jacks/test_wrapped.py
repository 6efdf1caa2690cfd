"""Edits never vanish: models that are compiled, traced, wrapped, copied, checkpointed or called in part are edited as they are plain, or
refused by name."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CompileConfig

import patchbay as pb
from patchbay.errors import EditNeverMade
from patchbay.signal.port import PatchbayError
from patchbay.tiny.twins import twin
from tests.jacks.test_calls import clean
from tests.shares import by_turns
from tests.tolerance import close

IDS = torch.tensor([[5, 9, 40, 2, 11, 3]])
EDITS = (
    pb.scale(pb.Port("attn.out", 0), 3.0),
    pb.scale(pb.Port("attn.pattern", 1), 0.2, positions="last"),
    pb.scale(pb.Port("mlp.act", 1), -1.0),
    pb.scale(pb.Port("logits"), 2.0, positions=-1),
)


@functools.cache
def plain_twin() -> pb.Model:
    return pb.load(twin("llama"))


def right(edits: tuple[pb.Edit, ...] = ()) -> Tensor:
    """What the plain twin gives."""
    return pb.run(plain_twin(), IDS, edits=edits).logits


def called(run: Callable[[Tensor], Any]) -> Tensor:
    with torch.no_grad():
        out = run(IDS)
    return out.logits if hasattr(out, "logits") else out[0]


# --- compiled ---


def whole(hf: Any, **how: Any) -> Any:
    return torch.compile(hf, **how)


def in_place(hf: Any, **how: Any) -> Any:
    hf.compile(**how)
    return hf


def forward_alone(hf: Any, **how: Any) -> Any:
    hf.forward = torch.compile(hf.forward, **how)
    return hf


def inside(hf: Any, **how: Any) -> Any:
    hf.model = torch.compile(hf.model, **how)
    return hf


def layers_in_place(hf: Any, **how: Any) -> Any:
    for layer in hf.model.layers:
        layer.compile(**how)
    return hf


def one_layer(hf: Any, **how: Any) -> Any:
    hf.model.layers[1] = torch.compile(hf.model.layers[1], **how)
    return hf


def one_mlp(hf: Any, **how: Any) -> Any:
    hf.model.layers[1].mlp = torch.compile(hf.model.layers[1].mlp, **how)
    return hf


def layers_forward(hf: Any, **how: Any) -> Any:
    for layer in hf.model.layers:
        layer.forward = torch.compile(layer.forward, **how)
    return hf


FORMS = (whole, in_place, forward_alone, inside, layers_in_place, one_layer, one_mlp, layers_forward)


KINDS = [pytest.param(form, "eager", id=f"eager-{form.__name__}") for form in by_turns(FORMS, of=2)]
KINDS += [pytest.param(form, "aot_eager", id=f"aot-{form.__name__}", marks=pytest.mark.slow) for form in FORMS]
KINDS += [
    pytest.param(form, "inductor", id=f"inductor-{form.__name__}", marks=pytest.mark.slow) for form in (whole, one_mlp)
]


@pytest.mark.parametrize(("form", "backend"), KINDS)
@pytest.mark.parametrize("loaded", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_compiled_forms(form: Callable[..., Any], backend: str, loaded: str) -> None:
    """Used once as compiled, then edited, then used again."""
    torch._dynamo.reset()
    hf = twin("llama")
    model = pb.load(hf) if loaded == "before" else None
    runs = form(hf, backend=backend)
    model = model or pb.load(runs)
    assert close(called(runs), right(), noise=256)  # compilers sum in another order
    for edit in EDITS:
        with model.edited(edit):
            assert close(called(runs), right((edit,)))
            assert model.touched[0][0]
        assert close(pb.run(model, IDS, edits=[edit]).logits, right((edit,)))
    assert close(called(runs), right(), noise=256)


@pytest.mark.parametrize("edit", EDITS[:2], ids=str)
def test_a_static_cache_that_compiles_by_itself(edit: pb.Edit) -> None:
    """As transformers does on other devices by itself: after one plain call, decoding steps are edited."""
    torch._dynamo.reset()
    model = pb.load(twin("llama"))
    config = CompileConfig(backend="eager", mode=None, fullgraph=False)
    config._compile_all_devices = True
    more = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    static = {"cache_implementation": "static", "compile_config": config}
    plain = model.hf.generate(IDS, **more, **static)
    assert torch.equal(plain, model.hf.generate(IDS, **more, use_cache=False))
    open_end = pb.Edit(edit.op, edit.port, edit.value, "predicting")
    with model.edited(open_end):
        found = model.hf.generate(IDS, **more, **static)
        assert torch.equal(found, model.hf.generate(IDS, **more, use_cache=False))
    assert not torch.equal(found, plain) or edit.port.signal in ("logits", "attn.pattern")
    assert torch.equal(model.hf.generate(IDS, **more, **static), plain)


def test_regions_that_accelerate_compiles() -> None:
    regions = pytest.importorskip("accelerate.utils", reason="accelerate is in the extra test").compile_regions
    torch._dynamo.reset()
    hf = twin("llama")
    plain, compiled = pb.load(hf), regions(hf, backend="eager")
    model = pb.load(compiled)
    for edit in EDITS:
        with model.edited(edit):
            assert close(called(compiled), right((edit,)))
        if edit.port.layer is not None:
            with plain.edited(edit):
                with pytest.raises(PatchbayError, match="outside a run of the model"):
                    called(compiled)  # another model around the same layers
                called(hf)
        with plain.edited(edit):
            assert close(called(hf), right((edit,)))
    assert close(called(compiled), right())
    with pytest.warns(EditNeverMade), plain.edited(EDITS[3]):
        called(compiled)


# --- wrapped ---


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"])
def test_wrappers_of_one_process(one_process: None, kind: str) -> None:
    """Refused where they are loaded; calls through them are edited, since they call the model that was."""
    hf = twin("llama")
    model = pb.load(hf)
    edits = [e for e in EDITS if e.port.signal != "attn.head_out"]
    if kind == "FullyShardedDataParallel":
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrapped: nn.Module = FullyShardedDataParallel(hf, device_id=torch.device("cpu"))
    else:
        wrapped = getattr(nn.parallel, kind)(hf)
    with pytest.raises(PatchbayError, match=f"the model is wrapped as {kind}: .*model.module"):
        pb.load(wrapped)
    if kind == "FullyShardedDataParallel":
        for inside in (lambda: pb.load(wrapped.module), lambda: pb.run(model, IDS)):
            with pytest.raises(PatchbayError, match="weights are sharded by .*: call the wrapper inside"):
                inside()
    for edit in edits:
        with model.edited(edit):
            assert close(called(wrapped), right((edit,)))
    assert close(called(wrapped), right())


@pytest.mark.filterwarnings("ignore")
def test_sharding_in_place_is_refused(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    hf = twin("llama")
    model = pb.load(hf)
    fully_shard(hf, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(PatchbayError, match="wrapped as FSDPModule"), model.edited(EDITS[0]):
        called(hf)


def test_engines_by_name_are_refused() -> None:
    class DeepSpeedEngine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = twin("llama")
            self.config = self.module.config

    with pytest.raises(PatchbayError, match="wrapped as DeepSpeedEngine"):
        pb.load(DeepSpeedEngine())


def test_prepared_by_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is in the extra test")
    hf = twin("llama")
    model = pb.load(hf)
    prepared = accelerate.Accelerator(cpu=True).prepare(hf)
    for edit in EDITS:
        with model.edited(edit):
            assert close(called(prepared), right((edit,)))


def replica_of(module: nn.Module) -> nn.Module:
    """As `nn.parallel.replicate` makes one for each device."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else replica_of(child)
    for name, weight in module._parameters.items():
        setattr(made, name, weight)
    return made


def test_replicas_are_refused() -> None:
    """`DataParallel` on several devices runs copies that keep the hooks, in threads of their own."""
    hf = twin("llama")
    model = pb.load(hf)
    for edit in EDITS:
        with model.edited(edit):
            replica = replica_of(hf)
            with pytest.raises(PatchbayError, match="a replica of LlamaForCausalLM ran"):
                called(replica)
            called(hf)
    assert close(called(replica_of(hf)), right())


# --- traced ---


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_traced_models_are_refused_and_said_to_be_unedited() -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hf = hf

        def forward(self, ids: Tensor) -> Tensor:
            return self.hf(ids, use_cache=False).logits

    hf = twin("llama")
    model, traced = pb.load(hf), torch.jit.trace(Logits(), IDS)
    with pytest.raises(PatchbayError, match="wrapped as ScriptModule"):
        pb.load(traced)
    with pytest.warns(EditNeverMade, match=r"scale\(L0.attn.out, 3\) was never made: .*traced"), model.edited(EDITS[0]):
        called(traced)
    graph = torch.fx.symbolic_trace(hf.model.layers[0].mlp)
    with pytest.raises(PatchbayError, match="wrapped as GraphModule"):
        pb.load(graph)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", ["jit", "fx"])
def test_traced_parts(how: str) -> None:
    """A traced MLP in the place of one: what is around it is edited, what is inside is refused or edited."""
    hf = twin("llama")
    model, mlp = pb.load(hf), hf.model.layers[1].mlp
    hf.model.layers[1].mlp = (
        torch.jit.trace(mlp, torch.randn(1, 6, 32)) if how == "jit" else torch.fx.symbolic_trace(mlp)
    )
    for edit in (EDITS[0], EDITS[1]):
        assert close(pb.run(model, IDS, edits=[edit]).logits, right((edit,)))
    for signal in ("mlp.act", "mlp.out"):
        edit = pb.scale(pb.Port(signal, 1), 0.5)
        if how == "fx" and signal == "mlp.act":  # the graph calls the same projection
            assert close(pb.run(model, IDS, edits=[edit]).logits, right((edit,)))
        else:
            with pytest.raises(PatchbayError, match=rf"L1.{signal} was never reached"):
                pb.run(model, IDS, edits=[edit])
    assert clean(model)


# --- called in part, copied ---


def test_the_inside_of_a_model_called_by_itself() -> None:
    """`model.hf.model(ids)` and `model.hf.forward(ids)` are under the edits too, at their own positions; a layer alone is refused."""
    model = pb.load(twin("llama"))
    edit = pb.scale(pb.Port("resid_out", 0), -2.0, positions=-2)
    stream = pb.Port("final_norm")
    with torch.no_grad(), model.edited(edit):
        model.hf(IDS[:, :4])
        for ids in (IDS, IDS[:, :3]):
            found = model.hf.model(ids).last_hidden_state
            assert torch.equal(found, pb.run(model, ids, taps=[stream])[stream])
            assert torch.equal(model.hf.forward(ids).logits, pb.run(model, ids).logits)
            assert model.touched == [[(ids.shape[1] - 2,)]]
        cache = model.hf.model(IDS[:, :4], use_cache=True).past_key_values
        with pytest.raises(PatchbayError, match="prompt_length=n"):
            model.hf.model(IDS[:, 4:], past_key_values=cache)
        with pytest.raises(PatchbayError, match="outside a run of the model"):
            model.modules[0].layer(torch.zeros(1, 4, 32), position_embeddings=(torch.zeros(1, 4, 8),) * 2)
    with torch.no_grad(), model.edited(EDITS[3]):
        for run in (model.hf.model, model.hf.forward):
            with pytest.raises(PatchbayError, match="logits was never reached"):
                run(IDS)
        assert close(called(model.hf), right((EDITS[3],)))
    with torch.no_grad(), model.edited(edit):
        with pytest.raises(IndexError):
            model.hf(torch.full((1, 4), 1000))
        assert torch.equal(model.hf.model(IDS).last_hidden_state, pb.run(model, IDS, taps=[stream])[stream])


def test_weights_given_with_the_call_and_a_pipeline() -> None:
    model = pb.load(twin("llama"))
    moved = {name: weight * 1.1 for name, weight in model.hf.named_parameters()}
    other = twin("llama")
    other.load_state_dict(moved, strict=False)
    with torch.no_grad(), model.edited(EDITS[0]):
        found = torch.func.functional_call(model.hf, moved, (IDS,)).logits
    assert close(found, pb.run(pb.load(other), IDS, edits=[EDITS[0]]).logits)


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_copies_and_pickles_made_inside_are_plain(name: str) -> None:
    model = pb.load(twin(name))
    plain = called(model.hf)
    with model.edited(pb.scale(pb.Port("attn.pattern", 1), 0.2, positions="last")):
        called(model.hf)
        for twin_of in (copy.deepcopy(model.hf), pickle.loads(pickle.dumps(model.hf))):
            assert torch.equal(called(twin_of), plain)
            more = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
            assert twin_of.generate(IDS, **more).shape == (1, 8)
    assert clean(model)


# --- gradients ---


def checkpointed(hf: Any, how: str) -> Callable[[Tensor], Any]:
    """The model with its layers, or itself, made again in the backward pass."""
    reentrant = "reentrant" in how
    if "enabled" in how:
        hf.gradient_checkpointing_enable({"use_reentrant": reentrant})
        hf.train()
        return hf
    return lambda ids: checkpoint(hf, ids, use_reentrant=reentrant)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:None of the inputs")
@pytest.mark.parametrize("how", ["enabled", "enabled reentrant", "whole", "whole reentrant"])
@pytest.mark.parametrize("edit", EDITS[:3], ids=str)
def test_what_runs_again_in_the_backward_pass_is_refused(how: str, edit: pb.Edit) -> None:
    hf = twin("llama")
    model = pb.load(hf)
    for weight in hf.parameters():
        weight.requires_grad_(True)
    hf.enable_input_require_grads()
    run = checkpointed(hf, how)
    with model.edited(edit), pytest.raises(PatchbayError, match="gradient checkpointing is on"):
        run(IDS)
    with torch.no_grad(), model.edited(edit):
        assert close(hf(IDS).logits, right((edit,)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", ["enabled", "enabled reentrant"])
def test_edits_after_the_last_layer_have_their_gradient(how: str) -> None:
    """What stands outside the layers runs once: the gradient is the one without checkpointing."""
    found = []
    for with_checkpoints in (True, False):
        hf = twin("llama")
        model = pb.load(hf)
        hf.enable_input_require_grads()
        run = checkpointed(hf, how) if with_checkpoints else hf
        with model.edited(EDITS[3]):
            run(IDS).logits.square().sum().backward()
        found.append(hf.model.layers[0].mlp.down_proj.weight.grad)
    assert close(found[0], found[1])


# --- hooks of others ---


def test_lasting_hooks_of_others_come_first() -> None:
    """Whatever others do to a layer, before and after it, on it or on every module: what is tapped is what the model goes on with, and
    edits act on that."""
    model, port = pb.load(twin("llama")), pb.Port("resid_out", 0)
    layer, norm = model.hf.model.layers[0], model.hf.model.layers[1].input_layernorm
    hooks = [
        layer.register_forward_pre_hook(lambda m, args: (args[0] * 1.5, *args[1:])),
        layer.register_forward_hook(lambda m, args, out: out + 1.0),
        layer.register_full_backward_hook(lambda m, grads_in, grads_out: None),
        nn.modules.module.register_module_forward_hook(lambda m, args, out: out * 1.1 if m is norm else None),
    ]
    try:
        left = len(layer._forward_hooks)
        plain = pb.run(model, IDS, taps=[port])
        assert len(layer._forward_hooks) == left
        seen = model.hf(IDS, output_hidden_states=True).hidden_states[1]
        assert torch.equal(plain[port], seen)
        hooks.append(layer.register_forward_hook(lambda m, args, out: out * 3.0))  # by hand, after all others
        right_one = called(model.hf)
        hooks.pop().remove()
        assert close(pb.run(model, IDS, edits=[pb.scale(port, 3.0)]).logits, right_one)
        assert close(called(model.hf), plain.logits)
    finally:
        for hook in hooks:
            hook.remove()
