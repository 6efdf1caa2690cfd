"""Gated residuals: a block's output enters the stream through a gate, in place of a plain sum.

    y = relu(f(LN x)),  r = sigma(W_r y + U_r x),  z = sigma(W_z y + U_z x - b),  h = tanh(W_g y + U_g (r * x)),  out = (1 - z) * x + z * h,  b = 2

for attention and for the MLP of every layer: 6 d^2 a gate, 12 d^2 a layer, as much again as a layer of width d. With zero weights out = 0.8808 x exactly and z = 0.1192; b large is the identity.

Parisotto et al. 2019, "Stabilizing Transformers for Reinforcement Learning": stable where the plain one fails.

What a block adds is out - x = z * (h - x): the parts sum to the stream with that, and heads and neurons do not sum to it. So a layer offers its streams, what
the two gates add, and `openness`, the mean of z; the equal-parameter twin is a wider plain model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

BIAS = 2.0


class ResidualGate(nn.Module):
    """What a gate adds to the stream x, given what the block made of its norm."""

    def __init__(self, width: int, bias: float = BIAS) -> None:
        super().__init__()
        self.bias = bias
        self.seen: list[Tensor] | None = None  # where `openness` asks, the mean of z of each call
        self.of_block = nn.Linear(width, 3 * width, bias=False)  # W_r, W_z, W_g
        self.of_stream = nn.Linear(width, 2 * width, bias=False)  # U_r, U_z
        self.of_reset = nn.Linear(width, width, bias=False)  # U_g

    def forward(self, x: Tensor, block: Tensor) -> Tensor:
        z, h = self.parts(x, block)
        if self.seen is not None:
            self.seen.append(z.mean())
        return z * (h - x)

    def parts(self, x: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """z and h, each [..., d]."""
        y_r, y_z, y_g = self.of_block(torch.relu(block)).chunk(3, -1)
        x_r, x_z = self.of_stream(x).chunk(2, -1)
        r = torch.sigmoid(y_r + x_r)
        return torch.sigmoid(y_z + x_z - self.bias), torch.tanh(y_g + self.of_reset(r * x))


class GatedBlock(nn.Module):
    """A norm, the block that reads it, and the gate behind: the stream in, what is added to it out."""

    def __init__(self, norm: nn.Module, block: nn.Module, width: int, bias: float = BIAS) -> None:
        super().__init__()
        self.norm, self.block, self.gate = norm, block, ResidualGate(width, bias)

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        made = self.block(self.norm(hidden_states), **options)
        added: Tensor = self.gate(hidden_states, made[0] if isinstance(made, tuple) else made)
        return added


class GatedLayer(GradientCheckpointingLayer):
    """A decoder layer of the Llama kind, its norms, attention and MLP as they are, with a gate behind each block."""

    def __init__(self, layer: Any, width: int, bias: float = BIAS) -> None:
        super().__init__()
        self.gated_attn = GatedBlock(layer.input_layernorm, layer.self_attn, width, bias)
        self.gated_mlp = GatedBlock(layer.post_attention_layernorm, layer.mlp, width, bias)

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        x = hidden_states + self.gated_attn(hidden_states, **options)
        return x + self.gated_mlp(x)  # type: ignore[no-any-return]


@torch.no_grad()
def openness(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean of z over prompts, positions and channels, [layer, block]: attention's gate, then the MLP's. `model`: a Hugging Face model of gated layers."""
    gates = [module for module in model.modules() if isinstance(module, ResidualGate)]
    for gate in gates:
        gate.seen = []
    try:
        model(input_ids=ids, use_cache=False)
        return torch.stack([torch.stack(gate.seen or []).mean() for gate in gates]).view(-1, 2)
    finally:
        for gate in gates:
            gate.seen = None
