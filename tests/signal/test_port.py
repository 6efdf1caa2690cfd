"""port: addresses print and parse back to themselves, and errors say what is possible."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchbay.errors import suggest
from patchbay.signal.port import (
    KINDS,
    SIGNALS,
    WHOLE_MODEL,
    Part,
    PatchbayError,
    Port,
    as_part,
    parse_part,
    parse_port,
    signals_of,
)

IN_LAYERS = [signal for signal in SIGNALS if signal not in WHOLE_MODEL]
small = st.integers(0, 200)
parts = st.one_of(
    st.builds(Part, small, st.sampled_from(sorted(KINDS)), small),
    st.builds(Part, small, st.sampled_from(["layer", "attn", "mlp", "router", "experts"])),
    st.builds(Part, st.none(), st.sampled_from(["embed", "final_norm", "unembed"])),
)
rows = st.one_of(st.none(), st.lists(st.integers(-50, 50), min_size=1, max_size=4).map(tuple))
ports = st.one_of(
    st.sampled_from([Port(signal) for signal in WHOLE_MODEL]),
    st.builds(Port, st.sampled_from(IN_LAYERS), small),
    st.builds(Port, st.sampled_from([s for s in IN_LAYERS if Port(s, 0).index_axis is not None]), small, small),
    st.builds(Port, st.just("attn.pattern"), small, st.one_of(st.none(), small), rows),
)


@given(parts)
def test_a_part_parses_back_from_its_text(part: Part) -> None:
    assert parse_part(str(part)) == part
    assert parse_part(f" {str(part).replace('L', 'l')} ") == part


@given(ports)
def test_a_port_parses_back_from_its_text(port: Port) -> None:
    assert parse_port(str(port)) == port
    assert parse_port(str(port)).axes == port.axes


@given(ports)
def test_an_indexed_port_belongs_to_the_part_that_offers_it(port: Port) -> None:
    assert port.signal in signals_of(port.part.kind).values()
    assert port.part.layer == port.layer
    assert port.part.index == port.index


@given(st.lists(ports), st.lists(parts))
def test_ports_and_parts_sort_without_error_by_layer_first(some: list[Port], places: list[Part]) -> None:
    layers = [-1 if port.layer is None else port.layer for port in sorted(some)]
    assert layers == sorted(layers)
    layers = [-1 if part.layer is None else part.layer for part in sorted(places)]
    assert layers == sorted(layers)


def test_the_text_of_each_kind() -> None:
    written = {
        Port("attn.z", 3, 5): "L3.H5.z",
        Port("attn.k", 3, 1): "L3.KV1.k",
        Port("attn.head_out", 3, 5): "L3.H5.out",
        Port("mlp.act", 2, 77): "L2.N77.act",
        Port("experts.out", 4, 2): "L4.E2.out",
        Port("router.weights", 4, 2): "L4.E2.weight",
        Port("attn.out", 3): "L3.attn.out",
        Port("resid_mid", 0): "L0.resid_mid",
        Port("attn.pattern", 1, 0, (-1,)): "L1.H0.pattern[-1]",
        Port("attn.pattern", 1, None, (2, -1)): "L1.attn.pattern[2,-1]",
        Port("logits"): "logits",
    }
    for port, text in written.items():
        assert str(port) == text
        assert parse_port(text) == port
    assert parse_port("embed.out") == Port("embed")
    assert parse_port("unembed.logits") == Port("logits")
    assert Part(3, "head", 5).port() == Port("attn.z", 3, 5)


def test_axes_lose_the_one_that_is_indexed() -> None:
    assert Port("attn.q", 0).axes == ("prompt", "head", "query", "d_head")
    assert Port("attn.q", 0, 2).axes == ("prompt", "query", "d_head")
    assert Port("mlp.act", 0, 2).axes == ("prompt", "position")
    assert Port("attn.pattern", 0, 2).axes == ("prompt", "query", "key")
    assert Port("attn.k", 0).position_axis == 2
    assert Port("attn.z", 0).position_axis == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: parse_part("H5"), r"'H5' is not a part.*L3\.H5 \(head\)"),
        (lambda: parse_part("L3.X5"), "is not a part"),
        (
            lambda: parse_port("L3.H5.zed"),
            r"asked for signal 'zed', this part has q, k, v, pattern, z, out; did you mean 'z'",
        ),
        (lambda: parse_port("logit"), "did you mean 'logits'"),
        (lambda: parse_port("L3"), "'L3' is not a port: L3 is a part, .*L3.resid_in, L3.resid_mid, L3.resid_out"),
        (lambda: parse_port("blocks.3.hook_z"), "is not a port.*Signals of a layer are resid_in, .*attn.pattern"),
        (lambda: parse_port("L3.attn.patern"), "asked for signal 'patern'.*did you mean 'pattern'"),
        (lambda: Port("attn.zz", 0), "no signal 'attn.zz'.*did you mean 'attn.z'"),
        (lambda: Port("logits", 0), "belongs to no layer"),
        (lambda: Port("attn.z"), "needs a layer"),
        (lambda: Port("attn.out", 0, 1), "has axes prompt, position, d_model: none to index"),
        (lambda: Port("attn.z", 0, None, (1,)), "of attn.pattern alone"),
        (lambda: Port("attn.pattern", 0).rows(), "one or more"),
        (lambda: Part(0, "layer").port(), "resid_in, resid_mid, resid_out"),
        (lambda: as_part(3.5), "expected a part.*got float"),
    ],
)
def test_errors_say_what_was_asked_and_what_is_possible(wrong, says: str) -> None:
    with pytest.raises(PatchbayError, match=says):
        wrong()


def test_only_a_near_name_is_suggested() -> None:
    known = ["induction_heads", "isotropy", "channels"]
    assert suggest("induction_head", known) == "; did you mean 'induction_heads'?"
    assert suggest("zebra", known) == ""
