"""LongHeads: each head reads a few chunks of a long text, so that no position is further than the model was trained on.

The text is cut into chunks of `window` tokens. A query head reads `chunks` of them: the first, its own, the one before it, and of the
others those whose key is nearest to the query; they are put side by side and numbered anew (`_chunks.py` has the formulas). A text of
window x chunks tokens or fewer is read as ever: the same logits but for rounding. Past that, positions stay below window x chunks,
however long the text. The likeliest token is taken. One pass for a token; a query reads window x chunks keys, and one key of each chunk.

A query includes itself, in the prompt as later; the published code leaves it out in the prompt and turns it one place past the last key.
`logp` is under this attention: where all is read it is the model's own. `chosen` says which chunks each head read for each new token.

Lu et al. 2024, "LongHeads: Multi-Head Attention is Secretly a Long Context Processor".

Models whose queries and keys are turned by position, with attention through transformers' interface. It shows where heads look in a long
text, not that the text is understood: a model that does not break past its length has nothing to gain.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchbay.decode._chunks import Chunks
from patchbay.decode._loop import Call, Rows, asked
from patchbay.decode._published import published
from patchbay.decode._result import Draft, as_result
from patchbay.decode._stepwise import Chosen, stepwise
from patchbay.jacks.session import Session
from patchbay.model.model import Model
from patchbay.model.rotary import turns
from patchbay.model.weights import head_weights
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

TERMS = {"softcap": "a soft cap on scores", "s_aux": "sinks", "sliding_window": "a sliding window"}


class ChunkRows(Rows):
    """Rows whose attention reads chunks: the model is told position 0 everywhere, and the turn is made in `Chunks`."""

    def __init__(self, call: Call, of: list[int], chunks: Chunks) -> None:
        super().__init__(call, of)
        self.chunks = chunks

    def _options(self, n_sent: int, keep: int) -> dict[str, Any]:
        zeros = torch.zeros(len(self.ids), n_sent, dtype=torch.long, device=self.ids.device)
        return super()._options(n_sent, keep) | {"position_ids": zeros}

    def attach(self, session: Session) -> None:
        session.where.turned = True
        for layer in self.chunks.rotation:
            session.on_attention(layer, _attending(self.chunks, layer))

    def take(self, rows: Any) -> None:
        super().take(rows)
        self.chunks.take(torch.as_tensor(rows))


def decode(
    call: Call, *, window: int = 256, chunks: int = 16, seen: dict[int, list[Tensor]] | None = None
) -> list[list[Draft]]:
    """The loop: drafts [prompt][0] of a call. `seen` gets the chunks that were chosen for each new token, by prompt [layer, head, n]."""
    rotation = rotations(call.model, window, chunks)
    _refuse_edits(call)
    drafts = [[Draft()] for _ in call.prompts]
    for members in call.batches():
        held = Chunks(window, chunks, rotation)

        def run(tokens: Tensor | None, rows: Rows, held: Chunks = held) -> tuple[Tensor, None]:
            logits = rows.run(tokens).last
            if seen is not None:
                for row, i in enumerate(rows.of):
                    seen.setdefault(i, []).append(
                        torch.stack([held.chosen[layer][row].cpu() for layer in sorted(held.chosen)])
                    )
            return logits, None

        def choose(ids: Tensor, logits: Tensor, rest: Any) -> Chosen:
            tokens = logits.argmax(-1)
            return Chosen(tokens, torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0])

        with ChunkRows(call, members, held) as rows:
            stepwise(call, rows, partial(run, rows=rows), choose, drafts)
    return drafts


def _attending(chunks: Chunks, layer: int) -> Any:
    def attend(
        inner: Any, implementation: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Any
    ) -> tuple[Tensor, None]:
        found = next((word for name, word in TERMS.items() if options.get(name) is not None), None)
        if found is not None:
            raise PatchbayError(
                f"longheads turns queries and keys by itself: attention of layer {layer} has {found}, which reading chunks would leave out"
            )
        scale = options.get("scaling")
        return chunks.attend(layer, query, key, value, query.shape[-1] ** -0.5 if scale is None else scale), None

    return attend


def rotations(model: Model, window: int, chunks: int) -> dict[int, Tensor | None]:
    """The turn of each layer at the positions that are ever used; refuses models whose positions are something else."""
    if window < 1 or chunks < 3:
        raise PatchbayError(f"window={window}, chunks={chunks}: one token or more, and three chunks or more")
    longest = model.max_positions
    if longest is not None and window * chunks > longest:
        raise PatchbayError(
            f"window={window} times chunks={chunks} is {window * chunks} positions: the model was made for {longest}"
        )
    layers = [i for i in range(model.n_layers) if model.n_heads(i)]
    if len(layers) < model.n_layers or model.family.attention == "operators":
        without = [i for i in range(model.n_layers) if i not in layers] or "all"
        raise PatchbayError(
            f"longheads turns queries and keys by itself, and this {model.family.name} model has no attention through transformers' interface in layers {without}"
        )
    if any("sliding" in str(kind) for kind in getattr(model.config, "layer_types", None) or ()):
        raise PatchbayError(
            f"longheads turns queries and keys by itself, and this {model.family.name} model has sliding windows, in which heads see no other chunk"
        )
    folded = {
        i: head_weights(
            model.family, model.modules[i], model.n_heads(i), model.n_groups(i), model.d_head(i), fold_norm=True
        )
        for i in layers
    }
    with Session(model, whole=True):  # as the model is, whatever edits are in force
        found = turns(model, range(window * chunks), folded)
    if all(turn.rotation is None for turn in found.values()):
        raise PatchbayError(
            f"longheads: positions do not turn queries and keys of this {model.family.name} model (they are learned, or distances)"
        )
    return {layer: turn.rotation for layer, turn in found.items()}


def _refuse_edits(call: Call) -> None:
    inside = next(
        (edit for edit in call.edits if edit.port.signal in ("attn.q", "attn.k", "attn.v", "attn.pattern")), None
    )
    if inside is not None:
        raise PatchbayError(
            f"{inside}: it acts inside attention, which reads chunks here; edit attn.z, attn.out or the stream"
        )


@method(paper="lu2024")
def longheads(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    window: int = 256,
    chunks: int = 16,
    max_new_tokens: int = 20,
    ends: list[int] | None = None,
    batch_size: int = 16,
) -> Result:
    """Each prompt, of any length, continued greedily by heads that read a few chunks, with `score` the sum of `logp` in nats.

    Beside it `chosen` [prompt, position, layer, head, chunk], the chunks that a head read for each new token, -1 where there were fewer.
    The rest as every decoder returns it.

    `window`: tokens of a chunk. `chunks`: how many a head reads, three or more.
    """
    call = asked(model, prompts, max_new_tokens, ends, batch_size, endless=True)
    seen: dict[int, list[Tensor]] = {}
    drafts = decode(call, window=window, chunks=chunks, seen=seen)
    longest = max(map(len, seen.values()))
    chosen = torch.full((len(drafts), longest, *seen[0][0].shape), -1)
    for i, steps in seen.items():
        chosen[i, : len(steps)] = torch.stack(steps)
    axes = ("prompt", "position", "layer", "head", "chunk")
    return as_result(call, drafts, scalars={"chosen": (chosen, axes, "number of a chunk")})


published(longheads, decode, endless=True)
