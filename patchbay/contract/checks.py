"""The contract: what is true of every method. Each check calls one method on one lent model, and raises `ContractError` with what is not.

A `Case` says how a method is called; models and prompts are handed in, and to what only reads it, what a call returned. Weights and
logits of the model are afterwards what they were, no hook is left, also after an exception; random states, train and grad modes stay;
two threads at once see what each sees alone; the same call gives the same Result; a batch equals its prompts one by one; what is saved
loads and replays; what cannot be right is refused by name.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import random
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import patchbay as pb
from patchbay.contract.held import hold, refused, untouched
from patchbay.errors import EditNeverMade
from patchbay.jacks.session import Session
from patchbay.model.regime import randomness
from patchbay.results.given import has_default, may_be_left_out

ONE_DRAW = ("difference_low", "difference_high")  # the spread of draws is not known from one
LENS = ("probability", "logit", "rank", "kl", "logit_diff")  # the lens takes the positions that all prompts have
OF_SCORES = ("effect", "from_embed", "gap", "total")  # differences of scores, which round as scores of size one do
NOISE = 64.0  # roundings of the largest value that a batch may differ by from its prompts


@dataclass(frozen=True)
class Case:
    """One way to call one method. `means`: variables that are means over prompts; `runs`: whether it runs the model."""

    method: str
    call: Callable[..., Any]  # (model, task, **options)
    means: tuple[str, ...] = ()
    runs: bool = True
    label: str = ""
    needs: str = ""  # a signal: families without it refuse
    second: str = ""  # the option that is a second model, of which only a record is kept: a replay must be given it
    own: bool = False  # it acts on items of its own making, which its record holds in place of the prompts
    on: tuple[str, ...] = ()  # the families that it is tried on; all without

    def __str__(self) -> str:
        return self.method + (f"-{self.label}" if self.label else "")

    def __call__(self, model: pb.Model, prompts: Any, **options: Any) -> Any:
        return self.call(model, prompts, **options)


# --- what is lent comes back as it was --------------------------------------------------------------


def called(call: Callable[..., Any], model: pb.Model, prompts: Any) -> tuple[Any, bool]:
    """What a method returns, and whether it ran a layer of the model."""
    ran: list[int] = []
    hook = model.modules[-1].layer.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        returned = call(model, prompts)
    finally:
        hook.remove()
    return returned, bool(ran)


def leaves_all_as_it_was(case: Case, model: pb.Model, prompts: pb.Task) -> Any:
    """The model and all else are left as they were, and what comes back, which is returned, has values."""
    with untouched(model, prompts):
        returned = case(model, prompts)
    hold(isinstance(returned, pb.Result | pb.Knob), f"it returned a {type(returned).__name__}, not a Result or a Knob")
    if isinstance(returned, pb.Result):
        empty = [v for v in returned.variables if v not in ONE_DRAW and not returned[v].isfinite().any()]
        hold(not empty, f"variables without any value: {empty}")
    return returned


def also_after_an_exception(case: Case, model: pb.Model, prompts: pb.Task) -> None:
    """The model fails in mid-run, on its first run and on a later one: what the method put on is gone again."""
    for fails_at in (1, 2):
        calls = 0

        def fail(module: Any, args: Any, kwargs: Any, fails_at: int = fails_at) -> None:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise RuntimeError("injected")

        with untouched(model, prompts):
            hook = model.modules[-1].layer.register_forward_pre_hook(fail, with_kwargs=True)
            try:
                with refused("injected", kind=RuntimeError):
                    case(model, prompts, **({} if fails_at == 1 else {"batch_size": 2}))
            finally:
                hook.remove()


def also_when_hooks_fail(case: Case, model: pb.Model, prompts: pb.Task) -> bool:
    """The second layer refuses its hooks after the first has its own; whether the method asked it for any is returned."""
    attach = Session._attach_layer
    asked: list[set[str]] = []

    def fail(self: Session, layer: int, signals: set[str]) -> None:
        if layer == 1:
            asked.append(signals)
            raise RuntimeError("injected")
        attach(self, layer, signals)

    with untouched(model, prompts), mock.patch.object(Session, "_attach_layer", fail):
        try:
            case(model, prompts)
        except RuntimeError as error:
            hold(str(error) == "injected", f"it made another error of it: {error}")
        else:
            hold(not asked, "a hook that could not be put on was no error")
    return bool(asked)


def changes_in_training(model: pb.Model) -> bool:
    """Whether a model in train mode has dropout, or other chance."""
    model.hf.train()
    try:
        return bool(randomness(model.hf))
    finally:
        model.hf.eval()


def modes_stay(case: Case, model: pb.Model, prompts: pb.Task) -> None:
    """A model lent in training mode, with gradients off somewhere, comes back so, and no graph is kept."""
    first = next(model.hf.parameters())
    model.hf.train()
    first.requires_grad_(False)
    try:
        with torch.enable_grad(), untouched(model, prompts):
            result = case(model, prompts)
        if isinstance(result, pb.Result):
            kept = [v for v in result.variables if result[v].requires_grad]
            hold(not kept, f"a graph is kept of {kept}")
    finally:
        first.requires_grad_(True)
        model.hf.eval()


# --- several at once --------------------------------------------------------------------------------


def outcome(case: Case, model: pb.Model, prompts: pb.Task, edits: list[pb.Edit]) -> Any:
    """What a method gives under edits, or why it refuses."""
    try:
        with model.edited(*edits) if edits else nullcontext():
            return case(model, prompts)
    except pb.PatchbayError as error:
        return str(error)


def alike(a: Any, b: Any) -> bool:
    return a.equal(b) if isinstance(a, pb.Result) and isinstance(b, pb.Result) else bool(a == b)


def at_once(case: Case, model: pb.Model, prompts: pb.Task, edits: list[pb.Edit]) -> list[Any]:
    """What two coroutines get that run at once: one by itself, one under edits, in a thread that it hands the call to. Threads take
    turns as often as they can."""

    async def plain() -> Any:
        await asyncio.sleep(0)
        return outcome(case, model, prompts, [])

    async def edited() -> Any:
        try:
            with model.edited(*edits):
                return await asyncio.to_thread(case, model, prompts)
        except pb.PatchbayError as error:
            return str(error)

    async def both() -> list[Any]:
        return list(reversed(await asyncio.gather(edited(), plain())))

    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        return asyncio.run(both())
    finally:
        sys.setswitchinterval(often)


def threads_see_what_each_sees_alone(case: Case, model: pb.Model, prompts: pb.Task, returned: Any) -> list[Any]:
    """Two coroutines in two threads at once on one model, one under edits, beside a generator that rests under them: the numbers of
    each alone.

    What each gives alone, or why it refuses, is returned, so that a caller can see that the edits change something.
    """
    edits = [pb.scale(pb.Port("attn.out", 0), -3.0)]
    edits += [pb.scale(pb.Port("attn.pattern", 1), 0.5)] if "attn.pattern" in model.signals(1) else []

    def rests() -> Generator[None, None, None]:
        with model.edited(*edits):
            model.hf(torch.tensor([list(prompts.clean[0])], device=model.device))
            yield

    with warnings.catch_warnings(action="ignore", category=EditNeverMade):  # of what reads weights alone
        alone = [returned, outcome(case, model, prompts, edits)]
        with untouched(model, prompts):
            resting = rests()
            next(resting)
            try:
                found = at_once(case, model, prompts, edits)
            finally:
                resting.close()
    for what, mine, theirs in zip(("without edits", "under edits"), alone, found, strict=True):
        hold(alike(mine, theirs), f"beside another task and thread it gives other numbers {what}")
    return alone


# --- what comes back --------------------------------------------------------------------------------


def same_again(case: Case, model: pb.Model, prompts: pb.Task, returned: Any) -> None:
    """The same call gives the same, whatever the random state."""
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        random.seed(7)
        second = case(model, prompts)
    if isinstance(returned, pb.Result):
        hold(returned.equal(second), f"the same call gives other numbers: {returned.differences(second, rtol=0.0)}")
    else:
        hold(returned == second, "the same call gives another knob")


def near(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ by no more than `NOISE` roundings of the largest value, NaN where the other is."""
    size = max(float(x.abs().nan_to_num(0.0).max()) for x in (found, expected))
    allowed = NOISE * torch.finfo(torch.float32).eps * size
    return torch.allclose(found, expected, rtol=0.0, atol=allowed, equal_nan=True)


