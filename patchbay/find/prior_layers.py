"""Prior layers: at which layers what the stream says for the answer follows the answer's prior probability.

    lens[layer]  = Spearman correlation, over prompts, of log p(answer) by the logit lens with the answer's log prior
    probe[layer] = Spearman correlation of the log prior with what a ridge regression reads of it in the stream at the last
                   token, no answer being in the part that the regression saw

The log prior is given, or measured: log of the mean probability of the answer after `neutral` prompts. Where a layer writes the
prior whatever is asked, also answers that were NOT asked follow it: `unasked` is the same as `lens` for another
prompt's answer. A prior belongs to an answer, so the null deals the priors to the ANSWERS anew, `draws` times: `null_low` and
`null_high` (the middle 95 %) and `p` for the lens, `probe_low`, `probe_high` and `probe_p` for the probe; two-sided for the lens,
one-sided for the probe, Benjamini-Hochberg over layers. One forward pass, and for each layer one unembedding and `folds` ridge regressions.

Zhang, Veselovsky, McCoy and Griffiths 2025, "Identifying and Mitigating the Influence of the Prior Distribution in Large
Language Models"; both ways to read a layer are our own, theirs was not compared.

A correlation at a layer does not say that the answer is wrong for it, nor that the layer brings it about: follow with
`prove.ablation`. Frequent words have large unembedding rows or biases, which alone makes a lens follow the prior from
the embedding on: look for the layer at which it rises. The probe reads whatever goes with the prior too: of sums, their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.find._probe import scaled
from patchbay.find._states import depth, exceeded, lens, permutations
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

UNIT = "rank correlation"


@method(paper="zhang2025c", unit=UNIT)
def prior_layers(
    model: Model,
    task: Task,
    *,
    prior: Sequence[float] | None = None,
    neutral: Sequence[Any] | None = None,
    folds: int = 5,
    draws: int = 500,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Correlation of each layer's read-out of the right answer with the answer's log prior, against priors dealt at random.

    Give `prior` (a log probability for each prompt's answer, the same wherever the answer is the same) or `neutral` prompts
    (texts or lists of ids) after which it is measured. Table `prior` lists the answers.

    `prior`: a log probability for each prompt's answer, known beforehand. `neutral`: prompts after which the answers'
    prior is measured instead. `folds`: parts of the prompts, each read by a probe of the others. `draws`: random deals
    of the priors that make the null.
    """
    task.check(model.vocab_size)
    if (prior is None) == (neutral is None):
        raise PatchbayError(
            "give prior= (a log probability for each prompt's answer) or neutral= (prompts), one of them"
        )
    answers = sorted(set(task.right))
    if len(answers) < max(3, folds) or folds < 2 or draws < 1:
        raise PatchbayError(
            f"{len(answers)} different answers, folds={folds}, draws={draws}: at least 3 answers, 2 folds, an answer "
            "for each fold and 1 draw"
        )
    place = torch.tensor([answers.index(token) for token in task.right])  # [prompt]
    of_answer = _given(task, prior, answers) if prior is not None else _measured(model, neutral, answers, batch_size)
    if float(of_answer.max() - of_answer.min()) == 0.0:
        raise PatchbayError("all answers have one prior: nothing to correlate with")
    order = torch.cat([torch.arange(len(answers))[None], permutations(len(answers), draws, seed)])
    dealt = of_answer[order][:, place]  # [1 + draw, prompt]
    other = (place + 1 + torch.arange(len(place)) % (len(answers) - 1)) % len(answers)  # an answer that was not asked
    held = _folds(len(answers), folds, seed)[place]
    names, ports = depth(model)
    states, asked, unasked = _read(model, task, ports, torch.tensor(answers)[other], batch_size)
    found: dict[str, list[Tensor]] = {}
    for state, own, not_asked in zip(states, asked, unasked, strict=True):
        by_lens, by_probe = _spearman(own[None], dealt), _spearman(_ridge(scaled(state), dealt, held), dealt)
        cell = {"lens": by_lens[0], **_band(by_lens[1:], ""), "p": exceeded(by_lens[0].abs(), by_lens[1:].abs())}
        cell |= {"unasked": _spearman(not_asked[None], of_answer[other][None])[0]}
        cell |= {"probe": by_probe[0], **_band(by_probe[1:], "probe_")}
        cell |= {"probe_p": exceeded(by_probe[0], by_probe[1:])}
        for name, value in cell.items():
            found.setdefault(name, []).append(value)
    table = {name: torch.stack(values) for name, values in found.items()}
    for name in ("p", "probe_p"):
        table[name] = maths.benjamini_hochberg(table[name])
    text = [model.decode([token]) if model.tokenizer is not None else str(token) for token in answers]
    rows = [
        {"token": token, "text": shown, "log_prior": value, "prompts": int((place == i).sum())}
        for i, (token, shown, value) in enumerate(zip(answers, text, of_answer.tolist(), strict=True))
    ]
    units = {"p": "p value", "probe_p": "p value"}
    return Result(
        {name: (value, ("layer",), units.get(name, UNIT)) for name, value in table.items()},
        coords={"layer": names},
        tables={"prior": sorted(rows, key=lambda row: -float(row["log_prior"]))},
        notes=_notes(table, names),
    )


