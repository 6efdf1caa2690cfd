"""What TransformerLens finds on a saved model, run by its own Python: `peer_transformer_lens_agree.py FOLDER GIVEN OUT`; see agree.py."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from peer_transformer_lens import save_tokenizer
from safetensors.torch import save_file
from transformer_lens.model_bridge import TransformerBridge


def main(folder: str, given_file: str, out: str) -> None:
    if not (Path(folder) / "tokenizer.json").exists():
        save_tokenizer(folder)
    model = TransformerBridge.boot_transformers(folder, device="cpu")
    given = json.loads((Path(folder) / given_file).read_text(encoding="utf-8"))
    clean, corrupted = torch.tensor(given["clean"]), torch.tensor(given["corrupted"])
    layer, position, head = given["layer"], given["position"], given["head"]
    row, right, wrong = torch.arange(len(clean)), torch.tensor(given["right"]), torch.tensor(given["wrong"])
    layers = range(model.cfg.n_layers)
    with torch.no_grad():
        logits, cache = model.run_with_cache(clean)
        _, other = model.run_with_cache(corrupted)
    stream, z = f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.attn.hook_z"

    def put_stream(value: torch.Tensor, hook: object) -> torch.Tensor:
        value = value.clone()
        value[:, position] = other[stream][:, position]
        return value

    def put_head(value: torch.Tensor, hook: object) -> torch.Tensor:
        value = value.clone()
        if value.ndim == 4:
            value[:, :, head] = other[z][:, :, head]
        else:
            d = value.shape[-1] // model.cfg.n_heads
            value[..., head * d : (head + 1) * d] = other[z].flatten(2)[..., head * d : (head + 1) * d]
        return value

    def by_head(value: torch.Tensor) -> torch.Tensor:
        return value if value.ndim == 4 else value.unflatten(-1, (model.cfg.n_heads, -1))

    with torch.no_grad():
        found = {
            "logits": logits,
            "resid_out": torch.stack([cache[f"blocks.{i}.hook_resid_post"] for i in layers]),
            "pattern": torch.stack([cache[f"blocks.{i}.attn.hook_pattern"] for i in layers]),
            "z": torch.stack([by_head(cache[f"blocks.{i}.attn.hook_z"]) for i in layers]),
            "patched": model.run_with_hooks(clean, fwd_hooks=[(stream, put_stream)]),
            "patched_z": model.run_with_hooks(clean, fwd_hooks=[(z, put_head)]),
            "lens": torch.stack([model.unembed(model.ln_final(cache[f"blocks.{i}.hook_resid_post"])) for i in layers]),
        }
    added: dict[int, torch.Tensor] = {}  # zeros, whose gradient is that of what they are added to

    def keep(i: int) -> object:
        def hook(value: torch.Tensor, hook: object) -> torch.Tensor:
            added[i] = torch.zeros_like(value).requires_grad_(True)
            return value + added[i]

        return hook

    scored = model.run_with_hooks(clean, fwd_hooks=[(f"blocks.{i}.attn.hook_z", keep(i)) for i in layers])
    (scored[row, -1, right] - scored[row, -1, wrong]).mean().backward()
    attributed = [
        by_head((other[f"blocks.{i}.attn.hook_z"] - cache[f"blocks.{i}.attn.hook_z"]) * added[i].grad).sum((0, 1, 3))
        for i in layers
    ]
    found["attributed"] = torch.stack(attributed)
    found |= {f"composition_{mode}": composition(folder, mode) for mode in given["composition"]}
    for name, steps in (("eap", 1), ("eap_ig", given["steps"])):
        found[name] = edges(model, clean, corrupted, right, wrong, steps)
    save_file({name: value.detach().float().contiguous() for name, value in found.items()}, str(Path(folder) / out))
    print(json.dumps({"version": version("transformer-lens")}))


def composition(folder: str, mode: str) -> torch.Tensor:
    """Scores of all pairs of heads, [writer's layer, head, reader's layer, head], with norms folded into what reads (a writer keeps its mean)."""
    model = TransformerBridge.boot_transformers(folder, device="cpu")
    model.enable_compatibility_mode(disable_warnings=True, center_writing_weights=False)
    return model.all_composition_scores(mode.upper()).scores


def edges(
    model: TransformerBridge,
    clean: torch.Tensor,
    corrupted: torch.Tensor,
    right: torch.Tensor,
    wrong: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """Edge attribution [writer, reader]: the writer's output, clean less corrupted, times the mean gradient at the reader.

    Writers are the embedding, then of each layer its heads and its MLP; readers of each layer the heads' queries, keys, values
    and the MLP, then the logits. Gradients are those of runs whose embeddings lie k / steps of the way to the clean ones.
    """
    model.set_use_split_qkv_input(True)
    model.set_use_attn_result(True)
    model.set_use_hook_mlp_in(True)
    layers, row = range(model.cfg.n_layers), torch.arange(len(clean))
    with torch.no_grad():
        caches = [model.run_with_cache(prompts)[1] for prompts in (clean, corrupted)]
    change: list[torch.Tensor] = []
    writers = [cache["blocks.0.hook_resid_pre"].unsqueeze(2) for cache in caches]
    change.append(writers[0] - writers[1])
    for i in layers:
        change.append(caches[0][f"blocks.{i}.attn.hook_result"] - caches[1][f"blocks.{i}.attn.hook_result"])
        change.append((caches[0][f"blocks.{i}.hook_mlp_out"] - caches[1][f"blocks.{i}.hook_mlp_out"]).unsqueeze(2))
    reading = [f"blocks.{i}.hook_{name}" for i in layers for name in ("q_input", "k_input", "v_input", "mlp_in")]
    reading.append(f"blocks.{len(layers) - 1}.hook_resid_post")
    total = torch.zeros(())
    for step in range(1, steps + 1):
        added: dict[str, torch.Tensor] = {}

        def keep(name: str, added: dict[str, torch.Tensor] = added) -> object:
            def hook(value: torch.Tensor, hook: object) -> torch.Tensor:
                added[name] = torch.zeros_like(value).requires_grad_(True)
                return value + added[name]

            return hook

        def put(value: torch.Tensor, hook: object, share: float = step / steps) -> torch.Tensor:
            return writers[1].squeeze(2) + share * (writers[0] - writers[1]).squeeze(2)

        hooks = [("blocks.0.hook_resid_pre", put), *((name, keep(name)) for name in reading)]
        scored = model.run_with_hooks(clean, fwd_hooks=hooks)
        (scored[row, -1, right] - scored[row, -1, wrong]).sum().backward()
        gradients = [added[name].grad for name in reading]
        readers = torch.cat([g if g.ndim == 4 else g.unsqueeze(2) for g in gradients], 2)
        total = total + torch.einsum("ptwd,ptrd->wr", torch.cat(change, 2), readers) / len(clean) / steps
    return total


if __name__ == "__main__":
    main(*sys.argv[1:])
