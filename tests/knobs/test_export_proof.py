"""Export proved on the file: adapters and parametrisations cannot be left out, rounding is measured, the written lines load."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import AutoModelForCausalLM

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.knobs import export as export_module
from patchbay.knobs import proof
from patchbay.knobs.knob import Knob
from patchbay.tiny.twins import twin
from tests.shares import by_turns
from tests.tolerance import close

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def knob_of(model: pb.Model) -> Knob:
    return Knob("k", [pb.scale(model.layers[1].heads[1].z, 1.0)], -1.5)


def adapted(how: str) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    hf = twin("llama")
    if how == "wrapped":
        return peft.get_peft_model(hf, config).base_model.model.eval()
    hf.add_adapter(config)
    return hf.eval()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("how", ["wrapped", "added"])
@pytest.mark.parametrize("form", ["checkpoint", "lora"])
def test_a_model_with_an_adapter_is_never_written_without_it(how: str, form: str, tmp_path: Path) -> None:
    hf = adapted(how)
    with pytest.raises(PatchbayError, match=r"has an adapter on .*proj.*merge_and_unload"):
        proof.plain_copy(SimpleNamespace(hf=hf))
    try:
        model = pb.load(hf)
    except PatchbayError:
        return  # not even loaded
    with pytest.raises(PatchbayError, match=r"has an adapter on .*proj.*merge_and_unload"):
        knob_of(model).export(model, tmp_path / "out", form=form)
    assert not list(tmp_path.iterdir())


def test_parametrised_weights_are_written_as_what_they_compute(tmp_path: Path) -> None:
    hf = twin("llama")
    parametrizations.weight_norm(hf.model.layers[1].self_attn.o_proj)
    with torch.no_grad():  # the stored parts are no longer the weight that was loaded
        hf.model.layers[1].self_attn.o_proj.parametrizations.weight.original0.mul_(3)
    model = pb.load(hf)
    knob = knob_of(model)
    knob.export(model, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = pb.run(model, IDS, edits=[knob]).logits
    with torch.no_grad():
        assert close(back(IDS).logits, expected)
    assert (
        float((expected - pb.run(pb.load(twin("llama")), IDS, edits=list(knob.edits_at())).logits).abs().max()) > 1e-3
    )
    assert hasattr(hf.model.layers[1].self_attn.o_proj, "parametrizations")  # the lent one stays as it was


@pytest.mark.parametrize("form", ["checkpoint", "lora"])
def test_a_file_that_differs_from_what_was_proved_in_memory_is_removed(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is one part in a thousand off; the weights in memory are right."""
    pytest.importorskip("peft")
    model = pb.load(twin("llama"))
    if form == "lora":
        own_save = export_module.save_file
        monkeypatch.setattr(
            export_module, "save_file", lambda t, *a, **k: own_save({n: x * 1.01 for n, x in t.items()}, *a, **k)
        )
    else:
        own = type(model.hf).save_pretrained

        def off(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                self.get_parameter("model.layers.1.self_attn.o_proj.weight").mul_(1.001)
            own(self, *args, **kwargs)

        monkeypatch.setattr(type(model.hf), "save_pretrained", off)
    with pytest.raises(
        PatchbayError, match="read back from the files, .* differ from the edited model's by .*: not written"
    ):
        knob_of(model).export(model, tmp_path / "out", form=form)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "dtype"), by_turns(["gpt2", "llama", "gemma2"], [torch.bfloat16, torch.float16], of=2)
)
def test_half_precision_is_held_to_its_own_rounding(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Right exports pass whatever the size of the logits; one that is a quarter off does not."""
    hf = twin(name)
    with torch.no_grad():
        hf.get_output_embeddings().weight.mul_(8)  # logits whose rounding steps are large
    model = pb.load(hf.to(dtype))
    noisy = Knob(
        "k", [pb.scale(model.layers[0].attn.out, noise(model.d_model)), pb.zero(model.layers[1].heads[1].z)][:1], 2.0
    )
    written = noisy.export(model, tmp_path / "out")
    wide = pb.load(copy.deepcopy(hf).float())
    truth = pb.run(wide, IDS, edits=list(noisy.edits_at())).logits
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    with torch.no_grad():
        file_off = float((back(IDS).logits.float() - truth).abs().max())
    run_off = float((pb.run(model, IDS, edits=[noisy]).logits.float() - truth).abs().max())
    assert file_off < 3 * run_off + 1e-6  # the file is about as near the truth as the edits are
    assert (
        written.error == json.loads((tmp_path / "out" / "patchbay.json").read_text())["largest_difference_of_a_logit"]
    )


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("name", "dtype"), by_turns(["gpt2", "llama", "gemma2", "mixtral", "mamba2"], DTYPES, of=2))
def test_one_row_that_is_one_per_cent_off_is_refused(name: str, dtype: torch.dtype) -> None:
    """A wrong export: one row of one matrix, of those that the knob changes and of those that it does not."""
    if (name, dtype) == ("mixtral", torch.float64):
        pytest.skip("grouped products of experts have no float64")
    model = pb.load(twin(name).to(dtype))
    edits = [pb.scale(model.layers[1].attn.out, noise(model.d_model))]
    right, _ = export_module._folded(model, edits)
    proof.apart(model, edits, right.hf, "so")
    named = ("self_attn.o_proj", "attn.c_proj", "mixer.out_proj")
    changed = next(
        one
        for key, one in model.hf.named_modules()
        if "layers.1." in key.replace("h.", "layers.") and key.endswith(named)
    )
    places = {one: key for key, one in model.hf.named_modules()}
    for place in (places[changed], places[model.hf.get_output_embeddings()]):
        wrong = copy.deepcopy(right.hf)
        with torch.no_grad():
            weight = wrong.get_submodule(place).weight
            weight[3] *= 1.01
        with pytest.raises(PatchbayError, match="not written"):
            proof.apart(model, edits, wrong, "so")


def test_a_wrong_rule_of_folding_is_refused_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored is compared with folded weights, which are compared with the edited run: a wrong fold is no reference."""
    model = pb.load(twin("llama").to(torch.bfloat16))
    edits = [pb.scale(model.layers[1].heads[1].z, 1.02)]
    own = proof.fold
    scaled = [pb.scale(model.layers[1].heads[1].z, 1.03)]
    monkeypatch.setattr(proof, "fold", lambda other, _: own(other, scaled))
    right, _ = export_module._folded(model, scaled)
    with pytest.raises(PatchbayError, match="not written"):
        proof.apart(model, edits, right.hf, "so")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_noise_is_that_of_one_step_of_every_weight(dtype: torch.dtype) -> None:
    """It follows the dtype, and a model that amplifies rounding has more of it."""
    model = pb.load(twin("gpt2").to(dtype))
    found = proof._noise(model, [], proof._logits(model))
    eps = torch.finfo(dtype).eps
    size = float(proof._logits(model).abs().max())
    assert 0.2 * eps * size < found < 20 * eps * size
    moved = proof._jittered(model.hf, 0)
    for one, other in zip(model.hf.state_dict().values(), moved.state_dict().values(), strict=True):
        step = ((other - one).abs().double() / one.abs().double().clamp(min=1e-30))[one != 0]
        assert 0.4 * eps <= float(step.min())
        assert float(step.max()) <= 2.1 * eps


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("form", ["checkpoint", "lora", "gguf", "vector"])
def test_the_lines_in_the_readme_load_the_export(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "lora":
        pytest.importorskip("peft")
    twin("gpt2").save_pretrained(tmp_path / "base")
    model = pb.load(tmp_path / "base")
    knob = (
        knob_of(model)
        if form in ("checkpoint", "lora")
        else Knob("k", [pb.add(model.layers[1].resid_out, noise(32))], 3.0)
    )
    knob.export(model, tmp_path / "out", form=form)
    lines = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    ask = "import torch; ids = torch.arange(9)[None] + 3\n"
    ask += (
        "logits = model(ids).logits"
        if form in ("checkpoint", "lora")
        else "logits = pb.run(model, ids, edits=[knob]).logits"
    )
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path / "out")
    exec(f"{lines}\n{ask}", names)
    expected = pb.run(model, torch.arange(9)[None] + 3, edits=[knob]).logits
    assert close(names["logits"], expected)
