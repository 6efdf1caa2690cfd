"""edit: every kind of edit by its closed form, every kind of position by plain lists, order, rows, files and errors."""

import functools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import patchbay as pb
from patchbay.edits.apply import row_mask
from patchbay.edits.edit import Edit, load_edits, pack, ports_of, save_edits, unpack
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError, Port
from patchbay.signal.positions import Batch, chosen
from patchbay.tiny.twins import twin
from tests.tolerance import close

N = 7


@functools.cache
def model_of(name: str = "llama") -> Model:
    return pb.load(twin(name))


def ids(n_prompts: int = 2) -> Tensor:
    return torch.randint(3, 90, (n_prompts, N), generator=torch.Generator().manual_seed(0))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PORTS = (
    Port("resid_mid", 0),
    Port("attn.z", 1),
    Port("attn.z", 0, 2),
    Port("attn.q", 0, 3),
    Port("attn.k", 1),
    Port("attn.head_out", 0, 1),
    Port("mlp.act", 0),
    Port("mlp.act", 1, 5),
    Port("logits"),
)


# ---- each kind, by its formula ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", PORTS, ids=str)
@pytest.mark.parametrize("positions", [None, 3, [4, 1]], ids=str)
def test_each_kind_does_what_its_formula_says_there_and_nothing_elsewhere(port: Port, positions: object) -> None:
    model = model_of()
    whole = Port(port.signal, port.layer)
    base = pb.run(model, ids(), taps=[whole])
    axis = port.axes.index(whole.axes[whole.position_axis])
    before = base[port].movedim(axis, 1)  # [prompt, position, ...features]
    value = noise(*before.shape[2:])
    mean = before.flatten(0, 1).mean(0)
    cases = [
        (pb.replace(port, value, positions=positions), value.expand_as(before)),
        (pb.add(port, value, positions=positions), before + value),
        (pb.scale(port, -0.7, positions=positions), -0.7 * before),
        (pb.zero(port, positions=positions), torch.zeros_like(before)),
        (pb.mean(port, base[port], positions=positions), mean.expand_as(before)),
    ]
    if before.ndim > 2:
        basis = noise(2, before.shape[-1], seed=1)
        inside = before @ basis.T @ torch.linalg.inv(basis @ basis.T) @ basis  # least squares on the two directions
        cases.append((pb.project(port, basis, positions=positions), before - inside))
        cases.append((pb.project(port, basis, positions=positions, keep=True), inside))
    here = torch.ones(N, dtype=torch.bool) if positions is None else torch.zeros(N, dtype=torch.bool)
    if positions is not None:
        here[torch.tensor(positions)] = True
    for edit, expected in cases:
        trace = pb.run(model, ids(), taps=[whole], edits=[edit])
        after = trace[port].movedim(axis, 1)
        assert close(after[:, here], expected[:, here]), edit
        if port.layer == 0:  # nothing upstream moved, so the rest is as it was
            assert close(after[:, ~here], before[:, ~here]), edit
        touched = tuple(here.nonzero()[:, 0].tolist())
        assert trace.touched == [[touched, touched]]
        if port.index is not None:
            others = [i for i in range(base[whole].shape[whole.axes.index(port.index_axis)]) if i != port.index]
            at = whole.axes.index(port.index_axis)
            same = torch.equal(
                trace[whole].index_select(at, torch.tensor(others)), base[whole].index_select(at, torch.tensor(others))
            )
            assert same or port.layer == 1, edit


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "bloom", "gemma2"])
def test_block_takes_the_key_away_and_renormalises_what_is_left(name: str) -> None:
    model = model_of(name)
    port = model.layers[0].attn.pattern
    base = pb.run(model, ids(), taps=[port])[port]
    found = pb.run(model, ids(), taps=[port], edits=[pb.block(port, query=[3, 5], key=[1, 2])])[port]
    expected = base.clone()
    for query in (3, 5):
        expected[:, :, query, 1:3] = 0
        expected[:, :, query] /= expected[:, :, query].sum(-1, keepdim=True)
    assert close(found, expected)
    assert float((base - expected).abs().max()) > 0.05
    one = model.layers[0].heads[1].pattern
    found = pb.run(model, ids(), taps=[port], edits=[pb.block(one, query=[3, 5], key=[1, 2])])[port]
    assert close(found[:, 1], expected[:, 1])
    assert close(found[:, [0, 2, 3]], base[:, [0, 2, 3]])


