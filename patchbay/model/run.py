"""Run a model on prompts, tapping and editing any signals. Exact: an untapped run is the model's own forward, bit for bit.

Prompts of different lengths run as one batch, padded on the right: in a causal model nothing at a prompt's own positions
depends on what stands to the right of it. Padding is NaN in what taps return, so that it cannot be averaged by mistake.

With `max_new_tokens` the prompts are continued first, and the finished texts are run once more, whole: taps then hold every
prompt's and every generated token, under the same edits, whatever cache, beams or drafts the tokens came from. The logits that
tokens were chosen from must be those of that run, else it is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbay.edits.apply import acts_on, for_prompts
from patchbay.edits.edit import Edit, conditional
from patchbay.errors import by_kind
from patchbay.jacks.defaults import on_own_device
from patchbay.model.filling import Folder, request
from patchbay.model.generate import check_agreement, continued
from patchbay.model.given import flat_edits, flat_ports
from patchbay.model.kept import load_trace
from patchbay.model.model import Model
from patchbay.model.regime import regimes
from patchbay.model.trace import Trace, join, nan_padding
from patchbay.signal.port import PatchbayError, Port
from patchbay.signal.positions import Batch

__all__ = ["Trace", "run"]
TOGETHER = 32  # prompts of a batch that goes to disk, unless batch_size says


@by_kind
@on_own_device
def run(
    model: Model,
    prompts: Any,
    *,
    taps: Sequence[Port | str] = (),
    edits: Sequence[Any] = (),
    grad: bool = False,
    logits: str | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    folder: str | Path | None = None,
    **options: Any,
) -> Trace:
    """Run `prompts` (text, texts, token ids, a tensor or a Task) once, with `edits` made and `taps` (Ports or their text, such as
    "L3.attn.pattern") read.

    `grad=True` keeps the graph, for `trace.gradient`. `logits="last"` keeps those of each prompt's last position alone, not all, and
    unembeds no others where all prompts have one length. `batch_size` splits the prompts; rows and masks of edits count in
    all of them. Raises PatchbayError for a port the model lacks, a position outside a prompt, a value that does not
    fit, or an edit that touches nothing.

    `max_new_tokens`: the prompts are continued as `model.generate` continues them, with its `options`, and the trace is of the
    finished texts, prompt and generated tokens: `trace.ids`, `trace.prompt_lengths`, `trace.new_ids`. Positions of edits count in
    the prompt. The cost is the generation and one run over the finished texts.

    `folder`: taps go to disk, for more than memory holds, and the trace reads them when it is asked (`pb.load_trace` opens it later).
    Its numbers are those of a run in memory with the same `batch_size`, which is 32 unless said. In memory are the token ids, one
    batch with its taps and one shard of 256 MB, or of one batch where that is larger. Logits are kept where `logits` says
    "all" or "last". The same call goes on where it was stopped; a folder of another model, prompts, taps or edits is refused.
    """
    edits, taps = flat_edits(edits, model=model), flat_ports(taps, model)
    if batch_size is not None and batch_size < 1:
        raise PatchbayError(f"batch_size={batch_size}: at least one prompt is run at a time")
    if logits not in (None, "all", "last"):
        raise PatchbayError(f"logits={logits!r}: 'all' or 'last'")
    if folder is not None:
        _refuse_beside_folder(grad, max_new_tokens, options)
        return _to_folder(model, prompts, taps, edits, logits or "none", batch_size, folder)
    logits = logits or "all"
    if max_new_tokens is None:
        if options:
            raise PatchbayError(f"{', '.join(options)}: options of generation are heard with max_new_tokens=n")
        batch = _Prompts(*model.batch(prompts))
        return _run(model, batch, taps, edits, grad, logits, batch_size)
    given = model.encode(prompts)
    grown = continued(model, given, max_new_tokens, edits, options, logits=True)
    batch = _Prompts(*model.batch(grown.rows), torch.tensor([len(ids) for ids in given]))
    trace = _run(model, batch, taps, edits, grad, "all", batch_size)
    check_agreement(trace.logits, batch.starts, grown.logits)
    if logits == "last":
        trace.logits = trace.last_logits[:, None]
    return trace


def run_rows(model: Model, rows: Any, prompt_lengths: Sequence[int]) -> Trace:
    """`run` of texts of which the first `prompt_lengths` tokens are the prompt and the others follow it: edits count in the prompt."""
    model.check_mode()
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    if int(ids.min()) < 0 or int(ids.max()) >= model.vocab_size or width > (model.longest_prompt or width):
        ids, lengths, _ = model.batch(rows)  # which says what is wrong
    batch = _Prompts(ids, lengths, int(lengths.min()) < width, torch.tensor(list(prompt_lengths)))
    return _run(model, batch, (), (), False, "all", None)


@dataclass(frozen=True)
class _Prompts:
    """What is run: `ids` [prompt, position] padded on the right, `lengths` [prompt]; `starts` [prompt], where generation begins."""

    ids: Tensor
    lengths: Tensor
    ragged: bool
    prompt_lengths: Tensor | None = None

    @property
    def starts(self) -> Tensor:
        return self.lengths if self.prompt_lengths is None else self.prompt_lengths

    def some(self, rows: Sequence[int]) -> _Prompts:
        """Some of the prompts, as wide as the longest of them."""
        lengths = self.lengths[list(rows)]
        width = int(lengths.max())
        return _Prompts(self.ids[list(rows), :width], lengths, int(lengths.min()) < width, self.starts[list(rows)])


def _run(
    model: Model,
    batch: _Prompts,
    taps: Sequence[Port],
    edits: Sequence[Edit],
    grad: bool,
    logits: str,
    batch_size: int | None,
) -> Trace:
    ids, lengths = batch.ids, batch.lengths
    touched = [_touched(edit, Batch(ids, lengths, batch.starts, model)) for edit in edits]
    apart = _apart(model, lengths)
    if apart is not None:
        trace = _in_groups(model, batch, apart, taps, edits, grad, logits, batch_size)
    elif batch_size is None or batch_size >= len(ids):
        trace = _together(model, batch, taps, edits, grad, logits)
    else:
        outer = next((edit for edit in model.active_edits() if edit.by_row), None)
        if grad or outer is not None:
            raise PatchbayError(
                f"batch_size cannot be combined with {outer or 'grad'}: "
                + ("its rows are those of a batch that is run whole" if outer else "the graph spans every prompt")
            )
        trace = _in_batches(model, batch, taps, edits, logits, batch_size)
    if conditional(edits):  # where a probe decided is known by now
        touched = [
            made if edit.where else named for edit, made, named in zip(edits, trace.touched, touched, strict=True)
        ]
    trace.touched, trace.edits, trace.prompt_lengths = touched, list(edits), batch.starts
    trace._model = model
    return trace


def _together(
    model: Model, batch: _Prompts, taps: Sequence[Port], edits: Sequence[Edit], grad: bool, logits: str
) -> Trace:
    """All prompts as one batch."""
    ids, lengths, ragged = batch.ids, batch.lengths, batch.ragged
    options: dict[str, Any] = {"use_cache": False}
    read = {port.signal for port in taps}
    if logits == "none":
        read |= {edit.port.signal for edit in model.active_edits(edits)}
    if logits != "all" and (logits == "none" or not ragged) and "logits" not in read:
        options["logits_to_keep"] = 1
    with (
        model.session(taps, edits, lengths=lengths, prompt_lengths=batch.starts, grad=grad) as session,
        torch.enable_grad() if grad else torch.no_grad(),
    ):
        output = model.hf(input_ids=_filled(ids, lengths, model) if ragged else ids, **options)
    with torch.set_grad_enabled(grad):  # whatever the caller's mode: what is read of a graph is of it
        kept = output.logits
        if logits == "last" and kept.shape[1] > 1:
            kept = kept[torch.arange(len(ids)), (lengths - 1).to(kept.device)][:, None]
        captured, touched = dict(session.captured), session.touched[-len(edits) :] if conditional(edits) else []
        session.captured.clear()  # hooks and session name one another: what they hold stays until Python looks for such circles
        if ragged:  # with grad a masked copy would stand beside the graph: it is made when it is read
            captured = {p: v if v.requires_grad else nan_padding(v, p, lengths) for p, v in captured.items()}
            if kept.shape[1] > 1 and (kept.requires_grad or Port("logits") in captured):
                kept = nan_padding(kept, Port("logits"), lengths)
            elif kept.shape[1] > 1:  # a vocabulary is wide: no second copy of it
                for row, n in zip(kept, lengths.tolist(), strict=True):
                    row[n:] = torch.nan
    return Trace(ids, lengths, kept, touched, [], captured)


def _apart(model: Model, lengths: Tensor) -> list[list[int]] | None:
    """Groups of prompts that must not share a batch, because what is computed for one would depend on the others; else None."""
    groups: dict[int, list[int]] = {}
    if int(lengths.min()) < int(lengths.max()):
        own = regimes(model, lengths.tolist())
        for i, length in enumerate(lengths.tolist()):
            groups.setdefault(own[length], []).append(i)
    return list(groups.values()) if len(groups) > 1 else None


def _cut(groups: Sequence[Sequence[int]], size: int | None) -> list[list[int]]:
    """Batches of at most `size` prompts of one group each."""
    return [
        list(group[i : i + (size or len(group))]) for group in groups for i in range(0, len(group), size or len(group))
    ]


def _in_groups(
    model: Model,
    batch: _Prompts,
    groups: Sequence[Sequence[int]],
    taps: Sequence[Port],
    edits: Sequence[Edit],
    grad: bool,
    logits: str,
    size: int | None,
) -> Trace:
    """Each group in batches of its own; their traces in the order of the prompts."""
    outer = next((edit for edit in model.active_edits() if edit.by_row), None)
    lengths = batch.lengths
    if grad or outer is not None:
        raise PatchbayError(
            f"{outer or 'grad=True'} on prompts of lengths {sorted(set(lengths.tolist()))[:6]}: what this model computes for one "
            "depends on the others of its batch, so they run apart; give prompts of one length"
        )
    batches = _cut(groups, size)
    joined = join([_share(model, batch, some, taps, edits, logits) for some in batches], logits)
    order = torch.tensor([i for some in batches for i in some]).argsort()
    captured = {port: value[order.to(value.device)] for port, value in joined._captured.items()}
    kept = joined.logits[order.to(joined.logits.device)]
    touched = [[rows[i] for i in order.tolist()] for rows in joined.touched]
    return Trace(joined.ids[order.to(joined.ids.device)], joined.lengths[order], kept, touched, [], captured)


def _in_batches(
    model: Model, batch: _Prompts, taps: Sequence[Port], edits: Sequence[Edit], logits: str, size: int
) -> Trace:
    """`size` prompts at a time, each batch under the edits' share of it."""
    some = _cut([range(len(batch.ids))], size)
    return join([_share(model, batch, rows, taps, edits, logits) for rows in some], logits)


