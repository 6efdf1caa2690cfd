"""What the page asks of the model at hand besides methods: its card, a part's, and one prompt looked at. Runs in the worker.

A look is a run of the library and the Result that it returns; `heads` shrinks patterns to thumbnails, each of whose cells is the
largest of those that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F

import patchbay as pb
from patchbay.app import asked as asked_of
from patchbay.app import features
from patchbay.app.asked import checked_text, sections
from patchbay.app.document import of_result
from patchbay.errors import PatchbayError
from patchbay.model.cards import model_card

THUMB = 40


def _run(model: pb.Model, asked: Mapping[str, Any], **options: Any) -> pb.Trace:
    return pb.run(model, checked_text(model, asked), **options)


def _layer(model: pb.Model, asked: Mapping[str, Any]) -> int:
    layer = asked.get("layer")
    if not isinstance(layer, int) or not 0 <= layer < model.n_layers:
        raise PatchbayError(f"layer {layer!r} asked; the model has layers 0..{model.n_layers - 1}")
    return layer


def prompt(model: pb.Model, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens with their surprise, what comes next, and the logit lens where the model has one."""
    shown = _run(model, asked).show("logits")
    said = of_result(
        shown, n=max(map(len, shown.tables.values()))
    )  # whole tables: the last token's rows are the end of one
    made: dict[str, Any] = {"next": said, "lens": None, "lens_message": "", "n_layers": model.n_layers}
    made["tokens"] = [str(row["after"]) for row in shown.tables["most_likely"]]
    try:
        made["lens"] = of_result(pb.find.logit_lens(model, asked["text"]))
    except PatchbayError as error:
        made["lens_message"] = str(error)
    heads = [model.n_heads(i) if "attn.pattern" in model.signals(i) else 0 for i in range(model.n_layers)]
    return made | {"heads": heads}


def pattern(model: pb.Model, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Where one head looks."""
    layer, head = _layer(model, asked), asked.get("head")
    trace = _run(model, asked, taps=[f"L{layer}.attn.pattern"], logits="last")
    return of_result(trace.show(f"L{layer}.H{head}.pattern"), inline=asked_of.MOST_TOKENS**2)


def heads(model: pb.Model, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The patterns of a layer's heads as thumbnails."""
    layer = _layer(model, asked)
    trace = _run(model, asked, taps=[f"L{layer}.attn.pattern"], logits="last")
    patterns = trace[model.port(f"L{layer}.attn.pattern")][0].detach().float().cpu()  # [head, query, key]
    side = min(THUMB, patterns.shape[-1])
    small = F.adaptive_max_pool2d(patterns, side)
    rows = [{"head": i, "data": [round(share, 4) for share in one.flatten().tolist()]} for i, one in enumerate(small)]
    return {"side": side, "heads": rows}


def card(model: pb.Model, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The model's card."""
    return model_card(model)


def part(model: pb.Model, asked: Mapping[str, Any]) -> dict[str, Any]:
    """A part's ports, and what it reads and writes as tokens."""
    return sections(model.card(str(asked.get("part"))))


LOOKS: dict[str, Callable[[pb.Model, Mapping[str, Any]], dict[str, Any]]] = {
    "prompt": prompt,
    "pattern": pattern,
    "heads": heads,
    "model": card,
    "part": part,
    "dictionaries": features.dictionaries,
    "active": features.active,
    "feature": features.feature,
}
