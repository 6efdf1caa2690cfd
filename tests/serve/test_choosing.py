"""How a token is chosen: laws by hand, draws by their shares, penalties by OpenAI's formula, log-probabilities of the model's own law."""

import math
from collections import Counter

import pytest
import torch

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.serve.asking import Sampling
from patchbay.serve.choosing import Chooser, own_steps, told
from patchbay.tiny.twins import twin
from tests.tolerance import close

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])


def chooser(seed: int = 0, own: tuple[object, ...] = (), **options: object) -> Chooser:
    return Chooser(Sampling(**options), own, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def shares(n: int = 900, **options: object) -> list[float]:
    one = chooser(**options)
    counts = Counter(one.choose([], LOGITS) for _ in range(n))
    return [counts[token] / n for token in range(len(LOGITS))]


def law(kept: list[int], temperature: float = 1.0) -> list[float]:
    """The softmax over some of the tokens, by hand."""
    weights = [math.exp(float(z) / temperature) if at in kept else 0.0 for at, z in enumerate(LOGITS)]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, law([0, 1, 2, 3, 4])),
        ({"temperature": 0.5}, law([0, 1, 2, 3, 4], 0.5)),
        ({"top_k": 2}, law([0, 1])),
        ({"top_p": 0.8}, law([0, 1, 4])),  # .55 + .20 + .12: the token that reaches .8 is among them
        ({"min_p": 0.3}, law([0, 1])),  # .3 of the likeliest: z >= 2 + log .3 = .80
        ({"temperature": 2.0, "top_k": 3}, law([0, 1, 4], 2.0)),
        ({"bias": ((3, 100.0),)}, [0, 0, 0, 1, 0]),
    ],
)
def test_draws_have_the_law(options: dict[str, object], expected: list[float]) -> None:
    for found, share in zip(shares(**options), expected, strict=True):
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / 900) + 1e-9


def test_greedy_takes_the_likeliest_and_draws_hang_on_the_seed() -> None:
    assert chooser(temperature=0).choose([], LOGITS) == 0
    assert chooser(temperature=0).plain
    flat = torch.zeros(1000)
    first = [chooser(seed).choose([], flat) for seed in (1, 1, 2)]
    assert first[0] == first[1] != first[2]


def test_penalties_are_openais_formula() -> None:
    """z - presence (count > 0) - frequency count, over what was chosen: 2, then 2 - .3 - .8, then, by 1 and 0 in turn, lower ones."""
    one = chooser(temperature=0, presence=0.3, frequency=0.8)
    scores, counts = [float(z) for z in LOGITS], Counter[int]()
    for _ in range(6):
        by_hand = [z - 0.3 * (counts[t] > 0) - 0.8 * counts[t] for t, z in enumerate(scores)]
        expected = max(range(5), key=lambda t: by_hand[t])
        assert one.choose([], LOGITS) == expected
        counts[expected] += 1
    assert len(counts) > 2


def test_the_models_own_repetition_penalty_is_made_as_generate_makes_it() -> None:
    hf = twin("gpt2")
    hf.generation_config.repetition_penalty = 1.7
    model = pb.load(hf)
    ids = [5, 9, 7, 11]
    row = model.generate([ids], 8)[0]
    one, text = chooser(temperature=0, own=tuple(own_steps(model))), list(ids)
    for _ in range(8):
        with torch.no_grad():
            text.append(one.choose(text, hf(torch.tensor([text])).logits[0, -1]))
    assert text == row
    hf.generation_config.repetition_penalty, hf.generation_config.suppress_tokens = None, [3]
    with pytest.raises(PatchbayError, match="suppress_tokens"):
        own_steps(model)
    hf.generation_config.suppress_tokens = None
    assert own_steps(model) == []


def test_log_probabilities_are_of_the_models_own_law() -> None:
    [one] = told(LOGITS[None], [2], 2)
    total = math.log(sum(math.exp(float(z)) for z in LOGITS))
    assert close([one.logp, *(logp for _, logp in one.top)], [0.0 - total, 2.0 - total, 1.0 - total])
    assert [token for token, _ in one.top] == [0, 1]
    assert told(LOGITS[None], [1], 0)[0].top == ()
