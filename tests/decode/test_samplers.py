"""Samplers: what each step leaves, by its formula; states that follow what was drawn; the law that is drawn from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import chi2

import patchbay as pb
from patchbay.decode._samplers import Dry, Mirostat, TopNSigma, Xtc
from patchbay.tiny.twins import twin
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]
NEW = 6


def model_of() -> pb.Model:
    return pb.load(twin("gpt2"))


def kept(step: Any, law: list[float], ids: list[int] | None = None) -> list[int]:
    out = step(torch.tensor([ids or [0]]), torch.tensor([law]).log())
    return out[0].isfinite().nonzero()[:, 0].tolist()


def test_planted() -> None:
    """Laws on which each step leaves what its formula says."""
    law = [0.5, 0.3, 0.15, 0.05]
    assert kept(Xtc(0.1, 1.0), law) == [2, 3], "of those above .1 the least likely stays"
    assert kept(Xtc(0.4, 1.0), law) == [0, 1, 2, 3], "one alone stays"
    assert kept(Xtc(0.1, 0.0), law) == [0, 1, 2, 3]
    z = torch.tensor([[3.0, 2.0, 0.0, -1.0]])  # mean 1, standard deviation sqrt(2.5)
    assert TopNSigma(0.5)(z.long(), z).isfinite().tolist() == [[True, False, False, False]]
    assert TopNSigma(1.0)(z.long(), z).isfinite().tolist() == [[True, True, False, False]]
    assert torch.equal(TopNSigma(1.0)(z.long(), z / 2).isfinite(), TopNSigma(1.0)(z.long(), z).isfinite())
    text = torch.tensor([[1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3]])
    taken = -Dry(0.8, 1.75, 2)(text, torch.zeros(1, 12))[0]
    assert close(taken, [0.8 * 1.75 if v == 9 else 0.8 if v == 8 else 0.0 for v in range(12)], dtype=torch.float32)
    assert Dry(breakers=[2])(text, torch.zeros(1, 12)).abs().sum() == 0, "no suffix reaches across a breaker"
    step = Mirostat(tau=0.5, eta=1.0)  # mu 1: surprises .69 1.2 1.9 3.0
    assert kept(step, law) == [0]
    step.mu = torch.tensor([1.3], dtype=torch.float64)
    step.law = torch.tensor([[0.25, 0.75, 0.0, 0.0]]).log()
    assert kept(step, law, [4, 0]) == [0], "surprise 1.39 came, .5 was the target: mu is .41, and the likeliest stays"
    assert close(step.mu, [1.3 - (math.log(4) - 0.5)], dtype=torch.float32)


def test_reference() -> None:
    """Mirostat by loops over whole runs along the drawn text; DRY by trying every token and length; chi-square of 4,000 draws."""
    model, tau, eta = model_of(), 2.0, 0.3
    found = pb.decode.samplers(
        model, PROMPTS, chain=[f"mirostat(tau={tau}, eta={eta})"], drafts=2, max_new_tokens=NEW, ends=[]
    )
    for i, prompt in enumerate(PROMPTS):
        for draft in range(2):
            new, mu = found["tokens"][i, draft].tolist(), 2 * tau
            with torch.no_grad():
                laws = torch.log_softmax(model.hf(torch.tensor([prompt + new])).logits[0].double(), -1)[
                    len(prompt) - 1 :
                ]
            for at, token in enumerate(new):
                law = laws[at].tolist()
                left = [v for v in range(96) if -law[v] <= mu or law[v] == max(law)]
                assert token in left
                logq = law[token] - math.log(sum(math.exp(law[v]) for v in left))
                assert close(found["logq"][i, draft, at], logq, of=5.0, dtype=torch.float32)
                mu -= eta * (-logq - tau)
    text = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    dry = Dry(0.5, 2.0, 3)
    for end in range(2, 40):
        own = dry(torch.tensor([text[:end]]), torch.zeros(1, 3))[0].tolist()
        for v in range(3):
            longest = max(
                (
                    n
                    for n in range(1, end)
                    for at in range(n, end)
                    if text[at - n : at] == text[end - n : end] and text[at] == v
                ),
                default=0,
            )
            assert own[v] == (-0.5 * 2.0 ** (longest - 3) if longest >= 3 else 0.0)
    n, k = 4000, 6
    drawn = pb.decode.samplers(
        model, [PROMPTS[0]], chain=[f"top_k({k})", "temperature(1.5)"], drafts=n, max_new_tokens=1, ends=[]
    )
    with torch.no_grad():
        z = model.hf(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / 1.5
    top = z.topk(k).indices
    law = z[top].softmax(0)
    counts = torch.stack([(drawn["tokens"][0, :, 0] == token).sum() for token in top])
    assert counts.sum() == n
    assert float(((counts - n * law).square() / (n * law)).sum()) < chi2.ppf(0.999, k - 1)


def test_null() -> None:
    """Steps that leave everything: the same texts as with none, each as likely under the drawn law as under the model's."""
    model = model_of()
    plain = pb.decode.samplers(model, PROMPTS, chain=[], max_new_tokens=NEW, ends=[])
    idle = [
        "temperature(1.0)",
        "top_p(1.0)",
        "dry(multiplier=0.0)",
        "xtc(probability=0.0)",
        "mirostat(tau=500.0)",
        "top_n_sigma(1e6)",
    ]
    off = pb.decode.samplers(model, PROMPTS, chain=idle, max_new_tokens=NEW, ends=[])
    assert torch.equal(plain["tokens"], off["tokens"])
    assert close(off["logq"], off["logp"], of=5.0, dtype=torch.float32)
    other = pb.decode.samplers(model, PROMPTS, chain=[], max_new_tokens=NEW, ends=[], seed=1)
    assert not torch.equal(plain["tokens"], other["tokens"])
    several = pb.decode.samplers(model, PROMPTS, chain=[], drafts=2, max_new_tokens=NEW, ends=[])
    assert torch.equal(several["tokens"][:, 0], plain["tokens"][:, 0])
    assert not torch.equal(several["tokens"][:, 1], plain["tokens"][:, 0]), "each draft has its own chance"


