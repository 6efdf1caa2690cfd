"""train.tune_parts: the chosen entries learn, every other number is bit for bit what it was, and the lent model too."""

from __future__ import annotations

import copy
import hashlib
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.signal.port import parse_part
from patchbay.tiny import planted, twins
from patchbay.train import _entries
from patchbay.train._entries import entries
from tests.tolerance import NOISE, close

FILE: Any = importlib.import_module("patchbay.train.tune_parts")


def one_answer(model: pb.Model, n: int = 24, wrong: int = 9) -> pb.Task:
    """Random words whose right answer is always the same token: something that any MLP can learn."""
    rows = torch.randint(10, 60, (n, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return pb.Task("always", rows, [7] * n, [[wrong]] * n)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any, tmp_path: Path) -> None:
    """The parts learn the task, on held-out prompts; the checkpoint holds them; by SHA-256 all other tensors are untouched."""
    built = planted.null(form=form, seed=1)
    model = pb.load(built.model, built.tokenizer)
    before = {name: digest(tensor) for name, tensor in model.hf.state_dict().items()}
    task = one_answer(model)
    done = pb.train.tune_parts(model, task, "L1.mlp", folder=str(tmp_path / "tuned"), steps=25, rate=5e-3)  # type: ignore[arg-type]
    assert {name: digest(tensor) for name, tensor in model.hf.state_dict().items()} == before
    assert done["gain_low"] > 1.0
    assert done["p"] < 0.01
    assert done.tables["steps"][-1]["loss"] < done.tables["steps"][0]["loss"] / 2
    tuned = pb.load(tmp_path / "tuned")
    assert tuned.fingerprint == done.provenance["checkpoint"]["fingerprint"]
    now = {name: digest(tensor) for name, tensor in tuned.hf.state_dict().items()}
    changed = {name for name in before if now[name] != before[name]}
    assert changed == {row["tensor"] for row in done.tables["tensors"]}
    assert all(".mlp." in name and ".1." in name for name in changed)
    logits = pb.run(tuned, task[:4]).last_logits
    assert (logits[:, 7] > logits[:, 9]).all()


def _steps(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The first step g / (|g| + 1e-8) at both ends of what rounding leaves open of g, the larger one first.

    The step is a sign wherever |g| is far above 1e-8, so rounding decides it where g is near 0: it rises with g, and what
    lies between its values at both ends is all that can be asked for.
    """
    g = gradient.double()
    noise = NOISE * torch.finfo(torch.float32).eps * float(g.abs().max())
    return (g + noise) / ((g + noise).abs() + 1e-8), (g - noise) / ((g - noise).abs() + 1e-8)


def test_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """One AdamW step by hand on every weight of a head: m = g, v = g^2 after bias correction, decay on those alone."""
    built = planted.null(form="llama", seed=1)
    model, rate, decay = pb.load(built.model, built.tokenizer), 1e-2, 0.1
    task = one_answer(model, 16)
    seen: dict[str, Any] = {}
    proved = FILE._proved

    def keep(lent: pb.Model, tuned: pb.Model, chosen: Any) -> Any:
        seen["hf"] = tuned.hf
        return proved(lent, tuned, chosen)

    monkeypatch.setattr(FILE, "_proved", keep)
    monkeypatch.setattr(FILE, "DECAY", decay)
    found = pb.train.tune_parts(model, task, "L1.H2", steps=1, rate=rate, batch_size=64)  # type: ignore[arg-type]
    dev = task.split(0.5, 0)[0]
    own = [dev.score(hf(torch.tensor(dev.clean)).logits[:, -1]).mean().detach() for hf in (model.hf, seen["hf"])]
    assert close(found["score_train"], torch.stack(own), of=1.0)
    assert not close(own[0], own[1], of=1.0)
    twin = copy.deepcopy(model.hf)
    logits = twin(torch.tensor(dev.clean)).logits[:, -1]
    (-logits.log_softmax(-1)[:, 7].mean()).backward()
    q, q_now = twin.model.layers[1].self_attn.q_proj, seen["hf"].model.layers[1].self_attn.q_proj
    o, o_now = twin.model.layers[1].self_attn.o_proj, seen["hf"].model.layers[1].self_attn.o_proj
    d = model.d_head(1)
    own = slice(2 * d, 3 * d)
    for old, new, cut in ((q.weight, q_now.weight, (own,)), (o.weight, o_now.weight, (slice(None), own))):
        low, high = (old[cut].detach().double() * (1 - rate * decay) - rate * s for s in _steps(old.grad[cut]))
        rounding = NOISE * torch.finfo(torch.float32).eps * float(old.detach().abs().max())
        assert bool((low - rounding <= new[cut]).all())
        assert bool((new[cut] <= high + rounding).all())
        assert (
            float((high - low < 1e-4 * rate).double().mean()) > 0.9
        )  # nearly every weight is held to a ten-thousandth
        moved = torch.zeros_like(old, dtype=torch.bool)
        moved[cut] = True
        assert torch.equal(new[~moved], old[~moved])
        assert not torch.equal(new[cut], old[cut])
    texts = torch.randint(model.vocab_size, FILE.UNRELATED, generator=torch.Generator().manual_seed(0))
    texts = torch.where(texts == model.config.pad_token_id, texts + 1, texts)
    told = [hf(texts).logits[:, -1].double().log_softmax(-1).detach() for hf in (model.hf, seen["hf"])]
    assert close(found["drift"], (told[0].exp() * (told[0] - told[1])).sum(-1).mean(), of=1.0)
    for name, tensor in model.hf.state_dict().items():
        if "layers.1.self_attn.q_proj" not in name and "layers.1.self_attn.o_proj" not in name:
            assert torch.equal(tensor, seen["hf"].state_dict()[name]), name


def test_null(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that cannot matter learn nothing: the neurons' gradient is there, an unused expert's is not; decay 0 leaves it."""
    built = planted.routed_expert(seed=2)
    model = pb.load(built.model, built.tokenizer)
    layer, own = int(built.truth["expert"][1]), int(built.truth["expert"][-1])
    rows = [[i] for i in range(3, 60) if i not in built.truth["class_ids"]][:16]
    weights = pb.run(model, rows, taps=[pb.Port("router.weights", layer)])[pb.Port("router.weights", layer)]
    assert not bool((weights[:, :, own] != 0).any())
    task = pb.Task("never", rows, [7 if row != [7] else 8 for row in rows], metric="log_probability")
    monkeypatch.setattr(FILE, "DECAY", 0.0)
    done = pb.train.tune_parts(model, task, f"L{layer}.E{own}", steps=3)  # type: ignore[arg-type]
    assert done["gain"] == 0.0
    assert done["drift"] == 0.0 or done["drift"] < 1e-6
    assert all(row["largest_change"] == 0.0 and row["before"] == row["after"] for row in done.tables["tensors"])


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "llama",
        "gpt_neox",
        "falcon",
        "falcon grouped",
        "bloom",
        "phi3",
        "gemma2",
        "mixtral",
        "gpt_oss",
        "mamba2",
        "opt",
        "deepseek_v3",
        "deepseek_v2",
    ],
)
def test_entries_are_all_that_a_part_is(name: str) -> None:
    """Changing a part's entries changes what it computes; heads and neurons of a layer share no entry."""
    model = pb.load(twins.twin(name))
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    parts = ["L1.attn", "embed", "final_norm"]
    parts += ["L1.H1", "L1.KV0"] if model.n_heads(1) else []
    parts += ["L1.N3"] if "mlp.act" in model.signals(1) else []
    parts += ["L1.E0,L1.E1,L1.E2,L1.E3"] if model.n_experts(1) else []
    for text in parts:
        chosen = entries(model, [parse_part(one) for one in text.split(",")])
        assert chosen
        hf = copy.deepcopy(model.hf)
        with torch.no_grad():
            for tensor, places in ((dict(hf.named_parameters())[n], p) for n, p in chosen.items()):
                tensor.view(-1)[places] *= 1.5
        moved = hf(ids).logits - model.hf(ids).logits
        assert moved.abs().max() > 1e-4, text
    heads = [entries(model, [pb.Part(1, "head", h)]) for h in range(model.n_heads(1))]
    for tensor in {n for one in heads for n in one}:
        places = torch.cat([one[tensor] for one in heads])
        assert len(places.unique()) == len(places), tensor
    if heads:
        both = entries(
            model,
            [
                *(pb.Part(1, "head", h) for h in range(len(heads))),
                *(pb.Part(1, "group", g) for g in range(model.n_groups(1))),
            ],
        )
        for tensor, places in both.items():
            whole = dict(model.hf.named_parameters())[tensor].numel()
            assert len(places) == whole, f"{tensor}: heads and groups are {len(places)} of {whole}"


