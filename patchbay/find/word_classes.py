"""Word classes: whether states cluster by the class of the word that comes next, layer by layer, with nothing trained.

The generalised discrimination value of states x [sample, d], each dimension z-scored and halved, with C classes:

    gdv = d^-1/2 * [ mean over classes of the mean distance within  -  mean over pairs of classes of the mean distance between ]

0 says no clusters, -1 two tight balanced ones. It does not change when a dimension is moved or scaled, when dimensions
change places or when each is taken twice. A sample is a position whose next token is in one of the classes; `current` is
the same by the class of the position's own token. Two nulls: `null_low` (5 %) shuffles the classes over samples, `p` over
TOKENS, so that clusters of one token's own contexts pass for nothing (Benjamini-Hochberg over layers). One
forward pass, and distances of `per_class` x C samples for each layer.

Surendra, Schilling, Stoewer and Krauss 2023, "Word class representations spontaneously emerge in a deep neural network
trained on next word prediction"; the value is Schilling et al. 2021's. Dimensions that do not vary are left out.

It says that the classes lie apart, not that the model reads the difference: in text of few forms the word before tells the
class, so that an untrained model has clusters too; compare with one. A class of few tokens can be told from its
tokens alone: with one token for each class no shuffle over tokens is left, and p is 1. The value depends on the axes: a turned
stream gives another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.find._states import depth, permutations, token_ids
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

UNIT = "discrimination value"


@method(paper="surendra2023", unit=UNIT)
def word_classes(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    classes: Mapping[str, Sequence[str | int]],
    *,
    site: str = "resid_out",
    per_class: int = 100,
    draws: int = 200,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Discrimination value of the next token's class at each layer, against classes shuffled over samples and over tokens.

    `classes`: name -> its tokens (ids, or texts that are single tokens), no token in two. At most `per_class` samples of a
    class are drawn, by the seed. Table `samples` says how many samples and different tokens each class has.

    `site`: which states: resid_out, resid_in, resid_mid, attn.out, mlp.in or mlp.out. `per_class`: the most samples of
    one class. `draws`: shuffles of the classes that make the null.
    """
    encoded = model.encode(prompts)
    of_token = _classes(model, classes)
    if draws < 1 or per_class < 2:
        raise PatchbayError(f"draws={draws}, per_class={per_class}: at least 1 and 2")
    following = _samples(encoded, of_token, 1, per_class, seed)
    current = _samples(encoded, of_token, 0, per_class, seed)
    counts = [len({sample[:2] for sample in following if of_token[sample[2]] == name}) for name in range(len(classes))]
    if min(counts) < 2:
        found = ", ".join(f"{name} {count}" for name, count in zip(classes, counts, strict=True))
        raise PatchbayError(f"each class needs 2 positions or more whose next token it holds; found {found}")
    names, ports = depth(model, site)
    states = _read(model, encoded, ports, [*following, *current], batch_size)  # [layer, sample, d_model]
    labels = torch.tensor([of_token[sample[2]] for sample in following])
    shuffled = torch.cat([labels[None], labels[permutations(len(labels), draws, seed)]])
    by_token = _by_token([sample[2] for sample in following], of_token, draws, seed)
    rows, own = [], _labels_of(current, of_token)
    for state in states:
        gaps = _distances(state[: len(labels)])
        null = _gdv(gaps, shuffled)
        tokens = _gdv(gaps, by_token)
        p = (1.0 + (tokens <= null[0] + 1e-12).sum()) / (1.0 + draws)
        here = [null[0], null[1:].mean(), null[1:].quantile(0.05), null[1:].quantile(0.95), p]
        rows.append(torch.stack([*here, _current(state[len(labels) :], own)]))
    table = torch.stack(rows, 1)  # [quantity, layer]
    table[4] = maths.benjamini_hochberg(table[4])
    keys = ("gdv", "null_mean", "null_low", "null_high", "p", "current")
    variables = {
        key: (row, ("layer",), "p value" if key == "p" else UNIT)
        for key, row in zip(keys, table, strict=True)
        if not row.isnan().all()
    }
    samples = [
        {"class": name, "samples": count, "tokens": len({s[2] for s in following if of_token[s[2]] == i})}
        for i, (name, count) in enumerate(zip(classes, counts, strict=True))
    ]
    notes = _notes(samples, "current" in variables)
    return Result(variables, coords={"layer": names}, tables={"samples": samples}, notes=notes)


Sample = tuple[int, int, int]  # prompt, position, token that gives the class


def _classes(model: Model, classes: Mapping[str, Sequence[str | int]]) -> dict[int, int]:
    """Token id -> number of its class."""
    if not isinstance(classes, Mapping) or len(classes) < 2:
        raise PatchbayError("classes map two names or more to their tokens, such as {'day': [' Monday', ...], ...}")
    found: dict[int, int] = {}
    for number, (name, tokens) in enumerate(classes.items()):
        for token in token_ids(model, tokens, f"class {name!r}"):
            if found.setdefault(token, number) != number:
                raise PatchbayError(f"token {token} is in class {name!r} and in {list(classes)[found[token]]!r}")
    return found


