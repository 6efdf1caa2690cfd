"""A signal of one prompt of a run as a Result with the prompt's tokens on its axes: what `Trace.show` returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay.model.trace import Trace
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port

NUMBERS = {"attn.pattern": "attention", "mlp.act": "activation", "router.logits": "logits", "router.weights": "weight"}
NEXT, LAST = 8, 48  # likeliest tokens that are listed, after how many of the last positions
PLACES = ("position", "query", "key")


def of_trace(trace: Trace, port: Port, prompt: int = 0) -> Result:
    """What `Trace.show` documents."""
    if not -len(trace.ids) <= prompt < len(trace.ids):
        raise PatchbayError(f"prompt {prompt} asked, the run had {len(trace.ids)} (0..{len(trace.ids) - 1})")
    tokens = token_texts(trace, prompt)
    if port.signal == "logits":
        return _next_tokens(trace, port, prompt, tokens)
    axes, value = port.axes[1:], trace[port][prompt].detach().float().cpu()
    if port.signal == "attn.pattern" and port.index is None:
        heads = value.shape[0]
        raise PatchbayError(f"{port} has {heads} heads: name one, like L{port.layer}.H0.pattern (0..{heads - 1})")
    for at, axis in enumerate(axes):  # padding is cut away
        if axis in PLACES and not (axis == "query" and port.query is not None):
            value = value.narrow(at, 0, len(tokens))
    unit = NUMBERS.get(port.signal)
    if port.signal == "router.experts":
        unit = "expert id"
    elif unit is None:  # vectors of width d_model or d_head, which end every such signal
        axes, value, unit = axes[:-1], value.norm(dim=-1), "2-norm"
    axes = tuple("component" if axis == "choice" else axis for axis in axes)
    coords = {axis: tokens for axis in axes if axis in PLACES}
    if port.query is not None:
        coords["query"] = [tokens[row] for row in port.query]
    name = unit.replace("2-norm", "length").replace(" ", "_")
    return Result(value, axes, unit, name=name, coords=coords, provenance=_whence(trace, port, prompt))


def token_texts(trace: Trace, prompt: int) -> list[str]:
    """The tokens of a prompt as text, or their ids where the model came without a tokenizer."""
    return _texts(trace, trace.ids[prompt, : int(trace.lengths[prompt])].tolist())


def _texts(trace: Trace, ids: list[int]) -> list[str]:
    model = trace._model
    return [str(i) if model is None or model.tokenizer is None else model.decode([i]) for i in ids]


def _next_tokens(trace: Trace, port: Port, prompt: int, tokens: list[str]) -> Result:
    """The most likely next token at each position, with its probability; how surprising the token that stands there was, in nats,
    given those before it; and the likeliest few after the last positions."""
    logits = trace.logits[prompt]  # [position, vocab]; the last position alone with logits="last"
    n = len(tokens) if len(logits) > 1 else 1
    logits, shown = logits[:n].detach().float(), tokens[-n:]
    likely, ids = logits.softmax(-1).max(-1)
    texts = _texts(trace, ids.tolist())
    rows = [
        {"position": place, "after": token, "most_likely": text, "probability": p}
        for place, (token, text, p) in enumerate(zip(shown, texts, likely.tolist(), strict=True), len(tokens) - n)
    ]
    variables = {
        "probability": (likely.cpu(), ("position",), "probability"),
        "token_id": (ids.cpu(), ("position",), "token id"),
    }
    if n == len(tokens):
        there = trace.ids[prompt, 1:n].to(logits.device)  # [position - 1]: the tokens that came
        said = -logits[:-1].log_softmax(-1).gather(-1, there[:, None])[:, 0]
        variables["surprise"] = (torch.cat([said.new_full((1,), torch.nan), said]).cpu(), ("position",), "nats")
    return Result(
        variables,
        coords={"position": [f"{after} -> {text}" for after, text in zip(shown, texts, strict=True)]},
        tables={"most_likely": rows, "next": _likeliest(trace, logits, len(tokens) - n)},
        provenance=_whence(trace, port, prompt),
    )


def _likeliest(trace: Trace, logits: Tensor, first: int) -> list[dict[str, Any]]:
    """The `NEXT` likeliest tokens after each of the last positions, as rows; the first of `logits` stands at position `first`."""
    start = max(0, len(logits) - LAST)
    likely, ids = logits[start:].softmax(-1).topk(min(NEXT, logits.shape[-1]))
    return [
        {"position": first + start + i, "place": place, "token": text, "probability": p}
        for i, (row, shares) in enumerate(zip(ids.tolist(), likely.tolist(), strict=True))
        for place, (text, p) in enumerate(zip(_texts(trace, row), shares, strict=True), 1)
    ]


def _whence(trace: Trace, port: Port, prompt: int) -> dict[str, Any]:
    source = getattr(trace._model, "source", "")
    said: dict[str, Any] = {"method": str(port), "options": {"prompt": prompt % len(trace.ids)}}
    if trace.edits:
        said["options"]["edits"] = ", ".join(map(str, trace.edits))
    return said | ({"model": {"source": source}} if source else {})
