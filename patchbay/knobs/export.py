"""Export: what a knob does, for programs that know nothing of knobs.

| form         | what is written                                            | which edits                                          |
|--------------|------------------------------------------------------------|------------------------------------------------------|
| `checkpoint` | a Hugging Face checkpoint with the edits in its weights    | all that `fold.py` folds                              |
| `lora`       | a PEFT LoRA adapter for the model as it is                 | those whose change of each weight has a low rank, and no bias |
| `gguf`       | a GGUF control vector, `direction.N` for layer N           | adding to the stream behind layers 1, 2, ...          |
| `vector`     | safetensors, one vector for each port                      | adding, at any port                                   |

Before a checkpoint or an adapter is written, the changed weights run on random tokens beside the model under the edits, and
their logits must agree: within 1e-5 of the largest in float32, within the dtype's own rounding below it. What cannot be written
is refused with the edit and the reason. Edits at some positions or some prompts are no weights and no vectors.

The folder is written whole or not at all. Its `patchbay.json` says which knob, at which strength, from which weights, and how
far the logits were apart.
"""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.files import write_folder
from patchbay.knobs.affine import Fold
from patchbay.knobs.fold import fold
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.model.self_check import TOLERANCE
from patchbay.results.record import versions
from patchbay.signal.port import PatchbayError, suggest

FORMS = ("checkpoint", "lora", "gguf", "vector")
RECORD = "patchbay.json"
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-5}
# model types that llama.cpp calls otherwise
ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "gpt_neox": "gptneox",
    "cohere": "command-r",
    "qwen2_moe": "qwen2moe",
}


@dataclass(frozen=True)
class Exported:
    """What was written. `error`: the largest difference of a logit from the model under the edits; 0 for vectors, which are the edits."""

    folder: Path
    form: str
    files: tuple[str, ...]
    error: float
    changed: tuple[str, ...]

    def __str__(self) -> str:
        proved = (
            f"logits within {self.error:.1e} of the edited model's"
            if self.form in FORMS[:2]
            else "the edits' own numbers"
        )
        return (
            f"{self.form} in {self.folder}: {', '.join(self.files)}; {proved}; changed {', '.join(self.changed[:6])}"
            + (f" and {len(self.changed) - 6} more" if len(self.changed) > 6 else "")
        )

    __repr__ = __str__


def export(
    knob: Knob, model: Model, folder: str | Path, *, form: str = "checkpoint", overwrite: bool = False
) -> Exported:
    """Write `knob` at its strength, made for `model`, into `folder`; forms are in the table above.

    Raises PatchbayError where an edit cannot be written in this form, or the result does not do what the edits do.
    """
    if form not in FORMS:
        raise PatchbayError(f"no form {form!r}; forms are {', '.join(FORMS)}" + suggest(form, FORMS))
    if model._session is not None:
        raise PatchbayError(
            "export inside model.edited(...): only the knob would be written, not the edits around it; leave the block"
        )
    knob.check(model)
    edits = knob.edits_at()
    if not edits:
        raise PatchbayError(f"knob {knob.name!r} at strength {knob.strength:g} is neutral: there is nothing to export")
    for edit in edits:
        model.require(edit.port)
    target = Path(os.path.realpath(folder))
    _check_place(target, overwrite)
    write, error, changed = {"checkpoint": _checkpoint, "lora": _lora, "gguf": _gguf, "vector": _vector}[form](
        model, edits
    )
    record = {
        "format": "patchbay-export",
        "version": 1,
        "form": form,
        "knob": {"name": knob.name, "strength": knob.strength, "edits": [str(edit) for edit in edits]},
        "model": {"source": model.source, "fingerprint": model.fingerprint, "family": model.family.name},
        "largest_difference_of_a_logit": error,
        "changed": list(changed),
        "versions": versions(),
    }
    files = _write_folder(target, write, record)
    return Exported(target, form, files, error, tuple(changed))


Writer = Callable[[Path], None]


# --- weights ------------------------------------------------------------------------------------------


def _folded(model: Model, edits: Sequence[Edit]) -> tuple[Model, Fold]:
    """A copy of the model with the edits in its weights."""
    other = Model(copy.deepcopy(model.hf), model._tokenizer, family=model.family, source=model.source)
    return other, fold(other, edits)


