"""The text of a port wherever a port belongs: taps, edits, traces; the same numbers as by the port itself."""

import functools

import pytest
import torch

import patchbay as pb
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError, Port
from patchbay.tiny.twins import twin
from tests.tolerance import close

IDS = [[3, 4, 5, 6, 7], [8, 9, 10]]


@functools.cache
def grouped() -> Model:
    return pb.load(twin("llama"))  # 4 heads over 2 key/value groups


@functools.cache
def tiny() -> Model:
    return pb.load("tiny")


def test_text_taps_what_the_port_taps() -> None:
    model = grouped()
    head = model.layers[1].heads[3]
    by_text = pb.run(model, IDS, taps=["L1.attn.pattern", "L1.H3.k", "logits", "L0.resid_out"])
    by_port = pb.run(model, IDS, taps=[model.layers[1].attn.pattern, head.k, model.logits, model.layers[0].resid_out])
    assert by_text.ports == by_port.ports
    for text, port in (("L1.H3.pattern", head.pattern), ("L1.H3.k", head.k), ("logits", Port("logits"))):
        assert torch.equal(by_text[text].nan_to_num(-7), by_port[port].nan_to_num(-7))
    assert torch.equal(by_text.last("L0.resid_out"), by_port.last(model.layers[0].resid_out))


def test_keys_of_a_query_head_are_its_groups_not_the_group_of_its_number() -> None:
    """Head 1 reads from group 0: group 1 would be another head's keys, in silence."""
    model = grouped()
    assert pb.run(model, IDS, taps=["L0.H1.k"]).ports == [Port("attn.k", 0, 0)]
    with pytest.raises(PatchbayError, match="which the model knows"):
        pb.zero("L0.H1.v")
    assert pb.zero("L0.KV1.v").port == Port("attn.v", 0, 1)


def test_one_tap_needs_no_list() -> None:
    for one in ("L0.attn.z", Port("attn.z", 0)):
        assert pb.run(grouped(), IDS, taps=one).ports == [Port("attn.z", 0)]  # type: ignore[arg-type]
    with grouped().session(taps="L0.attn.z") as session:  # type: ignore[arg-type]
        grouped().hf(torch.tensor(IDS[:1]))
    assert list(session.captured) == [Port("attn.z", 0)]


@pytest.mark.parametrize("make", [pb.zero, lambda port: pb.scale(port, 0.5), lambda port: pb.add(port, torch.ones(8)),
                                  lambda port: pb.replace(port, 1.0), lambda port: pb.mean(port, torch.ones(8)),
                                  lambda port: pb.project(port, torch.eye(8)[:1])])  # fmt: skip
def test_an_edit_by_text_is_the_edit_by_its_port(make) -> None:
    assert make("L1.H2.z") == make(Port("attn.z", 1, 2))
    assert pb.block("L1.H2.pattern", key=0) == pb.block(Port("attn.pattern", 1, 2), key=0)


def test_gradients_take_text() -> None:
    trace = pb.run(grouped(), IDS[:1], taps=["L0.resid_out"], grad=True)
    by_text = trace.gradient(trace.logits[0, -1, 5], "L0.resid_out")[0]
    assert torch.equal(by_text, trace.gradient(trace.logits[0, -1, 5], Port("resid_out", 0))[0])
    assert by_text.abs().max() > 0


@pytest.mark.parametrize(("text", "says"), [
    ("L9.attn.z", "the model has layers 0..1"),
    ("L0.H7.z", r"layer 0 has 4 \(0..3\)"),
    ("L0.router.logits", "layer 0 offers resid_in, .*no layer of this llama model has it"),
    ("L0.H1", "is a part, and a port is one of its signals: L0.H1.q"),
])  # fmt: skip
def test_wrong_text_is_refused_with_what_there_is(text: str, says: str) -> None:
    with pytest.raises(PatchbayError, match=says):
        pb.run(grouped(), IDS, taps=[text])


def test_a_trace_that_lacks_a_port_says_what_it_has() -> None:
    trace = pb.run(grouped(), IDS, taps=["L0.attn.z"])
    with pytest.raises(PatchbayError, match="L1.attn.z was not tapped; tapped were L0.attn.z"):
        trace["L1.attn.z"]


# --- tokens and what a trace shows ----------------------------------------------------------------


def test_tokens_are_a_table() -> None:
    model, text = tiny(), "The capital of Lolavia"
    ids = model.encode(text)[0]
    found = model.tokens(text)
    assert [(t.position, t.from_end, t.id, t.text) for t in found] == [
        (i, i - len(ids), number, model.decode([number])) for i, number in enumerate(ids)
    ]
    lines = repr(found).splitlines()
    assert lines[0].split() == ["prompt", "position", "from", "end", "id", "token"]
    assert repr(model.decode([ids[-1]])) in lines[-1]
    assert "<script" not in model.tokens([ids])._repr_html_()
    assert [t.prompt for t in model.tokens([text, text])] == [0] * len(ids) + [1] * len(ids)


def test_a_pattern_is_shown_with_its_tokens() -> None:
    model, prompts = tiny(), ["The capital of Lolavia", "The capital of"]
    trace = pb.run(model, prompts, taps=["L1.attn.pattern", "L1.mlp.act", "L0.resid_out", "logits"])
    shown = trace.show("L1.H2.pattern", prompt=1)
    tokens = [t.text for t in model.tokens(prompts[1])]
    assert shown.axes == ("query", "key")
    assert shown.coords == {"query": tokens, "key": tokens}
    assert torch.equal(shown.values, trace["L1.H2.pattern"][1, : len(tokens), : len(tokens)])
    length = trace.show("L0.resid_out", prompt=1)
    assert close(length.values, trace["L0.resid_out"][1, : len(tokens)].norm(dim=-1))
    assert trace.show("L1.mlp.act").axes == ("position", "neuron")
    said = trace.show("logits").tables["most_likely"][-1]
    best = int(trace.last_logits[0].argmax())
    assert said["most_likely"] == model.decode([best])
    assert said["probability"] == pytest.approx(float(trace.last_logits[0].softmax(-1)[best]))
    with pytest.raises(PatchbayError, match="name one, like L1.H0.pattern"):
        trace.show("L1.attn.pattern")
    with pytest.raises(PatchbayError, match="the run had 2"):
        trace.show("L1.H0.pattern", prompt=2)


def test_ports_are_a_list_and_a_port_is_required_by_text() -> None:
    model = grouped()
    assert list(model.ports) == model.ports() == model.ports
    assert model.ports[0] == Port("embed")
    assert model.layers[1].heads[2].ports[0] == Port("attn.q", 1, 2)
    assert model.layers[1].heads[2].ports() == model.layers[1].heads[2].ports
    model.require("L1.H2.z")
    with pytest.raises(PatchbayError, match="the model has layers"):
        model.require("L9.H2.z")
    trace = pb.run(model, IDS, taps=model.ports)
    assert set(trace.ports) == set(model.ports)
