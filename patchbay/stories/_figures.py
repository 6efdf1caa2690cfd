"""Figures of the stories: curves before and after, the turns that were tried, a rank curve. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from patchbay.draw.report import BAD, FAINT, GOOD, GREY, INK, _axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from patchbay.results.result import Result
    from patchbay.signal.channel import Channel
    from patchbay.stories._turns import Search


def before_after(rows: Sequence[Any], rivals: Sequence[Sequence[float]] | None, label: str) -> Figure:
    """Shares with bands, before and after, over a number; `rivals` as a grey range."""
    drawn, axis = _axes((5.2, 3.3))
    x = [row[0] + (label != "objects in the list") for row in rows]
    if rivals is not None:
        axis.fill_between(
            x, [min(r) for r in rivals], [max(r) for r in rivals], color=FAINT, alpha=0.3, lw=0, label="rivals"
        )
    for which, name, colour in ((0, "before", INK), (1, "after", GOOD)):
        found = [row[2][which] for row in rows]
        axis.plot(x, [f.mean for f in found], "o-", color=colour, lw=2, ms=3.5, label=name)
        axis.fill_between(x, [f.low for f in found], [f.high for f in found], color=colour, alpha=0.14, lw=0)
    axis.set_ylim(-0.02, 1.04)
    axis.set_xlabel(label)
    axis.set_ylabel("missing object named")
    return _finished(drawn, axis)


def turns(found: Search, candidates: Sequence[Channel]) -> Figure:
    """For each candidate, the share at each strength; dots at the right for coordinates."""
    drawn, axis = _axes((5.2, 3.3))
    for channel in candidates:
        own = [(t, float(s)) for t, s in zip(found.turns, found.share, strict=True) if t.channel == channel]
        kept = [(1.0, found.base), *((t.strength, s) for t, s in own if t.strength is not None)]
        chosen = channel == found.turns[found.best].channel
        x, y = zip(*sorted(kept), strict=True)
        axis.plot(
            x,
            y,
            "o-",
            ms=3,
            lw=2.2 if chosen else 1,
            color=GOOD if chosen else FAINT,
            label=str(channel.source) if chosen else None,
        )
        if chosen:
            axis.plot(
                [5] * len(own),
                [s if t.strength is None else float("nan") for t, s in own],
                "s",
                ms=4,
                color=BAD,
                label="its coordinates",
            )
    axis.axhline(found.base, color=INK, lw=0.8, ls=":")
    axis.set_xlabel("strength (1 leaves the model as it is)")
    axis.set_ylabel("named, on choosing prompts")
    return _finished(drawn, axis)


def rank_curve(found: Result) -> Figure:
    """Right answers without the top, the bottom and random components."""
    drawn, axis = _axes((5.2, 3.3))
    x = found.labels_of("n_parts")
    for i, (name, colour) in enumerate(zip(found.labels_of("condition"), (BAD, GOOD, FAINT), strict=True)):
        axis.plot(x, found["accuracy"][i].tolist(), "o-", color=colour, lw=2, ms=3.5, label=name)
        low, high = (found[f"accuracy_{end}"][i].tolist() for end in ("low", "high"))
        axis.fill_between(x, low, high, color=colour, alpha=0.16, lw=0)
    axis.set_ylim(-0.02, 1.04)
    axis.set_xlabel("components taken away")
    axis.set_ylabel("right answers")
    return _finished(drawn, axis)


def _finished(drawn: Figure, axis: Any) -> Figure:
    axis.grid(axis="y", color=GREY, lw=0.7)
    axis.set_axisbelow(True)
    axis.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    return drawn
