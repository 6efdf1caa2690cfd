"""Build: a Hugging Face model of any config, with other blocks in the places of its own; it trains, saves and loads like any other.

    hf = pb.blocks.build(LlamaConfig(...), attention="sigmoid")        # new weights
    hf = pb.blocks.build(model, convolution=3)                        # a copy, its own weights kept where they still have a place
    hf.save_pretrained(folder);  model = pb.load(folder)

What was asked stands in the config as `blocks`, under a model type of its own (`blocks_llama` for a Llama): the class is made from the family's own and registered by that name, so that no code
comes with a checkpoint, and a program that does not know the name refuses the folder in place of reading it as a plain Llama. `register("llama")` makes the name known to
transformers' Auto classes in a process that builds nothing; `pb.load` does so by itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from patchbay.blocks import dispatch, kinds, lexinvariant
from patchbay.blocks.dispatch import NAME
from patchbay.blocks.host import Asked
from patchbay.blocks.installed import BLOCKS, install
from patchbay.errors import PatchbayError
from patchbay.jacks.patterns import of_transformers
from patchbay.signal.port import suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "blocks_"


def build(model: Any, **blocks: Any) -> PreTrainedModel:
    """A model of a config with other blocks, in evaluation mode; of a model, one that keeps its weights where they still have a place.

    `attention`: "softmax1", "k_bias", "kv_bias", "sigmoid", "normalised_sigmoid", or a table with `kind` and `bias` (of the sigmoids), or a list of these by layer
    with "softmax" for the family's own. `mixer`: "gla", "h3", "lssl", a table of "gla" with `decay` (False is linear attention), or a list by layer with "attention" for the family's own. `convolution`: the width of
    a causal convolution of queries, keys and values. `turned`: True, or {"bend": False} for phases alone. `monet`: a table of experts, heads, keep, width and form, {} for the defaults, in the place of every
    MLP. `feedforward`: a table with `kind` "low_rank", "block_dense" or "block_shuffle", `rank`, `blocks`, `guided`. `abs_topk`: how many neurons may write at a token. `ranks`: of a model, what `welore.ranks`
    makes of it. `gate`: True, or its bias. `meta_tokens`: a table of `id`, `layers`, `masked`. `lexinvariant`: True. `ngram`: how many last tokens, or a list of these. New weights are drawn from torch's
    global random state, as transformers' are.
    """
    if not isinstance(model, PretrainedConfig | nn.Module) or not isinstance(
        config := getattr(model, "config", model), PretrainedConfig
    ):
        inside = ": give its model.hf" if hasattr(model, "hf") else ""
        raise PatchbayError(f"build takes a Hugging Face config or model, got {type(model).__name__}{inside}")
    asked = _checked(blocks)
    base_type = str(config.model_type)
    if base_type.startswith(PREFIX):
        raise PatchbayError(
            f"{base_type} has blocks already ({', '.join(config.blocks)}): name all of them in one call on the plain config"
        )
    known = register(base_type)
    given = {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("model_type", "architectures", "transformers_version")
    }
    made = known[0](**given, blocks=asked)
    if (named := config._attn_implementation_internal) is not None:
        made._attn_implementation = named
    if not isinstance(model, nn.Module):
        return known[1](made).eval()  # type: ignore[no-any-return]
    return _with_its_own(known[1](made, _start(model)), model).eval()


def _start(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's numbers, by name."""
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if away := [name for name, value in start.items() if value.is_meta]:
        raise PatchbayError(f"build copies weights, and {len(away)} of this model lie elsewhere (first {away[0]})")
    return start


def _take(hf: Any, start: dict[str, Tensor]) -> None:
    """Let the model have these numbers, in their own dtypes; all of them, and no others."""
    if odd := sorted(set(start) ^ set(hf.state_dict())):
        raise PatchbayError(
            f"build keeps weights by their names, and {len(odd)} names differ between the model that was given and a plain {type(hf).__bases__[0].__name__} "
            f"(first {odd[0]}): give that model itself, with its unembedding, not compiled (model._orig_mod), adapters merged (model.merge_and_unload()), not quantised"
        )
    hf.load_state_dict(start, assign=True)