def _samples(encoded: list[list[int]], of_token: dict[int, int], ahead: int, per_class: int, seed: int) -> list[Sample]:
    """Positions whose token `ahead` is in a class, at most `per_class` of each, drawn at random."""
    every: list[list[Sample]] = [[] for _ in range(max(of_token.values()) + 1)]
    for n, ids in enumerate(encoded):
        for place in range(len(ids) - ahead):
            if ids[place + ahead] in of_token:
                every[of_token[ids[place + ahead]]].append((n, place, ids[place + ahead]))
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(members), generator=generator)[:per_class].sort().values for members in every]
    return [members[i] for members, order in zip(every, drawn, strict=True) for i in order.tolist()]


def _read(model: Model, encoded: list[list[int]], ports: Any, samples: list[Sample], batch_size: int) -> Tensor:
    """The states of the samples, [layer, sample, d_model]."""
    out = torch.empty(len(ports), len(samples), model.d_model, dtype=torch.float64)
    for start in range(0, len(encoded), batch_size):
        piece = encoded[start : start + batch_size]
        trace = run(model, piece, taps=ports, logits="last")
        here = [i for i, sample in enumerate(samples) if start <= sample[0] < start + len(piece)]
        prompt = torch.tensor([samples[i][0] - start for i in here], dtype=torch.int64)
        place = torch.tensor([samples[i][1] for i in here], dtype=torch.int64)
        for row, port in enumerate(ports):
            out[row, here] = trace[port].double().cpu()[prompt, place]
    return out


def _labels_of(samples: list[Sample], of_token: dict[int, int]) -> Tensor:
    return torch.tensor([of_token[sample[2]] for sample in samples], dtype=torch.int64)


def _current(state: Tensor, labels: Tensor) -> Tensor:
    """The value by the positions' own class; NaN where not every class that occurs has two samples, or only one occurs."""
    counts = torch.bincount(labels)
    counts = counts[counts > 0]
    if len(counts) < 2 or int(counts.min()) < 2:
        return torch.tensor(torch.nan, dtype=torch.float64)
    dense = torch.unique(labels, return_inverse=True)[1]
    return _gdv(_distances(state), dense[None])[0]


def _distances(state: Tensor) -> Tensor:
    """Distances of z-scored and halved states [sample, d], over d^1/2: [sample, sample]."""
    spread = state.std(0, correction=0)
    varies = spread > 1e-9 * spread.max().clamp_min(1e-300)
    scored = ((state - state.mean(0)) / spread)[:, varies] / 2.0
    if not bool(varies.any()):
        return torch.zeros(len(state), len(state), dtype=torch.float64)
    return torch.cdist(scored, scored, compute_mode="donot_use_mm_for_euclid_dist") / int(varies.sum()) ** 0.5


def _gdv(gaps: Tensor, labels: Tensor) -> Tensor:
    """The value under several labellings [draw, sample] of the same samples: [draw]."""
    n_classes = int(labels.max()) + 1
    member = torch.nn.functional.one_hot(labels, n_classes).double()  # [draw, sample, class]
    sums = member.transpose(1, 2) @ (gaps @ member)  # [draw, class, class]
    counts = member.sum(1)  # [draw, class]
    within = (sums.diagonal(dim1=1, dim2=2) / (counts * (counts - 1.0))).mean(1)
    between = sums / (counts[:, :, None] * counts[:, None, :])
    upper = torch.ones(n_classes, n_classes).triu(1).bool()
    return within - between[:, upper].mean(1)


def _by_token(tokens: list[int], of_token: dict[int, int], draws: int, seed: int) -> Tensor:
    """Labels [draw, sample] with the classes dealt anew to the different tokens; draws that leave a class one sample are
    drawn again, a hundred times at most, then the classes stay as they are (which counts against the finding)."""
    kinds = sorted(set(tokens))
    of_kind = torch.tensor([of_token[kind] for kind in kinds])
    index = torch.tensor([kinds.index(token) for token in tokens])
    generator = torch.Generator().manual_seed(seed + 1)
    out = []
    for _ in range(draws):
        for _ in range(100):
            labels = of_kind[torch.randperm(len(kinds), generator=generator)][index]
            if int(torch.bincount(labels, minlength=int(of_kind.max()) + 1).min()) >= 2:
                break
        else:
            labels = of_kind[index]
        out.append(labels)
    return torch.stack(out)


def _notes(samples: list[dict[str, Any]], has_current: bool) -> list[str]:
    few = [row["class"] for row in samples if row["tokens"] < 5]
    notes = [f"classes of fewer than 5 different tokens here: {', '.join(few)}; p can say little"] if few else []
    return notes if has_current else [*notes, "`current` needs two positions of each class that occurs: not measured"]
