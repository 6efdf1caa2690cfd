"""What is no Task, Knob, number or text where one belongs is refused in a sentence that shows the line to write."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import patchbay as pb
from patchbay.cli import options
from patchbay.results.given import check
from patchbay.tiny import twins

METHODS = [(room, name) for room in options.rooms() for name in options.files(room)]
MODEL = pb.load(twins.twin("gpt2"))


@pytest.mark.parametrize("given", ["a text", ["texts"], torch.ones(2, 3), None, 3, {"prompt": 1}], ids=str)
@pytest.mark.parametrize(("room", "name"), METHODS)
def test_what_is_no_task_is_answered_with_the_line_that_makes_one(room: str, name: str, given: Any) -> None:
    function = getattr(getattr(pb, room), name)
    parameters = inspect.signature(function).parameters
    if "task" not in parameters or (given is None and parameters["task"].default is None):
        return
    if isinstance(given, str) and "str" in options.names_in(parameters["task"].annotation):
        return  # one text will do
    needed = [key for key, one in parameters.items() if one.default is one.empty]
    call: dict[str, Any] = {key: MODEL if parameters[key].annotation == "Model" else "L1.H1" for key in needed}
    call |= {"task": given}
    with pytest.raises(pb.PatchbayError, match=r"task takes .*Task, got .*; make one: pb\.Task\.from_prompts\(model"):
        function(**call)


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [3, np.int64(3)], ["3", 3.5, True, None]),
        ("int | None", [3, None], ["3", [3]]),
        ("float", [0.5, 1, np.float32(1)], ["0.5", True, None]),
        ("bool", [True, np.bool_(False)], [1, "yes"]),
        ("str | None", ["a", None], [3, ["a"]]),
        ("list[int] | None", [[3], (), range(3), None], [3, 1.5, "anything", ["3"], {3: 4}]),
        ("list[str]", ["anything", ["a"]], [3]),
        ("dict[str, float] | None", [{"a": 1}, {}, None], [[1], "a", 3]),
    ],
)
def test_numbers_and_texts_are_what_the_annotation_says(annotation: str, good: list[Any], bad: list[Any]) -> None:
    parameter = inspect.Parameter("option", inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
    for value in good:
        check(value, parameter, "find.x")
    for value in bad:
        with pytest.raises(pb.PatchbayError, match=r"find\.x: option takes .*, got "):
            check(value, parameter, "find.x")


def test_the_same_where_no_method_is_called() -> None:
    task = pb.tasks.repeated_tokens(MODEL, 3)
    with pytest.raises(pb.PatchbayError, match=r"asked for '3' parts; n is a whole number, like top\(3\)"):
        pb.find.direct_logit_attribution(MODEL, task).top("3")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="causal language model, got Linear, a module without a config"):
        pb.load(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="knob takes a Knob, got str 'x.knob'; pb.load_knob"):
        pb.measure.dose_response(MODEL, task, "x.knob")  # type: ignore[arg-type]
