"""Attention knockout: planted edges are found in their layers; equals masks by hand; a cut span cannot be told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay import maths
from patchbay.prove.attention_knockout import Edge, _control, _edges
from patchbay.signal.port import Port
from patchbay.tiny import planted
from patchbay.tiny.twins import twin
from tests.tolerance import NOISE, close


def circuit(form: Any = "gpt2", n: int = 8) -> tuple[pb.Model, pb.Task]:
    built = planted.induction(form=form, seed=0)
    model = pb.load(built.model, built.tokenizer)
    return model, pb.tasks.repeated_tokens(model, n)


def marked(vocab: int = 90, n: int = 3, length: int = 8, seed: int = 0) -> pb.Task:
    ids = torch.randint(3, vocab, (n, length), generator=torch.Generator().manual_seed(seed)).tolist()
    marks = {"subject": [(1, 2), (2,), (1, 2, 3)], "late": [(5,), (4, 5), (5, 6)], "edge": [(7,), (), (2, 7)]}
    marks = {name: [spans[i % 3] for i in range(n)] for name, spans in marks.items()}
    return pb.Task("marked", ids, [5 + i for i in range(n)], [[90]] * n, marks=marks, metric="log_probability")


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """Induction: the asking token reads the source in layer 1; before that each source reads the token before it in layer 0."""
    model, task = circuit(form)
    before = {"before": [(at[0] - 1,) for at in task.marks["source"]]}
    task = pb.Task(task.name, task.clean, task.right, task.wrong, marks={**task.marks, **before})
    result = pb.prove.attention_knockout(model, task, keys=["source", "before", "rest"], queries=["last", "source"])
    edges = dict(zip(result.coords["key"], result.values.T.tolist(), strict=True))
    assert edges["source -> last"] == pytest.approx([0.0, -1.0], abs=0.05)
    assert edges["before -> source"] == pytest.approx([-1.0, 0.0], abs=0.05)
    for label in ("before -> last", "rest -> last"):
        assert edges[label] == pytest.approx([0.0, 0.0], abs=0.05)
    everywhere = dict(zip(result.coords["key"], result["everywhere"].tolist(), strict=True))
    assert everywhere["source -> last"] < -0.95
    assert everywhere["before -> source"] < -0.95
    at = result.coords["key"].index("source -> last")
    assert result["high"][1, at] < -0.9
    assert result["p_adjusted"][1, at] < 0.05
    assert result["control"][1, at] > -0.5
    assert any("source -> last: -1 in layer 1" in note for note in result.notes)


def p_by_hand(model: pb.Model, ids: Any, answer: int, keys: Any, queries: Any, layers: list[int]) -> float:
    """p(answer) with minus infinity added to the scores of Hugging Face's eager GPT-2 attention, layer by layer."""
    n = len(ids)
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    hooks = []
    for i in layers:
        mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)  # causal
        for query in queries:
            for key in keys:
                if key < query:
                    mask[query, key] = torch.finfo(torch.float32).min

        def cut(_: Any, args: Any, kwargs: Any, mask: Tensor = mask) -> Any:
            return args, kwargs | {"attention_mask": mask[None, None]}

        hooks.append(model.hf.transformer.h[i].attn.register_forward_pre_hook(cut, with_kwargs=True))
    with torch.no_grad():
        p = float(model.hf(torch.tensor([list(ids)])).logits[0, -1].double().softmax(0)[answer])
    for hook in hooks:
        hook.remove()
    model.hf.set_attn_implementation(before)
    return p


