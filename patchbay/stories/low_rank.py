"""Low rank: one threshold on all matrices' singular values says where a model can be cut, and the same ranks dealt anew do not.

Every matrix of the layers keeps the singular values that are at least a share of its largest; the share is one for all, set so that a given share of all
ranks stays (WeLore). Beside it, with as many numbers stored: the same share of every matrix's rank, the same share of its energy (the sum of squares), and the null,
the ranks of the threshold dealt anew among matrices of the same shape, many times. Measured is the loss on stories that chose nothing. Nothing is trained.

Jaiswal et al. 2024, "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients".

What it does not show: what tuning the low-rank matrices alone brings, the paper's other claim, which `patchbay papers run jaiswal2024` asks.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchbay import maths
from patchbay.blocks import build, welore
from patchbay.draw import screen
from patchbay.draw.report import Picture, Section, Table
from patchbay.model.model import Model
from patchbay.stories import _lab
from patchbay.stories._lab import Story, Telling
from patchbay.tiny import text

KEEPS = (0.75, 0.6, 0.5, 0.35)
JUDGED = 0.5  # the share at which the story ends well or not
STORIES, LENGTH, DRAWS = 32, 64, 60  # of which two may cost as little, and p is below .05
ARMS = ("one threshold", "equal energy", "equal share", "ranks dealt anew")
Ranks = dict[str, int]


def form() -> Model:
    """The model that is cut where no other is given."""
    from patchbay import load

    return load("tiny-llama")


def tell(
    model: Model, *, seed: int = 0, report: str | Path, quiet: bool = False, n: int | None = None
) -> dict[str, Any]:
    """Run the story on a model with a tokenizer; `n`: stories that the loss is of. Writes the page, returns the numbers."""
    story = Story("low-rank", "Where a model is of low rank", "Which matrices can be cut, and does their spectrum say so?", 1, None,
                  (_spectra, _cut), "jaiswal2024")  # fmt: skip
    return _lab.tell(story, model, seed=seed, report=report, quiet=quiet, n=n)


def losses(hf: Any, rows: list[list[int]]) -> Tensor:
    """Mean - log p of the tokens of each row after the first, float64 [text], nats."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=hf.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=hf.device)
    with torch.no_grad():
        logits = hf(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].double()
    each = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(rows), -1)
    return ((each * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)).cpu()


def stored(hf: Any, ranks: Ranks) -> int:
    """Numbers of two factors of these ranks, in all matrices."""
    return sum(ranks[name] * sum(module.weight.shape) for name, module in welore.matrices(hf))


def of_size(hf: Any, make: Callable[[float], Ranks], size: int) -> Ranks:
    """The largest ranks of a family, by a share from 0 to 1, that store no more than `size` numbers."""
    low, high = 1e-6, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if stored(hf, make(middle)) <= size else (low, middle)
    return make(low)


def _read(telling: Telling) -> list[list[int]]:
    tokenizer = telling.model._need_tokenizer()
    rng = random.Random(f"low rank {telling.seed}")
    return [list(tokenizer(text.story(rng).text)["input_ids"])[:LENGTH] for _ in range(telling.n or STORIES)]


def _spectra(telling: Telling, quiet: bool) -> Section:
    """Which kinds of matrices keep how much of their rank."""
    hf = telling.model.hf
    found = telling.found["spectra"] = welore.spectra(hf)
    ranks = welore.ranks(hf, JUDGED, found=found)
    kinds: dict[str, list[str]] = {}
    for name in found:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    rows, data = [], {}
    for kind, names in kinds.items():
        share = [ranks[name] / len(found[name]) for name in names]
        first = [float(found[name][0] / found[name][min(1, len(found[name]) - 1)]) for name in names]
        data[kind] = {
            "kept": sum(share) / len(share),
            "least": min(share),
            "largest": max(share),
            "first_over_second": max(first),
        }
        rows.append([kind, len(names), *data[kind].values()])
    low = welore.low(hf, ranks)
    told = [
        f"At a threshold that keeps {JUDGED:.0%} of all ranks, {len(low)} of {len(found)} matrices keep less than half of theirs. A first singular value far above the "
        "second makes all others small beside it: that is the last column."
    ]
    columns = ("matrix", "layers", "rank kept, of full", "least layer", "largest layer", "first over second, largest")
    return Section("Spectra", told, [Table(columns, rows)], data={"kept": data, "low": low})


