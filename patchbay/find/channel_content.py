"""Channel content: what a component of a part carries, in tokens, along prompts and in named variables.

With W = sum_i s_i u_i v_i^T the part's map, component i has a coordinate at every position, c = (what the part writes) . v_i.
Read here are: the tokens that v_i raises and lowers (through the final norm's gain and the unembedding) and the token embeddings
that u_i takes up most, both from weights; the coordinate along each prompt and the tokens where it is strongest, from one run;
and how much of the coordinate's variance a named variable explains in prompts that were not used to fit it,

    R^2 = 1 - sum (c - fit(variable))^2 / sum (c - mean)^2,     fit on every other prompt, scored on the rest,

for position (a line), duplicate (the token stood before), identity (a mean for each token), before (the token before) and the
task's own labels at the last position. The null shuffles the variable within each prompt (labels: over prompts), `draws` times;
p = (1 + hits) / (1 + draws), Benjamini-Hochberg over the variables. `raises_p` compares the largest |logit| per unit of the
coordinate with that of random directions. First tokens attend to themselves alone and are left out (`first`).

Merullo, Eickhoff and Pavlick 2024, "Talking Heads". A variable that explains a coordinate need not be why it is there: variables
go together in text. That a later part uses it is for `prove.channel` to say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.model.weights import folded
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.channel import Channel, parse_channel
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task
from patchbay.wiring.components import Components, check_channel, components, token_embedding

N_SHOWN = 10  # tokens and places in each table


@method(paper="merullo2024")
def channel_content(
    model: Model,
    prompts: Any,
    channel: Channel | str,
    *,
    first: int = 1,
    draws: int = 200,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """What a component carries on these prompts: its coordinate, its tokens, and the variables that explain it.

    `channel`: L0.H1.C3, or a whole channel of which the writer's component is meant. `first`: position from which the read-out
    counts. Returns `coordinate` [prompt, position]; `explained`, `null_mean`, `null_high`, `p` [statistic], one per variable;
    tables `raises`, `lowers` (tokens), `reads` (embeddings), `strongest` (places in the prompts).

    `draws`: shuffles of each variable that make the null.
    """
    channel = check_channel(parse_channel(channel), model)
    if draws < 1:
        raise PatchbayError(f"draws={draws}: at least 1 shuffle is needed for a null")
    found, i = _component(model, channel)
    ids = model.encode(prompts)
    if len(ids) < 2:
        raise PatchbayError(
            "one prompt was given: the read-out is fitted on some prompts and scored on others, at least 2"
        )
    if first < 0:
        raise PatchbayError(f"first={first}: positions count from 0")
    values = _coordinates(model, prompts, channel, found, i, batch_size)  # [prompt, position], NaN where padded
    labels = dict(prompts.labels) if isinstance(prompts, Task) else {}
    generator = torch.Generator().manual_seed(seed)
    rows = {
        name: variable.explained(generator, draws) for name, variable in _variables(values, ids, labels, first).items()
    }
    statistics = torch.tensor([rows[name] for name in rows], dtype=torch.float64)  # [variable, 4]
    adjusted = maths.benjamini_hochberg(statistics[:, 3])
    best = int(statistics[:, 0].nan_to_num(-torch.inf).argmax())
    said = f"of {channel.source}, {list(rows)[best]} explains most: {float(statistics[best, 0]):.2f} of the variance, held out"
    said += f" (shuffled labels {float(statistics[best, 1]):.2f}, p = {float(adjusted[best]):.2g})"
    raises, raises_p = _raised(model, found.v[i], generator, draws)
    tables = {**_token_tables(model, raises, found, i), "strongest": _strongest(model, values, ids)}
    return Result(
        {
            "coordinate": (values, ("prompt", "position"), "size in the stream"),
            "explained": (statistics[:, 0], ("statistic",), "share of variance, held out"),
            "null_mean": (statistics[:, 1], ("statistic",), "share of variance, held out"),
            "null_high": (statistics[:, 2], ("statistic",), "share of variance, held out"),
            "p": (adjusted, ("statistic",), "adjusted p"),
            "raises_p": (torch.tensor(raises_p, dtype=torch.float64), (), "p"),
        },
        coords={"statistic": list(rows)},
        tables=tables,
        notes=[said, *([found.note] if found.note else [])],
        highlights=[channel.writer],
    )


def _component(model: Model, channel: Channel) -> tuple[Components, int]:
    """The writer's components and the number of the one that is meant."""
    if channel.writer.kind not in ("head", "mlp", "neuron"):
        raise PatchbayError(
            f"{channel.source}: components with a coordinate along a prompt are those of heads, MLPs and neurons"
        )
    if isinstance(channel.component, str) or (channel.component is None and channel.writer.kind != "neuron"):
        raise PatchbayError(f"{channel.source}: name one component, such as {channel.writer}.C0")
    return components(model, channel.writer), int(channel.component or 0)


