"""`measure.dictionary`: exact and shrunk dictionaries read as such, sums are plain loops, random rows read as the null."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import patchbay as pb
from patchbay.features.load import fvu
from patchbay.measure.dictionary import one_to_one, random_rows
from tests import given
from tests.features.given import crosscoder, dictionary, layers
from tests.tolerance import close

TEXTS = [[5, 9, 7, 3, 11, 14], [8, 6, 20, 4], [9, 30, 12, 25, 17, 3, 21]]


@pytest.fixture(scope="module")
def model() -> pb.Model:
    return pb.load(given.gpt2(0))


def signs(size: float, at: str = "L1.resid_in", b_dec: torch.Tensor | None = None) -> pb.Dictionary:
    """Every coordinate's two signs as features, rebuilt `size` times as large."""
    eye = torch.eye(32)
    return pb.Dictionary(torch.cat([eye, -eye], 1), torch.cat([eye, -eye]) * size, torch.zeros(64), torch.zeros(32) if b_dec is None else b_dec,
                         layer=int(at[1]), reads=at[3:])  # fmt: skip


def measured(model: pb.Model, it: pb.Dictionary, **more: object) -> pb.Result:
    view = model.with_dictionaries(it)
    return pb.measure.dictionary(view, TEXTS, f"L{it.layer}.{next(iter(view.dictionaries))[1]}", **more)  # type: ignore[arg-type]


def test_planted(model: pb.Model) -> None:
    exact = measured(model, signs(1.0))
    assert float(exact["value"]) == 0
    assert close(exact["recovered_zero"], 1.0)
    assert close(exact["recovered_mean"], 1.0)
    assert close(exact["shrinkage"], 1.0)
    assert float(exact["dead"]) < 0.2
    assert close(exact["l0"], 32.0)
    assert close(measured(model, signs(0.7))["shrinkage"], 0.7)
    assert close(measured(model, signs(0.0))["recovered_zero"], torch.tensor(0.0), of=1.0)


def test_reference(model: pb.Model) -> None:
    it = dictionary(model, "L1.mlp.in to L1.mlp.out", form="topk", k=5)
    found = measured(model, it)
    pairs = []
    for ids in TEXTS:
        trace = pb.run(model, [ids], taps=["L1.mlp.in", "L1.mlp.out"])
        pairs.append((trace["L1.mlp.in"][0, 1:], trace["L1.mlp.out"][0, 1:]))
    every = torch.cat([y for _, y in pairs])
    mean = every.mean(0)
    off = [
        sum(float((y - it.decode(it.encode(x), x)).pow(2).sum()) for x, y in zip(xs, ys, strict=True))
        for xs, ys in pairs
    ]
    spread = [sum(float((y - mean).pow(2).sum()) for y in ys) for _, ys in pairs]
    assert close(found["value"], sum(off) / sum(spread))
    assert close(found["unexplained"], off)
    active = [float((it.encode(x) > 0).sum()) for xs, _ in pairs for x in xs]
    assert close(found["l0"], sum(active) / len(active))
    for name, value in (("ce", None), ("ce_zero", torch.zeros(32)), ("ce_mean", mean), ("ce_rebuilt", it)):
        lost = n = 0.0
        for ids, (xs, ys) in zip(TEXTS, pairs, strict=True):
            new = ys if value is None else it.decode(it.encode(xs), xs) if value is it else value.expand_as(ys)  # type: ignore[union-attr]
            edits = [pb.replace("L1.mlp.out", new, positions=slice(1, None))]
            logp = pb.run(model, [ids], edits=edits).logits[0].log_softmax(-1)
            lost -= sum(float(logp[i - 1, ids[i]]) for i in range(2, len(ids)))
            n += len(ids) - 2
        assert close(found[name], lost / n), name


def test_null(model: pb.Model) -> None:
    it = dictionary(model, "L1.resid_out", form="topk", k=5, subtract=True)
    null = measured(model, it, seed=3)["null"]
    assert close(measured(model, random_rows(it, 3))["value"], null), "random rows read as the null"
    rows = random_rows(it, 3)
    assert close(rows.W_dec.norm(dim=1), it.W_dec.norm(dim=1))
    assert float(null) > 0.5


