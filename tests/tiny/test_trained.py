"""The shipped models load with plain transformers and still score what `training.json` says they do."""

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from patchbay.tasks import words
from patchbay.tiny import text, train
from tests.shares import by_turns

NAMES = ("tiny", "tiny-wide", "tiny-llama", "tiny-moe")
MEGABYTE = 1_000_000
ARCHITECTURES = {
    "tiny": "GPT2LMHeadModel",
    "tiny-wide": "GPT2LMHeadModel",
    "tiny-llama": "LlamaForCausalLM",
    "tiny-moe": "Qwen3MoeForCausalLM",
}
LEAST = {
    "tiny": {"fact_bare": 0.95, "repeat": 0.8, "successor": 0.9, "indirect_object": 0.9, "laundry": 0.9},
    "tiny-wide": {"fact_bare": 0.95, "repeat": 0.9, "successor": 0.9, "indirect_object": 0.9, "laundry": 0.9},
    "tiny-llama": {"fact_bare": 0.95, "repeat": 0.8, "successor": 0.9, "indirect_object": 0.9, "laundry": 0.9},
    "tiny-moe": {"fact_bare": 0.95, "successor": 0.9, "sum": 0.8, "laundry": 0.8},  # it did not learn to repeat strings
}
"""What every shipped model must reach for the first methods to have something to find."""


@cache
def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = train.WEIGHTS / name
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def record(name: str) -> dict[str, Any]:
    return json.loads((train.WEIGHTS / name / "training.json").read_text())


