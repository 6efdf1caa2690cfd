"""turn.persona_vector: a planted trait is raised, lowered and foretold; equals plain loops over plain runs; nothing where there is no trait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.knobs.knob import Knob
from patchbay.tiny import twins
from tests import given
from tests.tolerance import close

TRAIT = [9, 10, 11]
N = 3  # tokens of an answer


def prompts(n: int = 10, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """The same questions after a token that brings the trait (5, 6 or 7), and after others."""
    rows = torch.randint(20, 60, (2 * n, 5), generator=torch.Generator().manual_seed(seed))
    rows[:n, 0] = 5 + torch.arange(n) % 3
    return rows[:n].tolist(), rows[n:].tolist()


def persona() -> pb.Model:
    """A GPT-2 of weak layers in which every token hears, by an even look at all before it, a direction that the trait's words read."""
    hf = twins.twin("gpt2", tie_word_embeddings=False)
    with torch.no_grad():
        d = hf.config.n_embd
        u = torch.randn(d, generator=torch.Generator().manual_seed(1))
        u = (u - u.mean()) / (u - u.mean()).norm()
        for norm in [hf.transformer.ln_f, *(norm for block in hf.transformer.h for norm in (block.ln_1, block.ln_2))]:
            norm.weight.fill_(1.0)
            norm.bias.zero_()
        for block in hf.transformer.h:
            for module in (block.attn.c_proj, block.mlp.c_proj):
                module.weight *= 0.05
                module.bias.zero_()
        table = hf.transformer.wte.weight
        for rows in (table, hf.transformer.wpe.weight):
            rows -= (rows @ u)[:, None] * u
        table[[5, 6, 7]] += 6.0 * table.norm(dim=1).mean() * u
        first = hf.transformer.h[0].attn
        first.c_attn.weight.zero_()
        first.c_attn.bias.zero_()
        first.c_attn.weight[:, 2 * d] = u  # head 0's first value channel reads it
        first.c_proj.weight[0] = 4.0 * table.norm(dim=1).mean() * u
        out = hf.lm_head.weight
        out -= (out @ u)[:, None] * u
        out[TRAIT] = 0.2 * out[TRAIT] + 1.5 * u
    return pb.load(hf)


def test_planted(tmp_path: Path) -> None:
    model = persona()
    knob = pb.turn.persona_vector(model, *prompts(), TRAIT, max_new_tokens=N, draws=9)
    found = knob.evidence["persona"]

    negative, added, positive, taken = found["expressed"].tolist()
    assert positive > 0.8
    assert negative < 0.2
    assert added > 0.6
    assert taken < 0.5 * positive
    assert float(found["random"].max()) < added
    assert float(found["p"]) == pytest.approx(0.1)
    assert float(found["p_shuffled"]) < 0.3
    assert float(found["monitor"].nan_to_num().max()) > 0.7
    assert float(found["monitor_p"].min()) < 0.05
    assert len(knob.provenance["fitted"]) == 10
    knob.save(tmp_path / "persona.knob")
    assert pb.load_knob(tmp_path / "persona.knob") == knob


def said(
    hf: Any, prompt: list[int], at: int | None = None, vector: Tensor | None = None
) -> tuple[float, list[Tensor], list[Tensor]]:
    """What an answer expresses; after every layer the mean state of its tokens, and the state before it. By a hook, without a cache."""
    ids, chances = list(prompt), []

    def put(_: Any, __: Any, out: Any) -> Any:
        x = (out[0] if isinstance(out, tuple) else out).clone()
        x[0, len(prompt) - 1 :] += vector.float()  # type: ignore[union-attr]
        return (x, *out[1:]) if isinstance(out, tuple) else x

    hook = hf.transformer.h[at].register_forward_hook(put) if at is not None else None
    with torch.no_grad():
        for _ in range(N):
            logits = hf(torch.tensor([ids])).logits[0, -1].double()
            chances.append(float(logits.softmax(0)[TRAIT].sum()))
            ids.append(int(logits.argmax()))
        streams = list(hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[1:])
    if hook is not None:
        hook.remove()
    return (
        sum(chances) / N,
        [x[0, len(prompt) :].double().mean(0) for x in streams],
        [x[0, len(prompt) - 1].double() for x in streams],
    )


