"""Dictionary: sparse features of a signal, trained on the signal of texts, and saved so that others read them.

    loss = mean |x - x^|^2 + what the form adds, by Adam; x^ = z W_dec + b_dec, rows of W_dec of norm 1

    topk            the k largest activations of each token
    batchtopk       the n k largest of a batch of n tokens (Mutual Choice); used with one threshold, the running smallest kept
    feature_choice  each feature keeps its own number of tokens, n k in all, by Zipf's law of its rank r, r^-s; used with thresholds of its own. Ranks
                    are by how often batchtopk would keep a feature: what it keeps itself would keep the first ranks for ever
    relu            penalty x sum z_i |d_i|, which also shrinks what is rebuilt
    jumprelu        0.1 (activations per token / k - 1)^2; thresholds learn by pseudo-gradients
    gated           penalty x sum of the gates, and the gates' own rebuilding

A transcoder ("L0.mlp.in to L0.mlp.out") rebuilds what is written from what is read. Of several signals, with commas, one set of features is trained for
all (a crosscoder), or of transcoders features of each layer that write in all after it (a cross-layer transcoder). Of two models it is a
crosscoder of one signal in both: `relative` R_i = |d_2i| / (|d_1i| + |d_2i|) is .5 for what they share, 1 for what the second alone has; since
training can split what is shared, `fitted` [condition, feature] says how much of each model the feature explains: the least-squares length of its
longer row in what the others leave of that model's signal. A feature is one model's own where R and both lengths say so.

Tokens but the first of each text, from a buffer that holds a bounded number of them (`_stream.py`), or from a trace on disk; a tenth of the texts
is held out: `value` is FVU, the share of their variance that is not rebuilt, `null` that of random rows of the same number and k. One run of the
texts and 12 F d operations a token for each epoch. Under torch.distributed every process takes an equal share of each batch.

Features of the first three forms that were silent for 50 batches also rebuild the error (aux_k); with a law, `form="batchtopk zipf 0.7"`, so do all that are used less than
it says, each by the share that it lacks (aux_zipf). `zipf` of the Result is the exponent that fits how often features are used on held-out tokens.

Ayonrinde 2024, "Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders" (the full text was not at hand: ranks by
the running density of Mutual Choice, no offset of ranks, and aux_zipf as its abstract can be read, as what becomes aux_k where features are dead or in full use); Lindsey et al. 2024, "Sparse
Crosscoders". A low FVU shows that the signal is rebuilt, not that features mean something.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.errors import one_of
from patchbay.features import saved
from patchbay.features.across import by_site, said
from patchbay.features.dictionary import Dictionary
from patchbay.model.attached import attach
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task
from patchbay.train._allocation import STEEPEST, exponent
from patchbay.train._differing import alone, compared
from patchbay.train._fitting import BUDGETED, Fitting, Plan, described, rate_of
from patchbay.train._places import places_of
from patchbay.train._stream import Source, batches, shuffled, source_of
from patchbay.train._together import world

FORMS = ("topk", "batchtopk", "feature_choice", "relu", "jumprelu", "gated")
LAW = " zipf "
WITH = " with "  # between a place and a second model
PENALISED = ("relu", "gated")
BATCH = 256  # tokens
BUFFER = 16  # batches that are in memory
EVERY = 100  # steps between states on disk
SHARE = "share of the variance"


@method(paper="ayonrinde2024")
def dictionary(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    at: str,
    *,
    form: str = "topk",
    n_features: int = 256,
    sparsity: float | None = None,
    steps: int = 500,
    folder: str | None = None,
    seed: int = 0,
) -> Result:
    """FVU of held-out tokens (`value`, with ends over texts), activations per token (`l0`) and share of silent features (`dead`) of a dictionary trained on texts.

    `prompts`: the texts, or the folder of a trace that holds the signals (`pb.run(model, texts, taps=[...], folder=...)`). `at`: the signal, "L0.resid_out";
    of a transcoder what is read and what is written, "L0.mlp.in to L0.mlp.out"; of several layers with commas, "L0.resid_out, L1.resid_out"; of a second model too, such as a
    tuned one, by its name or folder, "L1.resid_out with FOLDER". `form`: how
    activations are chosen, of the first three also with the exponent s of a law that features are to be used by, "feature_choice zipf 0" for all alike (without, feature_choice
    shares by s = 0.7, and there is no loss aux_zipf). `n_features`: how many features there are, of a cross-layer transcoder in each layer. `sparsity`: active features per token, 8 without; of
    relu and gated, which have no such number, the weight of their penalty, 0.1 without. `steps`: updates, of 256 tokens each, or as many as there are. `folder`:
    where the dictionary is written in SAELens's form; a call that was stopped goes on from the state beside it, bit for bit. Without, it is not kept.
    """
    form, zipf = _law(form)
    at, _, other = at.partition(WITH)
    models = [model, *([load(other)] if other else [])]
    places = places_of(model, at, models=len(models))
    _check_other(models, folder)
    source = source_of(models, prompts, places)
    plan = _plan(form, n_features, sparsity, zipf, steps, seed)
    _check(plan, source.ids, folder)
    order = shuffled(len(source.ids), seed, "held out")
    held = order[: max(1, len(order) // 10)]
    seen = order[len(held) :] or held
    fitting = Fitting(plan, *source.of(seen[:32]), places)
    start = fitting.dictionary()
    if folder is not None:
        saved.files_of(start)  # which says before the training what has no form
    rows = _fit(plan, fitting, source, seen, model.fingerprint, folder)
    trained_on = {
        "model_name": model.source or type(model.hf).__name__,
        "prepend_bos": False,
        "patchbay_fingerprint": model.fingerprint,
    }
    found = replace(fitting.dictionary(), trained_on=trained_on, source=folder or "")
    written = _written(found, folder)
    if len(models) == 1:
        attach(model, [found])  # what was made fits
    return _result(found, start, source, held, rows, written, seed)


def _written(found: Dictionary, folder: str | None) -> str | None:
    """Where the dictionary is, written by one process."""
    if folder is None:
        return None
    if world()[0] == 0:
        saved.write(found, folder)
        _state(folder).unlink(missing_ok=True)
    return str(folder)


def _check_other(models: list[Model], folder: str | None) -> None:
    if len(models) == 1:
        return
    if models[1].vocab_size != models[0].vocab_size:
        raise PatchbayError(
            f"at: a second model of the same tokens; {models[1].source} has {models[1].vocab_size} and this one {models[0].vocab_size}"
        )
    if folder is not None:
        raise PatchbayError(
            "features of two models are parts of neither, and are not written as a dictionary: leave folder out; the Result has their rows, "
            "result['row'] [condition, feature, d_model]"
        )


def _law(form: str) -> tuple[str, float | None]:
    """A form, and the exponent of its law where it has one: "batchtopk zipf 0.7"."""
    name, _, said = form.partition(LAW)
    one_of("form", name, FORMS)
    try:
        zipf = float(said) if said else None
    except ValueError:
        zipf = -1.0
    if LAW in form and (zipf is None or name not in BUDGETED or not 0 <= zipf < STEEPEST):
        raise PatchbayError(
            f"form={form!r}: zipf is followed by the exponent, 0 to {STEEPEST:g}, of the law by which features of {', '.join(BUDGETED)} are to be used"
            + ("" if name in BUDGETED else f"; {name} keeps no number of activations")
        )
    return name, zipf


def _plan(form: str, n_features: int, sparsity: float | None, zipf: float | None, steps: int, seed: int) -> Plan:
    rate = rate_of(n_features)
    if form in PENALISED:
        return Plan(form, n_features, 1, 0.1 if sparsity is None else float(sparsity), steps, rate, BATCH, seed)
    k = 8 if sparsity is None else sparsity
    if k != int(k):
        raise PatchbayError(f"sparsity={sparsity}: {form} has a whole number of active features per token")
    return Plan(form, n_features, int(k), 0.1, steps, rate, BATCH, seed, zipf)


def _check(plan: Plan, encoded: list[list[int]], folder: str | None) -> None:
    if not encoded:
        raise PatchbayError("features are of tokens but the first of each text, and no text has two")
    if (
        min(plan.n_features, plan.k, plan.steps) < 1
        or plan.k > plan.n_features
        or not 0 <= plan.sparsity < float("inf")
    ):
        told = plan.sparsity if plan.form in PENALISED else plan.k
        raise PatchbayError(
            f"n_features={plan.n_features}, sparsity={told}, steps={plan.steps}: 1 or more, and no more active features than there are"
        )
    if folder is not None and Path(folder).exists():
        raise PatchbayError(f"{folder} is already there; a trained dictionary goes to a new folder")


def _fit(
    plan: Plan, fitting: Fitting, source: Source, seen: list[int], fingerprint: str, folder: str | None
) -> list[dict[str, Any]]:
    """All steps, or those that are left; the state goes to disk every now and then where there is a folder."""
    texts = [source.ids[i] for i in seen]
    told = json.dumps([described(plan), str(source.places), fingerprint, type(source).__name__, texts], sort_keys=True)
    request = hashlib.sha256(told.encode()).hexdigest()
    if folder is not None and _state(folder).is_file():
        fitting.resume(_state(folder), request)
    rows = []
    size = min(plan.batch_size, sum(len(ids) - 1 for ids in texts))
    size -= size % world()[1]
    for read, written in batches(source, seen, size, BUFFER * size, plan.seed, fitting.step):
        if fitting.step >= plan.steps:
            break
        unexplained, active = fitting.advance(read, written)
        rows.append({"step": fitting.step, "unexplained": unexplained, "active": active})
        if folder is not None and fitting.step % EVERY == 0 and world()[0] == 0:
            fitting.save(_state(folder), request)
    return rows


def _state(folder: str) -> Path:
    return Path(f"{folder}.training.safetensors")


def _sums(it: Dictionary, read: Tensor, written: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each text: squared error, squared distance to the mean; and activations [token, feature]. Each site counts by its own variance."""
    found, z = said(it, read)
    spread = by_site(it, (written - written.mean(0)).double().pow(2)).sum(2)  # [token, site]
    error = by_site(it, (written - found).double().pow(2)).sum(2)
    weight = spread.sum() / spread.sum(0) / spread.shape[1]
    texts = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    above, below = (
        torch.zeros(len(lengths), dtype=torch.float64).index_add(0, texts, (x * weight).sum(1).cpu())
        for x in (error, spread)
    )
    return above, below, z


