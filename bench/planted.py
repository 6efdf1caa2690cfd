"""Rules of choosing activations where the truth is known: `python -m bench.planted`.

128 directions in 48 numbers, the r-th present with a chance proportional to r^-0.7 (8 a token in all), of sizes from 0.5 to 1.5. Each rule fits 192 features, 8 a
token, to the same fresh tokens; others measure it: what is not rebuilt, activations a token by the stored threshold, silent features, the mean
cosine of directions matched one to one, the share found (above 0.9), and F1 of where they are present. Random rows are the start's.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import patchbay as pb
from bench.report import describe, put_section
from patchbay.measure._features import recovered
from patchbay.train._allocation import exponent
from patchbay.train._fitting import Fitting, Plan, rate_of
from patchbay.train._places import Places

RULES = {
    "TopK": ("topk", None),
    "TopK, aux_zipf .7": ("topk", 0.7),
    "Mutual (batchtopk)": ("batchtopk", None),
    "Mutual, aux_zipf .7": ("batchtopk", 0.7),
    "Feature, Zipf .7": ("feature_choice", None),
    "Feature, aux_zipf .7": ("feature_choice", 0.7),
    "Feature, alike": ("feature_choice", 0.0),
}
HEAD = "| rule | FVU | L0 by threshold (sd) | dead | matched | found | support F1 | fitted s |\n|---|---|---|---|---|---|---|---|"
MANY, WIDE, ON, FEATURES = 128, 48, 8, 192


class Truth:
    """Tokens made of planted directions."""

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(1000 + seed)  # not that of the first rows
        self.rows = torch.nn.functional.normalize(torch.randn(MANY, WIDE, generator=self.draw), dim=1)
        law = torch.arange(1, MANY + 1).double() ** -0.7
        self.chance = (law / law.sum() * ON).clamp(max=1.0).float()

    def tokens(self, n: int) -> tuple[Tensor, Tensor]:
        """[token, number] and which directions are present, [token, direction]."""
        present = torch.rand(n, MANY, generator=self.draw) < self.chance
        sizes = torch.rand(n, MANY, generator=self.draw) + 0.5
        return (present * sizes) @ self.rows, present


def measured(rule: tuple[str, float | None], steps: int, seed: int, batch: int = 256) -> list[float]:
    """One rule's columns; of `steps` 0 those of random rows."""
    form, zipf = rule
    truth, port = Truth(seed), pb.Port("resid_out", 0)
    plan = Plan(form, FEATURES, ON, 0.0, max(steps, 1), rate_of(FEATURES), batch, seed, zipf)
    first = truth.tokens(4096)[0]
    fitting = Fitting(plan, first, first, Places((port,), (port,), "plain"))
    for _ in range(steps):
        x, _ = truth.tokens(batch)
        fitting.advance(x, x)
    x, present = truth.tokens(16384)
    it = fitting.dictionary()
    z = it.encode(x)
    on, error = z > 0, (x - it.decode(z, x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    found = recovered(it.W_dec, truth.rows, on, present)
    active = on.double().sum(1)
    numbers = [float(error), float(active.mean()), float(active.std()), float((~on.any(0)).double().mean())]
    return [*numbers, found["matched"], found["found"], found["support"], exponent(on.double().sum(0))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, rule in [*RULES.items(), ("random rows", ("topk", None))]:
        steps = 0 if name == "random rows" else given.steps
        mean = torch.tensor([measured(rule, steps, seed) for seed in range(given.seeds)]).mean(0).tolist()
        rows.append(
            f"| {name} | {mean[0]:.3f} | {mean[1]:.2f} ({mean[2]:.1f}) | {mean[3]:.3f} | {mean[4]:.3f} | {mean[5]:.3f} | {mean[6]:.3f} | {mean[7]:.2f} |"
        )
        print(rows[-1], flush=True)
    said = f"{FEATURES} features, {ON} a token, {given.steps} steps of 256 tokens, mean of {given.seeds} seeds. {(__doc__ or '').split(chr(10) * 2, 1)[1].replace(chr(10), ' ').strip()}"
    put_section(
        "planted dictionaries", "\n".join([describe("cpu", torch.float32, "cpu", 0.0), "", said, "", HEAD, *rows])
    )


if __name__ == "__main__":
    main()
