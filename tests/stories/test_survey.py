"""The survey on a trained model: its table is the finders' own numbers, and what cannot be run says why."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from click.testing import CliRunner
from scipy import stats

import patchbay as pb
from patchbay.cli import cli
from patchbay.maths import spearman
from patchbay.signal.port import PatchbayError
from patchbay.stories import survey as module
from patchbay.stories._evidence import adjusted
from patchbay.stories.survey import NEEDS, OTHERS, ROLES, find_all
from patchbay.tiny.twins import twin
from tests.shares import WHOLE
from tests.tolerance import close

N = 8


@pytest.fixture(scope="module")
def model() -> pb.Model:
    return pb.load("tiny")


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """The finders that have no heads to rank: without the dearest two in `make test`."""
    return [name for name in OTHERS if WHOLE or name not in ("concept_depth", "relation_neurons")]


@pytest.fixture(scope="module")
def survey(model: pb.Model, asked: list[str]) -> Iterator[pb.Result]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "OTHERS", {name: OTHERS[name] for name in asked})
        yield find_all(model, n=N)


def test_every_finder_is_run_or_says_why_not(survey: pb.Result, asked: list[str]) -> None:
    skipped = {row["finder"] for row in survey.tables["not run"]}
    assert set(survey.labels_of("condition")) == set(ROLES), skipped
    assert {row["finder"] for row in survey.tables["others"]} | skipped == set(asked) | skipped
    assert skipped <= {*NEEDS, "expert_specialisation"}, "what a model with heads and neurons offers is run"
    assert {*ROLES, *OTHERS, *NEEDS} == set(pb.find.__all__)
    assert all(row["why"] for row in survey.tables["not run"])


def test_the_table_holds_what_each_finder_says_alone(model: pb.Model, survey: pb.Result) -> None:
    roles = survey.labels_of("condition")
    heads = [(part.layer, part.index) for part in survey.parts or ()]
    for role, alone in (
        ("induction_heads", pb.find.induction_heads(model, pb.tasks.repeated_tokens(model, N, seed=0))),
        ("name_mover_heads", pb.find.name_mover_heads(model, pb.tasks.indirect_object(model, N, seed=0))),
    ):
        at = roles.index(role)
        for i, place in enumerate(heads):
            assert close(float(survey["score"][at, i]), float(alone.values[place]), of=1.0)
            assert close(float(survey["p_adjusted"][at, i]), float(adjusted(alone)[place]), dtype=torch.float64, of=1.0)
    first = survey["score"][roles.index("induction_heads")]
    second = survey["score"][roles.index("ngram_heads")]
    at = (roles.index("induction_heads"), roles.index("ngram_heads"))
    assert float(survey["agreement"][at]) == pytest.approx(spearman(first, second))


def test_roles_are_the_heads_known_of_this_model_and_are_proved_jointly(survey: pb.Result) -> None:
    best = {row["role"]: row for row in reversed(survey.tables["roles"])}
    assert best["induction_heads"]["head"].startswith("L1.")
    assert best["induction_heads"]["p_adjusted"] < 0.05
    ends = {row["role"]: row for row in survey.tables["knockout"]}
    assert ends["induction_heads"]["effect"] > ends["induction_heads"]["null_mean"]
    roles = survey.labels_of("condition")
    assert survey["knockout_p"][roles.index("induction_heads")].min() >= 1 / 20 - 1e-6
    assert "a score is not a cause" in survey.notes[-1]


def test_scores_without_a_null_have_no_p() -> None:
    scores = pb.Result(torch.rand(2, 3), unit="attention")
    assert adjusted(scores).isnan().all()


def test_a_p_is_students_over_the_prompts_and_one_sided_against_a_null() -> None:
    """Scores of .3 and -.3 with a standard error of .1 over 6 prompts: t of 3 and -3 with 5 degrees of freedom."""
    score = torch.tensor([[0.3, -0.3]])
    given = {
        "score": (score, ("layer", "head"), "attention"),
        "standard_error": (score.abs() / 3, ("layer", "head"), "attention"),
    }
    known = {"task": {"clean": [[1]] * 6}}
    upper = stats.t.sf(3, 5)
    assert close(adjusted(pb.Result(given, provenance=known))[0], torch.tensor([2 * upper, 2 * upper]), of=1.0)
    given |= {"null_mean": (torch.zeros(1, 2), ("layer", "head"), "attention")}
    assert close(adjusted(pb.Result(given, provenance=known))[0], torch.tensor([2 * upper, 1 - upper]), of=1.0)
    alone = {"task": {"clean": [[1]]}}
    assert adjusted(pb.Result(given, provenance=alone)).isnan().all()


def test_knockouts_are_made_on_prompts_that_chose_nothing(model: pb.Model) -> None:
    made = module.Survey(model, N, 0)
    assert not set(made.curve_task("induction_heads").clean) & set(made.make("repeated_tokens").clean)


def test_models_without_heads_are_refused() -> None:
    with pytest.raises(PatchbayError, match="no finder of heads runs on this mamba model"):
        find_all(pb.load(twin("mamba2")), n=4, curves=False)


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """With three roles and no other finders; all of them are in the survey above."""
    few = {name: ROLES[name] for name in ("induction_heads", "name_mover_heads", "successor_heads")}
    monkeypatch.setattr(module, "ROLES", few)
    monkeypatch.setattr(module, "OTHERS", {"neuron_vocabulary": OTHERS["neuron_vocabulary"]})
    done = CliRunner().invoke(cli, ["find", "all", "tiny", "--n", "8", "--no-curves", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {row["role"] for row in told["tables"]["roles"]} == set(few)
    assert {row["finder"] for row in told["tables"]["others"]} == {"neuron_vocabulary"}
    assert CliRunner().invoke(cli, ["find", "all", "no-such-model"]).exit_code == 2
    assert "every finder at once" in CliRunner().invoke(cli, ["find", "--help"]).output
