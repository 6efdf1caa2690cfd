"""Survey: every finder that a model offers, in one table, with how they agree and what each role's heads do together.

A role is what one finder of heads looks for. Each runs on the task that calls for it (induction on repeated tokens, name movers
on indirect objects), those that read attention patterns in one shared run. The table holds, for every head and role, the
finder's score and its p against the finder's own null, adjusted over the heads of the role (Benjamini-Hochberg); where a finder
gives a standard error and no p, Student's test over prompts against its null. `agreement` is Spearman's correlation of two roles' scores over
heads. A score is not a cause: for each role the joint knockout curve takes away its first 1, 2, 4, 8 heads (a quarter of all at most) together, on fresh
prompts of its task, or of one task for all roles, against as many random heads.

Finders of neurons, experts, layers and channels are run too and give one line each. What cannot be run on the model says why.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbay import find, maths, prove, tasks
from patchbay.files import write_file
from patchbay.find import _attention
from patchbay.find._statistics import student_p
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.model.source import built_in_names
from patchbay.results.result import Result
from patchbay.signal.channel import parse_channel
from patchbay.signal.port import Part, PatchbayError
from patchbay.tasks.task import Task

SIZES = (1, 2, 4, 8)
DRAWS = 19
SHARED = ("previous_token_heads", "induction_heads", "duplicate_token_heads", "ngram_heads", "attention_sinks")
ROLES: dict[str, str] = {  # finder -> the task that calls for it
    "previous_token_heads": "repeated_tokens",
    "induction_heads": "repeated_tokens",
    "duplicate_token_heads": "repeated_tokens",
    "ngram_heads": "repeated_tokens",
    "attention_sinks": "repeated_tokens",
    "copy_suppression_heads": "repeated_tokens",
    "retrieval_heads": "needle_retrieval",
    "successor_heads": "successor",
    "arithmetic_heads": "arithmetic",
    "fact_heads": "facts_in_context",
    "binding_heads": "entity_binding",
    "name_mover_heads": "indirect_object",
    "inhibition_heads": "indirect_object",
    "direct_logit_attribution": "indirect_object",
}
WEIGHTS_ONLY = ("successor_heads", "neuron_vocabulary", "channels", "communities", "mod_features")
OTHERS: dict[str, str] = {  # finders of other parts
    "neuron_vocabulary": "",
    "relation_neurons": "successor",
    "concept_neurons": "indirect_object",
    "neuron_importance": "indirect_object",
    "activation_sparsity": "indirect_object",
    "expert_specialisation": "facts_in_context",
    "head_importance": "indirect_object",
    "logit_lens": "indirect_object",
    "prior_layers": "arithmetic",
    "isotropy": "indirect_object",
    "key_clusters": "indirect_object",
    "observable_propagation": "indirect_object",
    "mod_features": "",
    "channels": "",
    "communities": "",
    "channel_content": "indirect_object",
    "concept_depth": "successor",
    "latent_language": "successor",
    "word_classes": "successor",
}
LEAST = {"successor": 64}  # its prompts are split among series and folds
NEEDS = {  # finders that ask for what no built-in task holds
    "language_similarity": "needs texts in several languages: find.language_similarity(model, prompts, translations)",
    "channel_changes": "needs a second model: find.channel_changes(model, other)",
}


KNOCKOUT = (
    ("knockout", "difference", "the task's unit"),
    ("knockout_low", "difference_low", "the task's unit"),
    ("knockout_high", "difference_high", "the task's unit"),
    ("knockout_p", "p", "probability"),
)


@dataclass
class Survey:
    """One model's tasks, made once, and what was found."""

    model: Model
    n: int
    seed: int
    task: Task | None = None
    made: dict[tuple[str, int], Task] = field(default_factory=dict)
    found: dict[str, Result] = field(default_factory=dict)

    def make(self, name: str, fresh: int = 0) -> Task:
        """The task of a name; `fresh` draws other prompts."""
        key = (name, fresh)
        if key not in self.made:
            n = max(self.n, LEAST.get(name, 0))
            self.made[key] = getattr(tasks, name)(self.model, n, seed=self.seed + fresh)
        return self.made[key]

    def curve_task(self, role: str) -> Task:
        return self.task if self.task is not None else self.make(ROLES[role], fresh=1)


