"""vectors: steering vectors of other programs do as knobs what their programs do with them; pickles are refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.knobs.gguf import read_gguf
from patchbay.knobs.knob import Knob
from patchbay.tiny.twins import twin
from tests.tolerance import close

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hook(model: pb.Model, vectors: dict[int, Tensor], strength: float) -> Tensor:
    """Logits with vectors added to what layers return, as repeng and steering-vectors do it."""

    def adding(vector: Tensor):
        def hook(_module, _args, output):
            first = output[0] if isinstance(output, tuple) else output
            new = first + strength * vector
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    handles = [model.modules[i].layer.register_forward_hook(adding(v)) for i, v in vectors.items()]
    try:
        with torch.no_grad():
            return model.hf(IDS).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
@pytest.mark.parametrize("kind", ["gguf", "named", "rows", "npy"])
def test_vectors_of_others_add_behind_their_layers(name: str, kind: str, tmp_path: Path) -> None:
    model = pb.load(twin(name))
    vectors = {i: noise(model.d_model, seed=i) for i in range(1, model.n_layers)}
    table = torch.stack([vectors.get(i, torch.zeros(model.d_model)) for i in range(model.n_layers)])
    path = tmp_path / f"happy.{'npy' if kind == 'npy' else 'gguf' if kind == 'gguf' else 'safetensors'}"
    if kind == "gguf":  # as repeng writes it, by the package
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(path, "controlvector")
        writer.add_string("controlvector.model_hint", name)
        writer.add_uint32("controlvector.layer_count", len(vectors))
        for i, vector in vectors.items():
            writer.add_tensor(f"direction.{i}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    elif kind == "named":
        save_file({f"layers.{i}": vector for i, vector in vectors.items()}, path)
    elif kind == "rows":
        save_file({"vectors": table}, path)
    else:
        np.save(path, table.numpy())
    knob = pb.load_knob(path, model)
    assert knob.name == "happy"
    assert knob.fits(model)
    expected = by_hook(model, vectors, 1.5)
    found = pb.run(model, IDS, edits=[knob.at(1.5)]).logits
    assert close(found, expected)
    assert float((expected - pb.run(model, IDS).logits).abs().max()) > 1e-2


def test_our_own_exports_of_vectors_load_again(tmp_path: Path) -> None:
    model = pb.load(twin("llama"))
    edits = [pb.add(model.layers[1].attn.out, noise(32)), pb.add(model.layers[1].resid_out, noise(32, seed=4))]
    knob = Knob("k", edits, 2.0)
    knob.export(model, tmp_path / "any", form="vector")
    again = pb.load_knob(tmp_path / "any" / "steering.safetensors", model)
    assert again.edits == tuple(knob.edits_at())
    Knob("k", edits[1:], 2.0).export(model, tmp_path / "gguf", form="gguf")
    again = pb.load_knob(tmp_path / "gguf" / "control-vector.gguf", model)
    assert again.edits == tuple(Knob("k", edits[1:], 2.0).edits_at())


def test_vectors_behind_a_block_of_a_layer(tmp_path: Path) -> None:
    """Behind attention or the MLP where what they return enters the stream; elsewhere, and behind norms, refused."""
    model, vector = pb.load(twin("llama")), noise(32)
    for name, signal in (("self_attn.1", "attn.out"), ("layers.mlp.1", "mlp.out"), ("decoder_block.1", "resid_out")):
        save_file({name: vector}, tmp_path / "v.safetensors")
        (edit,) = pb.load_knob(tmp_path / "v.safetensors", model).edits
        assert str(edit.port) == f"L1.{signal}"
    for name, family in (("self_attn.1", "gemma2"), ("mlp.1", "granite"), ("mlp.0", "mamba")):
        save_file({name: vector}, tmp_path / "v.safetensors")
        with pytest.raises(PatchbayError, match="a norm or a scale stands between"):
            pb.load_knob(tmp_path / "v.safetensors", pb.load(twin(family)))
    save_file({"input_layernorm.1": vector}, tmp_path / "v.safetensors")
    with pytest.raises(PatchbayError, match="is added behind a norm"):
        pb.load_knob(tmp_path / "v.safetensors", model)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_vectors_written_by_repeng_do_here_what_they_do_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4 names it, numpy 2 has it no more
    repeng = pytest.importorskip("repeng", reason="repeng is not installed (pip install repeng)")
    model = pb.load(twin(name))
    made = repeng.ControlVector(name, {i: noise(model.d_model, seed=i).numpy() for i in range(1, model.n_layers)})
    made.export_gguf(tmp_path / "v.gguf")
    wrapped = repeng.ControlModel(twin(name), list(made.directions))
    wrapped.set_control(made, 1.5)
    with torch.no_grad():
        expected = wrapped(IDS[:1]).logits  # it takes one row of positions for one prompt
    knob = pb.load_knob(tmp_path / "v.gguf", model)
    assert close(pb.run(model, IDS[:1], edits=[knob.at(1.5)]).logits, expected)
    assert not close(expected, pb.run(model, IDS[:1]).logits)


@pytest.mark.parametrize("kind", ["decoder_block", "self_attn", "mlp"])
def test_vectors_of_steering_vectors_do_here_what_they_do_there(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pytest.importorskip(
        "steering_vectors", reason="steering-vectors is not installed (pip install steering-vectors)"
    )
    monkeypatch.chdir(tmp_path)
    model = pb.load(twin("llama"))
    made = package.SteeringVector({1: noise(32), 0: noise(32, seed=2)}, kind)
    with torch.no_grad(), made.apply(model.hf, multiplier=-2.0):
        expected = model.hf(IDS).logits
    torch.save(made, "v.pt")
    with pytest.raises(PatchbayError) as refused:
        pb.load_knob("v.pt")
    exec(str(refused.value).split("\n", 1)[1])
    found = pb.run(model, IDS, edits=[pb.load_knob("v.safetensors", model).at(-2.0)]).logits
    assert close(found, expected)
    assert not close(expected, pb.run(model, IDS).logits)


class Dangerous:
    def __reduce__(self):
        return (Path.touch, (Path("opened-a-pickle"),))


def test_pickles_are_refused_with_the_lines_that_convert_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, write in (("a.pkl", pickle.dump), ("a.pt", lambda made, file: torch.save(made, file))):
        with open(name, "wb") as file:
            write(Dangerous(), file)
        with pytest.raises(PatchbayError, match=r"is a pickle[\s\S]*safetensors[\s\S]*layer_activations"):
            pb.load_knob(name)
    assert not Path("opened-a-pickle").exists()


def test_the_printed_conversion_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = ControlVector({0: noise(32).numpy(), 1: noise(32, seed=2).numpy()})
    torch.save(made, "v.pt")
    with pytest.raises(PatchbayError) as refused:
        pb.load_knob("v.pt")
    exec(str(refused.value).split("\n", 1)[1])
    knob = pb.load_knob("v.safetensors", pb.load(twin("llama")))
    assert [str(edit.port) for edit in knob.edits] == ["L0.resid_out", "L1.resid_out"]
    assert torch.equal(knob.edits[1].value, noise(32, seed=2))


class ControlVector:
    """As repeng's: directions by layer."""

    def __init__(self, directions: dict[int, np.ndarray]) -> None:
        self.directions = directions


