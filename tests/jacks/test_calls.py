"""A session belongs to a call: threads, tasks and generators run one model, each under its own edits, and nothing stays behind."""

import asyncio
import contextvars
import copy
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.jacks import attention, hooks
from patchbay.jacks.session import Session
from patchbay.model.self_check import self_check
from patchbay.signal.port import PatchbayError
from patchbay.signal.positions import Batch
from patchbay.tiny.twins import twin
from tests.tolerance import close

IDS = torch.tensor([[5, 9, 40, 2, 11, 3]])


@pytest.fixture(scope="module", params=["llama", "gptj", "mixtral"])
def model(request: pytest.FixtureRequest) -> pb.Model:
    return pb.load(twin(request.param).eval())


def logits(model: pb.Model) -> Tensor:
    with torch.no_grad():
        return model.hf(IDS).logits


def clean(model: pb.Model) -> bool:
    kept = any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.hf.modules())
    named = model.hf.config._attn_implementation.startswith(attention.PREFIX)
    return not (kept or named or attention._ACTIVE or attention._NAMED or hooks.open_here() or hooks.uncompiled.held)


def knobs(model: pb.Model) -> list[pb.Edit]:
    return [pb.scale(pb.Port("attn.out", 0), 3.0), pb.scale(pb.Port("attn.pattern", 1), 0.2)]


def alone(model: pb.Model) -> list[Tensor]:
    out = [logits(model)]
    for edit in knobs(model):
        with model.edited(edit):
            out.append(logits(model))
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(out[0], out[2])
    return out


