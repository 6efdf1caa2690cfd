"""Affine maps taken into weights: a copy of a model whose linear maps, norms, embeddings and experts take in what stands beside them.

A map y = A x + b before a linear one x W + c makes W into A^T W and c into c + b W; behind it, W into W A^T and c into A c + b. Behind
a norm it multiplies the gain and adds to the bias. `fold.py` says which edit is which map of which module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.edits.edit import Edit
from patchbay.knobs.flags import give_bias
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.model.weights import matrix, norm_parts
from patchbay.signal.port import PatchbayError, Port


class NotFoldableError(PatchbayError):
    """One edit that weights cannot express; the message is the reason alone."""


@dataclass(frozen=True)
class Affine:
    """y = A x + b. `a`: None (identity), numbers to multiply by (0- or 1-d), or a matrix [feature, feature]; `b`: None or numbers."""

    a: Tensor | None
    b: Tensor | None
    square: bool = False  # `a` is a matrix

    @classmethod
    def of(cls, edit: Edit) -> Affine:
        value = None if edit.value is None else torch.as_tensor(edit.value).detach().double().cpu()
        zero = torch.zeros((), dtype=torch.float64)
        return {
            "scale": cls(value, None),
            "project": cls(value, None, True),
            "add": cls(None, value),
            "zero": cls(zero, None),
            "replace": cls(zero, value),
            "mean": cls(zero, value),
        }[edit.op]

    def part(self, index: int | None, n: int) -> list[Affine]:
        """Of a signal [part, feature]: the map of each of `n` parts; of one part, that alone."""
        if index is not None:
            return [self]

        def each(value: Tensor | None, i: int) -> Tensor | None:
            return value if value is None or value.ndim < 2 or self.square else value[i if len(value) > 1 else 0]

        return [Affine(each(self.a, i), each(self.b, i), self.square) for i in range(n)]


def times(x: Tensor, a: Tensor | None) -> Tensor:
    """Rows of x through A: x A^T, or element by element."""
    return x if a is None else x @ a.T if a.ndim == 2 else x * a


class Fold:
    """A copy of a model whose weights take edits in. `linear` and `others` name what was changed."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.names = {id(module): name for name, module in model.hf.named_modules()}
        self.before: dict[
            int, tuple[nn.Module, Tensor]
        ] = {}  # linear maps touched, with their weight [in, out] as it was
        self.weights: dict[int, Tensor] = {}
        self.biases: dict[int, Tensor | None] = {}
        self.biased: set[str] = set()  # modules whose bias changed
        self.switched: set[str] = set()  # switches of the config that were turned for a bias
        self.others: set[str] = set()  # changed parameters that are no plain linear map

    # --- linear maps ---

    def hold(self, module: nn.Module) -> int:
        key = id(module)
        if key not in self.before:
            if module._parameters.get("weight") is None:
                raise NotFoldableError(
                    f"{self.names[key]} computes its weight ({type(module).__name__}: a product of factors), so that nothing can be written there"
                )
            weight = matrix(module).detach().double().cpu()
            bias = getattr(module, "bias", None)
            self.before[key] = (module, weight.clone())
            self.weights[key] = weight.clone()
            self.biases[key] = None if bias is None else bias.detach().double().cpu().clone()
        return key

    def shift(self, module: nn.Module, places: Any, amount: Tensor) -> None:
        key = self.hold(module)
        if self.biases[key] is None:
            self._have_bias(module)
            self.biases[key] = torch.zeros(self.weights[key].shape[1], dtype=torch.float64)
        bias = self.biases[key]
        assert bias is not None
        bias[places] += amount
        self.biased.add(self.names[id(module)])

    def _have_bias(self, module: nn.Module) -> None:
        """Give a module without a bias one, where the architecture can have it there. Raises NotFoldableError where it cannot."""
        if module.bias is not None:
            return  # another edit turned the switch
        name = self.names[id(module)]
        switch = give_bias(self.model.hf, name)
        if switch is None:
            kind = self.model.config.model_type
            raise NotFoldableError(
                f"{name} has no bias to add to, and no switch of a {kind} config (such as attention_bias or mlp_bias) gives it one; "
                "form='vector' or 'gguf' keeps it a vector"
            )
        self.switched.add(switch)

    def ahead(self, module: nn.Module | None, rows: Any, map_: Affine) -> None:
        """The map before a linear one, on some of its inputs."""
        assert module is not None
        key = self.hold(module)
        block = self.weights[key][rows]  # [in, out]
        if map_.b is not None:
            self.shift(module, slice(None), map_.b.expand(block.shape[0]) @ block)
        if map_.a is not None:
            a = map_.a
            self.weights[key][rows] = a.T @ block if a.ndim == 2 else a.reshape(-1, 1) * block

    def behind(self, module: nn.Module | None, columns: Any, map_: Affine) -> None:
        """The map after a linear one, on some of its outputs."""
        assert module is not None
        key = self.hold(module)
        self.weights[key][:, columns] = times(self.weights[key][:, columns], map_.a)
        bias = self.biases[key]
        if bias is not None and map_.a is not None:
            bias[columns] = times(bias[columns], map_.a)
            self.biased.add(self.names[id(module)])
        if map_.b is not None:
            self.shift(module, columns, map_.b)

    @torch.no_grad()
    def finish(self) -> None:
        """Write the sums into the modules."""
        for key, (module, _) in self.before.items():
            target = matrix(module)
            target.copy_(self.weights[key].to(target))
            bias = self.biases[key]
            if bias is not None:
                module.bias.copy_(bias.to(module.bias))  # type: ignore[union-attr, arg-type, operator]

    def changes(self) -> dict[str, Tensor]:
        """Name of each changed linear map -> the change of its weight, [in, out]."""
        found = {self.names[key]: self.weights[key] - weight for key, (_, weight) in self.before.items()}
        return {name: change for name, change in found.items() if bool(change.any())}

    # --- what is no linear map ---

    @torch.no_grad()
    def embeddings(self, map_: Affine) -> None:
        """The map on what enters the first layer: the token embedding, and learned positions."""
        self.untie()
        tokens = self.model.hf.get_input_embeddings()
        inside = {id(m) for at in self.model.modules for m in at.layer.modules()}
        tables = [m for m in self.model.hf.modules() if isinstance(m, nn.Embedding) and id(m) not in inside]
        for table in tables:
            new = times(table.weight.double().cpu(), map_.a)
            new = new + map_.b / self._embedding_scale() if map_.b is not None and table is tokens else new
            table.weight.copy_(new.to(table.weight))
            self.others.add(self.names[id(table)])

    def _embedding_scale(self) -> float:
        """By what the family multiplies token embeddings: what two tokens at one place differ by, over their weights' difference."""
        weight = self.model.hf.get_input_embeddings().weight.detach().double().cpu()
        seen = run(self.model, [[0], [1]], taps=[Port("embed")])[Port("embed")][:, 0].double().cpu()
        apart = weight[1] - weight[0]
        return float((seen[1] - seen[0]) @ apart / (apart @ apart))

    @torch.no_grad()
    def unembed(self, a: Tensor) -> None:
        """logits = W (A y): A into the unembedding."""
        self.untie()
        weight = self.model.hf.get_output_embeddings().weight  # [vocab, d_model]
        weight.copy_((weight.double().cpu() @ a if a.ndim == 2 else weight.double().cpu() * a).to(weight))
        self.others.add(self.names[id(self.model.hf.get_output_embeddings())])

    def untie(self) -> None:
        """Embedding and unembedding as two tensors."""
        hf: Any = self.model.hf
        tokens, out = hf.get_input_embeddings(), hf.get_output_embeddings()
        if out.weight is tokens.weight:
            out.weight = nn.Parameter(tokens.weight.detach().clone(), requires_grad=tokens.weight.requires_grad)
            hf.config.tie_word_embeddings = False
            hf.all_tied_weights_keys = {}
            self.others.add(self.names[id(out)])

    @torch.no_grad()
    def gain(self, norm: nn.Module, map_: Affine) -> None:
        """Multiplying or adding behind a norm: its gain (stored as w or as 1 + w) and its bias."""
        if map_.a is not None and map_.a.ndim == 2:
            raise NotFoldableError(
                "a norm stands between the last linear map and the stream; it takes factors, not a matrix"
            )
        gain, bias, _ = norm_parts(norm)
        weight: Tensor = norm.weight  # type: ignore[assignment]
        if map_.a is not None:
            less = 0.0 if gain is weight else 1.0
            weight.copy_((map_.a * (weight.double().cpu() + less) - less).to(weight))
            if bias is not None:
                bias.copy_((map_.a * bias.double().cpu()).to(bias))
        if map_.b is not None:
            if bias is None:
                raise NotFoldableError(
                    f"{self.names[id(norm)]} has no bias to add to; form='vector' or 'gguf' keeps it a vector"
                )
            bias.copy_((bias.double().cpu() + map_.b).to(bias))
        self.others.add(self.names[id(norm)])

    @torch.no_grad()
    def expert(self, layer: int, index: int | None, map_: Affine) -> None:
        """The map on what experts contribute, `index` or all of them: their last weights."""
        experts = self.model.modules[layer].experts
        down = (
            [(n, p) for n, p in experts.named_parameters() if n.startswith("down_proj")] if experts is not None else []
        )
        if map_.b is not None or map_.a is None or (map_.a.ndim == 2 and not map_.square):
            raise NotFoldableError(
                "experts contribute where they are chosen: only what is linear in each folds, adding does not"
            )
        if experts is None:
            raise NotFoldableError(
                f"no map of weights makes what layer {layer} adds there, as where a gate stands behind"
            )
        if not down:
            raise NotFoldableError("its experts have no down_proj to change")
        for name, weight in down:  # [expert, d_model, neuron] or [expert, neuron, d_model]; a bias is [expert, d_model]
            out = [axis for axis in range(1, weight.ndim) if weight.shape[axis] == self.model.d_model]
            if map_.a.numel() > 1 and len(out) != 1:
                raise NotFoldableError(f"{name} of shape {list(weight.shape)} does not show which axis is the stream")
            which = slice(None) if index is None else slice(index, index + 1)
            if map_.a.numel() == 1:
                weight[which] *= float(map_.a)
            else:
                new = times(weight[which].double().cpu().movedim(out[0], -1), map_.a).movedim(-1, out[0])
                weight[which] = new.to(weight)
            self.others.add(f"{self.names[id(experts)]}.{name}")
