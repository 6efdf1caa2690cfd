"""Views: the parts of a model as one walks them, `model.layers[3].heads[5].z`. A view computes nothing; it names ports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from torch import Tensor

from patchbay.model import weights
from patchbay.model.linear import rows
from patchbay.signal.card import card
from patchbay.signal.port import Part, PatchbayError, Port, signals_of

if TYPE_CHECKING:
    from patchbay.jacks.modelled import Modelled as Model

T = TypeVar("T")
V = TypeVar("V", bound="View")


class Many(Sequence[T], Generic[T]):
    """Parts of one kind, made when asked for; a wrong index says how many there are."""

    def __init__(self, n: int, make: Callable[[int], T], kind: str) -> None:
        self._n, self._make, self._kind = n, make, kind

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._n))]
        if not -self._n <= index < self._n:
            found = f"{self._n} (0..{self._n - 1})" if self._n else "none"
            raise PatchbayError(f"{self._kind} {index} asked, there are {found}")
        return self._make(index % self._n)

    def __iter__(self) -> Iterator[T]:
        return (self._make(i) for i in range(self._n))

    def __repr__(self) -> str:
        ends = [str(getattr(self._make(i), "part", "")) for i in (0, self._n - 1)] if self._n else []
        return f"{self._n} {self._kind}s" + (f": {ends[0]} .. {ends[1]}" if ends else "")


class Ports(list[Port]):
    """Ports of a model or of a part. A call gives the same list."""

    def __call__(self) -> Ports:
        return self


class View:
    """One part of one model."""

    def __init__(self, model: Model, part: Part) -> None:
        self.model, self.part = model, part

    @property
    def _layer(self) -> int:
        assert self.part.layer is not None
        return self.part.layer

    def port(self, signal: str) -> Port:
        port = self._resolve(signal)
        self.model.require(port)
        return port

    @property
    def ports(self) -> Ports:
        """The ports of this part that the model offers."""
        offered = Ports()
        for signal in signals_of(self.part.kind):
            port = self._resolve(signal)
            if port.layer is None or port.signal in self.model.signals(port.layer):
                offered.append(port)
        return offered

    def _resolve(self, signal: str) -> Port:
        return self.part.port(signal)

    def _many(self, n: int, kind: type[V]) -> Many[V]:
        """The parts of one kind that this layer has."""
        name = kind.__name__.lower()
        return Many(n, lambda index: kind(self.model, Part(self._layer, name, index)), name)

    def _what(self) -> str:
        return self.part.kind

    def __repr__(self) -> str:
        lines = [f"{self.part}: {self._what()} of {self.model.source or type(self.model.hf).__name__}"]
        for port in self.ports:
            lines.append(f"  {port!s:<20} [{', '.join(port.axes)}]" + ("" if port.editable else "  (tap only)"))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [[port, ", ".join(port.axes), "tap, edit" if port.editable else "tap"] for port in self.ports]
        title = f"{self.part}: {self._what()} of {self.model.source or type(self.model.hf).__name__}"
        return card(title, rows, columns=("port", "axes", ""))


def _signal(name: str, doc: str = "") -> Any:
    """A property that is the port of a signal."""
    return property(lambda view: view.port(name), doc=doc)


class Head(View):
    """A query head. Its keys and values are those of its key/value group, which grouped-query heads share."""

    @property
    def group(self) -> Group:
        index = (self.part.index or 0) * self.model.n_groups(self._layer) // self.model.n_heads(self._layer)
        return Group(self.model, Part(self._layer, "group", index))

    def _resolve(self, signal: str) -> Port:
        return self.group.part.port(signal) if signal in ("k", "v") else self.part.port(signal)

    def _what(self) -> str:
        return f"attention head (keys and values of {self.group.part})"

    q: Port = _signal("q", "Queries after rotary, [prompt, query, d_head].")
    k: Port = _signal("k", "Keys after rotary of the head's group, [prompt, key, d_head].")
    v: Port = _signal("v", "Values of the head's group, [prompt, key, d_head].")
    pattern: Port = _signal("pattern", "Attention weights, [prompt, query, key].")
    z: Port = _signal("z", "What enters the head's slice of the output projection, [prompt, position, d_head].")
    out: Port = _signal(
        "out",
        "What the head writes, z W_O, [prompt, position, d_model]; summed over heads, plus bias, the attention's output.",
    )

    def weights(self, *, fold_norm: bool = False) -> dict[str, Tensor]:
        """W_Q, W_K, W_V [d_model, d_head] and W_O [d_head, d_model] of this head; see `AttentionView.weights`."""
        w = AttentionView(self.model, Part(self._layer, "attn")).weights(fold_norm=fold_norm)
        h, g = self.part.index or 0, self.group.part.index or 0
        return {"W_Q": w.W_Q[h], "W_K": w.W_K[g], "W_V": w.W_V[g], "W_O": w.W_O[h]}


class Group(View):
    """A key/value group: the keys and values that one or several query heads share."""

    @property
    def heads(self) -> list[Head]:
        n_heads, n_groups = self.model.n_heads(self._layer), self.model.n_groups(self._layer)
        return [
            Head(self.model, Part(self._layer, "head", h))
            for h in range(n_heads)
            if h * n_groups // n_heads == self.part.index
        ]

    def _what(self) -> str:
        return f"key/value group (heads {', '.join(str(head.part) for head in self.heads)})"

    k: Port = _signal("k", "Keys after rotary, [prompt, key, d_head].")
    v: Port = _signal("v", "Values, [prompt, key, d_head].")


class AttentionView(View):
    """A layer's attention; the signals of all heads at once."""

    q: Port = _signal("q")
    k: Port = _signal("k")
    v: Port = _signal("v")
    pattern: Port = _signal("pattern")
    z: Port = _signal("z")
    head_out: Port = _signal("head_out")
    out: Port = _signal(
        "out", "What attention (or a hybrid's mixer) adds to the stream, after the family's norm and scale."
    )

    def weights(self, *, fold_norm: bool = False) -> weights.HeadWeights:
        """Per-head weights; `fold_norm` folds the gain, bias and centring of the norm before attention into copies. Of latent
        attention they are products of its factors, right up to one positive number per token (`inner_rates`)."""
        self.model.require(Port("attn.z", self._layer))
        i, model = self._layer, self.model
        _check_read(model, i, "attn")
        shape = (model.n_heads(i), model.n_groups(i), model.d_head(i))
        return weights.head_weights(model.family, model.modules[i], *shape, fold_norm=fold_norm)

    def inner_rates(self, x: Tensor) -> list[Tensor]:
        """By what x W_Q, x W_K and x W_V are multiplied to be q, k and v: 1, but in latent attention what the norms inside do
        to tokens x [..., d_model] of the normed stream (`weights.py`). Each [..., 1] or, for keys, [..., d_head]."""
        self.model.require(Port("attn.z", self._layer))
        i, model = self._layer, self.model
        if model.family.qkv != "latent":
            return [x.new_ones(1)] * 3
        return weights.inner_rates(model.family, model.modules[i], model.n_heads(i), model.d_head(i), x)


