"""Probes: edits made where a probe fires, as edits at those very positions are made; through batches, caches, knobs and sweeps."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import patchbay as pb
from patchbay.edits.edit import load_edits, pack, save_edits, unpack
from patchbay.knobs.rows import generate_rows
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError, Port
from patchbay.tiny.twins import twin
from tests.tolerance import close

TOKEN = 17
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@functools.cache
def model_of(name: str = "llama") -> Model:
    return pb.load(twin(name).eval())


def ids(n_prompts: int = 3, n: int = 8, seed: int = 0) -> Tensor:
    found = torch.randint(20, 60, (n_prompts, n), generator=torch.Generator().manual_seed(seed))
    found[0, 2] = TOKEN
    if n == 8:
        found[0, 5] = found[1, 7] = TOKEN
    return found


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def is_token(model: Model) -> pb.Probe:
    """A probe that fires where the embedded token is TOKEN: planted, its direction is what sets that token's embedding apart."""
    weight = model.hf.get_input_embeddings().weight.detach().double()
    away = weight[TOKEN] - weight.mean(0)
    direction = torch.linalg.solve(torch.cov(weight.T) + 1e-3 * torch.eye(len(away)).double(), away).float()
    embed = pb.run(model, torch.arange(weight.shape[0])[:, None], taps=["embed"])["embed"][:, 0]
    readings = embed @ direction
    others = torch.cat([readings[:TOKEN], readings[TOKEN + 1 :]]).max()
    assert readings[TOKEN] > others + 1e-3 * readings.abs().max()
    return pb.Probe("embed", direction, float(readings[TOKEN] + others) / 2)


def kinds(model: Model) -> list[pb.Edit]:
    """Edits of every kind, at ports of every axis."""
    d, neurons = model.d_model, model.n_neurons(1)
    return [
        pb.add("L0.resid_out", noise(d)),
        pb.zero("L1.attn.out"),
        pb.scale("L1.H1.z", -2.0),
        pb.replace("L0.H0.out", noise(d, seed=1)),
        pb.scale("L1.mlp.act", 1.0 + noise(neurons)),
        pb.project("L1.resid_in", noise(2, d)),
        pb.add("L0.H2.q", noise(model.d_head(0))),
        pb.block("L1.H0.pattern", key=0, query=slice(1, None)),
        pb.add("logits", noise(model.vocab_size)),
    ]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bloom", "mixtral"])
def test_planted_where_the_probe_finds_a_token_the_edit_is_that_at_the_token(name: str) -> None:
    model = model_of(name)
    probe = is_token(model)
    edits = [edit for edit in kinds(model) if edit.port.layer is None or edit.port.signal in model.signals(0)]
    for edit in edits:
        at_token = replace(edit, positions=pb.Token(TOKEN))
        if edit.op == "block":
            mask = (ids() == TOKEN) & (torch.arange(8) > 0)
            at_token = replace(edit, positions=mask)
        expected = pb.run(model, ids(), edits=[at_token])
        found = pb.run(model, ids(), edits=[edit.when(probe)])
        assert torch.equal(found.logits, expected.logits), edit
        assert found.touched == expected.touched == [[(2, 5), (7,), ()]], edit
    assert not torch.equal(found.logits, pb.run(model, ids()).logits)


@pytest.mark.parametrize("more", [{}, {"prefill_chunk_size": 3}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)  # fmt: skip
def test_each_generated_token_is_judged_by_its_own_signal(more: dict[str, Any]) -> None:
    model = model_of()
    towards = noise(model.vocab_size) * 0
    towards[TOKEN] = 40.0
    write = pb.add("logits", towards, positions=4)  # so that the first generated token is the one that the probe knows
    edit = pb.add("L0.resid_out", 3 * noise(model.d_model))
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), ids(2, 5, seed=4)], 1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0

    def grown(conditional: pb.Edit) -> tuple[Tensor, list[Any]]:
        with model.edited(write, conditional):
            return model.hf.generate(padded, attention_mask=mask, **OPTIONS, **more), model.touched[1]

    expected, at = grown(replace(edit, positions=pb.Token(TOKEN)))
    found, touched = grown(edit.when(is_token(model)))
    assert torch.equal(found, expected)
    assert touched == at
    assert all(5 in row for row in touched), "the first generated token is the one that the probe knows"
    plain, _ = grown(replace(edit, positions=[0]))
    assert not torch.equal(found[:, 8:], plain[:, 8:])