def test_block_beside_a_sink_leaves_the_rest_to_the_sink_too() -> None:
    model = model_of("gpt_oss")
    port = model.layers[1].attn.pattern
    base = pb.run(model, ids(), taps=[port])[port]
    found = pb.run(model, ids(), taps=[port], edits=[pb.block(port, query=6, key=2)])[port]
    left = base[:, :, 6].clone()
    taken = left[:, :, 2].clone()
    left[:, :, 2] = 0
    assert close(found[:, :, 6], left / (1 - taken[..., None]))  # the sink grows in proportion
    assert float(found[:, :, 6].sum(-1).min()) < 0.9


def test_no_edit_of_a_pattern_lets_a_query_see_what_comes_after_it() -> None:
    for name in ("llama", "gptj", "falcon", "mistral"):
        model = model_of(name)
        port = model.layers[0].attn.pattern
        trace = pb.run(model, ids(), taps=[port], edits=[pb.replace(port, 0.3)])
        back = torch.arange(N)[:, None] - torch.arange(N)
        seen = (back >= 0) & (back < (6 if name == "mistral" else N))
        assert torch.equal(trace[port], (0.3 * seen).expand_as(trace[port]))


def test_project_keeps_and_removes_complementary_parts_and_twice_is_once() -> None:
    model, port, basis = model_of(), Port("resid_in", 1), noise(3, 32)
    base = pb.run(model, ids(), taps=[port])[port]
    keep, drop = (
        pb.run(model, ids(), taps=[port], edits=[pb.project(port, basis, keep=k)])[port] for k in (True, False)
    )
    assert close(keep + drop, base)
    assert close(drop @ basis.T, 0.0, of=base @ basis.T)
    twice = pb.run(model, ids(), taps=[port], edits=[pb.project(port, basis)] * 2)[port]
    assert close(twice, drop)


def test_mean_leaves_padding_out() -> None:
    model, port = model_of(), Port("attn.z", 0, 1)
    long, short = ids()[0].tolist(), ids()[1, :3].tolist()
    trace = pb.run(model, [long, short], taps=[port])
    expected = torch.cat([trace[port][0], trace[port][1, :3]]).mean(0)
    assert close(pb.mean(port, trace[port]).value, expected)
    whole = Port("attn.q", 0)  # the position axis of q is its third
    trace = pb.run(model, [long, short], taps=[whole])
    expected = torch.cat([trace[whole][0], trace[whole][1, :, :3]], 1).mean(1)  # [head, d_head]
    assert close(pb.mean(whole, trace[whole]).value, expected)


# ---- positions and rows ----------------------------------------------------------------------------------------------

bounds = st.one_of(st.none(), st.integers(-9, 9))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    prompts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    new = draw(st.integers(0, 3))
    lengths = torch.tensor(prompts) + new
    tokens = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=len(prompts) * 9, max_size=len(prompts) * 9)))
    return Batch(tokens.view(-1, 9), lengths, torch.tensor(prompts))


