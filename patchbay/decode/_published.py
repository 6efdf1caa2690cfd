"""The same loops for plain transformers users: `hf.generate(ids, custom_generate=pb.decode.NAME.generate, ...)`.

transformers hands a callable the model, the ids, its own processors and stopping criteria and the generation config; options of the
loop are found by the callable's signature. Logits are processed before a token is chosen. Edits of an enclosing `model.edited(...)`
hold. Prompts padded on the left are told by their attention mask. Returns ids [row, position], padded on the right, as transformers'
own loops do; what the Result of the method says beside them is not there.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from patchbay.decode._loop import Call, asked
from patchbay.decode._result import Draft
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError

Loop = Callable[..., list[list[Draft]]]
SEEN: weakref.WeakKeyDictionary[Any, Model] = weakref.WeakKeyDictionary()
PRIVATE = ("beside", "seen")  # options of loops that only their methods give


def view(hf: Any) -> Model:
    """The model of transformers behind our view, made once."""
    if hf not in SEEN:
        SEEN[hf] = Model(hf)
    return SEEN[hf]


def published(method: Callable[..., Any], loop: Loop, *, endless: bool = False, stops: bool = True) -> None:
    """Give a method `generate`, its loop as a `custom_generate` of transformers. `endless`: of texts of any length. `stops`: whether the loop
    asks stopping criteria, beside end tokens and the length."""
    name = method.__name__
    own = [p for p in inspect.signature(loop).parameters.values() if p.kind is p.KEYWORD_ONLY and p.name not in PRIVATE]

    def generate(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **given: Any,
    ) -> Tensor:
        options = {p.name: _seen(given.pop(p.name)) for p in own if p.name in given}
        config = generation_config if generation_config is not None else model.generation_config
        call = _call(view(model), input_ids, given.get("attention_mask"), config, name, endless)
        if logits_processor:
            call.law = lambda ids, logits: logits_processor(ids, logits).float()
        if stopping_criteria:
            _refuse_unheard(stopping_criteria, stops, name)
            call.stops = lambda ids: stopping_criteria(ids, None)
        drafts = loop(call, **options)
        return _padded(call, [several[0] for several in drafts], input_ids, config)

    taken = list(inspect.signature(generate).parameters.values())
    generate.__signature__ = inspect.Signature([*taken[:-1], *own, taken[-1]])  # type: ignore[attr-defined]
    generate.__name__ = generate.__qualname__ = f"{name}.generate"
    generate.__doc__ = (
        f"`pb.decode.{name}` as a `custom_generate` of transformers; see `patchbay/decode/_published.py`."
    )
    method.generate = generate  # type: ignore[attr-defined]


def _refuse_unheard(criteria: Any, stops: bool, name: str) -> None:
    """Raise PatchbayError for what would end a text in a loop that looks at end tokens and at the length alone."""
    other = [type(one).__name__ for one in criteria if not isinstance(one, (MaxLengthCriteria, EosTokenCriteria))]
    if other and not stops:
        raise PatchbayError(
            f"{name}: several texts stand beside one another, which end at end tokens and at their length; {', '.join(other)} would not be heard. "
            "Give eos_token_id, or cut the text afterwards"
        )


def _seen(option: Any) -> Any:
    """A second model of transformers behind our view; every other option as it is."""
    return view(option) if isinstance(option, torch.nn.Module) else option


def _call(model: Model, ids: Tensor, mask: Tensor | None, config: Any, name: str, endless: bool) -> Call:
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise PatchbayError(
            f"{name}: prompts of several lengths are padded on the left, and this mask has padding behind a token"
        )
    prompts = [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]
    longest = config.max_length if config.max_new_tokens is None else config.max_new_tokens + ids.shape[1]
    n_new = int(longest or 0) - ids.shape[1]
    if n_new < 1:
        raise PatchbayError(f"{name}: max_length={longest} leaves no room after prompts of {ids.shape[1]} tokens")
    ends = [] if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).flatten().tolist()
    return asked(model, prompts, n_new, ends, endless=endless)


def _padded(call: Call, drafts: Sequence[Draft], ids: Tensor, config: Any) -> Tensor:
    pad = config.pad_token_id if config.pad_token_id is not None else min(call.ends, default=0)
    width = max(len(one.tokens) for one in drafts)
    new = torch.full((len(ids), width), int(pad), dtype=ids.dtype, device=ids.device)
    for row, one in enumerate(drafts):
        new[row, : len(one.tokens)] = torch.tensor(one.tokens, dtype=ids.dtype)
    return torch.cat([ids, new], 1)
