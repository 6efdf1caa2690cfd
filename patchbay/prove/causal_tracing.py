"""Causal tracing: where a run that no longer knows its subject gets the answer back from one clean state.

The tokens of the subject are made unreadable, e~ = e + noise x sd x N(0, 1) with sd the standard deviation of all numbers of the
subjects' embeddings, and one cell (layer, position) of that run is given its clean value:

    effect = mean over draws of (score with the clean state - score of the noised run)      share = mean effect / mean (clean - noised)

The control gives the same cell what it holds under another draw of the noise: a state of the same kind that does not know the
subject. `p` flips, prompt by prompt, the signs of the effect less its control; `p_adjusted` holds the share of false finds over
all cells (Benjamini and Hochberg). Noise is drawn by seed, prompt and draw, so that neither batches nor neighbours change it. Every
cell is exact, through `sweep`. In a window of w (`site="mlp_out x 10"`) a cell is w neighbouring layers put back together, from layer - w // 2 on, those
that there are; the paper takes ten of 48 for attention and MLPs, whose single outputs bring little back. Cost: 2 x draws x cells short runs.

Meng, Bau, Andonian and Belinkov 2022, "Locating and Editing Factual Associations in GPT", section 2. A cell that brings the answer
back carries what is needed from there on; it does not say that the fact is stored there, nor where a change of the weights works
best (Hase et al. 2023). Noise takes the run where no text does: `prove.activation_patching` asks the same with a twin.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.errors import one_of
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.prove._cells import batches, check_draws, doubtful, intervals, p_values, rounding, swept_batches
from patchbay.prove._sites import SIGNAL, Column, Layout, columns_of, layers_of, placed
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.sweeps.settings import in_turn
from patchbay.sweeps.sweep import sweep
from patchbay.tasks.checks import marked
from patchbay.tasks.task import Task

STATES = ("resid_in", "resid_mid", "resid_out", "attn_out", "mlp_out")
TIMES = " x "  # between a state and its window
EMBED = Port("embed")


@method(paper="meng2022")
def causal_tracing(
    model: Model,
    task: Task,
    *,
    site: str = "resid_out",
    positions: str | None = None,
    noise: float = 3.0,
    draws: int = 10,
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """The share of the answer that the clean state of each (layer, position) brings back to a run whose subject is noise.

    `task`: prompts with the mark "subject"; twins are not asked.
    `positions`: "each", "all", "last", "marks" or names of groups, as in `prove.activation_patching`. Main variable `share`
    [layer, position] with `low` and `high`; `effect` and its ends in the task's unit, `control`, `p`, `p_adjusted`, and the scores
    `clean` and `noised`. The paper's metric is "probability".

    `site`: which state: resid_in, resid_mid, resid_out, attn_out or mlp_out, of one layer, or of several neighbours put back together, "mlp_out x 10". `noise`: how much, in standard deviations of the
    subjects' embeddings. `draws`: of the noise, for every prompt.
    """
    site, window = _window(model, site)
    layers = layers_of(model, site, "denoising")
    spans = marked(task, "subject")
    check_draws(draws)
    if not noise > 0:
        raise PatchbayError(f"noise={noise}: standard deviations of the subjects' embeddings, above 0")
    task.check(model.vocab_size)
    ports = [Port(SIGNAL[site], layer) for layer in layers]
    columns = columns_of(model, task, site, positions)
    sd = _spread(model, task, spans, batch_size)
    found = _traced(model, task, ports, columns, spans, noise * sd, draws, batch_size, seed, window)
    effects, control, clean, noised = found
    gap = task.sign * (clean - noised)
    p, adjusted = p_values(effects - control, rounding(clean, noised))
    named = dict(zip(("share", "low", "high"), intervals(effects, gap), strict=True))
    named |= dict(zip(("effect", "effect_low", "effect_high"), intervals(effects), strict=True))
    named |= {"control": intervals(control)[0], "p": p, "p_adjusted": adjusted}
    units = dict.fromkeys(("effect", "effect_low", "effect_high", "control"), task.unit)
    units |= dict.fromkeys(("p", "p_adjusted"), "probability")
    layout = Layout(model, site, ports, None, columns)
    return Result(
        {name: (layout(value), layout.axes, units.get(name, "share of the gap")) for name, value in named.items()}
        | {"clean": (clean.mean(), (), task.unit), "noised": (noised.mean(), (), task.unit)}
        | {"sd": (sd, (), "standard deviation")},
        coords=layout.coords,
        notes=_notes(task, layout, named["share"], named["control"] / gap.mean(), adjusted, gap)
        + ([f"each layer is put back with its neighbours, {window} together"] if window > 1 else []),
    )


# --- the noise ------------------------------------------------------------------------------------------


def _spread(model: Model, task: Task, spans: Sequence[tuple[int, ...]], batch_size: int) -> float:
    """The standard deviation of all numbers of the subjects' embeddings."""
    rows = []
    for prompts in batches(task, batch_size):
        seen = run(model, task[prompts], taps=[EMBED], logits="last")[EMBED].double().cpu()
        rows += [seen[row, list(spans[prompt])] for row, prompt in enumerate(prompts)]
    return float(torch.cat(rows).std())


