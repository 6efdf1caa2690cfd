"""Whatever a user does, a run is under the edits of its own block and at its prompt's own positions: random splits of prompts into
calls, masks, interleavings of blocks, caches and options of generation, each against one plain run of one prompt without a cache.

Few examples by default; `pytest --hypothesis-profile many tests/jacks/test_properties.py` draws many.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import StaticCache, StoppingCriteriaList

import patchbay as pb
from patchbay.edits.apply import for_prompts
from patchbay.jacks.arguments import cache_among, with_cache
from patchbay.signal.port import PatchbayError
from patchbay.tiny.twins import twin
from tests.jacks.test_calls import clean
from tests.tolerance import close

FAMILIES = (
    "llama",
    "gemma2",
    "gptj",
    pytest.param("gpt2", marks=pytest.mark.slow),
    pytest.param("mixtral", marks=pytest.mark.slow),
)
SIGNALS = (
    "resid_in", "resid_mid", "resid_out", "attn.q", "attn.k", "attn.v", "attn.pattern", "attn.z", "attn.head_out", "attn.out", "mlp.in",
    "mlp.out",
)  # fmt: skip
STATIC = {"cache_implementation": "static"}


@functools.cache
def lent(name: str) -> pb.Model:
    return pb.load(twin(name))


# --- what is drawn ---

ENDS = st.integers(-4, 4) | st.none()
POSITIONS = st.one_of(
    st.none(),
    st.sampled_from(["last", "generated", "predicting", "-1:", pb.Token(9), pb.Token(40)]),
    st.integers(-3, 2),
    st.lists(st.integers(-3, 2), min_size=1, max_size=2, unique=True).map(tuple),
    st.builds(slice, ENDS, ENDS, st.none() | st.integers(1, 2)),
    st.lists(st.booleans(), min_size=3, max_size=3).map(lambda row: torch.tensor([row])),  # no prompt is shorter
)


@st.composite
def edits(draw: st.DrawFn, model: pb.Model, n_rows: int = 1) -> list[pb.Edit]:
    """One to three edits of any kind, at any positions; of several rows some go by row."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        layer = draw(st.integers(0, model.n_layers - 1))
        offered = [s for s in SIGNALS if s in model.signals(layer)]
        port = draw(st.sampled_from([*(pb.Port(s, layer) for s in offered), pb.Port("embed"), pb.Port("logits")]))
        if port.index_axis == "head" and port.signal not in ("attn.k", "attn.v") and draw(st.booleans()):
            port = pb.Port(port.signal, layer, draw(st.integers(0, model.n_heads(layer) - 1)))
        where: dict[str, Any] = {"positions": draw(POSITIONS)}
        if n_rows > 1:
            where["rows"] = draw(st.none() | st.integers(0, n_rows - 1))
        if port.signal == "attn.pattern" and draw(st.booleans()):
            where["query"] = where.pop("positions")
            made.append(pb.block(port, key=draw(st.sampled_from([0, pb.Token(9), slice(1, 2)])), **where))
            continue
        made.append(pb.scale(port, draw(st.sampled_from([-2.0, 0.0, 1.5, 3.0])), **where))
    return made


def prompts(n: int, lengths: Sequence[int], seed: int) -> list[Tensor]:
    drawn = torch.randint(3, 90, (n, max(lengths)), generator=torch.Generator().manual_seed(seed))
    drawn[:, 1] = 9  # a token that edits name
    return [row[:length] for row, length in zip(drawn, lengths, strict=True)]


def alone(model: pb.Model, changes: Sequence[pb.Edit], ids: Tensor, n_prompt: int, row: int, n: int) -> Tensor:
    """Logits [position, vocab] of one row of `n`, run by itself without a cache."""
    own = [share for e in changes if (share := for_prompts(e, [row], n, len(ids))) is not None]
    known = {"lengths": torch.tensor([len(ids)]), "prompt_lengths": torch.tensor([n_prompt])}
    with torch.no_grad(), model.session((), own, **known):
        return model.hf(ids[None], use_cache=False).logits[0]