def test_dictionaries_are_compared_row_by_row(model: pb.Model, tmp_path: Path) -> None:
    it = dictionary(model, "L1.resid_out", n=48)
    turned = pb.Dictionary(it.W_enc.flip(1), it.W_dec.flip(0) * 2, it.b_enc.flip(0), it.b_dec, layer=1)
    other = dictionary(model, "L1.resid_out", n=48, seed=1)
    folders = [str(one.save(tmp_path / name)) for name, one in (("same", turned), ("other", other))]
    found = measured(model, it, other=folders)
    assert close(found["similar"][0], 1.0)
    assert found["matched"].tolist() == [1.0, 0.0]
    assert abs(float(found["similar"][1] - found["chance"][1])) < 0.1
    assert one_to_one(torch.tensor([[0.95, 0.99], [0.1, 0.2]], dtype=torch.float64)) == 0.5
    shared = torch.tensor([[0.95, 0.2], [0.99, 0.1]], dtype=torch.float64)  # both rows are nearest to the first column
    assert one_to_one(shared) == 0.5


def test_single_features_are_asked_by_labels_concepts_and_truth(model: pb.Model, tmp_path: Path) -> None:
    """A dictionary of the embeddings' own two signs; a class that is one token, a concept that is two, directions that are coordinates."""
    texts = [[3 + (i * 7 + j) % 30 for j in range(5)] + [35 if i % 2 else 36] for i in range(12)]
    it = signs(1.0, "L0.resid_in")
    table = model.embed.weight.detach()
    truth = tmp_path / "truth.safetensors"
    save_file({"directions": torch.eye(32), "tokens": (table > 0).to(torch.uint8)}, truth)
    view = model.with_dictionaries(it)
    found = pb.measure.dictionary(
        view,
        texts,
        "L0.features",
        labels=[i % 2 for i in range(12)],
        concepts=[[35, 36], [39]],
        truth=str(truth),
        other=["untrained"],
    )
    assert found["best"] == found["matched"] == found["found"] == 1
    assert float(found["chance_found"]) == 0
    assert float(found["chance_best"]) < 0.75
    assert float(found["support"]) > float(found["chance_support"]) + 0.1, "positions move what the tokens alone say"
    assert (
        found["probe"].shape
        == found["probe_raw"].shape
        == found["chance_probe"].shape
        == found["probe_shuffled"].shape
        == (3,)
    )
    assert float(found["probe_raw"].max()) > 0.9
    assert float(found["absorption"][1]) != float(found["absorption"][1]), "no such token: NaN"
    assert float(found["null_untrained"]) < 1e-9, "what rebuilds every signal rebuilds an untrained network's too"
    with pytest.raises(pb.PatchbayError, match="labels: 2 of 2 kinds for 12 texts"):
        pb.measure.dictionary(view, texts, "L0.features", labels=[0, 1])
    save_file({"directions": torch.eye(4)}, truth)
    with pytest.raises(pb.PatchbayError, match=r"needs `directions` \[direction, 32\], has \[4, 4\]"):
        pb.measure.dictionary(view, texts, "L0.features", truth=str(truth))


def test_dictionaries_of_several_layers_are_measured_in_all_of_them(model: pb.Model, tmp_path: Path) -> None:
    it = layers(32, (0, 1))
    view = model.with_dictionaries(it)
    found = pb.measure.dictionary(view, TEXTS, "L1.mlp_features")
    assert close(found["value"], pb.measure.dictionary(model, TEXTS, str(it.save(tmp_path / "a")))["value"])
    assert close(found["value"], fvu(it, model, TEXTS))
    errors = [pb.zero(f"L{i}.mlp_features.error", positions=slice(1, None)) for i in (0, 1)]
    whole = [pb.zero(f"L{i}.mlp.out", positions=slice(1, None)) for i in (0, 1)]
    for name, edits in (("ce_rebuilt", errors), ("ce_zero", whole)):
        lost = n = 0.0
        for ids in TEXTS:
            logp = pb.run(view, [ids], edits=edits).logits[0].log_softmax(-1)
            lost -= sum(float(logp[i - 1, ids[i]]) for i in range(2, len(ids)))
            n += len(ids) - 2
        assert close(found[name], lost / n), name
    sites = crosscoder(32, (0, 1), n=40)
    one = pb.measure.dictionary(model.with_dictionaries(sites), TEXTS, "L1.features")
    assert close(one["value"], fvu(sites, model, TEXTS))
    with pytest.raises(pb.PatchbayError, match="asked of a dictionary of one layer"):
        pb.measure.dictionary(view, TEXTS, "L1.mlp_features", labels=[0, 1, 1])


def test_what_is_no_dictionary_is_refused(model: pb.Model) -> None:
    view = model.with_dictionaries(signs(1.0))
    with pytest.raises(pb.PatchbayError, match="all of one that is attached"):
        pb.measure.dictionary(view, TEXTS, "L1.F3")
    with pytest.raises(pb.PatchbayError, match="layer 0 has no dictionary"):
        pb.measure.dictionary(view, TEXTS, "L0.features")
    with pytest.raises(pb.PatchbayError, match="texts of three tokens or more"):
        pb.measure.dictionary(view, [[3, 4]], "L1.features")