def _share(
    model: Model, batch: _Prompts, some: Sequence[int], taps: Sequence[Port], edits: Sequence[Edit], logits: str
) -> Trace:
    """Some of the prompts as a batch of their own, under the edits' share of it."""
    part = batch.some(some)
    shares = [for_prompts(edit, some, len(batch.ids), part.ids.shape[1]) for edit in edits]
    trace = _together(model, part, taps, [share for share in shares if share is not None], False, logits)
    if conditional(edits):
        made = iter(trace.touched or [[()] * len(some)] * len(edits))
        trace.touched = [[()] * len(some) if share is None else next(made) for share in shares]
    return trace


def _refuse_beside_folder(grad: bool, max_new_tokens: int | None, options: dict[str, Any]) -> None:
    if grad:
        raise PatchbayError("folder= cannot be combined with grad=True: a gradient spans what is in memory")
    if max_new_tokens is not None or options:
        raise PatchbayError(
            f"folder= cannot be combined with {', '.join(['max_new_tokens'][: max_new_tokens is not None] + list(options))}: generate first "
            "(model.generate), then run the finished token ids, in which positions count in the whole text"
        )


def _to_folder(
    model: Model,
    prompts: Any,
    taps: Sequence[Port],
    edits: Sequence[Edit],
    logits: str,
    size: int | None,
    path: str | Path,
) -> Trace:
    """Batch by batch into a folder, where what is finished of the same request stays."""
    if not taps and logits == "none":
        raise PatchbayError("folder= keeps what is tapped: give taps=, or logits='all' or 'last'")
    batch = _Prompts(*model.batch(prompts))
    lengths = batch.lengths
    gated = conditional(model.active_edits(edits))
    if gated is not None:
        raise PatchbayError(
            f"folder= cannot be combined with {gated}: a trace on disk says where edits were made, which a probe decides as it runs; run in "
            "memory, with batch_size= and the taps that you need"
        )
    places = Batch(batch.ids, lengths, batch.starts, model)
    touched = [_runs(_acted(edit, places)) for edit in edits]
    batches = _cut(_apart(model, lengths) or [range(len(lengths))], size or TOGETHER)
    outer = next((edit for edit in model.active_edits() if edit.by_row), None)
    if len(batches) > 1 and outer is not None:
        raise PatchbayError(
            f"folder= cannot be combined with {outer}: its rows are those of a batch that is run whole, and here are {len(batches)}; "
            "give it as edits="
        )
    taps = list(dict.fromkeys(taps))
    asked = request(model, batch.ids, lengths, taps, edits, logits=logits, batch_size=size or TOGETHER)
    folder = Folder(path, asked)
    folder.fill(lambda some: _share(model, batch, some, taps, edits, logits), batches, lengths.tolist(), edits, touched)
    trace = load_trace(path)
    trace._model = model
    return trace


