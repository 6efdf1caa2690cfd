"""From a folder of knobs to an address, and to its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.serve import listen
from patchbay.serve.guard import Keys
from patchbay.serve.named import HEADER_BYTES, Named, knobs_of
from patchbay.serve.replicas import run_replicas
from patchbay.serve.run import Settings, application, name_of, started
from tests.commands import patchbay


@pytest.fixture(scope="module")
def model() -> pb.Model:
    return pb.load("tiny")


@pytest.fixture
def folder(tmp_path: Path, model: pb.Model) -> Path:
    root = tmp_path / "k"
    pb.turn.scale("L1.H1", 0.0, model=model).save(root / "text.knob")
    pb.turn.scale("L2.H0", 2.0).save(root / "loud.knob")
    return root


def test_a_folder_of_knobs_is_offered_by_the_names_of_its_files(model: pb.Model, folder: Path) -> None:
    found = knobs_of(folder, model)
    assert list(found) == ["loud", "text"]
    assert found["text"].strength == 0.0
    lines = started(Named(model, "tiny", found), "http://127.0.0.1:1/v1", Keys("a" * 20))
    assert lines[0] == "tiny with the knobs loud, text"
    assert lines[1] == f"export OPENAI_BASE_URL=http://127.0.0.1:1/v1 OPENAI_API_KEY={'a' * 20}"
    assert name_of("/models/some model") == "some-model"


def test_files_that_are_no_knobs_are_refused_before_they_are_read(
    model: pb.Model, folder: Path, tmp_path: Path
) -> None:
    bad = folder / "bad.knob"
    bad.write_bytes((HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
    with pytest.raises(PatchbayError, match="with a header of"):
        knobs_of(folder, model)
    bad.write_bytes((10**15).to_bytes(8, "little"))
    with pytest.raises(PatchbayError, match="with a header of"):
        knobs_of(folder, model)
    bad.write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(PatchbayError):
        knobs_of(folder, model)
    bad.unlink()
    (tmp_path / "far.knob").write_bytes((folder / "text.knob").read_bytes())
    (folder / "link.knob").symlink_to(tmp_path / "far.knob")
    with pytest.raises(PatchbayError, match="leads out of"):
        knobs_of(folder, model)
    (folder / "link.knob").unlink()
    with pytest.raises(PatchbayError, match="no folder of knobs"):
        knobs_of(folder / "nowhere", model)
    with pytest.raises(PatchbayError, match="made on tiny"):
        knobs_of(folder, pb.load("tiny-wide"))
    knob = pb.turn.scale("L2.H0", 2.0)
    knob.save(folder / "my  first +knob.knob")  # as a request can say it
    named = Named(model, "tiny", knobs_of(folder, model))
    assert named.asked("tiny+my-first-knob@3") == (("my-first-knob", 3.0),)
    assert "tiny+my-first-knob" in [row["id"] for row in named.listed()]
    knob.save(folder / "my first knob.knob")
    with pytest.raises(PatchbayError, match="is asked for as my-first-knob, and so is my .*: give it another name"):
        knobs_of(folder, model)
    (folder / "my first knob.knob").unlink()
    knob.save(folder / "+.knob")
    with pytest.raises(PatchbayError, match="has no letter in its name: give it another name"):
        knobs_of(folder, model)
    with pytest.raises(PatchbayError, match="no name that a request can say"):
        Named(model, "my tiny")


def test_running_requests_end_and_new_ones_are_503(
    model: pb.Model, listening: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM, as the server is told of it: what runs ends, what comes is refused, and then the server ends by itself."""
    keys = Keys()
    guard, engine, _ = application(model, Settings("tiny"), keys)
    engine.start()
    made: list[listen.Server] = []
    plain = listen.Server.__init__
    monkeypatch.setattr(listen.Server, "__init__", lambda self, *a: (made.append(self), plain(self, *a))[1])
    port = listening(guard, drain=engine.drain, idle=lambda: engine.idle)
    head = {"authorization": f"Bearer {keys.token}"}
    step, release = engine.turn, threading.Event()
    engine.turn = lambda: (release.wait(20), step())[1]  # type: ignore[method-assign, assignment]

    def post() -> httpx.Response:
        body = {"model": "tiny", "prompt": "The", "max_tokens": 3, "temperature": 0}
        return httpx.post(
            f"http://127.0.0.1:{port}/v1/completions", json=body, headers=head, trust_env=False, timeout=30
        )

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(post)
        while engine.idle:
            time.sleep(0.002)
        made[0].handle_exit(signal.SIGTERM, None)
        refused = post()
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"
        assert httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 503
        release.set()
        assert running.result().status_code == 200
    until = time.monotonic() + 10
    while not made[0].should_exit:
        assert time.monotonic() < until
        time.sleep(0.01)
    engine.close()


