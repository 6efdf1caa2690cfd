"""Claims about meters: what published evaluations say, asked of a small model.

Where a claim is of large models, data or classifiers that cannot be had at this size, the number is measured all the same and
the verdict says what would test it.
"""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING, Any

import patchbay as pb
from patchbay.papers.claims._claim import TRAINED, Claim, claim
from patchbay.papers.claims._shared import LEVEL, N, ends_of, student
from patchbay.papers.claims.training import difference, trained

if TYPE_CHECKING:
    from torch import Tensor


def stories(seed: int, n: int = N) -> list[str]:
    """Held-out text of the kind that the built-in models were trained on."""
    from patchbay.tiny import text

    made = text.documents(seed, held_out=True)
    return [next(made).text for _ in range(n)]


def shuffled(texts: list[str], seed: int) -> list[str]:
    """The same words of each text in another order, the first where it was."""
    chance = random.Random(f"shuffled-{seed}")
    found = []
    for one in texts:
        first, *words = one.split(" ")
        chance.shuffle(words)
        found.append(" ".join([first, *words]))
    return found


READ, STEPS = (0, 20, 40, 50, 60, 80, 110), 160  # steps after which a network is asked, and its last
LAWS, ITEMS, CHOICES, PROMPT = (
    8,
    40,
    4,
    12,
)  # laws that it reads, and as many others; items of each, their choices and tokens
ROWS = 4  # of each law in a batch


@claim("correa2024", "made", seeds=TRAINED)
def correa2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the accuracy on benchmarks of laws that a network reads follows the tokens read, in ranks over readings of one training, more than that on benchmarks of laws over the same tokens that it never reads.
    Told beside it: how many of either are beyond chance by `measure.benchmark_signal`, whose p takes readings for draws in any order: what drifts through one training may pass it. Portuguese and its benchmarks are not
    asked. Steps were chosen on another seed, so that the network is at chance first and learns between readings. Before, this check asked whether texts cost fewer bits than their tokens' frequencies say."""
    found = _followed(seed)
    rho = {name: [row["rho"] for row in rows] for name, rows in found.items() if name != "losses"}
    clear = {name: sum(row["q"] < LEVEL for row in found[name]) for name in rho}
    ends = {name: sum(row["last"] for row in found[name]) / LAWS for name in rho}
    mean = {name: sum(each) / LAWS for name, each in rho.items()}
    losses = found["losses"]
    text = (
        f"while the loss of a network goes from {losses[0]:.2f} to {losses[-1]:.2f} nats a token over {len(losses)} readings, the accuracy on benchmarks of {LAWS} laws that it reads has a rank correlation of {mean['read']:.2f} with the tokens read ({clear['read']} of {LAWS} beyond "
        f"chance; {ends['read']:.0%} right at the end), and that on {LAWS} laws over the same tokens that it never reads {mean['other']:.2f} ({clear['other']} of {LAWS}; {ends['other']:.0%} right, {1 / CHOICES:.0%} by chance)"
    )
    return Claim(text, *student([a - b for a, b in zip(rho["read"], rho["other"], strict=True)]), 0.0, "correlation")


@functools.cache
def _followed(seed: int) -> dict[str, Any]:
    """`read` and `other`: the rows of `measure.benchmark_signal` for laws that a network reads and others; `losses`: what held-out texts of the former cost at each reading."""
    import tempfile

    import torch

    from patchbay.model.source import quietly
    from patchbay.tiny import domains, lab

    network = lab.small(domains.N_TOKENS + 2 * LAWS, width=48, mlp=96, positions=domains.LENGTH, seed=seed)
    held = torch.cat([domains.texts(law, ROWS, seed=seed) for law in range(LAWS)])
    losses, folders = list[float](), list[str]()

    def nats(hf: Any, ids: Tensor) -> Tensor:
        """Nats a token; nothing tells a text's first word."""
        logits = hf(ids, use_cache=False).logits[:, 1:-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())

    with tempfile.TemporaryDirectory(prefix="patchbay-readings-") as folder:

        def loss(hf: Any, step: int) -> Tensor:
            if step in READ:
                losses.append(nats(hf, held).item())
                folders.append(f"{folder}/{step}")
                with quietly():
                    hf.save_pretrained(folders[-1])
            drawn = [domains.texts(law, ROWS, seed=10**6 * (seed + 1) + step) for law in range(LAWS)]
            return nats(hf, torch.cat(drawn))

        for one in network.hf.parameters():
            one.requires_grad_()
        with torch.enable_grad():
            last = lab.fitted(network, loss, STEPS, rate=1e-2)
        with torch.no_grad():
            losses.append(nats(last.hf, held).item())
        rows = [row for law in range(2 * LAWS) for row in asked_of_law(law, seed)]
        found = pb.measure.benchmark_signal(last, rows, folders, [*READ, STEPS], seed=seed)
    table = {int(row["benchmark"]): row for row in found.tables["benchmarks"]}
    return {"read": [table[law] for law in range(LAWS)], "other": [table[law] for law in range(LAWS, 2 * LAWS)], "losses": losses}  # fmt: skip


