"""Edge attribution: planted edges rank first; equals a derivative through plain hooks; exact where linear; complete; a null."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchbay as pb
from patchbay.prove._first_order import agreed, agreement
from patchbay.tiny import planted
from patchbay.tiny.twins import twin
from tests.given import chain, pairs
from tests.shares import by_turns
from tests.tolerance import NOISE, close

KINDS = ["gpt2", "gptj", "bloom", "falcon", "falcon grouped", "gemma2", "olmo2", "phi", "granite", "mixtral", "opt"]
KINDS += ["deepseek_v3", "qwen3_next", "bamba", "mamba2"]


def edges_of(result: pb.Result, variable: str = "effect") -> dict[str, float]:
    return dict(zip(result.coords["edit"], result[variable].tolist(), strict=True))


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """The token before the answer is another one in the twin: it goes embedding, first head, second head's key, logits."""
    model, built, task = chain(form, 5)
    first, second = built["previous_token"], built["induction"]
    keys, values = model.port(f"{second}.k"), model.port(f"{first}.v")
    truth = {f"embed -> {values}", f"{first} -> {keys}", f"{second} -> logits"}
    result = pb.prove.edge_attribution(model, task, steps=20, exact=12)
    found = edges_of(result)
    assert {row["edge"] for row in result.tables["edges"][:3]} == truth
    assert min(found[edge] for edge in truth) > 5
    assert max(abs(value) for edge, value in found.items() if edge not in truth) < 1
    assert result["overlap"] == 1.0
    assert len(result["exact"][result["exact"].isfinite()]) == 12


