"""Replay: the method that a Result records, run again and compared. And `diff`, which subtracts two Results.

A replay is made from the record alone: the model's source, the task or prompts, and the options with the tasks, knobs and
Results that stood in them (a Result by running its own method again). What a record cannot hold is refused with a word on how to
pass it: a model that was lent as an object, a tensor, a knob that is too large, a Result that no method made.

Where a method writes what it makes to a `folder`, and would take from it what lies there already, a replay leaves the folder out: everything is made anew, and nothing is written.

A replay that agrees says that the numbers follow from what is recorded, on this machine; not that the method is right.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from patchbay.errors import by_kind
from patchbay.late import late
from patchbay.maths import benjamini_hochberg
from patchbay.model.load import load
from patchbay.model.tokens import template_digest
from patchbay.results.given import kinds_of
from patchbay.results.outside import ROOMS, by_name, recorded
from patchbay.results.printed import short
from patchbay.results.record import INPUTS, is_model, model_record, ranked_parts, versions
from patchbay.results.result import Result, largest_difference
from patchbay.results.saved import packed
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

KEPT = ("train", "turn", "stories")  # rooms whose methods keep what they make in `folder`


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
    if room not in (*ROOMS, "stories") or not re.fullmatch(r"[a-z][a-z0-9_]*", short):
        raise PatchbayError(f"{name!r} names no method; a name is one of {', '.join(ROOMS)}, a dot and a file there")
    try:
        module = importlib.import_module(f"patchbay.{room}.{short}")
    except ModuleNotFoundError as error:
        own = importlib.import_module(f"patchbay.{room}")
        known = ", ".join(getattr(own, "__all__", ())) or "none"
        raise PatchbayError(f"this Patchbay has no method {name!r}; {room} has {known}") from error
    function = getattr(module, short, None)
    if getattr(function, "method_name", None) != name or not callable(function):
        raise PatchbayError(f"patchbay.{name} is not a method")
    return cast("Callable[..., Any]", function)


@by_kind
def replay(
    result: Result,
    model: Any = None,
    *,
    options: Mapping[str, Any] | None = None,
    method: Any = None,
    rtol: float = 1e-5,
) -> Replay:
    """Run the method recorded in `result` again, on the recorded task with the recorded options, and compare.

    `model`: a Model, or what `load` takes; by default the recorded source. `options`: values of options that the record could not
    hold, such as a second model. `method`: the function or the file of a method that lives outside the package, or several; needed
    unless the method is imported already or an installed package offers it, since a record runs no code. Its file must be what
    it was. Values agree when they differ by at most `rtol` times the largest of their variable.
    """
    if not rtol >= 0:
        raise PatchbayError(f"rtol={rtol}: the allowed difference over the largest value, 0 or more")
    record = result.provenance
    if "." not in str(record.get("method")) or "options" not in record:
        raise PatchbayError(
            "this Result does not say which method made it: only what a method returned can be replayed"
        )
    outside = by_name(method)
    call = Call(record, model, options or {}, outside)
    if unused := sorted(set(outside) - call.used):
        raise PatchbayError(f"method={', '.join(unused)}: this Result was made by {', '.join(sorted(call.used))}")
    notes = [*call.notes, *_changes("version of", record.get("versions") or {}, versions())]
    again = call.made()
    notes += _changes("option", record["options"], again.provenance["options"]) if options else []
    found = result.differences(again, rtol=rtol)
    shared = [v for v in result.variables if v in again and again[v].shape == result[v].shape]
    largest = max((largest_difference(result[v], again[v]) for v in shared), default=float("inf"))
    same = (record.get("model") or {}).get("fingerprint") == (again.provenance.get("model") or {}).get("fingerprint")
    return Replay(not found, largest, same, (*notes, *found), again, result)


def _same_edits(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a replay under other edits than those that were in force."""
    if recorded.get("edits_sha256") != now.get("edits_sha256"):
        ours, theirs = (", ".join(one.get("edits", ())) or "none" for one in (recorded, now))
        raise PatchbayError(
            f"the Result was made with these edits in force: {ours}; now in force: {theirs}. Replay it with its model, inside "
            "the same model.edited(...)"
        )


