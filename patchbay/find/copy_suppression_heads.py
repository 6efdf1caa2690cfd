"""Copy suppression heads: heads that look back at a token the model is about to say, and push it down.

    gives[i, p]              = A[i, p] (v_p W_O) . y_i[x_p]        y_i[t]: reads t's logit minus the mean logit at query i
    suppression[layer, head] = minus the mean over prompts and queries i of the sum over p in S_i of gives[i, p]
    S_i                      = the `share` of the earlier positions p < i whose tokens x_p are predicted most at i (all
                               places of equal ones): by the logits of the stream that enters the layer (a logit lens)

A the attention pattern, v the values, all norms frozen at what they were at i. In logits; positive: the head takes
back what was predicted. `null_mean` is the same sum when the effect is read at another token of the prompt (drawn
anew for each position): a head that pushes everything down scores as high there. Beside it: `attention` to S_i,
`attention_elsewhere` to as many other earlier positions, `without_first`, suppression with the first token left out
of S_i and of the earlier positions; and `own_lowest`, how often the token that a position holds is among the `lowest`
tokens of the whole vocabulary that v_p W_O says (the OV half; an induction or mover head has the highest there). p
flips signs prompt by prompt of the suppression minus its null; `p_adjusted` over all heads. One forward pass with all
patterns, and one projection to the vocabulary per head and prompt position (of `sample` positions in each prompt).

McDougall, Conmy, Rushing, McGrath and Nanda 2023, "Copy Suppression: Comprehensively Understanding an Attention Head"
(there S_i is the most predicted 5 % of the source tokens, and own_lowest counts 10 of 50,257 tokens on the stream
after the first MLP).

Direct effects on the prompts at hand alone; frozen norms. A soft cap on the logits is not counted. That the model is
better for the head, or repairs its removal, is not shown: follow with `prove.ablation`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.find._chance import standard_error
from patchbay.find._direct import by_head, grid, head_layers, normed_after, own_place, precise
from patchbay.find.direct_logit_attribution import Frozen
from patchbay.model.linear import bias_of
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.model.weights import norm_parts
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

WHAT = "copy_suppression_heads"
NAMES = ("suppression", "null", "without_first", "attention", "attention_elsewhere", "own_lowest")


@method(paper="mcdougall2023", unit="logits")
def copy_suppression_heads(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    share: float = 0.05,
    lowest: int = 10,
    sample: int = 8,
    batch_size: int = 8,
    seed: int = 0,
) -> Result:
    """Logits that each head takes from predicted tokens that it looks back at, mean over prompts and queries.

    Any text will do, best such in which words come again. `share`: of the earlier positions, how many count as
    predicted (at least one). `lowest`: how many tokens of the vocabulary the copied one may be among, at most a tenth
    of all.

    `sample`: positions of each prompt that are projected to the vocabulary.
    """
    if not 0.0 < share <= 1.0 or lowest < 1 or sample < 1:
        raise PatchbayError(f"share={share}, lowest={lowest}, sample={sample}: 0 < share <= 1, the others at least 1")
    layers, encoded = head_layers(model, WHAT), model.encode(prompts)
    short = next((i for i, ids in enumerate(encoded) if len(ids) < 3), None)
    if short is not None:
        raise PatchbayError(
            f"{WHAT}: prompt {short} has {len(encoded[short])} tokens; 3 or more are needed to look back"
        )
    lowest = min(lowest, max(1, model.vocab_size // 10))
    taps = [Port("resid_out", model.n_layers - 1), Port("final_norm")]
    for i in layers:
        taps += [Port(s, i) for s in ("resid_in", "attn.z", "attn.v", "attn.out", "attn.pattern")]
    pieces, generator = [], torch.Generator().manual_seed(seed)
    for start in range(0, len(encoded), batch_size):
        trace = run(model, encoded[start : start + batch_size], taps=taps, logits="last")
        pieces += [
            _one(model, trace, row, layers, share, lowest, sample, generator) for row in range(len(trace.lengths))
        ]
    seen = {name: torch.cat([piece[name] for piece in pieces]) for name in NAMES}  # [prompt, layer, head]
    p = maths.sign_flip_p(seen["suppression"] - seen["null"], floor=1e-6)
    adjusted, axes = maths.benjamini_hochberg(p), ("layer", "head")
    score = seen["suppression"].mean(0)
    clear = (score > seen["null"].mean(0)) & (score > 0) & (adjusted <= 0.05)
    return Result(
        {
            "suppression": (score, axes, "logits"),
            "standard_error": (standard_error(seen["suppression"]), axes, "logits"),
            "null_mean": (seen["null"].mean(0), axes, "logits"),
            "without_first": (seen["without_first"].nanmean(0), axes, "logits"),
            "attention": (seen["attention"].mean(0), axes, "attention"),
            "attention_elsewhere": (seen["attention_elsewhere"].nanmean(0), axes, "attention"),
            "own_lowest": (seen["own_lowest"].mean(0), axes, "share of tokens"),
            "p": (p, axes, "probability"),
            "p_adjusted": (adjusted, axes, "probability"),
        },
        notes=[
            (
                f"{int(clear.sum())} heads suppress more than at other tokens (adjusted p <= 0.05); "
                if maths.clear(adjusted)
                else ""
            )
            + f"by chance a token is among "
            f"the {lowest} lowest of {model.vocab_size} {lowest / model.vocab_size:.2g} of the time"
        ],
    )


def _one(
    model: Model,
    trace: Trace,
    row: int,
    layers: list[int],
    share: float,
    lowest: int,
    sample: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The measurements on one prompt, each [1, layer, head]; the generator goes on from prompt to prompt."""
    n = int(trace.lengths[row])
    ids = trace.ids[row, :n].cpu()
    unembed = precise(model.unembed.weight)
    said = unembed[ids] - unembed.mean(0)  # [position, d_model]: what each position's token is read by
    stream, normed = (precise(trace[port][row, :n]) for port in _ends(model))
    final = Frozen(model.final_norm_module, stream, normed)
    other = torch.stack([_another(ids, p, generator) for p in range(n)])  # [position]: a place with another token
    picked = torch.randperm(n, generator=generator)[:sample]
    found: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for i in layers:
        pattern = precise(trace[Port("attn.pattern", i)][row, :, :n, :n])  # [head, query, key]
        written, rate = _written(model, trace, row, n, i)  # [head, key, d_model], [query]
        gives = {
            name: torch.einsum("hkm,km->hk", written, _read(model, i, final, said[at]))
            for name, at in (("own", torch.arange(n)), ("other", other))
        }
        paid = pattern * (rate * final.rate)[None, :, None]  # [head, query, key]
        predicted = _predicted(model, trace, row, ids, i, unembed, share)  # [query, key]
        free = _predicted(model, trace, row, ids, i, unembed, share, first=1)
        earlier = torch.ones(n, n, dtype=torch.bool).tril(-1)
        rest = earlier & ~predicted
        fair = predicted.sum(1, keepdim=True) / rest.sum(1, keepdim=True).clamp_min(1)  # [query, 1]
        enough = rest.any(1)
        found["suppression"].append(-_mean(paid * gives["own"][:, None], predicted))
        found["null"].append(-_mean(paid * gives["other"][:, None], predicted))
        found["without_first"].append(-_mean(paid * gives["own"][:, None], free))
        found["attention"].append(_mean(pattern, predicted))
        found["attention_elsewhere"].append(_mean((pattern * fair)[:, enough], rest[enough]))
        found["own_lowest"].append(_lowest(model, trace, row, i, picked, ids, lowest))
    return {name: grid(model, layers, [value[None] for value in column]) for name, column in found.items()}


