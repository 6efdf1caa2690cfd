"""Sessions: the taps and edits of one call of a model, from where they are put on to where they are taken away.

A `Session` is told which ports to tap and which edits to make; it puts hooks only on the modules that these need, and takes
every one of them away again, also after an exception. A signal that nobody asked for costs nothing. Where an edit changes a
signal, the model continues from the changed value; a tap sees the signal after the edits, which is what the model used.

At the end of each run a signal that was asked and never passed is an error: what was not reached was neither read nor edited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.edits.edit import Edit
from patchbay.jacks import attention, hooks
from patchbay.jacks.attach import Jacks
from patchbay.jacks.modelled import Modelled as Lent
from patchbay.jacks.place import Place
from patchbay.signal.port import PatchbayError, Port

__all__ = ["Session", "attention", "refuse_wrapped"]
WRAPPERS = (
    "FullyShardedDataParallel",
    "FSDPModule",
    "DeepSpeedEngine",
    "DistributedDataParallel",
    "DataParallel",
    "ScriptModule",
    "GraphModule",
)


class Session(Jacks):
    """Taps and edits attached to one model for the length of a `with` block. `captured` holds what the taps saw in the
    last call of the model; `pb.run(..., max_new_tokens=n)` has all tokens of a generation.

    `whole`: it has taken over the edits of the blocks around it, which rest meanwhile. `lengths`: real tokens of each prompt of
    a batch padded on the right without a mask. `prompt_length`: where the prompt ends, for those whose tokens arrive in several
    calls; `prompt_lengths`: after how many of its tokens each prompt of such a batch ends, where generated ones follow.
    `must_reach`: a signal that does not pass is an error.
    """

    def __init__(
        self,
        model: Lent,
        taps: Sequence[Port] = (),
        edits: Sequence[Edit] = (),
        *,
        lengths: Tensor | None = None,
        prompt_length: int | None = None,
        prompt_lengths: Tensor | None = None,
        grad: bool = False,
        whole: bool = False,
        must_reach: bool = True,
    ) -> None:
        super().__init__(model, taps, edits, grad=grad)
        self.scope = hooks.Scope(model.hf, whole=whole)
        self.scope.session = self
        self.where = Place(self.edits, lengths, prompt_length, prompt_lengths)
        self.must_reach = must_reach
        self.runs = self.missed = 0  # under these edits, and of the same model under none of ours
        self._undo: list[Callable[[], Any]] = []

    def __enter__(self) -> Session:
        refuse_wrapped(self.model.hf)
        try:
            self.scope.open()
            self._attach()
        except BaseException:
            self.detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
        outer = hooks.innermost(self.model.hf)
        if outer is not None:  # its edits are the first of these
            outer.session.here.batch, outer.session.here.touched = (
                self.here.batch,
                {i: list(notes) for i, notes in self.here.touched.items()},
            )
        if kind is None and self.edits and self.missed and not self.runs:
            raise PatchbayError(
                f"{self.edits[0]} was never made: the model ran {self.missed} times while this block was open, in threads or "
                "generators that are not under it. Run it in the block, or start the thread with contextvars.copy_context().run"
            )

    def detach(self) -> None:
        self.scope.close()
        while self._undo:
            self._undo.pop()()

    def _attach(self) -> None:
        if not self.wants:
            return
        self._undo.append(hooks.uncompiled.hold())
        self._undo.append(self.model.hf.register_forward_pre_hook(self._notice, with_kwargs=True).remove)
        self._before(self.model.hf, self._begin)
        if self.where.positioned:
            self._undo.append(hooks.instead(self.scope, self.model.hf, self.where.generating, "generate"))
        asked: dict[int | None, set[str]] = {}
        for signal, layer in self.wants:
            asked.setdefault(layer, set()).add(signal)
        for signal in sorted(asked.get(None, ())):
            self._attach_whole(signal)
        for layer in sorted(layer for layer in asked if layer is not None):
            self._attach_layer(layer, asked[layer])
        self._after(self.model.hf, self._end)

    # ---- one forward ----

    @property
    def _notice(self) -> Callable[..., None]:
        """Counts the runs of the model that are not under this session; a copy of the model has a hook that does nothing."""
        return hooks.Hook(_Everywhere(), self.model.hf, self._count)  # type: ignore[arg-type]

    def _count(self, *_: Any) -> None:
        if not any(scope is self.scope for scope in hooks.open_here()) or not self.scope._reaches():
            self.missed += 1

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the model runs: where this chunk of tokens stands in its sequences."""
        for scope in hooks.open_here():
            if scope.of is self.scope.of:
                scope.session.runs += 1
        if torch.is_grad_enabled() and any(_checkpointed(at.layer) for at in self.model.modules):
            raise PatchbayError(
                "gradient checkpointing is on: layers run again in the backward pass, after the edits are gone; "
                "model.hf.gradient_checkpointing_disable(), or run in model.hf.eval()"
            )
        self.here.reached.clear()
        batch, start, end, column_of = self.where.begin(args, kwargs, self.model)
        if not start:
            self.here.captured.clear()
            self.here.touched.clear()
        self.place(batch, start, end, column_of)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After the model ran: every signal that was asked has passed."""
        self.where.end(output)
        lost = next((key for key in self.wants if key not in self.here.reached), None)
        if lost is None or not self.must_reach:
            return
        raise PatchbayError(
            f"{Port(*lost)} was never reached: its module was not called in this run (a compiled, traced or fused copy in its "
            "place, a wrapper around it, a layer that is skipped), so nothing was read or edited there. Run the model's own "
            "modules; `patchbay check` shows which ports it has"
        )


class _Everywhere:
    acts = True


def _checkpointed(layer: nn.Module) -> bool:
    return layer.training and bool(getattr(layer, "gradient_checkpointing", False))


def refuse_wrapped(hf: nn.Module) -> None:
    """Raise PatchbayError for a model whose modules are not called as they are, by the name of what is around it."""
    found = next((kind.__name__ for kind in type(hf).__mro__ if kind.__name__ in WRAPPERS), None)
    if found is not None:
        raise PatchbayError(
            f"the model is wrapped as {found}: its modules are not called as they stand (sharded, copied or traced); "
            "use Patchbay on the Hugging Face model before it is wrapped"
        )
