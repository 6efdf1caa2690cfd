"""Dictionary: how much of a signal, and of what the model does with it, the features of a dictionary hold.

    fvu        = sum |x - x^|^2 / sum |x - mean x|^2             over all tokens but the first of each text
    recovered  = (CE without x - CE with x^) / (CE without x - CE)       without: x is 0 at every token, or its mean
    l0         = activations that are not 0, per token; `l0_sd` its spread; dead: features that are 0 at every one of these tokens
    shrinkage  = E x^.x^ / E x.x^, below 1 where activations are too small, as an L1 penalty makes them

CE is the loss of the texts' tokens, from the third on, in nats per token. `null` is the FVU of random rows: the same form, k and thresholds with a
decoder of random directions and its transpose as the encoder. `other`: dictionaries of the same signal, by folder, for which
`similar` is the mean over features of the largest cosine to a row of the other, and `matched` the share of features that are nearest to one another
with a cosine above 0.9; `chance` is `similar` of random rows. A run as it is, one rebuilt, one without and one at the mean.

Ayonrinde 2024, "Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders"; shrinkage as in Gated SAEs (Rajamanoharan et
al. 2024). These say how faithful a dictionary is, not what its features mean, nor that they are the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.features.dictionary import Dictionary
from patchbay.features.load import load_dictionary
from patchbay.measure._meter import reading
from patchbay.model.attached import HOME, attach
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import HOMES, PatchbayError, Port, parse_part
from patchbay.tasks.task import Task

FOUND = 0.9  # the cosine from which two features are one
TOKEN, SHARE = "nats per token", "share of the variance"


@method(paper="ayonrinde2024")
def dictionary(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    features: str,
    *,
    other: list[str] | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """FVU of the texts' tokens with its interval over texts, cross-entropy with the signal rebuilt and without, and what else is above.

    `prompts`: the texts. `features`: the folder of a dictionary, or all of one that the model has attached: "L1.features", "L1.mlp_features" or
    "L1.attn_features". `other`: folders of dictionaries of the same signal, such as ones trained with other seeds.
    """
    model, it, home = _attached(model, features)
    encoded = [ids for ids in model.encode(prompts) if len(ids) > 2]
    if not encoded:
        raise PatchbayError(
            "a dictionary is measured on tokens but the first of each text, and their losses: texts of three tokens or more"
        )
    compared = [_alike(it, path) for path in other or ()]
    error, read, written = Port(f"{home}.error", it.layer), Port(it.reads, it.layer), Port(it.writes, it.layer)
    sums, x = _seen(model, it, encoded, read, written, batch_size)
    average = x.mean(0).float()
    mean = average.view(model.n_heads(it.layer), -1) if it.writes == "attn.z" else average
    loss = {
        name: _loss(model, encoded, edits, batch_size)
        for name, edits in (
            ("ce", []),
            ("ce_rebuilt", [edit.zero(error)]),
            ("ce_zero", [edit.zero(written)]),
            ("ce_mean", [edit.replace(written, mean)]),
        )
    }
    more: dict[str, Any] = {name: (float(value), (), TOKEN) for name, value in loss.items()}
    for name in ("zero", "mean"):
        lost = loss[f"ce_{name}"] - loss["ce"]
        share = (loss[f"ce_{name}"] - loss["ce_rebuilt"]) / lost if abs(lost) > 1e-6 else float("nan")
        more |= {f"recovered_{name}": (share, (), "share of the loss")} if share == share else {}
    active, on = sums["active"], sums["on"]
    more |= {"l0": (float(active.mean()), (), "features"), "l0_sd": (float(active.std(correction=0)), (), "features")}
    more |= {"dead": (1.0 - float(on.double().mean()), (), "share of features")}
    if float(sums["across"]) != 0:
        more |= {"shrinkage": (float(sums["squared"] / sums["across"]), (), "ratio")}
    more |= _similar(it, compared, seed)
    above, below = sums["above"], sums["below"]
    return reading(
        {"unexplained": above, "variance": below},
        SHARE,
        better="lower",
        made="ratio",
        null=_null(model, it, encoded, read, written, batch_size, seed),
        interval=maths.Interval(*(float(end) for end in maths.intervals(above[:, None], below, seed=seed))),
        more=more,
        units=dict.fromkeys(("unexplained", "variance"), "squared"),
        notes=[
            f"{it.n_features} features at {it.place}; {len(active)} tokens of {len(encoded)} texts, their first ones left out"
        ],
        seed=seed,
    )


def _attached(model: Model, features: str) -> tuple[Model, Dictionary, str]:
    """The model with the dictionary attached, the dictionary, and where it is attached."""
    try:
        part = parse_part(features)
    except PatchbayError:
        it = load_dictionary(features)
        view = attach(model, [it])
        return view, it.to(model.device), HOME[it.writes]
    if part.kind not in HOMES or part.layer is None:
        raise PatchbayError(
            f"features={features!r}: the folder of a dictionary, or all of one that is attached, such as L1.features, L1.mlp_features, L1.attn_features"
        )
    model.require(part.port("act"))
    found: Any = model.dictionaries[part.layer, part.kind]
    return model, found, part.kind


def _alike(it: Dictionary, path: str) -> Dictionary:
    found = load_dictionary(path)
    if found.d_out != it.d_out:
        raise PatchbayError(
            f"{path} writes {found.d_out} numbers and the dictionary at {it.place} {it.d_out}: their features cannot be compared"
        )
    return found


# --- sums over tokens -----------------------------------------------------------------------------------


def _tokens(
    model: Model, encoded: Sequence[Sequence[int]], read: Port, written: Port, size: int
) -> list[tuple[list[int], Tensor, Tensor]]:
    """Of each batch of texts: their places, and what is read and written at all their tokens but the first, [token, d]."""
    found = []
    for start in range(0, len(encoded), size):
        some = [list(ids) for ids in encoded[start : start + size]]
        trace = run(model, some, taps=list(dict.fromkeys((read, written))), logits="last")
        real = torch.arange(trace.ids.shape[1])[None] < trace.lengths[:, None].cpu()
        real[:, 0] = False
        x, y = (trace[port].flatten(2).cpu()[real].float() for port in (read, written))
        found.append((list(range(start, start + len(some))), x, y))
    return found


def _seen(
    model: Model, it: Dictionary, encoded: list[list[int]], read: Port, written: Port, size: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Sums by text and by token, and what is written at all tokens."""
    here = it.to("cpu")
    parts = _tokens(model, encoded, read, written, size)
    average = torch.cat([y for _, _, y in parts]).double().mean(0)
    above, below = torch.zeros(2, len(encoded), dtype=torch.float64)
    on, active = torch.zeros(it.n_features, dtype=torch.bool), []
    squared = across = torch.zeros((), dtype=torch.float64)
    for places, x, y in parts:
        z = here.encode(x)
        rebuilt, y = here.decode(z, x).double(), y.double()
        texts = torch.repeat_interleave(torch.tensor(places), torch.tensor([len(encoded[i]) - 1 for i in places]))
        above.index_add_(0, texts, (y - rebuilt).pow(2).sum(1))
        below.index_add_(0, texts, (y - average).pow(2).sum(1))
        squared, across = squared + rebuilt.pow(2).sum(), across + (y * rebuilt).sum()
        active.append((z > 0).sum(1).double())
        on |= (z > 0).any(0)
    sums = {"above": above, "below": below, "active": torch.cat(active), "on": on, "squared": squared, "across": across}
    return sums, torch.cat([y for _, _, y in parts]).double()


