"""Export: what a knob does, for programs that know nothing of knobs.

| form         | what is written                                            | which edits                                          |
|--------------|------------------------------------------------------------|------------------------------------------------------|
| `checkpoint` | a Hugging Face checkpoint with the edits in its weights    | all that `fold.py` folds; vectors that are added become biases, where the architecture has a switch for them (`flags.py`) |
| `lora`       | a PEFT LoRA adapter for the model as it is                 | those whose change of each weight has a low rank, and no bias |
| `gguf`       | a GGUF control vector, `direction.N` for layer N           | adding to the stream behind layers 1, 2, ...          |
| `vector`     | safetensors, one vector for each port                      | adding, at any port                                   |

Before a checkpoint or an adapter is written, and again when its files have been read back by those who will read them
(`from_pretrained`, PEFT), the changed weights run on random tokens beside the model under the edits, and their logits must
agree: within 2e-5 of the largest in float32; in half precision within the rounding noise of this model, measured against the
same in float32. Vectors are read back too. What cannot be written is refused with the edit and the reason, and nothing of it is
left. Edits at some positions or some prompts are no weights and no vectors. Parametrised weights are written as what they
compute; a model with adapters or quantised weights is refused for the weight forms.

The folder is written whole or not at all. Its `patchbay.json` says which knob, at which strength, from which weights, and how
far the logits were apart; its `README.md` has the lines that load it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.errors import by_kind
from patchbay.files import write_folder
from patchbay.jacks.defaults import on_own_device
from patchbay.knobs.affine import Fold
from patchbay.knobs.fold import as_written, fold
from patchbay.knobs.gguf import read_gguf, write_gguf
from patchbay.knobs.knob import Knob
from patchbay.knobs.proof import apart, plain_copy, read_back
from patchbay.model.linear import in_first
from patchbay.model.model import Model
from patchbay.results.record import versions
from patchbay.signal.port import PatchbayError, suggest

FORMS = ("checkpoint", "lora", "gguf", "vector")
RECORD = "patchbay.json"
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


@on_own_device
@by_kind
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
    edits = [as_written(model, edit) for edit in knob.edits_at()]
    if not edits:
        raise PatchbayError(f"knob {knob.name!r} at strength {knob.strength:g} is neutral: there is nothing to export")
    for edit in edits:
        model.require(edit.port)
    target = Path(os.path.realpath(folder))
    _check_place(target, overwrite)
    made = {"checkpoint": _checkpoint, "lora": _lora, "gguf": _gguf, "vector": _vector}[form](model, edits)
    record = {
        "format": "patchbay-export",
        "version": 1,
        "form": form,
        "knob": {"name": knob.name, "strength": knob.strength, "edits": [str(edit) for edit in edits]},
        "model": {"source": model.source, "fingerprint": model.fingerprint, "family": model.family.name},
        "changed": list(made.changed),
        "switched": list(made.switched),
        "versions": versions(),
    }
    files, error = _write_folder(target, made, record, model)
    return Exported(target, form, files, error, tuple(made.changed))


@dataclass(frozen=True)
class Made:
    """An export that is ready to be written. `write` writes it and reads it back: the largest difference of a logit."""

    write: Callable[[Path], float]
    changed: Sequence[str]
    lines: str  # Python that loads it; {source} is the model that it was made for
    switched: Sequence[str] = ()  # switches of the config that were turned, so that there are biases to add to


_READ_CHECKPOINT = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
"""
_READ_LORA = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({source!r}, dtype="auto")
model = PeftModel.from_pretrained(model, folder)
"""
_READ_GGUF = """\
import patchbay as pb

model = pb.load({source!r})
knob = pb.load_knob(f"{{folder}}/control-vector.gguf", model)
"""
_READ_VECTOR = """\
import patchbay as pb

