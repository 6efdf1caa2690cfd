"""Claims about which texts of a pool are taken: those that bring it nearest to a target, and those that are to bring back what a cut took.

The networks are the lab's own, from weights drawn by the seed, and the model at hand has no part.
"""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING, Any

import patchbay as pb
from patchbay.papers.claims._claim import TRAINED, Claim, claim
from patchbay.papers.claims.training import difference, trained

if TYPE_CHECKING:
    from torch import Tensor

    from patchbay.model.model import Model


def of_law(law: int, n: int, seed: int) -> list[list[int]]:
    """Texts of a law of `tiny.domains` without the token that names it."""
    from patchbay.tiny import domains

    found: list[list[int]] = domains.texts(law, n, seed=seed)[:, 1:].tolist()
    return found


# --- a target -----------------------------------------------------------------------------------------

COMMON, RARE = 1080, 120  # texts of the two laws in the pool
TAKEN = 60  # of them, by each way; as many make the target
HELD = 100
LAYERS = 3


@claim("kang2024", "made", seeds=TRAINED)
def kang2024(model: Model, seed: int) -> Claim:
    """Confirmed if a network that read a pool, a tenth of it texts of another law over the same tokens, loses less on held-out texts of that law after as many steps on texts that the gradient of a
    transport cost took from the pool than on those that the better of two other ways took: the nearest neighbours of the target's texts, and a draw. Told beside it: the law's share of each choice, by the
    middle layer's states, which choose what is trained on, and by the others'. The first setting was another: of a chain of words in which six of 24 changed places no way found much (13 % by the
    gradient, 7 % by neighbours), twice as many steps on any choice cost more than none, and the claim was inconclusive (-0.04 nats; signs by seed - - + + -)."""
    found = _chosen(seed)
    losses = found["losses"]
    told = {name: float(one.mean()) for name, one in losses.items()}
    better = min(("nearest", "drawn"), key=lambda name: told[name])
    shares = {name: ", ".join(f"{one:.0%}" for one in found["shares"][name]) for name in ("gradient", "nearest")}
    best = max(range(LAYERS), key=lambda layer: float(found["shares"]["gradient"][layer]))
    text = (
        f"a law that a tenth of a pool follows costs {told['gradient']:.3f} nats a token after tuning on {TAKEN} texts by the transport gradient, {told['nearest']:.3f} on nearest neighbours of the target, {told['drawn']:.3f} on texts "
        f"drawn, {told['before']:.3f} before; of the texts by states after layers 0 to {LAYERS - 1} that law has {shares['gradient']} (gradient; most after layer {best}) and {shares['nearest']} (neighbours), of those drawn "
        f"{found['shares']['drawn'][0]:.0%}"
    )
    return Claim(text, *difference(losses[better], losses["gradient"]), 0.0, "nats per token")


@functools.cache
def _chosen(seed: int) -> dict[str, Any]:
    """`losses`: of held-out texts of the rare law after tuning on each choice, and before; `shares`: what that law has of each choice, by layer."""
    from patchbay.corpus import selection
    from patchbay.tiny import domains, lab
    from patchbay.train._objectives import objective
    from patchbay.train._plan import Arm

    rare = of_law(1, RARE + TAKEN + HELD, seed + 1)
    pool, target = of_law(0, COMMON, seed + 1) + rare[:RARE], rare[RARE : RARE + TAKEN]
    held: Any = [[ids] for ids in rare[RARE + TAKEN :]]

    def loss(tuned: Model) -> Tensor:
        return objective("ntp").scores(tuned, held)

    def after(network: Model, texts: Any, of: Any, **plan: Any) -> Any:
        return trained(network, texts, of, seed, {"one": Arm()}, **plan)["one"]

    start = lab.small(domains.N_TOKENS, layers=LAYERS, width=32, mlp=64)
    base: Any = after(start, pool, lambda tuned: tuned, fresh=True, steps=200)
    choices: dict[str, list[list[int]]] = {
        "gradient": [selection.pick(base, pool, target, TAKEN, layer=layer) for layer in range(LAYERS)],
        "nearest": [nearest(base, pool, target, TAKEN, layer) for layer in range(LAYERS)],
        "drawn": [random.Random(f"drawn {seed}").sample(range(len(pool)), TAKEN)] * LAYERS,
    }
    middle = base.n_layers // 2
    losses = {
        name: after(base, [pool[i] for i in by_layer[middle]], loss, steps=20, rate=1e-3)
        for name, by_layer in choices.items()
    }
    shares = {name: [sum(i >= COMMON for i in some) / TAKEN for some in by_layer] for name, by_layer in choices.items()}
    return {"losses": losses | {"before": loss(base)}, "shares": shares}