def _loss(model: Model, encoded: list[list[int]], edits: list[Any], size: int) -> float:
    """Nats per token of all tokens from the third on, under edits at all positions but the first."""
    made = [replace(one, positions=slice(1, None)) for one in edits]
    total = count = 0.0
    for start in range(0, len(encoded), size):
        some = encoded[start : start + size]
        logits = run(model, some, edits=made).logits
        for ids, row in zip(some, logits, strict=True):
            logp = row[1 : len(ids) - 1].double().log_softmax(-1)
            total -= float(logp.gather(1, torch.tensor(ids[2:], device=logp.device)[:, None]).sum())
            count += len(ids) - 2
    return total / count


# --- nulls ------------------------------------------------------------------------------------------------


def random_rows(it: Dictionary, seed: int) -> Dictionary:
    """The same form with a decoder of random directions of its rows' norms, and its transpose as the encoder where both have one width."""
    draw = torch.Generator().manual_seed(seed)
    norms = it.W_dec.cpu().norm(dim=1, keepdim=True)
    rows = torch.nn.functional.normalize(torch.randn(it.W_dec.shape, generator=draw), dim=1)
    columns = (
        rows.T
        if it.d_in == it.d_out
        else torch.nn.functional.normalize(torch.randn(it.W_enc.shape, generator=draw), dim=0)
    )
    return replace(it.to("cpu"), W_dec=rows * norms, W_enc=columns * it.W_enc.cpu().norm(dim=0))


def _null(
    model: Model, it: Dictionary, encoded: list[list[int]], read: Port, written: Port, size: int, seed: int
) -> float:
    sums, _ = _seen(model, random_rows(it, seed), encoded, read, written, size)
    return float(sums["above"].sum() / sums["below"].sum())


def _similar(it: Dictionary, others: list[Dictionary], seed: int) -> dict[str, Any]:
    """Cosines of features with those of other dictionaries, [draw]; and of random rows."""
    if not others:
        return {}
    means, matched, chance = [], [], []
    for i, one in enumerate(others):
        cosines = _unit(it.W_dec.cpu()) @ _unit(one.W_dec.cpu()).T
        means.append(float(cosines.amax(1).mean()))
        matched.append(one_to_one(cosines))
        chance.append(float((_unit(it.W_dec.cpu()) @ _unit(random_rows(one, seed + i).W_dec).T).amax(1).mean()))
    rows = (("similar", means, "cosine"), ("chance", chance, "cosine"), ("matched", matched, "share of features"))
    return {name: (torch.tensor(row), ("draw",), unit) for name, row, unit in rows}


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=1)


def one_to_one(cosines: Tensor) -> float:
    """The share of rows that are the nearest of their nearest column, with a cosine above FOUND."""
    best, column = cosines.max(1)
    mutual = cosines.argmax(0)[column] == torch.arange(len(cosines))
    return float((mutual & (best > FOUND)).double().mean())