def _result(
    found: Dictionary, start: Dictionary, source: Source, held: list[int], rows: list[dict[str, Any]], written: str | None, seed: int,
) -> Result:  # fmt: skip
    read, target = source.of(held)
    lengths = [len(source.ids[i]) - 1 for i in held]
    above, below, z = _sums(found, read, target, lengths)
    nothing = _sums(start, read, target, lengths)[0]
    low, high = (
        (float("nan"), float("nan"))
        if len(held) < 2
        else (float(end) for end in maths.intervals(above[:, None], below, seed=seed)[1:])
    )
    active = (z > 0).double().sum(1)
    total = float(below.sum())
    n = z.shape[1]
    variables: dict[str, Any] = {
        "value": (float(above.sum()) / total, (), SHARE),
        "null": (float(nothing.sum()) / total, (), SHARE),
        "l0": (float(active.mean()), (), "features"),
        "l0_sd": (float(active.std(correction=0)), (), "features"),
        "dead": (1.0 - float((z > 0).any(0).double().mean()), (), "share of features"),
        "zipf": (exponent((z > 0).double().sum(0).cpu()), (), "exponent"),
    }
    variables |= {name: (end, (), SHARE) for name, end in (("low", low), ("high", high)) if end == end}
    width = by_site(found, target).shape[2]
    place = found.place if len(source.models) == 1 else f"{source.places.reads[0]} of two models"
    notes = [
        f"{n} features at {place}, {width} numbers wide; {len(z)} held-out tokens of {len(held)} texts: {variables['value'][0]:.3g} of their "
        f"variance is not rebuilt (random rows: {variables['null'][0]:.3g})",
        f"written to {written}" if written else "no folder was given: the dictionary is not kept",
    ]
    if len(source.models) > 1:
        variables |= compared(found, read, target)
        notes.append(alone(variables["relative"][0], variables["fitted"][0]))
    return Result(
        variables,
        tables={"steps": rows},
        notes=notes,
        provenance={"dictionary": {"folder": written, "digest": found.digest}},
    )