class Neuron(View):
    """One neuron: one number per position, between the MLP's projections."""

    act: Port = _signal("act", "Activation, what the down projection multiplies, [prompt, position].")


class MLPView(View):
    """A layer's MLP."""

    @property
    def neurons(self) -> Many[Neuron]:
        return self._many(self.model.n_neurons(self._layer), Neuron)

    input: Port = _signal("in", "What enters the MLP, after its norm, [prompt, position, d_model].")
    act: Port = _signal("act", "Activations of all neurons, [prompt, position, neuron].")
    out: Port = _signal("out", "What the MLP adds to the stream, after the family's norm and scale.")

    def weights(self, *, fold_norm: bool = False) -> weights.MLPWeights:
        self.model.require(Port("mlp.act", self._layer))
        _check_read(self.model, self._layer, "mlp")
        return weights.mlp_weights(self.model.family, self.model.modules[self._layer], fold_norm=fold_norm)


class Expert(View):
    """One routed expert."""

    out: Port = _signal(
        "out", "What the expert contributes, times its weight; 0 where it was not chosen. [prompt, position, d_model]"
    )
    weight: Port = _signal("weight", "Its routing weight, 0 where it was not chosen. [prompt, position]")
    logit: Port = _signal("logit", "Its router logit, before softmax and top-k. [prompt, position]")


