"""The models that benchmarks run on: random weights in two common shapes, saved to a folder, and the trained checkpoints at hand.

Cost does not depend on what the weights hold, only on their shapes; both shapes have about 124 million parameters.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# GPT-2 small: 12 layers, 12 heads, d_model 768, vocabulary 50257. Llama form of the same size: grouped queries, gated MLP.
SHAPES = {
    "gpt2-small": ("gpt2", {}),
    "llama-small": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "intermediate_size": 2048,
            "max_position_embeddings": 1024,
        },
    ),
}
SHARED = Path(os.environ.get("PATCHBAY_SHARED", Path(__file__).resolve().parents[2] / "shared"))  # checkpoints, data
SIZES = ((1, 16), (8, 64), (1, 512))  # (prompts, positions)


def save_shapes(folder: Path, dtype: torch.dtype) -> dict[str, Path]:
    """Save a random model of each shape; name -> its folder."""
    saved = {}
    for name, (family, options) in SHAPES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options), dtype=dtype)
        model.save_pretrained(folder / name)
        saved[name] = folder / name
    return saved


def checkpoints() -> dict[str, Path]:
    """Trained checkpoints: the folders of PATCHBAY_SHARED/models, or of ../shared/models beside the repository."""
    found = sorted(path.parent for path in (SHARED / "models").glob("*/config.json"))
    if not found:
        print(f"no checkpoints under {SHARED / 'models'}: their rows are left out (set PATCHBAY_SHARED)")
    return {path.name: path for path in found}


def prompts(n_prompts: int, n_positions: int, vocab: int, device: str) -> torch.Tensor:
    """Random token ids [prompt, position]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab, (n_prompts, n_positions), generator=generator).to(device)
