"""What the page shows of a model's sparse dictionaries: which there are, what is active on a text, and one feature. Runs in the worker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import patchbay as pb
from patchbay.app.asked import checked_text, sections
from patchbay.errors import PatchbayError

STRONGEST, MOST_TEXTS = 24, 64
NAMES = {
    "features": "",
    "mlp_features": ".mlp",
    "attn_features": ".attn",
}  # home -> what stands between layer and feature


def dictionaries(model: pb.Model, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionaries that are attached, by layer."""
    rows = []
    for (layer, home), one in sorted(model.dictionaries.items()):
        rows.append({
            "place": f"L{layer}{NAMES[home]}", "layer": layer, "home": home, "reads": str(one.reads), "writes": str(one.writes),
            "n": int(one.n_features), "source": Path(str(getattr(one, "source", ""))).name, "notes": [note.partition(": give ")[0] for note in getattr(one, "notes", ())],
        })  # fmt: skip
    return {"dictionaries": rows}


def active(model: pb.Model, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The features that are most active on a text, and `part` where it is asked, each with its activation at every token; how many
    are active at each token."""
    text, place = checked_text(model, asked), asked.get("place")
    found = {f"L{layer}{NAMES[home]}": (layer, home) for layer, home in model.dictionaries}
    if place not in found:
        raise PatchbayError(f"no dictionary at {place!r}; there are {', '.join(found) or 'none'}")
    layer, home = found[place]
    port = model.port(f"L{layer}.{home}.act")
    trace = pb.run(model, text, taps=[port], logits="last")
    values = trace[port][0].detach().float().cpu()  # [position, feature]
    most = values[1:] if len(values) > 1 else values  # the first token's stream is like no other's
    heights = most.amax(0)
    chosen = [int(i) for i in heights.topk(min(STRONGEST, len(heights))).indices if heights[i] > 0]
    _, _, number = str(asked.get("part") or "").rpartition(".F")
    if asked.get("part") == f"{place}.F{number}" and number.isdecimal() and int(number) < len(heights):
        chosen += [int(number)] if int(number) not in chosen else []
    rows = [{"feature": f"{place}.F{i}", "most": float(heights[i]), "values": values[:, i].tolist()} for i in chosen]
    tokens = [model.decode([i]) for i in model.encode(text)[0]]
    return {"tokens": tokens, "rows": rows, "active": (values != 0).sum(-1).tolist(), "n": values.shape[1]}


def feature(model: pb.Model, asked: Mapping[str, Any]) -> dict[str, Any]:
    """One feature: what it reads and writes as tokens, and where in the given texts it is most active."""
    texts = asked.get("texts") or []
    if (
        not isinstance(texts, list)
        or len(texts) > MOST_TEXTS
        or not all(isinstance(text, str) and text for text in texts)
    ):
        raise PatchbayError(f"texts is a list of at most {MOST_TEXTS} texts of one letter or more")
    made = sections(model.card(str(asked.get("part")), texts=texts or None))
    for section in made["sections"]:
        section["rows"] = [row for row in section["rows"] if row.get("value") != "0"]  # where it is not active
    return made
