"""The contract: what is true of every method, driven by one list of cases on several families.

A new method adds one `Case`; a test fails while it has none. Models are random twins: GPT-2,
grouped-query Llama, Gemma 2 (norms after, soft caps), Phi (parallel blocks), Mixtral (experts), GPT-Neo and BLOOM (attention
not through transformers' interface) and Mamba 2 (no heads: a method works or refuses and says what it lacks).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import itertools
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.contract import checks
from patchbay.contract.checks import Case
from patchbay.contract.every import TWINS, prompts_of
from patchbay.features import lens as lenses
from patchbay.knobs.knob import Knob
from patchbay.model.filling import edits_digest
from patchbay.tiny import twins
from tests import given
from tests.features.given import dictionary
from tests.measure.words import tokenizer
from tests.shares import by_turns
from tests.tolerance import close

pytestmark = pytest.mark.filterwarnings(
    "ignore::patchbay.errors.EditNeverMade"
)  # methods that read weights alone, under edits
ROOMS = [room for room in ("find", "prove", "turn", "decode", "train", "measure") if hasattr(pb, room)]
METHODS = {f"{room}.{name}": getattr(getattr(pb, room), name) for room in ROOMS for name in getattr(pb, room).__all__}


# --- the models -------------------------------------------------------------------------------------

NAMES: dict[int, str] = {}  # of the models lent, by their identity


@functools.cache
def lent(name: str) -> pb.Model:
    model = pb.load(given.lent(name).hf, tokenizer("characters"))  # meters ask questions in words
    NAMES[id(model)] = name
    return model


@functools.cache
def drawn_for(name: str) -> pb.Model:
    """The same model as random prompts are drawn for: letters alone, so that they stay what they are when more is written."""
    return pb.load(given.lent(name).hf, tokenizer("characters", marks=""))


@functools.cache
def task(name: str, n: int = 4) -> pb.Task:
    return prompts_of(drawn_for(name), n)


TEXTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18]]  # of different lengths


# --- the cases --------------------------------------------------------------------------------------


def part_of(model: pb.Model) -> list[str]:
    return ["L1.H2", "L0.H1"] if model.n_heads(0) else ["L1.attn"]


def ablation(by: str) -> Callable[..., Any]:
    return lambda m, t, **o: pb.prove.ablation(m, t, part_of(m), **{"by": by, "draws": 3 if m.n_heads(0) else 1, **o})


def attribution(part: str) -> Callable[..., Any]:
    return lambda m, t, **o: pb.find.direct_logit_attribution(m, t, **{"part": part, **o})


def dose_response(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    knob = Knob("turn", [pb.scale(pb.Part(1, "attn").port(), 1.0)], 1.0)
    return pb.measure.dose_response(
        model, prompts, knob, **{"strengths": [0.0, 1.0, 2.0], "neutral": TEXTS, "others": {"same": prompts}, **options}
    )


def patching(**chosen: Any) -> Callable[..., Any]:
    return lambda m, t, **o: pb.prove.activation_patching(m, t, **{**chosen, **o})


def knockout(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    return pb.prove.attention_knockout(model, prompts, **{"keys": ["first", "second"], "draws": 1, **options})


def gate(channel: str = "L0.H1.C2>L1.H3.k", **chosen: Any) -> Callable[..., Any]:
    return lambda m, t, **o: pb.prove.channel(m, t, channel, **{"draws": 2, "sizes": [2, 8], **chosen, **o})  # type: ignore[arg-type]


def path(receiver: str) -> Callable[..., Any]:
    return lambda m, t, **o: pb.prove.path_patching(m, t, **{"receivers": [receiver], **o})


def bound(prompts: pb.Task) -> pb.Task:
    """The same prompts with five candidates, and with the places among them that place, key and answer point at."""
    wrong = [[(right + step) % 60 for step in (1, 2, 3, 4)] for right in prompts.right]
    places = [list(itertools.permutations(range(5), 4))[sum(ids) % 120] for ids in prompts.clean]
    names = ("asked", "positional", "lexical", "reflexive")
    labels = {name: [row[at] for row in places] for at, name in enumerate(names)}
    return pb.Task(prompts.name, prompts.clean, prompts.right, wrong, prompts.corrupted or prompts.clean, labels=labels)


def marked(prompts: pb.Task) -> pb.Task:
    """The same prompts with marks that the head finders ask for, wherever they may lie."""
    n = len(prompts)
    marks = {
        "boxes": [[0, 2]] * n,
        "objects": [[1, 3]] * n,
        "answer": [[1 + 2 * (ids[0] % 2)] for ids in prompts.clean],
    }
    marks |= {"needle": [[1, 2]] * n, "left": [[0]] * n, "right": [[2]] * n, "operator": [[1]] * n}
    return pb.Task(prompts.name, prompts.clean, prompts.right, prompts.wrong, prompts.corrupted, marks=marks)


def asked_of(prompts: pb.Task) -> pb.Task:
    """The same prompts, their second token being what they ask of."""
    return dataclasses.replace(prompts, marks={"subject": [[1]] * len(prompts)})


def rewriting(model: pb.Model, prompts: pb.Task, **options: Any) -> Any:
    how: dict[str, Any] = {"layers": [1], "steps": 2, "draws": 1, "weight": 1.0}
    return pb.turn.rewrite(model, asked_of(prompts), TEXTS, **{**how, **options})


def patched_in(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    ids = [list(one) for one in (prompts.clean if isinstance(prompts, pb.Task) else prompts)]
    return pb.find.patchscopes(model, ids, TEXTS[0], **{"layers": [1], "max_new_tokens": 2, **options})


def parsed(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    """Sentences of the prompts' letters, each with two trees."""
    texts = []
    for ids in prompts.clean if isinstance(prompts, pb.Task) else prompts:
        for heads in ((2, 0, 2, 3), (0, 1, 1, 2)):
            forms = ["abcdefghijklmnop"[(token + heads[0]) % 16] for token in list(ids)[:4]]
            rows = [
                f"{i + 1}\t{form}\t_\t_\t_\t_\t{head}\t_\t_\t_"
                for i, (form, head) in enumerate(zip(forms, heads, strict=True))
            ]
            texts.append("\n".join(rows))
    return pb.find.tree_probe(model, texts, **{"kind": "conllu", "rank": 4, "steps": 2, "draws": 1, **options})


