"""Claims about prompts: examples, glosses, histories, what is left of a context, judges that vote, functions and plans told in text.

Most of these papers prompt models that follow instructions. As in `behaviour`, the meter is run on words that a built-in model
knows, and the verdict names the command that would test the claim.
"""

from __future__ import annotations

import random
from typing import Any

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import ends, over_sets
from patchbay.papers.claims.behaviour import NAMES, elsewhere, known
from patchbay.papers.claims.meters import stories
from patchbay.papers.claims.readings import facts

SHARE = "share of items"


def asked(model: pb.Model, seed: int, n: int) -> list[dict[str, Any]]:
    """Capitals as questions with three choices."""
    listed = facts(model, seed, n)
    cities = [city for _, city in listed]
    return [
        {"prompt": f"The capital of {place} is", "choices": [f" {city}", f" {cities[i - 1]}", f" {cities[i - 2]}"], "answer": 0}
        for i, (place, city) in enumerate(listed)
    ]  # fmt: skip


@claim("chatterjee2024", "comparison")
def chatterjee2024(model: pb.Model, seed: int) -> Claim:
    """What two examples of who gave what do for capitals."""
    names = [name.strip() for name in known(model, NAMES)]
    source = [{"prompt": f"Then {a} and {b} met. {a} saw", "choices": [f" {b}", f" {a}"], "answer": 0} for a, b in zip(names[:8], names[8:16], strict=True)]  # fmt: skip
    found = pb.measure.cross_task(model, asked(model, seed, 16), source, join=". ", seed=seed)
    needs = elsewhere("cross-task gpt2 --items target.jsonl --source source.jsonl", "a model that learns from examples")
    return Claim("examples of another task help", *ends(found), 0.0, "nats", untestable=needs)


@claim("tan2025", "comparison")
def tan2025(model: pb.Model, seed: int) -> Claim:
    """Places asked as they are known, and after a text that gives them another capital: as a spelling with two meanings."""
    rows = []
    for row in asked(model, seed, 16):
        place, (own, other, _) = row["prompt"].split(" ")[3], row["choices"]
        rows.append({**row, "word": place, "type": "other"})
        rows.append({**row, "word": place, "type": "homograph", "prompt": f"{row['prompt']}{other}. {row['prompt']}", "answer": 1})  # fmt: skip
        rows.append({**row, "word": place, "type": "homograph", "prompt": f"{row['prompt']}{own}. {row['prompt']}"})
    found = pb.measure.word_types(model, rows, seed=seed)
    needs = elsewhere("word-types gpt2 --items words.jsonl", "a model of two languages, and their homographs")
    value, low, high = (float(found[name]) if name in found else float("nan") for name in ("difference", "difference_low", "difference_high"))  # fmt: skip
    return Claim("words of two meanings are harder than others", value, low, high, 0.0, SHARE, above=False, untestable=needs)  # fmt: skip


