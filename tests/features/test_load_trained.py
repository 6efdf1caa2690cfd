"""Dictionaries that are trained here, saved in SAELens's form and read back: found, proved and turned on small models that were trained."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

import patchbay as pb
from tests.shared import SHARED

pytestmark = pytest.mark.slow
NAMES = ("tiny", "stories260K", "gpt2-sp512-tinystories-0.28m")


def lent(name: str, **more: Any) -> pb.Model:
    if name == "tiny":
        return pb.load("tiny", **more)
    if not (SHARED / "models" / name).is_dir():
        pytest.skip(f"{name} is not in {SHARED / 'models'}")
    return pb.load(str(SHARED / "models" / name), **more)


def sampled(model: pb.Model, n: int, length: int = 32) -> list[list[int]]:
    torch.manual_seed(0)
    start = torch.full((n, 1), model.hf.config.bos_token_id or 1)
    drawn = {"max_new_tokens": length - 1, "do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": None}
    ids = model.hf.generate(start, attention_mask=torch.ones_like(start), **drawn)
    return ids.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_features_are_found_proved_and_turned(name: str, tmp_path: Path) -> None:
    model = lent(name)
    texts, at = sampled(model, 60), f"L{model.n_layers // 2}.resid_out"
    how: dict[str, Any] = {"form": "batchtopk", "n_features": 128, "sparsity": 8, "steps": 150}
    trained = pb.train.dictionary(model, texts, at, folder=str(tmp_path / "d"), **how)
    assert float(trained["value"]) < 0.5 < float(trained["null"])
    it = pb.load_dictionary(tmp_path / "d", model=model, texts=texts[:10])
    assert it.digest == trained.provenance["dictionary"]["digest"]
    view = model.with_dictionaries(it)
    right = [int(row) for row in pb.run(model, texts[:8]).last_logits.argmax(1)]
    task = pb.Task("its own", texts[:8], right, [[(one + 1) % model.vocab_size] for one in right])  # type: ignore[arg-type]
    found = pb.find.features(view, task, f"L{model.n_layers // 2}.features")
    assert abs(float(found.values.sum() + found["error"] + found["bias"] - found["total"])) < 1e-2
    top = found.top(6)
    swept = pb.sweep(view, task, [pb.zero(part.port("act")) for part in top])  # type: ignore[union-attr]
    assert float(swept["effect"].mean()) < 0  # what speaks for the answer is missed
    proof = pb.prove.ablation(view, task, top, draws=10)
    assert float(proof["difference"]) > 0
    knob = pb.turn.scale(top, 0.0)
    knob.save(tmp_path / "less.knob")
    with view.edited(pb.load_knob(tmp_path / "less.knob")):
        less = task.score(pb.run(view, task).last_logits).mean()
        assert len(view.generate(texts[:1], 4, new_only=True)[0]) >= 1
    assert float(less) < float(task.score(pb.run(view, task).last_logits).mean())
    with pytest.raises(pb.PatchbayError), model.edited(knob):
        pb.run(model, task)


@pytest.mark.parametrize("kind", ["transcoders", "cross-layer"])
@pytest.mark.parametrize("name", ["tiny", "stories260K"])
def test_graphs_through_trained_transcoders(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 features a layer: sums to 1e-10 in float64, under 20 s of the processor, a graph that matters, in circuit-tracer's form."""
    model = lent(name, dtype=torch.float64)

    def exact(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", exact)  # which counts in float32 whatever it is given
    texts = sampled(model, 40)
    places = [f"L{i}.mlp.in to L{i}.mlp.out" for i in range(model.n_layers)]
    how: dict[str, Any] = {"form": "batchtopk", "n_features": 512, "sparsity": 16, "steps": 60}
    own = []
    for i, at in enumerate(places if kind == "transcoders" else [", ".join(places)]):
        pb.train.dictionary(model, texts, at, folder=str(tmp_path / str(i)), **how)
        own.append(pb.load_dictionary(tmp_path / str(i)).double())
    view = model.with_dictionaries(*own)
    began = time.process_time()
    graph = pb.find.attribution_graph(view, texts[:1])
    assert time.process_time() - began < 20
    assert float(graph["sum_error"][0]) < 1e-10
    assert 0 < float(graph["through_error"][0]) < 0.9
    assert 0 < int(graph["n_nodes"][0]) < int(graph["n_active"][0])
    proof = pb.prove.graph_ablation(view, graph, draws=19)
    assert float(proof["joint"]) > 2 * float(proof["random"].mean())
    assert pb.load_result(graph.save_graph(tmp_path / "g.json")).tables["edges"]
