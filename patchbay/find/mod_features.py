"""Mod features: directions that say which remainder a number leaves, shared by the classes of ordinal words.

    feature[r]  = mean over decades of (embedding of the number with remainder r, less its decade's mean)
    shift(i, j) = e(i) - feature[i mod m] + feature[j mod m]

e is the effective embedding of a number's token (`raw`, `mlp0` or `sum`; see `successor_heads`). Measured:

- `accuracy` of a linear probe (ridge, one-hot remainders) for i mod m, on decades that it was not fitted on (2
  halves, then swapped), for each embedding; `null_mean`, `null_high` (95th percentile) and p with the remainders
  shuffled `draws` times;
- transfer: the probe of all numbers read on other classes (months, letters, number words) by the number of each word,
  with a p from shuffled labels, in the table `transfer`;
- the edit: feature directions from one half of the decades, put into numbers of the other half; `follow`, the share
  of edited words for which the head's answer within the numbers has the remainder (j + 1) mod m, `follow_exact`, for
  which it is that very number of the same decade; `follow_random`, with random directions of the same length;
  `unedited`, the share of plain words of that half with the right successor. The head is the given one, or the best
  on the half that is not tested.

`direction` [feature, d_model] holds the features of all decades: `pb.add(port, direction[j] - direction[i])`, at the
port that the notes name, is the edit in the running model. Needs no prompts.

Gould, Ong, Ogden and Conmy 2023, "Successor Heads" (features there from a sparse autoencoder and from probes, on
mlp0, m = 10).

A probe says that the remainder can be read, not that anything reads it; that is what the edit is for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.find._ordinals import (
    CLASSES,
    WAYS,
    Classes,
    OrdinalClass,
    answers,
    effective_embeddings,
    ordinal_classes,
    say,
)
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port

WHAT = "mod_features"
RIDGE = 0.1  # of the mean eigenvalue of the kernel
SHARE = "share of tokens"


@method(paper="gould2023", unit=SHARE)
def mod_features(
    model: Model,
    *,
    modulus: int = 10,
    head: Part | None = None,
    classes: Classes | None = None,
    draws: int = 200,
    batch_size: int = 256,
    seed: int = 0,
) -> Result:
    """Probe, directions and edit of the remainder modulo `modulus`, on the number words of the model's own tokenizer.

    `classes`: name -> words (or token ids) in order; the first one is the numbers, counted from 0, on which features
    are fitted, the others are for transfer. `head`: whose answers the edit is read by.

    `modulus`: what the numbers are divided by. `draws`: shuffles of the remainders that make the null.
    """
    if modulus < 2 or draws < 1:
        raise PatchbayError(f"{WHAT}: modulus={modulus} (2 or more), draws={draws} (1 or more)")
    used, notes = ordinal_classes(model, WHAT, classes)
    numbers = used[0]
    if classes is None and numbers.name != "numbers":
        raise PatchbayError(
            f"{WHAT}: this tokenizer has too few of the numbers {CLASSES['numbers'][0]} to 200 as tokens"
        )
    value = torch.tensor([n - numbers.numbers[0] for n in numbers.numbers]) if classes is not None else None
    value = torch.tensor(numbers.numbers) if value is None else value
    decade, remainder = value // modulus, value % modulus
    complete = [d for d in decade.unique().tolist() if int((decade == d).sum()) == modulus]
    if modulus < 2 or len(complete) < 4:
        raise PatchbayError(
            f"{WHAT}: modulus={modulus} with {len(value)} numbers gives {len(complete)} full rounds; "
            "a modulus of 2 or more and 4 full rounds are needed"
        )
    kept = torch.tensor([d in complete for d in decade.tolist()])
    made = effective_embeddings(model, [token for one in used for token in one.ids], batch_size)
    n = len(numbers.ids)
    half = _halves(decade, complete, seed)  # bool [number]: in the first half
    variables, ways = _probed(made, n, kept, half, remainder, modulus, draws, seed)
    layer, index, said = _read_by(model, head, made, used, half, kept, batch_size)
    way = "raw" if layer == 0 or "sum" not in made else "sum"
    edited = _edit(
        model, made[way][:n].double(), numbers, (layer, index), (decade, remainder, kept, half), modulus, seed
    )
    after = torch.tensor(numbers.after)
    before = (said[way][layer][:, index] == after)[kept & ~half & (after >= 0)]
    directions = _features(made[way][:n].double(), decade, remainder, kept, modulus)
    port = Port("embed") if way == "raw" else Port("resid_out", 0)
    return Result(
        {
            **{name: (x, ("condition",), "probability" if name == "p" else SHARE) for name, x in variables.items()},
            "unedited": (before.double().mean(), (), SHARE),
            **{name: (x, (), SHARE) for name, x in edited.items()},
            "direction": (directions, ("feature", "d_model"), "stream"),
        },
        coords={"condition": ways},
        tables={"transfer": _transfer(made[way].double(), used, kept, remainder, modulus, draws, seed)},
        notes=[
            *notes,
            f"the edit is pb.add at {port} of direction[j] - direction[i]; read by L{layer}.H{index}"
            + ("" if head is not None else ", chosen as the best successor head"),
        ],
        highlights=[Part(layer, "head", index)],
    )


def _halves(decade: Tensor, complete: list[int], seed: int) -> Tensor:
    """Whether a number's round is in the first half of a random split of the full rounds, bool [number]."""
    order = torch.randperm(len(complete), generator=torch.Generator().manual_seed(seed)).tolist()
    first = {complete[at] for at in order[: len(complete) // 2]}
    return torch.tensor([d in first for d in decade.tolist()])


# --- the probe ----------------------------------------------------------------------------------------------


def _probed(
    made: dict[str, Tensor], n: int, kept: Tensor, half: Tensor, remainder: Tensor, modulus: int, draws: int, seed: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Held-out accuracy for each embedding, with shuffled remainders beside, each [condition]."""
    rows = []
    labels = remainder[kept]
    for x in made.values():
        some = x[:n].double().cpu()[kept]
        generator = torch.Generator().manual_seed(seed)
        found = _held_out(some, half[kept], labels, modulus)
        null = torch.stack(
            [
                _held_out(some, half[kept], labels[torch.randperm(len(labels), generator=generator)], modulus)
                for _ in range(draws)
            ]
        )
        p = (1 + (null >= found - 1e-9).sum()) / (1 + draws)
        rows.append(torch.stack([found, null.mean(), null.quantile(0.95), p.double()]))
    names = ("accuracy", "null_mean", "null_high", "p")
    return dict(zip(names, torch.stack(rows, 1), strict=True)), [way for way in WAYS if way in made]


def _held_out(x: Tensor, half: Tensor, labels: Tensor, modulus: int) -> Tensor:
    """Share of the words whose remainder a probe fitted on the other half names."""
    right = []
    for test in (half, ~half):
        fit = _probe(x[~test], labels[~test], modulus)
        right.append((fit(x[test]) == labels[test]).double())
    return torch.cat(right).mean()


def _probe(x: Tensor, labels: Tensor, modulus: int) -> Any:
    """A ridge fit of one-hot remainders; returns the function from rows to the remainder with the highest output."""
    centre = x.mean(0)
    rows = x - centre  # [word, d_model]
    target = torch.nn.functional.one_hot(labels, modulus).double()
    shift = target.mean(0)
    kernel = rows @ rows.T
    weight = torch.linalg.solve(kernel + RIDGE * kernel.diagonal().mean() * torch.eye(len(x)).double(), target - shift)
    return lambda new: (((new - centre) @ rows.T) @ weight + shift).argmax(1)


def _transfer(
    x: Tensor, used: list[OrdinalClass], kept: Tensor, remainder: Tensor, modulus: int, draws: int, seed: int
) -> list[dict[str, Any]]:
    """The probe of all numbers on every other class, each word's label the remainder of its number."""
    n, out = len(used[0].ids), []
    fit = _probe(x[:n].cpu()[kept], remainder[kept], modulus)
    start = n
    for one in used[1:]:
        words = x[start : start + len(one.ids)].cpu()
        start += len(one.ids)
        labels, said = torch.tensor(one.numbers) % modulus, fit(words)
        found = float((said == labels).double().mean())
        generator = torch.Generator().manual_seed(seed)
        null = [
            float((said == labels[torch.randperm(len(labels), generator=generator)]).double().mean())
            for _ in range(draws)
        ]
        p = (1 + sum(value >= found - 1e-9 for value in null)) / (1 + draws)
        row = {"class": one.name, "words": len(one.ids), "accuracy": found, "null_mean": sum(null) / draws, "p": p}
        out.append(row)
    return out


# --- the edit -------------------------------------------------------------------------------------------------


def _features(x: Tensor, decade: Tensor, remainder: Tensor, some: Tensor, modulus: int) -> Tensor:
    """feature[r] [remainder, d_model] of the numbers marked in `some`, whose rounds are full."""
    x, out = x.cpu(), torch.zeros(modulus, x.shape[1], dtype=torch.float64)
    rounds = decade[some].unique().tolist()
    for d in rounds:
        mine = some & (decade == d)
        out[remainder[mine]] += (x[mine] - x[mine].mean(0)) / len(rounds)
    return out


def _read_by(
    model: Model,
    head: Part | None,
    made: dict[str, Tensor],
    used: list[OrdinalClass],
    half: Tensor,
    kept: Tensor,
    batch_size: int,
) -> tuple[int, int, dict[str, dict[int, Tensor]]]:
    """The head that reads the edit, and every head's answers to the plain numbers, by embedding and layer."""
    numbers, n = used[0], len(used[0].ids)
    layers = [i for i in range(model.n_layers) if "attn.head_out" in model.signals(i)]
    said: dict[str, dict[int, Tensor]] = {}
    for way in {"raw", "sum"} & set(made):
        outs = say(model, dict.fromkeys(layers, made[way][:n]), batch_size)
        said[way] = {i: answers(model, outs[i], [numbers]) for i in layers}  # [number, head]
    if head is not None:
        if head.kind != "head":
            raise PatchbayError(f"{head}: the edit is read by a head, such as L1.H2")
        model.require(head.port())
        return head.layer or 0, head.index or 0, said
    after = torch.tensor(numbers.after)
    counts = (after >= 0) & kept & half
    best = (-1.0, 0, 0)
    for i in layers:
        share = (
            (said["raw" if i == 0 or "sum" not in made else "sum"][i][counts] == after[counts, None]).double().mean(0)
        )
        for h, value in enumerate(share.tolist()):
            best = max(best, (value, i, h))
    return best[1], best[2], said


def _edit(
    model: Model,
    x: Tensor,
    numbers: OrdinalClass,
    where: tuple[int, int],
    rounds: tuple[Tensor, Tensor, Tensor, Tensor],
    modulus: int,
    seed: int,
) -> dict[str, Tensor]:
    """Features of the first half put into the numbers of the second: how often the head's answer follows."""
    decade, remainder, kept, half = rounds
    layer, index = where
    feature = _features(x, decade, remainder, kept & half, modulus)
    tested = (kept & ~half).nonzero()[:, 0].tolist()
    random = torch.randn(feature.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    random = random * feature.norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True)
    pairs = [(i, j) for i in tested for j in range(modulus) if j != int(remainder[i])]
    start, to = (torch.tensor(column) for column in zip(*pairs, strict=True))
    place = {(int(d), int(r)): at for at, (d, r) in enumerate(zip(decade, remainder, strict=True))}
    wanted = torch.tensor([place.get((int(decade[i]), j + 1), -1) if j + 1 < modulus else -1 for i, j in pairs])
    out = {}
    for name, used in (("follow", feature), ("follow_random", random)):
        moved = x.cpu()[start] - used[remainder[start]] + used[to]
        said = say(model, {layer: moved.to(model.dtype).to(model.device)}, 1024)[layer][:, index : index + 1]
        rows = model.unembed.weight[torch.tensor(numbers.ids)].detach().double().cpu()
        answer = (said[:, 0] @ rows.T).argmax(-1)
        out[name] = (remainder[answer] == (to + 1) % modulus).double().mean()
        if name == "follow":
            by_number = (remainder[answer] == (to + 1) % modulus).double().reshape(len(tested), modulus - 1).mean(1)
            _, out["follow_low"], out["follow_high"] = map(torch.tensor, maths.bootstrap_interval(by_number))
            out["follow_exact"] = (answer == wanted)[wanted >= 0].double().mean()
    return out
