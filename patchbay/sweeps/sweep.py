"""Sweeps: the effect of many edits on a task's metric, exact, in a fraction of one forward pass per edit.

`sweep(model, task, edits)` gives one number for every edit (or set of edits made together) and prompt: what the metric would
be if the model were run with that edit on that prompt. It is computed by the restarted walk of `walk.py`, a whole list of
mixed edits as one growing batch; where a model's layers carry a state and cannot restart, whole runs are batched instead and the
result says so. Work goes in batches that fit a memory budget; with a folder, each batch is kept as it ends, and the same call
goes on where an earlier one stopped. Cost: with C edits over L layers and T positions, about half of C forwards for edits
spread over layers at one position, a quarter when spread over positions too, and no full unembedding.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbay.edits.apply import acts_on, for_prompts
from patchbay.edits.edit import Edit, conditional, pack
from patchbay.errors import by_kind
from patchbay.jacks.defaults import on_own_device, refuse_other_dtype
from patchbay.model.given import flat_edits
from patchbay.model.model import Model
from patchbay.results.record import model_record, now, task_record, versions
from patchbay.results.result import Result
from patchbay.signal.port import HOMES, PatchbayError, Port
from patchbay.signal.positions import Batch
from patchbay.sweeps import ray_executor
from patchbay.sweeps.batch import by_walk, by_whole_runs
from patchbay.sweeps.calls import Base
from patchbay.sweeps.difference import Difference
from patchbay.sweeps.joins import Joins
from patchbay.sweeps.kept import Kept
from patchbay.sweeps.plan import Cell, Touched, changed_by, plan, spanning
from patchbay.sweeps.ranking import effects, ranking
from patchbay.sweeps.restart import base_run
from patchbay.sweeps.scorer import Metric, Scorer
from patchbay.sweeps.settings import SETTINGS, Estimate, in_notebook
from patchbay.sweeps.whole_answers import sweep_answers
from patchbay.tasks.task import Task

PRECISIONS = ("fp32", "bf16", "delta-bf16")


@by_kind
@on_own_device
def sweep(
    model: Model,
    task: Task | Any,
    edits: Sequence[Edit | Sequence[Edit]],
    metric: str | Metric | None = None,
    *,
    on: str = "clean",
    folder: str | Path | None = None,
    memory: int | None = None,
    precision: str = "fp32",
    executor: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """The metric under each edit, on each prompt: a Result with `value` [edit, prompt] and `base` [prompt], in the metric's unit.

    `edits`: each entry an Edit, a knob, or several made together. `metric`: one of the task's (default: its own) or a function of
    (logits [row, vocab] at the last position, prompt index of each row), which may name the `tokens` that it reads, or ask for all
    `positions` (see `tasks.scoring.Metric`). Answers of several tokens are scored whole. `on`: run the task's "clean" prompts or its "corrupted"
    twins. `memory`: bytes that rows and working space may take (2 GB). `folder`: keep finished batches there and resume from them.
    `precision="bf16"` runs the walk under autocast, "delta-bf16" only what differs from the base run: faster and inexact, with
    the error on a sample in the notes. `executor="ray"` spreads batches over `workers`. `progress(done, total)` is told of cells as they end.
    """
    refuse_other_dtype("sweep")
    running: dict[str, Any] = {"folder": folder, "executor": executor, "workers": workers, "progress": progress}
    if isinstance(task, Task) and task.answers and not callable(metric):
        if folder is not None:
            raise PatchbayError(
                "a sweep over answers of several tokens is several sweeps: leave folder out, or use task.steps()"
            )
        task = task if metric is None else task.with_metric(metric)

        def one(part: Task, entries: Sequence[Any]) -> Result:
            return Sweep(model, part, entries, memory=memory, precision=precision).run(**running)

        return sweep_answers(model, task, edits, on, one)
    return Sweep(model, task, edits, metric, on=on, memory=memory, precision=precision).run(**running)


@on_own_device
def estimate(model: Model, task: Task | Any, edits: Sequence[Any], metric: Any = None, **options: Any) -> Estimate:
    """The cost of `sweep` with these arguments, by counting, and by timing one small layer call."""
    return Sweep(model, task, edits, metric, **options).estimate()


@dataclass
class Ready:
    """What the batches of one group of prompts start from."""

    base: Base
    prompts: Tensor  # their places among all prompts
    base_values: Tensor  # [prompt]
    batches: list[list[Cell]]


class Sweep:
    """A planned sweep: prompts in groups of one length, cells in batches that fit the memory."""

    def __init__(
        self,
        model: Model,
        task: Task | Any,
        edits: Sequence[Any],
        metric: str | Metric | None = None,
        *,
        on: str = "clean",
        memory: int | None = None,
        precision: str = "fp32",
    ) -> None:
        if model._session is not None:
            raise PatchbayError(
                "a sweep inside model.edited(...): put those edits into each entry of the sweep instead"
            )
        if precision not in PRECISIONS:
            raise PatchbayError(f"precision {precision!r}; possible are {', '.join(PRECISIONS)}")
        self.model, self.task, self.precision, self.on = model, task, precision, on
        self.memory = SETTINGS.get().memory if memory is None else memory
        self.pieces = SETTINGS.get().pieces
        if not isinstance(edits, Iterable):
            raise PatchbayError(f"a sweep takes a list of edits, knobs and lists of them, got {type(edits).__name__}")
        self.cells_edits = [tuple(flat_edits([entry], model=model)) for entry in edits]
        if not self.cells_edits or not all(self.cells_edits):
            raise PatchbayError(
                "a sweep needs at least one edit in every entry, got " + ("an empty entry" if edits else "none")
            )
        for edit in (edit for entry in self.cells_edits for edit in entry):
            model.require(edit.port)
        self.prompts = model.encode(task.prompts(on) if isinstance(task, Task) else task)
        self.scorer = Scorer(model, task if isinstance(task, Task) else None, metric)
        lengths = sorted({len(ids) for ids in self.prompts})
        self.groups = [[i for i, ids in enumerate(self.prompts) if len(ids) == length] for length in lengths]
        if len(lengths) > 1:
            self._check_edits()
        self.notes: set[str] = set()
        self._ready: tuple[int, Ready] | None = None
        self._held: Difference | None = None

    # ---- planning ----

    def _ids(self, group: Sequence[int]) -> Tensor:
        return torch.tensor([self.prompts[i] for i in group], device=self.model.device)

    def _check_edits(self) -> None:
        """Refuse edits that fit no prompt, with places counted over all of them; a group of prompts sees its share alone."""
        lengths = torch.tensor([len(ids) for ids in self.prompts])
        ids = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in self.prompts])
        batch = Batch(ids, lengths, lengths, self.model)
        for edit in (edit for entry in self.cells_edits for edit in entry):
            if not bool(acts_on(edit, batch).any()):
                raise PatchbayError(f"{edit} touches nothing: no prompt has such a position")

    def _cells(self, number: int, halves: bool, narrow: bool = False) -> list[Cell]:
        """The cells of a group of prompts, by where they start; those that do nothing to any of its prompts are left out."""
        ids = self._ids(self.groups[number])
        lengths = torch.full((len(ids),), ids.shape[1])
        batch = Batch(ids, lengths, lengths, self.model)
        entries = [self._acting(entry, number, batch) for entry in self.cells_edits]
        touched = Touched(batch)
        cells = [plan(self.model, i, edits, touched, halves, narrow) for i, edits in enumerate(entries) if edits]
        return sorted(cells, key=lambda cell: cell.key)

    def _acting(self, entry: tuple[Edit, ...], number: int, batch: Batch) -> tuple[Edit, ...]:
        """The edits of an entry as they act on a group of prompts; without those that do nothing to any of them."""
        if len(self.groups) == 1:
            return entry
        shares = (for_prompts(edit, self.groups[number], len(self.prompts), batch.ids.shape[1]) for edit in entry)
        return tuple(edit for edit in shares if edit is not None and bool(acts_on(edit, batch).any()))

    def _batches(self, cells: Sequence[Cell], ids: Tensor) -> list[list[Cell]]:
        """Cells in order, split where the rows' streams and the working space would outgrow the memory."""
        each = [self._row_bytes(ids.shape[1] - cell.start) * len(ids) for cell in cells]
        work = self._row_bytes(1) * 2048 * 8
        room = self.memory - work
        if max(each, default=0) > room:
            raise PatchbayError(
                f"memory={self.memory:,} bytes cannot hold one cell: working space takes {work:,}, the largest cell "
                f"{max(each):,} ({len(ids)} prompts of {ids.shape[1]} tokens)"
            )
        room = min(room, max(max(each, default=0), sum(each) // self.pieces)) if self.pieces > 1 else room
        out: list[list[Cell]] = [[]] if cells else []
        held = 0
        for cell, size in zip(cells, each, strict=True):
            if held + size > room:
                out.append([])
                held = 0
            out[-1].append(cell)
            held += size
        return out

    def _row_bytes(self, n_positions: int) -> int:
        return 3 * n_positions * self.model.d_model * torch.empty(0, dtype=self.model.dtype).element_size()

    def _signals(self) -> list[Port]:
        wanted = {edit.port for entry in self.cells_edits for edit in entry}
        names = {(port.signal if port.signal != "attn.head_out" else "attn.z", port.layer) for port in wanted}
        names |= {(changed_by(self.model, port), port.layer) for port in wanted}
        starts = ("attn.z", "mlp.act", "mlp.out", *(f"{home}.act" for home in HOMES))
        return [Port(signal, layer) for signal, layer in sorted(names, key=str) if signal in starts]

    def estimate(self) -> Estimate:
        per_layer = sum(p.numel() for p in self.model.modules[0].layer.parameters())
        rows, tokens, peak = 0, 0, 0
        for number, group in enumerate(self.groups):
            ids = self._ids(group)
            for cell in self._cells(number, True):
                rows += len(ids)
                tokens += len(ids) * (ids.shape[1] - cell.start) * (self.model.n_layers - cell.layer)
                peak += self._row_bytes(ids.shape[1] - cell.start) * len(ids)
        flops = 2.0 * per_layer * tokens
        work = self._row_bytes(1) * 2048 * 8
        return Estimate(rows, flops, min(peak + work, self.memory), flops / self._rate(per_layer))

    @torch.no_grad()
    def _rate(self, per_layer: int) -> float:
        """Floating-point operations a second of a matrix product of the layers' shape, from a short calibration."""
        d = self.model.d_model
        a, b = (torch.randn(n, d, device=self.model.device, dtype=self.model.dtype) for n in (512, 4 * d))
        a @ b.T
        began = time.perf_counter()
        (a @ b.T).sum().item()
        return 2.0 * 512 * 4 * d * d / (time.perf_counter() - began)

    # ---- running ----

    def run(
        self,
        *,
        folder: str | Path | None = None,
        executor: str | None = None,
        workers: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Result:
        usual, start = SETTINGS.get(), time.perf_counter()
        executor, workers = executor or usual.executor, workers or usual.workers
        progress = progress or (usual.far if usual.progress else in_notebook()) or (lambda done, total: None)
        if folder is None and usual.folder is not None:
            folder = Path(usual.folder) / self.digest()[:16]
        usual.cost(self.estimate)
        if executor not in ("local", "ray"):
            raise PatchbayError(f"executor {executor!r}; possible are 'local' and 'ray'")
        kept = Kept(folder, self.digest()) if folder is not None else None
        values = torch.full((len(self.cells_edits), len(self.prompts)), float("nan"))
        base = torch.full((len(self.prompts),), float("nan"))
        ended = torch.zeros_like(values, dtype=torch.bool)
        done, total = 0, len(self.cells_edits) * len(self.groups)
        for number, group in enumerate(self.groups):
            ready = self.ready(number)
            base[group] = ready.base_values
            values[:, group] = ready.base_values  # of cells that do nothing to these prompts
            idle = torch.ones(len(values), dtype=torch.bool)
            idle[[cell.index for batch in ready.batches for cell in batch]] = False
            ended[:, group] = idle[:, None]
            done += len(self.cells_edits) - sum(map(len, ready.batches))
            for place, block in self._blocks(number, kept, executor, workers):
                cells = torch.tensor([cell.index for cell in ready.batches[place]])
                values[cells[:, None], torch.tensor(group)[None, :]] = block
                ended[cells[:, None], torch.tensor(group)[None, :]] = True
                done += len(cells)
                if usual.partial is not None:
                    so_far = torch.where(ended, values - base, torch.nan).nanmean(1)
                    usual.partial(self.cells_edits, so_far, self.scorer.unit)
                progress(done, total)
            if ready.base.refusal is not None:
                self.notes.add(f"whole runs, batched: {ready.base.refusal}")
        if self.precision != "fp32":
            self.notes.add(self._inexact(values))
        return self._result(values, base, time.perf_counter() - start)

    def _result(self, values: Tensor, base: Tensor, seconds: float) -> Result:
        """What `sweep` returns, with what it was made of."""
        unit = self.scorer.unit
        names = [" + ".join(map(str, entry)) for entry in self.cells_edits]
        result = Result(
            {
                "value": (values, ("edit", "prompt"), unit),
                "base": (base, ("prompt",), unit),
                "effect": (effects(values, base), ("edit",), unit),
            },
            coords={"edit": names},
            tables={"effects": ranking(values, base, names)},
            notes=sorted(self.notes),
        )
        prompts = self.task if isinstance(self.task, Task) else self.prompts
        result.provenance |= {
            "method": "sweep",
            "model": model_record(self.model),
            "options": {"metric": self.scorer.name, "on": self.on, "precision": self.precision},
            "task": task_record(prompts, "the prompts"),
            "versions": versions(),
            "wall_time_s": seconds,
            "date": now(),
        }
        return result

    def ready(self, number: int) -> Ready:
        """The base run of a group of prompts, and its cells in batches; the last one made is kept."""
        if self._ready is None or self._ready[0] != number:
            ids, prompts = self._ids(self.groups[number]), torch.tensor(self.groups[number])
            base = base_run(self.model, ids, self._signals())
            if self.scorer.everywhere:
                base.refusal = f"the metric {self.scorer.name} reads all positions"
            elif (gated := conditional([edit for entry in self.cells_edits for edit in entry])) is not None:
                base.refusal = f"a probe reads in the run itself where an edit is made ({gated.where})"
            elif (wide := spanning(self.model, [edit for entry in self.cells_edits for edit in entry])) is not None:
                base.refusal = f"features that are read or written in several layers ({wide.port})"
            with torch.no_grad():
                if base.refusal is None:
                    logits = self.scorer.logits(self.model.final_norm_module(base.resid[-1][:, -1]))
                else:
                    logits = self.scorer.columns(self.scorer.read(self.model.hf(input_ids=ids, use_cache=False).logits))
                self.scorer.reference(logits, prompts)
                values = self.scorer.score(logits, prompts).float().cpu()
            batches = self._batches(self._cells(number, base.halves, base.narrow), ids)
            self._ready = (number, Ready(base, prompts, values, batches))
        return self._ready[1]

    def block(self, number: int, place: int) -> Tensor:
        """Scores [cell, prompt] of one batch."""
        ready = self.ready(number)
        base, cells = ready.base, ready.batches[place]
        if base.refusal is not None:
            return by_whole_runs(base, cells, ready.prompts, self.scorer)
        moved = sorted(Joins(base).moving(cells), key=lambda cell: cell.key)
        block = ready.base_values.repeat(len(cells), 1)  # of cells that change nothing
        if moved:
            places = {cell.index: i for i, cell in enumerate(cells)}
            bf16, difference = self.precision == "bf16", self._difference(base)
            found = by_walk(base, moved, ready.prompts, self.scorer, bf16=bf16, difference=difference)
            block[[places[cell.index] for cell in moved]] = found
        return block

    def _blocks(self, number: int, kept: Kept | None, executor: str, workers: int) -> Iterator[tuple[int, Tensor]]:
        """Every batch of a group as it ends: from the folder where it is there, else computed and kept."""
        missing = []
        for place in range(len(self.ready(number).batches)):
            block = kept.read(number, place) if kept is not None else None
            if block is None:
                missing.append(place)
            else:
                yield place, block
        if executor == "ray":
            computed: Iterator[tuple[int, Tensor]] = ray_executor.blocks(self, number, missing, workers)
        else:
            computed = ((place, self.block(number, place)) for place in missing)
        for place, block in computed:
            if kept is not None:
                kept.write(number, place, block)
            yield place, block

    def _difference(self, base: Base) -> Difference | None:
        """Made once for a base run, and kept with it."""
        if self.precision == "delta-bf16" and (self._held is None or self._held.base is not base):
            self._held = Difference(base)
        return self._held

    def _inexact(self, values: Tensor) -> str:
        """The error of a faster precision, on a sample of cells run exactly."""
        sample = sorted(set(torch.linspace(0, len(self.cells_edits) - 1, 16).long().tolist()))
        exact = Sweep(self.model, self.task, [self.cells_edits[i] for i in sample], self.scorer.given, on=self.on).run()
        error = float((exact["value"] - values[sample]).abs().max())
        return f"precision {self.precision}: largest error {error:.1e} {self.scorer.unit} on {len(sample)} cells run exactly"

    def digest(self) -> str:
        """What makes two sweeps the same: model, prompts, answers, edits, the metric whole, and how they are split."""
        rows, tensors = pack([edit for entry in self.cells_edits for edit in entry])
        digest = hashlib.sha256(json.dumps([rows, [len(e) for e in self.cells_edits], self.prompts]).encode())
        for name in sorted(tensors):
            digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
        digest.update(
            json.dumps(
                [self.model.fingerprint, self.scorer.identity(), self.memory, self.precision, self.on, versions()]
                + ([self.pieces] if self.pieces > 1 else [])
            ).encode()
        )
        return digest.hexdigest()
