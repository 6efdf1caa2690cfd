"""Places by the names that other programs give them."""

from __future__ import annotations

import pytest

import patchbay as pb
from patchbay.features.hooks import HOOKS, from_folder, from_hook, from_module, from_point
from patchbay.features.saved import NAMES, hook_name


def test_hooks_and_back() -> None:
    for hook, signal in HOOKS.items():
        assert from_hook(f"blocks.7.{hook}") == (7, signal)
    assert {from_hook(hook_name(2, signal)) for signal in NAMES} == {(2, signal) for signal in HOOKS.values()}


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        ("layers.3", "output", (3, "resid_out")),
        ("gpt_neox.layers.5.mlp", "output", (5, "mlp.out")),
        ("transformer.h.11.mlp", "input", (11, "mlp.in")),
        ("model.layers.4.self_attn", "output", (4, "attn.out")),
        ("transformer.h.0.attn.c_proj", "input", (0, "attn.z")),
    ],
)
def test_modules_of_hugging_face_models(name: str, side: str, expected: tuple[int, str]) -> None:
    assert from_module(name, side=side) == expected


def test_points_and_folders_of_gemma_scope() -> None:
    assert from_point("model.layers.9.output") == (9, "resid_out")
    assert from_point("model.layers.9.self_attn.o_proj.input") == (9, "attn.z")
    assert from_folder("/x/gemma-scope-9b-pt-att/layer_12/width_16k") == (12, "attn.z")
    assert from_folder("models--google--gemma-scope-2b-pt-mlp/snapshots/a/layer_3/width_16k") == (3, "mlp.out")


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (from_module, "model.norm"),
        (from_hook, "hook_embed"),
        (from_folder, "/x/layer_12"),
        (from_module, "layers.2.self_attn.q_proj"),
    ],
)
def test_other_names_are_refused_with_how_to_say_it(read: object, name: str) -> None:
    with pytest.raises(pb.PatchbayError, match="say where: at='"):
        read(name)  # type: ignore[operator]
