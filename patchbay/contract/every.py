"""Every check of one method outside the package: what lies beside it, then each call on random twins of eight families.

A family may refuse the method, by its name. Checks come one by one, each with the words that say what it holds.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import patchbay as pb
from patchbay.contract import beside, checks
from patchbay.contract.held import hold
from patchbay.results.given import kinds_of
from patchbay.results.outside import Outside
from patchbay.signal.port import PatchbayError
from patchbay.tiny import twins

TWINS = ("gpt2", "llama", "gemma2", "phi", "mixtral", "gpt_neo", "bloom", "mamba2")
PARTS = ["L1.H2", "L0.H1"]
Check = tuple[str, Callable[[], Any]]  # what it holds, and the call that raises where it does not


def prompts_of(model: pb.Model, n: int = 4) -> pb.Task:
    """Prompts of different lengths, of tokens that every twin has, with answers and twins."""
    return pb.tasks.repeated_tokens(model, n, max_period=6, max_offset=4)


def call_of(function: Callable[..., Any], given: Mapping[str, Any]) -> Callable[..., Any]:
    """(model, task, **options) -> what the method returns: parts where it takes parts, and what was given."""
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


def of_files(found: Outside) -> Iterator[Check]:
    """What must lie beside the method."""
    for check in (beside.has_its_three_tests, beside.its_tests_pass, beside.its_tests_notice_planted_bugs):
        yield _said(check), lambda check=check: check(found.path, found.name)  # type: ignore[misc]


def of_calls(function: Any, call: Callable[..., Any], means: tuple[str, ...]) -> Iterator[Check]:
    """Every check of the contract on every twin that does not refuse the method by name."""
    yield _said(checks.is_typed), lambda: checks.is_typed(function)
    works, says = 0, "it works, or refuses by the family's name"
    for name in TWINS:
        model = pb.load(twins.twin(name))
        task = prompts_of(model)
        try:
            returned, runs = checks.called(call, model, task)
        except PatchbayError as error:
            yield f"{name}: {says}", lambda told=str(error), model=model: hold(model.family.name in told, told)  # type: ignore[misc]
            continue
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            yield f"{name}: {says}", lambda told=told: hold(False, told)  # type: ignore[misc]
            continue
        works += 1
        case = checks.Case(function.method_name, call, means, runs=runs)
        for check, arguments in _calls(case, model, task, returned, function):
            yield f"{name}: {_said(check)}", lambda check=check, given=arguments: check(*given)  # type: ignore[misc]
    yield "it works on at least one family", lambda: hold(works, f"it works on none of {', '.join(TWINS)}")


def _calls(
    case: checks.Case, model: pb.Model, task: pb.Task, returned: Any, function: Any
) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The checks of one twin with their arguments."""
    yield checks.leaves_all_as_it_was, (case, model, task)
    yield checks.same_again, (case, model, task, returned)
    yield checks.threads_see_what_each_sees_alone, (case, model, task, returned)
    if case.runs:
        if "batch_size" in inspect.signature(function).parameters:
            yield checks.also_after_an_exception, (case, model, task)
            yield checks.a_batch_is_its_prompts, (case, model, task, returned)
            yield checks.no_prompts_at_a_time_are_refused, (function, model, task)
        yield checks.also_when_hooks_fail, (case, model, task)
        if not checks.changes_in_training(model):  # else it refuses itself
            yield checks.modes_stay, (case, model, task)
        yield checks.another_vocabulary_is_refused, (case, model, task)
    yield checks.says_where_it_came_from, (case, model, task, returned, function)
    yield checks.an_unknown_option_is_answered, (case, model, task, function)
    yield checks.no_model_is_refused, (function, task)

    def replays() -> None:
        with tempfile.TemporaryDirectory() as folder:
            checks.saves_loads_replays(case, model, returned, Path(folder), method=function)
            checks.draws_itself(returned, Path(folder))

    replays.__doc__ = checks.saves_loads_replays.__doc__
    yield replays, ()


def _said(check: Callable[..., Any]) -> str:
    return str(check.__doc__).split("\n")[0].rstrip(".")
