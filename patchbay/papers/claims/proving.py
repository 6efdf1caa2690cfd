"""Claims about what patching, paths, edges and circuits show."""

from __future__ import annotations

from typing import Literal

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import N, against, at_part, ends_of, over_sets
from patchbay.signal.channel import parse_channel
from patchbay.signal.port import PatchbayError

CPR = ("cpr", "cpr_low", "cpr_high")


@claim("mueller2025")
def mueller2025(model: pb.Model, seed: int) -> Claim:
    found = pb.prove.circuit(model, pb.tasks.indirect_object(model, N, seed=seed), seed=seed)
    interval = ends_of(found, "cpr", "cpr_low", "cpr_high")
    text = "circuits of the best edges are more faithful than circuits of random edges"
    return Claim(text, *interval, float(found["cpr_random"].max()), "area")


@claim("merullo2024")
def merullo2024(model: pb.Model, seed: int) -> Claim:
    said = pb.tasks.repeated_tokens(model, N, seed=seed)
    writer, reader = pb.find.previous_token_heads(model, said).top(1)[0], pb.find.induction_heads(model, said).top(1)[0]
    if (writer.layer or 0) >= (reader.layer or 0):
        raise PatchbayError(
            f"the previous-token head {writer} does not stand before the induction head {reader}: no channel"
        )
    assert writer.layer is not None
    size = 3 * model.d_head(writer.layer) // 8
    fresh = pb.tasks.repeated_tokens(model, N, seed=seed + 1)
    found = pb.prove.channel(model, fresh, parse_channel(f"{writer}>{reader}.k"), sizes=[size], draws=9, seed=seed)
    value, low, high = (float(found[name][0]) for name in ("gap", "gap_low", "gap_high"))
    text = f"of what {writer} writes, the {size} components that the key of {reader} reads best carry more than the {size} it reads least"
    return Claim(text, value, low, high, 0.0, "logits")


@claim("goldowskydill2023")
def goldowskydill2023(model: pb.Model, seed: int) -> Claim:
    half, other = pb.tasks.indirect_object(model, 2 * N, seed=seed).split(seed=seed)
    head = pb.prove.path_patching(model, half).top(1)[0]
    found = pb.prove.path_patching(model, other)
    value, low, high = (at_part(found, name, head) for name in ("effect", "low", "high"))
    text = f"{head}, whose direct path to the logits does most on one half of the prompts, does it on the other half"
    return Claim(text, value, low, high, 0.0, found.unit)


@claim("prakash2024")
def prakash2024(model: pb.Model, seed: int) -> Claim:
    found = pb.prove.desiderata_mask(model, pb.tasks.indirect_object(model, N, seed=seed), seed=seed)
    interval = ends_of(found, "difference", "difference_low", "difference_high")
    text = f"the {int(found['chosen'].nansum())} heads of a learned mask bring the answer over, more than as many random heads"
    return Claim(text, *interval, 0.0, found.units["difference"])


@claim("zhang2025")
def zhang2025(model: pb.Model, seed: int) -> Claim:
    half, other = pb.tasks.facts_in_context(model, 2 * N, seed=seed).split(seed=seed)
    names = pb.prove.attention_knockout(model, half, seed=seed)
    at = int(names["everywhere"].nan_to_num(0.0).argmin())
    group = str(names.labels_of("key")[at])
    found = pb.prove.attention_knockout(model, other, seed=seed)
    value, low, high = (float(found[name][at]) for name in ("everywhere", "everywhere_low", "everywhere_high"))
    text = f"what the answer says flows by attention to {group!r}: cut from there, its probability falls"
    return Claim(text, value, low, high, 0.0, "relative change", above=False)


@claim("heimersheim2024")
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


@claim("nanda2023")
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
    return Claim(text, *interval, _unrelated(cells[0]), "Spearman's correlation")


def _unrelated(n: int) -> float:
    """What the correlation of two unrelated rankings of n stays below in 97.5 %."""
    return min(1.0, 1.96 / max(1, n - 1) ** 0.5)


@claim("syed2023")
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
