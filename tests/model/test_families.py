"""families: every port of every covered family holds what it claims, and what fits no row is refused with what was found.

The proof itself is `patchbay.model.check`; here it runs on the twin of each family, and broken models show that it can fail.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

import patchbay as pb
from patchbay.model.check import Row, family_table, verify
from patchbay.model.families import FAMILIES, Family
from patchbay.model.model import Model
from patchbay.model.placing import candidates, follow, layer_modules, missing
from patchbay.signal.port import PatchbayError, Port
from patchbay.tiny.twins import FAMILY_CONFIGS, twin
from tests.given import MIXTURES, lent
from tests.shares import by_turns

REQUIRED = """falcon_h1 nemotron_h jamba lfm2_moe nanochat llava gemma3 qwen2_vl qwen2_5_vl paligemma mistral3 idefics3 smolvlm apertus glm4 granitemoe llama4_text mpt olmo persimmon xglm ernie4_5 gpt_bigcode gpt2 gpt_neox gpt_neo gptj opt bloom falcon llama mistral mixtral qwen2 qwen3 qwen3_moe qwen3_next gemma gemma2
gemma3_text olmo2 olmoe phi phi3 stablelm starcoder2 cohere cohere2 granite gpt_oss deepseek_v3 smollm3 mamba2 lfm2 bamba"""

HEADS = ("attn.q", "attn.k", "attn.v", "attn.pattern", "attn.z", "attn.head_out")
STREAM = ("embed", "resid_in", "resid_out", "attn.out", "final_norm", "logits")
MLP, EXPERTS = ("mlp.in", "mlp.out"), ("router.logits", "router.weights", "router.experts", "experts.out")
PARALLEL = (
    "gpt_neox",
    "gptj",
    "falcon",
    "falcon grouped",
    "phi",
    "stablelm parallel",
    "cohere",
    "cohere normed",
    "cohere2",
    "cohere2_moe",
    "aya_vision",
)
DENSE_TOO = (
    "deepseek_v3",
    "deepseek_v2",
    "glm4_moe_lite",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "glm4_moe",
    "hy_v3",
    "jamba",
    "laguna",
    "lfm2_moe",
)  # a dense layer before those with experts


@functools.cache
def rows_of(name: str) -> tuple[Model, list[Row]]:
    model = lent(name)
    return model, verify(model)


def expected_signals(name: str) -> set[str]:
    if name in ("mamba", "mamba2", "falcon_mamba"):
        return set(STREAM)
    if name == "nemotron_h":
        return {*STREAM, *HEADS}
    found = {*STREAM, *MLP} if name == "falcon_h1" else {*STREAM, *HEADS, *MLP}
    found |= set() if name in PARALLEL else {"resid_mid"}
    found |= set(EXPERTS) if name in MIXTURES else {"mlp.act"}
    return found | ({"mlp.act"} if name in DENSE_TOO else set())


def test_every_required_family_has_a_twin() -> None:
    assert set(REQUIRED.split()) <= set(FAMILY_CONFIGS)
    assert len(FAMILY_CONFIGS) >= 110


def test_every_model_type_of_a_row_has_a_twin_that_resolves_to_it() -> None:
    made = [AutoConfig.for_model(kind, **settings) for kind, settings in FAMILY_CONFIGS.values()]
    covered = {config.get_text_config(decoder=True).model_type for config in made}
    named = [model_type for family in FAMILIES for model_type in family.model_types]
    assert set(named) <= covered
    assert len(named) == len(set(named))


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_every_port_of_a_family_is_offered_and_proved(name: str) -> None:
    model, rows = rows_of(name)
    assert model.config.model_type in model.family.model_types  # adopted by its own row
    assert {port.signal for port in model.ports()} == expected_signals(name)
    failed = [str(row) for row in rows if not row.passed]
    assert not failed
    assert {row.signal for row in rows} == expected_signals(name)


def test_the_table_is_the_result_of_the_checks() -> None:
    table = family_table(twin, ["gpt2", "mamba2"])
    assert [row["family"] for row in table] == ["gpt2", "mamba2"]
    assert table == family_table(twin, ["gpt2", "mamba2"])
    for row in table:
        _, rows = rows_of(row["family"])
        assert row["verified"] is True
        assert row["errors"] == []
        assert set(row["ports"]) == expected_signals(row["family"])
        assert row["checks"] == len(rows)


def failures(model: Model) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in verify(model):
        if not row.passed:
            found.setdefault(row.signal, set()).add(row.claim)
    return found


def test_the_checks_fail_on_a_view_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pb.load(twin("llama"))
    assert not failures(model)
    norm = model.modules[0].norm_mlp
    model.modules[0] = layer_modules(
        Family("llama", norm_mlp="input_layernorm"), model.modules[0].layer, model.config
    )  # the MLP's norm mistaken for another
    assert failures(model) == {
        "mlp.in": {"the norm of the stream before the MLP"},
        "logits": {"gradients are those of the parts"},
    }
    model = pb.load(twin("llama"))
    monkeypatch.setitem(model._heads, 0, (4, 4, 8))  # key/value groups miscounted
    with pytest.raises((PatchbayError, RuntimeError, IndexError)):
        verify(model)
    model = pb.load(twin("llama"))
    monkeypatch.setattr("patchbay.model.view.Group.heads", property(lambda group: group.model.layers[0].heads[0:2]))
    assert {"attn.k", "attn.v"} <= set(failures(model))
    assert norm is not None


def test_the_checks_fail_where_a_tap_disturbs_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pb.load(twin("llama"))
    from patchbay.jacks.session import Session

    plain = Session._store

    def clumsy(self, port, value):
        plain(self, port, value)
        if port.signal == "mlp.act":
            value.mul_(1.001)

    monkeypatch.setattr(Session, "_store", clumsy)
    assert "a tap leaves the logits bit-equal" in failures(model)["mlp.act"]


@pytest.mark.parametrize(
    ("changed", "claim"),
    [
        (lambda x: x + 0.5 * x.mean(0, keepdim=True) * (len(x) == 2), "a prompt is the same alone and beside another"),
        (lambda x: x + 0.1 * x[:, -1:] * (x.shape[1] > 10), "what stands up to 32 tokens ahead leaves them"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_the_checks_ask_more_than_loading_does(name: str, changed: Callable[[Tensor], Tensor], claim: str) -> None:
    """An embedding that knows who stands beside a prompt, or what comes in a longer one: rows of three tokens do not show it."""
    hf = twin(name)
    hf.get_input_embeddings().register_forward_hook(lambda _, __, out: changed(out))
    assert claim in failures(pb.load(hf)).get("logits", ()), failures(pb.load(hf))


# ---- unknown architectures -------------------------------------------------------------------------------------------


BUILDS = [
    "llama",
    "gemma2",
    "olmo2",
    "granite",
    "falcon",
    "gpt_neo",
    "gpt_oss",
    "stablelm parallel",
    "mamba2",
    "cohere2",
]


@pytest.mark.parametrize("name", by_turns(BUILDS, of=2))
def test_an_unknown_model_type_is_adopted_by_its_structure(name: str) -> None:
    hf = twin(name)
    hf.config.model_type = "brand_new"
    model = pb.load(hf)
    named = {family.name: family for family in FAMILIES}
    known = pb.load(twin(name))
    assert {port.signal for port in model.ports()} == {port.signal for port in known.ports()}
    failed = [row for row in verify(model) if not row.passed]
    assert not failed, (model.family.name, failed)
    assert model.family.name in named


class Odd(nn.Module):
    """A language model that is built like no other."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"model_type": "odd", "_name_or_path": ""})()
        self.lookup, self.tower = nn.Embedding(8, 4), nn.ModuleList([nn.Linear(4, 4)])


