"""One run on Hugging Face's Trainer: the same weights from the same plan, also when it was killed and goes on.

The Trainer (accelerate) brings devices, several processes and FSDP; rows, their order and the loss are the lab's. Processes take equal parts of the rows of a step, and its loss
is over the tokens of all of them, so that any number of processes makes the steps of one. The model trains without
dropout, at a constant rate, with gradients clipped to norm 1; the guides of guided maps have left in the end (`blocks.structured`). A checkpoint counts once `whole.json` lies in it, which is written last; a
run goes on from the last that does, and what was half written is removed. Nothing of a run is drawn from global random states.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from patchbay.blocks.structured import guide_share, guided, set_share
from patchbay.files import reason, write_file
from patchbay.model.model import Model
from patchbay.model.source import quietly
from patchbay.results.method import seeded
from patchbay.signal.port import PatchbayError
from patchbay.sweeps.settings import SETTINGS
from patchbay.train import _together
from patchbay.train._objectives._objective import IGNORED, collated, learned
from patchbay.train._optimizers import learns, optimizer
from patchbay.train._plan import Arm, Plan, Rows
from patchbay.train._states import held
from patchbay.train._windows import backward, prove

CLIP = 1.0  # the norm that gradients are clipped to
WHOLE = "whole.json"


Watch = tuple[int, Callable[[Model], Any]]  # every so many steps, what is read of the model as JSON can hold it


class Trained(NamedTuple):
    """The loss of every step, what was watched, and the bytes of the optimizer's state in the end."""

    losses: list[float]
    seen: list[Any]
    state: int


def trained(
    model: Model, rows: Rows, arm: Arm, plan: Plan, place: Path, *, keep: bool, watch: Watch | None = None
) -> Trained:
    """Train the model in place by the plan; what is watched is read before every so many steps.

    With `keep`, checkpoints go to `place` and a run that is there goes on.
    """
    hf = model.hf
    if plan.steps == 0:
        return Trained([], [], 0)
    last = _last_whole(place) if keep else None
    told = {} if last is None else json.loads((last / WHOLE).read_text(encoding="utf-8"))
    losses, seen = told.get("losses", []), told.get("seen", [])
    cached = getattr(hf.config, "use_cache", None)
    learn = learns(arm.optimizer, model)
    moved = {id(one) for one in learn}
    for p in hf.parameters():
        p.requires_grad_(id(p) in moved)
    try:
        with memory_named(place if keep else None), disk_named(place), quietly():
            trainer = _trainer(model, rows, arm, plan, place, keep, losses, seen)
            trainer.watch = watch
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
            for one in trainer.guided:  # from a share above 0 on to none
                set_share(one, 0.0)
    finally:
        for one in learn:
            one.grad = None
            one.requires_grad_(False)
        hf.config.use_cache = cached
        hf.eval()
    if not all(bool(one.isfinite().all()) for one in learn):
        raise PatchbayError(
            f"the weights are no longer finite after {plan.steps} steps at rate {plan.rate}: lower the rate"
        )
    return Trained([float(loss) for loss in losses], seen, held(trainer.optimizer))


@contextlib.contextmanager
def memory_named(kept: Path | None) -> Iterator[None]:
    """Say in a sentence that memory ran out, and what is kept; `kept`: where checkpoints go, None where none do."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not memory:
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise PatchbayError(
            f"memory ran out while training ({why}); {_left(kept)}. Give a smaller batch_size or length"
        ) from error


@contextlib.contextmanager
def disk_named(place: Path) -> Iterator[None]:
    """Say in a sentence that a checkpoint could not be written, and what is kept."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save's writer
            raise
        why = "the file could not be written whole" if isinstance(error, RuntimeError) else reason(error)
        raise PatchbayError(
            f"could not write a checkpoint to {place}: {why}; {_left(place)}. Make room there, or give another folder"
        ) from error


def _left(kept: Path | None) -> str:
    """What of a run that failed is kept; what was half written goes, and leaves its room."""
    last = None if kept is None else _last_whole(kept)
    return "nothing of this run is kept" if last is None else f"{last} is kept, and the same call goes on from it"


