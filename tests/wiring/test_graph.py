"""The wiring as a graph: edges and their filters, networkx, the figure."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import patchbay as pb
from patchbay.draw import graph, report, result_page, style
from patchbay.draw.plot_wiring import wiring
from patchbay.tiny import planted, twins


@functools.cache
def found() -> pb.Result:
    return pb.find.channels(
        pb.load(planted.channel(form="llama", composition="key", strength=0.5, component=5).model), nulls=0
    )


def test_edges_are_the_rows_of_the_list() -> None:
    listed = graph.edges(found())
    assert [(str(edge.channel), edge.score) for edge in listed] == [
        (str(r["part"]), r["value"]) for r in found().table()
    ]
    whole = graph.edges(found(), of="whole")
    assert len(whole) == int((~found()["whole"].isnan()).sum())
    writers, readers = found().labels_of("writer"), found().labels_of("reader")
    for edge in whole[:5]:
        place = writers.index(edge.channel.source), readers.index(edge.channel.target)
        assert edge.score == float(found()["whole"][place])
        assert edge.p == float(found()["whole_p"][place])


def test_filters() -> None:
    whole = functools.partial(graph.edges, found(), of="whole")
    assert {edge.channel.kind for edge in whole(kinds=["key"])} == {"key"}
    assert all(edge.p <= 0.05 for edge in whole(p=0.05))
    assert all(edge.score >= 0.07 for edge in whole(least=0.07))
    assert all(
        edge.channel.writer.layer == 0 == edge.reader.layer for edge in whole(layers=[0]) if edge.channel.writer.layer
    )
    assert all("L0.H1" in (str(edge.channel.writer), str(edge.reader)) for edge in whole(parts=["L0.H1"]))
    assert whole(n=3) == whole()[:3]
    with pytest.raises(pb.PatchbayError, match="'list' and 'whole'"):
        graph.edges(found(), of="all")
    with pytest.raises(pb.PatchbayError, match="holds no wiring"):
        graph.edges(pb.Result([1.0], ("layer",)))


def test_networkx_reads_it() -> None:
    networkx = pytest.importorskip("networkx")
    made = graph.to_networkx(found(), of="list")
    assert isinstance(made, networkx.MultiDiGraph)
    edges = graph.edges(found())
    assert made.number_of_edges() == len(edges)
    edge = edges[0]
    data = made.edges[str(edge.channel.writer), str(edge.reader), str(edge.channel)]
    assert (data["weight"], data["kind"], data["component"]) == (edge.score, edge.channel.kind, edge.channel.component)
    assert made.nodes[str(edge.reader)] == {"layer": 1, "kind": "head"}


def test_the_map_shows_parts_and_channels(tmp_path: Path) -> None:
    drawn = found().plot(tmp_path / "map.svg")
    text = (tmp_path / "map.svg").read_text()
    assert "read as key" in text
    assert "L1" in text
    assert text == style.svg(drawn)[: len(text)] or "<svg" in text
    found().plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
    page = report.page("a", "b", [result_page.of_result(found())])
    assert "read as key" in page


def test_roles_are_named_and_filters_reach_the_map() -> None:
    made = wiring(found(), of="whole", kinds=["value"], n=10, roles={"writer of interest": ["L0.H1"]})
    text = style.svg(made)
    assert "writer of interest" in text
    assert "read as value" in text
    assert "read as key" not in text
    with pytest.raises(pb.PatchbayError, match="no channel is left"):
        wiring(found(), least=0.99)


def test_a_change_that_weakens_is_dashed() -> None:
    change = pb.find.channel_changes(*(pb.load(twins.twin("gpt2", seed)) for seed in (0, 1)))
    assert "weaker" in style.svg(wiring(change))
    weaker = min(graph.edges(change, of="whole"), key=lambda edge: edge.score)
    assert weaker.score < 0
    assert weaker in graph.edges(change, of="whole", least=-weaker.score)  # by size, whichever way it went


def test_a_saved_wiring_is_still_one(tmp_path: Path) -> None:
    again = pb.load_result(found().save(tmp_path / "wiring"))
    assert graph.edges(again) == graph.edges(found())
