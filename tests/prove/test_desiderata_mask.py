"""Desiderata masks: two heads needed together, at several seeds; the role that is asked for; equals plain loops."""

from __future__ import annotations

import importlib
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.tiny import planted, twins
from patchbay.tiny.planted_canvas import Canvas
from patchbay.tiny.planted_vocabulary import ids, tokenizer
from tests.shares import by_turns
from tests.tolerance import close

desiderata_mask: Any = importlib.import_module("patchbay.prove.desiderata_mask")  # the file; the name is its method
DAYS, MONTHS, SUMS = ids("day")[:3], ids("month")[:3], ids("number")[:9]
FILLER = ids("name") + ids("object")


def conjunction(form: Any = "gpt2", seed: int = 0, noise: float = 0.002) -> tuple[pb.Model, list[str]]:
    """Two last-layer heads, one copies the day in the prompt, one the month; each of nine numbers is read off a pair.

    A head alone from another prompt gives a pair of two prompts: only both together give the other prompt's number.
    """
    canvas = Canvas(form, seed, noise=noise)
    words, flags = canvas.take(canvas.n_vocab), canvas.take(2)
    carried = torch.zeros(canvas.n_vocab, 2)
    carried[DAYS, 0], carried[MONTHS, 1] = 1.0, 1.0
    canvas.embed(words + carried @ flags)
    slot, heads = canvas.slots(1), []
    for flag, kind in zip(flags, (DAYS, MONTHS), strict=True):
        heads.append(canvas.pick_head(1))
        q, k = 25.0 * canvas.one[:, None] * slot, flag[:, None] * slot
        canvas.set_head(1, heads[-1], q=q, k=k, v=words[kind].T, o=2.0 * words[kind])
    rows = words.clone()
    for i, number in enumerate(SUMS):
        rows[number] = 6.0 * (words[DAYS[i // 3]] + words[MONTHS[i % 3]])
    canvas.unembed(rows)
    return pb.load(canvas.model, tokenizer()), sorted(f"L1.H{head}" for head in heads)


def pairs(n: int = 16, seed: int = 0) -> pb.Task:
    """A day and a month among other words; the twin has another day and another month there."""
    rng = random.Random(seed)
    clean, corrupted, right, wrong = [], [], [], []
    for _ in range(n):
        day, other_day = rng.sample(range(3), 2)
        month, other_month = rng.sample(range(3), 2)
        row = rng.sample(FILLER, 8)
        a, b = rng.sample(range(7), 2)
        twin = list(row)
        row[a], row[b] = DAYS[day], MONTHS[month]
        twin[a], twin[b] = DAYS[other_day], MONTHS[other_month]
        clean.append(row)
        corrupted.append(twin)
        right.append(SUMS[3 * day + month])
        wrong.append([SUMS[3 * other_day + other_month]])
    return pb.Task("pairs", clean, right, wrong, corrupted)


@pytest.mark.parametrize("form", by_turns(["gpt2", "llama"], of=2, start=1))
def test_planted(form: Any) -> None:
    """Exactly the two heads, at three seeds of the split and of the model, with the paper's settings."""
    for seed in (0, 1, 2):
        model, heads = conjunction(form, seed)
        result = pb.prove.desiderata_mask(model, pairs(24, seed), steps=12, draws=5, seed=seed)
        assert [str(part) for part in sorted(result.highlights)] == heads
        assert sorted(str(part) for part in result.top(2)) == heads
        assert result["chosen"].sum() == 2
        assert result["accuracy"] == result["accuracy_low"] == result["accuracy_all"] == 1.0
        assert result["accuracy_base"] == 0.0
        assert result["gain_low"] > 10
        assert result["random"].abs().max() < 8  # a draw may hold one of the two
        assert result["difference"] > 4
        assert result["difference_low"].isnan() == (len(result["random"]) == 1), "one draw says nothing of the spread"
        assert result["p"] == pytest.approx(1 / (1 + len(result["random"])))
        again = pb.prove.desiderata_mask(model, pairs(24, seed), steps=12, draws=1, seed=seed + 10)
        assert torch.equal(again["chosen"], result["chosen"])
    last = pb.prove.desiderata_mask(model, pairs(24), steps=12, draws=1, positions="last")
    assert torch.equal(last["chosen"], result["chosen"])


def test_a_mask_acts_where_it_was_asked() -> None:
    """At the last position alone, or at all of them: the plain runs of edits written by hand, which differ."""
    model, ids = pb.load("tiny"), [[5, 6, 7, 8]]
    heads = [head.part for head in model.layers[1].heads]
    m = torch.linspace(0.0, 1.0, len(heads))
    source = {1: torch.zeros(len(heads), model.d_head(1))}
    seen = []
    for asked, positions in (("last", "last"), ("all", None)):
        edits = desiderata_mask.Mask(model, heads, asked).edits(m, source)
        plain = [pb.scale(head.z, float(m[i]), positions=positions) for i, head in enumerate(model.layers[1].heads)]
        logits = [pb.run(model, ids, edits=some, logits="last").last_logits for some in (edits, plain)]
        assert close(*logits)
        seen.append(logits[0])
    assert not close(*seen)


def roles(n: int = 12, seed: int = 0) -> tuple[pb.Task, pb.Task]:
    """Two desiderata for `a b c ... a ->` b. Value: what followed was x, say x. Place: the asked word stood elsewhere, before
    x; say what stands after that place in the base, which is not what the source says."""
    rng = random.Random(seed)
    tasks: dict[str, list[list[Any]]] = {"value": [[], [], []], "place": [[], [], []]}
    for _ in range(n):
        row = rng.sample(range(3, 64), 9)
        x = row.pop()
        j, elsewhere = sorted(rng.sample(range(0, 7, 2), 2), key=lambda _: rng.random())
        base = [*row, row[j]]
        source = list(base)
        source[j + 1] = x
        for side, item in zip(tasks["value"], (source, base, x), strict=True):
            side.append(item)
        source = list(base)
        source[j], source[elsewhere], source[elsewhere + 1] = row[elsewhere], row[j], x
        for side, item in zip(tasks["place"], (source, base, row[elsewhere + 1]), strict=True):
            side.append(item)
    return tuple(  # type: ignore[return-value]
        pb.Task(name, clean, right, corrupted=corrupted, metric="log_probability")
        for name, (clean, corrupted, right) in tasks.items()
    )


def test_planted_roles() -> None:
    """In the induction circuit the value is the induction head's and the place the previous-token head's. Its attention is
    made softer, since a saturated one gives a mask on what it reads no gradient."""
    built = planted.induction(seed=1, noise=0.002)
    hf: Any = built.model
    d, head = 64, int(built.truth["induction"][-1])
    with torch.no_grad():
        hf.transformer.h[1].attn.c_attn.weight[:, head * d : head * d + d] *= 0.15
    model = pb.load(hf, built.tokenizer)
    found = [pb.prove.desiderata_mask(model, task, steps=15, draws=2) for task in roles()]
    assert [str(part) for part in found[0].highlights] == [built.truth["induction"]]
    assert [str(part) for part in found[1].highlights] == [built.truth["previous_token"]]
    assert min(float(one["accuracy"]) for one in found) > 0.8  # 1 with the attention as it was planted
    assert max(float(one["accuracy_base"]) for one in found) == 0.0


def test_several_desiderata_ask_for_both() -> None:
    """Where only the day changes the day's head is enough, and where the month does the month's; together, both."""
    model, heads = conjunction(seed=3)
    both = pairs(24, seed=3)
    sides = []
    for kind in (DAYS, MONTHS):
        base = [
            [s if s in kind else b for s, b in zip(*two, strict=True)]
            for two in zip(both.clean, both.corrupted, strict=True)
        ]
        right = [SUMS[3 * DAYS.index(next(t for t in row if t in DAYS)) + MONTHS.index(next(t for t in row if t in MONTHS))] for row in base]  # fmt: skip
        sides.append(pb.Task("day" if kind is DAYS else "month", base, right, both.wrong, both.corrupted))
    alone = [pb.prove.desiderata_mask(model, side, steps=12, draws=1) for side in sides]
    assert sorted(str(part) for one in alone for part in one.highlights) == heads
    assert [one["chosen"].sum() for one in alone] == [1.0, 1.0]
    result = pb.prove.desiderata_mask(model, sides, steps=12, draws=1)
    rows = {row["task"]: row for row in result.tables["desiderata"]}
    assert {name: row["prompts"] for name, row in rows.items()} == {"day": 12, "month": 12}
    again = pb.replay(result, model)
    assert again, str(again)


def forward(hf: Any, ids_: list[int], mask: Tensor, source: dict[int, Tensor]) -> Tensor:
    """Last logits of a GPT-2 whose heads are blended, plain hooks on the input of c_proj."""
    handles = []
    for layer, block in enumerate(hf.transformer.h):

        def blend(_: Any, args: Any, layer: int = layer) -> Any:
            z = args[0]
            d = z.shape[-1] // 4
            m = mask[4 * layer : 4 * layer + 4].repeat_interleave(d)
            return (m * z + (1 - m) * source[layer],)

        handles.append(block.attn.c_proj.register_forward_pre_hook(blend))
    out = hf(torch.tensor([ids_])).logits[0, -1]
    for handle in handles:
        handle.remove()
    return out


def test_reference() -> None:
    """The whole procedure as loops: loss, Adam by hand, clamping, rounding, and which mask is kept."""
    model, _ = conjunction(seed=4, noise=0.05)
    task = pairs(12, seed=4)
    result = pb.prove.desiderata_mask(model, task, penalty=0.05, steps=9, draws=1, seed=2, batch_size=2)
    dev, test = task.split(0.5, 2)
    train, valid = dev.split(0.5, 2)
    hf: Any = model.hf

    def sources(some: pb.Task) -> list[dict[int, Tensor]]:
        found = []
        for row in some.clean:
            seen: dict[int, Tensor] = {}
            handles = [
                block.attn.c_proj.register_forward_pre_hook(
                    lambda _, a, at=at, seen=seen: seen.update({at: a[0].detach()})
                )
                for at, block in enumerate(hf.transformer.h)
            ]
            with torch.no_grad():
                hf(torch.tensor([list(row)]))
            for handle in handles:
                handle.remove()
            found.append(seen)
        return found

    def logits(some: pb.Task, mask: Tensor) -> list[Tensor]:
        return [forward(hf, list(row), mask, s) for row, s in zip(some.corrupted or (), sources(some), strict=True)]

    def accuracy(some: pb.Task, mask: Tensor) -> float:
        with torch.no_grad():
            return sum(
                float(x.argmax() == right) for x, right in zip(logits(some, mask), some.right, strict=True)
            ) / len(some)

    mask = torch.ones(8, requires_grad=True)
    first, second = torch.zeros(8), torch.zeros(8)
    best: tuple[float, int, Tensor] | None = None
    losses = []
    for step in range(1, 11):
        rounded = (mask.detach() >= 0.5).float()
        now = accuracy(valid, rounded)
        n = int(8 - rounded.sum())
        if best is None or now > best[0] or (now == best[0] and n < best[1]):
            best = (now, n, mask.detach().clone())
        if step == 10:
            break
        loss = -torch.stack([x[right] for x, right in zip(logits(train, mask), train.right, strict=True)]).mean()
        loss = loss + 0.05 * (1 - mask).sum()
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, mask)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        change = 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        mask = (mask.detach() - change).clamp(0, 1).requires_grad_()
    assert best is not None
    assert close(result["weight"].flatten().tolist(), (1 - best[2]).tolist(), of=1.0)
    assert float(result["accuracy_validation"]) == pytest.approx(best[0])
    assert [row["loss"] for row in result.tables["steps"][:-1]] == pytest.approx(losses, abs=1e-3)
    kept = (best[2] >= 0.5).float()
    assert float(result["accuracy"]) == pytest.approx(accuracy(test, kept))
    with torch.no_grad():
        rise = [
            float(a[right] - b[right])
            for a, b, right in zip(logits(test, kept), logits(test, torch.ones(8)), test.right, strict=True)
        ]
    assert close(float(result["gain"]), sum(rise) / len(rise), of=1.0)
    assert float(result["gain"]) > 5


def test_of_equals_the_fewest_heads_are_kept_also_when_they_come_later() -> None:
    """A stand-in for the model: head 0 is wanted throughout, head 1 in the first steps only; head 0 alone is enough."""

    class Drifting(desiderata_mask.Mask):
        def __init__(self) -> None:
            self.heads = [pb.Part(0, "head", 0), pb.Part(0, "head", 1)]
            self.model: Any = SimpleNamespace(dtype=torch.float32)
            self.calls = 0

        def logits(self, m: Tensor, some: desiderata_mask.Some, grad: bool = False) -> Tensor:
            self.calls += 1
            return (-m[0] - (m[1] if self.calls <= 7 else -m[1])).reshape(1, 1)

        def scores(self, chosen: Any, pieces: Any) -> tuple[Tensor, Tensor]:
            return torch.tensor([float(self.heads[0] in chosen)]), torch.zeros(1)

    some = desiderata_mask.Some([[1]], {}, torch.tensor([0]), 0)
    kept, rows = desiderata_mask._learn(Drifting(), [some], [some], 0.01, 30)
    assert {row["n_heads"] for row in rows} == {0, 1, 2}
    assert next(row["n_heads"] for row in rows if row["accuracy"] == 1.0) == 2  # the first that is right is not the one
    assert (kept.accuracy, kept.n_heads) == (1.0, 1)
    assert (kept.mask < 0.5).tolist() == [True, False]


def test_null() -> None:
    """A random model: no mask says the right answer more often than none does, so none is returned."""
    for seed in (0, 1):
        built = planted.null(seed=seed)
        model = pb.load(built.model, built.tokenizer)
        result = pb.prove.desiderata_mask(model, pairs(16, seed), penalty=0.0, steps=8, draws=3)
        assert result["chosen"].sum() == 0
        assert list(result.highlights) == []
        assert result["gain"] == 0.0
        assert result["p"] == 1.0
        assert "no heads" in result.notes[0]
        assert result.tables["steps"][-1]["n_heads"] > 0  # it did look at some


def test_errors_say_what_is_possible() -> None:
    model, _ = conjunction()
    with pytest.raises(pb.PatchbayError, match="has 3 prompts.*4 or more"):
        pb.prove.desiderata_mask(model, pairs(3))
    with pytest.raises(pb.PatchbayError, match="positions='each'; possible are all, last"):
        pb.prove.desiderata_mask(model, pairs(4), positions="each")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="penalty=-1"):
        pb.prove.desiderata_mask(model, pairs(4), penalty=-1.0)
    with pytest.raises(pb.PatchbayError, match="no corrupted twins"):
        pb.prove.desiderata_mask(model, pb.Task("bare", pairs(4).clean, pairs(4).right, pairs(4).wrong))
    with pytest.raises(pb.PatchbayError, match="takes a Task|takes.*a Task, got list"):
        pb.prove.desiderata_mask(model, [])
    with pytest.raises(pb.PatchbayError, match="takes a Task, got list"):
        pb.prove.desiderata_mask(model, ["value"])  # type: ignore[list-item]


def test_the_same_variables_whatever_was_found() -> None:
    """No heads, or more than leave a random control: the variables are there, without values where there are none."""
    module = desiderata_mask
    model = pb.load(twins.twin("gpt2"))
    mask = module.Mask(model, module._heads(model), "all")
    ready = module._prepare(model, [pairs(8, 0)], mask, 8)
    found = [module._compare(model, mask, chosen, ready, 3, 0)[0] for chosen in ([], mask.heads[:2], mask.heads)]
    assert found[0].keys() == found[1].keys() == found[2].keys()
    assert found[2]["p"][0] != found[2]["p"][0]
    assert 0.25 <= found[1]["p"][0] <= 1.0
