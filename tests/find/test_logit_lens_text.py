"""logit_lens of a text alone: a token and its probability in each cell; the last row is the model."""

import functools
import json

import pytest
import torch
from click.testing import CliRunner

import patchbay as pb
from patchbay.cli import cli
from patchbay.signal.port import PatchbayError, Port
from tests.tolerance import close

TEXT = "The capital of Lolavia is"


@functools.cache
def tiny():
    return pb.load("tiny")


def test_each_cell_is_the_most_likely_token_of_the_stream_there_and_the_last_row_is_the_model():
    model = tiny()
    found = pb.find.logit_lens(model, TEXT)
    ids = model.encode(TEXT)
    trace = pb.run(model, ids, taps=["L0.resid_out", "logits"])
    said = trace["logits"][0]
    assert found.axes == ("layer", "position")
    assert found.values.shape == (model.n_layers + 1, len(ids[0]))
    assert torch.equal(found["token_id"][-1], said.argmax(-1))
    assert torch.equal(found.values[-1].float(), said.float().softmax(-1).max(-1).values)
    assert torch.equal(found["kl"][-1], torch.zeros(len(ids[0]), dtype=torch.float64))
    own = model.unembed_logits(model.final_norm_module(trace[Port("resid_out", 0)]))[0].softmax(-1)
    assert torch.equal(found["token_id"][1], own.argmax(-1))
    assert close(found.values[1], own.max(-1).values)
    cells = {(row["layer"], row["position"]): row["text"] for row in found.tables["cells"]}
    assert cells["L0", -1] == model.decode([int(own[-1].argmax())])
    assert [row["token"] for row in found.tables["tokens"]] == [t.text for t in model.tokens(TEXT)]


def test_an_answer_has_its_probability_and_rank_in_every_cell():
    model = tiny()
    said = pb.run(model, TEXT).last_logits[0]
    token = int(said.topk(3).indices[2])
    found = pb.find.logit_lens(model, TEXT, answer=model.decode([token]), positions=2)
    assert found.sizes["position"] == 2
    assert float(found["rank"][-1, -1]) == 2
    assert close(found["answer_probability"][-1, -1], said.softmax(-1)[token])


def test_it_prints_tokens_and_is_made_again():
    found = pb.find.logit_lens(tiny(), TEXT)
    best = found.tables["cells"][-1]["text"].strip()
    row = next(line for line in str(found).splitlines() if line.strip().startswith(f"L{tiny().n_layers - 1} "))
    assert best in row
    assert pb.replay(found, tiny()).agrees


def test_what_is_no_one_text_is_refused():
    with pytest.raises(PatchbayError, match="task takes a text or a Task, got list; make one"):
        pb.find.logit_lens(tiny(), [TEXT, TEXT])
    with pytest.raises(PatchbayError, match="the task .* has its own answers"):
        pb.find.logit_lens(tiny(), pb.tasks.repeated_tokens(tiny(), 2), answer=" a")


def test_the_command_takes_a_prompt_and_writes_a_page(tmp_path):
    run = CliRunner().invoke
    page = tmp_path / "lens.html"
    shown = run(cli, ["find", "logit-lens", "tiny", "--prompt", TEXT, "--report", str(page)])
    assert shown.exit_code == 0, shown.output
    said = pb.run(tiny(), TEXT).last_logits[0].softmax(-1).max()
    assert f"{float(said):.3f}" in shown.output
    assert f"{float(said):.3f}" in page.read_text()
    assert "<script" not in page.read_text()
    both = run(
        cli, ["find", "logit-lens", "tiny", "--prompt", TEXT, "--task", "repeated_tokens"], standalone_mode=False
    )
    assert "without --task" in str(both.exception)
    again = run(cli, ["find", "logit-lens", "tiny", "--prompt", TEXT, "--report", str(page)], standalone_mode=False)
    assert "is already there; --overwrite replaces it" in str(again.exception)
    as_json = run(cli, ["find", "logit-lens", "tiny", "--prompt", TEXT, "--json"])
    assert json.loads(as_json.stdout)["variables"]["token_id"]["axes"] == ["layer", "position"]