def _probe(model: Model) -> Tensor:
    """Random tokens, as many as a few sentences."""
    longest = min(24, model.max_positions or 24)
    return torch.randint(model.vocab_size, (4, longest), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _apart(model: Model, other: Model, edits: Sequence[Edit]) -> float:
    """Largest difference of a logit between the edited model and the one with other weights; refuses one that is too large."""
    ids = _probe(model)
    expected = run(model, ids, edits=list(edits)).logits.double()
    difference = float(
        (other.hf(input_ids=ids.to(other.device), use_cache=False).logits.double() - expected).abs().max()
    )
    scale = max(1.0, float(expected.abs().max()))
    allowed = CLOSE.get(model.dtype, TOLERANCE.get(model.dtype, 1e-2))
    if not difference <= allowed * scale:
        raise PatchbayError(
            f"{', '.join(map(str, edits[:4]))}: with the edits in its weights this {model.family.name} model's logits differ from "
            f"the edited model's by {difference:.1e} (largest logit {scale:.3g}, {allowed:.0e} of it is allowed): not written"
        )
    return difference


def _checkpoint(model: Model, edits: Sequence[Edit]) -> tuple[Writer, float, Sequence[str]]:
    other, made = _folded(model, edits)
    error = _apart(model, other, edits)

    def write(folder: Path) -> None:
        other.hf.save_pretrained(folder)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)

    return write, error, sorted({*made.changes(), *made.biased, *made.others})