@settings(max_examples=150, deadline=None)
@given(batches(), bounds, bounds, st.sampled_from([None, 1, 2]))
def test_slices_count_within_the_prompt_and_open_ones_go_on(
    batch: Batch, start: int | None, stop: int | None, step: int | None
) -> None:
    found = chosen(slice(start, stop, step), batch)
    for row, (n, prompt) in enumerate(zip(batch.lengths.tolist(), batch.prompt_lengths.tolist(), strict=True)):
        expected = list(range(prompt)[start:stop:step])
        if stop is None and step in (None, 1):
            expected += range(prompt, n)
        assert found[row].ge(0).nonzero()[:, 0].tolist() == expected
        assert found[row][found[row] >= 0].tolist() == list(range(len(expected)))


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(0, 2), st.lists(st.integers(-6, 5), min_size=1, max_size=3, unique=True))
def test_the_other_kinds_of_position_equal_plain_lists(batch: Batch, token: int, indices: list[int]) -> None:
    lengths, prompts = batch.lengths.tolist(), batch.prompt_lengths.tolist()
    mask = torch.arange(9) % 2 == 0
    cases = {
        "all": (None, lambda i: range(lengths[i])),
        "last": ("last", lambda i: [prompts[i] - 1]),
        "generated": ("generated", lambda i: range(prompts[i], lengths[i])),
        "token": (pb.Token(token), lambda i: [p for p in range(lengths[i]) if batch.ids[i, p] == token]),
        "mask": (mask[None], lambda i: range(0, lengths[i], 2)),
    }
    for what, (positions, expected) in cases.items():
        found = chosen(positions, batch)
        for i in range(len(prompts)):
            assert found[i].ge(0).nonzero()[:, 0].tolist() == list(expected(i)), what
    inside = all(-n <= index < n for n in prompts for index in indices)
    if not inside:
        with pytest.raises(PatchbayError, match=r"position -?\d+ is outside prompt \d+, which has \d+ tokens"):
            chosen(tuple(indices), batch)
    elif all(len({index % n for index in indices}) == len(indices) for n in prompts):
        found = chosen(tuple(indices), batch)
        for i, n in enumerate(prompts):  # the order asked is the order of the values
            assert [int(found[i, index % n]) for index in indices] == list(range(len(indices)))
            assert int(found[i].ge(0).sum()) == len(indices)


def test_a_value_for_each_position_goes_to_its_position() -> None:
    model, port, values = model_of(), Port("resid_in", 1), noise(3, 32)
    for positions, where in (([5, 0, 2], [5, 0, 2]), (slice(1, 4), [1, 2, 3]), ([-1, 1, 2], [6, 1, 2])):
        found = pb.run(model, ids(), taps=[port], edits=[pb.replace(port, values, positions=positions)])[port]
        assert all(torch.equal(found[:, place], values[i].expand(2, -1)) for i, place in enumerate(where))


def test_a_different_edit_for_every_row_of_one_batch() -> None:
    model, port, n = model_of(), Port("attn.z", 0, 1), 4
    batch, values = ids(1).expand(n, -1), noise(n, 8)
    by_edit = [pb.replace(port, values[i], positions=i, rows=i) for i in range(n - 1)]
    trace = pb.run(model, batch, taps=[port], edits=by_edit)
    base = pb.run(model, batch, taps=[port])
    for i in range(n - 1):
        expected = base[port][i].clone()
        expected[i] = values[i]
        assert close(trace[port][i], expected)
    assert close(trace.logits[n - 1], base.logits[n - 1])
    assert trace.touched == [[(i,) if i == j else () for j in range(n)] for i in range(n - 1)]
    in_one = pb.run(model, batch, taps=[port], edits=[pb.replace(port, values[[2, 0], None], rows=[3, 1])])[port]
    assert torch.equal(in_one[3], values[2].expand(N, -1))
    assert torch.equal(in_one[1], values[0].expand(N, -1))
    assert close(in_one[[0, 2]], base[port][[0, 2]])
    each = noise(2, N, 8, seed=1)  # a value for every row and every position
    found = pb.run(model, batch, taps=[port], edits=[pb.replace(port, each, rows=[2, 0])])[port]
    assert torch.equal(found[[2, 0]], each)


def test_nothing_acts_on_padding() -> None:
    model, port = model_of(), Port("resid_in", 1)
    prompts = [ids()[0].tolist(), ids()[1, :3].tolist()]
    trace = pb.run(model, prompts, taps=[port], edits=[pb.replace(port, noise(32))])
    assert trace.touched == [[tuple(range(N)), (0, 1, 2)]]
    assert bool(trace[port][1, 3:].isnan().all())
    assert not bool(trace[port][1, :3].isnan().any())


# ---- order -----------------------------------------------------------------------------------------------------------


