"""Language similarity: how alike a model's states are for a text and for its translation, language by language.

    similarity[layer, language] = mean over pairs of cos(h(text), h(translation)),    h the stream at the last token

ranks languages by how near they lie to the reference (Language Ranker). States share a large common direction, so raw
cosines are high for any two texts: `floor` is the mean over all pairs that are NOT translations of each other, `centred`
the similarity after each language's own mean state is taken away (its floor is then about -1 / (n - 1)), and `gain` is
similarity - floor with a 95 % bootstrap over pairs, `gain_low` and `gain_high`. `p`: as high a mean when translations are dealt to
the texts at random, `draws` times, Benjamini-Hochberg over layers and languages. One forward pass over all texts.

Li et al. 2024, "Language Ranker: A Metric for Quantifying LLM Performance Across High and Low-Resource Languages".

A likeness of last tokens: texts that end in the same token (a full stop) are alike for that alone, and the table says how many
pairs do. The score of a language is of these texts; rank languages on translations of the same ones. It measures no skill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.find._states import depth, exceeded, last_states, permutations
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

GRID = ("layer", "condition")


@method(paper="li2024", unit="cosine")
def language_similarity(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    translations: Mapping[str, Sequence[Any]],
    *,
    site: str = "resid_out",
    draws: int = 500,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Cosine of the last-token states of `prompts` and of their translations, at each layer, for each language.

    `translations`: language -> as many texts (or lists of ids) as there are prompts, in their order. Table `ranking`: mean
    over layers of similarity, gain and centred similarity, highest gain first.

    `site`: which states: resid_out, resid_in, resid_mid, attn.out, mlp.in or mlp.out. `draws`: random pairings of the
    texts that make the null.
    """
    encoded = model.encode(prompts)
    lists = isinstance(translations, Mapping) and all(
        not isinstance(texts, str | int) for texts in translations.values()
    )
    if not lists or not translations:
        raise PatchbayError("translations map a language to its texts, such as {'fr': [...]}")
    if len(encoded) < 3 or draws < 1:
        raise PatchbayError(f"{len(encoded)} prompts, draws={draws}: at least 3 pairs (for the floor) and 1 draw")
    names, ports = depth(model, site)
    reference = last_states(model, encoded, ports, batch_size)  # [layer, pair, d_model]
    order = permutations(len(encoded), draws, seed)
    columns, same = [], []
    for language, texts in translations.items():
        theirs = model.encode(list(texts))
        if len(theirs) != len(encoded):
            raise PatchbayError(f"{language}: {len(theirs)} translations of {len(encoded)} prompts; one for each")
        same.append(sum(a[-1] == b[-1] for a, b in zip(encoded, theirs, strict=True)))
        columns.append(_compare(reference, last_states(model, theirs, ports, batch_size), order, seed))
    table = {key: torch.stack([column[key] for column in columns], 1) for key in columns[0]}  # [layer, language]
    table["p"] = maths.benjamini_hochberg(table["p"])
    units = {"p": "p value"}
    rows: list[dict[str, Any]] = [
        {
            "language": language,
            "gain": float(table["gain"][:, i].mean()),
            "similarity": float(table["similarity"][:, i].mean()),
            "floor": float(table["floor"][:, i].mean()),
            "centred": float(table["centred"][:, i].mean()),
            "same_last_token": same[i],
        }
        for i, language in enumerate(translations)
    ]
    rows.sort(key=lambda row: (-row["gain"], row["language"]))
    said = " > ".join(f"{row['language']} {row['gain']:.3f}" for row in rows)
    notes = [f"by gain over random pairs, mean over layers: {said}"]
    notes += [f"{sum(same)} of {len(same) * len(encoded)} pairs end in the same token"] if any(same) else []
    return Result(
        {key: (value, GRID, units.get(key, "cosine")) for key, value in table.items()},
        coords={"layer": names, "condition": list(translations)},
        tables={"ranking": rows},
        notes=notes,
    )


def _compare(ours: Tensor, theirs: Tensor, order: Tensor, seed: int) -> dict[str, Tensor]:
    """Similarity of pairs, its floor and interval at each layer, each [layer]; states [layer, pair, d_model]."""
    cosines = _unit(ours) @ _unit(theirs).transpose(1, 2)  # [layer, text, translation]
    n = cosines.shape[1]
    pairs = cosines.diagonal(dim1=1, dim2=2)  # [layer, pair]
    floor = (cosines.sum((1, 2)) - pairs.sum(1)) / (n * (n - 1))
    others = (cosines.sum(2) + cosines.sum(1) - 2.0 * pairs) / (2.0 * (n - 1))  # each pair's own floor: [layer, pair]
    gains = torch.tensor([maths.bootstrap_interval(gain, seed=seed) for gain in pairs - others], dtype=torch.float64)
    dealt = cosines[:, torch.arange(n), order].mean(-1)  # [layer, draw]
    centred = _unit(ours - ours.mean(1, keepdim=True)) * _unit(theirs - theirs.mean(1, keepdim=True))
    return {
        "similarity": pairs.mean(1),
        "floor": floor,
        "gain": gains[:, 0],
        "gain_low": gains[:, 1],
        "gain_high": gains[:, 2],
        "centred": centred.sum(-1).mean(1),
        "p": exceeded(pairs.mean(1), dealt.T),
    }


def _unit(states: Tensor) -> Tensor:
    """Rows of length 1; a zero row, which has no direction, stays zero."""
    return states / states.norm(dim=-1, keepdim=True).clamp_min(1e-300)
