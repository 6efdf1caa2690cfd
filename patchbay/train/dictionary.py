"""Dictionary: sparse features of a signal, trained on the signal of texts, and saved so that others read them.

    loss = mean |x - x^|^2 + what the form adds, by Adam; x^ = z W_dec + b_dec, rows of W_dec of norm 1

    topk            the k largest activations of each token
    batchtopk       the n k largest of a batch of n tokens (Mutual Choice); used with one threshold, the running smallest kept
    feature_choice  each feature keeps its own number of tokens, n k in all, by Zipf's law of its rank; used with thresholds of its own
    relu            penalty x sum z_i |d_i|, which also shrinks what is rebuilt
    jumprelu        0.1 (activations per token / k - 1)^2; thresholds learn by pseudo-gradients
    gated           penalty x sum of the gates, and the gates' own rebuilding

A transcoder ("L0.mlp.in to L0.mlp.out") rebuilds what is written from what is read. Tokens but the first of each text, from a buffer that holds
a bounded number of them (`_stream.py`); a tenth of the texts is held out: `value` is FVU, the share of their variance that is not
rebuilt, `null` that of random rows of the same number and k. One run of the texts and 12 F d operations a token for each epoch.

Ayonrinde 2024, "Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders" (the full text was not at hand: ranks by
running density, exponent 0.7, no auxiliary Zipf loss). A low FVU shows that the signal is rebuilt, not that features mean something.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.errors import one_of
from patchbay.features import saved
from patchbay.features.dictionary import Dictionary
from patchbay.model.attached import attach, width_of
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port, parse_port
from patchbay.tasks.task import Task
from patchbay.train._fitting import Fitting, Plan, described
from patchbay.train._stream import activations, batches, shuffled

Form = Literal["topk", "batchtopk", "feature_choice", "relu", "jumprelu", "gated"]
FORMS = ("topk", "batchtopk", "feature_choice", "relu", "jumprelu", "gated")
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
    form: Form = "topk",
    n_features: int = 256,
    sparsity: float | None = None,
    steps: int = 500,
    folder: str | None = None,
    seed: int = 0,
) -> Result:
    """FVU of held-out tokens (`value`, with ends over texts), activations per token (`l0`) and share of silent features (`dead`) of a dictionary trained on texts.

    `prompts`: the texts. `at`: the signal, "L0.resid_out", or of a transcoder what is read and what is written, "L0.mlp.in to L0.mlp.out". `form`: how
    activations are chosen. `n_features`: how many features there are. `sparsity`: active features per token, 8 without; of relu and gated, which have no
    such number, the weight of their penalty, 0.1 without. `steps`: updates, of 256 tokens each, or as many as there are. `folder`: where the dictionary is
    written in SAELens's form; a call that was stopped goes on from the state beside it, bit for bit. Without, it is not kept.
    """
    one_of("form", form, FORMS)
    ports = _ports(model, at)
    encoded = [ids for ids in model.encode(prompts) if len(ids) > 1]
    plan = _plan(form, n_features, sparsity, steps, seed)
    _check(plan, encoded, folder)
    order = shuffled(len(encoded), seed, "held out")
    held = [encoded[i] for i in order[: max(1, len(order) // 10)]]
    seen = [encoded[i] for i in order[len(held) :]] or held
    fitting = _begun(model, plan, seen, ports)
    start = fitting.dictionary(ports[0].layer or 0, ports[0].signal, ports[1].signal)
    rows = _fit(model, plan, fitting, seen, ports, folder)
    found = fitting.dictionary(ports[0].layer or 0, ports[0].signal, ports[1].signal)
    trained_on = {
        "model_name": model.source or type(model.hf).__name__,
        "prepend_bos": False,
        "patchbay_fingerprint": model.fingerprint,
    }
    found = replace(found, trained_on=trained_on, source=folder or "")
    written = None if folder is None else str(saved.write(found, folder))
    if folder is not None:
        _state(folder).unlink(missing_ok=True)
    return _result(model, found, start, held, ports, rows, written, seed)


def _ports(model: Model, at: str) -> tuple[Port, Port]:
    ports = [parse_port(one) for one in at.split(" to ")]
    if (
        not 1 <= len(ports) <= 2
        or len({port.layer for port in ports}) > 1
        or any(port.index is not None for port in ports)
    ):
        raise PatchbayError(
            f"at={at!r}: one signal of a layer, such as 'L0.resid_out', or two, 'L0.mlp.in to L0.mlp.out'"
        )
    for port in ports:
        model.require(port)
    return ports[0], ports[-1]


def _plan(form: str, n_features: int, sparsity: float | None, steps: int, seed: int) -> Plan:
    """Adam's rate follows from the number of features, as in Gao et al. 2024."""
    rate = 2e-4 / (max(n_features, 1) / 2**14) ** 0.5
    if form in PENALISED:
        return Plan(form, n_features, 1, 0.1 if sparsity is None else float(sparsity), steps, rate, BATCH, seed)
    k = 8 if sparsity is None else sparsity
    if k != int(k):
        raise PatchbayError(f"sparsity={sparsity}: {form} has a whole number of active features per token")
    return Plan(form, n_features, int(k), 0.1, steps, rate, BATCH, seed)


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


