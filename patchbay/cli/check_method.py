"""`patchbay check-method PATH`: the contract, run on a method that lives outside the package.

PATH is FILE.py, FILE.py:NAME, or VERB.NAME of an installed package. The method is called on random twins of eight families with
prompts of repeated tokens; a family may refuse it, by name. It must have its three tests beside it, and planted bugs that these notice.
What it needs besides a model, a task and parts is given as --give KEY=JSON.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import click

from patchbay.cli.commands import json_option
from patchbay.results import outside
from patchbay.signal.port import PatchbayError

TWINS = ("gpt2", "llama", "gemma2", "phi", "mixtral", "gpt_neo", "bloom", "mamba2")
PARTS = ["L1.H2", "L0.H1"]


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


def call_of(function: Callable[..., Any], given: Mapping[str, Any]) -> Callable[..., Any]:
    """(model, task, **options) -> what the method returns: parts where it takes parts, and what was given."""
    from patchbay.results.given import kinds_of

    parameters = inspect.signature(function).parameters
    needed = [
        p for p in parameters.values() if p.default is p.empty and p.name not in ("model", "task", "prompts", *given)
    ]
    for one in needed:
        if "Part" not in kinds_of(one):
            raise PatchbayError(f"the contract cannot know what {one.name!r} is: --give {one.name}=JSON")

    def call(model: Any, task: Any, **options: Any) -> Any:
        own: dict[str, Any] = {key: value for key, value in (("model", model),) if key in parameters}
        own |= {key: task for key in ("task", "prompts") if key in parameters}
        parts: list[str] = PARTS if model.n_heads(0) else ["L1.attn"]
        own |= {
            one.name: parts if "list" in kinds_of(one).lower() or "Sequence" in kinds_of(one) else parts[0]
            for one in needed
        }
        return function(**(own | dict(given) | options))

    return call


def of_files(found: outside.Outside) -> Iterator[tuple[str, Callable[[], None]]]:
    """What must lie beside the method."""
    from patchbay.contract import beside

    for check in (beside.has_its_three_tests, beside.its_tests_pass, beside.its_tests_notice_planted_bugs):
        yield _said(check), lambda check=check: check(found.path, found.name)  # type: ignore[misc]


def of_calls(
    function: Any, call: Callable[..., Any], means: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check of the contract on every twin that does not refuse the method by name."""
    import patchbay as pb
    from patchbay.contract import checks
    from patchbay.tiny import twins

    yield _said(checks.is_typed), lambda: checks.is_typed(function)
    works = 0
    for name in TWINS:
        model = pb.load(twins.twin(name))
        task = pb.tasks.repeated_tokens(model, 4, max_period=6, max_offset=4)
        try:
            runs = checks.runs_the_model(call, model, task)
        except PatchbayError as error:
            refusal = str(error)
            said = f"{name}: it works, or refuses by the family's name"
            yield said, lambda refusal=refusal, model=model: checks.hold(model.family.name in refusal, refusal)  # type: ignore[misc]
            continue
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            yield f"{name}: it works, or refuses by the family's name", lambda text=text: checks.hold(False, text)  # type: ignore[misc]
            continue
        works += 1
        case = checks.Case(function.method_name, call, means, runs=runs)
        for check, arguments in _calls(case, model, task, function):
            yield f"{name}: {_said(check)}", lambda check=check, given=arguments: check(*given)  # type: ignore[misc]
    yield "it works on at least one family", lambda: checks.hold(works, f"it works on none of {', '.join(TWINS)}")


def _calls(case: Any, model: Any, task: Any, function: Any) -> Iterator[tuple[Callable[..., None], tuple[Any, ...]]]:
    """The checks of one twin with their arguments."""
    from patchbay.contract import checks

    batched = "batch_size" in inspect.signature(function).parameters
    yield from ((check, (case, model, task)) for check in (checks.leaves_all_as_it_was, checks.same_again))
    if case.runs:
        if batched:
            yield checks.also_after_an_exception, (case, model, task)
            yield checks.a_batch_is_its_prompts, (case, model, task)
        if not checks.changes_in_training(model):  # else it refuses itself
            yield checks.modes_stay, (case, model, task)
        yield checks.another_vocabulary_is_refused, (case, model, task)
    yield checks.says_where_it_came_from, (case, model, task, function)
    yield checks.an_unknown_option_is_answered, (case, model, task, function)
    yield checks.no_model_is_refused, (function, task)

    def replays(case: Any, model: Any, task: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            checks.saves_loads_replays(case, model, task, Path(folder), method=function)

    replays.__doc__ = checks.saves_loads_replays.__doc__
    yield replays, (case, model, task)


def _said(check: Callable[..., None]) -> str:
    return str(check.__doc__).split("\n")[0].rstrip(".")


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
    from patchbay.draw import screen

    found = named(path)
    function = found.load()
    call = call_of(function, read_given(give, function))
    rows = []
    variables = tuple(name for name in means.split(",") if name)
    for says, check in chain(of_files(found), of_calls(function, call, variables)):
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


def _outcome(check: Callable[[], None]) -> str | None:
    """What a check found wrong; None where it holds."""
    try:
        check()
    except Exception as error:
        return " ".join(str(error).split()) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    return None
