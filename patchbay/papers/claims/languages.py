"""Claims about several languages: clones of one, whose words are other tokens, so that what a network shares between them is known.

The networks are the lab's own, from weights drawn by the seed, and the model at hand has no part.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from patchbay.papers.claims._claim import TRAINED, Claim, claim
from patchbay.papers.claims.training import alone, difference, pair

if TYPE_CHECKING:
    from torch import Tensor

    from patchbay.model.model import Model

VOCAB = 24  # tokens of one language


@claim("schafer2024", "made", seeds=TRAINED)
def schafer2024(model: Model, seed: int) -> Claim:
    """Confirmed if the smaller of two clones of a language, a tenth of the documents, costs less beside the larger one than it costs a network that read it alone, as many documents of it in
    as many steps, by more than a tenth of a nat. Told beside it: alone in a tenth of the steps; and an even mixture, which by the paper is worse for both."""
    found = _imbalanced(seed)
    told = {name: one.mean(1).tolist() for name, one in found.items()}
    text = (
        f"a language that is a tenth of what a network reads costs {told['uneven'][1]:.2f} nats a token beside its clone, {told['alone'][1]:.2f} alone in as many steps, {told['few steps'][1]:.2f} in a tenth of them, "
        f"{told['even'][1]:.2f} in an even mixture; the larger one {told['uneven'][0]:.2f}, {told['even'][0]:.2f} in the even mixture"
    )
    return Claim(text, *difference(found["alone"][1], found["uneven"][1]), 0.1, "nats per token")


@functools.cache
def _imbalanced(seed: int) -> dict[str, Tensor]:
    """Held-out loss in both clones [language, text] of networks that read both, evenly or not, or the second alone."""
    import torch

    from patchbay.tiny import lab
    from patchbay.train._objectives import objective
    from patchbay.train._plan import Arm

    texts = lab.backcopies(3260, seed, length=16, vocab=VOCAB)
    held: Any = [[one] for one in texts[3200:]]

    def losses(tuned: Model) -> Tensor:
        return torch.stack([objective(f"cloned:vocab={VOCAB},scored={i}").scores(tuned, held) for i in (0, 1)])

    network, plan = lab.small(2 * VOCAB, width=32, heads=2, mlp=64), {"steps": 200, "batch_size": 16}
    arms = [Arm(f"cloned:vocab={VOCAB},share={share}") for share in (0.9, 0.5, 0.0)]
    uneven, even = pair(network, texts[:3200], losses, seed, (arms[0], arms[1]), **plan)
    rest = {"alone": 200, "few steps": 20}
    few = {
        name: alone(network, texts[:320], losses, seed, arms[2], **{**plan, "steps": steps})
        for name, steps in rest.items()
    }
    return {"uneven": uneven, "even": even, **few}


@claim("liu2024", "made", seeds=TRAINED)
def liu2024(model: Model, seed: int) -> Claim:
    """Confirmed if a network that learned two clones of a language with language vectors before its unembedding finds more translations by its middle states than one
    that learned them without, and than one whose vectors did not follow the language."""
    base = f"vocab={VOCAB},languages=2,scripts=1"
    found = _found(f"langsamp:{base}", f"cloned:vocab={VOCAB}", f"langsamp:{base},tied=0", seed)
    return _translations("vectors for languages before the unembedding", found)


@claim("liu2024b", "made", seeds=TRAINED)
def liu2024b(model: Model, seed: int) -> Claim:
    """Confirmed if a network trained with a contrast of texts and their transliterations finds more translations by its middle states than one that read both scripts alone,
    by more than 0.3 of the texts."""
    found = _found(
        f"translico:vocab={VOCAB}", f"cloned:vocab={VOCAB}", f"translico:vocab={VOCAB},paired=0", seed, steps=50
    )
    return _translations("a contrast with transliterations", found, 0.3)


def _translations(what: str, found: tuple[Tensor, Tensor, Tensor], bound: float = 0.0) -> Claim:
    one, other, null = (float(some.mean()) for some in found)
    text = f"of 60 texts in two clones of a language {one:.0%} find their translation by the middle states with {what}, {other:.0%} without, {null:.0%} with its null"
    return Claim(text, *difference(found[0], found[1]), bound, "share of texts")


@functools.cache
def _found(variant: str, twin: str, null: str, seed: int, *, steps: int = 150) -> tuple[Tensor, Tensor, Tensor]:
    """Of 60 held-out texts, whether the nearest middle state in the other clone is their translation's, for three ways to train."""
    from patchbay.corpus.languages import clone, retrieved
    from patchbay.corpus.selection import states
    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    chain = lab.backcopies(660, seed, length=16, vocab=VOCAB)
    held = [chain[600:], [clone(ids, VOCAB, 1, 2) for ids in chain[600:]]]

    def right(tuned: Model) -> Tensor:
        return retrieved(*(states(tuned, some, layer=0) for some in held)).double()

    network = lab.small(2 * VOCAB, width=32, heads=2, mlp=64)
    arms = [Arm(text) for text in (variant, twin, null)]
    one, other = pair(network, chain[:600], right, seed, (arms[0], arms[1]), steps=steps)
    return one, other, alone(network, chain[:600], right, seed, arms[2], steps=steps)
