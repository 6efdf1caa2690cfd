"""Generation under edits with the key/value cache equals one run over the finished text without it.

For every family: every kind of edit at every signal, each in its own row of a batch, with every kind of position among
them. The reference names the positions as plain lists and runs the whole text at once, so it shares neither the cache nor
the arithmetic of positions with what it checks.
"""

import functools

import pytest
import torch

import patchbay as pb
from patchbay.edit import OPS, Edit
from patchbay.model import Model
from patchbay.port import PatchbayError, Port
from patchbay.tiny.twins import FAMILY_CONFIGS, N_VOCAB, WINDOW, twin

LENGTH, NEW, TOLERANCE = 10, 5, 1e-4
TOKEN = 7  # stands in the prompt at position 4, and wherever it is generated
KINDS = (None, 2, -3, slice(2, 5), slice(4, None), (1, 3), "last", "generated", pb.Token(TOKEN), "mask")
MAIN = [name for name in FAMILY_CONFIGS if list(FAMILY_CONFIGS).index(name) <= list(FAMILY_CONFIGS).index("bamba")]


@functools.cache
def model_of(name: str) -> Model:
    return pb.load(twin(name))


def prompt_ids(n: int = 1) -> torch.Tensor:
    ids = torch.randint(8, N_VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[0, 4] = TOKEN
    return ids.expand(n, -1).contiguous()


def positions_of(kind: object) -> object:
    """What an edit is given for this kind of position."""
    if kind == "mask":
        return torch.arange(LENGTH)[None] % 3 == 1
    return list(kind) if isinstance(kind, tuple) else kind


def places(kind: object, ids: list[int]) -> list[int]:
    """Which positions of a text of these tokens are meant, the first LENGTH of which are the prompt."""
    everything = list(range(len(ids)))
    if kind is None:
        return everything
    if isinstance(kind, int):
        return [kind if kind >= 0 else LENGTH + kind]
    if isinstance(kind, slice):
        return everything[kind.start :] if kind.stop is None else everything[kind]
    if isinstance(kind, tuple):
        return list(kind)
    if isinstance(kind, pb.Token):
        return [i for i in everything if ids[i] == kind.token]
    return {
        "last": [LENGTH - 1],
        "generated": everything[LENGTH:],
        "mask": [i for i in range(LENGTH) if i % 3 == 1],
    }[kind]


def edit_of(op: str, port: Port, tap: torch.Tensor, seed: int, **where: object) -> Edit | None:
    """An edit of this kind at this port, of the size of the signal; None where the kind says nothing about it."""
    generator = torch.Generator().manual_seed(seed)
    shape = tap.movedim(port.position_axis, 1).shape[2:]
    noise = tap.std() * torch.randn(shape, generator=generator)
    noise = torch.full((1, 1), 0.07) if port.signal == "attn.pattern" else noise  # its keys grow
    if op in ("replace", "add"):
        return Edit(op, port, noise, **where)
    if op == "scale":
        return pb.scale(port, -1.6 if port.signal == "router.logits" else 1.6, **where)
    if op == "zero":  # equal logits leave the choice of experts to chance
        return None if port.signal == "router.logits" else pb.zero(port, **where)
    if op == "mean":
        return pb.mean(port, noise if port.signal == "attn.pattern" else tap, **where)
    if op == "project" and port.signal not in ("attn.pattern", "router.logits", "router.weights"):
        return pb.project(port, torch.randn(2, shape[-1], generator=generator), **where)
    return None


def generated(model: Model, ids: torch.Tensor, edits: list[Edit], **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy continuation with the cache: the whole text [prompt, position], and the logits of its new tokens."""
    with model.edited(*edits):
        out = model.hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return out.sequences, torch.stack(out.logits, 1)


def assert_equals_recomputation(model: Model, edits: list[Edit], kinds: list[object], key_kinds: list[object] | None = None) -> torch.Tensor:
    """Returns by how much each row's logits differ from those without edits."""
    text, logits = generated(model, prompt_ids(len(edits)), edits)
    plain = []
    for row, (edit, kind) in enumerate(zip(edits, kinds, strict=True)):
        ids = text[row, :-1].tolist()
        where = places(kind, ids)
        keys = tuple(places(key_kinds[row], ids)) if key_kinds else None
        if where:
            plain.append(Edit(edit.op, edit.port, edit.value, tuple(where), (row,), keys))
    whole = pb.run(model, text[:, :-1], edits=plain).logits[:, LENGTH - 1 :]  # [prompt, new token, vocab]
    difference = (whole - logits).abs().amax(dim=(1, 2))
    worst = int(difference.argmax())
    assert float(difference[worst]) < TOLERANCE, f"{edits[worst]} differs by {float(difference[worst]):.1e}"
    assert torch.equal(whole.argmax(-1), text[:, LENGTH:])
    unedited = pb.run(model, text[:, :-1]).logits[:, LENGTH - 1 :]
    return (whole - unedited).abs().amax(dim=(1, 2))


@pytest.mark.parametrize("op", [op for op in OPS if op != "block"])
@pytest.mark.parametrize("name", MAIN)
def test_generation_with_the_cache_equals_one_run_without_it(name: str, op: str) -> None:
    model = model_of(name)
    base = pb.run(model, prompt_ids(), taps=model.ports())
    ports = [port for port in model.ports() if port.editable]
    edits: list[Edit] = []
    kinds: list[object] = []
    for i, port in enumerate(ports):
        kind = KINDS[(i + 3 * OPS.index(op)) % len(KINDS)]
        edit = edit_of(op, port, base[port], i, positions=positions_of(kind), rows=len(edits))
        if edit is not None:
            edits.append(edit)
            kinds.append(kind)
    changed = assert_equals_recomputation(model, edits, kinds)
    idle = [edit for edit, change in zip(edits, changed, strict=True) if change < 1e-4]
    silent = [edit for edit in idle if not may_be_silent(model, edit)]
    assert not silent, f"without effect: {silent}"


def may_be_silent(model: Model, edit: Edit) -> bool:
    """Signals of the last layer and after it reach no logits but those of their own position."""
    late = edit.port.layer is None or edit.port.layer == model.n_layers - 1
    before_the_last = edit.positions not in (None, "last", "generated", slice(4, None))
    return late and before_the_last
