"""Text to values: what is written on a command line, read as the parameter's annotation asks, or refused with what is possible.

Numbers, choices, lists (comma between items, calls such as `beam(beams=4, length_penalty=1)` whole, a JSON list, or `@FILE` of lines), mappings (JSON, or `@FILE` of it), Parts (`L3.H5,L2.H1`, or `FOLDER:3` for the best of a saved
Result), Ports, Tasks (`laundry_list:n=50,objects=8`, or a file of prompts), texts (a file of them, or one as it stands), Results (their
folder), knobs (`x.knob@2`), edits (`scale(L3.H5.z, 0)`).
"""

from __future__ import annotations

import ast
import collections.abc
import json
import re
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbay.cli import prompt_files
from patchbay.cli.options import LATER, choices, names_in, shown_type, tasks, writable
from patchbay.cli.signatures import parameters_of, source
from patchbay.signal.channel import parse_channel
from patchbay.signal.port import PatchbayError, parse_part, parse_port, suggest

if TYPE_CHECKING:
    from patchbay import Model, Task

FORMS = (".txt", ".jsonl")  # of a corpus, read as a stream


def read(text: str, hint: Any, what: str, model: Model | None = None) -> Any:
    """The value that a text gives for an annotation, or a PatchbayError that names the option and what it takes."""
    if text.lower() in ("none", "null") and type(None) in typing.get_args(hint):
        return None
    if given := choices(hint):
        found = next((value for value in given if str(value) == text), None)
        if found is None:
            known = [str(value) for value in given]
            raise PatchbayError(f"{what}: {text!r} is none of {', '.join(known)}" + suggest(text, known))
        return found
    origin, inner = typing.get_origin(hint), [item for item in typing.get_args(hint) if item is not type(None)]
    if origin in (types.UnionType, typing.Union):
        return _read_first(text, inner, what, model)
    if origin in (list, tuple, collections.abc.Sequence, collections.abc.Iterable) or hint in (list, tuple):
        return _read_list(text, next((one for one in inner if one is not Ellipsis), str), hint, what, model)
    if hint is dict or origin in (dict, collections.abc.Mapping):
        return _read_mapping(text, inner[-1] if inner else Any, what, model)
    return _read_one(text, origin or hint, what, model)


def _read_list(text: str, item: Any, hint: Any, what: str, model: Model | None) -> list[Any]:
    """Items with a comma between them; the lines of `@FILE`; or a JSON list, whose texts may hold commas and spaces."""
    if "Part" in names_in(item):
        return read_parts([text], model)
    plain = not (item is Any or names_in(item) & {"list", "Sequence", "tuple"})
    if text.startswith("["):
        try:
            listed = json.loads(text)
        except ValueError:
            listed = None
        if isinstance(listed, list):
            whole = all(isinstance(one, str) for one in listed) if item is str else True
            if not whole or (not plain and item is not Any and not all(isinstance(one, list) for one in listed)):
                raise PatchbayError(f"{what}: {text!r} is not {shown_type(hint)}")
            return [read(str(one), item, what, model) for one in listed] if plain and item is not str else listed
    pieces = _lines(text[1:], what) if text.startswith("@") else _items(text)
    if not pieces:
        raise PatchbayError(f"{what}: nothing in {text!r}; one or more are written {shown_type(hint)}")
    if item is Any and text.startswith("@"):
        return pieces
    return pieces if item is str else [read(piece, item, what, model) for piece in pieces]


def _items(text: str) -> list[str]:
    """What stands between commas, those inside a call's brackets left: `beam(beams=4, length_penalty=1),greedy` are two."""
    try:
        found = ast.parse(f"[{text}]", mode="eval").body
    except (SyntaxError, ValueError):
        found = None
    if (
        isinstance(found, ast.List)
        and any(isinstance(one, ast.Call) for one in found.elts)
        and all(
            isinstance(one, ast.Name) or (isinstance(one, ast.Call) and isinstance(one.func, ast.Name))
            for one in found.elts
        )
    ):
        return [ast.get_source_segment(f"[{text}]", one) or "" for one in found.elts]
    return [one.strip() for one in text.split(",") if one.strip()]


