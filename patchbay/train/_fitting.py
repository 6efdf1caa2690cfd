"""Fitting a dictionary: its tensors, its loss, one step, and a state from which training goes on bit for bit.

The signal is divided by its mean norm over sqrt(d) while it is fitted, and the tensors are then folded back. Rows of the decoder have norm
1: the gradient along them is removed before each step, and they are put back after it. Features that were silent for `PATIENCE`
batches rebuild what is left of the signal by the largest of their own pre-activations, with weight 1/32 (Gao et al. 2024).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as write_tensors
from torch import Tensor

from patchbay.features import folds
from patchbay.features.dictionary import Dictionary, gated
from patchbay.files import write_file
from patchbay.signal.port import PatchbayError
from patchbay.train._allocation import Jump, kept

PATIENCE = 50  # batches
WIDTH = 0.2  # of the pseudo-gradients of thresholds
FASTER = 10.0  # thresholds learn so many times as fast as the rest
BUDGETED = ("topk", "batchtopk", "feature_choice")


@dataclass(frozen=True)
class Plan:
    """What is fitted, and how."""

    form: str
    n_features: int
    k: int
    sparsity: float
    steps: int
    rate: float
    batch_size: int
    seed: int


class Fitting:
    """A dictionary while it is trained, from what is read to what is written."""

    def __init__(self, plan: Plan, read: Tensor, written: Tensor, *, transcodes: bool) -> None:
        self.plan, self.transcodes, self.step = plan, transcodes, 0
        self.scale_in, self.scale_out = (float(x.norm(dim=1).mean()) / x.shape[1] ** 0.5 for x in (read, written))
        if not (self.scale_in > 0 and self.scale_out > 0):
            raise PatchbayError(
                "the signal is 0 at every token of the first batches: there is nothing to make features of"
            )
        d_in, d_out, n = read.shape[1], written.shape[1], plan.n_features
        draw = torch.Generator().manual_seed(plan.seed)
        rows = torch.nn.functional.normalize(torch.randn(n, d_out, generator=draw), dim=1)
        W_enc = (
            rows.T.clone()
            if not transcodes
            else torch.nn.functional.normalize(torch.randn(d_in, n, generator=draw), dim=0)
        )
        self.tensors: dict[str, Tensor] = {
            "W_enc": W_enc.contiguous(), "W_dec": rows, "b_enc": torch.zeros(n), "b_dec": written.mean(0) / self.scale_out,
        }  # fmt: skip
        if plan.form == "jumprelu":
            self.tensors["log_theta"] = torch.full((n,), 0.3).log()
        if plan.form == "gated":
            self.tensors |= {"b_gate": torch.zeros(n), "r_mag": torch.zeros(n)}
        self.tensors = {name: value.requires_grad_() for name, value in self.tensors.items()}
        slow = [value for name, value in self.tensors.items() if name != "log_theta"]
        groups: list[dict[str, Any]] = [{"params": slow, "factor": 1.0}]
        if plan.form == "jumprelu":
            groups.append({"params": [self.tensors["log_theta"]], "factor": FASTER})
        self.adam = torch.optim.Adam(groups, lr=plan.rate, betas=(0.9, 0.999))
        self.silent = torch.zeros(n)  # batches since a feature was last active
        self.density = torch.zeros(n)  # running share of tokens
        self.theta = torch.full((n,), -1.0)  # running smallest kept value of each feature, -1: none yet

    # ---- one step ----

    def advance(self, read: Tensor, written: Tensor) -> tuple[float, float]:
        """One step on a batch [token, d]: the share of its variance that is unexplained, and activations per token."""
        x, y = read / self.scale_in, written / self.scale_out
        pre = self._pre(x)
        z, extra = self._activations(pre)
        t = self.tensors
        error = y - (z @ t["W_dec"] + t["b_dec"])
        loss = error.pow(2).mean() + extra + self._revived(pre, error, y)
        left = min(1.0, 5.0 * (1 - self.step / self.plan.steps))  # the last fifth slows down
        for group in self.adam.param_groups:
            group["lr"] = self.plan.rate * group["factor"] * left
        self.adam.zero_grad()
        loss.backward()
        rows, along = t["W_dec"], t["W_dec"].grad
        assert along is not None
        along -= (along * rows.detach()).sum(1, keepdim=True) * rows.detach()
        self.adam.step()
        with torch.no_grad():
            rows.copy_(torch.nn.functional.normalize(rows, dim=1))
            self._note(z.detach())
        self.step += 1
        spread = (y - y.mean(0)).pow(2).sum()
        return float(error.detach().pow(2).sum() / spread), float((z > 0).float().sum(1).mean())

    def _pre(self, x: Tensor) -> Tensor:
        t = self.tensors
        return (x if self.transcodes else x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]

    def _activations(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Activations, and what is added to the loss for their number."""
        plan, t = self.plan, self.tensors
        none = pre.new_zeros(())
        if plan.form in BUDGETED:
            value = pre.relu()
            return torch.where(kept(plan.form, value.detach(), plan.k, self.density), value, 0.0), none
        if plan.form == "relu":
            z = pre.relu()
            return z, plan.sparsity * (z * t["W_dec"].norm(dim=1)).sum(1).mean() / t["W_dec"].shape[1] ** 0.5
        if plan.form == "jumprelu":
            z, on = Jump.apply(pre.relu(), t["log_theta"].exp(), WIDTH)  # type: ignore[no-untyped-call]
            return z, plan.sparsity * (on.sum(1).mean() / plan.k - 1).pow(2)
        u = pre - t["b_enc"]  # gated: b_enc is the magnitudes' bias
        gate = (u + t["b_gate"]).relu()
        z = torch.where(gate > 0, (t["r_mag"].exp() * u + t["b_enc"]).relu(), 0.0)
        cost = plan.sparsity * (gate * t["W_dec"].detach().norm(dim=1)).sum(1).mean() / t["W_dec"].shape[1] ** 0.5
        self._gate = gate  # its own rebuilding, with the decoder as it is
        return z, cost

    def _revived(self, pre: Tensor, error: Tensor, y: Tensor) -> Tensor:
        """What silent features leave of the error; of gated ones, what the gates leave of the signal."""
        t = self.tensors
        if self.plan.form == "gated":
            return (y - (self._gate @ t["W_dec"].detach() + t["b_dec"].detach())).pow(2).mean()
        dead = self.silent > PATIENCE
        if self.plan.form not in BUDGETED or not bool(dead.any()):
            return pre.new_zeros(())
        among = pre[:, dead].relu()
        top = among.topk(min(max(y.shape[1] // 2, 1), among.shape[1]), dim=1)
        z = torch.zeros_like(among).scatter(1, top.indices, top.values)
        return (error.detach() - z @ t["W_dec"][dead]).pow(2).mean() / 32

    def _note(self, z: Tensor) -> None:
        """How often features were active, how long they were silent, and the smallest value that was kept of each."""
        on = z > 0
        some = on.any(0)
        self.silent = torch.where(some, 0.0, self.silent + 1)
        rate = 1.0 if not self.step else 0.01
        self.density += rate * (on.float().mean(0) - self.density)
        least = torch.where(on, z, torch.inf).amin(0)
        if self.plan.form == "batchtopk" and bool(some.any()):
            least, some = least.min().expand_as(least), torch.ones_like(some)
        fresh = some & (self.theta < 0)
        moved = self.theta + 0.01 * (least - self.theta)
        self.theta = torch.where(fresh, least, torch.where(some, moved, self.theta))

    # ---- what comes of it ----

    @torch.no_grad()
    def dictionary(self, layer: int, reads: str, writes: str) -> Dictionary:
        """The dictionary as it is now, for the signal as it is; what depended on the batch became thresholds."""
        t, form = {name: value.detach().clone() for name, value in self.tensors.items()}, self.plan.form
        held: dict[str, Any] = {"W_enc": t["W_enc"], "b_enc": t["b_enc"], "form": "relu"}
        if form == "topk":
            held |= {"form": "topk", "k": min(self.plan.k, self.plan.n_features)}
        elif form in BUDGETED:
            held |= {"form": "jumprelu", "threshold": self.theta.clamp_min(0.0).clone()}
        elif form == "jumprelu":
            held |= {"form": "jumprelu", "threshold": t["log_theta"].exp()}
        elif form == "gated":
            held = gated(t["b_gate"], t["b_enc"], t["r_mag"], t["W_enc"])
        place: dict[str, Any] = {"layer": layer, "reads": reads, "writes": writes}
        it = Dictionary(
            W_dec=t["W_dec"],
            b_dec=t["b_dec"],
            subtract=not self.transcodes,
            density=self.density.clone(),
            **held,
            **place,
        )
        if not self.transcodes:
            return folds.scaled_input(it, 1 / self.scale_in)
        scaled = {
            "W_enc": it.W_enc / self.scale_in,
            "W_dec": it.W_dec * self.scale_out,
            "b_dec": it.b_dec * self.scale_out,
        }
        return Dictionary(
            b_enc=it.b_enc, form=it.form, threshold=it.threshold, k=it.k, density=it.density, **scaled, **place
        )

    # ---- files ----

    def save(self, path: Path, request: str) -> None:
        """All that the next step depends on, in one file, whole or not at all."""
        found = {f"p.{name}": value.detach() for name, value in self.tensors.items()}
        for name, value in self.tensors.items():
            found |= {f"{key}.{name}": self.adam.state[value][key] for key in ("exp_avg", "exp_avg_sq", "step")}
        found |= {"silent": self.silent, "density": self.density, "theta": self.theta}
        marks = {"step": str(self.step), "request": request, "scales": json.dumps([self.scale_in, self.scale_out])}
        write_file(
            path, write_tensors({name: value.clone().contiguous() for name, value in found.items()}, metadata=marks)
        )

    def resume(self, path: Path, request: str) -> None:
        """Go on from a file of `save`. Raises PatchbayError where it is of another training."""
        with safe_open(path, framework="pt") as file:
            marks = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if marks.get("request") != request:
            raise PatchbayError(
                f"{path} is of a training with other texts, model or options: give another folder, or remove it"
            )
        self.step = int(marks["step"])
        self.scale_in, self.scale_out = json.loads(marks["scales"])
        with torch.no_grad():
            for name, value in self.tensors.items():
                value.copy_(found[f"p.{name}"])
                self.adam.state[value] = {key: found[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq", "step")}
        self.silent, self.density, self.theta = found["silent"], found["density"], found["theta"]


def described(plan: Plan) -> dict[str, Any]:
    return asdict(plan)
