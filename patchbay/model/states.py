"""States: the stream of a model through its depth, at the last token or as the mean over tokens, and the logit lens on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.errors import one_of
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import PatchbayError, Port

SITES = ("resid_out", "resid_in", "resid_mid", "attn.out", "mlp.in", "mlp.out")


def depth(model: Model, site: str = "resid_out") -> tuple[list[str], list[Port]]:
    """Names and ports of one signal of width d_model through the depth; before the first `resid_out` comes the embedding."""
    one_of("site", site, SITES)
    layers = [i for i in range(model.n_layers) if site in model.signals(i)]
    if not layers:
        offered = [name for name in SITES if any(name in model.signals(i) for i in range(model.n_layers))]
        raise PatchbayError(
            f"site={site!r}: no layer of this {model.family.name} model has it; possible are {', '.join(offered)}"
        )
    names, ports = [f"L{i}" for i in layers], [Port(site, i) for i in layers]
    return (["embed", *names], [Port("resid_in", 0), *ports]) if site == "resid_out" else (names, ports)


def last_states(
    model: Model,
    encoded: Sequence[list[int]],
    ports: Sequence[Port],
    batch_size: int,
    edits: Callable[[int, int], list[Edit]] | None = None,
) -> Tensor:
    """The signals at each prompt's last token, [port, prompt, d_model] in float64; `edits(start, stop)` are made of a batch."""
    pieces = []
    for start in range(0, len(encoded), batch_size):
        piece = list(encoded[start : start + batch_size])
        made = edits(start, start + len(piece)) if edits is not None else []
        trace = run(model, piece, taps=list(ports), edits=made, logits="last")
        pieces.append(torch.stack([trace.last(port).double().cpu() for port in ports]))
    return torch.cat(pieces, 1)


def mean_states(model: Model, encoded: Sequence[list[int]], ports: Sequence[Port], batch_size: int) -> Tensor:
    """The mean of the signals over each prompt's tokens, [port, prompt, d_model] in float64; padding does not count."""
    pieces = []
    for start in range(0, len(encoded), batch_size):
        trace = run(model, list(encoded[start : start + batch_size]), taps=list(ports), logits="last")
        pieces.append(torch.stack([trace[port].double().cpu().nanmean(1) for port in ports]))
    return torch.cat(pieces, 1)


def lens(model: Model, stream: Tensor) -> tuple[Tensor, Tensor]:
    """What the final norm and the unembedding make of a stream [..., d_model]: the normed stream, logits [..., vocab]."""
    with torch.no_grad():  # forward, not a call: edits of an enclosing `edited` block belong to runs of the model
        normed = model.final_norm_module.forward(stream)
        return normed, model.unembed_logits(normed)
