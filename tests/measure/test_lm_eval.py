"""The harness itself, with a model under a knob: as our own meter, to the last digit; its tasks as items, ours as its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.measure.words import reader
from tests.tolerance import close

pytest.importorskip("lm_eval", reason="lm-eval is an extra, and is not installed here")
harness: Any = pytest.importorskip("patchbay.measure.lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # of packages of others

PAIRS = [
    {"good": f"the {x} sat on it", "bad": f"{x} the sat it on"}
    for x in ("cat", "dog", "hat", "sun", "man", "hen", "mat", "kit")
]
ITEMS = [
    {"prompt": f"the {x}", "choices": [" sat", " ran away", " is"], "answer": i % 3}
    for i, x in enumerate(("cat", "dog", "hat", "sun", "man"))
]


def instances(kind: str, *args: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in args]


def yaml_of(folder: Path) -> Path:
    """Minimal pairs as a task of the harness."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (folder / "pairs.yaml").write_text(
        f"task: pairs\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'pairs.jsonl'}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: ""\ntarget_delimiter: ""\ndoc_to_choice: "{{[good, bad]}}"\ndoc_to_target: 0\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n'
    )
    return folder


def evaluated(lm: Any, folder: Path, name: str) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(model=lm, tasks=[name], task_manager=TaskManager(include_path=str(folder), include_defaults=False), bootstrap_iters=0, cache_requests=False)  # fmt: skip
    return dict(found["results"][name])


@pytest.mark.parametrize("strength", [None, -3.0])
def test_pairs_are_won_in_the_harness_as_in_our_meter(tmp_path: Path, strength: float | None) -> None:
    model = reader("pairs", "gpt2")
    knob = None if strength is None else pb.turn.scale(["L1.H1"], strength, model=model)
    folder = yaml_of(tmp_path)
    theirs = evaluated(harness.PatchbayLM(model, knob), folder, "pairs")["acc,none"]
    if knob is None:
        ours = pb.measure.minimal_pairs(model, PAIRS)
    else:
        with model.edited(knob):
            ours = pb.measure.minimal_pairs(model, PAIRS)
    assert theirs == float(ours.values)


def test_it_scores_as_the_harness_own_model_does() -> None:
    from lm_eval.models.huggingface import HFLM

    model = reader("characters", "gpt2")
    own, other = (
        harness.PatchbayLM(model),
        HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=4, device="cpu"),
    )
    asked = instances("loglikelihood", ("the cat", " sat"), ("the cat", " ran away"), ("", "a dog"), ("on ", "it"))
    for ours, theirs in zip(own.loglikelihood(asked), other.loglikelihood(asked), strict=True):
        assert close(ours[0], theirs[0], of=10.0)
        assert ours[1] == theirs[1]
    whole = instances("loglikelihood_rolling", ("the cat sat on the mat",))
    [rolled] = own.loglikelihood_rolling(whole)
    assert close(
        rolled, -float(pb.measure.text_loss(model, ["the cat sat on the mat"], unit="token")["per_item"][0]), of=10.0
    )


def test_texts_are_continued_up_to_what_ends_them() -> None:
    model = reader("characters", "gpt2")
    lm = harness.PatchbayLM(model)
    [long] = lm.generate_until(instances("generate_until", ("the cat", {"until": [], "max_gen_toks": 12})))
    assert long == model.generate("the cat", 12)[len("the cat") :]
    [short] = lm.generate_until(instances("generate_until", ("the cat", {"until": [long[-1]], "max_gen_toks": 12})))
    assert short == long.split(long[-1])[0]
    drawn = {"do_sample": True, "temperature": 0.7, "top_k": 1}
    for asked in (
        {"max_new_tokens": 12},
        {"max_tokens": 12, "temperature": 0.7, "top_k": 1},
        {"max_gen_toks": 12} | drawn,
    ):  # greedy each
        assert lm.generate_until(instances("generate_until", ("the cat", {"until": []} | asked))) == [long]
    penalised = {"until": [], "max_gen_toks": 12, "repetition_penalty": 5.0}
    [other] = lm.generate_until(instances("generate_until", ("the cat", penalised)))
    assert other == model.generate("the cat", 12, repetition_penalty=5.0)[len("the cat") :] != long


def test_their_tasks_are_items_and_ours_their_files(tmp_path: Path) -> None:
    model = reader("characters", "gpt2")
    task = pb.Task.from_prompts(
        model, [one["prompt"] for one in ITEMS], [" sat"] * 5, [[" ran away", " is"]] * 5, name="own"
    )
    path = harness.write_task(task, tmp_path, model)
    assert path.name == "own.yaml"
    ours = pb.measure.answer_choices(model, task)
    read = harness.items("own", include_path=str(tmp_path))
    assert [(row["prompt"], row["choices"], row["answer"]) for row in read] == [
        (one["prompt"], [" sat", " ran away", " is"], 0) for one in ITEMS
    ]
    again = pb.measure.answer_choices(model, read)
    assert torch.equal(again["per_item"], ours["per_item"])
    assert evaluated(harness.PatchbayLM(model), tmp_path, "own")["acc,none"] == float(ours.values)
    with pytest.raises(pb.PatchbayError, match="names Python functions"):
        (tmp_path / "bad.yaml").write_text("task: bad\ndoc_to_text: !function utils.f\n")
        harness.items("own", include_path=str(tmp_path))


def test_what_cannot_be_taken_is_refused(tmp_path: Path) -> None:
    model = reader("characters", "gpt2")
    with pytest.raises(pb.PatchbayError, match="model_args parallelize: not taken"):
        harness.PatchbayLM(model, parallelize=True)
    with pytest.raises(pb.PatchbayError, match="has 200 tokens and the model reads"):
        harness.PatchbayLM(model).loglikelihood(instances("loglikelihood", ("", "a" * 199)))
    made = pb.turn.scale(["L1.H1"], 0.0, model=reader("pairs", "llama"))
    with pytest.raises(pb.PatchbayError, match="was made on"):
        harness.PatchbayLM(model, made)
    knob = pb.turn.scale(["L1.H1"], 2.0, model=model).save(tmp_path / "k.knob")
    assert harness.PatchbayLM(model, f"{knob}@-1").turned.knob.strength == -1.0


@pytest.mark.slow  # the harness reads all of its own tasks first
def test_the_command_runs_theirs_with_ours(tmp_path: Path) -> None:
    """`patchbay harness ...` on a built-in model: the accuracy of our own meter, in the harness's own file of results."""
    from click.testing import CliRunner

    from patchbay.cli import cli

    rows = [{"good": "Then Mary gave the ball to John.", "bad": "Then Mary gave ball the to John."}] * 3
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = yaml_of(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [
        "--model",
        "patchbay",
        "--model_args",
        "pretrained=tiny",
        "--tasks",
        "pairs",
        "--include_path",
        str(folder),
    ]
    said = CliRunner().invoke(cli, ["harness", *given, "--output_path", str(tmp_path / "out")])
    assert said.exit_code == 0, (said.output, said.exception)
    [written] = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())["results"]["pairs"]["acc,none"]
    assert found == float(pb.measure.minimal_pairs(pb.load("tiny"), rows).values)