@dataclass
class Call:
    """A recorded call of a method: its arguments as they were, and notes on those that are not quite."""

    record: Mapping[str, Any]
    model: Any = None
    given: Mapping[str, Any] = field(default_factory=dict)
    outside: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        name, made = str(self.record["method"]), self.record.get("origin")
        self.function = recorded(name, made, self.outside) if made else find_method(name)
        self.used.add(name)
        if made and not made.get("sha256"):
            self.notes.append(f"{name} was defined in no file: that it is the same cannot be checked")
        self.parameters = inspect.signature(self.function).parameters
        unknown = [name for name in self.given if name not in self.record["options"]]
        if unknown:
            known = ", ".join(self.record["options"]) or "none"
            raise PatchbayError(f"options={unknown}: not recorded of {self.record['method']}, which has {known}")
        self.arguments: dict[str, Any] = {}
        if self.record.get("model"):
            self.model = _model(self.record["model"], self.model)
            self.arguments["model"] = self.model
            _same_edits(self.record["model"], model_record(self.model))
            self.notes += _changes("model", self.record["model"], model_record(self.model))
            if digest := self.record.get("chat_template_sha256"):
                again = {"template": template_digest(self.model.tokenizer)}
                self.notes += _changes("chat", {"template": digest}, again)
        for name, value in self.record["options"].items():
            if name == "folder" and value is not None and name not in self.given and _keeps(self.record):
                self.notes.append(f"option 'folder' was {short(value)} and was left out: what it keeps was made anew")
                value = None
            self.arguments[name] = self.given[name] if name in self.given else self._option(name, value)
        if self.record.get("task"):
            task = self.record["task"]
            name = next(key for key in self.parameters if key in INPUTS)
            own = set(task) == {"prompts"}
            self.arguments[name] = self._option(name, task["prompts"]) if own else Task.from_json(task)

    def made(self) -> Result:
        returned = self.function(**self.arguments)
        if not isinstance(returned, Result):
            raise PatchbayError(
                f"{self.record['method']} returned {type(returned).__name__}; only Results are compared"
            )
        return returned

    def _option(self, name: str, value: Any) -> Any:
        """An option as it was given, from what is recorded of it."""
        if isinstance(value, list):
            return [self._option(name, item) for item in value]
        if not isinstance(value, dict):
            return value
        held = set(value)
        if {"result", "parts"} <= held <= {"result", "parts", "record"}:
            return self._result(name, value)
        if held == {"object", "json"}:
            return self._object(name, value)
        if held == {"model"} and isinstance(value["model"], Mapping) and "fingerprint" in value["model"]:
            return self._second(name, value["model"])
        if held == {"tensor", "dtype", "sha256"}:
            raise self._lost(name, f"held a tensor {value['tensor']} of which only a digest is recorded")
        return {key: self._option(name, item) for key, item in value.items()}

    def _lost(self, name: str, why: str) -> PatchbayError:
        return PatchbayError(
            f"cannot replay: option {name!r} {why}; pass it, replay(result, model, options={{{name!r}: ...}})"
        )

    def _object(self, name: str, value: Mapping[str, Any]) -> Any:
        if value["object"] == "Task":
            return Task.from_json(value["json"])
        if value["object"] == "Knob" and "tensors" in value["json"]:
            return late("knob")(value["json"])
        raise self._lost(name, f"held a {value['object']} of which only a digest is recorded")

    def _second(self, name: str, record: Mapping[str, Any]) -> Any:
        """Another model, from its source."""
        if self.model is not None and record["fingerprint"] == self.model.fingerprint:
            return self.model
        if not record.get("source"):
            raise self._lost(name, "held a model that was lent as an object")
        loaded = load(record["source"])
        self.notes += _changes(f"option {name!r}: model", record, model_record(loaded))
        return loaded

    def _result(self, name: str, value: Mapping[str, Any]) -> Any:
        """A Result, made again by its own method; else its best parts, where parts will do."""
        why = "no method made it"
        if value.get("record"):
            record = value["record"]
            own = self.model is not None and (record.get("model") or {}).get("fingerprint") == self.model.fingerprint
            try:
                call = Call(record, self.model if own else None, outside=self.outside, used=self.used)
                made = call.made()
            except PatchbayError as error:
                why = str(error)
            else:
                self.notes += call.notes
                if ranked_parts(made) != value["parts"]:
                    self.notes.append(f"option {name!r}: {value['result']} was run again and ranks other parts")
                return made
        parameter = self.parameters.get(name)
        if parameter is None or "Part" not in kinds_of(parameter) or not value["parts"]:
            raise self._lost(name, f"was a Result of {value['result']}, which could not be made again ({why})")
        said = f"option {name!r} was a Result of {value['result']}; replayed with its {len(value['parts'])} top parts"
        self.notes.append(f"{said} ({why})")
        return value["parts"]


