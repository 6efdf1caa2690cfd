"""Claims about layers and the vocabulary: where something can be read, and in which words."""

from __future__ import annotations

import random

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import N, known_words, over_sets, stories
from patchbay.signal.port import PatchbayError
from patchbay.tasks import words
from patchbay.tasks.spell import tokenizer_of


@claim("jin2024", "mechanism")
def jin2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if who was spoken of last is read from the stream in earlier layers than who has not been spoken of again.

    Of the same prompts, and both a half of the names: only the second has to be inferred. The depth is the mean over layers of
    the accuracy that is still to come, as a share of all that comes.
    """
    half = {f" {name}" for name in sorted(words.NAMES)[: len(words.NAMES) // 2]}

    def gap(at: int) -> float:
        task = pb.tasks.indirect_object(model, 150, seed=at)
        simple = [model.decode([ids[places[0]]]) for ids, places in zip(task.clean, task.marks["s2"], strict=True)]
        hard = [model.decode([token]) for token in task.right]
        return _depth(model, task, [name in half for name in hard]) - _depth(
            model, task, [name in half for name in simple]
        )

    text = "the name that has to be inferred is read later in the depth than the name that was said last"
    return Claim(text, *over_sets(gap, seed), 0.0, "of the depth")


def _depth(model: pb.Model, task: pb.Task, truth: list[bool]) -> float:
    """Where in the depth a probe's accuracy comes: 0 all in the embedding, 1 all in the last layer."""
    found = pb.find.concept_depth(model, task, [str(label) for label in truth], draws=1)
    so_far = found["accuracy"].cummax(0).values
    gain = float(so_far[-1] - found["chance"])
    if gain < 0.1:
        raise PatchbayError(
            f"a half of the names is read right in {float(so_far[-1]):.0%} of the prompts at best, chance is {float(found['chance']):.0%}: "
            "what cannot be read has no depth"
        )
    return float((so_far[-1] - so_far[:-1]).mean()) / gain


BRACKETED = (  # sentences of the built-in models' text, with their trees
    "(S (NP {first}) (VP saw (NP {article} {thing}) (PP near (NP the {place}))))",
    "(S (NP {first}) (VP put (NP the {thing}) (PP under (NP the {thing2}))))",
    "(S (NP {second}) (VP said (C that (S (NP the {animal}) (VP was (AP very {adjective}))))))",
    "(S (NP {first}) (VP wanted (VP to (VP buy (NP the {thing}) (PP from (NP the {place}))))))",
    "(S (NP {second}) (VP looked (PP for (NP the {adjective} {thing}))))",
    "(S (NP Nobody) (VP knew (C why (S (NP the {thing}) (VP was (AP {adjective}))))))",
)


@claim("hernandezlopez2022", "mechanism")
def hernandezlopez2022(model: pb.Model, seed: int) -> Claim:
    """Confirmed if trees of sentences are read from a layer's subspace further than branching to the right, with each word's commonest
    labels, would give; the layer is chosen on other sentences."""
    tokenizer_of(model, "sentences")

    def found(at: int) -> pb.Result:
        rng, texts = random.Random(f"hernandezlopez2022-{at}"), []
        for i in range(2 * N):
            first, second = rng.sample(words.NAMES, 2)
            texts.append(BRACKETED[i % len(BRACKETED)].format(**words.fresh_words(rng, [first, second])))
        return pb.find.tree_probe(model, texts, kind="brackets", steps=60, draws=1, seed=at)

    best = int(found(seed + 1000).values[1:].argmax()) + 1
    row = found(seed)
    text = f"syntax trees are read from a subspace of layer {row.labels_of('layer')[best]} further than words and right branches say (sentences, not code)"
    gain, low, high = (float(row[name][best]) for name in ("gain", "gain_low", "gain_high"))
    return Claim(text, gain, low, high, 0.0, "F1")


@claim("nostalgebraist2020", "mechanism")
def nostalgebraist2020(model: pb.Model, seed: int) -> Claim:
    """Confirmed if every layer, from the embedding on, brings the lens nearer to what the model says in the end."""

    def least(at: int) -> float:
        found = pb.find.logit_lens(model, pb.tasks.indirect_object(model, N // 2, seed=at), positions=1)
        return float((-found["kl"][:, -1].diff()).min())

    text = "each layer's lens is nearer to the model's own output than the lens of the layer before: the least approach of all layers"
    return Claim(text, *over_sets(least, seed), 0.0, "nats")


@claim("peng2024", "mechanism")
def peng2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if tokens at ranks 11 to 100 lie in a cluster with one of the first ten more often than tokens in random order would."""

    def gap(at: int) -> float:
        rng = random.Random(f"peng2024-{at}")
        whole = model.encode(stories(N, at))
        cut = [ids[: rng.randint(min(5, len(ids)), len(ids))] for ids in whole]
        found = pb.find.key_clusters(model, cut, seed=at)
        return float(found["share"].mean() - found["null_mean"].mean())

    text = "tokens at ranks 11 to 100 crowd into the clusters of the ten most likely ones, more than tokens in random order"
    return Claim(text, *over_sets(gap, seed), 0.0, "share of tokens above chance")


@claim("su2022", "comparison")
def su2022(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the last states of a text's tokens are more than half as spread over directions as independent ones.

    Against one half, not against networks that were not trained: these are isotropic too.
    """
    found = pb.find.isotropy(model, stories(N, seed), seed=seed)
    value, low, high = (float(found[name][-1]) for name in ("isotropy", "low", "high"))
    text = "the model is isotropic: the last states of a text are more than half as spread as independent directions"
    return Claim(text, value, low, high, 0.5, "1 - cosine")


@claim("surendra2023", "mechanism")
def surendra2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if states cluster by the next word's class more in the last layer than in the embedding."""
    classes = {"name": words.NAMES, "thing": words.OBJECTS, "adjective": words.ADJECTIVES, "place": words.PLACES}
    tokens = {name: known_words(model, listed) for name, listed in classes.items()}

    def deeper(at: int) -> float:
        found = pb.find.word_classes(model, stories(N, at), tokens, draws=1, seed=at)
        return float(found["gdv"][-1] - found["gdv"][0])

    text = "clusters by the next word's class are clearer after the last layer than in the embedding"
    return Claim(text, *over_sets(deeper, seed), 0.0, "discrimination value", above=False)