def _lora(model: Model, edits: Sequence[Edit]) -> tuple[Writer, float, Sequence[str]]:
    """B A = the change of each weight, from its singular values; every module gets the largest rank, padded with zeros."""
    other, made = _folded(model, edits)
    wrong = sorted(made.biased | made.others)
    if wrong:
        raise PatchbayError(
            f"{', '.join(map(str, edits[:4]))}: as a LoRA adapter only weights of linear maps change, and this changes "
            f"{', '.join(wrong[:4])} (a bias, an embedding, a norm or fused experts); form='checkpoint' can"
        )
    factors = {name: _factors(name, change) for name, change in made.changes().items()}
    if not factors:
        raise PatchbayError(f"{', '.join(map(str, edits[:4]))} changes no weight of this model")
    rank = max(len(a) for a, _ in factors.values())
    tensors = {}
    for name, (a, b) in factors.items():
        missing = rank - len(a)
        padded = (torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), missing)], 1))
        for letter, tensor in zip("AB", padded, strict=True):
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = tensor.float().contiguous()
    with torch.no_grad():  # what the adapter will do, in place of what was folded
        for module, before in made.before.values():
            name = made.names[id(module)]
            if name in factors:
                a, b = (tensors[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
                weight = module.weight
                new = before + (b @ a).T  # [in, out]
                weight.copy_((new if type(module).__name__ == "Conv1D" else new.T).to(weight))  # type: ignore[operator, arg-type]
    error = _apart(model, other, edits)
    turned = any(type(module).__name__ == "Conv1D" for module, _ in made.before.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": turned,
        "target_modules": sorted(factors),
        "inference_mode": True,
    }

    def write(folder: Path) -> None:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_json(folder / "adapter_config.json", config)

    return write, error, sorted(factors)


def _factors(name: str, change: Tensor) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of a change [in, out]; refuses one of more than half of the full rank."""
    u, sizes, v = torch.linalg.svd(change, full_matrices=False)
    rank = int((sizes > 1e-7 * sizes[0]).sum())
    if rank > min(change.shape) // 2:
        raise PatchbayError(
            f"{name}: the edits change this {change.shape[0]} x {change.shape[1]} weight by a matrix of rank {rank}, more than half of "
            "the full: an adapter of it would be no smaller than the weight; form='checkpoint' writes it"
        )
    root = sizes[:rank].sqrt()
    return (u[:, :rank] * root).T, (v[:rank].T * root)


# --- vectors ------------------------------------------------------------------------------------------


def _vectors(edits: Sequence[Edit], what: str) -> dict[str, Tensor]:
    """Port -> what is added there, edits of one port together; refuses all that is not adding everywhere."""
    found: dict[str, Tensor] = {}
    for edit in edits:
        if edit.op != "add" or edit.positions is not None or edit.rows is not None or edit.spread:
            raise PatchbayError(
                f"{edit}: {what} only adds, the same at every position of every prompt; form='checkpoint' folds other linear edits"
            )
        value = torch.as_tensor(edit.value).detach().float().cpu()
        found[str(edit.port)] = found[str(edit.port)] + value if str(edit.port) in found else value.clone()
    return found


def _vector(model: Model, edits: Sequence[Edit]) -> tuple[Writer, float, Sequence[str]]:
    vectors = _vectors(edits, "a steering vector")
    marks = {"format": "patchbay-steering", "version": "1", "model": model.fingerprint}
    return lambda folder: save_file(vectors, folder / "steering.safetensors", metadata=marks), 0.0, sorted(vectors)


def _gguf(model: Model, edits: Sequence[Edit]) -> tuple[Writer, float, Sequence[str]]:
    """Readers of the format add `direction.N` to the stream behind layer N, counted from 0; none of layer 0 is possible."""
    directions: dict[int, Tensor] = {}
    for edit in edits:
        vector = next(iter(_vectors([edit], "a control vector").values()))
        layer = _behind(model, edit)
        vector = vector.expand(model.d_model)
        directions[layer] = directions[layer] + vector if layer in directions else vector.clone()
    named = {f"direction.{layer}": vector.numpy() for layer, vector in sorted(directions.items())}
    kind = str(model.config.model_type)
    fields: dict[str, str | int] = {
        "general.architecture": "controlvector",
        "controlvector.model_hint": ARCHITECTURES.get(kind, kind),
        "controlvector.layer_count": model.n_layers,
    }
    return lambda folder: write_gguf(folder / "control-vector.gguf", fields, named), 0.0, sorted(named)


def _behind(model: Model, edit: Edit) -> int:
    """The layer behind which the edit adds to the stream."""
    signal, layer = edit.port.signal, edit.port.layer
    at = model.modules[layer] if layer is not None else None
    last = signal in ("resid_out", "mlp.out") or (
        signal == "attn.out" and at is not None and (at.mid is None or at.mlp is None)
    )
    found = layer if last else layer - 1 if signal == "resid_in" and layer is not None else None
    if found is None:
        raise PatchbayError(
            f"{edit}: a control vector is added to the stream behind a layer (resid_out, mlp.out, the next layer's resid_in); "
            "form='vector' holds other ports"
        )
    if found < 1:
        raise PatchbayError(
            f"{edit}: control vectors begin behind layer 1 (direction.1), the format has none for layer 0; form='vector' has"
        )
    return found


def write_gguf(path: Path, fields: Mapping[str, str | int], arrays: Mapping[str, Any]) -> None:
    """GGUF version 3, little-endian: texts and unsigned numbers as fields, one-dimensional float32 arrays."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return struct.pack("<Q", len(raw)) + raw

    def aligned(content: bytes) -> bytes:
        return content + bytes(-len(content) % 32)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(arrays), len(fields))
    for name, value in fields.items():
        typed = struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
        head += text(name) + typed
    data = b""
    for name, array in arrays.items():
        head += text(name) + struct.pack("<IQIQ", 1, array.size, 0, len(data))  # dimensions, length, float32, place
        data += aligned(array.astype("<f4").tobytes())
    path.write_bytes(aligned(head) + data)


# --- folders ------------------------------------------------------------------------------------------


def _check_place(target: Path, overwrite: bool) -> None:
    """Raise unless the place is free, or holds an export that may be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise PatchbayError(f"{target} is a file; an export is a folder")
    found = sorted(path.name for path in target.iterdir())
    if found and not overwrite:
        raise PatchbayError(
            f"{target} is already there and holds {', '.join(found[:5])}; overwrite=True replaces an export"
        )
    if found:
        try:
            ours = json.loads((target / RECORD).read_bytes()).get("format") == "patchbay-export"
        except (OSError, ValueError, AttributeError):
            ours = False
        if not ours:
            raise PatchbayError(f"{target} holds {', '.join(found[:5])}, which is no export: not replaced")


def _write_folder(target: Path, write: Writer, record: Mapping[str, Any]) -> tuple[str, ...]:
    """Write the export and its record, whole or not at all."""

    def both(fresh: Path) -> None:
        write(fresh)
        _write_json(fresh / RECORD, record)

    write_folder(target, both)
    return tuple(sorted(path.name for path in target.iterdir()))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
