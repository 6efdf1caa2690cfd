"""Stories: what a paper did, end to end, on the model at hand: `patchbay run STORY --model MODEL`.

corpus-transfer train on strings that mean nothing, then on a little text, and see which heads serve
impossible-languages   train on orders that nobody speaks, and see what is learned and what heads look at
low-rank        cut a model by one threshold on its spectra, and by the same ranks dealt anew
one-layer-induction   convolve keys, and one layer repeats what it has read; cut one tap, and it does not
reversal        train on permuted units, and ask for facts the way that was not read
sinks           train heads of four kinds, and see which rest on the first token, when, and what they do elsewhere
talking-heads   find the channel that tells the mover what is done with, prove it, turn it, and count what is named

A story finds, proves and turns with the methods of the other folders, says what came of it on prompts that chose nothing, also
when that is nothing, and writes a page. One file is one story: its function `tell` runs it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from patchbay.signal.port import PatchbayError, suggest


def names() -> list[str]:
    """The stories that can be run, as the command line writes them."""
    files = sorted(Path(__file__).parent.glob("[a-z]*.py"))
    return [path.stem.replace("_", "-") for path in files if "\ndef tell(" in path.read_text(encoding="utf-8")]


def story(name: str) -> Callable[..., dict[str, Any]]:
    """The function that tells a story: (model, *, seed, report, quiet, n) -> its numbers; of one that trains with `folder` and `dry_run`, too."""
    known = names()
    if name.replace("_", "-") not in known:
        raise PatchbayError(f"no story {name!r}; stories are {', '.join(known)}{suggest(name, known)}")
    tell: Callable[..., dict[str, Any]] = import_module(f"patchbay.stories.{name.replace('-', '_')}").tell
    return tell


def own_form(name: str) -> Callable[[], Any] | None:
    """What makes the network that a story trains where none is given; None for stories of models that are trained already."""
    found: Callable[[], Any] | None = getattr(import_module(f"patchbay.stories.{name.replace('-', '_')}"), "form", None)
    return found


def trains(name: str) -> bool:
    """Whether a story trains networks, so that it has a folder to keep them in and an estimate of its cost."""
    return "folder" in inspect.signature(story(name)).parameters


def first_line(name: str) -> str:
    """What a story is about, from its file's first line, without importing it."""
    text = (Path(__file__).parent / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
    return text.removeprefix('"""').split("\n")[0]
