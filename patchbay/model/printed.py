"""How a model prints, and its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from patchbay.signal.card import card
from patchbay.signal.port import LAYER


def printed(model: Any) -> str:
    """Family, shape, self-check and ports, as `print(model)` shows them."""
    title, rows = _said(model)
    return "\n".join([title, *(f"  {name}: {text}" for name, text in rows)])


def as_html(model: Any) -> str:
    """The same for a notebook."""
    title, rows = _said(model)
    return card(title, rows)


def _said(model: Any) -> tuple[str, list[tuple[str, str]]]:
    """A line on what the model is, and rows of what is checked, offered and lacking."""
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
    title = (
        f"Model {model.source or type(model.hf).__name__}: family {model.family.name} ({model.config.model_type}), "
        f"{n_parameters:,} parameters, {', '.join(shape)}"
    )
    rows = [("self-check", str(model.check)), ("ports of a layer", ", ".join(model.signals(model.n_layers - 1)))]
    return title, rows + ([("lacks", ", ".join(lacking))] if lacking else [])


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
        return card(f"{len(self)} tokens", self._cells(), columns=self.columns)


def tokens_of(model: Any, prompts: Any) -> Tokens:
    """What `Model.tokens` documents."""
    return Tokens(
        Token(row, place, place - len(ids), number, model.decode([number]) if model.tokenizer else str(number))
        for row, ids in enumerate(model.encode(prompts))
        for place, number in enumerate(ids)
    )