def _with_its_own(hf: Any, model: Any) -> Any:
    """The model's device, its dtype for what is new, and what no checkpoint holds: buffers such as rotary frequencies, and how it generates."""
    kept = {value.data_ptr() for value in hf.started}
    del hf.started
    for new in (*hf.parameters(), *(one for name, one in hf.named_buffers() if name in hf.state_dict())):
        if new.is_floating_point() and new.data_ptr() not in kept:
            new.data = new.data.to(model.dtype)
    hf = hf.to(device=model.device)
    here = dict(hf.named_buffers())
    for name, buffer in model.named_buffers():
        if name in here and here[name].shape == buffer.shape:
            here[name].data = buffer.detach().clone()
    if (generation := getattr(model, "generation_config", None)) is not None:
        hf.generation_config = copy.deepcopy(generation)
    return hf


def register(base_type: str = "llama") -> tuple[Any, Any]:
    """Make the class of a family's models with blocks known to transformers by name; returns its config and model class."""
    kinds.register()
    dispatch.register()
    return _classes(base_type)


def known(config: dict[str, Any], attention: str | None = None) -> None:
    """Register what a checkpoint's config, or a named attention, needs before transformers reads it."""
    base_type = str(config.get("model_type", ""))
    if base_type.startswith(PREFIX):
        register(base_type.removeprefix(PREFIX))
        _checked(config.get("blocks") or {})
    elif attention in kinds.FREE:
        kinds.register()


@functools.cache
def _classes(base_type: str) -> tuple[Any, Any]:
    try:
        base_config = AutoConfig.for_model(base_type).__class__
        base_model = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    except (ValueError, KeyError) as error:
        raise PatchbayError(
            f"no causal language model of type {base_type!r} in transformers to put blocks into"
        ) from error
    config = type(f"Blocks{base_config.__name__}", (base_config,), {"model_type": PREFIX + base_type, "blocks": None})
    body = {
        "config_class": config,
        "__init__": _init(base_model),
        "forward": _forward(base_model),
        "_init_weights": _reset(base_model),
    }
    made = type(
        f"Blocks{base_model.__name__}",
        (base_model,),
        {**body, "__module__": base_model.__module__, "generate": _generate(base_model)},
    )
    AutoConfig.register(PREFIX + base_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, made, exist_ok=True)
    return config, made


def _init(base: Any) -> Callable[..., None]:
    def init(self: Any, config: Any, start: dict[str, Tensor] | None = None) -> None:
        base.__init__(self, config)
        if start is not None:
            _take(self, start)
            self.started = list(start.values())
        self.asked = install(self, base.config_class.model_type, config.blocks or {}, kept=start is not None)
        self.post_init()
        if self.asked.dispatched:
            named = self.config._attn_implementation
            if self.asked.plain and named != NAME and not of_transformers(named):
                raise PatchbayError(
                    f"attention {named!r} was named for the model, and layers {', '.join(map(str, self.asked.plain))} would attend by a softmax: "
                    "load it without, and name a kind for each layer (attention=[...])"
                )
            self.config._attn_implementation = NAME
        inner: Any = self.base_model
        kind: Any = type(inner)
        inner.asked, inner.__class__ = self.asked, _inner(kind)

    return init


@functools.cache
def _inner(base: Any) -> Any:
    """The class of the model without its unembedding, which refuses what its blocks cannot be given, whoever calls it."""
    return type(base.__name__, (base,), {"forward": _within(base), "__module__": base.__module__})


def _within(base: Any) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, input_ids: Tensor | None = None, *more: Any, **options: Any) -> Any:
        asked: Asked = self.asked
        named = str(self.config._attn_implementation)
        if asked.dispatched and not named.endswith(NAME):
            raise PatchbayError(
                f"attention {named!r} was named for a model whose blocks are {', '.join(self.config.blocks)}: it would compute a plain softmax. Its attention "
                f"is {NAME!r}; build a plain model for the softmax"
            )
        if asked.whole:
            if more:
                raise PatchbayError(f"{', '.join(asked.whole)}: give masks and caches by their names")
            refuse_pieces(asked, options.get("attention_mask"), options)
            options["use_cache"], options["past_key_values"] = False, None
        if asked.ids and input_ids is None:
            raise PatchbayError(
                f"{', '.join(asked.ids)}: what came before is read off input_ids; embeddings alone do not say"
            )
        if asked.meta is not None:
            if input_ids is None:
                raise PatchbayError(
                    "meta_tokens: where the token stands is read off input_ids; embeddings alone do not say"
                )
            options["meta"] = input_ids == asked.meta
        return base.forward(self, input_ids, *more, **options)

    return forward


