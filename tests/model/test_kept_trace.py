"""Traces on disk: bit for bit those of a run in memory, whatever stopped the run on its way; what is not so is refused by name."""

import errno
import functools
import gc
import json
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.model import filling, shards
from patchbay.model import run as running
from patchbay.model.kept import KeptTrace
from patchbay.signal.port import PatchbayError, Port
from patchbay.tiny.twins import N_VOCAB, twin
from tests.given import forks
from tests.shares import by_turns


@functools.cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> pb.Model:
    return pb.load(twin(name).to(dtype))


def tokens(n: int, seed: int) -> list[int]:
    return torch.randint(3, N_VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [tokens(n, i) for i, n in enumerate([9, 4, 1, 7, 9, 2, 6])]
ONE_LENGTH = [tokens(5, i) for i in range(7)]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 2_000)


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit: NaN is like NaN, and -0 is not 0."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def asked(model: pb.Model) -> dict[str, Any]:
    """All signals, a head's, single query rows; edits by row, by mask and from the end."""
    at = model.layers[0]
    taps = [*model.ports(), at.heads[1].pattern.rows(-1, 0)] if "attn.pattern" in model.signals(0) else model.ports()
    mask = torch.zeros(len(PROMPTS), 9, dtype=torch.bool)
    mask[3, 2:5] = True
    edits = [
        pb.scale(at.attn.out, -0.5, positions=-1),
        pb.add(
            model.layers[1].resid_in, torch.arange(7.0)[:, None, None].expand(7, 1, model.d_model), positions="last"
        ),
        pb.zero(Port("resid_out", 1), positions=mask),
    ]
    return dict(taps=taps, edits=edits, batch_size=2)


@pytest.mark.parametrize(
    ("name", "length", "logits"),
    by_turns(["gpt2", "mixtral", "bloom", "mamba"], ["ragged", "one length"], ["all", "last"], of=2),
)
def test_a_trace_on_disk_is_that_in_memory(name: str, length: str, logits: str, tmp_path: Path) -> None:
    prompts = PROMPTS if length == "ragged" else ONE_LENGTH
    model = model_of(name)
    given = asked(model) | ({"edits": asked(model)["edits"][:2]} if prompts is ONE_LENGTH else {})
    memory = pb.run(model, prompts, logits=logits, **given)
    made = pb.run(model, prompts, logits=logits, folder=tmp_path / "t", **given)
    for disk in (made, pb.load_trace(tmp_path / "t")):
        assert sorted(disk.ports) == sorted(memory.ports)
        for port in memory.ports:
            assert same(disk[port], memory[port]), port
        assert same(disk.logits, memory.logits)
        assert same(disk.ids, memory.ids)
        assert same(disk.lengths, memory.lengths)
        assert same(disk.last_logits, memory.last_logits)
        assert disk.touched == memory.touched
        assert disk.edits == memory.edits
        assert disk.new_ids == memory.new_ids
        assert str(disk.folder) in repr(disk)
    assert len(list((tmp_path / "t").glob("shard-*"))) > 1
    inside = memory.lengths.sum() * model.d_model * 4
    stored = pb.run(model, prompts, taps=[model.layers[0].resid_in], folder=tmp_path / "one").folder
    size = sum(path.stat().st_size for path in stored.glob("shard-*"))
    assert inside < size < inside + 8 * memory.lengths.sum() + 2000  # no padding: the signal, ids and the header


