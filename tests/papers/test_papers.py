"""The catalogue as people meet it: search, one paper, and a claim with its verdict."""

from __future__ import annotations

import dis
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from click.testing import CliRunner

import patchbay as pb
from patchbay.cli import cli
from patchbay.papers import catalogue, claims
from patchbay.papers.claims import Checked, Claim
from patchbay.papers.claims._claim import CLAIMS, Entry
from patchbay.papers.claims._shared import against, beyond_random, one_more, student, untrained
from patchbay.signal.port import PatchbayError
from patchbay.tiny.twins import twin
from tests.measure.words import tokenizer
from tests.shares import by_turns


def ask(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["papers", *words])
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("low", "high", "above", "verdict"),
    [
        (0.6, 0.9, True, "confirmed"),
        (0.1, 0.4, True, "not confirmed"),
        (0.4, 0.6, True, "inconclusive"),
        (0.4, 0.8, True, "inconclusive"),
        (0.1, 0.4, False, "confirmed"),
        (0.6, 0.9, False, "not confirmed"),
        (0.4, 0.6, False, "inconclusive"),
        (math.nan, 0.9, True, "inconclusive"),
    ],
)
def test_the_verdict_is_the_intervals(low: float, high: float, above: bool, verdict: str) -> None:
    assert Claim("x", (low + high) / 2, low, high, 0.5, "share", above).verdict == verdict


def test_a_claim_without_a_check_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(PatchbayError, match="no claim of 'agerri2022' can be run; those that can are"):
        claims.known("agerri2022")


def test_a_claim_is_confirmed_where_it_holds_and_not_where_nothing_was_learned(tmp_path: Path) -> None:
    found = claims.check("olsson2022", pb.load("tiny"))
    assert found.verdict == "confirmed"
    assert str(catalogue.paper("olsson2022")["measured"]).startswith("confirmed: ")
    assert all(run.excess[1] > found.limit for run in found.runs if isinstance(run, Claim))
    twin("gpt2").save_pretrained(tmp_path)
    tokenizer("characters").save_pretrained(tmp_path)
    code, text = ask("run", "olsson2022", "--model", str(tmp_path))
    assert code == 1
    assert "not confirmed" in text or "inconclusive" in text
    told = json.loads(ask("run", "olsson2022", "--json")[1])
    assert told["verdict"] == "confirmed"


def test_claims_that_cannot_be_asked_of_a_model_are_refused() -> None:
    with pytest.raises(PatchbayError, match="attn.pattern"):
        claims.check("olsson2022", pb.load(twin("mamba2")))
    with pytest.raises(PatchbayError, match="tokenizer"):
        claims.check("su2022", pb.load(twin("gpt2")))
    with pytest.raises(PatchbayError, match="needs neurons"):
        claims.check("liu2025b", pb.load("tiny-moe"))


@pytest.mark.parametrize("key", ["nostalgebraist2020", "olsson2022"])
def test_a_row_holds_what_its_command_finds(key: str) -> None:
    found = claims.known(key).measure(pb.load("tiny"), 0)
    row = str(catalogue.paper(key)["measured"])
    assert float(row.split(": ")[1].split()[0]) == pytest.approx(found.value, rel=0.02)


@pytest.mark.parametrize("key", by_turns(["nostalgebraist2020", "olsson2022"], of=2, start=1))
def test_an_untrained_network_confirms_nothing_that_is_learned(key: str) -> None:
    assert claims.check(key, untrained(pb.load("tiny"), 1)).verdict != "confirmed"