def test_every_model_is_there_and_all_fit_in_eight_megabytes() -> None:
    assert {folder.name for folder in train.WEIGHTS.iterdir()} == set(NAMES) == set(train.MODELS)
    files = [file for file in train.WEIGHTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8 * MEGABYTE


@pytest.mark.parametrize("name", NAMES)
def test_stored_as_float16_and_loaded_as_float32_in_the_right_class(name: str) -> None:
    with safe_open(train.WEIGHTS / name / "model.safetensors", "pt") as stored:
        assert {stored.get_tensor(key).dtype for key in stored.keys()} == {torch.float16}  # noqa: SIM118
    model, tokenizer = load(name)
    assert type(model).__name__ == ARCHITECTURES[name]
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) < 1000
    assert sum(p.numel() for p in model.parameters()) == record(name)["parameters"]


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_is_word_level_and_round_trips(name: str) -> None:
    _, tokenizer = load(name)
    for word in words.POOL:
        assert len(tokenizer.encode(f" {word}")) == 1
    stream = text.documents(77)
    for document in (next(stream) for _ in range(500)):
        ids = tokenizer.encode(document.text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == document.text
        assert train.encode(document.pieces, tokenizer.get_vocab())[0] == ids


@pytest.mark.parametrize("name", by_turns(NAMES, of=2, start=1))
def test_the_stored_tokenizer_is_the_one_that_training_builds(name: str) -> None:
    built = train.build_tokenizer()
    assert built.decode(built.encode("In May, Mary gave an egg to John.")) == "In May, Mary gave an egg to John."
    _, stored = load(name)
    assert json.loads(stored.backend_tokenizer.to_str()) == json.loads(built.backend_tokenizer.to_str())


@pytest.mark.parametrize("name", by_turns(NAMES, of=2))
def test_accuracies_and_losses_are_reproduced_on_fresh_prompts(name: str) -> None:
    """A fresh sample of 60 lies within four standard errors of the recorded share (and its own error)."""
    model, tokenizer = load(name)
    told = record(name)
    fresh = train.evaluate(model, tokenizer, 60, 4242)
    assert fresh.keys() == told["accuracy"].keys()
    for task, score in fresh.items():
        share = told["accuracy"][task]["accuracy"]
        error = (max(share * (1 - share), 0.01) / score["n"] + max(share * (1 - share), 0.01) / 1000) ** 0.5
        assert abs(score["accuracy"] - share) <= 4 * error, f"{name} {task}: {score} against recorded {share}"
    losses = train.held_out_loss(model, tokenizer, 150, 4242)
    assert losses["text"] == pytest.approx(told["held_out_loss"]["text"], rel=0.1)
    assert losses["answer"] == pytest.approx(told["held_out_loss"]["answer"], rel=0.3)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_accuracies_are_enough_to_find_something(name: str) -> None:
    accuracy = record(name)["accuracy"]
    for task, least in LEAST[name].items():
        assert accuracy[task]["accuracy"] >= least, f"{name} {task}: {accuracy[task]}"
    assert 0.2 <= accuracy["contradiction_context"]["accuracy"] <= 0.8
    assert accuracy["contradiction_context"]["accuracy"] + accuracy["contradiction_memory"]["accuracy"] >= 0.95


def test_the_readme_quotes_the_records() -> None:
    readme = (train.WEIGHTS.parent / "README.md").read_text()
    for name in NAMES:
        told = record(name)
        assert f"{told['steps']:,}" in readme
        assert f"train {name} " in readme
    for task in record("tiny")["accuracy"]:
        row = re.search(rf"^\| {task} \|(.*)\|$", readme, re.MULTILINE)
        assert row, f"no row for {task}"
        cells = [cell.strip().split(" ")[0] for cell in row.group(1).split("|")]
        assert cells == [f"{100 * record(name)['accuracy'][task]['accuracy']:.1f}" for name in NAMES]


def test_one_head_turns_answers_from_memory_to_context() -> None:
    """The knob of `tiny`: some head's value, scaled by 4, moves contradicting prompts to the stated capital."""
    model, tokenizer = load("tiny")
    items = train.held_out_items("contradiction", 100, 7)
    shares = {}
    for layer, block in enumerate(model.transformer.h):
        for head in range(model.config.n_head):
            shares[layer, head] = context_share(model, tokenizer, items, block.attn.c_proj, head, 4.0)
    base = context_share(model, tokenizer, items, model.transformer.h[0].attn.c_proj, 0, 1.0)
    best = max(shares, key=lambda part: shares[part])
    assert shares[best] >= max(0.8, base + 0.3), f"base {base}, best L{best[0]}.H{best[1]} {shares[best]}"
    opposite = context_share(model, tokenizer, items, model.transformer.h[best[0]].attn.c_proj, best[1], -2.0)
    assert opposite <= base - 0.2


def context_share(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: list[words.Item],
    projection: torch.nn.Module,
    head: int,
    scale: float,
) -> float:
    """Share of contradicting prompts answered with the stated capital while one head's value is scaled."""

    def scaled(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        z = inputs[0].clone()  # [prompt, query, head * d_head]
        z[..., 32 * head : 32 * (head + 1)] *= scale
        return (z,)

    hook = projection.register_forward_pre_hook(scaled)
    try:
        said = train.answers(model, tokenizer, items)
    finally:
        hook.remove()
    return sum(
        answer == f" {item.prompt.split()[5].strip('.')}" for answer, item in zip(said, items, strict=True)
    ) / len(items)


@pytest.fixture
def short_lessons(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first lesson of two steps, so that a test can train within seconds."""
    monkeypatch.setattr(train, "LOOKING_BACK", ((20, 8, 4, 16, 2, 2.0),))


@pytest.mark.slow  # it trains twice
@pytest.mark.usefixtures("short_lessons")
def test_training_is_repeatable_and_lowers_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "BATCH", 4)
    first, tokenizer, told = train.train("tiny", seed=3, steps=2)
    again, _, _ = train.train("tiny", seed=3, steps=2)
    other, _, _ = train.train("tiny", seed=4, steps=1)
    assert told["first_lesson_steps"] == 2
    assert told["steps"] == 2
    assert told["training_tokens"] == 2 * 4 * train.N_CONTEXT
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    untrained = train.MODELS["tiny"](len(tokenizer)).eval()
    longer, _, _ = train.train("tiny", seed=3, steps=12)
    before, after = (train.held_out_loss(model, tokenizer, 40, 9)["text"] for model in (untrained, longer))
    assert after < before - 0.3
    with pytest.raises(ValueError, match="exactly one of the two"):
        train.train("tiny", steps=3, minutes=1.0)


def test_rows_hold_whole_documents_at_many_positions() -> None:
    ids = train.build_tokenizer().get_vocab()
    stream = train.rows(text.documents(1), ids, random.Random(1))
    starts = set()
    for token_ids, weights in (next(stream) for _ in range(200)):
        assert len(token_ids) == len(weights) == train.N_CONTEXT + 1
        starts |= {
            i + 1 for i, token_id in enumerate(token_ids[:-1]) if token_id == train.END_ID and weights[i + 1] > 0
        }
    assert len(starts) > 80


@pytest.mark.usefixtures("short_lessons")
def test_saving_rounds_once_and_measures_after_it(tmp_path: Path) -> None:
    model, tokenizer, told = train.train("tiny-moe", seed=0, steps=1)
    train.save(model, tokenizer, told, tmp_path, n=10)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert all(torch.equal(p, p.half().float()) for p in loaded.parameters())
    written = json.loads((tmp_path / "training.json").read_text())
    assert written["accuracy"] == train.evaluate(loaded.eval(), tokenizer, 10, written["evaluation"]["seed"])


def test_wilson_interval_is_the_root_of_its_equation() -> None:
    """The bounds are where |share - p| = z sqrt(p (1 - p) / n)."""
    score = train.wilson(37, 50)
    for bound in (score["low"], score["high"]):
        assert abs(0.74 - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / 50) ** 0.5)
    assert train.wilson(50, 50)["high"] == pytest.approx(1.0)
