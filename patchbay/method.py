"""@method: what is true of every published method. `replay` runs a recorded one again, `diff` subtracts two Results.

A method is a plain function `def name(model, task, *, options...) -> Result`. What it acts on (model, task, parts)
comes first and has no default; options are keyword-only, typed and recordable. The decorator reads parts written as
text, times the call, puts back the random states and the train and grad modes of the model, and fills `provenance` with
method, paper, model, task, options, seed, versions, wall time and date. It seeds nothing and registers nothing.

A replay that agrees says that the numbers follow from what is recorded, on this machine; not that the method is right.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import platform
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from patchbay.channel import Channel, parse_channel
from patchbay.port import Part, PatchbayError, Port, as_part, parse_port, suggest
from patchbay.result import Result, largest_difference, packed, short

P = ParamSpec("P")
R = TypeVar("R")

ROOMS = ("find", "prove", "turn", "decode", "measure", "train")
INPUTS = ("task", "prompts")  # arguments that are recorded as the task
MAX_PARTS = 100  # of a Result given as an option, how many of its ranked parts are recorded
RECORDABLE = "None, bool, int, float, str, lists and dicts of these, Parts, Ports, Channels, Results and Tasks"


def method(
    *, paper: str, unit: str | None = None, tensors: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function a method of the catalogue entry `paper`.

    `unit`: the unit that its Result must have, where it is always the same. `tensors`: options that may be tensors;
    they are recorded by shape and digest, and such a call cannot be replayed.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = _name(function)
        signature = _checked_signature(function, name)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = _bind(signature, name, args, kwargs)
            record = _record(given, name, tensors)
            with _unchanged([value for value in given.values() if _is_model(value)], name):
                start = time.perf_counter()
                returned = function(**given)  # type: ignore[call-arg]
                seconds = time.perf_counter() - start
            _fill(returned, {"method": name, "paper": paper, **record, "wall_time_s": seconds, "date": _now()})
            if unit is not None and isinstance(returned, Result) and returned.unit != unit:
                raise PatchbayError(
                    f"{name} declares unit {unit!r} and returned {returned.unit!r}: a fault of the method"
                )
            return returned

        call.paper, call.method_name, call.unit = paper, name, unit  # type: ignore[attr-defined]
        return call

    return decorate


# --- the call ---------------------------------------------------------------------------------------


def _name(function: Callable[..., Any]) -> str:
    """`find.induction_heads` for patchbay/find/induction_heads.py; elsewhere the module and the function."""
    path = function.__module__.removeprefix("patchbay.").split(".")
    return ".".join(path if path[-1] == function.__name__ else [*path, function.__name__])


def _checked_signature(function: Callable[..., Any], name: str) -> inspect.Signature:
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise PatchbayError(f"{name}: parameter {parameter} cannot be recorded; name every option")
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is not parameter.empty:
            raise PatchbayError(
                f"{name}: option {parameter.name!r} has a default and must be keyword-only: put it after *"
            )
    return signature


def _bind(signature: inspect.Signature, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name, defaults filled in, parts and ports read from text."""
    known = list(signature.parameters)
    for option in kwargs:
        if option not in known:
            options = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
            raise PatchbayError(
                f"{name} has no option {option!r}; its options are {', '.join(options) or 'none'}"
                + suggest(option, known)
            )
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise PatchbayError(f"{name}{signature}: {error}") from error
    bound.apply_defaults()
    optional = "model" in known and signature.parameters["model"].default is None and bound.arguments["model"] is None
    if "model" in bound.arguments and not optional and not _is_model(bound.arguments["model"]):
        found = type(bound.arguments["model"]).__name__
        raise PatchbayError(
            f"{name} needs a Model from patchbay.load(...), got {found}; load() takes names, paths and models"
        )
    return {key: _read(value, signature.parameters[key], name) for key, value in bound.arguments.items()}


def _read(value: Any, parameter: inspect.Parameter, name: str) -> Any:
    """Turn text and views into the Parts or Ports that the annotation asks for; leave everything else."""
    annotation = str(parameter.annotation)
    kinds = set(re.findall(r"\b(?:Part|Port|Channel|Result)\b", annotation))
    many = re.search(r"list|Sequence|tuple|Iterable", annotation) is not None
    if isinstance(value, Result) and "Part" in kinds and "Result" not in kinds:
        raise PatchbayError(f"{name}: {parameter.name} takes parts, got a Result; choose some, like result.top(3)")
    if value is None or isinstance(value, Result) or not kinds & {"Part", "Port", "Channel"}:
        return value
    convert = parse_channel if "Channel" in kinds else as_part if "Part" in kinds else _as_port
    if many and isinstance(value, str):
        value = [piece for piece in value.split(",") if piece.strip()]
    return [convert(item) for item in value] if isinstance(value, (list, tuple)) else convert(value)


def _as_port(value: Any) -> Port:
    return parse_port(value) if isinstance(value, str) else value


