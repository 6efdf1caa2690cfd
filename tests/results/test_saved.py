"""saved: what goes to disk is whole or not there, whatever fails, and what was there before stays."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import patchbay as pb
from patchbay.cli import main
from patchbay.draw import report
from patchbay.edits.edit import save_edits
from patchbay.files import reason, write_file, write_folder
from patchbay.results.result import Result
from patchbay.results.saved import packed, unpacked
from patchbay.signal.port import Part, PatchbayError
from patchbay.tiny.twins import twin
from tests.given import forks
from tests.shares import by_turns

FORK: Any = multiprocessing.get_context("fork")  # has all imported that this process has
FULL, STOPPED = OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()


def result(value: float = 1.0) -> Result:
    return Result(torch.full((2, 3), value))


def knob(strength: float = 1.0) -> pb.Knob:
    edit = pb.add(Part(0, "layer").port("resid_out"), torch.ones(64))
    return pb.Knob("k", [edit], strength, evidence={"proof": result()})


SAVERS: dict[str, Callable[[Path], Any]] = {
    "result": lambda path: result(2.0).save(path, overwrite=True),
    "knob": lambda path: knob(2.0).save(path, overwrite=True),
    "edits": lambda path: save_edits(knob(2.0).edits_at(2.0), path),
    "figure": lambda path: result().plot(path),
    "page": lambda path: report.write(path, "<p>new</p>"),
    "file": lambda path: write_file(path, lambda fresh: save_file({"x": torch.zeros(9)}, fresh)),
    "folder": lambda path: write_folder(path, lambda fresh: save_file({"x": torch.zeros(9)}, fresh / "x")),
}
FIRST: dict[str, Callable[[Path], Any]] = {
    "result": lambda path: result().save(path),
    "knob": lambda path: knob().save(path),
    "folder": lambda path: (path.mkdir(), (path / "x").write_text("old")),
}


def old(path: Path) -> Any:
    return path.write_text("old")


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# what others wrote is forced to disk where that is possible; a file is put into place with replace, a folder with rename
STEPS = {
    name: ["fsync", "rename", "rename 2"] if name in ("result", "folder") else ["fsync", "replace"] for name in SAVERS
}
STEPS |= {name: STEPS[name][1:] for name in ("file", "folder")}


@pytest.mark.parametrize(
    ("at", "error"), by_turns([f"{saver} {step}" for saver in SAVERS for step in STEPS[saver]], [FULL, STOPPED], of=2)
)
def test_whatever_fails_all_is_as_it_was(
    at: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, step = at.split(maxsplit=1)
    name, place = step.split()[0], tmp_path / "there.png"
    FIRST.get(saver, old)(place)
    before, real, calls = snapshot(tmp_path), getattr(os, name), 0

    def fail(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1 + step.endswith("2"):
            raise error
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(os, name, fail)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else PatchbayError) as caught:
            SAVERS[saver](place)
    assert calls
    assert snapshot(tmp_path) == before
    if error is FULL:
        assert str(caught.value) == f"could not save to {place}: No space left on device; nothing was written"
    with monkeypatch.context() as patched:  # and where nothing was, nothing is left, nor the folders made for it
        calls = 0
        patched.setattr(os, name, fail)
        if not step.endswith("2"):
            with pytest.raises((KeyboardInterrupt, PatchbayError)):
                SAVERS[saver](tmp_path / "a" / "b" / "new.png")
            assert snapshot(tmp_path) == before
    SAVERS[saver](place)
    assert snapshot(tmp_path) != before
    assert {path.name for path in tmp_path.iterdir()} == {"there.png"}


def test_safetensors_says_why_in_the_words_of_the_system() -> None:
    said = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert reason(said) == os.strerror(errno.ENOSPC)
    assert reason(SafetensorError("header too large")) == "header too large"
    assert reason(FULL) == "No space left on device"
    assert reason(OSError("odd")) == "odd"


def test_folders_are_made_and_a_file_in_their_place_is_named(tmp_path: Path) -> None:
    assert write_file(tmp_path / "a" / "b" / "c", b"x").read_bytes() == b"x"
    with pytest.raises(PatchbayError, match="c is a file, not a folder; nothing was written"):
        write_folder(tmp_path / "a" / "b" / "c" / "d" / "e", {"x": b""})
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c"]


def test_links_are_followed_and_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    assert write_file(tmp_path / "link", b"new") == (tmp_path / "real" / "file").resolve()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_bytes() == b"new"


def test_plain_data_comes_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, math.inf, -math.inf, None, True, "x"], "part": Part(0, "head", 1)}
    assert unpacked(packed(value)) == {"a": [1, 2.5, math.inf, -math.inf, None, True, "x"], "part": "L0.H1"}
    assert math.isnan(unpacked(packed({"n": math.nan}))["n"])
    with pytest.raises(PatchbayError, match="hold plain data, got object"):
        packed([object()])


# --- a system that really refuses -------------------------------------------------------------------


def save_all(folder: Path, limit: int | None, told: Any) -> None:
    """Everything that can be saved, one after the other; what became of each is told."""
    import resource

    model = pb.load(twin("gpt2"))
    task = pb.Task("t", [[5, 6, at] for at in range(40)], [1] * 40, [[2]] * 40)
    steer = pb.add(model.layers[0].resid_out, torch.ones(20_000, model.d_model), positions=None)
    head, cells = model.layers[0].heads[0].z, [pb.zero(h.z) for _ in range(100) for h in model.layers[0].heads]
    savers: dict[str, Callable[[Path], Any]] = {
        "result": lambda at: pb.Result(torch.zeros(200, 200)).save(at),
        "knob": lambda at: pb.Knob("k", [steer], 1.0).save(at),
        "edits": lambda at: save_edits([steer], at),
        "export": lambda at: pb.Knob("z", [pb.zero(head)], 1.0).export(model, at),
        "tuned": lambda at: pb.train.tune_parts(
            model, pb.tasks.repeated_tokens(model, 4), ["L0.H1"], steps=1, folder=str(at)
        ),
        "sweep": lambda at: pb.sweep(model, task, cells, folder=at),
    }
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for name, save in savers.items():
        try:
            save(folder / name)
            told.send(f"{name} was saved")
        except Exception as error:
            told.send(f"{name} {type(error).__name__} {error}")
    told.close()


WORDS = {"limit": "File too large", "tmpfs": "No space left on device"}


@forks
@pytest.mark.skipif(sys.platform != "linux", reason="needs resource limits or a file system of its own")
@pytest.mark.parametrize("how", ["limit", "tmpfs"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_disk_that_is_really_full(how: str, tmp_path: Path) -> None:
    """A limit on the size of files, and a file system of 16 KB where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if how == "tmpfs":
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", place], capture_output=True)
        if mounted.returncode:
            pytest.skip("no file system may be mounted here")
    try:
        hears, tells = FORK.Pipe(duplex=False)
        child = FORK.Process(target=save_all, args=(place, 10_000 if how == "limit" else None, tells))
        child.start()
        lines = [hears.recv() for _ in range(6)]
        child.join()
        assert [line.split()[0] for line in lines] == ["result", "knob", "edits", "export", "tuned", "sweep"]
        for line in lines:
            assert "PatchbayError" in line
            assert f"{WORDS[how]}; nothing was written" in line
        assert [path.name for path in place.iterdir()] == ["sweep"]  # finished batches stay
        assert [path.name for path in (place / "sweep").iterdir()] == ["sweep.json"]
    finally:
        if how == "tmpfs":
            subprocess.run(["umount", place], check=False)


