"""A Result made under edits says which, and is replayed under the same ones or not at all."""

import json

import pytest
import torch

import patchbay as pb
from patchbay.cli import prompt_files
from patchbay.errors import PatchbayError
from tests.model.test_text import ASKED, model_with


def test_a_result_records_the_edits_in_force_and_is_replayed_under_them_alone():
    model = pb.load("tiny")
    task = pb.tasks.facts_in_context(model, n=6)
    plain = pb.find.direct_logit_attribution(model, task)
    edit = pb.add(model.port("L1.H1.z"), torch.ones(model.d_head(1)))
    with model.edited(edit):
        under = pb.find.direct_logit_attribution(model, task)
        assert pb.replay(under, model)
    assert "edits" not in plain.provenance["model"]
    assert under.provenance["model"]["edits"] == [str(edit)]
    with model.edited(pb.add(model.port("L1.H1.z"), 2 * torch.ones(model.d_head(1)))):
        other = pb.find.direct_logit_attribution(model, task)
        with pytest.raises(PatchbayError, match="made with these edits in force"):
            pb.replay(under, model)
    assert other.provenance["model"]["edits_sha256"] != under.provenance["model"]["edits_sha256"]
    with pytest.raises(PatchbayError, match="now in force: none"):
        pb.replay(under, model)


def test_a_task_of_chats_records_its_template():
    model = model_with()
    task = pb.Task.from_prompts(model, [ASKED], [" blue"])
    assert len(task.options["chat_template_sha256"]) == 16
    assert "chat_template_sha256" not in pb.Task.from_prompts(model, ["the sky is"], [" blue"]).options


def test_prompt_files_keep_separators_inside_texts_and_drop_the_byte_order_mark(tmp_path):
    texts = ["The\u2028capital", "of\u0085Poland", "is"]
    lines = "\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "own.jsonl").write_bytes(lines.encode("utf-8-sig"))
    assert prompt_files.read_prompts(str(tmp_path / "own.jsonl"), model_with(), texts=True) == texts
