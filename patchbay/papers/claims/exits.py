"""Claims about what can be read before the last layer, in networks that were trained to say it there.

The networks are the lab's own, from weights drawn by the seed, and the model at hand has no part.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import patchbay as pb
from patchbay.papers.claims._claim import TRAINED, Claim, claim
from patchbay.papers.claims.training import difference, trained

if TYPE_CHECKING:
    from torch import Tensor

    from patchbay.features.lens import Lens
    from patchbay.model.model import Model
    from patchbay.train._plan import Arm

LAYERS, TEXTS, HELD = 4, 2000, 100
PLAN = {"steps": 120, "batch_size": 16, "rate": 4e-3}
# on texts neither trained on nor held out, of two other seeds, higher rates and more steps than 1e-2 and 150 brought 0.01 nats at most
LENS: dict[str, Any] = {"rate": 2e-2, "steps": 300}


@claim("gurioli2025", "made", seeds=TRAINED)
def gurioli2025(model: Model, seed: int) -> Claim:
    """Confirmed if held-out stories cost less, read after the layers before the last, in a network each of whose layers was an exit in training, than through a tuned lens of a plain network that was
    trained for as many operations (a lens is the same reading without training the network again; its own 300 steps come on top). The mean over these layers decides. Told beside it: each layer, the logit lens of the plain
    network, what the exits cost at the last layer, beside plain training for as many steps too, and how far what is read after each layer is from what the network says. The
    paper's network is an encoder that retrieves code. How many rows a step has, and how the lens is trained, was chosen on two other seeds, at both of which exits cost 0.01 nats more than the lens."""
    found = _read(seed)
    nats = {name: found[name][0] for name in found}
    text = (
        f"in networks of {LAYERS} layers and 166,000 weights, stories read after the layers before the last cost {_each(nats['exits'])} nats a token where every layer was an exit in training, {_each(nats['tuned'])} through a tuned lens of a plain "
        f"network of as many operations, {_each(nats['plain'])} through its logit lens; said by the last layer {_last(nats['exits'])} with exits, {_last(nats['plain'])} plain ({_last(nats['steps'])} after as many steps); what is read there is {_each(found['exits'][1])} "
        f"nats from the last layer with exits, {_each(found['tuned'][1])} through the tuned lens, {_each(found['plain'][1])} through the logit lens"
    )
    return Claim(text, *difference(early(nats["tuned"]), early(nats["exits"])), 0.0, "nats per token")


def early(told: Tensor) -> Tensor:
    """Means over the exits before the last, [text], of what is told after each layer, [layer, text]."""
    return told[:-1].mean(0)


def _each(told: Tensor) -> str:
    return ", ".join(f"{one:.2g}" if one < 0.1 else f"{one:.2f}" for one in told[:-1].mean(1).tolist())


def _last(told: Tensor) -> str:
    return f"{float(told[-1].mean()):.2f}"


@functools.cache
def _read(seed: int) -> dict[str, Tensor]:
    """Of each way to train and to read: what a token of a held-out text costs after each layer, and how far what is said there is from the last layer, in nats, [2, layer, text]."""
    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    tiny = pb.load("tiny")
    texts = lab.pieces(tiny, TEXTS + HELD, seed, range(12, 36))
    held, data = texts[:HELD], texts[HELD:]
    network = lab.small(tiny.vocab_size, layers=LAYERS, width=48, mlp=96)
    arms = {"exits": Arm("multi-exit"), "plain": as_costly(network, data, seed), "steps": Arm()}
    models: Any = trained(network, data, lambda tuned: tuned, seed, arms, fresh=True, **PLAN)  # type: ignore[arg-type, return-value]
    found = {name: after_layers(one, held) for name, one in models.items()}
    return found | {"tuned": after_layers(models["plain"], held, _tuned(models["plain"], data, seed))}


def as_costly(network: Model, data: list[list[int]], seed: int) -> Arm:
    """Plain training for as many operations as training with exits takes."""
    from patchbay.train._plan import Arm, plan_of
    from patchbay.train._runs import Lab, equal

    documents: Any = [[ids] for ids in data]
    share = Lab(network, documents, documents, plan_of({"held": 0.0, "fresh": True, "seed": seed, **PLAN}))
    return equal(share, Arm("multi-exit"), Arm()) or Arm()


def _tuned(network: Model, data: list[list[int]], seed: int) -> Lens:
    """The tuned lens of a network, learned on the texts that it was trained on."""
    from patchbay.features import lens

    with tempfile.TemporaryDirectory() as there:
        folder = str(Path(there, "lens"))
        pb.train.tuned_lens(network, data, folder=folder, seed=seed, **LENS)
        return lens.load(folder, network, lens.TUNED)


def after_layers(network: Model, texts: list[list[int]], lens: Lens | None = None) -> Tensor:
    """What a token costs after each layer, and how far what is read there is from what the network says, KL(network || read), [2, layer, text], nats; through a lens or, without one, as it stands."""
    import torch

    from patchbay import maths
    from patchbay.features.lens import stream_ports

    ports = stream_ports(network)
    trace, rows = pb.run(network, texts, taps=ports), []
    for i, ids in enumerate(texts):
        said, right = trace.logits[i, : len(ids) - 1], torch.tensor(ids[1:], device=trace.logits.device)[:, None]
        told = []
        for depth, port in list(enumerate(ports))[1:]:
            state = trace[port][i, : len(ids) - 1]
            with torch.no_grad():
                read = network.unembed_logits(network.final_norm_module(state if lens is None else lens(depth, state)))
            cost = -torch.log_softmax(read.double(), -1).gather(1, right)
            told.append(torch.stack([cost.mean(), maths.kl(said, read).double().mean()]))
        rows.append(torch.stack(told, 1).cpu())
    return torch.stack(rows, 2)
