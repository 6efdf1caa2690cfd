"""Activation sparsity: how many neurons can be left out, token by token, before the text becomes p % more perplexing.

    c_i = |a_i| * |w_i|          a_i the activation of neuron i at a token, w_i its column of the down projection
    CETT_l(t) = mean over tokens of | sum over i with c_i < t of a_i w_i | / | sum over i of a_i w_i |
    sparsity = share of (token, neuron) with c_i < t_l, or c_i = 0

The thresholds t_l of the layers share one CETT (cumulative error of tail truncation), each the largest that keeps to it; the
bias of the down projection is no neuron's and left out. PPL-p % is the largest CETT at which the perplexity is at most
1 + p / 100 times the model's. That ratio need not rise with CETT (near 0 it may fall below 1), so the search comes from
above: down a grid to the first CETT that keeps the bound, then bisection between it and its neighbour. Every step runs
the model with all thresholds on, so that later layers see what earlier ones have lost.

Thresholds and CETT are found on one random half of the prompts; `ratio_held_out` is measured on the other half, with a
95 % bootstrap interval over prompts. Two baselines are taken to the same perplexity: `top_k` keeps the same number
of neurons at every token of every layer, those of largest c; `fat` leaves out |a_i| < epsilon, one epsilon for all layers.

Cost: about 15 forward passes for each way, and one product of the sizes of the MLP for each step of a threshold.

Luo et al. 2024, "Sparsing Law: Towards Large Language Models with Greater Activation Sparsity". In gated MLPs a_i is gate
times up; the paper's epsilon looks at the gate alone.

A neuron that is left out at most tokens may still be what a rare answer needs: perplexity on this text is all that is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from patchbay.find._neurons import neuron_layers
from patchbay.jacks.session import Session
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.model.weights import matrix
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

GRID = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)  # of CETT
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)  # of neurons left out, for the baselines
CLOSE, STEPS = 5e-4, 12  # of the ratio of perplexities; bisections at most
N_TOKENS, N_QUANTILES = 512, 24  # tokens on which thresholds are found, and thresholds tried before the finer search
NAME = "activation_sparsity"


@method(paper="luo2024", unit="share of neurons")
def activation_sparsity(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    percent: float = 1.0,
    baselines: bool = True,
    batch_size: int = 8,
    seed: int = 0,
) -> Result:
    """Share of neurons that can be left out at each layer while perplexity rises by at most `percent` %.

    `prompts`: texts (longer ones say more); random halves find and test. Main variable `sparsity` [layer] with `threshold`
    and `cett_layer`; `cett`, `overall`, `ratio`, `ratio_held_out` with `ratio_low` and `ratio_high`, `sparsity_held_out`,
    `perplexity`; the curve `curve_ratio` and `curve_sparsity` over CETT [strength]; with `baselines`, `at_equal_ratio`
    and `ratio_reached` [condition: cett, top_k, fat].

    `percent`: how many per cent the perplexity may rise. `baselines`: also leave out by the two simpler rules, at the
    same perplexity.
    """
    layers, notes = neuron_layers(model, NAME)
    found, unseen = _halves(model, prompts, percent, seed)
    text = Text(model, found, layers, batch_size)
    limit = 1.0 + percent / 100.0
    sizes = _tail_errors(model, found, layers, batch_size)

    def cut_at(cett: float) -> Cut:
        return Cut("c", {i: size.threshold(cett) for i, size in sizes.items()})

    curve = [text.measure(cut_at(cett)) for cett in GRID]
    cett, reached = bracketed(lambda x: text.measure(cut_at(x)), GRID, limit, curve)
    cut = cut_at(cett)
    test = Text(model, unseen, layers, batch_size)
    tested = test.measure(cut)
    ratio = test.interval(cut, seed)
    values = _values(model, layers, reached, cut, {i: size.error(cut.at[i]) for i, size in sizes.items()})
    scalars: dict[str, tuple[float, str]] = {
        "cett": (cett, "relative error"),
        "overall": (reached.overall, "share of neurons"),
        "ratio": (reached.ratio, "times perplexity"),
        "ratio_held_out": (tested.ratio, "times perplexity"),
        "ratio_low": (ratio[0], "times perplexity"),
        "ratio_high": (ratio[1], "times perplexity"),
        "sparsity_held_out": (tested.overall, "share of neurons"),
        "perplexity": (math.exp(text.whole.mean), "perplexity"),
    }
    values |= {name: (torch.tensor(value), (), unit) for name, (value, unit) in scalars.items()}
    values["curve_ratio"] = (torch.tensor([one.ratio for one in curve]), ("strength",), "times perplexity")
    values["curve_sparsity"] = (torch.tensor([one.overall for one in curve]), ("strength",), "share of neurons")
    coords: dict[str, Sequence[Any]] = {"strength": list(GRID)}
    if baselines:
        rows = [reached, *_baselines(text, sizes, limit)]
        values["at_equal_ratio"] = (torch.tensor([row.overall for row in rows]), ("condition",), "share of neurons")
        values["ratio_reached"] = (torch.tensor([row.ratio for row in rows]), ("condition",), "times perplexity")
        coords["condition"] = ["cett", "top_k", "fat"]
    if reached.ratio < limit - 1e-3:
        notes.append(f"the ratio {reached.ratio:.4f} is the nearest below {limit:.4f} that was reached")
    notes.insert(0, f"thresholds of {text.n_tokens} tokens, held out {test.n_tokens}; strength is CETT")
    return Result(values, coords=coords, notes=notes)


# --- text -------------------------------------------------------------------------------------------


def _halves(model: Model, prompts: Any, percent: float, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Two random halves of the prompts that have a next token to predict."""
    if not 0.0 <= percent <= 1000.0:
        raise PatchbayError(f"percent={percent}: by how many % perplexity may rise, 0 or more")
    encoded = [ids for ids in model.encode(prompts) if len(ids) > 1]
    if len(encoded) < 2:
        raise PatchbayError(
            f"{NAME} finds thresholds on some prompts and tests them on others: it needs two of two tokens or more, "
            f"got {len(encoded)}"
        )
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed)).tolist()
    middle = (len(encoded) + 1) // 2
    return [encoded[i] for i in sorted(order[:middle])], [encoded[i] for i in sorted(order[middle:])]