def test_reference() -> None:
    """Vector, expression with and without it, its controls and the monitor, of the half that did not choose."""
    model = persona()
    sides = prompts(6)
    knob = pb.turn.persona_vector(model, *sides, TRAIT, max_new_tokens=N, layers=[0], draws=2)
    found, fitted = knob.evidence["persona"], {tuple(ids) for ids in knob.provenance["fitted"]}
    dev, test = (
        [[ids for ids in side if (tuple(ids) in fitted) == inside] for side in sides] for inside in (True, False)
    )
    read = [[said(model.hf, ids) for ids in side] for side in dev]
    told = [[said(model.hf, ids) for ids in side] for side in test]
    v = torch.stack([one[1][0] for one in read[0]]).mean(0) - torch.stack([one[1][0] for one in read[1]]).mean(0)
    assert close(knob.edits[0].value, v)
    by_hand = [np.mean([one[0] for one in told[1]]), np.mean([said(model.hf, ids, 0, v)[0] for ids in test[1]])]
    by_hand += [np.mean([one[0] for one in told[0]]), np.mean([said(model.hf, ids, 0, -v)[0] for ids in test[0]])]
    assert close(found["expressed"], by_hand, of=1.0)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2, model.d_model, generator=generator).double()
    pooled = torch.stack([one[1][0] for side in read for one in side])
    for draw in range(2):
        order = torch.randperm(6, generator=generator)
        dealt = pooled[order[:3]].mean(0) - pooled[order[3:]].mean(0)
        for name, one in (("random", random[draw]), ("shuffled", dealt)):
            one = one / one.norm() * v.norm()
            assert close(
                float(found[name][draw]), np.mean([said(model.hf, ids, 0, one)[0] for ids in test[1]]), of=1.0
            ), name
    along = [float(one[2][0] @ v) for side in told for one in side]
    shown = [one[0] for side in told for one in side]
    assert close(float(found["monitor"][0]), np.corrcoef(along, shown)[0, 1])
    gains = [float(x) - by_hand[0] for x in found["random"]]
    assert close(float(found["p"]), (1 + sum(gain >= by_hand[1] - by_hand[0] for gain in gains)) / 3)


def test_answers_of_one_token_give_the_direction_of_steer() -> None:
    """Fitted on the prompts with their one token behind them, at that token."""
    model = given.lent("gpt2")
    sides = prompts(6)
    knob = pb.turn.persona_vector(model, *sides, TRAIT, max_new_tokens=1, layers=[1], draws=1)
    fitted = {tuple(ids) for ids in knob.provenance["fitted"]}
    whole = [[list(model.generate([ids], 1)[0]) for ids in side if tuple(ids) in fitted] for side in sides]
    means = [
        pb.run(model, rows, taps=["L1.resid_out"], logits="last").last("L1.resid_out").double().mean(0)
        for rows in whole
    ]
    assert close(knob.edits[0].value, means[0] - means[1])


def test_null() -> None:
    """Prompts of one kind, called two: no more than random directions and dealt labels, and nothing is foretold."""
    model = given.lent("gpt2")
    rows = torch.randint(20, 60, (24, 5), generator=torch.Generator().manual_seed(3)).tolist()
    found = pb.turn.persona_vector(model, rows[:12], rows[12:], list(range(30)), max_new_tokens=2, draws=9).evidence[
        "persona"
    ]
    assert float(found["p_shuffled"]) > 0.1
    assert float(found["monitor_p"].min()) > 0.02
    assert abs(float(found["expressed"][1] - found["expressed"][0])) < 0.2


def test_tuning_under_the_vector_brings_less_of_the_trait() -> None:
    """The same tuning on answers of the trait, by itself, under v and under a random direction: asked elsewhere, without any knob."""
    model = persona()
    knob = pb.turn.persona_vector(model, *prompts(), TRAIT, max_new_tokens=1, draws=1)
    vector = knob.edits[0].value
    assert isinstance(vector, Tensor)
    random = torch.randn(len(vector), generator=torch.Generator().manual_seed(0))
    other = Knob(
        "random", [pb.add(knob.edits[0].port, random / random.norm() * vector.norm(), positions="predicting")], 1.0
    )
    rows = prompts(16, seed=5)[1]
    task = pb.Task("trait", rows, [TRAIT[i % 3] for i in range(16)], [[30]] * 16)
    after = {
        name: pb.train.tune_parts(model, task.with_metric("log_probability"), "L1.mlp", steps=25, rate=5e-3, under=one)  # type: ignore[arg-type]
        for name, one in (("none", None), ("v", knob), ("random", other))
    }
    gains = {name: float(found["gain"]) for name, found in after.items()}

    assert gains["v"] < 0.5 * gains["none"]
    assert gains["random"] > 0.7 * gains["none"]
    plain = after["none"].tables["steps"][0]["loss"]
    assert after["v"].tables["steps"][0]["loss"] < plain - 0.5


def test_what_is_refused() -> None:
    model = given.lent("gpt2")
    for trait in ([], [-1], [10**6], list(range(model.vocab_size))):
        with pytest.raises(pb.PatchbayError, match="one token or more"):
            pb.turn.persona_vector(model, *prompts(4), trait)
    for options in ({"layers": [5]}, {"max_new_tokens": 0}, {"draws": 0}):
        with pytest.raises(pb.PatchbayError, match="layers are 0 to 1, and a token and a draw"):
            pb.turn.persona_vector(model, *prompts(4), TRAIT, **options)
    with pytest.raises(pb.PatchbayError, match="hold out"):
        pb.turn.persona_vector(model, [[3, 4]], [[5, 6], [7, 8]], TRAIT)