def find_all(
    model: Model,
    *,
    task: Task | None = None,
    n: int = 32,
    seed: int = 0,
    curves: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """Every finder on a model. `task`: what the knockout curves are measured on, for all roles; without, each role's own task.

    Main variable `evidence` [condition, part]: -log10 of the adjusted p of a head in a role, NaN where a finder has no null. Also
    `score` and `p_adjusted` [condition, part] (in the units of the table "roles"), `agreement` [condition, choice], and with
    `curves` `knockout` [condition, n_parts], what the first heads of a role cost more than random heads, with `knockout_low`,
    `knockout_high` and `knockout_p`. Tables: "roles" (the best heads of each), "knockout", "others", "not run".
    """
    if n < 1:
        raise PatchbayError(f"asked for n={n}; possible: 1 and more")
    survey = Survey(model, n, seed, task)
    steps = len(ROLES) * (2 if curves else 1) + len(OTHERS)
    done = 0

    def step(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(done, steps, what)
        done += 1

    lacking: list[dict[str, str]] = []
    found = dict(_roles(survey, lacking, step))
    if not found:
        raise PatchbayError(f"no finder of heads runs on this {model.family.name} model: {lacking[0]['why']}")
    others = list(_others(survey, lacking, step))
    lacking += [{"finder": name, "why": why} for name, why in NEEDS.items()]
    curve_results = dict(_curves(survey, found, lacking, step)) if curves else {}
    return _result(model, found, curve_results, others, lacking)


def _tried(name: str, lacking: list[dict[str, str]], call: Callable[[], Any]) -> Any:
    """What the call gives; where it is refused, None, and why is noted."""
    try:
        return call()
    except PatchbayError as error:
        lacking.append({"finder": name, "why": str(error)})
        return None


def _roles(survey: Survey, lacking: list[dict[str, str]], step: Callable[[str], None]) -> Iterator[tuple[str, Result]]:
    shared = _tried("attention finders", lacking, lambda: _shared(survey))
    for name in ROLES:
        step(name)
        if name in SHARED:
            if shared is not None:
                yield name, shared[name]
            continue
        result = _tried(name, lacking, partial(_run, survey, name, ROLES[name]))
        if result is not None:
            yield name, result


def _shared(survey: Survey) -> dict[str, Result]:
    """The finders that read patterns of repeated tokens, from one run."""
    from importlib import import_module

    task = survey.make("repeated_tokens")
    encoded = survey.model.encode(task)
    finders = [import_module(f"patchbay.find.{name}").finder(survey.model, encoded) for name in SHARED]
    found = dict(zip(SHARED, _attention.together(survey.model, encoded, finders), strict=True))
    for result in found.values():  # no method made them, but the prompts are known
        result.provenance["task"] = task.to_json()
    return found


def _run(survey: Survey, name: str, task: str) -> Result:
    function = getattr(find, name)
    if name in WEIGHTS_ONLY:
        result = function(survey.model)
    else:
        result = function(survey.model, survey.make(task), **_options(survey, name, task))
    assert isinstance(result, Result)
    return result


def _options(survey: Survey, name: str, task: str) -> dict[str, Any]:
    """What a finder asks for besides its task: the kinds of series are its relations, classes and languages."""
    if name == "channel_content":
        channels = (survey.found.get("channels") or find.channels(survey.model)).parts or []
        return {
            "channel": next((one for one in channels if parse_channel(str(one)).writer.kind == "head"), channels[0])
        }
    if name == "prior_layers":
        return {"neutral": [list(ids) for ids in survey.make(task, fresh=1).clean]}
    if task != "successor":
        return {}
    series = survey.make(task)
    kinds = [str(kind) for kind in series.labels["kind"]]
    if name == "relation_neurons":
        return {"labels": ("kind", "start")}
    if name == "concept_depth":
        return {"labels": kinds}
    answers: dict[str, list[int]] = {}
    for kind, answer in zip(kinds, series.right, strict=True):
        answers[kind] = sorted({*answers.get(kind, []), answer})
    return {"groups" if name == "latent_language" else "classes": answers}


def _others(survey: Survey, lacking: list[dict[str, str]], step: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    for name, task in OTHERS.items():
        step(name)
        result = _tried(name, lacking, partial(_run, survey, name, task))
        if result is None:
            continue
        survey.found[name] = result
        best = result.top(1) if result.ranked else []
        finite = result.values[~result.values.isnan()]
        yield {
            "finder": name,
            "task": task or "weights",
            "best": str(best[0]) if best else "",
            "highest": float(finite.max()) if len(finite) else math.nan,
            "unit": result.unit,
            "note": result.notes[0] if result.notes else "",
        }


def _curves(
    survey: Survey, found: Mapping[str, Result], lacking: list[dict[str, str]], step: Callable[[str], None]
) -> Iterator[tuple[str, Result]]:
    n_heads = sum(map(survey.model.n_heads, range(survey.model.n_layers)))
    sizes = [size for size in SIZES if size <= n_heads // 4]  # few heads leave few others to draw from
    for name, result in found.items():
        step(f"knockout of {name}")
        if not sizes:
            lacking.append(
                {"finder": f"knockout of {name}", "why": f"{n_heads} heads leave no random ones to compare with"}
            )
            continue
        heads = result.top(sizes[-1])
        knock_out = partial(_curve, survey, name, heads, sizes)
        curve = _tried(f"knockout of {name}", lacking, knock_out)
        if curve is not None:
            yield name, curve


def _curve(survey: Survey, role: str, heads: list[Part], sizes: list[int]) -> Result:
    task = survey.curve_task(role)
    return prove.knockout_curve(survey.model, task, heads, sizes=sizes, draws=DRAWS, seed=survey.seed)


# --- the result ---------------------------------------------------------------------------------------


def adjusted(result: Result) -> Tensor:
    """Adjusted p of every head [layer, head]: the finder's own, or Student's test over prompts of its score against its null; NaN without."""
    if "p_adjusted" in result and result["p_adjusted"].shape == result.values.shape:
        return result["p_adjusted"].double()
    if "standard_error" not in result:
        return torch.full_like(result.values, torch.nan, dtype=torch.float64)
    null = next((result[name].double() for name in ("null_mean", "uniform") if name in result), torch.zeros(()))
    z = (result.values.double() - null) / result["standard_error"].double()
    one_sided = "null_mean" in result or "uniform" in result
    n_prompts = len((result.provenance.get("task") or {}).get("clean", ()))
    if n_prompts < 2:  # nothing says how many were averaged: no p
        return torch.full_like(z, torch.nan)
    p = student_p(z, torch.tensor(n_prompts - 1.0))
    p = torch.where(z > 0, p / 2.0, 1.0 - p / 2.0) if one_sided else p
    flat, seen = p.flatten(), ~p.flatten().isnan()
    flat[seen] = maths.benjamini_hochberg(flat[seen])
    return flat.view(p.shape)


def _result(
    model: Model,
    found: Mapping[str, Result],
    curves: Mapping[str, Result],
    others: list[dict[str, Any]],
    lacking: list[dict[str, str]],
) -> Result:
    heads = [Part(layer, "head", head) for layer in range(model.n_layers) for head in range(model.n_heads(layer))]
    pick = (torch.tensor([h.layer for h in heads]), torch.tensor([h.index for h in heads]))
    score = torch.stack([result.values.double()[pick] for result in found.values()])  # [role, head]
    p = torch.stack([adjusted(result)[pick] for result in found.values()])
    names = list(found)
    agreement = torch.tensor([[maths.spearman(a, b) for b in score] for a in score], dtype=torch.float64)
    grid = ("condition", "part")
    variables: dict[str, Any] = {
        "evidence": (-p.clamp(min=1e-12).log10(), grid, "-log10 of adjusted p"),
        "score": (score, grid, "each role's own unit"),
        "p_adjusted": (p, grid, "probability"),
        "agreement": (agreement, ("condition", "choice"), "Spearman's correlation over heads"),
    }
    coords: dict[str, Any] = {"condition": names, "choice": names}
    if curves:
        coords["n_parts"] = next(iter(curves.values())).labels_of("n_parts")
        none = torch.full((len(coords["n_parts"]),), torch.nan)
        for new, old, unit in KNOCKOUT:
            rows = [curves[name][old] if name in curves else none for name in names]
            variables[new] = (torch.stack([row.double() for row in rows]), ("condition", "n_parts"), unit)
    return Result(
        variables,
        coords=coords,
        parts=heads,
        tables={"roles": _best(found), "knockout": _knockouts(curves), "others": others, "not run": lacking},
        notes=_notes(found, curves),
    )


def _best(found: Mapping[str, Result], n: int = 3) -> list[dict[str, Any]]:
    """The first heads of each role."""
    rows = []
    for name, result in found.items():
        p = adjusted(result)
        for part in result.top(n):
            place = (part.layer, part.index)
            value, of = float(result.values[place]), float(p[place])
            rows.append({"role": name, "head": str(part), "score": value, "unit": result.unit, "p_adjusted": of})
    return rows


def _knockouts(curves: Mapping[str, Result]) -> list[dict[str, Any]]:
    """The end of each joint curve: what the first heads cost more than random heads, together."""
    rows = []
    for name, curve in curves.items():
        task = curve.provenance.get("task") or {}
        ends = {key: float(curve[key][-1]) for key in ("effect", "null_mean", "difference_low", "difference_high", "p")}
        size = curve.labels_of("n_parts")[-1]
        rows.append({"role": name, "task": task.get("name", ""), "heads": size, **ends, "unit": curve.unit})
    return rows


def _notes(found: Mapping[str, Result], curves: Mapping[str, Result]) -> list[str]:
    sure = {name: int((adjusted(result) <= 0.05).sum()) for name, result in found.items()}
    none = [name for name, result in found.items() if adjusted(result).isnan().all()]
    notes = ["heads at adjusted p <= 0.05: " + ", ".join(f"{name} {n}" for name, n in sure.items() if name not in none)]
    if none:
        notes.append(f"no null, so no p: {', '.join(none)}")
    proved = [name for name, curve in curves.items() if bool((curve["p_adjusted"] <= 0.05).any())]
    if curves:
        notes.append(
            f"heads that cost more together than random heads (adjusted p <= 0.05 at some size): {', '.join(proved) or 'of no role'}; "
            "a score is not a cause"
        )
    return notes


# --- the page of the built-in models --------------------------------------------------------------------


def page(found: Mapping[str, Result]) -> str:
    """docs/roles.md: the survey of some models, one section each."""
    lines = [
        "# Roles",
        "",
        "What `patchbay find all MODEL` says of the built-in models; written by `python -m patchbay.stories.survey docs`.",
        "",
        "A role is what one finder of heads looks for. `p` is adjusted over the heads of a role. The last columns take the role's",
        "first heads away together, on fresh prompts, against as many random heads of the same layers: a score is not a cause.",
        "Models of twelve heads leave few other heads to draw, so that p can be no smaller than 1 / (1 + different draws).",
    ]
    for name, result in found.items():
        best = {row["role"]: row for row in reversed(result.tables["roles"])}
        ends = {row["role"]: row for row in result.tables["knockout"]}
        lines += ["", f"## {name}", "", f"![Evidence of each role by head](roles-{name}.png)", ""]
        lines += [
            "| role | first head | score | p | task | heads | costs together | random heads | p |",
            "|---" * 9 + "|",
        ]
        for role, row in best.items():
            end = ends.get(role)
            proof = "| | | | | |"
            if end is not None:
                costs = f"{end['effect']:.2f} {end['unit']} | {end['null_mean']:.2f}"
                proof = f"| {end['task']} | {end['heads']} | {costs} | {end['p']:.2g} |"
            p = "" if math.isnan(row["p_adjusted"]) else f"{row['p_adjusted']:.2g}"
            lines.append(f"| {role} | {row['head']} | {row['score']:.3g} {row['unit']} | {p} {proof}")
        lines += ["", "| other finders | best | highest | what it says |", "|---|---|---|---|"]
        for row in result.tables["others"]:
            lines.append(f"| {row['finder']} | {row['best']} | {row['highest']:.3g} {row['unit']} | {row['note']} |")
        if result.tables["not run"]:
            lines += [
                "",
                "Not run: " + "; ".join(f"{row['finder']} ({row['why']})" for row in result.tables["not run"]),
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Survey the built-in models, and write the page and its figures into a folder."""
    folder = Path(sys.argv[1])
    found = {}
    for name in built_in_names():
        found[name] = find_all(load(name))
        found[name].plot(folder / f"roles-{name}.png")
    write_file(folder / "roles.md", page(found).encode())


if __name__ == "__main__":
    main()
