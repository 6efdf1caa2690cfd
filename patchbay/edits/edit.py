"""Edits: values that say what to do at a port. Data only: they compare, print, save, load and batch row by row.

`replace` sets the signal to a value, `add` adds one, `scale` multiplies, `zero` sets 0, `mean` sets the mean of a reference,
`project` removes (or keeps) a subspace, `block` cuts attention from queries to keys before the softmax. Each names the
positions it acts at and the prompts (rows) of the batch; a value may differ for every row and every position.

`edit.when(condition)` makes an edit conditional: a `Probe` says at which of those positions it is made, or a role of the chat.

Order: ports act in the order of the forward pass. At one port, edits act in the order given, except that `block`, which acts
before the softmax, precedes the other edits of a pattern. Nothing acts on padding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any, Literal, SupportsIndex, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as write_tensors
from torch import Tensor

from patchbay.edits.probe import CACHED, Probe
from patchbay.files import write_file
from patchbay.signal.port import PatchbayError, Port, as_part, as_port, parse_port, suggest
from patchbay.signal.positions import Positions, Role, brief, fixed, from_json, to_json

Op = Literal["replace", "add", "scale", "zero", "mean", "project", "block"]
OPS: tuple[str, ...] = get_args(Op)


@dataclass(frozen=True, eq=False)
class Edit:
    """One change at one port. Build it with `pb.replace`, `pb.add`, `pb.scale`, `pb.zero`, `pb.mean`, `pb.project`, `pb.block`.

    `port`: a Port or its text, such as "L3.H5.z". `positions`: None (all), an index (negative counts from each prompt's end), a slice, several indices, a bool mask
    [prompt, position], a `Token`, a role of a chat ("user"), "last" (each prompt's last token), "generated" (every token after the prompt) or "predicting"
    (those whose output predicts the generated ones: the last and all after it). For an
    attention pattern and for q they are query positions; for k and v, key positions. `rows`: prompts of the batch that are
    edited (None: all). `value`: a number or a tensor whose axes are the port's own without prompt and position, optionally
    with a position axis (one entry for each selected position) and before that a row axis (one for each edited row).
    `where`: a Probe that says at which of these positions it is made; without, at all.
    """

    op: Op
    port: Port
    value: Tensor | float | None = None
    positions: Positions = None
    rows: tuple[int, ...] | None = None
    keys: Positions = None
    where: Probe | None = None

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise PatchbayError(f"no edit {self.op!r}; edits are {', '.join(OPS)}" + suggest(str(self.op), OPS))
        object.__setattr__(self, "port", as_port(self.port))
        if not self.port.editable:
            raise PatchbayError(f"{self.port} can be tapped, not edited")
        if self.port.query is not None:
            raise PatchbayError(f"{self.port}: give query rows of an edit as positions=, not in the port")
        if self.op == "block" and self.port.signal != "attn.pattern":
            raise PatchbayError(f"block cuts attention and needs a pattern port, got {self.port}")
        object.__setattr__(self, "value", as_numbers(self.value))
        if isinstance(self.value, Tensor):
            if not self.value.is_floating_point():
                raise PatchbayError(f"{self.op} at {self.port}: value has dtype {self.value.dtype}, a float is needed")
            if self.value.device.type == "meta":
                raise PatchbayError(f"{self.op} at {self.port}: value is on the meta device, it has no numbers")
            if not bool(torch.isfinite(self.value).all()):
                raise PatchbayError(f"{self.op} at {self.port}: value holds NaN or infinite numbers")
        elif self.value is not None and not (isinstance(self.value, int | float) and abs(self.value) < float("inf")):
            raise PatchbayError(f"{self.op} at {self.port}: value {self.value!r} is not a finite number or tensor")
        if self.where is not None:
            self._check_probe(self.where)

    def _check_probe(self, probe: Probe) -> None:
        if not isinstance(probe, Probe):
            raise PatchbayError(
                f"{self.op} at {self.port}: where= is a probe, pb.Probe(port, direction, threshold), got {probe!r:.60}"
            )
        if self.port.signal in CACHED:
            raise PatchbayError(
                f"{self.op} at {self.port} where {probe}: keys and values of earlier tokens are edited again in each call, by when what the "
                "probe read there is gone; edit what they are made of (resid_in), what is done with them (attn.z) or the pattern"
            )
        if not probe.precedes(self.port):
            raise PatchbayError(
                f"{self.op} at {self.port} where {probe}: the probe reads after the place that it decides about; give a port at or before it"
            )

    def when(self, condition: Probe | Role | str) -> Edit:
        """The same edit, made only where a probe fires, or only in a chat's messages of a role ("user", "assistant", ...)."""
        if isinstance(condition, Probe):
            if self.where is not None:
                raise PatchbayError(f"{self} has a condition already; an edit has one probe")
            return changed(self, where=condition)
        role = condition if isinstance(condition, Role) else fixed(condition) if isinstance(condition, str) else None
        if not isinstance(role, Role):
            raise PatchbayError(
                f"{self}: a condition is a pb.Probe or a role of the chat such as 'user', got {condition!r:.60}"
            )
        if self.positions is not None:
            raise PatchbayError(f"{self}: it names positions already; those of a role would stand in their place")
        return changed(self, positions=role)

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
    def same_everywhere(self) -> bool:
        """Is the value by row, and within a row the same at every position?"""
        return isinstance(self.value, Tensor) and self.value.ndim == len(self.port.axes) and self.value.shape[1] == 1

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
            parts.append(f"positions={brief(self.positions)}")
        if self.keys is not None:
            parts.append(f"key={brief(self.keys)}")
        if self.rows is not None:
            parts.append(f"rows={list(self.rows)}")
        if self.where is not None:
            parts.append(f"where {self.where}")
        return f"{self.op}({', '.join(parts)})"

    __repr__ = __str__


def as_numbers(value: Any) -> Any:
    """A list, an array or a scalar of numpy as what an edit holds: a tensor of floats or a number; all else as it is."""
    if isinstance(value, Tensor) or not (isinstance(value, list | tuple) or hasattr(value, "__array__")):
        return value
    try:
        found = torch.tensor(value) if isinstance(value, list | tuple) else torch.as_tensor(value.__array__())
    except (ValueError, TypeError, RuntimeError) as error:
        raise PatchbayError(f"{type(value).__name__} is not an array of numbers: {error}") from error
    if not found.ndim:
        return float(found)
    return found if found.is_floating_point() else found.float()


def _rows(rows: int | Sequence[int] | None) -> tuple[int, ...] | None:
    return None if rows is None else (int(rows),) if isinstance(rows, SupportsIndex) else tuple(int(r) for r in rows)


def replace(port: Port | str, value: Any, *, positions: Positions = None, rows: Any = None) -> Edit:
    """Set the signal to `value`."""
    return Edit("replace", as_port(port), value, fixed(positions), _rows(rows))


def add(port: Port | str, value: Any, *, positions: Positions = None, rows: Any = None) -> Edit:
    """Add `value` to the signal: a steering vector, a bias."""
    return Edit("add", as_port(port), value, fixed(positions), _rows(rows))


def scale(port: Port | str, factor: Any, *, positions: Positions = None, rows: Any = None) -> Edit:
    """Multiply the signal by `factor`; 1.0 leaves it bit for bit."""
    return Edit("scale", as_port(port), factor, fixed(positions), _rows(rows))


def zero(port: Port | str, *, positions: Positions = None, rows: Any = None) -> Edit:
    """Set the signal to 0."""
    return Edit("zero", as_port(port), None, fixed(positions), _rows(rows))


def mean(port: Port | str, reference: Any, *, positions: Positions = None, rows: Any = None) -> Edit:
    """Set the signal to the mean of `reference` over its prompts and positions.

    `reference` is what a tap of the same port returned on reference prompts, [prompt, position, ...] in the port's own axes
    (padding, NaN, is left out); a tensor without those axes is taken as the mean itself.
    """
    port = as_port(port)
    features, reference = len(port.axes) - 2, as_numbers(reference)
    if not isinstance(reference, Tensor):
        raise PatchbayError(f"mean at {port}: reference {reference!r} is not a tensor, an array or a list of numbers")
    if reference.ndim == features + 2:
        reference = reference.movedim(port.tapped_axis, 1).flatten(0, 1).nanmean(0)
    return Edit("mean", port, reference, fixed(positions), _rows(rows))


def project(port: Port | str, basis: Any, *, keep: bool = False, positions: Positions = None, rows: Any = None) -> Edit:
    """Remove from the signal its part in the span of `basis` [direction, feature]; with `keep`, remove everything else."""
    port = as_port(port)
    if len(port.axes) < 3:
        raise PatchbayError(f"project at {port}: the signal is one number at each position, it has no directions")
    basis = as_numbers(basis)
    if not isinstance(basis, Tensor):
        raise PatchbayError(f"project at {port}: basis {basis!r} is not a tensor, an array or a list of numbers")
    basis = torch.atleast_2d(basis)
    if not bool(torch.isfinite(basis).all()):
        raise PatchbayError(f"project at {port}: basis holds NaN or infinite numbers")
    if torch.linalg.matrix_rank(basis.double()) < basis.shape[0]:
        raise PatchbayError(f"project at {port}: the {basis.shape[0]} directions are not linearly independent")
    orthonormal = torch.linalg.qr(basis.double().T).Q.T.to(basis.dtype)  # [direction, feature]
    inside = orthonormal.T @ orthonormal  # [feature, feature], the projector on the span
    matrix = inside if keep else torch.eye(len(inside), dtype=basis.dtype, device=basis.device) - inside
    return Edit("project", port, matrix, fixed(positions), _rows(rows))


def block(port: Port | str, *, query: Positions = None, key: Positions, rows: Any = None) -> Edit:
    """Cut attention from `query` positions to `key` positions before the softmax: the rest of each row renormalises."""
    return Edit("block", as_port(port), None, fixed(query), _rows(rows), fixed(key))


# ---- files -----------------------------------------------------------------------------------------------------------

FORMAT = {"format": "patchbay-edits", "version": "1"}
CONDITIONAL = "2"  # the version of files that hold a probe, which readers of version 1 would not see


def conditional(edits: Sequence[Edit]) -> Edit | None:
    """The first edit that a probe decides about."""
    return next((edit for edit in edits if edit.where is not None), None)


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
            row["positions"] = to_json(edit.positions, tensors)
        if edit.keys is not None:
            row["keys"] = to_json(edit.keys, tensors)
        if edit.rows is not None:
            row["rows"] = list(edit.rows)
        if edit.where is not None:
            row["where"] = edit.where.to_json(tensors)
        rows.append(row)
    return rows, tensors


def unpack(rows: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> list[Edit]:
    """Edits from what `pack` made. Raises PatchbayError where a row is not an edit."""
    edits = []
    for row in rows:
        try:
            value = tensors[row["tensor"]] if "tensor" in row else row.get("value")
            positions = from_json(row.get("positions"), tensors)
            keys = from_json(row.get("keys"), tensors)
            rows_of = tuple(row["rows"]) if "rows" in row else None
            where = Probe.from_json(row["where"], tensors) if "where" in row else None
            edits.append(Edit(row["op"], parse_port(row["port"]), value, positions, rows_of, keys, where))
        except (KeyError, TypeError) as error:
            raise PatchbayError(f"not an edit: {row!r} ({error})") from error
    return edits


def save_edits(edits: Sequence[Edit], path: str | Path) -> None:
    """Write edits to one safetensors file, its rows in the header; atomic."""
    rows, tensors = pack(edits)
    own = {name: tensor.clone() for name, tensor in tensors.items()}  # several may be views of one
    marks = FORMAT | ({"version": CONDITIONAL} if conditional(edits) else {}) | {"edits": json.dumps(rows)}
    write_file(path, write_tensors(own, metadata=marks))


def load_edits(path: str | Path) -> list[Edit]:
    """Read edits written by `save_edits`."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PatchbayError(f"{path} is not a readable edits file: {error}") from error
    known = (FORMAT["version"], CONDITIONAL)
    if header.get("format") != FORMAT["format"] or header.get("version") not in known:
        raise PatchbayError(
            f"{path} is not an edits file of version {' or '.join(known)}: its header says {header or 'nothing'}"
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