def test_edits_at_one_port_act_in_the_order_given() -> None:
    model, port, value = model_of(), Port("attn.z", 0), noise(8)
    base = pb.run(model, ids(), taps=[port])[port]
    one, two = pb.scale(Port("attn.z", 0, 2), 3.0), pb.add(port, value)
    found = pb.run(model, ids(), taps=[port], edits=[one, two])[port]
    assert close(found[:, :, 2], 3 * base[:, :, 2] + value)
    found = pb.run(model, ids(), taps=[port], edits=[two, one])[port]
    assert close(found[:, :, 2], 3 * (base[:, :, 2] + value))
    assert close(found[:, :, 1], base[:, :, 1] + value)


def test_ports_act_in_the_order_of_the_forward_pass_whatever_the_order_given() -> None:
    for name in ("llama", "bloom", "falcon alibi", "gemma2"):
        model = model_of(name)
        layer = model.layers[0]
        value = noise(model.d_model)
        chain = [layer.attn.head_out, layer.attn.out, layer.resid_mid, layer.mlp.out, layer.resid_out]
        edits = [pb.replace(port, value * (i + 1)) for i, port in enumerate(chain)]
        for order in (edits, edits[::-1]):
            trace = pb.run(model, ids(), taps=chain, edits=order)
            for i, port in enumerate(chain):  # each later port is set after the earlier ones have acted
                assert close(trace[port], (value * (i + 1)).expand_as(trace[port])), (name, port)


def test_block_precedes_the_other_edits_of_a_pattern() -> None:
    model = model_of()
    port = model.layers[0].attn.pattern
    edits = [pb.scale(port, 2.0), pb.block(port, query=4, key=2)]
    found = pb.run(model, ids(), taps=[port], edits=edits)[port]
    assert close(found[:, :, 4].sum(-1), torch.tensor(2.0))
    assert float(found[:, :, 4, 2].abs().max()) == 0


@pytest.mark.parametrize("name", ["falcon", "llama", "olmo2", "mixtral"])
def test_running_never_writes_into_an_edits_value(name: str) -> None:
    model = model_of(name)
    ports = [port for port in model.ports() if port.editable and port.signal not in ("attn.pattern", "router.logits")]
    base = pb.run(model, ids(), taps=ports)
    for port in ports:  # a value of the signal's full shape can be passed on without a copy
        value = base[port].movedim(port.position_axis, 1).clone()
        kept = value.clone()
        edit = pb.replace(port, value)
        pb.run(model, ids(), edits=[edit, pb.scale(port, 2.0)])
        pb.run(model, ids(), edits=[edit])
        assert torch.equal(value, kept), port


# ---- comparing, printing and files -----------------------------------------------------------------------------------


def some_edits() -> list[Edit]:
    port = Port("attn.z", 1, 2)
    shared = noise(4, 8)
    return [
        pb.replace(port, shared[1], positions=3),
        pb.add(port, shared[1], positions=[1, -2], rows=[0, 2]),  # shares memory with the one before
        pb.add(port, shared.T[:, 2], positions="last"),  # not contiguous
        pb.scale(Port("mlp.act", 0), 0.5, positions=slice(2, None)),
        pb.zero(Port("logits"), positions="generated"),
        pb.mean(Port("resid_out", 1), noise(32), positions=pb.Token(7)),
        pb.mean(Port("resid_out", 1), noise(32), positions=pb.Token(" the")),
        pb.project(Port("resid_in", 0), noise(2, 32), positions=torch.tensor([[True, False, True]])),
        pb.block(Port("attn.pattern", 0, 1), query=-1, key=[3]),
        pb.block(Port("attn.pattern", 0), key=torch.tensor([[True, True]])),
        pb.add(Port("resid_in", 0), noise(32).to(torch.bfloat16)),
    ]


def test_edits_come_back_equal_from_memory_and_from_a_file(tmp_path: Path) -> None:
    edits = some_edits()
    rows, tensors = pack(edits)
    assert unpack(json.loads(json.dumps(rows)), tensors) == edits
    save_edits(edits, tmp_path / "edits.safetensors")
    again = load_edits(tmp_path / "edits.safetensors")
    assert again == edits
    assert [hash(edit) for edit in again] == [hash(edit) for edit in edits]
    assert [str(edit) for edit in again] == [str(edit) for edit in edits]
    assert [path.name for path in tmp_path.iterdir()] == ["edits.safetensors"]


