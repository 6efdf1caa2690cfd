"""Generation: prompts continued by transformers' own generate, under edits, prompts of one length at a time.

Options count where transformers reads them: in the call, in its `generation_config=`, in the model's own generation config. A
prompt's continuation is what it is alone: a row that ends before others of its batch is cut where it ended.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchbay.edits.apply import for_prompts
from patchbay.edits.edit import Edit
from patchbay.model import text
from patchbay.model.given import by_length, flat_edits
from patchbay.signal.port import PatchbayError
from patchbay.signal.positions import Token

if TYPE_CHECKING:
    from patchbay.jacks.modelled import Modelled as Model

NEW_TOKENS = 20  # where nothing says how many
REFUSED = {
    "num_return_sequences": "one continuation is returned for each prompt: repeat the prompt instead",
    "return_dict_in_generate": "texts or ids are returned: pb.run(model, prompts, max_new_tokens=n) has every token's logits",
    "output_scores": "texts or ids are returned: pb.run(model, prompts, max_new_tokens=n) has every token's logits",
    "output_logits": "texts or ids are returned: pb.run(model, prompts, max_new_tokens=n) has every token's logits",
    "output_attentions": "texts or ids are returned: pb.run(model, prompts, max_new_tokens=n, taps=...) has every token's",
    "output_hidden_states": "texts or ids are returned: pb.run(model, prompts, max_new_tokens=n, taps=...) has every token's",
    "max_length": "say max_new_tokens, the number of new ones",
    "input_ids": "prompts say it",
    "inputs": "prompts say it",
    "inputs_embeds": "prompts are text or ids; edit the port embed to change what is embedded",
    "attention_mask": "prompts are run without padding, so none is needed",
    "position_ids": "prompts begin at position 0",
    "past_key_values": "every call begins with its prompts: give the whole text",
    "cache": "every call begins with its prompts: give the whole text",
    "negative_prompt_ids": "a second prompt would be run as rows of the same batch, under the same edits",
    "negative_prompt_attention_mask": "a second prompt would be run as rows of the same batch, under the same edits",
    "guidance_scale": "a second prompt would be run beside each, under the same edits",
    "custom_generate": "code of others that runs the model as it likes",
    "token_healing": "it changes the prompt's own tokens, at which edits count",
}
"""Options of transformers' generate that are not taken, and what to do instead."""
HARMLESS = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "max_length",
)
"""Those of them that in a model's own config change nothing of the texts or ids that are returned here."""
ALONE = ("stop_strings", "stopping_criteria", "assistant_model", "prompt_lookup_num_tokens", "use_mtp")
"""Options under which each prompt runs by itself: transformers takes one, or a row goes on after it has ended."""


@torch.no_grad()
def generate(
    model: Model,
    prompts: Any,
    max_new_tokens: int | None = None,
    *,
    edits: Sequence[Any] = (),
    new_only: bool = False,
    **options: Any,
) -> Any:
    """What `Model.generate` documents."""
    given = text.read(model, prompts)
    grown = continued(model, given.ids, max_new_tokens, flat_edits(edits, model=model), options)
    return returned(model, given, grown.rows, new_only)


@dataclass(frozen=True)
class Continued:
    """Prompts and their continuations as ids; where asked, the logits that each new token was chosen from [token, vocab]."""

    rows: list[list[int]]
    logits: list[Tensor]