@contextmanager
def _unchanged(models: list[Any], name: str) -> Iterator[None]:
    """Put back random states and train and grad modes, also after an exception; moving a mode is the method's fault."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    training = [(module, module.training) for model in models for module in model.hf.modules()]
    trained = [(parameter, parameter.requires_grad) for model in models for parameter in model.hf.parameters()]
    grad = torch.is_grad_enabled()
    moved = []
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        for module, flag in training:
            if module.training != flag:
                module.training = flag
                moved.append("train mode")
        for parameter, flag in trained:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
                moved.append("requires_grad")
        if torch.is_grad_enabled() != grad:
            torch.set_grad_enabled(grad)
            moved.append("grad mode")
    if moved:
        raise PatchbayError(
            f"{name} changed the model's {' and '.join(sorted(set(moved)))} (put back): a fault of the method"
        )


def _fill(returned: Any, provenance: dict[str, Any]) -> None:
    if not hasattr(returned, "provenance"):
        what = type(returned).__name__
        raise PatchbayError(
            f"{provenance['method']} returned {what}, which has no provenance; a method returns a Result"
        )
    if isinstance(returned.provenance, dict):
        returned.provenance.update(provenance)
    else:
        returned.provenance = provenance


# --- the record -------------------------------------------------------------------------------------


def _is_model(value: Any) -> bool:
    return isinstance(getattr(value, "hf", None), torch.nn.Module) and hasattr(value, "source")


def _record(given: Mapping[str, Any], name: str, tensors: Sequence[str]) -> dict[str, Any]:
    """What provenance says of the arguments: model, task, options, seed, versions."""
    model = given.get("model")
    inputs = next((given[key] for key in INPUTS if given.get(key) is not None), None)
    options = {
        key: _recorded(value, f"{name}: option {key!r}", key in tensors)
        for key, value in given.items()
        if key not in ("model", *INPUTS)
    }
    return {
        "model": None if model is None else _model_record(model),
        "task": None if inputs is None else _task_record(inputs, f"{name}: the task"),
        "options": options,
        "seed": options.get("seed"),
        "versions": versions(),
    }


def _model_record(model: Any) -> dict[str, Any]:
    first = next(model.hf.parameters(), None)
    dtype = getattr(model.hf, "dtype", None) or getattr(first, "dtype", None)
    return {
        "source": model.source,
        "fingerprint": model.fingerprint,
        "family": model.family.name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "none" if first is None else first.device.type,
    }


def _task_record(inputs: Any, what: str) -> dict[str, Any]:
    if hasattr(inputs, "to_json"):
        return dict(inputs.to_json())
    if isinstance(inputs, Tensor):
        return {"prompts": inputs.tolist()}
    return {"prompts": _recorded(inputs, what, False)}


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
        parts = [str(part) for part in value.top(MAX_PARTS)] if value.ranked else []
        return {"result": value.provenance.get("method"), "parts": parts}
    if _is_model(value):
        return {"model": _model_record(value)}
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
    raise PatchbayError(f"{what} is a {type(value).__name__}; recordable are {RECORDABLE}")


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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- replay -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """What came of running a recorded method again. True when it agrees."""

    agrees: bool
    largest: float
    same_model: bool
    notes: tuple[str, ...]
    result: Result
    original: Result

    def __bool__(self) -> bool:
        return self.agrees

    def __str__(self) -> str:
        verdict = "agrees" if self.agrees else "does NOT agree"
        lines = [f"{self.original.provenance['method']}: the replay {verdict}; largest difference {self.largest:.3g}"]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    __repr__ = __str__


def find_method(name: str) -> Callable[..., Any]:
    """The method of a recorded name such as `find.induction_heads`: a function of this package made with @method."""
    room, _, short = name.partition(".")
    if room not in ROOMS or not re.fullmatch(r"[a-z][a-z0-9_]*", short):
        raise PatchbayError(f"{name!r} names no method; a name is one of {', '.join(ROOMS)}, a dot and a file there")
    try:
        module = importlib.import_module(f"patchbay.{room}.{short}")
    except ModuleNotFoundError as error:
        raise PatchbayError(f"this Patchbay has no method {name!r}: {error}") from error
    function = getattr(module, short, None)
    if getattr(function, "method_name", None) != name or not callable(function):
        raise PatchbayError(f"patchbay.{name} is not a method")
    return cast("Callable[..., Any]", function)


def replay(result: Result, model: Any = None, *, rtol: float = 1e-5) -> Replay:
    """Run the method recorded in `result` again, on the recorded task with the recorded options, and compare.

    `model`: a Model, or what `load` takes; by default the recorded source. Values agree when they differ by at most
    `rtol` times the largest of their variable.
    """
    record = result.provenance
    if "method" not in record or "options" not in record:
        raise PatchbayError(
            "this Result does not say which method made it: only what a method returned can be replayed"
        )
    function = find_method(str(record["method"]))
    arguments, notes = _replayed_options(function, record)
    if record.get("model"):
        arguments["model"] = _replayed_model(record["model"], model)
        notes += _changes("model", record["model"], _model_record(arguments["model"]))
    if record.get("task"):
        arguments[next(key for key in inspect.signature(function).parameters if key in INPUTS)] = _replayed_task(
            record["task"]
        )
    notes += _changes("version of", record.get("versions") or {}, versions())
    again = function(**arguments)
    if not isinstance(again, Result):
        raise PatchbayError(f"{record['method']} returned {type(again).__name__}; only Results are compared")
    found = result.differences(again, rtol=rtol)
    shared = [v for v in result.variables if v in again and again[v].shape == result[v].shape]
    largest = max((largest_difference(result[v], again[v]) for v in shared), default=float("inf"))
    same = (record.get("model") or {}).get("fingerprint") == (again.provenance.get("model") or {}).get("fingerprint")
    return Replay(not found, largest, same, (*notes, *found), again, result)


def _replayed_options(function: Callable[..., Any], record: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The recorded options as arguments, and notes on those that are not quite what they were."""
    arguments, notes = dict(record["options"]), []
    for key, value in arguments.items():
        if isinstance(value, dict) and set(value) == {"result", "parts"}:
            parameter = inspect.signature(function).parameters.get(key)
            if parameter is None or "Part" not in str(parameter.annotation):
                raise PatchbayError(
                    f"cannot replay: option {key!r} was a Result of {value['result']}; run that again first"
                )
            arguments[key] = value["parts"]
            notes.append(
                f"option {key!r} was a Result of {value['result']}; replayed with its {len(value['parts'])} top parts"
            )
        elif isinstance(value, dict) and value.get("object") == "Knob" and "tensors" in value["json"]:
            from patchbay.knob import Knob

            arguments[key] = Knob.from_json(value["json"])
        elif kinds := _lost(value):
            raise PatchbayError(f"cannot replay: option {key!r} held a {kinds} of which only a digest is recorded")
    return arguments, notes


