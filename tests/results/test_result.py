"""result: labels, ranking, printing, comparison, and files that are whole or not there."""

import builtins
import errno
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchbay.results.arrays import MADE_AXES
from patchbay.results.result import FILES, Result, load_result
from patchbay.signal.port import AXES, Part, PatchbayError
from tests.forked import python

PROVENANCE = {
    "method": "find.induction_heads",
    "paper": "olsson2022",
    "model": {"source": "tiny", "fingerprint": "0123456789abcdef", "family": "gpt2", "dtype": "float32"},
    "task": {"name": "repeated_tokens", "options": {"n": 20}, "seed": 3},
    "options": {"first": 2, "scale": math.inf},
    "seed": None,
    "versions": {"torch": "2.13.0"},
    "wall_time_s": 0.25,
    "date": "2025-01-01T00:00:00+00:00",
}
SCORES = torch.tensor([[0.1, -2.0, math.nan], [0.9, 0.1, -0.3]])


def heads(**more):
    grid = ("layer", "head")
    return Result(
        {
            "score": (SCORES, grid, "attention"),
            "low": (SCORES - 0.05, grid, "attention"),
            "high": (SCORES + 0.05, grid, "attention"),
            "p": (SCORES.abs() / 10, grid, "probability"),
            "mlp": (torch.tensor([1.0, 2.0]), ("layer",), "logits"),
        },
        tables={"words": [{"part": Part(1, "head", 0), "share": math.nan, "n": 3, "text": " ü\n"}]},
        notes=["patterns only"],
        highlights=["L1.H0"],
        provenance=PROVENANCE,
        **more,
    )


def curve():
    steps = torch.tensor([0.1, 0.5, 0.9])
    return Result(
        {"accuracy": (steps, ("strength",), "share"), "low": (steps - 0.1, ("strength",), "share")},
        coords={"strength": [-2.0, 0.0, math.inf]},
    )


# --- values and labels ------------------------------------------------------------------------------


def test_one_array_with_its_name_axes_and_unit():
    result = Result(np.arange(6.0).reshape(2, 3), unit="logits", name="effect")
    assert (result.axes, result.unit, result.variables, result.name) == (
        ("layer", "head"),
        "logits",
        ("effect",),
        "effect",
    )
    assert torch.equal(result.values, torch.arange(6.0, dtype=torch.float64).reshape(2, 3))
    assert torch.equal(result["effect"], result.values)
    assert "effect" in result
    assert "low" not in result


def test_several_variables_with_their_own_axes_and_units_as_xarray():
    data = heads().data
    assert dict(data.sizes) == {"layer": 2, "head": 3}
    assert data["score"].attrs["unit"] == "attention"
    assert data["mlp"].dims == ("layer",)
    np.testing.assert_array_equal(data["score"].values, SCORES.numpy())
    assert curve().data["accuracy"].sel(strength=0.0).item() == pytest.approx(0.5)


def test_a_result_does_not_change_with_what_it_was_made_of():
    lent = np.ones((2, 2))
    results = [Result(lent), Result(torch.from_numpy(lent))]
    lent[:] = 0
    assert all((result.values == 1).all() for result in results)


def test_a_result_keeps_its_own_copy_in_float32():
    lent = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    result = Result(lent, unit="logits")
    with torch.no_grad():
        lent.zero_()
    assert result.values.dtype == torch.float32
    assert (result.values == 1).all()
    assert not result.values.requires_grad


def test_scalars_and_empty_arrays_are_results():
    assert Result(3.5, (), "nats").values.item() == 3.5
    assert "score in nats" in str(Result(3.5, (), "nats"))
    empty = Result(torch.zeros(0, 4), unit="nats")
    assert (empty.top(), empty.table()) == ([], [])
    assert str(empty)


