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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from patchbay import find, prove, tasks
from patchbay.files import write_file
from patchbay.find import _attention
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.model.source import built_in_names
from patchbay.results.record import model_record, now, versions
from patchbay.results.result import Result
from patchbay.signal.channel import parse_channel
from patchbay.signal.port import Part, PatchbayError, parse_part
from patchbay.stories._evidence import evidence
from patchbay.stories._roles_page import page
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
WEIGHTS_ONLY = ("successor_heads", "neuron_vocabulary", "channels", "communities", "mod_features", "spectrum")
OTHERS: dict[str, str] = {  # finders of other parts
    "neuron_vocabulary": "",
    "relation_neurons": "successor",
    "concept_neurons": "indirect_object",
    "neuron_importance": "indirect_object",
    "activation_sparsity": "indirect_object",
    "expert_specialisation": "facts_in_context",
    "head_importance": "indirect_object",
    "logit_lens": "indirect_object",
    "relevance": "indirect_object",
    "prior_layers": "arithmetic",
    "isotropy": "indirect_object",
    "key_clusters": "indirect_object",
    "observable_propagation": "indirect_object",
    "mod_features": "",
    "channels": "",
    "communities": "",
    "spectrum": "",
    "channel_content": "indirect_object",
    "concept_depth": "successor",
    "latent_language": "successor",
    "word_classes": "successor",
}
LEAST = {"successor": 64}  # its prompts are split among series and folds
NEEDS = {  # finders that ask for what no built-in task holds
    "attribution_graph": "needs one prompt to tell of: find.attribution_graph(model, prompt)",
    "feature_names": "needs texts and features or neurons to name: find.feature_names(model, texts, 'L1.N5')",
    "function_vectors": "needs a task shown by examples, with twins that do not show it: find.function_vectors(model, task)",
    "patchscopes": "needs a prompt that tells what is put into it: find.patchscopes(model, prompts, target)",
    "features": "needs a dictionary: find.features(model.with_dictionaries(...), task, 'L1.features')",
    "relation_embedding": "needs prompts of one relation and a stream: find.relation_embedding(model, task, 'L1.resid_out', subject='subject')",
    "token_rewards": "needs a model that was trained with rewards: train.variant(model, texts, objective='inverse-rl'), then find.token_rewards(model, texts)",
    "tree_probe": "needs texts whose trees are known: find.tree_probe(model, functions)",
    "tuned_lens": "needs a trained lens: train.tuned_lens(model, texts, folder=FOLDER), then find.tuned_lens(model, task, FOLDER)",
    "jacobian_lens": "needs texts that its Jacobians are means over: find.jacobian_lens(model, task, texts=texts)",
    "language_similarity": "needs texts in several languages: find.language_similarity(model, prompts, translations)",
    "channel_changes": "needs a second model: find.channel_changes(model, other)",
}


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
    begun, survey = time.perf_counter(), Survey(model, n, seed, task)
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
    result = evidence(model, found, curve_results, others, lacking)
    result.provenance |= {
        "method": "find all",
        "model": model_record(model),
        "options": {"n": n, "seed": seed, "curves": curves},
        "task": None if task is None else task.to_json(),
        "versions": versions(),
        "wall_time_s": time.perf_counter() - begun,
        "date": now(),
    }
    return result


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
    for name, result in _ranking(survey, lacking, step):
        best = result.top(1) if result.ranked else []
        finite = result.values[~result.values.isnan()]
        yield {
            "finder": name,
            "task": OTHERS[name] or "weights",
            "best": str(best[0]) if best else "",
            "highest": float(finite.max()) if len(finite) else math.nan,
            "unit": result.unit,
            "note": result.notes[0] if result.notes else "",
        }


def _ranking(
    survey: Survey, lacking: list[dict[str, str]], step: Callable[[str], None], names: Iterable[str] | None = None
) -> Iterator[tuple[str, Result]]:
    """The finders of other parts, those that run."""
    for name in OTHERS if names is None else names:
        task = OTHERS[name]
        step(name)
        result = _tried(name, lacking, partial(_run, survey, name, task))
        if result is not None:
            survey.found[name] = result
            yield name, result


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


RANKING: dict[str, tuple[str, ...]] = {  # kind of part -> the other finders that rank such
    "head": ("head_importance", "observable_propagation", "mod_features"),
    "neuron": ("neuron_vocabulary", "relation_neurons", "concept_neurons", "neuron_importance"),
    "expert": ("expert_specialisation",),
    "layer": ("prior_layers", "isotropy", "concept_depth", "latent_language", "word_classes", "activation_sparsity"),
}


def ranks(
    model: Model, part: str, *, n: int = 32, seed: int = 0, progress: Callable[[int, int, str], None] | None = None
) -> list[dict[str, Any]]:
    """The rank of a part in every finder that ranks parts of its kind, best first; empty where none does."""
    survey, lacking, found = Survey(model, n, seed), list[dict[str, str]](), list[dict[str, Any]]()
    kind = (
        parse_channel(part).writer.kind if "." in part and part.rpartition(".")[2][:1] == "C" else parse_part(part).kind
    )
    others = RANKING.get(kind, ())
    steps = len(others) + (len(ROLES) if kind == "head" else 0)
    done = iter(range(steps))

    def step(what: str) -> None:
        if progress is not None:
            progress(next(done), steps, what)

    heads = _roles(survey, lacking, step) if kind == "head" else ()
    for name, result in chain(heads, _ranking(survey, lacking, step, others)):
        rows = result.table() if result.ranked else []
        row = next((row for row in rows if str(row["part"]) == part), None)
        if row is not None:
            p = next(
                (row[key] for key in ("p_adjusted", "p") if row.get(key) == row.get(key, math.nan) and key in row), None
            )
            found.append(
                {
                    "finder": name,
                    "rank": row["rank"],
                    "of": len(rows),
                    "value": row["value"],
                    "unit": result.unit,
                    "p": p,
                }
            )
    return sorted(found, key=lambda row: (row["rank"] / row["of"], row["finder"]))


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
