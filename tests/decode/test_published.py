"""Loops as `custom_generate` of transformers: the first draft of each method's Result, for models and options of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny import twins
from tests.decode.shared_stories import new_tokens

PROMPTS = [[5, 9, 7, 11], [8, 6, 7]]
NEW = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "beam": {"beams": 3},
    "best_of_n": {"drafts": 3, "scorer": "logp", "seed": 3},
    "contrastive_decoding": {"amateur": 1},
    "contrastive_search": {"k": 3, "alpha": 0.5},
    "dexperts": {"expert": 1, "antiexpert": 2, "alpha": 0.5},
    "diverse_beam": {"beams": 4, "groups": 2, "penalty": 1.0},
    "dola": {"layers": [0, 1], "alpha": 0.2},
    "knn": {"store": "L1.mlp.in", "weight": 0.4, "neighbours": 5},
    "longheads": {"window": 2, "chunks": 3},
    "navigate": {"push": 1.0, "per_round": 2, "rounds": 1},
    "rerank": {"scorer": "logp", "pool": [2, 2, 2]},
    "rule_adapter": {"penalty": 2.0},
    "samplers": {"chain": ["top_k(5)"], "seed": 3},
    "speculative": {"draft": 1, "ahead": 2, "chain": ["top_k(20)"], "seed": 3},
    "superposed": {"drafts": 2, "temperature": 0.5},
    "watermark": {"bias": 5.0, "seed": 3},
}


def made(seed: int = 0) -> Any:
    return twins.twin("llama", seed=seed)


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Ids padded on the left, and their mask."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(row)) + row for row in prompts]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
    return {"inputs": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_loop_is_its_method_for_transformers(name: str, tmp_path: Path) -> None:
    """Second models are transformers' own; texts that end early are padded on the right."""
    method: Callable[..., Any] = getattr(pb.decode, name)
    hf, options = made(), dict(OPTIONS[name])
    if "store" in options:
        pb.run(pb.load(hf), PROMPTS, taps=[options["store"]], folder=tmp_path / "store")
        options["store"] = str(tmp_path / "store")
    voices = {key: made(value) for key, value in options.items() if key in ("amateur", "draft", "expert", "antiexpert")}
    plain = {key: value for key, value in options.items() if key not in voices}
    ours = {key: pb.load(value) for key, value in voices.items()}
    found = new_tokens(method(pb.load(hf), prompts=PROMPTS, max_new_tokens=NEW, **ours, **plain))
    given = {"max_new_tokens": NEW, "pad_token_id": 0, "custom_generate": method.generate, **voices, **plain}  # type: ignore[attr-defined]
    out = hf.generate(**padded(PROMPTS), **given)
    assert out.shape == (2, 4 + NEW)
    assert out[:, 4:].tolist() == [drafts[0] for drafts in found]


def test_every_decoder_is_published() -> None:
    assert set(OPTIONS) == {name for name in pb.decode.__all__ if hasattr(getattr(pb.decode, name), "generate")}


def test_what_ends_a_text_and_what_bars_tokens_are_transformers_own() -> None:
    hf = made()
    given: dict[str, Any] = {
        "max_new_tokens": NEW,
        "pad_token_id": 0,
        "custom_generate": pb.decode.beam.generate,
        "beams": 1,
    }  # type: ignore[attr-defined]
    free = hf.generate(**padded(PROMPTS), **given)
    greedy = hf.generate(**padded(PROMPTS), max_new_tokens=NEW, pad_token_id=0, do_sample=False)
    assert torch.equal(free, greedy)
    second = int(free[0, 5])
    ended = hf.generate(**padded(PROMPTS), **given, eos_token_id=second)
    assert ended[0, 4:6].tolist() == free[0, 4:6].tolist()
    assert not ended[0, 6:].any()
    barred = hf.generate(**padded(PROMPTS), **given, suppress_tokens=[second])
    assert not bool((barred[:, 4:] == second).any())


@pytest.mark.parametrize("name", ["beam", "diverse_beam", "superposed"])
def test_what_would_end_a_text_unheard_is_refused(name: str) -> None:
    """Loops that keep several texts of a prompt side by side look at end tokens; others ask whatever criteria there are."""
    hf, method = made(), getattr(pb.decode, name)

    def at_once(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.ones(len(ids), dtype=torch.bool)

    given: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": 0, "stopping_criteria": [at_once]}
    with pytest.raises(pb.PatchbayError, match=f"{name}: several texts stand .* function would not be heard"):
        hf.generate(**padded(PROMPTS), **given, custom_generate=method.generate, **OPTIONS[name])
    heard = hf.generate(**padded(PROMPTS), **given, custom_generate=pb.decode.contrastive_search.generate)  # type: ignore[attr-defined]
    assert heard.shape == (2, 4 + 1)


def test_refusals() -> None:
    hf = made()
    inputs = padded(PROMPTS)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with pytest.raises(pb.PatchbayError, match="this mask has padding behind a token"):
        hf.generate(**inputs, max_new_tokens=2, pad_token_id=5, custom_generate=pb.decode.dola.generate)  # type: ignore[attr-defined]