def _read_mapping(text: str, value: Any, what: str, model: Model | None) -> dict[str, Any]:
    """A JSON object; where its values are to be lists or tasks, they are."""
    try:
        read_in = json.loads("\n".join(_lines(text[1:], what)) if text.startswith("@") else text)
    except ValueError as error:
        raise PatchbayError(f"{what}: {text!r} is not json: {error}") from error
    if not isinstance(read_in, dict):
        raise PatchbayError(f"{what}: {text!r} is no JSON object, {{name: value, ...}}")
    names = names_in(value)
    for key, held in read_in.items():
        if "Task" in names:
            read_in[key] = read(str(held), value, f"{what}, {key}", model)
        elif names & {"Sequence", "list"} and not isinstance(held, list):
            raise PatchbayError(f"{what}: {key!r} is {held!r}; a list is needed")
        elif value is float and (isinstance(held, bool) or not isinstance(held, int | float)):
            raise PatchbayError(f"{what}: {key!r} is {held!r}; a number is needed")
    return read_in


def _read_first(text: str, inner: list[Any], what: str, model: Model | None) -> Any:
    """The first type of a union that takes the text; plain text comes last. Texts or lists of ids are prompts, and may lie in a file; one that is also
    taken by its name is read where it is used, if it is of the forms that are read there."""
    if {list[str], list[list[int]]} <= set(inner):
        named = str in inner and Path(text).suffix in FORMS and not text.startswith("[")
        return text.removeprefix("@") if named else prompt_files.read_texts(text, what)
    reasons = []
    for hint in sorted(inner, key=lambda item: item is str):
        if writable(hint):
            try:
                return read(text, hint, what, model)
            except PatchbayError as error:
                reasons.append(str(error))
    raise PatchbayError(
        reasons[0] if len(reasons) == 1 else f"{what}: {text!r} is not {' or '.join(map(shown_type, inner))}"
    )


