"""train.variant: the Trainer's run is a plain loop's, pairs start and read alike, a run that died goes on bit for bit, what cannot be is refused."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import patchbay as pb
from patchbay.sweeps.settings import using
from patchbay.train import _trainer
from patchbay.train._copies import copied
from patchbay.train._objectives import objective
from patchbay.train._objectives._objective import collated
from patchbay.train._plan import Arm, Rows, plan_of, split
from tests.given import lent
from tests.measure import words
from tests.tolerance import close

PLAN: dict[str, float] = {"steps": 6, "batch_size": 4, "panel": 0}


def texts(n: int = 20, seed: int = 0, words: int = 30) -> list[list[list[int]]]:
    """Documents of three units of random tokens."""
    rng = random.Random(seed)
    return [[[rng.randrange(5, words) for _ in range(k)] for k in (2, 1, 3)] for _ in range(n)]


def variant(data: Any = None, model: pb.Model | None = None, **options: Any) -> pb.Result:
    how = {"seeds": 1, "plan": PLAN, **options}
    return pb.train.variant(model or lent("llama"), texts() if data is None else data, **how)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(pb.load(folder).hf.state_dict())


def test_planted() -> None:
    """Documents with one order: a variant that only reads them backwards scores that order worse than its twin, by every seed."""
    plan = {"steps": 8, "batch_size": 4, "rate": 0.02, "panel": 0}
    found = variant([[[5], [6], [7], [8]]] * 30, objective="spt:kept=0,reversed=1", seeds=2, plan=plan)
    assert found.labels_of("condition") == ["variant - twin", "null - twin", "variant - null"]
    assert float(found["run_low"][0].min()) > 1.0
    assert int(found["above"][0]) == 2


def test_reference(tmp_path: Path) -> None:
    """Losses and weights of twenty lines of plain torch on the same rows; held-out scores by loops."""
    model, documents = lent("llama"), texts()
    found = variant(folder=str(tmp_path / "runs"), plan={**PLAN, "decay": 0.0})
    train, held = split(20, 0.1)
    plan = plan_of({**PLAN, "decay": 0.0})
    rows = Rows([documents[i] for i in train], Arm(), plan, 0)
    hf = pb.tiny.twins.twin("llama")
    optimizer = torch.optim.AdamW(hf.parameters(), lr=plan.rate, weight_decay=0.0)
    losses = []
    for step in range(plan.steps):
        ids = torch.tensor([rows[step * plan.batch_size + i][0] for i in range(plan.batch_size)])
        loss = cross_entropy(hf(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    told = [row["loss"] for row in found.tables["steps"] if row["arm"] == "twin"]
    assert close(torch.tensor(told), torch.tensor(losses))
    mine, theirs = hf.state_dict(), weights(tmp_path / "runs" / "twin-0")
    assert all(close(mine[name], theirs[name]) for name in mine)
    scores = []
    for i in held:
        ids = torch.tensor([token for unit in documents[i] for token in unit])
        logp = torch.log_softmax(hf(ids[None]).logits[0].detach().double(), -1)
        scores.append(-sum(float(logp[t, ids[t + 1]]) for t in range(len(ids) - 1)) / (len(ids) - 1))
    assert close(float(found.tables["runs"][1]["loss"]), sum(scores) / len(scores), of=10.0, dtype=torch.float32)
    assert found.tables["runs"][0]["start"] == found.tables["runs"][1]["start"] == model.fingerprint
    assert pb.load(tmp_path / "runs" / "twin-0").fingerprint == found.tables["runs"][1]["end"]


def test_null() -> None:
    """The plain objective as its own variant: no bit differs from the twin; other batches do something, which is the null arm's."""
    found = variant(seeds=2)
    runs = {row["run"]: row for row in found.tables["runs"]}
    for seed in range(2):
        assert runs[f"variant-{seed}"]["end"] == runs[f"twin-{seed}"]["end"] != runs[f"null-{seed}"]["end"]
    assert found["by_run"][0].tolist() == [0.0, 0.0]
    assert runs["twin-0"]["end"] != runs["twin-1"]["end"]


def test_no_steps_change_nothing_and_the_lent_model_stays() -> None:
    model = lent("llama")
    before = model.fingerprint
    found = variant(objective="spt", plan={**PLAN, "steps": 0})
    assert {row[key] for row in found.tables["runs"] for key in ("start", "end")} == {before}
    variant(objective="spt")
    assert model.hf.config.use_cache == pb.tiny.twins.twin("llama").config.use_cache
    model._fingerprint = None
    assert model.fingerprint == before


