"""Claims about what patching, paths, edges and circuits show."""

from __future__ import annotations

from typing import Literal

import patchbay as pb
from patchbay.papers.claims._claim import WIDE, Claim, claim
from patchbay.papers.claims._shared import (
    FEW,
    N,
    against,
    at_part,
    beyond_random,
    ends_of,
    first_of,
    one_more,
    over_sets,
    unrelated,
)
from patchbay.signal.channel import parse_channel
from patchbay.signal.port import PatchbayError

CPR = ("cpr", "cpr_low", "cpr_high")


@claim("mueller2025", "comparison")
def mueller2025(model: pb.Model, seed: int) -> Claim:
    found = pb.prove.circuit(model, pb.tasks.indirect_object(model, N, seed=seed), seed=seed)
    text = "circuits of the best edges are more faithful, on other prompts, than 97.5 % of circuits of random edges"
    return Claim(text, *ends_of(found, *CPR), one_more(found["cpr_random"].tolist()), "area")


@claim("merullo2024", "mechanism")
def merullo2024(model: pb.Model, seed: int) -> Claim:
    said = pb.tasks.repeated_tokens(model, N, seed=seed)
    writer, reader = first_of(pb.find.previous_token_heads(model, said)), first_of(pb.find.induction_heads(model, said))
    if (writer.layer or 0) >= (reader.layer or 0):
        raise PatchbayError(
            f"the previous-token head {writer} does not stand before the induction head {reader}: no channel"
        )
    assert writer.layer is not None
    size = max(1, model.d_head(writer.layer) // 8)
    fresh = pb.tasks.repeated_tokens(model, N, seed=seed + 1)
    found = pb.prove.channel(
        model, fresh, parse_channel(f"{writer}>{reader}.k"), n_components=size, sizes=[size], seed=seed
    )
    value, low, high = ends_of(found, "edge_difference", "edge_difference_low", "edge_difference_high")
    low = low if float(found["proved"]) == 1.0 else min(low, 0.0)  # not without the proof's own gate
    text = (
        f"of the {model.d_head(writer.layer)} components of what {writer} writes, the {size} that the key of {reader} reads best carry "
        "more to it than as many random ones"
    )
    return Claim(text, value, low, high, 0.0, "logits")


@claim("goldowskydill2023", "mechanism")
def goldowskydill2023(model: pb.Model, seed: int) -> Claim:
    half, other = pb.tasks.indirect_object(model, 2 * N, seed=seed).split(seed=seed)
    head = first_of(pb.prove.path_patching(model, half))
    found = pb.prove.path_patching(model, other)
    value, low, high = (at_part(found, name, head) for name in ("effect", "low", "high"))
    text = f"{head}, whose direct path to the logits does most on one half of the prompts, does it on the other half"
    return Claim(text, value, low, high, 0.0, found.unit)


@claim("prakash2024", "mechanism", WIDE)
def prakash2024(model: pb.Model, seed: int) -> Claim:
    found = pb.prove.desiderata_mask(model, pb.tasks.indirect_object(model, N, seed=seed), seed=seed)
    interval = ends_of(found, "difference", "difference_low", "difference_high")
    text = f"the {int(found['chosen'].nansum())} heads of a learned mask bring the answer over, more than as many random heads"
    if not float(found["chosen"].nansum()):
        return Claim(text, *interval, 0.0, found.units["difference"])
    return beyond_random(text, interval, float(found["p"]), len(found["random"]), found.units["difference"])


@claim("zhang2025", "mechanism")
def zhang2025(model: pb.Model, seed: int) -> Claim:
    names = pb.prove.attention_knockout(model, pb.tasks.facts_in_context(model, N, seed=seed), draws=0, seed=seed)
    group = str(names.labels_of("key")[int(names["everywhere"].nan_to_num(0.0).argmin())])
    keys = [group.removesuffix(" -> last")]

    def fall(at: int) -> float:
        task = pb.tasks.facts_in_context(model, FEW, seed=at)
        found = pb.prove.attention_knockout(model, task, keys=keys, seed=at)
        return float(found["everywhere"][0] - found["control_everywhere"][0])

    text = f"the answer needs attention along {group!r}: cut there, its probability falls further than with as many random keys cut"
    return Claim(text, *over_sets(fall, seed), 0.0, "relative change beyond random keys", above=False)


@claim("heimersheim2024", "comparison")
def heimersheim2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the head for which bringing the answer back and taking it away differ most on one half of the prompts differs
    likewise on the other: were heads to add up, both ways would give the same."""
    half, other = pb.tasks.indirect_object(model, 2 * N, seed=seed).split(seed=seed)
    ways: tuple[Literal["denoising", "noising"], ...] = ("denoising", "noising")
    back, away = (pb.prove.activation_patching(model, half, site="head", way=way) for way in ways)
    gap = (back["share"] - away["share"]).nan_to_num(0.0)
    layer, head = divmod(int(gap.abs().argmax()), gap.shape[1])
    found = [pb.prove.activation_patching(model, other, site="head", way=way) for way in ways]
    more, less = found if float(gap[layer, head]) > 0.0 else found[::-1]
    at = pb.Part(layer, "head", head)
    ends = [(at_part(one, "share", at), at_part(one, "low", at), at_part(one, "high", at)) for one in (more, less)]
    said = ("brings back", "takes away") if more is found[0] else ("takes away", "brings back")
    text = f"the two ways of patching differ: {at} {said[0]} more of the answer than it {said[1]}"
    return Claim(text, *against(*ends), 0.0, "share of the gap")


@claim("nanda2023", "comparison", WIDE)
def nanda2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the effects of heads that the corrupted run's gradient estimates (the paper's way) rank as those of patching them
    one by one, further than unrelated ranks would. The clean run's gradient is told beside it."""
    cells: list[int] = []

    def rank(at: int, way: Literal["denoising", "noising"]) -> float:
        task = pb.tasks.indirect_object(model, N // 2, seed=at)
        found = pb.prove.attribution_patching(model, task, way=way, exact=True)
        cells.append(int((~found["exact"].isnan()).sum()))
        return float(found["spearman"])

    clean = over_sets(lambda at: rank(at, "noising"), seed)
    interval = over_sets(lambda at: rank(at, "denoising"), seed)
    text = f"one gradient, of the corrupted run, ranks the {cells[0]} heads as patching them one by one does (the clean run's: {clean[0]:.2f})"
    return Claim(text, *interval, unrelated(cells[0]), "Spearman's correlation")


@claim("syed2023", "comparison")
def syed2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if circuits of the edges with the largest estimates are more faithful, on other prompts, than circuits of the edges
    that cost most when they are corrupted one by one (the criterion of automated circuit discovery)."""
    half, other = pb.tasks.indirect_object(model, N, seed=seed).split(seed=seed)
    found = pb.prove.edge_attribution(model, half, exact=10**6, batch_size=64)
    labels = {"edit": found.labels_of("edit")}
    ours, theirs = (
        pb.prove.circuit(model, other, scores=pb.Result(found[name], ("edit",), coords=labels), draws=1, seed=seed)
        for name in ("effect", "exact")
    )
    text = (
        "circuits of the edges with the largest estimates are more faithful than circuits of the edges whose corruption costs most "
        f"(areas {float(ours['cpr']):.3g} and {float(theirs['cpr']):.3g})"
    )
    return Claim(text, *against(ends_of(ours, *CPR), ends_of(theirs, *CPR)), 0.0, "area")


@claim("meng2022", "mechanism")
def meng2022(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the best MLP at the subject's last token brings back more than the best one at the prompt's last token, both
    chosen on other prompts."""
    from dataclasses import replace

    task = pb.tasks.facts_in_memory(model, N, seed=seed).with_metric("log_probability")
    task = replace(task, marks={**task.marks, "end": tuple((max(span),) for span in task.marks["subject"])})
    halves = [
        pb.prove.causal_tracing(model, half, site="mlp_out", positions="end,last", draws=2, seed=seed)
        for half in task.split(seed=seed)
    ]
    best = halves[0]["effect"].argmax(0).tolist()  # of each place the layer
    subject, last = (
        tuple(float(halves[1][name][layer, place]) for name in ("effect", "effect_low", "effect_high"))
        for place, layer in enumerate(best)
    )
    text = (
        f"the clean output of L{best[0]}.mlp at the subject's last token brings back more of a fact ({subject[0]:.3g} nats) than that of "
        f"L{best[1]}.mlp at the prompt's last token ({last[0]:.3g})"
    )
    return Claim(text, *against(subject, last), 0.0, "nats")  # type: ignore[arg-type]


def _of_one_length(task: pb.Task) -> pb.Task:
    """The prompts of the length that most have."""
    lengths = [len(ids) for ids in task.clean]
    most = max(sorted(set(lengths)), key=lengths.count)
    return task[[i for i, length in enumerate(lengths) if length == most]]


@claim("conmy2023", "mechanism")
def conmy2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if, on prompts that chose nothing, the circuit that is left has a lower KL than random ones of its size."""
    task = _of_one_length(pb.tasks.repeated_tokens(model, N, max_period=6, max_offset=4, seed=seed))[:8]
    found = pb.prove.acdc(model, task, threshold=0.1, draws=40, seed=seed)
    random = found["kl_random"].double()
    gap = random - float(found["kl"])
    text = f"the {int(found['n_kept'])} of {len(found['kept'])} edges that are kept have a lower KL than as many random ones ({float(found['kl']):.3g} and {float(random.mean()):.3g} nats)"
    low, high = sorted(gap.tolist())[1], sorted(gap.tolist())[-2]  # 95 % of the draws
    return beyond_random(text, (float(gap.mean()), low, high), float(found["p"]), len(random), "nats")


@claim("chan2022", "identity")
def chan2022(model: pb.Model, seed: int) -> Claim:
    """Confirmed if everything claimed recovers 1 of the score, and what recovers it differs from 1 by rounding alone."""
    same = _of_one_length(pb.tasks.repeated_tokens(model, N, max_period=6, max_offset=4, seed=seed))
    every: dict[str, str | list[str]] = {
        f"L{i}.{kind}": "self" for i in range(model.n_layers) for kind in ("attn", "mlp")
    }
    off = abs(float(pb.prove.causal_scrubbing(model, same, every, draws=1, seed=seed)["recovered"]) - 1.0)
    none = abs(float(pb.prove.causal_scrubbing(model, same, {"L0.mlp": "self"}, draws=4, seed=seed)["recovered"]))
    text = f"a hypothesis that claims every part recovers all of the score (one that claims the first MLP alone {none:.3g} of it)"
    return Claim(text, off, off, off, 1e-4, "share of the score", above=False)