def test_what_fits_no_row_is_refused_with_what_was_found_and_what_to_pass() -> None:
    with pytest.raises(PatchbayError) as error:
        candidates(Odd())
    text = str(error.value)
    assert "Odd (model type 'odd') fits no known family" in text
    assert "Nearest row is" in text
    assert "the model has children lookup, tower" in text
    assert "pb.load(model, family=patchbay.Family(" in text


def test_a_model_that_fails_the_self_check_is_refused_with_the_numbers() -> None:
    hf = twin("llama")
    hf.model.layers[1].register_forward_hook(
        lambda module, args, output: output * 1.01
    )  # adds what no part accounts for
    with pytest.raises(PatchbayError, match=r"self-check failed.*parts sum to the final stream within \d\.\de-0[123]"):
        pb.load(hf)
    hf = twin("llama")
    with torch.no_grad():
        hf.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(PatchbayError, match="within inf"):
        pb.load(hf)


def test_a_row_given_by_hand_is_used_and_proved() -> None:
    row = Family("mine", norm_mlp="post_attention_layernorm")
    assert pb.load(twin("llama"), family=row).family is row
    with pytest.raises(PatchbayError, match=r"mine: parts sum to the final stream within"):
        pb.load(twin("gemma2"), family=row)
    with pytest.raises(PatchbayError, match="self-check failed|has no model.stack"):
        pb.load(twin("llama"), family=Family("mine", layers="model.stack"))


