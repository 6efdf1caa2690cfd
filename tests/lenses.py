"""Models whose last block is known, as lenses are asked to undo it: GPT-2 without norms and attention, its MLPs given as matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import patchbay as pb

VOCAB, D = 24, 8


def rotation(seed: int = 0) -> Tensor:
    """A random orthogonal matrix [D, D]."""
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed)))[0]


@torch.no_grad()
def blocks(
    *added: Tensor,
    act: Any = None,
    unembed: Tensor | None = None,
    embed: Tensor | None = None,
    bias: Tensor | None = None,
) -> pb.Model:
    """h -> h + act(h in + bias) out for each block, given as (in, out) or as one matrix W with h -> h + h W; logits are h U."""
    config = AutoConfig.for_model(
        "gpt2", vocab_size=VOCAB, n_embd=D, n_layer=len(added), n_head=2, n_inner=VOCAB + 2 * D, n_positions=32, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    hf: Any = AutoModelForCausalLM.from_config(config).eval()
    hf.transformer.ln_f = nn.Identity()
    hf.transformer.wpe.weight.zero_()
    generator = torch.Generator().manual_seed(9)
    hf.transformer.wte.weight.copy_(torch.randn(VOCAB, D, generator=generator) if embed is None else embed)
    hf.lm_head.weight.copy_(torch.randn(VOCAB, D, generator=generator) if unembed is None else unembed)
    for layer, given in zip(hf.transformer.h, added, strict=True):
        layer.ln_1 = layer.ln_2 = nn.Identity()
        layer.mlp.act = act or nn.Identity()
        read, write = given if isinstance(given, tuple) else (given, torch.eye(D))
        for parameter in (*layer.attn.parameters(), *layer.mlp.parameters()):
            parameter.zero_()
        layer.mlp.c_fc.weight[:, : read.shape[1]] = read
        layer.mlp.c_proj.weight[: write.shape[0]] = write
        if bias is not None:
            layer.mlp.c_fc.bias[: len(bias)] = bias
    return pb.load(hf)


def texts(n: int, length: int = 8, seed: int = 0) -> list[list[int]]:
    return torch.randint(VOCAB, (n, length), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[no-any-return]


def answers(model: pb.Model, n: int = 12) -> pb.Task:
    """Prompts whose right answer is what the model says."""
    rows = texts(n, seed=5)
    said = pb.run(model, rows).last_logits.argmax(-1).tolist()
    return pb.Task("said", rows, said, [[]] * n, metric="log_probability")
