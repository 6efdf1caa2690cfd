"""Corpus: tools for texts by the million: read as a stream, in bounded memory.

reading   texts of a file, one after another
"""

from patchbay.corpus.reading import texts_of

__all__ = ["texts_of"]
