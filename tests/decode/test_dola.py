"""DoLa: the formula as loops, a layer that was planted, the published code's other choice, and nothing where layers agree."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon

import patchbay as pb
from patchbay.decode.dola import divergence, published_divergence
from patchbay.tiny import twins
from tests.decode.shared_stories import new_tokens
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]
NEW = 4


def model_of(name: str = "llama", **config: int) -> pb.Model:
    return pb.load(twins.twin(name, **config))


def texts(found: pb.Result) -> list[list[int]]:
    return [drafts[0] for drafts in new_tokens(found)]


def law(logits: torch.Tensor) -> list[float]:
    return logits.double().softmax(-1).tolist()


def naive(model: pb.Model, prompt: list[int], layers: list[int]) -> tuple[list[int], list[int]]:
    """Loops over candidates and tokens; early exits from transformers' own hidden states."""
    text, chosen = list(prompt), []
    for _ in range(NEW):
        with torch.no_grad():
            out = model.hf(torch.tensor([text]), output_hidden_states=True)
            norm, head = model.final_norm_module, model.hf.get_output_embeddings()
            early = {j: law(head(norm(out.hidden_states[j][0, -1]))) for j in layers}
        last = law(out.logits[0, -1])
        far = {}
        for j, other in early.items():
            mean = [(a + b) / 2 for a, b in zip(last, other, strict=True)]
            far[j] = sum(
                0.5 * a * math.log(a / m) + 0.5 * b * math.log(b / m) for a, b, m in zip(last, other, mean, strict=True)
            )
        at = max(layers, key=lambda j: far[j])
        head_tokens = [v for v in range(len(last)) if last[v] >= 0.1 * max(last)]
        text.append(max(head_tokens, key=lambda v: math.log(last[v]) - math.log(early[at][v])))
        chosen.append(at)
    return text[len(prompt) :], chosen


def test_reference() -> None:
    model = model_of(num_hidden_layers=4)
    found = pb.decode.dola(model, PROMPTS, layers=[1, 2, 3], max_new_tokens=NEW)
    for i, prompt in enumerate(PROMPTS):
        tokens, chosen = naive(model, prompt, [1, 2, 3])
        assert texts(found)[i] == tokens
        assert found["contrasted"][i, 0].tolist() == chosen


def test_planted() -> None:
    """The layer whose stream was turned round is the one that the others are contrasted with."""
    model = model_of("gpt2", n_layer=4)
    edits = [pb.scale("L1.resid_out", -1.0), pb.scale("L2.resid_in", -1.0)]  # after two layers it stands on its head
    with model.edited(*edits):
        found = pb.decode.dola(model, PROMPTS, layers=[1, 2, 3], max_new_tokens=NEW, as_published=True)
    plain = pb.decode.dola(model, PROMPTS, layers=[2], alpha=0.0, max_new_tokens=1)
    turned = pb.decode.dola(model, PROMPTS, layers=[3], alpha=0.0, max_new_tokens=1)
    assert texts(plain) != texts(turned)
    assert found["contrasted"].unique().tolist() == [2.0]


def test_null() -> None:
    """Only the likeliest token plausible: greedy. Layers that change nothing: no divergence, and greedy by ties."""
    model = model_of()
    greedy = model.generate(PROMPTS, NEW, new_only=True)
    assert texts(pb.decode.dola(model, PROMPTS, layers=[0, 1], alpha=1.0, max_new_tokens=NEW)) == greedy
    same = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    assert close(divergence(same, same[:, None]), 0.0, of=1.0, dtype=torch.float32)


def test_the_divergence_is_jensen_and_shannons() -> None:
    generator = torch.Generator().manual_seed(0)
    last, early = torch.randn(2, 7, generator=generator), torch.randn(2, 3, 7, generator=generator)
    found = divergence(last, early)
    for row in range(2):
        for candidate in range(3):
            root = jensenshannon(law(last[row]), law(early[row, candidate]))  # SciPy gives its square root
            assert close(float(found[row, candidate]), float(root) ** 2, of=1.0)


def test_the_published_divergence_is_the_other_way_round_and_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    last, early = torch.randn(2, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    expected = torch.zeros(3)
    for row in range(2):
        for j in range(3):
            p, q = law(last[row]), law(early[row, j])
            m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
            terms = [0.5 * x * (math.log(x / a) + math.log(x / b)) for x, a, b in zip(m, p, q, strict=True)]
            expected[j] += sum(terms) / 5 / 2
    found = published_divergence(last, early)
    assert close(found, expected.expand(2, 3), of=1.0)
    assert not torch.equal(divergence(last, early)[0], divergence(last, early)[1])


def test_as_published_takes_no_norm_and_says_that_prompts_depend_on_one_another() -> None:
    model = model_of()
    found = pb.decode.dola(model, PROMPTS, layers=[0, 1], as_published=True, max_new_tokens=NEW)
    assert any("may depend on the others" in note for note in found.notes)
    assert texts(found) != texts(pb.decode.dola(model, PROMPTS, layers=[0, 1], max_new_tokens=NEW))


@pytest.mark.parametrize("layers", [[], [2], [-1], [0, 0]])
def test_refusals(layers: list[int]) -> None:
    with pytest.raises(pb.PatchbayError, match="after how many of the 2 layers, each from 0 to 1 and once"):
        pb.decode.dola(model_of(), PROMPTS, layers=layers)
    with pytest.raises(pb.PatchbayError, match="alpha=2.0: from 0"):
        pb.decode.dola(model_of(), PROMPTS, alpha=2.0)
