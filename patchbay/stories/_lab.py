"""What stories of training share: a small network to train, arms by seed as rows and a figure, and the page."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import patchbay as pb
from patchbay.draw import report, screen
from patchbay.draw.report import BAD, GOOD, INK, Picture, Section, Table, _axes
from patchbay.model.model import Model
from patchbay.results.record import versions
from patchbay.signal.port import PatchbayError
from patchbay.train._kept import Kept
from patchbay.train._paired import paired
from patchbay.train._plan import Arm
from patchbay.train._runs import Lab, run_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = 5
Step = Callable[["Telling", bool], Section]


@dataclass
class Telling:
    """A story of training so far: the network whose form is trained, its seeds, and what was found."""

    model: Model
    seed: int
    seeds: int
    folder: Path
    found: dict[str, Any] = field(default_factory=dict)

    def opened(self, run: str) -> Model:
        """The model of a run, as `variant-0`."""
        return pb.load(self.folder / run)


def runs_of(
    telling: Telling, arms: Mapping[str, tuple[Lab, Arm]], quiet: bool, what: str = "training"
) -> dict[str, list[Tensor]]:
    """Train every arm with every seed into the story's folder, as `NAME-SEED`: held-out scores by arm, for each seed [document]."""
    found: dict[str, list[Tensor]] = {arm: [] for arm in arms}
    with screen.progress(what, quiet=quiet) as bar:
        kept = Kept(telling.folder, telling.folder, {"story": what})
        for seed in range(telling.seed, telling.seed + telling.seeds):
            for name, (lab, arm) in arms.items():
                found[name].append(run_of(lab, name.replace(" ", "-"), arm, seed, kept).scores)
                bar(sum(map(len, found.values())), telling.seeds * len(arms))
    return found


def needs(model: Model, vocab: int, what: str) -> None:
    """Raise PatchbayError for a model with fewer tokens than the story's own text has."""
    if model.vocab_size < vocab:
        raise PatchbayError(f"{what} is told in {vocab} tokens; this {model.family.name} model has {model.vocab_size}")


def arms_section(
    title: str, text: Sequence[str], values: Mapping[str, Sequence[Tensor]], unit: str, against: str, key: str
) -> Section:
    """Values of arms by seed, each a mean over items: a table, a figure, and each arm's difference from the arm `against` with its signs.

    `values`: arm -> for each seed one number for each item [item].
    """
    stacked = {arm: torch.stack([one.double() for one in by_seed]) for arm, by_seed in values.items()}  # [seed, item]
    found = paired(stacked, twin=against, unit=unit)
    rows, data = [], {}
    for arm, by_seed in stacked.items():
        means = by_seed.mean(1).tolist()
        data[arm] = {"by_seed": means}
        rows.append([arm, sum(means) / len(means), min(means), max(means), "", "", ""])
        if arm != against:
            at = found.labels_of("condition").index(f"{arm} - {against}")
            ends = [float(found[name][at]) for name in ("effect", "low", "high")]
            signs = [int(found["above"][at]), int(found["below"][at])]
            data[arm] |= {
                "difference": ends,
                "above": signs[0],
                "below": signs[1],
                "p": float(found["p"][at]),
                "runs": found["by_run"][at].tolist(),
            }
            said = f"{signs[0]} above, {signs[1]} below" + (f", p {data[arm]['p']:.3g}" if sum(signs) else "")
            rows[-1][4:] = [f"{ends[0]:+.3f}", f"{ends[1]:+.3f} to {ends[2]:+.3f}", said]
    columns = ("arm", f"mean, {unit}", "least seed", "largest seed", f"less {against}", "95 %", "seeds")
    picture = Picture(
        partial(dots, {arm: row["by_seed"] for arm, row in data.items()}, unit),
        f"{title}: a dot is a seed, the bar their mean.",
    )
    return Section(title, list(text), [Table(columns, rows)], [picture], {key: data})


def dots(values: Mapping[str, Sequence[float]], unit: str) -> Figure:
    """A column of dots for each arm, a dot for each seed, and a bar at their mean."""
    drawn, axis = _axes((5.2, 3.3))
    colours = [GOOD, INK, BAD, *[INK] * len(values)]
    for at, (by_seed, colour) in enumerate(zip(values.values(), colours, strict=False)):
        axis.plot([at] * len(by_seed), by_seed, "o", ms=5, color=colour, alpha=0.6)
        mean = sum(by_seed) / len(by_seed)
        axis.plot([at - 0.25, at + 0.25], [mean, mean], color=colour, lw=2)
    axis.set_xticks(range(len(values)), list(values))
    axis.set_xlim(-0.6, len(values) - 0.4)
    axis.set_ylabel(unit)
    return drawn


def tell(
    telling: Telling, name: str, title: str, lead: str, steps: Sequence[Step], page: Path, quiet: bool
) -> dict[str, Any]:
    """Run the steps, printing each as it ends; write the page; all numbers."""
    began, sections = time.perf_counter(), []
    if page.is_dir():
        raise PatchbayError(f"cannot write the report to {page}: give a file")
    for step in steps:
        sections.append(step(telling, quiet))
        if not quiet:
            screen.say(*screen.sections(sections[-1], len(sections)))
    seconds = time.perf_counter() - began
    config = telling.model.config
    foot = [
        f"Made by the command patchbay run {name}, seed {telling.seed}, {telling.seeds} seeds. Networks of the form {config.model_type} "
        f"({sum(p.numel() for p in telling.model.hf.parameters()):,} weights) from weights drawn by seed. "
        f"Versions: {', '.join(f'{k} {v}' for k, v in versions().items())}.",
        "Every number and figure is of this run. Intervals are 95 % bootstraps inside a seed; p is of signs over seeds, two-sided.",
    ]
    report.write(page, report.page(title, lead, sections, foot=foot))
    ending = Section(
        "What was written",
        [f"The page is **{page}**. {seconds:.0f} s."],
        data={"written": {"report": str(page)}, "seconds": seconds},
    )
    if not quiet:
        screen.say(*screen.sections(ending, len(sections) + 1))
    return {key: value for section in [*sections, ending] for key, value in section.data.items()}
