"""What happens to runs around their training: two calls in one folder, disks and memory that are full, half precision, several processes."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

import patchbay as pb
from patchbay import files
from patchbay.tiny.twins import twin
from patchbay.train import _together, _trainer
from patchbay.train._copies import copied
from patchbay.train._documents import read_whose
from patchbay.train._kept import Kept
from patchbay.train._low_rank import LoraSB, LowRank, adapter
from patchbay.train._objectives import names, objective
from patchbay.train._objectives._objective import Objective, collated, learned
from patchbay.train._plan import Arm, Rows, plan_of, split
from patchbay.train._runs import Lab, by_document, ended, run_of
from patchbay.train._trainer import trained
from tests.given import lent
from tests.measure import words
from tests.tolerance import close
from tests.train.test_objectives import SETTINGS
from tests.train.test_objectives_in_parts import CLASSES, LABELLED, PRINCIPLED, REASONED
from tests.train.test_variant import PLAN, texts, variant

# --- one folder ---------------------------------------------------------------------------------------


def test_one_call_at_a_time_has_a_folder(tmp_path: Path) -> None:
    """A second one is told; what a killed one left half written goes; runs that ended are told as they were."""
    folder = tmp_path / "runs"
    whole = variant(folder=str(folder), plan={**PLAN, "steps": 0})
    with files.alone(folder), pytest.raises(pb.PatchbayError, match="is being written to by another call: let it end"):
        variant(folder=str(folder), plan={**PLAN, "steps": 0})
    (folder / ".variant-0.aa.partial").mkdir()
    (folder / ".lab.json.bb.partial").write_text("half")
    (folder / ".twin-0").mkdir()  # killed between its last two acts
    again = variant(folder=str(folder), plan={**PLAN, "steps": 0})
    assert sorted(os.listdir(folder)) == ["lab.json", "null-0", "twin-0", "variant-0"]
    assert torch.equal(again["by_run"], whole["by_run"])


def test_of_processes_that_train_together_the_first_alone_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another's file of the request, half written when the first clears what killed calls left, would be gone before it has its name."""
    folder, request = tmp_path / "runs", {"of": "this"}
    monkeypatch.setenv("RANK", "1")
    second = Kept(folder, folder, request)
    assert not folder.exists()
    monkeypatch.setenv("RANK", "0")
    with Kept(folder, folder, request).alone():
        assert os.listdir(folder) == ["lab.json"]
    monkeypatch.setenv("RANK", "1")
    with second.alone(), pytest.raises(pb.PatchbayError, match="holds runs of another of"):
        Kept(folder, folder, {"of": "that"})


def test_runs_that_ended_are_told_as_they_were(tmp_path: Path) -> None:
    """Also of a model whose own numbers a checkpoint does not hold: angles of positions in half precision."""
    lab = Lab(pb.load(twin("llama").to(torch.bfloat16)), texts(), texts(4, 1), plan_of({"steps": 0, "panel": 2}))

    def run() -> Any:
        return run_of(lab, "twin", Arm(), 0, Kept(tmp_path, tmp_path, {"of": "this"}))

    one, two = run(), run()
    assert torch.equal(one.scores, two.scores)
    assert (one.panel, one.nonzero, one.weights, one.folder) == (two.panel, two.nonzero, two.weights, two.folder)
    assert one.panel
    told = json.loads((file := tmp_path / "twin-0" / "run.json").read_text())
    for lacking in (set(told) - {"state"}, {"arm"}, None):  # as one of another version, and as none
        file.write_text(json.dumps(lacking and {key: told[key] for key in lacking}))
        named = "(state)" if lacking and len(lacking) > 1 else "scores, losses, "
        with pytest.raises(pb.PatchbayError, match="remove .*twin-0, and it is trained") as refused:
            run()
        assert named in str(refused.value)
    (tmp_path / "lab.json").write_text("[1]")
    with pytest.raises(pb.PatchbayError, match="lab.json is not of training runs"):
        run()


# --- full disks and memory ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 0"),
            "could not be written whole",
        ),
    ],
)
def test_a_full_disk_is_said_and_the_checkpoint_before_kept(
    error: Exception, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = transformers.Trainer._save_optimizer_and_scheduler, iter(range(99))

    def full(self: Any, *args: Any) -> Any:
        if next(calls) == 1:
            raise error
        return own(self, *args)

    monkeypatch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", full)
    plan = plan_of({"steps": 3, "batch_size": 4, "every": 1})

    def run(*, keep: bool = True) -> Any:
        return trained(copied(lent("llama")), Rows(texts(), Arm(), plan, 0), Arm(), plan, tmp_path, keep=keep)

    with pytest.raises(
        pb.PatchbayError, match=rf"could not write a checkpoint to .*{says}; .*checkpoint-1 is kept, and"
    ):
        run()
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    assert run() == run(keep=False)


def test_memory_that_runs_out_while_scoring_is_said_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Objective, "scores", full)
    with pytest.raises(
        pb.PatchbayError, match=r"memory ran out .*\(MemoryError\); .*checkpoint-6 is kept, and the same"
    ):
        variant(folder=str(tmp_path / "runs"))
    with pytest.raises(RuntimeError, match="another"), _trainer.disk_named(tmp_path), _trainer.memory_named(None):
        raise RuntimeError("another fault")


