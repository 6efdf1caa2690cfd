"""Corpus: tools for texts by the million, read as a stream, in bounded memory, and for what a text is to a model.

automata     languages that a text explains itself, and the distance of a prediction from them
compression  a text as as many bits as a model finds it surprising, and back
dedup        each text, or each paragraph, once; near copies by MinHash
diachronic   which words changed between slices of time, by models of each
languages    the same text in orders that no people speak, or in a second vocabulary
mixture      from the order of a tokenizer's merges, how much of which text it was trained on
mixture_law  losses by size and by a language's weight in training, and what that is worth
mixer        what a text is like, which stay, and from which source the next one comes
reading      texts of a file, one after another
recovery     texts that bring back what a cut took, by where the cut model differs from the whole one
selection    the texts of a pool that bring it nearest to a target
stories      short stories from a grammar, and a grader of any text
synthetic    languages that mean nothing, in which one thing alone can be learned
transtokens  a model under another vocabulary, its rows from those of aligned tokens

Each is imported when it is used: what only reads and counts texts needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from patchbay.corpus.reading import records_of, texts_of

if TYPE_CHECKING:
    from patchbay.corpus import (
        automata,
        compression,
        dedup,
        diachronic,
        languages,
        mixer,
        mixture,
        mixture_law,
        recovery,
        selection,
        stories,
        synthetic,
        transtokens,
    )

__all__ = [
    "automata",
    "compression",
    "dedup",
    "diachronic",
    "languages",
    "mixer",
    "mixture",
    "mixture_law",
    "records_of",
    "recovery",
    "selection",
    "stories",
    "synthetic",
    "texts_of",
    "transtokens",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"patchbay.corpus.{name}")
    raise AttributeError(f"patchbay.corpus has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
