"""What stands higher up and is reached only when it is asked for. This table is the one place where a lower room names a higher one.

A Result draws itself, a signal of a run becomes one, a knob exports itself, a record makes its knob again; a Result that is not drawn needs no matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

LATE = {
    "blocks": "blocks.build.known",  # pb.load of a model with blocks
    "figure": "draw.plot.of_result",  # Result.plot
    "save_figure": "draw.style.save",
    "shown": "results.shown.of_trace",  # Trace.show
    "panel": "stories.panel.panel",  # train.variant, of each of its runs
    "card": "stories.card.card",  # Model.card
    "export": "knobs.export.export",  # Knob.export
    "view": "app.widget.view",  # Result.view
    "save_html": "app.saved_page.save_html",  # Result.save_html
    "ui": "app.opened.serve",  # patchbay ui
    "knob": "knobs.knob.Knob.from_json",  # a knob that stands in a Result's record
}


def late(name: str) -> Any:
    """The function behind a name of the table."""
    room, file, *path = LATE[name].split(".")
    found: Any = import_module(f"patchbay.{room}.{file}")
    for step in path:
        found = getattr(found, step)
    return found