def test_fresh_weights_are_drawn_by_seed_and_shared_by_a_pair() -> None:
    found = variant(objective="spt", seeds=2, plan={**PLAN, "steps": 1, "fresh": True})
    starts = [[row["start"] for row in found.tables["runs"] if row["seed"] == seed] for seed in (0, 1)]
    assert len(set(starts[0])) == len(set(starts[1])) == 1
    assert len({starts[0][0], starts[1][0], lent("llama").fingerprint}) == 3


@pytest.mark.parametrize("name", ["gpt2", "llama"])  # tied, and not
def test_rows_of_tokens_are_drawn_anew_and_nothing_else(name: str, tmp_path: Path) -> None:
    variant(texts(), lent(name), folder=str(tmp_path / "runs"), plan={"steps": 0, "redraw": True, "panel": 0})
    own, found = lent(name).hf, pb.load(tmp_path / "runs" / "twin-0").hf
    tables = {id(m.weight) for m in (own.get_input_embeddings(), own.get_output_embeddings())}
    moved = {key for key, value in own.state_dict().items() if not torch.equal(value, found.state_dict()[key])}
    assert moved == {key for key, p in own.named_parameters(remove_duplicate=False) if id(p) in tables}
    one, other = (hf.get_input_embeddings().weight.detach() for hf in (own, found))
    assert float(other.std()) == pytest.approx(float(one.std()), rel=0.1)
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.1


def test_blocks_start_from_the_plain_weights_and_load_again(tmp_path: Path) -> None:
    """What is new is drawn by the seed, all else starts as the twin does; the folder opens, and a second call takes what is there."""
    own, blocks = dict(lent("llama").hf.state_dict()), {"attention": "sigmoid", "convolution": 3}
    told = [variant(blocks=blocks, folder=str(tmp_path / "runs"), plan={**PLAN, "steps": 0}) for _ in range(2)]
    assert float(told[0]["by_run"][0].abs().max()) > 0
    assert torch.equal(told[0]["by_run"], told[1]["by_run"])
    there = weights(tmp_path / "runs" / "variant-0")
    kept = {key.replace(".inner", ""): value for key, value in there.items()}
    assert all(torch.equal(own[key], kept[key]) for key in own)
    assert len(there) > len(own)
    with pytest.raises(pb.PatchbayError, match="no block 'attn'"):
        variant(blocks={"attn": "sigmoid"})


class DiedError(Exception):
    pass


RESUMED: tuple[dict[str, Any], ...] = (
    {"objective": "spt"},
    {"optimizer": "sparse:keep=0.1,over=5"},
    {"optimizer": "muon"},
    {"optimizer": "cosmos:rank=3"},
)