def a_batch_is_its_prompts(
    case: Case, model: pb.Model, prompts: pb.Task, returned: Any, near: Callable[[Tensor, Tensor], Any] = near
) -> None:
    """Prompts of different lengths together, in small batches and alone: the same numbers."""
    hold(len({len(ids) for ids in prompts.clean}) > 1, "the prompts handed in are all of one length")
    small = case(model, prompts, batch_size=2)
    apart = returned.differences(small, rtol=1e-5)
    hold(small.agrees(returned, 1e-5), f"with batch_size=2 it gives other numbers: {apart}")
    alone = [case(model, prompts[i]) for i in range(len(prompts))] if case.means else []
    for variable in case.means:
        mean = torch.stack([one[variable].double() for one in alone]).mean(0)
        theirs = returned[variable].double()
        if variable in LENS:
            mean, theirs = mean[:, -1], theirs[:, -1]
        if variable in OF_SCORES:
            mean, theirs = mean + 1.0, theirs + 1.0
        hold(near(mean, theirs), f"{variable} of a batch is not the mean of its prompts one by one")


def saves_loads_replays(
    case: Case, model: pb.Model, returned: Any, folder: Path, second: Any = None, method: Any = None
) -> None:
    """What was saved loads as it was, replays to the same numbers, and prints."""
    if not isinstance(returned, pb.Result):
        hold(pb.load_knob(returned.save(folder / "a.knob")) == returned, "a saved knob loads as another")
        return
    again = pb.load_result(returned.save(folder / "a"))
    hold(again.equal(returned) and again.provenance == returned.provenance, "a saved Result loads as another")

    def around() -> Any:  # a replay is made under the edits that were in force
        held = "edits" in returned.provenance["model"]
        return model.edited(pb.scale(pb.Part(1, "attn").port(), 1.0)) if held else nullcontext()

    def quiet() -> Any:
        return warnings.catch_warnings(action="ignore", category=EditNeverMade)  # of what reads weights alone

    if case.second:
        with quiet(), around(), refused(f"cannot replay: option '{case.second}' held a model"):
            pb.replay(again, model)
    with quiet(), around():
        options = {case.second: second} if case.second else None
        replayed = pb.replay(again, model, options=options, method=method)
    hold(replayed and replayed.largest == 0, f"a replay gives other numbers: {replayed}")
    hold(str(returned).startswith(case.method), f"it prints as another method: {str(returned).splitlines()[0]}")


