"""What a shell's Tab completes: built-in models and local folders, tasks, parts; none of it loads a model.

`eval "$(_PATCHBAY_COMPLETE=bash_source patchbay)"` in a shell's start file turns it on (`zsh_source`, `fish_source`).
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from patchbay.cli import options
from patchbay.cli.signatures import PACKAGE

LAYERS = 12  # shown of a model whose shape is not at hand


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Built-in models, then what lies in the folder."""
    built_in = sorted(path.name for path in (PACKAGE / "tiny" / "weights").iterdir() if path.is_dir())
    found = [CompletionItem(name) for name in built_in if name.startswith(incomplete)]
    return [*found, CompletionItem(incomplete, type="file")]


def tasks(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name, help=one.doc) for name, one in options.tasks().items() if name.startswith(incomplete)]


def parts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Heads, attention and MLPs of the layers of the model that the line names; after a comma, the next one."""
    before, comma, last = incomplete.rpartition(",")
    n_layers, n_heads = _shape(
        str(ctx.params.get("model") or next(iter(ctx.args), ""))
    )  # args: of a line without its end
    layers = [f"L{layer}" for layer in range(n_layers)]
    kinds = [".attn", ".mlp", *(f".H{head}" for head in range(n_heads))]
    known = layers if "." not in last else [layer + kind for layer in layers for kind in kinds]
    return [CompletionItem(before + comma + part) for part in known if part.startswith(last)]


def _shape(model: str) -> tuple[int, int]:
    """Layers and heads of a built-in or local model, from its config file."""
    for folder in (PACKAGE / "tiny" / "weights" / model, Path(model)):
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        sizes = [next((int(config[key]) for key in keys if isinstance(config.get(key), int)), LAYERS)
                 for keys in (("num_hidden_layers", "n_layer", "num_layers"), ("num_attention_heads", "n_head"))]  # fmt: skip
        return sizes[0], sizes[1]
    return LAYERS, LAYERS