@dataclass(frozen=True)
class Loss:
    """Nats and predicted tokens of each prompt."""

    nats: Tensor
    tokens: Tensor

    @property
    def mean(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Cut:
    """What is left out: c below a layer's threshold, all but the k largest c, or |a| below epsilon."""

    kind: str  # c, top_k or fat
    at: dict[int, float]

    def keep(self, layer: int, act: Tensor, norms: Tensor) -> Tensor:
        """Bool [..., neuron]: what stays of activations [..., neuron]."""
        size = act.abs() if self.kind == "fat" else act.abs() * norms
        if self.kind == "top_k":
            k = round(self.at[layer])
            chosen = torch.zeros_like(size, dtype=torch.bool)
            chosen.scatter_(-1, size.topk(k, dim=-1).indices, True) if k else None
            return chosen & (size > 0)
        return (size >= self.at[layer]) & (size > 0)


class CutSession(Session):
    """A run in which activations that a Cut leaves out are 0; counts what stays."""

    def __init__(self, model: Model, cut: Cut, norms: dict[int, Tensor], lengths: Tensor) -> None:
        super().__init__(model, [Port("mlp.act", i) for i in norms], lengths=lengths)
        self.cut, self.norms = cut, norms
        self.kept: dict[int, Tensor] = {}  # layer -> neurons kept, at each real token

    def site(
        self, signal: str, layer: int | None, x: Tensor, n_keys: int | None = None, closed: Tensor | None = None
    ) -> Tensor:
        self.here.reached.add((signal, layer))
        assert layer is not None
        assert self.here.batch is not None
        keep = self.cut.keep(layer, x, self.norms[layer].to(x))  # [prompt, position, neuron]
        real = torch.arange(x.shape[1])[None] < self.here.batch.lengths[:, None]
        self.kept[layer] = keep.sum(-1).cpu()[real]
        return x if bool(keep.all()) else x.masked_fill(~keep, 0.0)


@dataclass(frozen=True)
class Measured:
    """Ratio of perplexities, and the share of neurons left out of each layer and of all."""

    ratio: float
    sparsity: dict[int, float]
    overall: float


class Text:
    """Prompts on which cuts are measured."""

    def __init__(self, model: Model, prompts: list[list[int]], layers: list[int], batch_size: int) -> None:
        self.model, self.prompts, self.batch_size = model, prompts, batch_size
        self.norms = {i: norms_of(model, i) for i in layers}
        self.whole = self.loss(None)[0]
        self.n_tokens = sum(map(len, prompts))

    @torch.no_grad()
    def loss(self, cut: Cut | None) -> tuple[Loss, dict[int, list[Tensor]]]:
        """The loss of each prompt under a cut, and the neurons kept at each token of each layer."""
        nats, kept = [], {i: list[Tensor]() for i in self.norms}
        for start in range(0, len(self.prompts), self.batch_size):
            batch = self.prompts[start : start + self.batch_size]
            lengths = torch.tensor([len(ids) for ids in batch])
            width = int(lengths.max())
            filling = int(getattr(self.model.config, "pad_token_id", None) == 0)  # any token but the pad token
            rows = [ids + [filling] * (width - len(ids)) for ids in batch]
            ids = torch.tensor(rows, device=self.model.device)
            if cut is None:
                logits = self.model.hf(input_ids=ids, use_cache=False).logits
            else:
                session = CutSession(self.model, cut, self.norms, lengths)
                with session:
                    logits = self.model.hf(input_ids=ids, use_cache=False).logits
                for i, count in session.kept.items():
                    kept[i].append(count)
            lost = cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none").cpu().double()
            real = torch.arange(1, width)[None] < lengths[:, None]
            nats.append((lost * real).sum(1))
        return Loss(torch.cat(nats), torch.tensor([len(ids) - 1.0 for ids in self.prompts]).double()), kept

    def measure(self, cut: Cut) -> Measured:
        loss, kept = self.loss(cut)
        counts = {i: torch.cat(pieces).double() for i, pieces in kept.items()}
        sparsity = {i: 1.0 - float(count.mean()) / len(self.norms[i]) for i, count in counts.items()}
        size = {i: len(norms) for i, norms in self.norms.items()}
        overall = sum(sparsity[i] * size[i] for i in size) / sum(size.values())
        return Measured(math.exp(min(loss.mean - self.whole.mean, 50.0)), sparsity, overall)

    def interval(self, cut: Cut, seed: int) -> tuple[float, float]:
        """95 % bootstrap over prompts of the ratio of perplexities; NaN with one prompt."""
        loss = self.loss(cut)[0]
        if len(self.prompts) < 2:
            return math.nan, math.nan
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(self.prompts), (2000, len(self.prompts)), generator=generator)
        change = (loss.nats - self.whole.nats)[drawn].sum(1) / loss.tokens[drawn].sum(1)
        low, high = change.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).exp().tolist()
        return low, high