def fired_by_hand(model: Model, prompts: list[list[int]], probe: pb.Probe, before: list[pb.Edit]) -> list[list[bool]]:
    """Where a probe fires, one prompt and one position at a time."""
    out = []
    for prompt in prompts:
        whole = Port(probe.port.signal, probe.port.layer)
        signal = pb.run(model, [prompt], taps=[whole], edits=before)[whole][0]
        row = []
        for at in range(len(prompt)):
            value = signal[at] if probe.port.index is None else signal[at][probe.port.index]
            number = float(value) if probe.direction is None else sum(float(a) * float(b) for a, b in zip(value, probe.direction, strict=True))  # fmt: skip
            row.append(number < probe.threshold if probe.below else number > probe.threshold)
        out.append(row)
    return out


PROBES = ("L0.resid_mid", "L1.attn.out", "L0.mlp.in", "L1.mlp.act", "L1.H1.z", "L0.H1.out", "L0.N3.act", "L1.resid_in")


@pytest.mark.parametrize("port", PROBES)
@pytest.mark.parametrize("below", [False, True])
def test_reference_is_plain_loops_over_prompts_and_positions(port: str, below: bool) -> None:
    model, prompts = model_of(), [row[: 4 + 2 * i].tolist() for i, row in enumerate(ids())]
    width = pb.run(model, prompts, taps=[port])[port].shape[2:]
    before = [pb.scale("L0.attn.out", 3.0)] if port != "L0.N3.act" else []
    probe = pb.Probe(port, noise(*width) if width else None, 0.01, below)
    edit = pb.add("L1.resid_out", 5 * noise(model.d_model)).when(probe)
    fired = fired_by_hand(model, prompts, probe, before)
    assert len({fire for row in fired for fire in row}) == 2, "it fires at some positions and not at others"
    mask = torch.tensor([row + [False] * (8 - len(row)) for row in fired])
    expected = pb.run(model, prompts, edits=[*before, replace(edit, where=None, positions=mask)])
    found = pb.run(model, prompts, edits=[*before, edit], batch_size=2)
    assert close(found.logits.nan_to_num(), expected.logits.nan_to_num())
    assert (
        found.touched[-1] == expected.touched[-1] == [tuple(i for i, fire in enumerate(row) if fire) for row in fired]
    )


def test_experts_are_read_too() -> None:
    model, prompts = model_of("mixtral"), ids().tolist()
    for probe in (pb.Probe("L0.E1.out", noise(model.d_model), 0.0), pb.Probe("L0.E1.weight", None, 0.2)):
        edit = pb.zero("L1.mlp.out").when(probe)
        mask = torch.tensor(fired_by_hand(model, prompts, probe, []))
        assert 0 < int(mask.sum()) < mask.numel()
        expected = pb.run(model, prompts, edits=[replace(edit, where=None, positions=mask)]).logits
        assert torch.equal(pb.run(model, prompts, edits=[edit]).logits, expected)


def test_null_a_random_direction_fires_at_its_stated_rate_on_other_text() -> None:
    model = model_of()
    many = torch.randint(3, 60, (120, 20), generator=torch.Generator().manual_seed(3))
    for rate in (0.05, 0.3):
        shares = []
        for seed in range(6):
            probe = pb.probe(model, noise(model.d_model, seed=seed), many[:60], port="L1.resid_out", rate=rate)
            hit = pb.run(model, many[60:], edits=[pb.scale("L1.resid_out", 1.0).when(probe)]).touched[0]
            shares.append(sum(map(len, hit)) / many[60:].numel())
        assert abs(sum(shares) / len(shares) - rate) < 0.25 * rate
        below = pb.probe(model, noise(model.d_model), many[:60], port="L1.resid_out", rate=rate, below=True)
        hit = pb.run(model, many[:60], edits=[pb.scale("L1.resid_out", 1.0).when(below)]).touched[0]
        assert sum(map(len, hit)) == round(rate * many[:60].numel())  # on its own texts, exactly