def test_the_order_of_steps_counts() -> None:
    model = model_of()
    with torch.no_grad():
        z = model.hf(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    for chain, law in (
        (["temperature(3.0)", "min_p(0.2)"], (z / 3).softmax(0)),
        (["min_p(0.2)", "temperature(3.0)"], z.softmax(0)),
    ):
        n = int((law >= 0.2 * law.max()).sum())
        drawn = pb.decode.samplers(model, [PROMPTS[0]], chain=chain, drafts=400, max_new_tokens=1, ends=[])["tokens"]
        assert set(drawn.flatten().tolist()) <= set(law.topk(n).indices.tolist())
        least = (z / 3)[law.topk(n).indices].softmax(0).min()
        assert len(set(drawn.flatten().tolist())) == n or 400 * least < 8


@pytest.mark.parametrize(
    ("chain", "says"),
    [
        (["top_q(0.9)"], "chain: 'top_q' is none of top_n_sigma, dry, xtc, mirostat, temperature"),
        (["top_p(2.0)"], r"chain: top_p\(2.0\): .*top_p"),
        (["mirostat(tau=0)"], r"mirostat\(tau=0, eta=0.1\): above 0"),
        (["xtc(threshold=0)"], r"xtc\(threshold=0, probability=0.5\)"),
        (["dry(base=0.5)"], r"dry\(multiplier=0.8, base=0.5, allowed=2\)"),
        (["top_n_sigma(0)"], r"top_n_sigma\(0\): above 0"),
        (["min_p(0.1, 2, 3, 4)"], r"chain: min_p\(0.1, 2, 3, 4\): "),
    ],
)
def test_refusals(chain: list[str], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.samplers(model_of(), PROMPTS, chain=chain)
    with pytest.raises(pb.PatchbayError, match="drafts=0: one or more of each prompt"):
        pb.decode.samplers(model_of(), PROMPTS, drafts=0)
