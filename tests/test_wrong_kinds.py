"""An argument of the wrong kind, in any public call: it will do, or it is refused by name; never an error from somewhere inside."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import patchbay as pb
from tests.shares import by_turns

WRONG: dict[str, Any] = {
    "a number": 5,
    "a fraction": 1.5,
    "a text": "x y",
    "None": None,
    "an object": SimpleNamespace(),
    "a list": [],
    "a list of objects": [SimpleNamespace()],
    "a mapping": {"x": 1},
}
NAMES = [
    "run",
    "sweep",
    "replay",
    "diff",
    "load",
    "load_knob",
    "load_result",
    "load_trace",
    "zero",
    "add",
    "scale",
    "replace",
    "mean",
    "block",
    "Model.encode",
    "Model.generate",
    "Model.card",
    "Model.port",
    "Model.part",
    "Model.decode",
    "Model.signals",
    "Model.edited",
    "Result.top",
    "Result.bottom",
    "Result.table",
    "Result.summary",
    "Result.labels_of",
    "Result.axes_of",
    "Result.equal",
    "Result.agrees",
    "Result.differences",
    "Result.save",
    "Result.plot",
    "Result.[]",
    "Knob.at",
    "Knob.edits_at",
    "Knob.save",
    "Knob.fits",
    "Knob.when",
    "Knob.with_evidence",
    "Knob.on_rows",
    "Knob.export",
    "Edit.when",
    "Trace.last",
    "Trace.show",
    "Trace.[]",
    "Task.[]",
    "Task.split",
    "Task.joined",
    "Task.with_metric",
    "Task.score",
    "Task.from_prompts",
    "Task.from_file",
    "Task.show",
    "tasks.repeated_tokens",
    "turn.scale",
    "compare",
]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each public call with arguments that are right; a fresh file name is made for what writes."""
    folder = tmp_path_factory.mktemp("kinds")
    model = pb.load("tiny")
    task = pb.tasks.repeated_tokens(model, 4)
    rows = [list(ids) for ids in task.clean]
    found = pb.find.direct_logit_attribution(model, task)
    knob = pb.turn.scale("L1.H1", 0.0)
    trace = pb.run(model, rows, taps=["L1.attn.pattern", "L1.resid_out"])
    (folder / "mine.csv").write_text("prompt,right,wrong\nThe capital of Lolavia is, Budurg, Grerum\n")
    found.save(folder / "result")
    knob.save(folder / "file.knob")
    pb.run(model, rows, taps=["L1.resid_out"], folder=folder / "traces")
    part, port, edit = pb.Part(1, "head", 1), pb.Port("resid_out", 1), pb.zero("L1.H1.z")
    given: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "run": (
            pb.run,
            {
                "model": model,
                "prompts": rows,
                "taps": [port],
                "edits": [edit],
                "grad": False,
                "batch_size": 2,
                "logits": "last",
            },
        ),
        "sweep": (pb.sweep, {"model": model, "task": task, "edits": [edit], "metric": "logit_diff"}),
        "replay": (pb.replay, {"result": found, "model": model}),
        "diff": (pb.diff, {"a": found, "b": found}),
        "load": (pb.load, {"model": "tiny"}),
        "load_knob": (pb.load_knob, {"path": folder / "file.knob"}),
        "load_result": (pb.load_result, {"folder": folder / "result"}),
        "load_trace": (pb.load_trace, {"folder": folder / "traces"}),
        "zero": (pb.zero, {"port": port, "positions": -1}),
        "add": (pb.add, {"port": "L1.H1.z", "value": 1.0}),
        "scale": (pb.scale, {"port": "L1.H1.z", "factor": 1.0}),
        "replace": (pb.replace, {"port": "L1.H1.z", "value": 1.0}),
        "mean": (pb.mean, {"port": "L1.H1.z", "reference": [0.0] * 16}),
        "block": (pb.block, {"port": "L1.attn.pattern", "query": 2, "key": 1}),
        "Model.encode": (model.encode, {"prompts": rows}),
        "Model.generate": (model.generate, {"prompts": rows, "max_new_tokens": 1, "edits": [edit], "new_only": True}),
        "Model.card": (model.card, {"part": part, "n": 3}),
        "Model.port": (model.port, {"text": "L1.resid_out"}),
        "Model.part": (model.part, {"text": "L1.H1"}),
        "Model.decode": (model.decode, {"ids": rows[0]}),
        "Model.signals": (model.signals, {"layer": 1}),
        "Model.edited": (lambda *edits: model.edited(*edits).__enter__(), {"edits": edit}),
        "Result.top": (found.top, {"n": 2, "by": "abs"}),
        "Result.bottom": (found.bottom, {"n": 2}),
        "Result.table": (found.table, {"n": 2}),
        "Result.summary": (found.summary, {"n": 2}),
        "Result.labels_of": (found.labels_of, {"axis": "layer"}),
        "Result.axes_of": (found.axes_of, {"variable": "attribution"}),
        "Result.equal": (found.equal, {"other": found}),
        "Result.agrees": (found.agrees, {"other": found, "rtol": 1e-5}),
        "Result.differences": (found.differences, {"other": found}),
        "Result.save": (found.save, {"folder": folder / "again", "overwrite": True}),
        "Result.plot": (found.plot, {"path": folder / "f.png"}),
        "Result.[]": (found.__getitem__, {"variable": "attribution"}),
        "Knob.at": (knob.at, {"strength": 1.0}),
        "Knob.edits_at": (knob.edits_at, {"strength": 1.0}),
        "Knob.save": (knob.save, {"path": folder / "again.knob", "overwrite": True}),
        "Knob.fits": (knob.fits, {"model": model}),
        "Knob.when": (knob.when, {"condition": "user"}),
        "Knob.with_evidence": (knob.with_evidence, {"steering": found}),
        "Knob.on_rows": (knob.on_rows, {"rows": 0}),
        "Knob.export": (
            knob.export,
            {"model": model, "folder": folder / "made", "form": "checkpoint", "overwrite": True},
        ),
        "Edit.when": (edit.when, {"condition": "user"}),
        "Trace.last": (trace.last, {"port": port}),
        "Trace.show": (trace.show, {"port": "L1.H1.pattern", "prompt": 0}),
        "Trace.[]": (trace.__getitem__, {"port": port}),
        "Task.[]": (task.__getitem__, {"which": 0}),
        "Task.split": (task.split, {"fraction": 0.5, "seed": 0}),
        "Task.joined": (pb.Task.joined, {"tasks": [task]}),
        "Task.with_metric": (task.with_metric, {"metric": "kl"}),
        "Task.score": (task.score, {"logits": trace.last_logits}),
        "Task.from_prompts": (
            pb.Task.from_prompts,
            {"model": model, "clean": ["The capital of Lolavia is"], "right": [" Budurg"], "wrong": [" Grerum"]},
        ),
        "Task.from_file": (pb.Task.from_file, {"path": folder / "mine.csv", "model": model}),
        "Task.show": (task.show, {"n": 1}),
        "tasks.repeated_tokens": (pb.tasks.repeated_tokens, {"model": model, "n": 2, "seed": 0}),
        "turn.scale": (pb.turn.scale, {"parts": "L1.H1", "strength": 0.0}),
        "compare": (
            pb.compare,
            {
                "model": model,
                "task": task,
                "knobs": [knob, pb.turn.scale("L2.H1", 0.0)],
                "strengths": [0.0],
                "draws": 1,
            },
        ),
    }
    return given


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """The call; by position where the parameter takes any number of them."""
    several = [one.name for one in inspect.signature(function).parameters.values() if one.kind is one.VAR_POSITIONAL]
    rest = {key: value for key, value in arguments.items() if key not in several}
    function(*(arguments[key] for key in several), **rest)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_it_will_do_or_is_refused_by_name(
    name: str, calls: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a text that will do as a file name is one
    function, right = calls[name]
    call(function, right)
    for key, what in by_turns(right, WRONG, of=3, start=NAMES.index(name)):
        allowed = (pb.PatchbayError, IndexError) if name == "Task.[]" else pb.PatchbayError  # loops end by the latter
        with contextlib.suppress(allowed):
            call(function, right | {key: WRONG[what]})


def test_every_call_is_asked(calls: dict[str, Any]) -> None:
    """All functions of the package but methods, which have their own check, and what only makes or names things."""
    plain = {
        name for name in pb.__all__ if inspect.isfunction(getattr(pb, name)) and not hasattr(getattr(pb, name), "paper")
    }
    assert set(NAMES) == set(calls)
    assert plain - {"method", "probe", "project", "load_dictionary"} <= set(calls)
    with pytest.raises(
        pb.PatchbayError, match=r"run: model takes a Model from patchbay\.load\(\.\.\.\), got str 'text'"
    ):
        pb.run("text", calls["run"][1]["model"])  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="load_knob: path takes a text or a path, got int 5"):
        pb.load_knob(5)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="compare: knobs takes a list, got Knob"):
        pb.compare(calls["run"][1]["model"], calls["sweep"][1]["task"], calls["compare"][1]["knobs"][0])