def test_edits_of_one_port_under_one_probe_agree_on_where_they_act() -> None:
    model = model_of()
    w = noise(model.d_model)
    probe = pb.Probe("L0.resid_out", w, 0.0)
    held = pb.turn.clamp(model, "L0", -4.0, direction=w, signal="resid_out").when(probe)  # away with w, then add -4 w
    fired = torch.tensor(fired_by_hand(model, ids().tolist(), probe, []))
    stream = pb.run(model, ids(), taps=["L0.resid_out"], edits=[held])["L0.resid_out"] @ (w / w.norm())
    assert close(stream[fired], torch.full_like(stream[fired], -4.0))
    assert bool((stream[~fired] < 0.001).all())
    assert 0 < int(fired.sum()) < fired.numel()


def test_rows_each_under_its_own_knob_and_probe() -> None:
    model, prompts = model_of(), [row.tolist() for row in ids()]
    made = [pb.Knob(f"k{i}", [pb.add("L0.resid_out", (i + 2) * noise(model.d_model, seed=i))], 1.0) for i in range(3)]
    shared = pb.Probe("L0.resid_out", noise(model.d_model, seed=9), 0.0)
    entries = [made[0].when(shared), made[1].when(shared), made[2]]
    together = generate_rows(model, prompts, entries, 4)
    assert together == [model.generate(prompts[i], 4, edits=[entries[i]]) for i in range(3)]
    assert together[2] != model.generate(prompts[2], 4)
    assert together[0] != model.generate(prompts[0], 4, edits=[made[0]])


def test_a_knob_keeps_its_condition_in_its_file_and_in_its_record(tmp_path: Path) -> None:
    model = model_of()
    knob = pb.Knob("k", [pb.mean("L1.mlp.out", noise(model.d_model))], 0.7).when(is_token(model))
    for strength in (0.7, 2.0):
        assert {edit.where for edit in knob.edits_at(strength)} == {knob.edits[0].where}
    path = knob.save(tmp_path / "k.knob")
    loaded = pb.load_knob(path)
    assert loaded.edits == knob.edits
    assert pb.Knob.from_json(knob.to_json()).edits == knob.edits
    assert torch.equal(*(pb.run(model, ids(), edits=[one]).logits for one in (knob, loaded)))
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["version"] == "2", "a reader that knows no probes would make the edit everywhere"
    save_edits(knob.edits, tmp_path / "edits")
    assert load_edits(tmp_path / "edits") == list(knob.edits) == unpack(*pack(knob.edits))
    assert "where tensor[" in str(knob.edits[0])
    assert "embed >" in str(knob.edits[0])
    other = replace(knob.edits[0], where=replace(is_token(model), threshold=9.0))
    assert other != knob.edits[0]


def test_a_sweep_runs_conditional_edits_whole_and_right() -> None:
    model = model_of()
    probe = pb.Probe("L0.resid_mid", noise(model.d_model), 0.0)
    entries = [
        pb.zero("L0.mlp.out").when(probe),
        pb.zero("L0.mlp.out"),
        [pb.scale("L1.H0.z", 3.0).when(probe), pb.zero("L0.H1.z")],
    ]

    def first(logits: Tensor, prompts: Any) -> Tensor:
        return logits[:, 5]

    table = pb.sweep(model, ids(), entries, first)
    for entry, row in zip(entries, table["value"], strict=True):
        edits = entry if isinstance(entry, list) else [entry]
        assert close(row, pb.run(model, ids(), edits=edits).last_logits[:, 5], noise=256)
    assert "a probe reads in the run itself" in " ".join(table.notes)
    assert not torch.equal(table["value"][0], table["value"][1])