def _given(task: Task, prior: Sequence[float], answers: list[int]) -> Tensor:
    """The log prior of each answer from that of each prompt, [answer]."""
    values = [float(value) for value in prior]
    if len(values) != len(task):
        raise PatchbayError(f"prior has {len(values)} values for {len(task)} prompts; one for each")
    found: dict[int, float] = {}
    for token, value in zip(task.right, values, strict=True):
        if value != value or value in (float("inf"), float("-inf")) or found.setdefault(token, value) != value:
            raise PatchbayError(
                f"prior of token {token}: {value} where it also is {found.get(token)}; one finite number"
            )
    return torch.tensor([found[token] for token in answers], dtype=torch.float64)


def _measured(model: Model, neutral: Any, answers: list[int], batch_size: int) -> Tensor:
    """log of the mean probability of each answer after the neutral prompts, [answer]."""
    encoded = model.encode(neutral if isinstance(neutral, str) else list(neutral))
    total = torch.zeros(len(answers), dtype=torch.float64)
    for start in range(0, len(encoded), batch_size):
        logits = run(model, encoded[start : start + batch_size], logits="last").last_logits.double().cpu()
        total += logits.softmax(-1)[:, answers].sum(0)
    return (total / len(encoded)).clamp_min(1e-300).log()


def _folds(n: int, folds: int, seed: int) -> Tensor:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    fold = torch.empty(n, dtype=torch.int64)
    fold[order] = torch.arange(n) % folds
    return fold


def _read(model: Model, task: Task, ports: list[Any], other: Tensor, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Last-token states [layer, prompt, d_model], lens log-probability of the right and of another answer [layer, prompt]."""
    pieces = []
    for start in range(0, len(task), batch_size):
        piece = task[start : start + batch_size]
        trace = run(model, piece, taps=ports, logits="last")
        rows = torch.arange(len(piece))
        states, asked, unasked = [], [], []
        for port in ports:
            likely = lens(model, trace.last(port))[1].double().cpu().log_softmax(-1)  # [prompt, vocab]
            states.append(trace.last(port).double().cpu())
            asked.append(likely[rows, torch.tensor(piece.right)])
            unasked.append(likely[rows, other[start : start + len(piece)]])
        pieces.append((torch.stack(states), torch.stack(asked), torch.stack(unasked)))
    first, second, third = zip(*pieces, strict=True)
    return torch.cat(first, 1), torch.cat(second, 1), torch.cat(third, 1)


def _ridge(x: Tensor, y: Tensor, held: Tensor) -> Tensor:
    """Held-out ridge predictions of y [draw, prompt] from x [prompt, d]: [draw, prompt].

    The penalty is the mean squared singular value of the fold's states, so that about half of an average direction is kept.
    """
    out = torch.empty_like(y)
    for fold in held.unique():
        test = held == fold
        mean, level = x[~test].mean(0), y[:, ~test].mean(1, keepdim=True)
        u, size, basis = torch.linalg.svd(x[~test] - mean, full_matrices=False)
        kept = size / (size.square() + size.square().mean().clamp_min(1e-300))
        out[:, test] = level + ((y[:, ~test] - level) @ u * kept) @ basis @ (x[test] - mean).T
    return out


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of rows, equal values sharing their mean rank: [draw, prompt] (one of them may be [1, prompt]) -> [draw].

    0 where either row is constant: nothing follows anything.
    """
    first, second = (_ranks(rows) for rows in (a, b))
    scale = first.norm(dim=1) * second.norm(dim=1)
    return torch.where(scale > 0, (first * second).sum(1) / scale.clamp_min(1e-300), 0.0)


def _ranks(rows: Tensor) -> Tensor:
    """Centred mean ranks along each row."""
    low = torch.searchsorted(rows.sort(1).values, rows.contiguous())
    high = torch.searchsorted(rows.sort(1).values, rows.contiguous(), right=True)
    ranks = (low + high).double() / 2.0
    return ranks - ranks.mean(1, keepdim=True)


def _band(null: Tensor, prefix: str) -> dict[str, Tensor]:
    low, high = null.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {f"{prefix or 'null_'}low": low, f"{prefix or 'null_'}high": high}


def _notes(table: dict[str, Tensor], names: list[str]) -> list[str]:
    clear = [name for name, p in zip(names, table["p"].tolist(), strict=True) if p < 0.05]
    rise = table["lens"].diff()
    at = int(rise.argmax()) + 1
    said = f"lens outside the null at {', '.join(clear) or 'no layer'}"
    return [f"{said}; largest rise {float(rise[at - 1]):+.2f} at {names[at]}"]
