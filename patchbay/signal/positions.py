"""Positions: which tokens of which prompts are meant, by index, slice, token, mask, or name.

Indices and slices count within each prompt, so that prompts of different lengths can be named at once. Names, for a prompt of
four tokens and three generated ones:

    tokens        The   cat   sat   on  | the   mat   .
    index           0     1     2     3 |
    "last"                            x |
    "generated"                         |   x     x   x
    "predicting"                      x |   x     x   x      those whose output predicts the generated ones
    "-1:"                             x |   x     x   x      as slice(-1, None): from there on, generated ones too

"system", "user", "assistant" and "tool" are the tokens of a chat's messages of that role, the template's own tokens between them not;
generated tokens are the assistant's (`model/chats.py`). As text, an index ("3", "-1") and a slice ("2:", ":-1", "1:4") say the same as in Python.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, TypeAlias

import torch
from torch import Tensor

from patchbay.errors import said
from patchbay.signal.port import PatchbayError, suggest


@dataclass(frozen=True)
class Token:
    """Every position that holds this token: an id, or a text that is a single token of the model's tokenizer."""

    token: int | str


ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Role:
    """Every position of a chat's messages of this role; generated tokens are the assistant's."""

    role: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise PatchbayError(f"no role {self.role!r}; roles are {', '.join(ROLES)}" + suggest(str(self.role), ROLES))


Positions: TypeAlias = (
    int | slice | Sequence[int] | Tensor | Token | Role | Literal["last", "generated", "predicting"] | str | None
)


def fixed(positions: Positions) -> Positions:
    """A copy that will not change under us: sequences become tuples."""
    if isinstance(positions, Tensor):
        return positions.clone()
    if isinstance(positions, slice):
        if positions.step is not None and positions.step < 1:
            raise PatchbayError(
                f"positions {positions}: a slice steps forward; positions are a set, their order says nothing"
            )
        return slice(*(None if x is None else int(x) for x in (positions.start, positions.stop, positions.step)))
    if positions is None or isinstance(positions, Token | Role):
        return positions
    if isinstance(positions, SupportsIndex):
        return int(positions)
    if isinstance(positions, str):
        return _named(positions)
    try:
        return tuple(int(p) for p in positions)
    except (TypeError, ValueError):
        raise PatchbayError(
            f"positions are an index, several, a slice, a bool mask, a text or a role, got {said(positions)}"
        ) from None


NAMES = ("last", "generated", "predicting")
_SLICE = re.compile(r"^(-?\d+)?:(-?\d+)?(?::(\d+))?$")


def _named(text: str) -> Positions:
    found = _SLICE.match(text)
    if text in NAMES:
        return text
    if text in ROLES:
        return Role(text)
    if found:
        return fixed(slice(*(None if part is None else int(part) for part in found.groups())))
    if re.match(r"^-?\d+$", text):
        return int(text)
    raise PatchbayError(
        f"positions {text!r}: as text only 'last', 'generated', 'predicting', a role of a chat ('user', 'assistant', 'system', 'tool'), an "
        "index or a slice such as '-1:'; for a token use pb.Token(...)"
    )


def brief(positions: Positions) -> str:
    return f"mask{list(positions.shape)}" if isinstance(positions, Tensor) else repr(positions)


@dataclass(frozen=True)
class Batch:
    """The tokens of a run: `ids` [prompt, position] on the right padded with anything, `lengths` and `prompt_lengths` [prompt].

    `prompt_lengths` equals `lengths` except in generation, where `lengths` counts generated tokens too.
    """

    ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    model: Any = None  # which knows the id of a Token given as text, and whose words the tokens of a chat are