def norms(family: str, layer: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    """The norms before attention and before the MLP, and the one after attention."""
    if family == "gemma2":
        return layer.input_layernorm, layer.pre_feedforward_layernorm, layer.post_attention_layernorm
    if family == "phi":
        return layer.input_layernorm, layer.input_layernorm, None
    return layer.input_layernorm, layer.post_attention_layernorm, None


class Hooked:
    """One prompt through a Hugging Face model in which one reader sees `strength` of one writer's corrupted output."""

    def __init__(self, family: str, hf: Any, clean: list[int], corrupted: list[int]) -> None:
        self.family, self.hf, self.clean = family, hf, clean
        self.layers = hf.model.layers
        self.here, self.there = self.record(clean), self.record(corrupted)

    def record(self, ids: list[int]) -> dict[str, Tensor]:
        """Streams, what heads put out before a norm after attention, what the projection sums to, what MLPs add."""
        seen: dict[str, Tensor] = {}
        hooks = []
        for i, layer in enumerate(self.layers):
            proj = layer.self_attn.dense if self.family == "phi" else layer.self_attn.o_proj
            added = layer.post_feedforward_layernorm if self.family == "gemma2" else layer.mlp
            middle = {"gemma2": "pre_feedforward_layernorm", "llama": "post_attention_layernorm"}.get(self.family)

            def stream(_: Any, args: Any, kwargs: Any, i: int = i) -> None:
                seen[f"in{i}"] = args[0] if args else kwargs["hidden_states"]

            def projected(m: Any, args: Any, out: Tensor, i: int = i) -> None:
                d = args[0].shape[-1] // 4
                for h in range(4):
                    at = slice(d * h, d * h + d)
                    seen[f"L{i}.H{h}"] = args[0][..., at] @ m.weight[:, at].T
                seen[f"sum{i}"] = out

            hooks.append(layer.register_forward_pre_hook(stream, with_kwargs=True))
            hooks.append(proj.register_forward_hook(projected))
            hooks.append(added.register_forward_hook(lambda _, a, out, i=i: seen.__setitem__(f"L{i}.mlp", out)))
            if middle:
                norm = getattr(layer, middle)
                hooks.append(norm.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(f"mid{i}", args[0])))
        with torch.no_grad():
            self.hf(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        seen["embed"] = seen["in0"]
        return seen

    def missing(self, writer: str, strength: Tensor) -> Tensor:
        """What the reader's stream loses."""
        change = strength * (self.here[writer] - self.there[writer])
        after = norms(self.family, self.layers[int(writer[1])])[2] if ".H" in writer else None
        if after is None:
            return change
        total = self.here[f"sum{writer[1]}"]
        return after(total) - after(total - change)

    def score(self, writer: str, reader: str, strength: Tensor, right: int, wrong: list[int]) -> Tensor:
        if reader == "logits":
            norm = self.hf.model.final_layernorm if self.family == "phi" else self.hf.model.norm
            hook = norm.register_forward_pre_hook(lambda _, args: (args[0] - self.missing(writer, strength),))
        else:
            place, what = reader.split(".", 1)
            i = int(place[1:])
            before, before_mlp, _ = norms(self.family, self.layers[i])
            if what == "mlp.in":
                middle = self.here.get(f"mid{i}", self.here[f"in{i}"])
                x = before_mlp(middle - self.missing(writer, strength))
                hook = self.layers[i].mlp.register_forward_pre_hook(lambda _, args: (x,))
            else:
                head, name = what.split(".")
                index = int(head.removeprefix("KV").removeprefix("H"))
                x = before(self.here[f"in{i}"] - self.missing(writer, strength))

                def read(m: Any, args: Any, out: Tensor) -> Tensor:
                    d = out.shape[-1] // (4 if name == "q" or self.family == "phi" else 2)
                    at = torch.zeros(out.shape[-1])
                    at[d * index : d * index + d] = 1.0
                    return out * (1 - at) + nn.functional.linear(x, m.weight, m.bias) * at

                hook = getattr(self.layers[i].self_attn, f"{name}_proj").register_forward_hook(read)
        logits = self.hf(torch.tensor([self.clean])).logits[0, -1]
        hook.remove()
        return logits[right] - logits[wrong].mean()


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_reference(family: str) -> None:
    """Every edge: the derivative, and the whole effect, of one reader's stream going over to the corrupted writer."""
    hf = twin(family)
    task = pairs(2 if family == "llama" else 1, 7)  # every edge by hand, prompt by prompt
    result = pb.prove.edge_attribution(pb.load(hf), task, exact=1000)
    effects = {edge: [0.0, 0.0] for edge in result.coords["edit"]}
    for i in range(len(task)):
        hooked = Hooked(family, hf, list(task.clean[i]), list((task.corrupted or ())[i]))
        for edge, both in effects.items():
            writer, reader = edge.split(" -> ")
            answers = task.right[i], list(task.wrong[i])
            none, whole = torch.tensor(0.0, requires_grad=True), torch.tensor(1.0)
            score = hooked.score(writer, reader, none, *answers)
            both[0] -= float(torch.autograd.grad(score, none)[0]) / len(task)
            with torch.no_grad():
                both[1] += float(score - hooked.score(writer, reader, whole, *answers)) / len(task)
    # an edge is a difference of logits some times larger than 1
    assert close(list(edges_of(result).values()), [a for a, _ in effects.values()], of=1.0, noise=4 * NOISE)
    assert close(list(edges_of(result, "exact").values()), [b for _, b in effects.values()], of=1.0, noise=4 * NOISE)
    assert max(abs(b) for _, b in effects.values()) > 0.1


@pytest.mark.parametrize("family", by_turns(KINDS, of=2))
def test_edges_out_of_a_part_sum_to_the_effect_of_the_part(family: str) -> None:
    """On every kind of architecture: grouped heads, parallel blocks, norms after, gates, mixers, experts."""
    model, task = pb.load(twin(family)), pairs(2, 7, metric="log_probability")
    result = pb.prove.edge_attribution(model, task)
    found = edges_of(result)
    sums: dict[str, float] = {}
    for edge, effect in found.items():
        writer = edge.split(" -> ")[0]
        sums[writer] = sums.get(writer, 0.0) + effect
    checked, largest = 0, 0.0
    for site, name in (("head", "H"), ("attn_out", "attn"), ("mlp_out", "mlp")):
        if site == "head" and family == "mamba2":
            continue
        if site == "mlp_out" and family == "mamba2":
            continue
        values = pb.prove.attribution_patching(model, task, site=site, positions="all").values  # type: ignore[arg-type]
        for layer, row in enumerate(values.reshape(len(values), -1).tolist()):
            for index, value in enumerate(row):
                writer = f"L{layer}.{name}{index if site == 'head' else ''}"
                if writer in sums:
                    assert close(sums[writer], value, of=1.0), writer
                    checked, largest = checked + 1, max(largest, abs(value))
    assert checked == len(sums) - 1  # all but the embedding
    assert largest > 0.05


@pytest.mark.parametrize("family", by_turns(["gpt2", "gemma2", "phi", "cohere"], of=2))
def test_edges_out_of_the_embedding_sum_to_the_gap_as_steps_grow(family: str) -> None:
    model, task = pb.load(twin(family)), pairs(2, 7, metric="log_probability")
    few, many = (pb.prove.edge_attribution(model, task, steps=steps) for steps in (1, 30))
    gap = float(many["clean"] - many["corrupted"])
    assert close(many["gap"], gap, of=many["clean"])
    assert float(many["from_embed"]) == pytest.approx(gap, abs=0.05)
    assert abs(float(few["from_embed"]) - gap) > 0.1


class One(nn.Module):
    """An activation that is 1 whatever it is given: a gated MLP is then linear."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


def test_exact_on_a_linear_model() -> None:
    """No norms, even attention, linear MLPs: every edge's effect is its first-order effect, whatever the steps."""
    hf: Any = twin("llama")
    hf.model.norm = nn.Identity()
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
            layer.self_attn.q_proj.weight.zero_()
            layer.mlp.act_fn = One()
    model = pb.load(hf)
    for steps in (1, 3):
        result = pb.prove.edge_attribution(model, pairs(), steps=steps, exact=1000)
        assert float(result["exact"].abs().max()) > 0.1
        assert close(result.values, result["exact"], of=1.0)
        assert result["overlap"] == 1.0
        assert close(result["from_embed"], result["gap"], of=1.0)


def test_null() -> None:
    """Random answers of a random model: p values as even as they should be, and nothing left after adjusting."""
    model = pb.load(planted.null(seed=3).model)
    ps = []
    for seed in range(3):
        result = pb.prove.edge_attribution(model, pairs(12, seed=seed, n_wrong=1))
        assert result["p_adjusted"].min() > 0.02
        ps.append(result["p"])
    every = torch.cat(ps)
    assert 0.3 < float(every.mean()) < 0.75
    assert float((every < 0.1).double().mean()) < 0.3


def test_batches_lengths_and_errors() -> None:
    model = pb.load(twin("llama"))
    long, short = pairs(3, 9, seed=1), pairs(2, 6, seed=2)
    both = pb.Task("both", *([*getattr(long, n), *getattr(short, n)] for n in ("clean", "right", "wrong", "corrupted")))
    whole = pb.prove.edge_attribution(model, both, exact=5)
    assert pb.prove.edge_attribution(model, both, exact=5, batch_size=2).agrees(whole, 1e-5)
    parts = [pb.prove.edge_attribution(model, task).values * len(task) for task in (long, short)]
    assert close(whole.values, sum(parts) / 5)  # type: ignore[arg-type]
    for message, options, task in (
        ("exact=-1", {"exact": -1}, long),
        ("steps=0", {"steps": 0}, long),
        ("accuracy has no gradient", {}, long.with_metric("accuracy")),
        ("no corrupted twins", {}, pb.Task("own", long.clean, long.right, long.wrong)),
    ):
        with pytest.raises(pb.PatchbayError, match=message):
            pb.prove.edge_attribution(model, task, **options)
    with pytest.raises(pb.PatchbayError, match="leave the block"), model.edited(pb.scale(model.port("L0.H0.z"), 0.5)):
        pb.prove.edge_attribution(model, long, exact=5)


def test_agreement_counts_ties_and_zeros_in_part() -> None:
    """Of 80 edges four have an effect and the estimate sees one; of four equal estimates, of which one is true, k = 2."""
    exact = torch.zeros(80)
    exact[[3, 20, 41, 66]] = torch.tensor([1.0, -2.0, 3.0, 4.0])
    estimate = torch.zeros(80)
    estimate[66] = 0.5
    assert agreement(estimate, exact, 1e-6)[1:] == (0.25, 4)
    flat = torch.tensor([1.0, 1.0, 1.0, 1.0] + [0.0] * 16)
    true = torch.tensor([5.0] + [0.0] * 18 + [4.0])
    assert agreement(flat, true, 1e-6)[1:] == (pytest.approx(1 / 4), 2)
    assert agreement(flat, torch.zeros(20), 1e-6)[2] == 0
    assert (
        agreed(torch.ones(20), torch.zeros(20), 1e-6, "edges")[1]
        == "against 20 edges patched exactly: none of them has an effect"
    )