@torch.no_grad()
def norms_of(model: Model, layer: int) -> Tensor:
    """|w_i| of the down projection's columns, [neuron]."""
    proj = model.modules[layer].mlp_proj
    assert proj is not None
    return matrix(proj).detach().float().norm(dim=1) * model.residual_scale


# --- thresholds -------------------------------------------------------------------------------------


@dataclass
class TailError:
    """CETT of one layer as a function of its threshold, on stored activations."""

    act: Tensor  # [token, neuron]
    w_out: Tensor  # [neuron, d_model]
    size: Tensor = field(init=False)  # c, [token, neuron]
    whole: Tensor = field(init=False)  # norm of what all neurons write, [token]
    tried: list[tuple[float, float]] = field(init=False)  # thresholds upwards with their errors

    def __post_init__(self) -> None:
        self.size = self.act.abs() * self.w_out.norm(dim=1)
        self.whole = (self.act @ self.w_out).norm(dim=1)
        every = self.size.flatten().sort().values
        highest = float(every[-1]) * (1.0 + 1e-6) + 1e-30
        steps = [float(every[len(every) * i // N_QUANTILES]) for i in range(1, N_QUANTILES)]
        self.tried = [(at, self.error(at)) for at in (*steps, highest)]

    def error(self, threshold: float) -> float:
        """Mean over tokens of the norm of what is left out over the norm of all; tokens that write nothing are left out."""
        tail = (self.act.masked_fill(self.size >= threshold, 0.0) @ self.w_out).norm(dim=1)
        real = self.whole > 0
        return float((tail[real] / self.whole[real]).double().mean()) if bool(real.any()) else 0.0

    def threshold(self, cett: float) -> float:
        """The largest threshold tried whose error is at most `cett`, then eight bisections towards the next; 0 for 0."""
        if cett <= 0.0:
            return 0.0
        place = next((i for i in range(len(self.tried) - 1, -1, -1) if self.tried[i][1] <= cett), -1)
        low = self.tried[place][0] if place >= 0 else 0.0
        if place == len(self.tried) - 1:
            return low
        high = self.tried[place + 1][0]
        for _ in range(8):
            middle = (low + high) / 2.0
            low, high = (middle, high) if self.error(middle) <= cett else (low, middle)
        return low


def _tail_errors(model: Model, prompts: list[list[int]], layers: list[int], batch_size: int) -> dict[int, TailError]:
    """Activations of up to N_TOKENS tokens spread over the prompts, by layer."""
    every = max(1, math.ceil(sum(map(len, prompts)) / N_TOKENS))
    stored: dict[int, list[Tensor]] = {i: [] for i in layers}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        trace = run(model, batch, taps=[Port("mlp.act", i) for i in layers], logits="last")
        real = torch.arange(trace.ids.shape[1])[None] < trace.lengths[:, None]
        for i in layers:
            stored[i].append(trace[Port("mlp.act", i)].float().cpu()[real])
    out = {}
    for i in layers:
        proj = model.modules[i].mlp_proj
        assert proj is not None
        w_out = matrix(proj).detach().float().cpu() * model.residual_scale
        out[i] = TailError(torch.cat(stored.pop(i))[::every], w_out)
    return out


# --- the search -------------------------------------------------------------------------------------


def bracketed(
    measure: Callable[[float], Measured], grid: Sequence[float], limit: float, known: Sequence[Measured] | None = None
) -> tuple[float, Measured]:
    """The largest point whose ratio is at most `limit`, coming from above, to within CLOSE of the limit."""
    best: tuple[float, Measured] | None = None
    above = grid[-1]
    for at in range(len(grid) - 1, -1, -1):
        found = known[at] if known is not None else measure(grid[at])
        if found.ratio <= limit or at == 0:
            best = grid[at], found
            break
        above = grid[at]
    assert best is not None
    if best[0] == grid[-1]:
        return best
    for _ in range(STEPS):
        if 0.0 <= limit - best[1].ratio <= CLOSE:
            break
        middle = (best[0] + above) / 2.0
        found = measure(middle)
        if found.ratio <= limit:
            best = middle, found
        else:
            above = middle
    return best


def _baselines(text: Text, sizes: dict[int, TailError], limit: float) -> list[Measured]:
    """Top-k and FAT-epsilon, each at the largest cut that keeps the ratio. Their dials go over SHARES."""
    every = torch.cat([size.act.abs().flatten() for size in sizes.values()]).sort().values

    def top_k(share: float) -> Measured:
        return text.measure(Cut("top_k", {i: (1.0 - share) * len(norms) for i, norms in text.norms.items()}))

    def fat(share: float) -> Measured:
        epsilon = float(every[min(len(every) - 1, int(share * len(every)))]) if share > 0.0 else 0.0
        return text.measure(Cut("fat", dict.fromkeys(text.norms, epsilon)))

    return [bracketed(way, SHARES, limit)[1] for way in (top_k, fat)]


def _values(model: Model, layers: list[int], reached: Measured, cut: Cut, errors: dict[int, float]) -> dict[str, Any]:
    out = {}
    for name, found, unit in (
        ("sparsity", reached.sparsity, "share of neurons"),
        ("threshold", cut.at, "norm"),
        ("cett_layer", errors, "relative error"),
    ):
        row = torch.full((model.n_layers,), torch.nan, dtype=torch.float64)
        row[layers] = torch.tensor([found[i] for i in layers]).double()
        out[name] = (row, ("layer",), unit)
    return out
