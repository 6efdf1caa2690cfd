"""The contract: what is true of every method. Each check calls one method on one lent model, and raises `ContractError` with what is not.

A `Case` says how a method is called; models and prompts are handed in. Weights and logits of the model are afterwards what they were,
no hook is left, also after an exception; random states, train and grad modes stay; the same call gives the same Result; a batch
equals its prompts one by one; what is saved loads and replays; what cannot be right is refused by name.
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import patchbay as pb
from patchbay.jacks.session import Session, attention
from patchbay.model.regime import randomness
from patchbay.results.given import has_default, may_be_left_out

ONE_DRAW = ("difference_low", "difference_high")  # the spread of draws is not known from one
LENS = ("probability", "logit", "rank", "kl", "logit_diff")  # the lens takes the positions that all prompts have


class ContractError(AssertionError):
    """What a method does not keep of the contract."""


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

    def __str__(self) -> str:
        return self.method + (f"-{self.label}" if self.label else "")

    def __call__(self, model: pb.Model, prompts: Any, **options: Any) -> Any:
        return self.call(model, prompts, **options)


def hold(true: Any, says: str) -> None:
    if not true:
        raise ContractError(says)


@contextmanager
def refused(*says: str, kind: type[Exception] = pb.PatchbayError) -> Iterator[None]:
    """The block raises that error, and its message has these words."""
    try:
        yield
    except kind as error:
        missing = [word for word in says if word not in str(error)]
        hold(not missing, f"the refusal lacks {missing}: {error}")
    else:
        raise ContractError(f"nothing was refused; a {kind.__name__} with {list(says)} was due")


# --- what is lent comes back as it was --------------------------------------------------------------


def state_of(model: pb.Model) -> dict[str, Any]:
    """Everything that a method must leave alone, as comparable values."""
    hf = model.hf
    modules = dict(hf.named_modules())
    return {
        "weights": {name: tensor.detach().clone() for name, tensor in hf.state_dict().items()},
        "pointers": {name: tensor.data_ptr() for name, tensor in hf.state_dict().items()},
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._backward_pre_hooks))
            for name, m in modules.items()
        },
        "forwards": [name for name, m in modules.items() if "forward" in m.__dict__],
        "attention": [m.config._attn_implementation for m in modules.values() if hasattr(m, "config")],
        "training": {name: m.training for name, m in modules.items()},
        "requires_grad": {name: (p.requires_grad, p.grad is None) for name, p in hf.named_parameters()},
        "grad mode": torch.is_grad_enabled(),
        "torch": torch.get_rng_state(),
        "numpy": [value.tolist() if hasattr(value, "tolist") else value for value in np.random.get_state()],
        "random": random.getstate(),
        "listening": dict(attention._ACTIVE),
        "session": model._session,
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return bool(a == b)

    return [name for name in before if not same(before[name], after[name])]


@contextmanager
def untouched(model: pb.Model, prompts: pb.Task) -> Iterator[None]:
    """Weights, logits, hooks, modes, random states and the task are after the block what they were before."""
    ids = torch.tensor([[5, 9, 5, 9, 11, 3]])
    with torch.no_grad():
        logits = model.hf(ids).logits
    before, record = state_of(model), json.dumps(prompts.to_json())
    yield
    changed = differences(before, state_of(model))
    hold(not changed, f"it left changed: {', '.join(changed)}")
    hold(json.dumps(prompts.to_json()) == record, "it changed the task")
    with torch.no_grad():
        hold(torch.equal(model.hf(ids).logits, logits), "the model gives other logits afterwards")


def runs_the_model(call: Callable[..., Any], model: pb.Model, prompts: Any) -> bool:
    """Call a method once: whether it ran a layer of the model."""
    ran: list[int] = []
    hook = model.modules[-1].layer.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        call(model, prompts)
    finally:
        hook.remove()
    return bool(ran)


def leaves_all_as_it_was(case: Case, model: pb.Model, prompts: pb.Task) -> None:
    """The model and all else are left as they were, and what comes back has values."""
    with untouched(model, prompts):
        returned = case(model, prompts)
    hold(isinstance(returned, pb.Result | pb.Knob), f"it returned a {type(returned).__name__}, not a Result or a Knob")
    if isinstance(returned, pb.Result):
        empty = [v for v in returned.variables if v not in ONE_DRAW and not returned[v].isfinite().any()]
        hold(not empty, f"variables without any value: {empty}")


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


def also_when_hooks_fail(case: Case, model: pb.Model, prompts: pb.Task) -> None:
    """The second layer refuses its hooks after the first has its own."""
    attach = Session._attach_layer

    def fail(self: Session, layer: int, signals: set[str]) -> None:
        if layer == 1:
            raise RuntimeError("injected")
        attach(self, layer, signals)

    with untouched(model, prompts):
        with mock.patch.object(Session, "_attach_layer", fail), refused("injected", kind=RuntimeError):
            case(model, prompts)


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


# --- what comes back --------------------------------------------------------------------------------


def same_again(case: Case, model: pb.Model, prompts: pb.Task) -> None:
    """The same call gives the same, whatever the random state."""
    first = case(model, prompts)
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        random.seed(7)
        second = case(model, prompts)
    if isinstance(first, pb.Result):
        hold(first.equal(second), f"the same call gives other numbers: {first.differences(second, rtol=0.0)}")
    else:
        hold(first == second, "the same call gives another knob")


def a_batch_is_its_prompts(case: Case, model: pb.Model, prompts: pb.Task) -> None:
    """Prompts of different lengths together, in small batches and alone: the same numbers."""
    hold(len({len(ids) for ids in prompts.clean}) > 1, "the prompts handed in are all of one length")
    whole = case(model, prompts)
    small = case(model, prompts, batch_size=2)
    hold(small.agrees(whole, 1e-5), f"with batch_size=2 it gives other numbers: {whole.differences(small, rtol=1e-5)}")
    alone = [case(model, prompts[i]) for i in range(len(prompts))] if case.means else []
    for variable in case.means:
        mean = torch.stack([one[variable].double() for one in alone]).mean(0)
        theirs = whole[variable].double()
        if variable in LENS:
            mean, theirs = mean[:, -1], theirs[:, -1]
        close = torch.allclose(mean, theirs, atol=1e-4, equal_nan=True)
        hold(close, f"{variable} of a batch is not the mean of its prompts one by one")


def saves_loads_replays(
    case: Case, model: pb.Model, prompts: pb.Task, folder: Path, second: Any = None, method: Any = None
) -> None:
    """What was saved loads as it was, replays to the same numbers, prints and draws."""
    returned = case(model, prompts)
    if not isinstance(returned, pb.Result):
        hold(pb.load_knob(returned.save(folder / "a.knob")) == returned, "a saved knob loads as another")
        return
    again = pb.load_result(returned.save(folder / "a"))
    hold(again.equal(returned) and again.provenance == returned.provenance, "a saved Result loads as another")
    if case.second:
        with refused(f"cannot replay: option '{case.second}' held a model"):
            pb.replay(again, model)
    held = "edits" in returned.provenance["model"]
    around = model.edited(pb.scale(pb.Part(1, "attn").port(), 1.0)) if held else nullcontext()
    with around:  # a replay is made under the edits that were in force
        options = {case.second: second} if case.second else None
        replayed = pb.replay(again, model, options=options, method=method)
    hold(replayed and replayed.largest == 0, f"a replay gives other numbers: {replayed}")
    hold(str(returned).startswith(case.method), f"it prints as another method: {str(returned).splitlines()[0]}")
    returned.plot(folder / "a.png")


def says_where_it_came_from(case: Case, model: pb.Model, prompts: pb.Task, function: Any) -> None:
    """Provenance holds method, paper, model, every option, and the prompts; as JSON."""
    held = json.loads(json.dumps(case(model, prompts).provenance))
    found = (held["method"], held["paper"], held["model"]["fingerprint"], held["model"]["family"])
    expected = (case.method, function.paper, model.fingerprint, model.family.name)
    hold(found == expected, f"provenance says {found}, not {expected}")
    missing = options_of(function) - {"model"} - set(held["options"])
    hold(not missing, f"provenance lacks the options {missing}")
    if case.runs:
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
        optional = has_default(parameter) and not may_be_left_out(parameter)
        hold(optional == (parameter.kind is parameter.KEYWORD_ONLY), f"{parameter.name}: options come after *")
        if optional:
            json.dumps(parameter.default)
    hold(len(options_of(function)) <= 6, f"it has {len(options_of(function))} options; at most six")


def an_unknown_option_is_answered(case: Case, model: pb.Model, prompts: pb.Task, function: Any) -> None:
    """An option that there is not is answered with those that there are."""
    with untouched(model, prompts), refused("'zzz'", *sorted(options_of(function))):
        case(model, prompts, zzz=1)


def no_model_is_refused(function: Any, prompts: pb.Task) -> None:
    """What is no model is refused, with how one is made."""
    parameters = inspect.signature(function).parameters
    hold("model" in parameters, "it has no argument `model`")
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.name != "model"]
    with refused("needs a Model from patchbay.load(...), got str"):
        function(model="gpt2", **dict.fromkeys(needed, prompts))


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
