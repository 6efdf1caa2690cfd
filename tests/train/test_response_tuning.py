"""train.response_tuning: the form of responses is learned without questions, the loss as loops, nothing from responses of no form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import patchbay as pb
from patchbay.tiny import twins
from tests.tolerance import close


def model_of(seed: int = 0) -> pb.Model:
    return pb.load(twins.twin("llama", seed=seed))


def echoes(n: int = 24) -> list[list[list[int]]]:
    """Questions of random words; the response is always the same pair of tokens, then the question's last word."""
    rows = torch.randint(10, 60, (n, 4), generator=torch.Generator().manual_seed(0)).tolist()
    return [[row, [70, 71, row[-1]]] for row in rows]


def test_planted(tmp_path: Path) -> None:
    """The pair of tokens is learned from responses alone; on held-out questions it is likelier, and the checkpoint holds it."""
    model = model_of()
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    found = pb.train.response_tuning(model, echoes(), start=[1], steps=25, rate=3e-3, folder=str(tmp_path / "tuned"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.hf.state_dict().items())
    untuned, responses, instructions = found["score"].tolist()
    assert responses > found["high"][0]
    assert instructions > responses - 1.0
    assert untuned < -2.0
    assert found.tables["steps"][-1]["responses"] < found.tables["steps"][0]["responses"] / 2
    tuned = pb.load(tmp_path / "tuned")
    assert tuned.fingerprint == found.provenance["checkpoint"]["fingerprint"]
    said = pb.run(tuned, [[1]]).last_logits[0].argmax()
    assert int(said) == 70


def test_reference() -> None:
    """Scores by loops over runs of question and response; the first loss is that of responses after the start alone."""
    model, pairs = model_of(), echoes(6)
    found = pb.train.response_tuning(model, pairs, start=[1, 5], steps=1, rate=1e-9, batch_size=3, seed=2)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2)).tolist()
    test = [pairs[i] for i in order[3:]]

    def logp(before: list[int], after: list[int]) -> float:
        with torch.no_grad():
            logits = model.hf(torch.tensor([before + after])).logits[0].double()
        rows = [torch.log_softmax(logits[len(before) - 1 + i], -1)[token] for i, token in enumerate(after)]
        return float(sum(rows)) / len(after)

    own = [logp(question, answer) for question, answer in test]
    moved = [logp(question, test[(i + 1) % 3][1]) for i, (question, _) in enumerate(test)]
    for name, values in (("score", own), ("paired", moved)):
        assert close(found[name][0], sum(values) / 3, of=10.0, dtype=torch.float32)
        assert close(found[name][1], found[name][0], of=10.0, dtype=torch.float32)  # at so small a rate nothing moves
    assert close(found["own"], found["score"] - found["paired"], of=10.0, dtype=torch.float32)
    first = -sum(logp([1, 5], pairs[i][1]) for i in order[:3]) / 3
    assert close(found.tables["steps"][0]["responses"], first, of=10.0, dtype=torch.float32)


def test_null() -> None:
    """Responses that no question has a part in: tuning on them says nothing of which question they answer."""
    draw = torch.Generator().manual_seed(1)
    pairs = torch.randint(10, 60, (24, 2, 4), generator=draw).tolist()
    found = pb.train.response_tuning(model_of(), pairs, start=[1], steps=10, rate=1e-3)
    assert found["gain_own_low"] < 0.0 < found["gain_own_high"]


@pytest.mark.parametrize(
    ("pairs", "options", "says"),
    [
        (echoes(3), {}, "3 pairs: four or more"),
        ([[5, 6], [7, 8]], {}, "lists of two"),
        ([["a", [5]]], {}, "both texts or both token ids"),
        (echoes(6), {"steps": 0}, "steps=0, rate=0.001"),
        (echoes(6), {"folder": "."}, "is already there"),
    ],
)
def test_refusals(pairs: list[list[list[int]]], options: dict[str, object], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.train.response_tuning(model_of(), pairs, start=[1], **options)  # type: ignore[arg-type]
