"""Refusals in the words of the command line: what says `top=20` to Python says `--top 20` to whoever wrote a command.

One place for every command: the options of the command that was called are known by name, and what is said of them to Python
is written as they are written. `corrupted=` and other arguments of `Task.from_prompts` are columns of a file of prompts. What is no
option of the command is left as it is: an option of a task is written `key=value` on the command line too.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence

import click

COLUMNS = (
    "corrupted",
    "right",
    "wrong",
    "labels",
    "marks",
)  # of a file of prompts; `Task.from_prompts` has them as arguments
QUOTED = r"""(?P<value>\[[^\[\]]*\]|\{[^{}]*\}|'[^']*'|"[^"]*"|[\w.+-]+)?"""  # a value as Python writes it, or none


def spoken(text: str, parameters: Sequence[click.Parameter]) -> str:
    """The text of a refusal with a command's options as they are written on the command line."""
    before, listed, after = text.partition("its options are ")  # of a task: written `key=value`
    for option in parameters:
        if isinstance(option, click.Option) and option.name is not None:
            for name in {option.name, _long(option).replace("-", "_")}:
                before = _written(before, name, f"--{_long(option)}", option)
    if any(option.name == "prompts" for option in parameters):
        for name in COLUMNS:
            before = _keyed(name).sub(f"the column {name} (of --prompts FILE)", before)
        before = re.sub(r"\btask\.with_metric\((?:\.\.\.)?\)", "--metric NAME", before)
    return before + listed + after


def _long(option: click.Option) -> str:
    """`max-new-tokens` of `--max-new-tokens`, the longest of its names."""
    return (
        max((name.lstrip("-") for name in option.opts), key=len) if len(option.opts) > 1 else option.opts[0].lstrip("-")
    )


def _keyed(name: str) -> re.Pattern[str]:
    """`name=value`, not where it is part of `FILE:name=value` or of another word, nor quoted: that is what was typed."""
    return re.compile(rf"(?<![\w:,.+'\"-]){re.escape(name)}=(?!=){QUOTED}")


def _written(text: str, name: str, flag: str, option: click.Option) -> str:
    def one(found: re.Match[str]) -> str:
        value = found["value"]
        if value is None:
            return flag
        if value.startswith("{") and isinstance(
            option.type, click.Choice
        ):  # `columns={...}` of a table is no `--columns all`
            return found[0]
        end = value[-1] if value[-1] in ".-+" and value != "..." else ""  # of the sentence
        value = value.removesuffix(end) if end else value
        if value in ("True", "False") and option.is_flag:
            off = option.secondary_opts[0] if option.secondary_opts else f"without {flag}"
            return (flag if value == "True" else off) + end
        return f"{flag} {_plain(value)}{end}"

    return _keyed(name).sub(one, text)


def _plain(value: str) -> str:
    """A Python value as the command line takes it: no quotes, commas between items, a table as JSON, a file where anything may stand."""
    if value == "[...]":
        return "FILE"
    try:
        held = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    if isinstance(held, dict):
        return f"'{json.dumps(held)}'"
    if isinstance(held, list):
        return ",".join(map(str, held)) if held else "''"
    return str(held) if isinstance(held, str) and held else value
