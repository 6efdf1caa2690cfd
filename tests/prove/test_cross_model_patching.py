"""Cross-model patching: what tuning changed brings the change; equals hooks put on by hand; itself brings nothing."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import patchbay as pb
from patchbay.corpus.transtokens import transferred
from patchbay.prove.cross_model_patching import _task_of
from patchbay.tiny import planted
from patchbay.tiny.twins import twin
from tests.measure import words
from tests.shares import by_turns
from tests.tolerance import close


def pair(form: Any = "gpt2", broken: str = "o", seed: int = 0) -> tuple[pb.Model, pb.Model, pb.Task, list[str]]:
    """The induction model as the tuned one; its base lacks one weight of the induction head (its group's, for k and v)."""
    built = planted.induction(form=form, seed=seed)
    heads = [built.truth["previous_token"], built.truth["induction"]]
    hf = copy.deepcopy(built.model)
    d, head = hf.config.hidden_size // 4, int(heads[1][-1])
    group = head // 2 if form == "llama" and broken in "kv" else head
    rows = slice(group * d, group * d + d)
    with torch.no_grad():
        if form == "llama":
            weight = getattr(hf.model.layers[1].self_attn, f"{broken}_proj").weight
            (weight[:, rows] if broken == "o" else weight[rows]).zero_()
        elif broken == "o":
            hf.transformer.h[1].attn.c_proj.weight[rows].zero_()
        else:
            start = "qkv".index(broken) * hf.config.hidden_size
            hf.transformer.h[1].attn.c_attn.weight[:, start + rows.start : start + rows.stop].zero_()
    base, tuned = pb.load(hf, built.tokenizer), pb.load(built.model, built.tokenizer)
    return base, tuned, pb.tasks.repeated_tokens(tuned, 10, seed=seed), heads


@pytest.mark.parametrize(
    ("form", "broken"), by_turns([("gpt2", "v"), ("gpt2", "k"), ("llama", "k"), ("llama", "q")], of=2)
)
def test_planted(form: Any, broken: str) -> None:
    """Copying the signal that the broken weight makes, or one that comes after it, brings all of the gap; another nothing."""
    base, tuned, task, heads = pair(form, broken)
    result = pb.prove.cross_model_patching(base, tuned, task, heads, draws=4)  # type: ignore[arg-type]
    assert [str(part) for part in result.parts or []] == heads
    assert result["gap_low"] > 3
    assert result["share"] == pytest.approx(1.0, abs=1e-3)
    assert result["effect"][0] == 0.0  # the heads of layer 0 are the same in both
    assert result["p"].tolist()[0] == 1.0
    assert result["low"][1] > 3
    assert result["p_adjusted"][1] < 0.01
    assert result["random"].abs().max() < 0.1 or form == "llama"  # the other query head of the group is changed too
    assert result["p_joint"] == pytest.approx(1 / (1 + len(result["random"])))
    assert result["difference_low"] > 3
    assert result["accuracy_tuned"] == result["accuracy_joint"] == 1.0
    assert result["accuracy_base"] < 0.5
    for signal in "qkv":
        one = pb.prove.cross_model_patching(base, tuned, task, heads[1], signal=signal, draws=1)  # type: ignore[arg-type]
        assert float(one["share"]) == pytest.approx(1.0 if signal == broken else 0.0, abs=1e-3)
        assert any("whole group's" in note for note in one.notes) == (form == "llama" and signal in "kv")


def test_streams_carry_everything_from_where_they_differ() -> None:
    base, tuned, task, _ = pair()
    result = pb.prove.cross_model_patching(base, tuned, task, ["L0", "L1"], signal="resid_out", draws=2)  # type: ignore[arg-type]
    assert result["effect"][0] == 0.0
    assert close(result["effect"][1], result["gap"], of=1.0)
    assert result["accuracy_joint"] == result["accuracy_tuned"] == 1.0
    assert "random" not in result
    assert any("no random control" in note for note in result.notes)


def test_from_itself_nothing_changes() -> None:
    """Bit for bit, for every signal of several families."""
    for name in ("gpt2", "llama", "gemma2", "gpt_neox", "bloom"):
        model = pb.load(twin(name))
        task = pb.tasks.repeated_tokens(model, 3, max_period=6, max_offset=2)
        for signal in ("z", "q,k,v"):
            result = pb.prove.cross_model_patching(model, model, task, ["L0.H1", "L1.H2"], signal=signal, draws=2)  # type: ignore[arg-type]
            assert result["effect"].abs().max() == 0.0
            assert result["joint"] == result["gap"] == 0.0
            assert result["random"].abs().max() == 0.0
            assert result["p"].min() == 1.0


def by_hand(base: Any, tuned: Any, ids: list[int], what: str, heads: list[int], keep: list[int]) -> torch.Tensor:
    """Last logits of a Llama of which layer 1's v (of a group) or o-projection input (of heads) are set by plain hooks.

    `heads`: groups for v, heads for z, from the tuned model; `keep`: heads whose z is the base's own.
    """
    tokens = torch.tensor([ids])

    def seen(hf: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        attn = hf.model.layers[1].self_attn
        handles = [
            attn.v_proj.register_forward_hook(lambda m, a, out: found.update(v=out)),
            attn.o_proj.register_forward_pre_hook(lambda m, a: found.update(z=a[0])),
        ]
        with torch.no_grad():
            hf(tokens)
        for handle in handles:
            handle.remove()
        return found

    theirs, own = seen(tuned), seen(base)
    d = base.config.head_dim
    attn = base.model.layers[1].self_attn

    def change(x: torch.Tensor, name: str) -> torch.Tensor:
        x = x.clone()
        for head in heads if what == name else ():
            x[..., head * d : head * d + d] = theirs[name][..., head * d : head * d + d]
        for head in keep if name == "z" else ():
            x[..., head * d : head * d + d] = own["z"][..., head * d : head * d + d]
        return x

    handles = [
        attn.v_proj.register_forward_hook(lambda m, a, out: change(out, "v")),
        attn.o_proj.register_forward_pre_hook(lambda m, a: (change(a[0], "z"),)),
    ]
    with torch.no_grad():
        out = base(tokens).logits[0, -1].double()
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize(
    ("signal", "restore", "keep", "copied"), [("z", False, [], [1]), ("v", False, [], [0]), ("v", True, [0], [0])]
)
def test_reference(signal: Any, restore: bool, keep: list[int], copied: list[int]) -> None:
    """patched - base with plain hooks: z of head 1, or v of its group 0, which also serves head 0, unless that is restored."""
    one, two = (planted.null(form="llama", seed=seed) for seed in (1, 2))
    base, tuned = (pb.load(built.model, built.tokenizer) for built in (one, two))
    task = pb.tasks.repeated_tokens(base, 6)
    result = pb.prove.cross_model_patching(
        base,
        tuned,
        task,
        "L1.H1",
        signal=signal,
        restore=restore,
        draws=1,
        batch_size=2,  # type: ignore[arg-type]
    )
    effects, gaps = [], []
    for ids, right, wrong in zip(task.clean, task.right, task.wrong, strict=True):

        def score(logits: torch.Tensor, right: int = right, wrong: tuple[int, ...] = wrong) -> float:
            return float(logits[right] - logits[list(wrong)].mean())

        with torch.no_grad():
            plain, other = (m(torch.tensor([list(ids)])).logits[0, -1].double() for m in (one.model, two.model))
        effects.append(score(by_hand(one.model, two.model, list(ids), signal, copied, keep)) - score(plain))
        gaps.append(score(other) - score(plain))
    assert close(float(result.values[0]), sum(effects) / 6, of=1.0)
    assert close(float(result["joint"]), sum(effects) / 6, of=1.0)
    assert close(float(result["gap"]), sum(gaps) / 6, of=1.0)
    assert close(float(result["share"]), sum(effects) / sum(gaps), of=1.0)
    assert abs(sum(effects) / 6) > 1e-3
    text = " ".join(result.notes)
    assert ("it also serves L1.H0, which keep the base's own z" in text) == restore
    assert ("it also serves L1.H0, which use it too" in text) == (signal == "v" and not restore)


def test_null() -> None:
    """Between two random models no head brings more than others do."""
    built = [planted.null(seed=seed) for seed in (3, 4)]
    base, tuned = (pb.load(one.model, one.tokenizer) for one in built)
    task = pb.tasks.repeated_tokens(base, 16)
    ps, clear = [], 0
    for head in ("L0.H1", "L0.H3", "L1.H0", "L1.H2"):
        result = pb.prove.cross_model_patching(base, tuned, task, head, draws=3)  # type: ignore[arg-type]
        ps.append(float(result["p_joint"]))
        clear += float(result["p_adjusted"][0]) < 0.05
    assert sorted(ps)[1] > 0.25
    assert clear <= 1


def test_controls_share_no_group_with_what_was_copied() -> None:
    base, tuned, task, _ = pair("llama", "k")
    model_heads = pb.prove.cross_model_patching(base, tuned, task[:2], "L1.H1", signal="k", draws=9)  # type: ignore[arg-type]
    assert len(model_heads["random"]) == 2  # of heads 0, 2 and 3, head 0 shares the group
    assert any("9 draws were asked; 2 different" in note for note in model_heads.notes)


def test_models_of_another_shape_are_refused() -> None:
    base = pb.load(twin("llama"))
    task = pb.tasks.repeated_tokens(base, 2, max_period=6, max_offset=2)
    for name, config, message in (
        ("llama", {"num_hidden_layers": 3}, "n_layers 2 and 3"),
        ("llama", {"num_key_value_heads": 4}, "layer 0: n_groups 2 and 4; layer 1: n_groups 2 and 4"),
        ("llama", {"intermediate_size": 40}, "n_neurons 48 and 40"),
        ("gpt2", {}, "family"),
    ):
        with pytest.raises(pb.PatchbayError, match=message):
            pb.prove.cross_model_patching(base, pb.load(twin(name, **config)), task, "L0.H0")  # type: ignore[arg-type]


def test_errors_say_what_is_possible() -> None:
    model = pb.load(twin("llama"))
    task = pb.tasks.repeated_tokens(model, 2, max_period=6, max_offset=2)
    with pytest.raises(pb.PatchbayError, match="signal 'w'.*has q, k, v, pattern, z, out"):
        pb.prove.cross_model_patching(model, model, task, "L0.H0", signal="w")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="the main one.*resid_in, resid_mid, resid_out"):
        pb.prove.cross_model_patching(model, model, task, "L0")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match=r"L0\.H9.*has 4"):
        pb.prove.cross_model_patching(model, model, task, "L0.H9", signal="k")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="draws=0"):
        pb.prove.cross_model_patching(model, model, task, "L0.H0", draws=0)  # type: ignore[arg-type]


