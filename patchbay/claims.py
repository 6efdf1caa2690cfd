"""Claims of papers, at the size of a small model: each checked by one function, with an interval and one rule for the verdict.

A claim says that a number stands above (or below) a bound. It is confirmed when the whole 95 % interval does, not confirmed
when none of it does, and inconclusive otherwise. The bound is what chance or the control gives, or what the claim itself
names; it stands in the function, before anything is run. What a claim shows holds for this model and these prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from patchbay.port import PatchbayError, suggest

if TYPE_CHECKING:
    from patchbay.model import Model

N = 60  # prompts


@dataclass(frozen=True)
class Claim:
    """What was claimed, the number measured with its 95 % interval, and the bound that decides."""

    text: str
    value: float
    low: float
    high: float
    bound: float
    unit: str
    above: bool = True  # the claim is that the number is above the bound

    @property
    def verdict(self) -> str:
        if not all(map(math.isfinite, (self.value, self.low, self.high))):
            return "inconclusive"
        inside, outside = (self.low > self.bound, self.high <= self.bound)
        if not self.above:
            inside, outside = (self.high < self.bound, self.low >= self.bound)
        return "confirmed" if inside else "not confirmed" if outside else "inconclusive"

    def numbers(self) -> str:
        side = "above" if self.above else "below"
        return f"{self.value:.3g} {self.unit} (95 % {self.low:.3g} to {self.high:.3g}); claimed {side} {self.bound:.3g}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


CLAIMS: dict[str, Callable[[Any, int], Claim]] = {}  # key of the paper -> its check(model, seed)


def claim(key: str) -> Callable[[Callable[[Any, int], Claim]], Callable[[Any, int], Claim]]:
    def keep(function: Callable[[Any, int], Claim]) -> Callable[[Any, int], Claim]:
        CLAIMS[key] = function
        return function

    return keep


def known(key: str) -> Callable[[Any, int], Claim]:
    """The check of a paper's claim. Raises PatchbayError where none is written."""
    if key not in CLAIMS:
        raise PatchbayError(
            f"no claim of {key!r} can be run; those that can are {', '.join(sorted(CLAIMS))}{suggest(key, list(CLAIMS))}"
        )
    return CLAIMS[key]


def check(key: str, model: Model, *, seed: int = 0) -> Claim:
    """Check the claim of one paper on a model."""
    return known(key)(model, seed)


# --- the claims ---------------------------------------------------------------------------------------


def _at(result: Any, name: str, part: Any) -> float:
    """A variable of a Result [layer, head] at a head."""
    return float(result[name][part.layer, part.index])


def _top(result: Any, name: str) -> float:
    """A variable of a Result [layer, head] at its best head."""
    return _at(result, name, result.top(1)[0])


def _ends(result: Any, *names: str) -> tuple[float, float, float]:
    """A number of a Result and the ends of its interval."""
    value, low, high = (float(result[name]) for name in names)
    return value, low, high


def _joint(model: Model, parts: Any, task: Any, seed: int, text: str) -> Claim:
    """That parts cost more, taken away together, than as many random ones of their layers; paired over prompts."""
    from patchbay import prove

    found = prove.ablation(model, task, parts, seed=seed)
    return Claim(text, *_ends(found, "difference", "difference_low", "difference_high"), 0.0, task.unit)


@claim("elhage2021")
def _elhage2021(model: Model, seed: int) -> Claim:
    from patchbay import find, tasks

    error = float(find.direct_logit_attribution(model, tasks.indirect_object(model, N, seed=seed))["sum_error"])
    text = "what the parts write sums to the logit difference"
    return Claim(text, error, error, error, 1e-4, "logits off", above=False)


@claim("olsson2022")
def _olsson2022(model: Model, seed: int) -> Claim:
    from patchbay import find, tasks

    found = find.induction_heads(model, tasks.repeated_tokens(model, N, seed=seed))
    score, error = _top(found, "score"), 1.96 * _top(found, "standard_error")
    text = f"{found.top(1)[0]} looks at what followed the token before, more than at the places around it"
    return Claim(text, score, score - error, score + error, _top(found, "null_high"), "attention")


@claim("wang2022")
def _wang2022(model: Model, seed: int) -> Claim:
    from patchbay import find, tasks

    heads = find.name_mover_heads(model, tasks.indirect_object(model, N, seed=seed)).top(2)
    text = f"the name movers {heads[0]} and {heads[1]} carry the indirect object, more than random heads"
    return _joint(model, heads, tasks.indirect_object(model, N, seed=seed + 1), seed, text)


@claim("wu2024")
def _wu2024(model: Model, seed: int) -> Claim:
    from patchbay import find, tasks

    heads = find.retrieval_heads(model, tasks.needle_retrieval(model, N, seed=seed)).top(2)
    text = f"the retrieval heads {heads[0]} and {heads[1]} carry the needle, more than random heads"
    return _joint(model, heads, tasks.needle_retrieval(model, N, seed=seed + 1), seed, text)