def test_the_commands_refuse_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = patchbay("serve", "tiny", "--host", "0.0.0.0", "--port", "0")
    assert done.exit_code == 2
    assert "--unsafe-listen" in done.output
    done = patchbay("serve", "tiny", "--knobs", str(tmp_path / "none"), "--port", "0")
    assert done.exit_code == 2
    assert "no folder of knobs" in done.output
    monkeypatch.setenv("PATCHBAY_TOKEN", "short")
    assert "16 or more" in patchbay("serve", "tiny", "--port", "0").output
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    done = patchbay("serve", "tiny", "--replicas", "2")
    assert done.exit_code == 2
    assert "patchbay-lm[replicas]" in done.output


def test_without_its_packages_a_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for command, absent, extra in (("serve", "patchbay.serve.run", "serve"), ("mcp", "patchbay.serve.agents", "mcp")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, absent, None)
            done = patchbay(command, "tiny")
        assert done.exit_code == 2
        assert f"patchbay-lm[{extra}]" in done.output


@pytest.mark.slow
def test_a_process_serves_and_ends(tmp_path: Path, folder: Path) -> None:
    """The command itself, asked over HTTP, then ended as a service is."""
    run = subprocess.Popen(
        [sys.executable, "-m", "patchbay", "serve", "tiny", "--knobs", str(folder), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert run.stdout is not None
    lines = [run.stdout.readline() for _ in range(3)]
    found = re.search(r"OPENAI_BASE_URL=(\S+) OPENAI_API_KEY=(\S+)", lines[1])
    assert found is not None
    base, key = found.groups()
    longer = "The capital of Lolavia is Grerum. Emma asked Kate about the violin. The capital of Lolavia is"
    body: dict[str, Any] = {"model": "tiny+text", "prompt": longer, "max_tokens": 2, "temperature": 0}
    answer = httpx.post(
        f"{base}/completions", json=body, headers={"authorization": f"Bearer {key}"}, trust_env=False, timeout=60
    )
    assert answer.json()["choices"][0]["text"] == " Grerum."
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 0
    assert "Traceback" not in errors
    assert longer not in errors


@pytest.mark.slow
def test_replicas_answer_what_one_process_answers(folder: Path) -> None:
    serve = pytest.importorskip(
        "ray.serve", reason="Ray Serve is not installed whole: pip install 'ray[serve]'", exc_type=ImportError
    )
    said: list[str] = []
    keys = run_replicas("tiny", {}, Settings("tiny", str(folder), port=8123), 2, said.append, wait=False)
    try:
        body = {"model": "tiny+text", "prompt": "The capital of Lolavia is", "max_tokens": 3, "temperature": 0}
        head = {"authorization": f"Bearer {keys.token}"}
        found = [
            httpx.post("http://127.0.0.1:8123/v1/completions", json=body, headers=head, trust_env=False, timeout=120)
            for _ in range(4)
        ]
        model = pb.load("tiny")
        with model.edited(pb.load_knob(folder / "text.knob")):
            expected = model.generate(body["prompt"], 3, new_only=True)
        assert [one.json()["choices"][0]["text"] for one in found] == [expected] * 4
        assert (
            httpx.post("http://127.0.0.1:8123/v1/completions", json=body, trust_env=False, timeout=60).status_code
            == 401
        )
    finally:
        serve.shutdown()
