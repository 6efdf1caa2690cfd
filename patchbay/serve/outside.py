"""One rule for the page's fields and the agents' inputs: no text names a file outside the folder, in whatever way it is written.

A text may be a name itself, a prompts' file (`@FILE`, `FILE:field=name`), a knob (`FILE@2`), one of several (`a,FILE`), or hold one as an option of
a task, a decoder or a meter (`name:table=FILE`, `name(kept='FILE')`). Each piece is looked at as whoever reads it would find it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from patchbay.errors import PatchbayError

WRITTEN = re.compile(r"""[,:;=@()\[\]{}'"\n]""")  # around what an option's text may hold


def refuse_outside(text: str, folder: Path, stands: Path) -> None:
    """Raise PatchbayError for a text that names a file outside `folder`, also by a link in it. `stands`: where names that do not begin at a
    root are read from; a name that the folder has is the folder's."""
    root = folder.resolve()
    for piece in _pieces(text):
        try:
            own, found = (root / piece).resolve(), (stands / Path(piece).expanduser()).resolve()
            inside = own.exists() and (own == root or root in own.parents)
            outside = not inside and found != root and root not in found.parents and found.exists()
            outside = outside and (found.is_file() or _is_path(piece) or piece == text.strip())
        except (OSError, ValueError, RuntimeError):  # no path at all
            continue
        if outside:
            raise PatchbayError(f"{piece!r:.200} is a file outside the folder {root}; copy it there")


def _pieces(text: str) -> Iterator[str]:
    """What of a text may be a name: the whole, what stands between commas and other signs, without what is written around a file."""
    for part in dict.fromkeys([text, *text.split(","), *WRITTEN.split(text)]):
        bare = part.strip().lstrip("@")
        for piece in dict.fromkeys([part.strip(), bare, bare.rpartition(":")[0], part.strip().rpartition("@")[0]]):
            if piece and "\0" not in piece:
                yield piece


def _is_path(piece: str) -> bool:
    return "/" in piece or "\\" in piece or piece.startswith((".", "~"))
