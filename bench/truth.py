"""`python -m bench.truth`: what finders and provers say of compiled programs, against the graph that was compiled; docs/truth.md.

For every program, plain and superposed, and every seed: heads (or edges) are ranked by each method, and compared with those that
compute something that differs between twins. `AP` is the average precision of the ranking: 1 where all true ones come
first. `precision` and `recall` are of what the method itself calls significant (adjusted p below .05, or its own choice).
Intervals are 95 % percentile bootstraps over models (seeds, plain and superposed).
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel

import patchbay as pb
from patchbay.tiny import compiled, toys
from patchbay.tiny.compiler import Compiled

PAGE = Path(__file__).parents[1] / "docs" / "truth.md"
CLEAR = 0.05
HEAD = """# What the finders and provers say where the truth is known

Written by `python -m bench.truth`. Twelve programs are compiled into GPT-2 weights (`patchbay/tiny/compiled.py`), six heads in
each of three layers, of which one to three compute something and the others are random; so are the neurons that are left over.
`AP` is the average precision of a method's ranking against the true parts: 1 where these come first. `precision` and `recall`
are of those that the method calls significant at .05 after its own adjustment, or of those it chose. In brackets 95 % intervals
over models (seeds, plain and superposed codes). True of a method that measures effects between twins is what computes
something that differs between them; what only positions decide is the same in both twins and rightly not seen.

Distractors write as much as codes do where nobody reads, and a twentieth of that everywhere, so that most have an effect that is
tiny and real: `precision` below 1 of exact methods is that, not error. What the table says of the methods: exact
effects (ablation, patching) rank every head that computes first; first-order ones do so for circuits that copy, and are blind to
counts, which are read off by neurons that are flat at both twins; the direct effect sees the last writer alone; the size of
what a head writes says nothing; a learned mask of heads chooses distractors where several heads work in a row.
"""


@dataclass(frozen=True)
class Said:
    """Labels in a method's order, best first, and those that it calls significant (None where it does not say)."""

    ranked: list[str]
    chosen: set[str] | None = None


@dataclass(frozen=True)
class Score:
    precise: float
    precision: float
    recall: float


def heads_of(result: pb.Result, value: str | None = None, p: str | None = "p_adjusted") -> Said:
    """A Result over [layer, head], by the size of its values."""
    values = (result.values if value is None else result[value]).double()
    labels = [f"L{i}.H{j}" for i in range(values.shape[0]) for j in range(values.shape[1])]
    order = values.abs().flatten().nan_to_num(0).argsort(descending=True, stable=True).tolist()
    chosen = None if p is None else {labels[i] for i in (result[p].flatten() < CLEAR).nonzero()[:, 0].tolist()}
    return Said([labels[i] for i in order], chosen)


def by_ablation(model: pb.Model, task: pb.Task, by: Any) -> Said:
    """Every head taken away alone; significant where the 95 % interval of what it costs lies above 0."""
    heads = [str(head.part) for layer in model.layers for head in layer.heads]
    costs = [pb.prove.ablation(model, task, [head], by=by, draws=1) for head in heads]
    order = sorted(range(len(heads)), key=lambda i: -float(costs[i].values))
    return Said([heads[i] for i in order], {heads[i] for i in order if float(costs[i]["low"]) > 0})


def by_mask(model: pb.Model, task: pb.Task) -> Said:
    found = pb.prove.desiderata_mask(model, task, draws=5)
    ranked = heads_of(found, p=None).ranked
    chosen = {label for label in ranked if bool(found["chosen"][int(label[1])][int(label.split("H")[1])])}
    return Said(ranked, chosen)