def test_edits_differ_where_anything_of_them_differs() -> None:
    edits = some_edits()
    assert all((a == b) == (a is b) for a in edits for b in edits)
    value = noise(8)
    assert pb.add(Port("attn.z", 0), value) == pb.add(Port("attn.z", 0), value.clone())
    assert pb.add(Port("attn.z", 0), value) != pb.add(Port("attn.z", 0), value + 1e-6)
    assert pb.add(Port("attn.z", 0), value) != pb.add(Port("attn.z", 0), value.double())
    assert pb.add(Port("attn.z", 0), value) != "add"
    assert len({pb.zero(Port("attn.z", 0)), pb.zero(Port("attn.z", 0)), pb.zero(Port("attn.z", 1))}) == 2


def test_a_mask_that_changes_later_does_not_change_the_edit() -> None:
    mask = torch.tensor([[True, False]])
    edit = pb.zero(Port("resid_in", 0), positions=mask)
    mask[:] = False
    assert bool(edit.positions[0, 0])


def test_printing_says_what_and_where() -> None:
    assert str(pb.scale(Port("attn.z", 1, 2), 0.5, positions=slice(2, None), rows=1)) == (
        "scale(L1.H2.z, 0.5, positions=slice(2, None, None), rows=[1])"
    )
    assert (
        str(pb.add(Port("resid_out", 3), noise(32), positions="last"))
        == "add(L3.resid_out, tensor[32], positions='last')"
    )
    assert str(pb.block(Port("attn.pattern", 0), query=-1, key=[3])) == "block(L0.attn.pattern, positions=-1, key=(3,))"


