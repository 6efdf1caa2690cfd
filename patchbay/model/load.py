"""Load: a hub name, a local folder, the name of a built-in model or a model object becomes a Model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patchbay.jacks.session import refuse_wrapped
from patchbay.model import recalled
from patchbay.model.families import FAMILIES, Family
from patchbay.model.model import Model
from patchbay.model.placing import text_config
from patchbay.model.plain import PlainModel
from patchbay.model.regime import refuse_unrunnable
from patchbay.model.source import built_in_names, from_pretrained, lent, refuse_other_libraries
from patchbay.signal.port import PatchbayError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    model: str | Path | PreTrainedModel,
    tokenizer: Any = None,
    *,
    family: Family | None = None,
    vocab: int | tuple[str, str] | None = None,
    dtype: Any = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a model by hub name, local folder or built-in name, or wrap a Hugging Face model object as it is.

    Weights are read from safetensors only; no code of the model's repository runs unless `trust_remote_code=True`. A model
    object keeps its dtype, device and mode. A plain torch module takes `family`, and `vocab`: the number of its tokens, or the paths
    of its token embedding and its head (docs/any-module.md). Raises PatchbayError when nothing is found or no family row fits. The self-check
    runs before any part is shown: here for model objects and for families known by their structure alone, at the first
    look at a part for saved models of a known family, since it reads every weight and `from_pretrained` only maps them.
    """
    if isinstance(model, Model):
        return model
    if vocab is not None and (not isinstance(model, nn.Module) or hasattr(model, "get_output_embeddings")):
        raise PatchbayError(
            "vocab= is for plain modules; a Hugging Face model says by itself which embedding and head it has"
        )
    if isinstance(model, nn.Module):
        if device is not None or dtype is not None or device_map is not None:
            raise PatchbayError("a model object is wrapped as it is: move or cast it before pb.load")
        if type(model).__name__ == "OptimizedModule":  # compiled: what it computes is what its own modules compute
            model = model._orig_mod
        refuse_wrapped(model)
        refuse_other_libraries(model)
        if vocab is not None:
            if family is None:
                raise PatchbayError(
                    "a plain module needs family=pb.Family(...), which says where its parts are: see docs/any-module.md"
                )
            return Model(PlainModel(model, family, vocab), tokenizer, family=family)  # type: ignore[arg-type]
        if getattr(model, "config", None) is None:
            raise PatchbayError(
                f"expected a Hugging Face causal language model, got {type(model).__name__}, a module without a config; a plain module is "
                "loaded by pb.load(module, family=pb.Family(...), vocab=...): see docs/any-module.md"
            )
        refuse_unrunnable(model)
        model = lent(model)
        return Model(model, tokenizer, family=family, source=str(getattr(model.config, "_name_or_path", "") or ""))
    if not isinstance(model, str | Path):
        raise PatchbayError(f"expected a name, a folder or a Hugging Face model, got {type(model).__name__}")
    source = str(model)
    before = recalled.stamps(source)
    hf = from_pretrained(
        source,
        dtype=torch.float32 if dtype is None and source in built_in_names() else dtype,
        device_map=device_map,
        attn_implementation=attn_implementation,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    hf.config.return_dict = hf.config.get_text_config().return_dict = True  # nobody else's: its outputs have names
    hf = lent(hf)
    named = any(
        text_config(hf).model_type in row.model_types for row in FAMILIES
    )  # else by structure: proved before it returns
    prove = family is not None or not named
    made = Model(hf.to(device) if device is not None else hf, tokenizer, family=family, source=source, prove=prove)
    made._loaded = recalled.loaded(made.hf, source, before)
    return made
