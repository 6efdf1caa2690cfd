"""The sweep equals running every edit on its own, on every family; it resumes, and refuses what it cannot do."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.signal.port import PatchbayError, Port
from patchbay.sweeps.restart import base_run
from patchbay.sweeps.settings import in_turn, using
from patchbay.sweeps.sweep import Sweep, estimate
from patchbay.tasks.scoring import METRICS
from patchbay.tiny.twins import FAMILY_CONFIGS, twin
from tests.given import forks, lent
from tests.shares import by_turns
from tests.tolerance import close


def a_task(n_prompts: int = 3, length: int = 10, seed: int = 0, **more: object) -> pb.Task:
    ids = torch.randint(3, 60, (n_prompts, length), generator=torch.Generator().manual_seed(seed))
    wrong = tuple((8 + i,) if i % 2 else (9 + i, 20 + i) for i in range(n_prompts))
    return pb.Task(
        name="t", clean=tuple(map(tuple, ids.tolist())), right=tuple(range(3, 3 + n_prompts)), wrong=wrong, **more
    )


def edits_everywhere(model: pb.Model, task: pb.Task, only: tuple[str, ...] = ()) -> list[pb.Edit | list[pb.Edit]]:
    """Scale, replace, add and block at every editable port: some positions, the last one, all with a value for each row."""
    generator = torch.Generator().manual_seed(1)
    trace = pb.run(model, task, taps=[port for port in model.ports() if port.editable])
    last = len(task.clean[0]) - 1
    edits: list[pb.Edit | list[pb.Edit]] = []
    for whole in trace.ports:
        if only and whole.signal not in only:
            continue
        value = trace[whole].movedim(whole.position_axis, 1)
        port = whole
        if whole.index_axis:
            port = Port(whole.signal, whole.layer, value.shape[2] - 1)
            value = value[:, :, -1]
        edits.append(pb.scale(port, 0.5, positions=[2, 6]))
        pattern = whole.signal == "attn.pattern"
        edits.append(
            pb.replace(port, 0.1 if pattern else torch.rand(value.shape[2:], generator=generator), positions=last)
        )
        if pattern:
            edits.append(pb.block(port, query=[5, last], key=[1, 2]))
        else:
            shift = torch.randn(len(task), 1, *value.shape[2:], generator=generator)
            edits.append(pb.add(port, 0.3 * shift, rows=range(len(task))))
    edits.append([pb.scale(Port("attn.out", 0), 0.1), pb.scale(Port("resid_out", 1), 1.5, positions=4)])
    return edits


def one_by_one(model: pb.Model, task: pb.Task, edits: list) -> Tensor:
    entries = [entry if isinstance(entry, list) else [entry] for entry in edits]
    return torch.stack([task.score(pb.run(model, task, edits=entry).last_logits) for entry in entries])


MAIN = ("gpt2", "llama", "gemma2", "phi", "mixtral", "bloom")  # every edit, also by `make test`


@pytest.mark.parametrize("family", dict.fromkeys([*MAIN, *by_turns(FAMILY_CONFIGS, of=6)]))
def test_reference_every_family(family: str) -> None:
    model, task = lent(family), a_task()
    stateful = any(at.attn is None for at in model.modules)
    edits = edits_everywhere(model, task, ("resid_out", "attn.out", "logits") if stateful else ())
    others = by_turns(edits, of=4, start=list(FAMILY_CONFIGS).index(family))  # a quarter of all, others in each family
    edits = edits if family in MAIN else others
    result = pb.sweep(model, task, edits)
    assert close(result["value"], one_by_one(model, task, edits))
    assert close(result["base"], task.score(pb.run(model, task).last_logits))
    whole_runs = any("whole runs" in note for note in result.notes)
    assert whole_runs == stateful, result.notes
    assert float((result["value"] - result["base"]).abs().max()) > 1e-2  # the edits did something to compare


@pytest.fixture(scope="module")
def model() -> pb.Model:
    return pb.load(twin("llama"))


@pytest.mark.parametrize("metric", list(METRICS))
def test_metrics(model: pb.Model, metric: str) -> None:
    task = a_task()
    edits = [pb.scale(model.layers[1].attn.out, 3.0), pb.zero(model.layers[0].heads[1].z, positions=3)]
    result = pb.sweep(model, task, edits, metric)
    base = pb.run(model, task).last_logits
    for i, edit in enumerate(edits):
        expected = task.with_metric(metric).score(pb.run(model, task, edits=[edit]).last_logits, base)
        assert close(result["value"][i], expected.float(), of=1.0)


def test_prompts_of_different_length(model: pb.Model) -> None:
    task = a_task(4, 9)
    task = pb.Task(
        name="t", clean=tuple(ids[: 6 + i] for i, ids in enumerate(task.clean)), right=task.right, wrong=task.wrong
    )
    edits = [pb.zero(model.layers[i].heads[h].z, positions="last") for i in range(2) for h in range(4)]
    assert close(pb.sweep(model, task, edits)["value"], one_by_one(model, task, edits))


def ragged(n: int = 5) -> pb.Task:
    """Prompts of 6, 7, 8, 6, 7, ... tokens."""
    whole = a_task(n, 8)
    clean = tuple(ids[: 6 + i % 3] for i, ids in enumerate(whole.clean))
    return pb.Task(name="t", clean=clean, right=whole.right, wrong=whole.wrong)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "mamba2"])
def test_a_value_for_each_prompt_of_different_length(family: str) -> None:
    """Rows, masks and values by row, by position and by key: cut to each group, all that `run` does with them at once."""
    model, task = pb.load(twin(family)), ragged()
    generator = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    stream, out = model.layers[0].resid_out, model.layers[1].attn.out
    mask = torch.rand(len(task), 8, generator=generator) < 0.5
    mask[:, 3] = True
    edits: list = [
        pb.add(stream, drawn(5, 1, model.d_model)),
        pb.add(stream, drawn(5, 8, model.d_model)),  # as a tap of the ragged batch gives it
        pb.replace(stream, drawn(5, 2, model.d_model), positions=[1, -1]),
        pb.add(stream, drawn(3, 1, model.d_model), rows=(4, 0, 1)),  # rows in another order
        pb.scale(out, 3.0, rows=(2,)),  # nothing to do for two of the three groups
        pb.scale(out, 3.0, positions=mask),
        pb.add(stream, drawn(8, model.d_model), positions=mask),
        pb.scale(stream, 2.0, positions=pb.Token(task.clean[1][6])),  # perhaps not in every group
        [pb.add(stream, drawn(5, 1, model.d_model)), pb.zero(out, rows=(0, 4))],
        pb.scale(Port("logits"), 1.0 + drawn(5, 1, model.vocab_size).abs(), positions=-1),
    ]
    if model.n_heads(0):
        pattern = model.layers[0].heads[1].pattern
        edits += [
            pb.block(pattern, query=-1, key=mask),
            pb.block(pattern, query=mask, key=[1], rows=[0, 2, 3]),
            pb.replace(pattern, drawn(5, 1, 8).softmax(-1), positions=-1),
            pb.add(model.layers[1].heads[0].k, drawn(5, 8, model.d_head(1))),
        ]
    found = pb.sweep(model, task, edits)
    assert close(found["value"], one_by_one(model, task, edits))
    changed = (found["value"] - found["base"]).abs() > 1e-6
    assert changed[0].all()
    assert changed[4].tolist() == [False, False, True, False, False]
    seen: list[tuple[int, int]] = []
    pb.sweep(model, task, edits, progress=lambda *at: seen.append(at))
    assert seen[-1] == (3 * len(edits), 3 * len(edits))


def test_prompts_of_different_length_refuse_what_run_refuses(model: pb.Model) -> None:
    stream, task = model.layers[0].resid_out, ragged()
    wrong = [
        (pb.zero(stream, rows=(7,)), "row 7 asked, the batch has prompts 0..4"),
        (pb.zero(stream, positions=6), "position 6 is outside prompt 0, which has 6 tokens"),
        (pb.add(stream, torch.zeros(4, 1, model.d_model)), "4 rows was given, the edit has 5"),
        (pb.zero(stream, positions=torch.ones(3, 8, dtype=torch.bool)), "a position mask is a bool tensor"),
        (pb.zero(stream, positions=pb.Token(1)), "touches nothing"),
    ]
    for edit, message in wrong:
        with pytest.raises(PatchbayError, match=message):
            pb.sweep(model, task, [edit])


def test_order_of_edits_is_irrelevant(model: pb.Model) -> None:
    task = a_task()
    edits = edits_everywhere(model, task)
    order = torch.randperm(len(edits), generator=torch.Generator().manual_seed(3)).tolist()
    forward, shuffled = pb.sweep(model, task, edits), pb.sweep(model, task, [edits[i] for i in order])
    assert close(forward["value"][order], shuffled["value"])


def test_self_patch_changes_nothing_and_patching_everything_gives_the_other_run(model: pb.Model) -> None:
    ids = torch.randint(3, 60, (2, 3, 8), generator=torch.Generator().manual_seed(2)).tolist()
    task = pb.Task(
        name="t",
        clean=tuple(map(tuple, ids[0])),
        corrupted=tuple(map(tuple, ids[1])),
        right=(3, 4, 5),
        wrong=((6,), (7,), (8,)),
    )
    ports = [layer.resid_in for layer in model.layers]
    clean, other = pb.run(model, task, taps=ports), pb.run(model, [list(i) for i in task.corrupted or ()], taps=ports)
    itself = pb.sweep(model, task, [pb.replace(port, clean[port]) for port in ports])
    assert close(itself["value"], itself["base"].expand_as(itself["value"]))
    everything = pb.sweep(model, task, [pb.replace(port, other[port]) for port in ports])
    assert close(everything["value"], task.score(other.last_logits).expand_as(everything["value"]))
    back = pb.sweep(model, task, [pb.replace(port, clean[port]) for port in ports], on="corrupted")
    assert close(back["value"], task.score(clean.last_logits).expand_as(back["value"]))


def test_small_memory_gives_the_same(model: pb.Model) -> None:
    task = a_task()
    edits = [pb.zero(head.z, positions=p) for layer in model.layers for head in layer.heads for p in range(10)]
    small = Sweep(model, task, edits, memory=6_400_000)
    ids = small._ids(small.groups[0])
    assert len(small._batches(small._cells(0, True), ids)) > 1
    assert close(small.run()["value"], pb.sweep(model, task, edits)["value"])


def test_model_is_left_as_it_was(model: pb.Model) -> None:
    before = model.fingerprint
    task = a_task()
    with pytest.raises(PatchbayError, match="shape"):
        pb.sweep(model, task, [pb.add(model.layers[0].resid_in, torch.zeros(7))])
    assert model.fingerprint == before
    assert not [m for m in model.hf.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "phi"])
def test_the_difference_in_bf16_is_nearer_than_all_of_it_in_bf16(name: str) -> None:
    model = pb.load(twin(name))
    cells = [pb.scale(head.z, 0.0, positions=at) for layer in model.layers for head in layer.heads for at in (2, -1)]
    cells += [pb.scale(layer.resid_in, 1.2, positions=3) for layer in model.layers]
    exact = pb.sweep(model, a_task(), cells)["value"]
    results = {how: pb.sweep(model, a_task(), cells, precision=how) for how in ("bf16", "delta-bf16")}
    off = {how: float((result["value"] - exact).abs().mean()) for how, result in results.items()}
    assert 0 < off["delta-bf16"] < off["bf16"]
    assert "delta-bf16: largest error" in results["delta-bf16"].notes[-1]
    assert all("forward" not in module.__dict__ for module in model.hf.modules())


def test_using_tells_the_sweeps_inside_a_method_how_to_run(model: pb.Model, tmp_path: Path) -> None:
    task, cells = a_task(), [pb.zero(head.z) for head in model.layers[0].heads]
    seen: list[tuple[int, int]] = []
    estimates = []
    with using(progress=lambda *at: seen.append(at), announce=estimates.append, folder=tmp_path / "kept"):
        first = pb.sweep(model, task, cells)
        again = pb.sweep(model, task, cells)  # from the folder
        other = pb.sweep(model, task, cells[:1])  # another sweep has a folder of its own
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert seen[-1] == (1, 1)
    assert (len(cells), len(cells)) in seen
    assert estimates[0].rows == len(cells) * len(task)
    assert torch.equal(first["value"], again["value"])
    assert close(first["value"][:1], other["value"])
    plain = len(seen)
    pb.sweep(model, task, cells)
    assert len(seen) == plain, "outside the block all is as before"
    with using(memory=10), pytest.raises(PatchbayError, match="memory=10 bytes cannot hold one cell"):
        pb.sweep(model, task, cells)


def test_of_several_sweeps_cost_and_progress_are_told_of_all(model: pb.Model) -> None:
    """Three parts of 2, 1 and 1 shares, the first of them two sweeps: each cell counts as its share of the whole."""
    task, cells = a_task(), [pb.zero(head.z) for head in model.layers[0].heads]
    seen: list[tuple[int, int]] = []
    costs: list[Any] = []

    def method() -> None:
        for part in in_turn(("a", "b", "c"), (2, 1, 1)):
            for _ in in_turn((1, 2)) if part == "a" else [1]:
                pb.sweep(model, task, cells)

    with using(progress=lambda *at: seen.append(at), announce=costs.append, pieces=len(cells)):
        method()
        n = len(cells)
        ends = [seen.index((i * n, 4 * n)) for i in (1, 2, 3, 4)]
        assert ends == sorted(ends)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert {total for _, total in seen} == {4 * n}
        assert [cost.rows for cost in costs] == [4 * n * len(task)]
        pb.sweep(model, task, cells)  # after them, one by itself
        assert seen[-1] == (n, n)
        assert costs[1].rows == n * len(task)
        method()
        assert [cost.rows for cost in costs[2:]] == [4 * n * len(task)]
        with pytest.raises(ZeroDivisionError):
            for _ in in_turn((1, 2)):
                raise ZeroDivisionError
        pb.sweep(model, task, cells)
        assert seen[-1] == (n, n)
    assert list(in_turn("ab")) == ["a", "b"]


@pytest.mark.parametrize("method", ["activation_patching", "causal_tracing"])
def test_a_method_says_what_all_of_its_sweeps_cost(model: pb.Model, method: str) -> None:
    """Prompts of two lengths have sweeps of their own; what is told before the first, and how far they are, is of both."""
    ids = ((5, 9, 40, 2), (7, 8, 9, 8), (5, 9, 40, 2, 11, 3), (7, 7, 9, 8, 30, 12))
    twins = tuple((row[0], row[1] + 1, *row[2:]) for row in ids)
    task = pb.Task(
        "two lengths",
        ids,
        right=(4, 5, 6, 7),
        wrong=((8,), (9,), (10,), (11,)),
        corrupted=twins,
        marks={"subject": ((1,),) * 4},
    )
    seen: list[tuple[int, int]] = []
    costs: list[Any] = []
    options = {"draws": 2} if method == "causal_tracing" else {}
    with using(progress=lambda *at: seen.append(at), announce=costs.append):
        getattr(pb.prove, method)(model, task, **options)
    assert len(costs) == 1
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert sum(done == total for done, total in seen) == 1


def test_bf16_says_its_error(model: pb.Model) -> None:
    result = pb.sweep(model, a_task(), [pb.zero(h.z) for h in model.layers[0].heads], precision="bf16")
    assert any("largest error" in note for note in result.notes)


def test_estimate_counts(model: pb.Model) -> None:
    found = estimate(
        model, a_task(3, 10), [pb.zero(model.layers[i].heads[0].z, positions=4) for i in range(model.n_layers)]
    )
    assert found.rows == 3 * model.n_layers
    per_layer = sum(p.numel() for p in model.modules[0].layer.parameters())
    assert found.flops == 2.0 * per_layer * 3 * 6 * sum(range(1, model.n_layers + 1))
    assert "GFLOP" in str(found)


def test_the_token_with_id_0_is_a_token(model: pb.Model) -> None:
    edit = pb.zero(model.layers[0].heads[0].z)
    found = pb.sweep(model, pb.Task("zero", [[3, 4, 5]], [7], [[0]]), [edit])["value"]
    logits = pb.run(model, [[3, 4, 5]], edits=[edit]).last_logits[0]
    assert close(float(found), float(logits[7] - logits[0]), of=logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, t: pb.sweep(m, t, []), "at least one edit"),
        (lambda m, t: pb.sweep(m, t, [pb.zero(Port("attn.z", 99, 0))]), "layers 0.."),
        (lambda m, t: pb.sweep(m, t, [pb.zero(m.layers[0].heads[0].z, positions=50)]), "outside prompt"),
        (lambda m, t: pb.sweep(m, t, [pb.zero(m.layers[0].heads[0].z)], memory=1000), "cannot hold one cell"),
        (lambda m, t: pb.sweep(m, t, [pb.zero(m.layers[0].heads[0].z)], "blue"), "metric"),
        (lambda m, t: pb.sweep(m, t, [pb.zero(m.layers[0].heads[0].z)], on="corrupted"), "no corrupted twins"),
        (lambda m, t: pb.sweep(m, [[3, 4]], [pb.zero(m.layers[0].heads[0].z)]), "without a Task"),
        (lambda m, t: pb.sweep(m, t, [pb.zero(m.layers[0].heads[0].z)], precision="fp8"), "precision"),
    ],
)
def test_bad_input(model: pb.Model, make: object, message: str) -> None:
    with pytest.raises(PatchbayError, match=message):
        make(model, a_task())  # type: ignore[operator]


def test_inside_edited_is_refused(model: pb.Model) -> None:
    edit = pb.zero(model.layers[0].heads[0].z)
    with pytest.raises(PatchbayError, match="inside model.edited"), model.edited(edit):
        pb.sweep(model, a_task(), [edit])


def cells_of(model: pb.Model) -> list[pb.Edit]:
    return [pb.zero(h.z, positions=p) for layer in model.layers for h in layer.heads for p in range(10)]


@forks
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_in_the_middle_then_resumed_gives_the_same_bytes(model: pb.Model, tmp_path: Path) -> None:
    """Killed in a process of its own; resumed, and run afresh, in this one."""
    slow = {"memory": 6_400_000, "folder": tmp_path / "a", "progress": lambda done, total: time.sleep(0.3)}
    killed = multiprocessing.get_context("fork").Process(
        target=pb.sweep, args=(model, a_task(), cells_of(model)), kwargs=slow
    )
    killed.start()
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "a").glob("batch-*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    killed.join()
    done = sorted((tmp_path / "a").glob("batch-*.safetensors"))
    assert len(done) >= 2
    stamps = {path: path.stat().st_mtime_ns for path in done}
    resumed, fresh = (
        pb.sweep(model, a_task(), cells_of(model), memory=6_400_000, folder=tmp_path / folder)["value"]
        for folder in ("a", "b")
    )
    assert len(list((tmp_path / "b").glob("batch-*.safetensors"))) > len(done)  # it was in the middle
    assert all(
        path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()
    )  # finished batches were kept, not redone
    assert torch.equal(resumed, fresh)


def test_another_sweep_in_the_folder_is_refused(model: pb.Model, tmp_path: Path) -> None:
    task = a_task()
    pb.sweep(model, task, [pb.zero(model.layers[0].heads[0].z)], folder=tmp_path / "s")
    with pytest.raises(PatchbayError, match="another sweep"):
        pb.sweep(model, task, [pb.zero(model.layers[0].heads[1].z)], folder=tmp_path / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(PatchbayError, match="not empty"):
        pb.sweep(model, task, [pb.zero(model.layers[0].heads[0].z)], folder=tmp_path / "other")


@pytest.mark.slow
def test_ray_gives_the_same_also_when_a_worker_is_killed(model: pb.Model, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    task, flag, edits = a_task(), str(tmp_path / "killed"), cells_of(model)

    def score(logits: Tensor, prompts: Tensor) -> Tensor:
        return logits[:, 5] - logits[:, 9]

    def score_and_die_once(logits: Tensor, prompts: Tensor) -> Tensor:
        import signal

        try:
            if len(logits) > 3:  # a batch of cells in a worker, not the base run
                os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass
        return logits[:, 5] - logits[:, 9]

    local = pb.sweep(model, task, edits, score, memory=6_400_000)
    spread = pb.sweep(model, task, edits, score_and_die_once, memory=6_400_000, executor="ray", workers=2)
    assert Path(flag).exists()  # a worker did die
    assert torch.equal(local["value"], spread["value"])
    assert not ray.is_initialized()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral", "qwen3_moe", "phi", "cohere2", "deepseek_v3"])
def test_the_narrow_way_reproduces_the_base_run_where_attention_is_asked_through_the_interface(family: str) -> None:
    """It falls back silently where it does not, and only a slower sweep would tell."""
    base = base_run(pb.load(twin(family)), torch.randint(3, 60, (2, 9)), [])
    assert base.narrow
    assert base.refusal is None


def test_a_sweep_says_where_its_numbers_come_from() -> None:
    model, task = pb.load(twin("llama")), a_task()
    edits = [pb.zero(model.layers[0].attn.z)]
    known = (found := pb.sweep(model, task, edits)).provenance
    assert (known["method"], known["options"]) == (
        "sweep",
        {"metric": "logit_diff", "on": "clean", "precision": "fp32"},
    )
    assert known["model"]["fingerprint"] == model.fingerprint
    assert known["task"] == task.to_json()
    assert known["wall_time_s"] > 0
    assert {"versions", "date"} <= set(known)
    assert "made by hand" not in str(found)
    with pytest.raises(PatchbayError, match="only what a method returned can be replayed"):
        pb.replay(found)
    prompts = [list(ids) for ids in task.clean]
    assert pb.sweep(model, prompts, edits, lambda logits, at: logits[:, 0]).provenance["task"] == {"prompts": prompts}


def test_a_folder_is_not_another_tasks_or_another_metrics(model: pb.Model, tmp_path: Path) -> None:
    """Right and wrong exchanged, two lambdas, two values closed over: never the kept numbers of the other."""
    task = dataclasses.replace(a_task(), wrong=((30,), (31,), (32,)))
    turned = dataclasses.replace(task, right=(30, 31, 32), wrong=tuple((token,) for token in task.right))
    edits = [pb.zero(model.layers[0].heads[0].z)]
    kept = pb.sweep(model, task, edits, folder=tmp_path / "answers")
    with pytest.raises(PatchbayError, match="answers"):
        pb.sweep(model, turned, edits, folder=tmp_path / "answers")
    with using(folder=tmp_path / "command line"):
        there, back = (pb.sweep(model, one, edits) for one in (task, turned))
    assert torch.equal(there["value"], kept["value"])
    assert close(back["value"], -kept["value"])

    def scaled(by: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda logits, prompt: by * logits[:, 5]

    metrics = [lambda x, i: x[:, 5], lambda x, i: x[:, 6], lambda x, i: -x[:, 5], scaled(2.0), scaled(3.0)]
    for at, metric in enumerate(metrics):
        pb.sweep(model, task, edits, metric, folder=tmp_path / str(at))
        for other in metrics[:at] + metrics[at + 1 :]:
            with pytest.raises(PatchbayError, match="another sweep"):
                pb.sweep(model, task, edits, other, folder=tmp_path / str(at))
    pb.sweep(model, task, edits, scaled(2.0), folder=tmp_path / "3")  # made again, the same
    with pytest.raises(PatchbayError, match=r"_thread\.lock, which cannot be told"):
        pb.sweep(model, task, edits, functools.partial(lambda lock, x, i: x[:, 5], Lock()), folder=tmp_path / "lock")
