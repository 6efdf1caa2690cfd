"""Models as people have them: quantised, kept on disk, read from GGUF, in train mode, under other defaults of the process. Each is
right against its own modules, or refused by name."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.knobs.knob import Knob
from patchbay.model.check import verify
from patchbay.model.linear import _is_rounding, linear_map, read
from patchbay.signal.port import Port
from patchbay.sweeps.scorer import Scorer
from patchbay.tiny.twins import twin
from tests.shares import by_turns

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
WIDE: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


def logits_without_head(model: pb.Model) -> Tensor:
    """The model's own forward with L1.H1's slice of z set to 0 by a hook of plain torch."""
    width = model.d_head(1)

    def cut(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        x[..., width : 2 * width] = 0
        return (x, *args[1:])

    handle = model.modules[1].attn_proj.register_forward_pre_hook(cut)  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            return model.hf(input_ids=IDS.to(model.device), use_cache=False).logits
    finally:
        handle.remove()


def assert_right(model: pb.Model, matrix_of: Any = None, tolerance: float = 1e-5) -> None:
    """Runs, edits, ports, sweeps and weights against the modules themselves. `matrix_of`: a module's weight by hand [out, in]."""
    with torch.no_grad():
        plain = model.hf(input_ids=IDS.to(model.device), use_cache=False).logits
    assert torch.equal(pb.run(model, IDS).logits, plain)
    edit = pb.zero(model.layers[1].heads[1].z)
    expected = logits_without_head(model)
    assert torch.equal(pb.run(model, IDS, edits=[edit]).logits, expected)
    assert relative(plain, expected) > 0.05  # the edit does something
    assert [str(row) for row in verify(model) if not row.passed] == []
    table = pb.sweep(model, IDS, [edit], metric=lambda logits, _: logits[:, 3].float())
    assert relative(table["value"].flatten(), expected[:, -1, 3].float()) < max(tolerance, 1e-5)
    at = model.modules[0]
    x = torch.randn(5, model.d_model, generator=torch.Generator().manual_seed(0))
    w = model.layers[0].attn.weights()
    for given, module in ((w.W_V, at.attn.v_proj), (w.W_Q, at.attn.q_proj)):  # type: ignore[union-attr]
        flat = given.movedim(0, 1).flatten(1).float()
        with torch.no_grad():
            assert relative(x @ flat, module(x.to(model.dtype)).float()) < tolerance
        if matrix_of is not None:
            assert relative(flat, matrix_of(module).T) < 1e-3
    trace = pb.run(model, IDS, taps=[Port("final_norm")])
    assert relative(trace[Port("final_norm")].float() @ model.unembed.weight.float().T, trace.logits) < max(
        tolerance, 1e-5
    )
    assert len(model.fingerprint) == 16


# ---- a quantised layer of our own, as packages have them ------------------------------------------------------------


class Eight(nn.Module):
    """int8 weights with a scale for each row; `inputs`: also rounds what it is given, as bitsandbytes and torchao can."""

    def __init__(self, linear: nn.Linear, inputs: bool, differentiable: bool) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.inputs, self.differentiable = inputs, differentiable
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def matrix(self) -> Tensor:
        return self.weight.float() * self.scale.float()

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs:
            step = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
            rounded = (x / step).round() * step
            x = x + (rounded - x).detach() if self.differentiable else rounded
        return (x.float() @ self.matrix().T).to(x.dtype)


def eight(name: str = "llama", inputs: bool = False, differentiable: bool = True) -> Any:
    return in_eights(twin(name, **WIDE), inputs, differentiable)