def cut_short(prompts: pb.Task) -> pb.Task:
    """The ends of the same prompts and their twins, of one length."""
    length = min(map(len, prompts.clean))
    rows = ([list(ids[-length:]) for ids in side] for side in (prompts.clean, prompts.corrupted or prompts.clean))
    return pb.Task(prompts.name, next(rows), prompts.right, prompts.wrong, next(rows))  # type: ignore[arg-type]


def scrubbing(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    """The same prompts cut to one length, of two kinds."""
    own = dataclasses.replace(cut_short(prompts), labels={"kind": [i % 2 for i in range(len(prompts))]})
    return pb.prove.causal_scrubbing(model, own, {"L1.attn": "kind"}, **{"draws": 1, **options})


def refusing(model: pb.Model, prompts: pb.Task, **options: Any) -> Any:
    """Prompts of two kinds, and most of what they may be followed by as what a refusal begins with."""
    ids = [list(one) for one in prompts.clean]
    first, second = [[*one, 7] for one in ids], [[*one, 9] for one in ids]
    said = pb.run(model, first, logits="last").last_logits.mean(0).topk(60).indices.tolist()
    return pb.turn.refusal_direction(model, first, second, **{"kl": 1e6, "refusal": said, **options})


def answering(model: pb.Model, prompts: pb.Task, **options: Any) -> Any:
    """Prompts of two kinds, and a third of the vocabulary as the trait."""
    ids = [list(one) for one in prompts.clean]
    first, second = [[*one, 7] for one in ids], [[*one, 9] for one in ids]
    how: dict[str, Any] = {"max_new_tokens": 2, "layers": [1], "draws": 1}
    return pb.turn.persona_vector(model, first, second, list(range(30)), **{**how, **options})


ORDERED = {"numbers": list(range(5, 45)), "days": [50, 51, 52, 53, 54, 55, 56]}  # twins have no tokenizer


def ordinal(name: str, **chosen: Any) -> Callable[..., Any]:
    return lambda m, t, **o: getattr(pb.find, name)(m, **{"classes": ORDERED, "draws": 5, **chosen, **o})


def inhibition(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    last = max((i for i in range(model.n_layers) if model.n_heads(i)), default=1)
    return pb.find.inhibition_heads(model, prompts, **{"movers": [f"L{last}.H1"], "draws": 1, **options})


def propagation(**chosen: Any) -> Callable[..., Any]:
    return lambda m, t, **o: pb.find.observable_propagation(m, t, **{**chosen, **o})


def importance(name: str) -> Callable[..., Any]:
    return lambda m, t, **o: getattr(pb.find, name)(m, t, **{"exact": 4, **o})


def twinned(prompts: pb.Task) -> pb.Task:
    """The same prompts, with twins where they have none."""
    return pb.Task(prompts.name, prompts.clean, prompts.right, prompts.wrong, prompts.corrupted or prompts.clean)


def intents(model: pb.Model, prompts: pb.Task, **options: Any) -> Any:
    """The same prompts, said to ask for one of two things in turn."""
    labels = {"intent": ["context" if place % 2 else "prior" for place in range(len(prompts))]}
    twins_ = prompts.corrupted or prompts.clean
    own = pb.Task(prompts.name, prompts.clean, prompts.right, prompts.wrong, twins_, labels=labels)
    return pb.turn.context_knob(model, own, **{"steps": 2, "layers": [0], **options})


@functools.cache
def other(name: str) -> pb.Model:
    """A second model of the same shape with other weights."""
    return pb.load(twins.twin(name, seed=1), tokenizer("characters"))


def second(model: pb.Model) -> pb.Model:
    return other(NAMES[id(model)])


def across(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    tuned, parts = other(NAMES[id(model)]), part_of(model)
    return pb.prove.cross_model_patching(model, tuned, prompts, parts, **{"draws": 1, **options})  # type: ignore[arg-type]


def set_prompt(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    """The same prompts, their second and third token being two options."""
    spans = [[[1, 2], [2, 3]]] * len(prompts)
    own = pb.Task(prompts.name, prompts.clean, prompts.right, prompts.wrong, labels={"options": spans})
    with model.edited(pb.scale(pb.Part(1, "attn").port(), 1.0)):  # it has hooks, and changes nothing
        return pb.turn.set_prompt(model, own, **{"orders": 1, "max_new_tokens": 2, **options})


HALVES = {"low": range(48), "high": range(48, 96)}  # of the twins' vocabulary


def depth(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    labels = [place % 2 for place in range(len(prompts))]
    return pb.find.concept_depth(model, prompts, labels, **{"draws": 3, "folds": 2, **options})


def priors(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    """The answers made different: some tasks repeat one."""
    right = [40 + place for place in range(len(prompts))]
    other = pb.Task(prompts.name, prompts.clean, right, metric="log_probability")
    return pb.find.prior_layers(model, other, **{"prior": [0.5, -1.0, 2.0, 0.1], "draws": 5, "folds": 2, **options})


def clusters(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    """Reads logits alone, so that hooks are there only for an edit around it."""
    with model.edited(pb.scale(pb.Part(1, "attn").port(), 1.0)):
        return pb.find.key_clusters(model, prompts, **{"n_clusters": 8, "upto": 40, **options})


def rewarded(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    """It reads logits alone, too."""
    with model.edited(pb.scale(pb.Part(1, "attn").port(), 1.0)):
        return pb.find.token_rewards(model, prompts, **{"draws": 5, **options})


def translated(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    other = {"reversed": [list(ids[::-1]) for ids in prompts.clean]}
    return pb.find.language_similarity(model, prompts, other, **{"draws": 5, **options})


def sorted_by(prompts: pb.Task, **labels: list[Any]) -> pb.Task:
    """The same prompts with labels."""
    return dataclasses.replace(
        prompts, labels={name: [row[i % len(row)] for i in range(len(prompts))] for name, row in labels.items()}
    )


def relations(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    labelled = sorted_by(prompts, relation=["a", "a", "b", "b"], subject=["s", "t"])
    return pb.find.relation_neurons(model, labelled, **{"shares": [], **options})


def experts(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    return pb.find.expert_specialisation(model, sorted_by(prompts, half=[0, 1]), **{"label": "half", **options})


def vocabulary(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    return pb.find.neuron_vocabulary(model, **{"draws": 50, **options})


def agreeing(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    return vocabulary(model, prompts, **{"other": other(NAMES[id(model)]), **options})


def responses(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    """The prompts cut in two: what stands before, and what is to be said."""
    ids = [list(one) for one in (prompts.clean if isinstance(prompts, pb.Task) else prompts)]
    pairs = [[one[:-2], one[-2:]] for one in (ids * 4)[:4]]
    return pb.train.response_tuning(model, pairs, **{"steps": 2, "start": [1], **options})


def variants(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    """The prompts as documents, two steps of the plain objective beside another order of units."""
    ids = [list(one) for one in (prompts.clean if isinstance(prompts, pb.Task) else prompts)]
    plan: dict[str, float] = {"steps": 2, "batch_size": 2, "held": 0.5, "panel": 0}
    options.pop("batch_size", None)  # of the plan, where it is what is measured
    return pb.train.variant(
        model, [[one[:2], one[2:]] for one in ids], **{"objective": "spt", "seeds": 1, "plan": plan, **options}
    )


def trained(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    how: dict[str, Any] = {"n_features": 12, "sparsity": 2, "steps": 2}
    options.pop("batch_size", None)  # it has none, and runs the model several times all the same
    return pb.train.dictionary(model, prompts, "L1.resid_out", **{**how, **options})


@functools.cache
def saved(name: str) -> str:
    """A folder with a random dictionary for a model."""
    folder = Path(tempfile.mkdtemp()) / name
    return str(dictionary(lent(name), "L1.resid_out", form="topk", k=4).save(folder))


def related_by(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    twice = pb.Task.joined([prompts] * 2)
    return pb.find.relation_embedding(model, twice, pb.Port("resid_out", 0), **{"examples": 2, **options})


def searched(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    """It reads and edits the first layer alone, so that hooks of the second are there for an edit around it."""
    with model.edited(pb.scale(pb.Part(1, "attn").port(), 1.0)):
        return pb.prove.das(model, prompts, pb.Port("resid_out", 0), **{"dims": 4, "steps": 2, **options})


def trained_lens(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    """It reads the stream alone, which needs no hook on the last layer but for an edit around it."""
    with model.edited(pb.scale(pb.Part(1, "attn").port(), 1.0)):
        return pb.train.tuned_lens(model, prompts, **{"steps": 2, **options})


@functools.cache
def kept_lens(name: str) -> str:
    """A folder with a random lens for a model."""
    model, folder = lent(name), Path(tempfile.mkdtemp()) / name
    size = model.n_layers, model.d_model, model.d_model
    weight = 0.1 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    return lenses.save(lenses.Lens(weight, torch.zeros(size[:2]), adds=True), folder)


def tuned_lens(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    return pb.find.tuned_lens(model, prompts, kept_lens(NAMES[id(model)]), **{"positions": 2, **options})


def jacobian_lens(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    return pb.find.jacobian_lens(model, prompts, **{"positions": 2, "texts": TEXTS[:1], "skip": 3, **options})


def measured(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    return pb.measure.dictionary(model, prompts, saved(NAMES[id(model)]), **options)


def graphs(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    options.pop("batch_size", None)  # it has none: each prompt is a run
    return pb.find.attribution_graph(model, prompts, **{"features": 12, **options})


def without_graphs(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    drawn = graphs(model, [list(ids) for ids in prompts.clean[:2]])
    return pb.prove.graph_ablation(model, drawn, **{"draws": 2, **options})


def turned(model: pb.Model) -> Knob:
    return Knob("turned", [pb.scale(pb.Part(1, "attn").port(), 1.0)], -1.0)


def decoded(name: str, **chosen: Any) -> Callable[..., pb.Result]:
    """A decoder that reads no layer by itself has hooks for an edit around it, which changes nothing."""

    def call(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
        others = {key: make(model) for key, make in chosen.items() if callable(make)}
        plain = {key: value for key, value in chosen.items() if not callable(value)}
        with model.edited(pb.scale(pb.Part(1, "attn").port(), 1.0)):
            return getattr(pb.decode, name)(
                model, prompts=prompts, **{"max_new_tokens": 3, **others, **plain, **options}
            )

    return call


STORES = Path(tempfile.mkdtemp(prefix="patchbay-stores-"))


def nearest(name: str, **chosen: Any) -> Callable[..., pb.Result]:
    """A store is a trace of the model as it stands, under the edits in force; that of the same model and edits is found again."""

    def call(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
        with model.edited(pb.scale(pb.Part(1, "attn").port(), 1.0)):
            store = STORES / f"{model.family.name}-{model.fingerprint}-{edits_digest(model.active_edits())[:12]}"
            if not (store / "trace.json").is_file():
                pb.run(model, TEXTS, taps=[f"L{model.n_layers - 1}.resid_out"], folder=store)
            given = {} if name == "knn_parts" else {"max_new_tokens": 3}
            return getattr(pb.decode, name)(model, str(store), prompts, **{**given, **chosen, **options})

    return call


FEW_TWINS = (
    "gpt2",
    "llama",
    "mixtral",
    "mamba2",
)  # of meters, which run the model in one place (measure/test_answers.py)


TWO_TWINS = ("gpt2", "mamba2")  # of meters that are told in words: with heads and without


def meter(name: str, items: Any = None, *, runs: bool = True, **chosen: Any) -> Callable[..., Any]:
    """A meter reads logits alone, so that hooks are there only for an edit around it."""

    def call(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
        given = prompts if items is None else items(prompts) if callable(items) else items
        around = model.edited(pb.scale(pb.Part(1, "attn").port(), 1.0)) if runs else nullcontext()
        with around:
            return getattr(pb.measure, name)(model, given, **{**chosen, **options})  # type: ignore[no-any-return]

    return call


LETTERS = "abcdefghijklmnopqrstuvwxyz"
SAMPLED: dict[str, Any] = {"per_prompt": 2, "max_new_tokens": 12}
NORMS = [{"word": word, "norm": at * 3 % 5} for at, word in enumerate(("cat", "dog", "hat", "sun", "man"))]
GUISES = [{"a": f"he {x}", "b": f"she {x}"} for x in ("on", "in", "at", "up", "out", "off")]
ASKED = [{"question": f"is it {x}?", "choices": ["a", "be"]} for x in ("on", "in", "at", "up", "out", "off")]
SAID = [{"text": f"{x} cat {y} dog {x}", "group": y} for x in ("one", "two", "big") for y in ("one", "two")]
REVERSED = [{"prompt": f"{x} or y?", "reverse": f"y or {x}?", "choices": ["a", "be"], "answer": i % 2} for i, x in enumerate(("on", "in", "at", "up", "out", "off"))]  # fmt: skip
CLAIMED = [{"item": x, "variant": v, "prompt": f"{v} {x}", "choices": ["a", "be", "no"], "keys": list("xyz"), "reference": "xyz"[i % 3]} | ({} if v == "en" else {"claimant": v}) for i, x in enumerate(("on", "in", "at", "up", "out", "off")) for v in ("en", "x", "y")]  # fmt: skip
TARGETS = [{"text": f"{x} {y}", "target": i * 5 % 7} for i, (x, y) in enumerate(itertools.product(("on", "in", "at"), ("cat", "dog", "man")))]  # fmt: skip

SMALL = ("on", "in", "at", "up", "out", "off")
NOVEL = [{"learn": "the cat {} the dog"}, {"learn": "a man {} it"}] + [{"test": f"{x} {{}} a mat", "twin": f"{x} {{}} mat a"} for x in SMALL]  # fmt: skip
ANSWERED = [{"prompt": f"{x} is {y}", "choices": [" a", " be"], "answer": (i * 7) % 3 % 2, "group": y, "word": x, "type": "homograph" if y == "on" else "other", "context": f"{y} {x} ran. it sat. no man", "question": f" is {y}", "changed": f"so {y} is {x}"} for i, (x, y) in enumerate(itertools.product(("cat", "dog", "man", "hen"), ("on", "in", "at")))]  # fmt: skip
STYLED = [{"text": text, "author": str(i % 2)} for i, text in enumerate(("the cat", "RAN 9", "a hen is", "SEE 8", "it sat", "GO 77", "on a mat", "HAT 6"))]  # fmt: skip
GUESSED = [{"prompt": f"{x} is", "guess": f" a {x} on", "truth": f" a {y} on"} for x, y in itertools.pairwise(SMALL)]  # fmt: skip
SHOWN = [{"prompt": f"was {x}", "choices": [" he", " no"], "answer": i % 2} for i, x in enumerate(SMALL[:4])]
PLANNED = [{"edges": "tree:3", "start": a, "goal": b} for a, b in itertools.permutations("ABC", 2)]


def functions(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    with model.edited(pb.scale(pb.Part(1, "attn").port(), 1.0)):
        return pb.measure.boolean_functions(model, **{"bits": 2, "pairs": 3, "functions": 6, **options})


def described(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    options.pop("batch_size", None)  # the model goes on from prompts of one length at a time
    with model.edited(pb.scale(pb.Part(1, "attn").port(), 1.0)):
        return pb.measure.function_descriptions(model, **{"functions": 3, "queries": 2, **options})


def with_another(name: str, **chosen: Any) -> Callable[..., pb.Result]:
    """A meter of two models: the second is as small as the first."""
    return lambda m, t, **o: meter(name, ANSWERED if name == "score_convergence" else [row["prompt"] for row in ANSWERED], other=second(m), **chosen)(m, t, **o)  # fmt: skip


@functools.cache
def earlier(name: str) -> str:
    """The second model of this family in a folder, as the checkpoint of an earlier step."""
    folder = STORES / f"earlier-{name}"
    other(name).hf.save_pretrained(folder)
    tokenizer("characters").save_pretrained(folder)
    return str(folder)


def followed(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    given_ = {"checkpoints": [earlier(NAMES[id(model)])], "tokens": [1.0, 2.0], "read": "log_probability"}
    return meter("benchmark_signal", ANSWERED, **given_)(model, prompts, **options)  # type: ignore[no-any-return]


def dials(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    """Two knobs against the letters of two halves of the alphabet."""
    knobs = {
        name: Knob(name, [pb.scale(pb.Part(at, "attn").port(), 1.0)], 1.0) for at, name in enumerate(("low", "high"))
    }
    scorers = {"low": list(LETTERS[:13]), "high": list(LETTERS[13:])}
    how = {"strengths": [-3.0, 3.0], **SAMPLED, "per_prompt": 4, "max_new_tokens": 6}
    return pb.measure.dial_response(model, prompts, knobs, scorers, **{**how, **options})


def effects(model: pb.Model, prompts: pb.Task, **options: Any) -> pb.Result:
    knob = Knob("turn", [pb.scale(pb.Part(1, "attn").port(), 1.0)], 3.0)
    meters = {"text_loss": {"items": TEXTS, "unit": "token"}, "minimal_pairs": {"items": prompts}}
    return pb.measure.side_effects(model, knob, meters, **{"draws": 1, **options})


METERS = [
    Case("measure.answer_choices", meter("answer_choices"), on=FEW_TWINS),
    Case("measure.minimal_pairs", meter("minimal_pairs"), on=FEW_TWINS),
    Case("measure.text_loss", meter("text_loss", unit="token"), on=FEW_TWINS),
    Case(
        "measure.calibration", meter("calibration", lambda t: pb.Task.joined([t] * 5), bins=2), own=True, on=FEW_TWINS
    ),
    Case("measure.benchmark_signal", followed, own=True, on=TWO_TWINS),
    Case("measure.survey_answers", meter("survey_answers", ASKED), own=True, on=FEW_TWINS),
    Case(
        "measure.expected_rating",
        meter("expected_rating", NORMS, min_mass=0.0, frame="on {}?", scale=[1, 2]),
        own=True,
        on=FEW_TWINS,
    ),
    Case("measure.matched_guise", meter("matched_guise", GUISES, attributes=[" a", " be"]), own=True, on=FEW_TWINS),
    Case("measure.worst_of_k", meter("worst_of_k", scorer=list(LETTERS), **SAMPLED, k=1), on=FEW_TWINS),
    Case("measure.dial_response", dials, on=FEW_TWINS),
    Case(
        "measure.word_odds",
        meter("word_odds", SAID, runs=False, least=1, draws=20),
        own=True,
        runs=False,
        on=("gpt2", "mixtral"),
    ),
    Case("measure.side_effects", effects, own=True, on=FEW_TWINS),
    Case(
        "measure.evaluation_card",
        meter("evaluation_card", ANSWERED[:6], swaps={"cat": "dog"}, scorer=list("abc"), per_prompt=1),
        own=True,
        on=TWO_TWINS,
    ),
    Case("measure.self_consistency", meter("self_consistency", alike="words", **SAMPLED), on=TWO_TWINS),
    Case("measure.incoherence", meter("incoherence", REVERSED), own=True, on=TWO_TWINS),
    Case("measure.concurrence", meter("concurrence", CLAIMED), own=True, on=TWO_TWINS),
    Case("measure.head_risk", meter("head_risk", TARGETS, sizes=[0, 2], draws=2), own=True, on=TWO_TWINS),
    Case("measure.predictive_geometry", meter("predictive_geometry"), on=TWO_TWINS),
    Case("measure.function_descriptions", described, own=True, on=TWO_TWINS),
    Case("measure.novel_word", meter("novel_word", NOVEL, steps=2, draws=1), own=True, on=TWO_TWINS),
    Case("measure.task_probability", meter("task_probability", ANSWERED), own=True, on=TWO_TWINS),
    Case("measure.cross_task", meter("cross_task", ANSWERED, source=SHOWN), own=True, on=TWO_TWINS),
    Case("measure.word_types", meter("word_types", ANSWERED), own=True, on=TWO_TWINS),
    Case("measure.context_compression", meter("context_compression", ANSWERED), own=True, on=TWO_TWINS),
    Case("measure.boolean_functions", functions, own=True, on=TWO_TWINS),
    Case(
        "measure.graph_planning",
        meter("graph_planning", PLANNED, frame="{edges}: {start} to {goal}: {start}", per_prompt=4, max_new_tokens=8),
        own=True,
        on=TWO_TWINS,
    ),
    Case("measure.routing", with_another("routing"), own=True, second="other", on=TWO_TWINS),
    Case("measure.style_detection", meter("style_detection", STYLED, support=2, draws=2), own=True, on=TWO_TWINS),
    Case("measure.prompt_change", meter("prompt_change", ANSWERED, change="given"), own=True, on=TWO_TWINS),
    Case("measure.doubtful_tokens", meter("doubtful_tokens", GUESSED), own=True, on=TWO_TWINS),
    Case("measure.judge_network", meter("judge_network", ANSWERED, roles=["", "no ", "he "]), own=True, on=TWO_TWINS),
    Case("measure.score_convergence", with_another("score_convergence", k=1), own=True, second="other", on=TWO_TWINS),
]

PATCHED = ("effect", "clean", "corrupted")
LENS = ("probability", "logit", "rank", "kl", "logit_diff")
DLA = ("attribution", "mlp", "attn_bias", "embed", "bias", "total")
SHARES = ("score", "right", "wrong", "other")
CASES = [
    Case("find.activation_sparsity", pb.find.activation_sparsity, needs="mlp.act"),
    Case("find.concept_neurons", pb.find.concept_neurons, needs="mlp.act"),
    Case("find.expert_specialisation", experts, needs="experts.out"),
    Case("find.neuron_vocabulary", vocabulary, runs=False, needs="mlp.act"),
    Case("find.neuron_vocabulary", agreeing, runs=False, label="agreement", needs="mlp.act", second="other"),
    Case("find.relation_neurons", relations, needs="mlp.act"),
    Case("find.channels", lambda m, t, **o: pb.find.channels(m, **{"nulls": 5, **o}), runs=False, needs="attn.z"),
    Case(
        "find.channel_changes",
        lambda m, t, **o: pb.find.channel_changes(m, second(m), **o),
        runs=False,
        needs="attn.z",
        second="other",
    ),
    Case(
        "find.channel_content",
        lambda m, t, **o: pb.find.channel_content(m, t, "L1.H1.C2", **{"draws": 3, **o}),
        needs="attn.z",
    ),
    Case("find.spectrum", lambda m, t, **o: pb.find.spectrum(m, **{"draws": 3, **o}), runs=False, needs="attn.z"),
    Case(
        "find.communities",
        lambda m, t, **o: pb.find.communities(m, **{"rate": 1.0, "draws": 3, **o}),
        runs=False,
        needs="attn.z",
    ),
    Case("find.direct_logit_attribution", attribution("head"), DLA, label="head", needs="attn.z"),
    Case("find.direct_logit_attribution", attribution("neuron"), DLA, label="neuron", needs="mlp.act"),
    Case("find.direct_logit_attribution", attribution("expert"), DLA, label="expert", needs="experts.out"),
    Case("find.direct_logit_attribution", attribution("layer"), DLA, label="layer"),
    Case(
        "find.arithmetic_heads",
        lambda m, t, **o: pb.find.arithmetic_heads(m, marked(t), **{"all_prompts": True, **o}),
        ("effect", "effect_frozen", "operands"),
        needs="attn.pattern",
    ),
    Case(
        "find.attention_sinks",
        lambda m, t, **o: pb.find.attention_sinks(m, t, **{"epsilon": 0.2, "length": 12, **o}),
        ("rate", "alpha", "key_norm", "uniform"),
        needs="attn.pattern",
    ),
    Case(
        "find.binding_heads",
        lambda m, t, **o: pb.find.binding_heads(m, marked(t), **o),
        ("score", "partner", "answer"),
        needs="attn.pattern",
    ),
    Case("find.duplicate_token_heads", pb.find.duplicate_token_heads, ("score", "uniform"), needs="attn.pattern"),
    Case(
        "find.function_vectors",
        lambda m, t, **o: pb.find.function_vectors(m, twinned(t), **{"top": 2, "draws": 2, **o}),
        needs="attn.z",
    ),
    Case("find.fact_heads", pb.find.fact_heads, ("slope", "attribution", "stated_without"), needs="attn.z"),
    Case("find.ngram_heads", pb.find.ngram_heads, ("excess", "uniform"), needs="attn.pattern"),
    Case(
        "find.retrieval_heads",
        lambda m, t, **o: pb.find.retrieval_heads(m, marked(t), **{"all_runs": True, **o}),
        ("score", "activation"),
        needs="attn.pattern",
    ),
    Case(
        "find.copy_suppression_heads",
        pb.find.copy_suppression_heads,
        ("suppression", "without_first", "attention"),
        needs="attn.pattern",
    ),
    Case("find.head_importance", importance("head_importance"), ("importance", "norm", "loss"), needs="attn.z"),
    Case("find.inhibition_heads", inhibition, ("inhibition", "effect", "looks_at_wrong"), needs="attn.pattern"),
    Case("find.mod_features", ordinal("mod_features", modulus=4), runs=False, needs="attn.z"),
    Case(
        "find.name_mover_heads",
        pb.find.name_mover_heads,
        ("moved", "moved_wrong", "elsewhere", "attention", "copy"),
        needs="attn.pattern",
    ),
    Case("find.neuron_importance", importance("neuron_importance"), ("importance", "output", "loss"), needs="mlp.act"),
    Case("find.observable_propagation", propagation(), ("score", "effect", "vector"), needs="attn.pattern"),
    Case(
        "find.observable_propagation",
        propagation(path=["L1.mlp"]),
        ("score", "effect"),
        label="path",
        needs="attn.pattern",
    ),
    Case("find.successor_heads", ordinal("successor_heads"), runs=False, needs="attn.z"),
    Case("find.induction_heads", pb.find.induction_heads, ("score", "uniform"), needs="attn.pattern"),
    Case(
        "find.logit_lens",
        lambda m, t, **o: pb.find.logit_lens(m, t, **{"positions": 2, **o}),
        LENS,
    ),
    Case(
        "find.features",
        lambda m, t, **o: pb.find.features(m, t, saved(NAMES[id(m)]), **{"draws": 1, **o}),
        ("effect", "error", "total", "score"),
        on=FEW_TWINS,
    ),
    Case(
        "find.relevance",
        lambda m, t, **o: pb.find.relevance(m, t, **{"site": "attn_out", **o}),
        ("relevance", "score", "biases"),
        on=tuple(name for name in TWINS if name != "bloom"),  # refused: no rule for what it computes
    ),
    Case("find.token_rewards", rewarded),
    Case("find.relation_embedding", related_by, own=True, on=FEW_TWINS),
    Case("find.tree_probe", parsed, own=True, on=FEW_TWINS),
    Case("find.tuned_lens", tuned_lens, (*LENS, "aligned")),
    Case("find.jacobian_lens", jacobian_lens, LENS),
    Case("find.patchscopes", patched_in, on=FEW_TWINS),
    Case("find.previous_token_heads", pb.find.previous_token_heads, ("score", "uniform"), needs="attn.pattern"),
    Case("find.concept_depth", depth),
    Case(
        "find.concept_depth",
        lambda m, t, **o: depth(m, t, **{"conditions": ["noise 0.5", "int4"], "draws": 1, **o}),
        label="conditions",
    ),
    Case("find.isotropy", lambda m, t, **o: pb.find.isotropy(m, t, **{"draws": 20, **o})),
    Case("find.key_clusters", clusters),
    Case("find.language_similarity", translated),
    Case(
        "find.latent_language",
        lambda m, t, **o: pb.find.latent_language(m, t, HALVES, **{"draws": 3, **o}),
        ("entropy", "energy"),
    ),
    Case(
        "find.attribution_graph",
        graphs,
        needs="mlp.act",
    ),
    Case(
        "find.feature_names",
        lambda m, t, **o: pb.find.feature_names(m, t, ["L0.N3", "L1.N5"], **{"draws": 1, **o}),
        needs="mlp.act",
    ),
    Case("find.prior_layers", priors),
    Case("find.word_classes", lambda m, t, **o: pb.find.word_classes(m, t, HALVES, **{"draws": 5, **o})),
    Case("decode.beam", decoded("beam", beams=3)),
    Case("decode.best_of_n", decoded("best_of_n", drafts=3)),
    Case("decode.samplers", decoded("samplers", chain=["top_k(5)", "xtc()"])),
    Case("decode.compare", decoded("compare", decoders=["greedy", "contrastive_search(k=3)"])),
    Case("decode.contrastive_decoding", decoded("contrastive_decoding", amateur=turned, beta=0.5)),
    Case("decode.contrastive_search", decoded("contrastive_search", k=3)),
    Case("decode.dexperts", decoded("dexperts", expert=turned, antiexpert=lambda m: turned(m).at(2.0), alpha=0.5)),
    Case("decode.diverse_beam", decoded("diverse_beam", beams=4, groups=2)),
    Case("decode.dola", decoded("dola", layers=[0, 1])),
    Case("decode.knn", nearest("knn", weight=0.6, temperature=0.5, neighbours=5)),
    Case("decode.knn_parts", nearest("knn_parts", neighbours=5, cells=[3, 2]), own=True),
    Case("decode.longheads", decoded("longheads", window=2, chunks=3), needs="attn.turn"),
    Case("decode.navigate", decoded("navigate", push=1.0, per_round=2, rounds=2)),
    Case("decode.rerank", decoded("rerank", scorer="logp", pool=[2, 2, 2])),
    Case("decode.rule_adapter", decoded("rule_adapter")),
    Case(
        "decode.speculative", decoded("speculative", draft=turned, ahead=2, chain=["top_k(20)"]), needs="attn.pattern"
    ),
    Case("decode.superposed", decoded("superposed", drafts=2, texts=TEXTS)),
    Case("decode.watermark", decoded("watermark")),
    Case("measure.dictionary", measured, own=True, on=FEW_TWINS),
    Case("measure.dose_response", dose_response, SHARES),
    Case("prove.ablation", ablation("zero"), ("effect", "joint", "score", "random", "accuracy"), label="zero"),
    Case("prove.ablation", ablation("mean"), label="mean"),  # the mean is of the prompts at hand: no mean over them
    Case("prove.ablation", ablation("resample"), ("effect", "joint", "random"), label="resample"),
    Case(
        "prove.acdc",
        lambda m, t, **o: pb.prove.acdc(m, cut_short(t), **{"threshold": 9.0, "draws": 1, **o}),
        own=True,
        on=FEW_TWINS,
    ),
    Case("prove.causal_scrubbing", scrubbing, own=True, on=FEW_TWINS),
    Case("prove.activation_patching", patching(positions="marks"), PATCHED, label="stream"),
    Case("prove.activation_patching", patching(site="head", way="noising"), PATCHED, label="head", needs="attn.z"),
    Case(
        "prove.activation_patching",
        patching(site="neuron", parts=["L0.N3", "L1.N5"]),
        PATCHED,
        label="neuron",
        needs="mlp.act",
    ),
    Case("prove.attention_knockout", knockout, ("relative", "change", "everywhere"), needs="attn.pattern"),
    Case(
        "prove.causal_tracing",
        lambda m, t, **o: pb.prove.causal_tracing(m, asked_of(t), **{"draws": 1, "positions": "subject", **o}),
    ),
    Case("prove.cross_model_patching", across, ("effect", "joint", "gap", "score_base", "random"), second="tuned"),
    Case(
        "prove.das",
        searched,
        own=True,
        on=FEW_TWINS,
    ),
    Case(
        "prove.desiderata_mask",
        lambda m, t, **o: pb.prove.desiderata_mask(m, t, **{"steps": 6, "draws": 2, **o}),
        needs="attn.z",
    ),
    Case(
        "prove.fit_mechanisms", lambda m, t, **o: pb.prove.fit_mechanisms(m, bound(t), **{"steps": 5, "draws": 1, **o})
    ),
    Case("prove.graph_ablation", without_graphs, own=True, needs="mlp.act"),
    Case(
        "prove.interchange", lambda m, t, **o: pb.prove.interchange(m, bound(t), **o), ("share", "probability", "base")
    ),
    Case(
        "prove.knockout_curve",
        lambda m, t, **o: pb.prove.knockout_curve(m, t, part_of(m), **{"draws": 3, "by": "zero", **o}),
        ("effect", "singles", "null_mean", "accuracy", "score"),
    ),
    Case(
        "prove.channel",
        gate(),
        ("removed", "edge", "restored", "effect", "accuracy", "score"),
        label="key",
        needs="attn.z",
    ),
    Case("prove.channel", gate("L0.H1.C2>unembed", by="mean", n_components=2), label="logits", needs="attn.z"),
    Case("prove.path_patching", path("logits"), (*PATCHED, "joint", "mlp", "relative"), needs="attn.z"),
    Case("prove.path_patching", path("L1.H1"), (*PATCHED, "joint"), label="receiver", needs="attn.z"),
    Case(
        "prove.attribution_patching",
        lambda m, t, **o: pb.prove.attribution_patching(m, t, **{"exact": True, **o}),
        ("effect", "exact", "clean", "corrupted"),
        needs="attn.z",
    ),
    Case(
        "prove.atp_star",
        lambda m, t, **o: pb.prove.atp_star(m, t, **{"site": "query", **o}),
        ("score", "effect", "plain", "clean", "corrupted"),
        needs="attn.pattern",
    ),
    Case("prove.edge_attribution", pb.prove.edge_attribution, ("effect", "from_embed", "gap", "clean", "corrupted")),
    Case("prove.circuit", lambda m, t, **o: pb.prove.circuit(m, t, **{"scores": part_of(m), "draws": 2, **o})),
    Case(
        "turn.channel",
        lambda m, t, **o: pb.turn.channel(m, "L0.H1.C2", **{"strength": 0.5, **o}),
        runs=False,
        needs="attn.z",
    ),
    Case("turn.set_prompt", set_prompt, ("score", "plain_score"), needs="attn.mask"),
    Case("train.dictionary", trained, own=True, on=FEW_TWINS),
    Case("train.tuned_lens", trained_lens, own=True, on=FEW_TWINS),
    Case("train.response_tuning", responses, own=True, on=("gpt2", "llama", "mixtral")),
    Case(
        "train.subspace_fusion",
        lambda m, t, **o: pb.train.subspace_fusion(m, second(m), t, **{"steps": 2, "rate": 1.0, **o}),
        second="tuned",
        on=("gpt2", "llama", "mixtral"),
    ),
    Case(
        "train.tune_parts", lambda m, t, **o: pb.train.tune_parts(m, t, part_of(m), **{"steps": 2, **o}), label="heads"
    ),
    Case("train.tune_parts", lambda m, t, **o: pb.train.tune_parts(m, t, "L1", **{"steps": 2, **o}), label="layer"),  # type: ignore[arg-type]
    Case("train.variant", variants, own=True, on=("gpt2", "mixtral")),
    Case("turn.block", lambda m, t, **o: pb.turn.block(m, "1:3", **o), runs=False, needs="attn.pattern"),
    Case(
        "turn.clamp",
        lambda m, t, **o: pb.turn.clamp(m, "L1.N3", 1.0, **o),  # type: ignore[arg-type]
        runs=False,
        label="neuron",
        needs="mlp.act",
    ),
    Case(
        "turn.clamp",
        lambda m, t, **o: pb.turn.clamp(m, "L1", 1.0, **{"coordinate": 2, "texts": TEXTS, **o}),  # type: ignore[arg-type]
        runs=False,
        label="stream",
    ),
    Case("turn.context_knob", intents),
    Case(
        "turn.cut",
        lambda m, t, **o: pb.turn.cut(
            m, [f"L{i}.N{n}" for i in range(m.n_layers) for n in (1, 4)], TEXTS, **{"draws": 1, **o}
        ),  # type: ignore[arg-type, misc]
        own=True,
        on=("gpt2", "llama", "phi"),
    ),
    Case(
        "turn.project",
        lambda m, t, **o: pb.turn.project("L1.resid_out", torch.ones(m.d_model), model=m, **o),  # type: ignore[arg-type]
        runs=False,
    ),
    Case(
        "turn.remove_direction", lambda m, t, **o: pb.turn.remove_direction(m, torch.ones(m.d_model), **o), runs=False
    ),
    Case(
        "turn.route",
        lambda m, t, **o: pb.turn.route(m, "L1.E0", **{"texts": TEXTS, **o}),  # type: ignore[arg-type]
        runs=False,
        needs="experts.out",
    ),
    Case(
        "prove.mean_mask",
        lambda m, t, **o: pb.prove.mean_mask(m, t, **{"steps": 2, "draws": 1, "loss": 1e3, **o}),
        on=("gpt2", "llama", "phi", "mixtral"),
    ),
    Case("turn.persona_vector", answering, own=True, on=("gpt2", "gemma2", "mixtral", "mamba2")),
    Case("turn.refusal_direction", refusing, own=True, on=("gpt2", "gemma2", "mixtral", "mamba2")),
    Case("turn.rewrite", rewriting, needs="mlp.act"),
    Case("turn.steer", lambda m, t, **o: pb.turn.steer(m, twinned(t), **o)),
    Case(
        "turn.neurofeedback",
        lambda m, t, **o: pb.turn.neurofeedback(m, t, **{"marks": ([60], [61]), "shots": [2], **o}),
    ),
    Case("turn.scale", lambda m, t, **o: pb.turn.scale(part_of(m), 0.5, model=m, **o), runs=False),
    *METERS,
]
WITHOUT = {"mamba2": ("attn.z", "attn.pattern", "mlp.act", "experts.out"), "mixtral": ("mlp.act",)}
WITHOUT |= {"bloom": ("experts.out", "attn.mask"), "gpt_neo": ("experts.out", "attn.mask")}  # ALiBi, a window in tokens
WITHOUT["mamba2"] += ("attn.mask",)
WITHOUT = {name: WITHOUT.get(name, ("experts.out",)) for name in TWINS}  # what a family lacks; these cases refuse there
for name in ("gpt2", "gemma2", "gpt_neo", "bloom", "mamba2"):  # positions that are learned, windows, distances, states
    WITHOUT[name] += ("attn.turn",)
BOTH = [
    pytest.param(c, name, id=f"{c}-{name}") for c in CASES for name in c.on or TWINS if c.needs not in WITHOUT[name]
]
FEW = [param for param in BOTH if param.values[1] in ("gpt2", "gemma2", "mixtral", "gpt_neo")]


def turns(params: list[Any], of: int) -> list[Any]:
    """One in `of` of the families of each case, by turns, and all of them in `make test-all`; a case of few has one."""
    by_case = [[param for param in params if param.values[0] is case] for case in CASES]
    return [param for i, own in enumerate(by_case) for param in by_turns(own, of=min(of, len(own)), start=i)]


RETURNED: dict[tuple[Case, str], Any] = {}


def returned(case: Case, name: str) -> Any:
    """What the case returns on this family, called once for all tests that only read it."""
    if (case, name) not in RETURNED:
        RETURNED[case, name] = case(lent(name), task(name))
    return RETURNED[case, name]


def on(case: Case, name: str = "gpt2") -> str:
    """That family, or one with experts for what needs them."""
    return "mixtral" if case.needs in ("experts.out", "attn.turn") else name


def of(case: Case, name: str) -> tuple[Case, pb.Model, pb.Task]:
    return case, lent(name), task(name)


def nearly(found: Tensor, expected: Tensor) -> Any:
    return close(found, expected, equal_nan=True)


# --- what is lent comes back as it was --------------------------------------------------------------


@pytest.mark.parametrize(("case", "name"), by_turns(turns(BOTH, 4), of=3))
def test_the_model_and_all_else_are_left_as_they_were(case: Case, name: str) -> None:
    RETURNED[case, name] = checks.leaves_all_as_it_was(*of(case, name))


@pytest.mark.parametrize(("case", "name"), by_turns(turns([p for p in FEW if p.values[0].runs], 4), of=2))
def test_also_after_an_exception(case: Case, name: str) -> None:
    checks.also_after_an_exception(*of(case, name))


@pytest.mark.parametrize("case", [c for c in CASES if c.runs], ids=str)
def test_also_when_hooks_cannot_all_be_put_on(case: Case) -> None:
    if case.second:
        other(on(case))  # proved before hooks fail
    assert checks.also_when_hooks_fail(*of(case, on(case))), "it puts no hook on the second layer"


@pytest.mark.parametrize("case", by_turns([c for c in CASES if c.runs], of=3, start=1), ids=str)
def test_train_and_grad_modes_stay(case: Case) -> None:
    checks.modes_stay(*of(case, on(case, "llama")))


@pytest.mark.parametrize("case", by_turns(CASES, of=4), ids=str)
def test_two_threads_at_once_see_what_each_sees_alone(case: Case) -> None:
    name = on(case)
    alone = checks.threads_see_what_each_sees_alone(*of(case, name), returned(case, name))
    same = (
        "find.retrieval_heads",
        "measure.graph_planning",
    )  # there is nothing to retrieve, and no way is found, edited or not
    if case.runs and isinstance(alone[1], pb.Result) and case.method not in same:
        assert not checks.alike(*alone), "the edits change nothing"


# --- what comes back --------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "name"), by_turns(turns(FEW, 4), of=4))
def test_the_same_call_gives_the_same_whatever_the_random_state(case: Case, name: str) -> None:
    checks.same_again(*of(case, name), returned(case, name))


@pytest.mark.parametrize(("case", "name"), by_turns(turns([p for p in FEW if p.values[0].means], 2), of=3))
def test_a_batch_equals_its_prompts_one_by_one(case: Case, name: str) -> None:
    checks.a_batch_is_its_prompts(*of(case, name), returned(case, name), nearly)


@pytest.mark.parametrize(("case", "name"), by_turns(turns(FEW, 4), of=3, start=1))
def test_a_result_saves_loads_and_replays(case: Case, name: str, tmp_path: Path) -> None:
    model, found = lent(name), returned(case, name)
    checks.saves_loads_replays(case, model, found, tmp_path, second(model) if case.second else None)


@pytest.mark.parametrize(("case", "name"), by_turns(turns(FEW, 4), of=4))
def test_a_result_draws_itself(case: Case, name: str, tmp_path: Path) -> None:
    checks.draws_itself(returned(case, name), tmp_path)


@pytest.mark.parametrize(("case", "name"), turns(FEW, 4))
def test_provenance_says_where_the_numbers_came_from(case: Case, name: str) -> None:
    checks.says_where_it_came_from(*of(case, name), returned(case, name), METHODS[case.method])


# --- how it is called -------------------------------------------------------------------------------


def test_every_method_has_a_case() -> None:
    assert {case.method for case in CASES} == set(METHODS)
    assert {case.method.split(".")[0] for case in CASES} == set(ROOMS)


@pytest.mark.parametrize("name", METHODS)
def test_signatures_are_typed_and_options_keyword_only(name: str) -> None:
    checks.is_typed(METHODS[name])
    module = inspect.unwrap(METHODS[name]).__module__
    assert importlib.import_module(module).__name__ == f"patchbay.{name}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_unknown_option_is_answered_with_the_options_there_are(case: Case) -> None:
    checks.an_unknown_option_is_answered(*of(case, on(case)), METHODS[case.method])


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_model_is_refused(name: str) -> None:
    checks.no_model_is_refused(METHODS[name], task("gpt2"))


@pytest.mark.parametrize("name", [n for n in METHODS if "batch_size" in checks.options_of(METHODS[n])])
def test_a_batch_of_no_prompts_is_refused(name: str) -> None:
    checks.no_prompts_at_a_time_are_refused(METHODS[name], lent("gpt2"), task("gpt2"))


@pytest.mark.parametrize("case", [c for c in CASES if c.runs and not c.own], ids=str)
def test_prompts_of_another_vocabulary_are_refused(case: Case) -> None:
    checks.another_vocabulary_is_refused(*of(case, on(case)))


@pytest.mark.parametrize("case", [c for c in CASES if c.needs], ids=str)
def test_a_family_without_the_signal_refuses(case: Case) -> None:
    lacking = [name for name in TWINS if case.needs in WITHOUT[name]]
    assert lacking
    for name in lacking:
        checks.a_family_without_it_refuses(*of(case, name))