def _filled(ids: Tensor, lengths: Tensor, model: Model) -> Tensor:
    """The ids with padding of any token but the pad token, at which transformers warns that a mask is missing."""
    padding = torch.arange(ids.shape[1])[None, :] >= lengths[:, None]
    return ids.masked_fill(padding.to(ids.device), int(getattr(model.config, "pad_token_id", None) == 0))


def _acted(edit: Edit, batch: Batch) -> Tensor:
    """Where the edit acts, [prompt, position]; an edit that touches nothing is a mistake and said so."""
    places = acts_on(edit, batch)
    if not bool(places.any()):
        raise PatchbayError(
            f"{edit} touches nothing: no prompt has such a position (prompts have {batch.lengths.tolist()[:8]} tokens)"
        )
    return places


def _touched(edit: Edit, batch: Batch) -> list[tuple[int, ...]]:
    """Positions of each prompt that the edit touches."""
    found: list[list[int]] = [[] for _ in batch.lengths]
    for row, at in _acted(edit, batch).nonzero().tolist():
        found[row].append(at)
    return [tuple(row) for row in found]


def _runs(places: Tensor) -> list[list[int]]:
    """Of each prompt the positions where runs of touched ones begin and end, begin and end."""
    steps = torch.nn.functional.pad(places.int(), (1, 1)).diff().cpu()  # [prompt, position + 1]
    return [row.nonzero()[:, 0].tolist() for row in steps]