def asked_of_law(law: int, seed: int) -> list[dict[str, Any]]:
    """Items of a law of `tiny.domains`: which of four tokens follows a text; one of them is the likeliest, the others never follow its last token."""
    from patchbay.tiny import domains

    rng, followers, items = random.Random(f"asked {law} {seed}"), domains.law(law), []
    for ids in domains.texts(law, ITEMS, seed=-1 - seed)[:, :PROMPT].tolist():
        own = followers[ids[-1]].tolist()
        choices = [own[0], *rng.sample([token for token in range(domains.N_TOKENS) if token not in own], CHOICES - 1)]
        rng.shuffle(choices)
        items.append({"prompt": ids, "choices": [[token] for token in choices], "answer": choices.index(own[0]), "group": str(law)})  # fmt: skip
    return items


@claim("wiegreffe2023", "mechanism")
def wiegreffe2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if most answers cannot be changed by the probability that other spellings took."""
    task = pb.tasks.facts_in_memory(model, seed=seed)
    found = pb.measure.answer_choices(model, task, read="unaffected", seed=seed)
    text_ = f"of {len(task)} facts most are answered alike whatever other spellings took (the choices hold {float(found['mass'].mean()):.0%})"
    return Claim(text_, *ends_of(found, "value", "low", "high"), 0.5, "share of items")


@claim("someya2023", "mechanism")
def someya2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if a model finds texts likelier than the same words in another order, beyond what their lengths give."""
    from patchbay import maths

    good = [one for one in stories(seed) if len(set(one.split(" "))) > 3]
    pairs = [{"good": a, "bad": b} for a, b in zip(good, shuffled(good, seed), strict=True) if a != b]
    found = pb.measure.minimal_pairs(model, pairs, seed=seed)
    value, low, high = maths.bootstrap_interval(found["per_item"] - float(found["null"]), seed=seed)
    return Claim(
        "texts are likelier than the same words in another order, beyond what length gives",
        value,
        low,
        high,
        0.0,
        "share of pairs",
    )


# --- labels --------------------------------------------------------------------------------------------

TOPICS, KNOWN, LONG = 8, 64, 24  # topics of eight words each among the known words, and tokens of a text
NAMES, UNREAD = (
    [KNOWN + i * TOPICS + topic for topic in range(TOPICS)] for i in range(2)
)  # tokens that name topics, and such that no text says
SIZES, TOLD = (8, 32, 128, 512), 200  # examples that are labelled, and other texts whose labels are asked
WITHIN = 1e-5  # relative error of a label's probability among labels, in float32


@claim("clavie2025", "made", seeds=TRAINED)
def clavie2025(model: pb.Model, seed: int) -> Claim:
    """Confirmed if texts are labelled right more often by a network that was tuned to say labels which it knows as words than by the better of a linear probe of its last state and the same tuning with labels that it never
    read, which have to be learned as the rows of a classification head are: mean over 8, 32, 128 and 512 examples; and if the probability of a label among the labels, as it is scored and as it is learned, is its share of
    the labels' probability among all tokens, in whatever order they are asked. Told beside it: the network before it was tuned, and labels dealt to other examples, each by number of examples. The paper's models are
    masked ones, tuned on instructions and asked MMLU. The rate was chosen on another seed; before, this check asked of the identity alone."""
    found, error = _labelled(seed)
    told = {name: ", ".join(f"{float(one):.0%}" for one in some.mean(1)) for name, some in found.items()}
    mean = {name: some.mean(0) for name, some in found.items()}  # [text]
    better = max(("probe", "unread"), key=lambda name: float(mean[name].mean()))
    text = (
        f"in networks of 50,000 weights that are asked which of {TOPICS} topics a text has, after {', '.join(map(str, SIZES))} examples {told['names']} are right by labels that name the topics in what was read ({told['before'].split(',')[0]} before), {told['unread']} by "
        f"labels that were never read, {told['probe']} by a linear probe and {told['dealt']} by names dealt to other examples; a label has among labels its share of all tokens' probability to {error:.1g}"
    )
    value, low, high = difference(mean["names"], mean[better])
    return Claim(text, value, low if error < WITHIN else min(low, 0.0), high, 0.0, "share of texts")