def test_damaged_and_foreign_files_are_refused_with_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "edits.safetensors"
    with pytest.raises(PatchbayError, match="not a readable edits file"):
        load_edits(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(PatchbayError, match="not a readable edits file"):
        load_edits(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(PatchbayError, match="header says nothing"):
        load_edits(path)
    for rows, says in (
        ("[", "holds no edits"),
        ('[{"op": "explode", "port": "L0.resid_in"}]', "no edit 'explode'; edits are replace, add"),
        ('[{"op": "zero"}]', "not an edit"),
        ('[{"op": "zero", "port": "L0.nothing"}]', "asked for signal 'nothing'"),
        ('[{"op": "add", "port": "L0.resid_in", "tensor": "value9"}]', "not an edit"),
    ):
        save_file({"x": torch.zeros(1)}, path, metadata={"format": "patchbay-edits", "version": "1", "edits": rows})
        with pytest.raises(PatchbayError, match=says):
            load_edits(path)


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "edits.safetensors"
    save_edits(some_edits(), path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PatchbayError, match="No space left on device; nothing was written"):
        save_edits(some_edits()[:1], path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["edits.safetensors"]


def test_ports_of_parts_texts_views_and_ports() -> None:
    model = model_of()
    assert ports_of("L1.H2") == [Port("attn.z", 1, 2)]
    assert ports_of([model.layers[0].mlp.neurons[3], "L0.attn"]) == [Port("mlp.act", 0, 3), Port("attn.out", 0)]
    assert ports_of(["L1.H2"], "pattern") == [Port("attn.pattern", 1, 2)]
    assert ports_of(Port("logits")) == [Port("logits")]


# ---- errors ----------------------------------------------------------------------------------------------------------

Z = Port("attn.z", 0, 1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Edit("melt", Z), "no edit 'melt'; edits are replace, add, scale"),
        (lambda: pb.zero(3), "expected a port, such as .*got int"),
        (lambda: pb.zero("L0.H1"), "'L0.H1' is not a port: L0.H1 is a part, .*: L0.H1.q, L0.H1.k"),
        (lambda: pb.zero(pb.Part(0, "head", 1)), "expected a port: L0.H1 is a part, .*: L0.H1.q, L0.H1.k"),
        (lambda: pb.zero("L0.atn.z"), "'L0.atn.z' is not a port.*did you mean 'attn.z'"),
        (lambda: pb.scale("L0.H1.k", 2.0), "head's key/value group, which the model knows: give model.port"),
        (lambda: pb.zero(Port("router.experts", 0)), "can be tapped, not edited"),
        (lambda: pb.zero(Port("attn.pattern", 0, 1, (2,))), "give query rows of an edit as positions="),
        (lambda: pb.block(Z, key=1), "block cuts attention and needs a pattern port"),
        (lambda: pb.add(Z, torch.tensor([1, 2])), "dtype torch.int64, a float is needed"),
        (lambda: pb.add(Z, torch.tensor([1.0, float("nan")])), "value holds NaN or infinite"),
        (lambda: pb.add(Z, float("inf")), "inf is not a finite number"),
        (lambda: pb.add(Z, "big"), "'big' is not a finite number"),
        (lambda: pb.add(Z, torch.zeros(8, device="meta")), "meta device"),
        (lambda: pb.zero(Z, positions=slice(3, None, -1)), "a slice steps forward"),
        (lambda: pb.zero(Z, positions="first"), "as text only 'last', 'generated', 'predicting'"),
        (lambda: pb.project(Z, torch.tensor([[1.0, 0], [2.0, 0]])), "the 2 directions are not linearly independent"),
        (lambda: pb.project(Z, torch.tensor([[1.0, float("nan")]])), "basis holds NaN"),
        (lambda: pb.project(Port("mlp.act", 0, 1), torch.ones(1, 1)), "one number at each position"),
    ],
)
def test_what_is_not_an_edit_is_refused_when_it_is_made(make, says: str) -> None:
    with pytest.raises(PatchbayError, match=says):
        make()


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            pb.zero(Z, positions=N),
            rf"zero\(L0.H1.z, positions={N}\): position {N} is outside prompt 0, which has {N} tokens \(0..6\)",
        ),
        (pb.zero(Z, positions=-N - 1), "position -8 is outside prompt 0"),
        (pb.zero(Z, positions=slice(3, 3)), "touches nothing"),
        (pb.zero(Z, positions="generated"), "touches nothing"),
        (pb.zero(Z, positions=pb.Token(1)), "touches nothing"),
        (pb.zero(Z, rows=2), "row 2 asked, the batch has prompts 0..1"),
        (pb.zero(Z, positions=torch.ones(3, N, dtype=torch.bool)), r"a bool tensor \[prompt, position\] = \[2, 7\]"),
        (pb.zero(Z, positions=torch.ones(1, N + 1, dtype=torch.bool)), "mask marks position 7, prompts have 7"),
        (pb.zero(Z, positions=torch.tensor([1, 2])), "got torch.int64"),
        (pb.add(Z, torch.zeros(7)), r"value has shape \[7\]; L0.H1.z takes \[8\]"),
        (pb.add(Z, torch.zeros(2, 8), positions=slice(0, 3)), r"value has shape \[2, 8\].*\[3, \*\[8\]\]"),
        (pb.add(Z, torch.zeros(3, 1, 8)), r"\[2, 1 or n_positions, \*\[8\]\] for each row"),
        (pb.project(Z, torch.eye(9)[:2]), "directions have 9 features, L0.H1.z has 8"),
        (pb.zero(Port("attn.z", 0, 4)), r"L0.H4.z: layer 0 has 4 \(0..3\)"),
        (pb.zero(Port("attn.z", 2)), "the model has layers 0..1"),
        (pb.zero(Port("router.logits", 0)), "layer 0 offers .*no layer of this llama model has it"),
        (pb.zero(Z, positions=pb.Token("word")), "text needs a tokenizer"),
        (
            pb.block(Port("attn.pattern", 0), query=3, key=slice(0, None)),
            "query position 3 of prompt 0 .* left with no key",
        ),
        (pb.block(Port("attn.pattern", 0), query=2, key=5), "touches nothing"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_run_is_refused_and_leaves_no_hook(edit: Edit, says: str) -> None:
    model = model_of()
    with pytest.raises(PatchbayError, match=says):
        pb.run(model, ids(), edits=[edit])
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.hf.modules())
    assert model.hf.config._attn_implementation == "sdpa"


def test_rows_of_an_edit_are_numbered_in_the_order_asked() -> None:
    assert row_mask(pb.zero(Z, rows=[3, 1]), 4).tolist() == [-1, 1, -1, 0]
    assert row_mask(pb.zero(Z), 3).tolist() == [0, 1, 2]