def test_missing_names_the_paths_and_alternatives_are_tried_in_order() -> None:
    hf = twin("llama")
    assert missing(FAMILIES[0], hf) == []
    assert "model.layers.0.self_attn.out" in missing(Family("x", attn_proj="out"), hf)
    assert "transformer.h" in missing(Family("x", layers="transformer.h"), hf)
    layer = hf.model.layers[0]
    assert follow(layer, "nothing|mlp.up_proj|mlp") is layer.mlp.up_proj
    assert follow(layer, "nothing|none") is None
    assert follow(layer, "") is None


def test_hybrid_layers_offer_what_they_have() -> None:
    model = pb.load(twin("lfm2"))
    assert "attn.z" in model.signals(1)
    assert "attn.z" not in model.signals(0)
    assert "attn.out" in model.signals(0)
    with pytest.raises(PatchbayError, match=r"L0.attn.z: layer 0 offers resid_in, .*; layers \[1\] have it"):
        pb.run(model, [[1, 2, 3]], taps=[Port("attn.z", 0)])
    assert len(model.layers[0].heads) == 0
    with pytest.raises(PatchbayError, match="head 0 asked, there are none"):
        model.layers[0].heads[0]


def test_neurons_that_a_factor_follows_are_not_offered() -> None:
    """Falcon-H1's `mlp_multipliers` scale what the down projection makes: the stream is right, W_out would not be."""
    model = pb.load(twin("falcon_h1", mlp_multipliers=[0.8, 0.6]))
    assert "no neurons in layers [0, 1]" in str(model.check)
    assert {"mlp.in", "mlp.out"} <= set(model.signals(0))
    assert "mlp.act" not in model.signals(0)
    assert [row for row in verify(model) if not row.passed] == []
    ids = torch.tensor([[5, 9, 20, 33]])
    for signal in ("attn.out", "resid_mid", "mlp.out"):
        port = Port(signal, 1)
        with torch.no_grad():
            plain = model.hf(ids, use_cache=False).logits
        assert torch.equal(pb.run(model, ids, taps=[port]).logits, plain)
        trace = pb.run(model, ids, taps=[port], grad=True)
        (found,) = torch.autograd.grad(trace.last_logits[0, 7], trace[port])
        step = 1e-2 * torch.randn(32, generator=torch.Generator().manual_seed(0))
        moved = [
            float(pb.run(model, ids, edits=[pb.add(port, s * step, positions=3)]).last_logits[0, 7]) for s in (1, -1)
        ]
        assert float(found[0, 3] @ step) == pytest.approx((moved[0] - moved[1]) / 2, rel=0.02, abs=1e-5)
