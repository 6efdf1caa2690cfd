"""Models that two processes share: each edits its own blocks of what it runs, or is refused by name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.tiny.twins import twin
from tests.tolerance import close

pytestmark = pytest.mark.slow  # every process imports torch and starts a group
IDS = torch.tensor([[5, 9, 40, 2, 11, 3]])
EDITS = (
    pb.scale(pb.Port("attn.out", 0), 3.0),
    pb.scale(pb.Port("attn.z", 1, 1), 0.2, positions="last"),
    pb.scale(pb.Port("mlp.act", 1), -1.0),
    pb.scale(pb.Port("attn.head_out", 0, 1), -1.0),
)


@functools.cache
def right() -> list[Tensor]:
    plain = pb.load(twin("llama"))
    return [pb.run(plain, IDS, edits=[edit]).logits for edit in EDITS]


def edited_as_plain(model: pb.Model, runs: Callable[[Tensor], Any]) -> None:
    for edit, logits in zip(EDITS, right(), strict=True):
        with torch.no_grad(), model.edited(edit):
            assert close(runs(IDS).logits, logits), str(edit)


def refused(act: Callable[[], Any], words: str) -> None:
    with pytest.raises(PatchbayError, match=words):
        act()


def data_parallel() -> None:
    hf = twin("llama")
    model = pb.load(hf)
    wrapped = nn.parallel.DistributedDataParallel(hf)
    refused(lambda: pb.load(wrapped), "wrapped as DistributedDataParallel: .*model.module")
    edited_as_plain(model, wrapped)
    edited_as_plain(model, hf)


def sharded(*, keep_names: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    hf = twin("llama")
    model = pb.load(hf)
    wrapped = FullyShardedDataParallel(hf, device_id=torch.device("cpu"), use_orig_params=keep_names)
    refused(lambda: pb.load(wrapped), "wrapped as FullyShardedDataParallel")
    refused(lambda: pb.load(wrapped.module), "sharded by FullyShardedDataParallel")
    refused(lambda: pb.run(model, IDS), "sharded by FullyShardedDataParallel")
    edited_as_plain(model, wrapped)


def sharded_layers() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    hf, mesh = twin("llama"), init_device_mesh("cpu", (2,))
    model = pb.load(hf)
    for layer in hf.model.layers:
        fully_shard(layer, mesh=mesh)
    edited_as_plain(model, hf)
    fully_shard(hf, mesh=mesh)
    refused(lambda: pb.run(model, IDS, edits=[EDITS[0]]), "weights are sharded by")


def prepared() -> None:
    from accelerate import Accelerator

    hf = twin("llama")
    model = pb.load(hf)
    made = Accelerator(cpu=True).prepare(hf)
    assert dist.get_world_size() == 2
    edited_as_plain(model, made)


KINDS: dict[str, Callable[[], None]] = {
    "DistributedDataParallel": data_parallel,
    "FSDP": functools.partial(sharded, keep_names=False),
    "FSDP with original parameters": functools.partial(sharded, keep_names=True),
    "fully_shard of layers, then of all": sharded_layers,
    "accelerate": prepared,
}


def work(rank: int, kind: str, group: str) -> None:
    """One of the two; what fails in it ends the test."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(group, 2), rank=rank, world_size=2)
    try:
        KINDS[kind]()
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_models_that_two_processes_share(kind: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (kind, str(tmp_path / "group")), nprocs=2)  # type: ignore[no-untyped-call]
