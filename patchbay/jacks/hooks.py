"""Hooks that know whose call they are in: any number of threads, coroutines and generators run one model, each under its own.

A session belongs to the code that opened it. Which sessions are open is a context variable, so that threads and tasks have
their own; a task that is made inside a block, or `asyncio.to_thread`, inherits what is open there, a bare `threading.Thread`
does not (give it `contextvars.copy_context().run`). Generators share the context of those who iterate them: a session that a
generator opened acts while that generator is on the stack, and rests while it is suspended, also for tasks that its caller makes then.
A generator that contextlib (or pytest) drives as a context manager stands for its user.

Every session has its own hooks, and each does nothing in a call that is not its session's. What a model has once only, a
module's `forward` and the name of its attention function, is shared: put there by the first session that needs it, taken away
by the last, and what runs is that of the session in whose call it is.
"""

from __future__ import annotations

import dis
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from functools import partial
from types import FrameType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.errors import PatchbayError
from patchbay.jacks.defaults import own_device

LOCK = threading.RLock()  # around what is shared by all sessions
_PAUSES = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE | inspect.CO_ASYNC_GENERATOR
_DRIVERS = ("contextlib", "_pytest.fixtures")  # they run a generator to its yield, and the block after it is its user's


class Scope:
    """Where something acts: in the code that opened it, and in what that calls. `whole`: among those of one model the
    innermost alone acts (it has taken over what the outer ones do); others act beside them."""

    def __init__(self, of: Any, *, whole: bool) -> None:
        self.of, self.whole = of, whole
        self.closed = True
        self.session: Any = None  # what acts in it
        self._owner: FrameType | None = None
        self._token: Token[None] | None = None

    def open(self) -> None:
        self.closed, self._owner = False, _pausing(sys._getframe(1))
        self._token = _HERE.set(None) if self._owner is not None else None
        _OPEN.set((*(scope for scope in _OPEN.get() if not scope.closed), self))

    def close(self) -> None:
        self.closed, self._owner = True, None
        _OPEN.set(tuple(scope for scope in _OPEN.get() if not scope.closed))

    @property
    def acts(self) -> bool:
        """Whether the code that runs now is under this scope."""
        for scope in reversed(_OPEN.get()):
            if scope is self:
                return self._reaches()
            if self.whole and scope.whole and scope.of is self.of and scope._reaches():
                return False
        return False

    def _reaches(self) -> bool:
        if self.closed or self._owner is None:
            return not self.closed
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is self._owner:
                return True
            frame = frame.f_back
        return self._elsewhere()

    def _elsewhere(self) -> bool:
        """Whether this context is another than the one that opened the scope, and was made inside it: a task or a thread.

        One that was made while a generator rests has a copy of the context too, and is its caller's. Which it was is asked at its
        first run, and then kept.
        """
        assert self._token is not None
        assert self._owner is not None
        try:
            _HERE.reset(self._token)
        except ValueError:
            judged = _JUDGED.get()
            if self not in judged:
                judged = {scope: found for scope, found in judged.items() if not scope.closed} | {
                    self: not rests(self._owner)
                }
                _JUDGED.set(judged)
            return judged[self]
        self._token = _HERE.set(None)
        return False


_OPEN: ContextVar[tuple[Scope, ...]] = ContextVar("patchbay_open", default=())
_HERE: ContextVar[None] = ContextVar("patchbay_here", default=None)
_JUDGED: ContextVar[dict[Scope, bool]] = ContextVar("patchbay_judged", default={})  # noqa: B039  never changed in place


def innermost(of: Any) -> Scope | None:
    """The whole scope of a model that acts here, None without one."""
    return next((s for s in reversed(_OPEN.get()) if s.whole and s.of is of and s._reaches()), None)


def open_here() -> tuple[Scope, ...]:
    return _OPEN.get()


def _pausing(frame: FrameType | None) -> FrameType | None:
    """The generator or coroutine nearest on the stack that may be suspended while what it opened stays open."""
    while frame is not None:
        by = frame.f_back
        driven = by is not None and by.f_globals.get("__name__") in _DRIVERS
        if (
            frame.f_code.co_flags & _PAUSES
            and not driven
            and frame.f_globals.get("__name__") not in (__name__, *_DRIVERS)
        ):
            return frame
        frame = by
    return None


def rests(frame: FrameType) -> bool:
    """Whether this is a generator that is suspended at a yield of its own, and not one that runs or awaits."""
    if frame.f_back is not None or not frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
        return False
    if frame.f_code.co_flags & inspect.CO_GENERATOR:
        return not frame.f_code.co_flags & inspect.CO_ITERABLE_COROUTINE
    resumes = (i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti and i.opname == "RESUME")
    found = next(resumes, None)
    return found is not None and (found.arg or 0) & 3 == 1  # 1 after a yield, 3 after an await


