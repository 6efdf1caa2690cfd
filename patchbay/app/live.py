"""Looks that are told piece by piece while they run: knobs turned on a prompt, and a prompt patched cell by cell. Runs in the worker."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import patchbay as pb
from patchbay.app.asked import checked_text
from patchbay.errors import PatchbayError
from patchbay.serve.guard import inside

Piece = Callable[[dict[str, Any]], None]
MOST_NEW, MOST_KNOBS, SHOWN = 128, 64, 8


# --- knobs --------------------------------------------------------------------------------------------


def turned(model: pb.Model, asked: Mapping[str, Any], piece: Piece) -> dict[str, Any]:
    """A prompt with and without knobs: the most likely next tokens of both, KL(without || with) in nats, and with `new` above 0 the
    greedy continuation of both, told token by token as `{"side", "token"}`."""
    text = checked_text(model, asked)
    new = asked.get("new", 0)
    if not isinstance(new, int) or not 0 <= new <= MOST_NEW:
        raise PatchbayError(f"new is a number of tokens from 0 to {MOST_NEW}, got {new!r}")
    knobs = _knobs(model, asked.get("knobs") or [])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sides = {"before": [], "after": knobs}
        logp = {side: _logp(model, text, edits) for side, edits in sides.items()}
        texts = {side: _continued(model, text, edits, new, side, piece) for side, edits in sides.items()} if new else {}
    before, after = logp["before"], logp["after"]
    best = torch.maximum(before, after).topk(min(SHOWN, len(before))).indices
    rows = [
        {"token": model.decode([int(i)]), "before": float(before[i].exp()), "after": float(after[i].exp())}
        for i in best
    ]
    moved = (before.exp() * (before - after)).nansum()
    notes = list(dict.fromkeys(str(one.message) for one in said))
    return {"next": rows, "kl": max(0.0, float(moved)), "notes": notes, **texts}


def knobs(model: pb.Model, asked: Mapping[str, Any], piece: Piece) -> dict[str, Any]:
    """Knobs of the folder by name: neutral and saved strength, how far a slider goes, what they edit, and why one does not fit here."""
    names = asked.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PatchbayError("names is a list of names of knobs")
    rows = []
    for name in names[:MOST_KNOBS]:
        row: dict[str, Any] = {"name": name, "message": ""}
        rows.append(row)
        try:
            knob = read_knob(name)
            far = max(1.0, 2.0 * abs(knob.strength - knob.neutral))
            row |= {
                "called": knob.name,
                "neutral": knob.neutral,
                "strength": knob.strength,
                "edits": [str(edit) for edit in knob.edits[:8]],
            }
            row |= {"low": knob.neutral - far, "high": knob.neutral + far, "n_edits": len(knob.edits)}
            knob.fits(model)  # refuses one of parts that are not here
            knob.check(model)
        except PatchbayError as error:
            row["message"] = str(error)
    return {"knobs": rows}


def _knobs(model: pb.Model, given: Any) -> list[pb.Knob]:
    """Knobs of the folder at the strengths that were asked, without those that do nothing there."""
    if not isinstance(given, list) or len(given) > MOST_KNOBS:
        raise PatchbayError(f"knobs is a list of at most {MOST_KNOBS}")
    made = []
    for one in given:
        name, strength = (one.get("name"), one.get("strength")) if isinstance(one, dict) else (None, None)
        if not isinstance(name, str) or isinstance(strength, bool) or not isinstance(strength, int | float):
            raise PatchbayError(f'a knob is {{"name": "x.knob", "strength": 1.0}}, got {one!r:.100}')
        knob = read_knob(name)
        knob.check(model)
        if strength != knob.neutral:
            made.append(knob.at(float(strength)))
    return made


def read_knob(name: str) -> pb.Knob:
    """A knob of the folder that the worker stands in, read again when its file has changed."""
    path = inside(Path.cwd(), name)
    if not path.is_file():
        raise PatchbayError(f"there is no knob {name!r} among the results")
    return _read(path, path.stat().st_mtime_ns)


@functools.lru_cache(64)
def _read(path: Path, changed: int) -> pb.Knob:
    return pb.load_knob(path)


def _logp(model: pb.Model, text: str, knobs: list[pb.Knob]) -> Tensor:
    """Log-probabilities of the next token [vocab], in float64."""
    logits = pb.run(model, text, edits=knobs, logits="last").logits
    return logits[0, -1].detach().double().cpu().log_softmax(-1)


class _Told:
    """What transformers' generate tells of each token; the prompt's come first."""

    def __init__(self, model: pb.Model, side: str, piece: Piece) -> None:
        self.model, self.side, self.piece, self.begun = model, side, piece, False

    def put(self, ids: Tensor) -> None:
        if self.begun:
            self.piece({"side": self.side, "token": self.model.decode(ids.flatten().tolist())})
        self.begun = True

    def end(self) -> None:
        pass


def _continued(model: pb.Model, text: str, knobs: list[pb.Knob], new: int, side: str, piece: Piece) -> str:
    made = model.generate(text, new, edits=knobs, new_only=True, streamer=_Told(model, side, piece))
    return str(made)


# --- cells --------------------------------------------------------------------------------------------


def patching(model: pb.Model, asked: Mapping[str, Any], piece: Piece) -> dict[str, Any]:
    """What the stream of another prompt does in this one, cell by cell: layer by layer a row of `{"layer", "values"}`, the logit of the
    other prompt's next token over that of this one's, when the stream that leaves the layer at one position is the other's."""
    ids, there = _twins(model, asked)
    clean, other = (pb.run(model, [one], logits="last").logits[0, -1].detach() for one in (ids, there))
    ours, theirs = int(clean.argmax()), int(other.argmax())
    if ours == theirs:
        raise PatchbayError(
            f"both prompts go on with {model.decode([ours])!r}: there is nothing that a patch could be seen to bring over"
        )

    def over(logits: Tensor) -> float:
        return float(logits[theirs].double() - logits[ours].double())

    ports = [model.port(f"L{layer}.resid_out") for layer in range(model.n_layers)]
    streams = pb.run(model, [there], taps=ports, logits="last")
    task = pb.Task("patching", (tuple(ids),), right=(theirs,), wrong=((ours,),))
    for layer, port in enumerate(ports):
        edits = [pb.replace(port, streams[port][0, at], positions=at) for at in range(len(ids))]
        values = pb.sweep(model, task, edits)["value"][:, 0].double().tolist()
        piece({"layer": layer, "values": values})
    tokens = {name: [model.decode([i]) for i in one] for name, one in (("tokens", ids), ("others", there))}
    answers = {"ours": model.decode([ours]), "theirs": model.decode([theirs])}
    return tokens | answers | {"n_layers": model.n_layers, "clean": over(clean), "other": over(other)}


