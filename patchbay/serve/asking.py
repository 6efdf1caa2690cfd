"""What a client asks: the bodies of OpenAI's completions and chat completions, read field by field.

Every field is understood, or refused by its name; none is dropped. Fields that change nothing here are taken at the values at which
they change nothing anywhere. Beside OpenAI's own there are `top_k`, `min_p` and

    "patchbay": {"knobs": [{"name": "context", "strength": 2}]}

the same knobs as in the model's name, `tiny+context@2`; where both name some, those of the name come first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from patchbay.errors import suggest
from patchbay.serve.guard import Refusal

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, MOST_LOGPROBS, MOST_KNOBS = 16, 64, 16, 20, 16
COMPLETION_TOKENS = (
    16  # OpenAI's own default for completions; a chat without a number ends with the model's window or the server's
)
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # by which a client names a request to itself
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Fields of OpenAI's that are taken only where they ask for nothing."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits. `bias`: added to tokens' logits; penalties as OpenAI defines them, over what was generated."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token of the model's own law is taken."""
        return self.temperature == 0 and not (self.presence or self.frequency or self.bias)


@dataclass(frozen=True)
class Asked:
    """One request, understood. `prompts`: texts, or lists of token ids; of a chat one list of messages. `logprobs`: how many
    alternatives are told, None for no log-probabilities at all. `n_new` None: as many as fit."""

    model: str
    chat: bool
    prompts: list[Any]
    sampling: Sampling
    n: int = 1
    n_new: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    usage: bool = False
    knobs: tuple[tuple[str, float | None], ...] = field(default=())


