"""Where a model comes from: a hub name, a local folder, a GGUF file, or the name of a built-in model. Weights are safetensors, or
GGUF, which transformers writes out as plain numbers; never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from patchbay.late import late
from patchbay.model.placing import text_config
from patchbay.signal.port import PatchbayError, suggest

CROSS = (
    "encoder_attn",
    "crossattention",
    "cross_attn",
    "EncDecAttention",
    "cross_attention",
)  # attention to another stack
BUILT_IN = Path(__file__).parents[1] / "tiny" / "weights"


def built_in_names() -> list[str]:
    """Names of the trained models that ship with the package."""
    return (
        sorted(path.name for path in BUILT_IN.iterdir() if (path / "config.json").is_file())
        if BUILT_IN.is_dir()
        else []
    )


def folder(source: str) -> str:
    """The folder of a built-in model; any other source as it is, its `~` written out."""
    return str(BUILT_IN / source) if source in built_in_names() else os.path.expanduser(source)


def from_pretrained(source: str, **options: Any) -> Any:
    """The Hugging Face model of a source, in evaluation mode; options that are None are left out."""
    from transformers import AutoModelForCausalLM

    given = {name: value for name, value in options.items() if value is not None}
    path = Path(folder(source))
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        return _adapted(source, path, options)
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(p.name for p in path.iterdir())
        whole = next((f"; load the file itself: {path / name}" for name in files if name.endswith(".gguf")), "")
        raise PatchbayError(f"{source}: this folder has no config.json; found {files[:8]}{whole}")
    if not path.exists() and (path.is_absolute() or source.startswith((".", "~"))):  # no hub name looks like that
        raise _not_loaded(source, "there is no such folder")
    _let_know(path, given.get("attn_implementation"))
    try:
        with (
            quietly() if path.is_dir() or path.is_file() else nullcontext()
        ):  # what is fetched from a hub shows how far it is
            if gguf := gguf_file(path):
                return AutoModelForCausalLM.from_pretrained(str(path.parent), **gguf, **given).eval()
            return AutoModelForCausalLM.from_pretrained(str(path), use_safetensors=True, **given).eval()
    except Exception as error:  # a name that is not there, no network, a damaged file: transformers raises many kinds
        said = str(error).strip().splitlines()
        raise _not_loaded(source, f"{type(error).__name__}: {said[0][:300] if said else ''}") from error


def _let_know(path: Path, attention: str | None) -> None:
    """Models with blocks, and attention kinds, are made known to transformers by name before they are asked for."""
    config: Any = {}
    with suppress(OSError, ValueError, RecursionError):
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if attention is not None or "blocks" in (config if isinstance(config, dict) else {}):
        late("blocks")(config if isinstance(config, dict) else {}, attention)


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' bar over weights that lie on this disk; asked for by HF_HUB_DISABLE_PROGRESS_BARS=0 it stays."""
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled() or HF_HUB_DISABLE_PROGRESS_BARS is False:
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def gguf_file(path: Path) -> dict[str, str]:
    """How transformers is told of a GGUF file; nothing for other sources."""
    return {"gguf_file": path.name} if path.suffix == ".gguf" and path.is_file() else {}


def lent(model: Any) -> Any:
    """The Hugging Face causal LM inside what was lent: of a PEFT model the one that holds its layers. Refuses what is none."""
    name = type(model).__name__
    refuse_other_libraries(model)
    if not (hasattr(model, "config") and hasattr(model, "get_output_embeddings")):
        raise _foreign(name)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        if any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values()):
            raise PatchbayError(
                f"{name} puts learned tokens before each prompt, which the model inside knows nothing of"
            )
        model = model.get_base_model()
    _refuse_encoders(model)
    return model


def refuse_other_libraries(model: Any) -> None:
    """Raise PatchbayError for a model of TransformerLens, which holds a checkpoint's weights in another form."""
    if any(kind.__module__.split(".")[0] == "transformer_lens" for kind in type(model).__mro__):
        raise _foreign(type(model).__name__)


def _foreign(name: str) -> PatchbayError:
    return PatchbayError(
        f"{name} is no Hugging Face model: load the checkpoint itself (a name, a folder, or AutoModelForCausalLM), since what is "
        "shown here is read off the model's own modules"
    )