HEAD_METHODS: dict[str, Callable[[pb.Model, pb.Task], Said]] = {
    "find.direct_logit_attribution": lambda m, t: heads_of(pb.find.direct_logit_attribution(m, t), p=None),
    "find.head_importance": lambda m, t: heads_of(pb.find.head_importance(m, t, exact=0), p=None),
    "prove.ablation by=zero": lambda m, t: by_ablation(m, t, "zero"),
    "prove.ablation by=mean": lambda m, t: by_ablation(m, t, "mean"),
    "prove.activation_patching denoising": lambda m, t: heads_of(pb.prove.activation_patching(m, t, site="head")),
    "prove.activation_patching noising": lambda m, t: heads_of(
        pb.prove.activation_patching(m, t, site="head", way="noising")
    ),
    "prove.attribution_patching": lambda m, t: heads_of(pb.prove.attribution_patching(m, t)),
    "prove.attribution_patching steps=8": lambda m, t: heads_of(pb.prove.attribution_patching(m, t, steps=8)),
    "prove.path_patching to the logits": lambda m, t: heads_of(pb.prove.path_patching(m, t)),
    "prove.desiderata_mask": by_mask,
}


def by_edges(model: pb.Model, task: pb.Task, steps: int) -> Said:
    found = pb.prove.edge_attribution(model, task, steps=steps)
    labels = list(found.coords["edit"])
    order = found.values.double().abs().argsort(descending=True, stable=True).tolist()
    return Said([labels[i] for i in order], {labels[i] for i in (found["p_adjusted"] < CLEAR).nonzero()[:, 0].tolist()})


def by_circuit(model: pb.Model, task: pb.Task) -> Said:
    found = pb.prove.circuit(model, task, draws=1)
    ranked = [str(row["unit"]) for row in found.tables["circuit"]]
    smallest = float(found["smallest"])
    return Said(ranked, set(ranked[: int(smallest)]) if smallest == smallest else set())


EDGE_METHODS: dict[str, Callable[[pb.Model, pb.Task], Said]] = {
    "prove.edge_attribution (EAP)": lambda m, t: by_edges(m, t, 1),
    "prove.edge_attribution steps=8 (EAP-IG)": lambda m, t: by_edges(m, t, 8),
    "prove.circuit, its smallest": by_circuit,
}


def true_heads(made: Compiled) -> set[str]:
    """Heads that pass on something that differs between twins."""
    return {edge.writer for edge in made.edges if edge.varies and ".H" in edge.writer}


def true_edges(made: Compiled) -> set[str]:
    return {f"{edge.writer} -> {edge.reader}" for edge in made.edges if edge.varies}


def score(said: Said, truth: set[str]) -> Score:
    """Average precision of the ranking; precision and recall of what was chosen (NaN where nothing was)."""
    hits, total = 0, 0.0
    for place, label in enumerate(said.ranked, 1):
        if label in truth:
            hits += 1
            total += hits / place
    nan = float("nan")
    if not truth:
        return Score(nan, nan, nan)
    if said.chosen is None:
        return Score(total / len(truth), nan, nan)
    right = len(said.chosen & truth)
    return Score(total / len(truth), right / len(said.chosen) if said.chosen else nan, right / len(truth))


def measured(name: str, seeds: Iterable[int], n: int, methods: dict[str, Any], truth: Any) -> dict[str, list[Score]]:
    """Scores of every method on the models of one program."""
    found: dict[str, list[Score]] = defaultdict(list)
    for seed in seeds:
        for superposed in (1.0, 0.9):
            made = compiled.make(name, superposed=superposed, seed=seed)
            real = truth(made)
            if not real:
                continue
            model, task = pb.load(made.model), compiled.task(name, made, n, seed=seed)
            for method, say in methods.items():
                found[method].append(score(say(model, task), real))
    return found


