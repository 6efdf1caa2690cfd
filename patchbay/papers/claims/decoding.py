"""Claims about decoders: what their texts are like beside greedy ones."""

from __future__ import annotations

from typing import Any

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import N

NEW = 24  # tokens of a continuation


def new_tokens(found: pb.Result) -> list[list[int]]:
    """The first draft of each prompt."""
    return [[token for token in drafts[0] if token >= 0] for drafts in found["tokens"].tolist()]


def repeated(tokens: list[int], n: int = 3) -> float:
    """The share of a text's n-grams that were there before."""
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / max(1, len(grams))


def continued(model: pb.Model, prompts: list[list[int]]) -> list[list[int]]:
    return [list(row) for row in model.generate(prompts, NEW, new_only=True, eos_token_id=None)]


@claim("li2023c", "comparison")
def li2023c(model: pb.Model, seed: int) -> Claim:
    """Confirmed if text repeats itself less than greedy text where the amateur is the same model without its last layer."""
    import torch

    from patchbay import maths

    prompts = [list(ids) for ids in pb.tasks.facts_in_memory(model, N, seed=seed).clean]
    last = model.n_layers - 1
    amateur = pb.turn.scale([f"L{last}.attn", f"L{last}.mlp"], 0.0, model=model)  # type: ignore[list-item]
    found = pb.decode.contrastive_decoding(model, amateur, prompts, max_new_tokens=NEW, ends=[])
    greedy = torch.tensor([repeated(row) for row in continued(model, prompts)], dtype=torch.float64)
    own = torch.tensor([repeated(row) for row in new_tokens(found)], dtype=torch.float64)
    interval = maths.paired_interval(greedy, own)
    text = (
        f"set against itself without its last layer, the model repeats less than greedily ({float(greedy.mean()):.2f} of the "
        f"3-grams there, {float(own.mean()):.2f} here)"
    )
    return Claim(text, *interval[:3], 0.0, "share of 3-grams")


@claim("chuang2024", "comparison")
def chuang2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if contrasting with an earlier layer completes more facts as they were learned than greedy decoding does."""
    import torch

    from patchbay import maths

    task = pb.tasks.facts_in_memory(model, N, seed=seed)
    prompts, right = [list(ids) for ids in task.clean], torch.tensor(task.right)
    found = pb.decode.dola(model, prompts, max_new_tokens=1, ends=[])
    greedy = torch.tensor(model.generate(prompts, 1, new_only=True, eos_token_id=None))[:, 0]
    own, plain = (found["tokens"][:, 0, 0] == right).double(), (greedy == right).double()
    interval = maths.paired_interval(own, plain)
    text = (
        f"set against an earlier layer, the model completes more facts than greedily ({float(plain.mean()):.0%} greedily, "
        f"{float(own.mean()):.0%} here)"
    )
    return Claim(text, *interval[:3], 0.0, "share of prompts")


@claim("basu2021", "comparison")
def basu2021(model: pb.Model, seed: int) -> Claim:
    """Confirmed if text drawn by mirostat with a target of 1.5 nats is more surprising to the model than with one of 0.5."""
    from patchbay import maths

    prompts = [list(ids) for ids in pb.tasks.facts_in_memory(model, N, seed=seed).clean]
    high, low = (
        -pb.decode.samplers(
            model, prompts, chain=[f"mirostat(tau={tau}, eta=0.2)"], max_new_tokens=NEW, ends=[], seed=seed
        )["logp"][:, 0].mean(1)
        for tau in (1.5, 0.5)
    )
    text = f"text with a target of 1.5 nats has a surprise of {float(high.mean()):.2f}, with one of 0.5 {float(low.mean()):.2f}"
    return Claim(text, *maths.paired_interval(high, low)[:3], 0.0, "nats per token")


@claim("kang2025", "comparison")
def kang2025(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the answer that most of eight draws at temperature 2 give is right more often than one such draw is.

    At temperature 1 the model nearly always draws the same answer, and a vote changes nothing (0 of the prompts, 95 % 0 to 0).
    """
    import torch

    from patchbay import maths

    task = pb.tasks.facts_in_memory(model, N, seed=seed)
    prompts, right = [list(ids) for ids in task.clean], torch.tensor(task.right)
    hot = ["temperature(2.0)"]
    found = pb.decode.best_of_n(model, prompts, scorer="vote", drafts=8, chain=hot, max_new_tokens=1, seed=seed)
    single = pb.decode.samplers(model, prompts, chain=hot, max_new_tokens=1, ends=[], seed=seed + 1)
    own, plain = ((one["tokens"][:, 0, 0] == right).double() for one in (found, single))
    text = f"a vote of eight draws at temperature 2 is right {float(own.mean()):.0%} of the time, one draw {float(plain.mean()):.0%}"
    return Claim(text, *maths.paired_interval(own, plain)[:3], 0.0, "share of prompts")