def test_threads_see_their_own_edits(model: pb.Model) -> None:
    right, wrong = alone(model), []

    def plain() -> None:
        for _ in range(15):
            wrong.extend([0] if not torch.equal(logits(model), right[0]) else [])

    def under(i: int) -> None:
        for _ in range(15):
            with model.edited(knobs(model)[i - 1]):
                wrong.extend([i] if not torch.equal(logits(model), right[i]) else [])
            run = pb.run(model, IDS, edits=[knobs(model)[i - 1]])
            wrong.extend([i] if not torch.equal(run.logits, right[i]) else [])

    threads = [threading.Thread(target=plain), *(threading.Thread(target=under, args=(i,)) for i in (1, 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert clean(model)


@pytest.mark.parametrize("order", ["ababab", "abba", "baab", "aabb", "ab"])
def test_generators_that_interleave_see_their_own(model: pb.Model, order: str) -> None:
    right = alone(model)

    def steps(i: int) -> Iterator[Tensor]:
        with model.edited(knobs(model)[i]):
            for _ in range(3):
                yield logits(model)

    running = {"a": steps(0), "b": steps(1)}
    for name in order:
        assert torch.equal(next(running[name]), right[1 + "ab".index(name)])
        assert torch.equal(logits(model), right[0])  # their caller is under neither
    running.pop("a").close()
    running.clear()
    assert torch.equal(logits(model), right[0])
    assert clean(model)


def test_tasks_see_their_own_and_what_they_were_made_in(model: pb.Model) -> None:
    right = alone(model)

    async def step(i: int | None) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
            if i is None:
                assert torch.equal(logits(model), right[1])
            else:
                with model.edited(knobs(model)[i]):
                    await asyncio.sleep(0)
                    assert torch.equal(logits(model), right[1 + i])

    async def everything() -> None:
        await asyncio.gather(step(0), step(1))
        with model.edited(knobs(model)[0]):
            await asyncio.gather(step(None), step(None))
            assert torch.equal(await asyncio.to_thread(logits, model), right[1])

    asyncio.run(everything())
    assert clean(model)


@pytest.mark.parametrize("kind", ["generator", "async generator", "delegating"])
def test_tasks_made_while_a_generator_rests_are_their_callers(model: pb.Model, kind: str) -> None:
    """They have a copy of its context, as tasks have that are made inside its block, which are under it."""
    right, edit = alone(model), knobs(model)[0]

    def rests() -> Iterator[None]:
        with model.edited(edit):
            logits(model)
            yield

    def delegates() -> Iterator[None]:
        yield from rests()

    async def rests_too() -> AsyncIterator[Tensor]:
        with model.edited(edit):
            yield await asyncio.to_thread(logits, model)
            found = await asyncio.gather(asyncio.to_thread(logits, model), task())
            assert torch.equal(found[0], right[1])
            yield found[1]

    async def task() -> Tensor:
        await asyncio.sleep(0)
        return logits(model)

    async def beside() -> list[Tensor]:
        found = [*await asyncio.gather(task(), asyncio.to_thread(logits, model)), logits(model)]
        with model.edited(knobs(model)[1]):
            found += await asyncio.gather(task(), asyncio.to_thread(logits, model))
        return found

    async def everything() -> None:
        inner = rests_too()
        assert torch.equal(await anext(inner), right[1])
        found = await beside()
        assert torch.equal(await anext(inner), right[1])
        found_again = await beside()
        await inner.aclose()
        for some in (found, found_again):
            assert all(
                torch.equal(one, plain) for one, plain in zip(some, [right[0]] * 3 + [right[2]] * 2, strict=True)
            )

    if kind == "async generator":
        asyncio.run(everything())
    else:
        resting = rests() if kind == "generator" else delegates()
        next(resting)
        found = asyncio.run(beside())
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(lambda: found.insert(0, logits(model)),))
        thread.start()
        thread.join()
        resting.close()
        assert all(torch.equal(one, plain) for one, plain in zip(found, [right[0]] * 4 + [right[2]] * 2, strict=True))
    assert clean(model)


def test_a_thread_that_was_not_given_the_block_is_an_error(model: pb.Model) -> None:
    def block() -> None:
        with model.edited(knobs(model)[0]):
            thread = threading.Thread(target=logits, args=(model,))
            thread.start()
            thread.join()

    with pytest.raises(PatchbayError, match=r"was never made: .*copy_context"):
        block()
    assert clean(model)


def test_layers_that_run_one_by_one_are_a_run_beside_another_thread() -> None:
    """A block that restarts in the middle of the model is no block in which nothing ran, though another thread runs the model."""
    model, ids = pb.load(twin("gpt2")), torch.tensor([[5, 6, 7]])
    other = threading.Thread(target=model.hf, args=(ids,))
    with Session(model, (), [pb.scale(pb.Port("attn.out", 0), 0.0)], whole=True) as session:
        other.start()
        other.join()
        assert session.missed == 1
        session.place(Batch(ids, torch.tensor([3]), torch.tensor([3]), model), 0, 3)


def test_threads_that_share_a_block_know_their_own_tokens(model: pb.Model) -> None:
    """Each at its prompt's last token, though both runs are under way at once in the one session that they inherited."""
    edit = pb.scale(pb.Port("resid_out", 0), -2.0, positions="last")
    texts = [IDS, IDS[:, :4], IDS[:, 1:].repeat(3, 1)]
    right = [pb.run(model, ids, edits=[edit]).logits for ids in texts]
    together, found = threading.Barrier(len(texts)), {}

    def work(i: int) -> None:
        with torch.no_grad():
            found[i] = model.hf(texts[i]).logits

    def both(*_: object) -> None:
        together.wait(20)

    waits = model.modules[0].layer.register_forward_pre_hook(both)
    try:
        with model.edited(edit):
            contexts = [contextvars.copy_context() for _ in texts]
            threads = [threading.Thread(target=c.run, args=(work, i)) for i, c in enumerate(contexts)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        waits.remove()
    assert all(close(found[i], right[i]) for i in range(len(texts)))
    assert clean(model)


def test_threads_that_share_a_block_generate_and_tap_their_own(model: pb.Model) -> None:
    port = pb.Port("resid_out", 0)
    edit = pb.scale(port, -2.0, positions="predicting")
    texts = [IDS, IDS[:, :4]]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with model.edited(edit):
        right = [model.hf.generate(ids, **options) for ids in texts]
        taps = [pb.run(model, row[:, :-1], taps=[port])[port] for row in texts]
    found, seen = {}, {}

    def work(i: int, session: Session) -> None:
        found[i] = model.hf.generate(texts[i], **options)
        with torch.no_grad():
            model.hf(texts[i][:, :-1])
        seen[i] = session.captured[port]

    with model.session([port], [edit]) as session:
        contexts = [contextvars.copy_context() for _ in texts]
        threads = [threading.Thread(target=c.run, args=(work, i, session)) for i, c in enumerate(contexts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[i], right[i]) for i in range(2))
    assert all(close(seen[i], taps[i]) for i in range(2))


def test_threads_that_look_first_at_once_see_one_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    model, checks = pb.Model(twin("llama").eval(), prove=False), []

    def slow(view: pb.Model) -> object:
        checks.append(view)
        time.sleep(0.2)
        return self_check(view)

    monkeypatch.setattr("patchbay.model.model.self_check", slow)
    start, found = threading.Barrier(4), []

    def look() -> None:
        start.wait()
        found.append((model.n_groups(0), model.n_layers, model.check.passed))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(2, 2, True)] * 4
    assert len(checks) == 1


def test_a_copy_made_inside_is_a_plain_model(model: pb.Model) -> None:
    right = alone(model)
    for i in (0, 1):
        with model.edited(knobs(model)[i]):
            twin_of = copy.deepcopy(model.hf)
            assert torch.equal(logits(model), right[1 + i])
        with torch.no_grad():
            assert torch.equal(twin_of(IDS).logits, right[0])


def test_compiled_models_are_edited() -> None:
    hf = twin("llama").eval()
    model = pb.load(hf)
    edit = pb.scale(pb.Port("attn.out", 0), 3.0)
    plain, right = logits(model), pb.run(model, IDS, edits=[edit]).logits
    compiled = torch.compile(hf, backend="eager")
    hf.compile(backend="eager")
    with torch.no_grad():
        assert close(compiled(IDS).logits, plain)
        assert close(hf(IDS).logits, plain)
        with model.edited(edit):
            assert torch.equal(hf(IDS).logits, right)
            assert torch.equal(compiled(IDS).logits, right)
        assert close(compiled(IDS).logits, plain)


def test_recorded_hidden_states_are_the_edited_ones() -> None:
    model = pb.load(twin("llama").eval())
    port = pb.Port("resid_out", 0)
    model.hf(IDS, output_hidden_states=True)
    with model.edited(pb.add(port, 2.0)):
        found = model.hf(IDS, output_hidden_states=True).hidden_states[1]
    assert torch.equal(found, pb.run(model, IDS, taps=[port], edits=[pb.add(port, 2.0)])[port])


def test_what_is_not_reached_is_an_error() -> None:
    model = pb.load(twin("llama").eval())
    mlp = model.modules[1].mlp
    held = mlp.forward
    mlp.forward = lambda x: mlp.down_proj.forward(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    with pytest.raises(PatchbayError, match=r"L1\.mlp\.act was never reached"):
        pb.run(model, IDS, edits=[pb.zero(pb.Port("mlp.act", 1))])
    mlp.forward = held
    del mlp.forward
    assert clean(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointed_layers_and_loss_of_edited_logits_are_refused() -> None:
    hf = twin("llama").eval()
    model = pb.load(hf)
    with model.edited(pb.scale(pb.Port("logits"), 2.0)), pytest.raises(PatchbayError, match="labels under an edit"):
        hf(IDS, labels=IDS)
    hf.gradient_checkpointing_enable()
    hf.train()
    with model.edited(pb.scale(pb.Port("attn.out", 0), 2.0)), pytest.raises(PatchbayError, match="checkpointing"):
        hf(IDS)
    hf.eval()
