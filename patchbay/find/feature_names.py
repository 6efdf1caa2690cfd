"""Feature names: in words, when features and neurons fire, held to texts that did not name them.

Three readings of each part, all from the model and the texts alone:

- `contexts`: the tokens at which it is highest and a fair sample of the others, with the value at every token shown;
- `promotes`: the tokens that it says to the logits, its row d_i through the final norm's gain and the centred unembedding columns;
- `predicate`: the shortest of the best sentences about a token (in a set, after one, came before, a class of words, a place, a pattern, two joined),
  chosen on half of the texts; `f1` is how well it says on the other half where the part fires, `base` the F1 of "always", and `null` that of
  predicates chosen in the same way for the same firing moved along the texts (`draws` times); `p` = (1 + moved ones as good) / (1 + draws).

A feature fires where its activation is not 0, a neuron where it is above half of the highest on the half that chooses. One pass over the texts.

The task is that of Schwettmann et al. 2023, "A Function Interpretation Benchmark for Evaluating Interpretability Methods" (interpreters describe
black boxes); predicates in place of a language model's words, since a predicate can be counted. `endpoint` asks a language model behind an
OpenAI-compatible address for a sentence as well, which is told and scored by nothing. A name says when a part fires on such texts; what it does is for
`prove.ablation` to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.features.contexts import Seen
from patchbay.features.reading import check_parts, logit_effect, nearest, written
from patchbay.find._asked_names import ask, check_endpoint
from patchbay.find._predicates import Tokens, best, f1
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.tasks.task import Task

WHAT = "feature_names"
SHOWN, NEAR, QUANTILES, EACH, SAMPLED = 10, 5, 4, 3, 200
ROOM = 2**28  # numbers: tokens times parts
SHARE = 0.5  # of a neuron's highest, above which it fires


@method(paper="schwettmann2023", unit="F1")
def feature_names(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    features: list[Part] | Part,
    *,
    contexts: int = 10,
    draws: int = 5,
    endpoint: str = "",
    unsafe_endpoint: bool = False,
    batch_size: int = 16,
    seed: int = 0,
) -> Result:
    """A predicate for each part with its F1 on texts that did not choose it; main variable `f1` [part].

    `prompts`: the texts, one half to choose by, the other to score. `features`: features or neurons, such as "L1.mlp.F3,L2.N77". `contexts`: how
    many of the highest are told. `draws`: how often the firing is moved along the texts, as the null. `endpoint`: an OpenAI-compatible address,
    such as http://127.0.0.1:8000/v1, that is asked for a sentence of each part; "" asks none. `unsafe_endpoint`: the address may be another machine's,
    which is sent contexts of the texts.
    """
    parts = list(dict.fromkeys([features] if isinstance(features, Part) else features))
    if not parts or contexts < 1 or draws < 1:
        raise PatchbayError(f"{WHAT}: {len(parts)} parts, contexts={contexts}, draws={draws}: one or more of each")
    check_parts(model, parts, WHAT)
    check_endpoint(endpoint, unsafe_endpoint)
    texts = [list(ids) for ids in model.encode(prompts)]
    if len(texts) < 2:
        raise PatchbayError(f"{WHAT}: one half of the texts chooses and the other scores, and {len(texts)} was given")
    if sum(map(len, texts)) * len(parts) > ROOM:
        raise PatchbayError(
            f"{WHAT}: {sum(map(len, texts)):,} tokens times {len(parts)} parts are too many at once (at most {ROOM:,}): give fewer of either"
        )
    seen, values = _read(model, texts, parts, contexts, batch_size, seed)
    tokens = Tokens(texts, _spelled(model))
    chooses = _half(texts, seed)
    named = [_named(tokens, values[:, i], part, chooses, draws, seed) for i, part in enumerate(parts)]
    return _result(model, parts, named, seen, ask(endpoint, model, parts, seen) if endpoint else [], draws)


def _read(
    model: Model, texts: list[list[int]], parts: Sequence[Part], n: int, size: int, seed: int
) -> tuple[Seen, Tensor]:
    """Contexts of all parts, and their values at every token, [token, part]."""
    ports = list(dict.fromkeys(Port(part.port().signal, part.layer) for part in parts))
    seen, values = Seen(len(parts), n, SAMPLED, seed), []
    for start in range(0, len(texts), size):
        some = texts[start : start + size]
        trace = run(model, some, taps=ports, logits="last")
        numbers = (
            torch.stack([trace[Port(part.port().signal, part.layer)][..., part.index] for part in parts], -1)
            .float()
            .cpu()
        )
        seen.add(some, numbers, [(start + i, 0) for i in range(len(some))])
        values.append(numbers[~numbers[..., 0].isnan()])
    return seen, torch.cat(values)


def _spelled(model: Model) -> Any:
    return None if model.tokenizer is None else lambda token: model.decode([token])


def _half(texts: Sequence[Sequence[int]], seed: int) -> Tensor:
    """Which tokens are of the texts that choose: a random half of the texts."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    mine = set(order[: len(texts) // 2].tolist())
    return torch.tensor([i in mine for i, ids in enumerate(texts) for _ in ids])


