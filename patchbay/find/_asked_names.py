"""Names from a language model behind an OpenAI-compatible address: asked only where an address is given, of this machine unless another is meant."""

from __future__ import annotations

import ipaddress
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from patchbay.features.contexts import Seen
from patchbay.model.model import Model
from patchbay.signal.port import Part, PatchbayError

SHOWN, WORDS, SECONDS, LONGEST = 8, 60, 60.0, 1_000_000
ASKS = (
    "Below are pieces of text in which one feature of a language model is active; it is most active at the token between << and >>. "
    "Say in one short sentence what these tokens, or what stands before them, have in common. Answer with that sentence alone."
)


def check_endpoint(endpoint: str, unsafe: bool) -> None:
    """Refuse what is no HTTP address, and another machine's unless that is meant."""
    if not endpoint:
        return
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PatchbayError(f"endpoint={endpoint!r}: an address such as http://127.0.0.1:8000/v1")
    if not unsafe and not _loopback(parts.hostname):
        raise PatchbayError(
            f"endpoint={endpoint!r} is not on this machine, and would be sent contexts of the texts: unsafe_endpoint=True if that is meant"
        )


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def ask(endpoint: str, model: Model, parts: Sequence[Part], seen: Seen) -> list[dict[str, Any]]:
    """A sentence for each part, with what was asked of whom."""
    root = endpoint.rstrip("/")
    name = _json(f"{root}/models", None)["data"][0]["id"]
    rows = []
    for i, part in enumerate(parts):
        shown = [_marked(model, held) for held in seen.kept[i].highest[:SHOWN]]
        prompt = "\n".join([ASKS, *shown])
        body = {"model": name, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": WORDS}
        answer = _json(f"{root}/chat/completions", body)["choices"][0]["message"]["content"]
        rows.append(
            {"part": str(part), "said": str(answer).strip(), "model": str(name), "endpoint": endpoint, "prompt": prompt}
        )
    return rows


def _marked(model: Model, held: dict[str, Any]) -> str:
    span, at = list(held["span"]), held["at"]
    pieces = [
        model.decode(some) if some and model.tokenizer is not None else " ".join(map(str, some))
        for some in (span[:at], span[at : at + 1], span[at + 1 :])
    ]
    return f"{pieces[0]}<<{pieces[1]}>>{pieces[2]}".replace("\n", " ")


def _json(address: str, body: dict[str, Any] | None) -> Any:
    """What an address answers. Raises PatchbayError for what is no answer of that protocol."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            held = json.loads(answer.read(LONGEST))
        if not isinstance(held, dict) or not (held.get("data") or held.get("choices")):
            raise ValueError(f"it said {str(held)[:200]}")
        return held
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise PatchbayError(f"{address} gave no answer of OpenAI's protocol: {error}") from error
