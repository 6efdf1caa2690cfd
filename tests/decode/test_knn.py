"""Nearest neighbours: the mixture by loops over every key, the model where they weigh nothing, and stores that belong to one model."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.decode._neighbours import Store, read_store, search_of
from patchbay.signal.port import Port
from patchbay.tiny.twins import twin
from tests.decode.shared_stories import new_tokens
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]
NEW, SITE = 5, "L1.mlp.in"


def model_of(seed: int = 0, name: str = "llama") -> pb.Model:
    return pb.load(twin(name, seed=seed))


def texts_of(n: int = 8, seed: int = 0, length: int = 12) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(96, (length - at % 3,), generator=draw).tolist() for at in range(n)]


def store_in(folder: Path, model: pb.Model, texts: Any = None, **options: Any) -> str:
    pb.run(model, texts_of() if texts is None else texts, taps=[SITE], folder=folder, **options)
    return str(folder)


def test_planted(tmp_path: Path) -> None:
    """The nearest key alone, with all the weight: a text of the store is said on, word by word."""
    model, text = model_of(), texts_of()[0]
    store = store_in(tmp_path / "store", model)
    found = pb.decode.knn(model, store, [text[:5]], weight=1.0, temperature=1e-300, neighbours=3, max_new_tokens=6)
    assert new_tokens(found)[0][0] == text[5:11]
    assert close(found["nearest"], torch.ones(1, 1, 6), dtype=torch.float32)
    rows = found.tables["neighbours"]
    assert [row["its next token"] for row in rows] == [str(token) for token in text[5:11]]
    assert rows[0]["nearest context"] == " ".join(map(str, text[:5]))
    assert close(found["distance"], torch.zeros(1, 1, 6), of=1.0, dtype=torch.float32)


def test_reference(tmp_path: Path) -> None:
    """Loops over whole runs, every key and every token."""
    model, k, weight, temperature = model_of(), 20, 0.6, 0.5
    store = store_in(tmp_path / "store", model)
    found = pb.decode.knn(
        model, store, PROMPTS, weight=weight, temperature=temperature, neighbours=k, max_new_tokens=NEW
    )
    keys: list[tuple[torch.Tensor, int]] = []
    for text in texts_of():
        states = pb.run(model, [text], taps=[SITE])[SITE][0].double()
        keys += [(states[at], text[at + 1]) for at in range(len(text) - 1)]
    for i, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for at in range(NEW):
            seen = pb.run(model, [text], taps=[SITE])
            query = seen[SITE][0, -1].double()
            near = sorted((float((key - query).square().sum()), value) for key, value in keys)[:k]
            total = sum(math.exp(-apart / temperature) for apart, _ in near)
            p = seen.last_logits[0].double().softmax(-1).tolist()
            q = [sum(math.exp(-a / temperature) for a, value in near if value == v) / total for v in range(96)]
            mixed = [weight * b + (1 - weight) * a for a, b in zip(p, q, strict=True)]
            best = max(range(96), key=lambda v: mixed[v])
            assert int(found["tokens"][i, 0, at]) == best
            assert close(found["logq"][i, 0, at], math.log(mixed[best]), of=10.0, dtype=torch.float32)
            assert close(found["nearest"][i, 0, at], q[best], of=1.0, dtype=torch.float32)
            assert close(found["distance"][i, 0, at], near[0][0], of=100.0, dtype=torch.float32)
            text.append(best)


def test_null(tmp_path: Path) -> None:
    """Without weight the neighbours change nothing, bit for bit; a store in another order says the same."""
    model = model_of()
    store = store_in(tmp_path / "store", model)
    plain = pb.decode.samplers(model, PROMPTS, chain=["top_k(1)"], max_new_tokens=NEW, ends=[])
    found = pb.decode.knn(model, store, PROMPTS, weight=0.0, max_new_tokens=NEW)
    assert torch.equal(found["tokens"], plain["tokens"])
    assert torch.equal(found["logp"], plain["logp"])
    assert close(found["logq"], found["logp"], dtype=torch.float32)
    turned = store_in(tmp_path / "turned", model, texts_of()[::-1])
    one, other = (
        pb.decode.knn(model, where, PROMPTS, weight=0.7, neighbours=9, max_new_tokens=NEW) for where in (store, turned)
    )
    assert torch.equal(one["tokens"], other["tokens"])


def test_the_unembedding_as_a_store_is_the_softmax() -> None:
    """Keys of one length are nearest where their products are largest: with all of them, exp(-|q - w|^2 / 2) is exp(q w) but for a factor."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(40, 8, generator=draw, dtype=torch.float64), dim=1).float()
    store = Store(rows, torch.arange(40), Port("final_norm"), [], torch.zeros(40, 2, dtype=torch.long))
    queries = torch.randn(5, 8, generator=draw)
    law = store.law(*store.nearest(queries, 40), 2.0, 40)
    assert close(law, (queries.double() @ rows.double().T).softmax(-1), dtype=torch.float32)
    sharp = store.law(*store.nearest(queries, 40), 1e-4, 40)
    assert torch.equal(sharp.argmax(1), torch.cdist(queries, rows).argmin(1))
    assert close(sharp.amax(1), torch.ones(5))


