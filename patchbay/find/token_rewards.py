"""Token rewards: what each token is worth to a model by the reward in its logits, and what of it is not surprisal.

    reward[t] = Q(s_t, a_t) - gamma V(s_{t+1}),   Q = logits, V = logsumexp Q, V after the last token of a text = 0

s_t is the text before token a_t, so that reward = log p(a_t | s_t) + V(s_t) - gamma V(s_{t+1}): surprisal, and what a step does to the value. At gamma 1 a
text's rewards sum to its log p and the value at its start. `beyond` is the reward less its regression (least squares, all tokens together) on log p, `share` = variance of
beyond / variance of reward, with a 95 % bootstrap over texts; `slope`: of the regression. `term` is the mean square of rewards, which inverse soft-Q learning keeps small.

Adding a constant c(s) to all logits of a state leaves every probability, and so the loss and the surprisal, and moves the rewards. That gauge is not fixed by training on
next tokens: the rewards of an ordinary language model mean nothing. They are meant of a model that was trained with the term
(`train.variant(objective="inverse-rl")`, with its gamma). The null is such gauges, with the values that there are: all states of all texts in one line, their values moved along it by a
drawn number of states. `null_low` and `null_high` are the middle 95 % of share there, `p` is two-sided; `term_null` is the mean of the term, `term_p` one-sided, that moved values have one
as small. One forward pass.

Wulfmeier et al. 2024, "Imitating Language via Scalable Inverse Reinforcement Learning"; the null is this project's own.

A small `term_p` does not show that the term was trained: values of states that follow one another are alike in ordinary models, too. A reward is of this model's own
gauge and says nothing of what people want.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

LEAST = 3  # tokens with a reward: a line through two leaves nothing


@method(paper="wulfmeier2024", unit="nats")
def token_rewards(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    gamma: float = 1.0,
    ends: bool = True,
    draws: int = 200,
    seed: int = 0,
    batch_size: int = 16,
) -> Result:
    """The reward of each token after the first of each text, with its surprisal and what of the reward is beyond it.

    Main variable `reward` [prompt, position], positions counted from a text's first token, 0, which has none; beside it `surprisal` and `beyond`, all in nats, NaN behind a text's end. The
    table `cells` holds the tokens, so that rewards show as colour on text. Numbers: `share` with `share_low`, `share_high`, its null and `p`; `slope`; `term`, `term_null`, `term_p`.
    Texts of one token, and fewer than three tokens with a reward in all, are refused.

    `gamma`: the discount, from 0 to 1: what the model was trained with. `ends`: whether the texts end where they end, so that the value after the last token is 0; without, they were cut
    there and it is the model's own. `draws`: gauges of the null; where there are no more moves than that, all of them.
    """
    if not 0 <= gamma <= 1:
        raise PatchbayError(f"gamma={gamma}: a discount, from 0 to 1")
    if draws < 1:
        raise PatchbayError(f"draws={draws}: one gauge or more, for the null")
    encoded = model.encode(prompts)
    short = [i for i, ids in enumerate(encoded) if len(ids) < 2]
    if short:
        raise PatchbayError(f"prompts {short[:5]} have one token: rewards are of tokens after the first")
    if sum(map(len, encoded)) - len(encoded) < LEAST:
        raise PatchbayError(f"a regression needs {LEAST} tokens with a reward: give more texts, or longer ones")
    logps, values = _read(model, encoded, batch_size)
    rewards = [_rewards(logp, value, gamma, ends) for logp, value in zip(logps, values, strict=True)]
    x, y = torch.cat(logps), torch.cat(rewards)
    of = torch.tensor([i for i, logp in enumerate(logps) for _ in logp])  # the text of each token
    slope, beyond = _beyond(x, y)
    table = {"reward": rewards, "surprisal": [-logp for logp in logps], "beyond": _split(beyond, logps)}
    widest = max(map(len, rewards))
    variables: dict[str, Any] = {
        name: (torch.stack([_padded(row, widest) for row in rows]), ("prompt", "position"), "nats")
        for name, rows in table.items()
    }
    moved = torch.stack([torch.cat(each) for each in _moved(logps, values, gamma, ends, draws, seed)])  # [draw, token]
    numbers = _share(x, y, moved, of, seed) | _term(y, moved) | {"slope": slope}
    units = {"share": "share of variance", "null": "share of variance", "p": "p value", "slope": "nats per nat"}
    units |= {"term": "squared nats", "term_null": "squared nats", "term_p": "p value"}
    variables |= {
        name: (value, (), units.get(name) or units[name.partition("_")[0]])
        for name, value in numbers.items()
        if value == value
    }
    return Result(
        variables,
        coords={"position": list(range(1, widest + 1))},
        tables={"cells": _cells(model, encoded)},
        notes=_notes(numbers, len(moved)),
    )


def _read(model: Model, encoded: list[list[int]], batch_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """log p of every token after the first [token], and V of the state behind every token [position], of each text."""
    logps, values = [], []
    for start in range(0, len(encoded), batch_size):
        piece = encoded[start : start + batch_size]
        logits = run(model, piece).logits
        for i, (ids, row) in enumerate(zip(piece, logits, strict=True), start=start):
            said = row[: len(ids)].float()
            q = said[:-1].gather(1, torch.tensor(ids[1:], device=said.device)[:, None])[:, 0].double().cpu()
            value = said.logsumexp(-1).double().cpu()
            wrong = (~(q.isfinite() & value[:-1].isfinite() & value[1:].isfinite())).nonzero()[:, 0].tolist()
            if wrong:
                raise PatchbayError(
                    f"prompt {i}, position {wrong[0] + 1}: its logits are not finite: a token that a model rules out has no reward"
                )
            logps.append(q - value[:-1])
            values.append(value)
    return logps, values


def _rewards(logp: Tensor, value: Tensor, gamma: float, ends: bool) -> Tensor:
    """Q - gamma V of the state after each token, [token]."""
    after = value[1:].clone()
    if ends:
        after[-1] = 0.0
    return logp + value[:-1] - gamma * after


def _moved(
    logps: list[Tensor], values: list[Tensor], gamma: float, ends: bool, draws: int, seed: int
) -> list[list[Tensor]]:
    """Rewards of all texts under gauges that have the values that there are, moved along all states that a reward reads; for each draw."""
    read = [value[:-1] if ends else value for value in values]
    line = torch.cat(read)
    steps = torch.arange(1, len(line))
    if len(steps) > draws:
        steps = steps[torch.randperm(len(steps), generator=torch.Generator().manual_seed(seed))[:draws]]
    found = []
    for step in steps.tolist():
        pieces = line.roll(step).split([len(one) for one in read])
        other = [torch.cat([one, one.new_zeros(1)]) if ends else one for one in pieces]
        found.append([_rewards(logp, value, gamma, ends) for logp, value in zip(logps, other, strict=True)])
    return found


def _beyond(x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Slope of y on x, and y less its regression; a slope of NaN, and y less its mean, where x does not vary."""
    a, b = x - x.mean(), y - y.mean()
    below = a.square().sum()
    if float(below) <= len(x) * (maths.TIES * float(x.abs().max())) ** 2:
        return float("nan"), b
    slope = float((a * b).sum() / below)
    return slope, b - slope * a


