"""The story of low rank: losses by loops, families of ranks at one size, a planted model that the threshold finds, a random one that it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import patchbay as pb
from patchbay.blocks import welore
from patchbay.cli import cli
from patchbay.stories import low_rank
from tests.given import lent
from tests.tolerance import close


def test_losses_are_those_of_single_texts() -> None:
    hf, rows = lent("llama").hf, [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    found = low_rank.losses(hf, rows)
    for i, row in enumerate(rows):
        said = torch.log_softmax(hf(torch.tensor([row])).logits[0].detach().double(), -1)
        mean = -sum(float(said[t, row[t + 1]]) for t in range(len(row) - 1)) / (len(row) - 1)
        assert close(float(found[i]), mean, of=10.0, dtype=torch.float32)


def test_equal_energy_by_hand() -> None:
    spectra = {"a": torch.tensor([3.0, 1.0, 0.0]).double(), "b": torch.tensor([1.0, 1.0, 1.0, 1.0]).double()}
    assert welore.energy(0.9, spectra) == {"a": 1, "b": 4}
    assert welore.energy(0.75, spectra) == {"a": 1, "b": 3}
    assert welore.energy(0.95, spectra) == {"a": 2, "b": 4}
    assert welore.energy(1.0, spectra) == {"a": 2, "b": 4}


def test_ways_of_sharing_out_store_no_more() -> None:
    hf = lent("llama").hf
    spectra = welore.spectra(hf)
    size = low_rank.stored(hf, welore.ranks(hf, 0.5, found=spectra))
    maps = dict(welore.matrices(hf))
    assert size == sum(r * sum(maps[name].weight.shape) for name, r in welore.ranks(hf, 0.5, found=spectra).items())
    for make in (lambda share: welore.energy(share, spectra), lambda share: welore.uniform(hf, share)):
        made = low_rank.stored(hf, low_rank.of_size(hf, make, size))
        assert 0.9 * size < made <= size


def planted() -> tuple[pb.Model, list[list[int]]]:
    """A twin two of whose matrices are of rank 2, and texts that it is sure of: its own, under sharpened logits."""
    hf = pb.tiny.twins.twin("llama")
    with torch.no_grad():
        for name, module in welore.matrices(hf):
            module.weight.mul_(4.0)
            if ".0." in name and name.endswith(("q_proj", "gate_proj")):
                left, right = welore.factors(module.weight, 2)
                module.weight.copy_(left @ right)
        hf.lm_head.weight.mul_(40.0)
        rows = hf.generate(torch.arange(5, 11)[:, None], max_new_tokens=9, do_sample=False, eos_token_id=None).tolist()
    return pb.load(hf), rows


def test_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is of rank 2 in truth is cut for nothing by the threshold, and others of its shape, cut in its place, cost."""
    monkeypatch.setattr(low_rank, "DRAWS", 6)
    model, rows = planted()
    spectra = welore.spectra(model.hf)
    share = sum(2 / len(s) if s[2] < 1e-5 * s[0] else 1.0 for s in spectra.values()) / len(spectra) - 1e-9
    assert share < 0.97
    found = low_rank.cuts(model.hf, rows, share, spectra, low_rank.losses(model.hf, rows), 0)
    assert abs(found["cost"]["one threshold"]) < 0.01
    assert found["beyond"][0] == pytest.approx(found["cost"]["ranks dealt anew"] - found["cost"]["one threshold"])
    assert found["beyond"][0] > 0.1
    assert found["stored"]["equal share"] <= found["stored"]["one threshold"]


def test_the_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the built-in model: half of all ranks go for nothing where they are small, and dealt anew they cost more than a nat."""
    monkeypatch.setattr(low_rank, "DRAWS", 4)
    monkeypatch.setattr(low_rank, "KEEPS", (0.5,))
    page = tmp_path / "page.html"
    told = low_rank.tell(low_rank.form(), report=page, quiet=True, n=8)
    one = told["cut"]["0.5"]
    assert one["cost"]["one threshold"] < 0.1
    assert one["cost"]["ranks dealt anew"] > 0.5
    assert one["p"] == pytest.approx(1 / 5)
    assert told["verdict"] is False  # four draws reach no p of .05
    assert told["kept"]["q_proj"]["kept"] < told["kept"]["down_proj"]["kept"]
    assert "patchbay run low-rank" in page.read_text()
    assert "To look closer: patchbay papers run jaiswal2024 checks the paper" in page.read_text()
    assert "It does not hold</b> that with 50% of all ranks kept" in page.read_text()


@pytest.mark.slow
def test_the_claim(tmp_path: Path) -> None:
    told = low_rank.tell(low_rank.form(), report=tmp_path / "page.html", quiet=True)
    assert told["verdict"] is True
    assert told["cut"]["0.5"]["p"] < 0.05
    assert told["cut"]["0.5"]["beyond"][0] > 1.0


@pytest.mark.parametrize("given", [["--folder", "runs"], ["--dry-run"]])
def test_what_trains_nothing_has_no_folder_and_no_estimate(given: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["run", "low-rank", "--report", str(tmp_path / "page.html"), *given])
    assert done.exit_code == 2
    assert "low-rank trains nothing, and runs in one piece" in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pb.PatchbayError, match="tokenizer"):
        low_rank.tell(lent("llama"), report=tmp_path / "page.html", quiet=True)
