"""The proof of an export: other weights, and files that were read back, have the logits of the edited model.

Random tokens run through both. What may differ is what rounding does to this model, and that is measured: every weight is
moved by one step of its dtype, and the logits say how far that takes them. In half precision the stored weights are held too,
number by number, since what rounding does to logits there would hide an error of a per cent.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from patchbay.edits.edit import Edit
from patchbay.errors import PatchbayError
from patchbay.knobs.fold import fold
from patchbay.model.linear import is_plain
from patchbay.model.model import Model
from patchbay.model.run import run

FULL = (torch.float64, torch.float32)
TIMES = 4.0  # of the noise; right folds of all families and signals lie within 0.8 of it in float32
DRAWS = 2  # of the noise, the larger of which counts
ROUNDED = 0.75  # of a step: rounding once is off by at most half


def _adapted(hf: nn.Module) -> list[str]:
    """Modules whose weight is not a parameter of their own alone: adapters on them, or a parametrisation that computes it."""
    own = [name for name, module in hf.named_modules() if _is_adapter(module) or parametrize.is_parametrized(module)]
    return [name for name in own if not any(name.startswith(f"{other}.") for other in own)]


def _is_adapter(module: nn.Module) -> bool:
    """PEFT's layers hold the module that they wrap as `base_layer`."""
    return hasattr(module, "base_layer") and isinstance(module.base_layer, nn.Module)


@torch.no_grad()
def _compute(module: nn.Module) -> None:
    """Put what parametrisations compute in their place. torch's own removal changes the class, which the lent model shares."""
    found = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr, operator]
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]
    for name, value in found.items():
        module.register_parameter(name, nn.Parameter(value))


def _written_out(hf: nn.Module) -> bool:
    """Whether a model that was read from a quantised file holds plain numbers."""
    maps = [module for module in hf.modules() if hasattr(module, "in_features")]
    return all(type(p) is nn.Parameter and p.is_floating_point() for p in hf.parameters()) and all(map(is_plain, maps))


def plain_copy(model: Model) -> nn.Module:
    """A copy of the model with parametrised weights computed for good; adapters are refused, and packed weights."""
    method = getattr(getattr(model.hf.config, "quantization_config", None), "quant_method", None)
    if method is not None and not _written_out(model.hf):
        raise PatchbayError(
            f"the model's weights are quantised ({getattr(method, 'value', method)}), and an export would have to round them anew: "
            "load it unquantised, make the knob there and export that; form='vector' or 'gguf' needs no weights"
        )
    away = next((name for name, weight in model.hf.named_parameters() if weight.device.type == "meta"), None)
    if away is not None:
        raise PatchbayError(
            f"weights such as {away} are kept on another device or on disk (device_map), and a copy of the model could not hold "
            "them: load it without offload for form='checkpoint' or 'lora'; form='vector' or 'gguf' needs no weights"
        )
    hf = copy.deepcopy(model.hf)
    for name in _adapted(hf):
        module = hf.get_submodule(name)
        if _is_adapter(module):
            raise PatchbayError(
                f"the model has an adapter on {name}: an export of its weights alone would leave it out. Merge it "
                "(hf = peft_model.merge_and_unload()), pb.load(hf), and make the knob on that"
            )
        _compute(module)
    if method is not None:  # of a GGUF file, whose numbers are plain here: what is saved is no longer quantised
        del hf.config.quantization_config
        hf.hf_quantizer, hf.is_quantized = None, False
    if getattr(hf, "_hf_peft_config_loaded", False):  # loaded, and on no module of the model that is left
        raise PatchbayError(
            "the model carries an adapter's settings: delete_adapter() them, or merge the adapter, before export"
        )
    return hf


def _probe(model: Model) -> Tensor:
    """Random tokens, as many as a few sentences."""
    longest = min(24, model.max_positions or 24)
    return torch.randint(model.vocab_size, (4, longest), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: Model, edits: Sequence[Edit] = ()) -> Tensor:
    return run(model, _probe(model), edits=list(edits)).logits.double().cpu()


@torch.no_grad()
def _of(hf: Any, ids: Tensor) -> Tensor:
    device = hf.get_input_embeddings().weight.device
    return hf(input_ids=ids.to(device), use_cache=False).logits.double().cpu()


def _in_float32(hf: nn.Module) -> Any:
    return copy.deepcopy(hf).float()


def _like(model: Model, hf: nn.Module) -> Model:
    return Model(hf, model._tokenizer, family=model.family, source=model.source)  # type: ignore[arg-type]


