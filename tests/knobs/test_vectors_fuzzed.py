"""Damaged files of vectors, knobs and adapters: whatever their bytes are, they are read, or refused as what they are."""

import contextlib
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.knobs.gguf import write_gguf
from patchbay.knobs.knob import Knob
from patchbay.signal.port import Port
from patchbay.tiny.twins import twin

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def whole(kind: str, folder: Path) -> bytes:
    """A whole file of each kind that `load_knob` reads."""
    vectors = {"direction.1": torch.arange(32.0), "direction.2": torch.ones(32)}
    if kind == "gguf":
        fields: dict[str, str | int] = {"general.architecture": "controlvector", "controlvector.layer_count": 3}
        write_gguf(folder / "v.gguf", fields, {name: vector.numpy() for name, vector in vectors.items()})
        return (folder / "v.gguf").read_bytes()
    if kind == "npy":
        file = io.BytesIO()
        np.save(file, torch.ones(3, 32).numpy())
        return file.getvalue()
    if kind == "knob":
        return Knob("k", [pb.add(Port("resid_out", 1), torch.arange(32.0))], 2.0).save(folder / "k.knob").read_bytes()
    return save(vectors)


def read(raw: bytes, path: Path) -> None:
    path.write_bytes(raw)
    with contextlib.suppress(PatchbayError):  # any other exception fails the test
        assert pb.load_knob(path).edits


@st.composite
def damage(draw: Any) -> Any:
    """Bytes set, cut out, doubled or put in, most of them in the header."""
    return [
        (
            draw(st.sampled_from("scdp")),
            draw(st.floats(0, 1)) ** draw(st.sampled_from([1, 3])),
            draw(st.binary(max_size=9)),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]


def damaged(raw: bytes, how: list[tuple[str, float, bytes]]) -> bytes:
    for kind, place, new in how:
        at = int(place * len(raw))
        raw = {
            "s": raw[:at] + new + raw[at + len(new) :],
            "c": raw[:at] + raw[at + len(new) :],
            "d": raw[:at] + raw[at : at + 9] + raw[at:],
            "p": raw[:at] + new + raw[at:],
        }[kind]
    return raw


@FEW
@given(kind=st.sampled_from(["gguf", "npy", "knob", "safetensors"]), how=damage())
def test_damaged_files_are_read_or_refused(kind: str, how: Any, tmp_path: Path) -> None:
    (tmp_path / "k.knob").unlink(missing_ok=True)
    read(damaged(whole(kind, tmp_path), how), tmp_path / "found")


def gguf(fields: bytes = b"", n_fields: int = 0, arrays: bytes = b"", n_arrays: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_arrays, n_fields) + fields + arrays


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


ONE = text("direction.1")
HEADERS = {
    "alignment 0": gguf(text("general.alignment") + struct.pack("<II", 4, 0), 1),
    "alignment a word": gguf(text("general.alignment") + struct.pack("<I", 8) + text("wide"), 1),
    "a field of no kind": gguf(text("x") + struct.pack("<I", 99), 1),
    "a list in lists": gguf(text("x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9000 + bytes(12), 1),
    "more fields than bytes": gguf(b"", 2**63),
    "a shape beyond all numbers": gguf(arrays=ONE + struct.pack("<IQQQIQ", 3, 2**62, 2**62, 2**62, 0, 0), n_arrays=1),
    "a shape that comes out negative": gguf(arrays=ONE + struct.pack("<IQQIQ", 2, 2**62, 3, 0, 0), n_arrays=1),
    "a place beyond the file": gguf(arrays=ONE + struct.pack("<IQIQ", 1, 4, 0, 2**60), n_arrays=1),
    "no dimensions": gguf(arrays=ONE + struct.pack("<IIQ", 0, 0, 0), n_arrays=1),
    "a quantised array": gguf(arrays=ONE + struct.pack("<IQIQ", 1, 32, 12, 0), n_arrays=1),
}


@pytest.mark.parametrize("name", HEADERS)
def test_gguf_headers_that_announce_what_is_not_there(name: str, tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_bytes(HEADERS[name])
    with pytest.raises(PatchbayError):
        pb.load_knob(tmp_path / "v.gguf")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@FEW
@given(header=st.dictionaries(st.sampled_from(["direction.1", "__metadata__", "x"]), JSON | st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "I8", "Q4"]), "shape": st.lists(st.integers(0, 2**40), max_size=3),
     "data_offsets": st.lists(st.integers(0, 2**40), max_size=3)}), max_size=3))  # fmt: skip
@example(header={"__metadata__": {"format": "patchbay-knob", "version": "1", "knob": "[]", "sha256": ""}})
@example(header={"__metadata__": {"format": "patchbay-knob", "version": "1"}})
@example(header={"__metadata__": {"format": "patchbay-knob", "version": "x"}})
def test_headers_of_safetensors(header: dict[str, Any], tmp_path: Path) -> None:
    raw = json.dumps(header).encode()
    read(struct.pack("<Q", len(raw)) + raw + bytes(64), tmp_path / "found")


ADAPTERS: dict[str, Any] = {
    "a list": [],
    "no base": {"peft_type": "LORA"},
    "a base that is a number": {"base_model_name_or_path": 3, "peft_type": "LORA"},
    "a base that is not there": {"base_model_name_or_path": "/nowhere/at-all", "peft_type": "LORA"},
    "no kind": {"base_model_name_or_path": "../base"},
    "a kind that nobody knows": {"base_model_name_or_path": "../base", "peft_type": "SORCERY"},
    "modules that are not there": {
        "base_model_name_or_path": "../base",
        "peft_type": "LORA",
        "target_modules": ["nothing"],
        "r": 2,
    },
    "a rank that is a word": {
        "base_model_name_or_path": "../base",
        "peft_type": "LORA",
        "target_modules": ["q_proj"],
        "r": "two",
    },
    "no weights": {"base_model_name_or_path": "../base", "peft_type": "LORA", "target_modules": ["q_proj"], "r": 2},
    "torn weights": {"base_model_name_or_path": "../base", "peft_type": "LORA", "target_modules": ["q_proj"], "r": 2},
    "other shapes": {"base_model_name_or_path": "../base", "peft_type": "LORA", "target_modules": ["q_proj"], "r": 3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapters")
    twin("llama").save_pretrained(folder / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(twin("llama"), config).save_pretrained(folder / "whole")
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_folders_that_are_wrong_are_refused(name: str, base: Path) -> None:
    folder = base / name.replace(" ", "-")
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTERS[name]))
    weights = (base / "whole" / "adapter_model.safetensors").read_bytes()
    if name != "no weights":
        (folder / "adapter_model.safetensors").write_bytes(weights[:60] if name == "torn weights" else weights)
    with pytest.raises(PatchbayError, match="could not load"):
        pb.load(folder)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"null", b"[" * 100_000])
def test_settings_of_an_adapter_that_are_no_json(raw: bytes, base: Path) -> None:
    folder = base / f"raw{len(raw)}{raw[:1].hex()}"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(raw)
    with pytest.raises(PatchbayError, match=r"could not load .*adapter_config\.json is no table of settings"):
        pb.load(folder)
