"""Together: what processes that train together tell one another, by torch.distributed; of one process nothing.

Of a dictionary each takes an equal share of the rows of every batch. Means of gradients, the largest activations of the whole batch and how often features
were active are those of all, so that any number of processes makes the same steps as one, but for the order of sums.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def first() -> bool:
    """Whether this is the process that writes, also before the processes have met."""
    return int(os.environ.get("RANK", "0")) == 0 if world()[1] == 1 else world()[0] == 0


def wait() -> None:
    """Until all processes are here."""
    if world()[1] > 1:
        dist.barrier()


def share(items: Sequence[T]) -> list[T]:
    """This process's part of a list, one after another; of fewer items than processes everybody has all."""
    rank, n = world()
    return list(items) if n == 1 or len(items) < n else list(items[rank::n])


def gathered(mine: Tensor, lengths: Sequence[int]) -> Tensor:
    """All rows of a list of which each process made the rows of its `share`; `lengths`: how many rows each item has."""
    _, n = world()
    if n == 1 or len(lengths) < n:
        return mine
    room = max(sum(lengths[r::n]) for r in range(n))
    padded = torch.cat([mine, mine.new_zeros(room - len(mine), mine.shape[1])])
    held = [torch.empty_like(padded) for _ in range(n)]
    dist.all_gather(held, padded)
    pieces = [iter(held[r].split([*lengths[r::n], room - sum(lengths[r::n])])) for r in range(n)]
    return torch.cat([next(pieces[i % n]) for i in range(len(lengths))])


def rows(batch: Tensor) -> Tensor:
    """This process's rows of a batch; equal shares, so that means of means are means."""
    rank, n = world()
    return batch if n == 1 else batch[rank * (len(batch) // n) : (rank + 1) * (len(batch) // n)]


def mean(*tensors: Tensor | None) -> None:
    """Each tensor, in place, its mean over the processes."""
    _, n = world()
    for tensor in tensors if n > 1 else ():
        if tensor is not None:
            dist.all_reduce(tensor)
            tensor /= n


def least(tensor: Tensor) -> Tensor:
    """The smallest over the processes of each number."""
    if world()[1] > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def cut(value: Tensor, n: int) -> Tensor:
    """The `n`-th largest of all numbers of all processes: each sends no more than its own `n` largest."""
    flat = value.flatten()
    own = flat.topk(min(n, len(flat))).values
    if world()[1] == 1:
        return own[-1]
    held = [torch.empty_like(own) for _ in range(world()[1])]
    dist.all_gather(held, own)
    return torch.cat(held).topk(n).values[-1]


def counted(n: Tensor) -> tuple[int, int]:
    """A number over all processes, and over those before this one."""
    rank, processes = world()
    if processes == 1:
        return int(n), 0
    held = [torch.empty_like(n) for _ in range(processes)]
    dist.all_gather(held, n)
    each = [int(one) for one in held]
    return sum(each), sum(each[:rank])


def columns(value: Tensor) -> Tensor:
    """The rows of all processes, [token, feature], one process after another."""
    held = [torch.empty_like(value) for _ in range(world()[1])]
    dist.all_gather(held, value)
    return torch.cat(held)
