"""prove.channel: a planted one-component channel is proved and the rest of the head is not; equals hooks and sums by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.model.source import built_in_names
from patchbay.prove._components import Writer
from patchbay.prove.channel import _against, _rotated, composition
from patchbay.signal.channel import parse_channel
from patchbay.tasks import words
from patchbay.tiny import planted
from patchbay.tiny.planted_canvas import Canvas
from patchbay.tiny.planted_vocabulary import TOKEN_IDS, tokenizer
from patchbay.tiny.twins import twin
from patchbay.wiring.components import components
from tests.shares import by_turns
from tests.tolerance import close

N_JUNK = 11


def flagged(form: Any = "gpt2", seed: int = 0) -> tuple[pb.Model, dict[str, Any]]:
    """A head flags the word after " to" in one direction, and writes eleven larger things that nobody reads; a second head
    looks for the flag by its key and copies the word."""
    canvas = Canvas(form, seed)
    code, flag, junk = canvas.take(canvas.n_vocab), canvas.take(1), canvas.take(N_JUNK)
    canvas.embed(code)
    writer, reader = canvas.pick_head(0), canvas.pick_head(1)
    marker, others = TOKEN_IDS[" to"], [i for i in range(3, 60) if i != TOKEN_IDS[" to"]]
    mixed = torch.linalg.qr(canvas.normal(len(others), N_JUNK)).Q.T @ code[others]  # [junk, d_model]
    q, k = canvas.offset_maps(1, 25.0)
    canvas.set_head(0, writer, q=q, k=k, v=torch.cat([code[[marker]], mixed]).T, o=torch.cat([flag, 3.0 * junk]))
    slot = canvas.slots(1)
    canvas.set_head(1, reader, q=25.0 * canvas.one[:, None] * slot, k=flag.T @ slot, v=code.T, o=2.0 * code)
    canvas.unembed(6.0 * code)
    model = pb.load(canvas.model, tokenizer())
    v = components(model, f"L0.H{writer}").v
    return model, {
        "writer": f"L0.H{writer}",
        "reader": f"L1.H{reader}",
        "component": int((v @ flag[0]).abs().argmax()),
        "marker": marker,
        "others": others,
    }


def question(truth: dict[str, Any], n: int = 12, seed: int = 0) -> pb.Task:
    """Twelve different words, " to" before one of them: which?"""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        said = rng.sample(truth["others"], 12)
        at, other = rng.sample(range(1, 12), 2)
        rows.append((said, at, other))
    put = [[*said[:at], truth["marker"], *said[at:]] for said, at, _ in rows]
    return pb.Task("flag", put, [said[at] for said, at, _ in rows], [[said[other]] for said, _, other in rows])


@pytest.mark.parametrize("form", by_turns(["gpt2", "llama"], of=2, start=1))
def test_planted(form: Any) -> None:
    """The small component is proved with the key that reads it; another reader, another input and other components are not."""
    model, truth = flagged(form)
    task, name = question(truth), f"{truth['writer']}.C{truth['component']}>{truth['reader']}"
    found = pb.prove.channel(model, task, f"{name}.k", sizes=[1, 4])  # type: ignore[arg-type]
    assert truth["component"] == N_JUNK  # the smallest of the twelve
    assert float(found["accuracy_whole"]) == 1.0
    assert float(found["proved"]) == 1.0
    assert float(found["p_removed"]) == float(found["p_edge"]) == pytest.approx(1 / 21)
    assert float(found["accuracy_removed"]) < 0.4
    assert float(found["edge"]) > 0.8 * float(found["removed"]) > 3
    assert float(found["restored"]) > 0.8 * float(found["whole_head"])
    assert int(found["composition"].argmax()) == truth["component"]
    accuracy = found["accuracy"]  # [condition, size]
    assert accuracy[0].max() < 0.4
    assert accuracy[1].min() == 1.0
    assert accuracy[2, 0] > 0.75  # a draw in twelve takes the flag
    assert found["accuracy_gap_low"].min() > 0.3
    assert "proved: without" in found.notes[0]
    assert found.plot() is not None
    for wrong in (f"{name}.q", f"{name}.v", f"{truth['writer']}.C0>{truth['reader']}.k"):
        other = pb.prove.channel(model, task, wrong, sizes=[1])  # type: ignore[arg-type]
        assert float(other["proved"]) == 0.0, wrong
        assert abs(float(other["edge"])) < 0.1 * float(found["edge"]), wrong


def test_planted_coordinate() -> None:
    """Held at one coordinate everywhere, the flag tells nothing, whatever the coordinate."""
    model, truth = flagged()
    name = f"{truth['writer']}.C{truth['component']}>{truth['reader']}.k"
    found = pb.prove.channel(model, question(truth), name, sizes=[1], draws=1)  # type: ignore[arg-type]
    assert found["at_accuracy"].max() < 0.4
    assert found["coordinate"].diff().abs().min() > 0
    assert found.coords["strength"] == [-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0]


def logits_by_hand(model: pb.Model, ids: list[int], keep: torch.Tensor, head: int, reader: int | None) -> torch.Tensor:
    """Llama form: the writer's z in layer 0 times `keep`; with a reader, only its own key in layer 1 hears it."""
    layers, d = model.hf.model.layers, model.d_head(0)
    x = torch.tensor([ids])

    def change(_: Any, args: Any) -> Any:
        z = args[0].clone()
        z[..., head * d : head * d + d] = z[..., head * d : head * d + d] @ keep
        return (z,)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model.hf(x).logits[0, -1].double()

    if reader is None:
        hook = layers[0].self_attn.o_proj.register_forward_pre_hook(change)
        out = logits()
        hook.remove()
        return out
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.__setitem__("z", args[0])),
        layers[1].register_forward_pre_hook(lambda _, args: seen.__setitem__("x", args[0])),
        layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.__setitem__("z1", args[0])),
    ]
    logits()
    for hook in hooks:
        hook.remove()
    own = seen["z"][..., head * d : head * d + d]
    moved = (own @ keep - own) @ layers[0].self_attn.o_proj.weight[:, head * d : head * d + d].T
    attn, n = layers[1].self_attn, len(ids)
    plain, heard = layers[1].input_layernorm(seen["x"]), layers[1].input_layernorm(seen["x"] + moved)
    cos, sin = model.hf.model.rotary_emb(plain, torch.arange(n)[None])

    def turned(y: torch.Tensor) -> torch.Tensor:
        half = torch.cat([-y[..., d // 2 :], y[..., : d // 2]], -1)
        return y * cos[0] + half * sin[0]

    group = reader * model.n_groups(1) // model.n_heads(1)
    q = turned((plain @ attn.q_proj.weight.T)[0, :, reader * d : reader * d + d])
    k = turned((heard @ attn.k_proj.weight.T)[0, :, group * d : group * d + d])
    v = (plain @ attn.v_proj.weight.T)[0, :, group * d : group * d + d]
    score = (q @ k.T / d**0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    z1 = seen["z1"].clone()
    z1[0, :, reader * d : reader * d + d] = score.softmax(-1) @ v
    hook = attn.o_proj.register_forward_pre_hook(lambda _, args: (z1,))
    out = logits()
    hook.remove()
    return out


def test_reference() -> None:
    """Removal, the edge to one of two heads that share a key, what is put back, and the curve, by hooks on a plain model."""
    model = pb.load(twin("llama"))
    task = pb.tasks.repeated_tokens(model, 3, max_period=6)
    head, reader, i = 1, 1, 2  # head 1 shares keys with head 0: its group is 0
    found = pb.prove.channel(model, task, f"L0.H{head}.C{i}>L1.H{reader}.k", sizes=[3], draws=2)  # type: ignore[arg-type]
    w = model.layers[0].attn.weights(fold_norm=True)
    W_V, W_O = w.W_V[0], w.W_O[head]
    with torch.no_grad():
        vh = torch.linalg.svd(W_V @ W_O, full_matrices=False)[2][:8].detach()  # [component, d_model]
        read, write = W_O @ vh.T, torch.linalg.pinv(W_O.T) @ vh.T  # [d_head, component]
        scores = composition(model, parse_channel(f"L0.H{head}>L1.H{reader}.k"))
    top = scores.argsort(descending=True)[:3].tolist()

    def mean_loss(keep: torch.Tensor, heard_by: int | None = None) -> float:
        eye, lost = torch.eye(8), []
        for ids, right, wrong in zip(task.clean, task.right, task.wrong, strict=True):
            plain, cut = (logits_by_hand(model, list(ids), m, head, heard_by) for m in (eye, keep.detach()))
            gap = [float(one[right] - one[list(wrong)].mean()) for one in (plain, cut)]
            lost.append(gap[0] - gap[1])
        return sum(lost) / len(lost)

    without = torch.eye(8) - torch.outer(read[:, i], write[:, i])
    assert close(float(found["removed"]), mean_loss(without), of=1.0)
    assert close(float(found["edge"]), mean_loss(without, reader), of=1.0)
    assert abs(float(found["edge"])) > 1e-4
    alone = mean_loss(torch.zeros(8, 8)) - mean_loss(torch.outer(read[:, i], write[:, i]))
    assert close(float(found["restored"]), alone, of=1.0)
    curve = mean_loss(torch.eye(8) - read[:, top] @ write[:, top].T)
    assert close(float(found.values[0, 0]), curve, of=1.0)


def test_reference_composition() -> None:
    """|v_i W_out| / |W_out| with W_out made by plain products, for query, key, value, MLP and unembedding."""
    model = pb.load(twin("gpt2"))
    v = components(model, "L0.H2").v
    w = model.layers[1].attn.weights(fold_norm=True)
    mlp = model.layers[1].mlp.weights(fold_norm=True)
    rows = model.unembed.weight - model.unembed.weight.mean(0)
    gain = model.final_norm_module.weight
    unembed = gain[:, None] * rows.T
    expected = {
        "L1.H3.q": w.W_QK(3),
        "L1.H3.k": w.W_QK(3).T,
        "L1.H3.v": w.W_OV(3),
        "L1.mlp": mlp.W_in,
        "unembed": unembed - unembed.mean(0),
    }
    for target, W_out in expected.items():
        found = composition(model, parse_channel(f"L0.H2>{target}")).float()
        assert close(found, (v @ W_out).norm(dim=1) / W_out.norm()), target


def test_last_layer_to_the_logits() -> None:
    """With nothing after the writer, all who hear it are the logits: removal and edge are one."""
    made = planted.null(seed=1)
    model = pb.load(made.model, made.tokenizer)
    with torch.no_grad():
        model.hf.transformer.h[1].mlp.c_proj.weight.zero_()
    task = pb.tasks.repeated_tokens(model, 4)
    found = pb.prove.channel(model, task, "L1.H0.C1>unembed", sizes=[1], draws=3)  # type: ignore[arg-type]
    assert close(float(found["edge"]), float(found["removed"]), of=1.0)
    assert close(found["edge_random"], found["removed_random"], of=1.0)
    assert abs(float(found["removed"])) > 1e-3


def test_null() -> None:
    """In random models nothing is proved, and the p values of channels drawn at random are not small more often than they say."""
    small, proved = [], 0.0
    for seed in range(2):
        made = planted.null(seed=seed, d_model=128)
        model = pb.load(made.model, made.tokenizer)
        task = pb.tasks.repeated_tokens(model, 4, seed=seed)
        for name in ("L0.H1.C3>L1.H2.k", "L0.H0.C9>L1.H1.q", "L0.H2.C20>L1.mlp"):
            found = pb.prove.channel(model, task, name, sizes=[1], draws=20, seed=seed)  # type: ignore[arg-type]
            small += [float(found["p_removed"]) <= 0.25, float(found["p_edge"]) <= 0.25]
            proved += float(found["proved"])
    assert proved == 0
    assert sum(small) <= 6  # 3 of 12 are expected


def repeated_words(model: pb.Model, n: int, seed: int = 1) -> pb.Task:
    """A string of random words twice, the second one cut: which word follows? In the words that the models know."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        said, before = rng.sample(words.POOL, rng.randint(8, 16)), rng.sample(words.POOL, rng.randint(0, 8))
        cut = rng.randint(3, len(said) - 1)
        prompt = "".join(f" {word}" for word in [*before, *said, *said[:cut]])
        rows.append((prompt, f" {said[cut]}", f" {said[cut - 2]}"))
    return pb.Task.from_prompts(model, *(list(column) for column in zip(*rows, strict=True)))


@pytest.mark.parametrize(("name", "reader"), [("tiny", "L1.H3"), ("tiny-llama", "L1.H0")])
def test_top_components_decide_in_a_trained_copy_model(name: str, reader: str) -> None:
    """Previous-token head to the induction head's key: without the top 12 of 32 the answers go, without the bottom 12 they stay."""
    if name not in built_in_names():
        pytest.skip(f"no built-in model named {name} in this checkout")
    model = pb.load(name)
    task = repeated_words(model, 16)
    found = pb.prove.channel(model, task, f"L0.H0>{reader}.k", n_components=12, sizes=[12], draws=3)  # type: ignore[arg-type]
    assert float(found["accuracy_whole"]) == 1.0
    assert float(found["accuracy_gap"]) >= 0.5
    assert float(found["accuracy_gap_low"]) > 0.3
    assert float(found["edge_difference_low"]) > 1.0
    assert "3 controls cannot give p <= 0.05" in found.notes[2]


def test_the_same_by_mean() -> None:
    """Held at its mean, a flag that is on at one place of thirteen is as good as gone."""
    model, truth = flagged()
    name = f"{truth['writer']}.C{truth['component']}>{truth['reader']}.k"
    task = question(truth)
    zero, mean = (pb.prove.channel(model, task, name, by=by, sizes=[1], draws=2) for by in ("zero", "mean"))  # type: ignore[arg-type]
    assert float(mean["removed"]) == pytest.approx(float(zero["removed"]), rel=0.1)
    assert float(mean["removed"]) != float(zero["removed"])


def test_errors() -> None:
    model = pb.load(twin("gpt2"))
    task = pb.tasks.repeated_tokens(model, 2, max_period=6)
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("L0.H1.C3", {}, "a head as writer and a reader are needed"),
        ("L0.mlp.C3>L1.H0.q", {}, "a head as writer"),
        ("L1.H1.C3>L0.H0.q", {}, "reads the stream before"),
        ("L0.H1.C8>L1.H0.q", {}, r"components 0\.\.7"),
        ("L7.H1.C0>L8.H0.q", {}, "no channel of this model"),
        ("L0.H1.C0>L1.H0.z", {}, "is not a channel|is not a part"),
        ("L0.H1.C0>L1.H0.q", {"n_components": 9}, "has 8"),
        ("L0.H1.C0>L1.H0.q", {"sizes": [0]}, "each 1 to 8"),
        ("L0.H1.C0>L1.H0.q", {"draws": 0}, "at least 1"),
        ("L0.H1.C0>L1.H0.q", {"by": "magic"}, "possible are zero, mean"),
    ]
    for name, options, message in refused:
        with pytest.raises(pb.PatchbayError, match=message):
            pb.prove.channel(model, task, name, **options)
    single = planted.null(n_layers=1)
    with pytest.raises(pb.PatchbayError, match="one layer"):
        pb.prove.channel(pb.load(single.model, single.tokenizer), task, "L0.H1.C0>L0.H0.q")  # type: ignore[arg-type]
    mixtral = pb.load(twin("mixtral"))
    with pytest.raises(pb.PatchbayError, match="readers that can be proved"):
        pb.prove.channel(mixtral, task, "L0.H1.C0>L1.router")  # type: ignore[arg-type]
    with torch.no_grad():
        model.hf.transformer.h[0].attn.c_attn.weight[0, 70] = float("nan")
    with pytest.raises(pb.PatchbayError, match="NaN or infinite"):
        pb.prove.channel(model, task, "L0.H1.C0>L1.H0.q")  # type: ignore[arg-type]


def test_p_counts_controls_of_either_sign() -> None:
    """A removal that costs 1 beside controls that cost .5, -3 and -2: two are as large."""
    values = torch.tensor([1.0, 0.5, -3.0, -2.0])[:, None].expand(4, 6).double()
    assert float(_against("x", values, "logits")["p_x"][0]) == pytest.approx(3 / 4)


def test_other_directions_of_a_head_hang_on_seed_and_draw() -> None:
    writer = Writer(pb.Part(0, "head", 1), torch.eye(4), torch.eye(4))
    turns = [_rotated(writer, None, 1, draw, seed)[0].read for seed, draw in ((0, 0), (1, 0), (0, 1))]
    for i, turn in enumerate(turns):
        assert close(turn @ turn.T, torch.eye(4), of=1.0)
        assert not any(torch.equal(turn, other) for other in turns[:i])
