"""Outputs without names (`return_dict=False`): edits and taps of the logits, and the cache among them, as in outputs with names."""

from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny.twins import twin
from tests.tolerance import close

MODELS = {name: pb.load(twin(name).eval()) for name in ("gpt2", "llama", "mixtral", "mamba")}
IDS = torch.tensor([[5, 9, 40, 2, 11, 3], [7, 7, 9, 8, 30, 12]])
EDITS = [
    pb.scale(pb.Port("logits"), 3.0, positions=-1),
    pb.scale(pb.Port("resid_out", 1), -2.0, positions="last"),
    pb.add(pb.Port("embed"), 1.0, positions=slice(1, 3)),
]


def logits_of(output: Any) -> torch.Tensor:
    return next(x for x in output if isinstance(x, torch.Tensor) and x.ndim == 3)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tuples_are_edited_as_outputs_with_names(name: str) -> None:
    model = MODELS[name]
    plain = model.hf(IDS).logits
    for edit in EDITS:
        with model.edited(edit):
            right = model.hf(IDS).logits
            found = model.hf(IDS, return_dict=False)
            more = {"output_router_logits": True} if name == "mixtral" else {"output_hidden_states": True}
            assert torch.equal(logits_of(model.hf(IDS, return_dict=False, **more)), right)
        assert isinstance(found, tuple)
        assert torch.equal(logits_of(found), right)
        assert not torch.equal(right, plain)
    with model.session([pb.Port("logits")]) as session:
        model.hf(IDS, return_dict=False)
    assert torch.equal(session.captured[pb.Port("logits")], plain)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_a_cache_that_comes_back_in_a_tuple_is_known(name: str) -> None:
    model, edit = MODELS[name], pb.scale(pb.Port("attn.out", 0), -2.0, positions=-1)
    with model.edited(edit, prompt_length=6):
        cache = model.hf(IDS[:, :4], return_dict=False)[1]
        found = model.hf(IDS[:, 4:], past_key_values=cache, return_dict=False)[0]
        right = model.hf(IDS).logits
        assert model.touched == [[(5,), (5,)]]
    assert close(found[:, -1], right[:, -1], noise=256)  # in other pieces
    assert not close(right[:, -1], model.hf(IDS).logits[:, -1], noise=256)
    with model.edited(pb.scale(pb.Port("attn.out", 0), -2.0, positions="last")):  # where the prompt ends is not said
        cache = model.hf(IDS[:, :4], return_dict=False)[1]
        with pytest.raises(pb.PatchbayError, match="hang on the prompt's end"):
            model.hf(IDS[:, 4:], past_key_values=cache, return_dict=False)


def test_a_loss_in_a_tuple_is_not_of_edited_logits() -> None:
    model = MODELS["llama"]
    with model.edited(EDITS[0]), pytest.raises(pb.PatchbayError, match="labels under an edit of the logits"):
        model.hf(IDS, labels=IDS, return_dict=False)
    with model.edited(EDITS[1]):
        loss, logits = model.hf(IDS, labels=IDS, return_dict=False)[:2]
        named = model.hf(IDS, labels=IDS)
    assert loss == named.loss
    assert torch.equal(logits, named.logits)


def test_a_config_without_names_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("gpt2", "llama"):  # transformers itself runs the first of them, and not the second
        hf = twin(name).eval()
        model = pb.load(hf)
        hf.config.return_dict = False
        refused = pytest.raises(pb.PatchbayError, match=r"return_dict=False.*set model\.config\.return_dict = True")
        with refused:
            pb.load(hf)
        with refused:
            pb.run(model, IDS)
        with refused:
            model.generate(IDS.tolist(), 2)
        hf.save_pretrained(tmp_path / name)
        kept = pb.load(tmp_path / name)  # loaded here, for this alone
        hf.config.return_dict = True
        assert torch.equal(pb.run(kept, IDS).logits, pb.run(model, IDS).logits)