def test_no_made_axis_doubles_an_axis_of_a_signal():
    assert not set(MADE_AXES) & set(AXES)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Result(torch.zeros(2, 2), ("layer", "heads")), "no axis 'heads'.*did you mean 'head'"),
        (lambda: Result(torch.zeros(2, 2), ("layer",)), r"shape \(2, 2\).*one axis per dimension"),
        (lambda: Result(torch.zeros(2, 2), ("head", "head")), "one axis per dimension"),
        (
            lambda: Result({"a": (torch.zeros(2), ("layer",), ""), "b": (torch.zeros(3), ("layer",), "")}),
            "2 steps.*'b' has 3",
        ),
        (lambda: Result({}), "at least one variable"),
        (lambda: Result(torch.zeros(2), ("layer",), name="head"), "cannot name a variable"),
        (lambda: Result(torch.zeros(2), ("layer",), name="a b"), "cannot name a variable"),
        (lambda: Result(torch.zeros(2, dtype=torch.complex64), ("layer",)), "complex"),
        (lambda: Result(torch.zeros(2), ("layer",), coords={"head": [0, 1]}), "'head', which no variable has"),
        (lambda: Result(torch.zeros(2), ("layer",), coords={"layer": [0]}), "2 steps, got 1 labels"),
        (lambda: Result(torch.zeros(2), ("part",)), r"needs parts=\[...\]"),
        (lambda: Result(torch.zeros(2), ("part",), parts=["L0"]), "2 steps, got 1"),
        (lambda: Result(torch.zeros(1), ("part",), parts=["L0.H"]), "'L0.H' is not a part"),
        (lambda: Result(torch.zeros(1), ("layer",), tables={"t": [{"a": object()}]}), "plain data, got object"),
        (lambda: heads()["scores"], "no variable 'scores'.*did you mean 'score'"),
        (lambda: curve().top(), r"ranks no parts.*strength.*\(layer, head\).*\(part\)"),
        (lambda: heads().top(by="size"), "by 'size'.*'value' and 'abs'"),
        (lambda: heads().top(-1), "n must be 0 or more"),
    ],
)
def test_errors_say_what_was_asked_and_what_is_possible(build, says):
    with pytest.raises(PatchbayError, match=says):
        build()


# --- ranking ----------------------------------------------------------------------------------------


def test_top_and_bottom_rank_by_value_or_size_and_leave_nan_out():
    result = heads()
    assert [str(part) for part in result.top()] == [
        "L1.H0",
        "L0.H0",
        "L1.H1",
        "L1.H2",
        "L0.H1",
    ]  # equals in model order
    assert [str(part) for part in result.bottom(2)] == ["L0.H1", "L1.H2"]
    assert [str(part) for part in result.top(2, by="abs")] == ["L0.H1", "L1.H0"]
    assert result.top(0) == []


def test_table_has_every_variable_on_the_same_axes():
    rows = heads().table()
    assert len(rows) == 5
    assert list(rows[0]) == ["rank", "part", "value", "low", "high", "p"]
    assert rows[0]["rank"] == 1
    assert rows[0]["part"] == Part(1, "head", 0)
    assert rows[0]["high"] == pytest.approx(0.95)
    assert rows[-1]["p"] == pytest.approx(0.2)
    assert heads().table(2) == rows[:2]
    frame = heads().to_dataframe()
    assert list(frame["part"]) == ["L1.H0", "L0.H0", "L1.H1", "L1.H2", "L0.H1"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.5, math.nan, math.inf]), min_size=3, max_size=3), min_size=1)
)
def test_ranking_equals_sorting_plainly(rows):
    values = torch.tensor(rows)
    pairs = [(v, Part(i, "expert", j)) for i, row in enumerate(rows) for j, v in enumerate(row) if v == v]
    assert Result(values, ("layer", "expert")).top(99) == [part for _, part in sorted(pairs, key=lambda pair: -pair[0])]


def test_parts_of_several_kinds_and_chosen_layers():
    mixed = Result(torch.tensor([0.2, 0.7, 0.4]), ("part",), "logits", parts=["embed", "L3.KV1", Part(2, "mlp")])
    assert [str(part) for part in mixed.top()] == ["L3.KV1", "L2.mlp", "embed"]
    some = Result(torch.tensor([[1.0, 3.0], [2.0, 4.0]]), coords={"layer": [5, 9]})
    assert [str(part) for part in some.top()] == ["L9.H1", "L5.H1", "L9.H0", "L5.H0"]
    assert Result(torch.tensor([1.0, 2.0]), ("layer",)).top(1) == [Part(1, "layer")]
    assert not Result(torch.tensor([1.0, 2.0]), ("layer",), coords={"layer": ["embed", "L0"]}).ranked


