"""The story finds the planted mover and inhibition head, judges on prompts that chose nothing, and says when there is nothing."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import GPT2Config, GPT2LMHeadModel

import patchbay as pb
from patchbay.cli import cli
from patchbay.draw import screen
from patchbay.model.source import built_in_names
from patchbay.signal.channel import parse_channel
from patchbay.signal.port import PatchbayError
from patchbay.stories import _lists, _turns, first_line, names, story, talking_heads
from patchbay.tiny import planted
from patchbay.tiny.planted_vocabulary import TOKEN_IDS
from patchbay.tiny.planted_vocabulary import ids as word_ids
from patchbay.tiny.twins import twin
from tests.tolerance import close


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few prompts, candidates and rivals: the steps are tested, not the power."""
    monkeypatch.setattr(talking_heads, "_prompts_for", lambda model: (6, 6))
    for name, value in {"N_CANDIDATES": 3, "N_FOUND": 16, "N_GATE": 6, "GATE_SIZES": [1, 4]}.items():
        monkeypatch.setattr(talking_heads, name, value)
    monkeypatch.setattr(_turns, "STRENGTHS", (0.0, 2.0))
    monkeypatch.setattr(_turns, "STEPS", (2.0,))


def planted_lists(sizes: tuple[int, ...] = (3, 4, 5), n: int = 12, seed: int = 0) -> _lists.Lists:
    """` the a, b, c. then b, c:` in the planted words, with marks and twins as the task has them."""
    rng, tasks, objects = random.Random(seed), [], word_ids("object")
    the, then, comma, dot, colon = (TOKEN_IDS[w] for w in (" the", " then", ",", ".", ":"))
    for size in sizes:
        rows: dict[str, list[Any]] = {
            k: [] for k in ("clean", "corrupted", "right", "wrong", "missing", "objects", "done", "index")
        }
        for _ in range(n):
            listed = rng.sample(objects, size)
            again = rng.sample(listed, size)
            missing, done = again[0], again[1:]

            def spell(first: list[int], second: list[int]) -> list[int]:
                told = [token for word in first for token in (word, comma)][:-1]
                return [the, *told, dot, then, *[t for word in second for t in (word, comma)][:-1], colon]

            rows["clean"].append(spell(listed, done))
            rows["corrupted"].append(spell(listed, [missing, *done[1:]]))
            rows["right"].append(missing)
            rows["wrong"].append(done)
            places = [1 + 2 * i for i in range(size)]
            rows["objects"].append(places)
            rows["missing"].append([places[listed.index(missing)]])
            rows["done"].append([2 * size + 2 + 2 * i for i in range(size - 1)])
            rows["index"].append(listed.index(missing))
        marks = {name: rows[name] for name in ("missing", "objects", "done")}
        labels = {"n_objects": [size] * n, "missing_index": rows["index"]}
        tasks.append(
            pb.Task(
                "laundry_list",
                rows["clean"],
                rows["right"],
                rows["wrong"],
                rows["corrupted"],
                marks=marks,
                labels=labels,
            )
        )
    halves = [task.split(1 / 3) for task in tasks]
    return _lists.Lists(*(_lists.join(list(side)) for side in zip(*halves, strict=True)), sizes, "")


@pytest.fixture(scope="module")
def inhibiting() -> tuple[pb.Model, Any]:
    made = planted.inhibition()
    return pb.load(made.model, made.tokenizer), made.truth


