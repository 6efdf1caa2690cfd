"""Places that other programs name: TransformerLens' hooks, modules of Hugging Face models, folders of Gemma Scope; as signals of ours."""

from __future__ import annotations

import re

from patchbay.signal.port import PatchbayError

HOOKS = {
    "hook_resid_pre": "resid_in",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_out",
    "hook_mlp_out": "mlp.out",
    "hook_attn_out": "attn.out",
    "attn.hook_z": "attn.z",
    "mlp.hook_in": "mlp.in",
    "hook_mlp_in": "resid_mid",  # TransformerLens' copy of the stream before the MLP's norm
    "mlp.hook_post": "mlp.act",
    "ln2.hook_normalized": "mlp.in",
}
MODULES = (  # what a module's name ends in -> what goes in, what comes out
    (r"(mlp|feed_forward|block_sparse_moe)", "mlp.in", "mlp.out"),
    (r"(mlp|feed_forward)\.(down_proj|c_proj|dense_4h_to_h)", "mlp.act", "mlp.out"),
    (r"(attn|self_attn|attention|self_attention)\.(o_proj|c_proj|dense|out_proj)", "attn.z", "attn.out"),
    (r"(attn|self_attn|attention|self_attention)", None, "attn.out"),
    (r"(pre_feedforward_layernorm|ln_2)", "resid_mid", "mlp.in"),
    (r"post_feedforward_layernorm", None, "mlp.out"),
    (r"post_attention_layernorm", None, "attn.out"),  # of families that have a norm after attention
)


def from_hook(name: str) -> tuple[int, str]:
    """`blocks.3.hook_resid_post` -> (3, "resid_out")."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if found is None or found.group(2) not in HOOKS:
        raise PatchbayError(
            f"the dictionary sits at {name!r}, which is none of blocks.L.{{{', '.join(HOOKS)}}}; say where: at='L3.resid_out', or "
            "at='L3.mlp.in to L3.mlp.out'"
        )
    return int(found.group(1)), HOOKS[found.group(2)]


def from_module(name: str, *, side: str = "output") -> tuple[int, str]:
    """`model.layers.3.mlp` and which of its sides -> (3, "mlp.out")."""
    found = re.fullmatch(r"(?:.*\.)?(?:layers|h|blocks|block)\.(\d+)(?:\.(.+))?", name)
    if found is not None:
        layer, inner = int(found.group(1)), found.group(2)
        if inner is None:
            return layer, "resid_out" if side == "output" else "resid_in"
        for pattern, given, made in MODULES:
            signal = made if side == "output" else given
            if re.fullmatch(pattern, inner) and signal is not None:
                return layer, signal
    raise PatchbayError(
        f"the dictionary sits at the {side} of module {name!r}, which is no signal known by that name; say where: at='L3.resid_out', or "
        "at='L3.mlp.in to L3.mlp.out'"
    )


def from_point(name: str) -> tuple[int, str]:
    """Gemma Scope 2's `model.layers.9.output`, `model.layers.9.self_attn.o_proj.input` -> (9, signal)."""
    module, _, side = name.rpartition(".")
    if side not in ("input", "output"):
        return from_module(name)
    return from_module(module, side=side)


def from_folder(path: str) -> tuple[int, str]:
    """Gemma Scope's folders, .../gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 -> (20, "resid_out")."""
    layer = re.search(r"layer_(\d+)", path)
    kind = re.search(r"gemma-scope-[^/]*-(res|mlp|att)\b", path)
    if layer is None or kind is None:
        raise PatchbayError(
            f"{path}: Gemma Scope's files do not say where they belong, and this folder is not named as its are "
            "(gemma-scope-2b-pt-res/layer_20/...); say where: at='L20.resid_out'"
        )
    return int(layer.group(1)), {"res": "resid_out", "mlp": "mlp.out", "att": "attn.z"}[kind.group(1)]
