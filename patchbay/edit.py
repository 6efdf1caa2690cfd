"""Edits: values that say what to do at a port. Data only: they compare, print, save, load and batch row by row.

`replace` sets the signal to a value, `add` adds one, `scale` multiplies, `zero` sets 0, `mean` sets the mean of a reference,
`project` removes (or keeps) a subspace, `block` cuts attention from queries to keys before the softmax. Each names the
positions it acts at and the prompts (rows) of the batch; a value may differ for every row and every position.

Order: ports act in the order of the forward pass. At one port, edits act in the order given, except that `block`, which acts
before the softmax, precedes the other edits of a pattern. Nothing acts on padding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, SupportsIndex, TypeAlias, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as write_tensors
from torch import Tensor

from patchbay.port import PatchbayError, Port, as_part, parse_port, suggest
from patchbay.saved import write_file

Op = Literal["replace", "add", "scale", "zero", "mean", "project", "block"]
OPS: tuple[str, ...] = get_args(Op)


@dataclass(frozen=True)
class Token:
    """Every position that holds this token: an id, or a text that is a single token of the model's tokenizer."""

    token: int | str


Positions: TypeAlias = int | slice | Sequence[int] | Tensor | Token | Literal["last", "generated"] | None


@dataclass(frozen=True, eq=False)
class Edit:
    """One change at one port. Build it with `pb.replace`, `pb.add`, `pb.scale`, `pb.zero`, `pb.mean`, `pb.project`, `pb.block`.

    `positions`: None (all), an index (negative counts from each prompt's end), a slice, several indices, a bool mask
    [prompt, position], a `Token`, "last" (each prompt's last token) or "generated" (every token after the prompt). For an
    attention pattern and for q they are query positions; for k and v, key positions. `rows`: prompts of the batch that are
    edited (None: all). `value`: a number or a tensor whose axes are the port's own without prompt and position, optionally
    with a position axis (one entry for each selected position) and before that a row axis (one for each edited row).
    """

    op: Op
    port: Port
    value: Tensor | float | None = None
    positions: Positions = None
    rows: tuple[int, ...] | None = None
    keys: Positions = None

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise PatchbayError(f"no edit {self.op!r}; edits are {', '.join(OPS)}" + suggest(str(self.op), OPS))
        if not isinstance(self.port, Port):
            raise PatchbayError(
                f"an edit needs a Port such as model.layers[3].heads[5].z, got {type(self.port).__name__}"
            )
        if not self.port.editable:
            raise PatchbayError(f"{self.port} can be tapped, not edited")
        if self.port.query is not None:
            raise PatchbayError(f"{self.port}: give query rows of an edit as positions=, not in the port")
        if self.op == "block" and self.port.signal != "attn.pattern":
            raise PatchbayError(f"block cuts attention and needs a pattern port, got {self.port}")
        if isinstance(self.value, Tensor):
            if not self.value.is_floating_point():
                raise PatchbayError(f"{self.op} at {self.port}: value has dtype {self.value.dtype}, a float is needed")
            if self.value.device.type == "meta":
                raise PatchbayError(f"{self.op} at {self.port}: value is on the meta device, it has no numbers")
            if not bool(torch.isfinite(self.value).all()):
                raise PatchbayError(f"{self.op} at {self.port}: value holds NaN or infinite numbers")
        elif self.value is not None and not (isinstance(self.value, int | float) and abs(self.value) < float("inf")):
            raise PatchbayError(f"{self.op} at {self.port}: value {self.value!r} is not a finite number or tensor")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Edit):
            return NotImplemented
        mine, theirs = pack([self]), pack([other])
        return mine[0] == theirs[0] and all(
            value.dtype == theirs[1][name].dtype and torch.equal(value, theirs[1][name])
            for name, value in mine[1].items()
        )

    def __hash__(self) -> int:
        return hash((self.op, self.port, self.rows))

    @property
    def spread(self) -> bool:
        """Does the value differ from position to position, or from row to row?"""
        return isinstance(self.value, Tensor) and self.op != "project" and self.value.ndim > len(self.port.axes) - 2

    @property
    def by_row(self) -> bool:
        """Does it treat prompts by their place in the batch, so that the batch must be run whole?"""
        masks = [mask for mask in (self.positions, self.keys) if isinstance(mask, Tensor)]
        values = (
            [self.value]
            if isinstance(self.value, Tensor) and self.spread and self.value.ndim == len(self.port.axes)
            else []
        )
        return self.rows is not None or any(len(tensor) > 1 for tensor in [*masks, *values])

    def __str__(self) -> str:
        parts = [str(self.port)]
        if isinstance(self.value, Tensor):
            parts.append(f"tensor{list(self.value.shape)}")
        elif self.value is not None:
            parts.append(f"{self.value:g}")
        if self.positions is not None:
            parts.append(f"positions={_brief(self.positions)}")
        if self.keys is not None:
            parts.append(f"key={_brief(self.keys)}")
        if self.rows is not None:
            parts.append(f"rows={list(self.rows)}")
        return f"{self.op}({', '.join(parts)})"

    __repr__ = __str__


