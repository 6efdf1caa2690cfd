"""Claims about knobs: what turning them does."""

from __future__ import annotations

import patchbay as pb
from patchbay.papers.claims._claim import WIDE, Claim, claim
from patchbay.papers.claims._shared import DRAWS, N, beyond_random, first_of, known_words
from patchbay.tasks import words


@claim("yu2023", "mechanism", WIDE)
def yu2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if one head's values times 4 give more answers by the text than the values of the other heads times 4, and than the
    model as it is; the head is chosen on other prompts."""
    import torch

    from patchbay import maths

    head = first_of(pb.find.fact_heads(model, pb.tasks.facts_in_context(model, N, seed=seed)))
    test = pb.tasks.facts_in_context(model, N, seed=seed + 1).with_metric("accuracy")

    def by_text(*knobs: pb.Knob) -> torch.Tensor:
        return test.score(pb.run(model, test, edits=list(knobs), logits="last").last_logits).double()  # [prompt]

    heads = [pb.Part(i, "head", j) for i in range(model.n_layers) for j in range(model.n_heads(i))]
    drawn = torch.stack([by_text(pb.turn.scale([other], 4.0)) for other in heads if other != head])  # [draw, prompt]
    own, plain = by_text(pb.turn.scale([head], 4.0)), by_text()
    ways = [maths.beyond_draws(own, drawn), maths.paired_interval(own, plain)]
    value, low, high = min(ways, key=lambda interval: interval.low)
    text = (
        f"the values of {head} times 4 move answers from memory to the text ({float(plain.mean()):.0%} to {float(own.mean()):.0%}), "
        f"more than those of the other heads do ({float(drawn.mean()):.0%})"
    )
    p = maths.draws_p(float(own.mean()), drawn.mean(1))
    return beyond_random(text, (value, low, high), p, len(drawn), "share of prompts")


@claim("mcilroyyoung2024", "identity")
def mcilroyyoung2024(model: pb.Model, seed: int) -> Claim:
    drawn = pb.tasks.repeated_tokens(model, 4 * N, seed=seed).clean
    said = [ids for ids in drawn if len(ids) > 7][:N]  # two tokens, options of two, one and two, and what follows
    prompts = [[list(ids[:2]), [list(ids[2:4]), list(ids[4:5]), list(ids[5:7])], list(ids[7:])] for ids in said]
    found = pb.turn.set_prompt(model, prompts, seed=seed)
    spread = float(found["spread"].max())
    text = f"logits after a set prompt do not depend on the order (of plain prompts they do, by {float(found['plain_spread'].mean()):.2g})"
    return Claim(text, spread, spread, spread, 5e-5, "logits", above=False)


@claim("rimsky2024", "mechanism")
def rimsky2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the knob moves the twins towards the prompts' answers further than random directions of its length do, on prompts
    that chose nothing."""
    import torch

    from patchbay import maths

    [own] = pb.turn.steer(model, pb.tasks.indirect_object(model, 2 * N, seed=seed), seed=seed).edits
    fresh = pb.tasks.indirect_object(model, N, seed=seed + 1)
    twins = [list(ids) for ids in fresh.corrupted or ()]

    def score(*edits: pb.Edit) -> torch.Tensor:
        return fresh.sign * fresh.score(pb.run(model, twins, edits=list(edits), logits="last").last_logits).double()

    vector = torch.as_tensor(own.value)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(DRAWS, len(vector), generator=generator)
    directions *= vector.norm() / directions.norm(dim=-1, keepdim=True)
    plain = score()
    drawn = torch.stack([score(pb.add(own.port, one)) - plain for one in directions])  # [draw, prompt]
    gain = score(own) - plain
    text = (
        f"the mean difference of prompts and their twins, added at layer {own.port.layer}, moves the answer of other twins, more than "
        "random directions"
    )
    p = maths.draws_p(float(gain.mean()), drawn.mean(1))
    found = maths.beyond_draws(gain, drawn)
    return beyond_random(text, (found.mean, found.low, found.high), p, DRAWS, "logits")


@claim("chen2025", "mechanism")
def chen2025(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the mean difference of answers to series of numbers and to other series makes answers to other series say numbers, more
    than random directions of its length do, on prompts that chose nothing."""
    import torch

    from patchbay import maths

    numbers = [model.token_id(word) for word in known_words(model, words.NUMBERS)]

    def series(at: int, n: int) -> tuple[list[list[int]], list[list[int]]]:
        task = pb.tasks.successor(model, n, seed=at)
        kinds = zip(task.clean, task.labels["kind"], strict=True)
        said = [(list(ids), kind == "numbers") for ids, kind in kinds]
        return [ids for ids, own in said if own], [ids for ids, own in said if not own]

    [own] = pb.turn.persona_vector(model, *series(seed, 2 * N), numbers, max_new_tokens=4, draws=1, seed=seed).edits
    others = series(seed + 1, N)[1]

    def expressed(*edits: pb.Edit) -> torch.Tensor:
        trace = pb.run(model, others, edits=list(edits), max_new_tokens=4)
        ends = zip(trace.logits, trace.prompt_lengths.tolist(), trace.lengths.tolist(), strict=True)
        laws = [row[first - 1 : end - 1].double().softmax(-1) for row, first, end in ends]
        return torch.stack([law[:, numbers].sum(-1).mean() for law in laws])

    vector, plain = torch.as_tensor(own.value), expressed()
    directions = torch.randn(DRAWS // 2, len(vector), generator=torch.Generator().manual_seed(seed))
    directions *= vector.norm() / directions.norm(dim=-1, keepdim=True)
    drawn = torch.stack([expressed(pb.add(own.port, one, positions="predicting")) - plain for one in directions])
    gain = expressed(own) - plain
    text = (
        f"the mean difference of answers with and without numbers, added at layer {own.port.layer}, makes answers to letters, days and months "
        "say numbers, more than random directions (a class of tokens, no trait of character)"
    )
    p, found = maths.draws_p(float(gain.mean()), drawn.mean(1)), maths.beyond_draws(gain, drawn)
    return beyond_random(text, (found.mean, found.low, found.high), p, DRAWS // 2, "probability")
