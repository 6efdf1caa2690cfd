"""method: what the decorator promises, on a model and a task small enough to see through."""

import inspect
import json
import random
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from tests.fakes import Model, Task, weights

# --- provenance -------------------------------------------------------------------------------------


def test_provenance_says_where_the_numbers_came_from(installed):
    result = installed()(Model(), Task(3), scale=2.0, parts=["L1.H0", Part(0, "mlp")], seed=5)
    found = result.provenance
    assert found["method"] == "find.weights"
    assert found["paper"] == "nobody2020"
    assert found["model"] == {
        "source": "fake", "fingerprint": Model().fingerprint, "family": "linear", "dtype": "float32", "device": "cpu"
    }  # fmt: skip
    assert found["task"] == Task(3).to_json()
    assert found["options"] == {"scale": 2.0, "parts": ["L1.H0", "L0.mlp"], "seed": 5}
    assert found["seed"] == 5
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__ in found["versions"]["torch"]
    )
    assert set(found["versions"]) == {"patchbay", "torch", "transformers", "numpy", "python"}
    assert found["date"][:2] == "20"
    json.dumps(found, allow_nan=False)


def test_wall_time_is_the_time_of_the_method():
    @method(paper="x")
    def slow(model: Model) -> Result:
        time.sleep(0.05)
        return Result(torch.zeros(1, 1))

    assert 0.05 <= slow(Model()).provenance["wall_time_s"] < 1.0


def test_defaults_are_recorded_and_the_signature_is_kept(installed):
    function = installed()
    assert function(Model(), Task(1)).provenance["options"] == {"scale": 1.0, "parts": None, "seed": 0}
    assert inspect.signature(function) == inspect.signature(weights)
    assert (function.__name__, (function.__doc__ or "").split("\n")[0], function.paper, function.method_name) == (
        "weights", "Weights times the task's size, plus seeded noise.", "nobody2020", "find.weights"
    )  # fmt: skip


def test_anything_with_provenance_is_filled_and_nothing_else_is_accepted():
    knob = SimpleNamespace(provenance={"strength": 2.0})

    @method(paper="x")
    def knob_of(parts: list[Part], strength: float) -> SimpleNamespace:
        return knob

    assert knob_of(["L0.H1"], 2.0) is knob
    assert knob.provenance["strength"] == 2.0
    assert knob.provenance["options"] == {"parts": ["L0.H1"], "strength": 2.0}
    assert knob.provenance["model"] is None

    @method(paper="x")
    def number(model: Model) -> int:
        return 3

    with pytest.raises(PatchbayError, match="returned int, which has no provenance"):
        number(Model())


def test_a_declared_unit_is_held():
    @method(paper="x", unit="nats")
    def wrong_unit(model: Model) -> Result:
        return Result(torch.zeros(1, 1), unit="logits")

    with pytest.raises(PatchbayError, match="declares unit 'nats' and returned 'logits'"):
        wrong_unit(Model())


# --- options ----------------------------------------------------------------------------------------


def test_text_and_views_become_parts_and_ports():
    seen = {}

    @method(paper="x")
    def look(
        model: Model, parts: Sequence[Part | str], *, at: Part | str | None = None, port: Port | None = None
    ) -> Result:
        seen.update(parts=parts, at=at, port=port)
        return Result(torch.zeros(1, 1))

    view = SimpleNamespace(part=Part(2, "neuron", 7))
    record = look(Model(), ["L3.H5", view], at="L1", port="L3.H5.z").provenance["options"]
    assert seen == {"parts": [Part(3, "head", 5), view.part], "at": Part(1, "layer"), "port": Port("attn.z", 3, 5)}
    assert record == {"parts": ["L3.H5", "L2.N7"], "at": "L1", "port": "L3.H5.z"}
    look(Model(), "L0.H1,L2.E3")
    assert seen["parts"] == [Part(0, "head", 1), Part(2, "expert", 3)]
    with pytest.raises(PatchbayError, match=r"'L0\.Q1' is not a part"):
        look(Model(), ["L0.Q1"])
    with pytest.raises(PatchbayError, match=r"takes parts, got a Result; choose some, like result.top\(3\)"):
        look(Model(), Result(torch.zeros(2, 2)))


def test_a_result_option_is_recorded_as_its_top_parts(installed):
    heads = installed()(Model(), Task(1))

    @method(paper="x")
    def use(model: Model, *, of: Result | Sequence[Part]) -> Result:
        assert of is heads
        return Result(torch.zeros(1, 1))

    record = use(Model(), of=heads).provenance["options"]["of"]
    call = {key: heads.provenance[key] for key in ("method", "model", "task", "options")}
    assert record == {"result": "find.weights", "parts": [str(part) for part in heads.top(100)], "record": call}