def _brief(positions: Positions) -> str:
    return f"mask{list(positions.shape)}" if isinstance(positions, Tensor) else repr(positions)


def _rows(rows: int | Sequence[int] | None) -> tuple[int, ...] | None:
    return None if rows is None else (int(rows),) if isinstance(rows, SupportsIndex) else tuple(int(r) for r in rows)


def _positions(positions: Positions) -> Positions:
    """A copy that will not change under us: sequences become tuples."""
    if isinstance(positions, Tensor):
        return positions.clone()
    if isinstance(positions, slice):
        if positions.step is not None and positions.step < 1:
            raise PatchbayError(
                f"positions {positions}: a slice steps forward; positions are a set, their order says nothing"
            )
        return slice(*(None if x is None else int(x) for x in (positions.start, positions.stop, positions.step)))
    if positions is None or isinstance(positions, Token):
        return positions
    if isinstance(positions, SupportsIndex):
        return int(positions)
    if isinstance(positions, str):
        if positions not in ("last", "generated"):
            raise PatchbayError(
                f"positions {positions!r}: as text only 'last' or 'generated'; for a token use pb.Token(...)"
            )
        return positions
    return tuple(int(p) for p in positions)


def replace(port: Port, value: Tensor | float, *, positions: Positions = None, rows: Any = None) -> Edit:
    """Set the signal to `value`."""
    return Edit("replace", port, value, _positions(positions), _rows(rows))


def add(port: Port, value: Tensor | float, *, positions: Positions = None, rows: Any = None) -> Edit:
    """Add `value` to the signal: a steering vector, a bias."""
    return Edit("add", port, value, _positions(positions), _rows(rows))


def scale(port: Port, factor: Tensor | float, *, positions: Positions = None, rows: Any = None) -> Edit:
    """Multiply the signal by `factor`; 1.0 leaves it bit for bit."""
    return Edit("scale", port, factor, _positions(positions), _rows(rows))


def zero(port: Port, *, positions: Positions = None, rows: Any = None) -> Edit:
    """Set the signal to 0."""
    return Edit("zero", port, None, _positions(positions), _rows(rows))


def mean(port: Port, reference: Tensor, *, positions: Positions = None, rows: Any = None) -> Edit:
    """Set the signal to the mean of `reference` over its prompts and positions.

    `reference` is what a tap of the same port returned on reference prompts, [prompt, position, ...] in the port's own axes
    (padding, NaN, is left out); a tensor without those axes is taken as the mean itself.
    """
    features = len(port.axes) - 2
    if reference.ndim == features + 2:
        axis = Port(port.signal, port.layer).position_axis - (0 if port.index is None or port.position_axis == 1 else 1)
        reference = reference.movedim(axis, 1).flatten(0, 1).nanmean(0)
    return Edit("mean", port, reference, _positions(positions), _rows(rows))