class Fields:
    """The fields of a body that are still to be read."""

    def __init__(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise Refusal(400, "the body is a JSON object")
        self.left = dict(body)
        self.known = list(NEUTRAL) + list(LABELS)

    def take(self, name: str, default: Any = None) -> Any:
        self.known.append(name)
        found = self.left.pop(name, None)
        return default if found is None else found

    def number(self, name: str, default: Any, low: float, high: float, *, whole: bool = False) -> Any:
        found = self.take(name, default)
        if found is None:
            return None
        kinds = (int,) if whole else (int, float)
        if isinstance(found, bool) or not isinstance(found, kinds) or not low <= found <= high:
            kind = "a whole number" if whole else "a number"
            raise wrong(name, found, f"{kind} from {low:g} to {high:g}")
        return found

    def flag(self, name: str) -> bool:
        found = self.take(name, False)
        if not isinstance(found, bool):
            raise wrong(name, found, "true or false")
        return found

    def done(self) -> None:
        """Refuse what was not read, by its name."""
        for name in LABELS:
            self.left.pop(name, None)
        for name, values in NEUTRAL.items():
            if name in self.left:
                found = self.left.pop(name)
                if not any(found == value and type(found) is type(value) for value in values):
                    raise Refusal(400, f"{name} is not done here; leave it out", about=name, code="unsupported")
        for name in self.left:
            raise Refusal(
                400,
                f"there is no field {name[:60]!r}{suggest(name[:60], self.known)}",
                about=name[:60],
                code="unknown_field",
            )


def wrong(name: str, found: Any, possible: str) -> Refusal:
    shown = repr(found)
    return Refusal(
        400,
        f"{name} is {possible}, got {shown if len(shown) <= 60 else shown[:57] + '...'}",
        about=name,
        code="invalid_value",
    )


def completion(body: Any) -> Asked:
    """A body of /v1/completions."""
    fields = Fields(body)
    prompts = _prompts(fields.take("prompt"))
    n = fields.number("n", 1, 1, MOST_CHOICES, whole=True)
    if fields.number("best_of", n, 1, MOST_CHOICES, whole=True) != n:
        raise Refusal(400, "best_of other than n is not done here; leave it out", about="best_of", code="unsupported")
    asked = _common(
        fields,
        chat=False,
        prompts=prompts,
        n=n,
        n_new=fields.number("max_tokens", COMPLETION_TOKENS, 0, 10**9, whole=True),
        logprobs=fields.number("logprobs", None, 0, MOST_LOGPROBS, whole=True),
        echo=fields.flag("echo"),
    )
    if asked.n_new == 0 and not asked.echo:
        raise Refusal(
            400, "max_tokens 0 is for echo: true, which tells of the prompt", about="max_tokens", code="invalid_value"
        )
    return asked


def chat(body: Any) -> Asked:
    """A body of /v1/chat/completions."""
    fields = Fields(body)
    messages = _messages(fields.take("messages"))
    counts = [fields.number(name, None, 1, 10**9, whole=True) for name in ("max_completion_tokens", "max_tokens")]
    given = {count for count in counts if count is not None}
    if len(given) > 1:
        raise wrong("max_tokens", counts[1], "what max_completion_tokens says, where both are given")
    told, most = fields.flag("logprobs"), fields.number("top_logprobs", None, 0, MOST_LOGPROBS, whole=True)
    if most is not None and not told:
        raise Refusal(400, "top_logprobs needs logprobs: true", about="top_logprobs", code="invalid_value")
    return _common(
        fields,
        chat=True,
        prompts=[messages],
        n=fields.number("n", 1, 1, MOST_CHOICES, whole=True),
        n_new=given.pop() if given else None,
        logprobs=(most or 0) if told else None,
    )


def _common(fields: Fields, **more: Any) -> Asked:
    """What both bodies have."""
    model = fields.take("model")
    if not isinstance(model, str):
        raise wrong("model", model, "the model's name as /v1/models lists it")
    sampling = Sampling(
        temperature=float(fields.number("temperature", 1.0, 0, 100)),
        top_p=float(fields.number("top_p", 1.0, 0, 1)),
        top_k=fields.number("top_k", 0, 0, 10**9, whole=True),
        min_p=float(fields.number("min_p", 0.0, 0, 1)),
        presence=float(fields.number("presence_penalty", 0.0, -2, 2)),
        frequency=float(fields.number("frequency_penalty", 0.0, -2, 2)),
        bias=_bias(fields.take("logit_bias", {})),
    )
    stream, options = fields.flag("stream"), fields.take("stream_options")
    asked = Asked(
        model=model,
        sampling=sampling,
        seed=fields.number("seed", None, -(2**63), 2**64 - 1, whole=True),
        stop=_stops(fields.take("stop", [])),
        stream=stream,
        usage=_usage(options, stream),
        knobs=_knobs(fields.take("patchbay", {})),
        **more,
    )
    fields.done()
    return asked


def _usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    possible = '{"include_usage": true or false}, where stream is true'
    if not stream or not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise wrong("stream_options", options, possible)
    if options.get("include_obfuscation") not in (None, False) or options.get("include_usage") not in (
        None,
        True,
        False,
    ):
        raise wrong("stream_options", options, possible)
    return bool(options.get("include_usage"))


def _prompts(given: Any) -> list[Any]:
    """Texts or lists of ids: one, or several."""
    possible = f"a text, a list of token ids, or a list of up to {MOST_PROMPTS} of these"
    if isinstance(given, str) or (isinstance(given, list) and given and all(_is_id(x) for x in given)):
        given = [given]
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_PROMPTS:
        raise wrong("prompt", given, possible)
    for one in given:
        if not (isinstance(one, str) and one) and not (isinstance(one, list) and one and all(_is_id(x) for x in one)):
            raise wrong("prompt", one, possible + ", none of them empty")
    return given


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _messages(given: Any) -> list[dict[str, str]]:
    """Messages with their contents as text."""
    if not isinstance(given, list) or not given:
        raise wrong("messages", given, 'a list of {"role": ..., "content": ...}')
    found = []
    for at, message in enumerate(given):
        about = f"messages[{at}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise wrong(about, message, '{"role": ..., "content": ...}')
        for name, value in message.items():
            if name not in ("role", "content", "name") and value not in (None, []):
                raise Refusal(
                    400, f"{about}.{name[:40]} is not done here; leave it out", about=about, code="unsupported"
                )
        content = _content(message.get("content"), about)
        named = message.get("name")
        if named is not None and not isinstance(named, str):
            raise wrong(f"{about}.name", named, "a text")
        found.append({"role": message["role"], "content": content} | ({} if named is None else {"name": named}))
    return found


def _content(content: Any, about: str) -> str:
    """A text, or parts of the kind "text"."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        if all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            return "".join(part["text"] for part in content)
        raise Refusal(
            400, f"{about}.content has parts that are no text; only text is read", about=about, code="unsupported"
        )
    raise wrong(f"{about}.content", content, "a text")


def _stops(given: Any) -> tuple[str, ...]:
    found = [given] if isinstance(given, str) else given
    if (
        not isinstance(found, list)
        or len(found) > MOST_STOPS
        or not all(isinstance(x, str) and 0 < len(x) <= 1000 for x in found)
    ):
        raise wrong("stop", given, f"a text, or up to {MOST_STOPS} of them, none empty")
    return tuple(dict.fromkeys(found))


def _bias(given: Any) -> tuple[tuple[int, float], ...]:
    possible = "an object of up to 1024 token ids (as text) with numbers from -100 to 100"
    if not isinstance(given, dict) or len(given) > 1024:
        raise wrong("logit_bias", given, possible)
    for token, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and -100 <= value <= 100
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and number):
            raise wrong("logit_bias", {token: value}, possible)
    return tuple((int(token), float(value)) for token, value in given.items())


def _knobs(given: Any) -> tuple[tuple[str, float | None], ...]:
    possible = '{"knobs": [{"name": "context", "strength": 2}]}'
    if not isinstance(given, dict) or set(given) - {"knobs"}:
        raise wrong("patchbay", given, possible)
    listed = given.get("knobs") or []
    if not isinstance(listed, list) or len(listed) > MOST_KNOBS:
        raise wrong("patchbay.knobs", listed, f"a list of up to {MOST_KNOBS}")
    found = []
    for one in listed:
        if not isinstance(one, Mapping) or set(one) - {"name", "strength"} or not isinstance(one.get("name"), str):
            raise wrong("patchbay.knobs", one, 'objects {"name": ..., "strength": ...}')
        found.append((one["name"], strength(one["name"], one.get("strength"))))
    return tuple(found)


def strength(name: str, given: Any) -> float | None:
    """How far a knob is turned; None for as far as it was saved."""
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given) or abs(given) > 1e6:
        raise wrong(f"the strength of knob {name[:40]!r}", given, "a number from -1e6 to 1e6")
    return float(given)
