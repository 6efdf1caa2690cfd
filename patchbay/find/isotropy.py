"""Isotropy: how evenly the states of a text's tokens spread over directions, layer by layer.

    isotropy[layer] = 1 - mean over texts and pairs of different positions i, j of a text of cos(h_i, h_j)

with every pair of every text counting the same. 1 is what independent random directions give (`null_low` and `null_high`:
1 -+ 1.96 / sqrt(d_model x pairs), the closed form), 0 is one direction for all tokens. The last two rows are the stream after the last layer
and the same after the final norm, which is what transformers calls the last hidden state. Beside it: `without_first` (without
each text's first token, whose state is huge in many models), `across` (pairs of tokens from different texts: what no text says
of itself), `centred` (the mean over all tokens taken away first: what a common direction hides); low and high are a
95 % bootstrap over texts. One forward pass.

Su and Xu 2022, "Contrastive Search Is What You Need For Neural Text Generation", for the last state; low isotropy is where
contrastive decoding fails.

A narrow cone is no fault in itself: a common direction that the final norm or the unembedding ignores costs nothing, so read
`centred` beside it. Texts of other lengths give other pairs: compare models on the same texts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay.find._states import depth
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

UNIT = "1 - cosine"


@method(paper="su2022", unit=UNIT)
def isotropy(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    site: str = "resid_out",
    draws: int = 1000,
    seed: int = 0,
    batch_size: int = 16,
) -> Result:
    """1 minus the mean cosine between the states of a text's tokens, at each layer, with and without the first token.

    `draws`: of the bootstrap over texts. Texts of one token have no pairs and are refused where all are so.

    `site`: which states: resid_out, resid_in, resid_mid, attn.out, mlp.in or mlp.out.
    """
    encoded = model.encode(prompts)
    if draws < 1 or max(map(len, encoded)) < 2:
        raise PatchbayError(f"draws={draws} and texts of up to {max(map(len, encoded))} tokens: at least 1 and 2")
    names, ports = depth(model, site)
    names, ports = ([*names, "final_norm"], [*ports, Port("final_norm")]) if site == "resid_out" else (names, ports)
    states = _read(model, encoded, ports, batch_size)  # [layer][text], each [position, d_model]
    pairs = torch.tensor([len(ids) * (len(ids) - 1) / 2.0 for ids in encoded], dtype=torch.float64)
    rows = [_measure(texts, pairs, draws, seed) for texts in states]
    table = {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in rows[0]}
    half = 1.96 / float(model.d_model * pairs.sum()) ** 0.5
    variables: dict[str, Any] = {key: (value, ("layer",), UNIT) for key, value in table.items() if _known(value)}
    variables |= {"null_low": (torch.tensor(1.0 - half), (), UNIT), "null_high": (torch.tensor(1.0 + half), (), UNIT)}
    notes = [f"not measured: {', '.join(key for key in table if key not in variables)} (too few texts or tokens)"]
    return Result(variables, coords={"layer": names}, notes=[] if len(variables) == len(table) + 2 else notes)


def _known(value: Tensor) -> bool:
    return bool(value.isfinite().any())


def _read(model: Model, encoded: list[list[int]], ports: list[Port], batch_size: int) -> list[list[Tensor]]:
    """States of each port and text, [position, d_model] in float64."""
    found: list[list[Tensor]] = [[] for _ in ports]
    for start in range(0, len(encoded), batch_size):
        piece = encoded[start : start + batch_size]
        trace = run(model, piece, taps=ports, logits="last")
        for row, port in zip(found, ports, strict=True):
            row += [state[: len(ids)].double().cpu() for state, ids in zip(trace[port], piece, strict=True)]
    return found


def _measure(texts: list[Tensor], pairs: Tensor, draws: int, seed: int) -> dict[str, float]:
    """Isotropy of one layer's states, of their variants, and the ends of its interval."""
    cosines = torch.stack([_sum_of_cosines(text) for text in texts])  # [text], summed over pairs
    value = 1.0 - float(cosines.sum() / pairs.sum())
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(texts), (draws, len(texts)), generator=generator)
    spread = 1.0 - cosines[drawn].sum(1) / pairs[drawn].sum(1)
    ends = torch.nanquantile(spread, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    later = [text[1:] for text in texts if len(text) > 2]
    mean = torch.cat(texts).mean(0)
    unit = torch.cat([_unit(text) for text in texts])
    inside = cosines.sum()
    n, within = len(unit), pairs.sum()
    between = n * (n - 1) / 2.0 - within
    return {
        "isotropy": value,
        "low": ends[0] if len(texts) > 1 else float("nan"),
        "high": ends[1] if len(texts) > 1 else float("nan"),
        "without_first": _isotropy(later) if later else float("nan"),
        "across": float(1.0 - (_sum_of_cosines(unit) - inside) / between) if between else float("nan"),
        "centred": _isotropy([text - mean for text in texts]),
    }


def _isotropy(texts: list[Tensor]) -> float:
    """1 minus the mean cosine over all pairs within texts."""
    sums = sum(float(_sum_of_cosines(text)) for text in texts)
    return 1.0 - sums / sum(len(text) * (len(text) - 1) / 2.0 for text in texts)


def _unit(states: Tensor) -> Tensor:
    """Rows of length 1; a zero row, which has no direction, stays zero."""
    return states / states.norm(dim=-1, keepdim=True).clamp_min(1e-300)


def _sum_of_cosines(states: Tensor) -> Tensor:
    """Sum over pairs i < j of their cosine, by (|sum of unit vectors|^2 - n) / 2."""
    unit = _unit(states)
    return (unit.sum(0).square().sum() - unit.square().sum()) / 2.0
