"""@method: what is true of every published method.

A method is a plain function `def name(model, task, *, options...) -> Result`. What it acts on (model, task, parts)
comes first and has no default, but for None where prompts or texts need not be given (a task, or two lists); options
are keyword-only, typed and recordable. The decorator reads parts written as text, times the call, puts back the random
states and the train and grad modes of the model, and fills `provenance` with method, paper, model, task, options, seed, versions, wall time and date. It seeds nothing and registers nothing.
What is recorded is enough to make the call again (`replay.py`), but for second models without a source and for tensors.
"""

from __future__ import annotations

import functools
import inspect
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from patchbay.jacks.defaults import on_own_device, refuse_other_dtype
from patchbay.model.precisions import precisions
from patchbay.results.described import whole
from patchbay.results.given import check, has_default, kinds_of, may_be_left_out
from patchbay.results.outside import check_name, origin
from patchbay.results.record import call_record, is_model, now
from patchbay.results.result import Result
from patchbay.signal.channel import parse_channel
from patchbay.signal.port import PatchbayError, as_part, as_port, suggest

P = ParamSpec("P")
R = TypeVar("R")

METRIC = "\n\n`metric=` in any prover: the name of a metric, or a function of the logits, in place of the task's own (`task.with_metric`).\n"
RANDOM = threading.RLock()  # around every look at a global random state, and every change of one


