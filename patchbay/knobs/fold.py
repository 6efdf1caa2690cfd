"""Folding: edits that act at every position as other weights of the same model, so that plain Hugging Face code has them too.

An edit is foldable where it is a map y = A x + b of a signal that stands next to a linear map, the same at every position of
every prompt. A goes into the weights of that map (before it: x W becomes x (A^T W); after it: W becomes W A^T), b into its bias,
which it gets if it has none and the architecture can give it one (`flags.py`). Adding to the residual stream is adding to the bias of the last map that wrote there. A projection of the stream
alone is not foldable: layers below read what it takes away. One projection at every place of the stream is: it is then the
same as projecting everything that is written, embeddings included.

`reasons` says of every edit that cannot be folded why. Sums are made in float64 and stored in the model's own dtype; nothing is
believed until the folded model has reproduced the edited one (`export.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.edits.edit import Edit
from patchbay.knobs.affine import Affine, Fold, NotFoldableError, times
from patchbay.model.model import Model
from patchbay.model.placing import follow
from patchbay.model.weights import _columns, matrix
from patchbay.signal.port import PatchbayError, Port, by_home

STREAM = ("embed", "resid_in", "resid_mid", "resid_out")
ORDER: tuple[str, ...] = (
    "embed",
    "resid_in",
    "attn.v",
    "attn.z",
    "attn.head_out",
    "attn.out",
    "resid_mid",
    "mlp.in",
    "mlp.act",
)
ORDER += ("router.weights", "experts.out", "mlp.out", "resid_out", "final_norm", "logits")
NEVER = {
    "attn.pattern": "attention weights are no linear map of the stream",
    "attn.q": "queries pass rotary or a norm, or are scaled, behind their projection",
    "attn.k": "keys pass rotary or a norm behind their projection",
    "router.logits": "a softmax and a choice of experts follow",
}


# --- signal by signal ---------------------------------------------------------------------------------


def _z(fold: Fold, port: Port, map_: Affine) -> None:
    layer = port.layer or 0
    n_heads, at = fold.model.n_heads(layer), fold.model.modules[layer]
    width = matrix(at.attn_proj).shape[0] // n_heads  # type: ignore[arg-type]
    heads = range(n_heads) if port.index is None else [port.index]
    for head, one in zip(heads, map_.part(port.index, n_heads), strict=True):
        fold.ahead(at.attn_proj, slice(head * width, (head + 1) * width), one)


def _head_out(fold: Fold, port: Port, map_: Affine) -> None:
    """z W_O of a head through the map; the projection's own bias is no head's."""
    layer = port.layer or 0
    n_heads, module = fold.model.n_heads(layer), fold.model.modules[layer].attn_proj
    assert module is not None
    weight = fold.weights[fold.hold(module)]
    width = weight.shape[0] // n_heads
    heads = range(n_heads) if port.index is None else [port.index]
    for head, one in zip(heads, map_.part(port.index, n_heads), strict=True):
        rows = slice(head * width, (head + 1) * width)
        weight[rows] = times(weight[rows], one.a)
        if one.b is not None:
            fold.shift(module, slice(None), one.b)


def _v(fold: Fold, port: Port, map_: Affine) -> None:
    model, layer = fold.model, port.layer or 0
    family, at, n_groups, d_head = model.family, model.modules[layer], model.n_groups(layer), model.d_head(layer)
    modules: list[Any] = [follow(at.attn, name) for name in family.qkv_modules]
    if family.qkv == "latent":  # the last map gives, head by head, the key's part that is not turned, then the value
        width = matrix(at.attn_proj).shape[0] // n_groups  # type: ignore[arg-type]
        columns = torch.arange(matrix(modules[-1]).shape[1]).view(n_groups, -1)[:, -width:]
    elif len(modules) == 1:
        n_stored = (matrix(modules[0]).shape[1] // d_head - model.n_heads(layer)) // 2
        columns = _columns(family, model.n_heads(layer), n_stored, d_head)[2]
    else:
        width = matrix(at.attn_proj).shape[0] // model.n_heads(layer)  # type: ignore[arg-type]
        columns = torch.arange(matrix(modules[-1]).shape[1]).view(-1, width)
    if len(columns) != n_groups:
        raise NotFoldableError(f"{n_groups} value heads share {len(columns)} stored ones")
    groups = range(n_groups) if port.index is None else [port.index]
    for group, one in zip(groups, map_.part(port.index, n_groups), strict=True):
        fold.behind(modules[-1], columns[group], one)


def _attn_out(fold: Fold, port: Port, map_: Affine) -> None:
    at = fold.model.modules[port.layer or 0]
    if at.attn is None:
        for block, factor in at.beside or ((at.attn_added, 1.0),):
            whole = block is at.attn_added  # what is added is added once
            one = Affine(map_.a, map_.b / factor if whole and map_.b is not None else None, map_.square)
            for module in _last_maps(fold, block, "this layer's mixer"):
                fold.behind(module, slice(None), _unscaled(fold, one))
        return
    if at.attn_added is at.attn or at.attn_added is at.attn_proj:
        fold.behind(at.attn_proj, slice(None), _unscaled(fold, map_))
    else:
        fold.gain(at.attn_added, _unscaled(fold, map_))  # type: ignore[arg-type]


def _mlp_out(fold: Fold, port: Port, map_: Affine) -> None:
    at = fold.model.modules[port.layer or 0]
    if at.mlp_added is not at.mlp and at.mlp_added is not at.mlp_proj:
        fold.gain(at.mlp_added, _unscaled(fold, map_))  # type: ignore[arg-type]
    elif at.mlp_proj is not None:
        fold.behind(at.mlp_proj, slice(None), _unscaled(fold, map_))
    else:
        fold.expert(port.layer or 0, None, map_)  # of a linear map, that of the sum is the sum of the parts
        for name, child in at.mlp.named_children():  # type: ignore[union-attr]
            if child not in (at.experts, at.router) and not _gives_one(child):
                for module in _last_maps(fold, child, f"{name}, beside its routed experts,"):
                    fold.behind(module, slice(None), map_)


LAST = (
    "out_proj",
    "o_proj",
    "down_proj",
    "c_proj",
    "w2",
    "dense_4h_to_h",
    "output_linear",
)  # of mixers and shared experts


def _last_maps(fold: Fold, block: nn.Module | None, what: str) -> list[nn.Module]:
    """The linear maps by which a block without heads writes to the stream; the proof of the export tells whether they are all."""
    named = [] if block is None else [*block.named_modules()]
    found = [
        module
        for name, module in named
        if name.rpartition(".")[2] in LAST
        and getattr(module, "weight", None) is not None
        and matrix(module).shape[1] == fold.model.d_model
    ]
    if not found:
        raise NotFoldableError(f"{what} has no last linear map by a known name ({', '.join(LAST)})")
    return found


def _gives_one(module: nn.Module) -> bool:
    """A gate of one number for each token, or what has no weights: linear maps of the stream pass both."""
    weights = [*module.parameters()]
    return not weights or (isinstance(module, nn.Linear) and module.out_features == 1)


def _unscaled(fold: Fold, map_: Affine) -> Affine:
    """What is added to the stream is the module's output times the family's residual scale."""
    return map_ if map_.b is None else Affine(map_.a, map_.b / fold.model.residual_scale, map_.square)


def _mlp_in(fold: Fold, port: Port, map_: Affine) -> None:
    at = fold.model.modules[port.layer or 0]
    if at.mlp_up is None:
        raise NotFoldableError("this layer's MLP is routed experts, whose input the router reads too")
    for module in (at.mlp_up, at.mlp_gate):
        if module is not None:
            fold.ahead(module, slice(None), map_)


def _act(fold: Fold, port: Port, map_: Affine) -> None:
    rows = slice(None) if port.index is None else slice(port.index, port.index + 1)
    fold.ahead(fold.model.modules[port.layer or 0].mlp_proj, rows, map_)


def _resid(fold: Fold, port: Port, map_: Affine) -> None:
    """Adding to the stream: to the bias of what wrote there last."""
    if map_.a is not None:
        raise NotFoldableError(
            "layers below read the stream as it was; only a projection that stands at every place of the stream (embed, and "
            "resid_mid and resid_out of every layer, the same one) is one of all that is written, and folds"
        )
    layer = port.layer or 0
    if port.signal == "embed" or (port.signal == "resid_in" and layer == 0):
        fold.embeddings(map_)
    elif port.signal == "resid_mid":
        _attn_out(fold, Port("attn.out", layer), map_)
    else:
        last = layer - (port.signal == "resid_in")
        at = fold.model.modules[last]
        side_by_side = at.mid is None and at.attn is not None
        bias_in_mlp = at.mlp_proj is not None and getattr(at.mlp_proj, "bias", None) is not None
        write = _attn_out if at.mlp is None or (side_by_side and not bias_in_mlp) else _mlp_out
        write(fold, Port("attn.out" if write is _attn_out else "mlp.out", last), map_)


def _embed(fold: Fold, port: Port, map_: Affine) -> None:
    fold.embeddings(map_)


def _final_norm(fold: Fold, port: Port, map_: Affine) -> None:
    if map_.a is None:
        fold.gain(fold.model.final_norm_module, map_)
    elif map_.b is not None:
        raise NotFoldableError(
            "setting the normalised stream sets all logits to constants, which an unembedding without bias cannot"
        )
    else:
        fold.unembed(map_.a)


def _logits(fold: Fold, port: Port, map_: Affine) -> None:
    if map_.a is None or map_.b is not None or map_.a.numel() > 1:
        raise NotFoldableError(
            "the unembedding has no bias; one factor on all logits folds, other edits of them do not"
        )
    if getattr(fold.model.config, "final_logit_softcapping", None):
        raise NotFoldableError("a soft cap stands between the unembedding and the logits")
    fold.unembed(map_.a)
    bias = getattr(fold.model.hf.get_output_embeddings(), "bias", None)
    if bias is not None:
        bias.data.mul_(float(map_.a))


def _experts(fold: Fold, port: Port, map_: Affine) -> None:
    n = fold.model.n_experts(port.layer or 0)
    if port.signal == "router.weights" and port.index is None and map_.a is not None and map_.a.ndim == 1:
        map_ = Affine(map_.a.reshape(-1, 1), map_.b)  # a factor for each expert
    for index, one in zip(range(n) if port.index is None else [port.index], map_.part(port.index, n), strict=True):
        fold.expert(port.layer or 0, index, one)


WRITE: dict[str, Callable[[Fold, Port, Affine], None]] = {
    "embed": _embed,
    "resid_in": _resid,
    "resid_mid": _resid,
    "resid_out": _resid,
    "attn.v": _v,
    "attn.z": _z,
    "attn.head_out": _head_out,
    "attn.out": _attn_out,
    "mlp.in": _mlp_in,
    "mlp.act": _act,
    "mlp.out": _mlp_out,
    "router.weights": _experts,
    "experts.out": _experts,
    "final_norm": _final_norm,
    "logits": _logits,
}
AHEAD = ("attn.z", "mlp.in", "mlp.act")  # several edits there are folded last first


# --- a list of edits ----------------------------------------------------------------------------------


def fold(model: Model, edits: Sequence[Edit]) -> Fold:
    """Take the edits into the weights of `model`, which is changed. Raises PatchbayError that names all that cannot be."""
    made = Fold(model)
    refused = [(edit, reason) for edit in edits if (reason := _never(edit))]
    everywhere = _everywhere(model, edits) if not refused else None
    if everywhere is not None:
        _project_writers(made, everywhere)
        edits = [edit for edit in edits if edit.port.signal not in STREAM]
    for edit in _in_order(edits) if not refused else ():
        try:
            WRITE[edit.port.signal](made, edit.port, Affine.of(edit))
        except NotFoldableError as error:
            refused.append((edit, str(error)))
    if refused:
        listed = "; ".join(f"{edit}: {reason}" for edit, reason in refused[:6])
        more = f"; and {len(refused) - 6} more" if len(refused) > 6 else ""
        raise PatchbayError(f"not foldable into the weights of this {model.family.name} model: {listed}{more}")
    made.finish()
    return made


def as_written(model: Model, edit: Edit) -> Edit:
    """What is always added to features is as well added to the signal that they are written to, along their decoder's rows."""
    found = by_home(edit.port)
    if found is None or edit.op != "add" or edit.spread:
        return edit
    layer = edit.port.layer or 0
    dictionary = model.dictionaries[layer, found[0]]
    if getattr(dictionary, "normalise", "none") != "none":
        return edit  # by how much it is multiplied differs from token to token
    if dictionary.later:
        return edit  # it writes in several layers
    value = torch.as_tensor(edit.value).detach().to(dictionary.W_dec)
    if found[1] == "error":
        written = value.expand(dictionary.W_dec.shape[1])
    elif edit.port.index is not None:
        written = value * dictionary.W_dec[edit.port.index]
    else:
        written = value.expand(dictionary.n_features) @ dictionary.W_dec
    if dictionary.writes == "attn.z":
        written = written.unflatten(0, (model.n_heads(layer), -1))
    return replace(edit, port=Port(dictionary.writes, layer), value=written)


