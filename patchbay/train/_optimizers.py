"""Optimisers by name, `NAME` or `NAME:key=value`: what the Trainer is given. AdamW is its own; others stand in a file of theirs.

`cosmos` and `muon` step by the matrices of linear maps; embeddings, unembeddings, tables of positions and vectors take Adam. COSMOS's own code tells tables of tokens by more than
10,000 rows, which small vocabularies have not and wide maps have; here they are told by what they are, so that the two move the same matrices.

`low-ranks` is AdamW on the factors of matrices that a cut left with less than half of their full rank (`blocks.welore`); nothing else moves, and no
gradient of anything else is made. Jaiswal et al. 2024, "From GaLore to WeLore".
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from patchbay.blocks.structured import LowRank as Factors
from patchbay.blocks.welore import LOW
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError, suggest
from patchbay.train._cosmos import Cosmos, Split
from patchbay.train._low_rank import FORMS, Form, LowRank, maps
from patchbay.train._muon import MuonAdamW
from patchbay.train._sparse import Sparse, SparseAdamW
from patchbay.train._written import made

NAMES = ("adamw", "cosmos", "lora", "lora-sb", "low-ranks", "muon", "sparse")
SETTINGS: dict[str, type[Any]] = {**FORMS, "cosmos": Split, "sparse": Sparse}
Optimizer = tuple[type[torch.optim.Optimizer], dict[str, Any]]


def form_of(text: str) -> Form | None:
    """The low-rank form that a text names; None for an optimiser that moves whole matrices. PatchbayError where there is none."""
    name = name_of(text)
    if name not in NAMES:
        raise PatchbayError(f"no optimizer {name!r}; optimizers are {', '.join(NAMES)}{suggest(name, NAMES)}")
    if name not in SETTINGS and ":" in text:
        raise PatchbayError(f"optimizer {name} has no settings, got {text!r}")
    found = made("optimizer", text, SETTINGS[name]) if name in SETTINGS else None
    return found if isinstance(found, Form) else None


def name_of(text: str) -> str:
    """Which optimiser a text names, its settings aside."""
    return text.partition(":")[0].strip().replace("_", "-")


def sparse_of(text: str) -> Sparse | None:
    """How sparse matrices become, where a text says so."""
    return made("optimizer", text, Sparse) if name_of(text) == "sparse" else None


def learns(text: str, model: Model) -> list[torch.nn.Parameter]:
    """The parameters that a run moves, or whose gradients it needs to. PatchbayError where there are none."""
    if name_of(text) != "low-ranks":
        return [p for p in model.hf.parameters() if p.is_floating_point()]
    low = [
        module
        for module in model.hf.modules()
        if isinstance(module, Factors) and len(module.U) < LOW * min(module.in_features, module.out_features)
    ]
    if not low:
        raise PatchbayError(
            f"optimizer low-ranks tunes matrices that a cut left with less than {LOW:g} of their full rank, and this {model.family.name} model has none: "
            "hf = pb.blocks.build(model.hf, ranks=pb.blocks.welore.ranks(model.hf, 0.5)); pb.load(hf)"
        )
    return [p for module in low for p in (module.U, module.V)]


def optimizer(text: str, model: Model, seed: int) -> Optimizer | None:
    """The class and what it is made with beside a rate, or None for the Trainer's own AdamW."""
    form = form_of(text)
    if form is not None:
        among = frozenset(id(one.weight) for one in maps(model).values())
        return LowRank, {"form": form, "among": among, "seed": seed}
    if (sparse := sparse_of(text)) is not None:
        return SparseAdamW, {"keep": sparse.keep, "over": sparse.over}
    if (name := name_of(text)) in ("cosmos", "muon"):
        among = frozenset(id(one.weight) for one in maps(model, f"optimizer {name}").values())
        if name == "muon":
            return MuonAdamW, {"among": among}
        return Cosmos, {"among": among, **asdict(made("optimizer", text, Split))}
    return None