def method(
    *, paper: str, verb: str = "", unit: str | None = None, tensors: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function a method of the catalogue entry `paper`.

    `verb`: for a method outside the package, the verb under which it is called: with "find" and a function `stripes` it is
    `find.stripes`. `unit`: the unit that its Result must have, where it is always the same. `tensors`: options that may be
    tensors; they are recorded by shape and digest, and a replay of such a call must be given them.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name, made = _name(function, verb), origin(function)
        signature = _checked_signature(function, name)

        @functools.wraps(function)
        @on_own_device
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            refuse_other_dtype(name)
            given = _bind(signature, name, args, kwargs)
            record = call_record(given, name, tensors)
            with _unchanged([value for value in given.values() if is_model(value)], name):
                start = time.perf_counter()
                returned = function(**given)  # type: ignore[call-arg]
                seconds = time.perf_counter() - start
            whence = {} if made is None else {"origin": made}
            if (
                hasattr(returned, "edits_at") and given.get("model") is not None
            ):  # a knob, used on other loads of this model
                whence["precisions"] = precisions(given["model"])
            _fill(returned, {"method": name, "paper": paper, **whence, **record, "wall_time_s": seconds, "date": now()})
            if unit is not None and isinstance(returned, Result) and returned.unit != unit:
                raise PatchbayError(
                    f"{name} declares unit {unit!r} and returned {returned.unit!r}: a fault of the method"
                )
            return returned

        call.paper, call.method_name, call.unit, call.origin = paper, name, unit, made  # type: ignore[attr-defined]
        call.__doc__ = whole(_file_doc(function), function.__doc__ or "", list(signature.parameters))
        if _scored(list(signature.parameters), name):
            call.__doc__ += METRIC
        return call

    return decorate


# --- the call ---------------------------------------------------------------------------------------


def _name(function: Callable[..., Any], verb: str) -> str:
    """`find.induction_heads` for patchbay/find/induction_heads.py; elsewhere the verb, or the module, and the function."""
    if verb:
        check_name(verb, function.__name__, f"{function.__module__}.{function.__name__}")
        return f"{verb}.{function.__name__}"
    path = function.__module__.removeprefix("patchbay.").split(".")
    return ".".join(path if path[-1] == function.__name__ else [*path, function.__name__])


def _file_doc(function: Callable[..., Any]) -> str:
    """The docstring of the file of a method; "" where several functions share a file."""
    module = sys.modules.get(function.__module__)
    return (module.__doc__ or "") if module is not None and function.__module__.endswith(function.__name__) else ""


def _checked_signature(function: Callable[..., Any], name: str) -> inspect.Signature:
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise PatchbayError(f"{name}: parameter {parameter} cannot be recorded; name every option")
        if (
            parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            and has_default(parameter)
            and not may_be_left_out(parameter)
        ):
            raise PatchbayError(
                f"{name}: option {parameter.name!r} has a default and must be keyword-only: put it after *"
            )
    return signature


def _bind(signature: inspect.Signature, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name, defaults filled in, parts and ports read from text."""
    known = list(signature.parameters)
    kwargs = dict(kwargs)
    also = ["metric"] if _scored(known, name) else []
    metric = [kwargs.pop(option) for option in also if option in kwargs]
    for option in kwargs:
        if option not in known:
            options = [p.name for p in signature.parameters.values() if has_default(p)] + also
            raise PatchbayError(
                f"{name} has no option {option!r}; its options are {', '.join(options) or 'none'}"
                + suggest(option, [*known, *also])
            )
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise PatchbayError(f"{name}{signature}: {error}") from None
    bound.apply_defaults()
    if isinstance(size := bound.arguments.get("batch_size"), int) and size < 1:
        raise PatchbayError(f"batch_size={size}: at least one prompt is run at a time")
    optional = "model" in known and signature.parameters["model"].default is None and bound.arguments["model"] is None
    if "model" in bound.arguments and not optional and not is_model(bound.arguments["model"]):
        found = type(bound.arguments["model"]).__name__
        raise PatchbayError(
            f"{name} needs a Model from patchbay.load(...), got {found}; load() takes names, paths and models"
        )
    for key, value in bound.arguments.items():
        check(value, signature.parameters[key], name)
    if metric:
        bound.arguments["task"] = bound.arguments["task"].with_metric(*metric)
    return {key: _read(value, signature.parameters[key], name) for key, value in bound.arguments.items()}


def _scored(known: Sequence[str], name: str) -> bool:
    """Whether a method is a prover of a task, which takes `metric=` in place of the task's own."""
    return name.startswith("prove.") and "task" in known and "metric" not in known


def _read(value: Any, parameter: inspect.Parameter, name: str) -> Any:
    """Turn text and views into the Parts or Ports that the annotation asks for; leave everything else."""
    annotation = kinds_of(parameter)
    kinds = set(re.findall(r"\b(?:Part|Port|Channel|Result)\b", annotation))
    many = re.search(r"list|Sequence|tuple|Iterable", annotation) is not None
    if isinstance(value, Result) and "Part" in kinds and "Result" not in kinds:
        raise PatchbayError(f"{name}: {parameter.name} takes parts, got a Result; choose some, like result.top(3)")
    if value is None and kinds and "None" not in annotation:
        raise PatchbayError(f"{name}: {parameter.name} takes {' or '.join(sorted(kinds))}s, got None")
    if value is None or isinstance(value, Result) or not kinds & {"Part", "Port", "Channel"}:
        return value
    convert = parse_channel if "Channel" in kinds else as_part if "Part" in kinds else as_port
    if many and isinstance(value, str):
        value = [piece for piece in value.split(",") if piece.strip()]
    return [convert(item) for item in value] if isinstance(value, (list, tuple)) else convert(value)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global random state, which others' code draws weights from, started at `seed` for the block and then put back; one
    thread at a time."""
    with RANDOM, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass
class Overlapping:
    """Methods that run at once: how many, and the random states before the first of them."""

    n: int = 0
    states: list[Callable[[], None]] = field(default_factory=list)


OVERLAPPING = Overlapping()
INSIDE: ContextVar[bool] = ContextVar("inside a method", default=False)


def _random_states() -> list[Callable[[], None]]:
    """What puts the global random states back to what they are now."""
    states: list[Callable[[], None]] = [partial(random.setstate, random.getstate())]
    states += [partial(np.random.set_state, np.random.get_state()), partial(torch.set_rng_state, torch.get_rng_state())]
    if torch.cuda.is_initialized():
        states.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    return states


@contextmanager
def _random_unchanged() -> Iterator[None]:
    """Put random states back. Of methods that overlap in time each puts back what was before the first: what it found itself may be
    what another had drawn from."""
    inner = INSIDE.get()  # a method that another one calls gives it back its own
    with RANDOM:
        if inner:
            before = _random_states()
        else:
            OVERLAPPING.states = OVERLAPPING.states if OVERLAPPING.n else _random_states()
            OVERLAPPING.n += 1
            before = OVERLAPPING.states
    token = INSIDE.set(True)
    try:
        yield
    finally:
        INSIDE.reset(token)
        with RANDOM:
            OVERLAPPING.n -= not inner
            for put_back in before:
                put_back()


@contextmanager
def _unchanged(models: list[Any], name: str) -> Iterator[None]:
    """Put back random states and train and grad modes, also after an exception; moving a mode is the method's fault."""
    training = [(module, module.training) for model in models for module in model.hf.modules()]
    trained = [(parameter, parameter.requires_grad) for model in models for parameter in model.hf.parameters()]
    grad = torch.is_grad_enabled()
    moved = []
    try:
        with _random_unchanged():
            yield
    finally:
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