def _never(edit: Edit) -> str:
    """Why no weight can do what this edit does; empty where one might."""
    if by_home(edit.port) is not None:
        return "a feature's activation is no linear map of the stream; what is always added to it, alike at every token, alone folds"
    if edit.op == "block":
        return "cutting attention is no linear map"
    if edit.where is not None:
        return f"it acts where a probe says so ({edit.where}), weights act everywhere"
    if edit.positions is not None:
        return "it acts at some positions, weights act at all of them"
    if edit.rows is not None or edit.spread:
        return "it treats prompts or positions differently, weights treat all alike"
    return NEVER.get(edit.port.signal, "")


def _in_order(edits: Sequence[Edit]) -> list[Edit]:
    """In the order of the forward pass; before a linear map, those of one signal last first."""
    places = {id(edit): i for i, edit in enumerate(edits)}

    def key(edit: Edit) -> tuple[int, int, int]:
        signal, layer = edit.port.signal, edit.port.layer
        depth = -1 if signal == "embed" else 10**9 if layer is None else layer
        return depth, ORDER.index(signal), -places[id(edit)] if signal in AHEAD else places[id(edit)]

    return sorted(edits, key=key)


def _everywhere(model: Model, edits: Sequence[Edit]) -> Tensor | None:
    """The projector that stands at every place of the stream, if one does and nothing else is done to the stream."""
    stream = [edit for edit in edits if edit.port.signal in STREAM]
    if not stream or any(edit.op != "project" for edit in stream):
        return None
    first = stream[0].value
    assert isinstance(first, Tensor)
    p = first.double().cpu()
    same = all(isinstance(e.value, Tensor) and torch.equal(e.value, first) for e in stream)
    if not same or float((p @ p - p).abs().max()) > 1e-5:
        return None
    ports = {edit.port for edit in stream}
    last = model.n_layers - 1
    places = [{Port("embed"), Port("resid_in", 0)}]
    places += [{Port("resid_mid", i)} for i in range(last + 1) if "resid_mid" in model.signals(i)]
    places += [{Port("resid_out", i), *([Port("resid_in", i + 1)] if i < last else [])} for i in range(last + 1)]
    return p if all(ports & either for either in places) else None


def _project_writers(made: Fold, p: Tensor) -> None:
    """Everything that is written to the stream, projected."""
    made.embeddings(Affine(p, None, True))
    for i, at in enumerate(made.model.modules):
        for write, port, there in (
            (_attn_out, Port("attn.out", i), True),
            (_mlp_out, Port("mlp.out", i), at.mlp is not None),
        ):
            if there:
                try:
                    write(made, port, Affine(p, None, True))
                except NotFoldableError as error:
                    raise PatchbayError(
                        f"not foldable: the projection of the stream would have to go into {port}: {error}"
                    ) from error