def chosen(positions: Positions, batch: Batch, *, what: object = "edit") -> Tensor:
    """Which positions are meant: int64 [prompt, position], -1 where untouched, else the ordinal among the chosen ones."""
    n_prompts, n_positions = batch.ids.shape
    place = torch.arange(n_positions).expand(n_prompts, -1)  # [prompt, position]
    lengths, starts = batch.lengths[:, None].cpu(), batch.prompt_lengths[:, None].cpu()
    real = place < lengths
    if positions is None:
        return torch.where(real, place, -1)
    if isinstance(positions, int | tuple):
        return _indexed((positions,) if isinstance(positions, int) else positions, starts, n_positions, what)
    if isinstance(positions, slice):
        touched = torch.zeros_like(real)
        for i, length in enumerate(starts[:, 0].tolist()):  # a slice counts within the prompt, to its end
            inside = range(int(length))[positions]
            touched[i, [at for at in inside if at < n_positions]] = True
            if positions.stop is None and positions.step in (None, 1):
                touched[i, int(length) :] = True
    elif isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.ndim != 2 or positions.shape[0] not in (1, n_prompts):
            raise PatchbayError(
                f"{what}: a position mask is a bool tensor [prompt, position] = [{n_prompts}, {n_positions}], "
                f"got {positions.dtype} {list(positions.shape)}"
            )
        longest = max(n_positions, int(starts.max()))  # some of a prompt may be still to come
        if positions.shape[1] > longest and bool(positions[:, longest:].any()):
            raise PatchbayError(f"{what}: mask marks position {positions.shape[1] - 1}, prompts have {longest}")
        touched = torch.zeros_like(real)
        width = min(n_positions, positions.shape[1])
        touched[:, :width] = positions[:, :width].cpu()
    elif isinstance(positions, Token):
        wanted = positions.token if isinstance(positions.token, int) else batch.model.token_id(positions.token)
        touched = batch.ids.cpu() == wanted
    elif isinstance(positions, Role):
        touched = _spoken(positions.role, batch)
    else:
        first = starts if positions == "generated" else starts - 1
        touched = place == first if positions == "last" else place >= first
    touched = touched & real
    return torch.where(touched, touched.cumsum(1) - 1, -1)


def _spoken(role: str, batch: Batch) -> Tensor:
    """Where messages of a role stand, bool [prompt, position]; what follows the prompt is the assistant's."""
    touched = torch.zeros(batch.ids.shape, dtype=torch.bool)
    for i, (ids, length) in enumerate(zip(batch.ids.tolist(), batch.prompt_lengths.tolist(), strict=True)):
        by = batch.model.roles_of(ids[:length], length)  # of a prompt that arrives in pieces, those that are there
        touched[i, : len(by)] = torch.tensor([one == role for one in by])
        touched[i, length:] = role == "assistant"
    return touched


def all_from(begin: int, positions: Positions, batch: Batch) -> bool:
    """Whether every position from `begin` on is meant, as those past the prompts are by "generated" and by open slices."""
    if positions is None:
        return True
    onward = isinstance(positions, slice) and positions.stop is None and positions.step in (None, 1)
    return (onward or positions in ("generated", "predicting")) and begin >= int(batch.prompt_lengths.max())


def _indexed(indices: tuple[int, ...], starts: Tensor, n_positions: int, what: object) -> Tensor:
    """Indices count within the prompt, from its end when negative; one outside any prompt is an error."""
    out = torch.full((len(starts), n_positions), -1)
    for ordinal, index in enumerate(indices):
        place = starts[:, 0] + index if index < 0 else torch.full_like(starts[:, 0], index)
        outside = ((place < 0) | (place >= starts[:, 0])).nonzero()
        if len(outside):
            i = int(outside[0])
            n = int(starts[i])
            raise PatchbayError(f"{what}: position {index} is outside prompt {i}, which has {n} tokens (0..{n - 1})")
        here = (place < n_positions).nonzero()[:, 0]  # the others are still to come
        out[here, place[here]] = ordinal
    return out


def to_json(positions: Positions, tensors: dict[str, Tensor]) -> Any:
    if isinstance(positions, slice):
        return {"slice": [positions.start, positions.stop, positions.step]}
    if isinstance(positions, Token):
        return {"token": positions.token}
    if isinstance(positions, Role):
        return {"role": positions.role}
    if isinstance(positions, Tensor):
        name = f"mask{len(tensors)}"
        tensors[name] = positions.detach().cpu().contiguous()
        return {"mask": name}
    return list(positions) if isinstance(positions, tuple) else positions


def from_json(data: Any, tensors: dict[str, Tensor]) -> Positions:
    if isinstance(data, dict):
        if "slice" in data:
            return slice(*data["slice"])
        if "role" in data:
            return Role(data["role"])
        return Token(data["token"]) if "token" in data else tensors[data["mask"]]
    return tuple(data) if isinstance(data, list) else data
