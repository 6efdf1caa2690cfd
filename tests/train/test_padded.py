"""Rows of other lengths in one batch: the loss of a padded row is the loss of the row alone, in every family, block and objective; what cannot be is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.tiny.twins import FAMILY_CONFIGS, twin
from patchbay.train._copies import copied
from patchbay.train._objectives import names, objective
from patchbay.train._objectives._objective import Document, collated
from patchbay.train._padded import refuse_padding
from tests.blocks.given import built
from tests.given import lent, pairs
from tests.shares import by_turns
from tests.tolerance import close

TEXTS = [[random.Random(i).randrange(3, 45) for _ in range(n)] for i, n in enumerate((14, 9, 2, 5))]
SETTINGS = {
    "bico": "bico:both=1,share=0.5,mask=1",
    "cloned": "cloned:vocab=48",
    "impossible": "impossible:kind=local",
    "infill": "infill:vocab=96,share=0.5,prefix=0.5",
    "label-supervision": "label-supervision:classes=46+47,two_way=1",
    "langsamp": "langsamp:vocab=48",
    "translico": "translico:vocab=48,weight=0",
}
IN_PARTS: dict[str, list[Document]] = {  # of objectives whose documents are no plain texts
    "label-supervision": [[text, [46 + i % 2]] for i, text in enumerate(TEXTS)],
    "pinto": [[text, text[:2], [5], [6 + i]] for i, text in enumerate(TEXTS)],
    "sami": [[text, [3], [4, 5, 6], [7, 8], [9]] for text in TEXTS],
}
OF_ROWS = ("label-supervision", "pinto", "sami")  # means over rows; the others are sums over places
OF_ALL = ("fine-grained", "self-evolution")  # answers drawn from the model; a mean over the places of all rows


def parts_of(name: str, model: pb.Model, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """The loss of a padded batch, and of each row by itself."""
    aim = objective(SETTINGS.get(name, name)).of_batch(random.Random(seed))
    documents = IN_PARTS.get(name, [[text] for text in TEXTS])
    rows = [aim.row(one, random.Random(f"{seed} {i}")) for i, one in enumerate(documents)]
    aim.adapt(model)
    with torch.no_grad():
        both = (
            aim.loss(model, model.hf, collated(rows), 1),
            [aim.loss(model, model.hf, collated([row]), 1) for row in rows],
        )
    aim.leave(model)
    return both


def same(together: Tensor, apart: list[Tensor], name: str) -> bool:
    total = torch.stack(apart).sum() / (len(apart) if name in OF_ROWS else 1)
    return close(float(together), float(total), of=100.0, dtype=torch.float32)


@pytest.mark.parametrize("family", by_turns([name for name in FAMILY_CONFIGS if name != "paligemma"], of=6))
def test_a_padded_row_has_the_loss_that_it_has_alone(family: str) -> None:
    """And the streams between its layers."""
    model = lent(family)
    refuse_padding(model, [2, 14])
    assert same(*parts_of("ntp", model), "ntp")
    assert same(*parts_of("multi-exit", model), "multi-exit")


@pytest.mark.parametrize(
    "blocks",
    by_turns(
        [
            {"attention": "softmax1"}, {"attention": "k_bias"}, {"attention": "kv_bias"}, {"attention": "sigmoid"}, {"attention": "normalised_sigmoid"},
            {"mixer": "gla"}, {"mixer": "h3"}, {"mixer": "lssl"}, {"convolution": 3}, {"monet": {}}, {"abs_topk": 8}, {"gate": True},
            {"meta_tokens": {"id": 90, "layers": [0]}}, {"lexinvariant": True}, {"ngram": 2}, {"feedforward": {"kind": "low_rank", "rank": 4}},
        ],
        of=3,
    ),
    ids=str,
)  # fmt: skip
def test_blocks_do_not_hear_padding(blocks: dict[str, Any]) -> None:
    model = pb.load(built(**blocks))
    refuse_padding(model, [2, 14])
    assert same(*parts_of("ntp", model), "ntp")


@pytest.mark.parametrize("name", [name for name in names() if name not in OF_ALL])
def test_in_every_objective(name: str) -> None:
    assert same(*parts_of(name, copied(lent("llama")), 1), name)


def opening(hf: Any) -> Any:
    """A Llama that is causal until a mask tells of padding, and then lets all real tokens see each other."""
    own = hf.forward

    def forward(input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Any:
        if attention_mask is not None and attention_mask.ndim == 2:
            closed = torch.finfo(torch.float32).min
            attention_mask = torch.zeros(len(input_ids), 1, *[input_ids.shape[1]] * 2).masked_fill(
                ~attention_mask.bool()[:, None, None], closed
            )
        return own(input_ids=input_ids, attention_mask=attention_mask, **more)

    hf.forward = forward
    return hf


def test_masks_of_a_models_own_are_refused() -> None:
    """PaliGemma by its name; one that is causal as long as nothing is padded by what its rows give; before anything is trained."""
    data = [list(text) for text in TEXTS]
    for how in ("ntp", "spt", "label-supervision:classes=46+47"):
        with pytest.raises(pb.PatchbayError, match="tokens of this paligemma model see those after them: a row shows"):
            pb.train.variant(lent("paligemma"), data, objective=how, seeds=1, plan={"steps": 2})
    model = pb.load(twin("llama"))
    opening(model.hf)
    with pytest.raises(
        pb.PatchbayError, match=r"a row of . tokens of this llama model has other logits alone than in a batch"
    ):
        pb.train.variant(model, data, seeds=1, plan={"steps": 2})
    task = pairs()
    ragged = pb.Task("ragged", [task.clean[0], *[row[1:] for row in task.clean[1:]]], task.right, task.wrong)
    base, tuned = lent("paligemma"), pb.load(twin("paligemma", seed=1))
    with pytest.raises(pb.PatchbayError, match="tokens of this paligemma model see those after them"):
        pb.train.subspace_fusion(base, tuned, ragged, steps=1)


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        (dict(rope_type="longrope", original_max_position_embeddings=8, long_factor=[4.0] * 4, short_factor=[1.0] * 4), "5 to 14 tokens: give rows of at most 5 tokens, or all"),
        (dict(rope_type="dynamic", factor=2.0, original_max_position_embeddings=4), "5 to 14 tokens: give rows of one length"),
    ],
)  # fmt: skip
def test_positions_that_hang_on_the_longest_row_are_refused(rope: dict[str, Any], says: str) -> None:
    model = pb.load(twin("llama", rope_parameters=rope | {"rope_theta": 10000.0}))
    with pytest.raises(pb.PatchbayError, match=f"are scaled by the longest row of a batch, and rows have {says}"):
        pb.train.variant(model, [TEXTS[0], TEXTS[3]] * 3, seeds=1, plan={"steps": 2})
    refuse_padding(model, [14, 14])
