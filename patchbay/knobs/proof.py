"""The proof of an export: other weights, and files that were read back, have the logits of the edited model.

Random tokens run through both. In float64 and float32 the largest difference of a logit may be a fixed share of the largest logit.
In half precision a share says nothing: how far rounding alone moves a logit depends on the model, so it is measured, against the
same weights and edits in float32.
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
from patchbay.model.linear import is_plain
from patchbay.model.model import Model
from patchbay.model.run import run

CLOSE = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
}  # of the largest logit; right folds of all families reach 1.4e-5 in float32


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


def _noise(model: Model, edits: Sequence[Edit], hf: Any) -> float:
    """What float32 does to a logit of the edited model and of `hf`, against the same in float64; 0 where that does not run."""
    try:
        wide = Model(copy.deepcopy(model.hf).double(), model._tokenizer, family=model.family, source=model.source)
        run_off = (_logits(model, edits) - _logits(wide, edits)).abs().max()
        file_off = (_of(hf, _probe(model)) - _of(copy.deepcopy(hf).double(), _probe(model))).abs().max()
    except (RuntimeError, PatchbayError):
        return 0.0
    return float(run_off + file_off)


def apart(model: Model, edits: Sequence[Edit], hf: Any, what: str) -> float:
    """Largest difference of a logit between the edited model and `hf`; refuses one that rounding does not explain.

    In float64 and float32 both run as they are, and a fixed share of the largest logit is allowed, in float32 also what
    rounding does to both, measured against float64 (recurrences round more than a share). Below, both run in float32,
    so that only the numbers stored differ, and what is allowed is what rounding does to a run of this model in its own dtype."""
    share = CLOSE.get(model.dtype)
    if share is not None:
        expected, found = _logits(model, edits), _of(hf, _probe(model))
        allowed = share * max(1.0, float(expected.abs().max()))
    else:
        wide = Model(_in_float32(model.hf), model._tokenizer, family=model.family, source=model.source)
        expected, found = _logits(wide, edits), _of(_in_float32(hf), _probe(model))
        allowed = float((_logits(model, edits) - expected).abs().max())
    difference = float((found - expected).abs().max())
    if model.dtype == torch.float32 and not difference <= allowed:
        allowed = max(allowed, _noise(model, edits, hf))
    if not difference <= allowed:
        why = f"{model.dtype} allows" if share is not None else f"this model's rounding noise in {model.dtype} is"
        raise PatchbayError(
            f"{', '.join(map(str, edits[:4]))}: {what} this {model.family.name} model's logits differ from the edited model's by "
            f"{difference:.1e} (largest logit {float(expected.abs().max()):.3g}, {why} {allowed:.1e}): not written"
        )
    return difference


def read_back(model: Model, edits: Sequence[Edit], load: Callable[[], Any]) -> float:
    """The proof of a file: read as its readers do, it has the edited model's logits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hf = load().eval()
    except Exception as error:  # others' code read it
        raise PatchbayError(f"what was written does not load again ({error!r}): not written") from error
    return apart(model, edits, hf, "read back from the files,")
