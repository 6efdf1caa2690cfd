"""Four domains: texts of the same 48 tokens under four laws, the first token naming which, for models whose experts may come to be of one domain each.

Each law gives every token three followers with chances .7, .2 and .1, so that nobody can lose less than .80 nats a token. `train("horizontal")` or `train("vertical")`
teaches a Monet model of two layers, `train("dense")` a Llama with as many numbers in its MLPs; about a minute. `effects` switches each domain's
experts off, and as many random ones, and tells what it costs on texts that nothing was chosen on.

    python -m patchbay.tiny.domains horizontal --out my-model
"""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from patchbay.blocks import build, monet
from patchbay.errors import one_of
from patchbay.results.method import seeded

N_DOMAINS, N_TOKENS, LENGTH = 4, 48, 32
CHANCES = (0.7, 0.2, 0.1)
FLOOR = -sum(p * math.log(p) for p in CHANCES)
FORMS = (*monet.FORMS, "dense")
EXPERTS = {"experts": 32, "heads": 2, "keep": 4, "width": 8}
BATCH, BALANCE = 32, 1e-3  # rows of a step; weight of the two losses of routing


def law(domain: int) -> Tensor:
    """The three followers of each token [token, 3], likeliest first."""
    draw = torch.Generator().manual_seed(domain)
    return torch.stack([torch.randperm(N_TOKENS, generator=draw)[: len(CHANCES)] for _ in range(N_TOKENS)])


def texts(domain: int, n: int, *, seed: int) -> Tensor:
    """Ids [text, position]: the domain's own token, then its law."""
    followers, generator = law(domain), torch.Generator().manual_seed(10 * seed + domain)
    now = torch.randint(N_TOKENS, (n,), generator=generator)
    rows = [torch.full((n,), N_TOKENS + domain), now]
    while len(rows) < LENGTH:
        drawn = torch.multinomial(torch.tensor(CHANCES), n, replacement=True, generator=generator)
        rows.append(followers[rows[-1], drawn])
    return torch.stack(rows, 1)


def train(form: str, *, steps: int = 500, seed: int = 0) -> Any:
    """A model of all four domains, in evaluation mode."""
    one_of("form", form, FORMS)
    from transformers import LlamaConfig, LlamaForCausalLM

    inside = EXPERTS["experts"] * EXPERTS["width"] * 2 // 3  # as many numbers in two maps of Monet as in three of Llama
    config = LlamaConfig(
        vocab_size=N_TOKENS + N_DOMAINS, hidden_size=64, intermediate_size=inside, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with seeded(seed):
        hf: Any = LlamaForCausalLM(config) if form == "dense" else build(config, monet={**EXPERTS, "form": form})
    hf.train()
    optimiser = torch.optim.AdamW(hf.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        ids = torch.cat(
            [texts(domain, BATCH // N_DOMAINS, seed=10**6 * (seed + 1) + step) for domain in range(N_DOMAINS)]
        )
        _loss(hf, ids, form).backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return hf.eval()


def _loss(hf: Any, ids: Tensor, form: str) -> Tensor:
    if form == "dense":
        return _each(hf, ids).mean()
    with monet.watched(hf) as seen:
        loss = _each(hf, ids).mean()
    return loss + BALANCE * sum(monet.losses(seen))


def _each(hf: Any, ids: Tensor) -> Tensor:
    """Loss in nats a token of each text, the first word left out: nothing tells it."""
    logits = hf(ids).logits[:, 1:-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten(), reduction="none").view(len(ids), -1).mean(1)


class Effects(NamedTuple):
    """What experts that are off cost, in nats a token: `own` and `random` [domain, text] in the domain's own texts, `others` [domain, text] in those of the other domains.

    `loss` is that of the model as it is [domain]; `n` how many experts each domain has."""

    own: Tensor
    others: Tensor
    random: Tensor
    loss: Tensor
    n: list[int]


@torch.no_grad()
def effects(hf: Any, *, n: int = 64, times: float = 2.0, seed: int = 0) -> Effects:
    """Switch off the experts that one domain uses at least `times` as much as the next, chosen on other texts than are told of, and as many random ones."""
    chosen_on = [texts(domain, n, seed=2 * seed + 10**5) for domain in range(N_DOMAINS)]
    told = [texts(domain, n, seed=2 * seed + 1 + 10**5) for domain in range(N_DOMAINS)]
    sets = monet.own_of(torch.stack([monet.shares(hf, [one]) for one in chosen_on]), times=times)
    plain = [_each(hf, one) for one in told]
    generator = torch.Generator().manual_seed(seed)
    own, others, random = [], [], []
    for domain, pairs in enumerate(sets):
        with monet.without(hf, pairs):
            cost = [_each(hf, one) - base for one, base in zip(told, plain, strict=True)]
        own.append(cost[domain])
        others.append(torch.stack([one for at, one in enumerate(cost) if at != domain]).mean(0))
        with monet.without(hf, _random(pairs, generator)):
            random.append(_each(hf, told[domain]) - plain[domain])
    counts = [sum(map(len, pairs.values())) for pairs in sets]
    return Effects(torch.stack(own), torch.stack(others), torch.stack(random), torch.stack(plain).mean(1), counts)


def _random(pairs: monet.Pairs, generator: torch.Generator) -> monet.Pairs:
    """As many experts of each layer, any that are not these."""
    made: monet.Pairs = {}
    for at, own in pairs.items():
        taken = {i * EXPERTS["experts"] + j for i, j in own}
        order = torch.randperm(EXPERTS["experts"] ** 2, generator=generator).tolist()
        free = [one for one in order if one not in taken]
        made[at] = [divmod(one, EXPERTS["experts"]) for one in free[: len(own)]]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m patchbay.tiny.domains", description=__doc__)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--out", required=True, help="the folder that is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()
    hf = train(given.form, steps=given.steps, seed=given.seed)
    hf.save_pretrained(given.out)
    print(f"{given.out}: floor {FLOOR:.3f} nats a token")


if __name__ == "__main__":
    main()