def _last_whole(place: Path) -> Path | None:
    """The last checkpoint that was written to its end; those that were not are removed."""
    found = []
    for folder in place.glob("checkpoint-*"):
        if (folder / WHOLE).is_file():
            found.append(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # another process may be at it
    return max(found, key=lambda folder: int(folder.name.partition("-")[2]), default=None)


def _trainer(
    model: Model, rows: Rows, arm: Arm, plan: Plan, place: Path, keep: bool, losses: list[Any], seen: list[Any]
) -> Any:
    try:
        from transformers import TrainingArguments
        from transformers.trainer_callback import PrinterCallback, TrainerCallback

        with seeded(0):
            every = plan.every or max(1, -(-plan.steps // 4))
            arguments = TrainingArguments(
                output_dir=str(place), max_steps=plan.steps, per_device_train_batch_size=plan.batch_size,
                learning_rate=plan.rate, weight_decay=plan.decay, lr_scheduler_type="constant", max_grad_norm=CLIP, optim="adamw_torch",
                save_strategy="steps" if keep else "no", save_steps=every, logging_strategy="no", report_to="none",
                disable_tqdm=True, remove_unused_columns=False, use_cpu=model.device.type == "cpu",
            )  # fmt: skip
    except ImportError as error:
        raise PatchbayError(
            f"training runs on accelerate, which is not installed: pip install 'patchbay-lm[train]' ({error})"
        ) from error

    class Whole(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                told = json.dumps({"step": state.global_step, "losses": [float(one) for one in losses], "seen": seen})
                here = place / f"checkpoint-{state.global_step}"
                write_file(here / WHOLE, told.encode())
                for older in place.glob("checkpoint-*"):
                    if older != here:
                        shutil.rmtree(older)

    if plan.batch_size % arguments.world_size:
        raise PatchbayError(
            f"batch_size={plan.batch_size} over {arguments.world_size} processes: give a multiple of their number"
        )
    if arguments.world_size > 1 and rows.objective.alone:
        raise PatchbayError(
            f"{arm.objective}: {rows.objective.alone}, and there are {arguments.world_size} processes: train it in one"
        )
    arguments.per_device_train_batch_size = plan.batch_size // arguments.world_size
    if plan.window:
        prove(model, rows.objective, arguments.world_size)
    made = optimizer(arm.optimizer, model, rows.seed)
    with seeded(0):
        found = _class()(
            model=model.hf, args=arguments, train_dataset=rows, data_collator=collated, callbacks=[Whole()],
            optimizer_cls_and_kwargs=None if made is None else (made[0], {"lr": plan.rate, **made[1]}),
        )  # fmt: skip
    cut = [name for name in ("FSDP", "DeepSpeed") if getattr(found, f"is_{name.lower()}_enabled", False)]
    if made is not None and cut:  # all but AdamW, which takes each number by itself
        raise PatchbayError(
            f"optimizer {arm.optimizer!r} steps by whole matrices, which {cut[0]} cuts into shards: train without {cut[0]}, or with adamw"
        )
    found.remove_callback(PrinterCallback)
    found.view, found.rows, found.losses, found.seen, found.guided = model, rows, losses, seen, guided(model.hf)
    return found


def _class() -> Any:
    from transformers import Trainer

    class Lab(Trainer):  # type: ignore[misc]
        """The Trainer with the lab's rows in their order, its loss, and no use of global random states."""

        view: Model
        rows: Rows
        losses: list[Any]
        seen: list[Any]
        guided: list[nn.Module]
        watch: Watch | None

        def get_train_dataloader(self) -> Any:
            loader = torch.utils.data.DataLoader(
                self.train_dataset,
                batch_size=self._train_batch_size,
                collate_fn=self.data_collator,
                generator=torch.Generator(),
            )
            return self.accelerator.prepare(loader)

        def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
            model.eval()
            SETTINGS.get().far(len(self.losses), self.rows.plan.steps)
            for one in self.guided:
                set_share(one, guide_share(len(self.losses), self.rows.plan.steps))
            if self.watch is not None and len(self.losses) % self.watch[0] == 0:
                self.seen.append(self.watch[1](self.view))
            batch = self._prepare_inputs(inputs)
            n = learned(batch["labels"])
            if (n_processes := _together.world()[1]) > 1:
                # gradients are meant over processes: over the mean count they are those of all tokens
                n = (batch["labels"][:, 1:] != IGNORED).sum().float()
                _together.mean(n)
                n.clamp_min_(1.0 / n_processes)
            if self.rows.plan.window:
                whole = backward(model, batch, n, self.rows.plan.window, self.accelerator.backward)
                self.losses.append(whole)
                return whole
            with self.compute_loss_context_manager():
                loss = self.rows.objective.loss(self.view, model, batch, n)
            self.accelerator.backward(loss)
            told = loss.detach().clone()
            _together.mean(told)
            self.losses.append(told)
            return told

        def _save_rng_state(self, output_dir: str) -> None:
            pass

        def _load_rng_state(self, checkpoint: str | None) -> None:
            pass

    return Lab
