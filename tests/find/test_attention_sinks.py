"""Attention sinks: a planted one, closed forms, the formula as loops, nothing in a random model."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted
from patchbay.tiny.planted_canvas import Canvas
from patchbay.tiny.planted_vocabulary import tokenizer
from tests.given import llama
from tests.tolerance import close


def with_sink(seed: int) -> tuple[pb.Model, str]:
    """A head that attends to position 0 from everywhere, and reads nothing there: its values are the other positions'."""
    canvas = Canvas("gpt2", seed)
    words = canvas.take(canvas.n_vocab)
    canvas.embed(words)
    assert canvas.positions is not None
    head = canvas.pick_head(1)
    slot = canvas.slots(1)
    q, k = 25.0 * canvas.one[:, None] * slot, canvas.positions[0][:, None] * slot
    canvas.set_head(1, head, q=q, k=k, v=canvas.positions[1:9].T, o=words[:8])
    canvas.unembed(6.0 * words)
    return pb.load(canvas.model, tokenizer()), f"L1.H{head}"


def prompts(n: int, length: int, seed: int = 0) -> list[list[int]]:
    return torch.randint(3, 61, (n, length), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("seed", [0, 1])
def test_planted(seed: int) -> None:
    model, head = with_sink(seed)
    result = pb.find.attention_sinks(model, prompts(8, 64))
    best, second = result.table(2)
    assert str(best["part"]) == head
    assert best["value"] == 1.0
    assert best["alpha"] == pytest.approx(1.0, abs=0.01)
    assert best["elsewhere"] == 0.0
    assert best["without_first"] == 0.0
    assert best["key_norm"] > 5.0  # only the first key has a norm to speak of
    assert best["value_norm"] < 0.5
    assert second["value"] == 0.0
    assert float(result["sink_rate"]) == pytest.approx(1 / 8)
    assert float(result["position_rate"][0]) == pytest.approx(1 / 8)


def test_closed_forms() -> None:
    """Even attention: alpha_1 = H_64 / 64 = 0.0741, alpha_k between 1/64 and that. All on the first: 1."""
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    with model.edited(*(pb.zero(layer.attn.k) for layer in model.layers)):
        result = pb.find.attention_sinks(model, prompts(2, 70))
        low = pb.find.attention_sinks(model, prompts(2, 70), epsilon=0.07)
    assert torch.allclose(result["alpha"], torch.full((2, 4), 0.07412), atol=1e-5)  # five printed digits
    assert float(result["uniform"]) == pytest.approx(0.07412, abs=1e-5)
    assert result.values.max() == 0.0
    assert low.values.min() == 1.0
    assert len(low["position_rate"]) == 64
    first = torch.zeros(64, 64)
    first[:, 0] = 1.0
    with model.edited(
        *(pb.replace(layer.attn.pattern, first.expand(4, 64, 64).movedim(1, 0)[None]) for layer in model.layers)
    ):
        all_on_first = pb.find.attention_sinks(model, prompts(1, 64))
    assert close(all_on_first["alpha"], torch.ones(2, 4))
    assert all_on_first.values.min() == 1.0
    assert all_on_first["without_first"].max() == 0.0  # nothing is left to scale


def test_reference() -> None:
    """The stored metric as loops: column k over the queries that see it, a threshold, a mean over prompts; norms beside it."""
    hf = llama(0, sharpness=60)
    model = pb.load(hf)
    texts = [torch.randint(3, 90, (n,)).tolist() for n in (12, 9, 20, 16)]
    epsilon, length = 0.25, 16
    result = pb.find.attention_sinks(model, texts, epsilon=epsilon, length=length, batch_size=3)
    trace = [
        pb.run(
            model,
            [ids[:length]],
            taps=[p for i in range(2) for p in (model.port(f"L{i}.attn.k"), model.port(f"L{i}.resid_in"))],
        )
        for ids in texts
    ]
    hf.set_attn_implementation("eager")
    rate, alpha = torch.zeros(2, 4), torch.zeros(2, 4)
    elsewhere, without, keys, hidden = torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2)
    by_place: dict[int, list[float]] = {}
    for n, ids in enumerate(texts):
        size = min(len(ids), length)
        with torch.no_grad():
            attentions = hf(torch.tensor([ids[:size]]), output_attentions=True).attentions
        for layer in range(2):
            stream = trace[n][model.port(f"L{layer}.resid_in")][0].norm(dim=-1)
            hidden[layer] += stream[0] / stream[1:].mean() / len(texts)
            for head in range(4):
                a = attentions[layer][0, head]
                received = [sum(float(a[i, k]) for i in range(k, size)) / (size - k) for k in range(size)]
                rest = [
                    sum(float(a[i, k]) / (1 - float(a[i, 0])) for i in range(k, size) if float(a[i, 0]) < 1 - 1e-3)
                    / (size - k)
                    for k in range(1, size)
                ]
                alpha[layer, head] += received[0] / len(texts)
                rate[layer, head] += float(received[0] > epsilon) / len(texts)
                elsewhere[layer, head] += float(max(received[1 : size // 2 + 1]) > epsilon) / len(texts)
                without[layer, head] += float(max(rest[: size // 2]) > epsilon) / len(texts)
                norm = trace[n][model.port(f"L{layer}.attn.k")][0, head // 2].norm(dim=-1)
                keys[layer, head] += norm[0] / norm[1:].mean() / len(texts)
                for k in range(size):
                    by_place.setdefault(k, []).append(float(received[k] > epsilon))
    assert close(result.values, rate)
    assert 0 < rate.mean() < 1
    assert close(result["alpha"], alpha)
    assert close(result["elsewhere"], elsewhere)
    assert close(result["without_first"], without)
    assert close(result["key_norm"], keys)
    assert close(result["hidden_norm"], hidden)
    expected = torch.tensor([sum(by_place[k]) / len(by_place[k]) for k in range(length)])
    assert close(result["position_rate"], expected)
    assert "2 of 4 prompts are shorter than 16 tokens" in " ".join(result.notes)


def test_null() -> None:
    """A random model has no sinks."""
    built = planted.null(seed=1)
    result = pb.find.attention_sinks(pb.load(built.model, built.tokenizer), prompts(6, 64))
    assert result.values.max() == 0.0
    assert float(result["sink_rate"]) == 0.0
    assert (result["alpha"] - result["uniform"]).abs().max() < 0.05


def test_errors() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    for options, words in (({"epsilon": 1.5}, "epsilon=1.5"), ({"length": 1}, "length=1")):
        with pytest.raises(pb.PatchbayError, match=words):
            pb.find.attention_sinks(model, [[5, 6, 7]], **options)
    with pytest.raises(pb.PatchbayError, match="prompt 1 has 1 token"):
        pb.find.attention_sinks(model, [[5, 6, 7], [5]])
