"""Dictionary: how much of a signal, and of what the model does with it, the features of a dictionary hold.

    fvu        = sum |x - x^|^2 / sum |x - mean x|^2             over all tokens but the first of each text
    recovered  = (CE without x - CE with x^) / (CE without x - CE)       without: x is 0 at every token, or its mean
    l0         = activations that are not 0, per token; `l0_sd` its spread; dead: features that are 0 at every one of these tokens
    shrinkage  = E x^.x^ / E x.x^, below 1 where activations are too small, as an L1 penalty makes them

CE is the loss of the texts' tokens, from the third on, in nats per token. `null` is the FVU of random rows: the same form, k and thresholds with a
decoder of random directions and its transpose as the encoder; `null_untrained` that of the dictionary itself on the signal of a network of the
same form that was never trained, where `other` names it. `other`: dictionaries of the same signal, by folder, for which `similar` is the mean over features of the
largest cosine to a row of the other, and `matched` the share of features that are nearest to one another with a cosine above 0.9; `chance` is
`similar` of random rows. `labels`, `concepts` and `truth` ask what single features are worth (`_features.py`): sparse probes beside the
signal's own numbers and shuffled labels, absorption, and how planted directions are recovered, each beside random rows.

Of several layers the FVU is the mean over them; a cross-layer transcoder is put in, and taken away, in all of its layers, a crosscoder in the last
of its own. A run as it is, one rebuilt, one without and one at the mean.

Ayonrinde 2024, "Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders"; shrinkage as in Gated SAEs (Rajamanoharan et
al. 2024); absorption and sparse probing as in SAEBench (Karvonen et al. 2025). These say how faithful a dictionary is, not what its features mean,
nor that they are the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.features.across import cross_layer, pieces_of, writes_of
from patchbay.features.dictionary import Dictionary
from patchbay.features.files import tensors
from patchbay.features.load import load_dictionary, named
from patchbay.measure._features import FOUND, absorbed, probed, recovered, unit
from patchbay.measure._meter import reading
from patchbay.measure._rebuilt import Seen, everything, look
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.results.untrained import untrained as made_new
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

UNTRAINED = "untrained"
TOKEN, SHARE = "nats per token", "share of the variance"
RECOVERED = {"best": "cosine", "matched": "cosine", "found": "share of directions", "support": "F1"}


@method(paper="ayonrinde2024")
def dictionary(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    features: str,
    *,
    other: list[str] | None = None,
    labels: list[int] | list[str] | None = None,
    concepts: list[list[int]] | None = None,
    truth: str | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """FVU of the texts' tokens with its interval over texts, cross-entropy with the signal rebuilt and without, and what else is above.

    `prompts`: the texts. `features`: the folder of a dictionary, or all of one that the model has attached: "L1.features", "L1.mlp_features" or
    "L1.attn_features". `other`: folders of dictionaries of the same signal, such as ones trained with other seeds; "untrained" among them also measures this one on an
    untrained network of the model's form. `labels`: one for each text, for sparse
    probes of 1, 2 and 5 features. `concepts`: lists of token ids, each a concept such as the words with one first letter, for absorption. `truth`: a
    safetensors file with planted `directions` [direction, d], and `tokens` [vocab, direction], where each is present.
    """
    model, it, home = named(model, features)
    encoded = [ids for ids in model.encode(prompts) if len(ids) > 2]
    if not encoded:
        raise PatchbayError(
            "a dictionary is measured on tokens but the first of each text, and their losses: texts of three tokens or more"
        )
    if labels is not None and (len(labels) != len(encoded) or len(set(labels)) < 2):
        raise PatchbayError(
            f"labels: {len(labels)} of {len(set(labels))} kinds for {len(encoded)} texts of three tokens or more; one for each, of two kinds or more"
        )
    compared = [_alike(it, path) for path in other or () if path != UNTRAINED]
    seen = look(model, it, encoded, batch_size)
    more: dict[str, Any] = _losses(model, it, home, encoded, seen, batch_size)
    more |= {"l0": (float(seen.active.mean()), (), "features")}
    more |= {"l0_sd": (float(seen.active.std(correction=0)), (), "features")}
    more |= {"dead": (1.0 - float(seen.on.double().mean()), (), "share of features")}
    if seen.across != 0:
        more |= {"shrinkage": (seen.squared / seen.across, (), "ratio")}
    more |= _similar(it, compared, seed)
    more |= _single(model, it, encoded, labels, concepts, truth, batch_size, seed)
    more |= _untrained(model, it, encoded, batch_size, seed) if UNTRAINED in (other or ()) else {}
    return reading(
        {"unexplained": seen.above, "variance": seen.below},
        SHARE,
        better="lower",
        made="ratio",
        null=look(model, random_rows(it, seed), encoded, batch_size).fvu,
        interval=maths.Interval(*(float(end) for end in maths.intervals(seen.above[:, None], seen.below, seed=seed))),
        more=more,
        units=dict.fromkeys(("unexplained", "variance"), "squared"),
        notes=[
            f"{len(seen.on)} features at {it.place}; {len(seen.active)} tokens of {len(encoded)} texts, their first ones left out"
        ],
        seed=seed,
    )


def _alike(it: Dictionary, path: str) -> Dictionary:
    found = load_dictionary(path)
    if found.d_out != it.d_out:
        raise PatchbayError(
            f"{path} writes {found.d_out} numbers and the dictionary at {it.place} {it.d_out}: their features cannot be compared"
        )
    return found


# --- the loss ---------------------------------------------------------------------------------------------


def _losses(model: Model, it: Dictionary, home: str, encoded: list[list[int]], seen: Seen, size: int) -> dict[str, Any]:
    """Nats per token as it is, with the signal rebuilt, without it and at its mean, and the shares that are recovered."""
    layers = [piece.layer for piece in pieces_of(it)]
    errors, written = ([Port(name, layer) for layer in layers] for name in (f"{home}.error", it.writes))
    means = seen.mean[-len(layers) :].float()  # of a crosscoder its last site's
    shape = (model.n_heads(it.layer), -1) if it.writes == "attn.z" else (-1,)
    loss = {
        name: _loss(model, encoded, edits, size)
        for name, edits in (
            ("ce", []),
            ("ce_rebuilt", [edit.zero(error) for error in errors]),
            ("ce_zero", [edit.zero(port) for port in written]),
            ("ce_mean", [edit.replace(port, mean.view(shape)) for port, mean in zip(written, means, strict=True)]),
        )
    }
    found: dict[str, Any] = {name: (float(value), (), TOKEN) for name, value in loss.items()}
    for name in ("zero", "mean"):
        lost = loss[f"ce_{name}"] - loss["ce"]
        share = (loss[f"ce_{name}"] - loss["ce_rebuilt"]) / lost if abs(lost) > 1e-6 else float("nan")
        found |= {f"recovered_{name}": (share, (), "share of the loss")} if share == share else {}
    return found


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


# --- nulls, and what single features are worth --------------------------------------------------------------


def random_rows(it: Dictionary, seed: int) -> Dictionary:
    """The same form with a decoder of random directions of its rows' norms, and its transpose as the encoder where both have one width."""
    draw = torch.Generator().manual_seed(seed)

    def turned(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        norms = rows.cpu().norm(dim=-1, keepdim=True)
        return torch.nn.functional.normalize(torch.randn(rows.shape, generator=draw), dim=-1) * norms

    found = []
    for piece in pieces_of(it.to("cpu")):
        rows, decoders = turned(piece.W_dec), turned(piece.decoders)
        assert rows is not None
        tied = rows if decoders is None else torch.cat([*decoders, rows], 1)
        tied = tied if tied.shape[1] == piece.d_in else torch.randn(piece.n_features, piece.d_in, generator=draw)
        columns = torch.nn.functional.normalize(tied, dim=1).T * piece.W_enc.norm(dim=0)
        found.append(
            replace(piece, W_dec=rows, W_enc=columns, decoders=decoders, onward=turned(piece.onward), family="")
        )
    return found[0] if len(found) == 1 else cross_layer(found)


def _untrained(model: Model, it: Dictionary, encoded: list[list[int]], size: int, seed: int) -> dict[str, Any]:
    new = made_new(model, seed)
    if isinstance(new, str):
        raise PatchbayError(f"other={UNTRAINED!r}: no untrained network of this form can be made here ({new})")
    return {"null_untrained": (look(new, it, encoded, size).fvu, (), SHARE)}


def _single(
    model: Model, it: Dictionary, encoded: list[list[int]], labels: Sequence[Any] | None, concepts: list[list[int]] | None,
    truth: str | None, size: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Probes, absorption and recovery, of the dictionary and of random rows."""
    if labels is None and concepts is None and truth is None:
        return {}
    if len(writes_of(it)) > 1:
        raise PatchbayError("labels, concepts and truth are asked of a dictionary of one layer")
    found: dict[str, Any] = {}
    tokens = torch.tensor([token for ids in encoded for token in ids[1:]])
    texts = torch.repeat_interleave(torch.arange(len(encoded)), torch.tensor([len(ids) - 1 for ids in encoded]))
    for prefix, one in (("", it.to("cpu")), ("chance_", random_rows(it, seed))):
        x, z = everything(model, one, encoded, size)
        if labels is not None:
            found |= _probes(prefix, x, z, texts, labels, seed)
        if concepts is not None:
            shares = [
                absorbed(x - x.mean(0), z, one.W_dec, torch.isin(tokens, torch.tensor(ids)), seed) for ids in concepts
            ]
            found[f"{prefix}absorption"] = (torch.tensor(shares), ("condition",), "share")
        if truth is not None:
            directions, present = planted(truth, it, tokens)
            rows = recovered(one.W_dec, directions, z > 0, present)
            found |= {f"{prefix}{name}": (value, (), RECOVERED[name]) for name, value in rows.items()}
    return found


def _probes(prefix: str, x: Tensor, z: Tensor, texts: Tensor, labels: Sequence[Any], seed: int) -> dict[str, Any]:
    """Balanced accuracy [n_parts] of features, and once of the signal's numbers and of shuffled labels."""
    n = int(texts.max()) + 1
    pooled = [torch.zeros(n, y.shape[1], dtype=torch.float64).index_add(0, texts, y.double()) for y in (z, x)]
    each = torch.bincount(texts, minlength=n)[:, None]
    ways: dict[str, tuple[Tensor, Sequence[Any]]] = {f"{prefix}probe": (pooled[0] / each, labels)}
    if not prefix:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        ways |= {
            "probe_raw": (pooled[1] / each, labels),
            "probe_shuffled": (pooled[0] / each, [labels[i] for i in order]),
        }
    return {name: (probed(y, said, seed), ("n_parts",), "balanced accuracy") for name, (y, said) in ways.items()}


def planted(path: str, it: Dictionary, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Planted directions of a file, and at which of the tokens each is present."""
    held = tensors(Path(path))
    directions, present = held.get("directions"), held.get("tokens")
    if directions is None or directions.ndim != 2 or directions.shape[1] != it.d_out:
        found = None if directions is None else list(directions.shape)
        raise PatchbayError(f"truth: {path} needs `directions` [direction, {it.d_out}], has {found or ', '.join(held)}")
    if present is not None and (
        present.ndim != 2 or len(present) <= int(tokens.max()) or present.shape[1] != len(directions)
    ):
        raise PatchbayError(f"truth: `tokens` of {path} is {list(present.shape)}, not [vocab, {len(directions)}]")
    return directions, None if present is None else present.bool()[tokens]


def _similar(it: Dictionary, others: list[Dictionary], seed: int) -> dict[str, Any]:
    """Cosines of features with those of other dictionaries, [draw]; and of random rows."""
    if not others:
        return {}
    means, matched, chance = [], [], []
    for i, one in enumerate(others):
        cosines = unit(it.W_dec.cpu()) @ unit(one.W_dec.cpu()).T
        means.append(float(cosines.amax(1).mean()))
        matched.append(one_to_one(cosines))
        chance.append(float((unit(it.W_dec.cpu()) @ unit(random_rows(one, seed + i).W_dec).T).amax(1).mean()))
    rows = (("similar", means, "cosine"), ("chance", chance, "cosine"), ("matched", matched, "share of features"))
    return {name: (torch.tensor(row), ("draw",), unit) for name, row, unit in rows}


def one_to_one(cosines: Tensor) -> float:
    """The share of rows that are the nearest of their nearest column, with a cosine above FOUND."""
    best, column = cosines.max(1)
    mutual = cosines.argmax(0)[column] == torch.arange(len(cosines))
    return float((mutual & (best > FOUND)).double().mean())
