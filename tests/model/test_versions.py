"""versions: a cached step knows its position whatever the cache is called, and a release never seen is said and proved."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import patchbay as pb
from patchbay.jacks.arguments import CACHE_NAMES, cache_among, cache_name, is_cache, with_cache
from patchbay.model import versions
from patchbay.model.model import Model
from patchbay.model.versions import TESTED, prove_cached_step, unseen
from patchbay.signal.port import PatchbayError
from patchbay.tiny.twins import twin

ROOT = Path(__file__).parents[2]


class Renamed(nn.Module):
    """A model whose forward takes the cache under a name of its own."""

    def __init__(self, inner: nn.Module, name: str = "memory") -> None:
        super().__init__()
        self.inner, self.name = inner, name

    def forward(self, input_ids: Tensor, memory: DynamicCache | None = None, use_cache: bool = True) -> Any: ...


def test_a_cache_is_known_by_what_it_is_and_not_by_its_name() -> None:
    cache = DynamicCache()
    assert cache_among((), {"some_new_name": cache, "attention_mask": torch.ones(1)}) is cache
    assert cache_among((torch.zeros(1, 2), cache), {}) is cache
    assert cache_among((), {"past_key_values": None, "use_cache": True}) is None
    state = object()  # custom code's own
    assert cache_among((), {"cache_params": state}) is state
    assert not is_cache({"a": 1})
    assert not is_cache(torch.ones(2))
    assert cache_name(Renamed(nn.Identity())) == "memory"
    assert with_cache(Renamed(nn.Identity()), cache) == {"memory": cache}
    assert cache_name(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "mamba2", "qwen3_next"])
def test_a_cached_step_knows_its_position(name: str) -> None:
    model = pb.load(twin(name))
    assert cache_name(model.hf) in CACHE_NAMES
    prove_cached_step(model)


def test_a_step_that_takes_itself_for_the_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pb.load(twin("llama"))
    monkeypatch.setattr("patchbay.jacks.place.cache_among", lambda args, kwargs: None)  # as if it had another name
    with pytest.raises(PatchbayError, match=r"taken for positions \(0, 1\)"):
        prove_cached_step(model)


def test_a_release_never_seen_is_said_once_and_proved_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    proved: list[Model] = []
    monkeypatch.setattr(versions, "_WARNED", set())
    monkeypatch.setattr(versions, "TESTED", TESTED | {"transformers": ("5.0.0", "5.1.0")})
    monkeypatch.setattr(versions, "prove_cached_step", proved.append)
    with pytest.warns(UserWarning, match=r"not tested with transformers \d+\.\d+.*tested: 5\.0\.0 to 5\.1\.0"):
        first = pb.load(twin("gpt2"))
    second = pb.load(twin("gpt2"))  # warnings are errors: it says it once
    assert [model.hf for model in proved] == [first.hf, second.hf]


def test_releases_are_compared_by_number() -> None:
    assert versions._numbers("2.13.0+cpu") == (2, 13, 0) < versions._numbers("2.14.1") < versions._numbers("10.0")
    assert unseen() == ()  # these tests run on tested releases


def test_the_declared_range_is_what_is_tested() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, (oldest, newest) in TESTED.items():
        assert f"{name}>={oldest},<={newest}" in declared
