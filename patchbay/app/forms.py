"""Methods as forms: the fields of a method are the options of its command, in the words of its `--help`; and back to a command.

Nothing is imported for it: commands are read from the methods' text. Options that say where a command reads, writes or runs
(`ELSEWHERE`) are the server's affair and no fields.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from patchbay.cli import options
from patchbay.cli.commands import method_command
from patchbay.cli.signatures import parameters_of, source
from patchbay.errors import PatchbayError
from patchbay.serve.outside import refuse_outside
from patchbay.signal.port import suggest

ELSEWHERE = {
    *("out", "overwrite", "report", "figure", "rows", "columns", "as_json"),  # what is printed and written
    *("keep", "memory", "executor", "workers", "dtype", "device", "trust_remote_code", "model"),  # how it runs
}
ACTS_ON = ("typed", "task", "prompts", "prompt", "items", "n", "metric", "parts", "part", "heads", "knob", "knobs")
LONGEST = 100_000  # letters of one field


def about() -> list[dict[str, Any]]:
    """The rooms of methods with their methods, each with its first line."""
    return [
        {
            "name": room,
            "doc": options.ROOMS[room],
            "methods": [{"name": one.name, "doc": one.doc} for one in options.methods(room).values()],
        }
        for room in options.rooms()
    ]


def tasks() -> list[dict[str, str]]:
    return [{"name": one.name, "doc": one.doc, "options": one.options} for one in options.tasks().values()]


def command(room: str, name: str) -> click.Command:
    """The command of a method; refuses a name that is none."""
    if room not in options.rooms() or name not in options.methods(room):
        known = list(options.methods(room)) if room in options.rooms() else options.rooms()
        raise PatchbayError(f"there is no method {room}.{name}" + suggest(name, known))
    return method_command(room, name)


def form(room: str, name: str) -> dict[str, Any]:
    """A method's fields and words, as data."""
    made = command(room, name)
    takes = parameters_of(source(options.files(room)[name]), name)
    fields = [_field(one, takes.get(str(one.name))) for one in made.params if one.name not in ELSEWHERE]
    fields.sort(key=lambda field: ACTS_ON.index(field["name"]) if field["name"] in ACTS_ON else len(ACTS_ON))
    text = (made.help or "").replace("\b\n", "")
    head, _, rest = text.partition("\n\n")
    return {"room": room, "name": name, "head": " ".join(head.split()), "help": rest, "fields": fields}


def _field(one: click.Parameter, takes: inspect.Parameter | None) -> dict[str, Any]:
    """One field: the option's word, its type and what it is without being given."""
    default = one.default if takes is None else takes.default
    given = list(one.type.choices) if isinstance(one.type, click.Choice) else []
    given = list(options.choices(takes.annotation)) if takes is not None and not given else given
    initial = ",".join(map(str, default)) if isinstance(default, list | tuple) else default
    initial = initial if isinstance(initial, bool | int | float | str) else ""
    return {
        "name": str(one.name),
        "flag": min(one.opts, key=len) if isinstance(one, click.Option) else "PROMPT",
        "word": (getattr(one, "help", None) or "One text to a line.").partition("  [default")[0],
        "kind": _kind(one, given),
        "metavar": str(one.metavar or "").lower(),
        "choices": [str(value) for value in given if value is not None],
        "required": bool(one.required),
        "initial": str(initial).lower() if isinstance(initial, bool) else str(initial),
        "group": "acts on" if one.name in ACTS_ON or one.required else "options",
    }


def _kind(one: click.Parameter, given: list[Any]) -> str:
    if getattr(one, "is_flag", False) or one.secondary_opts:
        return "flag"
    if given:
        return "choice"
    whole = isinstance(one.type, click.types.IntParamType) or str(one.metavar).lower() == "int"
    return "integer" if whole else "number" if str(one.metavar).lower() == "number" else "text"


def arguments(room: str, name: str, given: Mapping[str, Any], folder: Path) -> list[str]:
    """The words after MODEL of the command line that a filled form means; refuses fields that are none and files elsewhere."""
    known = {str(one.name): one for one in command(room, name).params if one.name not in ELSEWHERE}
    unknown = [key for key in given if key not in known]
    if unknown:
        raise PatchbayError(f"{room}.{name} has no field {', '.join(unknown)}; its fields are {', '.join(known)}")
    typed: list[str] = []
    flags: list[str] = []
    for key, value in given.items():
        one = known[key]
        if value in ("", None):
            continue
        if not isinstance(value, str | bool | int | float) or len(str(value)) > LONGEST:
            raise PatchbayError(f"{key} is text of at most {LONGEST:,} letters")
        if isinstance(value, bool):
            flags += _flag(one, key, value)
            continue
        refuse_outside(str(value), folder, folder)  # where the worker stands
        if isinstance(one, click.Argument):
            typed += [line for line in str(value).splitlines() if line]
        else:
            flags.append(f"{max(one.opts, key=len)}={value}")
    return [*flags, *(["--", *typed] if typed else [])]


def _flag(one: click.Parameter, key: str, value: bool) -> list[str]:
    if not (getattr(one, "is_flag", False) or one.secondary_opts):
        raise PatchbayError(f"{key} takes text, got {value}")
    if value == bool(one.default):
        return []
    names = one.opts if value else one.secondary_opts
    return [names[0]] if names else []


def spoken(room: str, name: str, model: str, words: list[str], target: str) -> str:
    """The command line that makes the same Result."""
    return shlex.join(["patchbay", room, name.replace("_", "-"), model, *words, "--out", target])