@pytest.mark.parametrize("how", RESUMED, ids=lambda how: next(iter(how.values())))
def test_a_call_that_died_goes_on_bit_for_bit(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dying in the fourth step, after a checkpoint at the second; a half-written later one beside it is not believed. Of a sparse network the share
    still falls then, and entries behind the zeros have moments."""
    plan = {**PLAN, "every": 2}
    whole = variant(**how, folder=str(tmp_path / "whole"), plan=plan)
    own, calls = Rows.__getitem__, 0

    def dying(rows: Rows, place: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4 * 4 - 1:
            raise DiedError
        return own(rows, place)

    monkeypatch.setattr(Rows, "__getitem__", dying)
    folder = tmp_path / "died"
    with pytest.raises(DiedError):
        variant(**how, folder=str(folder), plan=plan)
    at_work = folder / ".variant-0"
    assert [path.name for path in at_work.iterdir()] == ["checkpoint-2"]
    (at_work / "checkpoint-4").mkdir()
    (at_work / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    calls = 100
    found = variant(**how, folder=str(folder), plan=plan)
    assert calls - 100 < 3 * 6 * 4  # it did not begin anew
    assert found.tables["steps"] == whole.tables["steps"]
    assert [row["end"] for row in found.tables["runs"]] == [row["end"] for row in whole.tables["runs"]]
    assert torch.equal(found["by_run"], whole["by_run"])
    assert sorted(path.name for path in folder.iterdir()) == ["lab.json", "null-0", "twin-0", "variant-0"]


def test_what_is_watched_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read before steps 0, 2 and 4 of 6; a run that dies in the fourth has the same readings in the end, each once."""
    plan = plan_of({**PLAN, "every": 2})
    rows = Rows(texts(), Arm(), plan, 0)

    def total(model: pb.Model) -> float:
        return float(model.hf.get_input_embeddings().weight.detach().double().sum())

    def run(place: str) -> Any:
        lent_, where = copied(lent("llama")), tmp_path / place
        return _trainer.trained(lent_, rows, Arm(), plan, where, keep=True, watch=(2, total))

    whole = run("whole")
    assert whole[1][0] == total(lent("llama"))
    assert len(set(whole[1])) == 3
    own, calls = Rows.__getitem__, itertools.count(1)

    def dying(rows: Rows, place: int) -> Any:
        if next(calls) == 4 * 4 - 1:
            raise DiedError
        return own(rows, place)

    monkeypatch.setattr(Rows, "__getitem__", dying)
    with pytest.raises(DiedError):
        run("died")
    assert run("died") == whole


KILLED = """
import json, sys, patchbay as pb
from patchbay.tiny.twins import twin
from tests.train.test_variant import texts
how = json.loads(sys.argv[2])
pb.train.variant(pb.load(twin("llama")), texts(), seeds=1, folder=sys.argv[1], plan={"steps": 120, "batch_size": 4, "every": 5}, **how)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [RESUMED[0], {"optimizer": "sparse:keep=0.1,over=100"}], ids=lambda how: "-".join(how))
def test_a_process_that_is_killed_goes_on_bit_for_bit(how: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 of a real process after its first checkpoint, again in mid-course of the next start, and then to the end."""
    plan = {"steps": 120, "batch_size": 4, "every": 5}
    whole = variant(**how, folder=str(tmp_path / "whole"), plan=plan)
    folder = tmp_path / "killed"
    for least in (5, 20):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), json.dumps(how)])
        until = time.monotonic() + 240

        def done(least: int = least) -> bool:
            names = [path.parent.name for path in folder.glob(".variant-0/checkpoint-*/whole.json")]
            return any(int(name.partition("-")[2]) >= least for name in names)

        while not done() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    found = variant(**how, folder=str(folder), plan=plan)
    assert [row["end"] for row in found.tables["runs"]] == [row["end"] for row in whole.tables["runs"]]
    assert found.tables["steps"] == whole.tables["steps"]


def test_a_folder_of_other_runs_is_refused(tmp_path: Path) -> None:
    folder = str(tmp_path / "runs")
    variant(folder=folder)
    for other, says in (({"plan": {**PLAN, "rate": 0.1}}, "another plan"), ({"data": texts(seed=1)}, "another data")):
        with pytest.raises(pb.PatchbayError, match=f"holds runs of {says}"):
            variant(folder=folder, **other)
    with pytest.raises(pb.PatchbayError, match="variant-0 is of another run"):
        variant(folder=folder, objective="spt")


def test_what_was_refused_leaves_no_folder_and_takes_none_away(tmp_path: Path) -> None:
    """Documents that an objective refuses when it reads them: the same name is free for other documents; a folder that was there, or that holds a run, stays."""
    folder = tmp_path / "runs"
    for _ in range(2):
        with pytest.raises(pb.PatchbayError, match="a document is a question"):
            variant(objective="pinto", folder=str(folder))
        assert not folder.exists()
    folder.mkdir()
    with pytest.raises(pb.PatchbayError, match="a document is a question"):
        variant(objective="pinto", folder=str(folder))
    assert (folder / "lab.json").is_file()
    with pytest.raises(pb.PatchbayError, match="no longer finite"):
        variant(folder=str(tmp_path / "far"), plan={**PLAN, "steps": 3, "rate": 1e30})
    assert not (tmp_path / "far").exists() or any((tmp_path / "far").rglob("*.safetensors"))


def test_memory_that_runs_out_is_said_and_the_checkpoint_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls = Rows.__getitem__, 0

    def full(rows: Rows, place: int) -> Any:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return own(rows, place)

    monkeypatch.setattr(Rows, "__getitem__", full)
    with pytest.raises(
        pb.PatchbayError, match=r"memory ran out .*checkpoint-2 is kept, and the same call goes on from it"
    ):
        variant(folder=str(tmp_path / "runs"), plan={**PLAN, "every": 2})
    with pytest.raises(pb.PatchbayError, match="nothing of this run is kept"):
        variant()


def test_the_estimate_trains_nothing(tmp_path: Path) -> None:
    found = variant(objective="spt", seeds=5, folder=str(tmp_path / "runs"), plan={**PLAN, "dry_run": True})
    n = sum(p.numel() for p in lent("llama").hf.parameters())
    assert float(found["bytes"]) == 5 * 3 * 4 * n
    assert float(found["flops"]) == pytest.approx(
        6.0 * n * 5 * 3 * 6 * 4 * 6
    )  # weights, seeds, arms, steps, rows, tokens
    assert float(found["seconds"]) > 0
    assert not (tmp_path / "runs").exists()
    assert found.labels_of("condition") == ["variant", "twin", "null"]
    told = [f"variant: spt with adamw, {n:,} weights", f"twin: ntp with adamw, {n:,} weights"]
    assert found.notes[1:] == (*told, f"null: {objective('spt').null} with adamw, {n:,} weights")