@claim("gould2023")
def _gould2023(model: Model, seed: int) -> Claim:
    from patchbay import find, tasks

    heads = find.successor_heads(model).top(1)
    text = f"the head {heads[0]}, found by its weights, carries successions, more than random heads"
    return _joint(model, heads, tasks.successor(model, N, seed=seed), seed, text)


@claim("zhang2024")
def _zhang2024(model: Model, seed: int) -> Claim:
    from patchbay import find, tasks

    heads = find.arithmetic_heads(model, tasks.arithmetic(model, N, seed=seed)).top(2)
    text = f"{heads[0]} and {heads[1]} carry sums, more than random heads"
    return _joint(model, heads, tasks.arithmetic(model, N, seed=seed + 1), seed, text)


@claim("yu2023")
def _yu2023(model: Model, seed: int) -> Claim:
    from patchbay import find, measure, tasks, turn

    head = find.fact_heads(model, tasks.facts_in_context(model, N, seed=seed)).top(1)[0]
    test = tasks.facts_in_context(model, N, seed=seed + 1)
    curve = measure.dose_response(model, test, turn.scale([head], 1.0), strengths=[1.0, 4.0], draws=0)
    value, low, high = (float(curve[name][-1]) for name in ("right", "right_low", "right_high"))
    text = f"the value vectors of {head} times 4 move answers from memory to context"
    return Claim(text, value, low, high, float(curve["right"][0]), "share of prompts")


@claim("gu2024")
def _gu2024(model: Model, seed: int) -> Claim:
    from patchbay import find, tasks

    found = find.attention_sinks(model, tasks.repeated_tokens(model, N, seed=seed))
    value, low, high = (_top(found, name) for name in ("rate", "low", "high"))
    text = f"{found.top(1)[0]} rests on the first token in more than half of the prompts"
    return Claim(text, value, low, high, 0.5, "share of prompts")


@claim("akyurek2024")
def _akyurek2024(model: Model, seed: int) -> Claim:
    from patchbay import find, tasks

    found = find.ngram_heads(model, tasks.repeated_tokens(model, N, seed=seed), n=2)
    value, low, high = (_top(found, name) for name in ("excess", "low", "high"))
    return Claim(
        f"{found.top(1)[0]} looks at what followed the last two tokens before", value, low, high, 0.0, "attention"
    )


@claim("dunefsky2023")
def _dunefsky2023(model: Model, seed: int) -> Claim:
    from patchbay import find, tasks

    found = find.observable_propagation(model, tasks.indirect_object(model, N, seed=seed), seed=seed)
    ends = _ends(found, "spearman", "spearman_low", "spearman_high")
    return Claim("propagated scores of heads rank as their exact effects do", *ends, 0.0, "Spearman's correlation")


@claim("mugnaini2025")
def _mugnaini2025(model: Model, seed: int) -> Claim:
    from patchbay import find, tasks

    found = find.head_importance(model, tasks.indirect_object(model, N, seed=seed), seed=seed)
    ends = _ends(found, "spearman", "spearman_low", "spearman_high")
    return Claim("heads that write much cost much when they are removed", *ends, 0.0, "Spearman's correlation")


@claim("mueller2025")
def _mueller2025(model: Model, seed: int) -> Claim:
    from patchbay import prove, tasks

    found = prove.circuit(model, tasks.indirect_object(model, N, seed=seed), seed=seed)
    ends = _ends(found, "cpr", "cpr_low", "cpr_high")
    text = "circuits of the best edges are more faithful than circuits of random edges"
    return Claim(text, *ends, float(found["cpr_random"].max()), "area")


@claim("mcilroyyoung2024")
def _mcilroyyoung2024(model: Model, seed: int) -> Claim:
    from patchbay import tasks, turn

    said = tasks.repeated_tokens(model, N, seed=seed).clean
    prompts = [[list(ids[:2]), [list(ids[2:4]), list(ids[4:5]), list(ids[5:7])], list(ids[7:])] for ids in said]
    found = turn.set_prompt(model, prompts, seed=seed)
    spread = float(found["spread"].max())
    text = f"logits after a set prompt do not depend on the order (of plain prompts they do, by {float(found['plain_spread'].mean()):.2g})"
    return Claim(text, spread, spread, spread, 5e-5, "logits", above=False)


@claim("luo2024")
def _luo2024(model: Model, seed: int) -> Claim:
    from patchbay import find, tasks

    found = find.activation_sparsity(model, tasks.indirect_object(model, N, seed=seed), seed=seed)
    ends = _ends(found, "ratio_held_out", "ratio_low", "ratio_high")
    text = f"leaving out {float(found['sparsity_held_out']):.0%} of the neurons costs at most 2 % perplexity on held-out text"
    return Claim(text, *ends, 1.02, "of the perplexity", above=False)


