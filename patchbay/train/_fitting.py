"""Fitting a dictionary: its tensors, its loss, one step, and a state from which training goes on bit for bit.

Each signal is divided by its mean norm over sqrt(d) while it is fitted, and the tensors are then folded back. Rows of the decoder have norm
1: the gradient along them is removed before each step, and they are put back after it. Features that were silent for `PATIENCE`
batches rebuild what is left of the signal by the largest of their own pre-activations, with weight 1/32 (Gao et al. 2024); where a law is given,
so do all features that are used less than it says, each as far as it lacks (aux_zipf, Ayonrinde 2024, read as the sum of both). Signals of several
layers stand side by side; of a cross-layer transcoder the features of each layer too, and what one layer does not read or write is 0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as write_tensors
from torch import Tensor

from patchbay.features.dictionary import Dictionary, gated
from patchbay.files import write_file
from patchbay.signal.port import PatchbayError
from patchbay.train import _together
from patchbay.train._allocation import ZIPF, Jump, kept, shortfall
from patchbay.train._finished import finished
from patchbay.train._places import Places

PATIENCE = 50  # batches
WIDTH = 0.2  # of the pseudo-gradients of thresholds
RATE, FASTEST = 8e-4, 8e-3  # of Adam, for 2^14 features; and the most, for few
FASTER = 2.5  # thresholds learn so many times as fast as the rest
BUDGETED = ("topk", "batchtopk", "feature_choice")


def rate_of(n_features: int) -> float:
    """Adam's rate for a number of features, as one over its root (Gao et al. 2024, whose 2e-4 is for thousands of times as many tokens); no
    more than FASTEST: at 0.02 a crosscoder of 24 does not find the direction that one model alone has."""
    return min(FASTEST, RATE / (max(n_features, 1) / 2**14) ** 0.5)


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
    zipf: float | None = (
        None  # the exponent of the law that features are to be used by; None: feature_choice's own, and no loss
    )

    @property
    def law(self) -> float:
        return ZIPF if self.zipf is None else self.zipf


class Fitting:
    """A dictionary while it is trained, from what is read to what is written."""

    def __init__(self, plan: Plan, read: Tensor, written: Tensor, places: Places) -> None:
        self.plan, self.places, self.step = plan, places, 0
        self.sites, self.blocks = len(places.reads), places.blocks
        self.subtracts = places.kind == "plain"
        self.scale_in, self.scale_out = (_scales(x, self.sites) for x in (read, written))
        d_in, d_out, n = read.shape[1], written.shape[1], plan.n_features * self.blocks
        draw = torch.Generator().manual_seed(plan.seed)
        self.masks = self._masks(read, d_out)
        alike = self.sites if places.kind == "crosscoder" else 1  # one row for all sites, which training parts
        drawn = torch.randn(n, d_out // alike, generator=draw).to(read).repeat(1, alike) * self.masks[1]
        rows = torch.nn.functional.normalize(drawn, dim=1)
        tied = places.kind in ("plain", "crosscoder")
        drawn = rows.T if tied else torch.randn(d_in, n, generator=draw).to(read) * self.masks[0]
        W_enc = drawn.clone() if tied else torch.nn.functional.normalize(drawn, dim=0)
        zeros = read.new_zeros(n)
        self.tensors: dict[str, Tensor] = {
            "W_enc": W_enc.contiguous(), "W_dec": rows, "b_enc": zeros.clone(), "b_dec": (written / self.scale_out).mean(0),
        }  # fmt: skip
        if plan.form == "jumprelu":
            self.tensors["log_theta"] = torch.full_like(zeros, 0.3).log()
        if plan.form == "gated":
            self.tensors |= {"b_gate": zeros.clone(), "r_mag": zeros.clone()}
        self.tensors = {name: value.requires_grad_() for name, value in self.tensors.items()}
        slow = [value for name, value in self.tensors.items() if name != "log_theta"]
        groups: list[dict[str, Any]] = [{"params": slow, "factor": 1.0}]
        if plan.form == "jumprelu":
            groups.append({"params": [self.tensors["log_theta"]], "factor": FASTER})
        self.adam = torch.optim.Adam(groups, lr=plan.rate, betas=(0.9, 0.999), fused=True)
        self.silent = zeros.clone()  # batches since a feature was last active
        self.density = zeros.clone()  # running share of tokens
        self.demand = zeros.clone()  # of feature_choice: the same, were the largest of the batch kept
        self.theta = torch.full_like(zeros, -1.0)  # running smallest kept value of each feature, -1: none yet

    def _masks(self, read: Tensor, d_out: int) -> tuple[Tensor | float, Tensor | float]:
        """Of a cross-layer transcoder what each layer's features may read and write; else all."""
        if self.blocks == 1:
            return 1.0, 1.0
        n, s = self.plan.n_features, self.blocks
        eye = torch.eye(s).repeat_interleave(read.shape[1] // s, 0).repeat_interleave(n, 1)
        after = torch.ones(s, s).triu().repeat_interleave(n, 0).repeat_interleave(d_out // s, 1)
        return eye.to(read), after.to(read)

    # ---- one step ----

    def advance(self, read: Tensor, written: Tensor) -> tuple[float, float]:
        """One step on a batch [token, d]: the share of its variance that is unexplained, and activations per token."""
        x, y = _together.rows(read) / self.scale_in, _together.rows(written) / self.scale_out
        pre = self._pre(x)
        found, z, extra, active = self._said(pre)
        error = y - found
        loss = error.pow(2).mean() + extra + self._revived(pre, error, y)
        left = min(1.0, 5.0 * (1 - self.step / self.plan.steps))  # the last fifth slows down
        for group in self.adam.param_groups:
            group["lr"] = self.plan.rate * group["factor"] * left
        self.adam.zero_grad()
        loss.backward()
        self._step()
        with torch.no_grad():
            self._note(z)
        self.step += 1
        figures = torch.stack([error.detach().pow(2).sum() / (y - y.mean(0)).pow(2).sum(), active])
        _together.mean(figures)
        return float(figures[0]), float(figures[1])

    @torch.no_grad()
    def _step(self) -> None:
        """Adam's step of all processes, along rows that keep their norm."""
        rows, along, encoder = self.tensors["W_dec"], self.tensors["W_dec"].grad, self.tensors["W_enc"].grad
        assert along is not None
        assert encoder is not None
        _together.mean(*(value.grad for value in self.tensors.values()))
        if self.blocks > 1:
            along *= self.masks[1]
            encoder *= self.masks[0]
        along.addcmul_(rows, torch.linalg.vecdot(along, rows)[:, None], value=-1)
        self.adam.step()
        rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)

    def _pre(self, x: Tensor) -> Tensor:
        t = self.tensors
        bias = t["b_enc"] - t["b_dec"] @ t["W_enc"] if self.subtracts else t["b_enc"]  # no gradient of x is needed so
        return torch.addmm(bias, x, t["W_enc"])

    def _said(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is rebuilt, activations without a graph, what their number adds to the loss, and how many there are per token."""
        t = self.tensors
        if self.plan.form == "topk" and self.blocks == 1:  # k rows a token, not all of them
            top = pre.topk(min(self.plan.k, self.plan.n_features), dim=1)
            value = top.values.relu()
            found = torch.nn.functional.embedding_bag(top.indices, t["W_dec"], mode="sum", per_sample_weights=value)
            z = torch.zeros_like(pre).scatter(1, top.indices, value.detach())
            return found + t["b_dec"], z, pre.new_zeros(()), (value.detach() > 0).float().sum(1).mean()
        z, extra = self._activations(pre)
        active = (z.detach() > 0).float().sum(1).mean()
        return torch.addmm(t["b_dec"], z, t["W_dec"]), z.detach(), extra, active

    def _activations(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Activations, and what is added to the loss for their number."""
        plan, t = self.plan, self.tensors
        none = pre.new_zeros(())
        if plan.form in BUDGETED:
            return self._chosen(pre.relu()), none
        if plan.form == "relu":
            z = pre.relu()
            return z, plan.sparsity * (z * self._norms(t["W_dec"])).sum(1).mean() / t["W_dec"].shape[1] ** 0.5
        if plan.form == "jumprelu":
            z, on = Jump.apply(pre.relu(), t["log_theta"].exp(), WIDTH)  # type: ignore[no-untyped-call]
            count = on.sum(1).mean()
            every = count.detach().clone()
            _together.mean(every)  # the square is of the mean of all processes
            return z, plan.sparsity * ((count + (every - count.detach())) / (plan.k * self.blocks) - 1).pow(2)
        u = pre - t["b_enc"]  # gated: b_enc is the magnitudes' bias
        gate = (u + t["b_gate"]).relu()
        z = torch.where(gate > 0, (t["r_mag"].exp() * u + t["b_enc"]).relu(), 0.0)
        cost = plan.sparsity * (gate * self._norms(t["W_dec"].detach())).sum(1).mean() / t["W_dec"].shape[1] ** 0.5
        self._gate = gate  # its own rebuilding, with the decoder as it is
        return z, cost

    def _chosen(self, value: Tensor) -> Tensor:
        """Activations that the budget keeps, the others 0; of a cross-layer transcoder k of each layer, or as many of all."""
        plan, n = self.plan, len(value)
        if plan.form == "topk":
            each = value.unflatten(1, (self.blocks, -1))
            top = each.topk(min(plan.k, plan.n_features), dim=2)
            return torch.zeros_like(each).scatter(2, top.indices, top.values).flatten(1)
        if plan.form == "feature_choice":
            self._ask(value.detach())
        on = kept(plan.form, value.detach(), plan.k * self.blocks, self.demand, plan.law)
        assert len(on) == n
        return torch.where(on, value, 0.0)

    def _ask(self, value: Tensor) -> None:
        """How often each feature is among the largest of a whole batch, which ranks it: what it keeps itself would keep the first ranks for ever."""
        share = kept("batchtopk", value, self.plan.k * self.blocks, self.demand).float().mean(0)
        _together.mean(share)
        self.demand += self._pace * (share - self.demand)

    def _norms(self, rows: Tensor) -> Tensor:
        """What an activation costs: the norm of its row, of several layers the sum of theirs."""
        return rows.unflatten(1, (self.sites, -1)).norm(dim=2).sum(1)

    def _revived(self, pre: Tensor, error: Tensor, y: Tensor) -> Tensor:
        """What silent features, or those used too little, leave of the error; of gated ones, what the gates leave of the signal."""
        t = self.tensors
        if self.plan.form == "gated":
            return (y - (self._gate @ t["W_dec"].detach() + t["b_dec"].detach())).pow(2).mean()
        lack = self._lack()
        some = lack > 0
        if self.plan.form not in BUDGETED or not bool(some.any()):
            return pre.new_zeros(())
        among = pre[:, some].relu()
        top = among.topk(min(max(y.shape[1] // 2, 1), among.shape[1]), dim=1)
        z = torch.zeros_like(among).scatter(1, top.indices, top.values) * lack[some]
        return (error.detach() - z @ t["W_dec"][some]).pow(2).mean() / 32

    def _lack(self) -> Tensor:
        """How much each feature is to rebuild of the error, 0 to 1: where it is silent, or by what it is used less than the law says."""
        silent = (self.silent > PATIENCE).to(self.silent)
        if self.plan.zipf is None or not self.step:
            return silent
        ranks = self.demand if self.plan.form == "feature_choice" else self.density
        return silent.maximum(shortfall(self.density, self.plan.k * self.blocks, self.plan.zipf, ranks))

    @property
    def _pace(self) -> float:
        """How far running shares go to a batch's own."""
        return 0.01 if self.step else 1.0

    def _note(self, z: Tensor) -> None:
        """How often features were active, how long they were silent, and the smallest value that was kept of each."""
        on = z > 0
        share = on.float().mean(0)
        _together.mean(share)
        some = share > 0
        self.silent = torch.where(some, 0.0, self.silent + 1)
        self.density += self._pace * (share - self.density)
        if self.plan.form not in ("batchtopk", "feature_choice"):
            return  # the others need no threshold of their own
        least = _together.least(torch.where(on, z, torch.inf).amin(0))
        if self.plan.form == "batchtopk" and bool(some.any()):
            least, some = least.min().expand_as(least), torch.ones_like(some)
        fresh = some & (self.theta < 0)
        moved = self.theta + 0.01 * (least - self.theta)
        self.theta = torch.where(fresh, least, torch.where(some, moved, self.theta))

    # ---- what comes of it ----

    @torch.no_grad()
    def dictionary(self) -> Dictionary:
        """The dictionary as it is now, for the signals as they are; what depended on the batch became thresholds."""
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
        held["W_enc"] = held["W_enc"] / self.scale_in[:, None]
        held |= {"W_dec": t["W_dec"] * self.scale_out, "b_dec": t["b_dec"] * self.scale_out}
        return finished(held, self.density.clone(), self.places)

    # ---- files ----

    def save(self, path: Path, request: str) -> None:
        """All that the next step depends on, in one file, whole or not at all."""
        found = {f"p.{name}": value.detach() for name, value in self.tensors.items()}
        for name, value in self.tensors.items():
            found |= {f"{key}.{name}": self.adam.state[value][key] for key in ("exp_avg", "exp_avg_sq", "step")}
        found |= {"silent": self.silent, "density": self.density, "demand": self.demand, "theta": self.theta}
        found |= {"scale_in": self.scale_in, "scale_out": self.scale_out}
        marks = {"step": str(self.step), "request": request}
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
        found = {name: value.to(self.silent.device) for name, value in found.items()}
        self.scale_in, self.scale_out = found["scale_in"], found["scale_out"]
        with torch.no_grad():
            for name, value in self.tensors.items():
                value.copy_(found[f"p.{name}"])
                self.adam.state[value] = {key: found[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq", "step")}
        self.silent, self.density, self.theta = found["silent"], found["density"], found["theta"]
        self.demand = found["demand"]


def _scales(x: Tensor, sites: int) -> Tensor:
    """By what each number is divided, [sites x d]: the mean norm of its signal over sqrt(d)."""
    each = x.unflatten(1, (sites, -1))
    found = each.norm(dim=2).mean(0) / each.shape[2] ** 0.5
    if not bool((found > 0).all()):
        raise PatchbayError("the signal is 0 at every token of the first batches: there is nothing to make features of")
    return found.repeat_interleave(each.shape[2])


def described(plan: Plan) -> dict[str, Any]:
    return asdict(plan)
