"""How a model prints, and its tokens."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from patchbay.signal.port import LAYER


def printed(model: Any) -> str:
    """Family, shape, self-check and ports, as `print(model)` shows them."""
    heads = sorted({model.n_heads(i) for i in range(model.n_layers)} - {0})
    groups = sorted({model.n_groups(i) for i in range(model.n_layers)} - {0})
    experts = sorted({model.n_experts(i) for i in range(model.n_layers)} - {0})
    n_parameters = sum(p.numel() for p in model.hf.parameters())
    shape = [f"{model.n_layers} layers", f"d_model {model.d_model}", f"vocab {model.vocab_size}"]
    grouped = f" over {'/'.join(map(str, groups))} key/value groups" if groups != heads else ""
    shape += [f"{'/'.join(map(str, heads))} heads{grouped}"] if heads else ["no attention heads"]
    shape += [f"{'/'.join(map(str, experts))} experts"] if experts else []
    offered = {signal for i in range(model.n_layers) for signal in model.signals(i)}
    lacking = [signal for signal in (*LAYER, "attn.pattern") if signal not in offered]
    return (
        f"Model {model.source or type(model.hf).__name__}: family {model.family.name} ({model.config.model_type}), "
        f"{n_parameters:,} parameters, {', '.join(shape)}\n  self-check: {model.check}\n"
        f"  ports of a layer: {', '.join(model.signals(model.n_layers - 1))}"
        + (f"\n  lacks: {', '.join(lacking)}" if lacking else "")
    )


@dataclass(frozen=True)
class Token:
    """One token of a prompt."""

    prompt: int
    position: int
    from_end: int
    id: int
    text: str


class Tokens(list[Token]):
    """The tokens of prompts, one row each: which prompt, position, position from the end (-1 the last), id and text."""

    columns = ("prompt", "position", "from end", "id", "token")

    def _cells(self) -> list[list[str]]:
        return [[str(t.prompt), str(t.position), str(t.from_end), str(t.id), repr(t.text)] for t in self]

    def __repr__(self) -> str:
        rows = [list(self.columns), *self._cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        return "\n".join(
            "  ".join([*(c.rjust(w) for c, w in zip(row[:-1], widths, strict=False)), row[-1]]) for row in rows
        )

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self._cells())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def tokens_of(model: Any, prompts: Any) -> Tokens:
    """What `Model.tokens` documents."""
    return Tokens(
        Token(row, place, place - len(ids), number, model.decode([number]) if model.tokenizer else str(number))
        for row, ids in enumerate(model.encode(prompts))
        for place, number in enumerate(ids)
    )
