"""A Result in a notebook: the same front end as a widget (anywidget), which needs no server and no network."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from patchbay.app.document import document
from patchbay.app.saved_page import INLINE, static
from patchbay.errors import PatchbayError


def view(returned: Any) -> Any:
    """The widget of a Result or knob, for the last line of a cell."""
    return _widget()(document=json.dumps(document(returned, inline=INLINE), allow_nan=False))


@cache
def _widget() -> Any:
    try:
        import anywidget
        import traitlets
    except ModuleNotFoundError as error:
        raise PatchbayError(
            f"the view in a notebook needs {error.name}: pip install 'patchbay-lm[notebook]'; result.save_html(FILE) needs nothing"
        ) from error

    class View(anywidget.AnyWidget):  # type: ignore[misc]
        """One document, drawn by the front end of the page."""

        _esm, _css = static("patchbay.js"), static("patchbay.css")
        document = traitlets.Unicode("null").tag(sync=True)

    return View
