"""Activation patching: planted parts carry the answer and no others; equals patching by hand; nothing in a random model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.tiny import planted
from patchbay.tiny.twins import twin
from tests.shares import by_turns
from tests.tolerance import close


def circuit(form: Any = "gpt2", seed: int = 0, n: int = 10) -> tuple[pb.Model, pb.Task, dict[str, Any]]:
    built = planted.induction(form=form, seed=seed)
    model = pb.load(built.model, built.tokenizer)
    return model, pb.tasks.repeated_tokens(model, n, seed=seed), dict(built.truth)


def pairs(vocab: int, n: int = 3, length: int = 7, metric: str = "logit_diff", seed: int = 0) -> pb.Task:
    """Random prompts of one length; the twin has two other tokens."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, vocab, (n, length), generator=generator)
    corrupted = clean.clone()
    corrupted[:, [1, 3]] = torch.randint(3, vocab, (n, 2), generator=generator)
    right, wrong = torch.randint(3, vocab // 2, (n,), generator=generator), torch.full((n, 1), vocab // 2 + 1)
    return pb.Task("pairs", clean.tolist(), right.tolist(), wrong.tolist(), corrupted.tolist(), metric)


@pytest.mark.parametrize(("way", "form"), by_turns(["denoising", "noising"], ["gpt2", "llama"], of=2))
def test_planted(form: Any, way: Any) -> None:
    """The twin's second part differs: the induction head carries the answer, at the asking token, and alone."""
    model, task, truth = circuit(form)
    heads = pb.prove.activation_patching(model, task, site="head", way=way)
    assert str(heads.top(1)[0]) == truth["induction"]
    best, *others = heads.table()
    assert best["value"] > 0.95
    assert best["low"] > 0.9
    assert best["p_adjusted"] < 0.05
    assert max(abs(row["value"]) for row in others) < 0.05
    marks = pb.prove.activation_patching(model, task, positions="marks", way=way)
    assert marks.coords["position"] == ["first", "second", "source"]
    assert close(marks.values[0].tolist(), [0.0, 1.0, 0.0], of=marks.values)
    each = pb.prove.activation_patching(model, task, site="head", positions="last,source", way=way)
    share = dict(zip(map(str, each.parts or []), each.values.tolist(), strict=True))
    assert share[truth["induction"]] == pytest.approx([1.0, 0.0], abs=0.1)


def test_planted_neurons_chosen_on_one_half_and_patched_on_the_other() -> None:
    built = planted.relation_neuron(seed=0)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    other = {" is": " has", " has": " is"}
    twins = [f"{p.rsplit(' ', 1)[0]}{other[' ' + p.rsplit(' ', 1)[1]]}" for p in truth["prompts"]]
    task = pb.Task.from_prompts(model, truth["prompts"], truth["answers"], truth["wrong"], twins)
    result = pb.prove.activation_patching(model, task, site="neuron", top=4)
    assert {str(part) for part in result.top(2)} == set(truth["neurons"].values())
    assert result["p_adjusted"].min() < 0.05
    assert "chosen on 7 prompts" in result.notes[1]
    assert len(result.provenance["task"]["clean"]) == 14
    _, rest = task.split()
    assert close(float(result["clean"]), float(rest.score(pb.run(model, rest).last_logits).mean()), of=10.0)
    both = pb.prove.activation_patching(model, task, site="neuron", parts=list(truth["neurons"].values()))
    assert both["share"].sum() == pytest.approx(
        1.0, abs=0.1
    )  # each of the two relations' neurons is half of the change


def by_hand(
    model: pb.Model, task: pb.Task, site: str, layer: int, index: int | None, positions: list[int]
) -> list[float]:
    """Denoising effect on each prompt with plain hooks on Hugging Face's GPT-2, one forward pass at a time."""
    block = model.hf.transformer.h[layer]
    where: dict[str, tuple[Any, bool]] = {
        "resid_in": (block, True),
        "resid_mid": (block.ln_2, True),
        "resid_out": (block, False),
        "attn_out": (block.attn, False),
        "mlp_out": (block.mlp, False),
        "head": (block.attn.c_proj, True),
        "neuron": (block.mlp.c_proj, True),
    }
    module, before = where[site]
    d = model.d_model // model.n_heads(layer)
    columns = (
        slice(None) if index is None else slice(index * d, index * d + d) if site == "head" else slice(index, index + 1)
    )
    kept: list[Tensor] = []

    def change(x: Tensor) -> Tensor:
        if not kept:
            kept.append(x.clone())
            return x
        new = x.clone()
        for at in positions:
            new[0, at, columns] = kept[0][0, at, columns]
        return new

    def pre(_: Any, args: Any) -> Any:
        return (change(args[0]), *args[1:])

    def post(_: Any, __: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    def score(ids: Any, i: int) -> float:
        with torch.no_grad():
            logits = model.hf(torch.tensor([list(ids)])).logits[0, -1].double()
        return float(logits[task.right[i]] - logits[list(task.wrong[i])].mean())

    entered: list[Tensor] = []

    def middle(_: Any, __: Any, out: Any) -> Any:
        """The stream after attention also goes around the MLP: change what attention adds to it."""
        new = change(entered[-1] + out[0]) - entered[-1]
        return (new, *out[1:])

    found = []
    for i, (clean, corrupted) in enumerate(zip(task.clean, task.corrupted or (), strict=True)):
        plain = score(corrupted, i)
        hooks = [module.register_forward_pre_hook(pre) if before else module.register_forward_hook(post)]
        if site == "resid_mid":
            hooks[0].remove()
            hooks = [
                block.register_forward_pre_hook(lambda _, args: entered.append(args[0])),
                block.attn.register_forward_hook(middle),
            ]
        kept.clear()
        score(clean, i)
        found.append(score(corrupted, i) - plain)
        for hook in hooks:
            hook.remove()
    return found


@pytest.mark.parametrize("site", ["resid_in", "resid_mid", "resid_out", "attn_out", "mlp_out", "head", "neuron"])
def test_reference(site: Any) -> None:
    """Every cell of every site equals one patched Hugging Face run, prompt by prompt; the share is the ratio of means."""
    model = pb.load(twin("gpt2"))
    task = pairs(90)
    options: dict[str, Any] = {"parts": ["L0.N3", "L1.N17"]} if site == "neuron" else {}
    result = pb.prove.activation_patching(model, task, site=site, positions="each", **options)
    cells = [(port.layer, port.index) for port in result.parts or []] if result.parts else [(0, None), (1, None)]
    effects = torch.tensor([[by_hand(model, task, site, *cell, [at]) for at in range(7)] for cell in cells])
    assert close(result["effect"], effects.mean(-1).double(), of=1.0)
    gap = float(result["clean"] - result["corrupted"])
    assert close(result.values * gap, result["effect"], dtype=torch.float64)
    if site in ("head", "neuron"):
        return
    whole = pb.prove.activation_patching(model, task, site=site, positions="all")
    together = [sum(by_hand(model, task, site, layer, None, list(range(7)))) / 3 for layer in (0, 1)]
    assert close(whole["effect"].tolist(), together, of=1.0)


def test_noising_is_denoising_of_the_twins_exchanged() -> None:
    model = pb.load(twin("llama"))
    task = pairs(90)
    turned = pb.Task("pairs", task.corrupted or (), task.right, task.wrong, task.clean)
    noising = pb.prove.activation_patching(model, task, site="head", way="noising")
    other = pb.prove.activation_patching(model, turned, site="head")
    assert close(noising["effect"], -other["effect"])
    assert torch.allclose(noising.values, other.values, atol=1e-3)


@pytest.mark.parametrize(
    ("way", "name"),
    by_turns(
        ["denoising", "noising"],
        ["gemma2", "phi", "mixtral", "falcon", "gpt_neo", "olmo2", "mamba2", "qwen3_next"],
        of=2,
    ),
)
def test_every_family(name: str, way: Any) -> None:
    """The stream at all positions of any layer is the other run: the share is exactly 1; a twin that is the prompt gives 0."""
    model = pb.load(twin(name))
    task = pairs(90, length=9)
    result = pb.prove.activation_patching(model, task, positions="all", way=way)
    gap = float((result["clean"] - result["corrupted"]).abs())
    size = max(1.0, float(result["clean"].abs()), float(result["corrupted"].abs())) / gap  # a share of a small gap
    assert close(result.values.tolist(), [1.0] * model.n_layers, of=size)
    last = pb.prove.activation_patching(model, task, site="resid_out", positions="last", way=way)
    assert close(float(last.values[-1]), 1.0, of=size)
    same = pb.Task("same", task.clean, task.right, task.wrong, task.clean)
    nothing = pb.prove.activation_patching(model, same, site="attn_out", way=way)
    assert close(nothing["effect"], 0.0, of=1.0)
    assert nothing["p"].min() == 1.0
    for site, signal in (("head", "attn.z"), ("expert", "experts.out"), ("resid_mid", "resid_mid")):
        if any(signal in model.signals(layer) for layer in range(model.n_layers)):
            assert (
                pb.prove.activation_patching(model, task, site=site, way=way, positions="all").values.isfinite().any()
            )
        else:
            with pytest.raises(pb.PatchbayError, match=f"no layer of this {model.family.name} model has it"):
                pb.prove.activation_patching(model, task, site=site)


def test_null() -> None:
    """In a random model with random answers no site carries them: p values are uniform, none survives adjustment."""
    ps = []
    for seed in range(12):
        built = planted.null(seed=seed)
        model = pb.load(built.model, built.tokenizer)
        task = pairs(60, n=12, length=6, seed=seed)
        result = pb.prove.activation_patching(model, task, site="head")
        ps.append(result["p"].flatten())
        assert result["p_adjusted"].min() > 0.005
    p = torch.cat(ps)
    assert 0.35 < float(p.mean()) < 0.65
    assert float((p <= 0.05).double().mean()) < 0.12
    assert 0.3 < float((p <= 0.5).double().mean()) < 0.7


def test_prompts_of_different_lengths_line_up_at_the_end() -> None:
    model, task, _ = circuit()
    lengths = [len(ids) for ids in task.clean]
    assert len(set(lengths)) > 1
    result = pb.prove.activation_patching(model, task[:4], positions="each")
    widest = max(lengths[:4])
    assert [int(str(label).split()[0]) for label in result.coords["position"]] == list(range(-widest, 0))
    longest = int(torch.tensor(lengths[:4]).argmax())
    alone = pb.prove.activation_patching(model, task[longest])
    assert close(result["effect"][0, 0], float(alone["effect"][0, 0]), of=1.0)  # it alone is so long
    assert result["effect"][1, -1] == pytest.approx(float(result["clean"] - result["corrupted"]), abs=1e-2)


def test_prompts_of_different_lengths_have_columns_that_all_of_them_have() -> None:
    """The task's groups and the rest; without groups the positions of the shortest, and all earlier ones together."""
    model, task, _ = circuit()
    task = task[:4]
    lengths = [len(ids) for ids in task.clean]
    marked = replace(task, marks={"first": [(0,)] * 4, "late": [(n - 2, n - 1) for n in lengths]})
    result = pb.prove.activation_patching(model, marked)
    assert result.coords["position"] == ["first", "late", "last", "rest"]
    for name in ("first", "late"):
        alone = pb.prove.activation_patching(model, marked, positions=f"{name},last")
        assert close(result["effect"][:, result.coords["position"].index(name)], alone["effect"][:, 0], of=1.0)
    assert not bool(result["effect"].isnan().any())
    plain = pb.prove.activation_patching(model, replace(task, marks={}))
    assert plain.coords["position"][0] == "earlier"
    assert len(plain.coords["position"]) == min(lengths) + 1
    assert plain["effect"][1, -1] == pytest.approx(float(plain["clean"] - plain["corrupted"]), abs=1e-2)
    each = pb.prove.activation_patching(model, replace(task, marks={}), positions="each")
    assert close(plain["effect"][:, 1:], each["effect"][:, -min(lengths) :], of=1.0)


def test_positions_show_their_tokens() -> None:
    model, _, _ = circuit()
    task = pb.Task.from_prompts(
        model,
        [" then Mary has a", " then John has a"],
        [" book", " book"],
        [" cup"] * 2,
        [" then Tom has a", " then Max has a"],
    )
    result = pb.prove.activation_patching(model, task)
    assert result.coords["position"] == ["0 then", "1", "2 has", "3 a"]
    assert result.plot() is not None


def test_metrics_where_less_is_better_are_turned_round() -> None:
    model, task, truth = circuit()
    for metric in ("rank", "kl", "log_probability"):
        for way in ("denoising", "noising"):
            result = pb.prove.activation_patching(model, task.with_metric(metric), site="head", way=way)  # type: ignore[arg-type]
            assert str(result.top(1)[0]) == truth["induction"]
            assert float(result.values.max()) > 0.7
            assert float(result["effect"].max()) > 0
    assert float(pb.prove.activation_patching(model, task.with_metric("kl"), site="head")["clean"]) == 0.0


def test_no_gap_is_said() -> None:
    model, task, _ = circuit()
    turned = pb.Task("turned", task.corrupted or (), task.right, task.wrong, task.clean)
    assert "shares mean little" in pb.prove.activation_patching(model, turned, site="head").notes[-1]


def test_a_result_gives_its_first_parts() -> None:
    model, task, truth = circuit()
    ranked = pb.find.direct_logit_attribution(model, task)
    result = pb.prove.activation_patching(model, task, site="head", parts=ranked, top=2)
    assert str((result.parts or [])[0]) == truth["induction"]
    assert "nothing is held out" in result.notes[-1]
    half = pb.prove.activation_patching(
        model, task, site="head", parts=pb.find.direct_logit_attribution(model, task[:4]), top=1
    )
    assert "left out: 6 remain" in half.notes[-1]
    assert pb.replay(result, model)


def test_errors_name_what_is_possible() -> None:
    model, task, _ = circuit(n=4)
    patch = pb.prove.activation_patching
    with pytest.raises(pb.PatchbayError, match=r"site='heads'; possible are .*did you mean 'head'"):
        patch(model, task, site="heads")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="possible are denoising, noising"):
        patch(model, task, way="both")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="no corrupted twins"):
        patch(model, pb.Task("bare", task.clean, task.right, task.wrong))
    with pytest.raises(pb.PatchbayError, match="no group 'sorce'.*did you mean 'source'"):
        patch(model, task, positions="sorce")
    with pytest.raises(pb.PatchbayError, match=r"256 neurons: name some"):
        patch(model, task, site="neuron")
    with pytest.raises(pb.PatchbayError, match=r"L0\.N3 is no head"):
        patch(model, task, site="head", parts=["L0.N3"])  # type: ignore[list-item]
    with pytest.raises(pb.PatchbayError, match="patched layer by layer"):
        patch(model, task, site="mlp_out", top=3)
    with pytest.raises(pb.PatchbayError, match=r"L0\.H9.*has 4"):
        patch(model, task, site="head", parts=["L0.H9"])  # type: ignore[list-item]
    with pytest.raises(pb.PatchbayError, match="differ from their prompts in length"):
        short = [ids[:-1] for ids in task.corrupted or ()]
        patch(model, pb.Task("uneven", task.clean, task.right, task.wrong, short, options={"aligned": False}))


def test_places_are_named_by_their_token_and_that_of_the_twin():
    model = pb.load("tiny")
    a, b = "The capital of Lolavia is", "The capital of Genonia is"
    task = pb.Task.from_prompts(model, [a], [" Budurg"], [" the"], [b])
    found = pb.prove.activation_patching(model, task, site="resid_out", positions="each")
    assert found.labels_of("position") == ["0 The", "1 capital", "2 of", "3 Lolavia/Genonia", "4 is"]