@functools.cache
def _labelled(seed: int) -> tuple[dict[str, Tensor], float]:
    """Right or wrong [size, text] by each way to label, and the largest relative error of a label's probability among labels."""
    import torch

    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    read = [ids for ids, _ in topical(2000, seed, named=True)]
    start = lab.small(KNOWN + 2 * TOPICS, width=48, mlp=96)
    network: Any = trained(start, read, lambda tuned: tuned, seed, {"one": Arm()}, fresh=True, steps=200, batch_size=16)["one"]  # type: ignore[arg-type, return-value]  # fmt: skip
    examples, held = topical(max(SIZES), seed + 1000), topical(TOLD, seed + 2000)
    dealt = [topic for _, topic in examples]
    random.Random(f"dealt {seed}").shuffle(dealt)
    found: dict[str, list[Tensor]] = {name: [] for name in ("names", "unread", "dealt", "probe", "before")}
    for size in SIZES:
        some = examples[:size]
        others = [(ids, topic) for (ids, _), topic in zip(some, dealt, strict=False)]
        for name, labels, labelled in (("names", NAMES, some), ("unread", UNREAD, some), ("dealt", NAMES, others)):
            documents = [[ids, [labels[topic]]] for ids, topic in labelled]
            arm = Arm(f"label-supervision:classes={'+'.join(map(str, labels))}")
            right = functools.partial(labelled_right, held=held, labels=labels)
            tuned = trained(network, documents, right, seed, {"one": arm}, steps=30, batch_size=8, rate=1e-3)
            found[name].append(tuned["one"])
        found["probe"].append(probed_right(network, some, held))
        found["before"].append(labelled_right(network, held=held, labels=NAMES))
    errors = label_errors(network, [ids for ids, _ in held[:24]], NAMES, seed)
    return {name: torch.stack(some) for name, some in found.items()}, float(errors.max())


def topical(n: int, seed: int, *, named: bool = False) -> list[tuple[list[int], int]]:
    """Texts and their topics: a third of the words are of the topic, the others follow the last word by the chances of one language; an eighth of the words of `named` texts name the topic."""
    import torch

    language = (torch.rand(KNOWN, KNOWN, generator=torch.Generator().manual_seed(0)) ** 6).tolist()
    rng, found = random.Random(f"topical {seed}"), []
    for _ in range(n):
        topic, ids, last = rng.randrange(TOPICS), list[int](), rng.randrange(KNOWN)
        for _ in range(LONG):
            if named and rng.random() < 1 / 8:
                ids.append(NAMES[topic])
                continue
            own = rng.random() < 1 / 3
            last = 8 * topic + rng.randrange(8) if own else rng.choices(range(KNOWN), language[last])[0]
            ids.append(last)
        found.append((ids, topic))
    return found


def labelled_right(model: pb.Model, *, held: list[tuple[list[int], int]], labels: list[int]) -> Tensor:
    """1 where the label of a text's topic is the likeliest of the labels after it, [text]."""
    choices = [[label] for label in labels]
    found = pb.measure.answer_choices(model, [{"prompt": ids, "choices": choices, "answer": topic} for ids, topic in held])  # fmt: skip
    right: Tensor = found["per_item"].double()
    return right


def probed_right(model: pb.Model, some: list[tuple[list[int], int]], held: list[tuple[list[int], int]]) -> Tensor:
    """1 where a logistic regression on the last layer's state after each text says its topic, [text]."""
    import torch

    from patchbay.find._probe import logistic, scaled

    port = pb.Port("resid_out", model.n_layers - 1)
    states = pb.run(model, [ids for ids, _ in [*some, *held]], taps=[port], logits="last")[port][:, -1]
    x, topics = scaled(states.cpu()), torch.tensor([topic for _, topic in [*some, *held]])
    fit = logistic(x, topics[None], (torch.arange(len(x)) < len(some))[None])
    said = (x[len(some) :] @ fit.weights[0] + fit.intercepts[0]).argmax(1)
    return (said == topics[len(some) :]).double()


def label_errors(model: pb.Model, texts: list[list[int]], labels: list[int], seed: int) -> Tensor:
    """How far the probability of a label among the labels is from its share among all tokens, as each of `label_scores` has it: the largest relative error [text]."""
    import torch

    whole = torch.softmax(pb.run(model, texts, logits="last").last_logits.double().cpu(), -1)[:, labels]
    rng = random.Random(f"labels {seed}")
    own = label_scores(model, texts, labels, [rng.sample(range(len(labels)), len(labels)) for _ in texts])
    return torch.stack([(one / (whole / whole.sum(1, keepdim=True)) - 1.0).abs().amax(1) for one in own]).amax(0)


def label_scores(model: pb.Model, texts: list[list[int]], labels: list[int], order: list[list[int]]) -> list[Tensor]:
    """The probability of each label among the labels [text, label]: scored as answers, scored as answers in an order of each text's own, and as the label-supervision objective has it."""
    import torch

    from patchbay.measure._answers import outcomes
    from patchbay.train._objectives import objective

    found = []
    for orders in ([[*range(len(labels))]] * len(texts), order):
        scores = outcomes(model, texts, [[[labels[i]] for i in each] for each in orders])
        among = scores.logp.exp() / scores.mass[:, None]
        found.append(torch.empty_like(among).scatter_(1, torch.tensor(orders), among))
    aim = objective(f"label-supervision:classes={'+'.join(map(str, labels))}")
    learned = [aim.scores(model, [[ids, [label]] for ids in texts]) for label in labels]
    return [*found, (-torch.stack(learned, 1)).exp()]
