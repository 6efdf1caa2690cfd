"""Predictive geometry: how sure a model's predictions are, how much they depend on the text, and whether its states lie as its predictions do.

    gap = mean over tokens of -log p(token) - H(p)         0 where what comes is as surprising as the model expects
    information = H(mean p) - mean H(p)                    what the text tells of the next token, in nats
    alignment[layer] = CKA(states, K),    K_ij = sum over v of sqrt(p_i(v) p_j(v)) of the predictions at two tokens

`value` is the gap, in nats per token; `entropy` and `surprisal` stand beside it. Linear CKA is in [0, 1]. Its nulls are two: states dealt to
the tokens at random (`alignment_shuffled`), and a network of this form with the weights that training starts from (`alignment_untrained`). The second
may be the higher one: nearly uniform predictions are linear in the state, so a high alignment alone is no sign of training. One forward pass, one
more of the untrained network; alignment is of at most `MOST` tokens, evenly taken.

Zhang 2025, "A Markov Categorical Framework for Language Modeling". Neither way is better. The paper's claim about spectra is not tested here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure._items import Items, resolved
from patchbay.measure._meter import reading
from patchbay.measure._runs import batches, comparing, distributions
from patchbay.measure._texts import Text, given_texts, whole_texts
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.results.untrained import untrained
from patchbay.signal.port import PatchbayError, Port

MOST = 400  # tokens of an alignment
NATS = "nats per token"


@method(paper="zhang2025b")
def predictive_geometry(
    model: Model, items: Items, *, twin: bool = True, seed: int = 0, batch_size: int = 32
) -> Result:
    """Surprisal minus entropy of the predictions of texts, the information that the text gives, and the alignment of states with predictions.

    `alignment` [layer] with `alignment_shuffled` and `alignment_untrained`.

    `items`: texts, lists of token ids, a Task (its prompts), or a file with the field text. `twin`: whether an untrained network of this form is
    run as a null of the alignment.
    """
    texts, names, _, said = given_texts(resolved(model, items))
    read = whole_texts(model, texts, names)
    _check(model, read)
    rows = [text.before + text.ids for text in read]
    places = [range(len(text.before) - 1, len(row) - 1) for text, row in zip(read, rows, strict=True)]
    found = distributions(model, rows, places, batch_size=batch_size)  # of each text [token, vocab]
    entropy = torch.stack([-(logp.exp() * logp).nan_to_num(0.0).sum() for logp in found])  # [text]
    surprisal = torch.stack(
        [-logp.gather(1, torch.tensor(text.ids)[:, None]).sum() for logp, text in zip(found, read, strict=True)]
    )
    count = torch.tensor([float(len(text.ids)) for text in read], dtype=torch.float64)
    more: dict[str, Any] = {
        "entropy": (entropy.sum() / count.sum(), (), NATS),
        "surprisal": (surprisal.sum() / count.sum(), (), NATS),
        "information": (information(torch.cat(found)), (), "nats"),
    }
    notes = list(said)
    if not comparing():
        own = aligned(model, rows, places, found, batch_size)  # [layer]
        more["alignment"] = (own, ("layer",), "CKA")
        more["alignment_shuffled"] = (aligned(model, rows, places, found, batch_size, deal=seed), ("layer",), "CKA")
        made = untrained(model, seed) if twin else "it was not asked for"
        if isinstance(made, Model):
            theirs = distributions(made, rows, places, batch_size=batch_size)
            more["alignment_untrained"] = (aligned(made, rows, places, theirs, batch_size), ("layer",), "CKA")
        else:
            notes.append(f"no untrained network: {made}")
    gap = surprisal - entropy
    return reading(
        {"per_item": gap, "length": count}, NATS, better="neither", made="ratio", null=0.0,
        p=float(maths.sign_flip_p(gap[:, None], seed=seed)[0]), more=more, units={"per_item": "nats", "length": "tokens"},
        notes=notes, seed=seed,
    )  # fmt: skip


def information(logp: Tensor) -> float:
    """H(mean p) - mean H(p) in nats, of log-probabilities [token, vocab]: the Jensen-Shannon divergence, 0 where all are alike."""
    p, mean = logp.exp(), logp.exp().mean(0)
    return float((p * (logp - mean.clamp_min(1e-300).log())).nan_to_num(0.0).sum(1).mean())


def overlap(logp: Tensor) -> Tensor:
    """K [token, token], the sum over v of sqrt(p_i(v) p_j(v)): its diagonal is 1 and no eigenvalue is below 0."""
    root = (logp / 2.0).exp()
    return root @ root.T


def cka(a: Tensor, b: Tensor) -> float:
    """Centred kernel alignment of two kernels [token, token]; 0 where either has nothing beside its mean."""
    a, b = ((x - x.mean(0)) - (x - x.mean(0)).mean(1, keepdim=True) for x in (a, b))
    scale = float(a.norm() * b.norm())
    return float((a * b).sum()) / scale if scale > 1e-12 else 0.0


def aligned(
    model: Model,
    rows: Sequence[Sequence[int]],
    places: Sequence[range],
    found: Sequence[Tensor],
    batch_size: int,
    deal: int | None = None,
) -> Tensor:
    """Alignment of each layer's states with the predictions at the same tokens, or at others that a seed deals, [layer]."""
    total = sum(map(len, places))
    kept = torch.arange(0, total, max(1, -(-total // MOST)))
    kernel = overlap(torch.cat(list(found))[kept])
    order = torch.arange(len(kept))
    if deal is not None:
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(deal))
    states = _states(model, rows, places, batch_size)[:, kept][:, order]  # [layer, token, d_model]
    return torch.tensor([cka(layer @ layer.T, kernel) for layer in states], dtype=torch.float64)


def _states(model: Model, rows: Sequence[Sequence[int]], places: Sequence[range], batch_size: int) -> Tensor:
    """The streams after every layer at the places of all rows, [layer, token, d_model]."""
    ports = [Port("resid_out", i) for i in range(model.n_layers)]
    of: dict[int, Tensor] = {}
    for some in batches(model, rows, batch_size):
        trace = run(model, [list(rows[i]) for i in some], taps=ports, logits="last")
        for at, i in enumerate(some):
            of[i] = torch.stack([trace[port][at, list(places[i])].double().cpu() for port in ports])
    return torch.cat([of[i] for i in range(len(rows))], 1)


def _check(model: Model, texts: Sequence[Text]) -> None:
    longest = model.longest_prompt
    for text in texts:
        n = len(text.before) + len(text.ids)
        if longest is not None and n > longest:
            raise PatchbayError(
                f"{text.where} has {n} tokens and the model reads {longest}: cut it into texts that fit"
            )
    if sum(len(text.ids) for text in texts) < 4:
        raise PatchbayError("predictions at four tokens or more are compared: give more text")
