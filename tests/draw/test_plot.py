"""plot: what is drawn is what the Result holds, with its labels and units. Reads the drawn objects, not pixels."""

import re
import warnings
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from patchbay.draw import plot, style
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from tests.shares import by_turns
from tests.tolerance import close

PACKAGE = Path(style.__file__).parents[1]
SCORES = torch.tensor([[0.1, -2.0, float("nan")], [0.9, 0.1, -0.3]])
TOKENS = [" Warsaw", "$x$", "\n", "\u4e2d", "<b>", "a" * 40]


def grid(values=SCORES, **options):
    return Result(
        values, unit="logits", provenance={"method": "find.induction_heads", "model": {"source": "tiny"}}, **options
    )


def curve(**more):
    steps = torch.tensor([0.1, 0.5, 0.9])
    variables = {"accuracy": steps, "low": steps - 0.1, "high": steps + 0.2, **more}
    return Result({k: (v, ("strength",), "share") for k, v in variables.items()}, coords={"strength": [-2.0, 1.0, 4.0]})


def bars(**more):
    value = torch.tensor([0.2, 0.7, -0.4])
    variables = {"effect": value, "low": value - 0.1, "high": value + 0.2, **more}
    return Result({k: (v, ("part",), "logits") for k, v in variables.items()}, parts=["embed", "L3.H1", "L2.mlp"])


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_a_grid_is_a_map_of_its_values_with_labels_unit_and_written_cells():
    drawn = plot.figure(grid(highlights=["L1.H0", "L0.mlp"]))
    axis, bar = drawn.axes
    np.testing.assert_array_equal(axis.images[0].get_array().filled(np.nan), SCORES.double().numpy())
    assert (axis.get_xlabel(), axis.get_ylabel(), bar.get_ylabel()) == ("head", "layer", "score (logits)")
    assert axis.get_title(loc="left") == "Induction heads"
    assert {"0.10", "-2.00", "0.90", "-0.30", "tiny"} <= set(texts(axis))
    assert "nan" not in "".join(texts(axis))
    frames = [patch.get_xy() for patch in axis.patches if isinstance(patch, Rectangle)]
    assert set(frames) == {(-0.5, 0.5)}  # only the highlighted head, at layer 1, head 0
    assert axis.get_ylim()[0] < axis.get_ylim()[1]  # layers count upwards


def test_signed_values_are_centred_at_zero_and_others_are_not():
    image = plot.figure(grid()).axes[0].images[0]
    assert (image.norm.vmin, image.norm.vmax, image.get_cmap().name) == (-2.0, 2.0, "RdBu")
    image = plot.figure(grid(torch.tensor([[0.0, 0.25], [0.5, 0.75]]))).axes[0].images[0]
    assert (image.norm.vmin, image.norm.vmax, image.get_cmap().name) == (0.0, 0.75, "viridis")


def test_written_cells_can_be_read_on_their_colour():
    axis = plot.figure(grid(torch.linspace(0, 1, 20).reshape(4, 5))).axes[0]
    image = axis.images[0]
    for text in axis.texts:
        if text.get_text().replace(".", "").isdigit():
            ground = np.array(image.cmap(image.norm(float(text.get_text())))[:3]) @ [0.299, 0.587, 0.114]
            ink = np.array(mpl.colors.to_rgb(text.get_color())) @ [0.299, 0.587, 0.114]
            assert abs(ground - ink) > 0.35


def test_many_cells_are_not_written_and_very_many_become_bars():
    assert texts(plot.figure(Result(torch.rand(32, 32), unit="attention")).axes[0]) == []
    values = torch.rand(4, 3072, generator=torch.Generator().manual_seed(0))
    axis = plot.figure(Result(values, ("layer", "neuron"), "activation")).axes[0]
    assert len(axis.patches) == plot.MAX_BARS
    assert "strongest 24 of 12288" in axis.get_xlabel()
    assert axis.patches[0].get_width() == pytest.approx(values.max().item())