@pytest.mark.parametrize("window", [1, 2, 3])
def test_reference(window: int) -> None:
    """(p_cut - p) / p, window by window, by masks on plain Hugging Face attention; groups that overlap keep the diagonal."""
    model = pb.load(twin("gpt2", n_layer=3))
    task = marked()
    names, to = ["subject", "late", "edge"], ["last", "subject", "all"]
    result = pb.prove.attention_knockout(model, task, keys=names, queries=to, window=window, draws=0, batch_size=2)
    groups: dict[str, Any] = {**task.marks, "last": [(7,)] * 3, "all": [tuple(range(8))] * 3}
    assert result.coords["key"] == [f"{a} -> {b}" for a in names for b in to]
    own = [p_by_hand(model, ids, right, (), (), [0, 1, 2]) for ids, right in zip(task.clean, task.right, strict=True)]
    for column, label in enumerate(result.coords["key"]):
        a, b = label.split(" -> ")
        for centre in [*range(3), None]:
            start = 0 if centre is None else centre - window // 2
            width = 3 if centre is None else window
            layers = [i for i in range(3) if start <= i < start + width]
            found = []
            for ids, right, p, keys, queries in zip(task.clean, task.right, own, groups[a], groups[b], strict=True):
                if keys:
                    found.append((p_by_hand(model, ids, right, keys, queries, layers) - p) / p)
            expected = sum(found) / len(found)
            value = result["everywhere"][column] if centre is None else result.values[centre, column]
            assert close(float(value), expected, of=1.0, noise=2 * NOISE), (label, centre)


def test_the_control_cuts_other_keys_of_the_same_queries_and_p_counts_it() -> None:
    model, task = pb.load(twin("gpt2", n_layer=3)), marked(n=6)
    result = pb.prove.attention_knockout(model, task, keys=["subject"], queries=["last"], window=1, draws=1, seed=2)
    [edge] = _edges(task, ["subject"], ["last"])
    other = _control(edge, task, 0, 2)
    relative = torch.zeros(2, len(task), 4, dtype=torch.float64)  # [cut or control, prompt, layer; all at the end]
    for n, (ids, right) in enumerate(zip(task.clean, task.right, strict=True)):
        p = p_by_hand(model, ids, right, (), (), [0, 1, 2])
        for row, keys in enumerate((edge.keys[n], other.keys[n])):
            for at, layers in enumerate(([0], [1], [2], [0, 1, 2])):
                relative[row, n, at] = (p_by_hand(model, ids, right, keys, (7,), layers) - p) / p
    mean = relative[1].mean(0)
    assert close(result["control"][:, 0], mean[:3], of=1.0, noise=2 * NOISE)
    assert close(float(result["control_everywhere"][0]), float(mean[3]), of=1.0, noise=2 * NOISE)
    assert close(result["p"][:, 0], maths.sign_flip_p((relative[0] - relative[1])[:, :3], floor=1e-5))
    span = Edge("x", [(1,)] * 6, [(2, 7)] * 6)
    drawn = {key for draw in range(40) for keys in _control(span, task, draw, 0).keys for key in keys}
    assert drawn == {0, 2, 3, 4, 5, 6}, "all that the latest query sees, but for the keys that are cut"


def test_null() -> None:
    """In a random model a group's edges change no more than random ones: p values are uniform."""
    ps = []
    for seed in range(8):
        built = planted.null(seed=seed)
        model = pb.load(built.model, built.tokenizer)
        ids = torch.randint(3, 60, (10, 9), generator=torch.Generator().manual_seed(seed))
        right = ids[:, 0].roll(3).tolist()
        task = pb.Task("null", ids.tolist(), right, marks={"a": [(2, 3)] * 10}, metric="log_probability")
        result = pb.prove.attention_knockout(model, task, keys=["a"], seed=seed)
        ps.append(result["p"].flatten())
        assert result["p_adjusted"].min() > 0.003
    p = torch.cat(ps)
    assert 0.25 < float(p.mean()) < 0.75


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "phi", "mixtral", "gpt_neo", "bloom", "falcon", "mistral"])
def test_a_span_cut_from_all_is_unknown_to_the_answer(name: str) -> None:
    """Cut everywhere from every other token, the span may hold any tokens: p is the same. Cut from the last alone, not."""
    model = pb.load(twin(name))
    task = marked()
    other = [list(ids) for ids in task.clean]
    for ids, span in zip(other, task.marks["subject"], strict=True):
        for at in span:
            ids[at] = (ids[at] + 17) % 80 + 3
    changed = pb.Task("marked", other, task.right, task.wrong, marks=task.marks, metric="log_probability")

    def p_of(task: pb.Task, queries: list[str]) -> Tensor:
        results = [
            pb.prove.attention_knockout(model, task[i], keys=["subject"], queries=queries, draws=0) for i in range(3)
        ]
        return torch.stack([r["probability"].double() * (1 + r["everywhere"][0]) for r in results])

    assert close(p_of(task, ["all"]), p_of(changed, ["all"]))
    assert not torch.allclose(p_of(task, ["last"]), p_of(changed, ["last"]), rtol=1e-3)