def in_eights(hf: Any, inputs: bool = False, differentiable: bool = True) -> Any:
    """The model itself, its matrices now stored as integers."""
    for layer in hf.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for child, module in list(owner.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(owner, child, Eight(module, inputs, differentiable))
    return hf


def test_weights_that_are_stored_as_integers_are_right() -> None:
    assert_right(pb.load(eight()), Eight.matrix)


def test_weights_that_are_given_rounded_inputs_are_read_and_it_is_said() -> None:
    model = pb.load(eight(inputs=True))
    assert model.check.passed
    assert "layers [0, 1] are given rounded inputs" in str(model.check)
    assert model.check.missing == {}
    assert model.check.weights == {}
    assert_right(model, Eight.matrix, tolerance=3e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_read_weights_come_in_the_dtype_that_the_model_computes_in(dtype: torch.dtype) -> None:
    model = pb.load(eight(inputs=True).to(dtype))
    assert {
        w.dtype for w in (model.W_O(0), model.layers[0].attn.weights().W_V, model.layers[1].mlp.weights().W_in)
    } == {dtype}
    head = model.layers[0].heads[1].out  # z in the model's dtype times W_O
    assert torch.isfinite(pb.run(model, IDS, taps=[head])[head]).all()


class Otherwise(Eight):
    """Makes of dense inputs what another matrix makes, of single ones what its own does: a reading by single inputs is wrong."""

    def change(self, x: Tensor, made: Tensor) -> Tensor:
        return made

    def forward(self, x: Tensor) -> Tensor:
        made = super().forward(x)
        dense = ((x != 0).sum(-1, keepdim=True) > 1).to(made)
        return made + dense * self.change(x, made)


class OneStepOff(Otherwise):
    """A single weight is off by one step of its row."""

    def change(self, x: Tensor, made: Tensor) -> Tensor:
        moved = torch.zeros_like(made)
        moved[..., 5] = x[..., 9] * self.scale[5, 0]
        return moved


class RowOff(Otherwise):
    """Every weight of one output is one per cent off."""

    def change(self, x: Tensor, made: Tensor) -> Tensor:
        moved = torch.zeros_like(made)
        moved[..., 5] = 0.01 * made[..., 5]
        return moved


class Bent(Otherwise):
    """What it makes grows with the size of what it is given, by 4 per cent."""

    def change(self, x: Tensor, made: Tensor) -> Tensor:
        return 0.05 * x.abs().mean(-1, keepdim=True) * made


@pytest.mark.parametrize("wrong", [OneStepOff, RowOff, Bent])
@pytest.mark.parametrize("width", [32, 64, 256])
def test_a_wrong_quantised_weight_is_not_taken_for_rounding(wrong: type[Eight], width: int) -> None:
    """By as little as one step of one weight, which is far less than what rounding the inputs does to any output."""
    torch.manual_seed(0)
    linear = nn.Linear(width, 48, bias=False)
    nn.init.normal_(linear.weight, 0.0, width**-0.5)
    right = read(Eight(linear, True, True))
    assert 1e-3 < right.off < 3e-2  # rounding
    assert relative(right.matrix, Eight(linear, True, True).matrix().T) < 1e-5
    with pytest.raises(PatchbayError, match="no linear map that weights could be read of"):
        read(wrong(linear, True, True))


@pytest.mark.parametrize("width", [16, 64, 200])
def test_rounding_is_not_taken_for_a_wrong_weight(width: int) -> None:
    """Twenty layers of each width, inputs rounded to 8 and to 4 bits: none is refused."""
    for seed in range(20):
        torch.manual_seed(seed)
        linear = nn.Linear(width, 24)
        assert read(Eight(linear, True, True)).off > 0
        assert is_rounding(Coarse(linear, True, True))


class Coarse(Eight):
    """Inputs of 4 bits."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 7
        return ((x / step).round() * step) @ self.matrix().T + self.bias


def is_rounding(module: Eight) -> bool:
    def call(x: Tensor) -> Tensor:
        return module.forward(x.float()).detach()

    return _is_rounding(call, module.matrix().T, module.bias.detach(), torch.float32)


def test_weights_that_no_matrix_explains_are_refused_in_a_model() -> None:
    hf = eight(inputs=True)
    for layer in hf.model.layers:
        layer.self_attn.v_proj.__class__ = OneStepOff
    with pytest.raises(PatchbayError, match=r"weights of L0\.attn cannot be read: OneStepOff is no linear map"):
        pb.load(hf).layers[0].attn.weights()


class PackedFour(nn.Module):
    """Four bits in int32 as GPTQ's packages keep them: eight inputs a number, zeros and scales for each group of inputs, an order of
    groups; there is no `weight`. With `across`, eight outputs a number, as AWQ's do."""

    def __init__(self, linear: nn.Linear, across: bool, group: int = 16) -> None:
        super().__init__()
        self.infeatures = self.in_features = linear.in_features
        self.outfeatures = self.out_features = linear.out_features
        self.bias, self.across = linear.bias, across
        weight = linear.weight.detach().T  # [in, out]
        groups = weight.view(-1, group, self.out_features)
        low, high = groups.amin(1), groups.amax(1)
        self.register_buffer("scales", ((high - low) / 15).clamp(min=1e-8))  # [group, out]
        self.register_buffer("zeros", (-low / self.scales).round().clamp(0, 15))
        self.register_buffer("g_idx", torch.arange(self.in_features) // group)
        four = (weight / self.scales[self.g_idx] + self.zeros[self.g_idx]).round().clamp(0, 15).to(torch.int64)
        packed = (four if not across else four.T).view(-1, 8, four.shape[0 if across else 1])
        shifts = 4 * torch.arange(8)[:, None]
        self.register_buffer("qweight", (packed << shifts).sum(1).to(torch.int32))

    def matrix(self) -> Tensor:
        """[out, in]."""
        four = (self.qweight.to(torch.int64)[:, None] >> (4 * torch.arange(8)[:, None])) & 15
        four = four.flatten(0, 1)
        four = four.T if self.across else four
        return ((four - self.zeros[self.g_idx]) * self.scales[self.g_idx]).T

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.matrix().to(x.dtype).T
        return out if self.bias is None else out + self.bias


@pytest.mark.parametrize("across", [False, True])
def test_packed_four_bits_without_a_weight_are_right_and_not_written(across: bool, tmp_path: Path) -> None:
    """As GPTQ and AWQ are stored; their packages are not needed for what their layers are asked."""
    hf = twin("llama", **WIDE)
    for layer in hf.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for child, module in list(owner.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(owner, child, PackedFour(module, across))
    hf.config.quantization_config = SimpleNamespace(quant_method="awq" if across else "gptq", to_dict=dict)
    model = pb.load(hf)
    assert not model.check.missing
    assert_right(model, PackedFour.matrix)
    assert relative(model.layers[0].attn.weights().W_V.movedim(0, 1).flatten(1), twin("llama", **WIDE).model.layers[0].self_attn.v_proj.weight.T) > 1e-3  # fmt: skip
    knob = Knob("k", [pb.scale(model.layers[1].heads[1].z, 1.0)], 0.5)
    with pytest.raises(
        PatchbayError, match=r"weights are quantised \((awq|gptq)\).*form='vector' or 'gguf' needs no weights"
    ):
        knob.export(model, tmp_path / "out")
    Knob("v", [pb.add(Port("resid_out", 1), torch.ones(64))], 0.5).export(model, tmp_path / "v", form="vector")


def test_gradients_that_do_not_pass_quantised_layers_are_refused() -> None:
    tap = Port("resid_mid", 0)
    good, plain = pb.load(eight(inputs=True)), twin("llama", **WIDE)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(other := good.hf.get_submodule(name), Eight):
                module.weight.copy_(other.matrix())
    found = []
    for model in (good, pb.load(plain)):
        trace = pb.run(model, IDS, taps=[tap], grad=True)
        found.append(trace.gradient(trace.logits[:, -1, 3].sum(), tap)[0])
    assert relative(*found) < 0.15
    bad = pb.load(eight(inputs=True, differentiable=False))
    with pytest.raises(
        PatchbayError, match=r"gradients do not pass through model.layers.0.self_attn.q_proj, a quantised Eight"
    ):
        pb.run(bad, IDS, taps=[tap], grad=True)
    pb.run(bad, IDS, taps=[tap])


def test_the_fingerprint_counts_stored_integers() -> None:
    hf = eight()
    model = pb.load(hf)
    before = model.fingerprint
    assert pb.load(eight()).fingerprint == before
    with torch.no_grad():
        hf.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert model.fingerprint != before


# ---- packages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["8", "4", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    twin("llama", **WIDE).save_pretrained(tmp_path)
    more: dict[str, Any] = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True) if kind == "nf4" else {}
    settings = BitsAndBytesConfig(
        load_in_8bit=kind == "8", load_in_4bit=kind != "8", bnb_4bit_compute_dtype=dtype, **more
    )
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=dtype)
    assert_right(pb.load(hf), tolerance=3e-2 if kind == "8" or dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize(
    "kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"]
)
@pytest.mark.filterwarnings("ignore")
def test_torchao(kind: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed (pip install torchao)")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    twin("llama", **WIDE).save_pretrained(tmp_path)
    settings = TorchAoConfig(getattr(quantization, kind)())
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    model = pb.load(hf)
    assert_right(model, tolerance=3e-2 if "Dynamic" in kind else 1e-5)
    if "Dynamic" in kind:
        with pytest.raises(PatchbayError, match="gradients do not pass"):
            pb.run(model, IDS, taps=[Port("resid_mid", 0)], grad=True)
    with pytest.raises(PatchbayError, match="the model's weights are quantised"):
        Knob("k", [pb.zero(model.layers[1].heads[1].z)], 1.0).export(model, tmp_path / "out")


# ---- GGUF ---------------------------------------------------------------------------------------------------------------


def write_gguf_model(path: Path, hf: Any) -> None:
    """A Llama in GGUF, its matrices in Q8_0, by the gguf package."""
    gguf = pytest.importorskip("gguf")
    c, writer = hf.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "t1", *(f"x{i}" for i in range(3, c.vocab_size))])
    writer.add_token_merges(["t 1"])

    def put(name: str, weight: Tensor) -> None:
        array = weight.detach().float().numpy()
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)

    def turned(weight: Tensor, n: int) -> Tensor:  # llama.cpp's order of rotary pairs
        return weight.reshape(n, 2, len(weight) // n // 2, -1).swapaxes(1, 2).reshape(weight.shape)

    put("token_embd.weight", hf.model.embed_tokens.weight)
    put("output_norm.weight", hf.model.norm.weight)
    put("output.weight", hf.lm_head.weight)
    for i, layer in enumerate(hf.model.layers):
        put(f"blk.{i}.attn_q.weight", turned(layer.self_attn.q_proj.weight, c.num_attention_heads))
        put(f"blk.{i}.attn_k.weight", turned(layer.self_attn.k_proj.weight, c.num_key_value_heads))
        put(f"blk.{i}.attn_v.weight", layer.self_attn.v_proj.weight)
        put(f"blk.{i}.attn_output.weight", layer.self_attn.o_proj.weight)
        for name, module in (("up", layer.mlp.up_proj), ("gate", layer.mlp.gate_proj), ("down", layer.mlp.down_proj)):
            put(f"blk.{i}.ffn_{name}.weight", module.weight)
        put(f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight)
        put(f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.filterwarnings("ignore")
def test_a_gguf_file_loads_and_exports_as_the_plain_numbers_that_it_holds(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = twin("llama", **WIDE)
    (tmp_path / "gguf").mkdir()
    write_gguf_model(tmp_path / "gguf" / "m.gguf", source)
    model = pb.load(tmp_path / "gguf" / "m.gguf")
    assert_right(model, lambda module: module.weight)
    with torch.no_grad():
        assert 1e-4 < relative(pb.run(model, IDS).logits, source(IDS).logits) < 0.1  # rounded to 8 bits, else the same
    knob = Knob("k", [pb.zero(model.layers[1].heads[1].z)], 1.0)
    knob.export(model, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert relative(back(IDS).logits, logits_without_head(model)) < 1e-5
    assert model.hf.config.quantization_config is not None  # the lent one stays as it was
    with pytest.raises(PatchbayError, match=r"load the file itself: .*m\.gguf"):
        pb.load(tmp_path / "gguf")


# ---- weights that lie elsewhere -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"), by_turns(["llama", "gpt2"], ["layers on disk", "all on disk", "all in memory"], of=2)
)
def test_offloaded_models_are_right_and_not_written(how: str, name: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    hf: Any = twin(name)
    reference = pb.load(copy.deepcopy(hf))
    if how == "layers on disk":
        hf.save_pretrained(tmp_path / "m")
        parts = ["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"]
        parts = ["transformer", "lm_head"] if name == "gpt2" else parts
        places = {part: "disk" if part in ("model.layers", "model.norm", "lm_head") else "cpu" for part in parts}
        places |= {"transformer.h": "disk"} if name == "gpt2" else {}
        if name == "gpt2":
            inside = ["wte", "wpe", "drop", "h", "ln_f"]
            places = {f"transformer.{one}": "disk" if one in ("h", "ln_f") else "cpu" for one in inside} | {
                "lm_head": "cpu"
            }
        hf = AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", device_map=places, offload_folder=tmp_path / "off"
        ).eval()
    elif how == "all on disk":
        accelerate.disk_offload(hf, tmp_path / "off", execution_device="cpu")
    else:
        accelerate.cpu_offload(hf, execution_device="cpu")
    assert any(p.device.type == "meta" for p in hf.parameters())
    model = pb.load(hf)
    assert torch.equal(pb.run(model, IDS).logits, pb.run(reference, IDS).logits)
    assert torch.equal(
        pb.run(model, IDS, edits=[pb.zero(model.layers[1].heads[1].z)]).logits, logits_without_head(model)
    )
    assert [str(row) for row in verify(model) if not row.passed] == []
    assert torch.equal(
        model.layers[0].attn.weights(fold_norm=True).W_V, reference.layers[0].attn.weights(fold_norm=True).W_V
    )
    assert torch.equal(model.unembed.weight, reference.unembed.weight)
    assert torch.equal(model.embed.weight, reference.embed.weight)
    b, c = model.layers[1].attn.weights().b_O, reference.layers[1].attn.weights().b_O
    assert (b is None and c is None) or torch.equal(b, c)  # type: ignore[arg-type]
    assert model.fingerprint == reference.fingerprint
    metric = lambda logits, _: logits[:, 3]  # noqa: E731
    tables = [pb.sweep(one, IDS, [pb.zero(one.layers[0].mlp.out)], metric=metric) for one in (model, reference)]
    assert torch.equal(tables[0]["value"], tables[1]["value"])
    with pytest.raises(PatchbayError, match="kept on another device or on disk"):
        Knob("k", [pb.zero(model.layers[1].heads[1].z)], 1.0).export(model, tmp_path / "out")


def test_a_model_without_numbers_is_refused() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(twin("llama").config)
    with pytest.raises(PatchbayError, match="on the meta device: shapes without numbers"):
        pb.load(hf)


# ---- defaults of the process --------------------------------------------------------------------------------------------


@pytest.fixture
def other_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    try:
        yield request.param
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("other_dtype", [torch.float64, torch.bfloat16], indirect=True)
def test_under_another_default_dtype_models_are_right_and_methods_refused(other_dtype: torch.dtype) -> None:
    hf = twin("llama").float()
    model = pb.load(hf)
    assert torch.equal(
        pb.run(model, IDS, edits=[pb.zero(model.layers[1].heads[1].z)]).logits, logits_without_head(model)
    )
    assert [str(row) for row in verify(model) if not row.passed] == []
    cure = r"torch.set_default_dtype\(torch.float32\) first"
    with pytest.raises(PatchbayError, match=cure):
        pb.sweep(model, IDS, [pb.zero(model.layers[1].heads[1].z)], metric=lambda logits, _: logits[:, 3])
    with pytest.raises(PatchbayError, match=cure):
        pb.find.induction_heads(model, [[5, 6, 7, 5, 6]])


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "gemma2"])
def test_another_default_device_changes_nothing(name: str) -> None:
    """ "meta" stands for any device that the model is not on: what is made there by mistake has no numbers."""
    hf = twin(name)
    model = pb.load(hf)
    edit = pb.zero(model.layers[1].heads[1].z)
    expected = pb.run(model, IDS, edits=[edit]).logits
    text = model.generate([IDS[0].tolist()], 4, edits=[edit])
    heads = pb.find.induction_heads(model, [[5, 6, 7, 5, 6]])
    metric = lambda logits, _: logits[:, 3]  # noqa: E731
    values = pb.sweep(model, IDS, [edit], metric=metric)["value"]
    ids = IDS.tolist()
    torch.set_default_device("meta")
    try:
        again = pb.load(hf)
        assert again.check.weights == {}
        assert torch.equal(pb.run(again, ids, edits=[edit]).logits, expected)
        assert again.generate([ids[0]], 4, edits=[edit]) == text
        assert torch.equal(pb.sweep(again, ids, [edit], metric=metric)["value"], values)
        assert torch.equal(pb.find.induction_heads(again, [[5, 6, 7, 5, 6]])["score"], heads["score"])
        with again.edited(edit), torch.no_grad(), torch.device("cpu"):
            assert torch.equal(again.hf(input_ids=IDS).logits, expected)
        assert torch.equal(linear_map(again.modules[0].attn_proj)[0], linear_map(model.modules[0].attn_proj)[0])
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("name", "dtype"), by_turns(["mamba", "mamba2", "falcon_mamba"], [torch.bfloat16, torch.float16], of=2)
)
def test_streams_in_float32_meet_a_head_in_half_precision(name: str, dtype: torch.dtype) -> None:
    hf = twin(name).to(dtype)
    model = pb.load(hf)
    with torch.no_grad():
        plain = hf(input_ids=IDS, use_cache=False).logits
    trace = pb.run(model, IDS, taps=[Port("final_norm")])
    assert torch.equal(trace.logits, plain)
    assert torch.equal(model.unembed_logits(trace[Port("final_norm")]).float(), plain.float())
    scorer = Scorer(model, None, lambda logits, _: logits[:, 0])
    scorer.tokens = torch.tensor([3, 7])
    assert relative(scorer.logits(trace[Port("final_norm")][0]).float(), plain[0][:, [3, 7]].float()) < 1e-2
    edit = pb.scale(model.layers[1].attn.out, 0.5)
    expected = pb.run(model, IDS, edits=[edit]).logits[:, -1, 3].float()
    table = pb.sweep(model, IDS, [edit], metric=lambda logits, _: logits[:, 3].float())
    assert relative(table["value"].flatten(), expected) < 1e-2
