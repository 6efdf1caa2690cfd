"""Probes: a direction and a threshold at a port, which say at which positions of which prompts an edit is made.

    reading = direction . signal            one number for each prompt and position
    fires   = reading > threshold           with `below`: reading < threshold

The signal is that of the same run, as it arrives at its port: edits of earlier ports have acted on it, those of the same port have
not, so that several edits under one probe agree on where they act. A generated token is judged by its own signal. A probe reads at
or before the place that it decides about; it runs nothing of its own, and costs one product at each position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchbay.signal.port import PatchbayError, Port, as_port, by_home

ORDER = (
    "embed", "resid_in", "attn.q", "attn.k", "attn.v", "attn.pattern", "attn.z", "attn.head_out", "attn.out", "resid_mid", "mlp.in",
    "router.logits", "router.weights", "router.experts", "mlp.act", "experts.out", "mlp.out", "resid_out", "final_norm", "logits",
)  # fmt: skip
CACHED = ("attn.k", "attn.v")  # of earlier tokens, edited again in later calls


@dataclass(frozen=True, eq=False)
class Probe:
    """Fires where `direction` . signal is above `threshold` (with `below`: below it), at each prompt and position.

    `port`: a Port or its text, such as "L2.resid_out", "L2.N77.act" or "L3.H1.z"; its axes are prompt, position and at most one
    more. `direction`: one number for each feature of that axis; None where the signal is one number at each position.
    """

    port: Port
    direction: Tensor | None = None
    threshold: float = 0.0
    below: bool = False

    def __post_init__(self) -> None:
        port = as_port(self.port)
        object.__setattr__(self, "port", port)
        if port.axes[:2] != ("prompt", "position") or len(port.axes) > 3 or port.signal == "router.experts":
            raise PatchbayError(
                f"a probe at {port}: it has axes {', '.join(port.axes)}, and a probe reads one vector or number at each position, as at "
                "L2.resid_out, L3.mlp.act, L2.N77.act or L3.H1.z (one head of several)"
            )
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float) or not abs(self.threshold) < float("inf"):  # fmt: skip
            raise PatchbayError(f"a probe at {port}: threshold {self.threshold!r} is not a finite number")
        object.__setattr__(self, "threshold", float(self.threshold))
        object.__setattr__(self, "direction", _direction(port, self.direction))

    def reading(self, signal: Tensor) -> Tensor:
        """direction . signal, [prompt, position], of a signal [prompt, position, feature] or [prompt, position]."""
        signal = signal.detach().to(torch.promote_types(signal.dtype, torch.float32))
        if self.direction is None:
            return signal
        if signal.shape[-1] != len(self.direction):
            raise PatchbayError(
                f"{self}: a direction of {len(self.direction)} numbers, {self.port} has {signal.shape[-1]}"
            )
        return signal @ self.direction.to(signal)

    def fires(self, signal: Tensor) -> Tensor:
        """bool [prompt, position]; never where the signal is NaN, as in padding."""
        reading = self.reading(signal)
        return reading < self.threshold if self.below else reading > self.threshold

    def precedes(self, port: Port) -> bool:
        """Whether the probe's signal passes at or before that of a port, in every family; of features, which have no place of their
        own, whether it can: the run says where it does not."""
        return _place(self.port, first=True) <= _place(port, first=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Probe):
            return NotImplemented
        mine, theirs = self.direction, other.direction
        same = (self.port, self.threshold, self.below) == (other.port, other.threshold, other.below)
        if mine is None or theirs is None:
            return same and mine is theirs
        return same and mine.dtype == theirs.dtype and torch.equal(mine, theirs)

    def __hash__(self) -> int:
        return hash((self.port, self.threshold, self.below))

    def __str__(self) -> str:
        what = str(self.port) if self.direction is None else f"tensor[{len(self.direction)}] . {self.port}"
        return f"{what} {'<' if self.below else '>'} {self.threshold:g}"

    __repr__ = __str__

    def to_json(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """As JSON types; the direction goes into `tensors` under the name that is said."""
        row: dict[str, Any] = {"port": str(self.port), "threshold": self.threshold, "below": self.below}
        if self.direction is not None:
            row["direction"] = f"probe{len(tensors)}"
            tensors[row["direction"]] = self.direction.detach().cpu().contiguous()
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any], tensors: dict[str, Tensor]) -> Probe:
        direction = tensors[row["direction"]] if "direction" in row else None
        return cls(as_port(row["port"]), direction, row["threshold"], bool(row["below"]))


def _place(port: Port, *, first: bool) -> tuple[float, int]:
    """Layer and place in it: of features the first or the last where a dictionary may sit."""
    layer = port.layer if port.layer is not None else -1 if port.signal == "embed" else float("inf")
    return layer, ORDER.index(("resid_in" if first else "resid_out") if by_home(port) else port.signal)


def _direction(port: Port, given: Any) -> Tensor | None:
    """What is given as a direction, one finite number for each feature; None where the signal has no features."""
    if len(port.axes) == 2:
        if given is not None:
            raise PatchbayError(f"a probe at {port}: the signal is one number at each position and takes no direction")
        return None
    found = None if given is None else torch.as_tensor(given).detach()
    if found is None or found.ndim != 1 or not len(found):
        shape = "none" if found is None else f"shape {list(found.shape)}"
        raise PatchbayError(f"a probe at {port}: one number for each {port.axes[-1]} as its direction, got {shape}")
    found = found.clone() if found.is_floating_point() else found.float()
    if not bool(found.isfinite().all()) or not bool(found.any()):
        raise PatchbayError(f"a probe at {port}: its direction is finite and not 0")
    return found