def _noise(task: Task, prompts: list[int], draw: int, size: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal numbers [prompt, position, d_model], each prompt's by its tokens."""
    rows = []
    for prompt in prompts:
        own = zlib.crc32(f"{seed} {draw} {list(task.clean[prompt])}".encode())
        rows.append(torch.randn(size, generator=torch.Generator().manual_seed(own)))
    return torch.stack(rows)


def _window(model: Model, site: str) -> tuple[str, int]:
    """A state, and of how many layers: "mlp_out x 10"."""
    name, _, said = site.partition(TIMES)
    one_of("site", name, STATES)
    window = 1 if TIMES not in site else int(said) if said.isdecimal() else 0
    if not 1 <= window <= model.n_layers:
        raise PatchbayError(
            f"site={site!r}: a state, and after{TIMES}how many neighbouring layers are put back together, 1 to {model.n_layers}"
        )
    return name, window


# --- the runs -------------------------------------------------------------------------------------------


def together(ports: list[Port], at: int, window: int) -> list[Port]:
    """The ports of the layers that are put back with one of them."""
    first = (ports[at].layer or 0) - window // 2
    return [port for port in ports if first <= (port.layer or 0) < first + window]


def _traced(
    model: Model,
    task: Task,
    ports: list[Port],
    columns: list[Column],
    spans: list[tuple[int, ...]],
    scale: float,
    draws: int,
    batch_size: int,
    seed: int,
    window: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Effects and their controls [prompt, port, column], and the scores of the clean and the noised run [prompt]."""
    effects = torch.full((2, len(task), len(ports), len(columns)), torch.nan, dtype=torch.float64)
    scores = torch.zeros(2, len(task), dtype=torch.float64)
    for prompts in swept_batches(task, batch_size):
        some, own = task[prompts], [spans[prompt] for prompt in prompts]
        clean = run(model, some, taps=ports, logits=task.reads)
        last = clean.read(task.reads)
        size = (len(some.clean[0]), model.d_model)
        noises = [
            placed(EMBED, scale * _noise(task, prompts, draw, size, seed), own, edit.add) for draw in range(draws + 1)
        ]
        cells = [
            (i, j)
            for i in range(len(ports))
            for j, column in enumerate(columns)
            if any(column.spans[n] for n in prompts)
        ]
        metric = None if task.metric != "kl" else lambda logits, at, last=last: maths.kl(last[at], logits)
        total = torch.zeros(2, len(cells), len(prompts), dtype=torch.float64)
        noised = torch.zeros(len(prompts), dtype=torch.float64)
        for draw in in_turn(range(draws)):
            other = run(model, some, taps=ports, edits=[noises[draw + 1]], logits="last")
            entries: list[list[Edit]] = [[noises[draw]]]
            for donor in (clean, other):
                for i, j in cells:
                    spots = [columns[j].spans[prompt] for prompt in prompts]
                    near = together(ports, i, window)
                    entries.append([noises[draw], *(placed(port, donor[port], spots) for port in near)])
            swept = sweep(model, some, entries, metric)["value"].double()  # [edit, prompt]
            noised += swept[0] / draws
            total += task.sign * (swept[1:] - swept[0]).view(2, len(cells), -1) / draws
        scores[0, prompts], scores[1, prompts] = some.score(last, last).double().cpu(), noised
        has = torch.tensor([[bool(columns[j].spans[prompt]) for prompt in prompts] for _, j in cells])
        at = torch.tensor(cells)
        effects[:, torch.tensor(prompts)[None, :], at[:, :1], at[:, 1:]] = torch.where(has, total, torch.nan)
    return effects[0], effects[1], scores[0], scores[1]


# --- the result -----------------------------------------------------------------------------------------


def _notes(task: Task, layout: Layout, share: Tensor, control: Tensor, adjusted: Tensor, gap: Tensor) -> list[str]:
    """The largest cell in words beside its control, how many are clear of theirs, and whether there was a gap to share."""
    flat = share.nan_to_num(-torch.inf).flatten()
    best = int(flat.argmax())
    row, column = divmod(best, share.shape[1])
    place = f"{layout.ports[row]}" + (f" at {layout.columns[column].label}" if len(layout.columns) > 1 else "")
    clear = maths.clear(adjusted)
    notes = [
        f"{place} brings back most: {float(flat[best]):.3g} of the gap, a state of another noise {float(control.flatten()[best]):.3g}"
        + (f"; {clear}" if clear else "")
    ]
    if unsure := doubtful(gap, task.unit):
        notes.append(f"the noise takes nothing clear from the answer (gap {unsure}): shares mean little, read effect")
    return notes
