"""From a symbolic program (`programs`) to a GPT-2 model that computes it, and the graph of parts that do.

Every value of every variable is a direction of the stream, its code. A `Pick` is one head; a `Count` is a head that gives
the start token as much attention as every match, and neurons that read 1 / (1 + n) off it; a `Map` is one neuron for each
value of its inputs. What makes the weights exact:

- **The norm.** A constant direction of norm `LARGE` is part of every embedding, so that LayerNorm multiplies by
  sqrt(d_model) / LARGE to within a part in a thousand; all directions are mean-free. Read with weight 1, it is a bias.
- **Digits.** A head gives matches `SHARP` logits and the start token half of that, so it copies one code whole; a neuron is 0
  below its threshold and 1 at its value. Small errors do not travel.
- **Superposed.** With `superposed` below 1, codes share that part of the dimensions that they would need, pushed apart until they
  are nearly orthogonal: reading one value meets a little of the others. What is counted, and what is compared where one query
  may match several keys, stays orthogonal: there a part in a hundred tells.
- **Distractors.** Heads and neurons that the program leaves free hold random weights. They write about 1 in norm, as much as a
  code, where nobody reads, and `noise` of that everywhere.

After Lindner et al. 2023, "Tracr: Compiled Transformers as a Laboratory for Interpretability", here with norms and a language
model's causal mask. The model is checked against the interpreter where it is made (`Compiled.check`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from patchbay.tiny.programs import Count, Map, Pick, Positions, Selects, Tokens, Value, Variable, in_order

LARGE = 100.0
SHARP = 40.0
STRENGTH = 12.0  # logits between the answer and another token
START = "<start>"


@dataclass(frozen=True)
class Edge:
    """One arrow of the true graph: `writer` (a part's text) gives `variable` to `reader` (a port's text)."""

    writer: str
    reader: str
    variable: str
    varies: bool  # whether it can differ between prompts of one length


@dataclass
class Compiled:
    """A compiled model with what is true of it. `words[i]` is token i; token 0 is the start token."""

    model: GPT2LMHeadModel
    words: tuple[str, ...]
    answer: Variable
    parts: dict[str, list[str]]  # variable -> the parts that compute it
    edges: list[Edge] = field(default_factory=list)

    @property
    def heads(self) -> list[str]:
        """Heads that compute something, all others being distractors."""
        return sorted({part for parts in self.parts.values() for part in parts if ".H" in part})

    @property
    def mlps(self) -> list[str]:
        return sorted(
            {part.partition(".N")[0] + ".mlp" for parts in self.parts.values() for part in parts if ".N" in part}
        )

    def ids(self, tokens: Sequence[Value]) -> list[int]:
        return [0, *(self.words.index(word) for word in tokens)]

    def expected(self, tokens: Sequence[Value]) -> Value:
        """What the program answers at the last token."""
        return self.answer.at(tokens, len(tokens) - 1)

    @torch.no_grad()
    def check(self, prompts: Sequence[Sequence[Value]]) -> float:
        """The share of prompts whose most likely next token is the program's answer."""
        right = 0
        for tokens in prompts:
            logits = self.model(torch.tensor([self.ids(tokens)])).logits[0, -1]
            right += self.words[int(logits.argmax())] == self.expected(tokens)
        return right / len(prompts)


@dataclass
class Place:
    """Where one variable is computed: 0 for the embedding, 2 l + 1 for attention of layer l, 2 l + 2 for its MLP."""

    time: int
    head: int | None = None
    neurons: range = range(0)

    @property
    def layer(self) -> int:
        return (self.time - 1) // 2


def compile_program(
    answer: Variable,
    *,
    superposed: float = 1.0,
    n_layers: int = 3,
    n_heads: int = 6,
    noise: float = 0.05,
    seed: int = 0,
    n_positions: int = 24,
) -> Compiled:
    """The model of a program whose answer is one of its own tokens. `n_layers` and `n_heads`: at least. `superposed`: the
    share of the dimensions that orthogonal codes would need."""
    return _Compiler(answer, superposed, (n_layers, n_heads), noise, seed, n_positions).compiled()


