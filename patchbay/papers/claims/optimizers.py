"""Claims about optimizers: small networks trained from the same weights on the same texts in the same order, five seeds each.

The model at hand has no part in them. Rates are chosen once, on texts and weights of a seed that is none of the five.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patchbay.papers.claims._claim import TRAINED, Claim, claim
from patchbay.papers.claims.training import difference

if TYPE_CHECKING:
    from torch import Tensor

    from patchbay.model.model import Model

TEXTS, HELD, STEPS, EVERY = 1500, 80, 110, 5
CHOOSING = 5  # the seed by which rates are chosen; claims are checked with 0, 10, 20, 30, 40
WAYS = {
    "AdamW": "adamw",
    "Muon": "muon",
    "COSMOS": "cosmos:rank=4",
    "SOAP": "cosmos:rank=96",
}  # no matrix has more inputs than 96
RATES = {"AdamW": (1.5e-3, 3e-3, 6e-3)} | dict.fromkeys(("Muon", "COSMOS", "SOAP"), (1e-2, 2e-2, 4e-2))
READ = {
    "attention to the first token, of the head with most": "alpha_highest",
    "induction, of the head with most": "induction_highest",
    "attention to the token before, of all heads": "previous_token_mean",
}


@dataclass
class Trained:
    """What came of a run: nats per token of every held-out text, bytes of the optimizer's state, and, where a loss was to be reached, after how many steps it was (None: it was
    not) and what the panel showed then, or in the end."""

    loss: Tensor
    state: int
    steps: int | None = None
    panel: dict[str, float] = field(default_factory=dict)


@claim("liu2025c", "made", seeds=TRAINED)
def liu2025c(model: Model, seed: int) -> Claim:
    """Confirmed if held-out texts cost less after COSMOS of rank 4 than after Muon, each at the best of three rates, as many steps after the same start. Told beside it: AdamW, COSMOS of full rank (which is one-sided SOAP), bytes of
    states, and the panel where each reaches the loss of AdamW. The bound and the rates that are tried were set after one trial at another seed, of COSMOS that stepped by matrices in tables of tokens too; the least rate of COSMOS is its
    best. Adam of the tables is that of each way: its second moments decay by .999 beside Muon and by .95 beside COSMOS (Muon with .95 is .03 better at seed 0).
    Seen afterwards, over the five seeds: Muon leaves less than AdamW in two; where the loss of AdamW is reached (or in the end, where Muon does not reach it), heads attend less to the token before in all five after each of the other ways, beyond other batches, and neither the most
    attention to the first token nor the most induction differs by one sign between AdamW and Muon.
    """
    found, rates = _compared(seed), _rates()

    def told(of: Any) -> str:
        return ", ".join(str(of(found[name])) for name in WAYS)

    def panel(name: str, reading: str) -> str:
        return f"{found[name].panel.get(reading, float('nan')):.2f}"

    seen = "; ".join(
        f"{what} {', '.join(panel(name, reading) for name in WAYS)} (AdamW on other batches {panel('other', reading)})"
        for what, reading in READ.items()
    )
    text = (
        f"in networks of 50,000 weights, texts cost {told(lambda one: f'{float(one.loss.mean()):.3f}')} nats a token after {STEPS} steps of AdamW, Muon, COSMOS of rank 4 and of full rank (one-sided SOAP), at rates of "
        f"{', '.join(f'{rates[name]:g}' for name in WAYS)}, the best on other texts of three that were set after one trial; states hold {told(lambda one: round(one.state / 1000))} kB; AdamW's loss is reached after "
        f"{told(lambda one: one.steps if one.steps is not None else 'no')} steps, and there the panel shows {seen}"
    )
    return Claim(text, *difference(found["Muon"].loss, found["COSMOS"].loss), 0.0, "nats per token")


@functools.cache
def _rates() -> dict[str, float]:
    """Of each way the rate of the least loss, by the seed for choosing."""
    return {name: min(RATES[name], key=lambda rate: float(_trained(CHOOSING, name, rate).loss.mean())) for name in WAYS}


@functools.cache
def _compared(seed: int) -> dict[str, Trained]:
    """Every way at its rate, and `other`, AdamW on other batches."""
    rates = _rates()
    aim = float(_trained(seed, "AdamW", rates["AdamW"]).loss.mean())
    found = {name: _trained(seed, name, rates[name], reach=aim) for name in WAYS}
    return found | {"other": _trained(seed, "AdamW", rates["AdamW"], reach=aim, other=True)}


def _trained(seed: int, name: str, rate: float, *, reach: float | None = None, other: bool = False) -> Trained:
    """A network drawn by the seed after all steps; with `reach` it is read where its held-out loss, looked at every EVERY steps, is that or less."""
    import tempfile
    from pathlib import Path

    from patchbay.tiny import lab
    from patchbay.train._objectives import objective
    from patchbay.train._panels import means, read
    from patchbay.train._plan import Arm, Rows, plan_of
    from patchbay.train._runs import Lab, begun
    from patchbay.train._trainer import trained

    texts: list[Any] = [[ids] for ids in lab.backcopies(TEXTS, seed)]
    held: list[Any] = [[ids] for ids in lab.backcopies(HELD, seed + 1000)]
    plan, aim = plan_of({"fresh": 1, "steps": STEPS, "batch_size": 16, "rate": rate}), objective("ntp")
    arm = Arm(optimizer=WAYS[name], other_batches=other)
    tuned = begun(Lab(lab.small(64, width=48, mlp=96), texts, held, plan), arm, seed)
    there: list[dict[str, float]] = []

    def look(tuned: Model) -> bool:
        """Whether the loss is reached; the first time the panel is read."""
        tuned._fingerprint = None
        reached = reach is not None and float(aim.scores(tuned, held).mean()) <= reach
        if reached and not there:
            there.append(means(read(tuned, held, aim, HELD)))
        return reached

    rows, nowhere = Rows(texts, arm, plan, seed), Path(tempfile.gettempdir())
    told = trained(tuned, rows, arm, plan, nowhere, keep=False, watch=None if reach is None else (EVERY, look))
    looked = [*told.seen, look(tuned)]
    steps = looked.index(True) * EVERY if any(looked) else None
    if reach is not None and not there:
        there.append(means(read(tuned, held, aim, HELD)))
    return Trained(aim.scores(tuned, held), told.state, steps, there[0] if there else {})