def save_slowly(args: list[str], out: int, err: int) -> None:
    """The command line on a disk that takes a minute; its output and its messages go to these two."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever it was where the tests were started
    sys.stdout, sys.stderr = os.fdopen(out, "w", buffering=1), os.fdopen(err, "w", buffering=1)

    def slow(descriptor: int) -> None:
        print("writing", flush=True)
        time.sleep(60)

    os.fsync = slow
    sys.argv = ["patchbay", *args]
    main()


@forks
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_ctrl_c_while_the_command_line_saves(tmp_path: Path) -> None:
    place = pb.turn.scale("L1.H2", 2.0).save(tmp_path / "x.knob")
    before = place.read_bytes()
    args = ["turn", "scale", "tiny", "--parts", "L1.H2", "--strength", "4", "-o", str(place), "--overwrite"]
    (said, out), (told, err) = os.pipe(), os.pipe()
    child = FORK.Process(target=save_slowly, args=(args, out, err))
    child.start()
    os.close(out)
    os.close(err)
    with open(said) as lines, open(told) as messages:
        assert next(line for line in lines if "writing" in line)
        os.kill(child.pid, signal.SIGINT)
        error = messages.read()
    child.join()
    assert child.exitcode == 130, error
    assert error.strip().splitlines() == ["interrupted; nothing was left half-written"]
    assert place.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.knob"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_is_full_is_one_message() -> None:
    code = "from patchbay.cli import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code, "tasks"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "Error: the output: No space left on device"
