"""The catalogue: what each paper does, which methods here implement it, and in what state.

`python -m patchbay.papers.catalogue` prints docs/papers.md.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchbay.signal.port import PatchbayError, suggest

STATES = {
    "works": "its methods are here, and find what was planted, equal the formula, and find nothing where there is nothing",
    "partly": "some of it is here",
    "unmeasured": "its code is here and equals the formula; its claim was not measured, and the command that would is named",
    "not yet": "could be here and is not",
    "not a system": "nothing in it can be run on a language model here: surveys, positions, other modalities",
}
Paper = Mapping[str, Any]


@functools.cache
def papers() -> tuple[Paper, ...]:
    """Every entry of papers.toml, in its order (by key)."""
    return tuple(tomllib.loads((Path(__file__).parent / "papers.toml").read_text(encoding="utf-8"))["paper"])


def paper(key: str) -> Paper:
    """The entry of a key. Raises PatchbayError with the nearest keys where there is none."""
    found = next((entry for entry in papers() if entry["key"] == key), None)
    if found is None:
        near = suggest(key, [entry["key"] for entry in papers()])
        raise PatchbayError(
            f"no paper {key!r} in the catalogue of {len(papers())}{near}; `patchbay papers WORDS` searches it"
        )
    return found


def by_state() -> list[Paper]:
    """All entries, those that work first."""
    rank = list(STATES)
    return sorted(papers(), key=lambda entry: (rank.index(entry["state"]), entry["key"]))


def page() -> str:
    """docs/papers.md."""
    from patchbay.papers import claims

    lines = [
        "# Papers",
        "",
        f"{len(papers())} papers; written from `patchbay/papers/papers.toml` by `python -m patchbay.papers.catalogue`.",
        "`patchbay papers WORDS` searches them, `patchbay papers run KEY --model M` checks the claim of one that works.",
        "",
        "A claim is run with three seeds (five where it trains networks) on the model and, where the model has a part in it, on untrained",
        "networks of its form; all numbers are shown. Its kind says what is asked:",
        "",
        *(f"- `{kind}`: {meaning}." for kind, meaning in claims.KINDS.items()),
        "",
        "`confirmed`: the 95 % interval of every seed lies beyond the bound, and for a mechanism beyond what untrained networks give by",
        "twice the half-width of theirs (`by` in the row, where that is more than the bound asks). `not testable here`: the model has too",
        "few parts for its random controls to reach p = .05. The built-in models were trained on text that holds these very tasks.",
        "A row that names no other seeds is of one earlier run, without untrained networks: `python -m bench.claims KEY` makes it anew.",
    ]
    for state, meaning in STATES.items():
        entries = [entry for entry in by_state() if entry["state"] == state]
        if not entries:
            continue
        lines += ["", f"## {state.capitalize()} ({len(entries)}): {meaning}", ""]
        for entry in entries:
            lines += _entry(entry)
    return "\n".join(lines) + "\n"


def _entry(entry: Paper) -> Sequence[str]:
    head = f"- **{entry['title']}** ({entry['year']}, `{entry['key']}`): {entry['does']}."
    methods = ", ".join(f"`{name}`" for name in entry["methods"])
    more = [f"  {methods}."] if methods else []
    if entry["state"] == "unmeasured":
        more = [f"  {', '.join(f'`{tool}`' for tool in entry['tools'])}. To measure: `{entry['command']}`."]
    if "claim" in entry:
        from patchbay.papers import claims

        more.append(f"  Claim ({claims.known(str(entry['key'])).kind}): {entry['claim']}.")
    if "measured" in entry:
        more.append(f"  Measured on `{entry['model']}`: {entry['measured']} (`{entry['command']}`).")
    return [head, *more]


if __name__ == "__main__":
    print(page(), end="")
