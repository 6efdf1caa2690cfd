"""The worker's jobs on the built-in model: a form's run is the method's own Result, saved; an interrupt cancels; a failure says why."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.app.worker import Worker, lines
from patchbay.cli import options
from tests.tolerance import close


@pytest.fixture
def worker(
    trained: pb.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Worker, list[dict[str, Any]]]]:
    told: list[dict[str, Any]] = []
    made = Worker(tmp_path, told.append)
    made.model = trained
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, made.interrupted)
    yield made, told
    signal.signal(signal.SIGINT, before)


def job(tmp_path: Path, room: str, method: str, *words: str, out: str = "out") -> dict[str, Any]:
    return {"id": "1", "room": room, "method": method, "words": list(words), "out": out, "keep": str(tmp_path / "kept")}


def test_a_run_is_the_methods_own_result(worker: Any, trained: pb.Model, tmp_path: Path) -> None:
    made, told = worker
    made.do(job(tmp_path, "find", "direct_logit_attribution", "--task=facts_in_context:n=4", "--seed=3"))
    assert told[-1] == {"id": "1", "event": "done", "result": "out"}
    expected = pb.find.direct_logit_attribution(trained, pb.tasks.facts_in_context(trained, n=4, seed=3))
    assert pb.load_result(tmp_path / "out").equal(expected)
    made.do(job(tmp_path, "prove", "ablation", "--task=facts_in_context:n=4", "--parts=out:2", out="a/proof"))
    assert told[-1]["event"] == "done", told[-1]
    assert pb.load_result(tmp_path / "a" / "proof").parts == expected.top(2)


def test_a_sweep_says_what_it_will_cost_and_how_far_it_is(worker: Any, trained: pb.Model, tmp_path: Path) -> None:
    made, told = worker
    made.do(job(tmp_path, "prove", "activation_patching", "--task=facts_in_context:n=2"))
    assert told[-1]["event"] == "done", told[-1]
    assert [line for line in told if line["event"] == "estimate"]
    far = [(line["done"], line["total"]) for line in told if line["event"] == "progress"]
    assert far[-1][0] == far[-1][1] > 0
    assert list((tmp_path / "kept").rglob("batch-*")), "finished batches are kept"
    maps = [line["map"] for line in told if line["event"] == "partial"]
    assert maps[-1]["axes"] == ("layer", "place")
    whole = [one["values"] for one in maps if all(value is not None for row in one["values"] for value in row)]
    assert len(whole) == 2, "prompts of two lengths are two sweeps, each with its map"
    assert len(maps) > len(whole), "which fill as they go"
    assert close(torch.tensor(whole).mean(0), pb.load_result(tmp_path / "out")["effect"])


def test_a_knob_is_saved_as_a_knob(worker: Any, tmp_path: Path) -> None:
    made, told = worker
    made.do(job(tmp_path, "turn", "scale", "--parts=L1.H1", "--strength=0", out="off"))
    assert told[-1] == {"id": "1", "event": "done", "result": "off.knob"}
    assert pb.load_knob(tmp_path / "off.knob").edits


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--task=nothing", "--parts=L1.H1"], "no task 'nothing'"), (["--task=facts_in_context", "--parts=L9.H0"], "0..2"), (["--nothing=1"], "No such option"), ([], "--parts")],
)  # fmt: skip
def test_a_failure_says_why_in_the_words_of_the_command_line(
    words: list[str], said: str, worker: Any, tmp_path: Path
) -> None:
    made, told = worker
    made.do(job(tmp_path, "prove", "ablation", *words))
    assert told[-1]["event"] == "failed"
    assert said in told[-1]["message"]
    assert not (tmp_path / "out").exists()


def test_an_interrupt_cancels_the_job_at_hand_and_no_other(
    worker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, told = worker

    def interrupted(room: str, name: str) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    os.kill(os.getpid(), signal.SIGINT)  # nothing is at hand
    with monkeypatch.context() as patched:
        patched.setattr(options, "load_method", interrupted)
        made.do(job(tmp_path, "find", "direct_logit_attribution", "--task=facts_in_context:n=4"))
    assert told[-1]["event"] == "cancelled"
    made.do(job(tmp_path, "turn", "scale", "--parts=L1.H1", "--strength=0"))
    assert told[-1]["event"] == "done"


def test_the_check_of_a_claim_says_its_verdict_with_the_numbers(
    worker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchbay.papers import claims

    made, told = worker
    asked: list[Any] = []

    def check(key: str, model: pb.Model) -> Any:
        asked.append((key, model))
        one = claims.Claim("heads do", 2.0, 1.5, 2.5, 1.0, "of 1")
        return claims.Checked(key, "comparison", (0,), (one,), ("none can be made",))

    monkeypatch.setattr(claims, "check", check)
    made.do(job(tmp_path, "papers", "olsson2022"))
    assert asked == [("olsson2022", made.model)]
    assert told[-1]["result"] is None
    assert told[-1]["message"].startswith("confirmed: heads do\nmodel, seed 0: 2 of 1")


def test_pieces_of_a_look_come_before_its_answer(worker: Any) -> None:
    made, told = worker
    made.do({"id": "7", "look": "turned", "asked": {"text": "The capital", "new": 2}})
    assert [line["event"] for line in told[:-1]] == ["piece"] * (len(told) - 1)
    assert told[-1]["event"] == "answer"
    assert {line["id"] for line in told} == {"7"}


def test_a_model_is_loaded_with_its_dictionaries(tmp_path: Path) -> None:
    rows = torch.eye(128)[:8]
    pb.Dictionary(rows.T, rows, torch.zeros(8), torch.zeros(128), layer=1, reads="resid_out").save(tmp_path / "sae")
    told: list[dict[str, Any]] = []
    made = Worker(tmp_path, told.append)
    made.load("tiny", [str(tmp_path / "sae")])
    assert told == [{"event": "ready"}]
    assert list(made.model.dictionaries) == [(1, "features")]
    made.load("tiny", [str(tmp_path / "none")])
    assert told[-1]["event"] == "failed to load"


def test_a_claims_verdict_is_told_with_the_weights_that_it_is_of(
    worker: Any, trained: pb.Model, tmp_path: Path
) -> None:
    made, told = worker
    made.do(job(tmp_path, "papers", "olsson2022"))
    assert told[-1]["event"] == "done", told[-1]
    assert told[-1]["verdict"] == told[-1]["message"].partition(":")[0] == "confirmed"
    assert told[-1]["weights"] == trained.fingerprint[:16]


def test_dictionaries_are_proved_on_texts_where_there_are_some_and_say_so_where_there_are_none(
    worker: Any, tmp_path: Path
) -> None:
    made, told = worker
    rows = torch.eye(128)
    pb.Dictionary(torch.cat([rows, -rows], 1), torch.cat([rows, -rows]), torch.zeros(256), torch.zeros(128), layer=1, reads="resid_out").save(tmp_path / "whole")  # fmt: skip
    pb.Dictionary(rows[:8].T, rows[:8], torch.zeros(8), torch.zeros(128), layer=1, reads="resid_out").save(tmp_path / "little")  # fmt: skip
    texts = tmp_path / "texts.txt"
    texts.write_text("The capital of Lolavia is Grerum.\n\nEmma asked Kate about the violin.\n")
    made.load("tiny", [str(tmp_path / "whole")], str(texts))
    assert told[-1] == {"event": "ready"}
    (notes,) = [one.notes for one in made.model.dictionaries.values()]
    assert any(note.startswith("FVU") and "2 texts" in note for note in notes), notes
    made.load("tiny", [str(tmp_path / "little")], str(texts))
    assert told[-1]["event"] == "failed to load"
    assert "of the variance" in told[-1]["message"]
    made.load("tiny", [str(tmp_path / "little")])
    assert told[-1] == {"event": "ready"}
    (notes,) = [one.notes for one in made.model.dictionaries.values()]
    assert any(note.startswith("not proved on text") for note in notes), notes
    for content, said in ((b"\xff\xfe", "cannot be read"), (b"\n", "no texts")):
        texts.write_bytes(content)
        made.load("tiny", [str(tmp_path / "whole")], str(texts))
        assert said in told[-1]["message"]


def test_an_interrupt_while_a_line_is_told_waits_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, its = os.pipe()
    write = os.write

    def in_parts(out: int, said: bytes) -> int:
        gone = write(out, said[:5])
        if out == its:
            signal.raise_signal(signal.SIGINT)
        return gone

    made = Worker(tmp_path, print)
    tell = lines(its, made.whole)
    before = signal.signal(signal.SIGINT, made.interrupted)
    monkeypatch.setattr(os, "write", in_parts)
    try:
        made.busy = True
        with pytest.raises(KeyboardInterrupt):
            tell({"event": "progress", "done": 1})
        tell({"event": "cancelled"})  # nothing is at hand
        made.busy = True
        other = threading.Thread(target=tell, args=({"event": "progress", "done": 2},))
        with pytest.raises(KeyboardInterrupt):  # another thread's line is its own
            other.start()
            other.join()
        other.join()
    finally:
        signal.signal(signal.SIGINT, before)
    os.close(its)
    with open(ours, encoding="utf-8") as read:
        said = [json.loads(line) for line in read]
    assert said == [{"event": "progress", "done": 1}, {"event": "cancelled"}, {"event": "progress", "done": 2}]
