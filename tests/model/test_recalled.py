"""Kept fingerprints: a second load hashes nothing, and nothing that has changed since is told an old one."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.model import recalled
from patchbay.tiny.twins import twin


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(recalled, "LEAST", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "patchbay" / "fingerprints"


@pytest.fixture
def saved(tmp_path: Path, home: Path) -> Path:
    twin("gpt2").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every hash of all weights."""
    calls: list[int] = []
    whole = recalled.fingerprint_of

    def counted(hf: Any) -> str:
        calls.append(1)
        return whole(hf)

    monkeypatch.setattr(recalled, "fingerprint_of", counted)
    return calls


def true(model: pb.Model) -> str:
    return pb.load(model.hf).fingerprint  # an object has no files: it is hashed


def test_a_second_load_reads_what_the_first_has_kept(saved: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pb.load(saved).fingerprint
    assert len(list(home.iterdir())) == 1

    def raises(hf: Any) -> str:
        raise AssertionError("hashed")

    monkeypatch.setattr(recalled, "fingerprint_of", raises)
    assert pb.load(saved).fingerprint == first
    with pytest.raises(AssertionError, match="hashed"):
        _ = pb.load(saved, dtype=torch.bfloat16).fingerprint
    with pytest.raises(AssertionError, match="hashed"):
        _ = pb.load(twin("gpt2")).fingerprint


def test_what_has_changed_is_hashed(saved: Path, hashed: list[int]) -> None:
    first = pb.load(saved).fingerprint
    model = pb.load(saved)
    with torch.no_grad():
        model.hf.transformer.h[1].mlp.c_fc.weight[3, 4] += 1
    assert len(hashed) == 1
    assert model.fingerprint != first
    assert len(hashed) == 2
    for index in ((5,), (slice(None), 7)):  # a row, a column, past what PyTorch counts
        model = pb.load(saved)
        model.hf.transformer.h[0].mlp.c_fc.weight.data[index] = 0.25
        assert model.fingerprint == true(model) != first
    other = pb.load(saved)
    other.hf.transformer.ln_f.weight = torch.nn.Parameter(torch.full_like(other.hf.transformer.ln_f.weight, 3.0))
    assert other.fingerprint == true(other) != first
    assert pb.load(saved).fingerprint == first


def test_another_file_is_another_key(saved: Path, home: Path, hashed: list[int]) -> None:
    first = pb.load(saved).fingerprint
    twin("gpt2", seed=1).save_pretrained(saved)
    second = pb.load(saved)
    assert second.fingerprint == true(second) != first
    at = (saved / "model.safetensors").stat()
    os.utime(saved / "model.safetensors", ns=(at.st_atime_ns, at.st_mtime_ns + 1))
    assert pb.load(saved).fingerprint == second.fingerprint
    assert len(list(home.iterdir())) == 3
    assert len(hashed) == 4


def test_weights_that_the_files_lack_are_hashed(saved: Path, hashed: list[int]) -> None:
    """They are drawn at each load; here, by a load that draws others."""
    first = pb.load(saved)
    _ = first.fingerprint
    kept = next(path for path in (saved.parent / "cache" / "patchbay" / "fingerprints").iterdir())
    torch.manual_seed(3)
    other = pb.load(twin("gpt2", seed=2))
    assert (
        recalled.fingerprint(other.hf, ("as loaded",), recalled.Loaded(("as loaded",), kept))
        == true(other)
        != first.fingerprint
    )


@pytest.mark.parametrize("damage", [b"", b"0123456789abcdef", b"\xff\xfe", None])
def test_a_damaged_kept_file_is_made_anew(saved: Path, home: Path, hashed: list[int], damage: bytes | None) -> None:
    first = pb.load(saved).fingerprint
    path = next(home.iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole.replace(first.encode(), first[::-1].encode()) if damage is None else damage)
    assert pb.load(saved).fingerprint == first
    assert path.read_bytes() == whole
    assert len(hashed) == 2


def test_a_home_that_cannot_be_written_is_no_error(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved.parent / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(saved.parent / "file" / "below"))
    model = pb.load(saved)
    assert model.fingerprint == true(model)
    assert (saved.parent / "file").read_text() == "in the way"


def test_small_models_and_adapters_keep_nothing(
    saved: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig

    with monkeypatch.context() as patch:
        patch.setattr(recalled, "LEAST", 64 * 2**20)
        _ = pb.load(saved).fingerprint
    adapted = pb.load(twin("gpt2"))
    try:
        adapted.hf.add_adapter(LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    except ValueError as why:
        pytest.skip(f"transformers asks for another PEFT than is installed: {why}")
    assert recalled.loaded(adapted.hf, str(saved), []) is None
    assert not home.exists()