def test_rows_of_a_cut_pattern_sum_to_one_and_hold_exact_zeros() -> None:
    """The edits that the method makes, on the pattern itself; the diagonal is never cut."""
    from patchbay.prove.attention_knockout import _block, _blocks

    model, task = pb.load(twin("llama")), marked()
    keys, queries = task.marks["subject"], [tuple(range(8))] * 3
    edits = [_block(1, *block) for block in _blocks(list(keys), queries)]
    pattern = pb.run(model, task, taps=[Port("attn.pattern", 1)], edits=edits)[Port("attn.pattern", 1)]
    assert close(pattern.sum(-1), torch.ones(()))
    for row, span in zip(pattern, keys, strict=True):
        for key in span:
            assert row[:, key + 1 :, key].abs().max() == 0.0
            assert row[:, key, key].min() > 0.0


def test_an_edge_that_no_query_sees_changes_nothing() -> None:
    model, task = pb.load(twin("gpt2")), marked()
    result = pb.prove.attention_knockout(model, task, keys=["late"], queries=["subject"])
    assert result.values.abs().max() == 0.0
    assert result["everywhere"] == 0.0
    mixed = pb.prove.attention_knockout(model, task[:2], keys=["edge", "last"], queries=["last"], draws=0)
    assert mixed.values.tolist() == [
        [0.0, 0.0],
        [0.0, 0.0],
    ]  # prompt 0: only its own position; prompt 1: no such tokens


def test_windows_are_a_fifth_of_the_model_and_at_least_one_layer() -> None:
    task = marked()
    one = pb.load(twin("gpt2", n_layer=3))
    assert pb.prove.attention_knockout(one, task, draws=0).agrees(
        pb.prove.attention_knockout(one, task, draws=0, window=1)
    )
    whole = pb.prove.attention_knockout(one, task, keys=["subject"], window=3, draws=0)
    assert close(float(whole.values[1]), float(whole["everywhere"]), of=whole.values)  # the middle window is all
    ten = pb.load(twin("gpt2", n_layer=10))
    default = pb.prove.attention_knockout(ten, task, keys=["subject"], draws=0)
    assert default.agrees(pb.prove.attention_knockout(ten, task, keys=["subject"], draws=0, window=2), 1e-6)


def test_groups_default_to_marks_and_the_rest() -> None:
    model, task = circuit(n=4)
    result = pb.prove.attention_knockout(model, task, draws=1)
    assert result.coords["key"] == ["first -> last", "second -> last", "source -> last", "rest -> last"]
    assert result.plot() is not None
    assert pb.replay(result, model)
    again = pb.prove.attention_knockout(model, task, draws=1, seed=1)
    assert close(result.values, again.values)
    assert not torch.equal(result["control"], again["control"])


def test_errors_name_what_is_possible() -> None:
    model, task = pb.load(twin("gpt2")), marked()
    with pytest.raises(pb.PatchbayError, match="no group 'subjct'.*did you mean 'subject'"):
        pb.prove.attention_knockout(model, task, keys=["subjct"])
    with pytest.raises(pb.PatchbayError, match="window=3: the model has 2 layers"):
        pb.prove.attention_knockout(model, task, window=3)
    with pytest.raises(pb.PatchbayError, match="draws=-1"):
        pb.prove.attention_knockout(model, task, draws=-1)
    with pytest.raises(pb.PatchbayError, match="no prompt of task marked has tokens of both"):
        pb.prove.attention_knockout(model, task[1], keys=["edge"])
    with pytest.raises(pb.PatchbayError, match="no layer of this mamba"):
        pb.prove.attention_knockout(pb.load(twin("mamba2")), task)
