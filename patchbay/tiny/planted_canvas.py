"""A blank Hugging Face model that can be written on by hand: the ground on which `planted` builds its mechanisms.

What makes a compiled mechanism exact:

- **Directions.** The residual stream is cut into orthonormal directions drawn at random from the seed, so that no
  mechanism is aligned with a coordinate axis. In GPT-2 form every direction is mean-free, so LayerNorm's centring
  changes nothing.
- **The norm.** One constant direction of norm C with C^2 = d_model - (norms of everything else in the embedding) is
  part of every embedding. Hence |x|^2 = d_model and a norm with unit gain is the identity; a later write of squared
  norm n scales the stream by sqrt(d_model / (d_model + n)). The constant direction divided by C is `one`: reading it
  gives 1, which serves as a bias.
- **Attention.** Keys have unit norm, all of a score stands in the query map, and `sharpness` is in logits.
- **Rotary positions.** A pair of head dimensions turns by theta_j per token. `offset_maps` reads `one` into the
  fastest pairs, the query turned by the wanted offset, so that the score is sum_j cos((distance - offset) theta_j),
  largest at the offset. `slots` hands out the slowest pairs for matching content. In GPT-2 form positions have a
  signed one-hot code: position p + width is minus position p.
- **Noise.** Every head and neuron starts as noise that reads everything but the protected directions and writes
  `noise` in norm, so that a finder has to discriminate; planted parts overwrite it. In grouped-query form the other
  query heads of a planted group share its k and v.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from patchbay.tiny.planted_vocabulary import BOS, PAD, WORDS

Form = Literal["gpt2", "llama", "mixtral"]
HeadWeight = Literal["q", "k", "v", "o"]
QKV: tuple[HeadWeight, ...] = ("q", "k", "v")
ROPE_THETA = 1e6  # fast pairs tell neighbours apart, slow pairs turn less than 0.13 rad over 128 tokens
N_FAST_PAIRS = 8


class Sizes(TypedDict, total=False):
    """Sizes of a planted model, all optional: the defaults are those of `Canvas`."""

    n_layers: int
    n_heads: int
    n_kv_heads: int  # Llama and Mixtral form
    n_experts: int  # Mixtral form
    d_model: int
    d_mlp: int
    n_positions: int
    noise: float  # norm that each noise head and each noise MLP writes; a token's code has norm 1


class Canvas:
    """A model of one form whose directions, heads, neurons and experts are written by hand."""

    def __init__(
        self,
        form: Form,
        seed: int,
        *,
        n_layers: int = 2,
        n_heads: int = 4,
        n_kv_heads: int = 2,
        n_experts: int = 4,
        d_model: int = 256,
        d_mlp: int = 128,
        n_positions: int = 128,
        noise: float = 0.05,
    ) -> None:
        if form not in _CONFIGS:
            raise ValueError(
                f"form {form!r} was asked; the forms of planted models are {', '.join(map(repr, _CONFIGS))}"
            )
        if d_model % n_heads or n_heads % n_kv_heads:
            raise ValueError(
                f"d_model={d_model} must divide by n_heads={n_heads}, and n_heads by n_kv_heads={n_kv_heads}"
            )
        self.form, self.seed, self.noise = form, seed, noise
        self.n_layers, self.n_heads, self.n_experts = n_layers, n_heads, n_experts
        self.n_kv_heads = n_heads if form == "gpt2" else n_kv_heads
        self.d_model, self.d_head, self.d_mlp, self.n_positions = d_model, d_model // n_heads, d_mlp, n_positions
        self.n_vocab = len(WORDS)
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            self.model: Any = _CONFIGS[form](self).eval()
        self._basis = self._random_basis()  # [direction, d_model]
        self._n_taken = 0
        self._constant = self.take(1)[0]
        self._n_protected = 1
        self._free_groups = {layer: list(range(self.n_kv_heads)) for layer in range(n_layers)}
        self.positions: Tensor | None = None  # [n_codes, d_model], GPT-2 form only
        self.one = self._constant / math.sqrt(d_model)  # set anew by `embed`

    # ---- directions ------------------------------------------------------------------------------
    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers from the canvas's own generator."""
        return torch.randn(*shape, generator=self.generator)

    def choose(self, n: int, n_of: int) -> list[int]:
        """`n` different integers below `n_of`, drawn from the seed."""
        return torch.randperm(n_of, generator=self.generator)[:n].tolist()

    def _random_basis(self) -> Tensor:
        columns = self.normal(self.d_model, self.d_model)
        if self.form == "gpt2":  # the first column takes the mean, the others are then mean-free
            columns[:, 0] = 1.0
        rows = torch.linalg.qr(columns.double())[0].T.float()  # [direction, d_model]
        return rows[1:] if self.form == "gpt2" else rows

    def take(self, n: int, *, protect: bool = False) -> Tensor:
        """The next `n` unused directions, [n, d_model]; a protected one is neither read nor written by the noise."""
        if self._n_taken + n > len(self._basis):
            raise ValueError(
                f"this mechanism needs {self._n_taken + n} orthogonal directions or more; d_model={self.d_model} in "
                f"{self.form} form offers {len(self._basis)}: pass a larger d_model"
            )
        directions = self._basis[self._n_taken : self._n_taken + n]
        self._n_taken += n
        if protect:
            if self._n_protected != self._n_taken - n:
                raise ValueError("protected directions must be taken before all others")
            self._n_protected = self._n_taken
        return directions

    def noisy(self) -> Tensor:
        """The directions that noise reads and writes, [direction, d_model]."""
        return self._basis[self._n_protected :]

    # ---- weights ---------------------------------------------------------------------------------
    def head_weight(self, layer: int, head: int, name: HeadWeight) -> Tensor:
        """A view of one head's weights: q k v as [d_model, d_head], o as [d_head, d_model]; k and v are its group's."""
        shared = name in ("k", "v")
        row = (head * self.n_kv_heads // self.n_heads if shared else head) * self.d_head
        if self.form == "gpt2":
            attn = self.model.transformer.h[layer].attn
            if name == "o":
                return attn.c_proj.weight.data[row : row + self.d_head]
            start = "qkv".index(name) * self.d_model + row
            return attn.c_attn.weight.data[:, start : start + self.d_head]
        weight = getattr(self.model.model.layers[layer].self_attn, f"{name}_proj").weight.data  # [out, in]
        return weight[:, row : row + self.d_head].T if name == "o" else weight[row : row + self.d_head].T

    def neuron_weights(self, layer: int, expert: int | None = None) -> tuple[list[Tensor], Tensor]:
        """Views of what the neurons read (one matrix, or gate and up) and of what they write, [neuron, d_model]."""
        if self.form == "gpt2":
            mlp = self.model.transformer.h[layer].mlp
            return [mlp.c_fc.weight.data.T], mlp.c_proj.weight.data
        mlp = self.model.model.layers[layer].mlp
        if self.form == "llama":
            return [mlp.gate_proj.weight.data, mlp.up_proj.weight.data], mlp.down_proj.weight.data.T
        gate_up = mlp.experts.gate_up_proj.data[expert]
        return [gate_up[: self.d_mlp], gate_up[self.d_mlp :]], mlp.experts.down_proj.data[expert].T

    def router_weight(self, layer: int) -> Tensor:
        """A view of the router's weight, [expert, d_model]."""
        return self.model.model.layers[layer].mlp.gate.weight.data

    def set_head(self, layer: int, head: int, *, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
        """Write one head: q k v as [d_model, width], o as [width, d_model]; a width below d_head is filled with zeros.

        q is given so that (x q) . (x k) is the score in logits: the sqrt(d_head) that the model divides by is put in
        here.
        """
        weights: tuple[tuple[HeadWeight, Tensor], ...] = (
            ("q", q * math.sqrt(self.d_head)),
            ("k", k),
            ("v", v),
            ("o", o),
        )
        for name, value in weights:
            width = value.shape[0] if name == "o" else value.shape[1]
            if width > self.d_head:
                raise ValueError(
                    f"{name} needs a width of {width}, d_head is {self.d_head}: pass a larger d_model or fewer heads"
                )
            view = self.head_weight(layer, head, name).zero_()
            (view[:width] if name == "o" else view[:, :width]).copy_(value)

    def set_neuron(self, layer: int, neuron: int, *, read: Tensor, write: Tensor, expert: int | None = None) -> None:
        """Write one neuron: pre-activation read . x; a gated neuron's up branch reads `one`, so that it is 1."""
        reads, writes = self.neuron_weights(layer, expert)
        for matrix, row in zip(reads, (read, self.one), strict=False):
            matrix[neuron] = row
        writes[neuron] = write

    def pick_head(self, layer: int) -> int:
        """A head of a key/value group that nothing else is planted in, drawn from the seed."""
        if layer >= self.n_layers:
            raise ValueError(
                f"this mechanism needs a layer {layer}; n_layers={self.n_layers}: pass {layer + 1} or more"
            )
        groups = self._free_groups[layer]
        group = groups.pop(self.choose(1, len(groups))[0])
        size = self.n_heads // self.n_kv_heads
        return group * size + self.choose(1, size)[0]

    def fill_with_noise(self, read: float, write: float) -> None:
        """Every head and MLP: reads of standard deviation `read` per direction, writes of about `write` in norm."""
        basis = self.noisy()
        for layer in range(self.n_layers):
            for head in range(self.n_heads):
                for name, scale in zip(QKV, (read, read, read / math.sqrt(self.d_head)), strict=True):
                    weight = basis.T @ self.normal(len(basis), self.d_head)  # [d_model, d_head]
                    self.head_weight(layer, head, name).copy_(scale * weight)
                o = self.normal(self.d_head, len(basis)) @ basis  # [d_head, d_model]
                self.head_weight(layer, head, "o").copy_(write / math.sqrt(self.d_model) * o)
            for expert in range(self.n_experts) if self.form == "mixtral" else (None,):
                reads, writes = self.neuron_weights(layer, expert)
                for matrix in reads:
                    matrix.copy_(read * self.normal(self.d_mlp, len(basis)) @ basis)
                scale = 2.0 * write / math.sqrt(self.d_model * self.d_mlp)
                writes.copy_(scale * self.normal(self.d_mlp, len(basis)) @ basis)
            if self.form == "mixtral":
                self.router_weight(layer).copy_(read * self.normal(self.n_experts, len(basis)) @ basis)

    def orthonormal(self, n: int) -> Tensor:
        """`n` new random orthonormal rows, [n, d_model], unrelated to those taken (mean-free in GPT-2 form)."""
        columns = torch.linalg.qr(self.normal(len(self._basis), n))[0]  # [direction, n]
        return columns.T @ self._basis

    def fill_at_random(self) -> None:
        """Every weight matrix drawn independently of all others: heads from orthonormal rows, the rest normal."""
        self._n_protected = 0
        self.one = torch.zeros(self.d_model)
        self.fill_with_noise(1.0 / math.sqrt(self.d_model), 2.0)
        for layer in range(self.n_layers):
            for head in range(self.n_heads):
                for name in QKV:
                    self.head_weight(layer, head, name).copy_(self.orthonormal(self.d_head).T)
                self.head_weight(layer, head, "o").copy_(0.25 * self.orthonormal(self.d_head))
        self.model.get_input_embeddings().weight.data.copy_(self.normal(self.n_vocab, len(self._basis)) @ self._basis)
        if self.form == "gpt2":
            self.model.transformer.wpe.weight.data.copy_(self.normal(self.n_positions, len(self._basis)) @ self._basis)
        self.unembed(self.normal(self.n_vocab, len(self._basis)) @ self._basis / math.sqrt(self.d_model))

    # ---- embedding and unembedding ---------------------------------------------------------------
    def embed(self, tokens: Tensor) -> None:
        """Write the embedding, [vocab, d_model], plus the constant direction, so that |x|^2 = d_model on average."""
        square = tokens.square().sum(1).mean().item()
        if self.form == "gpt2":
            if self.n_positions > 2 * self.d_head:
                raise ValueError(
                    f"n_positions={self.n_positions} was asked; d_head={self.d_head} allows {2 * self.d_head} at most"
                )
            self.positions = self.take(min(self.d_head, (self.n_positions + 1) // 2))
            place = torch.arange(self.n_positions)
            codes = self._signed(self.positions)[place % (2 * len(self.positions))]
            self.model.transformer.wpe.weight.data.copy_(codes)
            square += 1.0
        constant = math.sqrt(self.d_model - square)
        self.model.get_input_embeddings().weight.data.copy_(tokens + constant * self._constant)
        self.one = self._constant / constant
        self.fill_with_noise(0.7, self.noise)

    def unembed(self, rows: Tensor) -> None:
        """Write the unembedding, [vocab, d_model]."""
        self.model.get_output_embeddings().weight.data.copy_(rows)

    @staticmethod
    def _signed(rows: Tensor) -> Tensor:
        """Twice as many codes as rows: the rows and their negatives."""
        return torch.cat([rows, -rows])

    # ---- attention -------------------------------------------------------------------------------
    def _thetas(self) -> Tensor:
        half = self.d_head // 2
        return ROPE_THETA ** (-torch.arange(half, dtype=torch.float64) / half)

    def slots(self, n: int, *, signed: bool = False) -> Tensor:
        """`n` codes in a head's dimensions, [n, d_head], that rotary positions hardly turn (the slowest pairs first).

        Orthonormal; with `signed`, half as many dimensions are used and code i + n/2 is minus code i.
        """
        width = (n + 1) // 2 if signed else n
        if width > self.d_head:
            raise ValueError(
                f"a head needs {width} dimensions, d_head is {self.d_head}: pass a larger d_model or fewer heads"
            )
        half = self.d_head // 2
        order = (
            list(range(self.d_head))
            if self.form == "gpt2"
            else [half - 1 - i // 2 + i % 2 * half for i in range(2 * half)]
        )
        codes = torch.eye(self.d_head)[order[:width]]
        return self._signed(codes)[:n] if signed else codes

    def offset_maps(self, offset: int, sharpness: float) -> tuple[Tensor, Tensor]:
        """q and k maps, [d_model, d_head]: the score `offset` tokens back is `sharpness` above that at any other."""
        if self.positions is not None:
            width = len(self.positions)
            codes = self.slots(width)  # [width, d_head]
            shifted = self._signed(codes)[(torch.arange(width) - offset) % (2 * width)]
            return sharpness * self.positions.T @ shifted, self.positions.T @ codes
        theta = self._thetas()[:N_FAST_PAIRS]
        distance = torch.arange(self.n_positions, dtype=torch.float64) - offset
        kernel = torch.cos(distance[:, None] * theta).sum(1)  # [distance]
        gap = N_FAST_PAIRS - kernel[distance != 0].max().item()
        fast, half = torch.arange(N_FAST_PAIRS), self.d_head // 2
        query, key = torch.zeros(self.d_head), torch.zeros(self.d_head)
        query[fast], query[fast + half] = torch.cos(offset * theta).float(), -torch.sin(offset * theta).float()
        key[fast] = 1.0
        return sharpness / gap * torch.outer(self.one, query), torch.outer(self.one, key)


def _gpt2(canvas: Canvas) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=canvas.n_vocab,
            n_positions=canvas.n_positions,
            n_embd=canvas.d_model,
            n_layer=canvas.n_layers,
            n_head=canvas.n_heads,
            n_inner=canvas.d_mlp,
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=None,
            pad_token_id=PAD,
        )
    )


def _llama_sizes(canvas: Canvas) -> dict[str, Any]:
    return {
        "vocab_size": canvas.n_vocab,
        "max_position_embeddings": canvas.n_positions,
        "hidden_size": canvas.d_model,
        "intermediate_size": canvas.d_mlp,
        "num_hidden_layers": canvas.n_layers,
        "num_attention_heads": canvas.n_heads,
        "num_key_value_heads": canvas.n_kv_heads,
        "head_dim": canvas.d_head,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }


def _llama(canvas: Canvas) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_llama_sizes(canvas)))


def _mixtral(canvas: Canvas) -> PreTrainedModel:
    sizes: dict[str, Any] = {"num_local_experts": canvas.n_experts, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**_llama_sizes(canvas), **sizes))


_CONFIGS = {"gpt2": _gpt2, "llama": _llama, "mixtral": _mixtral}
