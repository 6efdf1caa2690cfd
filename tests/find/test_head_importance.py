"""Head importance: AMP's number as loops, its algebra, the true loss of leaving a head out, and nothing where nothing is written."""

from __future__ import annotations

import copy

import pytest
import torch

import patchbay as pb
from patchbay.find._chance import rank_agreement
from patchbay.find.head_importance import head_importance
from patchbay.tiny import planted, twins
from tests.tolerance import close

TEXTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18]]


def test_planted() -> None:
    """On its own repeated strings, the loss needs the planted induction circuit, and no head of noise."""
    built = planted.induction(seed=0)
    result = head_importance(pb.load(built.model, built.tokenizer), built.truth["prompts"])
    risen = {str(row["part"]): row["loss_increase"] for row in result.table()}
    needed = {built.truth["previous_token"], built.truth["induction"]}
    assert min(risen[part] for part in needed) > 10 * max(abs(v) for part, v in risen.items() if part not in needed)
    assert {str(part) for part in result.top(2)} == needed
    assert result["spearman"] > 0.3


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_reference(name: str) -> None:
    """AMP: the sum of |z W_O| over the stream by Hugging Face's own modules, and the loss with the head's columns zeroed."""
    hf = twins.twin(name)
    result = head_importance(pb.load(hf), TEXTS, batch_size=2)
    blocks = hf.transformer.h if name == "gpt2" else hf.model.layers
    projections = [b.attn.c_proj if name == "gpt2" else b.self_attn.o_proj for b in blocks]
    expected, norm = torch.zeros(2, 4), torch.zeros(2, 4)
    for ids in TEXTS:
        seen: list[torch.Tensor] = []
        hooks = [p.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0])) for p in projections]
        with torch.no_grad():
            hf(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        for layer, (z, projection) in enumerate(zip(seen, projections, strict=True)):
            w_o = (projection.weight if name == "gpt2" else projection.weight.T).detach()
            for head in range(4):
                for position in range(len(ids)):
                    out = z[position, 8 * head : 8 * head + 8] @ w_o[8 * head : 8 * head + 8]
                    expected[layer, head] += float(out.abs().sum()) / len(ids) / len(TEXTS)
                    norm[layer, head] += float(out.square().sum() ** 0.5) / len(ids) / len(TEXTS)
    assert close(result.values.float(), expected)
    assert close(result["norm"].float(), norm)

    def loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return sum(float(model(torch.tensor([x]), labels=torch.tensor([x])).loss) for x in TEXTS) / len(TEXTS)

    base = loss(hf)
    assert close(result["loss"], base, of=1.0)
    for layer, head in ((0, 1), (1, 3)):
        cut = copy.deepcopy(hf)
        block = (cut.transformer.h if name == "gpt2" else cut.model.layers)[layer]
        with torch.no_grad():
            if name == "gpt2":
                block.attn.c_proj.weight[8 * head : 8 * head + 8] = 0.0
            else:
                block.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0.0
        assert close(result["loss_increase"][layer, head], loss(cut) - base, of=base)


def test_it_scales_with_what_is_written() -> None:
    hf = twins.twin("gpt2")
    before = head_importance(pb.load(hf), TEXTS, exact=0)
    with torch.no_grad():
        hf.transformer.h[1].attn.c_proj.weight[:8] *= 3.0
    after = head_importance(pb.load(hf), TEXTS, exact=0)
    assert close(after.values[1, 0], 3.0 * before.values[1, 0])
    assert close(after.values[1, 1:], before.values[1, 1:])
    assert "loss_increase" not in after


def test_null() -> None:
    """Heads that write nothing have importance 0, cost nothing, and leave no correlation to print."""
    hf = twins.twin("gpt2")
    with torch.no_grad():
        for block in hf.transformer.h:
            block.attn.c_proj.weight.zero_()
    result = head_importance(pb.load(hf), TEXTS)
    assert (result.values == 0.0).all()
    assert close(result["loss_increase"], 0.0, of=1.0)
    assert result["spearman"].isnan()


def test_bad_input() -> None:
    model = pb.load(twins.twin("gpt2"))
    with pytest.raises(pb.PatchbayError, match="prompt 1 has one token"):
        head_importance(model, [[5, 6], [7]])
    with pytest.raises(pb.PatchbayError, match="exact=-1"):
        head_importance(model, TEXTS, exact=-1)
    with pytest.raises(pb.PatchbayError, match=r"needs heads \(attn.z\); no layer of this mamba model"):
        head_importance(pb.load(twins.twin("mamba2")), TEXTS)


def test_agreement_draws_prompts_anew_and_keeps_them_paired() -> None:
    """Where every prompt says the same there is nothing to vary; values that go together prompt by prompt stay together."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.arange(8.0).repeat(12, 1)
    same = rank_agreement(parts, parts)
    assert (same["rho"], same["low"], same["high"]) == (1.0, 1.0, 1.0)
    noise = 5.0 * torch.randn(12, 8, generator=generator)
    paired = rank_agreement(noise, noise + 0.01 * parts)
    assert paired["low"] > 0.8, "drawn apart, two means of noise would not agree"
    assert rank_agreement(-parts, parts)["rho"] == -1.0
    assert rank_agreement(-parts, parts, sizes=True)["rho"] == 1.0
    assert rank_agreement(parts[:1], parts[:1])["low"] != rank_agreement(parts[:1], parts[:1])["low"], "one prompt: NaN"
    assert rank_agreement(parts, parts, draws=9)["p"] >= 1 / 10
