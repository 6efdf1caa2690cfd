"""model: views and their text, weights by head against what attention receives, loading, and what is lent stays as it was."""

import functools
import hashlib
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import patchbay as pb
from patchbay.model.check import verify
from patchbay.model.model import Model
from patchbay.model.self_check import self_check
from patchbay.model.weights import norm_parts
from patchbay.signal.port import PatchbayError, Port
from patchbay.tiny.twins import twin
from tests.shared import SHARED
from tests.tolerance import close


@functools.cache
def model_of(name: str) -> Model:
    return pb.load(twin(name))


def ids(n: int = 8) -> Tensor:
    return torch.randint(3, 90, (2, n), generator=torch.Generator().manual_seed(0))


# ---- views -----------------------------------------------------------------------------------------------------------


def test_walking_the_parts_names_the_ports() -> None:
    model = model_of("mixtral")
    layer = model.layers[1]
    assert [str(port) for port in (layer.heads[3].z, layer.heads[3].q, layer.heads[3].pattern, layer.heads[3].out)] == [
        "L1.H3.z",
        "L1.H3.q",
        "L1.H3.pattern",
        "L1.H3.out",
    ]
    assert layer.heads[3].k == layer.groups[1].k == Port("attn.k", 1, 1)  # heads 2 and 3 share group 1
    assert [str(head.part) for head in layer.groups[1].heads] == ["L1.H2", "L1.H3"]
    assert layer.experts[2].out == Port("experts.out", 1, 2)
    assert (layer.experts[2].weight, layer.experts[2].logit) == (
        Port("router.weights", 1, 2),
        Port("router.logits", 1, 2),
    )
    assert layer.router.experts == Port("router.experts", 1)
    assert (layer.resid_in, layer.resid_mid, layer.resid_out) == tuple(
        Port(f"resid_{x}", 1) for x in ("in", "mid", "out")
    )
    assert (model.embed.out, model.final_norm.out, model.unembed.logits) == tuple(
        Port(x) for x in ("embed", "final_norm", "logits")
    )
    assert layer.attn.out == Port("attn.out", 1)
    assert (layer.mlp.input, layer.mlp.out) == (Port("mlp.in", 1), Port("mlp.out", 1))
    dense = model_of("llama").layers[-1]
    assert dense.mlp.neurons[-1].act == Port("mlp.act", 1, 47)
    assert [len(x) for x in (dense.heads, dense.groups, dense.mlp.neurons, dense.experts)] == [4, 2, 48, 0]
    assert [view.part.index for view in dense.heads] == [0, 1, 2, 3]
    assert [view.part.index for view in dense.heads[1:3]] == [1, 2]


def test_printing_a_part_shows_what_it_is_and_its_ports() -> None:
    model = model_of("mixtral")
    assert repr(model.layers[1].heads[3]).splitlines() == [
        "L1.H3: attention head (keys and values of L1.KV1) of MixtralForCausalLM",
        "  L1.H3.q              [prompt, query, d_head]",
        "  L1.KV1.k             [prompt, key, d_head]",
        "  L1.KV1.v             [prompt, key, d_head]",
        "  L1.H3.pattern        [prompt, query, key]",
        "  L1.H3.z              [prompt, position, d_head]",
        "  L1.H3.out            [prompt, position, d_model]",
    ]
    assert "key/value group (heads L1.H2, L1.H3)" in repr(model.layers[1].groups[1])
    assert "router.experts    [prompt, position, choice]  (tap only)" in repr(model.layers[1].router)
    assert "layer with 4 heads, 4 experts" in repr(model.layers[1])
    assert "layer with Mamba2Mixer" in repr(model_of("mamba2").layers[0])
    assert repr(model.layers) == "2 layers: L0 .. L1"
    assert repr(model_of("mamba2").layers[0].heads) == "0 heads"
    text = repr(model)
    assert "family moe (mixtral)" in text
    assert "4 heads over 2 key/value groups, 4 experts" in text
    assert "self-check: parts sum to the final stream within" in text
    assert "lacks: resid_mid" in repr(model_of("phi"))
    for view in (
        model.embed,
        model.final_norm,
        model.unembed,
        model.layers[0].attn,
        model.layers[0].mlp,
        model.layers[0].experts[1],
    ):
        assert str(view.ports()[0]) in repr(view)