def _keeps(record: Mapping[str, Any]) -> bool:
    """Whether the option `folder` of a recorded call is where its method of this package keeps what it makes."""
    return str(record["method"]).partition(".")[0] in KEPT and not record.get("origin")


def _model(record: Mapping[str, Any], model: Any) -> Any:
    if is_model(model):
        return model
    if model is None and not record.get("source"):
        raise PatchbayError(
            "the model's source is not recorded (it was lent as an object): pass it, replay(result, model)"
        )
    return load(record["source"] if model is None else model)


def _changes(what: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{what} {key} was {short(then.get(key))}, is {short(now.get(key))}"
        for key in dict.fromkeys([*then, *now])
        if then.get(key) != now.get(key)
    ]


# --- difference -----------------------------------------------------------------------------------


def _against_chance(a: Result, b: Result, change: Tensor, notes: list[str]) -> dict[str, Any]:
    """z, p and adjusted p of each difference where both Results carry a standard error of their values; else nothing."""
    known = [one for one in (a, b) if "standard_error" in one and one.axes_of("standard_error") == one.axes]
    if len(known) < 2:
        return {}
    z = change / (a["standard_error"].double().square() + b["standard_error"].double().square()).sqrt()
    p = torch.special.erfc(z.abs() / math.sqrt(2.0))
    flat, seen = p.flatten(), ~p.flatten().isnan()
    adjusted = flat.clone()
    if seen.any():
        adjusted[seen] = benjamini_hochberg(flat[seen])
    clear, tested = int((adjusted <= 0.05).sum()), int(seen.sum())
    notes.append(
        f"{clear} of {tested} differ at adjusted p <= 0.05, from the standard errors of both taken as independent: on the same "
        "prompts they mostly rise and fall together, and p is then too large rather than too small"
    )
    return {
        "z": (z, a.axes, "standard errors"),
        "p": (p, a.axes, "probability"),
        "p_adjusted": (adjusted.view(p.shape), a.axes, "adjusted p"),
    }


def _where(ours: Any, theirs: Any) -> str:
    """What of two records differs: of those of a task or of options the fields by name, with their values where these are short."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return f": {short(ours)} against {short(theirs)}"
    told = []
    for name in dict.fromkeys([*ours, *theirs]):
        both = [packed(one.get(name)) for one in (ours, theirs)]
        if both[0] != both[1]:
            values = [repr(one.get(name)) for one in (ours, theirs)]
            told.append(f"{name} ({' against '.join(values)})" if max(map(len, values)) <= 24 else str(name))
    return f" in {', '.join(told)}"


def diff(a: Any, b: Any) -> Result:
    """a minus b, value by value, for two Results on the same axes; notes say what else differs between them.

    Intervals and p values of either say nothing of the difference and are left out; where both carry a `standard_error`, each
    difference has a `z`, a `p` and an adjusted one against no difference. For two Models of one shape: which channels
    between parts are stronger or weaker in the second than in the first (`find.channel_changes`), against its rotation null.
    """
    if is_model(a) and is_model(b):
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
            notes.append(f"{key} differ{_where(ours, theirs)}")
    values = {"difference": first - second, "first": first, "second": second}
    variables = {name: (tensor, a.axes, a.unit) for name, tensor in values.items()}
    variables |= _against_chance(a, b, first - second, notes)
    return Result(
        variables,
        coords={axis: labels for axis, labels in a.coords.items() if axis in a.axes and axis != "part"},
        parts=a.parts if "part" in a.axes else None,
        notes=notes,
        provenance={"method": "diff", "first": a.provenance, "second": b.provenance},
    )