@torch.no_grad()
def continued(
    model: Model,
    prompts: Sequence[list[int]],
    max_new_tokens: int | None,
    changes: Sequence[Edit],
    options: dict[str, Any],
    *,
    logits: bool = False,
) -> Continued:
    """Prompts, as ids, continued under edits; with `logits`, also what the tokens were chosen from, before all processing."""
    asked = Asked(model, options)
    n_new = asked.read("max_new_tokens") if max_new_tokens is None else max_new_tokens
    n_new = NEW_TOKENS if n_new is None else int(n_new)
    _check_length(model, max(map(len, prompts)), n_new)
    asked.check(model.active_edits(changes))
    together = groups(prompts, asked.alone)
    outer = next((edit for edit in model.active_edits() if edit.by_row), None)
    if outer is not None and len(together) > 1:
        raise PatchbayError(
            f"{outer} is on for a batch that is run whole, and these prompts are continued in {len(together)} batches: "
            "give it as edits= of this call"
        )
    out: list[list[int]] = [[] for _ in prompts]
    seen: list[Tensor] = [torch.empty(0)] * len(prompts)
    for members in together:
        length = len(prompts[members[0]])
        ids = torch.tensor([prompts[i] for i in members], device=model.device)
        shares = (for_prompts(edit, members, len(prompts), length + n_new) for edit in changes)
        more = asked.options(model, n_new, members) | ({"return_dict_in_generate": True} if logits else {})
        more |= {"output_logits": True} if logits else {}
        with model.session(edits=[share for share in shares if share is not None], prompt_length=length):
            grown = model.hf.generate(ids, attention_mask=torch.ones_like(ids), **more)
        rows = grown.sequences if logits else grown
        for at, (i, row) in enumerate(zip(members, rows.tolist(), strict=True)):
            out[i] = ended(row, length, asked.ends)
            if logits:
                seen[i] = _chosen_from(grown, at, len(out[i]) - length)
    return Continued(out, seen)


def refuse_no_numbers(logits: Tensor, of: Sequence[int]) -> None:
    """Raise PatchbayError where logits [row, ..., vocab], of rows of the prompts at `of`, are NaN or infinite: no token can be chosen from them."""
    usable = logits < math.inf  # NaN is not; -inf bars a token
    if not bool(usable.all()):
        row = int((~usable).flatten(1).any(1).nonzero()[0])
        raise PatchbayError(
            f"prompt {of[row]}: the model gives logits that are no numbers (NaN or infinite), so no token can be chosen from them; turn a knob "
            "less far, or load the model in a dtype of more range, such as float32"
        )


class _Numbers:
    """A processor of transformers' generate that changes nothing and refuses logits that are no numbers; rows are those of `members`."""

    def __init__(self, members: Sequence[int]) -> None:
        self.members = members

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        each = max(1, len(scores) // len(self.members))  # beams of a prompt stand together
        refuse_no_numbers(scores, [member for member in self.members for _ in range(each)])
        return scores


def _chosen_from(grown: Any, row: int, n_new: int) -> Tensor:
    """The logits of a row's new tokens [token, vocab]: its own, or those of the beams that it went through."""
    beams = getattr(grown, "beam_indices", None)
    places = [row] * n_new if beams is None else beams[row, :n_new].tolist()
    return torch.stack([step[place] for step, place in zip(grown.logits, places, strict=False)])


def check_agreement(whole: Tensor, starts: Tensor, chosen_from: Sequence[Tensor]) -> None:
    """Raise PatchbayError unless the run over finished texts, logits `whole` [prompt, position, vocab], has the logits that each
    generated token was chosen from: root mean square difference over their spread, within what rounding does."""
    for i, (start, seen) in enumerate(zip(starts.tolist(), chosen_from, strict=True)):
        here = whole[i, start - 1 : start - 1 + len(seen)].detach().to(seen.device, torch.float64)
        seen = seen[: len(here)].double()
        ordinary = seen.isfinite() & here.isfinite()
        gap = (here - seen)[ordinary].square().mean().sqrt() / seen[ordinary].std().clamp(min=1e-30)
        allowed = (
            1e-3 if whole.dtype in (torch.float32, torch.float64) else 0.25
        )  # rounding may move a choice of experts
        if float(gap) > allowed:
            raise PatchbayError(
                f"the generated tokens of prompt {i} were chosen from logits that one run over the finished text does not give "
                f"({float(gap):.1e} of their spread away): with its cache this model computes something else (rotary positions "
                "that depend on the length, code that ignores the cache), so no single trace is of both. Trace the text with "
                "pb.run(model, ids), without max_new_tokens"
            )


def returned(model: Model, given: text.Prompts, rows: Sequence[list[int]], new_only: bool = False) -> Any:
    """Continued prompts in the form that they came in: text or ids, one or a list; of `new_only` without the prompts."""
    if given.text:
        said = [_said(model, ids, row, new_only) for ids, row in zip(given.ids, rows, strict=True)]
        return said[0] if given.single else said
    found = [row[len(ids) :] if new_only else row for ids, row in zip(given.ids, rows, strict=True)]
    return found[0] if given.single else found


def _said(model: Model, prompt: list[int], row: list[int], new_only: bool) -> str:
    """The text of a row; of its new tokens as they stand after the prompt, since some tokenizers spell a beginning apart."""
    tokenizer = model._need_tokenizer()
    whole = str(tokenizer.decode(row, skip_special_tokens=True))
    if not new_only:
        return whole
    before = str(tokenizer.decode(prompt, skip_special_tokens=True))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(row[len(prompt) :], skip_special_tokens=True))