# --- half precision -----------------------------------------------------------------------------------


def test_states_of_optimisers_come_back_bit_for_bit_in_half_precision() -> None:
    """Factors are float32 beside weights of bfloat16, before a checkpoint and after it."""
    steps = []
    for cut in (False, True):
        W = torch.nn.Parameter(torch.ones(6, 9, dtype=torch.bfloat16))
        made = LowRank([W], 0.05, LoraSB(rank=2), frozenset([id(W)]))
        for step in range(4):
            W.grad = torch.randn(6, 9, generator=torch.Generator().manual_seed(step)).to(W.dtype)
            made.step()
            if cut and step == 1:
                held = made.state_dict()
                made = LowRank([W], 0.05, LoraSB(rank=2), frozenset([id(W)]))
                made.load_state_dict(held)
        assert made.state[W]["R"].dtype == torch.float32
        steps.append((made.state[W]["R"], W.detach()))
    assert torch.equal(steps[0][0], steps[1][0])
    assert torch.equal(steps[0][1], steps[1][1])


def test_half_precision_is_trained_by_every_optimiser(tmp_path: Path) -> None:
    """A LoRA is written whose rest is what the weights round; a mask of four axes is heard to the same rounding."""
    model = pb.load(twin("llama").to(torch.bfloat16))
    objective("bico").adapt(model)
    lab = Lab(model, texts(), texts(), plan_of({"steps": 2, "batch_size": 4}))
    assert ended(lab, Arm(optimizer="cosmos"), 0).fingerprint != model.fingerprint
    adapter(model, ended(lab, Arm(optimizer="lora-sb:rank=2"), 0), 2, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


# --- several processes --------------------------------------------------------------------------------


def documents_of(name: str) -> list[Any]:
    parts: dict[str, list[Any]] = {
        "label-supervision": [[[5, 6], [20, 21]], *LABELLED],
        "pinto": REASONED * 2,
        "sami": PRINCIPLED * 2,
    }
    parts["fine-grained"] = [[[5 + i], list(range(60))] for i in range(4)]
    return parts.get(name, [[[5 + i, 6, 7], [8] * (i + 1), [9]] for i in range(4)])


@pytest.mark.parametrize("name", names())
def test_parts_of_a_batch_make_its_loss_or_the_objective_says_why_not(name: str) -> None:
    """Two processes' mean loss over the mean count is that of one with all rows; where it is not, several processes are refused."""
    given = {
        **SETTINGS,
        "label-supervision": CLASSES,
        "infill": "infill:vocab=96,share=0.5",
        "bico": "bico:both=1,share=0.5,mask=1",
    }
    model, aim = pb.load(twin("llama")), objective(given.get(name, name))
    aim.adapt(model)
    one = aim.of_batch(random.Random(0))
    documents = documents_of(name)
    rows = [
        one.row(
            [[t % 10 for t in u] for u in d] if name in ("cloned", "langsamp", "translico") else d, random.Random(i)
        )
        for i, d in enumerate(documents)
    ]

    def loss(some: list[Any], n: Any) -> tuple[Any, torch.Tensor]:
        batch = collated(some)
        with torch.enable_grad():
            found = aim.loss(model, model.hf, batch, learned(batch["labels"]) if n is None else n)
            [slope] = torch.autograd.grad(found, [model.hf.model.layers[0].mlp.up_proj.weight.requires_grad_()])
        return found.detach(), slope

    counts = [learned(collated(some)["labels"]).float() for some in (rows[:2], rows[2:])]
    halves = [loss(some, sum(counts) / 2) for some in (rows[:2], rows[2:])]
    whole = loss(rows, None)
    mean = sum(one for one, _ in halves) / 2, sum(slope for _, slope in halves) / 2
    alike = bool(close(mean[0], whole[0], of=10.0)) and bool(
        close(mean[1], whole[1], of=float(whole[1].abs().max()), noise=512)
    )
    assert alike == (not aim.alone or name == "langsamp"), name


def test_several_processes_are_refused_where_their_parts_are_not_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 2)
    for text in ("self-evolution", "langsamp:vocab=20"):
        arm, plan = Arm(text), plan_of(PLAN)
        with pytest.raises(pb.PatchbayError, match=rf"{text}: its .*, and there are 2 processes: train it in one"):
            _trainer._trainer(lent("llama"), Rows(texts(), arm, plan, 0), arm, plan, Path(), False, [], [])