def test_tensors_are_refused_unless_declared():
    def along(model: Model, *, direction: object = None) -> Result:
        return Result(torch.zeros(1, 1))

    with pytest.raises(PatchbayError, match=r"option 'direction' is a tensor of shape \(3,\)"):
        method(paper="x")(along)(Model(), direction=torch.zeros(3))
    allowed = method(paper="x", tensors=["direction"])(along)
    one, two = (allowed(Model(), direction=torch.full((3,), v)).provenance["options"]["direction"] for v in (1.0, 2.0))
    assert one["tensor"] == [3]
    assert one["sha256"] != two["sha256"]
    with pytest.raises(PatchbayError, match="option 'direction' is a function; recordable are"):
        allowed(Model(), direction=lambda: 0)


def test_prompts_are_recorded_as_the_task():
    @method(paper="x")
    def read(model: Model, prompts: list[str]) -> Result:
        return Result(torch.zeros(1, 1))

    assert read(Model(), ["a", "b"]).provenance["task"] == {"prompts": ["a", "b"]}
    assert read(Model(), torch.tensor([[1, 2]])).provenance["task"] == {"prompts": [[1, 2]]}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda f: f(Model(), Task(1), scael=2),
            "no option 'scael'; its options are scale, parts, seed.*did you mean 'scale'",
        ),
        (lambda f: f(Model()), "missing a required argument: 'task'"),
        (lambda f: f(Model(), Task(1), 2.0), "too many positional arguments"),
        (lambda f: f(torch.nn.Linear(2, 2), Task(1)), r"needs a Model from patchbay.load\(...\), got Linear"),
        (lambda f: f(Model(), Task(1), scale={1, 2}), "scale takes a number, got set"),
    ],
)
def test_wrong_calls_name_the_option(installed, call, says):
    with pytest.raises(PatchbayError, match=says):
        call(installed())


def test_options_must_be_keyword_only_and_named():
    def positional(model, task, scale=1.0): ...
    def loose(model, **options): ...

    with pytest.raises(PatchbayError, match="option 'scale' has a default and must be keyword-only"):
        method(paper="x")(positional)
    with pytest.raises(PatchbayError, match="cannot be recorded"):
        method(paper="x")(loose)


# --- what stays as it was ---------------------------------------------------------------------------


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("fails", [False, True])
def test_random_states_are_put_back_also_after_an_exception(fails):
    @method(paper="x")
    def draw(model: Model) -> Result:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        random.random(), np.random.rand(), torch.rand(1)
        if fails:
            raise RuntimeError("boom")
        return Result(torch.zeros(1, 1))

    model, before = Model(), states()
    with pytest.raises(RuntimeError, match="boom") if fails else nullcontext():
        draw(model)
    assert states() == before


def test_methods_that_overlap_put_back_what_was_before_the_first():
    """The second begins after the first has seeded, and ends after it: what it found was not the caller's."""
    begun, ended = threading.Event(), threading.Event()

    @method(paper="x")
    def first(model: Model) -> Result:
        torch.manual_seed(1)
        second_thread.start()
        assert begun.wait(10)
        return Result(torch.rand(1, 1))

    @method(paper="x")
    def second(model: Model) -> Result:
        begun.set()
        assert ended.wait(10)
        return Result(torch.zeros(1, 1))

    def inside(model: Model) -> Result:
        torch.manual_seed(5)
        return Result(torch.zeros(1, 1))

    @method(paper="x")
    def outer(model: Model) -> Result:
        before = torch.get_rng_state()
        method(paper="x")(inside)(model)
        assert torch.equal(torch.get_rng_state(), before), "a method that another one calls gives it back its own"
        return Result(torch.zeros(1, 1))

    model = Model()
    second_thread = threading.Thread(target=second, args=(model,))
    before = torch.get_rng_state()
    first(model)
    ended.set()
    second_thread.join()
    assert torch.equal(torch.get_rng_state(), before)
    outer(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_method_sees_the_callers_random_state():
    @method(paper="x")
    def draw(model: Model) -> Result:
        return Result(torch.rand(2, 2))

    model = Model()
    torch.manual_seed(3)
    expected = torch.rand(2, 2)
    torch.manual_seed(3)
    assert torch.equal(draw(model).values, expected)


@pytest.mark.parametrize("move", ["train", "requires_grad", "grad"])
@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_put_back_and_moving_one_is_a_fault(move, fails):
    @method(paper="x")
    def careless(model: Model) -> Result:
        if move == "train":
            model.hf[1].train()
        elif move == "requires_grad":
            model.hf[0].weight.requires_grad_(False)
        else:
            torch.set_grad_enabled(False)
        if fails:
            raise RuntimeError("boom")
        return Result(torch.zeros(1, 1))

    model = Model()
    with pytest.raises(
        RuntimeError if fails else PatchbayError, match="boom" if fails else f"changed the model's.*{move}"
    ):
        careless(model)
    assert not any(module.training for module in model.hf.modules())
    assert all(parameter.requires_grad for parameter in model.hf.parameters())
    assert torch.is_grad_enabled()
