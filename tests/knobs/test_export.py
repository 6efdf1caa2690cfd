"""Export: what was written does what the knob does, loaded by transformers, peft and gguf; what cannot be written is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import patchbay as pb
from patchbay.edits.edit import Edit
from patchbay.knobs.gguf import write_gguf
from patchbay.knobs.knob import Knob
from patchbay.signal.port import Port
from patchbay.tiny import planted, twins
from tests.given import lent
from tests.shares import by_turns
from tests.tolerance import NOISE, Nearness, close

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
FAMILIES = (
    "gpt2",
    "llama",
    "gemma2",
    "olmo2",
    "phi",
    "falcon grouped",
    "mixtral",
    "gpt_oss",
    "granite",
    "lfm2",
    "deepseek_v3",
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()


@torch.no_grad()
def apart(model: pb.Model, knob: Knob, hf: Any) -> tuple[Nearness, float]:
    """Whether other weights are the edited model, and how far that is from the model as it is, in the largest logit."""
    expected, plain = pb.run(model, IDS, edits=[knob]).logits, pb.run(model, IDS).logits
    near = close(hf(IDS).logits, expected, dtype=model.dtype, noise=4 * NOISE)  # its weights were rounded once more
    return near, float((expected - plain).abs().max())


def turned(*edits: Edit, strength: float | None = None) -> Knob:
    return Knob("k", edits, (2.0 if edits[0].op == "scale" else 1.0) if strength is None else strength)


# --- checkpoints --------------------------------------------------------------------------------------

FOLDED: dict[str, Callable[[pb.Model, int], list[Edit]]] = {
    "heads": lambda m, i: [pb.scale(m.layers[i].heads[1].z, 1.0), pb.scale(m.layers[i].heads[3].z, -0.5)],
    "values": lambda m, i: [pb.scale(m.layers[i].groups[0].v, noise(m.W_O(i).shape[1]))],
    "z of all heads": lambda m, i: [pb.scale(m.layers[i].attn.z, noise(m.n_heads(i), m.W_O(i).shape[1]))],
    "z project": lambda m, i: [pb.project(m.layers[i].heads[2].z, noise(2, m.W_O(i).shape[1]))],
    "head out": lambda m, i: [pb.project(m.layers[i].heads[0].out, noise(3, m.d_model), keep=True)],
    "two at one signal": lambda m, i: [
        pb.project(m.layers[i].attn.z, noise(2, m.W_O(i).shape[1])),
        pb.project(m.layers[i].heads[1].z, noise(3, m.W_O(i).shape[1], seed=5)),
    ],
    "attn out": lambda m, i: [pb.scale(m.layers[i].attn.out, noise(m.d_model))],
    "mlp out": lambda m, i: [pb.scale(m.layers[i].mlp.out, noise(m.d_model))],
}


@pytest.mark.parametrize(
    ("name", "what"), [pair for pair in by_turns(FAMILIES, FOLDED, of=3) if pair != ("falcon grouped", "values")]
)
def test_a_checkpoint_has_the_logits_of_the_edited_model(name: str, what: str, tmp_path: Path) -> None:
    model = lent(name)
    layer = next(i for i in range(model.n_layers) if model.n_heads(i))
    knob = turned(*FOLDED[what](model, layer))
    before = copy.deepcopy(model.hf.state_dict())
    written = knob.export(model, tmp_path / "out")
    near, effect = apart(model, knob, loaded(tmp_path / "out"))
    assert near
    assert effect > 1e-3
    assert all(torch.equal(before[key], value) for key, value in model.hf.state_dict().items())
    assert written.changed
    assert json.loads((tmp_path / "out" / "patchbay.json").read_text())["model"]["fingerprint"] == model.fingerprint


def test_neurons_and_inputs_of_the_mlp(tmp_path: Path) -> None:
    for name in ("gpt2", "llama", "phi3"):
        model = lent(name)
        layer = model.layers[1]
        active = int(pb.run(model, IDS, taps=[layer.mlp.act])[layer.mlp.act].abs().amax((0, 1)).argmax())
        for edit in (pb.scale(layer.mlp.neurons[active].act, 1.0), pb.project(layer.mlp.input, noise(4, 32))):
            knob = turned(edit, strength=3.0)
            knob.export(model, tmp_path / "out", overwrite=True)
            near, effect = apart(model, knob, loaded(tmp_path / "out"))
            assert near
            assert effect > 1e-4


def test_experts_of_both_layouts(tmp_path: Path) -> None:
    """Mixtral stores a matrix as [stream, neuron], GPT-OSS as [neuron, stream] with a bias."""
    for name in ("mixtral", "gpt_oss", "qwen3_moe"):
        model = lent(name)
        experts = [pb.scale(expert.out, 1.0) for expert in list(model.layers[1].experts)[:2]]
        for edits in (experts, [pb.project(Port("experts.out", 0), noise(2, 32))]):
            knob = turned(*edits)
            knob.export(model, tmp_path / "out", overwrite=True)
            near, effect = apart(model, knob, loaded(tmp_path / "out"))
            assert near
            assert effect > 1e-3


def test_adding_goes_into_biases_where_there_are_some(tmp_path: Path) -> None:
    """Added to the stream, to heads and to neurons of GPT-2 and of a Llama with biases."""
    model, biased = lent("gpt2"), lent("llama biased")
    for who in (model, biased):
        for port in (who.layers[1].resid_in, who.layers[0].resid_mid, who.layers[1].resid_out, who.layers[0].attn.out):
            knob = turned(pb.add(port, noise(who.d_model)))
            knob.export(who, tmp_path / "out", overwrite=True)
            near, effect = apart(who, knob, loaded(tmp_path / "out"))
            assert near
            assert effect > 1e-2
    for edit in (pb.mean(model.layers[1].heads[1].z, noise(8)), pb.replace(model.layers[0].mlp.neurons[3].act, 1.5)):
        knob = turned(edit, strength=0.5)
        knob.export(model, tmp_path / "out", overwrite=True)
        assert apart(model, knob, loaded(tmp_path / "out"))[0]


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi", "mixtral", "gpt_oss"])
def test_one_projection_of_the_whole_stream(name: str, tmp_path: Path) -> None:
    """At every place of the stream it folds, embeddings untied; at one place alone it does not."""
    model = lent(name)
    basis = noise(2, model.d_model)
    ports = [Port("embed")]
    ports += [Port(s, i) for i in range(model.n_layers) for s in ("resid_mid", "resid_out") if s in model.signals(i)]
    knob = turned(*(pb.project(port, basis) for port in ports))
    knob.export(model, tmp_path / "out")
    near, effect = apart(model, knob, loaded(tmp_path / "out"))
    assert near
    assert effect > 1e-2
    for missing in range(len(ports)):
        some = turned(*(pb.project(port, basis) for i, port in enumerate(ports) if i != missing))
        with pytest.raises(pb.PatchbayError, match="layers below read the stream as it was"):
            some.export(model, tmp_path / "none")


def test_tied_embeddings_are_untied_where_one_of_them_changes(tmp_path: Path) -> None:
    model = pb.load(twins.twin("llama", tie_word_embeddings=True))
    for edit in (
        pb.scale(Port("final_norm"), noise(32).abs()),
        pb.add(Port("embed"), noise(32)),
        pb.scale(Port("logits"), 1.0),
    ):
        knob = turned(edit, strength=0.5)
        knob.export(model, tmp_path / "out", overwrite=True)
        hf = loaded(tmp_path / "out")
        assert hf.config.tie_word_embeddings is False
        assert apart(model, knob, hf)[0]
    knob = turned(pb.scale(model.layers[0].heads[0].z, 1.0))
    knob.export(model, tmp_path / "out", overwrite=True)
    assert loaded(tmp_path / "out").config.tie_word_embeddings is True


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_a_planted_head_is_gone_from_the_checkpoint(form: Any, tmp_path: Path) -> None:
    """The built-in mechanism answers; loaded back with the head scaled to 0, it does not. The tokenizer goes along."""
    built = planted.induction(form=form, seed=1)
    model = pb.load(built.model, built.tokenizer)
    pb.turn.scale([built.truth["induction"]], 0.0, model=model).export(model, tmp_path / "out")
    other = pb.load(tmp_path / "out")
    for prompt, answer in list(zip(built.truth["prompts"], built.truth["answers"], strict=True))[:3]:
        assert model.generate(prompt, 1) == prompt + answer
        assert other.generate(prompt, 1) != prompt + answer


# --- adapters -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft asks transformers for an old name
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral", "phi"])
def test_peft_loads_the_adapter(name: str, tmp_path: Path) -> None:
    """Two modules of different ranks; with the adapter on, the logits of the edited model; off, the model's own."""
    peft = pytest.importorskip("peft")
    model = lent(name)
    edits = [pb.scale(model.layers[0].heads[1].z, 1.0), pb.scale(model.layers[1].heads[2].z, 1.0)]
    if "mlp.act" in model.signals(1):
        edits.append(pb.scale(model.layers[1].mlp.neurons[5].act, 1.0))
    knob = turned(*edits, strength=-1.5)
    written = knob.export(model, tmp_path / "lora", form="lora")
    assert set(written.files) == {"adapter_config.json", "adapter_model.safetensors", "patchbay.json", "README.md"}
    with_adapter = peft.PeftModel.from_pretrained(copy.deepcopy(model.hf), tmp_path / "lora").eval()
    near, effect = apart(model, knob, with_adapter)
    assert near
    assert effect > 1e-3
    with with_adapter.disable_adapter(), torch.no_grad():
        assert torch.equal(with_adapter(IDS).logits, model.hf(IDS).logits)
    assert apart(model, knob, with_adapter.merge_and_unload())[0]


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    gpt2, mixtral = lent("gpt2"), lent("mixtral")
    cases = [
        (gpt2, pb.scale(gpt2.layers[0].attn.z, 1.0), r"h\.0\.attn\.c_proj: .* rank 32, more than half"),
        (gpt2, pb.add(gpt2.layers[0].attn.out, noise(32)), "a bias, an embedding, a norm or fused experts"),
        (mixtral, pb.scale(mixtral.layers[0].experts[1].out, 1.0), "fused experts"),
    ]
    for model, edit, said in cases:
        with pytest.raises(pb.PatchbayError, match=said):
            turned(edit).export(model, tmp_path / "none", form="lora")
    assert not (tmp_path / "none").exists()


