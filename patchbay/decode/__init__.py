"""Decode: continue prompts by a method of the papers, under any edits and knobs. Every function returns a Result.

contrastive_decoding   what an expert finds likelier than an amateur: another model, or the same one under a knob
contrastive_search     the likely token whose state is least like those before it
dola                   what the last layer finds likelier than an earlier one
"""

from patchbay.decode.contrastive_decoding import contrastive_decoding
from patchbay.decode.contrastive_search import contrastive_search
from patchbay.decode.dola import dola

__all__ = ["contrastive_decoding", "contrastive_search", "dola"]