def interval(values: list[float], draws: int = 2000) -> str:
    """Mean with its 95 % interval over models."""
    kept = torch.tensor([value for value in values if value == value], dtype=torch.float64)
    if not len(kept):
        return ""
    picks = torch.randint(len(kept), (draws, len(kept)), generator=torch.Generator().manual_seed(0))
    low, high = kept[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean = f"{float(kept.mean()):.2f}"
    return mean if low == high else f"{mean} ({low:.2f}-{high:.2f})"


def table(found: dict[str, dict[str, list[Score]]], names: list[str]) -> list[str]:
    """One row a method: over all programs, and the average precision on each."""
    lines = [
        "| method | AP | precision | recall | " + " | ".join(names) + " |",
        "|" + "---|" * (4 + len(names)),
    ]
    for method in found[names[0]]:
        every = [one for name in names for one in found[name][method]]
        cells = [interval([getattr(one, what) for one in every]) for what in ("precise", "precision", "recall")]
        cells += [interval([one.precise for one in found[name][method]]).split(" ")[0] for name in names]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


TRAINED = "## A trained toy"
TOLD = f"""{TRAINED}

`toys.train("induction")`: two layers of four heads that learned random words that come again. True heads are those that spend most of
their attention where the algorithm needs some head to look, read from patterns on other prompts (`toys.heads`); `true` counts them, seed by seed.
These finders give a ranking and choose none, so that it has an average precision only.
{{n}} seeds, of which the model says {{accuracy}} of the words that come again.

| finder | true | AP |
|---|---|---|
"""
FINDERS = {"previous token": "previous_token_heads", "induction": "induction_heads"}


def by_toy(model: GPT2LMHeadModel, n: int) -> dict[str, tuple[int, Score]]:
    """What each finder of heads says of the trained toy, beside how many true heads there are."""
    prompts = toys.TOYS["induction"].draw(n, torch.Generator().manual_seed(1)).ids.tolist()
    loaded, truth = pb.load(model), toys.heads("induction", model)
    found = {role: heads_of(getattr(pb.find, finder)(loaded, prompts), p=None) for role, finder in FINDERS.items()}
    return {FINDERS[role]: (len(truth[role]), score(said, set(truth[role]))) for role, said in found.items()}


def trained(seeds: int, n: int) -> str:
    """The section on the trained toy."""
    found: dict[str, list[tuple[int, Score]]] = defaultdict(list)
    accuracies = []
    for seed in range(seeds):
        model, accuracy = toys.train("induction", seed=seed)
        accuracies.append(accuracy)
        for finder, one in by_toy(model, n).items():
            print(TRAINED, seed, finder, accuracy, one, flush=True)
            found[finder].append(one)
    lines = []
    for finder, rows in found.items():
        cell = interval([one.precise for many, one in rows if many])
        lines.append(f"| find.{finder} | {', '.join(str(many) for many, _ in rows)} | {cell} |\n")
    said = f"{min(accuracies):.1%} to {max(accuracies):.1%}"
    return TOLD.format(n=seeds, accuracy=said) + "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.truth", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n", type=int, default=48, help="prompts of each task")
    parser.add_argument(
        "--trained", action="store_true", help="only the section on the trained toy, the rest as it stands"
    )
    given = parser.parse_args()
    if given.trained:
        rest = PAGE.read_text(encoding="utf-8").split(TRAINED)[0].rstrip("\n")
        PAGE.write_text(f"{rest}\n\n{trained(given.seeds, given.n)}", encoding="utf-8")
        return
    lines = [
        HEAD,
        f"{given.seeds} seeds, {given.n} prompts, plain codes and codes in nine tenths of the dimensions.",
        "",
    ]
    for title, methods, truth in (("Heads", HEAD_METHODS, true_heads), ("Edges", EDGE_METHODS, true_edges)):
        found: dict[str, dict[str, list[Score]]] = {}
        for name in compiled.PROGRAMS:
            scores = measured(name, range(given.seeds), given.n, methods, truth)
            if scores:
                found[name] = scores
            print(title, name, {m: round(sum(s.precise for s in v) / len(v), 2) for m, v in scores.items()}, flush=True)
        lines += [f"## {title}", "", *table(found, list(found)), ""]
    lines.append(trained(given.seeds, given.n))
    PAGE.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