def cell(model: pb.Model, asked: Mapping[str, Any], piece: Piece) -> dict[str, Any]:
    """The next token with the other prompt's stream at one layer and position: the most likely ones with and without it."""
    ids, there = _twins(model, asked)
    layer, at = asked.get("layer"), asked.get("position")
    if not isinstance(at, int) or not 0 <= at < len(ids):
        raise PatchbayError(f"position {at!r} asked; the prompt has positions 0..{len(ids) - 1}")
    port = model.port(f"L{layer}.resid_out")
    stream = pb.run(model, [there], taps=[port], logits="last")[port][0, at]
    edit = pb.replace(port, stream, positions=at)
    before, after = (
        pb.run(model, [ids], edits=edits, logits="last").logits[0, -1].detach().double().cpu().softmax(-1)
        for edits in ([], [edit])
    )
    best = torch.maximum(before, after).topk(min(SHOWN, len(before))).indices
    rows = [{"token": model.decode([int(i)]), "before": float(before[i]), "after": float(after[i])} for i in best]
    return {"next": rows, "edit": str(edit)}


def _twins(model: pb.Model, asked: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Both prompts as tokens, of which there have to be as many."""
    text, other = checked_text(model, asked), checked_text(model, {"text": asked.get("other")})
    ids, there = (model.encode(one)[0] for one in (text, other))
    if len(ids) != len(there):
        raise PatchbayError(
            f"this prompt has {len(ids)} tokens and the other {len(there)}: cell by cell needs as many; change a word for one of as many tokens"
        )
    return list(ids), list(there)


LIVE: dict[str, Callable[[pb.Model, Mapping[str, Any], Piece], dict[str, Any]]] = {
    "knobs": knobs,
    "turned": turned,
    "patching": patching,
    "cell": cell,
}