def _lines(path: str, what: str) -> list[str]:
    try:
        return [
            line.removesuffix("\r") for line in Path(path).read_text(encoding="utf-8-sig").split("\n") if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise PatchbayError(f"{what}: could not read {path}: {error}") from error


def _read_one(text: str, hint: Any, what: str, model: Model | None) -> Any:
    name = getattr(hint, "__name__", str(hint))
    try:
        if hint is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        if hint in (int, float, Path):
            return hint(text)
    except (ValueError, KeyError) as error:
        raise PatchbayError(f"{what}: {text!r} is not {shown_type(hint)}") from error
    if name == "Part":
        return model.part(text) if model is not None else parse_part(text)
    if name == "Port":
        return model.port(text) if model is not None else parse_port(text)
    if name == "Channel":
        return parse_channel(text)
    if name in LATER:
        return _read_later(text, name, model)
    return text if hint is str else _literal(text)


def _read_later(text: str, name: str, model: Model | None) -> Any:
    import patchbay as pb

    if name == "Task":
        if model is None:
            raise PatchbayError(f"the task {text!r} needs a model to be written for")
        return read_task(text, model)
    if name == "Knob":
        return read_knob(text)
    return pb.load(text) if name == "Model" else pb.load_result(text)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_parts(texts: list[str] | tuple[str, ...], model: Model | None = None) -> list[Any]:
    """Parts from `L3.H5,L2.H1`, or the best N of a saved Result from `FOLDER:N`; checked against the model."""
    import patchbay as pb

    found = []
    for piece in (piece.strip() for text in texts for piece in text.split(",") if piece.strip()):
        folder, _, n = piece.rpartition(":")
        if n.isdigit() and Path(folder).is_dir():
            found += pb.load_result(folder).top(int(n))
        else:
            found.append(model.part(piece) if model is not None else parse_part(piece))
    if model is not None:
        found = [model.part(str(part)) for part in found]
    if not found:
        raise PatchbayError(
            "no parts were given; write them as L3.H5,L2.H1 or as FOLDER:3, the best 3 of a saved Result"
        )
    return list(dict.fromkeys(found))


def read_task(text: str, model: Model, *, n: int | None = None, seed: int | None = None) -> Task:
    """`laundry_list:n=50,objects=8` as a task in the model's own tokens, or the task of a file, `qa.csv`. `n` and `seed` stand for
    those not written."""
    name, _, written = text.partition(":")
    name = name.strip().replace("-", "_")
    known = tasks()
    if name not in known and prompt_files.named(text) is not None:
        return typing.cast("Task", prompt_files.first(prompt_files.read_prompts(text, model), n))
    if name not in known:
        raise PatchbayError(f"no task {name!r}; tasks are {', '.join(known)}, or a file" + suggest(name, list(known)))
    import patchbay as pb

    function = getattr(pb.tasks, name)
    takes = {key: value for key, value in parameters_of(source(known[name].path), name).items() if key != "model"}
    given: dict[str, Any] = {}
    for pair in filter(None, re.split(r",\s*(?=\w+\s*=)", written.strip())):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        key = key.replace("-", "_")
        if not equals or key not in takes:
            problem = f"has no option {key!r}" if equals else f"options are written name=value, got {pair!r}"
            raise PatchbayError(
                f"task {name}: {problem}; its options are {known[name].options}" + suggest(key, list(takes))
            )
        given[key] = read(value, takes[key].annotation, f"task {name}, {key}")
    for key, value in (("n", n), ("seed", seed)):
        if value is not None and key in given and given[key] != value:
            raise PatchbayError(f"task {name}: {key} is {given[key]} in --task and {value} in --{key}; write it once")
        if value is not None:
            given[key] = value
    return typing.cast("Task", function(model, **given))


# --- edits --------------------------------------------------------------------------------------------


def read_knob(text: str) -> Any:
    """The knob of `x.knob@2`, a file and a strength; `x.knob` alone leaves the strength to the knob."""
    import patchbay as pb

    path, at, written = text.rpartition("@")
    try:
        strength = float(written) if at else None
    except ValueError:
        strength = None
    return pb.load_knob(text) if strength is None else pb.load_knob(path).at(strength)


def read_edit(text: str, model: Model) -> Any:
    """`scale(L3.H5.z, 0)`, `zero(L2.mlp.out, positions=-1)`, `block(L1.H0.pattern, key=0)`: an edit as it prints."""
    import patchbay as pb

    possible = (
        "zero(L3.H5.z), scale(L3.H5.z, 2), add(L2.N7.act, 1.5), replace(L2.N7.act, 0), block(L1.H0.pattern, key=0)"
    )
    found = re.fullmatch(r"\s*(\w+)\s*\(\s*([^,()\s]+?)\s*(?:,(.*))?\)\s*", text)
    if not found:
        raise PatchbayError(f"{text!r} is not an edit; edits are written {possible}")
    op, port, rest = found.groups()
    known = ("zero", "scale", "add", "replace", "block")
    if op not in known:
        raise PatchbayError(f"{text!r}: no edit {op!r} that can be written; possible: {possible}" + suggest(op, known))
    try:
        call = typing.cast("ast.Call", ast.parse(f"f({rest or ''})", mode="eval").body)
        arguments = [ast.literal_eval(item) for item in call.args]
        options = {str(item.arg): ast.literal_eval(item.value) for item in call.keywords}
        return getattr(pb, op)(model.port(port), *arguments, **options)
    except (SyntaxError, TypeError) as error:
        raise PatchbayError(f"{text!r}: {error}; edits are written {possible}") from error
    except ValueError as error:
        if isinstance(error, PatchbayError):
            raise
        raise PatchbayError(f"{text!r}: only numbers, texts and lists can be written; {possible}") from error