def refuse_without_numbers(model: Any) -> None:
    """Raise PatchbayError where weights have shapes alone: on the meta device, and nobody brings them when they are used."""
    for name, module in model.named_modules():
        if any(weight.device.type == "meta" for weight in module.parameters(recurse=False)) and not hasattr(
            module, "_hf_hook"
        ):
            raise PatchbayError(
                f"weights of {name or type(model).__name__} are on the meta device: shapes without numbers. Load them "
                "(from_pretrained, or model.to_empty(device=...) and load_state_dict), outside torch.device('meta')"
            )


def _refuse_encoders(model: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise PatchbayError(
            f"{name} is an encoder-decoder: its tokens are written by a second stack that reads the first, and the parts here are those "
            "of one stack that reads its own prompt (a causal language model)"
        )
    crossed = next((part for part, _ in model.named_modules() if part.rpartition(".")[2] in CROSS), None)
    if crossed is not None and text_config(model) is config:  # not what turns images into tokens before a text model
        raise PatchbayError(
            f"{name} is made to read a second stack ({crossed} attends to what it gives): the parts here are those of one stack that "
            "reads its own prompt (a causal language model)"
        )
    masked = name in MASKED.values() and name not in CAUSAL.values()
    bidirectional = name in MASKED.values() or getattr(config, "model_type", "") in MASKED
    if masked or (bidirectional and getattr(config, "is_decoder", None) is False):
        raise PatchbayError(
            f"{name} is an encoder, which fills in masked tokens: the parts here are those of models that predict the next token "
            "(causal language models)"
        )
    if model.get_output_embeddings() is None and getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise PatchbayError(
            f"{name} reads {model.main_input_name}, not tokens: the parts here are those of models that read tokens and predict the "
            "next one (causal language models)"
        )
    if model.get_output_embeddings() is None:
        raise PatchbayError(
            f"{name} gives no logits: load the class with a language-model head (AutoModelForCausalLM), not its bare inside"
        )


def adapter_base(path: Path) -> str:
    """The model that an adapter folder was made for: a built-in, a folder (beside the adapter or from here), or a hub name."""
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        named = str(config.get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise _not_loaded(
            str(path), f"its adapter_config.json is no table of settings ({type(error).__name__})"
        ) from error
    if named in built_in_names():
        return named
    beside = path / os.path.expanduser(named)
    return str(beside.resolve()) if named and (beside / "config.json").is_file() else named


def _adapted(source: str, path: Path, options: dict[str, Any]) -> Any:
    """The base of an adapter folder with the adapter active."""
    base = adapter_base(path)
    if not base:
        raise _not_loaded(source, "its adapter_config.json names no base model")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise PatchbayError(
            f"{source} is an adapter of {base}: reading it takes the package peft (pip install peft)"
        ) from error
    hf = from_pretrained(base, **options)
    try:
        return lent(PeftModel.from_pretrained(hf, str(path)).eval())
    except PatchbayError:
        raise
    except Exception as error:  # whatever peft says of settings and weights that it cannot use
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise _not_loaded(source, f"its adapter does not fit {base}: {said}") from error


def tokenizer_of(source: str) -> dict[str, str]:
    """What AutoTokenizer.from_pretrained is told of a source."""
    return {"pretrained_model_name_or_path": tokenizer_folder(source), **gguf_file(Path(source))}


def tokenizer_folder(source: str) -> str:
    """Where the tokenizer of a source lies: beside an adapter, else beside its base."""
    path = Path(folder(source))
    alone = (path / "adapter_config.json").is_file() and not (path / "tokenizer_config.json").is_file()
    if gguf_file(path):
        return str(path.parent)
    return folder(adapter_base(path)) if alone else str(path) if path.is_dir() else folder(source)


def _not_loaded(source: str, why: str) -> PatchbayError:
    known = built_in_names()
    return PatchbayError(
        f"could not load {source!r}: {why.rstrip('.')}. A model is a local folder with config.json and safetensors, a GGUF file, a hub name, "
        f"or a built-in ({', '.join(known) or 'none'}){suggest(source, known)}"
    )