def test_kl_is_taken_from_the_tuned_model() -> None:
    base, tuned, task, heads = pair(broken="v")
    result = pb.prove.cross_model_patching(base, tuned, task.with_metric("kl"), heads, draws=2)  # type: ignore[arg-type]
    assert result["score_tuned"] == 0.0
    assert result["score_base"] > 0.5
    assert float(result["share"]) == pytest.approx(1.0, abs=1e-3)


def renumbered(tuned: pb.Model, vocab: int, seed: int = 0) -> tuple[pb.Model, dict[int, int]]:
    """The same model under a vocabulary in another order, with tokens more; and the new number of each token."""
    old = tuned.vocab_size
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))[:old].tolist()
    told = json.loads(tuned.tokenizer.backend_tokenizer.to_str())
    told["model"]["vocab"] = {token: order[i] for token, i in told["model"]["vocab"].items()}
    fast = Tokenizer.from_str(json.dumps({**told, "added_tokens": [], "post_processor": None}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast)
    return transferred(tuned, {(n, o): 1.0 for o, n in enumerate(order)}, vocab, tokenizer=tokenizer), dict(
        enumerate(order)
    )


def test_findings_survive_another_vocabulary() -> None:
    """Trans-tokenised, the body is what it was: every effect, control and score is that of the old numbers, though each prompt is other ids."""
    base, tuned, task, heads = pair("gpt2", "v")
    other, number = renumbered(tuned, tuned.vocab_size + 7)
    assert sum(i != n for i, n in number.items()) > len(number) // 2
    one, two = (pb.prove.cross_model_patching(base, model, task, heads, draws=4) for model in (tuned, other))  # type: ignore[arg-type]
    assert two["gap_low"] > 3
    assert all(close(one[name], two[name], of=100.0, dtype=torch.float32) for name in one.variables)
    assert any("have other numbers in the tuned model: each is told by its text" in note for note in two.notes)
    assert not any("other numbers" in note for note in one.notes)
    back = pb.prove.cross_model_patching(other, tuned, _in_numbers(task, number), heads, draws=1)  # type: ignore[arg-type]
    assert float(back["gap"]) == pytest.approx(0.0, abs=1e-3)  # one body, told in two vocabularies


def _in_numbers(task: pb.Task, number: dict[int, int]) -> pb.Task:
    clean = [[number[i] for i in ids] for ids in task.clean]
    return pb.Task("t", clean, [number[i] for i in task.right], [[number[i] for i in ids] for ids in task.wrong])


def test_tokens_are_told_by_their_text_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of other numbers are looked up, those of the task alone; special ones by what they do; what is not there, and whole laws, are refused."""
    base, tuned = (pb.load(twin("gpt2"), copy.deepcopy(words.tokenizer("characters"))) for _ in range(2))
    own = dict(tuned.tokenizer.get_vocab())
    text = {i: token for token, i in own.items()}
    task = pb.Task("t", [[5, 6, 7]], [8], [[9]])
    same, notes = _task_of(base, tuned, task)
    assert same is task
    assert not notes
    monkeypatch.setattr(tuned.tokenizer, "get_vocab", lambda: own | {text[5]: 9, text[9]: 5, text[20]: 21})
    moved, notes = _task_of(base, tuned, task)
    assert (moved.clean, moved.right, moved.wrong) == (((9, 6, 7),), (8,), ((5,),))
    assert notes[0].startswith("2 of the 5 tokens")
    with pytest.raises(pb.PatchbayError, match="the metric kl compares whole next-token laws"):
        pb.prove.cross_model_patching(base, tuned, task.with_metric("kl"), "L0.H0", draws=1)  # type: ignore[arg-type]
    monkeypatch.setattr(
        tuned.tokenizer, "get_vocab", lambda: {t: i for t, i in own.items() if i not in (6, 9)} | {"six": 6, "nine": 9}
    )
    with pytest.raises(
        pb.PatchbayError, match=f"2 tokens of the task are none of the tuned model's .{text[6]!r}, {text[9]!r}."
    ):
        pb.prove.cross_model_patching(base, tuned, task, "L0.H0", draws=1)  # type: ignore[arg-type]
    base.tokenizer.bos_token, tuned.tokenizer.bos_token = text[6], text[12]  # copies of this test's own
    monkeypatch.setattr(tuned.tokenizer, "get_vocab", lambda: {t: i for t, i in own.items() if i != 6} | {"six": 6})
    assert _task_of(base, tuned, task)[0].clean == ((5, 12, 7),)
    monkeypatch.setattr(tuned.tokenizer, "get_vocab", lambda: {t: i for t, i in own.items() if i != 7})
    assert _task_of(base, tuned, pb.Task("t", [[5, 7]], [8], [[9]]))[0].clean == ((5, 7),)  # a number that is nobody's
    bare = pb.load(twin("gpt2", vocab_size=97))
    with pytest.raises(pb.PatchbayError, match="vocab_size 96 and 97"):
        pb.prove.cross_model_patching(base, bare, task, "L0.H0", draws=1)  # type: ignore[arg-type]