@torch.no_grad()
def _jittered(hf: nn.Module, seed: int) -> nn.Module:
    """A copy whose every weight is moved by one step of its dtype, up or down by chance; in float64 by one of float32, in which
    families compute their norms whatever their weights are."""
    moved, generator = copy.deepcopy(hf), torch.Generator().manual_seed(seed)
    for weight in moved.parameters():  # tied ones once
        if weight.is_floating_point():
            up = torch.randint(2, weight.shape, generator=generator, dtype=torch.int8).to(weight) * 2 - 1
            weight.mul_(1 + max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps) * up)
    return moved


def _noise(model: Model, edits: Sequence[Edit], expected: Tensor) -> float:
    """What rounding may do to a logit of the edited model: how far it moves when every weight moves by one step of its dtype."""
    runs = (_logits(_like(model, _jittered(model.hf, seed)), edits) for seed in range(DRAWS))
    return max(float((run - expected).abs().max()) for run in runs)


def apart(model: Model, edits: Sequence[Edit], hf: Any, what: str) -> float:
    """Largest difference of a logit between the edited model and `hf`; refuses one that rounding does not explain.

    In float64 and float32 both run as they are, and the difference may be `TIMES` the noise of a step of every weight. Below,
    both run in float32, so that only the numbers stored differ. Logits are blunt there (one row of a matrix that is 1 % off
    is lost in their noise), so that the weights are held themselves: the edits folded into the float32 copy must give the
    edited model within its float32 noise, and what is stored must be those weights, rounded once to its dtype. An adapter beside
    its base is stored in float32 and held to float32's noise."""
    listed = f"{', '.join(map(str, edits[:4]))}: {what}"
    if model.dtype in FULL:
        expected = _logits(model, edits)
        return _held(model, listed, _of(hf, _probe(model)), expected, TIMES * _noise(model, edits, expected))
    wide = _like(model, _in_float32(model.hf))
    expected, found = _logits(wide, edits), _of(_in_float32(hf), _probe(model))
    tight = TIMES * _noise(wide, edits, expected)
    if set(hf.state_dict()) != set(model.hf.state_dict()) and _adapted(hf):
        return _held(model, listed, found, expected, tight)
    difference = _held(model, listed, found, expected, float((_logits(model, edits) - expected).abs().max()))
    fold(wide, edits)
    _held(model, f"{listed} in float32", _of(wide.hf, _probe(model)), expected, tight)
    _refuse_not_rounded(listed, wide.hf, hf)
    return difference


def _held(model: Model, listed: str, found: Tensor, expected: Tensor, allowed: float) -> float:
    difference = float((found - expected).abs().max())
    if not difference <= allowed:
        raise PatchbayError(
            f"{listed} this {model.family.name} model's logits differ from the edited model's by {difference:.1e} (largest "
            f"logit {float(expected.abs().max()):.3g}, this model's rounding noise in {model.dtype} allows {allowed:.1e}): not written"
        )
    return difference


@torch.no_grad()
def _refuse_not_rounded(listed: str, exact: nn.Module, hf: nn.Module) -> None:
    """Raise PatchbayError where a stored weight is not the exact one rounded to its dtype; several edits of an expert, a norm
    or an embedding are rounded one by one, and what an adapter's rank leaves out is small beside the whole weight."""
    right = exact.state_dict()
    for name, stored in hf.state_dict().items():
        if not stored.is_floating_point() or name not in right:
            continue
        whole = right[name].double().cpu()
        spacing = torch.finfo(stored.dtype).eps * torch.exp2(whole.frexp().exponent.double() - 1)
        spacing = spacing.clamp(min=torch.finfo(stored.dtype).smallest_normal * torch.finfo(stored.dtype).eps)
        over = (stored.double().cpu() - whole).abs() - ROUNDED * spacing - 1e-6 * whole.abs().max()
        if not bool((over <= 0).all()):
            raise PatchbayError(
                f"{listed} {name} is not what the edits make of it, rounded to {stored.dtype}: {int((~(over <= 0)).sum())} of its "
                f"{over.numel()} numbers are off by more than {ROUNDED} of a step: not written"
            )


def read_back(model: Model, edits: Sequence[Edit], load: Callable[[], Any]) -> float:
    """The proof of a file: read as its readers do, it has the edited model's logits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hf = load().eval()
    except Exception as error:  # others' code read it
        raise PatchbayError(f"what was written does not load again ({error!r}): not written") from error
    return apart(model, edits, hf, "read back from the files,")