def test_searches_agree_where_they_look_everywhere() -> None:
    """All cells: exact. A few: what is found is among the cells looked into, and never a key twice."""
    draw = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(300, 6, generator=draw), torch.randn(40, 6, generator=draw)
    exact = search_of(keys, "exact")(queries, 10)
    loops = torch.stack([(keys - query).square().sum(1).argsort()[:10] for query in queries])
    assert torch.equal(exact, loops)
    assert torch.equal(search_of(keys, "cells(7, 7)")(queries, 10), exact)
    few = search_of(keys, "cells(30, 2)")(queries, 10)
    hits = (few[:, :, None] == exact[:, None]).any(2).double().mean()
    assert 0.3 < float(hits) < 1.0
    short = search_of(keys, "cells(300, 1)")(queries, 10)
    assert bool((short[:, 1:] == -1).all()), "a cell of one key has one neighbour"
    store = Store(keys, torch.arange(300), Port("final_norm"), [], torch.zeros(300, 2, dtype=torch.long))
    apart, found = store.nearest(queries, 10, "cells(300, 1)")
    law = store.law(apart, found, 1.0, 300)
    assert close(law.sum(1), torch.ones(40))
    assert torch.equal(law.argmax(1), found[:, 0])


@pytest.mark.parametrize("index", ["exact", "cells(7, 7)", "faiss"])
def test_what_all_states_have_in_common_takes_no_digits(index: str) -> None:
    """A direction of the stream that is ten thousand times the others, as in trained models: the nearest are those of double precision."""
    if index == "faiss":
        pytest.importorskip("faiss", reason="faiss-cpu is not installed: pip install 'patchbay-lm[knn]'")
    draw = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(300, 16, generator=draw), torch.randn(30, 16, generator=draw)
    for one in (keys, queries):
        one[:, 3] += 1e4
    loops = torch.stack([(keys.double() - query.double()).square().sum(1).argsort()[:5] for query in queries])
    assert torch.equal(search_of(keys, index)(queries, 5), loops)


def test_faiss_finds_what_loops_find() -> None:
    pytest.importorskip("faiss", reason="faiss-cpu is not installed: pip install 'patchbay-lm[knn]'")
    draw = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(500, 6, generator=draw), torch.randn(20, 6, generator=draw)
    exact = search_of(keys, "exact")(queries, 10)
    assert torch.equal(search_of(keys, "faiss")(queries, 10), exact)
    assert torch.equal(search_of(keys, "faiss('IVF8,Flat', 8)")(queries, 10), exact)
    turned = search_of(keys, "faiss('PCA6,IVF8,Flat', 8)")(queries, 10)
    assert torch.equal(turned.sort(1).values, exact.sort(1).values), "all cells, all components"
    few = search_of(keys, "faiss('PCA6,IVF8,Flat', 1)")(queries, 10)
    assert not torch.equal(few, turned), "probes reach the cells behind the components"
    with pytest.raises(pb.PatchbayError, match="FAISS refuses 'IVF900,Flat' for 500 keys"):
        search_of(keys, "faiss('IVF900,Flat', 8)")
    with pytest.raises(pb.PatchbayError, match="has no probes"):
        search_of(keys, "faiss('Flat', 8)")


def test_faiss_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(pb.PatchbayError, match=r"needs FAISS: pip install 'patchbay-lm\[knn\]'"):
        search_of(torch.randn(5, 2), "faiss")


