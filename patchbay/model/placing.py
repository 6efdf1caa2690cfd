"""Which row of `families.py` a model is, and the modules of its layers by that row.

The row that names a model's `config.model_type` is tried first, then every row all of whose paths exist, the nearest first. Either
way nothing is believed until the self-check has proved the identities on the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.errors import PatchbayError
from patchbay.model.families import FAMILIES, Family
from patchbay.model.stream import refuse_normed
from patchbay.signal.port import SIGNALS

NESTED = (
    "model.language_model",
    "language_model.model",
    "model.text_model",
)  # where models of several kinds keep their text model
STANDS_FOR = {"OptimizedModule", "GraphModule", "ScriptModule", "FullyShardedDataParallel", "CheckpointWrapper"}


@dataclass(frozen=True, eq=False)
class LayerModules:
    """The modules of one decoder layer, resolved. None where the layer has no such part."""

    layer: nn.Module
    attn: nn.Module | None  # attention with heads
    attn_proj: nn.Module | None
    attn_added: (
        nn.Module | None
    )  # its output is what enters the stream (attention, or a hybrid's mixer; of `beside` the last)
    norm_attn: nn.Module | None
    mid: nn.Module | None  # its input is the stream between attention and MLP; None in parallel blocks
    mlp: nn.Module | None
    mlp_proj: nn.Module | None
    mlp_up: nn.Module | None
    mlp_gate: nn.Module | None
    mlp_added: nn.Module | None
    norm_mlp: nn.Module | None
    router: nn.Module | None
    experts: nn.Module | None
    beside: tuple[tuple[nn.Module, float], ...] = ()  # mixers whose outputs, each times its factor, are added together
    dtype: torch.dtype = torch.float32  # that the model computes in: of weights that are not stored as numbers
    links: tuple[
        tuple[nn.Module, str, nn.Module], ...
    ] = ()  # each module above inside the layer: its owner, its name there, itself

    def refuse_replaced(self) -> None:
        """Raise PatchbayError where another module stands in the place of one that was found and proved: hooks and weights would be
        those of a module that the model uses otherwise now, or not at all. What stands for one as it is (compiled, traced) may."""
        for owner, name, was in self.links:
            now = owner._modules.get(name)
            if now is not was and not STANDS_FOR & {kind.__name__ for kind in type(now).__mro__}:
                raise PatchbayError(
                    f"{name} of {type(owner).__name__} was a {type(was).__name__} when the model was loaded and is a {type(now).__name__} now "
                    "(an adapter that was put on or merged, another module in its place): pb.load the model again, and use what that returns"
                )

    def called(self) -> list[tuple[str, nn.Module]]:
        """The modules whose calls are signals, each once, with what they are."""
        found = {
            "the layer": self.layer,
            "attention": self.attn or self.attn_added,
            "the output projection": self.attn_proj,
        }
        found |= {"the MLP": self.mlp, "the down projection": self.mlp_proj, "the experts module": self.experts}
        return [*{id(m): (name, m) for name, m in reversed(found.items()) if m is not None}.values()]

    def signals(self) -> tuple[str, ...]:
        """The signals that a layer of these modules offers."""
        offered = {"resid_in", "resid_out", "attn.out"}
        if self.mid is not None:
            offered.add("resid_mid")
        if self.attn is not None:
            offered |= {"attn.q", "attn.k", "attn.v", "attn.pattern", "attn.z", "attn.head_out"}
        if self.mlp is not None:
            offered |= {"mlp.in", "mlp.out"} | ({"mlp.act"} if self.mlp_proj is not None else set())
        if self.experts is not None:
            offered |= {"router.weights", "router.experts", "experts.out"}
            offered |= {"router.logits"} if self.router is not None else set()
        return tuple(signal for signal in SIGNALS if signal in offered)

    @property
    def reader(self) -> nn.Module:
        """What is called with the norm of the stream: attention, or a hybrid's mixer."""
        found = self.attn or (self.beside[0][0] if self.beside else self.attn_added)
        assert found is not None
        return found


def text_config(hf: nn.Module) -> Any:
    """The config of the text model: its own part where several models are nested in one, as vision-language models do."""
    config: Any = hf.config
    read = getattr(config, "get_text_config", None)
    return config if read is None else read(decoder=True)


def scaled_logits(config: Any, logits: Tensor) -> Tensor:
    """The unembedding's raw output with the scale and soft cap that a config names; as it is where there is none (None)."""

    def named(*keys: str) -> float:
        return float(next((value for key in keys if (value := getattr(config, key, None))), 0.0))

    logits = logits * (named("logit_scale", "lm_head_multiplier") or 1.0) / (named("logits_scaling") or 1.0)
    cap = named("final_logit_softcapping", "logits_soft_cap")
    return torch.tanh(logits / cap) * cap if cap else logits


def follow(root: Any, path: str) -> Any | None:
    """The object at a dotted path, or None where a step is missing or the path is empty."""
    if "|" in path:
        return next((found for one in path.split("|") if (found := follow(root, one)) is not None), None)
    for name in path.split(".") if path else ():
        root = getattr(root, name, None)
        if root is None:
            return None
    return root if path else None


def around(hf: nn.Module, layers: Any) -> list[nn.Module]:
    """The model, and the modules in it that hold its layers and can be called by themselves, outermost first."""
    name = next((name for name, module in hf.named_modules() if module is layers[0]), "")
    parts = name.split(".")[:-1] if name else []
    inside = [hf.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts))]
    return [hf, *(module for module in inside if not isinstance(module, nn.ModuleList | nn.ModuleDict))]


