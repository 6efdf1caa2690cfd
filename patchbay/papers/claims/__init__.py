"""Claims of papers, at the size of a small model: each checked by one function, with an interval and one rule for the verdict.

A claim says that a number stands above (or below) a bound: what chance or the control gives, or what the claim itself names. It
stands in the function, before anything is run. Four kinds: an `identity` holds of every model, a `mechanism` is learned, a
`comparison` is of two measures, and what is `made` is of networks that the check makes itself (`KINDS`). Each is run with three seeds (five where networks are trained)
on the model and, but for what is made, on untrained networks of its form, all told, and one rule gives the verdict (`_check`): confirmed, not confirmed, inconclusive, or not testable here, where the model has
too few parts for its random controls to reach p = .05. What a claim shows holds for this model and these prompts, whose like the
built-in models were trained on. Where a paper's own case cannot be had at this size (languages, refusals), the claim is of its small
analogue, and says so.

blocks    the identities that other architectures stand on, and a tuning for sub-networks
coded     text that another network compressed, in windows and in plain bits
corpora   what texts, tokenizers, vocabularies and times tell and teach
choices   which texts of a pool are taken, for a target or after a cut
exits     what is read before the last layer, of networks that were trained to say it there
behaviour what models say, where most papers need larger ones
factored  matrices in factors: low ranks tuned alone, feed-forward layers beside narrower ones
features  sparse dictionaries
heads     which heads there are, what they write, what they are needed for
imitation what is written after training with rewards
languages what several languages in one network do, clones of one
neurons   neurons and experts
objectives what training by another objective, or few numbers, brings
optimizers what training by other steps brings
meters    what published evaluations say
mixtures  which tokens are learned, in which order they come, how many are held
layers    where something can be read, and in which words
readings  what sharper probes of behaviour say
prompting what examples, glosses, judges and histories in prompts do
proving   what patching, paths, edges and circuits show
scaling   laws of losses by size and share
training  what training another way brings, beside a twin
relations maps between layers, subspaces and relations that are learned or derived
toys      what networks show that were taught a task whose truth is known (tiny.automata, ciphers, clones, feedback)
trained   what a model shows that had a lesson (tiny.lessons), for behaviour that no shipped model has
turning   what knobs do
symbols   trees and symbols that networks find in texts, trained beside a twin
variants  networks with other blocks, trained beside their twins
decoding  what decoders write
"""

from __future__ import annotations

from patchbay.papers.claims import (
    behaviour,
    blocks,
    choices,
    coded,
    corpora,
    decoding,
    exits,
    factored,
    features,
    heads,
    imitation,
    languages,
    layers,
    meters,
    mixtures,
    neurons,
    objectives,
    optimizers,
    prompting,
    proving,
    readings,
    relations,
    scaling,
    symbols,
    toys,
    trained,
    training,
    turning,
    variants,
)
from patchbay.papers.claims._check import Checked, check
from patchbay.papers.claims._claim import CLAIMS, KINDS, Claim, claim, known

__all__ = [
    "CLAIMS",
    "KINDS",
    "Checked",
    "Claim",
    "behaviour",
    "blocks",
    "check",
    "choices",
    "claim",
    "coded",
    "corpora",
    "decoding",
    "exits",
    "factored",
    "features",
    "heads",
    "imitation",
    "known",
    "languages",
    "layers",
    "meters",
    "mixtures",
    "neurons",
    "objectives",
    "optimizers",
    "prompting",
    "proving",
    "readings",
    "relations",
    "scaling",
    "symbols",
    "toys",
    "trained",
    "training",
    "turning",
    "variants",
]