def test_half_precision_stays_and_slices_are_those_of_the_whole(tmp_path: Path) -> None:
    model = model_of("llama", torch.bfloat16)
    taps = [Port("attn.k", 0), Port("attn.pattern", 1), Port("resid_out", 1)]
    memory, disk = (pb.run(model, PROMPTS, taps=taps, batch_size=3, **to) for to in ({}, {"folder": tmp_path / "t"}))
    assert disk["L1.resid_out"].dtype == torch.bfloat16
    for text in ("L0.KV1.k", "L1.H2.pattern", "L1.H0.pattern[-1]", "L1.resid_out"):
        assert same(disk[text], memory[text]), text
    assert same(disk.last("L1.H2.pattern"), memory.last("L1.H2.pattern"))


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_rows_are_tokens_in_the_order_of_the_index(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    taps = [Port("resid_out", 0), Port("attn.k", 1), Port("attn.z", 1), Port("attn.pattern", 0)]
    trace = pb.run(model, PROMPTS, taps=taps, batch_size=2, folder=tmp_path / "t")
    n = sum(map(len, PROMPTS))
    prompt, position = trace.places()
    assert trace.n_rows == n
    assert sorted(zip(prompt.tolist(), position.tolist(), strict=True)) == [
        (i, j) for i, p in enumerate(PROMPTS) for j in range(len(p))
    ]
    expected = {
        "L0.resid_out": trace["L0.resid_out"][prompt, position],
        "L1.attn.z": trace["L1.attn.z"][prompt, position],
        "L1.H1.z": trace["L1.H1.z"][prompt, position],
        "L1.attn.k": trace["L1.attn.k"][prompt, :, position],
        "L0.attn.pattern": trace["L0.attn.pattern"][prompt, :, position],
        "L0.H1.pattern": trace["L0.H1.pattern"][prompt, position],
    }
    for text, whole in expected.items():
        assert same(trace.rows(text), whole), text
        assert same(torch.cat(list(trace.shards(text))), whole), text
        for start, stop in ((0, 1), (5, 23), (12, 12), (n - 1, n)):
            assert same(trace.rows(text, start, stop), whole[start:stop]), (text, start, stop)
    assert [x.tolist() for x in trace.places(5, 9)] == [prompt[5:9].tolist(), position[5:9].tolist()]
    record = json.loads((tmp_path / "t" / "trace.json").read_text())
    assert len(record["shards"]) > 2
    for shard in record["shards"]:  # the index says it without our code
        first, length = shard["prompts"][0], len(PROMPTS[shard["prompts"][0]])
        assert prompt[shard["row"] : shard["row"] + length].tolist() == [first] * length
    with pytest.raises(PatchbayError, match=f"rows 3 to {n + 1}: this trace has rows 0 to {n}"):
        trace.rows("L0.resid_out", 3, n + 1)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts of every batch that is run from here on."""
    sizes: list[int] = []
    share = running._share

    def count(model: Any, batch: Any, some: Any, *rest: Any) -> Any:
        sizes.append(len(some))
        return share(model, batch, some, *rest)

    monkeypatch.setattr(running, "_share", count)
    return sizes


TAPS = ["L0.resid_out", "L1.attn.pattern"]


def go(model: pb.Model, folder: Path, prompts: Any = PROMPTS, **other: Any) -> Any:
    return pb.run(model, prompts, **{"taps": TAPS, "batch_size": 1, "folder": folder} | other)


@forks
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 1)  # a shard for each prompt
    model, save = model_of("gpt2"), shards.save_file
    model.fingerprint  # noqa: B018
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
        child = os.fork()
    if child == 0:

        def killed(tensors: Any, path: Path, **options: Any) -> None:
            save(tensors, path, **options)
            if "shard-00003" in path.name:
                os.kill(os.getpid(), signal.SIGKILL)

        shards.save_file = killed
        try:
            go(model, tmp_path / "t")
        finally:  # whatever happens, the child runs no other test
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert any(path.name.endswith(".partial") for path in (tmp_path / "t").iterdir())
    with pytest.raises(PatchbayError, match="t holds a run that was not finished: make the same call of pb.run"):
        pb.load_trace(tmp_path / "t")
    sizes = counted(monkeypatch)
    trace = go(model, tmp_path / "t")
    assert len(sizes) == len(PROMPTS) - 3
    memory = pb.run(model, PROMPTS, taps=TAPS, batch_size=1)
    assert all(same(trace[port], memory[port]) for port in TAPS)
    assert not any(path.name.endswith(".partial") for path in (tmp_path / "t").iterdir())
    sizes.clear()
    assert same(go(model, tmp_path / "t")[TAPS[0]], memory[TAPS[0]])
    assert sizes == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupt_and_a_full_disk_keep_what_is_finished(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD", 1)
    model, save = model_of("gpt2"), shards.save_file

    def fails(tensors: Any, path: Path, **options: Any) -> None:
        if "shard-00002" in path.name:
            path.write_bytes(b"some of it")
            raise stop
        save(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", fails)
        message = (
            r"could not save to .*shard-00002.*: No space left on device; nothing was written; finished shards stay"
        )
        kind, match = (KeyboardInterrupt, None) if isinstance(stop, KeyboardInterrupt) else (PatchbayError, message)
        with pytest.raises(kind, match=match):
            go(model, tmp_path / "t")
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [
        "shard-00000.safetensors",
        "shard-00001.safetensors",
        "trace.json",
    ]
    sizes = counted(monkeypatch)
    memory = pb.run(model, PROMPTS, taps=TAPS, batch_size=1)
    sizes.clear()
    assert same(go(model, tmp_path / "t")[TAPS[1]], memory[TAPS[1]])
    assert len(sizes) == len(PROMPTS) - 2


def test_a_request_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    model = model_of("gpt2")
    for bad in ({"taps": [Port("resid_out", 9)]}, {"edits": [pb.zero(Port("resid_out", 0), positions=50)]}):
        with pytest.raises(PatchbayError):
            go(model, tmp_path / "t", **bad)
        assert not (tmp_path / "t").exists()


def test_another_request_in_the_folder_is_refused_by_name(tmp_path: Path) -> None:
    model, edit = model_of("gpt2"), pb.scale(Port("resid_out", 0), 2.0)
    go(model, tmp_path / "t")
    others: dict[str, dict[str, Any]] = {
        "prompts": {"prompts": [*PROMPTS[:-1], PROMPTS[0]]},
        "taps": {"taps": TAPS[:1]},
        "edits": {"edits": [edit]},
        "logits": {"logits": "last"},
        "batch_size": {"batch_size": 2},
        "model": {"model": pb.load(twin("gpt2", seed=1))},
    }
    for what, other in others.items():
        with pytest.raises(
            PatchbayError, match=rf"t holds the trace of another run, with other {what}: choose another"
        ):
            go(**{"model": model, "folder": tmp_path / "t"} | other)
    with pytest.raises(PatchbayError, match="with other edits: "), model.edited(edit):
        go(model, tmp_path / "t")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    with pytest.raises(PatchbayError, match="full is not empty and not a trace: choose another folder"):
        go(model, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_damage_is_said_and_the_same_call_mends_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 1)
    model, whole = model_of("gpt2"), tmp_path / "whole"
    kept = go(model, whole)
    expected = kept[TAPS[0]].clone()
    data = (whole / "shard-00001.safetensors").read_bytes()
    flipped = data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]
    for damaged in (data[:-9], flipped, b"", data[:20] + b"x" + data[21:], None):
        folder = tmp_path / "t"
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        path = folder / "shard-00001.safetensors"
        path.unlink() if damaged is None else path.write_bytes(damaged)
        trace = pb.load_trace(folder)  # nothing but the index is read
        with pytest.raises(
            PatchbayError, match=r"shard-00001.safetensors is damaged \(.*\): make the call of pb.run again"
        ):
            _ = [trace[port] for port in TAPS], trace.ids
        sizes = counted(monkeypatch)
        assert same(go(model, folder)[TAPS[0]], expected)
        assert sizes == [1]
    index = (whole / "trace.json").read_text()
    for text, message in (
        (index[:-5], "trace.json cannot be read"),
        (
            index.replace('"lengths": [9, 4', '"lengths": [4, 9'),
            "trace.json is damaged: remove the folder and run again",
        ),
        ("[]", "trace.json is no record of a trace of version 1"),
        (index.replace('"version": 1', '"version": 2'), "trace.json is no record of a trace of version 1"),
    ):
        assert text != index
        (whole / "trace.json").write_text(text)
        for call in (lambda: pb.load_trace(whole), lambda: go(model, whole)):
            with pytest.raises(PatchbayError, match=message):
                call()
    with pytest.raises(PatchbayError, match="nowhere holds no trace: "):
        pb.load_trace(tmp_path / "nowhere")


def test_what_cannot_go_to_disk_is_refused_by_name(tmp_path: Path) -> None:
    model, folder = model_of("gpt2"), tmp_path / "t"
    for other, message in (
        ({"grad": True}, "folder= cannot be combined with grad=True: a gradient spans what is in memory"),
        ({"max_new_tokens": 3, "top_k": 4}, "folder= cannot be combined with max_new_tokens, top_k: generate first"),
        ({"taps": []}, "folder= keeps what is tapped: give taps="),
        ({"logits": "some"}, "logits='some': 'all' or 'last'"),
    ):
        with pytest.raises(PatchbayError, match=message):
            go(model, folder, **other)
    with pytest.raises(PatchbayError, match="give it as edits="), model.edited(pb.zero(Port("resid_out", 0), rows=2)):
        go(model, folder)
    trace = go(model, folder, taps=["L0.attn.pattern", "L0.H1.pattern[-1]"])
    with pytest.raises(PatchbayError, match="t holds no logits: run with logits='all' or logits='last' into another"):
        _ = trace.logits
    with pytest.raises(PatchbayError, match="query rows are no rows of tokens"):
        trace.rows("L0.H1.pattern[-1]")
    with pytest.raises(PatchbayError, match="L1.resid_out was not tapped; tapped were"):
        trace.rows("L1.resid_out")


def live() -> int:
    """Bytes of all tensors in memory."""
    found = [x for x in gc.get_objects() if type(x) is Tensor and x.device.type == "cpu"]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())


def test_memory_is_one_batch_and_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without help of the collector of circles: what is done with is let go."""
    model, peak, parts = model_of("gpt2"), [0], filling._parts

    def measured(trace: Any, logits: str) -> Any:
        found = parts(trace, logits)
        peak[0] = max(peak[0], live())
        return found

    monkeypatch.setattr(filling, "_parts", measured)
    batch = 4 * 8 * model.n_neurons(0) * 4  # prompts, positions, neurons, bytes
    monkeypatch.setattr(shards, "SHARD", 3 * batch)
    prompts = [tokens(8, i) for i in range(64)]
    gc.collect()
    before = live()
    gc.disable()
    try:
        trace = pb.run(model, prompts, taps=[Port("mlp.act", 0)], batch_size=4, folder=tmp_path / "t")
        small = batch  # token ids, lengths, logits of one position
        assert 4 * batch <= peak[0] - before < (3 + 1) * batch + small
        del trace
        assert isinstance(pb.load_trace(tmp_path / "t"), KeptTrace)
        assert live() - before < small
    finally:
        gc.enable()