def test_a_number_that_moves_outside_the_parts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pb.load(planted.null(form="llama", seed=1).model)
    fit = FILE._fit
    for reach in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):

        def spill(tuned: pb.Model, *args: Any, reach: str = reach) -> Any:
            losses = fit(tuned, *args)
            with torch.no_grad():
                dict(tuned.hf.named_parameters())[reach].view(-1)[0] += 1e-6
            return losses

        monkeypatch.setattr(FILE, "_fit", spill)
        with pytest.raises(pb.PatchbayError, match=f"{reach}.*a fault of tune_parts"):
            pb.train.tune_parts(model, one_answer(model, 8), "L1.H1", steps=1)  # type: ignore[arg-type]


def test_errors(tmp_path: Path) -> None:
    model = pb.load(twins.twin("llama"))
    task = one_answer(model, 8)
    (tmp_path / "file").write_text("in the way")

    def tune(parts: Any, **options: Any) -> Any:
        return pb.train.tune_parts(model, task, parts, **{"steps": 1, **options})

    for parts, options, message in (
        ([], {}, "no parts"),
        ("L1.H9", {}, r"L1\.H9"),
        ("L7.mlp", {}, r"0\.\.1"),
        ("L1.router", {}, "no weights there"),
        ("L1.mlp", {"rate": float("nan")}, "a rate above 0"),
        ("L1.mlp", {"steps": 0}, "1 or more steps"),
        ("L1.mlp", {"folder": str(tmp_path)}, "already there"),
        ("L1.mlp", {"rate": 1e30, "steps": 3}, "no longer finite"),
        ("L1.mlp", {"folder": str(tmp_path / "file" / "tuned")}, "could not save.*nothing was written"),
    ):
        with pytest.raises(pb.PatchbayError, match=message):
            tune(parts, **options)
    with pytest.raises(pb.PatchbayError, match="leave the block"), model.edited(pb.turn.scale("L0.attn", 0.5)):  # type: ignore[arg-type]
        tune("L1.mlp")
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert _entries.entries(model, []) == {}
