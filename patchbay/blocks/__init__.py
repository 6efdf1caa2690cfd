"""Blocks: other attention, mixers, feed-forward maps and embeddings in a Hugging Face model, which trains, saves, loads and is looked into like any other.

build      a model of a config, or of a model, with blocks in the places of its own
convolved  a causal convolution of queries, keys and values, and the cut of its taps
kinds      softmax1, K bias, KV bias, sigmoid, normalised sigmoid in the place of the softmax
register   make the class of a family's models with blocks known to transformers by name
"""

from patchbay.blocks import convolved, kinds
from patchbay.blocks.build import build, register

__all__ = ["build", "convolved", "kinds", "register"]
