"""inspect_ai: its evaluations on a model under a knob (`--model patchbay/NAME -M knob=x.knob@2`), and its samples as items of meters.

Found by inspect through its entry point. One request runs at a time: a knob is the model's. Messages go through the tokenizer's chat template; without
one a single user message is its text, and a conversation is refused. With `prompt_logprobs` the log-probability of every token of the prompt
but the first is returned. A text is greedy, or with `temperature` drawn: of one seed alike, without a seed anew at each epoch. What a request asks beyond that is refused by name. `get_model` keeps models by their arguments and takes Python objects for equal: give a knob as a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from patchbay.measure._harness import Turned, lacking, new_text
from patchbay.measure._runs import token_logprobs
from patchbay.results.method import seeded
from patchbay.signal.port import PatchbayError

try:
    from inspect_ai import model as _model
except ModuleNotFoundError as error:
    raise lacking("inspect", error) from error

UNHEARD = ("frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "response_schema", "modalities", "extra_body")  # fmt: skip


class PatchbayAPI(_model.ModelAPI):  # type: ignore[misc,name-defined]
    """A model behind Patchbay, under a knob or none, as a provider of inspect."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: Any = None,
        **model_args: Any,
    ) -> None:
        """`model_name`: a name or path; `patchbay_model`: a Model in its place; `knob`: a Knob, or x.knob@2, a file and a strength."""
        super().__init__(model_name, base_url, api_key, [], config or _model.GenerateConfig())
        knob, given = model_args.pop("knob", None), model_args.pop("patchbay_model", None)
        if model_args:
            raise PatchbayError(
                f"model arguments {', '.join(model_args)}: not taken; possible are knob and patchbay_model"
            )
        self.turned = Turned(model_name if given is None else given, knob)
        self.drawn: Counter[tuple[int, ...]] = Counter()  # how often each prompt was drawn after without a seed

    def max_connections(self) -> int:
        """One request at a time."""
        return 1

    async def generate(self, input: list[Any], tools: list[Any], tool_choice: Any, config: Any) -> Any:
        """What the model writes after the messages."""
        if tools:
            raise PatchbayError("tools are not called by this provider")
        model = self.turned.model
        [ids] = model.encode([prompt_of(model, input)])
        n = 64 if config.max_tokens is None else int(config.max_tokens)
        _refuse_unheard(config)
        sample = config.temperature is not None and config.temperature > 0
        how: dict[str, Any] = {"do_sample": True, "temperature": float(config.temperature), "top_p": float(config.top_p or 1.0), "top_k": int(config.top_k or 0)} if sample else {"do_sample": False}  # fmt: skip
        seed = config.seed
        if seed is None and sample:  # the next epoch of a sample is another draw
            seed, self.drawn[tuple(ids)] = self.drawn[tuple(ids)], self.drawn[tuple(ids)] + 1
        with self.turned.on(), seeded(int(seed or 0)):
            [row] = model.generate([ids], n, **how)
        text = new_text(model, ids, row)
        stops = [end for end in config.stop_seqs or [] if end in text]
        text = text[: min(map(text.index, stops))] if stops else text
        own = torch.as_tensor(model.hf.generation_config.eos_token_id or []).flatten().tolist()
        cut = not stops and len(row) - len(ids) == n and row[-1] not in own
        output = _model.ModelOutput.from_content(self.model_name, text, "max_tokens" if cut else "stop")
        output.usage = _model.ModelUsage(
            input_tokens=len(ids), output_tokens=len(row) - len(ids), total_tokens=len(row)
        )
        if getattr(config, "prompt_logprobs", None):
            output.choices[0].prompt_logprobs = self._prompt_logprobs(ids)
        return output

    def _prompt_logprobs(self, ids: Sequence[int]) -> Any:
        with self.turned.on() as model:
            [values] = token_logprobs(model, [list(ids)])
        content = [
            _model.Logprob(token=model.decode([token]), logprob=float(x))
            for token, x in zip(ids[1:], values, strict=True)
        ]
        return _model.Logprobs(content=content)

    async def tokenize(self, text: str) -> list[int]:
        """Ids of a text."""
        return list(self.turned.model.encode([text])[0])


def _refuse_unheard(config: Any) -> None:
    """Raise PatchbayError for what a request asks of a text, or of what is said beside it, and would not get."""
    lost = [name for name in UNHEARD if getattr(config, name, None) not in (None, False, 0, 0.0)]
    lost += [name for name in ("num_choices", "best_of") if (getattr(config, name, None) or 1) > 1]
    if config.temperature is None:
        lost += [
            f"{name} without temperature" for name in ("top_p", "top_k") if getattr(config, name, None) is not None
        ]
    if lost:
        raise PatchbayError(
            f"{', '.join(lost)}: not heard by this provider, which writes one greedy text, or with temperature= one that is drawn (top_p, top_k, seed)"
        )


def prompt_of(model: Any, messages: Sequence[Any]) -> Any:
    """Messages as the tokenizer's chat template writes them; a single user message as its text where there is none."""
    told = [{"role": str(one.role), "content": str(one.text)} for one in messages]
    if getattr(model.tokenizer, "chat_template", None):
        from patchbay.model.tokens import as_texts

        return as_texts(model.tokenizer, [told])[0]
    if len(told) != 1 or told[0]["role"] != "user":
        roles = ", ".join(one["role"] for one in told)
        raise PatchbayError(
            f"messages of {roles} need a chat template, and this tokenizer has none: ask with one user message, or set tokenizer.chat_template"
        )
    return told[0]["content"]


@_model.modelapi(name="patchbay")  # type: ignore[untyped-decorator]
def patchbay() -> type[PatchbayAPI]:
    """The provider, as inspect finds it."""
    return PatchbayAPI


def items(samples: Sequence[Any]) -> list[dict[str, Any]]:
    """Samples of an inspect dataset as items of our meters: prompt, choices, answer."""
    found = []
    for i, sample in enumerate(samples):
        if not isinstance(sample.input, str):
            raise PatchbayError(f"sample {sample.id or i} is a conversation: meters take texts")
        choices = list(sample.choices or [])
        target = sample.target[0] if isinstance(sample.target, list) and sample.target else sample.target
        row: dict[str, Any] = {"prompt": sample.input, "choices": [f" {choice}" for choice in choices]}
        letter = (
            isinstance(target, str)
            and len(target) == 1
            and target.isupper()
            and ord(target) - 65 < len(choices)
            and target not in choices
        )
        if target in choices or letter:
            row["answer"] = choices.index(target) if target in choices else ord(str(target)) - 65
        found.append(row | {"id": sample.id})
    return found
