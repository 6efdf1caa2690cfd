"""Concurrence: whether one question is answered alike in several languages, and whom each language answers for.

    value = mean over items of the share of pairs of variants (languages) that give the same answer

Choices are written in each variant's own language, and `keys` say what each means. Where a row says whose language it is in (`claimant`), only such rows
are compared. With a `reference`, the key that is right: `kb`, how often the base variant says it; `con`, how often the variant of the reference itself
does; `non`, the mean over items of the mean over other claimants' variants; `delta` = (con - non) / non, how much more a language
answers for its own side. `null`: two answers drawn at random among the choices, one in as many as there are; p by sign flips. One forward pass.

Li et al. 2023, "This Land is {Your, My} Land: Evaluating Geopolitical Biases in Language Models". Higher is better. Agreement is not truth: the
same wrong answer everywhere concurs.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch

from patchbay.measure._answers import outcomes
from patchbay.measure._asked import picked
from patchbay.measure._items import resolved, rows_of, texts_only
from patchbay.measure._meter import reading
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.table import Row

SHARE = "share of pairs"
MAY = ("reference", "claimant")


@method(paper="li2023b")
def concurrence(
    model: Model,
    items: str | list[dict[str, Any]],
    *,
    base: str = "en",
    boundary: Literal["refuse", "back_up"] = "refuse",
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Share of pairs of variants of an item that are answered alike, over items; whom each variant answers for.

    `kb`, `con`, `non` and `delta` where there are references; `mass`, the mean probability of all choices; tables `answers` (each row's key) and `variants` (how often each is right).

    `items`: rows with the fields item, variant, prompt, choices, keys (what each choice means, as many) and, where wanted, reference (the key that is right)
    and claimant (the key whose language this variant is). `base`: the variant that `kb` reads. `boundary`: refuse a choice that the
    tokenizer joins with its prompt, or back_up to before it for all choices.
    """
    rows, said = rows_of(
        resolved(model, items), ("item", "variant", "prompt", "choices", "keys"), MAY, lists=("choices", "keys")
    )
    texts_only(rows, ("prompt",))
    _check(rows)
    found = outcomes(
        model,
        [row.values["prompt"] for row in rows],
        [row.values["choices"] for row in rows],
        where=[row.where for row in rows],
        boundary=boundary,
        batch_size=batch_size,
    )
    best = picked(found.logp, seed).tolist()
    said_keys = [str(row.values["keys"][at]) for row, at in zip(rows, best, strict=True)]
    claimed = any("claimant" in row.values for row in rows)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(str(row.values["item"]), []).append(i)
    compared = [[i for i in own if not claimed or "claimant" in rows[i].values] for own in groups.values()]
    alike = torch.tensor([_alike([said_keys[i] for i in own]) for own in compared], dtype=torch.float64)
    if not bool(alike.isfinite().any()):
        raise PatchbayError(
            f"{len(groups)} items, none with two variants{' that have a claimant' if claimed else ''} to compare"
        )
    chance = torch.tensor([1.0 / len(rows[own[0]].values["choices"]) for own in groups.values()], dtype=torch.float64)
    chance = torch.where(alike.isnan(), torch.nan, chance)
    sides, notes = _sides(rows, said_keys, list(groups.values()), base)
    return reading(
        {"per_item": alike},
        SHARE,
        better="higher",
        null_items=chance,
        more={name: (x, (), "ratio" if name == "delta" else "share of items") for name, x in sides.items()}
        | {"mass": (float(found.mass.mean()), (), "probability")},
        tables=_tables(rows, said_keys),
        notes=[*said, *notes],
        seed=seed,
    )


def _alike(keys: list[str]) -> float:
    """Share of equal pairs; NaN of fewer than two."""
    pairs = [a == b for a, b in itertools.combinations(keys, 2)]
    return sum(pairs) / len(pairs) if pairs else float("nan")


def _sides(rows: list[Row], keys: list[str], groups: list[list[int]], base: str) -> tuple[dict[str, float], list[str]]:
    """How often the base variant, the reference's own variant and the others say the reference; and what is to be said."""
    right = [float(key == str(row.values["reference"])) if "reference" in row.values else None for row, key in zip(rows, keys, strict=True)]  # fmt: skip
    kb = [x for row, x in zip(rows, right, strict=True) if x is not None and str(row.values["variant"]) == base]
    con: list[float] = []
    non: list[float] = []
    for own in groups:
        known = [(rows[i].values, x) for i in own if (x := right[i]) is not None and "claimant" in rows[i].values]
        con += [x for values, x in known if str(values["claimant"]) == str(values["reference"])]
        others = [x for values, x in known if str(values["claimant"]) != str(values["reference"])]
        non += [sum(others) / len(others)] if others else []
    found = {name: sum(each) / len(each) for name, each in (("kb", kb), ("con", con), ("non", non)) if each}
    if "con" not in found or "non" not in found:
        return found, []
    if not found["non"]:
        return found, ["no other variant ever says the reference: delta divides by 0 and is left out"]
    return found | {"delta": (found["con"] - found["non"]) / found["non"]}, []


def _tables(rows: list[Row], keys: list[str]) -> dict[str, list[dict[str, Any]]]:
    each = [{"item": str(row.values["item"]), "variant": str(row.values["variant"]), "answer": key} for row, key in zip(rows, keys, strict=True)]  # fmt: skip
    variants = []
    for name in dict.fromkeys(row["variant"] for row in each):
        at = [i for i, row in enumerate(each) if row["variant"] == name and "reference" in rows[i].values]
        hits = sum(keys[i] == str(rows[i].values["reference"]) for i in at)
        variants.append({"variant": name, "n": sum(row["variant"] == name for row in each), "right": hits / len(at) if at else None})  # fmt: skip
    return {"answers": each, "variants": variants}


def _check(rows: list[Row]) -> None:
    """Raise PatchbayError for keys that do not fit the choices, and for a variant that an item has twice."""
    seen: dict[tuple[str, str], str] = {}
    for row in rows:
        keys, choices = [str(key) for key in row.values["keys"]], row.values["choices"]
        if len(keys) != len(choices) or len(set(keys)) != len(keys):
            raise PatchbayError(
                f"{row.where}: {len(choices)} choices and keys {keys}: one key of its own for each choice"
            )
        for name in MAY:
            if name in row.values and str(row.values[name]) not in keys:
                raise PatchbayError(f"{row.where}: {name} {row.values[name]!r} is none of the keys {', '.join(keys)}")
        pair = (str(row.values["item"]), str(row.values["variant"]))
        if pair in seen:
            raise PatchbayError(f"{row.where}: item {pair[0]} has the variant {pair[1]} already, in {seen[pair]}")
        seen[pair] = row.where
