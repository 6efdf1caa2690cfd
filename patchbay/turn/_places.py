"""Places: which positions a knob acts at, as options of a method: plain data, which prints and is recorded.

None or "all"            every position
3, -1, [1, 2]            positions in the prompt, negative ones from its end
"2:5", "4:"              a slice of the prompt; an open one goes on through generated tokens
"last", "generated"      the last token of each prompt; every token after it
"token: the"             every position that holds the token " the"
"""

from __future__ import annotations

import re
from typing import TypeAlias

from patchbay.signal.port import PatchbayError
from patchbay.signal.positions import Positions, Token

Place: TypeAlias = int | list[int] | str | None
FORMS = '"all", "last", "generated", 3, [1, 2], "2:5" or "token: the"'


def places(written: Place) -> Positions:
    """The positions of an edit that a written place means; PatchbayError that names the forms where it means none."""
    if written is None or written == "all":
        return None
    if isinstance(written, bool) or not isinstance(written, int | str | list | tuple):
        raise PatchbayError(f"positions {written!r}: written {FORMS}")
    if isinstance(written, int):
        return written
    if not isinstance(written, str):
        if not written or not all(isinstance(at, int) and not isinstance(at, bool) for at in written):
            raise PatchbayError(f"positions {written!r}: a list holds one whole number or more")
        return tuple(written)
    if written in ("last", "generated"):
        return written  # type: ignore[return-value]
    if written.startswith("token:") and len(written) > len("token:"):
        return Token(written.removeprefix("token:"))
    if re.fullmatch(r"-?\d+", written):
        return int(written)
    if found := re.fullmatch(r"(-?\d*):(-?\d*)", written):
        start, stop = (int(end) if end not in ("", "-") else None for end in found.groups())
        if None not in (start, stop) and (start < 0) == (stop < 0) and start >= stop:  # type: ignore[operator]
            raise PatchbayError(f"positions {written!r}: no position from {start} to before {stop}")
        return slice(start, stop)
    raise PatchbayError(f"positions {written!r}: written {FORMS}")
