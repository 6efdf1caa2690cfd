"""`python -m bench.agree`: the same numbers from Patchbay and from its peers, on the same weights and prompts; a section of RESULTS.md.

Models are random GPT-2 and Llama twins in float32, saved to a folder that everyone loads. A row is one quantity; `difference` is
the largest absolute one over the largest absolute value. Peers run in environments of their own (`peers.py`) and write what they
found to a file; nothing of theirs is imported here.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import patchbay as pb
from bench import peers
from bench.report import describe, put_section
from patchbay.tiny.twins import twin

FAMILIES = ("gpt2", "llama")
PEERS = ("transformer_lens", "nnsight")
PROMPTS = {"clean": [[3, 5, 8, 13, 21, 34, 55, 2], [4, 6, 9, 14, 22, 35, 56, 3]], "corrupted": [[3, 7, 8, 13, 29, 34, 50, 2], [4, 8, 9, 14, 30, 35, 51, 3]]}  # fmt: skip
RIGHT, WRONG = [10, 11], [12, 13]
LAYER, POSITION, HEAD, STEPS = 1, 4, 2, 4
COMPOSITION = {
    "gpt2": ["q", "k", "v"],
    "llama": ["v"],
}  # rotary positions stand between queries and keys, which the peer leaves out
WHAT = {
    "logits": "the run's logits",
    "resid_out": "residual stream after every layer",
    "pattern": "attention patterns, all heads",
    "z": "heads' z",
    "patched": f"logits with the stream into layer {LAYER} at position {POSITION} from the corrupted run",
    "patched_z": f"logits with head {HEAD} of layer {LAYER} from the corrupted run",
    "lens": "logit lens: final norm and unembedding of every layer's stream",
    "attribution": "direct attribution of every head to the logit difference at the last position",
    "attributed": "attribution patching of every head's z: (corrupted - clean) times the gradient",
    "composition_q": "composition of every head with every later head's query",
    "composition_k": "composition of every head with every later head's key",
    "composition_v": "composition of every head with every later head's value",
    "eap": "edge attribution patching (EAP), all edges",
    "eap_ig": f"edge attribution with integrated gradients (EAP-IG), {STEPS} steps, all edges",
}
METHOD = (
    "Random twins in float32; the same saved weights and prompts on both sides, each peer in an environment of its own. "
    "Composition is read from the peer with norms folded into what reads, and writers as they are: by default it also takes the mean "
    "out of every writer, which no norm lets through, and its scores are then up to 3 % larger. "
    "`python -m bench.agree` writes this."
)


def ours(model: pb.Model, modes: list[str]) -> dict[str, Tensor]:
    """Every quantity of `WHAT`, by Patchbay."""
    clean, corrupted = PROMPTS["clean"], PROMPTS["corrupted"]
    task = pb.Task(
        name="agree", clean=tuple(map(tuple, clean)), corrupted=tuple(map(tuple, corrupted)), right=tuple(RIGHT),
        wrong=tuple((token,) for token in WRONG), metric="logit_diff",
    )  # fmt: skip
    taps = [
        port for layer in model.layers for port in (layer.resid_out, layer.resid_in, layer.attn.pattern, layer.attn.z)
    ]
    trace, other = pb.run(model, clean, taps=taps), pb.run(model, corrupted, taps=taps)
    stream, z = model.layers[LAYER].resid_in, model.layers[LAYER].heads[HEAD].z
    streams = [trace[layer.resid_out] for layer in model.layers]
    patched = pb.run(model, clean, edits=[pb.replace(stream, other[stream][:, [POSITION]], positions=POSITION)])
    return {
        "logits": trace.logits,
        "resid_out": torch.stack(streams),
        "pattern": torch.stack([trace[layer.attn.pattern] for layer in model.layers]),
        "z": torch.stack([trace[layer.attn.z] for layer in model.layers]),
        "patched": patched.logits,
        "patched_z": pb.run(model, clean, edits=[pb.replace(z, other[model.layers[LAYER].attn.z][:, :, HEAD])]).logits,
        "lens": torch.stack([model.unembed_logits(model.final_norm_module(s)) for s in streams]).detach(),
        "attribution": pb.find.direct_logit_attribution(model, task).values.float(),
        "attributed": -pb.prove.attribution_patching(model, task, site="head").values.float(),
        **{f"composition_{mode}": composition(model, mode) for mode in modes},
        "eap": edges(model, task, 1),
        "eap_ig": edges(model, task, STEPS),
    }


def composition(model: pb.Model, mode: str) -> Tensor:
    """Scores [writer's layer, head, reader's layer, head], 0 where the reader is not later."""
    found = pb.find.channels(model)
    writers, readers = ({name: i for i, name in enumerate(found.coords[axis])} for axis in ("writer", "reader"))
    heads = range(model.config.num_attention_heads)
    scores = torch.zeros(model.n_layers, len(heads), model.n_layers, len(heads))
    for first, later in itertools.combinations(range(model.n_layers), 2):
        rows, columns = ([names[text] for text in texts] for names, texts in (
            (writers, [f"L{first}.H{h}" for h in heads]), (readers, [f"L{later}.H{h}.{mode}" for h in heads])))  # fmt: skip
        scores[first, :, later] = found["whole"][rows][:, columns].float()
    return scores


def edges(model: pb.Model, task: pb.Task, steps: int) -> Tensor:
    """Effects [writer, reader]; writers and readers in the order of the model, 0 where there is no edge."""
    found = pb.prove.edge_attribution(model, task, steps=steps)
    effects = {
        tuple(label.split(" -> ")): float(v) for label, v in zip(found.coords["edit"], found["effect"], strict=True)
    }
    heads, groups = (
        range(model.config.num_attention_heads),
        range(getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads),
    )
    writers, readers = ["embed"], list[str]()
    for i in range(model.n_layers):
        writers += [*(f"L{i}.H{h}" for h in heads), f"L{i}.mlp"]
        readers += [
            *(f"L{i}.H{h}.q" for h in heads),
            *(f"L{i}.KV{g}.{kind}" for kind in "kv" for g in groups),
            f"L{i}.mlp.in",
        ]
    return torch.tensor([[effects.get((w, r), 0.0) for r in [*readers, "logits"]] for w in writers])


def compared(family: str, peer: str, folder: Path) -> list[tuple[str, str, str, str]]:
    """(what, model, peer, difference) of every quantity that the peer gives."""
    model = pb.load(str(folder))
    mine = ours(model, COMPOSITION[family])
    given = {**PROMPTS, "right": RIGHT, "wrong": WRONG, "layer": LAYER, "position": POSITION, "head": HEAD,
             "steps": STEPS, "composition": COMPOSITION[family]}  # fmt: skip
    (folder / "given.json").write_text(json.dumps(given), encoding="utf-8")
    told = peers.run(peer, str(folder), "given.json", f"{peer}.safetensors", script=f"peer_{peer}_agree.py")
    theirs = load_file(folder / f"{peer}.safetensors")
    rows = []
    for name, text in WHAT.items():
        if name in theirs:
            a, b = mine[name].double(), theirs[name].double()
            if name.startswith("eap"):  # what is no edge has a product there
                b = b * (a != 0)
            rows.append(
                (text, family, f"{peer} {told['version']}", f"{float((a - b).abs().max() / a.abs().max()):.1e}")
            )
    return rows


def main() -> None:
    rows: list[tuple[str, ...]] = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            hf: Any = twin(family)
            hf.save_pretrained(folder)
            for peer in PEERS:
                rows += compared(family, peer, folder)
    lines = [
        "| what | model | peer | largest difference over largest value |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    print("\n".join(lines))
    setting = describe("cpu", torch.float32, "no", os.getloadavg()[0])
    put_section("agreement with the peers", "\n".join([setting, "", METHOD, "", *lines]))


if __name__ == "__main__":
    main()
