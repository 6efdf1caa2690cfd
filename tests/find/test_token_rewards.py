"""Token rewards: the rewards that a model was built from are read off it, formulas as loops, another gauge of the same model shows that nothing was fixed."""

from __future__ import annotations

import importlib
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.results import maps
from patchbay.tiny import lab, twins
from patchbay.train._objectives.inverse_rl import rewards as trained_on
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.find.token_rewards")
token_rewards: Any = module.token_rewards
TOKENS, GAMMA = 16, 0.9


def worth(seed: int) -> Tensor:
    """Rewards [state, token]: of the token, and more of the state, so that values differ."""
    draw = torch.Generator().manual_seed(seed)
    own, state = (torch.randn(TOKENS, n, generator=draw, dtype=torch.float64) for n in (TOKENS, 1))
    return own + 2 * state


def solved(reward: Tensor) -> Tensor:
    """Q of the soft Bellman equation, Q(s, a) = reward(s, a) + gamma V(a): the state is the last token."""
    value = torch.zeros(TOKENS, dtype=torch.float64)
    for _ in range(400):
        value = (reward + GAMMA * value).logsumexp(1)
    return reward + GAMMA * value


def saying(logits: Tensor) -> pb.Model:
    """A Llama whose logits are a table by its last token: layers write nothing, and the final norm turns a token into its own direction."""
    model = lab.small(TOKENS, layers=1, width=TOKENS, heads=2, mlp=8)
    hf: Any = model.hf
    with torch.no_grad():
        hf.model.embed_tokens.weight.copy_(1000 * torch.eye(TOKENS))  # far above the norm's epsilon
        hf.model.norm.weight.fill_(1.0)
        hf.lm_head.weight.copy_(logits.T / TOKENS**0.5)
        for map_ in (hf.model.layers[0].self_attn.o_proj, hf.model.layers[0].mlp.down_proj):
            map_.weight.zero_()
    return pb.load(hf)


def texts(seed: int, n: int = 6) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1000 + seed)
    return [torch.randint(TOKENS, (12 - i,), generator=draw).tolist() for i in range(n)]


def test_planted() -> None:
    """What was built in is what is read, to the token; a gauge that leaves every probability moves it; and the values follow what is said."""
    reward = worth(0)
    model, said = saying(solved(reward)), texts(0)
    found = token_rewards(model, said, gamma=GAMMA, ends=False)
    for i, ids in enumerate(said):
        own = torch.stack([reward[a, b] for a, b in pairwise(ids)])
        assert close(found["reward"][i, : len(own)], own, of=40.0, dtype=torch.float32)
        assert found["reward"][i, len(own) :].isnan().all()
    whole = token_rewards(model, said, gamma=GAMMA)
    last = [len(ids) - 2 for ids in said]
    for i, ids in enumerate(said):  # the same but for the last token, behind which nothing comes
        assert torch.equal(whole.values[i, : last[i]], found.values[i, : last[i]])
        assert close(whole.values[i, last[i]], solved(reward)[ids[-2], ids[-1]], of=40.0, dtype=torch.float32)
    assert found["term_p"] <= 0.05
    assert found["term"] < found["term_null"]
    assert "values follow what is said" in found.notes[1]
    gauge = torch.randn(TOKENS, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    other = token_rewards(saying(solved(reward) + 9 * gauge), said, gamma=GAMMA, ends=False)
    assert close(other["surprisal"], found["surprisal"], of=60.0, dtype=torch.float32, equal_nan=True)
    assert float((other.values - found.values).abs().nan_to_num(0.0).max()) > 5
    assert all("those of an ordinary language model mean nothing" in one.notes[2] for one in (found, other))


def regressed(x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    line = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None]).solution[:, 0]
    return float(line[0]), y - line[0] * x - line[1]