def _ends(model: Model) -> tuple[Port, Port]:
    return Port("resid_out", model.n_layers - 1), Port("final_norm")


def _another(ids: Tensor, place: int, generator: torch.Generator) -> Tensor:
    """A random position whose token differs from the one at `place`; itself where there is none."""
    places = (ids != ids[place]).nonzero()[:, 0]
    return places[torch.randint(len(places), (1,), generator=generator)][0] if len(places) else torch.tensor(place)


def _written(model: Model, trace: Trace, row: int, n: int, layer: int) -> tuple[Tensor, Tensor]:
    """v_p W_O [head, key, d_model], and the frozen rate of a norm after attention at each query [query] (else 1)."""
    values = by_head(model, layer, precise(trace[Port("attn.v", layer)])[row : row + 1, :, :n])[0]
    w_o, z = precise(model.W_O(layer)), precise(trace[Port("attn.z", layer)][row, :n])
    pattern = precise(trace[Port("attn.pattern", layer)][row, :, :n, :n])
    if (torch.einsum("hqk,hkd->qhd", pattern, values) - z).abs().max() > 1e-3 * z.abs().max():
        raise PatchbayError(
            f"{WHAT}: in layer {layer} of this {model.family.name} model z is not attention times values (a gate stands "
            "after it), so no position's share can be told; direct_logit_attribution works"
        )
    rate = torch.ones(n, dtype=torch.float64)
    if normed_after(model, layer):
        at = model.modules[layer]
        bias = bias_of(at.attn_proj)
        total = torch.einsum("qhd,hdm->qm", z, w_o) + (0.0 if bias is None else precise(bias))
        added = precise(trace[Port("attn.out", layer)][row, :n]) / model.residual_scale
        rate = Frozen(at.attn_added, total, added).rate
    return torch.einsum("hkd,hdm->hkm", values, w_o) * model.residual_scale, rate


