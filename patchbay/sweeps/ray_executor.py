"""Batches of a sweep on Ray workers, on this machine or a cluster; the numbers are those of a local run.

Each worker builds the sweep once, from the model's source where it has one and else from the model itself, runs its own base
run, and computes the batches it is given. The sweep comes in as an object that knows its `block`s: this file stands before `sweep.py`. A worker that dies is replaced and its batch computed again. Needs the extra:
`pip install 'patchbay-lm[ray]'`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from patchbay.model.load import load
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor

_BUILT: dict[str, Any] = {}  # in a worker: the sweep of the digest it works on


def blocks(sweep: Any, group: int, places: Sequence[int], workers: int) -> Iterator[tuple[int, Tensor]]:
    """Compute the batches `places` of a group on `workers` workers; yields each as it ends."""
    if not places:
        return
    try:
        import ray
    except ImportError as error:
        raise PatchbayError(
            "executor='ray' needs Ray: pip install 'patchbay-lm[ray]', or use executor='local'"
        ) from error
    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        model = sweep.model
        lent = model.source if os.path.isdir(model.source) else model.hf
        task = sweep.task.to_json() if isinstance(sweep.task, Task) else sweep.task
        plan = (sweep.cells_edits, sweep.scorer.given, sweep.on, sweep.memory, sweep.precision)
        shared, remote = (
            ray.put((type(sweep), lent, model.family, task, plan)),
            ray.remote(max_retries=3, num_cpus=1)(_block),
        )
        digest = sweep.digest()
        waiting = {remote.remote(shared, digest, group, place): place for place in places}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(done[0]), ray.get(done[0])
    finally:
        if started:
            ray.shutdown()


def _block(shared: Any, digest: str, group: int, place: int) -> Tensor:
    """In a worker: one batch, with the sweep built on first use."""
    import torch

    if digest not in _BUILT:
        made, lent, family, task, (cells, metric, on, memory, precision) = shared
        torch.set_num_threads(1)
        model = load(lent, family=family)
        given = Task.from_json(task) if isinstance(task, dict) else task
        _BUILT.clear()
        _BUILT[digest] = made(model, given, cells, metric, on=on, memory=memory, precision=precision)
    return _BUILT[digest].block(group, place)
