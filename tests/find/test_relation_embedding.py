"""Relation embedding: a linear relation is exact and edited; the formula by plain loops; nothing of a subject that is not read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from tests import given
from tests.lenses import VOCAB, D, answers, blocks, rotation
from tests.tolerance import close


def at(found: pb.Result, condition: str) -> float:
    return float(found["accuracy"][found.labels_of("condition").index(condition)])


def port(text: str) -> Any:
    return pb.Port("resid_out", int(text[1]))


def test_planted() -> None:
    """What is left of the model is linear: the map says what the model says, its inverse moves the subject, and a knob says another answer."""
    codes = torch.nn.functional.normalize(torch.randn(VOCAB, D, generator=torch.Generator().manual_seed(0)), dim=1)
    model = blocks(torch.zeros(D, D), rotation(2) - torch.eye(D), embed=codes, unembed=3 * codes @ rotation(2))
    found = pb.find.relation_embedding(model, answers(model, 40), port("L0"))
    assert at(found, "faithful") == 1.0
    assert at(found, "edited") == 1.0
    assert float(found["beta"]) == 1.0
    assert max(at(found, name) for name in ("constant", "other", "random")) < 0.5
    rows, toward = found.tables["answers"], found["toward"]
    one, other = rows[0]["token"], rows[1]["token"]
    prompt = next([[1, 2, t]] for t in range(VOCAB) if int(pb.run(model, [[1, 2, t]]).last_logits.argmax()) == one)
    with model.edited(pb.add("L0.resid_out", (toward[1] - toward[0]).float(), positions="last")):
        assert int(pb.run(model, prompt).last_logits.argmax()) == other


def test_reference() -> None:
    """J one number of the last stream at a time, b, and what beta J s + b says on held-out prompts, on Hugging Face's GPT-2."""
    hf = given.gpt2(2, vocab_size=VOCAB)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model = pb.load(hf)
    base = answers(model, 16)
    task = pb.Task(
        "own", base.clean, base.right, base.wrong, metric="log_probability", marks={"subject": [[3, 4]] * 16}
    )
    found = pb.find.relation_embedding(model, task, port("L0"), subject="subject", examples=3, rank=6, seed=2)
    dev, test = task.split(0.5, 2)
    jacobian, offset = torch.zeros(32, 32), torch.zeros(32)

    def streams(ids: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen: list[torch.Tensor] = []
        hooks = [
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            for module in (hf.transformer.h[1], hf.transformer.ln_f)
        ]
        hf(torch.tensor([list(ids)]))
        for hook in hooks:
            hook.remove()
        return seen[0], seen[1]

    for ids in dev.clean[:3]:
        s, o = streams(ids)
        one = torch.stack([torch.autograd.grad(o[0, -1, i], s, retain_graph=True)[0][0, 4] for i in range(32)])
        jacobian += one / 3
    for ids in dev.clean[:3]:
        s, o = streams(ids)
        offset += (o[0, -1] - jacobian @ s[0, 4]).detach() / 3
    right = []
    for ids in test.clean:
        s, o = (x.detach() for x in streams(ids))
        said = hf.lm_head(hf.transformer.ln_f(o[0, -1])).argmax()
        read = hf.lm_head(hf.transformer.ln_f(float(found["beta"]) * jacobian @ s[0, 4] + offset)).argmax()
        right.append(float(said == read))
    assert at(found, "faithful") == pytest.approx(sum(right) / len(right))
    means: dict[int, list[torch.Tensor]] = {}
    for ids in dev.clean[:3]:
        o = streams(ids)[1].detach()[0, -1]
        means.setdefault(int(hf.lm_head(hf.transformer.ln_f(o)).argmax()), []).append(o)
    u, sigma, v = torch.linalg.svd(jacobian)
    for row in found.tables["answers"]:
        mean = torch.stack(means[row["token"]]).mean(0)
        back = sum((u[:, k] @ mean) / sigma[k] * v[k] for k in range(6))
        assert close(found["toward"][row["feature"]], back, noise=2**12)  # through an inverse


def test_null() -> None:
    """A subject that the answer does not hang on: no map is better than the constant, and moving it moves nothing."""
    model = blocks(0.3 * rotation(1), rotation(2) - torch.eye(D))
    base = answers(model, 40)
    task = pb.Task("first", base.clean, base.right, base.wrong, metric="log_probability", marks={"subject": [[0]] * 40})
    found = pb.find.relation_embedding(model, task, port("L0"), subject="subject")
    assert at(found, "faithful") == at(found, "constant") == at(found, "other")
    assert at(found, "edited") == at(found, "random")


def test_what_cannot_be_read_is_refused() -> None:
    model = given.lent("gpt2")
    task = given.pairs(8)
    for message, where, options in (
        ("a subject is read from a stream", pb.Port("mlp.out", 0), {}),
        ("task pairs has the marks none", port("L0"), {"subject": "subject"}),
        ("a rank of 1 to 32", port("L0"), {"rank": 33}),
        ("6 or more prompts", port("L0"), {"examples": 0}),
    ):
        with pytest.raises(pb.PatchbayError, match=message):
            pb.find.relation_embedding(model, task, where, **options)  # type: ignore[arg-type]
