"""Blocks: other attention, mixers, feed-forward maps and embeddings in a Hugging Face model, which trains, saves, loads and is looked into like any other.

abs_topk       of a token's activations the k largest by size
build          a model of a config, or of a model, with blocks in the places of its own
convolved      a causal convolution of queries, keys and values, and the cut of its taps
gate           gated residuals, and how far their gates are open
gla            gated linear attention: recurrent, parallel, in chunks
kinds          softmax1, K bias, KV bias, sigmoid, normalised sigmoid in the place of the softmax
lexinvariant   embeddings that are drawn for each text
meta_tokens    a token whose places look at one another, put among others
monet          feed-forward layers of E x E small experts, read by text and switched off
next_vector    the next sentence's vector as codes of which each refines the last
ngram          layers that give each token the mean of what followed the last n tokens before
prefix_bag     a term of the logits that knows which words came before, and not in which order
register       make the class of a family's models with blocks known to transformers by name
state_space    recurrences as long convolutions: H3, LSSL, HiPPO
structured     feed-forward maps in factors, with a dense guide
subnetworks    what is left of a model without parts of its layers, and which of these nothing of their size beats
trees          trees from heights and distances, and from any attention pattern
turned         angles between queries and keys, times a number and plus another for each pair of channels
two_way        later keys seen as if they stood as far before, for a while
welore         ranks of matrices by one threshold, and their null
"""

from patchbay.blocks import (
    abs_topk,
    convolved,
    gate,
    gla,
    kinds,
    lexinvariant,
    meta_tokens,
    monet,
    next_vector,
    ngram,
    prefix_bag,
    state_space,
    structured,
    subnetworks,
    trees,
    turned,
    two_way,
    welore,
)
from patchbay.blocks.build import build, register

__all__ = [
    "abs_topk",
    "build",
    "convolved",
    "gate",
    "gla",
    "kinds",
    "lexinvariant",
    "meta_tokens",
    "monet",
    "next_vector",
    "ngram",
    "prefix_bag",
    "register",
    "state_space",
    "structured",
    "subnetworks",
    "trees",
    "turned",
    "two_way",
    "welore",
]