class _Compiler:
    def __init__(
        self, answer: Variable, superposed: float, least: tuple[int, int], noise: float, seed: int, n_positions: int
    ) -> None:
        self.answer, self.noise, self.n_positions = answer, noise, n_positions
        self.variables = in_order(answer)
        self.generator = torch.Generator().manual_seed(seed)
        self.words = (START, *next(v for v in self.variables if isinstance(v, Tokens)).values)
        self.places = self._schedule()
        self.n_heads = max([least[1], *(p.head + 2 for p in self.places.values() if p.head is not None)])
        self.n_layers = max(least[0], (max(place.time for place in self.places.values()) + 1) // 2)
        counts = [v for v in self.variables if isinstance(v, Count)]
        selects = [v for v in self.variables if isinstance(v, Selects) and (v in counts or max(map(sum, v.table)) > 1)]
        compared = {id(v) for select in selects for v in (select.keys, select.queries)}
        variables = sorted(self.variables, key=lambda v: id(v) not in compared)  # those with codes of their own first
        sizes = [len(v.values) for v in variables]
        own = sum(size for v, size in zip(variables, sizes, strict=True) if id(v) in compared)
        shared = math.ceil(superposed * (sum(sizes) - own))
        widest = max(len(v.values) + 2 for v in self.variables)
        self.d_head = max(widest, math.ceil((own + shared + len(counts) + 12) / self.n_heads))
        self.d_model = self.d_head * self.n_heads
        self.n_neurons = max([8, *(place.neurons.stop + 8 for place in self.places.values())])
        basis = self._basis()
        self.constant, self.start = basis[:2]
        self.tallies = {id(v): basis[2 + i] for i, v in enumerate(counts)}
        free = basis[2 + len(counts) :]
        codes = torch.cat([free[:own], self._apart(sum(sizes) - own, free[own : own + shared])])
        self.spare = free[own + shared :]
        self.codes = {id(v): part for v, part in zip(variables, codes.split(sizes), strict=True)}
        self.gain = LARGE / math.sqrt(self.d_model)  # undoes the norm

    # ---- where things are ----

    def _schedule(self) -> dict[int, Place]:
        places: dict[int, Place] = {}
        heads: dict[int, int] = {}
        neurons: dict[int, int] = {}
        for variable in self.variables:
            ready = max((places[id(v)].time for v in variable.inputs), default=0)
            if isinstance(variable, Tokens | Positions):
                places[id(variable)] = Place(0)
                continue
            is_head = isinstance(variable, Selects)
            time = ready + 1 if (ready % 2 == 0) == is_head else ready + 2
            n_neurons = 2 * len(variable.values) if isinstance(variable, Count) else 0
            if isinstance(variable, Map):
                n_neurons = math.prod(len(v.values) for v in variable.inputs)
            layer = (time - 1) // 2
            at = neurons.get(layer, 0)
            place = Place(time + (1 if isinstance(variable, Count) else 0), neurons=range(at, at + n_neurons))
            neurons[layer] = at + n_neurons
            if is_head:
                place.head = heads.get(layer, 0)
                heads[layer] = place.head + 1
            places[id(variable)] = place
        return places

    def _basis(self) -> Tensor:
        """Random orthonormal mean-free directions, [direction, d_model]."""
        columns = torch.randn(self.d_model, self.d_model, generator=self.generator, dtype=torch.float64)
        columns[:, 0] = 1.0
        return torch.linalg.qr(columns)[0].T[1:]

    def _apart(self, n: int, directions: Tensor) -> Tensor:
        """`n` unit codes in the span of fewer directions, pushed apart, [code, d_model]; orthonormal where they fit."""
        width = len(directions)
        if n <= width:
            return directions[:n]
        points = torch.randn(n, width, generator=self.generator, dtype=torch.float64)
        for _ in range(1000):  # gradient steps on the sum of fourth powers of the inner products
            points = points / points.norm(dim=1, keepdim=True)
            inner = points @ points.T - torch.eye(n, dtype=torch.float64)
            points = points - (width / 20) * inner.pow(3) @ points
        return points / points.norm(dim=1, keepdim=True) @ directions

    # ---- weights ----

    def compiled(self) -> Compiled:
        config = GPT2Config(
            vocab_size=len(self.words), n_positions=self.n_positions, n_embd=self.d_model, n_layer=self.n_layers,
            n_head=self.n_heads, n_inner=self.n_neurons, activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            self.model = GPT2LMHeadModel(config).eval().double()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self._embed()
        for layer in range(self.n_layers):
            self._distract(layer)
        for variable in self.variables:
            if isinstance(variable, Selects):
                self._head(variable)
            if isinstance(variable, Count):
                self._tally(variable)
            if isinstance(variable, Map):
                self._neurons(variable)
        head = self.model.lm_head.weight.zero_()
        for value, code in zip(self.answer.values, self.codes[id(self.answer)], strict=True):
            head[self.words.index(value)] = STRENGTH * self.gain * code
        parts = {v.name: self._parts(v) for v in self.variables}
        return Compiled(self.model.float(), self.words, self.answer, parts, list(self._edges()))

    def _embed(self) -> None:
        body = self.model.transformer
        body.wte.weight.zero_()
        body.wpe.weight.zero_()
        for variable in self.variables:
            if isinstance(variable, Tokens):
                body.wte.weight[1:] = self.codes[id(variable)]
            if isinstance(variable, Positions):
                body.wpe.weight[1 : 1 + len(variable.values)] = self.codes[id(variable)][: self.n_positions - 1]
        body.wte.weight[0] = self.start
        body.wte.weight += LARGE * self.constant
        for block in body.h:
            for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                linear.weight.zero_()
                linear.bias.zero_()

    def _attention(self, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of one head's W_Q, W_K, W_V [d_model, d_head] and W_O [d_head, d_model]."""
        at, d = self.model.transformer.h[layer].attn, self.d_head
        q, k, v = (
            at.c_attn.weight[:, i * self.d_model + head * d : i * self.d_model + (head + 1) * d] for i in range(3)
        )
        return q, k, v, at.c_proj.weight[head * d : (head + 1) * d]

    def _head(self, variable: Selects) -> None:
        place = self.places[id(variable)]
        W_Q, W_K, W_V, W_O = self._attention(place.layer, place.head or 0)
        for weight in (W_Q, W_K, W_V, W_O):
            weight.zero_()
        keys, queries = variable.keys, variable.queries
        table = torch.tensor(variable.table, dtype=torch.float64)  # [query, key]
        n = len(keys.values)
        scale = SHARP * math.sqrt(self.d_head)
        W_Q[:, :n] = scale * self.gain * self.codes[id(queries)].T @ table
        W_K[:, :n] = self.gain * self.codes[id(keys)].T
        rest = scale * (1.0 if isinstance(variable, Count) else 0.5)  # what the start token gets
        W_Q[:, n] = rest * self.constant * self.gain / LARGE
        W_K[:, n] = self.gain * self.start
        if isinstance(variable, Pick):
            W_V[:, : len(variable.of.values)] = self.gain * self.codes[id(variable.of)].T
            out = dict(zip(variable.values, self.codes[id(variable)], strict=True))
            W_O[: len(variable.of.values)] = torch.stack([out[value] for value in variable.of.values])
            if variable.default is not None:
                W_V[:, len(variable.of.values)] = self.gain * self.start
                W_O[len(variable.of.values)] = out[variable.default]
        else:
            W_V[:, 0] = self.gain * self.start
            W_O[0] = self.tallies[id(variable)]

    def _mlp(self, variable: Variable) -> tuple[Tensor, Tensor, Tensor]:
        """Views of a variable's neurons: W_in [d_model, neuron], bias [neuron], W_out [neuron, d_model], all set to 0."""
        place = self.places[id(variable)]
        at, own = self.model.transformer.h[place.layer].mlp, slice(place.neurons.start, place.neurons.stop)
        views = at.c_fc.weight[:, own], at.c_fc.bias[own], at.c_proj.weight[own]
        for view in views:
            view.zero_()
        return views

    def _tally(self, variable: Count) -> None:
        """1 / (1 + n) as a code of n: steps between neighbouring shares, each the difference of two ramps."""
        W_in, bias, W_out = self._mlp(variable)
        codes = self.codes[id(variable)]
        for n in variable.values:
            low, high = 1 / (2 + n), 1 / (1 + n)  # above the step: at most n match
            steep = 4 / (high - low)
            middle = (low + high) / 2 if n < variable.values[-1] else -1.0
            for ramp in (0, 1):
                W_in[:, 2 * n + ramp] = steep * self.gain * self.tallies[id(variable)]
                bias[2 * n + ramp] = -steep * middle - (ramp - 0.5)
                change = codes[n] - (codes[n + 1] if n + 1 < len(codes) else 0)  # step n is on for 0..n
                W_out[2 * n + ramp] = (1 - 2 * ramp) * change
        # every step above n is on too: code(n) = sum over m >= n of (code(m) - code(m + 1))

    def _neurons(self, variable: Map) -> None:
        W_in, bias, W_out = self._mlp(variable)
        sets = [list(zip(v.values, self.codes[id(v)], strict=True)) for v in variable.inputs]
        out = dict(zip(variable.values, self.codes[id(variable)], strict=True))
        room = 0.5  # the threshold stands halfway to the nearest other value
        for i, given in enumerate(itertools.product(*sets)):
            value = variable.function(*(a for a, _ in given))
            if value is None:
                continue
            W_in[:, i] = self.gain * torch.stack([code for _, code in given]).sum(0) / room
            bias[i] = -(len(given) - room) / room
            W_out[i] = out[value]

    def _distract(self, layer: int) -> None:
        """Random heads and neurons, which the program's own overwrite."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

        kept_off = torch.stack([self.constant, self.start, *self.tallies.values()])

        def written(*shape: int) -> Tensor:
            rows = normal(*shape)
            rows = rows - rows.mean(-1, keepdim=True)
            rows = self.noise * (rows - rows @ kept_off.T @ kept_off) / math.sqrt(self.d_model)
            return rows + normal(shape[0], len(self.spare)) @ self.spare / math.sqrt(len(self.spare))

        blind = torch.eye(self.d_model, dtype=torch.float64) - torch.outer(self.constant, self.constant)
        for head in range(self.n_heads):
            W_Q, W_K, W_V, W_O = self._attention(layer, head)
            for weight in (W_Q, W_K, W_V):
                weight.copy_(blind @ normal(*weight.shape) * self.gain / math.sqrt(self.d_head) * 2)
            W_O.copy_(written(*W_O.shape) / math.sqrt(self.d_head))
        mlp = self.model.transformer.h[layer].mlp
        mlp.c_fc.weight.copy_(blind @ normal(self.d_model, self.n_neurons) * self.gain)
        mlp.c_proj.weight.copy_(written(self.n_neurons, self.d_model) / math.sqrt(self.n_neurons))

    # ---- what is true ----

    def _parts(self, variable: Variable) -> list[str]:
        place = self.places[id(variable)]
        if place.time == 0:
            return ["embed"]
        found = [f"L{place.layer}.N{n}" for n in place.neurons]
        return ([f"L{place.layer}.H{place.head}"] if place.head is not None else []) + found

    def _edges(self) -> list[Edge]:
        found: list[Edge] = []

        def arrow(variable: Variable, reader: str, matters: bool = True) -> None:
            place = self.places[id(variable)]
            if place.time == 0:
                writer = "embed"
            else:
                writer = f"L{place.layer}.mlp" if len(place.neurons) else f"L{place.layer}.H{place.head}"
            found.append(Edge(writer, reader, variable.name, variable.reads_tokens and matters))

        for variable in self.variables:
            place = self.places[id(variable)]
            if isinstance(variable, Selects):
                layer, head = place.layer, place.head
                arrow(variable.queries, f"L{layer}.H{head}.q", len(set(variable.table)) > 1)
                arrow(variable.keys, f"L{layer}.KV{head}.k")
                if isinstance(variable, Pick):
                    arrow(variable.of, f"L{layer}.KV{head}.v")
                else:  # the head's tally is read by the neurons of its own layer
                    found.append(Edge(f"L{layer}.H{head}", f"L{layer}.mlp.in", variable.name, variable.reads_tokens))
            for before in variable.inputs if isinstance(variable, Map) else ():
                arrow(before, f"L{place.layer}.mlp.in")
        arrow(self.answer, "logits")
        return list(dict.fromkeys(found))