def _cut(telling: Telling, quiet: bool) -> Section:
    """The loss after each cut, less that of the whole model."""
    hf, rows, spectra = telling.model.hf, _read(telling), telling.found["spectra"]
    whole, data, table = losses(hf, rows), {}, []
    with screen.progress("cutting", quiet=quiet) as bar:
        for at, keep in enumerate(KEEPS):
            data[keep] = one = cuts(hf, rows, keep, spectra, whole, telling.seed)
            bar(at + 1, len(KEEPS))
            ends = f"{one['beyond'][1]:+.3f} to {one['beyond'][2]:+.3f}"
            table.append(
                [f"{keep:.0%}", *[one["cost"][arm] for arm in ARMS], f"{one['beyond'][0]:+.3f}", ends, one["p"]]
            )
    half = data[JUDGED]
    text_ = [
        f"The whole model's loss is {float(whole.mean()):.3f} nats per token on {len(rows)} stories. With {JUDGED:.0%} of all ranks kept it rises by **{half['cost'][ARMS[0]]:.3f}** "
        f"by one threshold and by **{half['cost'][ARMS[3]]:.3f}** with the same ranks dealt anew {DRAWS} times (p {half['p']:.2g}); with as many numbers "
        f"stored, by {half['cost'][ARMS[1]]:.3f} at equal energy and {half['cost'][ARMS[2]]:.3f} at an equal share of every rank.",
    ]
    columns = ("ranks kept", *ARMS, "dealt less threshold", "95 %", "p of draws")
    lines = {arm: ([100 * keep for keep in KEEPS], [data[keep]["cost"][arm] for keep in KEEPS]) for arm in ARMS}
    picture = Picture(
        partial(_lab.curves, lines, "ranks kept, %", "nats per token more"),
        "What a cut costs, by how ranks are shared out.",
    )
    told = Section(
        "What a cut costs",
        text_,
        [Table(columns, table, "nats per token more than the whole model")],
        [picture],
        {"cut": {f"{keep:g}": one for keep, one in data.items()}, "whole": float(whole.mean())},
    )
    asked = f"with {JUDGED:.0%} of all ranks kept, ranks by one threshold cost less than the same ranks dealt anew (exact p of draws below 0.05)"
    # by p: the interval takes one more dealing for normal, and costs are not
    _lab.judged(told, bool(half["p"] < 0.05), asked)
    return told


def cuts(
    hf: Any, rows: list[list[int]], keep: float, spectra: dict[str, Tensor], whole: Tensor, seed: int
) -> dict[str, Any]:
    """What each way of sharing out costs at one share of ranks, and the dealt ranks' cost beyond the threshold's."""
    ranks = welore.ranks(hf, keep, found=spectra)
    size = stored(hf, ranks)
    asked = {
        ARMS[0]: ranks,
        ARMS[1]: of_size(hf, lambda share: welore.energy(share, spectra), size),
        ARMS[2]: of_size(hf, partial(welore.uniform, hf), size),
    }
    cost = {arm: losses(build(hf, ranks=one), rows) - whole for arm, one in asked.items()}
    dealt = (
        torch.stack([losses(build(hf, ranks=welore.shuffled(hf, ranks, seed + i)), rows) for i in range(DRAWS)]) - whole
    )  # [draw, text]
    beyond = maths.beyond_draws(-cost[ARMS[0]], -dealt)  # dealt less threshold
    return {
        "cost": {arm: float(one.mean()) for arm, one in cost.items()} | {ARMS[3]: float(dealt.mean())},
        "stored": {arm: stored(hf, one) for arm, one in asked.items()},
        "beyond": list(beyond),
        "p": maths.draws_p(-float(cost[ARMS[0]].mean()), -dealt.mean(1)),
    }
