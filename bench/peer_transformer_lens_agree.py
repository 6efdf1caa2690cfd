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
    save_file({name: value.detach().float().contiguous() for name, value in found.items()}, str(Path(folder) / out))
    print(json.dumps({"version": version("transformer-lens")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
