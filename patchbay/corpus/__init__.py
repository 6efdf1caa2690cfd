"""Corpus: tools for texts by the million, read as a stream, in bounded memory, and for what a text is to a model.

compression  a text as as many bits as a model finds it surprising, and back
dedup        each text, or each paragraph, once; near copies by MinHash
languages    the same text in orders that no people speak, or in a second vocabulary
mixer        what a text is like, which stay, and from which source the next one comes
reading      texts of a file, one after another
selection    the texts of a pool that bring it nearest to a target
synthetic    languages that mean nothing, in which one thing alone can be learned
"""

from patchbay.corpus import compression, dedup, languages, mixer, selection, synthetic
from patchbay.corpus.reading import texts_of

__all__ = ["compression", "dedup", "languages", "mixer", "selection", "synthetic", "texts_of"]
