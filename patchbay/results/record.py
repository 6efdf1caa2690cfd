"""What is recorded of a call: the model with its fingerprint and what it carries, the task, options, seed, versions; data that JSON can hold."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchbay.edits.edit import pack
from patchbay.model.attached import attached
from patchbay.model.carried import carried
from patchbay.model.tokens import is_chat, template_digest
from patchbay.results.result import Result
from patchbay.results.saved import plain
from patchbay.signal.channel import Channel
from patchbay.signal.port import Part, PatchbayError, Port

INPUTS = ("task", "prompts", "items")  # arguments that are recorded as the task
CALL = ("method", "model", "task", "options")  # of a Result given as an option, what is needed to make it again
MAX_PARTS = 100  # of a Result given as an option, how many of its ranked parts are recorded
RECORDABLE = "None, bool, int, float, str, lists and dicts of these, Parts, Ports, Channels, Results and Tasks"


def is_model(value: Any) -> bool:
    return isinstance(getattr(value, "hf", None), torch.nn.Module) and hasattr(value, "source")


def call_record(given: Mapping[str, Any], name: str, tensors: Sequence[str]) -> dict[str, Any]:
    """What provenance says of the arguments: model, task, options, seed, versions."""
    model = given.get("model")
    inputs = next((given[key] for key in INPUTS if given.get(key) is not None), None)
    options = {
        key: _recorded(value, f"{name}: option {key!r}", key in tensors)
        for key, value in given.items()
        if key not in ("model", *INPUTS)
    }
    return {
        "model": None if model is None else model_record(model),
        "task": None if inputs is None else task_record(inputs, f"{name}: the task"),
        "options": options,
        "seed": options.get("seed"),
        **template_record(model, list(given.values())),
        "versions": versions(),
    }


def model_record(model: Any) -> dict[str, Any]:
    first = next(model.hf.parameters(), None)
    dtype = getattr(model.hf, "dtype", None) or getattr(first, "dtype", None)
    return {
        "source": model.source,
        "fingerprint": model.fingerprint,
        "family": model.family.name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "none" if first is None else first.device.type,
        **carried(model.hf, model.source),
        **attached(model),
        **edits_record(model),
    }


def edits_record(model: Any) -> dict[str, Any]:
    """The edits of enclosing `edited` blocks, as they print and by a digest of their numbers; nothing where there are none."""
    edits = model.active_edits() if hasattr(model, "active_edits") else []
    if not edits:
        return {}
    rows, tensors = pack(edits)
    digest = hashlib.sha256(json.dumps(rows).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"edits": [str(edit) for edit in edits], "edits_sha256": digest.hexdigest()[:16]}


def template_record(model: Any, given: Any) -> dict[str, str]:
    """The chat template, by its digest, that wrote the prompts of a call where chats were among what it was given."""
    tokenizer = getattr(model, "tokenizer", None)
    if not _holds_chat(given) or not getattr(tokenizer, "chat_template", None):
        return {}
    return {"chat_template_sha256": template_digest(tokenizer)}


def _holds_chat(value: Any) -> bool:
    if is_chat(value):
        return "role" in value[0]
    return isinstance(value, list | tuple) and any(map(_holds_chat, value))


def task_record(inputs: Any, what: str) -> dict[str, Any]:
    """What a call was given to act on: a Task as data, or prompts as they were."""
    if hasattr(inputs, "to_json"):
        return dict(inputs.to_json())
    if isinstance(inputs, Tensor):
        return {"prompts": inputs.tolist()}
    return {"prompts": _recorded(inputs, what, False)}


def ranked_parts(result: Result) -> list[str]:
    """The best parts of a Result, as they are recorded."""
    return [str(part) for part in result.top(MAX_PARTS)] if result.ranked else []


def _recorded(value: Any, what: str, tensor_allowed: bool) -> Any:
    """JSON for an option, or a PatchbayError that names it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (Part, Port, Channel, Path)):
        return str(value)
    if isinstance(getattr(value, "part", None), Part):
        return str(value.part)
    if isinstance(value, Result):
        held = [key for key in (*CALL, "origin") if key in CALL or key in value.provenance]
        record = {key: plain(value.provenance.get(key)) for key in held} if "options" in value.provenance else {}
        return {"result": value.provenance.get("method"), "parts": ranked_parts(value)} | (
            {"record": record} if record else {}
        )
    if is_model(value):
        return {"model": model_record(value)}
    if isinstance(value, Mapping):
        return {str(key): _recorded(item, what, tensor_allowed) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_recorded(item, what, tensor_allowed) for item in value]
    if callable(getattr(value, "to_json", None)):
        return {"object": type(value).__name__, "json": value.to_json()}
    if isinstance(value, Tensor):
        if not tensor_allowed:
            raise PatchbayError(f"{what} is a tensor of shape {tuple(value.shape)}; recordable are {RECORDABLE}")
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return {"tensor": list(value.shape), "dtype": str(value.dtype), "sha256": hashlib.sha256(data).hexdigest()}
    scorer = (
        "; a function that scores texts is given as an object with __call__ and to_json()" if callable(value) else ""
    )
    raise PatchbayError(f"{what} is a {type(value).__name__}; recordable are {RECORDABLE}{scorer}")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = {"patchbay": "patchbay-lm", "torch": "torch", "transformers": "transformers", "numpy": "numpy"}
    return {name: _version(package) for name, package in packages.items()} | {"python": platform.python_version()}


@functools.cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def now() -> str:
    """The date and time, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