class RouterView(View):
    """A layer's router."""

    logits: Port = _signal("logits")
    weights: Port = _signal(
        "weights", "Routing weights, dense: 0 for the experts not chosen. [prompt, position, expert]"
    )
    experts: Port = _signal("experts", "Ids of the chosen experts, [prompt, position, choice]; tap only.")


class LayerView(View):
    """One decoder layer."""

    def _what(self) -> str:
        at = self.model.modules[self._layer]
        mixers = [module for module, _ in at.beside] or [at.attn_added]
        mixer = " beside ".join(type(module).__name__ for module in mixers)
        mixer = f"{self.model.n_heads(self._layer)} heads" if at.attn is not None else mixer
        experts = self.model.n_experts(self._layer)
        return f"layer with {mixer}, " + (
            f"{experts} experts" if experts else f"{self.model.n_neurons(self._layer)} neurons"
        )

    @property
    def ports(self) -> Ports:
        return Ports(Port(signal, self._layer) for signal in self.model.signals(self._layer))

    @property
    def attn(self) -> AttentionView:
        return AttentionView(self.model, Part(self._layer, "attn"))

    @property
    def heads(self) -> Many[Head]:
        return self._many(self.model.n_heads(self._layer), Head)

    @property
    def groups(self) -> Many[Group]:
        return self._many(self.model.n_groups(self._layer), Group)

    @property
    def mlp(self) -> MLPView:
        return MLPView(self.model, Part(self._layer, "mlp"))

    @property
    def router(self) -> RouterView:
        self.model.require(Port("router.weights", self._layer))
        return RouterView(self.model, Part(self._layer, "router"))

    @property
    def experts(self) -> Many[Expert]:
        return self._many(self.model.n_experts(self._layer), Expert)

    resid_in: Port = _signal("resid_in", "The stream that enters the layer, [prompt, position, d_model].")
    resid_mid: Port = _signal(
        "resid_mid", "The stream between attention and MLP; blocks that run them side by side have none."
    )
    resid_out: Port = _signal("resid_out", "The stream that leaves the layer.")


class Embed(View):
    """The embedding: token, and where the family has them learned positions and scale."""

    out: Port = _signal("out", "What enters the first layer, [prompt, position, d_model].")

    @property
    def weight(self) -> Tensor:
        """Token embedding, [vocab, d_model]."""
        return rows(self.model.hf.get_input_embeddings())


class FinalNorm(View):
    """The norm before the unembedding."""

    out: Port = _signal("out", "The normalised final stream, [prompt, position, d_model].")


class Unembed(View):
    """The unembedding."""

    logits: Port = _signal("logits", "The model's logits, [prompt, position, vocab].")

    @property
    def weight(self) -> Tensor:
        """Unembedding rows, [vocab, d_model], without the final norm's gain."""
        return rows(self.model.hf.get_output_embeddings())


def _check_read(model: Model, layer: int, owner: str) -> None:
    """Refuse weights that the self-check found to be others than those that the model computes with."""
    found = getattr(model.__dict__.get("check"), "weights", {}).get((layer, owner))  # not there while the check runs
    if found:
        raise PatchbayError(
            f"weights of L{layer}.{owner} cannot be read: {found}. Signals can be tapped and edited; a family row that names "
            "how they lie (qkv, qkv_modules, mlp_up, mlp_gate) makes them readable: pb.load(model, family=patchbay.Family(...))"
        )