def project(port: Port, basis: Tensor, *, keep: bool = False, positions: Positions = None, rows: Any = None) -> Edit:
    """Remove from the signal its part in the span of `basis` [direction, feature]; with `keep`, remove everything else."""
    if len(port.axes) < 3:
        raise PatchbayError(f"project at {port}: the signal is one number at each position, it has no directions")
    basis = torch.atleast_2d(basis)
    if not bool(torch.isfinite(basis).all()):
        raise PatchbayError(f"project at {port}: basis holds NaN or infinite numbers")
    if torch.linalg.matrix_rank(basis.double()) < basis.shape[0]:
        raise PatchbayError(f"project at {port}: the {basis.shape[0]} directions are not linearly independent")
    orthonormal = torch.linalg.qr(basis.double().T).Q.T.to(basis.dtype)  # [direction, feature]
    inside = orthonormal.T @ orthonormal  # [feature, feature], the projector on the span
    matrix = inside if keep else torch.eye(len(inside), dtype=basis.dtype, device=basis.device) - inside
    return Edit("project", port, matrix, _positions(positions), _rows(rows))


def block(port: Port, *, query: Positions = None, key: Positions, rows: Any = None) -> Edit:
    """Cut attention from `query` positions to `key` positions before the softmax: the rest of each row renormalises."""
    return Edit("block", port, None, _positions(query), _rows(rows), _positions(key))


