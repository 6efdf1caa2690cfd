"""Cards: all that can be said of one part: its ports, what it reads and writes as tokens, its roles, and the contexts that excite it.

Ports and words come from the weights and run nothing. Contexts are the tokens of given texts at which the part is excited most, each in
its context (`_contexts.py`). Roles are the ranks of the part in every finder that ranks parts of its kind, each on the task that calls
for it, as `patchbay find all` runs them. None of it says what the part causes: prove.ablation does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patchbay.features.reading import KINDS, nearest, written
from patchbay.model.cards import part_card
from patchbay.model.model import Model
from patchbay.results.letters import visible
from patchbay.signal.card import card as table
from patchbay.signal.channel import Channel, parse_channel
from patchbay.signal.port import Part, PatchbayError, Port, parse_part
from patchbay.stories._contexts import contexts
from patchbay.stories.survey import ranks
from patchbay.wiring.components import check_channel
from patchbay.wiring.words import words

NEAR = 3  # others that write most nearly the same


@dataclass(frozen=True, repr=False)
class Card:
    """What is known of a part, as plain data (`data`); prints, and shows as tables in a notebook."""

    data: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def sections(self) -> list[tuple[str, tuple[str, ...], list[list[Any]]]]:
        """Tables: a title, columns and rows."""
        data = self.data
        made: list[tuple[str, tuple[str, ...], list[list[Any]]]] = [
            (
                "ports",
                ("port", "axes", ""),
                [
                    [row["port"], ", ".join(row["axes"]), "tap, edit" if row["editable"] else "tap"]
                    for row in data["ports"]
                ],
            )
        ]
        if data["words"]:
            rows = [
                [row["direction"], row["does"], *(" ".join(map(visible, row[end])) for end in ("most", "least"))]
                for row in data["words"]
            ]
            made.append(("in the weights", ("direction", "", "most", "least"), rows))
        if found := data.get("contexts"):
            title = f"highest {found['measure']} of {found['tokens']:,} tokens in {found['texts']:,} texts (mean {found['mean']:.3g}, lowest {found['lowest']:.3g})"
            rows = [
                [f"{row['value'] + 0.0:.4g}", row["context"].replace("\n", "\\n"), row["text"], row["position"]]
                for row in found["rows"]
            ]
            made.append((title, ("value", "context", "text", "position"), rows))
            rows = [
                [
                    f"{part['low']:.3g} to {part['high']:.3g}",
                    row["context"].replace("\n", "\\n"),
                    row["text"],
                    row["position"],
                ]
                for part in found["quantiles"]
                for row in part["contexts"]
            ]
            title = f"a sample of the {100 * found['density']:.3g} % of tokens at which it is not 0, by quarters"
            made.append((title, ("values", "context", "text", "position"), rows))
        if data.get("nearest"):
            rows = [[row["part"], f"{row['cosine']:.3f}"] for row in data["nearest"]]
            made.append(("those of its layer that write most nearly the same", ("part", "cosine"), rows))
        if data.get("roles") is not None:
            rows = [
                [row["finder"], f"{row['rank']} of {row['of']}", f"{row['value']:.4g} {row['unit']}", row["p"]]
                for row in data["roles"]
            ]
            made.append(("roles: its rank in each finder", ("finder", "rank", "value", "p"), rows))
        return made

    @property
    def title(self) -> str:
        return f"{self.data['part']} ({self.data['kind']}) of {self.data['model'] or 'a model'}"

    def __repr__(self) -> str:
        lines = [self.title]
        for title, _, rows in self.sections():
            lines += [title, *("  " + "  ".join(str(cell) for cell in row if cell not in ("", None)) for row in rows)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return "".join(
            table(f"{self.title}: {title}" if i == 0 else title, rows, columns=columns)
            for i, (title, columns, rows) in enumerate(self.sections())
        )


def card(
    model: Model, part: Any, *, texts: Any = None, roles: bool = False, n: int = 10, seed: int = 0, batch_size: int = 16,
    progress: Callable[[int, int, str], None] | None = None,
) -> Card:  # fmt: skip
    """What `Model.card` documents."""
    what = _what(model, part)
    if isinstance(what, Channel):
        ports = [] if what.writer.kind == "embed" else part_card(model, str(what.writer))["ports"]
        data: dict[str, Any] = {
            "model": model.source,
            "part": str(what),
            "kind": f"component of {what.writer.kind}",
            "ports": ports,
        }
    else:
        data = part_card(model, str(what))
    data["words"] = words(model, what.part if isinstance(what, Port) else what)
    if texts is not None:
        data["contexts"] = contexts(model, what, texts, n, batch_size)
        if isinstance(what, Part) and what.kind in KINDS and what.index is not None:
            rows = written(model, what.layer or 0, what.kind)
            data["nearest"] = [
                {"part": str(Part(what.layer, what.kind, i)), "cosine": cosine}
                for i, cosine in nearest(rows, what.index, NEAR)
            ]
    if roles:
        data["roles"] = ranks(model, str(what.part if isinstance(what, Port) else what), seed=seed, progress=progress)
    return Card(data)


def _what(model: Model, part: Any) -> Part | Channel | Port:
    """The part, port or component that is meant, checked against the model."""
    if isinstance(part, Channel):
        return check_channel(part, model)
    if isinstance(part, Port):
        model.require(part)
        return part
    text = str(getattr(part, "part", part))
    component = ">" in text or re.search(r"\.(C\d+|bias|positions)$", text, re.IGNORECASE) is not None
    if component:
        return check_channel(parse_channel(text), model)
    try:
        parse_part(text)
    except PatchbayError:
        return model.port(text)
    return model.part(text)