@claim("shen2025", "comparison")
def shen2025(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the sentence that a critic keeps answers more questions than one at random."""
    from patchbay import maths

    rows = []
    for row, text in zip(asked(model, seed, 20), stories(seed, 20), strict=True):
        pieces = [one for one in text.split(". ") if one][:3]
        context = f"{'. '.join(pieces[:2]).rstrip('.')}. {row['prompt']}{row['choices'][1]}. "
        rows.append({**row, "context": context, "question": row["prompt"], "answer": 1})
    found = pb.measure.context_compression(model, rows, keep=0.2, seed=seed)
    value, low, high = maths.bootstrap_interval(found["per_item"] - float(found["null"]), seed=seed)
    text_ = f"one sentence chosen by a critic (which sees the answer) answers more than one at random (all of them {float(found['full']):.2f})"
    return Claim(text_, value, low, high, 0.0, SHARE)


@claim("lu2024b", "comparison")
def lu2024b(model: pb.Model, seed: int) -> Claim:
    """What a gloss behind a place does, beyond the gloss of another."""
    glosses = {row["prompt"].split(" ")[3]: row["choices"][0].strip() for row in asked(model, seed, 16)}
    found = pb.measure.prompt_change(model, asked(model, seed, 16), glosses=glosses, seed=seed)
    needs = elsewhere("prompt-change gpt2 --items items.jsonl --glosses words.json", "a model of several languages")
    return Claim("glosses in prompts help", *ends(found), 0.0, "nats", untestable=needs)


@claim("piterbarg2023", "identity")
def piterbarg2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if histories told as differences come back byte for byte; that agents learn more of them is not asked here."""
    from patchbay.measure.prompt_change import diffed, undiffed

    def same(at: int) -> float:
        chance, hits = random.Random(f"history-{at}"), 0
        lines = [*stories(at, 4), "", "-", "@@ -1 +1 @@", " \\"]
        for _ in range(50):
            history = ["\n".join(chance.choices(lines, k=chance.randrange(6))) for _ in range(4)]
            hits += undiffed(diffed(history)) == history
        return hits / 50

    return Claim("a history told as differences holds all of it", *over_sets(same, seed), 0.999, "share of histories")


@claim("lee2023", "mechanism")
def lee2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if words that were put in place of a text's own are those a trained model doubts, beyond how many it doubts."""

    def beyond(at: int) -> float:
        chance, rows = random.Random(f"guess-{at}"), []
        for one in stories(at, 8):
            words = one.split(" ")[:14]
            if len(words) < 8:
                continue
            place = chance.randrange(4, len(words) - 1)
            other = [word for word in words[1:place] if word.isalpha() and word.islower() and word != words[place]]
            wrong = [*words[:place], chance.choice(other or words[place : place + 1]), *words[place + 1 :]]
            if wrong[place] != words[place]:
                rows.append({"prompt": " ".join(words[:3]), "guess": " " + " ".join(wrong[3:]), "truth": " " + " ".join(words[3:])})  # fmt: skip
        found = pb.measure.doubtful_tokens(model, rows, tau=0.05, seed=at)
        return float(found.values - found["null"])

    text = "wrong tokens are among those with a probability below .05, beyond the share of all tokens that are"
    return Claim(text, *over_sets(beyond, seed), 0.0, "share of wrong tokens")


@claim("zhang2023", "comparison")
def zhang2023(model: pb.Model, seed: int) -> Claim:
    """Whether the majority of a model behind three names is right more often than one of them."""
    from patchbay import maths

    roles = [f"Then {name.strip()} spoke. " for name in known(model, NAMES)[:3]]
    found = pb.measure.judge_network(model, asked(model, seed, 16), roles, seed=seed)
    interval = maths.bootstrap_interval(found["per_item"] - float(found["null"]), seed=seed)
    needs = elsewhere(
        "judge-network gpt2 --items judged.jsonl --roles @roles.txt",
        "a model that judges answers, and people's judgements",
    )
    return Claim("judges that vote are right more often than one", *interval, 0.0, SHARE, untestable=needs)


@claim("bigoulaeva2025", "comparison")
def bigoulaeva2025(model: pb.Model, seed: int) -> Claim:
    """Whether tasks that one built-in model does well with examples are those that another does well without."""
    rows: list[dict[str, Any]] = []
    for row in asked(model, seed, 8):
        question, (_, other, third) = row["prompt"], row["choices"]
        told = {"memory": "", "stated": f"{question}{other}. ", "later": f"{question}{other}. Then Mary ran. ", "twice": f"{question}{other}. {question}{third}. "}  # fmt: skip
        answers = {"memory": 0, "stated": 1, "later": 1, "twice": 2}
        rows += [{**row, "prompt": before + question, "answer": answers[name], "group": name} for name, before in told.items()]  # fmt: skip
    found = pb.measure.score_convergence(model, rows, pb.load("tiny-llama"), k=1, join=". ", seed=seed)
    needs = elsewhere("score-convergence gpt2 --items tasks.jsonl --other TUNED", "a base model and its tuned form")
    return Claim("a tuned model's scores follow its base's after examples", *ends(found), 0.0, "correlation", untestable=needs)  # fmt: skip


@claim("bhattamishra2023", "comparison")
def bhattamishra2023(model: pb.Model, seed: int) -> Claim:
    """Conjunctions told by examples, to a model that has seen none."""
    from patchbay import maths

    found = pb.measure.boolean_functions(model, bits=3, pairs=6, functions=16, seed=seed)
    interval = maths.bootstrap_interval(found["per_item"] - float(found["null"]), seed=seed)
    needs = elsewhere("boolean-functions gpt2", "a model that was trained on functions, or a large one")
    text = f"conjunctions are learned from examples (elimination {float(found['elimination'].mean()):.2f})"
    return Claim(text, *interval, 0.0, "share of answers", untestable=needs)


@claim("momennejad2023", "comparison")
def momennejad2023(model: pb.Model, seed: int) -> Claim:
    """Ways through trees of seven rooms, beside a random walk's."""
    from patchbay import maths

    chance = random.Random(f"plan-{seed}")
    rows = [
        dict(zip(("start", "goal"), chance.sample("ABCDEFG", 2), strict=True)) | {"edges": "tree:7"} for _ in range(8)
    ]
    found = pb.measure.graph_planning(model, rows, per_prompt=2, max_new_tokens=8, seed=seed)
    interval = maths.bootstrap_interval(found["per_item"] - float(found["null"]), seed=seed)
    needs = elsewhere("graph-planning gpt2 --items graphs.jsonl", "a model that follows a question about a graph")
    return Claim("ways through a graph are shortest ones beyond a random walk's", *interval, 0.0, "share of ways", untestable=needs)  # fmt: skip