def test_token_labels_are_literal_and_show_their_spaces():
    result = Result(torch.rand(3, 6), ("layer", "position"), "probability", coords={"position": TOKENS})
    axis = plot.figure(result).axes[0]
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["\u2423Warsaw", "$x$", "\\n", "\u4e2d", "<b>", "a" * 17 + "\u2026"]
    assert not any(label.get_parse_math() for label in axis.get_xticklabels())


def test_curves_have_their_values_and_band():
    axis = plot.figure(curve()).axes[0]
    assert close(axis.lines[0].get_xydata(), [[-2, 0.1], [1, 0.5], [4, 0.9]])
    corners = axis.collections[0].get_paths()[0].vertices
    assert {(-2.0, 0.0), (4.0, 1.1)} <= {(round(x, 3), round(y, 3)) for x, y in corners}
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("strength", "accuracy (share)")
    assert axis.get_legend() is None


def test_curves_beside_share_the_axis_and_the_null_is_named():
    half = torch.full((3,), 0.5)
    axis = plot.figure(curve(memory=torch.tensor([0.9, 0.5, 0.1]), null_mean=half, null_high=half + 0.1)).axes[0]
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["accuracy", "memory", "random control"]
    assert axis.get_ylabel() == "share"
    null_band = axis.collections[1].get_paths()[0].vertices[:, 1]
    assert (null_band.min(), null_band.max()) == pytest.approx((0.4, 0.6))


@pytest.mark.parametrize("axes", [("condition", "n_parts"), ("n_parts", "condition")])
def test_conditions_are_lines_whichever_axis_comes_first(axes):
    values = torch.tensor([[5.0, 3.0, 1.0], [5.0, 4.9, 4.8]])
    values = values if axes[0] == "condition" else values.T
    variables = {
        "score": (values, axes, "logits"),
        "low": (values - 1, axes, "logits"),
        "high": (values + 1, axes, "logits"),
    }
    axis = plot.figure(Result(variables, coords={"condition": ["chosen", "random"]})).axes[0]
    assert [line.get_label() for line in axis.lines] == ["chosen", "random"]
    np.testing.assert_array_equal(axis.lines[0].get_ydata(), [5, 3, 1])
    assert axis.collections[1].get_paths()[0].vertices[:, 1].min() == pytest.approx(3.8)
    assert axis.get_xlabel() == "number of parts"


def test_parts_are_bars_highest_first_with_whiskers():
    axis = plot.figure(bars(null_mean=torch.full((3,), 0.05))).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["L3.H1", "embed", "L2.mlp"]
    assert [patch.get_width() for patch in axis.patches] == pytest.approx([0.7, 0.2, -0.4])
    whiskers = [tuple(segment[:, 0].round(3)) for segment in axis.collections[0].get_segments()]
    assert whiskers == [(0.6, 0.9), (0.1, 0.4), (-0.5, -0.2)]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first on top
    assert axis.get_legend().get_texts()[0].get_text() == "random control"


def test_named_steps_are_bars_in_their_own_order():
    axis = plot.figure(
        Result(torch.tensor([0.1, 0.9]), ("token",), "probability", coords={"token": ["no", "yes"]})
    ).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["no", "yes"]


KINDS = [grid, curve, bars, lambda: grid(SCORES * float("nan")), lambda: grid(torch.zeros(2, 2))]


@pytest.mark.parametrize(("build", "suffix"), by_turns(KINDS, [".png", ".svg", ".pdf"], of=2))
def test_every_kind_is_written_without_a_warning_and_the_same_twice(tmp_path, build, suffix):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (style.save(plot.figure(build()), tmp_path / f"{i}{suffix}").read_bytes() for i in (1, 2))
    assert first == second
    assert first[:5].startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF-"}[suffix])
    assert len(list(tmp_path.iterdir())) == 2


def test_svg_is_one_element_whose_text_stays_text():
    result = Result(torch.rand(3, 6), ("layer", "position"), "probability", coords={"position": TOKENS})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also for a script that no font here has
        element = style.svg(plot.figure(result))
    root = ElementTree.fromstring(element)
    assert root.tag.endswith("svg")
    words = {text.strip() for text in root.itertext()}
    assert {"position", "<b>", "$x$", "\u4e2d"} <= words