def draws_itself(returned: Any, folder: Path) -> None:
    """A Result makes its own figure."""
    if isinstance(returned, pb.Result):
        returned.plot(folder / "a.png")
        hold((folder / "a.png").stat().st_size, "its figure is an empty file")


def says_where_it_came_from(case: Case, model: pb.Model, prompts: pb.Task, returned: Any, function: Any) -> None:
    """Provenance holds method, paper, model, every option, and the prompts; as JSON."""
    held = json.loads(json.dumps(returned.provenance))
    found = (held["method"], held["paper"], held["model"]["fingerprint"], held["model"]["family"])
    expected = (case.method, function.paper, model.fingerprint, model.family.name)
    hold(found == expected, f"provenance says {found}, not {expected}")
    missing = options_of(function) - {"model"} - set(held["options"])
    hold(not missing, f"provenance lacks the options {missing}")
    if case.runs and not case.own:
        recorded = held["task"] and held["task"].get("clean", held["task"].get("prompts"))
        hold(recorded == [list(ids) for ids in prompts.clean], "provenance holds other prompts")


# --- how it is called -------------------------------------------------------------------------------


def options_of(function: Any) -> set[str]:
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def is_typed(function: Any) -> None:
    """Everything has a type, what has a default is keyword-only and is JSON, and there are at most six options."""
    plain = inspect.unwrap(function)
    hold("return" in plain.__annotations__, "what it returns has no type")
    for parameter in inspect.signature(function).parameters.values():
        hold(parameter.name in plain.__annotations__, f"{parameter.name} has no type")
        optional = has_default(parameter)
        if may_be_left_out(parameter):  # an input of some methods, an option of others
            optional = parameter.kind is parameter.KEYWORD_ONLY
        hold(optional == (parameter.kind is parameter.KEYWORD_ONLY), f"{parameter.name}: options come after *")
        if optional:
            json.dumps(parameter.default)
    hold(len(options_of(function)) <= 6, f"it has {len(options_of(function))} options; at most six")


def an_unknown_option_is_answered(case: Case, model: pb.Model, prompts: pb.Task, function: Any) -> None:
    """An option that there is not is answered with those that there are."""
    with untouched(model, prompts), refused("'zzz'", *sorted(options_of(function))):
        case(model, prompts, zzz=1)


def needed(function: Any, prompts: pb.Task) -> dict[str, Any]:
    """The prompts for everything that must be given beside a model."""
    parameters = inspect.signature(function).parameters
    hold("model" in parameters, "it has no argument `model`")
    return {p.name: prompts for p in parameters.values() if p.default is p.empty and p.name != "model"}


def no_model_is_refused(function: Any, prompts: pb.Task) -> None:
    """What is no model is refused, with how one is made."""
    with refused("needs a Model from patchbay.load(...), got str"):
        function(**needed(function, prompts), model="gpt2")


def no_prompts_at_a_time_are_refused(function: Any, model: pb.Model, prompts: pb.Task) -> None:
    """A batch of no prompts is refused."""
    with refused("batch_size=0"):
        function(**needed(function, prompts), model=model, batch_size=0)


def another_vocabulary_is_refused(case: Case, model: pb.Model, prompts: pb.Task) -> None:
    """Prompts of another vocabulary are refused with the token and the model's last one."""
    clean = tuple((*ids[:-1], 4000, 4000) for ids in prompts.clean)
    foreign = pb.Task("foreign", clean, prompts.right, prompts.wrong)
    with untouched(model, foreign), refused("4000", str(model.vocab_size - 1)):
        case(model, foreign)


def a_family_without_it_refuses(case: Case, model: pb.Model, prompts: pb.Task) -> None:
    """It names the family and what is missing, and leaves the model alone."""
    lacks = not any(case.needs in model.signals(i) for i in range(model.n_layers))
    hold(lacks, f"{model.family.name} has {case.needs}")
    with untouched(model, prompts), refused(model.family.name, case.needs.split(".")[1]):
        case(model, prompts)