BUILD = """
import sys, time, torch, patchbay as pb
from patchbay.model import shards
from patchbay.tiny.twins import twin
shards.SHARD = 4096
write = shards.Shards.write
def slow(*given):
    write(*given); print("shard", flush=True); time.sleep(float(sys.argv[2]))
shards.Shards.write = slow
draw = torch.Generator().manual_seed(0)
texts = [torch.randint(96, (12 - at % 3,), generator=draw).tolist() for at in range(24)]
pb.run(pb.load(twin("llama")), texts, taps=["L1.mlp.in"], folder=sys.argv[1], batch_size=4)
"""


@pytest.mark.slow  # three processes that import torch
def test_a_store_that_was_killed_is_the_store_that_was_not(tmp_path: Path) -> None:
    """kill -9 after the first shard, then the same call: keys and values are those of a build in one go."""

    def build(folder: str, wait: float) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", BUILD, str(tmp_path / folder), str(wait)], stdout=subprocess.PIPE, text=True
        )

    with build("killed", 60.0) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "shard\n"
        time.sleep(0.1)
        killed.send_signal(signal.SIGKILL)
    with pytest.raises(pb.PatchbayError, match="a run that was not finished"):
        pb.load_trace(tmp_path / "killed")
    for name in ("killed", "whole"):
        with build(name, 0.0) as going:
            assert going.wait() == 0
    model = model_of()
    one, other = (read_store(str(tmp_path / name), model, []) for name in ("killed", "whole"))
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.values, other.values)


def test_a_store_belongs_to_its_model_and_its_edits(tmp_path: Path) -> None:
    model, edit = model_of(), pb.scale("L0.attn.out", 0.0)
    store = store_in(tmp_path / "store", model)
    with pytest.raises(pb.PatchbayError, match="was made with another model, whose keys lie in another space"):
        pb.decode.knn(model_of(1), store, PROMPTS)
    with model.edited(edit):
        with pytest.raises(pb.PatchbayError, match="was made with other edits"):
            pb.decode.knn(model, store, PROMPTS)
        own = store_in(tmp_path / "edited", model)
        assert new_tokens(pb.decode.knn(model, own, PROMPTS, max_new_tokens=2))
    with pytest.raises(pb.PatchbayError, match="was made with other edits"):
        pb.decode.knn(model, own, PROMPTS)


def test_the_same_weights_in_another_model_are_noticed(tmp_path: Path) -> None:
    """The fingerprint is of weights; the states of the first text are run again."""
    model, other = model_of(), model_of()
    store = store_in(tmp_path / "store", model)
    other.hf.config.rms_norm_eps = 1.0
    for module in other.hf.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1.0
    with pytest.raises(pb.PatchbayError, match="holds other states at L1.mlp.in for its first text"):
        pb.decode.knn(other, store, PROMPTS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weight": 1.5}, "weight=1.5: of the neighbours"),
        ({"temperature": 0.0}, "temperature=0.0: above 0"),
        ({"neighbours": 0}, "neighbours=0: from 1 to the 81 keys"),
        ({"neighbours": 82}, "neighbours=82: from 1 to the 81 keys"),
        ({"index": "tree"}, "index='tree': 'exact'"),
        ({"index": "cells(8)"}, "'cells"),
        ({"index": "cells(2, 3)"}, "as many probes as cells"),
        ({"index": "cells(99, 3)"}, "at most 81 cells"),
    ],
)
def test_refusals(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = model_of()
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.knn(model, store_in(tmp_path / "store", model), PROMPTS, **options)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    model = model_of()
    with pytest.raises(pb.PatchbayError, match="holds no trace"):
        pb.decode.knn(model, str(tmp_path / "none"), PROMPTS)
    with pytest.raises(pb.PatchbayError, match="store: a folder that .* got list"):
        pb.decode.knn(model, [1, 2], PROMPTS)
    pb.run(model, texts_of(), taps=["L0.resid_out", SITE], folder=tmp_path / "two")
    pb.run(model, texts_of(), taps=["L0.H1.z"], folder=tmp_path / "head")
    pb.run(model, [[3], [4]], taps=[SITE], folder=tmp_path / "short")
    for name, says in (
        ("two", "keys are one signal"),
        ("head", "keys are one signal"),
        ("short", "no token that another follows"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            pb.decode.knn(model, str(tmp_path / name), PROMPTS)
