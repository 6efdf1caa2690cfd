"""Features: training, one site of a model, attribution and sweeps, each against the plain way to do the same.

"train" steps a TopK dictionary on the same random batches by SAELens's own trainer (where it is installed) and by ours: the ratio is of seconds, so that
0.67 is 1.5 times its tokens per second. "site" runs a prompt with every feature of a dictionary of 16 d features at one layer encoded, one of them set,
and the change decoded, against the forward alone. "attribution" is all features of a 64-token prompt by one backward pass (pb.find.features) against
forward and backward of the plain model. "sweep" zeroes 1,000 features one at a time in one pb.sweep, at all positions of the prompt or at its last: the 1,000 of the highest activations, all of which are active
somewhere in it (k 128 of 12,288 about the mean of its tokens, so that there are so many); its "Hugging Face" side is pb.run with one edit, of which 20 are timed and scaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import patchbay as pb
from bench.clock import Comparison, compare, now
from bench.report import Row, timed
from bench.shapes import save_shapes
from patchbay.train._fitting import Fitting, Plan
from patchbay.train._places import Places

PARTS = ("train", "site", "attribution", "sweep")
METHOD = (__doc__ or "").split("\n\n", 1)[1].replace("\n", " ").strip()
D, N, K, BATCH = 256, 4096, 16, 512


def rows(folder: Path, parts: tuple[str, ...], device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """The section's rows."""
    if "train" in parts:
        yield from _training(seconds)
    if set(parts) & {"site", "attribution", "sweep"}:
        model = pb.load(save_shapes(folder, dtype)["gpt2-small"], device=device, dtype=dtype)
        view = model.with_dictionaries(_dictionary(model.d_model))
        yield from _site(model, view, seconds) if "site" in parts else ()
        yield from _attribution(model, view, seconds) if "attribution" in parts else ()
        for positions in (None, -1) if "sweep" in parts else ():
            yield _sweep(model, positions)


def _dictionary(d: int, k: int = 32) -> pb.Dictionary:
    draw = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(16 * d, d, generator=draw), dim=1)
    return pb.Dictionary(rows.T, rows, torch.zeros(16 * d), torch.zeros(d), form="topk", k=k, layer=6)


def _training(seconds: float) -> Iterator[Row]:
    """TopK of one size on the same batches."""
    try:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer
    except ImportError:
        return
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(BATCH, D, generator=draw) for _ in range(4)]
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=N, k=K, dtype="float32", device="cpu"))
    cfg = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=BATCH, lr_end=3e-4)
    theirs = SAETrainer(cfg, sae, iter(()))
    places = Places((pb.Port("resid_out", 0),), (pb.Port("resid_out", 0),), "plain")
    ours = Fitting(Plan("topk", N, K, 0.0, 10**6, 3e-4, BATCH, 0), batches[0], batches[0], places)

    def base() -> None:
        for batch in batches:
            theirs.step(batch)

    def own() -> None:
        for batch in batches:
            ours.advance(batch, batch)

    found = compare(base, own, seconds=seconds, least=5)
    speed = [len(batches) * BATCH / min(times) for times in (found.base, found.ours)]
    yield timed("train", f"TopK {N} of {D}, k {K}", f"{BATCH} tokens", found, 1 / 1.5, f"tokens a second {speed[0]:,.0f} and {speed[1]:,.0f}")  # fmt: skip


def _site(model: pb.Model, view: pb.Model, seconds: float) -> Iterator[Row]:
    for n, length in ((1, 64), (8, 64)):
        ids = torch.randint(0, 50000, (n, length), generator=torch.Generator().manual_seed(1))
        edit = pb.replace("L6.F5.act", 3.0)
        found = compare(lambda ids=ids: pb.run(model, ids), lambda ids=ids, edit=edit: pb.run(view, ids, edits=[edit]), seconds=seconds, least=5)  # fmt: skip
        yield timed("site: encode, edit, decode", "gpt2-small, F 12,288", f"{n} x {length}", found, 1.25)


def _attribution(model: pb.Model, view: pb.Model, seconds: float) -> Iterator[Row]:
    ids = torch.randint(0, 50000, (1, 64), generator=torch.Generator().manual_seed(1)).tolist()
    task = pb.Task("one", ids, [5], [[6]])

    def base() -> Any:
        trace = pb.run(model, ids, taps=["L6.resid_out"], grad=True)
        return trace.gradient(trace.last_logits[:, 5].sum() - trace.last_logits[:, 6].sum(), "L6.resid_out")

    found = compare(base, lambda: pb.find.features(view, task, "L6.features", draws=1), seconds=seconds, least=5)
    yield timed("attribution of 12,288 features", "gpt2-small", "1 x 64", found, None)


def _sweep(model: pb.Model, positions: int | None, few: int = 20, many: int = 1000) -> Row:
    ids = torch.randint(0, 50000, (1, 16), generator=torch.Generator().manual_seed(1)).tolist()
    mean = pb.run(model, ids, taps=["L6.resid_out"])["L6.resid_out"][0].mean(0)
    view = model.with_dictionaries(replace(_dictionary(model.d_model, 128), b_dec=mean, subtract=True))
    task = pb.Task("one", ids, [5], [[6]])
    z = pb.run(view, ids, taps=["L6.features.act"])["L6.features.act"][0]
    top = z.amax(0).topk(many)
    assert float(top.values.min()) > 0  # none of them does nothing
    active = top.indices.tolist()
    edits = [pb.zero(f"L6.F{i}.act", positions=positions) for i in active]
    began = now()
    swept = pb.sweep(view, task, edits)["value"][:few, 0]
    ours = now() - began
    began = now()
    alone = torch.stack([task.score(pb.run(view, ids, edits=[one]).last_logits)[0] for one in edits[:few]])
    base = (now() - began) * many / few
    gap = float((swept - alone).abs().max())
    where = "at all positions" if positions is None else "at the last position"
    at = float((z[:, active] > 0).double().sum(0).mean())
    note = f"{base / ours:.1f}x; active at {at:.1f} positions on average; scores within {gap:.0e}"
    return timed(
        f"sweep over {many:,} features {where}", "gpt2-small", "1 x 16", Comparison((base,), (ours,)), 1 / 15, note
    )