def of_lengths() -> list[Any]:
    rng = random.Random(1)
    return [[[rng.randrange(5, 30) for _ in range(rng.randrange(1, 9))] for _ in range(3)] for _ in range(20)]


SHARED: tuple[tuple[str, Any], ...] = (
    ("spt", of_lengths()),
    ("bico:both=1,mask=1", of_lengths()),
    ("sami", PRINCIPLED * 8),
)


def _process(rank: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29619"
    )
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for number, (text, data) in enumerate(SHARED):
        found = variant(data, objective=text, folder=f"{folder}/{number}", plan={**PLAN, "every": 3})
        torch.save((found.tables["steps"], found["by_run"]), f"{folder}/{number}-{rank}.pt")
    assert (_together.first(), _together.world()) == (rank == 0, (rank, 2))
    dist.destroy_process_group()


@pytest.mark.slow  # two processes import torch and start a group
def test_two_processes_make_the_steps_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_process, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    for number, (text, data) in enumerate(SHARED):
        alone = variant(data, objective=text, plan=PLAN)
        for rank in (0, 1):
            steps, by_run = torch.load(tmp_path / f"{number}-{rank}.pt")
            mine, theirs = (torch.tensor([row["loss"] for row in some]) for some in (alone.tables["steps"], steps))
            assert close(mine, theirs, of=10.0, noise=512)  # Adam divides by what rounds
            assert close(by_run, alone["by_run"], of=10.0, dtype=torch.float32, noise=512)
        assert sorted(os.listdir(tmp_path / str(number))) == ["lab.json", "null-0", "twin-0", "variant-0"]


# --- documents ----------------------------------------------------------------------------------------


def test_pieces_of_one_document_are_on_one_side_and_one_number() -> None:
    long: list[Any] = [[5 + i % 9 for i in range(n)] for n in (40, 7, 33, 20, 8)]
    rows, whose = read_whose(lent("llama"), long, 10)
    assert whose == [0] * 4 + [1] + [2] * 4 + [3] * 2 + [4]
    train, held = split(len(rows), 0.4, whose)
    assert not {whose[i] for i in train} & {whose[i] for i in held}
    assert (sorted(train + held), len({whose[i] for i in held})) == (list(range(12)), 2)
    assert split(5, 0.4) == split(5, 0.4, range(5))
    lab = Lab(lent("llama"), [], [[[1] * 10], [[1] * 3], [[1] * 5]], plan_of({}), whose=[7, 2, 7])
    expected = torch.tensor([2.0, (9 * 1.0 + 4 * 3.0) / 13], dtype=torch.float64)
    assert close(by_document(lab, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)), expected, dtype=torch.float64)
    found = variant(long, plan={**PLAN, "steps": 0, "length": 10, "held": 0.4})
    assert any("rows of 2 documents of which none was trained on" in note for note in found.notes)
    alone = variant(long[:1], plan={**PLAN, "steps": 0, "length": 10})
    assert any("rows of the one document, which was cut" in note for note in alone.notes)
    assert bool(alone["low"].isnan().all())


def test_tokens_that_a_text_may_and_may_not_have() -> None:
    """Beyond the model's rows, half of a letter, and an unknown token that has another use, with which OPT begins every text."""
    tokenizer = words.tokenizer("characters")
    tokenizer.add_tokens([f"w{i}" for i in range(300)])
    model = pb.load(lent("gpt2").hf, tokenizer)
    with pytest.raises(pb.PatchbayError, match=r"document 1: \d+ is no token; this model has 0.."):
        read_whose(model, ["the cat", "the w250"], 32)
    with pytest.raises(pb.PatchbayError, match="document 0 holds half a letter"):
        read_whose(model, ["a\ud800"], 32)
    with pytest.raises(pb.PatchbayError, match="documents are a list or a file, got dict"):
        read_whose(model, {"text": ["the cat"]}, 32)
    tokenizer = words.tokenizer("characters")
    tokenizer.unk_token = tokenizer.bos_token = tokenizer.convert_ids_to_tokens(tokenizer("the")["input_ids"][0])
    assert read_whose(pb.load(lent("gpt2").hf, tokenizer), ["the cat"], 32)[1] == [0]