def test_texts_of_parts_and_ports_are_checked_against_the_model() -> None:
    model = model_of("llama")
    assert model.port("L1.H3.k") == Port("attn.k", 1, 1)
    assert model.port("L1.KV1.v") == Port("attn.v", 1, 1)
    assert model.port("L0.H2.z") == model.layers[0].heads[2].z
    assert str(model.part("L1.N47")) == "L1.N47"
    for text, says in {
        "L2.H0.z": "the model has layers 0..1",
        "L0.H4.k": r"layer 0 has 4 \(0..3\)",
        "L0.KV2.k": r"layer 0 has 2 \(0..1\)",
        "L0.N48.act": r"layer 0 has 48",
        "L0.E0.out": "no layer of this llama model has it",
        "L0.H1.paths": "did you mean 'pattern'",
    }.items():
        with pytest.raises(PatchbayError, match=says):
            model.port(text)
    for text, says in {"L2": "layers 0..1", "L0.H9": r"0\.\.3", "L0.E1": "no layer of this"}.items():
        with pytest.raises(PatchbayError, match=says):
            model.part(text)
    for index in (4, -5):
        with pytest.raises(PatchbayError, match=rf"head {index} asked, there are 4 \(0..3\)"):
            model.layers[0].heads[index]
    with pytest.raises(PatchbayError, match="no layer of this llama model has it"):
        model.layers[0].router  # noqa: B018
    with pytest.raises(PatchbayError, match="no layer of this phi model has it"):
        model_of("phi").layers[0].resid_mid  # noqa: B018
    with pytest.raises(PatchbayError, match="expected a port, such as .*got int"):
        pb.run(model, ids(), taps=[3])  # type: ignore[list-item]


# ---- weights ---------------------------------------------------------------------------------------------------------


def rotated(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary by its formula: pairs (i, i + d/2) of [prompt, position, d] turn by position * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * theta ** (-2 * torch.arange(half) / x.shape[-1])
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)


@pytest.mark.parametrize(
    "name", ["gpt2", "opt", "gpt_neo", "bloom", "llama", "llama biased", "mistral", "granite", "phi3"]
)
def test_the_normed_stream_times_a_heads_weights_is_its_q_k_and_v(name: str) -> None:
    model = model_of(name)
    layer = model.layers[1]
    turn = rotated if model.family.name in ("llama", "granite", "phi3") else (lambda x: x)
    scale = 8**-0.5 if name == "opt" else 1.0  # OPT scales its queries before attention sees them
    trace = pb.run(
        model, ids(), taps=[layer.resid_in, layer.attn.q, layer.attn.k, layer.attn.v, layer.attn.z, layer.attn.head_out]
    )
    x = model.modules[1].norm_attn(trace[layer.resid_in])
    all_weights = layer.attn.weights()
    for head in layer.heads:
        w, h, g = head.weights(), head.part.index, head.group.part.index
        b_q, b_k, b_v = (
            0 if b is None else b[i] for b, i in ((all_weights.b_Q, h), (all_weights.b_K, g), (all_weights.b_V, g))
        )
        assert close(turn(x @ w["W_Q"] + b_q) * scale, trace[head.q])
        assert close(turn(x @ w["W_K"] + b_k), trace[head.k])
        assert close(x @ w["W_V"] + b_v, trace[head.v])
        assert close(trace[head.z] @ w["W_O"], trace[head.out])
        assert close(all_weights.W_OV(h), w["W_V"] @ w["W_O"])
        assert close(all_weights.W_QK(h), w["W_Q"] @ w["W_K"].T)
    assert torch.equal(all_weights.W_O, model.W_O(1))
    assert (model.n_heads(1), model.n_groups(1), model.d_head(1)) == (
        len(all_weights.W_Q),
        len(all_weights.W_K),
        all_weights.W_Q.shape[-1],
    )