def layer_modules(family: Family, layer: nn.Module, config: Any) -> LayerModules:
    """Resolve the row's paths on one decoder layer."""
    attn, mlp = follow(layer, family.attn), follow(layer, family.mlp)
    mixer = next((m for m in (follow(layer, path) for path in family.mixers) if m is not None), None)
    beside = tuple(
        (m, float(getattr(config, key, 1.0))) for path, key in family.beside if (m := follow(layer, path)) is not None
    )
    mixer = beside[-1][0] if beside else mixer

    def inside(owner: nn.Module | None, path: str) -> Any | None:  # "^name" starts at the layer
        return follow(layer, path[1:]) if path.startswith("^") else follow(owner, path)

    if attn is mixer and inside(attn, family.attn_proj) is None:
        attn = None  # one name for all kinds of blocks, of which those with heads have an output projection
    router, experts = follow(layer, family.router), follow(layer, family.experts)
    experts = experts if isinstance(experts, nn.Module) and any(p.ndim == 3 for p in experts.parameters()) else None
    made = LayerModules(
        layer=layer,
        attn=attn,
        attn_proj=inside(attn, family.attn_proj),
        attn_added=(follow(layer, family.attn_added) if attn is not None else None)
        or (mixer if attn is None else attn),
        norm_attn=follow(layer, family.norm_attn),
        mid=None if family.is_parallel(config) else follow(layer, family.mid),
        mlp=mlp,
        mlp_proj=inside(mlp, family.mlp_proj),
        mlp_up=inside(mlp, family.mlp_up),
        mlp_gate=inside(mlp, family.mlp_gate),
        mlp_added=follow(layer, family.mlp_added) or mlp,
        norm_mlp=follow(layer, family.norm_mlp),
        router=router if experts is not None else None,
        experts=experts,
        beside=beside,
    )
    known = {id(value) for value in vars(made).values() if isinstance(value, nn.Module)}
    inside_it = ((owner, name, module) for owner in layer.modules() for name, module in owner._modules.items())
    return replace(made, links=tuple(link for link in inside_it if id(link[2]) in known))


def missing(family: Family, hf: nn.Module) -> list[str]:
    """The row's paths that this model lacks: empty when the row fits."""
    lacking = [path for path in (family.layers, family.final_norm) if follow(hf, path) is None]
    layers = follow(hf, family.layers)
    if layers is None or not len(layers):
        return lacking or [family.layers]
    for i, layer in enumerate(layers):
        found = layer_modules(family, layer, text_config(hf))
        if found.attn_added is None:
            lacking.append(f"{family.layers}.{i}.{family.attn}" + "".join(f" or .{m}" for m in family.mixers))
        elif found.attn is not None and found.attn_proj is None:
            lacking.append(f"{family.layers}.{i}.{family.attn}.{family.attn_proj}")
        if family.mlp and found.mlp is None and not family.sparse:
            lacking.append(f"{family.layers}.{i}.{family.mlp}")
        elif (
            found.mlp is not None
            and found.mlp_proj is None
            and found.experts is None
            and not (family.opaque or getattr(found.mlp, "without_neurons", False))
        ):
            lacking.append(f"{family.layers}.{i}.{family.mlp}.{family.mlp_proj}")
    return lacking


def _nested(family: Family, hf: nn.Module) -> list[Family]:
    """The row, and where a text model stands inside another model, the row with its paths there."""
    inside = next((path for path in NESTED if follow(hf, path) is not None), None)
    if inside is None or not family.layers.startswith("model."):
        return [family]
    layers, norm = (inside + path.removeprefix("model") for path in (family.layers, family.final_norm))
    return [replace(family, layers=layers, final_norm=norm)]


def _unplaced(family: Family, hf: nn.Module) -> int:
    """How many norms, streams and routers the row names that this model's layers lack: the fewer, the nearer."""
    count = 0
    for layer in follow(hf, family.layers) or ():
        found = layer_modules(family, layer, text_config(hf))
        count += bool(family.norm_attn) and found.norm_attn is None
        count += bool(family.norm_mlp) and found.norm_mlp is None
        count += bool(family.mid) and found.mid is None and not family.is_parallel(text_config(hf))
        count += found.experts is not None and found.router is None
    return count


def _fitting(hf: nn.Module, *some: Sequence[Family]) -> Iterator[Family]:
    """Of each list the rows that fit, the nearest first; a list is looked at only when those before it are used up."""
    for rows in some:
        fitting = [family for family in rows if not missing(family, hf)]
        yield from sorted(fitting, key=lambda family: _unplaced(family, hf)) if len(fitting) > 1 else fitting


def candidates(hf: nn.Module, rows: Sequence[Family] = FAMILIES) -> Iterator[Family]:
    """Rows whose paths this model has, that of its type first, then the nearest. Refuses with what was found."""
    model_type = getattr(text_config(hf), "model_type", "")
    rows = [family for row in rows for family in _nested(row, hf)]
    named = [family for family in rows if model_type in family.model_types]
    others = [family for family in rows if family not in named]
    fitting = _fitting(hf, named, others)
    if (best := next(fitting, None)) is not None:
        return chain([best], fitting)
    refuse_normed(hf)
    nearest = min(named or rows, key=lambda family: len(missing(family, hf)))
    children = ", ".join(name for name, _ in hf.named_children())
    raise PatchbayError(
        f"{type(hf).__name__} (model type {model_type!r}) fits no known family. Nearest row is {nearest.name!r}, which also "
        f"needs {', '.join(missing(nearest, hf)[:4])}; the model has children {children}. "
        "Describe it: pb.load(model, family=patchbay.Family('name', layers='path.to.layers', final_norm='path', attn='name', "
        "attn_proj='name', mlp='name', mlp_proj='name', norm_attn='name', norm_mlp='name', mid='name'))"
    )