# --- vectors ------------------------------------------------------------------------------------------


def test_a_control_vector_as_the_format_says(tmp_path: Path) -> None:
    """Read by the gguf package: architecture, layers, and a direction for each layer that something is added behind."""
    gguf = pytest.importorskip("gguf")
    model = pb.load("tiny")
    first, second = noise(128), noise(128, seed=2)
    edits = [
        pb.add(model.layers[1].resid_out, first),
        pb.add(model.layers[2].resid_in, second),
        pb.add(model.layers[2].mlp.out, second),
    ]
    written = Knob("steer", edits, 2.5).export(model, tmp_path / "out", form="gguf")
    assert written.files == ("README.md", "control-vector.gguf", "patchbay.json")
    reader = gguf.GGUFReader(tmp_path / "out" / "control-vector.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "gpt2",
        "controlvector.layer_count": 3,
    }
    found = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in reader.tensors}
    assert list(found) == ["direction.1", "direction.2"]
    assert torch.equal(found["direction.1"], 2.5 * first + 2.5 * second)
    assert torch.equal(found["direction.2"], 2.5 * second)
    steered = [pb.add(Port("resid_out", int(name.split(".")[1])), vector) for name, vector in found.items()]
    knob = Knob("steer", edits, 2.5)
    same, plain = (pb.run(model, IDS, edits=e).logits for e in (steered, []))
    assert close(same, pb.run(model, IDS, edits=[knob]).logits)
    assert (same - plain).abs().max() > 0.1