def _begun(model: Model, plan: Plan, seen: list[list[int]], ports: tuple[Port, Port]) -> Fitting:
    """Tensors at their start, of the signal of the first texts."""
    read, written = activations(model, seen[:32], ports)
    return Fitting(plan, read, written, transcodes=ports[0] != ports[1])


def _fit(
    model: Model, plan: Plan, fitting: Fitting, seen: list[list[int]], ports: tuple[Port, Port], folder: str | None
) -> list[dict[str, Any]]:
    """All steps, or those that are left; the state goes to disk every now and then where there is a folder."""
    told = json.dumps([described(plan), [str(port) for port in ports], model.fingerprint, seen], sort_keys=True)
    request = hashlib.sha256(told.encode()).hexdigest()
    if folder is not None and _state(folder).is_file():
        fitting.resume(_state(folder), request)
    rows = []
    size = min(plan.batch_size, sum(len(ids) - 1 for ids in seen))
    for read, written in batches(model, seen, ports, size, BUFFER * size, plan.seed, fitting.step):
        if fitting.step >= plan.steps:
            break
        unexplained, active = fitting.advance(read, written)
        rows.append({"step": fitting.step, "unexplained": unexplained, "active": active})
        if folder is not None and fitting.step % EVERY == 0:
            fitting.save(_state(folder), request)
    return rows


def _state(folder: str) -> Path:
    return Path(f"{folder}.training.safetensors")


def _sums(it: Dictionary, read: Tensor, written: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each text: squared error, squared distance to the mean; and activations [token, feature]."""
    z = it.encode(read)
    error = (written - it.decode(z, read)).double().pow(2).sum(1)
    spread = (written - written.mean(0)).double().pow(2).sum(1)
    texts = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    above, below = (torch.zeros(len(lengths), dtype=torch.float64).index_add(0, texts, x) for x in (error, spread))
    return above, below, z


def _result(
    model: Model, found: Dictionary, start: Dictionary, held: list[list[int]], ports: tuple[Port, Port], rows: list[dict[str, Any]],
    written: str | None, seed: int,
) -> Result:  # fmt: skip
    attach(model, [found])  # what was made fits
    read, target = activations(model, held, ports)
    lengths = [len(ids) - 1 for ids in held]
    above, below, z = _sums(found, read, target, lengths)
    nothing = _sums(start, read, target, lengths)[0]
    low, high = (
        (float("nan"), float("nan"))
        if len(held) < 2
        else (float(end) for end in maths.intervals(above[:, None], below, seed=seed)[1:])
    )
    active = (z > 0).double().sum(1)
    total = float(below.sum())
    n = found.n_features
    variables: dict[str, Any] = {
        "value": (float(above.sum()) / total, (), SHARE),
        "null": (float(nothing.sum()) / total, (), SHARE),
        "l0": (float(active.mean()), (), "features"),
        "l0_sd": (float(active.std(correction=0)), (), "features"),
        "dead": (1.0 - float((z > 0).any(0).double().mean()), (), "share of features"),
    }
    variables |= {name: (end, (), SHARE) for name, end in (("low", low), ("high", high)) if end == end}
    notes = [
        f"{n} features at {found.place}, {width_of(model, ports[1])} numbers wide; {len(z)} held-out tokens of {len(held)} texts: {variables['value'][0]:.3g} of their "
        f"variance is not rebuilt (random rows: {variables['null'][0]:.3g})",
        f"written to {written}" if written else "no folder was given: the dictionary is not kept",
    ]
    return Result(
        variables,
        tables={"steps": rows},
        notes=notes,
        provenance={"dictionary": {"folder": written, "digest": found.digest}},
    )