def _lost(value: Any) -> str:
    """What kind of object stood in a recorded option that cannot be rebuilt; empty when all of it can."""
    if isinstance(value, dict):
        kind = next((kind for kind in ("tensor", "model", "object", "result") if kind in value), "")
        return kind or next((lost for item in value.values() if (lost := _lost(item))), "")
    return next((lost for item in value if (lost := _lost(item))), "") if isinstance(value, list) else ""


def _replayed_model(record: Mapping[str, Any], model: Any) -> Any:
    if _is_model(model):
        return model
    if model is None and not record.get("source"):
        raise PatchbayError(
            "the model's source is not recorded (it was lent as an object): pass it, replay(result, model)"
        )
    from patchbay.model import load

    return load(record["source"] if model is None else model)


def _replayed_task(record: Mapping[str, Any]) -> Any:
    if set(record) == {"prompts"}:
        return record["prompts"]
    from patchbay.task import Task

    return Task.from_json(record)


def _changes(what: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [f"{what} {key} was {then[key]}, is {now.get(key)}" for key in then if then[key] != now.get(key)]


# --- difference -----------------------------------------------------------------------------------


def diff(a: Any, b: Any) -> Result:
    """a minus b, value by value, for two Results on the same axes; notes say what else differs between them.

    Intervals and p values of either say nothing of the difference and are left out. For two Models of one shape: which channels
    between parts are stronger or weaker in the second than in the first (`find.channel_changes`), against its rotation null.
    """
    if _is_model(a) and _is_model(b):
        changes: Result = find_method("find.channel_changes")(a, b)
        return changes
    if not isinstance(a, Result) or not isinstance(b, Result):
        kinds = " and ".join(type(one).__name__ for one in (a, b))
        raise PatchbayError(f"diff takes two Results, or two Models from patchbay.load(...), got {kinds}")
    for what in ("axes", "sizes", "coords", "parts", "unit"):
        ours, theirs = getattr(a, what), getattr(b, what)
        if what == "sizes":
            ours, theirs = a.values.shape, b.values.shape
        if packed(ours) != packed(theirs):
            raise PatchbayError(f"cannot subtract: {what} differ: {short(ours)} against {short(theirs)}")
    first, second = a.values.double(), b.values.double()
    notes = [] if a.name == b.name else [f"variables differ: {a.name} against {b.name}"]
    for key in ("method", "model", "task", "options"):
        ours, theirs = a.provenance.get(key), b.provenance.get(key)
        if key == "model":
            key, ours, theirs = "model fingerprints", (ours or {}).get("fingerprint"), (theirs or {}).get("fingerprint")
        if packed(ours) != packed(theirs):
            notes.append(f"{key} differ: {short(ours)} against {short(theirs)}")
    values = {"difference": first - second, "first": first, "second": second}
    return Result(
        {name: (tensor, a.axes, a.unit) for name, tensor in values.items()},
        coords={axis: labels for axis, labels in a.coords.items() if axis in a.axes and axis != "part"},
        parts=a.parts if "part" in a.axes else None,
        notes=notes,
        provenance={"method": "diff", "first": a.provenance, "second": b.provenance},
    )