def or_refused(model: pb.Model, changes: Sequence[pb.Edit], texts: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """What is right for each text and its prompt's length; a draw that is refused even so is none (a query without a key, a
    position outside the prompt)."""
    try:
        return [alone(model, changes, ids, n, i, len(texts)) for i, (ids, n) in enumerate(texts)]
    except PatchbayError:
        assume(False)
        raise AssertionError from None


def columns(texts: Sequence[Tensor], left: Sequence[int], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that begin after so many columns of padding: ids, mask, places."""
    ids, mask = torch.full((len(texts), width), 7), torch.zeros(len(texts), width, dtype=torch.long)
    for row, (text, start) in enumerate(zip(texts, left, strict=True)):
        ids[row, start : start + len(text)], mask[row, start : start + len(text)] = text, 1
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


# --- a prompt in pieces ---


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
def test_a_prompt_in_any_pieces(name: str, data: st.DataObject) -> None:
    """Padded or not, in one to four calls on a cache of either kind or copies of it, the prompt's end said or not: the numbers of each prompt alone; or a
    refusal, never where its end is said."""
    model, n = lent(name), data.draw(st.integers(1, 2))
    lengths = data.draw(st.lists(st.integers(3, 9), min_size=n, max_size=n))
    changes = data.draw(edits(model, n))
    texts = prompts(n, lengths, data.draw(st.integers(0, 99)))
    right = or_refused(model, changes, [(text, len(text)) for text in texts])
    width = max(lengths)
    ids, mask, place = columns(texts, [width - len(text) for text in texts], width)
    cuts = sorted(data.draw(st.sets(st.integers(1, width - 1), max_size=3)))
    said = data.draw(st.booleans())
    cache = StaticCache(config=model.hf.config, max_cache_len=16) if data.draw(st.booleans()) else None
    copied, pieces = data.draw(st.booleans()), []
    try:
        with torch.no_grad(), model.edited(*changes, prompt_length=width if said else None):
            for start, end in zip([0, *cuts], [*cuts, width], strict=True):
                given_mask = {"attention_mask": mask[:, :end], "position_ids": place[:, start:end]} if n > 1 else {}
                out = model.hf(
                    ids[:, start:end],
                    use_cache=True,
                    **given_mask,
                    **with_cache(model.hf, copy.deepcopy(cache) if copied else cache),
                )
                pieces.append(out.logits)
                cache = cache_among((), out)
    except PatchbayError:
        assert not said
        assert cuts
        return
    found = torch.cat(pieces, 1)
    for row in range(n):
        assert close(found[row][mask[row].bool()], right[row], noise=256), changes  # in other pieces


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
def test_any_mask(name: str, data: st.DataObject) -> None:
    """Padding anywhere, also amid a prompt, under masks of any dtype, given by name or by place."""
    model, n = lent(name), data.draw(st.integers(1, 3))
    changes = data.draw(edits(model, n))
    rows = st.lists(st.booleans(), min_size=9, max_size=9)
    if name == "gemma2":  # its window counts columns, so that padding amid a prompt is a part of it
        rows = st.tuples(st.integers(0, 6), st.integers(3, 9)).map(lambda at: [at[0] <= i < sum(at) for i in range(9)])
    mask = torch.tensor(data.draw(st.lists(rows, min_size=n, max_size=n)))
    assume(bool((mask.sum(1) >= 3).all()))
    texts = [
        text[: int(row.sum())]
        for text, row in zip(prompts(n, [9] * n, data.draw(st.integers(0, 99))), mask, strict=True)
    ]
    right = or_refused(model, changes, [(text, len(text)) for text in texts])
    ids = torch.full((n, 9), 7)
    for row in range(n):
        ids[row, mask[row]] = texts[row]
    place = (mask.long().cumsum(1) - 1).clamp(min=0)
    by_place = list(inspect.signature(model.hf.forward).parameters).index("attention_mask")
    typed = mask.to(data.draw(st.sampled_from([torch.bool, torch.long, torch.float32])))
    with torch.no_grad(), model.edited(*changes):
        if data.draw(st.booleans()):
            found = model.hf(ids, attention_mask=typed, position_ids=place, use_cache=False).logits
        else:
            found = model.hf(ids, *[None] * (by_place - 1), typed, position_ids=place, use_cache=False).logits
    for row in range(n):
        assert close(found[row][mask[row]], right[row]), changes


# --- blocks that interleave ---

LOOK = torch.tensor([[5, 9, 40, 2, 11, 3]])
KNOBS = (
    pb.scale(pb.Port("attn.out", 0), 3.0),
    pb.scale(pb.Port("attn.pattern", 1), 0.2),
    pb.scale(pb.Port("resid_out", 0), -2.0, positions="last"),
    pb.block(pb.Port("attn.pattern", 0), query=slice(2, None), key=0),
)
STEPS = st.lists(
    st.sampled_from(["open 0", "open 1", "open 2", "open 3", "close", "look", "run", "generate", "fail"]), max_size=9
)


@functools.cache
def under(name: str, stack: tuple[int, ...]) -> tuple[Tensor, list[int]]:
    """The logits, and the text that follows, under a stack of knobs, each alone in the process."""
    model, own = lent(name), [KNOBS[i] for i in stack]
    return pb.run(model, LOOK, edits=own).logits, model.generate(LOOK, 2, edits=own)[0]


class Actor:
    """Follows a script of blocks and runs, and tells what differs from what is right under its own blocks."""

    def __init__(self, name: str, script: Sequence[str], wrong: list[Any]) -> None:
        self.name, self.model, self.script, self.wrong = name, lent(name), [*script, "look"], wrong
        self.blocks: list[Any] = []
        self.stack: tuple[int, ...] = ()

    def do(self, line: str) -> None:
        if line.startswith("open"):
            self.stack = (*self.stack, int(line[-1]))
            self.blocks.append(self.model.edited(KNOBS[self.stack[-1]]))
            self.blocks[-1].__enter__()
        elif line == "close":
            self.look("look")  # a block in which nothing runs is another matter
            if self.blocks:
                self.stack = self.stack[:-1]
                self.blocks.pop().__exit__(None, None, None)
        else:
            self.look(line)

    def look(self, how: str) -> None:
        logits, text = under(self.name, self.stack)
        if how == "fail":
            with pytest.raises(IndexError):
                self.model.hf(torch.full((1, 6), 10_000))
        elif how == "generate":
            found = self.model.hf.generate(
                LOOK, attention_mask=torch.ones_like(LOOK), max_new_tokens=2, do_sample=False, pad_token_id=0
            )
            self.note(found[0].tolist() == text, how)
        else:
            with torch.no_grad():
                found = self.model.hf(LOOK).logits if how == "look" else pb.run(self.model, LOOK).logits
            self.note(torch.equal(found, logits), how)

    def note(self, right: bool, how: str) -> None:
        if not right:
            self.wrong.append((how, self.stack))

    def steps(self) -> Iterator[None]:
        """As a generator that rests after every line."""
        for line in self.script:
            self.do(line)
            yield
        while self.blocks:
            self.do("close")
            yield

    def at_once(self) -> None:
        for line in self.script:
            self.do(line)
        while self.blocks:
            self.do("close")

    async def task(self) -> None:
        """As a coroutine that lets others run after every line."""
        for line in self.script:
            self.do(line)
            await asyncio.sleep(0)
        while self.blocks:
            self.do("close")
            await asyncio.sleep(0)


@pytest.mark.parametrize("name", ["llama", "gptj"])
@given(scripts=st.lists(STEPS, min_size=5, max_size=5), order=st.lists(st.integers(0, 2), max_size=24))
def test_blocks_of_threads_generators_and_tasks_interleave(
    name: str, scripts: list[list[str]], order: list[int]
) -> None:
    """Two generators and their caller turn about as drawn, beside a thread; then, while they rest, tasks turn about: each under its own
    blocks alone, nested as they may be, also after runs that failed; and nothing left behind."""
    wrong: list[Any] = []
    mine, first, second, other, *tasks = (Actor(name, script, wrong) for script in [*scripts, scripts[0]])
    for actor in (mine, first, second, other, *tasks):
        for k in range(len(actor.script)):  # what is right is found before anything interleaves
            expect(actor.name, actor.script[:k])
    thread = threading.Thread(target=other.at_once)
    turns = [mine.steps(), first.steps(), second.steps()]
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        thread.start()
        for i in order:
            next(turns[i], None)
        if not mine.blocks:  # tasks that are made in a block are under it
            asyncio.run(both(tasks))
        for turn in turns:
            for _ in turn:
                pass
        thread.join()
    finally:
        sys.setswitchinterval(often)
    assert wrong == []
    assert clean(lent(name))


async def both(actors: Sequence[Actor]) -> None:
    await asyncio.gather(*(actor.task() for actor in actors))


def expect(name: str, script: Sequence[str]) -> None:
    stack: tuple[int, ...] = ()
    for line in script:
        stack = (*stack, int(line[-1])) if line.startswith("open") else stack[:-1] if line == "close" else stack
    under(name, stack)


# --- generation ---

CACHES = st.sampled_from([{}, STATIC, {"use_cache": False}])
DECODING = st.sampled_from(
    [
        {}, {"do_sample": True, "temperature": 1.5}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2},
        {"prefill_chunk_size": 2}, {"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 2}, {"repetition_penalty": 3.0},
        {"assistant": True}, {"eos_token_id": list(range(3, 30))}, {"stop": True}, {"do_sample": True, "top_k": 5, "num_beams": 2},
    ]
)  # fmt: skip
NEW = 5


def options(drawn: dict[str, Any], name: str) -> dict[str, Any]:
    """What transformers is given for a drawn way of decoding."""
    made = dict(drawn)
    if made.pop("assistant", False):
        made["assistant_model"] = assistant(name)
    if made.pop("stop", False):
        made["stopping_criteria"] = StoppingCriteriaList([lambda ids, scores: ids[:, -1] % 3 == 0])
    return made


@functools.cache
def assistant(name: str) -> Any:
    """A model that drafts: the model itself with a little noise, so that some drafts are taken and some are not."""
    hf = copy.deepcopy(lent(name).hf)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in hf.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=noise))
    return hf


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
def test_generation_of_any_kind(name: str, data: st.DataObject) -> None:
    """Padded prompts, drawn edits, caches and ways of decoding: every token is chosen from the logits that one run over the finished
    text has under the same edits, each row alone and without a cache."""
    model, way, cached = lent(name), data.draw(DECODING), data.draw(CACHES)
    one = bool({"assistant", "prompt_lookup_num_tokens"} & set(way))
    if one or "prefill_chunk_size" in way:
        assume(cached.get("use_cache") is not False)
    assume(not one or "cache_implementation" not in cached)
    n = 1 if one else data.draw(st.integers(1, 2))
    lengths = data.draw(st.lists(st.integers(3, 7), min_size=n, max_size=n))
    changes = data.draw(edits(model, n))
    texts = prompts(n, lengths, data.draw(st.integers(0, 99)))
    or_refused(model, changes, [(text, len(text)) for text in texts])
    width = max(lengths)
    ids, mask, _ = columns(texts, [width - len(text) for text in texts], width)
    torch.manual_seed(3)
    more = {"do_sample": False} | options(way, name) | cached
    whole = {
        "attention_mask": mask,
        "max_new_tokens": NEW,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    moved = any(e.by_row or pb.Token in (type(e.positions), type(e.keys)) for e in changes)
    if "num_beams" in way and moved:
        with pytest.raises(PatchbayError, match="(beam search|num_return_sequences)"), model.edited(*changes):
            model.hf.generate(ids, **whole, **more)
        return
    with model.edited(*changes):
        grown = model.hf.generate(ids, **whole, **more)
    copies = way.get("num_return_sequences", 1)
    for at, row in enumerate(grown.sequences):
        i = at // copies
        text, steps = row[width - lengths[i] :], len(grown.logits)
        right = alone(model, changes, text[: lengths[i] + steps], lengths[i], i, n)
        beams = getattr(grown, "beam_indices", None)
        for step in range(steps):
            of = at if beams is None else int(beams[at, step])
            if of < 0 or (step and text[lengths[i] + step - 1] in (more.get("eos_token_id") or ())):
                break
            assert close(grown.logits[step][of], right[lengths[i] - 1 + step], noise=512), (
                changes,
                way,
                cached,
            )  # in other pieces


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@given(data=st.data())
def test_prompts_of_any_lengths_generate_as_each_alone(name: str, data: st.DataObject) -> None:
    """`Model.generate` of a batch, by whatever option, is each prompt generated alone without a cache."""
    model, way = (
        lent(name),
        data.draw(DECODING.filter(lambda way: not way.get("do_sample") and "num_return_sequences" not in way)),
    )
    n = data.draw(st.integers(1, 3))
    changes = data.draw(edits(model, n))
    texts = prompts(n, data.draw(st.lists(st.integers(3, 7), min_size=n, max_size=n)), data.draw(st.integers(0, 99)))
    or_refused(model, changes, [(text, len(text)) for text in texts])
    assume(
        "num_beams" not in way or not any(e.by_row or pb.Token in (type(e.positions), type(e.keys)) for e in changes)
    )
    more = options(way, name)
    found = model.generate([text.tolist() for text in texts], NEW, edits=changes, **more)
    for slow in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
        more.pop(slow, None)
    for i, text in enumerate(texts):
        own = [share for e in changes if (share := for_prompts(e, [i], n, len(text) + NEW)) is not None]
        assert found[i] == model.generate([text.tolist()], NEW, edits=own, use_cache=False, **more)[0], (changes, way)