def _named(tokens: Tokens, values: Tensor, part: Part, chooses: Tensor, draws: int, seed: int) -> dict[str, Any]:
    """The predicate of one part, and how it does on the other half beside what chance gives."""
    fires = values > SHARE * values[chooses].max().clamp_min(0.0) if part.kind == "neuron" else values != 0
    row: dict[str, Any] = {"part": str(part), "fires": float(fires.double().mean())}
    if not bool(fires[chooses].any()):
        return row | {
            "predicate": "",
            "length": 0,
            "chosen_f1": 0.0,
            "f1": float("nan"),
            "base": float("nan"),
            "null": [float("nan")] * draws,
        }
    found = best(tokens, fires, chooses)
    other = ~chooses
    generator, null = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        moved = _moved(fires, chooses, generator)
        null.append(f1(best(tokens, moved, chooses).mask[other], moved[other]))
    always = torch.ones_like(fires)
    return row | {
        "predicate": found.text,
        "length": found.length,
        "chosen_f1": f1(found.mask[chooses], fires[chooses]),
        "f1": f1(found.mask[other], fires[other]),
        "base": f1(always[other], fires[other]),
        "null": null,
    }


def _moved(fires: Tensor, chooses: Tensor, generator: torch.Generator) -> Tensor:
    """The firing moved along the tokens of each half by a random distance: as often and as near to itself, at other tokens."""
    moved = fires.clone()
    for half in (chooses, ~chooses):
        n = int(half.sum())
        by = int(torch.randint(1, max(n, 2), (), generator=generator))
        moved[half] = fires[half].roll(by)
    return moved


# --- what is told -----------------------------------------------------------------------------------


def _result(
    model: Model, parts: list[Part], named: list[dict[str, Any]], seen: Seen, asked: list[dict[str, Any]], draws: int
) -> Result:
    null = torch.tensor([row["null"] for row in named], dtype=torch.float64).T  # [draw, part]
    columns = {
        name: torch.tensor([float(row[name]) for row in named], dtype=torch.float64)
        for name in ("f1", "base", "chosen_f1", "length", "fires")
    }
    p = torch.tensor(
        [
            maths.draws_p(float(own), drawn) if own == own else float("nan")
            for own, drawn in zip(columns["f1"], null.T, strict=True)
        ]
    )
    density = torch.tensor([seen.density(i) for i in range(len(parts))], dtype=torch.float64)
    effects = [_effect(model, part) for part in parts]
    clear = [row for row in named if row["f1"] == row["f1"]]
    notes = [
        f"{row['part']}: {row['predicate']} (F1 {row['f1']:.2f}; always {row['base']:.2f}, moved {sum(row['null']) / draws:.2f})"
        for row in clear[:5]
    ]
    silent = [row["part"] for row in named if row["f1"] != row["f1"]]
    notes += [f"{', '.join(silent[:5])} fire nowhere in the half that chooses: no predicate"] if silent else []
    variables: dict[str, Any] = {
        "f1": (columns["f1"], ("part",), "F1"),
        "base": (columns["base"], ("part",), "F1"),
        "null_mean": (null.mean(0), ("part",), "F1"),
        "chosen_f1": (columns["chosen_f1"], ("part",), "F1"),
        "p": (p, ("part",), "probability"),
        "length": (columns["length"], ("part",), "words"),
        "fires": (columns["fires"], ("part",), "share of tokens"),
        "density": (density, ("part",), "share of tokens"),
        "null": (null, ("draw", "part"), "F1"),
    }
    tables: dict[str, list[dict[str, Any]]] = {
        "names": [{"part": str(part), "tokens": effect["most"]} for part, effect in zip(parts, effects, strict=True)],
        "predicates": [{key: row[key] for key in ("part", "predicate", "length", "f1", "base")} for row in named],
        "promotes": effects,
        "contexts": [row for i, part in enumerate(parts) for row in _contexts(model, seen, i, part)],
        "histograms": [{"part": str(part), **seen.histogram(i)} for i, part in enumerate(parts)],
    }
    if asked:
        tables["asked"] = asked
    return Result(variables, parts=parts, tables=tables, notes=notes)


def _effect(model: Model, part: Part) -> dict[str, Any]:
    """What a part says to the logits, and who writes nearly the same."""
    layer, index = part.layer or 0, part.index or 0
    rows = written(model, layer, part.kind)
    effect = logit_effect(model, rows[index : index + 1])[0].double().cpu()
    most, least = (effect.topk(min(SHOWN, len(effect)), largest=largest) for largest in (True, False))
    counts = torch.histc(effect, 50)
    low, high = float(effect.min()), float(effect.max())
    return {
        "part": str(part),
        "most": [_text(model, token) for token in most.indices.tolist()],
        "most_values": most.values.tolist(),
        "least": [_text(model, token) for token in least.indices.tolist()],
        "least_values": least.values.tolist(),
        "low": [low + (high - low) * i / len(counts) for i in range(len(counts))],
        "count": counts.long().tolist(),
        "near": [
            {"part": str(Part(layer, part.kind, i)), "cosine": cosine} for i, cosine in nearest(rows, index, NEAR)
        ],
    }


def _contexts(model: Model, seen: Seen, column: int, part: Part) -> list[dict[str, Any]]:
    """Rows of contexts: the highest, then those of each quantile."""
    highest = seen.kept[column].highest
    groups = (
        [{"high": highest[0]["value"], "low": highest[-1]["value"], "share": None, "contexts": highest}]
        if highest
        else []
    )
    groups += seen.quantiles(column, QUANTILES, EACH)
    return [
        {
            "part": str(part), "kind": "highest" if group["share"] is None else "quantile", "low": group["low"], "high": group["high"], "share": group["share"],
            "value": held["value"], "text": held["text"], "position": held["position"], "at": held["at"],
            "tokens": [_text(model, token) for token in held["span"]], "values": held["values"],
        }
        for group in groups
        for held in group["contexts"]
    ]  # fmt: skip


def _text(model: Model, token: int) -> str:
    return model.decode([token]) if model.tokenizer is not None else str(token)