def test_unranked_results_become_long_data_frames():
    assert list(curve().to_dataframe().columns) == ["strength", "accuracy", "low"]
    assert Result(2.0, (), "nats").to_dataframe()["score"].tolist() == [2.0]
    assert len(Result(torch.zeros(2, 3, 4), ("prompt", "layer", "position")).to_dataframe()) == 24


# --- printing ---------------------------------------------------------------------------------------


def test_prints_the_top_rows_unit_notes_and_origin():
    assert str(heads()) == (
        "find.induction_heads: score [layer 2, head 3] in attention; mlp [layer 2] in logits\n"
        "  rank  part      value     low    high       p\n"
        "     1  L1.H0 *   0.900   0.850   0.950  0.0900\n"
        "     2  L0.H0     0.100   0.050   0.150  0.0100\n"
        "     3  L1.H1     0.100   0.050   0.150  0.0100\n"
        "     4  L1.H2    -0.300  -0.350  -0.250  0.0300\n"
        "     5  L0.H1    -2.000  -2.050  -1.950  0.2000\n"
        "  (1 without a value)\n"
        "  note: patterns only\n"
        "  tiny (gpt2, float32, 0123456789abcdef) · task repeated_tokens n=20 seed=3 · first=2 · scale=inf · 0.25 s"
    )


def test_prints_curves_and_overviews():
    assert "strength  accuracy" in str(curve())
    assert "lowest" in str(Result(torch.ones(2, 3, 4), ("prompt", "layer", "position"), "nats"))
    assert "40 of 100 steps" in str(Result(torch.zeros(100), ("position",), "nats"))
    assert "(10 of 64 parts)" in str(Result(torch.rand(8, 8), unit="logits"))


def test_prints_single_numbers_on_a_line_and_each_unit_in_its_own_format():
    axes = ("prompt", "layer", "position")
    variables = {"score": (torch.full((1, 1, 1), 0.01234), axes, "probability")}
    variables |= {"rank": (torch.full((1, 1, 1), 370.44), axes, "rank"), "total": (torch.tensor(-1.5), (), "logits")}
    assert str(Result(variables)) == (
        "Result: score [prompt 1, layer 1, position 1] in probability\n"
        "  variable   lowest     mean  highest\n"
        "  score     0.01234  0.01234  0.01234\n"
        "  rank        370.4    370.4    370.4\n"
        "  total -1.5 logits\n"
        "  no provenance: made by hand"
    )


def test_small_p_values_stay_visible():
    grid = ("layer", "head")
    small = torch.tensor([[3e-7, 0.5]])
    assert "3e-07" in str(Result({"score": (torch.ones(1, 2), grid, ""), "p": (small, grid, "")}))


def test_html_escapes_what_came_from_a_model():
    page = Result(torch.ones(1), ("token",), "nats", coords={"token": ["<script>alert(1)</script>"]})._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


# --- comparison -------------------------------------------------------------------------------------


def test_equal_and_agrees_see_values_labels_units_and_nan():
    result = heads()
    assert result.equal(heads())
    assert result.agrees(heads())
    near = Result(SCORES + 1e-6, unit="attention")
    plain = Result(SCORES, unit="attention")
    assert plain.agrees(near)
    assert not plain.agrees(near, rtol=0.0)
    assert plain.agrees(near, atol=1e-5, rtol=0.0)
    assert not plain.equal(near)
    assert not plain.agrees(Result(SCORES, unit="logits"))
    large, small = (Result(SCORES * factor, unit="x") for factor in (1e3, 1e-3))  # the tolerance follows the size
    assert large.agrees(Result(large.values + 1e-2, unit="x"))
    assert not small.agrees(Result(small.values + 1e-6, unit="x"))
    assert not plain.agrees(Result(SCORES.nan_to_num(), unit="attention"), atol=100)  # NaN is no number
    assert not plain.agrees(Result(SCORES, unit="attention", coords={"layer": [0, 2]}))
    assert not plain.equal(Result(SCORES.double(), unit="attention"))
    assert not plain.equal(Result(SCORES, unit="attention", notes=["x"]))
    assert "score differs by up to 1" in plain.differences(Result(SCORES + 1, unit="attention"))[0]


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [heads, curve, lambda: Result(2.0, (), "nats")])
def test_what_is_loaded_is_what_was_saved(tmp_path, build):
    result = build()
    folder = result.save(tmp_path / "a" / "b")
    loaded = load_result(folder)
    assert loaded.equal(result)
    assert loaded.variables == result.variables
    assert loaded.provenance == result.provenance
    assert json.dumps(loaded.tables) == json.dumps(result.tables)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["b"]