class Hook:
    """A hook of one scope on one module: silent in calls of others, and on copies of the module."""

    def __init__(self, scope: Scope, module: nn.Module, function: Callable[..., Any]) -> None:
        self.scope, self.module, self.function = scope, module, function

    def __call__(self, module: nn.Module, *rest: Any) -> Any:
        if module is not self.module or not self.scope.acts:
            return None
        with own_device():
            return self.function(module, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _nothing, ()


class Notice(Hook):
    """Told of every call of a module, whoever makes it. Replicas (`DataParallel`) keep the hooks of what they stand for and run in
    threads of their own, under no block: they are refused."""

    def __init__(self, module: nn.Module, function: Callable[[], None]) -> None:
        self.module, self.function = module, function

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if getattr(module, "_is_replica", False):
            raise PatchbayError(
                f"a replica of {type(self.module).__name__} ran (DataParallel) while the model has taps or edits, which replicas do not "
                "have; call the model itself"
            )
        if module is self.module:
            self.function()


def nothing(*_: Any) -> None:
    """What stands for a hook in a copy of a model."""


def _nothing() -> Callable[..., None]:
    """What a pickled hook is loaded as."""
    return nothing


def before(scope: Scope, module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    with LOCK:
        return _removed(module.register_forward_pre_hook(Hook(scope, module, function), with_kwargs=True))


def at_last(scope: Scope, module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """After a call of the module, also where it failed."""
    with LOCK:
        return _removed(module.register_forward_hook(Hook(scope, module, function), with_kwargs=True, always_call=True))


def after(scope: Scope, module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """After others' hooks, whose changes the model uses, and before those with which transformers records outputs."""
    with LOCK:
        remove = _removed(module.register_forward_hook(Hook(scope, module, function), with_kwargs=True))
        for key, hook in list(module._forward_hooks.items()):
            if str(getattr(hook, "__module__", "")).startswith("transformers."):
                module._forward_hooks.move_to_end(key)
    return remove


@contextmanager
def watched(hf: nn.Module, modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[tuple[Any, Any]]]]:
    """What modules are given and return, first of several, call by call, for the length of the block: tensors, or None."""
    calls: dict[nn.Module, list[tuple[Any, Any]]] = {}
    scope = Scope(hf, whole=False)

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        found = output[0] if isinstance(output, tuple | list) else output
        if isinstance(found, Tensor):
            calls.setdefault(module, []).append((given if isinstance(given, Tensor) else None, found))

    undo: list[Callable[[], Any]] = []
    try:
        scope.open()
        undo += [after(scope, module, note) for module in dict.fromkeys(modules)]
        yield calls
    finally:
        scope.close()
        for one in undo:
            one()


def _removed(handle: Any) -> Callable[[], None]:
    """Take a hook away under the lock: who holds it, to copy a model, meets no change of its hooks."""

    def remove() -> None:
        with LOCK:
            handle.remove()

    return remove


class Instead:
    """Stands in a module's attribute while sessions replace it: runs the function of the one that acts here, else what was there."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.had = module.__dict__.get(name)
        self.inner = getattr(module, name)
        self.by: dict[Scope, Callable[..., Any]] = {}
        self.__wrapped__ = self.inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for scope, function in reversed(list(self.by.items())):
            if scope.acts:
                return function(*args, **kwargs)
        return self.inner(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """In a copy of the module: the copy's own."""
        return _own_method(memo.get(id(self.module), self.module), self.name)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[nn.Module, str]]:
        return _own_method, (self.module, self.name)


def _own_method(module: nn.Module, name: str) -> MethodType:
    return MethodType(getattr(type(module), name), module)


def instead(scope: Scope, module: nn.Module, function: Callable[..., Any], name: str = "forward") -> Callable[[], None]:
    """Let `function(inner, *args)` run in place of a module's `forward` (or another method), which is `inner`."""
    with LOCK:
        standing = module.__dict__.get(name)
        if not isinstance(standing, Instead):
            standing = Instead(module, name)
            setattr(module, name, standing)
        standing.by[scope] = partial(function, standing.by.get(scope, standing.inner))

    def undo(stands: Instead = standing) -> None:
        with LOCK:
            stands.by.pop(scope, None)
            if stands.by or module.__dict__.get(name) is not stands:
                return
            if stands.had is None:
                delattr(module, name)
            else:
                setattr(module, name, stands.had)

    return undo


class Uncompiled:
    """While it is held, compiled code is not used: compilers do not look at hooks. Held by all sessions together."""

    def __init__(self) -> None:
        self.held, self.stance = 0, None

    def hold(self) -> Callable[[], None]:
        with LOCK:
            if not self.held:
                self.stance = torch.compiler.set_stance("force_eager")
            self.held += 1
        return self._release

    def _release(self) -> None:
        with LOCK:
            self.held -= 1
            if not self.held and self.stance is not None:
                self.stance.__exit__(None, None, None)
                self.stance = None


uncompiled: Any = Uncompiled()