def nearest(model: Model, pool: list[list[int]], target: list[list[int]], k: int, layer: int) -> list[int]:
    """Places of the k texts of the pool that are nearest to a text of the target, by the states that `selection.pick` takes."""
    import torch

    from patchbay.corpus.selection import states

    both = states(model, pool + target, layer=layer)
    found: list[int] = torch.cdist(both[: len(pool)], both[len(pool) :]).min(1).values.argsort(stable=True)[:k].tolist()
    return found


# --- a cut --------------------------------------------------------------------------------------------

LAWS, POOLS, ASKED = (0, 1), 8, 20  # two laws of tiny.domains; pools of 20 texts of each, of which 20 are picked


@claim("he2025", "made", seeds=TRAINED)
def he2025(model: Model, seed: int) -> Claim:
    """Confirmed if, of texts to recover a network that learned two laws over the same tokens, more than half are of the law whose neurons were cut: half is what an even budget gives, and the mean over
    which of the two was cut is half where one law departs more whatever is cut. Told beside it: the same where as many neurons were drawn. Before, this check cut heads of the built-in model that
    repeat strings, and compared with a cut of other heads: inconclusive in three seeds."""
    import torch

    from patchbay import maths

    own, drawn = _recovered(seed)
    text = (
        f"in networks of 20,000 weights that learned two laws, {float(own.mean()):.0%} of {ASKED} texts to recover with are of the law whose neurons were cut ({float(own[:, 0].mean()):.0%} and {float(own[:, 1].mean()):.0%} of each), and {float(drawn[:, 0].mean()):.0%} and "
        f"{float(drawn[:, 1].mean()):.0%} where as many were drawn at random"
    )
    return Claim(text, *maths.bootstrap_interval(torch.as_tensor(own.mean(1)))[:3], 0.5, "share of texts")


@functools.cache
def _recovered(seed: int) -> tuple[Tensor, Tensor]:
    """Shares of a law among the texts picked after its neurons were cut, and after neurons drawn at random were, [pool, law]."""
    import torch

    from patchbay.tiny import domains, lab
    from patchbay.train._plan import Arm

    def texts(law: int, n: int, at: int) -> list[list[int]]:
        return of_law(law, n, 100 * (seed + 1) + at)

    data = [ids for both in zip(texts(0, 800, 0), texts(1, 800, 0), strict=True) for ids in both]
    start = lab.small(domains.N_TOKENS, width=32, mlp=64)
    network: Any = trained(start, data, lambda tuned: tuned, seed, {"one": Arm()}, fresh=True, steps=250)["one"]  # type: ignore[arg-type, return-value]
    sets = of_laws(network, [texts(law, 64, 1) for law in LAWS])
    rng = random.Random(f"neurons {seed}")
    every = [(layer, i) for layer in range(network.n_layers) for i in range(network.n_neurons(layer))]
    others = [rng.sample(every, len(some)) for some in sets]
    shares = torch.zeros(2, POOLS, len(LAWS), dtype=torch.float64)
    for at in range(POOLS):
        pool = [ids for law in LAWS for ids in texts(law, ASKED, 2 + at)]
        for kind, cuts in enumerate((sets, others)):
            for law, neurons in enumerate(cuts):
                shares[kind, at, law] = share(network, pool, neurons, law)
    return shares[0], shares[1]


def of_laws(network: Model, texts: list[list[list[int]]]) -> list[list[tuple[int, int]]]:
    """For each of two kinds of texts the eighth of all neurons (layer, neuron) that are more active on it than on the other, in deviations over texts."""
    import torch

    seen = []
    for some in texts:
        trace = pb.run(network, some, taps=[layer.mlp.act for layer in network.layers], logits="last")
        acts = [trace[layer.mlp.act].abs().double().mean(1) for layer in network.layers]  # [text, neuron]
        seen.append(torch.cat(acts, 1))
    apart = (seen[0].mean(0) - seen[1].mean(0)) / (seen[0].var(0) + seen[1].var(0)).sqrt().clamp_min(1e-12)
    places = [(layer, i) for layer in range(network.n_layers) for i in range(network.n_neurons(layer))]
    k = len(places) // 8
    return [[places[int(i)] for i in order[:k]] for order in (apart.argsort(descending=True), apart.argsort())]


def share(network: Model, pool: list[list[int]], neurons: list[tuple[int, int]], law: int) -> float:
    """What a law, of those that have as many texts of the pool one after another, has of the texts that are picked after neurons were cut."""
    from patchbay.corpus import recovery

    cut = [pb.zero(network.layers[layer].mlp.neurons[i].act) for layer, i in neurons]
    found = recovery.pick(network, pool, ASKED, cut=cut, clusters=4)
    return sum(i // ASKED == law for i in found.texts) / ASKED