def groups(prompts: Sequence[list[int]], alone: bool) -> list[list[int]]:
    """Places of prompts that run as one batch: those of one length, or each by itself."""
    if alone:
        return [[i] for i in range(len(prompts))]
    return by_length(prompts)


def ended(row: list[int], length: int, ends: set[int]) -> list[int]:
    """A row up to the first end token after its prompt: what follows is padding."""
    end = next((at for at in range(length, len(row)) if row[at] in ends), len(row) - 1)
    return row[: end + 1]


def _check_length(model: Model, length: int, n_new: int) -> None:
    if n_new < 1:
        raise PatchbayError(f"max_new_tokens={n_new}: one or more")
    if model.longest_prompt is not None and length + n_new > model.longest_prompt:
        raise PatchbayError(
            f"{n_new} new tokens asked after a prompt of {length}: the model takes {model.longest_prompt} in all"
        )


class Asked:
    """Options of one call, read where transformers reads them: the call, its generation_config, the model's own."""

    def __init__(self, model: Model, options: dict[str, Any]) -> None:
        self.given = options
        self.configs = (options.get("generation_config"), getattr(model.hf, "generation_config", None))

    def read(self, name: str) -> Any:
        """The value in force, None where nothing says one."""
        if self.given.get(name) is not None:
            return self.given[name]
        return next((value for config in self.configs if (value := getattr(config, name, None)) is not None), None)

    @property
    def alone(self) -> bool:
        return any(self.read(name) for name in ALONE)

    @property
    def ends(self) -> set[int]:
        """Tokens that end a row."""
        found = self.read("eos_token_id")
        if found is None:
            return set()
        return set(torch.as_tensor(found).flatten().tolist())

    def check(self, edits: Sequence[Edit]) -> None:
        """Refuse options that would go unheard, and those under which rows are no longer those that were meant."""
        for name, instead in REFUSED.items():
            value = self._called(name) if name in HARMLESS else self.read(name)
            if isinstance(value, torch.Tensor) or value not in (None, False, 1):
                raise PatchbayError(f"{name}={_short(value)}: Model.generate does not take it; {instead}")
        moved = next((edit for edit in edits if edit.by_row or isinstance(edit.positions, Token)), None)
        if (self.read("num_beams") or 1) > 1 and moved is not None:
            raise PatchbayError(
                f"{moved}: beam search (num_beams={self.read('num_beams')}) reorders the batch, so edits by row or by token do "
                "not hold there"
            )

    def _called(self, name: str) -> Any:
        """What the call itself says, in an option or its generation_config."""
        return self.given[name] if self.given.get(name) is not None else getattr(self.configs[0], name, None)

    def options(self, model: Model, n_new: int, members: Sequence[int]) -> dict[str, Any]:
        """What transformers' generate is called with for these prompts: greedy where the call does not say else."""
        filled: dict[str, Any] = {"max_new_tokens": n_new, "return_dict_in_generate": False}
        if self._called("do_sample") is None:
            filled["do_sample"] = False
        if self.read("pad_token_id") is None:
            filled["pad_token_id"] = min(self.ends, default=0)
        filled = self.given | filled
        filled["logits_processor"] = [_Numbers(members), *(filled.get("logits_processor") or [])]
        if self.read("stop_strings") and "tokenizer" not in filled:
            filled["tokenizer"] = model._need_tokenizer()
        allowed = filled.get("prefix_allowed_tokens_fn")
        if allowed is not None:  # asked by the place among all prompts
            filled["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(members[row], ids)
        if self.configs[0] is not None:  # one place for all that a config can say
            config = copy.deepcopy(filled.pop("generation_config"))
            filled = config.update(**filled) | {"generation_config": config}
        return filled


def _short(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:40]