def test_gguf_arrays_of_odd_lengths_are_aligned(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    arrays = {f"direction.{n}": noise(n).numpy() for n in (1, 7, 33)}
    write_gguf(tmp_path / "a.gguf", {"general.architecture": "controlvector", "naïve": "ü"}, arrays)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert {t.name: t.data.tolist() for t in reader.tensors} == {name: array.tolist() for name, array in arrays.items()}
    assert reader.fields["naïve"].contents() == "ü"


def test_plain_safetensors_hold_any_port(tmp_path: Path) -> None:
    model = lent("llama")
    edits = [pb.add(model.layers[0].resid_out, noise(32)), pb.add(model.layers[1].heads[2].z, noise(8))]
    Knob("steer", edits, -2.0).export(model, tmp_path / "out", form="vector")
    held = load_file(tmp_path / "out" / "steering.safetensors")
    assert set(held) == {"L0.resid_out", "L1.H2.z"}
    rebuilt = [pb.add(model.port(name), vector) for name, vector in held.items()]
    assert torch.equal(
        pb.run(model, IDS, edits=rebuilt).logits, pb.run(model, IDS, edits=[Knob("s", edits, -2.0)]).logits
    )


def test_what_is_no_vector_is_refused(tmp_path: Path) -> None:
    model = lent("gpt2")
    layer = model.layers[1]
    vector = noise(32)
    cases = [
        (pb.scale(layer.resid_out, 1.0), "gguf", "a control vector only adds"),
        (pb.add(layer.resid_out, vector, positions="last"), "vector", "the same at every position"),
        (pb.add(layer.resid_mid, vector), "gguf", "behind a layer"),
        (pb.add(model.layers[0].resid_out, vector), "gguf", r"none for layer 0; form='vector' has"),
        (pb.add(layer.resid_in, vector), "gguf", "none for layer 0"),
    ]
    for edit, form, said in cases:
        with pytest.raises(pb.PatchbayError, match=said):
            turned(edit).export(model, tmp_path / "none", form=form)
    assert not (tmp_path / "none").exists()


# --- what no form holds -------------------------------------------------------------------------------


def test_every_edit_that_cannot_be_folded_is_named_with_its_reason(tmp_path: Path) -> None:
    model = lent("llama")
    layer = model.layers[1]
    cases = [
        (pb.scale(layer.heads[0].z, 1.0, positions=-1), "weights act at all of them"),
        (pb.scale(layer.heads[0].z, 1.0, rows=0), "weights treat all alike"),
        (pb.add(layer.resid_out, noise(3, 32)), "weights treat all alike"),
        (pb.block(layer.heads[0].pattern, key=0), "cutting attention is no linear map"),
        (pb.zero(layer.heads[1].pattern), "attention weights are no linear map"),
        (pb.scale(layer.heads[1].q, 1.0), "queries pass rotary"),
        (pb.scale(layer.groups[1].k, 1.0), "keys pass rotary"),
        (pb.scale(layer.resid_out, 1.0), "layers below read the stream as it was"),
        (pb.add(Port("logits"), noise(96)), "the unembedding has no bias"),
    ]
    for edit, reason in cases:
        knob = turned(edit)
        with pytest.raises(pb.PatchbayError) as caught:
            knob.export(model, tmp_path / "none")
        assert reason in str(caught.value), edit
        assert str(knob.edits_at()[0]) in str(caught.value)
    good, bad = pb.scale(layer.heads[0].z, 1.0), pb.scale(layer.heads[1].q, 1.0)
    with pytest.raises(pb.PatchbayError) as caught:
        turned(good, bad, pb.scale(layer.groups[0].k, 1.0)).export(model, tmp_path / "none")
    assert "L1.H1.q" in str(caught.value)
    assert "L1.KV0.k" in str(caught.value)
    assert "L1.H0.z" not in str(caught.value)
    gemma, falcon = lent("gemma2"), lent("falcon grouped")
    with pytest.raises(pb.PatchbayError, match="4 value heads share 2 stored ones"):
        turned(pb.scale(falcon.layers[0].groups[0].v, 1.0)).export(falcon, tmp_path / "none")
    with pytest.raises(pb.PatchbayError, match="a norm stands between"):
        turned(pb.project(gemma.layers[0].attn.out, noise(1, 32))).export(gemma, tmp_path / "none")
    with pytest.raises(pb.PatchbayError, match="soft cap"):
        turned(pb.scale(Port("logits"), 1.0)).export(
            pb.load(twins.twin("gemma2", final_logit_softcapping=5.0)), tmp_path / "none"
        )
    assert not (tmp_path / "none").exists()


def test_what_does_not_reproduce_the_edited_model_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fold that is wrong by one part in a thousand is found before anything is written."""
    from patchbay.knobs import fold

    model = lent("gpt2")
    own = fold._z
    monkeypatch.setitem(fold.WRITE, "attn.z", lambda f, p, m: own(f, p, fold.Affine(m.a * 1.001, m.b)))
    knob = turned(pb.scale(model.layers[0].heads[0].z, 1.0))
    for form in ("checkpoint", "lora"):
        with pytest.raises(pb.PatchbayError, match="differ from the edited model's by .*: not written"):
            knob.export(model, tmp_path / "out", form=form)
    assert not list(tmp_path.iterdir())


def test_bad_requests(tmp_path: Path) -> None:
    model, other = lent("gpt2"), pb.load(twins.twin("gpt2", seed=1))
    knob = pb.turn.scale(["L0.H1"], 0.5, model=model)
    with pytest.raises(pb.PatchbayError, match=r"no form 'chekpoint'.*did you mean 'checkpoint'"):
        knob.export(model, tmp_path / "out", form="chekpoint")
    with pytest.raises(pb.PatchbayError, match="is neutral: there is nothing to export"):
        knob.at(1.0).export(model, tmp_path / "out")
    with pytest.raises(pb.PatchbayError, match="leave the block"), model.edited(knob):
        knob.export(model, tmp_path / "out")
    with pytest.raises(pb.PatchbayError, match=f"{model.fingerprint}.*{other.fingerprint}"):
        knob.export(other, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lent("gpt2")
    knob, target = pb.turn.scale(["L0.H1"], 0.5, model=model), tmp_path / "out"
    knob.export(model, target)
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(pb.PatchbayError, match="overwrite=True replaces an export"):
        knob.at(0.1).export(model, target)
    monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(pb.PatchbayError, match="No space left on device; nothing was written"):
        knob.at(0.1).export(model, target, overwrite=True)
    monkeypatch.undo()
    assert (target / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    knob.at(0.1).export(model, target, overwrite=True)
    assert (target / "model.safetensors").read_bytes() != before
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("keep")
    with pytest.raises(pb.PatchbayError, match="no export: not replaced"):
        knob.export(model, foreign, overwrite=True)
    with pytest.raises(pb.PatchbayError, match="an export is a folder"):
        knob.export(model, foreign / "notes.txt")
    assert (foreign / "notes.txt").read_text() == "keep"


def test_in_float64_the_weights_are_exact(tmp_path: Path) -> None:
    model = pb.load(twins.twin("llama").double())
    knob = turned(pb.project(model.layers[1].attn.out, noise(2, 32).double()), pb.zero(model.layers[0].heads[1].z))
    written = knob.export(model, tmp_path / "out")
    assert written.error < 1e-12
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    assert apart(model, knob, hf)[0]
