"""Other people's evaluations over the server, with and without a knob: inspect_ai's openai-api provider, lm-evaluation-harness's local-completions.

They run in a process of their own, by the Python that PATCHBAY_EVALUATIONS names (`pip install inspect-ai 'lm-eval[api]' openai`) or this
one; where that has them not the test is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import patchbay as pb
from patchbay.serve.api import Api
from patchbay.serve.engine import Engine
from patchbay.serve.guard import Guard, Keys
from patchbay.serve.named import Named
from tests.tolerance import close

PYTHON = os.environ.get("PATCHBAY_EVALUATIONS") or sys.executable
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
QUESTIONS = [
    "The capital of Lolavia is Grerum. The capital of Lolavia is",
    "Emma asked Kate about the violin. Emma asked",
]
INSPECT = """
import json, sys
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate
asked = json.loads(sys.argv[1])
samples = [Sample(input=text, target=asked["target"]) for text in asked["questions"]]
logs = eval(Task(dataset=samples, solver=generate(), scorer=includes()), model=[f"openai-api/patchbay/{name}" for name in asked["models"]],
            max_tokens=3, temperature=0.0, display="none", log_dir=asked["folder"], max_retries=1)
print(json.dumps([{"status": log.status, "said": [one.output.completion for one in log.samples or []],
                   "accuracy": log.results.scores[0].metrics["accuracy"].value} for log in logs]))
"""
HARNESS = """
import json, os, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
asked = json.loads(sys.argv[1])
found = []
for name in asked["models"]:
    lm = LocalCompletionsAPI(model=name, base_url=os.environ["PATCHBAY_BASE_URL"] + "/completions", tokenizer_backend="huggingface",
                             tokenizer=asked["tokenizer"], batch_size=2, max_length=512)
    pairs = [Instance(request_type="loglikelihood", doc={}, arguments=(text, asked["target"]), idx=0) for text in asked["questions"]]
    found.append([list(one) for one in lm.loglikelihood(pairs, disable_tqdm=True)])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def served(listening: Callable[..., int]) -> Iterator[tuple[pb.Model, pb.Knob, dict[str, str]]]:
    """A model that chats, its knob, and what clients read from the environment."""
    model, keys = pb.load("tiny"), Keys()
    model.tokenizer.chat_template = TEMPLATE  # type: ignore[union-attr]
    knob, engine = pb.turn.scale("L1.H1", 0.0), Engine(model).start()
    port = listening(Guard(Api(engine, Named(model, "tiny", {"text": knob})).router(), keys))
    base = f"http://127.0.0.1:{port}/v1"
    yield model, knob, {"PATCHBAY_BASE_URL": base, "PATCHBAY_API_KEY": keys.token, "OPENAI_API_KEY": keys.token}
    engine.close()
    model.tokenizer.chat_template = None  # type: ignore[union-attr]


def told(program: str, needs: str, asked: object, env: dict[str, str], folder: Path) -> list[object]:
    """What a program of the other side prints last."""
    if subprocess.run([PYTHON, "-c", f"import {needs}"], capture_output=True).returncode:
        pytest.skip(f"{PYTHON} has no {needs} (PATCHBAY_EVALUATIONS names one that has)")
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([PYTHON, "-c", program, json.dumps(asked)], env=outside | env | {"HF_HUB_OFFLINE": "1"}, cwd=folder, capture_output=True, text=True, timeout=400)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


@pytest.mark.slow
def test_inspect_ai_evaluates_a_model_and_its_knob(
    served: tuple[pb.Model, pb.Knob, dict[str, str]], tmp_path: Path
) -> None:
    model, knob, env = served
    plain, turned = [], []
    for text in QUESTIONS:
        plain.append(model.generate(text, 3, new_only=True))
        with model.edited(knob):
            turned.append(model.generate(text, 3, new_only=True))
    assert plain != turned
    target = plain[0].strip()
    asked = {"questions": QUESTIONS, "target": target, "models": ["tiny", "tiny+text"], "folder": str(tmp_path)}
    found = told(INSPECT, "inspect_ai", asked, env, tmp_path)
    for expected, log in zip((plain, turned), found, strict=True):
        said = [text.strip() for text in log.pop("said")]  # type: ignore[attr-defined]
        assert said == [text.strip() for text in expected]
        assert log == {"status": "success", "accuracy": sum(target in text for text in expected) / len(expected)}


@pytest.mark.slow
def test_lm_evaluation_harness_hears_the_models_own_log_probabilities(
    served: tuple[pb.Model, pb.Knob, dict[str, str]], tmp_path: Path
) -> None:
    model, knob, env = served
    model.tokenizer.save_pretrained(tmp_path / "tokenizer")  # type: ignore[union-attr]
    target = " Grerum"
    asked = {"questions": QUESTIONS, "target": target, "models": ["tiny", "tiny+text"], "tokenizer": str(tmp_path / "tokenizer")}  # fmt: skip
    found = told(HARNESS, "lm_eval", asked, env, tmp_path)
    for knobs, scores in zip(([], [knob]), found, strict=True):
        for text, (logp, greedy) in zip(QUESTIONS, scores, strict=True):  # type: ignore[arg-type]
            ids, n = model.encode(text + target)[0], len(model.encode(text)[0])
            logits = pb.run(model, [ids], edits=knobs).logits[0].double().log_softmax(-1)
            own = sum(float(logits[at - 1, ids[at]]) for at in range(n, len(ids)))
            assert close(logp, own, of=float(logits.abs().max()))
            assert greedy == all(int(logits[at - 1].argmax()) == ids[at] for at in range(n, len(ids)))


def test_a_template_of_one_line_says_what_the_messages_say(served: tuple[pb.Model, pb.Knob, dict[str, str]]) -> None:
    """What both sides of these tests stand on."""
    model, _, _ = served
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    ids = model.tokenizer.apply_chat_template(messages, return_dict=False)  # type: ignore[union-attr]
    assert torch.equal(torch.tensor(ids), torch.tensor(model.encode(QUESTIONS[0])[0]))