def _coordinates(model: Model, prompts: Any, channel: Channel, found: Components, i: int, batch_size: int) -> Tensor:
    """c [prompt, position] from the port of the writer: z . read_z or act . read_z."""
    part = channel.writer
    port = model.port(
        f"{part}.z" if part.kind == "head" else f"L{part.layer}.mlp.act" if part.index is None else f"{part}.act"
    )
    value = run(model, prompts, taps=[port], logits="last", batch_size=batch_size)[port].double().cpu()
    read = found.read_z[i].double().cpu()
    return value * read[0] if part.kind == "neuron" else value @ read


# --- tokens -------------------------------------------------------------------------------------------


def _raised(model: Model, v: Tensor, generator: torch.Generator, draws: int) -> tuple[Tensor, float]:
    """Logit of every token per unit of the coordinate [vocab], and p of the largest against random directions."""
    rows = model.unembed.weight.detach().float()
    if rows.shape[1] != len(v):
        return torch.full((len(rows),), torch.nan), float("nan")
    weight = folded(model.final_norm_module, (rows - rows.mean(0)).T, None)[0].detach()  # [d_model, vocab]
    raised = v.float() @ weight
    random = torch.randn(draws, len(v), generator=generator).to(weight)
    null = (random / random.norm(dim=1, keepdim=True) @ weight).abs().amax(1)
    return raised.cpu(), (1 + int((null >= raised.abs().max()).sum())) / (1 + draws)


def _token_tables(model: Model, raised: Tensor, found: Components, i: int) -> dict[str, list[dict[str, Any]]]:
    tables = {}
    if not raised.isnan().any():
        for name, sign in (("raises", 1), ("lowers", -1)):
            tables[name] = [
                _token(model, t, float(raised[t])) for t in (sign * raised).topk(min(N_SHOWN, len(raised))).indices
            ]
    embedding = token_embedding(model)
    if found.part.kind == "head" and embedding is not None:
        sizes = (embedding.pow(2).mean(1) + 1e-12).sqrt()  # a norm divides by this
        taken = (embedding @ found.u[i].to(embedding)) / sizes
        best = taken.abs().topk(min(N_SHOWN, len(taken))).indices
        tables["reads"] = [_token(model, t, float(taken[t])) for t in best]
    return tables


def _token(model: Model, token: Tensor, value: float) -> dict[str, Any]:
    return {"token": _text(model, int(token)), "id": int(token), "value": value}


def _text(model: Model, token: int) -> str:
    return model.decode([token]) if model.tokenizer is not None else str(token)


