"""A knob knows its model in other digits: any cast of one checkpoint passes with a note, other weights are refused."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.knobs.knob import Knob, KnobPrecision, load_knob
from patchbay.model.precisions import kept_of, one_checkpoint
from patchbay.tiny.twins import twin
from tests.model.test_stored import eight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAMILIES = ("llama", "gpt2", "gemma2", "mixtral", "mamba")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))


def cast(hf: nn.Module, dtype: torch.dtype) -> Any:
    return copy.deepcopy(hf).to(dtype)


def tuned(hf: nn.Module, which: int, size: float) -> Any:
    """A copy of which one tensor moved by a share of its size."""
    other = copy.deepcopy(hf)
    named = [p for p in other.parameters() if p.is_floating_point()]
    one = named[which % len(named)]
    with torch.no_grad():
        one.add_(
            size * one.std().clamp(min=0.1) * torch.randn(one.shape, generator=torch.Generator().manual_seed(which))
        )
    return other


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(FAMILIES),
    seed=st.integers(0, 3),
    which=st.integers(0, 40),
    made=st.sampled_from(DTYPES),
    used=st.sampled_from(DTYPES),
)
def test_casts_of_one_checkpoint_are_one_and_others_are_not(
    family: str, seed: int, which: int, made: torch.dtype, used: torch.dtype
) -> None:
    hf = twin(family, seed=seed)
    kept = json.loads(json.dumps(kept_of(cast(hf, made))))  # as a file holds it
    assert one_checkpoint(kept, kept_of(cast(hf, used)))
    assert not one_checkpoint(kept, kept_of(cast(twin(family, seed=seed + 1), used)))
    apart = {made, used} == {
        torch.bfloat16,
        torch.float16,
    }  # neither rounds the other: within a step of bfloat16 by samples
    assert not one_checkpoint(kept, kept_of(cast(tuned(hf, which, 0.5 if apart else 0.02), used)))


@pytest.mark.parametrize(("made", "used"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_a_saved_knob_is_used_in_other_digits_with_a_note(made: torch.dtype, used: torch.dtype, tmp_path: Path) -> None:
    hf = twin("llama")
    first, second = pb.load(cast(hf, made)), pb.load(cast(hf, used))
    path = pb.turn.scale(["L1.H2"], 3.0, model=first).save(tmp_path / "x.knob")
    knob = load_knob(path)
    names = [str(dtype).removeprefix("torch.") for dtype in (made, used)]
    with pytest.warns(KnobPrecision, match=f"this checkpoint in {names[0]} and is used in {names[1]}"):
        found = pb.run(second, IDS, edits=[knob]).logits
    assert torch.equal(found, pb.run(second, IDS, edits=knob.edits_at()).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pb.run(second, IDS, edits=[knob])  # said once
        assert knob.fits(second)
        assert knob.for_model(second) is knob  # its evidence stays
    other = pb.load(cast(tuned(hf, 3, 0.02), used))
    with pytest.raises(PatchbayError, match=f"{first.fingerprint}.*{other.fingerprint}"):
        pb.run(other, IDS, edits=[knob])


def test_a_quantised_load_of_the_checkpoint_is_known_both_ways_and_another_is_not(tmp_path: Path) -> None:
    rounded, inputs = pb.load(eight()), pb.load(eight(inputs=True))
    plain = {dtype: pb.load(cast(wide(), dtype)) for dtype in DTYPES}
    on_plain = load_knob(pb.turn.scale(["L1.H2"], 3.0, model=plain[torch.float32]).save(tmp_path / "a.knob"))
    on_rounded = load_knob(pb.turn.scale(["L1.H2"], 3.0, model=rounded).save(tmp_path / "b.knob"))
    for model in (rounded, inputs):
        with pytest.warns(KnobPrecision, match="in float32 and is used in Eight, 8 bits"):
            on_plain.check(model)
    for model in plain.values():
        with pytest.warns(KnobPrecision, match="in Eight, 8 bits and is used in"):
            on_rounded.check(model)
    for hf in (wide(seed=1), tuned(wide(), 1, 0.2)):  # parameter 1 is a quantised matrix: moved by more than a step
        for knob, model in ((on_rounded, pb.load(hf)), (on_plain, pb.load(as_eight(hf)))):
            with pytest.raises(PatchbayError, match="for_model"):
                knob.check(model)


def wide(seed: int = 0) -> Any:
    from tests.model.test_stored import WIDE

    return twin("llama", seed=seed, **WIDE)


def as_eight(hf: Any) -> Any:
    from tests.model.test_stored import in_eights

    return in_eights(copy.deepcopy(hf))


def test_a_knob_without_what_tells_precisions_apart_is_held_to_its_fingerprint() -> None:
    hf = twin("llama")
    first = pb.load(hf)
    old = Knob("old", [pb.zero(first.layers[0].heads[0].z)], 1.0, {"model": {"fingerprint": first.fingerprint}})
    with pytest.raises(PatchbayError, match="for_model"):
        old.check(pb.load(cast(hf, torch.bfloat16)))


def test_an_adapter_that_is_on_is_no_precision() -> None:
    from tests.model.test_adapters import adapted

    peft = adapted()
    kept = kept_of(peft.get_base_model())
    with peft.disable_adapter():
        assert not one_checkpoint(kept, kept_of(peft.get_base_model()))
    assert one_checkpoint(kept, kept_of(cast(peft.get_base_model(), torch.bfloat16)))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_bitsandbytes_loads_of_a_checkpoint_are_known(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    for seed in (0, 1):
        wide(seed).save_pretrained(tmp_path / str(seed))
    packed = BitsAndBytesConfig(
        load_in_8bit=kind == "int8", load_in_4bit=kind != "int8", bnb_4bit_quant_type=kind if kind != "int8" else "nf4"
    )
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "0", quantization_config=packed, dtype=torch.float16)
    assert one_checkpoint(kept_of(hf), kept_of(wide(0)))
    assert not one_checkpoint(kept_of(hf), kept_of(wide(1)))