NORMS = {
    "gpt2": ("w", True),
    "llama": ("w", False),
    "gemma": ("1 + w", False),
    "cohere": ("w", True),
    "nemotron": ("1 + w", True),
}


@pytest.mark.parametrize("name", NORMS)
def test_folding_a_norm_moves_its_gain_bias_and_centring_into_the_weights(name: str) -> None:
    model = model_of(name)
    at, layer = model.modules[0], model.layers[0]
    gain, bias, centred = norm_parts(at.norm_attn)
    stored, should_centre = NORMS[name]
    weight = at.norm_attn.weight
    assert torch.equal(gain, weight if stored == "w" else 1 + weight)
    assert (centred, bias is not None) == (should_centre, getattr(at.norm_attn, "bias", None) is not None)
    plain, folded = layer.attn.weights(), layer.attn.weights(fold_norm=True)
    x = 3 * torch.randn(5, model.d_model, generator=torch.Generator().manual_seed(0)) + 1
    unit = (x - x.mean(-1, keepdim=True) if centred else x) / 1.0
    unit = unit / unit.pow(2).mean(-1, keepdim=True).sqrt()
    raw = x / unit.pow(2).mean() / (x - x.mean(-1, keepdim=True) if centred else x).pow(2).mean(-1, keepdim=True).sqrt()
    for w, b, w_folded, b_folded in (
        (plain.W_Q, plain.b_Q, folded.W_Q, folded.b_Q),
        (plain.W_V, plain.b_V, folded.W_V, folded.b_V),
    ):
        expected = at.norm_attn(x) @ w + (0 if b is None else b[:, None])
        for stream in (unit, raw):  # the folded weights centre for themselves
            found = stream @ w_folded + (0 if b_folded is None else b_folded[:, None])
            assert close(found, expected), name
        assert not torch.allclose(w, w_folded)
    mlp, mlp_folded = layer.mlp.weights(), layer.mlp.weights(fold_norm=True)
    expected = at.norm_mlp(x) @ mlp.W_in + (0 if mlp.b_in is None else mlp.b_in)
    found = raw @ mlp_folded.W_in + (0 if mlp_folded.b_in is None else mlp_folded.b_in)
    assert close(found, expected)
    assert torch.equal(mlp.W_out, mlp_folded.W_out)


def test_weights_are_read_and_never_written() -> None:
    model = pb.load(twin("gpt2"))
    before = model.fingerprint
    for part in (model.layers[0].attn, model.layers[0].mlp):
        part.weights(fold_norm=True)
    assert pb.load(model.hf).fingerprint == before
    own = model.hf.transformer.h[0].attn.c_attn.weight
    assert torch.equal(torch.cat([model.layers[0].attn.weights().W_Q[h] for h in range(4)], 1), own[:, :32])