def _strongest(model: Model, values: Tensor, ids: list[list[int]]) -> list[dict[str, Any]]:
    flat = values.abs().nan_to_num(-1.0).flatten()
    out = []
    for place in flat.topk(min(N_SHOWN, int((flat >= 0).sum()))).indices.tolist():
        prompt, position = divmod(place, values.shape[1])
        around = [_text(model, token) for token in ids[prompt][max(0, position - 4) : position + 1]]
        out.append(
            {"prompt": prompt, "position": position, "text": "".join(around) if model.tokenizer else " ".join(around)}
        )
        out[-1]["value"] = float(values[prompt, position])
    return out


# --- variables ----------------------------------------------------------------------------------------


class Variable:
    """A variable at places of prompts: classes (or numbers, for a line), the coordinate there, the prompt of each place."""

    def __init__(self, c: Tensor, x: Tensor, prompt: Tensor, *, line: bool = False, within: bool = True) -> None:
        self.c, self.x, self.prompt, self.line, self.within = c, x, prompt, line, within

    def explained(self, generator: torch.Generator, draws: int) -> tuple[float, float, float, float]:
        """Held-out R^2, mean and 95 % point of its null, and p."""
        train = self.prompt % 2 == 0
        if int(train.sum()) < 3 or int((~train).sum()) < 3:
            return (float("nan"),) * 4
        real = self._score(self.x, train)
        null = torch.tensor([self._score(self._shuffled(generator), train) for _ in range(draws)], dtype=torch.float64)
        p = (1 + int((null >= real).sum())) / (1 + draws)
        return real, float(null.mean()), float(null.quantile(0.95)), p

    def _score(self, x: Tensor, train: Tensor) -> float:
        c = self.c
        mean = c[train].mean()
        if self.line:
            middle = x[train].mean()
            slope = ((x[train] - middle) * (c[train] - mean)).sum() / (x[train] - middle).square().sum().clamp_min(
                1e-12
            )
            guess = mean + slope * (x[~train] - middle)
        else:
            n = int(x.max()) + 1
            total = torch.zeros(n, dtype=c.dtype).index_add_(0, x[train], c[train] - mean)
            count = torch.bincount(x[train], minlength=n)
            guess = mean + (total / (count + 1))[x[~train]]  # drawn to the mean as by one observation of it
        rest = (c[~train] - mean).square().sum()
        return float(1 - (c[~train] - guess).square().sum() / rest) if rest > 0 else float("nan")

    def _shuffled(self, generator: torch.Generator) -> Tensor:
        order = torch.rand(len(self.x), generator=generator, dtype=torch.float64)
        if not self.within:
            return self.x[order.argsort()]
        inside = (self.prompt.double() * 2 + order).argsort()  # a random order in every prompt, prompts in order
        return self.x[inside]


def _variables(values: Tensor, ids: list[list[int]], labels: dict[str, Any], first: int) -> dict[str, Variable]:
    places = [(p, i) for p, row in enumerate(ids) for i in range(first, len(row))]
    if not places:
        raise PatchbayError(f"first={first}: no prompt has a token there; the longest has {max(map(len, ids))}")
    prompt, position = torch.tensor(places).T
    c = values[prompt, position]
    tokens = torch.tensor([ids[p][i] for p, i in places])
    before = torch.tensor([ids[p][i - 1] if i else -1 for p, i in places])
    again = torch.tensor([ids[p][i] in ids[p][:i] for p, i in places]).long()
    classes = {"duplicate": again, "identity": tokens.unique(return_inverse=True)[1]}
    classes["before"] = before.unique(return_inverse=True)[1]
    out = {"position": Variable(c, position.double(), prompt, line=True)}
    out |= {name: Variable(c, x, prompt) for name, x in classes.items()}
    last = torch.tensor([len(row) - 1 for row in ids])
    rows = torch.arange(len(ids))
    for name, given in labels.items():
        known = {value: n for n, value in enumerate(dict.fromkeys(map(str, given)))}
        if len(given) == len(ids) and len(known) > 1:
            x = torch.tensor([known[str(value)] for value in given])
            out[str(name)] = Variable(values[rows, last], x, rows, within=False)
    return out