def test_a_replay_trains_again_whatever_lies_in_the_folder(tmp_path: Path) -> None:
    """Kept scores that somebody wrote over agree with nothing; nothing of the folder is read or written."""
    folder = tmp_path / "runs"
    found = variant(objective="spt", folder=str(folder), plan={**PLAN, "steps": 2})
    told = json.loads((folder / "variant-0" / "run.json").read_text())
    (folder / "variant-0" / "run.json").write_text(json.dumps(told | {"scores": [9.0] * len(told["scores"])}))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = pb.replay(found, lent("llama"))
    assert again
    assert again.largest == 0.0
    assert again.notes == (f"option 'folder' was {folder} and was left out: what it keeps was made anew",)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert not pb.replay(found, lent("llama"), options={"folder": str(folder)})


def test_the_estimate_is_of_steps_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps in the first step, and then goes 1 and 3 seconds: 2 a step, whatever the start took."""
    clock = itertools.cycle([0.0, 100.0, 101.0, 104.0])

    def ticking(*_: Any, watch: Any, **__: Any) -> Any:
        return _trainer.Trained([], [watch[1](None) for _ in range(4)], 0)

    monkeypatch.setattr("patchbay.train._runs.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr("patchbay.train._runs.trained", ticking)
    found = variant(seeds=5, plan={**PLAN, "dry_run": True})
    assert found["by_arm"].tolist() == [2.0 * 6 * 5] * 3


def test_documents_that_are_scored_are_not_trained_on() -> None:
    for n, held, count in ((20, 0.1, 2), (3, 0.9, 2), (5, 0.01, 1)):
        train, scored = split(n, held)
        assert len(scored) == count
        assert sorted(train + scored) == list(range(n))
    assert split(4, 0.0) == ([0, 1, 2, 3], [0, 1, 2, 3])


def test_how_far_all_runs_are_is_told_at_every_step() -> None:
    seen: list[tuple[int, int]] = []
    with using(progress=lambda *at: seen.append(at)):
        variant(objective="spt", plan={**PLAN, "steps": 3})
    assert seen == [(i, 9) for i in range(9)]  # three arms of three steps, and none is trained twice


def test_rows_follow_from_seed_and_place_alone() -> None:
    plan = plan_of(PLAN)
    one, same, other = (Rows(texts(), Arm("spt"), plan, seed) for seed in (0, 0, 1))
    assert [same[i] for i in (20, 3, 11)] == [one[i] for i in (20, 3, 11)]
    assert [one[i] for i in range(24)] != [other[i] for i in range(24)]
    plain = Rows(texts(), Arm(), plan, 0)
    assert [sorted(plain[i][0]) for i in range(24)] == [
        sorted(one[i][0]) for i in range(24)
    ]  # the same documents in the same order
    batch = collated([([5, 6, 7], [5, 6, 7]), ([8], [8])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_data_may_lie_in_a_file(tmp_path: Path) -> None:
    """Texts by lines; the same texts as a list give the same run."""
    model = pb.load(lent("gpt2").hf, words.tokenizer("characters"))
    lines = [
        "the cat sat " * 20,
        "a dog ran",
        "birds sing",
        "it rains",
    ]  # the first is longer than the model reads, and is cut
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    runs = [
        variant(data, model, plan={"steps": 1, "batch_size": 2, "length": 32, "panel": 0})
        for data in (lines, str(tmp_path / "texts.txt"), str(tmp_path / "texts.jsonl"))
    ]
    assert torch.equal(runs[0]["by_run"], runs[1]["by_run"])
    assert torch.equal(runs[0]["by_run"], runs[2]["by_run"])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "one two"}\n{"text": "thr', "line 2 is no JSON: the file ends in mid-line, as one that was"),
        ("a.jsonl", '{"units": ["ab", "cd"]}\n{"units": ["ef"', "line 2 is no JSON: the file ends in mid-line"),
        ("a.txt", "one two\nth\u00e9".encode()[:-1], "line 2 is not UTF-8: the file ends in mid-line"),
        ("a.txt", "one two\nthr\u00e9e\n", "document 1: its token 4 is unknown to this tokenizer: 'thr\u00e9e'"),
        ("a.jsonl", '{"units": ["ab", "cd"]}\n{"units": ["ab", "\u00e9"]}\n', "document 1: its token 1 is unknown"),
        ("a.txt", "", "holds no text"),
        ("a.jsonl", "\n \n", "holds no text"),
        ("a.jsonl", '{"units": []}\n', "no field `text` that is a text; it has .'units'."),
        ("a.txt", "only one\n", "1 documents: two or more"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_whole_are_refused_and_nothing_is_written(
    name: str, content: str | bytes, says: str, tmp_path: Path
) -> None:
    file, folder = tmp_path / name, tmp_path / "runs"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(pb.PatchbayError, match=says):
        variant(str(file), words.reader("characters"), folder=str(folder))
    assert not folder.exists()


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        ([], {}, "no documents"),
        ([[5, 6]], {}, "1 documents: two or more"),
        ([[5], [6, 7]], {}, "document 0 has 1 tokens"),
        ([[5, 6], [7, 999]], {}, "document 1: 999 is no token"),
        ([[[5, 6], [7, 8]], [[5], []]], {}, "document 1: units are"),
        ([[5, 6], "x"], {}, "document 1 is a text, and this model has no tokenizer"),
        (None, {"objective": "sbt"}, "did you mean 'spt'"),
        (None, {"objective": "spt:keep=1"}, "its settings are kept, reversed, tokens"),
        (None, {"objective": "spt:kept=x"}, "is written as float"),
        (None, {"objective": "spt:kept=.1,reversed=0,kept=.9"}, "kept is given twice"),
        (None, {"plan": [3]}, "plan takes a dict by names or None, got list"),
        (None, {"objective": "spt:kept=0.9"}, "together at most 1"),
        (None, {"optimizer": "adam"}, "did you mean 'adamw'"),
        (None, {"seeds": 0}, "seeds=0: one pair"),
        (None, {"plan": {"step": 3}}, "did you mean 'steps'"),
        (None, {"plan": {"steps": 2.5}}, "steps is written as int, got 2.5"),
        (None, {"plan": {"steps": -1}}, "0 or more steps"),
        (None, {"plan": {"steps": float("inf")}}, "steps is written as int, got inf"),
        (None, {"plan": {"batch_size": float("nan")}}, "batch_size is written as int, got nan"),
        (None, {"plan": {"rate": float("nan")}}, "a rate above 0"),
        (None, {"plan": {"rate": 10**400}}, "rate is written as float, got 1000000"),
        (None, {"plan": {"length": 4}}, "has 6 tokens in 3 units, and a row holds length=4"),
        ([[5] * 200, [6] * 200], {"plan": {"length": 200}}, "this model reads at most 64"),
        (None, {"plan": {"steps": 3, "rate": 1e30}}, "no longer finite"),
    ],
)  # fmt: skip
def test_refusals(data: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        variant(data, **options)


def test_accelerate_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    class Missing:
        def __init__(self, **_: Any) -> None:
            raise ImportError("Using the `Trainer` requires `accelerate`")

    monkeypatch.setattr(transformers, "TrainingArguments", Missing)
    with pytest.raises(pb.PatchbayError, match=r"pip install 'patchbay-lm\[train\]'"):
        variant()
    assert _trainer.CLIP == 1.0


@pytest.mark.parametrize("cut", ["FSDP", "DeepSpeed"])
def test_steps_by_whole_matrices_are_refused_where_weights_are_cut(
    cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COSMOS, Muon, sparse AdamW and low ranks would take a shard for a matrix, or for a vector; AdamW takes each number by itself."""
    import transformers

    own = transformers.Trainer.create_accelerator_and_postprocess

    def sharded(self: Any) -> None:
        own(self)
        setattr(self, f"is_{cut.lower()}_enabled", True)

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", sharded)
    plan = plan_of({**PLAN, "steps": 1})
    for name in ("cosmos", "muon", "sparse:keep=0.5,over=1", "lora", "lora-sb:rank=2"):
        arm = Arm(optimizer=name)
        with pytest.raises(
            pb.PatchbayError, match=rf"optimizer '{name}' steps by whole matrices, which {cut} cuts into shards"
        ):
            _trainer._trainer(lent("llama"), Rows(texts(), arm, plan, 0), arm, plan, tmp_path, False, [], [])
    made = _trainer._trainer(lent("llama"), Rows(texts(), Arm(), plan, 0), Arm(), plan, tmp_path, False, [], [])
    assert made.optimizer_cls_and_kwargs is None
