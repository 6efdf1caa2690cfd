"""Claims about blocks as they train: a network with another block beside its twin, and the arm that lacks what the paper claims.

Networks are of the lab's own, trained from weights drawn by the seed on the same texts in the same order, three seeds each; the model at hand has no part in them, so that what an
untrained network of its form shows is the same number again. The identities that the blocks stand on are held by their tests. Rates and steps were chosen on the plain network alone.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._grown import grown, said
from patchbay.papers.claims.training import difference

if TYPE_CHECKING:
    from torch import Tensor

    from patchbay.model.model import Model


def _right(hf: Any, held: list[tuple[list[int], list[int]]]) -> Tensor:
    """The share of the told places of each text at which the likeliest token is the text's, [text]; texts of one length."""
    import torch

    likeliest = said(hf, [ids for ids, _ in held]).argmax(-1)
    shares = [
        sum(int(row[at - 1]) == ids[at] for at in places) / len(places)
        for row, (ids, places) in zip(likeliest, held, strict=True)
    ]
    return torch.tensor(shares, dtype=torch.float64)


# --- recall -------------------------------------------------------------------------------------------

MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"convolution": 3},
    "gla": {"convolution": 3, "mixer": "gla"},
    "linear": {"convolution": 3, "mixer": {"kind": "gla", "decay": False}},
    "h3": {"mixer": "h3"},
    "lssl": {"mixer": "lssl"},
}


@functools.cache
def _recalled(seed: int, mixer: str) -> tuple[Tensor, Tensor]:
    """The share of values that are right where their key came before, by text, of a network of one layer: in texts as long as those trained on, with as many pairs; and
    in texts of four times the length and the pairs."""
    from patchbay.tiny import lab

    texts = [ids for ids, _ in lab.recalls(4096, seed, pairs=4, length=32)]
    network = lab.small(32, layers=1, width=48, mlp=1)
    hf = grown(network, texts, MIXERS[mixer], seed, steps=300, rate=1e-2)
    one, other = (_right(hf, lab.recalls(64, seed + 1000, pairs=4 * n, length=32 * n)) for n in (1, 4))
    return one, other


def _shares(seed: int, names: tuple[str, ...], longer: int) -> dict[str, float]:
    return {name: float(_recalled(seed, name)[longer].mean()) for name in names}


@claim("yang2023", "comparison")
def yang2023(model: Model, seed: int) -> Claim:
    """Confirmed if, in texts of four times the length and the pairs that were trained on, gated linear attention recalls more values than the same layer without its decay. Told
    beside it: softmax attention, and texts as long as those trained on. Queries, keys and values of all three are convolved."""
    names = ("gla", "linear", "attention")
    near, far = (_shares(seed, names, longer) for longer in (0, 1))
    text = (
        f"in networks of one layer, gated linear attention recalls {far['gla']:.0%} of the values in texts four times as long as those trained on, {far['linear']:.0%} without decay and softmax attention "
        f"{far['attention']:.0%} (as long as those: {near['gla']:.0%}, {near['linear']:.0%}, {near['attention']:.0%}; chance 6%)"
    )
    return Claim(text, *difference(_recalled(seed, "gla")[1], _recalled(seed, "linear")[1]), 0.0, "share of values")


@claim("fu2022", "comparison")
def fu2022(model: Model, seed: int) -> Claim:
    """Confirmed if H3 recalls more values than a linear state space, which cannot compare contents, by more than 0.3 of them. Told beside it: convolved attention, which the
    paper matches."""
    found = _shares(seed, ("h3", "lssl", "attention"), 0)
    text = (
        f"in networks of one layer, H3 recalls {found['h3']:.0%} of the values whose key came before, a linear state space {found['lssl']:.0%}, and softmax attention {found['attention']:.0%} "
        "(one of the text's own: 25%)"
    )
    return Claim(text, *difference(_recalled(seed, "h3")[0], _recalled(seed, "lssl")[0]), 0.3, "share of values")