@claim("merullo2024")
def _merullo2024(model: Model, seed: int) -> Claim:
    from patchbay import find, prove, tasks
    from patchbay.channel import parse_channel

    said = tasks.repeated_tokens(model, N, seed=seed)
    writer, reader = find.previous_token_heads(model, said).top(1)[0], find.induction_heads(model, said).top(1)[0]
    if (writer.layer or 0) >= (reader.layer or 0):
        raise PatchbayError(
            f"the previous-token head {writer} does not stand before the induction head {reader}: no channel"
        )
    assert writer.layer is not None
    size = 3 * model.d_head(writer.layer) // 8
    fresh = tasks.repeated_tokens(model, N, seed=seed + 1)
    found = prove.channel(model, fresh, parse_channel(f"{writer}>{reader}.k"), sizes=[size], draws=9, seed=seed)
    value, low, high = (float(found[name][0]) for name in ("gap", "gap_low", "gap_high"))
    text = f"of what {writer} writes, the {size} components that the key of {reader} reads best carry more than the {size} it reads least"
    return Claim(text, value, low, high, 0.0, "logits")


@claim("goldowskydill2023")
def _goldowskydill2023(model: Model, seed: int) -> Claim:
    from patchbay import prove, tasks

    half, other = tasks.indirect_object(model, 2 * N, seed=seed).split(seed=seed)
    head = prove.path_patching(model, half).top(1)[0]
    found = prove.path_patching(model, other)
    value, low, high = (_at(found, name, head) for name in ("effect", "low", "high"))
    text = f"{head}, whose direct path to the logits does most on one half of the prompts, does it on the other half"
    return Claim(text, value, low, high, 0.0, found.unit)


@claim("mcdougall2023")
def _mcdougall2023(model: Model, seed: int) -> Claim:
    from patchbay import find, tasks

    found = find.copy_suppression_heads(model, tasks.indirect_object(model, N, seed=seed), seed=seed)
    score, error = _top(found, "suppression"), 1.96 * _top(found, "standard_error")
    text = f"{found.top(1)[0]} pushes down what is about to be said where it stands in the prompt, more than elsewhere"
    return Claim(text, score, score - error, score + error, _top(found, "null_mean"), "logits")


@claim("prakash2024")
def _prakash2024(model: Model, seed: int) -> Claim:
    from patchbay import prove, tasks

    found = prove.desiderata_mask(model, tasks.indirect_object(model, N, seed=seed), seed=seed)
    ends = _ends(found, "difference", "difference_low", "difference_high")
    text = f"the {int(found['chosen'].nansum())} heads of a learned mask bring the answer over, more than as many random heads"
    return Claim(text, *ends, 0.0, found.units["difference"])


@claim("zhang2025")
def _zhang2025(model: Model, seed: int) -> Claim:
    from patchbay import prove, tasks

    half, other = tasks.facts_in_context(model, 2 * N, seed=seed).split(seed=seed)
    names = prove.attention_knockout(model, half, seed=seed)
    at = int(names["everywhere"].nan_to_num(0.0).argmin())
    group = str(names.labels_of("key")[at])
    found = prove.attention_knockout(model, other, seed=seed)
    value, low, high = (float(found[name][at]) for name in ("everywhere", "everywhere_low", "everywhere_high"))
    text = f"what the answer says flows by attention to {group!r}: cut from there, its probability falls"
    return Claim(text, value, low, high, 0.0, "relative change", above=False)


@claim("davies2025")
def _davies2025(model: Model, seed: int) -> Claim:
    from patchbay import find

    p = find.neuron_vocabulary(model, seed=seed)["p"].flatten()
    p = p[~p.isnan()]
    share, bound = float((p <= 0.01).double().mean()), 0.01
    error = 1.96 * math.sqrt(share * (1 - share) / len(p))
    text = "more neurons read one token's direction apart from all others than randomly turned ones do"
    return Claim(text, share, share - error, share + error, bound, "share of neurons")


@claim("dahlke2025")
def _dahlke2025(model: Model, seed: int) -> Claim:
    from patchbay import find, tasks
    from patchbay.task import Task

    kinds = (tasks.successor, tasks.arithmetic, tasks.indirect_object)
    half, other = (
        Task.joined([make(model, N // 2, seed=at) for make in kinds]).with_metric("log_probability")
        for at in (seed, seed + 1)
    )
    best = find.expert_specialisation(model, half, label="task", value="0", seed=seed).top(1)[0]
    found = find.expert_specialisation(model, other, label="task", value="0", seed=seed)
    value, low, high = (_at(found, name, best) for name in ("relevance", "low", "high"))
    text = f"{best} is chosen more often where the next of a series is asked than elsewhere, also on new prompts"
    return Claim(text, value, low, high, 0.0, "share of prompts")


@claim("rimsky2024")
def _rimsky2024(model: Model, seed: int) -> Claim:
    from patchbay import tasks, turn

    knob = turn.steer(model, tasks.indirect_object(model, 2 * N, seed=seed), seed=seed)
    found = knob.evidence["steering"]
    at = knob.edits[0].port.layer
    value, low, high = (float(found[name][at]) for name in ("effect", "low", "high"))
    text = f"the mean difference of prompts and their twins, added at layer {at}, moves the answer, on prompts that chose nothing"
    return Claim(text, value, low, high, 0.0, "logits")
