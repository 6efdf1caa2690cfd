"""Logit lens: the last layer is the model, the formula as loops, the planted layer is where the answer appears."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted, twins
from tests.given import gpt2
from tests.tolerance import close


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """Nothing before the induction head's layer says the answer; from it on everything does."""
    built = planted.induction(form=form, seed=2, n_layers=4)
    model = pb.load(built.model, built.tokenizer)
    result = pb.find.logit_lens(model, pb.tasks.repeated_tokens(model, 12), positions=3)
    assert result.labels_of("layer") == ["embed", "L0", "L1", "L2", "L3"]
    assert result.labels_of("position") == [-3, -2, -1]
    last = result.values[:, -1]  # [layer]
    assert last[:2].max() < 0.1
    assert last[2:].min() > 0.9
    assert result["rank"][2:, -1].max() == 0
    assert result["rank"][:2, -1].min() > 2
    assert result["kl"][:2, -1].min() > 2
    assert result.values[:, 0].max() < 0.2  # two tokens before, another answer is due


def test_reference() -> None:
    """Hidden states through the norm and the unembedding of Hugging Face's model, one prompt and position at a time."""
    hf = gpt2(0, n_layer=3)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model = pb.load(hf)
    task = pb.tasks.repeated_tokens(model, 5, max_period=6, max_offset=4)
    n = min(2, *map(len, task.clean))
    result = pb.find.logit_lens(model, task, positions=n, batch_size=2)
    expected = {
        name: torch.zeros(4, n, dtype=torch.float64) for name in ("probability", "logit", "rank", "kl", "logit_diff")
    }
    for ids, right, wrong in zip(task.clean, task.right, task.wrong, strict=True):
        with torch.no_grad():
            out = hf(torch.tensor([ids]), output_hidden_states=True)
        said = out.logits[0].double().log_softmax(-1)
        for layer in range(4):
            for place in range(-n, 0):
                with torch.no_grad():
                    hidden = out.hidden_states[layer][0, place]
                    logits = out.logits[0, place] if layer == 3 else hf.lm_head(hf.transformer.ln_f(hidden))
                logits = logits.double()
                cell = (layer, place + n)
                expected["probability"][cell] += logits.softmax(-1)[right] / len(task)
                expected["logit"][cell] += logits[right] / len(task)
                expected["rank"][cell] += int((logits > logits[right]).sum()) / len(task)
                expected["logit_diff"][cell] += (logits[right] - logits[list(wrong)].mean()) / len(task)
                gap = (said[place] - logits.log_softmax(-1)) * said[place].exp()
                expected["kl"][cell] += gap.sum() / len(task)
    for name, values in expected.items():
        assert close(result[name], values), name


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere", "granite", "mamba2"])
def test_the_last_layer_is_the_model(family: str) -> None:
    hf = twins.twin(family, **({"final_logit_softcapping": 1.0} if family == "gemma2" else {}))
    model = pb.load(hf)
    task = pb.tasks.repeated_tokens(model, 4, max_period=5, max_offset=3)
    result = pb.find.logit_lens(model, task, positions=1)
    with torch.no_grad():
        logits = [hf(torch.tensor([ids])).logits[0, -1] for ids in task.clean]
    probabilities = [row.softmax(-1)[right] for row, right in zip(logits, task.right, strict=True)]
    assert close(result["kl"][-1], 0.0, of=1.0)
    assert close(float(result.values[-1, -1]), float(torch.stack(probabilities).mean()), of=result.values)


def test_null() -> None:
    """In a random model no layer says the answer: probability and rank stay those of chance."""
    built = planted.null(seed=1)
    model = pb.load(built.model, built.tokenizer)
    result = pb.find.logit_lens(model, pb.tasks.repeated_tokens(model, 60), positions=1)
    assert (result.values - 1 / model.vocab_size).abs().max() < 0.01
    assert (result["rank"] - (model.vocab_size - 1) / 2).abs().max() < 10


def test_the_first_prompts_best_tokens_are_listed() -> None:
    built = planted.induction(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 3)
    rows = pb.find.logit_lens(model, task, positions=2).tables["most_likely"]
    assert [(row["layer"], row["position"]) for row in rows] == [
        (a, p) for a in ("embed", "L0", "L1") for p in (-2, -1)
    ]
    assert rows[-1]["token"] == task.right[0]
    assert rows[-1]["text"] == built.tokenizer.decode([task.right[0]])


def test_positions_outside_are_refused_or_clipped() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 3)
    with pytest.raises(pb.PatchbayError, match="at least 1"):
        pb.find.logit_lens(model, task, positions=0)
    assert pb.find.logit_lens(model, task, positions=500).sizes["position"] == min(map(len, task.clean))


def test_inside_an_edited_block_the_edited_model_is_read() -> None:
    built = planted.induction(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 5)
    with model.edited(pb.zero(model.port(f"{built.truth['induction']}.z"))):
        silent = pb.find.logit_lens(model, task, positions=1)
    assert close(silent["kl"][-1], 0.0, of=1.0)
    assert silent.values.max() < 0.2
    with model.edited(pb.scale(model.final_norm.out, 0.5)):
        assert pb.find.logit_lens(model, task, positions=1)["kl"][-1].max() > 0.01  # the norm's edit is the run's alone