def _read(model: Model, layer: int, final: Frozen, said: Tensor) -> Tensor:
    """Directions that read what `said` [position, d_model] reads after the final norm, but for the norms' rates."""
    through = final._centre(final.gain * said)
    if normed_after(model, layer):
        norm = model.modules[layer].attn_added
        assert norm is not None
        gain, _, centred = norm_parts(norm)
        through = precise(gain) * through
        through = through - through.mean(-1, keepdim=True) if centred else through
    return through


def _predicted(
    model: Model, trace: Trace, row: int, ids: Tensor, layer: int, unembed: Tensor, share: float, *, first: int = 0
) -> Tensor:
    """S_i, bool [query, key]: of the earlier positions from `first` on, those whose tokens the stream predicts most."""
    n = len(ids)
    tokens, at = ids.unique(return_inverse=True)  # each token once: its places are predicted equally
    with torch.no_grad():
        normed = precise(model.final_norm_module.forward(trace[Port("resid_in", layer)][row, :n]))
    lens = (normed @ unembed[tokens].T)[:, at]  # [query, key]
    chosen = torch.zeros(n, n, dtype=torch.bool)
    for i in range(first + 1, n):
        count = max(1, math.ceil(share * (i - first)))
        chosen[i, first:i] = lens[i, first:i] >= lens[i, first:i].topk(count).values[-1]
    return chosen


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """[head, query, key] summed over some keys of each query, mean over the queries that have some, [head]."""
    queries = where.any(1)
    return (values * where)[:, queries].sum(-1).mean(-1)


def _lowest(model: Model, trace: Trace, row: int, layer: int, picked: Tensor, ids: Tensor, lowest: int) -> Tensor:
    """Share of the picked positions whose own token is among the lowest that their values say, [head]."""
    values = by_head(model, layer, precise(trace[Port("attn.v", layer)])[row : row + 1])[0, :, picked]
    outs = torch.einsum("hnd,hdm->nhm", values, precise(model.W_O(layer)))
    return (own_place(model, layer, outs, ids[picked], lowest=True) < lowest).double().mean(0)