model = pb.load({source!r})
knob = pb.load_knob(f"{{folder}}/steering.safetensors", model)
"""


# --- weights ------------------------------------------------------------------------------------------


def _folded(model: Model, edits: Sequence[Edit]) -> tuple[Model, Fold]:
    """A copy of the model with the edits in its weights."""
    other = Model(plain_copy(model), model._tokenizer, family=model.family, source=model.source)
    return other, fold(other, edits)


def _checkpoint(model: Model, edits: Sequence[Edit]) -> Made:
    other, made = _folded(model, edits)
    apart(model, edits, other.hf, "with the edits in its weights")

    def write(folder: Path) -> float:
        other.hf.save_pretrained(folder)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)
        how = {"dtype": model.dtype, "use_safetensors": True, "attn_implementation": _attention(model)}
        return read_back(model, edits, lambda: type(other.hf).from_pretrained(folder, **how))

    changed = sorted({*made.changes(), *made.biased, *made.others})
    return Made(write, changed, _READ_CHECKPOINT, sorted(made.switched))


def _attention(model: Model) -> str:
    return str(model.hf.config._attn_implementation)


def _lora(model: Model, edits: Sequence[Edit]) -> Made:
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
    _apply_factors(made, tensors)
    apart(model, edits, other.hf, "with the adapter in its weights")
    turned = any(in_first(module) for module, _ in made.before.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": turned,
        "target_modules": sorted(factors),
        "inference_mode": True,
    }

    def write(folder: Path) -> float:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_json(folder / "adapter_config.json", config)
        peft = _peft()
        return read_back(model, edits, lambda: peft.PeftModel.from_pretrained(plain_copy(model), folder))

    return Made(write, sorted(factors), _READ_LORA)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise PatchbayError(
            "a LoRA adapter is proved by reading it back with peft, which is not installed: pip install peft"
        ) from error
    return peft


@torch.no_grad()
def _apply_factors(made: Fold, tensors: Mapping[str, Tensor]) -> None:
    """What the adapter will do, in place of what was folded."""
    for module, before in made.before.values():
        name = f"base_model.model.{made.names[id(module)]}"
        if f"{name}.lora_A.weight" in tensors:
            a, b = (tensors[f"{name}.lora_{letter}.weight"].double() for letter in "AB")
            new = before + (b @ a).T  # [in, out]
            module.weight.copy_((new if in_first(module) else new.T).to(module.weight))  # type: ignore[operator, arg-type]


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
        if (
            edit.op != "add"
            or edit.positions is not None
            or edit.rows is not None
            or edit.spread
            or edit.where is not None
        ):
            raise PatchbayError(
                f"{edit}: {what} only adds, the same at every position of every prompt; form='checkpoint' folds other linear edits"
            )
        value = torch.as_tensor(edit.value).detach().float().cpu()
        found[str(edit.port)] = found[str(edit.port)] + value if str(edit.port) in found else value.clone()
    return found


def _vector(model: Model, edits: Sequence[Edit]) -> Made:
    vectors = _vectors(edits, "a steering vector")
    marks = {"format": "patchbay-steering", "version": "1", "model": model.fingerprint}

    def write(folder: Path) -> float:
        save_file(vectors, folder / "steering.safetensors", metadata=marks)
        _same(load_file(folder / "steering.safetensors"), vectors)
        return 0.0

    return Made(write, sorted(vectors), _READ_VECTOR)


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if sorted(found) != sorted(expected) or not all(torch.equal(found[name], expected[name]) for name in expected):
        raise PatchbayError("the vectors read back from the file are not those that were written: not written")


def _gguf(model: Model, edits: Sequence[Edit]) -> Made:
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

    def write(folder: Path) -> float:
        path = folder / "control-vector.gguf"
        write_gguf(path, fields, named)
        _, found = read_gguf(path)
        _same(found, {name: torch.from_numpy(array) for name, array in named.items()})
        return 0.0

    return Made(write, sorted(named), _READ_GGUF)


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


def _write_folder(target: Path, made: Made, record: dict[str, Any], model: Model) -> tuple[tuple[str, ...], float]:
    """Write the export, its record and the lines that load it, proved before it is moved into place: whole or not at all."""
    errors: list[float] = []

    def all_of_it(fresh: Path) -> None:
        errors.append(made.write(fresh))
        _write_json(fresh / RECORD, record | {"largest_difference_of_a_logit": errors[0]})
        (fresh / "README.md").write_text(_readme(record, made, model), encoding="utf-8")

    write_folder(target, all_of_it)
    return tuple(sorted(path.name for path in target.iterdir())), errors[0]


def _readme(record: Mapping[str, Any], made: Made, model: Model) -> str:
    knob = record["knob"]
    aside = (
        "\nllama.cpp: `llama-cli -m MODEL.gguf --control-vector control-vector.gguf`\n"
        if record["form"] == "gguf"
        else ""
    )
    return (
        f"# {knob['name']} at strength {knob['strength']:g}, a {record['form']}\n\nMade for "
        f"{model.source or 'a model without a name'} (weights {model.fingerprint}); `{RECORD}` says how, and how it was proved.\n\n"
        f'```python\nfolder = "."\n{made.lines.format(source=model.source or "THE MODEL")}```\n{aside}'
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
