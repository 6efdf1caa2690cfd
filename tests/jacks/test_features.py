"""Features of a signal, on every family and at every place: bit-equal when nothing changes, the error stays, taps and gradients are right.

A share of the grid of families by places here, all of it in the slow tier.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.contract.every import TWINS
from patchbay.model.attached import HOME
from patchbay.tiny import twins
from tests import given
from tests.features.given import crosscoder, dictionary, layers
from tests.shares import WHOLE, by_turns
from tests.tolerance import close

PLACES = (
    "resid_in", "resid_mid", "resid_out", "attn.out", "attn.z", "mlp.in", "mlp.act", "mlp.out", "mlp.in to L{}.mlp.out", "resid_mid to L{}.mlp.out",
)  # fmt: skip
FAMILIES = list(twins.FAMILY_CONFIGS) if WHOLE else [*TWINS, "falcon", "gptj", "falcon_h1"]
FAMILIES = [name for name in dict.fromkeys(FAMILIES) if name in twins.FAMILY_CONFIGS]
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def attached(model: pb.Model, place: str, **more: Any) -> tuple[pb.Model, pb.Dictionary, str] | None:
    """The last layer that has these signals, with a dictionary there."""
    names = [name.removeprefix("L{}.") for name in place.split(" to ")]
    has = [i for i in range(model.n_layers) if all(name in model.signals(i) for name in names)]
    if not has:
        return None
    it = dictionary(model, f"L{has[-1]}.{place.format(has[-1])}", **more)
    return model.with_dictionaries(it), it, f"L{has[-1]}.{HOME[it.writes]}"


@pytest.mark.parametrize(("family", "place"), by_turns(FAMILIES, PLACES, of=11))
def test_a_feature_is_a_part_of_every_family(family: str, place: str) -> None:
    model = given.lent(family)
    found = attached(model, place)
    if found is None:
        with pytest.raises(pb.PatchbayError, match="offers"):
            model.require(f"L0.{place.partition(' ')[0]}")
            model.require(f"L0.{place.rpartition('}.')[2]}")
        return
    view, it, home = found
    base = pb.run(model, IDS).logits
    taps = [f"{home}.act", f"{home}.error", f"L{it.layer}.{it.reads}", f"L{it.layer}.{it.writes}"]
    seen = pb.run(view, IDS, taps=taps)
    assert torch.equal(seen.logits, base)
    read, written = (seen[port].flatten(2) for port in taps[2:])
    z = it.encode(read)
    assert close(seen[taps[0]], z)
    assert close(it.decode(z, read) + seen[taps[1]], written, of=it.decode(z, read))
    same = pb.run(view, IDS, edits=[pb.scale(taps[0], 1.0), pb.add(taps[1], 0.0)]).logits
    assert torch.equal(same, base), "nothing changes: bit for bit"
    i = int(z.amax((0, 1)).argmax())
    by_hand = written + (2.0 - z[..., i, None]) * it.W_dec[i]
    edited = pb.run(view, IDS, edits=[pb.replace(taps[0], z.index_fill(2, torch.tensor(i), 2.0))]).logits
    port = f"L{it.layer}.{it.writes}"
    plain = pb.run(model, IDS, edits=[pb.replace(port, by_hand.view(seen[port].shape))]).logits
    assert close(edited, plain, of=base)
    assert not torch.equal(plain, base)


@pytest.mark.parametrize("place", PLACES)
def test_edits_of_one_feature_and_their_positions(place: str) -> None:
    found = attached(given.lent("llama"), place, form="topk", k=20)
    assert found is not None
    view, it, home = found
    part = str(view.part(f"L{it.layer}.F0")).removesuffix("0")
    seen = pb.run(view, IDS, taps=[f"{home}.act", f"L{it.layer}.{it.writes}"])
    z, written = seen[f"{home}.act"], seen[f"L{it.layer}.{it.writes}"]
    i = int((z > 0).float().mean((0, 1)).argmax())
    by_hand = written.flatten(2).clone()
    by_hand[1, -2] += (0.0 - z[1, -2, i]) * it.W_dec[i]
    by_hand[:, 3] += torch.tensor(1.5) * it.W_dec[i]
    edits = [pb.zero(f"{part}{i}.act", positions=-2, rows=1), pb.add(f"{part}{i}.act", 1.5, positions=3)]
    plain = pb.run(
        given.lent("llama"), IDS, edits=[pb.replace(f"L{it.layer}.{it.writes}", by_hand.view(written.shape))]
    )
    trace = pb.run(view, IDS, edits=edits, taps=[f"{home}.act"])
    assert close(trace.logits, plain.logits)
    assert trace.touched == [[(), (5,)], [(3,), (3,)]]
    assert torch.equal(trace[f"{home}.act"][:, 3, i], z[:, 3, i] + 1.5), "a tap sees the activation after the edits"


@pytest.mark.parametrize("place", PLACES)
def test_gradients_go_through_features_and_error(place: str) -> None:
    found = attached(given.lent("llama"), place)
    assert found is not None
    view, it, home = found
    port = f"L{it.layer}.{it.writes}"
    trace = pb.run(view, IDS, taps=[f"{home}.act", f"{home}.error", port], grad=True)
    z, e, g = trace.gradient(trace.logits[:, -1, 5].sum(), f"{home}.act", f"{home}.error", port)
    g = g.flatten(2)
    assert close(e, g)
    assert close(z, g @ it.W_dec.T, of=g)
    assert bool((g != 0).any())
    plain = pb.run(given.lent("llama"), IDS, taps=["embed"], grad=True)
    both = pb.run(view, IDS, taps=["embed", f"{home}.act"], grad=True)
    (alone,), (beside,) = (t.gradient(t.logits[:, -1, 5].sum(), "embed") for t in (plain, both))
    assert close(beside, alone), "what lies before sees the gradient that it had"


def test_generation_with_a_cache_edits_every_new_token() -> None:
    found = attached(given.lent("llama"), "resid_out", form="topk", k=20)
    assert found is not None
    view, it, _ = found
    edits = [pb.add(f"L{it.layer}.F3.act", 30.0, positions="generated"), pb.zero(f"L{it.layer}.F4.act")]
    text, logits = given.generated(view, IDS, edits, 5)
    whole = pb.run(view, IDS.tolist(), edits=edits, max_new_tokens=5)
    assert whole.ids.tolist() == text.tolist()
    assert close(logits, whole.logits[:, 6:-1])
    assert text.tolist() != given.generated(view, IDS, [], 5)[0].tolist()


def test_a_probe_on_a_feature_decides_where_an_edit_is_made() -> None:
    found = attached(given.lent("llama"), "resid_out")
    assert found is not None
    view, it, home = found
    z = pb.run(view, IDS, taps=[f"{home}.act"])[f"{home}.act"][..., 3]
    bound = float(z.median())
    edit = pb.add("logits", torch.ones(view.vocab_size)).when(pb.Probe(f"L{it.layer}.F3.act", threshold=bound))
    trace = pb.run(view, IDS, edits=[edit])
    assert trace.touched[0] == [tuple(row.nonzero()[:, 0].tolist()) for row in z > bound]
    early = pb.zero(f"L{it.layer}.mlp.out").when(pb.Probe(f"L{it.layer}.F3.act", threshold=bound))
    with pytest.raises(pb.PatchbayError, match="passes after"):
        pb.run(view, IDS, edits=[early])


def test_half_precision_keeps_what_is_not_edited() -> None:
    model = pb.load(given.llama(0).bfloat16())
    view = model.with_dictionaries(dictionary(model, "L1.resid_out"))
    base = pb.run(model, IDS).logits
    assert torch.equal(pb.run(view, IDS, edits=[pb.scale("L1.features.act", 1.0)]).logits, base)
    edited = pb.run(view, IDS, edits=[pb.add("L1.F3.act", 5.0, positions=-1)]).logits
    assert edited.dtype == torch.bfloat16
    assert torch.equal(edited[:, :-1], base[:, :-1])
    assert not torch.equal(edited[:, -1], base[:, -1])


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("gemma2", marks=pytest.mark.slow)])  # fmt: skip
def test_features_of_a_cross_layer_transcoder_write_in_every_layer_after_theirs(family: str) -> None:
    model = given.lent(family)
    it = layers(model.d_model, (0, 1))
    view, base = model.with_dictionaries(it), pb.run(model, IDS)
    assert it.onward is not None
    places = [
        f"L{i}.{signal}" for i in (0, 1) for signal in ("mlp.in", "mlp.out", "mlp_features.act", "mlp_features.error")
    ]
    seen = pb.run(view, IDS, taps=places)
    assert torch.equal(seen.logits, base.logits)
    z = [piece.encode(seen[f"L{i}.mlp.in"]) for i, piece in enumerate((it, *it.rest))]
    said = [it.decode(z[0], seen["L0.mlp.in"]), it.rest[0].decode(z[1], seen["L1.mlp.in"]) + z[0] @ it.onward[0]]
    for i in (0, 1):
        assert close(seen[f"L{i}.mlp_features.act"], z[i])
        assert close(seen[f"L{i}.mlp_features.error"], seen[f"L{i}.mlp.out"] - said[i], of=said[i])
    same = [pb.scale("L0.mlp_features.act", 1.0), pb.add("L1.mlp_features.error", 0.0)]
    assert torch.equal(pb.run(view, IDS, edits=same).logits, base.logits), "nothing changes: bit for bit"
    change = (3.0 - z[0][..., 4])[..., None]
    first = seen["L0.mlp.out"] + change * it.W_dec[4]
    moved = pb.run(model, IDS, edits=[pb.replace("L0.mlp.out", first)], taps=["L1.mlp.out"])["L1.mlp.out"]
    by_hand = [pb.replace("L0.mlp.out", first), pb.replace("L1.mlp.out", moved + change * it.onward[0, 4])]
    edited = pb.run(view, IDS, edits=[pb.replace("L0.mlp.F4.act", 3.0)], taps=["L1.mlp_features.error"])
    assert close(edited.logits, pb.run(model, IDS, edits=by_hand).logits, of=base.logits)
    assert not torch.equal(edited.logits, base.logits)


def test_gradients_of_a_cross_layer_feature_go_through_all_that_it_writes() -> None:
    model = given.lent("llama")
    it = layers(model.d_model, (0, 1))
    view = model.with_dictionaries(it)
    taps = ["L0.mlp_features.act", "L0.mlp.out", "L1.mlp.out"]
    trace = pb.run(view, IDS, taps=taps, grad=True)
    z, first, second = trace.gradient(trace.logits[:, -1, 5].sum(), *taps)
    assert it.onward is not None
    assert close(z, first @ it.W_dec.T + second @ it.onward[0].T, of=first @ it.W_dec.T)


def test_a_crosscoder_reads_all_its_layers_and_is_edited_in_the_last() -> None:
    model = given.lent("llama")
    it = crosscoder(model.d_model, (0, 1))
    view, base = model.with_dictionaries(it), pb.run(model, IDS)
    seen = pb.run(view, IDS, taps=["L0.resid_out", "L1.resid_out", "L1.features.act", "L1.features.error"])
    z = it.encode(torch.cat([seen["L0.resid_out"], seen["L1.resid_out"]], -1))
    assert torch.equal(seen.logits, base.logits)
    assert close(seen["L1.features.act"], z)
    assert close(seen["L1.features.error"], seen["L1.resid_out"] - z @ it.W_dec - it.b_dec)
    assert torch.equal(pb.run(view, IDS, edits=[pb.scale("L1.F3.act", 1.0)]).logits, base.logits)
    moved = seen["L1.resid_out"] + (2.0 - z[..., 3])[..., None] * it.W_dec[3]
    edited = pb.run(view, IDS, edits=[pb.replace("L1.F3.act", 2.0)]).logits
    assert close(edited, pb.run(model, IDS, edits=[pb.replace("L1.resid_out", moved)]).logits, of=base.logits)
    text, logits = given.generated(view, IDS, [pb.add("L1.F3.act", 9.0)], 4)
    whole = pb.run(view, text, edits=[pb.add("L1.F3.act", 9.0)]).logits
    assert close(logits, whole[:, 6:-1]), "with a cache, token by token"
