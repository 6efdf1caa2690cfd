"""Model: any Hugging Face causal language model behind one view of its parts. Wrapped, never changed.

Its family row says where the parts are; a short run then proves it (`self_check.py`), or it is refused with the numbers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchbay.edits.edit import Edit
from patchbay.errors import by_kind
from patchbay.jacks.defaults import on_own_device
from patchbay.jacks.hooks import innermost
from patchbay.jacks.modelled import Dictionary
from patchbay.jacks.session import Session, warn_of_no_run
from patchbay.late import late
from patchbay.model import asked, chats, recalled, weights
from patchbay.model.attached import attach
from patchbay.model.families import FAMILIES, Family
from patchbay.model.fingerprint import version_of
from patchbay.model.generate import generate
from patchbay.model.given import flat_edits, flat_ports
from patchbay.model.linear import refuse_gradients, runs_on, width_in, width_out
from patchbay.model.placing import around, candidates, follow, layer_modules, scaled_logits, text_config
from patchbay.model.printed import Tokens, as_html, printed, tokens_of
from patchbay.model.proving import prove
from patchbay.model.regime import refuse_unrunnable, rope_regime
from patchbay.model.self_check import self_check
from patchbay.model.source import refuse_without_numbers, tokenizer_of
from patchbay.model.text import batch, encode, longest_prompt
from patchbay.model.tokens import decoded, token_id
from patchbay.model.view import Embed, FinalNorm, LayerView, Many, Ports, Unembed
from patchbay.signal.port import Part, PatchbayError, Port

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROVED = ["family", "modules", "around", "_signals", "_heads", "final_norm_module", "residual_scale", "scaling", "check"]  # fmt: skip
PROVING = threading.RLock()  # held by the thread that proves a model


class Model:
    """A causal language model as a set of parts with ports. Made by `pb.load`.

    `hf` is the lent model itself; `layers[i]` (with `.heads[h]`, `.groups[g]`, `.attn`, `.mlp.neurons[n]`, `.experts[e]`,
    `.router`), `embed`, `final_norm` and `unembed` are views of its parts; printing one shows its ports.
    """

    _heads: dict[int, tuple[int, int, int]]  # layer -> (heads, key/value groups, width of q and k)
    dictionaries: Mapping[tuple[int, str], Dictionary] = MappingProxyType({})  # see `with_dictionaries`

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: Any = None,
        *,
        family: Family | None = None,
        source: str = "",
        prove: bool = True,
    ) -> None:
        self.hf = hf
        self.source = source
        self._tokenizer = tokenizer
        self._fingerprint: tuple[tuple[Any, ...], str] | None = None
        self._loaded: recalled.Loaded | None = None  # by `load`, for what came from files
        self._given_family = family
        refuse_without_numbers(hf)
        if prove:
            self._prove()
        else:
            next(self._rows())  # refuses at once where no row fits the structure

    def _rows(self) -> Iterator[Family]:
        return candidates(self.hf, FAMILIES) if self._given_family is None else iter([self._given_family])

    def __getattr__(self, name: str) -> Any:
        """What the self-check establishes is not there before it: the first look at a part makes the check."""
        if name not in PROVED or "_given_family" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._prove()
        return self.__dict__[name]

    @on_own_device
    def _prove(self) -> None:
        """Prove a view of its own and take over what it found: of threads that look at once, one proves and none sees it begun."""
        with PROVING:
            if "check" in self.__dict__:
                return
            view = copy.copy(self)
            view._heads = {}
            prove(view, view._rows(), view._given_family is not None)
            self.__dict__.update({name: view.__dict__[name] for name in PROVED})

    def _adopt(self, family: Family) -> None:
        self.family = family
        layers = follow(self.hf, family.layers)
        if layers is None:
            raise PatchbayError(f"{type(self.hf).__name__} has no {family.layers}, which family {family.name!r} names")
        self.modules = [replace(layer_modules(family, layer, self.config), dtype=self.dtype) for layer in layers]
        self.around = around(self.hf, layers)
        self._signals = [at.signals() for at in self.modules]
        self.final_norm_module: nn.Module = follow(self.hf, family.final_norm)
        self.residual_scale = float(getattr(self.config, family.residual_scale or "_", None) or 1.0)
        self.scaling = self.config
        self.check = self_check(self)
        for i in self.check.apart:
            self.modules[i] = replace(self.modules[i], mlp_proj=None, mlp_up=None, mlp_gate=None)
            self._signals[i] = self.modules[i].signals()
        for i in self.check.missing:
            self._signals[i] = tuple(signal for signal in self._signals[i] if signal != "attn.head_out")

    # ---- shape ----

    @property
    def config(self) -> Any:
        """The text model's config."""
        return text_config(self.hf)

    @property
    def device(self) -> torch.device:
        return runs_on(self.hf.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.get_input_embeddings().weight.dtype

    @property
    def n_layers(self) -> int:
        return len(self.modules)

    @property
    def d_model(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return width_out(self.hf.get_output_embeddings())

    @property
    def max_positions(self) -> int | None:
        """Longest prompt that the model was made for, where its config says."""
        found = getattr(self.config, "max_position_embeddings", None)
        return int(found) if found else None

    @property
    def longest_prompt(self) -> int | None:
        """Longest prompt that is run: `max_positions`, or None where the model's positions go on past it."""
        return longest_prompt(self.config)

    def n_heads(self, layer: int) -> int:
        """Query heads of a layer; 0 where it has no attention."""
        if self.modules[layer].attn is None:
            return 0
        return self._heads[layer][0] if layer in self._heads else int(self.config.num_attention_heads)

    def n_groups(self, layer: int) -> int:
        """Key/value heads of a layer: as many as its attention receives."""
        return self._heads[layer][1] if self.modules[layer].attn is not None else 0

    def d_head(self, layer: int) -> int:
        """Width of a query and a key."""
        return self._heads[layer][2]

    def n_neurons(self, layer: int) -> int:
        at = self.modules[layer]
        return width_in(at.mlp_proj) if at.mlp_proj is not None else 0

    def n_experts(self, layer: int) -> int:
        experts = self.modules[layer].experts
        return 0 if experts is None else next(p.shape[0] for p in experts.parameters() if p.ndim == 3)

    def W_O(self, layer: int) -> Tensor:
        """Output weights of a layer's heads, [head, d_head, d_model]."""
        return weights.output_weights(self.modules[layer], self.n_heads(layer))

    @property
    def causal(self) -> bool:
        """Whether no token sees those after it. Of other models, prompts of different lengths run apart and nothing restarts."""
        return self.check.causal

    def regime(self, length: int) -> int:
        """Prompts of one regime may share a batch: see `regime.py`."""
        return length if not self.causal else rope_regime(self.hf, length)

    def check_mode(self) -> None:
        """Refuse to measure a model that changes at random, or that is not what was loaded: see `regime.py`."""
        refuse_unrunnable(self.hf, self.modules)

    # ---- parts and ports ----

    @cached_property
    def layers(self) -> Many[LayerView]:
        return Many(self.n_layers, lambda i: LayerView(self, Part(i, "layer")), "layer")

    @property
    def embed(self) -> Embed:
        return Embed(self, Part(None, "embed"))

    @property
    def final_norm(self) -> FinalNorm:
        return FinalNorm(self, Part(None, "final_norm"))

    @property
    def unembed(self) -> Unembed:
        return Unembed(self, Part(None, "unembed"))

    def signals(self, layer: int) -> tuple[str, ...]:
        """Signals that a layer offers."""
        if layer not in range(-self.n_layers, self.n_layers):
            raise PatchbayError(f"layer {layer!r}: the model has layers 0..{self.n_layers - 1}")
        return self._signals[layer]

    @property
    def ports(self) -> Ports:
        """Every whole signal that the model offers, in the order of the forward pass; a list, as are the ports of a part."""
        inside = [Port(signal, i) for i in range(self.n_layers) for signal in self.signals(i)]
        return Ports([Port("embed"), *inside, Port("final_norm"), Port("logits")])

    @property
    def logits(self) -> Port:
        """The port of the model's logits, [prompt, position, vocab]."""
        return Port("logits")

    def require(self, port: Port | str) -> None:
        """Raise PatchbayError unless the model offers this port, a Port or its text."""
        asked.require(self, port)

    def part(self, text: str) -> Part:
        """The part of that text, such as 'L3.H5', checked against this model."""
        return asked.part(self, text)

    def with_dictionaries(self, *dictionaries: Any) -> Model:
        """A view of this model that has the features of sparse dictionaries for parts: `L3.F12` (of the stream), `L3.mlp.F12`,
        `L3.attn.F12`, to tap, edit, sweep, ablate and turn; the weights are shared, and this model stays as it is. A layer takes one
        dictionary of each; `L3.F12` is also the one dictionary of whatever kind that layer 3 has. See `pb.load_dictionary`."""
        return attach(self, dictionaries)

    def card(self, part: Any, *, texts: Any = None, roles: bool = False, n: int = 10, **options: Any) -> Any:
        """All that can be said of a part, port or component ("L1.N5", "L4.E2", "L1.H2.C0"): ports, what it reads and writes as tokens;
        with `texts` (any iterable of texts, read as they come) the `n` tokens that excite it most, in context; with `roles` its
        rank in every finder of such parts. `options`: `seed`, `batch_size`, `progress`."""
        return late("card")(self, part, texts=texts, roles=roles, n=n, **options)

    def port(self, text: str) -> Port:
        """The port of that text, such as 'L3.H5.z'; keys and values of a query head are those of its group."""
        return asked.port(self, text)

    # ---- text ----

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that was given, or the one that lies beside the model (loaded when first used; False: none is looked for); None without one."""
        if self._tokenizer is None and self.source:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(**tokenizer_of(self.source))
            except (OSError, ValueError):
                self._tokenizer = False
        return self._tokenizer or None

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise PatchbayError(
                "text needs a tokenizer and this model came without: pb.load(model, tokenizer), or pass token ids"
            )
        return self.tokenizer

    def token_id(self, text: str) -> int:
        """The id of a text that is a single token that the tokenizer knows."""
        return token_id(self._need_tokenizer(), text)

    def roles_of(self, ids: Sequence[int], length: int | None = None) -> tuple[str | None, ...]:
        """The role whose words each token of a chat is, None for the template's own tokens. Known for chats that came as messages to
        this model; `ids` may be the first of the `length` tokens of one."""
        return chats.roles_of(self._need_tokenizer(), ids, len(ids) if length is None else length)

    def decode(self, ids: Any) -> str:
        return decoded(self._need_tokenizer(), ids)

    def encode(self, prompts: Any) -> list[list[int]]:
        """Token ids of prompts: a text, texts, ids, lists of ids, a tensor or array [prompt, position], a column of a table, what a
        tokenizer returns (without its padding), or a Task (its clean prompts).

        A list of messages, {"role": ..., "content": ...}, or several such lists go through the tokenizer's chat template, up
        to where the assistant speaks next. A text that begins with the start token gets no second one, and an end token that the
        tokenizer would append is left off. A warning tells of text that the tokenizer does not know.
        """
        return encode(self, prompts)

    def tokens(self, prompts: Any) -> Tokens:
        """The tokens of prompts as a table: position (also from the end, as edits and taps count), id and text."""
        return tokens_of(self, prompts)

    @on_own_device
    def batch(self, prompts: Any) -> tuple[Tensor, Tensor, bool]:
        """Token ids of prompts [prompt, position] on the model's device, 0 to the right of a shorter one, their lengths
        [prompt], and whether these differ."""
        self.check_mode()
        return batch(self, prompts)

    # ---- running ----

    @contextmanager
    def session(self, taps: Sequence[Port | str] = (), edits: Sequence[Edit] = (), **options: Any) -> Iterator[Session]:
        """Taps and edits on for the length of the block, after the edits of any enclosing `edited` block."""
        for at in self.modules:
            at.refuse_replaced()
        if options.get("grad"):
            refuse_gradients(self.hf, self.__dict__.setdefault("_differentiated", set()))
        with Session(self, flat_ports(taps, self), self.active_edits(edits), whole=True, **options) as session:
            yield session

    @property
    def _session(self) -> Session | None:
        """The session that is on here: of the `edited` blocks around the code that runs now."""
        scope = innermost(self.hf)
        return None if scope is None else scope.session

    def active_edits(self, edits: Sequence[Edit] = ()) -> list[Edit]:
        """The edits of the enclosing `edited` blocks, then these: what a run here and now is under."""
        session = self._session
        return [*(session.edits if session else ()), *edits]

    @contextmanager
    def edited(
        self, *edits: Any, strength: float | Sequence[float] | None = None, prompt_length: int | None = None
    ) -> Iterator[Model]:
        """Run under edits or knobs: `with model.edited(knob): ...`. Applies to everything that runs the model meanwhile,
        also to `model.hf(...)`. Several act in the order given, with a warning where that order matters; `strength` is
        one number for the knobs among them, or one for each. `prompt_length`: after how many tokens the prompt ends, where
        you call `model.hf` yourself and its tokens arrive in several calls."""
        with self.session(edits=flat_edits(edits, strength, self), prompt_length=prompt_length) as session:
            yield self
        warn_of_no_run(session)

    @property
    def touched(self) -> list[list[tuple[int, ...]]]:
        """Inside `edited`: for each of its edits, for each prompt of the latest batch, the positions where it was made, from that
        prompt's first call on, through chunks and generated tokens. Positions count in the prompt, whatever padding stands there."""
        return self._session.touched if self._session else []

    @by_kind
    @on_own_device
    def generate(
        self,
        prompts: Any,
        max_new_tokens: int | None = None,
        *,
        edits: Sequence[Any] = (),
        new_only: bool = False,
        **options: Any,
    ) -> Any:
        """Continue prompts, greedily where nothing else is asked, with the key/value cache, under edits if given.

        Text or chat messages in, text out (prompt and continuation); ids in, lists of ids out; `new_only` leaves the prompts off.
        Prompts of different lengths are run in groups of one length, which is exact, and a row that ends early is cut at its end
        token. `options` go to transformers' generate, as do those of `generation_config=` and of the model's own generation
        config, but for sampling, which is only done when this call asks for it; `max_new_tokens` is 20 where none of them
        says one. Those that cannot be met are refused by name. Positions of edits count in the prompt; new
        tokens are edited too where positions are all, an open slice, "generated" or a `Token`. Their signals: `pb.run`.
        """
        self.check_mode()
        return generate(self, prompts, max_new_tokens, edits=edits, new_only=new_only, **options)

    def unembed_logits(self, normed: Tensor) -> Tensor:
        """Logits of a normalised stream [..., d_model] -> [..., vocab], with the family's scale and soft cap."""
        head = self.hf.get_output_embeddings()
        floats = (
            head.weight.is_floating_point() and head.weight.element_size() > 1
        )  # of a stream kept in float32, as Mamba's is
        return self.scaled_logits(head(normed.to(head.weight.dtype) if floats else normed))

    def scaled_logits(self, logits: Tensor) -> Tensor:
        """The unembedding's raw output with the family's scale and soft cap."""
        return scaled_logits(self.scaling, logits)

    @property
    def fingerprint(self) -> str:
        """BLAKE3 of all weights, 16 hex digits, recomputed when one changes (`fingerprint.py`); kept for saved models (`recalled.py`)."""
        version = version_of(self.hf)
        if self._fingerprint is None or self._fingerprint[0] != version:
            self._fingerprint = (version, recalled.fingerprint(self.hf, version, self._loaded))
        return self._fingerprint[1]

    def __repr__(self) -> str:
        return printed(self)

    def _repr_html_(self) -> str:
        return as_html(self)
