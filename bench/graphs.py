"""Attribution graphs through trained transcoders: `python -m bench.graphs MODEL [--dtype float64]`.

For every layer 512 features from what the MLP reads to what it adds, k 16, trained on texts that the model says itself, saved in SAELens's form and read
back; the same as one cross-layer transcoder, saved in circuit-tracer's; and the model's own neurons. Of each: what the features leave of held-out MLP outputs (`FVU`), and
of one prompt's graph its seconds of the processor, active and followed features, nodes and edges that are kept, shares of the logits through errors, tokens
and biases, and by how much weights into a node miss its pre-activation. The proof takes the kept features away, beside 20 random graphs of other active
features that write about as much (`prove.graph_ablation`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

import patchbay as pb
from bench.allocation import sampled
from bench.report import describe, put_section

HEAD = (
    "| features | FVU by layer | seconds | active, followed | nodes, edges | through errors / tokens / biases | sums off by | without it, beside random | p |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
FEATURES, K = 512, 16


def trained(
    model: pb.Model, texts: list[list[int]], steps: int, folder: Path
) -> dict[str, tuple[pb.Model, list[float]]]:
    """Views of the model by what stands for its MLPs, with what they leave of the variance."""
    places = [f"L{i}.mlp.in to L{i}.mlp.out" for i in range(model.n_layers)]
    how = {"form": "batchtopk", "n_features": FEATURES, "sparsity": K, "steps": steps}
    left, own = [], []
    for i, place in enumerate(places):
        made = pb.train.dictionary(model, texts, place, folder=str(folder / str(i)), **how)  # type: ignore[arg-type]
        left.append(float(made["value"]))
        own.append(pb.load_dictionary(folder / str(i), model=model, texts=texts[:20], worst=1.0))
    across = pb.train.dictionary(model, texts, ", ".join(places), folder=str(folder / "across"), **how)  # type: ignore[arg-type]
    whole = pb.load_dictionary(folder / "across", model=model, texts=texts[:20], worst=1.0)
    return {
        "transcoders": (model.with_dictionaries(*own), left),
        "cross-layer transcoder": (model.with_dictionaries(whole), [float(across["value"])]),
        "neurons": (model, [0.0]),
    }


def row(name: str, view: pb.Model, left: list[float], prompt: list[int], folder: Path) -> str:
    began = time.process_time()
    graph = pb.find.attribution_graph(view, [prompt])
    seconds = time.process_time() - began
    proof = pb.prove.graph_ablation(view, graph, draws=20, matched="length")
    assert pb.load_result(graph.save_graph(folder / f"{name}.json")).tables["edges"]
    shares = " / ".join(
        f"{100 * float(graph[one][0]):.1f} %" for one in ("through_error", "through_tokens", "through_bias")
    )
    counts = [int(graph[one][0]) for one in ("n_active", "n_followed", "n_nodes", "n_edges")]
    beside = f"{float(proof['joint']):.3g} nats, {float(proof['random'].mean()):.3g}"
    return (
        f"| {name} | {', '.join(f'{one:.3f}' for one in left)} | {seconds:.2f} | {counts[0]:,}, {counts[1]:,} | {counts[2]:,}, {counts[3]:,} | {shares} | "
        f"{float(graph['sum_error'][0]):.1e} | {beside} | {float(proof['p']):.2g} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--positions", type=int, default=24)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, given.dtype)
    model = pb.load(given.model, dtype=dtype)
    texts = sampled(model, 160, 64)
    with tempfile.TemporaryDirectory() as folder:
        views = trained(model, texts[:140], given.steps, Path(folder))
        rows = [
            row(name, view, left, texts[150][: given.positions], Path(folder)) for name, (view, left) in views.items()
        ]
    print("\n".join([HEAD, *rows]))
    name = Path(given.model).name
    said = (
        f"{name} ({model.n_layers} layers of {model.d_model} numbers), one prompt of {given.positions} tokens of its own, {given.dtype}, {given.steps} steps of "
        f"256 tokens a training. {(__doc__ or '').split(chr(10) * 2, 1)[1].replace(chr(10), ' ').strip()}"
    )
    setting = describe("cpu", dtype, "cpu", 0.0)
    put_section(f"attribution graphs of {name}, {given.dtype}", "\n".join([setting, "", said, "", HEAD, *rows]))


if __name__ == "__main__":
    main()
