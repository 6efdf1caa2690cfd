"""A metric of one's own that reads logits at all positions: taken by every prover that runs the model whole, and refused by name by
those that compute the end of prompts alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.signal.port import PatchbayError
from patchbay.tiny.twins import twin
from tests.tolerance import close

TASK = pb.Task(
    name="pairs",
    clean=((5, 17, 8, 5, 30, 9), (6, 18, 9, 6, 31, 8), (7, 19, 5, 7)),
    right=(22, 23, 24),
    wrong=((17,), (18,), (19,)),
    corrupted=((5, 22, 8, 5, 30, 9), (6, 23, 9, 6, 31, 8), (7, 24, 5, 7)),
)
RIGHT, WRONG = torch.tensor(TASK.right), torch.tensor([ids[0] for ids in TASK.wrong])


def difference(logits: Tensor, prompts: Tensor) -> Tensor:
    """logit_diff, read from the logits of all positions."""
    last, row = logits[:, -1], torch.arange(len(logits))
    return last[row, RIGHT[prompts]] - last[row, WRONG[prompts]]


def early(logits: Tensor, prompts: Tensor) -> Tensor:
    """The answer's log-probability at the second and third positions."""
    return logits[:, 1:3].log_softmax(-1)[torch.arange(len(logits)), :, RIGHT[prompts]].sum(-1)


difference.positions = early.positions = "all"  # type: ignore[attr-defined]
difference.unit, early.unit = "logits", "nats"  # type: ignore[attr-defined]

CALLS: dict[str, Callable[[pb.Model, pb.Task], pb.Result]] = {
    "ablation": lambda m, t: pb.prove.ablation(m, t, "L0.H1", draws=2),
    "ablation by twins": lambda m, t: pb.prove.ablation(m, t, "L0.H1", draws=2, by="resample"),
    "knockout_curve": lambda m, t: pb.prove.knockout_curve(m, t, ["L0.H1", "L1.H0"], sizes=[1, 2], draws=2),
    "activation_patching": lambda m, t: pb.prove.activation_patching(m, t, site="head"),
    "activation_patching back": lambda m, t: pb.prove.activation_patching(m, t, way="denoising"),
    "attribution_patching": lambda m, t: pb.prove.attribution_patching(m, t),
    "path_patching": lambda m, t: pb.prove.path_patching(m, t),
    "path_patching to a head": lambda m, t: pb.prove.path_patching(m, t, receivers=["L1.H1.q"]),
    "channel": lambda m, t: pb.prove.channel(m, t, "L0.H1.C2>L1.H3.k", draws=2),
    "cross_model_patching": lambda m, t: pb.prove.cross_model_patching(m, other(), t, ["L0.H1"], draws=1),
}  # fmt: skip
REFUSE: dict[str, Callable[[pb.Model, pb.Task], object]] = {
    "edge_attribution": lambda m, t: pb.prove.edge_attribution(m, t),
    "circuit": lambda m, t: pb.prove.circuit(m, t, scores=pb.prove.edge_attribution(m, TASK), draws=1),
    "dose_response": lambda m, t: pb.measure.dose_response(m, t, pb.turn.scale("L1.attn", 2.0)),  # type: ignore[arg-type]
}  # fmt: skip


def other() -> pb.Model:
    return pb.load(twin("llama", seed=1))


@pytest.fixture(scope="module")
def model() -> pb.Model:
    return pb.load(twin("llama"))


@pytest.mark.parametrize("name", CALLS)
def test_read_at_the_end_it_is_the_named_metric(model: pb.Model, name: str) -> None:
    right, found = CALLS[name](model, TASK), CALLS[name](model, TASK.with_metric(difference))
    ratios = ("share", "low", "high") if "share" in right.variables else ()  # of nearly nothing: no rounding of logits
    for variable in (v for v in right.variables if not v.startswith(ratios or ("-",))):
        assert close(found[variable], right[variable], equal_nan=True, of=torch.ones(())), variable


@pytest.mark.parametrize("name", CALLS)
def test_read_before_the_end_it_is_another_number(model: pb.Model, name: str) -> None:
    found = CALLS[name](model, TASK.with_metric(early))
    main = "effect" if "effect" in found.variables else found.variables[0]
    assert found[main].isfinite().any()
    assert not torch.allclose(found[main], CALLS[name](model, TASK)[main], atol=1e-3, equal_nan=True)


def test_an_ablation_by_hand(model: pb.Model) -> None:
    lost = []
    for i, ids in enumerate(TASK.clean):
        own, without = (pb.run(model, [list(ids)], edits=e).logits for e in ([], [pb.zero(model.port("L0.H1.z"))]))
        lost.append(early(own, torch.tensor([i])) - early(without, torch.tensor([i])))
    found = pb.prove.ablation(model, TASK.with_metric(early), "L0.H1", by="zero", draws=2)
    assert close(found["effect"].double(), torch.stack(lost).mean().double().expand(1), of=torch.stack(lost))


def test_a_patch_by_hand(model: pb.Model) -> None:
    """Of a position after those that are read, the stream changes nothing; of the second, what a run with it by hand says."""
    found = pb.prove.activation_patching(
        model, TASK[:2].with_metric(early), site="resid_out", positions="each", way="noising"
    )
    assert close(found["effect"][0, 4:], 0.0, of=torch.ones(()))
    change, port = [], pb.Port("resid_out", 0)
    for i in range(2):
        clean, twin_of = [list(TASK.clean[i])], [list((TASK.corrupted or ())[i])]
        put = pb.run(model, twin_of, taps=[port])[port][:, 1:2]
        edited = pb.run(model, clean, edits=[pb.replace(port, put, positions=1)]).logits
        change.append(early(pb.run(model, clean).logits, torch.tensor([i])) - early(edited, torch.tensor([i])))
    assert close(found["effect"][0, 1].double(), torch.cat(change).mean().double(), of=torch.cat(change))


@pytest.mark.parametrize("name", REFUSE)
def test_what_reads_the_end_alone_says_so(model: pb.Model, name: str) -> None:
    with pytest.raises(
        PatchbayError,
        match=r"the metric early reads (all positions and this reads the last|logits \[prompt, position, vocab\])",
    ):
        REFUSE[name](model, TASK.with_metric(early))
