"""Features in why: what each gives is its activation times its write along the difference, and the whole signal is told beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import patchbay as pb
from patchbay.cli import cli
from patchbay.tiny.twins import twin
from tests import given
from tests.features.given import dictionary
from tests.tolerance import close

IDS = [11, 3, 42, 7, 5, 23, 12]


def reading(model: pb.Model, ids: list[int], answer: int, against: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream after the last layer at the last position, and the gradient of the difference there with the final norm's scale held."""
    trace = pb.run(model, [ids], taps=[f"L{model.n_layers - 1}.resid_out"])
    stream = trace[f"L{model.n_layers - 1}.resid_out"][0, -1].double()
    norm = model.final_norm_module
    row = (
        model.unembed.weight[answer] - model.unembed.weight[against]
    ).detach().double() * norm.weight.detach().double()
    centred = isinstance(norm, torch.nn.LayerNorm)
    row = row - row.mean() if centred else row
    eps = norm.eps if centred else norm.variance_epsilon
    variance = (stream - stream.mean()).square().mean() if centred else stream.square().mean()
    return stream, row / (variance + eps).sqrt()


@pytest.mark.parametrize(
    ("name", "at"), [("gpt2", "L1.mlp.out"), ("llama", "L0.resid_out"), ("gpt2", "L1.mlp.act"), ("llama", "L1.attn.z")]
)
def test_reference(name: str, at: str) -> None:
    """Plain loops: activation times the write along the gradient; with error and bias they are the whole signal."""
    plain = given.lent(name)
    it = dictionary(plain, at)
    model = plain.with_dictionaries(it)
    found = pb.why(model, IDS, draws=1)
    answer, against = (found.tables["next tokens"][i]["id"] for i in range(2))
    _, y = reading(plain, IDS, answer, against)
    signal = pb.run(plain, [IDS], taps=[at])[at][0, -1].double().flatten()
    if at.endswith("mlp.act"):
        y = model.layers[1].mlp.weights().W_out.detach().double() @ y
    if at.endswith("attn.z"):
        y = torch.cat([plain.W_O(1)[h].detach().double() @ y for h in range(plain.n_heads(1))])
    z = it.encode(signal.float())
    rows = {row["feature"]: row for row in found.tables["features"]}
    assert rows
    for text, row in rows.items():
        f = int(re.search(r"F(\d+)$", text)[1])
        assert close(row["activation"], float(z[f]), of=10.0, dtype=torch.float32)
        assert close(row["logits"], float(z[f].double() * (it.W_dec[f].double() @ y)), of=10.0, dtype=torch.float32)
    strongest = max(range(it.n_features), key=lambda f: abs(float(z[f].double() * (it.W_dec[f].double() @ y))))
    assert next(iter(rows)).endswith(f"F{strongest}")
    [line] = [note for note in found.notes if "active features" in note]
    numbers = [float(n) for n in re.findall(r"(?:gives|features of \d+|rebuild|bias) (-?[\d.e-]+\d)", line)]
    whole, features, lost, bias = numbers
    assert whole == pytest.approx(float(signal @ y), rel=0.02)
    assert bias == pytest.approx(float(it.b_dec.double() @ y), rel=0.05, abs=5e-3)
    assert features + lost + bias == pytest.approx(whole, rel=0.05, abs=5e-3)


def test_a_feature_that_holds_the_answer_comes_first(tmp_path: Path) -> None:
    """A folder, by the option and on the command line: its one feature fires and writes the answer's own row."""
    model = pb.load("tiny")
    prompt = "The capital of Lolavia is"
    signal = pb.run(model, prompt, taps=["L2.mlp.out"])["L2.mlp.out"][0, -1]
    first, second = pb.run(model, prompt).last_logits[0].topk(2).indices.tolist()
    d = len(signal)
    W_enc = torch.zeros(d, 3)
    W_enc[:, 1] = signal / signal.square().sum()
    W_dec = torch.zeros(3, d)
    W_dec[1] = (model.unembed.weight[first] - model.unembed.weight[second]).detach()
    it = pb.Dictionary(
        W_enc=W_enc, W_dec=W_dec, b_enc=torch.zeros(3), b_dec=torch.zeros(d), layer=2, reads="mlp.out", writes="mlp.out"
    )
    it.save(tmp_path / "one")
    found = pb.why(model, prompt, dictionaries=[f"{tmp_path / 'one'}@L2.mlp.out"], draws=1)
    [row] = found.tables["features"]
    assert row["feature"] == "L2.mlp.F1"
    assert close(row["activation"], 1.0, of=10.0, dtype=torch.float32)
    assert row["logits"] > 0
    assert model.decode([first]).strip() in row["writes"].split(",")[0]
    shown = CliRunner().invoke(
        cli, ["why", "tiny", prompt, "--dictionary", f"{tmp_path / 'one'}@L2.mlp.out", "--draws", "1"]
    )
    assert shown.exit_code == 0, shown.output
    assert "L2.mlp.F1" in shown.output
    assert "features" not in pb.why(model, prompt, draws=1).tables


def test_refusals() -> None:
    with pytest.raises(pb.PatchbayError, match="a list of folders, or FOLDER@PLACE"):
        pb.why(given.lent("gpt2"), IDS, dictionaries="sae")  # type: ignore[arg-type]
    gemma = pb.load(twin("gemma2"))
    said = pb.why(gemma.with_dictionaries(dictionary(gemma, "L1.mlp.act")), IDS, draws=1)
    assert any("a norm follows the MLP of L1" in note for note in said.notes)