def _share_of(x: Tensor, y: Tensor) -> float:
    """Of the variance of y what x does not explain; NaN where y does not vary."""
    left, all_ = _beyond(x, y)[1].square().sum(), (y - y.mean()).square().sum()
    return float(left / all_) if float(all_) > len(y) * (maths.TIES * float(y.abs().max())) ** 2 else float("nan")


def _share(x: Tensor, y: Tensor, moved: Tensor, of: Tensor, seed: int) -> dict[str, float]:
    """The share with its ends over texts, under the null, and the p of it."""
    share = _share_of(x, y)
    null = torch.tensor([_share_of(x, each) for each in moved], dtype=torch.float64)
    null = null[~null.isnan()]
    if share != share or not len(null):
        return {"share": share}
    low, high = _over_texts(x, y, of, seed)
    ends = null.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    middle = float(null.mean())
    return {
        "share": share,
        "share_low": low,
        "share_high": high,
        "null_low": ends[0],
        "null_high": ends[1],
        "p": maths.draws_p(share - middle, null - middle, two_sided=True),
    }


def _over_texts(x: Tensor, y: Tensor, of: Tensor, seed: int, n: int = 2000) -> tuple[float, float]:
    """95 % ends of the share, texts drawn with replacement: sums of each text, counted as often as it was drawn. NaN of one text."""
    count = int(of.max()) + 1
    if count < 2:
        return float("nan"), float("nan")
    a, b = x - x.mean(), y - y.mean()
    each = torch.stack([torch.ones_like(a), a, b, a * a, a * b, b * b], 1)
    sums = torch.zeros(count, 6, dtype=torch.float64).index_add_(0, of, each)  # [text, sum]
    drawn = torch.randint(count, (n, count), generator=torch.Generator().manual_seed(seed))
    size, a1, b1, aa, ab, bb = sums[drawn].sum(1).T
    aa, ab, bb = aa - a1 * a1 / size, ab - a1 * b1 / size, bb - b1 * b1 / size
    shares = (1.0 - ab.square() / (aa * bb)).clamp(0.0, 1.0)
    low, high = shares.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _term(y: Tensor, moved: Tensor) -> dict[str, float]:
    """The mean square of rewards, under the null, and the p that moved values have one as small."""
    term, null = float(y.square().mean()), moved.square().mean(1)
    return {"term": term, "term_null": float(null.mean()), "term_p": maths.draws_p(-term, -null)}


def _split(values: Tensor, like: list[Tensor]) -> list[Tensor]:
    return list(values.split([len(one) for one in like]))


def _padded(row: Tensor, width: int) -> Tensor:
    return torch.cat([row, row.new_full((width - len(row),), torch.nan)])


def _cells(model: Model, encoded: list[list[int]]) -> list[dict[str, Any]]:
    def text(token: int) -> str:
        return model.decode([token]) if model.tokenizer is not None else str(token)

    return [
        {"prompt": i, "position": at, "token": token, "text": text(token)}
        for i, ids in enumerate(encoded)
        for at, token in enumerate(ids[1:], start=1)
    ]


def _notes(numbers: dict[str, float], draws: int) -> list[str]:
    if "p" in numbers:
        ends = maths.between(numbers["share_low"], numbers["share_high"], ".0%")
        share = f"{numbers['share']:.0%}{ends} of the variance of rewards is beyond surprisal; {numbers['null_low']:.0%} to {numbers['null_high']:.0%} where the same values are moved along the texts (p {numbers['p']:.3g} of {draws})"
    else:
        share = "rewards do not vary, here or where their values are moved: there is no share beyond surprisal"
    small = numbers["term_p"] <= 0.05
    return [
        share,
        f"the mean square of rewards is {numbers['term']:.3g}, {numbers['term_null']:.3g} under moved values (p {numbers['term_p']:.3g}): "
        + ("values follow what is said" if small else "nothing here says that the gauge was fixed"),
        "a constant on all logits of a state leaves every probability and moves rewards: those of an ordinary language model mean nothing; they are meant of one that was trained with "
        'train.variant(objective="inverse-rl")',
    ]