def test_nothing_global_is_touched():
    before = dict(mpl.rcParams)
    style.svg(plot.figure(grid()))
    assert dict(mpl.rcParams) == before


def test_what_cannot_be_drawn_or_written_is_said(tmp_path):
    with pytest.raises(PatchbayError, match=r"no drawing for axes \(prompt, layer, position\)"):
        plot.figure(Result(torch.zeros(2, 2, 2), ("prompt", "layer", "position")))
    with pytest.raises(PatchbayError, match="nothing to draw"):
        plot.figure(Result(torch.zeros(0, 2)))
    with pytest.raises(PatchbayError, match=r"'a.jpg': the suffix is one of .png, .svg, .pdf"):
        style.save(plot.figure(grid()), tmp_path / "a.jpg")
    (tmp_path / "no").write_text("mine")
    with pytest.raises(PatchbayError, match="no is a file, not a folder; nothing was written"):
        style.save(plot.figure(grid()), tmp_path / "no" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["no"]


def test_curves_over_named_layers():
    """The embedding is no number: its name and the layers' stand at the steps."""
    result = Result(
        torch.rand(3, 2, generator=torch.Generator().manual_seed(0)),
        ("layer", "condition"),
        "probability",
        coords={"layer": ["embed", "L0", "L1"], "condition": ["a", "b"]},
    )
    axis = plot.figure(result).axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["embed", "L0", "L1"]
    assert len([line for line in axis.lines if len(line.get_xdata()) == 3]) == 2


def test_a_circuit_of_edges_is_drawn_as_a_graph(tmp_path: Path) -> None:
    from patchbay.draw.plot_circuit import circuit

    rows = [("embed -> L0.H1.v", 3.0), ("L0.H1 -> L1.KV0.k", 2.0), ("L1.mlp -> logits", -1.0), ("L0.H1 -> L1.mlp", 0.5)]
    table = [{"rank": i, "unit": unit, "score": score} for i, (unit, score) in enumerate(rows, 1)]
    result = Result(torch.rand(3), ("n_parts",), coords={"n_parts": [1, 2, 4]}, tables={"circuit": table})
    drawn = result.plot(tmp_path / "circuit.svg", graph=True)
    text = (tmp_path / "circuit.svg").read_text()
    assert all(name in text for name in ("embed", "KV0", "logits", "against the answer", "by a key"))
    assert len(drawn.axes[0].patches) == len(rows)
    assert len(circuit(result, n=2).axes[0].patches) == 2
    with pytest.raises(PatchbayError, match="holds no circuit of edges"):
        Result(torch.rand(3), ("n_parts",)).plot(graph=True)


def test_names_are_said_in_words() -> None:
    assert [style.words(name) for name in ("n_parts", "max_n_parts", "knn_parts")] == [
        "number of parts",
        "max number of parts",
        "knn parts",
    ]


def test_methods_are_named_as_their_papers_write_them_in_figures_and_on_the_page() -> None:
    assert [style.spoken(name) for name in ("dola", "dexperts", "knn", "logit_lens", "n_parts_kept")] == [
        "DoLa", "DExperts", "kNN-LM", "Logit lens", "Number of parts kept",
    ]  # fmt: skip
    written = style.WRITTEN
    methods = {path.stem for path in PACKAGE.glob("*/*.py")}
    assert written.keys() <= methods
    page = (PACKAGE.parent / "web" / "src" / "data.ts").read_text(encoding="utf-8")
    table = page[page.index("const WRITTEN") : page.index("};", page.index("const WRITTEN"))]
    assert dict(re.findall(r'^  (\w+): "(.+)",$', table, flags=re.MULTILINE)) == written
    result = Result({"value": (torch.ones(3), ("layer",), "nats")}, provenance={"method": "decode.dola"})
    _, axis = style.blank((3, 2), result)
    assert axis.get_title() == "DoLa"