@claim("liu2021", "comparison")
def liu2021(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the answers of a knob that believes the text come more often when it is the expert than from the model alone."""
    import torch

    from patchbay import maths

    task = pb.tasks.facts_in_context(model, N, seed=seed)
    prompts, right = [list(ids) for ids in task.clean], torch.tensor(task.right)
    heads = pb.find.fact_heads(model, pb.tasks.facts_in_context(model, N, seed=seed + 1)).top(1)
    expert, against = (pb.turn.scale(heads, strength, model=model) for strength in (4.0, 0.0))
    options: dict[str, Any] = {"max_new_tokens": 1, "ends": [], "top_p": 0.95, "seed": seed}
    own, plain = (
        (
            pb.decode.dexperts(model, expert, against, prompts, alpha=alpha, **options)["tokens"][:, 0, 0] == right
        ).double()
        for alpha in (2.0, 0.0)
    )
    text = f"a knob as expert, turned the other way as anti-expert, makes answers by the text more frequent ({float(plain.mean()):.0%} to {float(own.mean()):.0%})"
    return Claim(text, *maths.paired_interval(own, plain)[:3], 0.0, "share of prompts")


@claim("vijayakumar2016", "comparison")
def vijayakumar2016(model: pb.Model, seed: int) -> Claim:
    """Confirmed if diverse beams hold more different 3-grams than a beam search of as many."""
    import torch

    from patchbay import maths

    prompts = [list(ids) for ids in pb.tasks.facts_in_memory(model, N, seed=seed).clean]
    options: dict[str, Any] = {"max_new_tokens": NEW, "ends": []}
    lists = [
        pb.decode.diverse_beam(model, prompts, beams=6, groups=3, penalty=0.5, **options)["tokens"].tolist(),
        pb.decode.beam(model, prompts, beams=6, **options)["tokens"].tolist(),
    ]
    shares = [torch.tensor([distinct(drafts) for drafts in found], dtype=torch.float64) for found in lists]
    text = f"diverse beams differ more than beams of the same number ({float(shares[0].mean()):.2f} of their 3-grams are different ones, {float(shares[1].mean()):.2f})"
    return Claim(text, *maths.paired_interval(*shares)[:3], 0.0, "share of 3-grams")


def distinct(drafts: list[list[int]], n: int = 3) -> float:
    """The share of different n-grams among all of several texts."""
    grams = [tuple(row[at : at + n]) for row in drafts for at in range(len(row) - n + 1) if min(row[at : at + n]) >= 0]
    return len(set(grams)) / max(1, len(grams))


@claim("shen2024", "comparison")
def shen2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the best of three superposed drafts is at least as likely as a nucleus sample, at a third of three samples' passes."""
    import torch

    from patchbay import maths

    prompts = [list(ids) for ids in pb.tasks.facts_in_memory(model, N, seed=seed).clean]
    found = pb.decode.superposed(model, prompts, max_new_tokens=NEW)
    drawn = pb.decode.rerank(model, prompts, scorer="logp", pool=[1, 1, NEW], max_new_tokens=NEW, seed=seed)
    best, sample = ((one["logp"].nansum(-1) / (~one["logp"].isnan()).sum(-1)) for one in (found, drawn))
    own, other = best.nan_to_num(-99.0).amax(1).double(), sample[:, 0].double()
    text = (
        f"the best of three superposed drafts is likelier than a nucleus sample ({float(own.mean()):.2f} nats a token, "
        f"{float(other.mean()):.2f}), in {int(found['fed'])} token positions against {int(drawn['fed'])} for one sample and its scoring"
    )
    assert torch.isfinite(other).all()
    return Claim(text, *maths.paired_interval(own, other)[:3], 0.0, "nats per token")


@claim("krishna2022", "comparison")
def krishna2022(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the model prefers a text's own continuation to those of nine other texts by what the prompt adds to it."""
    import torch

    from patchbay import maths
    from patchbay.decode._loop import asked
    from patchbay.decode._scorers import pmi

    task = pb.tasks.laundry_list(model, N, seed=seed)
    texts = [list(ids) for ids in task.clean]
    halves = [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in texts]
    call = asked(model, [prompt for prompt, _ in halves], 1, [], 10)
    first = []
    for at in range(len(texts)):
        others = [halves[(at + step) % len(halves)][1] for step in range(10)]
        scores = pmi(call, at, others)
        first.append(float(max(range(10), key=lambda i: scores[i]) == 0))
    shares = torch.tensor(first, dtype=torch.float64)
    text = "by what the prompt adds to its log-probability, a text's own continuation comes first among ten"
    return Claim(text, *maths.bootstrap_interval(shares)[:3], 0.1, "share of texts")


@claim("hewitt2024", "identity")
def hewitt2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if every new token raises the odds of an end by e^.06, whatever the text."""
    import torch

    from patchbay.decode._rules import SLOPE, Rules

    prompts = [list(ids) for ids in pb.tasks.facts_in_memory(model, N, seed=seed).clean]
    end, other, worst = 2 % model.vocab_size, 3 % model.vocab_size, 0.0
    for ids in prompts:
        logits = pb.run(model, [ids], logits="last").last_logits.double()
        rules = Rules(len(ids) - 3, [end], penalty=0.0)
        law = [torch.log_softmax(one, -1)[0] for one in (rules(torch.tensor([ids]), logits), logits)]
        gain = float(law[0][end] - law[0][other] - law[1][end] + law[1][other])
        worst = max(worst, abs(gain - 3 * SLOPE))
    text = "after three tokens of a response the odds of an end have risen by e^.18"
    return Claim(text, worst, worst, worst, 1e-6, "nats", above=False)


@claim("lu2024", "mechanism", "tiny-llama")
def lu2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if a secret in a text is said more often where each head may choose one chunk than where it reads the forced ones alone."""
    import torch

    from patchbay import maths

    task = pb.tasks.needle_retrieval(model, N, seed=seed)
    prompts, right = [list(ids) for ids in task.clean], torch.tensor(task.right)
    options: dict[str, Any] = {"window": 8, "max_new_tokens": 1, "ends": []}
    own, forced = (
        (pb.decode.longheads(model, prompts, chunks=n, **options)["tokens"][:, 0, 0] == right).double() for n in (4, 3)
    )
    text = (
        f"heads that choose one chunk of eight tokens beside the first and the last two find what is asked ({float(own.mean()):.0%}; "
        f"{float(forced.mean()):.0%} without the choice)"
    )
    return Claim(text, *maths.paired_interval(own, forced)[:3], 0.0, "share of prompts")


@claim("goel2025", "comparison")
def goel2025(model: pb.Model, seed: int) -> Claim:
    """Confirmed if a draft of a quarter of the vocabulary, by what the model writes, gains more per byte than one with all of it.

    The draft is the model without its last layer. What is gained is tokens per pass over the bytes of weights that a token costs.
    """
    import torch

    from patchbay import maths
    from patchbay.decode.speculative import bytes_read

    prompts = [list(ids) for ids in pb.tasks.facts_in_memory(model, N, seed=seed).clean]
    others = [list(ids) for ids in pb.tasks.facts_in_memory(model, N, seed=seed + 1).clean]
    last, ahead = model.n_layers - 1, 4
    draft = pb.turn.scale([f"L{last}.attn", f"L{last}.mlp"], 0.0, model=model)  # type: ignore[list-item]
    written = pb.decode.samplers(model, others, chain=[], max_new_tokens=NEW, ends=[], seed=seed)
    kept = pb.decode.speculative.kept(written, model.vocab_size // 4)  # type: ignore[attr-defined]
    gains = []
    for held, share in ((kept, len(kept) / model.vocab_size), (None, 1.0)):
        found = pb.decode.speculative(
            model, draft, prompts, ahead=ahead, kept=held, chain=[], max_new_tokens=NEW, seed=seed
        )
        cost = bytes_read(model, share) / bytes_read(model)
        gains.append(found["per_pass"][:, 0].double() / (1 + ahead * cost))
    text = (
        f"trimmed to {len(kept)} of {model.vocab_size} tokens, by what the model writes, a draft gains {float(gains[0].mean()):.3f} tokens per pass and "
        f"byte, with all of them {float(gains[1].mean()):.3f}"
    )
    assert all(bool(torch.isfinite(one).all()) for one in gains)
    return Claim(text, *maths.paired_interval(*gains)[:3], 0.0, "times")


def shifted(model: pb.Model, seed: int) -> list[list[int]]:
    """Texts in a script that the model has not met: every token of its own is another one."""
    texts = pb.tasks.laundry_list(model, N, seed=seed).clean
    return [[(token + model.vocab_size // 2) % model.vocab_size for token in ids] for ids in texts]


def parts_of(model: pb.Model, seed: int) -> pb.Result:
    """What a store of such texts gains on others of them, part by part."""
    import tempfile
    from pathlib import Path

    known, held = shifted(model, seed), shifted(model, seed + 1)
    taps = [f"L{model.n_layers - 1}.mlp.in", f"L{model.n_layers - 1}.resid_out"]
    with tempfile.TemporaryDirectory() as folder:
        pb.run(model, known, taps=taps, folder=Path(folder) / "store")
        held = [text for text in held if text not in known]
        return pb.decode.knn_parts(model, str(Path(folder) / "store"), held, seed=seed)


@claim("khandelwal2020", "comparison")
def khandelwal2020(model: pb.Model, seed: int) -> Claim:
    """Confirmed if held-out text of a kind that the model has not met is foretold better with a store of such texts."""
    found = parts_of(model, seed)
    text = f"with a store of texts of a script that it has not met, the model's loss on others goes from {float(found['loss'][0]):.2f} to {float(found['loss'][1]):.2f} nats a token"
    return Claim(text, float(found["gain"][1]), float(found["low"][1]), float(found["high"][1]), 0.0, "nats per token")


@claim("xu2023", "comparison")
def xu2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if a store gains more at its best temperature than at temperature 1, one of the three causes that the paper names."""
    from patchbay import maths

    found = parts_of(model, seed)
    own, one = found["text_loss"][1].double(), found["text_loss"][3].double()
    simpler = max(float(found["gain"][-2]), float(found["gain"][-1]))
    text = (
        f"a store gains {float(found['gain'][1]):.2f} nats a token at its best temperature, {float(found['gain'][3]):.2f} at 1; searched in "
        f"cells {float(found['gain'][4]):.2f}, the stream as key {float(found['gain'][2]):.2f}, one mean key a token {float(found['gain'][5]):.2f}, "
        f"no store at all {simpler:.2f}"
    )
    return Claim(text, *maths.paired_interval(one, own)[:3], 0.0, "nats per token")


@claim("kirchenbauer2023", "comparison")
def kirchenbauer2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if marked text has a higher z than text of the same model and chance without the mark."""
    prompts = [list(ids) for ids in pb.tasks.facts_in_memory(model, N, seed=seed).clean]
    found = pb.decode.watermark(model, prompts, max_new_tokens=NEW, seed=seed)
    rate = found["rate"].tolist()
    text = (
        f"of texts of {NEW} tokens {rate[0]:.0%} are found at z above 3 with the mark and {rate[1]:.0%} without; there z is "
        f"{float(found['null_mean']):.2f} with a spread of {float(found['null_spread']):.2f}, where the detector takes 0 and 1 for granted"
    )
    return Claim(text, float(found["gap"]), float(found["gap_low"]), float(found["gap_high"]), 0.0, "z")