def test_all_number_types_and_parts_survive(tmp_path):
    for dtype in (torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8):
        result = Result(torch.tensor([[1, 0]]).to(dtype), ("prompt", "part"), "x", parts=["L0.H1", "L2.N77"])
        assert load_result(result.save(tmp_path / "r", overwrite=True)).equal(result)
    assert load_result(tmp_path / "r").parts == [Part(0, "head", 1), Part(2, "neuron", 77)]


def test_the_json_is_strict(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    folder = heads().save(tmp_path / "r")
    assert json.loads((folder / "result.json").read_text("utf-8"), parse_constant=refuse)


def test_an_existing_folder_stays_unless_told(tmp_path):
    folder = curve().save(tmp_path / "r")
    with pytest.raises(PatchbayError, match=r"already there.*overwrite=True"):
        heads().save(folder)
    assert load_result(folder).equal(curve())
    heads().save(folder, overwrite=True)
    assert load_result(folder).equal(heads())
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_only_a_result_is_ever_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(PatchbayError, match=r"also holds chapter1\.txt"):
        curve().save(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text("{}")
    with pytest.raises(PatchbayError, match="did not write"):
        curve().save(tmp_path / "other", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(PatchbayError, match="is a file"):
        curve().save(tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    assert load_result(curve().save(tmp_path / "empty")).equal(curve())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["write", "fsync", "rename", "rename 2"])
def test_a_failed_save_leaves_everything_as_it_was(tmp_path, monkeypatch, error, step):
    folder = curve().save(tmp_path / "r")
    before, calls = snapshot(tmp_path), []

    def fail(*arguments, **options):
        calls.append(arguments)
        if step != "rename 2" or len(calls) == 2:
            raise error
        return rename(*arguments, **options)

    rename, real_open = os.rename, builtins.open
    if step == "write":
        monkeypatch.setattr(
            builtins, "open", lambda path, mode="r", *a, **k: fail() if "x" in mode else real_open(path, mode)
        )
    else:
        monkeypatch.setattr(os, step.split()[0], fail)
    save = (
        (lambda: heads().save(folder, overwrite=True))
        if step == "rename 2"
        else lambda: heads().save(tmp_path / "a" / "b")
    )
    with pytest.raises(PatchbayError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        save()
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
    assert len(calls) >= (2 if step == "rename 2" else 1)
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    assert load_result(folder).equal(curve())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: shutil.rmtree(f), "not there"),
        (lambda f: (shutil.rmtree(f), f.write_text("x")), "a file, not a folder"),
        (lambda f: (f / "result.json").unlink(), "lacks result.json; it holds arrays.safetensors"),
        (lambda f: (f / "arrays.safetensors").unlink(), "lacks arrays.safetensors"),
        (lambda f: (f / "result.json").write_text("{"), "damaged or no Patchbay file"),
        (lambda f: (f / "result.json").write_bytes(b"\xff\xfe\x00"), "damaged or no Patchbay file"),
        (lambda f: (f / "result.json").write_text("[" * 100_000), "damaged or no Patchbay file"),
        (
            lambda f: (f / "result.json").write_text('{"format": "other", "version": 1}'),
            "'other', not 'patchbay-result'",
        ),
        (
            lambda f: (f / "result.json").write_text('{"format": "patchbay-result", "version": 2}'),
            "version 2.*reads version 1",
        ),
        (
            lambda f: (f / "result.json").write_text('{"format": "patchbay-result", "version": 1}'),
            "damaged Result: KeyError",
        ),
        (lambda f: os.truncate(f / "arrays.safetensors", 40), r"truncated or altered \(40 bytes"),
        (lambda f: alter(f, variables=[]), "damaged Result: arrays without an entry"),
        (lambda f: alter(f, variables=[{"name": "x", "axes": [], "unit": ""}]), "damaged Result: KeyError"),
        (lambda f: alter(f, variables=7), "damaged Result: TypeError"),
        (lambda f: alter(f, parts=["L0.Z9"]), "'L0.Z9' is not a part"),
        (lambda f: alter(f, coords={"strength": [1]}), "3 steps, got 1 labels"),
        (lambda f: alter(f, provenance=3), "damaged Result"),
    ],
)
def test_damaged_and_foreign_folders_are_named(tmp_path, damage, says):
    folder = curve().save(tmp_path / "r")
    damage(folder)
    with pytest.raises(PatchbayError, match=says):
        load_result(folder)


def alter(folder: Path, **fields):
    record = json.loads((folder / "result.json").read_text()) | fields
    (folder / "result.json").write_text(json.dumps(record))


def test_no_cut_and_no_flipped_bit_gets_through_or_crashes(tmp_path):
    """Every length and many single bits: a wrong array never loads, and no error but PatchbayError is ever raised."""
    result = curve()
    folder = result.save(tmp_path / "r")
    for name in FILES:
        whole = (folder / name).read_bytes()
        cuts = [whole[:length] for length in range(0, len(whole) - 2, 7)]
        flips = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), 3)]
        for content in cuts + flips:
            (folder / name).write_bytes(content)
            try:
                loaded = load_result(folder)
            except PatchbayError:
                continue
            assert name == "result.json"  # a letter of a note or a unit may change; the arrays may not
            assert all(
                torch.equal(a, b) for a, b in zip(loaded._tensors.values(), result._tensors.values(), strict=True)
            )
        (folder / name).write_bytes(whole)