@pytest.mark.parametrize("ends", [True, False])
def test_reference(ends: bool) -> None:
    """Rewards, the regression, gauges and ends as loops over Hugging Face's logits."""
    hf, gamma = twins.twin("gpt2"), 0.8
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16], [17, 18]]
    found = token_rewards(pb.load(hf), prompts, gamma=gamma, ends=ends, batch_size=3, seed=3)
    logits = []
    for ids in prompts:
        with torch.no_grad():
            logits.append(hf(torch.tensor([ids])).logits[0].double())
    value = [[float(row.logsumexp(0)) for row in each] for each in logits]
    x, y, of = [], [], []

    def reward(i: int, t: int, values: list[list[float]]) -> float:
        ids = prompts[i]
        q = float(logits[i][t - 1, ids[t]]) - value[i][t - 1] + values[i][t - 1]
        return q if ends and t + 1 == len(ids) else q - gamma * values[i][t]

    places = [(i, t) for i, ids in enumerate(prompts) for t in range(1, len(ids))]
    for i, t in places:
        x.append(float(logits[i][t - 1, prompts[i][t]]) - value[i][t - 1])
        y.append(reward(i, t, value))
        of.append(i)
        assert close(float(found["reward"][i, t - 1]), y[-1], of=9.0, dtype=torch.float32)
        assert close(float(found["surprisal"][i, t - 1]), -x[-1], of=9.0, dtype=torch.float32)
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    slope, left = regressed(a, b)
    near = {
        "of": 9.0,
        "dtype": torch.float32,
        "noise": 4096.0,
    }  # quotients of small variances, read from single numbers
    assert close(float(found["slope"]), slope, **near)
    assert close(torch.stack([found["beyond"][i, t - 1] for i, t in places]), left, **near)

    def share(some: Tensor, other: Tensor) -> float:
        return float(regressed(some, other)[1].var(correction=0) / other.var(correction=0))

    assert close(float(found["share"]), share(a, b), **near)
    assert close(float(found["term"]), float(b.square().mean()), of=90.0, dtype=torch.float32)
    states = [(i, t) for i, ids in enumerate(prompts) for t in range(len(ids) - 1 if ends else len(ids))]
    shares, terms = [], []
    for move in range(1, len(states)):  # fewer than the draws: all of them
        dealt = [[*row] for row in value]
        for k, (i, t) in enumerate(states):
            j, s = states[k - move]
            dealt[i][t] = value[j][s]
        moved = torch.tensor([reward(i, t, dealt) for i, t in places], dtype=torch.float64)
        shares.append(share(a, moved))
        terms.append(float(moved.square().mean()))
    middle = sum(shares) / len(shares)
    beyond = [abs(one - middle) >= abs(share(a, b) - middle) - 1e-6 for one in shares]
    assert float(found["p"]) == pytest.approx((1 + sum(beyond)) / (1 + len(shares)))
    assert float(found["term_p"]) == pytest.approx(
        (1 + sum(t <= float(found["term"]) for t in terms)) / (1 + len(terms))
    )
    assert close(float(found["term_null"]), sum(terms) / len(terms), of=90.0, dtype=torch.float32)
    quantiles = torch.tensor(shares, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert close(torch.stack([found["null_low"], found["null_high"]]), quantiles, **near)
    drawn = torch.randint(4, (2000, 4), generator=torch.Generator().manual_seed(3)).tolist()
    again = []
    for some in drawn[:2000]:
        at = [k for i in some for k in range(len(of)) if of[k] == i]
        again.append(share(a[at], b[at]) if len({*some}) > 1 or some[0] != 3 else float("nan"))
    low, high = torch.tensor(again, dtype=torch.float64).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert close(torch.stack([found["share_low"], found["share_high"]]), torch.stack([low, high]), **near)


def test_null() -> None:
    """Where a state's constant is drawn, which no training on next tokens forbids, neither p is small more often than chance."""
    small, ps = 0, []
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        table = worth(seed).log_softmax(1) + 3 * torch.randn(TOKENS, 1, generator=draw, dtype=torch.float64)
        found = token_rewards(saying(table), texts(seed, n=4), ends=False, draws=60, seed=seed)
        small += int(found["p"] <= 0.05) + int(found["term_p"] <= 0.05)
        ps += [float(found["p"]), float(found["term_p"])]
    assert small <= 7
    assert 0.35 < sum(ps) / len(ps) < 0.65
    plain = token_rewards(saying(worth(0).log_softmax(1)), texts(0))  # values of 0: surprisal and nothing else
    assert float(plain["share"]) < 1e-6
    assert close(plain["beyond"], torch.zeros_like(plain["beyond"]).where(~plain["beyond"].isnan(), torch.nan), of=9.0, dtype=torch.float32, equal_nan=True)  # fmt: skip


def test_the_rewards_are_those_that_training_keeps_small() -> None:
    """The formula stands in two rooms of which neither may import the other."""
    model = pb.load(twins.twin("llama"))
    ids = [[5, 6, 7, 8], [9, 10, 11, 12]]
    for gamma in (1.0, 0.7):
        found = token_rewards(model, ids, gamma=gamma)
        with torch.no_grad():
            theirs = trained_on(model.hf(torch.tensor(ids)).logits, torch.tensor(ids), gamma)
        assert close(found.values, theirs)
        assert close(float(found["term"]), float(theirs.double().square().mean()), of=found.values.square())


def test_at_gamma_1_rewards_sum_to_the_text_and_the_value_at_its_start() -> None:
    model = pb.load(twins.twin("llama"))
    found = token_rewards(model, [[5, 6, 7, 8, 9]])
    start = pb.run(model, [[5]], logits="last").last_logits.logsumexp(-1)[0]
    assert close(float(found.values.sum()), float(start - found["surprisal"].sum()), of=20.0)
    assert "share_low" not in found  # one text has no interval over texts


def test_a_reward_is_colour_on_its_token() -> None:
    model = pb.load("tiny")
    found = token_rewards(model, ["The cat and the dog.", "The dog"], draws=3)
    drawn: Any = maps.map_of(found)
    assert drawn.axes == ("prompt", "position")
    ids = model.encode(["The cat and the dog.", "The dog"])
    for i, row in enumerate(ids):
        for at, token in enumerate(row[1:]):
            assert drawn.texts[i][at].startswith(maps.visible(model.decode([token]), 12))
    assert drawn.colour(float(found.values[1, -1])) == maps.GREY
    assert found.coords["position"][0] == 1


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([[5, 6, 7, 8]], {"gamma": 1.5}, "gamma=1.5: a discount, from 0 to 1"),
        ([[5, 6, 7, 8]], {"gamma": float("nan")}, "gamma=nan"),
        ([[5, 6, 7, 8]], {"draws": 0}, "draws=0: one gauge or more"),
        ([[5, 6, 7, 8], [9]], {}, r"prompts \[1\] have one token"),
        ([[5, 6, 7]], {}, "a regression needs 3 tokens with a reward"),
    ],
)
def test_what_has_no_rewards_is_refused(prompts: Any, options: Any, says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        token_rewards(pb.load(twins.twin("gpt2")), prompts, **options)


def test_a_token_that_is_ruled_out_has_no_reward() -> None:
    table = worth(0)
    table[3, 4] = -torch.inf
    model = saying(torch.zeros(TOKENS, TOKENS))
    own = model.hf.forward

    def ruled(*args: Any, **options: Any) -> Any:
        out = own(*args, **options)
        out.logits[..., 4] = -torch.inf
        return out

    model.hf.forward = ruled  # type: ignore[method-assign]
    with pytest.raises(pb.PatchbayError, match="prompt 1, position 2: its logits are not finite"):
        token_rewards(model, [[1, 2, 3, 5], [1, 3, 4, 5]])


def test_rewards_that_do_not_vary_have_no_share() -> None:
    found = token_rewards(saying(torch.zeros(TOKENS, TOKENS, dtype=torch.float64)), texts(0), ends=False)
    assert "share" not in found
    assert "p" not in found
    assert "rewards do not vary" in found.notes[0]


def test_a_seed_moves_the_ends_and_not_the_share() -> None:
    model, said = saying(worth(0)), texts(0)
    one, other = (token_rewards(model, said, draws=3, seed=seed) for seed in (0, 1))
    assert float(one["share"]) == float(other["share"])
    assert float(one["share_low"]) != float(other["share_low"])
    assert float(one["share_low"]) < float(one["share"]) < float(one["share_high"])
