"""Claims about what is learned or derived between two places of a model: maps between layers."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import FEW, against, ends_of, over_sets, stories, student

if TYPE_CHECKING:
    from patchbay.model.model import Model

STEPS = 40
AHEAD = 3  # tokens


@claim("belrose2023", "comparison")
def belrose2023(model: Model, seed: int) -> Claim:
    """Confirmed if, at half depth, a trained lens is nearer to what the model says on texts it was not trained on than the logit lens is."""
    half = model.n_layers // 2

    def nearer(at: int) -> float:
        found = pb.train.tuned_lens(model, stories(FEW, at), steps=STEPS, rate=0.01, batch_size=4, seed=at)
        return float(found["kl_logit_lens"][half] - found["kl"][half])

    text = "at half depth a tuned lens is nearer to what the model says, on texts that it was not trained on, than the logit lens"
    return Claim(text, *over_sets(nearer, seed), 0.0, "nats")


@claim("gurnee2026", "comparison")
def gurnee2026(model: Model, seed: int) -> Claim:
    """Confirmed if, at half depth, the lens ranks the token that is said three places later higher than the logit lens does. Beside it what either
    is worth when it is written: a token's direction, as long as the stream, added there, and what that adds to its log probability three places later."""
    half, written = model.n_layers // 2, list[tuple[float, float]]()

    def higher(at: int) -> float:
        encoded = [ids for ids in model.encode(stories(FEW, at)) if len(ids) > 12]
        cut = [ids[:10] for ids in encoded[4:]]
        later = [ids[9 + AHEAD] for ids in encoded[4:]]
        task = pb.Task("later", cut, later, [[]] * len(cut), metric="log_probability")  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory(prefix="patchbay-lens-") as made:
            found = pb.find.jacobian_lens(model, task, texts=encoded[:4], skip=2, positions=1, folder=f"{made}/lens")
            written.append(_written(model, f"{made}/lens", half, encoded[4:]))
        return float(pb.find.logit_lens(model, task, positions=1)["rank"][half, -1] - found["rank"][half, -1])

    interval = over_sets(higher, seed)
    more, low, high = student([ours - plain for ours, plain in written])
    text = (
        f"at half depth the Jacobian lens ranks the token that is said {AHEAD} places later higher than the logit lens does (written there, its direction of a token "
        f"adds {more:.2g} nats more to that token {AHEAD} places later than the logit lens's as long, 95 % {low:.2g} to {high:.2g})"
    )
    return Claim(text, *interval, 0.0, "ranks")


def _written(model: Model, folder: str, depth: int, encoded: list[list[int]]) -> tuple[float, float]:
    """By how much a token of another text is likelier AHEAD places after its direction, by the Jacobian and by the logit lens, was added; mean."""
    from patchbay.features.lens import JACOBIAN, load, stream_ports
    from patchbay.wiring.components import folded_norm

    port, weight = stream_ports(model)[depth], load(folder, model, JACOBIAN).weight[depth]
    reading = folded_norm(model, None, "", model.final_norm_module, model.unembed.weight.T).float().detach()
    gains = []
    for ids, other in zip(encoded, [*encoded[1:], encoded[0]], strict=True):
        token, seen = other[9 + AHEAD], ids[: 9 + AHEAD]
        base = pb.run(model, [seen], taps=[port])
        size = base[port][0, 9].norm()
        row = []
        for direction in (weight.T @ reading[:, token], reading[:, token]):
            edit = pb.add(port, direction * size / direction.norm(), positions=9)
            said = pb.run(model, [seen], edits=[edit], logits="last").last_logits
            row.append(float((said.log_softmax(-1) - base.logits[:, -1].log_softmax(-1))[0, token]))
        gains.append(row)
    ours, plain = (sum(column) / len(column) for column in zip(*gains, strict=True))
    return ours, plain


@claim("kramar2024", "comparison")
def kramar2024(model: Model, seed: int) -> Claim:
    """Confirmed if effects of keys with exact softmax correlate with exact patching further than those of one gradient."""
    from patchbay import maths

    def further(at: int) -> float:
        task = pb.tasks.indirect_object(model, FEW, seed=at)
        found = pb.prove.atp_star(model, task, site="key", exact=True)
        ours, plain = (maths.spearman(found[name], found["exact"]) for name in ("effect", "plain"))
        return ours - plain

    text = "effects of keys rank as patching them one by one does, further with exact softmax than by one gradient"
    return Claim(text, *over_sets(further, seed), 0.0, "Spearman's correlation")


def _patched(model: Model, at: int) -> tuple[float, float]:
    """How far MLP outputs' relevance against the twin, and attribution patching, correlate with exact patching."""
    from patchbay import maths

    task = pb.tasks.indirect_object(model, FEW // 2, seed=at)
    exact = pb.prove.activation_patching(model, task, site="mlp_out", positions="all", way="noising")["effect"]
    plain = pb.prove.attribution_patching(model, task, site="mlp_out", positions="all").values
    ours = pb.find.relevance(model, task, site="mlp_out", against="twin").values
    return maths.spearman(ours, exact), maths.spearman(plain, exact)


@claim("jafari2025", "comparison")
def jafari2025(model: Model, seed: int) -> Claim:
    """Confirmed if relevance patching ranks MLP outputs as exact patching does, further than attribution patching; the paper's case is GPT-2 large."""

    def further(at: int) -> float:
        ours, plain = _patched(model, at)
        return ours - plain

    text = "relevance patching ranks MLP outputs as patching them one by one does, further than attribution patching"
    return Claim(text, *over_sets(further, seed), 0.0, "Spearman's correlation")


@claim("geiger2024", "mechanism")
def geiger2024(model: Model, seed: int) -> Claim:
    """Confirmed if a learned subspace of the last token's stream brings the twin's answer over on held-out prompts, further than one
    learned on answers dealt anew."""
    task = pb.tasks.indirect_object(model, 2 * FEW, seed=seed)
    found = pb.prove.das(model, task, pb.Port("resid_out", model.n_layers - 1), dims=8, steps=60, seed=seed)
    text = "eight learned dimensions of the last stream bring the other run's answer over, further than eight learned on answers dealt anew"
    return Claim(text, *ends_of(found, "difference", "difference_low", "difference_high"), 0.0, "share of prompts")


@claim("hernandez2023", "comparison")
def hernandez2023(model: Model, seed: int) -> Claim:
    """Confirmed if the map says what the model says on held-out prompts more often than the map of another prompt's subject does."""
    task = pb.tasks.facts_in_memory(model, 2 * FEW, seed=seed)
    found = pb.find.relation_embedding(model, task, pb.Port("resid_out", 0), subject="subject", seed=seed)
    cells = {name: at for at, name in enumerate(found.labels_of("condition"))}
    ours, theirs = (
        tuple(float(found[end][cells[name]]) for end in ("accuracy", "low", "high")) for name in ("faithful", "other")
    )
    text = "an affine map of the subject's stream says what the model says, more often than that of another prompt's subject"
    return Claim(text, *against(ours, theirs), 0.0, "share of prompts")  # type: ignore[arg-type]