def test_a_claim_is_checked_with_three_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with other prompts, and an untrained network of its own weights beside it."""
    asked: list[tuple[str, int]] = []

    def measure(model: pb.Model, seed: int) -> Claim:
        asked.append((model.fingerprint, seed))
        return made(1.0)

    monkeypatch.setitem(CLAIMS, "nobody2024", Entry(measure, "mechanism", "tiny"))
    model = pb.load(twin("gpt2"))
    found = claims.check("nobody2024", model, seed=4)
    assert [seed for _, seed in asked] == [*found.seeds] * 2
    assert len(set(found.seeds)) == 3
    monkeypatch.setitem(CLAIMS, "nobody2024", Entry(measure, "made", "tiny", 5))  # networks that are trained
    own = claims.check("nobody2024", model)
    assert own.seeds == (0, 10, 20, 30, 40)
    assert [name for name, _ in asked[6:]] == [model.fingerprint] * 5, (
        "and no untrained network, which would say the same"
    )
    assert own.twins == ()
    assert "untrained" not in own.numbers() + "".join(own.told())
    assert {name for name, _ in asked[:3]} == {model.fingerprint}
    assert len({name for name, _ in asked[:6]}) == 4, "three other networks"


def made(value: float, half: float = 0.1, **given: Any) -> Claim:
    return Claim("x", value, value - half, value + half, 0.0, "logits", **given)


def checked(kind: Any, runs: list[Any], twins: list[Any]) -> Checked:
    return Checked("x", kind, (0, 10, 20), tuple(runs), tuple(twins))


def test_a_mechanism_is_confirmed_only_beyond_untrained_networks() -> None:
    """Three seeds at 1 +- .1: beyond networks at 0, not beyond networks at .8, whose limit is .8 + 2 * .1, nor where these vary."""
    runs = [made(1.0)] * 3
    assert checked("mechanism", runs, [made(0.0)] * 3).limit == pytest.approx(0.2)
    assert checked("mechanism", runs, [made(0.0)] * 3).verdict == "confirmed"
    assert checked("mechanism", runs, [made(0.8)] * 3).limit == pytest.approx(1.0)
    assert checked("mechanism", runs, [made(0.8)] * 3).verdict == "inconclusive"
    assert checked("mechanism", runs, [made(1.2)] * 3).verdict == "not confirmed"
    spread = [made(0.0, 0.0), made(-0.3, 0.0), made(0.3, 0.0)]
    assert checked("mechanism", runs, spread).limit == pytest.approx(2 * 1.96 * 0.3)
    assert checked("mechanism", runs, spread).verdict == "not confirmed"
    assert checked("mechanism", runs, ["cannot be asked"] * 3).verdict == "confirmed"
    below = [Claim("x", -1.0, -1.1, -0.9, 0.0, "nats", above=False)] * 3
    assert (
        checked("mechanism", below, [Claim("x", 0.0, -0.1, 0.1, 0.0, "nats", above=False)] * 3).verdict == "confirmed"
    )
    assert (
        checked("mechanism", below, [Claim("x", -0.9, -1.0, -0.8, 0.0, "nats", above=False)] * 3).verdict != "confirmed"
    )


def test_every_seed_counts_and_kinds_differ_in_what_untrained_networks_say() -> None:
    assert checked("comparison", [made(1.0), made(1.0), made(0.05)], [made(1.0)] * 3).verdict == "inconclusive"
    assert checked("comparison", [made(1.0)] * 3, [made(1.0)] * 3).verdict == "confirmed"
    assert checked("comparison", [made(1.0), "refused", made(1.0)], [made(1.0)] * 3).verdict == "inconclusive"
    assert checked("comparison", [made(-1.0)] * 3, [made(1.0)] * 3).verdict == "not confirmed"
    assert checked("made", [made(1.0)] * 3, []).verdict == "confirmed"
    assert checked("made", [made(1.0), made(-1.0), made(1.0)], []).verdict == "inconclusive"
    assert checked("identity", [made(1.0)] * 3, [made(1.0)] * 3).verdict == "confirmed"
    assert checked("identity", [made(1.0)] * 3, [made(-1.0)] * 3).verdict == "inconclusive"
    few = [made(1.0, untestable="9 different random sets: p is at least 0.1")] * 3
    assert checked("mechanism", few, [made(0.0)] * 3).verdict == "not testable here"
    assert "9 different random sets" in checked("mechanism", few, [made(0.0)] * 3).numbers()


def test_few_random_sets_are_no_proof_and_a_high_p_confirms_nothing() -> None:
    assert beyond_random("x", (1.0, 0.5, 1.5), 0.1, 9, "logits").verdict == "not testable here"
    assert beyond_random("x", (1.0, 0.5, 1.5), 0.05, 19, "logits").verdict == "confirmed"
    assert beyond_random("x", (1.0, 0.5, 1.5), 0.06, 40, "logits").verdict == "inconclusive"
    assert beyond_random("x", (-1.0, -1.5, -0.5), 1.0, 40, "logits").verdict == "not confirmed"


def test_one_more_value_stays_below_in_all_but_a_fortieth() -> None:
    """Of sets of 20 normal values and one more: the share of those beyond the limit, 2.5 % +- 3 standard errors of 4,000."""
    rng = np.random.default_rng(0)
    beyond = [rng.normal() > one_more(rng.normal(size=20).tolist()) for _ in range(4000)]
    assert abs(float(np.mean(beyond)) - 0.025) < 0.0075


def test_intervals_of_claims_are_students_and_the_ends_against_each_other() -> None:
    values = [0.1, 0.4, 0.2, 0.5, 0.3, 0.0, 0.7, 0.2]
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert student(values) == pytest.approx((np.mean(values), low, high), rel=1e-3)
    assert against((3.0, 2.0, 5.0), (1.0, 0.5, 1.5)) == (2.0, 0.5, 4.5)


def test_looking_up_a_claim_imports_nothing_heavy() -> None:
    code = "import sys; from patchbay.papers import claims; claims.known('olsson2022'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_claims_of_objectives_are_trained_in_five_pairs() -> None:
    from patchbay.papers.claims import factored, imitation, mixtures, objectives

    rooms = [one.__name__ for one in (objectives, factored, imitation, mixtures)]
    found = {key: entry for key, entry in CLAIMS.items() if entry.measure.__module__ in rooms}
    assert {entry.seeds for entry in found.values() if entry.kind != "identity"} == {5}
    assert {"jaiswal2024", "wei2024", "nijkamp2023", "zhong2022", "gupta2018", "wulfmeier2024"} <= set(found)


@pytest.mark.parametrize(
    ("seed", "uneven", "even", "verdict"),
    [
        (901, "falls", "mixed", "confirmed"),
        (902, "falls", "falls", "inconclusive"),
        (903, "mixed", "mixed", "not confirmed"),
    ],
)
def test_languages_have_to_rank_by_their_shares_and_not_where_all_were_read_alike(
    monkeypatch: pytest.MonkeyPatch, seed: int, uneven: str, even: str, verdict: str
) -> None:
    """Networks are stood in for by the cosines that they would give: falling with the share, or in no order."""
    from patchbay.papers.claims import toys
    from patchbay.tiny import clones

    cosines = {"falls": [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], "mixed": [0.4, 0.1, 0.6, 0.3, 0.7, 0.2, 0.5]}
    shares: dict[str, list[float]] = {"raw": cosines["mixed"]}

    def train(given: Any, *, seed: int) -> str:
        shares[name := "uneven" if given[0] > given[1] else "even"] = cosines[uneven if given[0] > given[1] else even]
        return name

    def similarity(asked: str, first: Any, texts: dict[str, Any], **_: Any) -> Any:
        assert len(texts) == len(clones.HALVING) - 1
        assert all(a[-1] != b[-1] for said in texts.values() for a, b in zip(first, said, strict=True))
        rows = [{"language": name, "centred": x} for name, x in zip(texts, shares[asked], strict=True)]
        return SimpleNamespace(tables={"ranking": sorted(rows, key=lambda row: str(row["centred"]))})

    monkeypatch.setattr(clones, "train", train)
    monkeypatch.setattr(clones, "network", lambda languages, seed: "raw")
    monkeypatch.setattr(pb.find, "language_similarity", similarity)
    monkeypatch.setattr(toys, "N", 2)
    found = toys.li2024(None, seed)  # kept by its seed
    assert found.verdict == verdict
    assert found.value == pytest.approx(1.0 if uneven == "falls" else 1 - 6 * 68 / (7 * 48))


def test_what_is_added_to_openings_is_graded_without_them() -> None:
    """Of four texts: one sentence of three keeps the people and two parse; none; one that is cut off counts for nothing; nothing was said."""
    from patchbay.corpus import stories
    from patchbay.papers.claims import corpora
    from patchbay.tasks import words

    class Said:
        def generate(self, openings: list[str], *_: Any, **__: Any) -> list[str]:
            told = []
            for opening in openings:
                people = stories.parse(opening)[0].people  # type: ignore[union-attr]
                other = [name for name in words.NAMES if name not in people][:2]
                one, two = (f" Then {a} gave the {words.OBJECTS[0]} to {b}." for a, b in (people, other))
                told.append(
                    (f"{one}{two} So it is.", " So it is. No more.", f"{one} Then {people[0]} gave", " and")[
                        len(told) % 4
                    ]
                )
            return told

    found = corpora._continued(Said(), 3)  # type: ignore[arg-type]
    assert found[0].tolist()[:4] == pytest.approx([1 / 3, 0.0, 1.0, 0.0])
    assert found[1].tolist()[:4] == pytest.approx([2 / 3, 0.0, 1.0, 0.0])
    assert found.shape == (2, corpora.OPENINGS)


def test_what_the_model_has_no_part_in_is_told_without_untrained_networks_of_its_form() -> None:
    for key, entry in CLAIMS.items():
        asks = any(step.argval == "model" for step in dis.get_instructions(entry.measure))
        assert asks or entry.kind in ("made", "identity"), key
        if entry.kind == "made":
            assert "; untrained " not in str(catalogue.paper(key)["measured"]), key