def test_dose_and_response_of_a_conditional_knob_is_that_of_the_same_positions() -> None:
    model = pb.load("tiny")
    task = pb.tasks.facts_in_context(model, n=12)
    knob = pb.Knob("k", [pb.add("L1.resid_out", noise(model.d_model))], 1.0)
    probe = pb.probe(model, noise(model.d_model, seed=2), task, port="L0.resid_out", rate=0.4)
    options: dict[str, Any] = {"strengths": [0.0, 2.0], "draws": 1}
    conditional = pb.measure.dose_response(model, task, knob.when(probe), **options)
    whole = pb.measure.dose_response(model, task, knob, **options)
    logits = pb.run(model, task, edits=[knob.when(probe).at(2.0)]).last_logits
    assert close(conditional["score"][1], task.score(logits).mean(), noise=256)
    assert float((conditional["score"][1] - whole["score"][1]).abs()) > 0.01


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: pb.zero("L0.KV0.v").when(pb.Probe("embed", noise(64))), "keys and values of earlier tokens are edited again"),
        (lambda: pb.zero("L0.mlp.out").when(pb.Probe("L0.resid_out", noise(64))), "the probe reads after the place"),
        (lambda: pb.zero("L0.attn.out").when(pb.Probe("L1.resid_in", noise(64))), "the probe reads after the place"),
        (lambda: pb.Probe("L0.attn.pattern", noise(4)), "a probe reads one vector or number at each position"),
        (lambda: pb.Probe("L0.attn.z", noise(4)), "one head of several"),
        (lambda: pb.Probe("L0.N1.act", noise(4)), "is one number at each position and takes no direction"),
        (lambda: pb.Probe("L0.resid_out"), "one number for each d_model as its direction, got none"),
        (lambda: pb.Probe("L0.resid_out", torch.zeros(4)), "its direction is finite and not 0"),
        (lambda: pb.Probe("L0.resid_out", noise(4), float("nan")), "is not a finite number"),
        (lambda: pb.zero("L0.mlp.out").when(3), "a condition is a pb.Probe or a role of the chat"),  # type: ignore[arg-type]
        (lambda: pb.zero("L0.mlp.out", positions=1).when("user"), "it names positions already"),
        (lambda: pb.zero("L0.mlp.out").when("usr"), "as text only"),
        (lambda: pb.zero("L1.mlp.out").when(pb.Probe("embed", noise(4))).when(pb.Probe("embed", noise(4))), "has a condition already"),
        (lambda: pb.run(model_of(), ids(), edits=[pb.zero("L1.mlp.out").when(pb.Probe("embed", noise(5)))]), "a direction of 5 numbers"),
        (lambda: pb.run(model_of(), ids(), edits=[pb.zero("logits").when(pb.Probe("L9.resid_out", noise(5)))]), "L9"),
        (lambda: pb.probe(model_of(), noise(32), ids(), rate=0.01, port="L0.resid_out"), "100 or more are needed"),
        (lambda: pb.probe(model_of(), noise(64), ids(), rate=2, port="L0.resid_out"), "between 0 and 1"),
        (lambda: pb.probe(model_of(), noise(64), ids()), "give port="),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(make: Any, said: str) -> None:
    with pytest.raises(PatchbayError, match=said):
        make()


def test_exports_and_folders_refuse_a_probe(tmp_path: Path) -> None:
    model = model_of()
    knob = pb.Knob("k", [pb.add("L0.mlp.out", noise(model.d_model))], 1.0).when(pb.Probe("embed", noise(model.d_model)))
    for form in ("checkpoint", "lora", "vector", "gguf"):
        with pytest.raises(PatchbayError, match=r"where a probe says so|where tensor"):
            knob.export(model, tmp_path / form, form=form)
    with pytest.raises(PatchbayError, match="which a probe decides as it runs"):
        pb.run(model, ids(), taps=["L0.resid_out"], edits=[knob], folder=tmp_path / "trace")
    moved = pb.load(twin("gpt2"))
    with pytest.raises(PatchbayError, match="made for 63 numbers"):
        replace(
            knob,
            edits=[pb.scale("L0.mlp.out", 2.0).when(pb.Probe("embed", noise(63)))],
            provenance={"model": {"fingerprint": "x"}},
        ).for_model(moved)
