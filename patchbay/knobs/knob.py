"""Knob: edits, a strength, and where they came from. Data that compares, prints, saves and loads; it knows no model.

`edits` are templates: what they do depends on how far the knob is turned. At its neutral strength a knob makes no edits at
all, so the model runs as if it were not there, bit for bit. By operation, with v the template's value and s the strength:

| op      | edits at strength s                              | neutral | at s = 1         |
|---------|--------------------------------------------------|---------|------------------|
| scale   | multiply by 1 + (s - 1) v; with v = 1, by s      | 1       | as it was        |
| add     | add s v                                          | 0       | the template     |
| zero    | multiply by 1 - s                                | 0       | the template     |
| project | the matrix (1 - s) I + s v                       | 0       | the template     |
| replace | multiply by 1 - s, then add s v                  | 0       | the template     |
| mean    | multiply by 1 - s, then add s v                  | 0       | the template     |
| block   | cut, whatever s is but 0                         | 0       | the template     |

All but `block` are linear in s, also beyond 1 and below 0. A knob with scale edits has no others: their neutral differs.
With `kept`, strength counts what is kept instead: the edits at s are those of the table at 1 - s, so that 1 is neutral and
0 the template (which then takes something away). A knob with scale edits is like that by itself.

Several knobs add up in the order given (`model.edited(a, b, strength=[2, 0.5])`); `conflicts` says where that order matters, and
using them together warns of it. `on_rows` limits a knob to some prompts of a batch; `when` to where a probe fires, in the same
run, or to a chat's messages of a role.

On disk a knob is one safetensors file with a JSON header: no pickle, written whole or not at all. `evidence` holds Results that
say what the knob does (its proof, its dose-response curve) and travels in the file. A knob that was made on one model acts on
those weights alone, also in other digits (float32, bfloat16, quantised: `model/precisions.py`), which a `KnobPrecision` says:
`for_model` makes one for another model with the same parts, and warns with both fingerprints.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as write_tensors
from torch import Tensor

from patchbay.edits.edit import Edit, conditional, pack, unpack
from patchbay.edits.probe import Probe
from patchbay.errors import by_kind
from patchbay.files import write_file
from patchbay.knobs.conflicts import KnobConflict, conflicts
from patchbay.knobs.vectors import kind_of, read_vectors
from patchbay.late import late
from patchbay.model.attached import attached, other_dictionary
from patchbay.model.carried import carried, said
from patchbay.model.model import Model
from patchbay.model.precisions import one_checkpoint, precisions
from patchbay.results.result import Result, described, from_described
from patchbay.results.saved import packed, unpacked
from patchbay.signal.card import card
from patchbay.signal.port import PatchbayError, Port
from patchbay.signal.positions import Role

FORMAT, VERSION = "patchbay-knob", 1
CONDITIONAL = 2  # the version of a knob that holds a probe, which readers of version 1 would not see
MAX_NUMBERS = 65_536  # in a JSON record; a knob that holds more is recorded by digest


class KnobPrecision(UserWarning):
    """A knob is used on the checkpoint that it was made on, loaded in other digits."""


@dataclass(frozen=True, repr=False)
class Knob:
    """Edit templates and how far they are turned. Use it with `model.edited(knob)`, `pb.run(..., edits=[knob])` or `generate`."""

    name: str
    edits: Sequence[Edit]
    strength: float
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)
    evidence: Mapping[str, Result] = field(default_factory=dict, compare=False)
    kept: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))
        object.__setattr__(self, "strength", _finite(self.name, self.strength))
        object.__setattr__(self, "provenance", dict(self.provenance))
        object.__setattr__(self, "evidence", dict(self.evidence))
        if not isinstance(self.name, str) or not self.name.strip():
            raise PatchbayError(f"a knob needs a name, got {self.name!r}")
        wrong = next((edit for edit in self.edits if not isinstance(edit, Edit)), None)
        if not self.edits or wrong is not None:
            found = "none" if wrong is None else type(wrong).__name__
            raise PatchbayError(f"knob {self.name}: edits such as pb.scale(head.z, 1.0) are needed, got {found}")
        ops = sorted({edit.op for edit in self.edits})
        if "scale" in ops and len(ops) > 1:
            raise PatchbayError(
                f"knob {self.name}: {' and '.join(ops)} in one knob have no strength at which all are neutral (scale: 1, the others: "
                "0); make two knobs, model.edited takes several"
            )
        if self.kept and "scale" in ops:
            raise PatchbayError(
                f"knob {self.name}: kept is for templates that take away; scale edits keep at 1 by themselves"
            )
        for name, result in self.evidence.items():
            if not isinstance(result, Result) or not name.isidentifier():
                raise PatchbayError(
                    f"knob {self.name}: evidence is a Result by name, got {name!r}: {type(result).__name__}"
                )

    @property
    def neutral(self) -> float:
        """The strength at which nothing is edited: 1 for scale and where strength counts what is kept, else 0."""
        return 1.0 if self.kept or self.edits[0].op == "scale" else 0.0

    def edits_at(self, strength: float | None = None) -> list[Edit]:
        """The edits at a strength (the knob's own without one), by the rules at the head of this file; none at neutral."""
        s = self.strength if strength is None else _finite(self.name, strength)
        if s == self.neutral:
            return []
        return [made for edit in self.edits for made in _turned(edit, 1.0 - s if self.kept else s)]

    def at(self, strength: float) -> Knob:
        """The same knob turned to another strength."""
        return replace(self, strength=strength)

    def on_rows(self, *rows: int) -> Knob:
        """The same knob for some prompts of a batch only; the others run as if it were not there."""
        return replace(self, edits=[replace(edit, rows=tuple(rows)) for edit in self.edits])

    def when(self, condition: Probe | Role | str) -> Knob:
        """The same knob, made only where a probe fires, or only in a chat's messages of a role; its evidence is of the one without
        the condition and stays behind."""
        return replace(self, edits=[edit.when(condition) for edit in self.edits], evidence={})

    def with_evidence(self, **results: Result) -> Knob:
        """The same knob with Results that show what it does, such as `proof=` and `dose_response=`."""
        return replace(self, evidence={**self.evidence, **results})

    @property
    def made_on(self) -> Mapping[str, Any]:
        """Source and fingerprint of the model that it was made on; empty when it was made without one."""
        return self.provenance.get("model") or {}

    @by_kind
    def fits(self, model: Model) -> bool:
        """Whether this model has the weights that the knob was made on, in any digits. Raises PatchbayError where it lacks a part."""
        for edit in self.edits:
            model.require(edit.port)
            if edit.where is not None:
                model.require(edit.where.port)
        same = self.made_on.get("fingerprint") == model.fingerprint or self._one_checkpoint(model)
        return bool(same) and not other_dictionary(model, self.made_on, [edit.port for edit in self.edits])

    def _one_checkpoint(self, model: Model) -> bool:
        """Whether the model is a load in other digits of the checkpoint that the knob was made on. Asked once for each pair."""
        made, kept = self.made_on.get("fingerprint"), self.provenance.get("precisions")
        if not made or not kept:
            return False
        known: dict[Any, bool] = model.__dict__.setdefault("_one_checkpoint", {})
        pair = (made, model.fingerprint)
        if pair not in known:
            known[pair] = one_checkpoint(kept, precisions(model))
            if known[pair]:
                digits = _digits(carried(model.hf) | {"dtype": str(model.dtype).removeprefix("torch.")})
                warnings.warn(
                    f"knob {self.name!r} was made on this checkpoint in {_digits(self.made_on)} and is used in {digits}: its numbers "
                    "are rounded to these, and its evidence was measured in those",
                    KnobPrecision,
                    stacklevel=4,
                )
        return known[pair]

    def check(self, model: Model) -> None:
        """Raise PatchbayError where the knob was made on other weights; one that does not say where is not held to any."""
        made = self.made_on.get("fingerprint")
        if made and made != model.fingerprint and not self._one_checkpoint(model):
            raise PatchbayError(
                f"knob {self.name!r} was made on {self.made_on.get('source') or 'a model without a name'} (weights {made}), this "
                f"is {model.source or type(model.hf).__name__} (weights {model.fingerprint}); to try it here all the same, "
                "use knob.for_model(model) (on the command line --other-weights)"
            )
        other = other_dictionary(model, self.made_on, [edit.port for edit in self.edits])
        if other:
            raise PatchbayError(f"knob {self.name!r}: {other}; to try it here all the same, use knob.for_model(model)")

    def for_model(self, model: Model) -> Knob:
        """The same edits for another model that has these parts, in these widths; warns where its weights are others. The evidence,
        which was measured elsewhere, stays behind."""
        if self.fits(model):
            return self
        for edit in self.edits:
            _check_width(edit, model)
        made = self.made_on.get("fingerprint") or "unknown"
        warnings.warn(
            f"knob {self.name!r} was made on weights {made} and is used on weights {model.fingerprint}: what it does here is "
            "not known until it is measured here",
            stacklevel=2,
        )
        provenance = {**self.provenance, **_on(model), "first_model": dict(self.made_on)}
        return replace(self, provenance=provenance, evidence={})

    def export(self, model: Model, folder: str | Path, *, form: str = "checkpoint", overwrite: bool = False) -> Any:
        """Write what the knob does for other programs: a checkpoint, a LoRA adapter, a steering vector. See `export.py`."""
        return late("export")(self, model, folder, form=form, overwrite=overwrite)

    def warn_of_conflicts(self, others: Sequence[Knob], strengths: Sequence[float | None]) -> None:
        """Warn with a `KnobConflict` where the order of this knob and those used after it matters; strengths of all."""
        for found in conflicts(self, *others, strengths=strengths):
            warnings.warn(found, KnobConflict, stacklevel=3)

    def _repr_html_(self) -> str:
        first, *below = repr(self).splitlines()
        return card(first, [[line.strip()] for line in below], columns=("edits, where it was made, evidence",))

    def __repr__(self) -> str:
        lines = [f"Knob {self.name!r} at strength {self.strength:g} (neutral {self.neutral:g})"]
        lines += [f"  {edit}" for edit in self.edits[:8]]
        lines += [f"  and {len(self.edits) - 8} more"] if len(self.edits) > 8 else []
        if method := self.provenance.get("method"):
            lines.append(f"  made by {method}")
        if self.made_on:
            lines.append(
                f"  on {self.made_on.get('source') or 'a model without a name'} ({self.made_on.get('fingerprint')})"
            )
        lines += [
            f"  evidence {name}: {result.provenance.get('method', 'Result')}" for name, result in self.evidence.items()
        ]
        return "\n".join(lines)

    # --- data and files ---------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The knob without its evidence as JSON types, for records of what was run; tensors as lists, or digests if large."""
        rows, tensors = pack(self.edits)
        listed: dict[str, Any] = {"name": self.name, "strength": self.strength, "edits": rows, "kept": self.kept}
        if sum(tensor.numel() for tensor in tensors.values()) > MAX_NUMBERS:
            return listed | {"sha256": _digest(tensors)}
        kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
        return listed | {"tensors": {name: {"dtype": kinds[name], "data": t.tolist()} for name, t in tensors.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Knob:
        """The knob that `to_json` described."""
        if "tensors" not in data:
            raise PatchbayError("this record holds a knob by digest alone: it was too large; load the knob's own file")
        held = {n: torch.tensor(t["data"], dtype=getattr(torch, t["dtype"])) for n, t in data["tensors"].items()}
        return cls(data["name"], unpack(data["edits"], held), data["strength"], kept=bool(data.get("kept")))

    @by_kind
    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write one file, whole or not at all; a knob that is already there stays unless `overwrite`."""
        target = Path(os.path.realpath(path))
        _refuse_to_replace(target, overwrite)
        rows, tensors = pack(self.edits)
        header: dict[str, Any] = {"name": self.name, "strength": self.strength, "edits": rows, "kept": self.kept}
        header |= {"provenance": self.provenance, "evidence": {}}
        for name, result in self.evidence.items():
            header["evidence"][name] = described(result)
            tensors |= {f"{name}.{variable}": result[variable] for variable in result.variables}
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # edits may share values, a file may not
        text = json.dumps(packed(header), ensure_ascii=False, allow_nan=False)
        version = CONDITIONAL if conditional(self.edits) else VERSION
        marks = {"format": FORMAT, "version": str(version), "sha256": _digest(tensors, text), "knob": text}
        write_file(target, write_tensors(tensors, metadata=marks))
        return target


@by_kind
def load_knob(path: str | Path, model: Model | None = None) -> Knob:
    """Read a file that `Knob.save` wrote, or steering vectors of other programs (`vectors.py` lists the files).

    Runs nothing from it; refuses all but a whole, undamaged knob. With `model`, knobs and others' vectors are held to it."""
    path = Path(path)
    if not path.is_file():
        raise PatchbayError(f"{path} is {'a folder, not a file' if path.is_dir() else 'not there'}: no knob to load")
    marks, tensors = _knob_file(path)
    if marks.get("format") != FORMAT:
        if "knob" in marks or "edits" in marks:  # a knob that was altered, or edits of `save_edits`
            raise PatchbayError(f"{path} holds {marks.get('format', 'tensors without a format')!r}, not {FORMAT!r}")
        origin = {} if model is None else _on(model)
        return Knob(path.stem, read_vectors(path, model), 1.0, {"method": f"vectors read from {path.name}", **origin})
    if marks.get("version") not in (str(VERSION), str(CONDITIONAL)):
        raise PatchbayError(
            f"{path} is a knob of version {marks.get('version')}; this Patchbay reads versions {VERSION} and {CONDITIONAL}: update it"
        )
    try:
        if marks["sha256"] != _digest(tensors, marks["knob"]):
            raise PatchbayError("its contents were altered (checksum differs)")
        header = unpacked(json.loads(marks["knob"]))
        evidence = {
            name: from_described(record, {key.removeprefix(f"{name}."): value for key, value in tensors.items()})
            for name, record in header["evidence"].items()
        }
        made, kept = unpack(header["edits"], tensors), bool(header.get("kept"))
        return Knob(header["name"], made, header["strength"], header["provenance"], evidence, kept)
    except Exception as error:  # whatever a damaged file leads to
        reason = str(error) if isinstance(error, PatchbayError) else repr(error)
        raise PatchbayError(f"{path} is a damaged knob: {reason}") from error


def _knob_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Marks and tensors of a safetensors file; no marks where it is another kind of file that vectors come in."""
    if kind_of(path) != "safetensors":
        return {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise PatchbayError(f"{path} is no knob, or a damaged one: {error}") from error


def _on(model: Model) -> dict[str, Any]:
    """What a knob's provenance says of the model that it is for."""
    dtype = str(model.dtype).removeprefix("torch.")
    record = {"source": model.source, "fingerprint": model.fingerprint, "family": model.family.name, "dtype": dtype}
    return {"model": record | carried(model.hf, model.source) | attached(model), "precisions": precisions(model)}


def _digits(record: Mapping[str, Any]) -> str:
    """How a recorded model's weights were stored."""
    made = record.get("quantisation")
    return ", ".join(said({"quantisation": made})) if made else str(record.get("dtype") or "other digits")


def _check_width(edit: Edit, model: Model) -> None:
    """Raise unless the numbers of the edit are as many as the model's signal has."""
    pairs = [(edit.port, edit.value)] + ([] if edit.where is None else [(edit.where.port, edit.where.direction)])
    for port, value in pairs:
        if isinstance(value, Tensor) and value.ndim:
            _check_numbers(edit, port, value, model)


def _check_numbers(edit: Edit, port: Port, value: Tensor, model: Model) -> None:
    layer = port.layer or 0
    widths = {"d_model": model.d_model, "neuron": model.n_neurons(layer), "expert": model.n_experts(layer)}
    widths |= {"vocab": model.vocab_size}
    if port.axes[-1] == "feature":
        widths["feature"] = model.dictionaries[layer, port.signal.split(".")[0]].n_features
    if port.signal == "attn.z":
        widths["d_head"] = model.W_O(layer).shape[1]
    width = widths.get(port.axes[-1])
    if width is not None and value.shape[-1] not in (1, width):
        raise PatchbayError(f"{edit}: made for {value.shape[-1]} numbers, {port} of this model has {width}")


# --- turning --------------------------------------------------------------------------------------


def _finite(name: object, strength: object) -> float:
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise PatchbayError(f"knob {name}: strength {strength!r} is not a finite number")
    return float(strength)


def _turned(edit: Edit, s: float) -> list[Edit]:
    """One template at a strength that is not neutral; the rules stand at the head of this file."""
    value = edit.value
    if edit.op == "scale":
        assert value is not None
        return [replace(edit, value=s * value + (1.0 - value))]
    if edit.op == "add":
        assert value is not None
        return [replace(edit, value=s * value)]
    if edit.op == "block" or s == 1.0:
        return [edit]
    if edit.op == "project":
        assert isinstance(value, Tensor)
        identity = torch.eye(len(value), dtype=value.dtype, device=value.device)
        return [replace(edit, value=torch.lerp(identity, value, s))]
    less = replace(edit, op="scale", value=1.0 - s)
    return [less] if edit.op == "zero" else [less, replace(edit, op="add", value=s * value)]  # type: ignore[operator]


# --- files ----------------------------------------------------------------------------------------


def _digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of names, kinds, shapes and bytes of tensors, and of a text."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _refuse_to_replace(target: Path, overwrite: bool) -> None:
    """Raise unless the place is free, or holds a knob that may be replaced."""
    if not target.exists():
        return
    if target.is_dir():
        raise PatchbayError(f"{target} is a folder; a knob is saved as a file")
    if not overwrite:
        raise PatchbayError(f"{target} is already there; overwrite=True replaces a knob")
    with contextlib.suppress(SafetensorError, OSError, ValueError), safe_open(target, framework="pt") as file:
        if (file.metadata() or {}).get("format") == FORMAT:
            return
    raise PatchbayError(f"{target} is not a knob: not replaced")
