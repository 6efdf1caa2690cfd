"""`patchbay check-method PATH`: the contract, run on a method that lives outside the package.

PATH is FILE.py, FILE.py:NAME, or VERB.NAME of an installed package. The method is called on random twins of eight families with
prompts of repeated tokens; a family may refuse it, by name. It must have its three tests beside it, and planted bugs that these notice.
What it needs besides a model, a task and parts is given as --give KEY=JSON.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from itertools import chain
from typing import Any

import click

from patchbay.cli.commands import json_option
from patchbay.results import outside
from patchbay.signal.port import PatchbayError


def named(text: str) -> outside.Outside:
    """The method that is asked for. Raises PatchbayError where there is none."""
    if outside.is_path(text):
        return outside.named(text)
    verb, _, name = text.replace("-", "_").partition(".")
    found = outside.entry(verb, name)
    if found is None:
        raise PatchbayError(f"{text!r} is neither FILE.py nor a method VERB.NAME that an installed package offers")
    return found


def read_given(given: tuple[str, ...], function: Callable[..., Any]) -> dict[str, Any]:
    """KEY=JSON of the arguments that a twin does not have."""
    known, read = list(inspect.signature(function).parameters), {}
    for text in given:
        key, equals, value = text.partition("=")
        key = key.replace("-", "_")
        if not equals or key not in known:
            raise PatchbayError(f"--give {text!r}: it is KEY=JSON, and KEY one of {', '.join(known)}")
        try:
            read[key] = json.loads(value)
        except ValueError:
            read[key] = value
    return read


@click.command("check-method", help=__doc__, params=[json_option()])
@click.argument("path", metavar="PATH")
@click.option(
    "--give",
    multiple=True,
    metavar="KEY=JSON",
    help="An argument that the contract cannot know; may be given more than once.",
)
@click.option(
    "--means",
    default="",
    metavar="NAME,...",
    help="Variables of its Result that are means over prompts; checked one by one.",
)
def check_method(path: str, give: tuple[str, ...], means: str, as_json: bool) -> None:
    from patchbay.contract import every
    from patchbay.draw import screen

    found = named(path)
    function = found.load()
    call = every.call_of(function, read_given(give, function))
    rows = []
    variables = tuple(name for name in means.split(",") if name)
    for says, check in chain(every.of_files(found), every.of_calls(function, call, variables)):
        failed = _outcome(check)
        rows.append({"check": says, "failed": failed})
        if not as_json:
            click.echo(f"{'FAILED' if failed else 'ok    '} {says}" + (f"\n       {failed}" if failed else ""))
    bad = sum(row["failed"] is not None for row in rows)
    if as_json:
        screen.emit({"method": found.method_name, "checks": rows, "failed": bad})
    else:
        click.echo(f"{found.method_name}: {len(rows) - bad} of {len(rows)} checks hold")
    if bad:
        raise SystemExit(1)


def _outcome(check: Callable[[], Any]) -> str | None:
    """What a check found wrong; None where it holds."""
    try:
        check()
    except Exception as error:
        return " ".join(str(error).split()) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    return None
