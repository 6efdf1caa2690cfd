"""Rows that come and go: each text has the logits of a run of itself alone, whole, without a cache, under its own edits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.edits.edit import Edit
from patchbay.jacks.session import Session
from patchbay.serve import joined
from patchbay.serve.joined import Alone, Joined, Text, fits, joins
from patchbay.serve.prefill import Prefill
from patchbay.tiny.twins import twin
from tests.tolerance import close

FAMILIES = ("gpt2", "gemma2", "bloom", "qwen3_next")
STATES = 256  # roundings where a layer carries a state: each token adds its own to those before


@functools.cache
def lent(name: str) -> pb.Model:
    return pb.load(twin(name))


def vector(model: pb.Model, size: float = 1.0) -> Tensor:
    return size * torch.randn(model.d_model, generator=torch.Generator().manual_seed(3))


def last(model: pb.Model) -> pb.Port:
    return model.port(f"L{model.n_layers - 1}.resid_out")


def attending(model: pb.Model) -> int:
    return next(i for i in range(model.n_layers) if "attn.pattern" in model.signals(i))


EDITS: dict[str, Callable[[pb.Model], list[Edit]]] = {
    "none": lambda m: [],
    "scale": lambda m: [pb.scale(m.port(f"L{attending(m)}.H1.z"), -2.0)],
    "add": lambda m: [pb.add(last(m), vector(m))],
    "generated": lambda m: [pb.add(m.port("L0.resid_out"), vector(m), positions="generated")],
    "last": lambda m: [pb.add(m.port("L0.resid_out"), vector(m), positions="last")],
    "a position": lambda m: [pb.replace(m.port("L0.mlp.out"), vector(m), positions=1)],
    "a token": lambda m: [pb.add(m.port("L0.resid_out"), vector(m, 3.0), positions=pb.Token(7))],
    "by position": lambda m: [pb.add(m.port("L0.resid_out"), torch.stack([vector(m), vector(m, 2.0)]), positions=[0, 2])],
    "logits": lambda m: [pb.add(pb.Port("logits"), torch.linspace(-2, 2, m.vocab_size))],
    "cut": lambda m: [pb.block(m.port(f"L{attending(m)}.attn.pattern"), query="generated", key=[1, -1])],
    "pattern": lambda m: [pb.scale(m.port(f"L{attending(m)}.H0.pattern"), 0.5)],
    "keys": lambda m: [pb.scale(m.port(f"L{attending(m)}.attn.k"), 1.5, positions=0)],
    "when": lambda m: [pb.add(m.port("L0.resid_out"), vector(m, 4.0)).when(pb.Probe(m.port("L0.resid_in"), vector(m), 0.0))],
    "project": lambda m: [pb.project(m.port("L0.resid_out"), vector(m)[None])],
}  # fmt: skip


def prompt(model: pb.Model, n: int, seed: int) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return [*torch.randint(8, model.vocab_size, (n - 1,), generator=draw).tolist(), 7]


def begun(model: pb.Model, text: Text, chunks: Sequence[int] = (99,)) -> Prefill:
    start = Prefill(model, [text.ids], [text.edits])
    for n in chunks:
        if start.left:
            start.run(n)
    return start


@torch.no_grad()
def whole(model: pb.Model, text: Text) -> Tensor:
    ids = torch.tensor([text.ids])
    with Session(
        model, (), list(text.edits), whole=True, prompt_length=text.n_prompt
    ):  # of nothing that is open around
        return model.hf(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_come_and_go_have_the_logits_of_runs_alone(name: str) -> None:
    """All kinds of edits at once, prompts of other lengths, some in pieces; texts join late, leave early, and go on to the end."""
    model = lent(name)
    assert joins(model) == "chunks"
    texts = [Text(prompt(model, 3 + 5 * i % 9, i), tuple(make(model))) for i, make in enumerate(EDITS.values())]
    rows, tokens = Joined(model), torch.Generator().manual_seed(1)
    for at, text in enumerate(texts):
        start = begun(model, text, (2, 3, 99) if at % 3 == 1 else (99,))
        assert close(start.logits[0], whole(model, text))
        rows.join([text], start.cache)
        if at % 2:
            rows.step(torch.randint(8, model.vocab_size, (len(rows.texts),), generator=tokens).tolist())
        if at == 9:
            rows.leave([texts[1], texts[3], texts[8]])
    rows.step(torch.randint(7, 12, (len(rows.texts),), generator=tokens).tolist())
    rows.leave([texts[0], texts[4]])
    logits = rows.step(torch.randint(7, 12, (len(rows.texts),), generator=tokens).tolist())
    rows.close()
    assert len(rows.texts) == len(EDITS) - 5
    for text, found in zip(rows.texts, logits, strict=True):
        assert close(found, whole(model, text), noise=STATES if name == "qwen3_next" else 64.0)


def test_edits_of_a_row_do_something() -> None:
    """What the test above compares is not one number: every kind of edit moves the logits."""
    model = lent("llama")
    ids = [5, 9, 7, 11, 7]
    plain = whole(model, Text(ids))
    for name, make in EDITS.items():
        text = Text(ids[:4], tuple(make(model)))
        text.ids.append(7)
        moved = (whole(model, text) - plain).abs().max()
        assert (moved > 1e-3) == (name != "none"), name


def test_a_row_does_not_feel_its_neighbours_knobs() -> None:
    """To the last bit, for the same tokens: whatever is turned in the other rows, and how far."""
    model = lent("llama")

    def run(kind: str, other: str, longer: int) -> Tensor:
        rows = Joined(model)
        for at, one in enumerate((kind, other)):
            text = Text(prompt(model, 4 + at * longer, at), tuple(EDITS[one](model)))
            rows.join([text], begun(model, text).cache)
        seen = [rows.step([7, 9])[0] for _ in range(3)]
        rows.close()
        return torch.stack(seen)

    for kind, longer in (("none", 0), ("none", 1), ("add", 2)):
        alone = run(kind, "none", longer)
        for other in EDITS:
            assert torch.equal(run(kind, other, longer), alone), (kind, other, longer)


@pytest.mark.parametrize("name", ["gpt2", "qwen3_next"])
def test_prompts_of_one_length_run_together(name: str) -> None:
    """Every kind of edit at once as rows of one run, then joined to a longer text; and a cache whose rows are repeated."""
    model = lent(name)
    texts = [Text(prompt(model, 6, i), tuple(make(model))) for i, make in enumerate(EDITS.values())]
    together = Prefill(model, [text.ids for text in texts], [text.edits for text in texts])
    together.run(6)
    for found, text in zip(together.logits, texts, strict=True):
        assert close(found, whole(model, text))
    rows, longer, twice = Joined(model), Text(prompt(model, 9, 99)), Text(list(texts[0].ids), texts[0].edits)
    rows.join([longer], begun(model, longer).cache)
    together.cache.reorder_cache(torch.tensor([0, *range(len(texts))]))
    rows.join([twice, *texts], together.cache)
    logits = rows.step([9] * (len(texts) + 2))
    rows.close()
    for found, text in zip(logits, rows.texts, strict=True):
        assert close(found, whole(model, text), noise=STATES if name == "qwen3_next" else 64.0)


def test_what_the_cache_holds_shrinks_with_the_rows() -> None:
    model = lent("gpt2")
    texts = [Text(prompt(model, n, n)) for n in (4, 30, 6)]
    rows = Joined(model)
    for text in texts:
        rows.join([text], begun(model, text).cache)
    rows.step([7, 7, 7])
    assert (rows.width, rows.cache.layers[0].keys.shape[-2]) == (31, 31)
    rows.leave([texts[1]])
    assert (rows.width, rows.cache.layers[0].keys.shape[-2]) == (7, 7)
    for found, text in zip(rows.step([9, 8]), rows.texts, strict=True):
        assert close(found, whole(model, text))
    rows.leave(list(rows.texts))
    assert rows.cache is None
    rows.close()


def test_models_whose_rows_cannot_be_joined_run_alone() -> None:
    """Jamba's states know chunks only from their beginning, Mamba's no mask beside a cache; neither is believed blindly."""
    assert joins(lent("jamba")) == "whole"
    assert joins(lent("mamba")) == ""
    model = lent("mamba")
    text = Text(prompt(model, 5, 1), tuple(EDITS["add"](model)))
    assert not fits(model, text, 3)
    alone = Alone(model, text, 3)
    assert close(alone.start()[-1], whole(model, text))
    for token in (7, 9):
        assert close(alone.step(token), whole(model, text))
    alone.close()


def test_a_number_for_each_key_is_not_for_rows_with_padding() -> None:
    model = lent("gpt2")
    edit = pb.scale(model.port("L0.H1.pattern"), torch.linspace(0, 1, 6))
    assert not fits(model, Text([1, 2, 3], (edit,)), 3)
    assert fits(model, Text([1, 2, 3], tuple(EDITS["pattern"](model))), 3)


def test_a_model_that_is_wrong_in_a_batch_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "_left", lambda x, width: torch.nn.functional.pad(x, (0, width - x.shape[1])))
    model = pb.load(twin("gpt2"))
    assert joins(model) == ""