class Scaled(nn.Module):
    """Not a norm: it scales and takes no size away."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return 3 * x * self.weight


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(PatchbayError, match="no layer of this moe model has it"):
        model_of("mixtral").layers[0].mlp.weights()
    with pytest.raises(PatchbayError, match="no layer of this mamba model has it"):
        model_of("mamba2").layers[0].attn.weights()
    with pytest.raises(PatchbayError, match="neither LayerNorm nor RMSNorm"):
        norm_parts(Scaled())
    with pytest.raises(PatchbayError, match="read the norms of the streams before them within [1-9]"):
        pb.load(twin("llama"), family=pb.Family("mine", norm_attn="somewhere"))


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "llama"])
def test_the_unembedding_includes_the_familys_scale_and_cap(name: str) -> None:
    model = model_of(name)
    trace = pb.run(model, ids(), taps=[model.final_norm.out])
    assert close(model.unembed_logits(trace[model.final_norm.out]), trace.logits)
    assert torch.equal(model.unembed.weight, model.hf.lm_head.weight)
    assert torch.equal(model.embed.weight, model.hf.get_input_embeddings().weight)


# ---- what is lent stays as it was ------------------------------------------------------------------------------------


def state(hf: nn.Module) -> dict[str, object]:
    digest = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in hf.state_dict().values())).hexdigest()
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + ("forward" in m.__dict__)
        for m in hf.modules()
    ]
    return {
        "weights": digest,
        "versions": [t._version for t in hf.state_dict().values()],
        "hooks": sum(hooks),
        "forwards": sum("forward" in m.__dict__ for m in hf.modules()),
        "training": [m.training for m in hf.modules()],
        "grad": [p.requires_grad for p in hf.parameters()],
        "gradients": [p.grad is None for p in hf.parameters()],
        "attention": hf.config._attn_implementation,
        "config": json.dumps(hf.config.to_dict(), default=str, sort_keys=True),
        "generation": json.dumps(hf.generation_config.to_dict(), default=str, sort_keys=True),
        "mode": torch.is_grad_enabled(),
        "random": hashlib.sha256(
            torch.get_rng_state().numpy().tobytes()
            + str(np.random.get_state()).encode()
            + str(random.getstate()).encode()
        ).hexdigest(),
    }


@pytest.mark.parametrize("name", ["gpt2", "falcon", "gpt_oss", "qwen3_next", "gemma2"])
@pytest.mark.parametrize("training", [False, True])
def test_loading_running_and_generating_leave_the_model_as_it_was(name: str, training: bool) -> None:
    still = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) if name == "gpt2" else {}  # no family else drops out
    hf = twin(name, **still).train(training)
    list(hf.children())[-1].train(not training)  # a mode of its own for the unembedding
    next(iter(hf.parameters())).requires_grad_(False)
    before = state(hf)
    model = pb.load(hf)
    assert state(hf) == before
    if training:
        pb.run(model, ids(), taps=model.ports(), edits=[pb.scale(model.layers[0].attn.out, 2.0)])
        before["random"] = state(hf)["random"]  # dropout draws
    else:
        verify(model)
        pb.run(model, ids(), taps=model.ports(), grad=True).logits.sum()
        model.generate(ids(), 3, edits=[pb.zero(model.layers[-1].attn.out)])
    assert state(hf) == before
    with pytest.raises((IndexError, RuntimeError)), model.edited(pb.zero(model.layers[0].resid_out)):
        model.hf(torch.tensor([[10**6]]))
    with pytest.raises(PatchbayError):
        pb.run(model, ids(), taps=model.ports(), edits=[pb.add(model.layers[0].resid_out, torch.zeros(5))])
    before["random"] = state(hf)["random"]
    assert state(hf) == before


def test_two_views_of_one_model_see_one_anothers_edits_of_attention() -> None:
    hf = twin("llama")
    one, two = pb.load(hf), pb.load(hf)
    value, query = pb.zero(one.layers[0].attn.v), two.layers[0].attn.q
    with one.edited(value):
        seen = pb.run(two, ids(), taps=[query])
        inside = one.hf(ids()).logits
    expected = pb.run(one, ids(), taps=[query], edits=[value])
    assert torch.equal(inside, expected.logits)
    assert torch.equal(seen.logits, expected.logits)
    assert torch.equal(seen[query], expected[query])


# ---- loading ---------------------------------------------------------------------------------------------------------


def tokenizer_of() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(90)), "the", "cat"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    twin("llama").save_pretrained(tmp_path / "model")
    tokenizer_of().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return


@pytest.mark.usefixtures("no_network")
def test_a_local_folder_loads_without_any_connection(folder: Path) -> None:
    for source in (folder, str(folder)):
        model = pb.load(source)
        assert not model.hf.training
        assert model.source == str(folder)
        assert model.fingerprint == pb.load(twin("llama")).fingerprint
        assert model.encode("the cat w1") == [[94, 95, 5]]
        assert model.encode(["the", "cat cat"]) == [[94], [95, 95]]
        assert model.decode([94, 95]) == "the cat"
        assert model.token_id("cat") == 95
    text = model.generate("the cat", 3)
    assert text.startswith("the cat")
    assert model.generate(["the cat", "w3"], 3) == [text, model.generate("w3", 3)]
    assert pb.run(model, "the cat").ids.tolist() == [[94, 95]]
    touched = pb.run(
        model, ["the cat the", "cat the"], edits=[pb.zero(model.layers[0].attn.out, positions=pb.Token("the"))]
    ).touched
    assert touched == [[(0, 2), (1,)]]
    with pytest.raises(PatchbayError, match="'the cat' is 2 tokens in this tokenizer"):
        model.token_id("the cat")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_pass_through_and_pass_the_self_check(folder: Path, dtype: torch.dtype) -> None:
    model = pb.load(folder, dtype=dtype)
    assert model.dtype == dtype
    assert model.check.passed
    trace = pb.run(model, ids(), taps=model.ports(), edits=[pb.add(model.layers[0].resid_mid, torch.ones(32))])
    assert all(trace[port].dtype == dtype for port in model.ports())
    assert trace.logits.dtype == dtype
    assert [str(row) for row in verify(model) if not row.passed] == []


def test_device_and_device_map_pass_through(folder: Path) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    model = pb.load(folder, device_map="cpu")
    assert model.device == torch.device("cpu")
    plain = pb.load(folder)
    edit = [pb.zero(model.layers[0].heads[1].z)]
    assert torch.equal(pb.run(model, ids(), edits=edit).logits, pb.run(plain, ids(), edits=edit).logits)
    assert pb.load(folder, device="cpu").device == torch.device("cpu")


def test_attention_implementations_agree(folder: Path) -> None:
    fused, eager = (pb.load(folder, attn_implementation=kind) for kind in ("sdpa", "eager"))
    assert (fused.hf.config._attn_implementation, eager.hf.config._attn_implementation) == ("sdpa", "eager")
    port = fused.layers[1].attn.pattern
    edits = [
        pb.block(port, query=5, key=[1, 2]),
        pb.scale(fused.layers[0].heads[1].pattern, 0.5),
        pb.add(fused.layers[0].attn.k, 0.3),
    ]
    for given in ([], edits):
        a, b = (pb.run(model, ids(), taps=fused.ports(), edits=given) for model in (fused, eager))
        for p in fused.ports():
            assert close(a[p], b[p]), p


def test_the_fingerprint_is_the_blake3_of_names_shapes_dtypes_and_bytes() -> None:
    hf = twin("gpt2")
    told = [
        f"{name}{tuple(t.shape)}{t.dtype}".encode() + t.detach().contiguous().numpy().tobytes()
        for name, t in sorted(hf.state_dict().items())
    ]
    assert pb.load(hf).fingerprint == blake3(b"".join(told)).hexdigest()[:16]


def test_the_fingerprint_is_that_of_the_weights() -> None:
    one, two, other = pb.load(twin("gpt2")), pb.load(twin("gpt2")), pb.load(twin("gpt2", seed=1))
    assert one.fingerprint == two.fingerprint == one.fingerprint
    assert one.fingerprint != other.fingerprint
    assert len(one.fingerprint) == 16
    int(one.fingerprint, 16)
    with torch.no_grad():
        two.hf.transformer.h[1].ln_1.bias[3] += 1e-6
    assert two.fingerprint != one.fingerprint
    with torch.no_grad():
        two.hf.transformer.h[1].ln_1.bias.copy_(one.hf.transformer.h[1].ln_1.bias)
    assert two.fingerprint == one.fingerprint


def test_what_cannot_be_loaded_is_refused_in_one_message(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source, says in {
        str(tmp_path / "nowhere"): "could not load",
        "no-such-org/no-such-model": "A model is a local folder with config.json and safetensors",
        str(tmp_path): "this folder has no config.json; found",
    }.items():
        with pytest.raises(PatchbayError, match=says):
            pb.load(source)
    with pytest.raises(PatchbayError, match="expected a name, a folder or a Hugging Face model, got int"):
        pb.load(3)
    with pytest.raises(PatchbayError, match="wrapped as it is"):
        pb.load(twin("gpt2"), dtype=torch.float16)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert pb.load(f"~/{folder.name}").n_layers == 2
    for gone in (str(folder / "gone"), "./gone", "~/gone"):
        with pytest.raises(PatchbayError, match=r"could not load .*gone': there is no such folder\. A model is"):
            pb.load(gone)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PatchbayError, match="could not load"):
        pb.load(folder)
    weights.unlink()
    torch.save(twin("llama").state_dict(), folder / "pytorch_model.bin")  # a pickle is never read
    with pytest.raises(PatchbayError, match="could not load"):
        pb.load(folder)


def test_a_weight_that_is_not_a_number_fails_the_self_check(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = pb.load(folder)  # a known family's check waits for the first look at a part
    for look in (lambda: loaded.layers[0], lambda: loaded.check, lambda: repr(loaded)):
        with pytest.raises(PatchbayError, match="self-check failed"):
            look()


def test_the_self_check_runs_once_before_anything_is_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    monkeypatch.setattr("patchbay.model.model.self_check", lambda given: checks.append(1) or self_check(given))
    loaded = pb.load(folder)
    assert not checks
    loaded.layers[0].heads[0]
    pb.run(loaded, [[1, 2, 3]], taps=[loaded.layers[0].resid_in])
    assert loaded.check.passed
    assert len(checks) == 1
    pb.load(twin("llama"))  # a model object is checked at once, and so is one that only its structure places
    assert len(checks) == 2


def test_code_of_a_models_repository_does_not_run(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "modeling.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "stranger",
        "auto_map": {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PatchbayError, match="could not load"):
        pb.load(folder)
    assert not ran.exists()


def test_prompts_in_every_form_and_what_is_refused() -> None:
    model = pb.load(twin("gpt2"), tokenizer_of())
    same = [[5, 6, 7]]
    array = np.array([5, 6, 7])
    for form in (
        "w1 w2 w3",
        ["w1 w2 w3"],
        same[0],
        same,
        torch.tensor(same),
        torch.tensor(same[0]),
        array,
        array[None],
        list(array),
    ):
        assert model.encode(form) == same
    for prompts, says in (
        ([], "no prompts were given"),
        ("", "prompt 0 is empty: ''"),
        ([[1, 2], []], "prompt 1 is empty"),
        ([[5] * 65], "prompt 0 has 65 tokens, the model takes 64"),
        ([[1, 96]], r"token ids 1..96, the vocabulary is 0..95"),
        ([[-1, 4]], r"token ids -1..4"),
        (None, "got NoneType"),
        (7, "got int"),
    ):
        with pytest.raises(PatchbayError, match=says):
            pb.run(model, prompts)
    with pytest.raises(PatchbayError, match="text needs a tokenizer and this model came without"):
        pb.run(model_of("gpt2"), "the cat")


@pytest.mark.parametrize("name", ["gpt2-char-tinystories-0.2m", "gpt2-sp512-tinystories-0.28m", "stories260K"])
def test_the_ports_of_a_trained_checkpoint_are_proved(name: str) -> None:
    path = SHARED / "models" / name
    if not path.is_dir():
        pytest.skip(f"no {path}: set PATCHBAY_SHARED to the folder of shared checkpoints")
    model = pb.load(path)
    assert [str(row) for row in verify(model) if not row.passed] == []
    assert model.generate("Once upon a time", 8).startswith("Once upon a time")