def test_what_does_not_fit_or_does_not_say_its_layer_is_refused(tmp_path: Path) -> None:
    model = pb.load(twin("llama"))
    n = model.n_layers
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"direction.9": noise(32)}, f"the model has layers 0..{n - 1}"),
        ({"direction.1": noise(31)}, "has 31 numbers, the stream of this model 32"),
        ({"happiness": noise(32)}, "'happiness' does not say where it is added"),
        ({"v": noise(n + 1, 32)}, f"has {n + 1} rows.*leave row 0 out"),
        ({"L1.nothing": noise(32)}, "names no port"),
        ({"a.1": noise(32), "b.1": noise(32)}, "second vector for L1.resid_out"),
        ({"a.1": torch.zeros(32)}, "no vector that is not 0"),
    ]
    for tensors, said in cases:
        save_file(tensors, tmp_path / "v.safetensors")
        with pytest.raises(PatchbayError, match=said):
            pb.load_knob(tmp_path / "v.safetensors", model)
    np.save(tmp_path / "one.npy", noise(32).numpy())
    with pytest.raises(PatchbayError, match="does not say which layer"):
        pb.load_knob(tmp_path / "one.npy", model)
    (tmp_path / "torn.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\xff")
    with pytest.raises(PatchbayError, match="no GGUF file, or a damaged one"):
        read_gguf(tmp_path / "torn.gguf")


def test_arrays_and_lists_are_numbers_of_edits() -> None:
    model = pb.load(twin("gpt2"))
    port, vector = model.layers[1].resid_out, noise(32)
    basis = noise(2, 32, seed=3)
    assert pb.add(port, vector.tolist()) == pb.add(port, vector.numpy()) == pb.add(port, vector)
    assert pb.replace(port, np.float32(1.5)) == pb.replace(port, 1.5)
    assert pb.scale(port, np.arange(32)) == pb.scale(port, torch.arange(32.0))
    assert pb.mean(port, vector.numpy()) == pb.mean(port, vector)
    assert pb.project(port, basis.numpy()) == pb.project(port, basis) == pb.project(port, basis.tolist())
    with pytest.raises(PatchbayError, match="is not an array of numbers"):
        pb.add(port, ["a", "b"])
    with pytest.raises(PatchbayError, match="basis 'x' is not a tensor"):
        pb.project(port, "x")
