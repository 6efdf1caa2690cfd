"""Low-rank tuning as an optimiser: matrices of linear maps move by a product of small factors, everything else stays bit for bit.

    W = W_0 + scale B R A,   B [m, r], A [r, n];   with G = dL/dW:   dL/dR = scale B^T G A^T,  dL/dB = scale G A^T R^T,  dL/dA = scale R^T B^T G

    lora-sb   R alone is learned, r^2 numbers a matrix. `bases=gradient` (LoRA-SB): U S V^T of - `first` sign(G) at the first step, B = U_r, A = V_r^T, R = S_r / scale, so
              that the start is itself the best update of rank r; `first=0` keeps the bases and starts at R = 0. `weights` (LoRA-XS): those of W_0, B times its singular values,
              R = 0. `random`: orthonormal ones that are drawn, R = 0
    lora      B and A are learned, r (m + n) numbers; B = 0, A drawn as LoRA draws it

Adam on what is learned. B' = B R and A are a plain LoRA (`adapter`), which PEFT reads. The first gradient is that of the first batch; the paper sums those of a share of the
data. sign() flattens the spectrum, so that only a part of it is kept: `kept` says which.

Ponkshe et al. 2024, "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning". Here the whole gradient of a matrix is made and then
projected: numbers, steps and results are those of the adapter, memory is that of full tuning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from patchbay.files import write_folder
from patchbay.knobs.directions import linear_maps
from patchbay.model.linear import in_first
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._states import Resumed, wide

BASES = ("gradient", "weights", "random")
BETAS, EPS = (0.9, 0.999), 1e-8
LEFT = 1e-4  # of a change, or of weights: what may be left beyond the rank, which is rounding; of weights in half precision as much as these round


@dataclass(frozen=True)
class LoraSB:
    """R alone is learned, in bases that stay."""

    rank: int = 8
    bases: str = "gradient"
    first: float = 1e-3
    scale: float = 1.0

    def check(self) -> None:
        if self.rank < 1 or self.bases not in BASES or self.first < 0 or not self.scale > 0:
            raise PatchbayError(
                f"lora-sb: rank={self.rank}, bases={self.bases!r}, first={self.first}, scale={self.scale}: 1 or more, one of {', '.join(BASES)}, "
                "0 or more, above 0"
            )

    learned = ("R",)

    def start(self, W: Tensor, G: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        rank = min(self.rank, *W.shape)
        if self.bases == "random":
            B, A = (
                torch.linalg.qr(torch.randn(n, rank, generator=draw, dtype=torch.float64))[0].to(W) for n in W.shape
            )
            return {"B": B, "A": A.T.contiguous(), "R": W.new_zeros(rank, rank)}
        if self.bases == "weights":
            U, S, V = torch.linalg.svd(W, full_matrices=False)
            return {"B": U[:, :rank] * S[:rank], "A": V[:rank].contiguous(), "R": W.new_zeros(rank, rank)}
        U, S, V = torch.linalg.svd(-torch.sign(G), full_matrices=False)
        return {
            "B": U[:, :rank].contiguous(),
            "A": V[:rank].contiguous(),
            "R": S[:rank].diag() * (self.first / self.scale),
        }


@dataclass(frozen=True)
class Lora:
    """Both factors are learned."""

    rank: int = 8
    scale: float = 1.0

    def check(self) -> None:
        if self.rank < 1 or not self.scale > 0:
            raise PatchbayError(f"lora: rank={self.rank}, scale={self.scale}: 1 or more, above 0")

    learned = ("B", "A")

    def start(self, W: Tensor, G: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        rank, n = min(self.rank, *W.shape), W.shape[1]
        A = (2 * torch.rand(rank, n, generator=draw, dtype=torch.float64) - 1).to(W) / n**0.5
        return {"B": W.new_zeros(len(W), rank), "A": A, "R": torch.eye(rank, dtype=W.dtype, device=W.device)}


Form = LoraSB | Lora
FORMS: dict[str, type[Form]] = {"lora": Lora, "lora-sb": LoraSB}


def kept(G: Tensor, rank: int) -> float:
    """The share of the squares of sign(G) that its largest `rank` singular values have."""
    squares = torch.linalg.svdvals(torch.sign(G)).square()
    return float(squares[:rank].sum() / squares.sum())


def maps(model: Model, what: str = "low-rank tuning") -> dict[str, nn.Module]:
    """The linear maps of the layers, by name: what has a matrix, embedding and unembedding aside. `what` asks, where there are none."""
    found = linear_maps(model)
    if not found:
        raise PatchbayError(
            f"{what}: this {model.family.name} model has no linear maps as modules (fused experts have none)"
        )
    return found


class LowRank(Resumed):
    """Adam on the factors of the matrices in `among` (ids of parameters); no other parameter moves."""

    def __init__(self, params: Iterable[Any], lr: float, form: Form, among: frozenset[int], seed: int = 0) -> None:
        super().__init__(params, {"lr": lr})
        self.form, self.among, self.seed = form, among, seed
        if not any(id(p) in among for group in self.param_groups for p in group["params"]):
            raise PatchbayError(
                "low-rank tuning: no matrix of a linear map is left as one (weights that are sharded are not)"
            )

    def move(self) -> None:
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                if id(p) in self.among and p.grad is not None:
                    number += 1
                    self._moved(p, group["lr"], number)

    def _moved(self, p: Tensor, rate: float, number: int) -> None:
        state, G, scale = self.state[p], wide(p.grad), self.form.scale  # type: ignore[arg-type]
        if not state:
            draw = torch.Generator().manual_seed(1_000_003 * self.seed + number)
            state.update(self.form.start(wide(p), G, draw), W=p.detach().clone(), step=0)
            for name in self.form.learned:
                state[f"m {name}"], state[f"v {name}"] = torch.zeros_like(state[name]), torch.zeros_like(state[name])
            if "R" in self.form.learned and bool(state["R"].any()):  # the start is the first update
                p.copy_(state["W"] + scale * state["B"] @ state["R"] @ state["A"])
                return
        state["step"] += 1
        B, R, A = state["B"], state["R"], state["A"]
        slopes = {"R": lambda: B.T @ G @ A.T, "B": lambda: G @ A.T @ R.T, "A": lambda: R.T @ B.T @ G}
        steps = {name: _adam(scale * slopes[name](), state, name) for name in self.form.learned}
        for name, step in steps.items():
            state[name] = state[name] - rate * step
        p.copy_(state["W"] + scale * state["B"] @ state["R"] @ state["A"])


def _adam(g: Tensor, state: dict[str, Any], name: str) -> Tensor:
    b1, b2 = BETAS
    m, v, t = state[f"m {name}"], state[f"v {name}"], state["step"]
    m.mul_(b1).add_(g, alpha=1 - b1)
    v.mul_(b2).add_(g.square(), alpha=1 - b2)
    step: Tensor = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + EPS)
    return step


def adapter(start: Model, tuned: Model, rank: int, folder: Path) -> None:
    """Write what training changed in linear maps as a plain LoRA that PEFT loads onto `start`; refuses a change of more than the rank."""
    tensors, turned = {}, False
    for name, module in maps(start).items():
        turned |= in_first(module)
        before, after = (one.get_submodule(name).weight.detach() for one in (start.hf, tuned.hf))
        change = (after.double() - before.double()).cpu()  # type: ignore[operator]
        U, S, V = torch.linalg.svd(change.T if in_first(module) else change, full_matrices=False)
        left, whole = float(S[rank:].square().sum().sqrt()), float(before.double().norm())  # type: ignore[operator]
        rounds = max(LEFT, torch.finfo(after.dtype).eps)  # type: ignore[union-attr]
        if left > rounds * max(whole, float(S.norm())):
            raise PatchbayError(
                f"{name} changed by more than rank {rank} ({left:.2g} of {float(S.norm()):.2g} is left): no adapter of that rank"
            )
        root = torch.nn.functional.pad(S[:rank].sqrt(), (0, max(0, rank - len(S))))
        U, V = (torch.nn.functional.pad(x, (0, max(0, rank - len(S))))[:, :rank] for x in (U, V.T))
        tensors[f"base_model.model.{name}.lora_A.weight"] = (V * root).T.float().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (U * root).float().contiguous()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": start.source or None, "r": rank, "lora_alpha": rank,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": turned, "target_modules": sorted(maps(start)), "inference_mode": True,
    }  # fmt: skip

    def save(fresh: Path) -> None:
        save_file(tensors, fresh / "adapter_model.safetensors", metadata={"format": "pt"})
        (fresh / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")

    write_folder(folder, save)