def test_planted(inhibiting: tuple[pb.Model, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole story on a model that does inhibit: mover, inhibition head and the channel between them are the planted ones."""
    model, truth = inhibiting
    monkeypatch.setattr(talking_heads, "ask", lambda model, *, n, seed: planted_lists())
    told = talking_heads.tell(model, report=tmp_path / "page.html", quiet=True)
    assert told["heads"]["movers"][0] == truth["mover"]
    assert told["heads"]["movers_clear"] is True
    assert truth["inhibition"] in told["heads"]["inhibition"]
    assert told["lists"]["accuracy"][3][0] > 0.9
    first = told["channels"]["candidates"][0]["channel"]
    assert first.startswith(truth["inhibition"])
    assert first.endswith(f">{truth['mover']}.q")
    assert told["judged"]["works"] is False  # it is right already: there is nothing to gain
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html"]
    assert "They do not single it out" not in (tmp_path / "page.html").read_text()


def test_silencing_the_planted_channel_costs_the_answer(inhibiting: tuple[pb.Model, Any]) -> None:
    """`rightness`, `screened` and `looks` under all components of the planted head at 0, against the head silenced at once."""
    model, truth = inhibiting
    task = planted_lists().test
    head = model.part(truth["inhibition"])
    silent = pb.turn.scale([head], 0.0)
    before, after = _lists.rightness(model, task), _lists.rightness(model, task, [silent])
    assert before.mean() > 0.9
    assert after.mean() < 0.6
    seen, unseen = (_lists.looks(model, task, [model.part(truth["mover"])], e) for e in ([], [silent]))
    assert (seen["missing"] - seen["listed"]).mean() > 0.5
    assert abs(float((unseen["missing"] - unseen["listed"]).mean())) < 0.1


def test_looks_are_sums_and_means_of_the_pattern(inhibiting: tuple[pb.Model, Any]) -> None:
    model, truth = inhibiting
    task, head = planted_lists(n=6).test, model.part(truth["mover"])
    found = _lists.looks(model, task, [head])
    port = pb.Port("attn.pattern", head.layer, head.index)
    for i in range(0, len(task), 5):
        row = pb.run(model, task[i : i + 1], taps=[port])[port][0, -1]
        missing = set(task.marks["missing"][i])
        listed = [float(row[at]) for at in task.marks["objects"][i] if at not in missing]
        assert close(float(found["missing"][0, i]), sum(float(row[at]) for at in missing), of=1.0)
        assert close(float(found["listed"][0, i]), sum(listed) / len(listed), of=1.0)


def test_screening_is_running_with_the_knob(inhibiting: tuple[pb.Model, Any]) -> None:
    model, truth = inhibiting
    task = planted_lists(n=6).dev
    head = model.part(truth["inhibition"])
    knobs = [pb.turn.channel(model, f"{head}.C{i}", strength=s, positions="last") for i in (0, 3) for s in (0.0, -3.0)]
    knobs.append(pb.turn.channel(model, f"{head}.C1", coordinate=4.0, positions="last"))
    found = _lists.screened(model, task, head, knobs)
    for row, knob in zip(found, knobs, strict=True):
        assert torch.equal(row, _lists.rightness(model, task, [knob]))


def test_rivals_are_chosen_as_the_channel_is(inhibiting: tuple[pb.Model, Any]) -> None:
    model, truth = inhibiting
    dev = planted_lists(n=6).dev
    right = _lists.rightness(model, dev)
    candidates = [parse_channel(f"{truth['inhibition']}.C{i}") for i in range(2)]
    found = _turns.search(model, dev, right, candidates, n_random=5, seed=0, quiet=True)
    assert found.n_random == 5
    assert len(found.turns) == 7 * 3
    assert found.turns[found.best].channel in candidates
    mine = [float(s) for t, s in zip(found.turns, found.share, strict=True) if t.channel in candidates]
    assert float(found.share[found.best]) == max(mine)
    assert len(found.rivals) == 19
    assert not {found.turns[i].channel for i in found.rivals} & set(candidates)
    again = _turns.search(model, dev, right, candidates, n_random=5, seed=0, quiet=True)
    assert again.rivals == found.rivals
    sizes = torch.tensor(dev.labels["n_objects"])
    by_size = torch.stack([right[sizes == n].mean() for n in sorted(set(sizes.tolist()))])
    assert found.base == pytest.approx(float(by_size.mean()))


def untrained() -> pb.Model:
    """A random model that reads the built-in models' words."""
    if "tiny" not in built_in_names():
        pytest.skip("no built-in model named tiny in this checkout")
    tokenizer = pb.load("tiny").tokenizer
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=40, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=None
    )
    return pb.load(GPT2LMHeadModel(config).eval(), tokenizer)


def test_null(tmp_path: Path) -> None:
    """A model that cannot do it: said at the head of the story; no knob is written; all lists that it can read are asked."""
    told = talking_heads.tell(untrained(), report=tmp_path / "page.html", quiet=True)
    text = (tmp_path / "page.html").read_text()
    assert "The model does not do this task" in text
    assert told["judged"]["works"] is False
    assert told["lists"]["sizes"] == (3, 4, 5)  # 40 positions
    assert "longer than the model's 40 positions" in told["lists"]["left_out"]
    assert told["judged"]["after"][0] < 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.slow  # the whole story of a trained model
def test_a_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in model: the judged numbers are those of plain runs on prompts that chose nothing; the page is of this run."""
    name = "tiny"
    if name not in built_in_names():
        pytest.skip(f"no built-in model named {name} in this checkout")
    monkeypatch.setattr(_lists, "SIZES", (3, 5, 13))
    done = CliRunner().invoke(
        cli, ["run", "talking_heads", "--model", name, "--report", str(tmp_path / "page.html"), "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["lists"]["sizes"] == [3, 5, 13]
    assert told["lists"]["accuracy"]["5"][0] == 1.0
    model = pb.load(name)
    lists = _lists.ask(model, n=6, seed=0)
    assert not set(lists.dev.clean) & set(lists.test.clean)
    turning = told["turning"]
    knob = pb.turn.channel(
        model, turning["channel"], strength=turning["strength"], coordinate=turning["coordinate"], positions="last"
    )
    for edits, key in (([], "before"), ([knob], "after")):
        said = [int(pb.run(model, [list(ids)], edits=edits).last_logits.argmax()) for ids in lists.test.clean]
        share = sum(a == b for a, b in zip(said, lists.test.right, strict=True)) / len(said)
        assert told["judged"][key][0] == pytest.approx(share)
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg") == 4
    assert not re.search(r"<(script|link|img|iframe)\b|(src|href)=\"(?!#|data:image/)", text)
    assert f"<b>{turning['chosen']}</b>" in text
    assert model.fingerprint in text


def test_it_can_be_listed_and_refuses() -> None:
    assert names() == sorted(names())
    assert {"demo", "one-layer-induction", "reversal", "talking-heads"} <= set(names())
    assert first_line("talking-heads").startswith("Talking heads: ")
    assert story("talking_heads") is talking_heads.tell
    done = CliRunner().invoke(cli, ["run", "--json"])
    assert [row["story"] for row in json.loads(done.stdout)] == names()
    done = CliRunner().invoke(cli, ["run", "talkin-heads"])
    assert done.exit_code == 2
    assert "did you mean 'talking-heads'" in done.output


def test_models_without_heads_or_words_are_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(PatchbayError, match="two layers with attention heads; this mamba model has no layer"):
        talking_heads.tell(pb.load(twin("mamba2")), report=page, quiet=True)
    with pytest.raises(PatchbayError, match="has no tokenizer"):
        talking_heads.tell(pb.load(twin("gpt2")), report=page, quiet=True)
    made = planted.null(n_layers=1)
    with pytest.raises(PatchbayError, match="attention heads in 1 layers"):
        talking_heads.tell(pb.load(made.model, made.tokenizer), report=page, quiet=True)
    with pytest.raises(PatchbayError, match="cannot write the report"):
        talking_heads.tell(untrained(), report=tmp_path, quiet=True)
    assert not page.exists()


def test_lists_that_choose_and_judge_share_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lists, "SIZES", range(3, 5))
    lists = _lists.ask(pb.load("tiny"), n=6, seed=0)
    assert len(lists.test) == 2 * len(lists.dev)
    assert not set(lists.dev.clean) & set(lists.test.clean)


def test_numbers_by_label_and_joined_tasks() -> None:
    lists = planted_lists(n=6)
    row = torch.arange(len(lists.test)).double()
    found = _lists.by_label(lists.test, "n_objects", row)
    assert [(value, count) for value, count, _ in found] == [(3, 4), (4, 4), (5, 4)]
    assert [one[0].mean for *_, one in found] == [1.5, 5.5, 9.5]
    right = torch.tensor([float(n == 4) for n in lists.test.labels["n_objects"]])
    some = _lists.known(lists.test, right, 3)
    assert set(some.labels["n_objects"]) == {4}
    assert len(some) == 3
    assert len(_lists.known(lists.test, torch.zeros(12), 100)) == 12
    assert screen.plain({"a": some.labels["n_objects"]}) == {"a": [4, 4, 4]}
