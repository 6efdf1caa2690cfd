"""Reversal: facts that were read one way are known the other way after training on permuted units, and not after plain training.

Facts are of two names of two tokens and a relation: "A is-of B". All are read in this order; half of them are read the other way, too. What
is asked is the other way of those that were read one way alone: B, the relation, and then A, both tokens right. Arms: semantic-aware
permutation training (Guo et al. 2024), which keeps, reverses or shuffles the units of a fact; next-token prediction on the same facts in the
same order; and the null, which as often reverses whole facts token by token, so that what the first sees in number and order of names is
there, but no name as it is asked for. Networks are small and drawn by seed; signals that the plain one lacks are sought by copying them from
the other one's run.

What it does not show: that language models of any size fail at this, or that permutation costs nothing on text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import patchbay as pb
from patchbay.draw import screen
from patchbay.draw.report import Section, Table
from patchbay.model.model import Model
from patchbay.signal.port import parse_part
from patchbay.stories import _lab
from patchbay.stories._lab import Story, Telling
from patchbay.tiny import lab
from patchbay.train._objectives.spt import Permuted
from patchbay.train._plan import Arm, plan_of
from patchbay.train._runs import Lab

FACTS = 40
STEPS, RATE, BATCH = 700, 3e-3, 32
ARMS = ("units permuted", "next token", "tokens reversed")


def form() -> Model:
    """The network that is trained where no other is given."""
    return lab.small(lab.FACT_VOCAB)


def tell(
    model: Model, *, seed: int = 0, report: str | Path, quiet: bool = False, n: int | None = None, folder: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Run the story on networks of this model's form; `n`: facts. Writes the page, returns the numbers."""
    story = Story("reversal", "Facts the other way round", "Is a fact that was read one way known the other way?", lab.FACT_VOCAB, _arms,
                  (_training, _asked, _where), "guo2024")  # fmt: skip
    return _lab.tell(story, model, seed=seed, report=report, quiet=quiet, n=n, folder=folder, dry_run=dry_run)


def _arms(telling: Telling) -> _lab.Arms:
    known = telling.found["facts"] = lab.facts(telling.n or FACTS, telling.seed)
    texts = lab.read_one_way(known)
    plan = plan_of({"steps": STEPS, "rate": RATE, "batch_size": BATCH, "fresh": True})
    shared = Lab(telling.model, list(texts), list(texts), plan)
    objectives = ("spt", "ntp", Permuted().null or "")
    return {arm: (shared, Arm(objective)) for arm, objective in zip(ARMS, objectives, strict=True)}


def _training(telling: Telling, quiet: bool) -> Section:
    known = telling.found["facts"]
    runs = telling.trained(_arms(telling), quiet)
    text = [
        f"{len(known)} facts are read one way, {len(known) // 2} of them the other way, too; {len(known) - len(known) // 2} are asked for the "
        f"way that was not read. {telling.seeds} seeds, {STEPS} steps of {BATCH} facts each.",
        "Loss of a fact in the order in which it was read, after training: "
        + ", ".join(
            f"{arm} {sum(float(run.scores.mean()) for run in some) / len(some):.3f}" for arm, some in runs.items()
        )
        + " nats per token.",
    ]
    rows = [[arm, *[run.losses[-1] for run in runs[arm]]] for arm in ARMS]
    columns = ("arm", *[f"seed {seed}" for seed in telling.of_seeds])
    return Section(
        "Training", text, [Table(columns, rows, "loss at the last step, nats per token")], data={"steps": STEPS}
    )


def asked(model: Model, known: list[lab.Fact]) -> tuple[Tensor, Tensor]:
    """Of each fact, whether both tokens of A follow B and the relation, and the log-probability of the first."""
    prompts = [b + r for _, r, b in known]
    first = torch.tensor([a[0] for a, _, _ in known])
    logits = pb.run(model, prompts, logits="last").last_logits.cpu()
    whole = pb.run(
        model, [[*p, a[0]] for p, (a, _, _) in zip(prompts, known, strict=True)], logits="last"
    ).last_logits.cpu()
    right = (logits.argmax(-1) == first) & (whole.argmax(-1) == torch.tensor([a[1] for a, _, _ in known]))
    return right.double(), torch.log_softmax(logits.double(), -1).gather(1, first[:, None])[:, 0]


def _asked(telling: Telling, quiet: bool) -> Section:
    known = telling.found["facts"]
    unread, read = known[len(known) // 2 :], known[: len(known) // 2]
    values: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    first: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    seen: dict[str, float] = {}
    with screen.working("asking", quiet=quiet):
        for arm in ARMS:
            for seed in telling.of_seeds:
                model = telling.opened(arm, seed)
                right, logp = asked(model, unread)
                values[arm].append(right)
                first[arm].append(logp)
                seen[arm] = seen.get(arm, 0.0) + float(asked(model, read)[0].mean()) / telling.seeds
    told = _lab.arms_section("The way that was not read", [], values, "share of facts", "next token", "reversed")
    data = told.data["reversed"]
    rates = {arm: sum(row["by_seed"]) / telling.seeds for arm, row in data.items()}
    told.text = [
        f"Both tokens right, of facts read one way alone: **{rates['units permuted']:.0%}** after units were permuted, "
        f"**{rates['next token']:.0%}** after plain training, {rates['tokens reversed']:.0%} after tokens were reversed. The first token's "
        "log-probability: " + ", ".join(f"{arm} {float(torch.stack(one).mean()):.2f}" for arm, one in first.items()) + " nats.",
        "Of facts that were read both ways: " + ", ".join(f"{arm} {share:.0%}" for arm, share in seen.items())
        + ": what an arm does not know of these it has not learned at all.",
    ]  # fmt: skip
    gap = data["units permuted"]
    _lab.judged(
        told,
        bool(gap["above"] == telling.seeds and gap["difference"][1] > 0),
        "more facts are known the way that was not read after units were permuted than after plain training, in every seed",
    )
    told.data["read_both_ways"] = seen
    return told


def _where(telling: Telling, quiet: bool) -> Section:
    """Signals of the permuted model's run in the plain one's, at the facts' other way."""
    base, tuned = (telling.opened(arm, telling.seed) for arm in ("next token", "units permuted"))
    known = telling.found["facts"]
    unread = known[len(known) // 2 :]
    prompts: Any = [b + r for _, r, b in unread]
    right: Any = [a[0] for a, _, _ in unread]
    wrong: Any = [[next(x for x in right[i + 1 :] + right[:i] if x != one)] for i, one in enumerate(right)]
    task = pb.Task("reversed facts", prompts, right, wrong).with_metric("log_probability")
    parts = [f"L{i}.{kind}" for i in range(base.n_layers) for kind in ("attn", "mlp")]
    with screen.working("copying signals", quiet=quiet):
        found = pb.prove.cross_model_patching(base, tuned, task, [parse_part(p) for p in parts], draws=1)
    rows = [[str(row["part"]), row["value"], row["p_adjusted"]] for row in found.table()]
    text = [
        f"Each part's signal of the permuted network of the first seed, copied into the plain one, at all positions: by how much the first token of A "
        f"gains. All together bring {float(found['joint'].mean()):+.2f} of {float(found['gap'].mean()):+.2f} nats.",
        "A late signal carries what earlier weights changed: this says through what the difference passes, not where it lies.",
    ]
    return Section(
        "Through which parts",
        text,
        [Table(("part", "nats", "p adjusted"), rows)],
        data={"where": {row[0]: row[1] for row in rows}},
    )
