"""Prompt change: glosses and diffs are undone byte for byte, gains equal loops, dealt glosses are the null."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

import patchbay as pb
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, by_hand, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.prompt_change")
GLOSSES = {"hen": "bird", "red hen": "red bird", "mat": "rug"}
ITEMS: list[dict[str, Any]] = [
    {"prompt": "the red hen is on", "choices": [" a", " it"], "answer": 0},
    {"prompt": "a mat, a mate", "choices": [" a", " it"], "answer": 1},
]


def test_planted() -> None:
    """The longest entry first, whole words alone; a thousand random histories come back byte for byte."""
    assert module.glossed("the red hen", GLOSSES) == "the red hen (red bird)"
    assert module.glossed("an ice cream", {"ice": "water", "ice cream": "sweet"}) == "an ice cream (sweet)"
    assert module.glossed("a hen, mate mat", GLOSSES) == "a hen (bird), mate mat (rug)"
    assert module.unglossed("a hen (bird), mate mat (rug)", GLOSSES) == "a hen, mate mat"
    chance = random.Random(0)
    for _ in range(1000):
        history = []
        for _ in range(3):
            lines = [
                chance.choice(["", "a", "b", "-- a", "@@ -1 +1 @@", " \r", "\\ No"]) for _ in range(chance.randrange(6))
            ]
            history.append("\n".join(lines))
        assert module.undiffed(module.diffed(history)) == history
    assert module.diffed(["a\nb\nc", "a\nX\nc"])[1] == "@@ -2 +2 @@\n-b\n+X"
    assert module.diffed(["\na\n", "\na\n"])[1] == ""


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model = reader(name)
    found = pb.measure.prompt_change(model, ITEMS, glosses=GLOSSES)
    changed = ["the red hen (red bird) is on", "a mat (rug), a mate"]
    for i, row in enumerate(ITEMS):
        own = []
        for prompt in (row["prompt"], changed[i]):
            [ids] = model.encode([prompt])
            logp = [by_hand(model, model.encode([prompt + c])[0], len(ids)) for c in row["choices"]]
            own.append(logp[row["answer"]] - pb.maths.torch.tensor(logp).logsumexp(0).item())
        assert close(float(found["per_item"][i]), own[1] - own[0], of=10.0)
    told = [{**ITEMS[0], "history": ["a\nb", "a\nc"]}]
    diff = pb.measure.prompt_change(model, told, change="diff")
    given = pb.measure.prompt_change(
        model,
        [
            {
                **ITEMS[0],
                "prompt": "a\nb\na\nc\nthe red hen is on",
                "changed": "a\nb\n@@ -2 +2 @@\n-b\n+c\nthe red hen is on",
            }
        ],
        change="given",
    )
    assert close(float(diff.values), float(given.values), of=10.0)


def test_null() -> None:
    """A model that does not read: no change, with p of 1; dealt glosses are those of other words, each once."""
    found = pb.measure.prompt_change(constant({" ": 1.0, "a": 0.5, "i": 0.0, "t": 0.0}), ITEMS, glosses=GLOSSES)
    assert close(found["per_item"], 0.0, of=1.0)
    assert float(found["p"]) == 1.0
    for seed in range(5):
        dealt = module._dealt(GLOSSES, seed)
        assert sorted(dealt.values()) == sorted(GLOSSES.values())
        assert all(dealt[word] != GLOSSES[word] for word in GLOSSES)
    reads = pb.measure.prompt_change(reader("characters"), ITEMS, glosses=GLOSSES)
    assert float(reads["null"]) != float(reads.values)


def test_files_and_bad_input(tmp_path: Path) -> None:
    model, path = reader("characters"), tmp_path / "words.json"
    path.write_text(json.dumps(GLOSSES))
    one, two = (pb.measure.prompt_change(model, ITEMS, glosses=given) for given in (str(path), GLOSSES))
    assert one.values.equal(two.values)
    for given, said in (
        ({"change": "swap"}, "change='swap'; possible are dictionary, diff, given"),
        ({"glosses": None}, "glosses=None: a mapping from words to glosses"),
        ({"glosses": {"zebra": "horse"}}, "changes no prompt"),
        ({"change": "diff"}, "items, row 0 lacks the field 'history'"),
        ({"glosses": {"hen": "b) (c", "hen (b)": "c"}}, "items, row 0: two entries of the dictionary read alike"),
    ):
        with pytest.raises(pb.PatchbayError, match=said):
            pb.measure.prompt_change(model, **{"items": ITEMS, "glosses": GLOSSES, **given})
    with pytest.raises(pb.PatchbayError, match="'nonsense' begins no hunk"):
        module.undiffed(["a", "nonsense"])
