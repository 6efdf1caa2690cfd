"""What stories of training share: a small network to train, arms by seed as rows and a figure, and the page."""

from __future__ import annotations

import itertools
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import patchbay as pb
from patchbay.draw import report, screen
from patchbay.draw.report import BAD, GOOD, INK, Picture, Section, Table, _axes, check_place
from patchbay.model.model import Model
from patchbay.results.record import versions
from patchbay.signal.port import PatchbayError
from patchbay.train._kept import Kept
from patchbay.train._paired import paired
from patchbay.train._plan import Arm
from patchbay.train._runs import PROBED, Lab, Run, cost, run_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = 5
SIGNS = "Bootstraps are inside a seed; p is of signs over seeds, two-sided. "
Step = Callable[["Telling", bool], Section]
Arms = Mapping[str, tuple[Lab, Arm]]


@dataclass
class Telling:
    """A story of training so far: the network whose form is trained, its seeds, where runs lie, and what was found."""

    model: Model
    seed: int
    seeds: int
    n: int | None = None
    folder: Path = Path()
    kept: Kept | None = None
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def of_seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)

    def opened(self, arm: str, seed: int) -> Model:
        """The network of an arm, as it ended."""
        return pb.load(self.folder / f"{arm.replace(' ', '-')}-{seed}")

    def trained(self, arms: Arms | Callable[[int], Arms], quiet: bool, what: str = "training") -> dict[str, list[Run]]:
        """Every arm of every seed, trained or taken from the folder: runs by arm. `arms` may depend on the seed."""
        assert self.kept is not None
        found: dict[str, list[Run]] = {}
        with screen.progress(what, quiet=quiet) as bar:
            for seed in self.of_seeds:
                here = arms(seed) if callable(arms) else arms
                for name, (lab, arm) in here.items():
                    found.setdefault(name, []).append(run_of(lab, name.replace(" ", "-"), arm, seed, self.kept))
                    bar(sum(map(len, found.values())), self.seeds * len(here))
        return found


@dataclass(frozen=True)
class Story:
    """A story as data: what it asks, how many tokens its own texts have, what it trains (None: nothing), its steps, and the key of the paper whose claim it tells."""

    name: str
    title: str
    lead: str
    vocab: int
    arms: Callable[[Telling], Arms] | None
    steps: Sequence[Step]
    paper: str


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


def judged(told: Section, held: bool, asked: str) -> None:
    """Say in words, and by the section's colour, whether what decides holds."""
    told.verdict, told.data["verdict"] = held, held
    told.text.append(f"**It {'holds' if held else 'does not hold'}** that {asked}.")


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


def curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], along: str, unit: str) -> Figure:
    """A line for each arm: (along, values)."""
    drawn, axis = _axes((5.2, 3.3))
    for (arm, (at, values)), (colour, dash) in zip(
        lines.items(), itertools.product((GOOD, BAD, INK), ("-", "--", ":")), strict=False
    ):
        axis.plot(at, values, dash, color=colour, lw=1.5, label=arm)
    axis.set_xlabel(along)
    axis.set_ylabel(unit)
    axis.legend(frameon=False, fontsize=8)
    return drawn


def tell(
    story: Story,
    model: Model,
    *,
    seed: int,
    report: str | Path,
    quiet: bool,
    n: int | None,
    folder: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Tell a story on networks of this model's form, or on the model; or with `dry_run` what that would cost. `folder`: where runs are kept, and gone on with."""
    needs(model, story.vocab, f"the story {story.name}")
    page = Path(report)
    check_place(page)
    telling = Telling(model, seed, SEEDS, n)
    if story.arms is None:
        return _told(story, telling, page, quiet, f"patchbay papers run {story.paper} checks the paper's claim.")
    arms = story.arms(telling)
    if dry_run:
        return _estimate(telling, arms, quiet)
    with tempfile.TemporaryDirectory() as nowhere:
        telling.folder = Path(folder) if folder else Path(nowhere) / "runs"
        plans = {name: asdict(lab.plan) for name, (lab, _) in arms.items()}
        request = {"story": story.name, "model": model.fingerprint, "seed": seed, "n": n, "plans": plans}
        with Kept(telling.folder, telling.folder, request).alone() as telling.kept:
            return _told(story, telling, page, quiet, _next(story, next(iter(arms)).replace(" ", "-"), seed, folder))


def _estimate(telling: Telling, arms: Arms, quiet: bool) -> dict[str, Any]:
    """What the story's trainings would cost, from a few steps of each arm; nothing is trained or written."""
    with screen.working("a few steps of each arm", quiet=quiet):
        found = {name: cost(lab, arm) for name, (lab, arm) in arms.items()}
    sums = {key: telling.seeds * sum(one[key] for one in found.values()) for key in ("seconds", "flops", "bytes")}
    rows = [
        [name, lab.plan.steps, telling.seeds, telling.seeds * found[name]["seconds"]] for name, (lab, _) in arms.items()
    ]
    text = [
        f"Nothing was trained. All trainings: about **{sums['seconds']:.0f} s**, {sums['bytes'] / 1e6:.1f} MB of checkpoints, "
        f"{sums['flops']:.2g} operations, from the seconds of {PROBED} steps of each arm."
    ]
    told = Section("What it would cost", text, [Table(("arm", "steps", "seeds", "seconds"), rows)])
    if not quiet:
        screen.say(*screen.sections(told, 1))
    return {"estimate": sums | {"by_arm": {name: telling.seeds * one["seconds"] for name, one in found.items()}}}


def _made(story: Story, telling: Telling) -> str:
    """What made the page."""
    model = telling.model
    form = f"form {model.config.model_type} ({sum(p.numel() for p in model.hf.parameters()):,} weights)"
    of = (
        f"a model of the {form}"
        if story.arms is None
        else f"{telling.seeds} seeds, networks of the {form} from weights drawn by seed"
    )
    said = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"Made by the command patchbay run {story.name}, seed {telling.seed}, {of}. Versions: {said}."


def _next(story: Story, arm: str, seed: int, folder: str | None) -> str:
    """The commands that look at what was trained, and that check the paper's claim."""
    keep = f"patchbay run {story.name} --folder runs keeps the networks, and " if folder is None else ""
    one = shlex.quote(f"{folder or 'runs'}/{arm}-{seed}")
    return (
        f"{keep}patchbay show {one} opens one of them as any model; "
        f"patchbay papers run {story.paper} checks the paper's claim."
    )


def _told(story: Story, telling: Telling, page: Path, quiet: bool, further: str) -> dict[str, Any]:
    """Run the steps, printing each as it ends; write the page; all numbers."""
    began, sections = time.perf_counter(), list[Section]()
    for step in story.steps:
        sections.append(step(telling, quiet))
        if not quiet:
            screen.say(*screen.sections(sections[-1], len(sections)))
    seconds = time.perf_counter() - began
    foot = [
        _made(story, telling),
        f"To look closer: {further}",
        f"Every number and figure is of this run. {'' if story.arms is None else SIGNS}Intervals are 95 %.",
    ]
    report.write(page, report.page(story.title, story.lead, sections, foot=foot))
    ending = Section(
        "What was written",
        [f"The page is **{page}**. {seconds:.0f} s.", f"To look closer: {further}"],
        data={"written": {"report": str(page)}, "seconds": seconds},
    )
    if not quiet:
        screen.say(*screen.sections(ending, len(sections) + 1))
    return {key: value for section in [*sections, ending] for key, value in section.data.items()}