def test_loading_runs_nothing(tmp_path):
    folder = curve().save(tmp_path / "r")
    marker = tmp_path / "ran"

    class Bad:
        def __reduce__(self):
            return (marker.write_text, ("x",))

    (folder / "arrays.safetensors").write_bytes(pickle.dumps(Bad()))
    with pytest.raises(PatchbayError, match="truncated or altered"):
        load_result(folder)
    assert not marker.exists()


def test_result_needs_neither_pandas_xarray_nor_matplotlib_until_asked(tmp_path):
    """In a process that has forgotten them."""
    code = (
        "import sys, torch; heavy = ('pandas', 'xarray', 'matplotlib')\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] in heavy]: del sys.modules[name]\n"
        "from patchbay.results.result import Result\n"
        "result = Result(torch.rand(2, 2)); str(result); result.top(); result._repr_html_()\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {*heavy}))\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stderr


def test_figures_have_no_global_state(tmp_path):
    code = (
        "import sys, torch; sys.modules.pop('matplotlib.pyplot', None)\n"
        "from patchbay.draw import plot, style; from patchbay.results.result import Result\n"
        "result = Result(torch.rand(2, 2)); print(result.plot()._repr_png_()[:4])\n"
        "style.svg(plot.figure(result)); print('matplotlib.pyplot' in sys.modules)"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout.splitlines() == [str(b"\x89PNG"), "False"], done.stderr


def test_plot_writes_the_figure(tmp_path):
    heads().plot(tmp_path / "heads.svg")
    assert (tmp_path / "heads.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize(("metric", "said"), [("logit_diff", "right less the mean of the wrong"), ("logit_diff_best", "right less the best of the wrong"), ("option_accuracy", "right above all of the wrong"), ("rank", "")])  # fmt: skip
def test_it_says_what_a_metric_compares(metric: str, said: str):
    record = {"name": "own", "metric": metric}
    printed = str(Result(torch.rand(2, 2), ("layer", "head"), "logits", provenance={"task": record}))
    assert (f"{metric}: {said}" in printed) == bool(said)
    assert ("right" in printed) == bool(said)
