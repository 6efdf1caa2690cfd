"""Decode: continue prompts by a method of the papers, under any edits and knobs. Every function returns a Result.

beam                   the likeliest continuations that a few beams find
best_of_n              several texts drawn, the best by a scorer or by a vote
compare                several decoders on the same prompts, side by side
contrastive_decoding   what an expert finds likelier than an amateur: another model, or the same one under a knob
contrastive_search     the likely token whose state is least like those before it
dexperts               the model's law, raised where an expert finds a token likelier than an anti-expert
diverse_beam           beams in groups that are pushed apart
dola                   what the last layer finds likelier than an earlier one
knn                    the model's law mixed with what followed the nearest states of a store
knn_parts              what a store gains on held-out text, part by part, beside simpler means
longheads              long texts, of which each head reads a few chunks
navigate               several answers, each away from those that were explored
rerank                 segments that are drawn, and kept by a scorer
rule_adapter           three rules on the output in place of a tuned model
samplers               text drawn after a chain of steps: mirostat, top-n-sigma, DRY, XTC and those of transformers
speculative            the model's own text in fewer passes, proposed by a cheap draft and checked
superposed             several drafts in one stream of mixed embeddings
watermark              text with a mark and without it, and how surely a detector tells them apart
"""

from patchbay.decode.beam import beam
from patchbay.decode.best_of_n import best_of_n
from patchbay.decode.compare import compare
from patchbay.decode.contrastive_decoding import contrastive_decoding
from patchbay.decode.contrastive_search import contrastive_search
from patchbay.decode.dexperts import dexperts
from patchbay.decode.diverse_beam import diverse_beam
from patchbay.decode.dola import dola
from patchbay.decode.knn import knn
from patchbay.decode.knn_parts import knn_parts
from patchbay.decode.longheads import longheads
from patchbay.decode.navigate import navigate
from patchbay.decode.rerank import rerank
from patchbay.decode.rule_adapter import rule_adapter
from patchbay.decode.samplers import samplers
from patchbay.decode.speculative import speculative
from patchbay.decode.superposed import superposed
from patchbay.decode.watermark import watermark

__all__ = [
    "beam",
    "best_of_n",
    "compare",
    "contrastive_decoding",
    "contrastive_search",
    "dexperts",
    "diverse_beam",
    "dola",
    "knn",
    "knn_parts",
    "longheads",
    "navigate",
    "rerank",
    "rule_adapter",
    "samplers",
    "speculative",
    "superposed",
    "watermark",
]