# ---- positions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """The tokens of a run: `ids` [prompt, position] on the right padded with anything, `lengths` and `prompt_lengths` [prompt].

    `prompt_lengths` equals `lengths` except in generation, where `lengths` counts generated tokens too.
    """

    ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    token_id: Any = None  # text -> id, for Token positions given as text


def chosen(positions: Positions, batch: Batch, *, what: str = "edit") -> Tensor:
    """Which positions are meant: int64 [prompt, position], -1 where untouched, else the ordinal among the chosen ones."""
    n_prompts, n_positions = batch.ids.shape
    place = torch.arange(n_positions).expand(n_prompts, -1)  # [prompt, position]
    lengths, starts = batch.lengths[:, None].cpu(), batch.prompt_lengths[:, None].cpu()
    real = place < lengths
    if positions is None:
        return torch.where(real, place, -1)
    if isinstance(positions, int | tuple):
        return _indexed((positions,) if isinstance(positions, int) else positions, starts, n_positions, what)
    if isinstance(positions, slice):
        touched = torch.zeros_like(real)
        for i, length in enumerate(starts[:, 0].tolist()):  # a slice counts within the prompt, to its end
            touched[i, : int(length)][positions] = True
            if positions.stop is None and positions.step in (None, 1):
                touched[i, int(length) :] = True
    elif isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.ndim != 2 or positions.shape[0] not in (1, n_prompts):
            raise PatchbayError(
                f"{what}: a position mask is a bool tensor [prompt, position] = [{n_prompts}, {n_positions}], "
                f"got {positions.dtype} {list(positions.shape)}"
            )
        if positions.shape[1] > n_positions and bool(positions[:, n_positions:].any()):
            raise PatchbayError(f"{what}: mask marks position {positions.shape[1] - 1}, prompts have {n_positions}")
        touched = torch.zeros_like(real)
        width = min(n_positions, positions.shape[1])
        touched[:, :width] = positions[:, :width].cpu()
    elif isinstance(positions, Token):
        wanted = positions.token if isinstance(positions.token, int) else batch.token_id(positions.token)
        touched = batch.ids.cpu() == wanted
    else:
        touched = place == starts - 1 if positions == "last" else place >= starts
    touched = touched & real
    return torch.where(touched, touched.cumsum(1) - 1, -1)


def all_from(begin: int, positions: Positions, batch: Batch) -> bool:
    """Whether every position from `begin` on is meant, as those past the prompts are by "generated" and by open slices."""
    if positions is None:
        return True
    onward = isinstance(positions, slice) and positions.stop is None and positions.step in (None, 1)
    return (onward or positions == "generated") and begin >= int(batch.prompt_lengths.max())


def _indexed(indices: tuple[int, ...], starts: Tensor, n_positions: int, what: str) -> Tensor:
    """Indices count within the prompt, from its end when negative; one outside any prompt is an error."""
    out = torch.full((len(starts), n_positions), -1)
    for ordinal, index in enumerate(indices):
        place = starts[:, 0] + index if index < 0 else torch.full_like(starts[:, 0], index)
        outside = ((place < 0) | (place >= starts[:, 0])).nonzero()
        if len(outside):
            i = int(outside[0])
            n = int(starts[i])
            raise PatchbayError(f"{what}: position {index} is outside prompt {i}, which has {n} tokens (0..{n - 1})")
        out[torch.arange(len(starts)), place] = ordinal
    return out


def row_mask(edit: Edit, n_prompts: int) -> Tensor:
    """int64 [prompt]: -1 where the edit leaves the prompt alone, else the ordinal of the prompt among `rows`."""
    if edit.rows is None:
        return torch.arange(n_prompts)
    bad = [row for row in edit.rows if not 0 <= row < n_prompts]
    if bad:
        raise PatchbayError(f"{edit}: row {bad[0]} asked, the batch has prompts 0..{n_prompts - 1}")
    out = torch.full((n_prompts,), -1)
    out[torch.tensor(edit.rows)] = torch.arange(len(edit.rows))
    return out


def acts_on(edit: Edit, batch: Batch) -> Tensor:
    """bool [prompt, position]: where the edit acts (for `block`, the queries that it cuts from some key)."""
    places = (chosen(edit.positions, batch, what=str(edit)) >= 0) & (row_mask(edit, len(batch.ids)) >= 0)[:, None]
    if edit.op == "block":
        keys = chosen(edit.keys, batch, what=str(edit)) >= 0
        places = places & (keys.long().cumsum(1) > 0)  # a query sees the keys at and before it
    return places


def for_prompts(edit: Edit, prompts: Sequence[int], n_prompts: int, width: int) -> Edit | None:
    """The edit as it acts on some prompts of a batch of `n_prompts`, run by themselves in a batch `width` tokens wide.

    Rows, masks, values by row and attention by key are cut to what those prompts need; None where it names none of them.
    """
    if not edit.by_row and not isinstance(edit.positions, Tensor) and not isinstance(edit.keys, Tensor):
        return _cut_keys(edit, width)
    n_rows = n_prompts if edit.rows is None else len(edit.rows)
    ordinals = row_mask(edit, n_prompts)[torch.tensor(prompts)]  # [prompt], -1 where the edit leaves it alone
    kept = (ordinals >= 0).nonzero()[:, 0]
    if not len(kept):
        return None
    value = edit.value
    if isinstance(value, Tensor) and edit.spread and value.ndim == len(edit.port.axes) and len(value) > 1:
        if len(value) != n_rows:
            raise PatchbayError(f"{edit}: a value for each of {len(value)} rows was given, the edit has {n_rows}")
        value = value[ordinals[kept].to(value.device)]
    masks = [
        mask[list(prompts) if len(mask) > 1 else [0], :width] if isinstance(mask, Tensor) else mask
        for mask in (edit.positions, edit.keys)
    ]
    rows = None if edit.rows is None else tuple(kept.tolist())
    return _cut_keys(Edit(edit.op, edit.port, value, masks[0], rows, masks[1]), width)


def _cut_keys(edit: Edit, width: int) -> Edit:
    """An edit of a pattern may have a number for each key: it keeps those of the keys that are there."""
    value = edit.value
    if (
        edit.port.signal != "attn.pattern"
        or not isinstance(value, Tensor)
        or not value.ndim
        or value.shape[-1] <= width
    ):
        return edit
    value = value[:width, :width] if edit.op == "project" else value[..., :width]
    return Edit(edit.op, edit.port, value, edit.positions, edit.rows, edit.keys)


# ---- application -----------------------------------------------------------------------------------------------------


def apply(edit: Edit, signal: Tensor, ordinal: Tensor | None, row: Tensor | None) -> Tensor:
    """The edited signal. `signal` [prompt, position, ...features]; `ordinal` [prompt, position] and `row` [prompt] as from
    `chosen` and `row_mask`, None where everything is touched. Never changes `signal` in place."""
    value = _value_for(edit, signal, ordinal, row)
    if edit.op == "replace" or edit.op == "mean":
        new = value.expand_as(signal)
    elif edit.op == "add":
        new = signal + value
    elif edit.op == "scale":
        new = signal * value
    elif edit.op == "zero":
        new = torch.zeros_like(signal)
    elif edit.op == "project":
        new = signal @ value.T  # the projector is symmetric; .T for the reader: features are rows
    else:
        raise PatchbayError(f"{edit.op} is not applied to a signal's values")
    if ordinal is None:
        return new
    touched = ordinal >= 0 if row is None else (ordinal >= 0) & (row >= 0)[:, None]
    return torch.where(touched.reshape(touched.shape + (1,) * (signal.ndim - 2)), new, signal)


def _value_for(edit: Edit, signal: Tensor, ordinal: Tensor | None, row: Tensor | None) -> Tensor:
    """The edit's value in the signal's dtype and device, shaped to broadcast against [prompt, position, ...features]."""
    if not isinstance(edit.value, Tensor):
        return signal.new_tensor(0.0 if edit.value is None else float(edit.value))
    value = edit.value.to(device=signal.device, dtype=signal.dtype)
    if edit.op == "project":
        if value.shape[0] != signal.shape[-1]:
            raise PatchbayError(
                f"{edit}: directions have {value.shape[0]} features, {edit.port} has {signal.shape[-1]}"
            )
        return value
    features = tuple(signal.shape[2:])
    extra = value.ndim - len(features)
    feature_shape = value.shape[max(extra, 0) :]
    fits = all(a in (1, b) for a, b in zip(reversed(feature_shape), reversed(features), strict=False))
    if extra > 2 or not fits:
        raise _wrong_shape(edit, signal)
    if extra <= 0:
        return value
    n_rows = len(edit.rows) if edit.rows is not None else signal.shape[0]
    if extra == 2 and value.shape[0] not in (1, n_rows):
        raise _wrong_shape(edit, signal)
    value = value if extra == 2 else value[None]  # [row, selected position, ...features]
    row_index = torch.zeros(signal.shape[0], dtype=torch.long) if value.shape[0] == 1 else row
    if value.shape[1] == 1:
        return value if value.shape[0] == 1 else value[_known(row_index, edit).clamp(min=0)]
    ordinal = _known(ordinal, edit)
    if int(ordinal.max()) >= value.shape[1]:
        raise _wrong_shape(edit, signal, int(ordinal.max()) + 1)
    rows = _known(row_index, edit).clamp(min=0)[:, None].to(ordinal.device)
    return value[rows, ordinal.clamp(min=0)]  # [prompt, position, ...features]


def _known(index: Tensor | None, edit: Edit) -> Tensor:
    if index is None:
        raise PatchbayError(f"{edit}: a value for each row or position needs their index")
    return index


def _wrong_shape(edit: Edit, signal: Tensor, n_selected: int | None = None) -> PatchbayError:
    features = list(signal.shape[2:])
    found = list(edit.value.shape) if isinstance(edit.value, Tensor) else edit.value
    rows = len(edit.rows) if edit.rows is not None else signal.shape[0]
    places = n_selected if n_selected is not None else "n_positions"
    return PatchbayError(
        f"{edit}: value has shape {found}; {edit.port} takes {features}, [{places}, *{features}] for each selected position, "
        f"or [{rows}, 1 or {places}, *{features}] for each row"
    )


# ---- files -----------------------------------------------------------------------------------------------------------

FORMAT = {"format": "patchbay-edits", "version": "1"}


def _positions_to_json(positions: Positions, tensors: dict[str, Tensor]) -> Any:
    if isinstance(positions, slice):
        return {"slice": [positions.start, positions.stop, positions.step]}
    if isinstance(positions, Token):
        return {"token": positions.token}
    if isinstance(positions, Tensor):
        name = f"mask{len(tensors)}"
        tensors[name] = positions.detach().cpu().contiguous()
        return {"mask": name}
    return list(positions) if isinstance(positions, tuple) else positions


def _positions_from_json(data: Any, tensors: dict[str, Tensor]) -> Positions:
    if isinstance(data, dict):
        if "slice" in data:
            return slice(*data["slice"])
        return Token(data["token"]) if "token" in data else tensors[data["mask"]]
    return tuple(data) if isinstance(data, list) else data


def pack(edits: Sequence[Edit]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Edits as JSON-able rows and named tensors; `unpack` reverses it exactly."""
    tensors: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for edit in edits:
        row: dict[str, Any] = {"op": edit.op, "port": str(edit.port)}
        if isinstance(edit.value, Tensor):
            row["tensor"] = f"value{len(tensors)}"
            tensors[row["tensor"]] = edit.value.detach().cpu().contiguous()
        elif edit.value is not None:
            row["value"] = float(edit.value)
        if edit.positions is not None:
            row["positions"] = _positions_to_json(edit.positions, tensors)
        if edit.keys is not None:
            row["keys"] = _positions_to_json(edit.keys, tensors)
        if edit.rows is not None:
            row["rows"] = list(edit.rows)
        rows.append(row)
    return rows, tensors