def _reset(base: Any) -> Callable[..., None]:
    def _init_weights(self: Any, module: nn.Module) -> None:
        if callable(getattr(module, "reset_block", None)):
            module.reset_block(self.config)  # type: ignore[operator]
        else:
            base._init_weights(self, module)

    return _init_weights


def _forward(base: Any) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(
        self: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> Any:
        if self.asked.drawn and self.training and input_ids is not None:
            return _drawn(self, input_ids, attention_mask, options)
        return base.forward(self, input_ids, attention_mask=attention_mask, **options)

    return forward


def _drawn(hf: Any, ids: Tensor, mask: Tensor | None, options: dict[str, Any]) -> CausalLMOutputWithPast:
    """A training step under a fresh table for each text."""
    labels = options.pop("labels", None)
    keep = {name: options[name] for name in ("position_ids", "use_cache") if name in options}
    weight = hf.get_input_embeddings().weight
    drawn = lexinvariant.fresh(len(ids), weight.shape[0], weight.shape[1], weight)
    made = lexinvariant.logits(hf, ids, drawn, attention_mask=mask, **keep)
    counted = {"num_items_in_batch": options["num_items_in_batch"]} if "num_items_in_batch" in options else {}
    loss = None if labels is None else hf.loss_function(logits=made, labels=labels, vocab_size=len(weight), **counted)
    return CausalLMOutputWithPast(loss=loss, logits=made)


def _generate(base: Any) -> Callable[..., Any]:
    @functools.wraps(base.generate)
    def generate(self: Any, *args: Any, **options: Any) -> Any:
        if self.asked.whole:
            options["use_cache"] = False
        return base.generate(self, *args, **options)

    return generate


def refuse_pieces(asked: Asked, mask: Tensor | None, options: dict[str, Any]) -> None:
    """Raise PatchbayError where a text comes in pieces to blocks that need it whole: a filled cache, padding on the left, several texts in one row, or a mask that says
    more than where texts end."""
    names, cache, places = ", ".join(asked.whole), options.get("past_key_values"), options.get("position_ids")
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise PatchbayError(
            f"{names}: a token depends on earlier ones in more than keys and values, which a cache does not hold; run the text whole (use_cache=False)"
        )
    if mask is not None and mask.ndim == 2 and bool(((mask[:, 1:] != 0) & (mask[:, :-1] == 0)).any()):
        raise PatchbayError(
            f"{names}: padding on the left would be read as the text's beginning; pad on the right, or run texts of one length together"
        )
    anew = mask is None and places is not None and bool((places.diff(dim=-1) != 1).any())
    if anew or options.get("cu_seq_lens_q") is not None:
        raise PatchbayError(
            f"{names}: position_ids begin anew inside a row, and a token would be given those of the text before; one text a row"
        )
    if mask is not None and mask.ndim == 4 and (asked.mixes or _hides_the_last(mask)):
        raise PatchbayError(
            f"{names}: a mask of four axes says who sees whom, which {'a mixer does not ask' if asked.mixes else 'is not what a convolution asks where the token before is hidden'}"
        )


def _hides_the_last(mask: Tensor) -> bool:
    """Whether a token does not see the one before it."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool((~seen.diagonal(-1, -2, -1)).any())


def _checked(blocks: dict[str, Any]) -> dict[str, Any]:
    """The blocks that were asked for, those that are None or False left out."""
    for name in blocks:
        if name not in BLOCKS:
            raise PatchbayError(f"no block {name!r}; blocks are {', '.join(BLOCKS)}" + suggest(name, list(BLOCKS)))
    asked = {name: value for name, value in blocks.items() if value is not None and value is not False}
    if not asked:
        raise PatchbayError(f"build needs a block: {', '.join(BLOCKS)}")
    if clash := "lexinvariant" in asked and [name for name in ("ngram", "meta_tokens") if name in asked]:
        raise PatchbayError(
            f"lexinvariant beside {', '.join(clash)}: a text trains on embeddings of its own, and {clash[0]} reads ids"
        )
    return asked
