"""Sessions: the taps and edits of one call of a model, from where they are put on to where they are taken away.

A `Session` is told which ports to tap and which edits to make; it puts hooks only on the modules that these need, and takes
every one of them away again, also after an exception. A signal that nobody asked for costs nothing. Where an edit changes a
signal, the model continues from the changed value; a tap sees the signal after the edits, which is what the model used.

At the end of each run a signal that was asked and never passed is an error: what was not reached was neither read nor edited.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.edits.edit import Edit
from patchbay.errors import EditNeverMade
from patchbay.jacks import attention, hooks
from patchbay.jacks.arguments import refuse_checkpoints
from patchbay.jacks.attach import Jacks
from patchbay.jacks.modelled import Modelled as Lent
from patchbay.jacks.place import Place
from patchbay.signal.port import PatchbayError, Port
from patchbay.signal.positions import Batch

__all__ = ["Session", "attention", "refuse_wrapped", "warn_of_no_run"]
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
        noticed = hooks.Notice(self.model.hf, self._count)
        self._undo.append(self.model.hf.register_forward_pre_hook(noticed, with_kwargs=True).remove)
        for module in self.model.around:
            self._undo.append(hooks.before(self.scope, module, self._begin))
        if self.where.watched:
            self._undo.append(hooks.instead(self.scope, self.model.hf, self._generating, "generate"))
        asked: dict[int | None, set[str]] = {}
        for signal, layer in (*self.wants, *self.hosts):
            asked.setdefault(layer, set()).add(signal)
        for signal in sorted(asked.get(None, ())):
            self._attach_whole(signal)
        for layer in sorted(layer for layer in asked if layer is not None):
            self._attach_layer(layer, asked[layer])
        for module in self.model.around:
            self._undo.append(hooks.after(self.scope, module, self._end))
            self._undo.append(hooks.at_last(self.scope, module, self._over))

    def _generating(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`: its prompt is noted, and what drafts touched past its text forgotten."""
        grown = self.where.generating(self.model.hf, inner, *args, **kwargs)
        text = getattr(grown, "sequences", grown)
        if isinstance(text, Tensor) and text.ndim == 2 and "inputs_embeds" not in kwargs:
            self.clip(text.shape[1] - 1)
        return grown

    # ---- one forward ----

    def place(self, batch: Batch, start: int, end: int, column_of: Tensor | None = None) -> None:
        """Say where the tokens that run now stand. Layers that are run one by one say it themselves: that is a run under these edits."""
        self.runs += 1
        super().place(batch, start, end, column_of)

    def _count(self) -> None:
        """Count a run of the model that is not under this session."""
        if not any(scope is self.scope for scope in hooks.open_here()) or not self.scope._reaches():
            self.missed += 1

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the model runs, or a part of it that holds the layers and was called by itself: where these tokens stand."""
        if module is not self.model.hf and self.here.within not in (None, module):
            return  # inside a run that has begun
        self.here.within, self.here.placed, self.here.grad = module, False, torch.is_grad_enabled()
        for scope in hooks.open_here():
            if scope.of is self.scope.of:
                scope.session.runs += 1
        refuse_checkpoints()
        self.here.reached.clear()
        batch, start, end, column_of = self.where.begin(module.forward, args, kwargs, self.model)
        if not start:
            self.here.captured.clear()
        self.here.touched = self.where.touched
        self.clip(start)
        self.place(batch, start, end, column_of)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After the model ran: every signal that was asked has passed."""
        if self.here.within is not module:
            return
        self.where.end(output)
        lost = next((key for key in self.wants if key not in self.here.reached), None)
        if lost is None or not self.must_reach:
            return
        raise PatchbayError(
            f"{Port(*lost)} was never reached: its module was not called in this run (a compiled, traced or fused copy in its "
            "place, a wrapper around it, a layer that is skipped), so nothing was read or edited there. Run the model's own "
            "modules; `patchbay check` shows which ports it has"
        )

    def _over(self, module: nn.Module, *_: Any) -> None:
        if self.here.within is module:
            self.here.within, self.here.placed = None, False


def refuse_wrapped(hf: nn.Module) -> None:
    """Raise PatchbayError for a model whose modules are not called as they are, by the name of what is around it."""
    found = next((kind.__name__ for kind in type(hf).__mro__ if kind.__name__ in WRAPPERS), None)
    if found is not None:
        raise PatchbayError(
            f"the model is wrapped as {found}: its modules are not called as they stand (sharded, copied or traced); "
            "load the Hugging Face model that was wrapped, for example model.module"
        )


def warn_of_no_run(session: Session) -> None:
    """Say of a block of edits that has ended that the model did not run in it."""
    if session.edits and not (session.runs or session.missed):
        warnings.warn(
            f"{session.edits[0]} was never made: the model did not run while this block was open. Edits act on runs of model.hf, "
            "not on its weights, nor on what was copied, traced, scripted or exported from it",
            EditNeverMade,
            stacklevel=4,
        )
