"""The instrument as an agent's tools: plain functions of JSON, over one model and one folder; `agents.py` puts them on a wire.

Answers are a short text and the same as data, with units and what the null gives. Results and knobs are kept in the folder by name, so
that a later step can be held against an earlier one. Nothing is read or written outside the folder, no code is taken, and one thing
runs at a time.
"""

from __future__ import annotations

import inspect
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import patchbay as pb
from patchbay.errors import PatchbayError, one_of, suggest
from patchbay.results import outside
from patchbay.results.printed import shown
from patchbay.serve.guard import inside
from patchbay.serve.schema import Giver, checked_name, schema
from patchbay.sweeps.settings import using

VERBS = ("find", "prove", "turn", "decode", "measure")  # train changes weights: not for an agent to start
OPS = ("replace", "add", "scale", "zero", "mean", "project")
ROWS, NUMBERS, TOKENS, LETTERS = 50, 4096, 256, 20_000
Progress = Callable[[int, int], None]


class Stopped(Exception):  # noqa: N818  no error: what the client asked for
    """A call that was cancelled."""


class Instrument:
    """The tools. Each takes JSON and returns (text, data)."""

    def __init__(self, model: pb.Model, folder: str | Path) -> None:
        self.model, self.folder = model, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.giver, self.lock = Giver(model, self.folder), threading.Lock()

    # ---- what there is ----

    def describe_model(self, part: str | None = None) -> tuple[str, dict[str, Any]]:
        """The model: family, sizes, ports; or one part of it ("L1.H3"), as the card shows it."""
        if part is None:
            from patchbay.model.cards import model_card

            card = model_card(self.model)
            return str(self.model), dict(card)
        shown = self.model.card(part)
        return str(shown), dict(shown.data)

    def list_methods(self, verb: str | None = None) -> tuple[str, dict[str, Any]]:
        """Methods by verb: find (which parts), prove (do they matter), turn (make a knob), decode, measure."""
        if verb is not None:
            one_of("verb", verb, VERBS)
        rows = []
        for room in VERBS if verb is None else (verb,):
            for name in getattr(pb, room).__all__:
                method = getattr(getattr(pb, room), name)
                if hasattr(method, "method_name"):
                    rows.append(
                        {"name": f"{room}.{name}", "does": (method.__doc__ or "").split("\n")[0], "paper": method.paper}
                    )
        return "\n".join(f"{row['name']}: {row['does']}" for row in rows), {"methods": rows}

    def method_help(self, method: str) -> tuple[str, dict[str, Any]]:
        """All that is said of a method, and its inputs as JSON schema."""
        found = self.method(method)
        text = (found.__doc__ or "")[:LETTERS]
        return text, {"method": method, "paper": getattr(found, "paper", ""), "inputs": schema(found), "help": text}

    def method(self, name: str) -> Callable[..., Any]:
        """Raises PatchbayError where there is none of that name."""
        verb, _, short = name.partition(".")
        known = [f"{room}.{one}" for room in VERBS for one in getattr(pb, room).__all__]
        if name not in known or verb not in outside.ROOMS:
            raise PatchbayError(f"no method {name[:60]!r}; list_methods lists {len(known)}{suggest(name[:60], known)}")
        found: Callable[..., Any] = getattr(getattr(pb, verb), short)
        return found

    # ---- what is done ----

    def run_method(
        self, method: str, inputs: Mapping[str, Any], save_as: str | None = None, progress: Progress | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Run a method; its Result or knob is kept under `save_as`, or a name of its own."""
        found = self.method(method)
        name = self._free(save_as or f"{method.partition('.')[2]}-{secrets.token_hex(3)}")
        with self.lock, using(**({} if progress is None else {"progress": progress})):
            arguments = self.giver.arguments(found, inputs)
            begun = time.perf_counter()
            if "model" in inspect.signature(found).parameters:
                arguments["model"] = self.model
            made = found(**arguments)
        data = {"name": name, "method": method, "seconds": round(time.perf_counter() - begun, 3)}
        if isinstance(made, pb.Knob):
            made.save(inside(self.folder, f"{name}.knob"))
            return f"{made}\nkept as the knob {name!r}", data | {"kind": "knob", "knob": _knob(made)}
        made.save(inside(self.folder, name))
        text, more = told(made)
        return f"{text}\nkept as the result {name!r}", data | {"kind": "result"} | more

    def tap(self, prompt: str, port: str, positions: Sequence[int] | None = None) -> tuple[str, dict[str, Any]]:
        """The values of one signal on a prompt, as "L1.resid_out" or "L2.H3.pattern": numbers where they are few, else what sums them up."""
        with self.lock:
            at = self.model.port(port)
            trace = pb.run(self.model, prompt, taps=[at])
            value = trace[at][0].float()
        if positions is not None:
            axis = at.tapped_axis - 1
            n = value.shape[axis]
            bad = next((p for p in positions if not -n <= p < n), None)
            if bad is not None:
                raise PatchbayError(f"position {bad}: the prompt has {n} tokens")
            value = value.index_select(axis, torch.tensor([p % n for p in positions]))
        tokens = [self.model.decode([token]) for token in self.model.encode(prompt)[0]]
        axes = list(at.axes[1:]) if len(at.axes) - 1 == value.ndim else [f"axis{i}" for i in range(value.ndim)]
        sums = {"mean": float(value.mean()), "std": float(value.std()) if value.numel() > 1 else 0.0}
        sums |= {"min": float(value.min()), "max": float(value.max()), "norm": float(value.norm())}
        data: dict[str, Any] = {"port": str(at), "shape": list(value.shape), "axes": axes, "tokens": tokens, **sums}
        if value.numel() <= NUMBERS:
            data["values"] = value.tolist()
        else:
            data["note"] = f"{value.numel()} numbers, {NUMBERS} are told at most: name positions, or a part"
        return f"{at} {data['shape']}: mean {sums['mean']:.4g}, std {sums['std']:.4g}, norm {sums['norm']:.4g}", data

    def edit_and_generate(
        self,
        prompt: str,
        edits: Sequence[Mapping[str, Any]] = (),
        knobs: Sequence[Mapping[str, Any]] = (),
        max_new_tokens: int = 20,
    ) -> tuple[str, dict[str, Any]]:
        """The greedy continuation of a prompt without and with edits and knobs."""
        if not 1 <= max_new_tokens <= TOKENS:
            raise PatchbayError(f"max_new_tokens={max_new_tokens}: 1 to {TOKENS}")
        with self.lock:
            turned = [*self._knobs(knobs), *map(self.edit, edits)]
            before = self.model.generate(prompt, max_new_tokens, new_only=True)
            after = self.model.generate(prompt, max_new_tokens, edits=turned, new_only=True) if turned else before
            logits = [pb.run(self.model, prompt, edits=some).last_logits[0].float() for some in ([], turned)]
        logp = [torch.log_softmax(one, -1) for one in logits]
        likely = [
            [
                {"token": self.model.decode([i]), "probability": float(one[i].exp())}
                for i in one.topk(5).indices.tolist()
            ]
            for one in logp
        ]
        moved = float((logp[0].exp() * (logp[0] - logp[1])).sum())
        data = {
            "before": before,
            "after": after,
            "next_before": likely[0],
            "next_after": likely[1],
            "kl": moved,
            "unit": "nats",
        }
        return f"before: {before}\nafter: {after}\nKL of the next token: {moved:.4g} nats", data | {
            "edits": [str(e) for e in turned]
        }

    def edit(self, given: Mapping[str, Any]) -> Any:
        """An edit of {"op": "scale", "port": "L1.H3.z", "value": 0, "positions": "last"}."""
        extra = next((key for key in given if key not in ("op", "port", "value", "positions")), None)
        if extra is not None or not isinstance(given.get("port"), str):
            raise PatchbayError(f"an edit has op, port, value and positions, got {dict(given)!r:.100}")
        one_of("op", given.get("op"), OPS)
        options = {} if given.get("positions") is None else {"positions": given["positions"]}
        values = [] if given["op"] == "zero" else [_number(given.get("value"))]
        return getattr(pb, str(given["op"]))(self.model.port(given["port"]), *values, **options)

    def save_knob(
        self, name: str, edits: Sequence[Mapping[str, Any]], strength: float = 1.0, overwrite: bool = False
    ) -> tuple[str, dict[str, Any]]:
        """Edits as a knob, kept in the folder under a name; `patchbay serve --knobs FOLDER` offers it."""
        if not edits:
            raise PatchbayError("a knob needs edits")
        with self.lock:
            made = pb.Knob(
                name, [self.edit(one) for one in edits], strength, {"method": "edits of an agent", **_on(self.model)}
            )
            pb.run(self.model, [[0]], edits=[made])  # what does not fit the model is refused before it is kept
            made.save(inside(self.folder, f"{checked_name(name)}.knob"), overwrite=overwrite)
        return str(made), {"name": name, "knob": _knob(made)}

    # ---- what is known ----

    def search_papers(self, words: str, limit: int = 10) -> tuple[str, dict[str, Any]]:
        """Papers in which every word occurs, best first, with what of them runs here."""
        from patchbay.papers.feed import opened, views

        with opened.opened() as held:
            rows = views.search(held, words[:200], limit=max(1, min(limit, ROWS)))
        names = ("key", "title", "year", "arxiv", "state", "methods")
        found = [{name: row[name] for name in names} for row in rows]
        return "\n".join(
            f"{row['key'] or row['arxiv']}: {row['title']} [{row['state'] or 'not yet'}]" for row in found
        ) or "none", {"papers": found}

    def check_claim(self, key: str, seed: int = 0) -> tuple[str, dict[str, Any]]:
        """A paper's claim run on this model, with three seeds (five where it trains networks), beside untrained networks of its form."""
        from patchbay.papers import catalogue, claims

        catalogue.paper(key)
        with self.lock:
            outcome = claims.check(key, self.model, seed=seed)
        return "\n".join(outcome.told()), dict(outcome.to_json())

    def read_result(self, name: str, rows: int = 20, by: str = "value") -> tuple[str, dict[str, Any]]:
        """A kept Result: its table, units, notes and where its numbers came from."""
        return told(self.giver.result(name), max(1, min(rows, ROWS)), by)

    def results(self) -> list[str]:
        """Names of the Results in the folder."""
        return sorted(path.parent.name for path in self.folder.glob("*/result.json"))

    # ---- parts ----

    def _knobs(self, given: Sequence[Mapping[str, Any]]) -> list[Any]:
        found = []
        for one in given:
            if set(one) - {"name", "strength"} or not isinstance(one.get("name"), str):
                raise PatchbayError('a knob is {"name": ..., "strength": ...}')
            knob = self.giver.knob(one["name"])
            found.append(knob if one.get("strength") is None else knob.at(one["strength"]))
        return found

    def _free(self, name: str) -> str:
        """Refuse a name that is taken: what was kept stays."""
        if any(inside(self.folder, checked_name(name) + end).exists() for end in ("", ".knob")):
            raise PatchbayError(f"{name!r} is in the folder already; save_as another name")
        return name


def told(result: pb.Result, n: int = 20, by: str = "value") -> tuple[str, dict[str, Any]]:
    """A Result as text and as data."""
    if result.ranked:
        table = result.told(n, by=by)
    else:
        columns, cells, _ = shown(result, n)
        table = [dict(zip(columns, row, strict=True)) for row in cells]
    rows = [{key: _json(value) for key, value in row.items()} for row in table]
    data = {"unit": result.unit, "units": dict(result.units), "rows": rows, "notes": list(result.notes)}
    axes = {name: list(result.axes_of(name)) for name in result.variables}
    data |= {
        "variables": axes,
        "numbers": {name: _json(float(result[name])) for name in axes if not axes[name]},
        "origin": result.origin(),
    }
    return result.summary(n)[:LETTERS], data


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | list):
        raise PatchbayError(f"value={value!r:.60}: a number, or a list of numbers")
    return float(value) if not isinstance(value, list) else torch.tensor(value, dtype=torch.float32)


def _knob(knob: pb.Knob) -> dict[str, Any]:
    return {"strength": knob.strength, "neutral": knob.neutral, "edits": [str(edit) for edit in knob.edits[:ROWS]]}


def _on(model: pb.Model) -> dict[str, Any]:
    from patchbay.knobs.knob import _on as on

    return on(model)


def _json(value: Any) -> Any:
    """A cell as JSON: NaN, which JSON has not, is null."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if isinstance(value, int | str | bool | type(None)) else str(value)
