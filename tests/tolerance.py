"""How near two numbers must be: the rounding of what was computed, never a number picked for one machine.

    assert close(found, expected)

holds when no entry differs by more than `noise * eps * size`:

- `eps` is the rounding of the dtype in which the numbers were made: float32 unless a tensor is coarser, since the models
  compute in it (numbers that are read out as doubles, or as Python's, still carry the model's rounding); `dtype=torch.float64`
  says that everything was computed in double precision.
- `size` is the largest absolute value of either side, or of `of` where the numbers are small remains of larger ones (one
  score of a row of scores, a difference of logits, what should be 0). One size for a whole tensor: an entry near 0 carries
  the rounding of the sum that cancelled in it.
- `noise` counts roundings: errors of n independent ones grow as sqrt(n), so 64 stands for the about 4,000 products and sums
  behind one value of a small model. A test that needs more says so and why.

What is exact by construction is compared with torch.equal. What is estimated (a share of prompts, a planted strength that
other parts of the model dilute) is no matter of rounding: such tests keep bounds of their own, in plain numbers.

With PATCHBAY_TOLERANCES=FILE every comparison writes a line; `python -m tests.tolerance FILE` prints how many times larger
than the observed error the tolerance was, by test file, dtype and noise, the tightest first. A ratio far above 1 says that
the rounding at hand is far below its bound, not that the bound is loose: another processor sums in another order.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NOISE = 64.0


@dataclass(frozen=True)
class Nearness:
    """The largest difference and what was allowed; true where it is within, and shown by a failing assert."""

    error: float
    tolerance: float
    why: str = ""

    def __bool__(self) -> bool:
        return not self.why and self.error <= self.tolerance


def close(
    found: Any,
    expected: Any,
    *,
    of: Any = None,
    noise: float = NOISE,
    dtype: torch.dtype | None = None,
    equal_nan: bool = False,
) -> Nearness:
    """Whether two tensors, numbers or lists of numbers are the same but for rounding (see the top of this file).

    A number is compared with every entry of a tensor; shapes must be the same otherwise. NaN is like NaN only where
    `equal_nan` says so, and infinities must be the same ones.
    """
    made = dtype or max((torch.float32, *_kinds(found, expected)), key=lambda kind: torch.finfo(kind).eps)
    a, b = _double(found), _double(expected)
    if a.shape != b.shape and a.ndim and b.ndim:
        return Nearness(float("inf"), 0.0, f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = torch.broadcast_tensors(a, b)
    nans = a.isnan() & b.isnan() if equal_nan else torch.zeros_like(a, dtype=torch.bool)
    gap = torch.where(nans | (a == b), 0.0, (a - b).abs())
    size = max(_size(x) for x in (a, b, _double(0.0 if of is None else of)))
    error = float(gap.max()) if gap.numel() else 0.0
    allowed = noise * torch.finfo(made).eps * size
    return _told(Nearness(error, allowed, "NaN on one side" if error != error else ""), made, noise)


def _kinds(*values: Any) -> list[torch.dtype]:
    return [value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _double(value: Any) -> Tensor:
    if isinstance(value, list | tuple) and any(isinstance(x, Tensor) for x in value):
        value = torch.stack([torch.as_tensor(x) for x in value])
    return torch.as_tensor(value).detach().double()


def _size(value: Tensor) -> float:
    finite = value[value.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _told(found: Nearness, dtype: torch.dtype, noise: float) -> Nearness:
    """Record who asked, where PATCHBAY_TOLERANCES names a file; one short line, appended whole by each process."""
    if path := os.environ.get("PATCHBAY_TOLERANCES"):
        frame = sys._getframe(2)
        file = Path(frame.f_code.co_filename).resolve().relative_to(Path(__file__).resolve().parent)
        row = [str(file), frame.f_lineno, str(dtype).removeprefix("torch."), noise, found.error, found.tolerance]
        with open(path, "a") as out:
            out.write(json.dumps(row) + "\n")
    return found


def table(path: str) -> str:
    """By test file, dtype and noise: the smallest ratio of tolerance to error with its line, and how many had no error."""
    rows: dict[tuple[str, str, float], list[tuple[float, int]]] = defaultdict(list)
    for written in Path(path).read_text().splitlines():
        file, line, dtype, noise, error, tolerance = json.loads(written)
        if not error > tolerance:  # what was not near was said to be different: no rounding
            rows[file, dtype, noise].append((tolerance / error if error else float("inf"), line))
    lines = [f"{'tolerance / error':>17} {'line':>5} {'compared':>8} {'no error':>8}  {'tolerance':<26} file"]
    for (file, dtype, noise), found in sorted(rows.items(), key=lambda item: min(item[1])):
        ratio, line = min(found)
        exact = sum(r == float("inf") for r, _ in found)
        rule = f"{noise:g} eps({dtype}) size"
        lines.append(f"{ratio:17.1f} {line:5} {len(found):8} {exact:8}  {rule:<26} {file}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1]))