def unpack(rows: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> list[Edit]:
    """Edits from what `pack` made. Raises PatchbayError where a row is not an edit."""
    edits = []
    for row in rows:
        try:
            value = tensors[row["tensor"]] if "tensor" in row else row.get("value")
            positions = _positions_from_json(row.get("positions"), tensors)
            keys = _positions_from_json(row.get("keys"), tensors)
            rows_of = tuple(row["rows"]) if "rows" in row else None
            edits.append(Edit(row["op"], parse_port(row["port"]), value, positions, rows_of, keys))
        except (KeyError, TypeError) as error:
            raise PatchbayError(f"not an edit: {row!r} ({error})") from error
    return edits


def save_edits(edits: Sequence[Edit], path: str | Path) -> None:
    """Write edits to one safetensors file, its rows in the header; atomic."""
    rows, tensors = pack(edits)
    own = {name: tensor.clone() for name, tensor in tensors.items()}  # several may be views of one
    write_file(path, write_tensors(own, metadata=FORMAT | {"edits": json.dumps(rows)}))


def load_edits(path: str | Path) -> list[Edit]:
    """Read edits written by `save_edits`."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PatchbayError(f"{path} is not a readable edits file: {error}") from error
    if header.get("format") != FORMAT["format"] or header.get("version") != FORMAT["version"]:
        raise PatchbayError(
            f"{path} is not an edits file of version {FORMAT['version']}: its header says {header or 'nothing'}"
        )
    try:
        rows = json.loads(header["edits"])
    except (KeyError, json.JSONDecodeError) as error:
        raise PatchbayError(f"{path} holds no edits: {error}") from error
    return unpack(rows, tensors)


def ports_of(parts: Any, signal: str | None = None) -> list[Port]:
    """Main ports (or those of `signal`) of parts given as Parts, their texts or views of a model."""
    if isinstance(parts, Port):
        return [parts]
    parts = [parts] if isinstance(parts, str) or not isinstance(parts, Sequence) else parts
    return [part if isinstance(part, Port) else as_part(part).port(signal) for part in parts]
