"""Channels: which parts of a model are wired to which later parts, and through which few dimensions, from the weights alone.

For a writer W (a head's W_V W_O, an MLP's or expert's out-map, a neuron, the embedding, a bias) and a later reader W_out (a head's
W_QK for its query, W_QK^T for its key, W_OV for its value; an MLP or expert, a router, the unembedding) the composition score is

    CS = |W W_out|_F / (|W|_F |W_out|_F)          of component i of W = sum_i s_i u_i v_i^T:  CS_i = |v_i^T W_out|_F / |W_out|_F

and CS^2 = sum s_i^2 CS_i^2 / sum s_i^2: a channel on a small singular value cannot be seen in CS and is plain in CS_i. Norm gains
and centring are folded into the reading side of copies. In rotary models W_QK depends on the distance between query and key:
CS^2 is then taken with |.|^2 averaged over `offsets` above and below the line, and `by_offset` has the score at each distance. Latent
attention has a norm inside its maps, one positive number per token; `weights.py` says which number stands for it: value
scores do not depend on it, query and key scores do.

Every score has its null: a random orthogonal matrix between the two keeps both spectra and destroys the alignment. The mean,
variance and skewness of CS^2 are known in closed form (`_haar.py`), so nothing is sampled: z = (CS^2 - 1 / d_model) / sd is exact,
`p_adjusted` (Benjamini-Hochberg over all channels tested) follows, `null_mean` and `null_sd` are those of CS itself, and `nulls`
exact draws check them. `chance` is 1 / sqrt(d_model). Cost: no run of the model but
the one that measures its rotary turn; GPT-2 small's heads in about a second, with all components a few.

Elhage et al. 2021 (scores); Merullo, Eickhoff and Pavlick 2024, "Talking Heads" (components). It does not show that a channel
is used: a trained stream is far from isotropic, so that many scores differ from a random rotation's, and what is written may never be
large. Follow with `prove.channel`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay.find import _haar
from patchbay.find._composition import Net, Scores, gather, reader_text, score
from patchbay.maths import benjamini_hochberg
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.channel import Channel
from patchbay.signal.port import PatchbayError
from patchbay.wiring.components import weighed

LISTED = 200  # channels in the ranked list
ERROR_RATE = 0.05  # the share of false finds that the list of channels allows


@method(paper="merullo2024", unit="composition")
def channels(
    model: Model,
    *,
    writers: Sequence[str] | None = None,
    readers: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    components: bool = True,
    offsets: Sequence[int] | None = None,
    nulls: int = 200,
) -> Result:
    """Composition scores of every writer with every later reader, with the rotation null.

    `writers`: kinds (head, mlp, neuron, expert, embed, positions, bias; by default all but neuron) or parts (L0.H1, L0).
    `readers`: parts or layers (by default all). `kinds`: query, key, value, mlp, router, unembed. `components`: heads by
    singular component too. `offsets`: distances of a rotary model's query and key. `nulls`: random rotations drawn to check.

    The list ranks channels by score: those whose adjusted p is at most 0.05, at most 200 (a head's components where asked, else
    whole writers); `share` is the component's part of sum s_i^2. `whole`, `whole_z`, `whole_p` [writer, reader] are the map of
    whole writers; `by_component` [writer, component, reader] every component's score.
    """
    if nulls < 0:
        raise PatchbayError(f"nulls={nulls}: a number of draws, 0 or more")
    net = gather(
        model, writing=writers, reading=readers, kinds=kinds, components=components, offsets=offsets,
        by_offset=True,
    )  # fmt: skip
    found = score(net)
    table = Table(net, found)
    listed = table.best(LISTED)
    values: dict[str, tuple[Tensor, Sequence[str], str]] = {
        name: (column, ("part",), unit) for name, (column, unit) in table.columns(listed).items()
    }
    turned = by_offset(net, listed)
    if bool(turned.isfinite().any()):
        values["by_offset"] = (turned, ("part", "offset"), "composition")
    values["whole"] = (found.squares.sqrt(), ("writer", "reader"), "composition")
    values["whole_z"] = (table.whole_z, ("writer", "reader"), "standard deviations")
    values["whole_p"] = (table.whole_p, ("writer", "reader"), "adjusted p")
    if found.rows:
        values["by_component"] = (_components(found), ("writer", "component", "reader"), "composition")
    values["chance"] = (torch.tensor(1 / math.sqrt(model.d_model)), (), "composition")
    if nulls:
        values |= _checked(net, found, nulls)
    coords: dict[str, Any] = {
        "writer": [str(name) for name in net.sources],
        "reader": [reader_text(*target) for target in net.targets],
    }
    coords |= {"offset": list(net.offsets)} if "by_offset" in values else {}
    return Result(values, coords=coords, parts=[row.channel for row in listed], notes=_notes(net, table, listed))


class Row:
    """A channel with its place among the writers, components and readers."""

    def __init__(self, channel: Channel, writer: int, component: int | None, reader: int) -> None:
        self.channel, self.writer, self.component, self.reader = channel, writer, component, reader


class Table:
    """Scores of all channels with null moments, p values and their adjustment; picks the strongest."""

    def __init__(self, net: Net, found: Scores) -> None:
        self.net, self.found = net, found
        d = net.model.d_model
        self.mean, variance, third = _haar.moments(found.written, found.read, d)
        self.score_mean, self.score_sd = _haar.of_score(self.mean, variance)
        self.whole_z = (found.squares - self.mean) / variance.sqrt()
        raw = _haar.upper_tail(found.squares, self.mean, variance, third).masked_fill(found.squares.isnan(), torch.nan)
        self.whole_p = benjamini_hochberg(raw.cpu())
        unit = torch.ones(1, 3, dtype=torch.float64, device=found.read.device)  # a unit vector: all traces are 1
        self.row_moments = [m[0] for m in _haar.moments(unit, found.read, d)]  # each [reader]
        self.row_mean, self.row_sd = _haar.of_score(*self.row_moments[:2])
        self.places = sorted(found.rows)
        self._test_all(raw)

    def _test_all(self, whole: Tensor) -> None:
        """p of every channel of the list, adjusted together: components of heads that have them, and the other writers."""
        plain = [i for i in range(len(whole)) if i not in self.found.rows]
        tested = [whole[plain].flatten().cpu()]
        if self.places:
            rows = torch.cat([self.found.rows[i] for i in self.places]).double()  # [head and component, reader]
            p = _haar.upper_tail(rows, *self.row_moments).masked_fill(rows.isnan(), torch.nan)
            tested.append(p.flatten().cpu())
        adjusted = benjamini_hochberg(torch.cat(tested))
        n_readers = whole.shape[1]
        count = len(plain) * n_readers
        self.plain, self.plain_p = plain, adjusted[:count].view(-1, n_readers)
        self.rows_p = adjusted[count:].view(-1, n_readers)

    def best(self, n: int) -> list[Row]:
        """The channels of highest score among those that pass; without any, the few of highest score."""
        scores = [self.found.squares[self.plain].flatten().cpu().sqrt()]
        if self.places:
            scores.append(torch.cat([self.found.rows[i] for i in self.places]).flatten().double().cpu().sqrt())
        flat = torch.cat(scores)
        p = torch.cat([self.plain_p.flatten(), self.rows_p.flatten()])
        self.n_tested, passing = int((~p.isnan()).sum()), p <= ERROR_RATE
        self.n_passing = int(passing.sum())
        kept = flat.masked_fill(~passing, -1.0) if self.n_passing else flat.nan_to_num(-1.0)
        top = kept.topk(min(n if self.n_passing else 20, self.n_passing or self.n_tested)).indices
        return [self._row(int(place)) for place in top]

    def _row(self, place: int) -> Row:
        n_readers, sources = len(self.net.targets), self.net.sources
        line, reader = divmod(place, n_readers)
        part, kind = self.net.targets[reader]
        if line < len(self.plain):
            source = sources[self.plain[line]]
            return Row(Channel(source.writer, source.component, part, kind), self.plain[line], None, reader)
        line -= len(self.plain)
        for writer in self.places:
            count = len(self.found.rows[writer])
            if line < count:
                return Row(Channel(sources[writer].writer, line, part, kind), writer, line, reader)
            line -= count
        raise AssertionError("a place outside the table")

    def columns(self, rows: list[Row]) -> dict[str, tuple[Tensor, str]]:
        """score, z, p_adjusted, null_mean, null_sd and share of listed channels."""
        out: dict[str, list[float]] = {
            name: [] for name in ("score", "z", "p_adjusted", "null_mean", "null_sd", "share")
        }
        starts = {writer: sum(len(self.found.rows[i]) for i in self.places if i < writer) for writer in self.places}
        for row in rows:
            w, r, c = row.writer, row.reader, row.component
            if c is None:
                square, p, share = self.found.squares[w, r], self.plain_p[self.plain.index(w), r], 1.0
                mean, sd, z = self.score_mean[w, r], self.score_sd[w, r], float(self.whole_z[w, r])
            else:
                square, p = self.found.rows[w][c, r].double(), self.rows_p[starts[w] + c, r]
                mean, sd, share = self.row_mean[r], self.row_sd[r], float(self.found.weights[w][c])
                z = float((square - self.row_moments[0][r]) / self.row_moments[1][r].sqrt())
            numbers = (float(square) ** 0.5, z, float(p), float(mean), float(sd), share)
            for name, number in zip(out, numbers, strict=True):
                out[name].append(number)
        units = ("composition", "standard deviations", "adjusted p", "composition", "composition", "share")
        return {n: (torch.tensor(v, dtype=torch.float64), u) for (n, v), u in zip(out.items(), units, strict=True)}


def by_offset(net: Net, rows: list[Row]) -> Tensor:
    """Scores of listed channels at each rotary offset, [channel, offset]; NaN where the reader does not turn."""
    out = torch.full((len(rows), len(net.offsets)), torch.nan, dtype=torch.float64)
    ends = torch.tensor([len(group.names) for group in net.readers]).cumsum(0)
    write_ends = torch.tensor([len(group.names) for group in net.writers]).cumsum(0)
    for i, row in enumerate(rows):
        at = int((ends <= row.reader).sum())
        reading = net.readers[at]
        if not reading.by_offset:
            continue
        place = row.reader - int(ends[at]) + len(reading.names)
        lines, total = _lines(net, row, write_ends)
        for j, factors in enumerate(reading.by_offset):
            f = factors.values[place]
            power = (f.diagonal().sum() if factors.is_gram else f.square().sum()).double()
            one = type(factors)(f[None], factors.is_gram)
            out[i, j] = (one.squares(lines).double().sum() / (total * power)).sqrt()
    return out


def _lines(net: Net, row: Row, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x whose |x F|^2 add up to |P F|^2 of a channel's writer, and |P|^2."""
    if row.component is not None:
        name = net.sources[row.writer].writer
        lines = net.bases[name.layer or 0][1][name.index or 0][row.component][None]
        return lines, lines.square().sum().double()
    at = int((ends <= row.writer).sum())
    group = net.writers[at]
    place = row.writer - int(ends[at]) + len(group.names)
    values = group.factors.values[place]
    if group.factors.is_gram:
        sizes, vectors = torch.linalg.eigh(values.double())
        values = (vectors * sizes.clamp_min(0).sqrt()).mT.to(values)
    return values, values.square().sum().double()


def _components(found: Scores) -> Tensor:
    """[writer, component, reader] in float32, NaN for writers that are not taken apart."""
    widest = max(len(rows) for rows in found.rows.values())
    out = torch.full((len(found.squares), widest, found.squares.shape[1]), torch.nan)
    for writer, rows in found.rows.items():
        out[writer, : len(rows)] = rows.sqrt().float().cpu()
    return out


def _checked(net: Net, found: Scores, n: int) -> dict[str, tuple[Tensor, Sequence[str], str]]:
    """The closed form against `n` random rotations of the first pair of whole writer and reader."""
    writer, reader = (int(x) for x in net.later().nonzero()[0])
    a, g = spectrum(net.writers, writer), spectrum(net.readers, reader)
    x = _haar.drawn(a, g, net.model.d_model, n, torch.Generator().manual_seed(0))
    mean, variance, _ = _haar.moments(found.written[writer][None], found.read[reader][None], net.model.d_model)
    error = (x.mean() - mean.cpu()[0, 0]) / (variance.cpu()[0, 0] / n).sqrt()
    spread = x.std() / variance.cpu()[0, 0].sqrt() if n > 1 else torch.tensor(torch.nan)
    return {
        "null_check_mean": (error, (), "standard errors from the closed form"),
        "null_check_spread": (spread, (), "drawn over closed form"),
    }


def spectrum(groups: Sequence[Any], place: int) -> Tensor:
    """Eigenvalues of the matrix of the writer or reader at a place of the flat list."""
    for group in groups:
        if place < len(group.names):
            eigenvalues: Tensor = group.factors.spectrum(place).cpu()
            return eigenvalues
        place -= len(group.names)
    raise AssertionError("a place outside the list")


def _notes(net: Net, table: Table, listed: list[Row]) -> list[str]:
    notes = [
        f"{table.n_passing} of {table.n_tested} channels pass at an adjusted p of {ERROR_RATE}"
        + ("; the list shows the highest scores, which chance may give" if not table.n_passing else "")
        + (f"; the list holds the {len(listed)} of highest score" if len(listed) < table.n_passing else "")
    ]
    if net.offsets:
        notes.append(f"queries and keys turn with distance: scores are over offsets {', '.join(map(str, net.offsets))}")
    if net.model.family.qkv == "gated":
        notes.append("a gate multiplies what heads write, token by token: their scores are of the map before it")
    notes += weighed(net.model, {group.kind for group in net.readers})
    skipped = [i for i, at in enumerate(net.model.modules) if at.attn is None]
    if skipped:
        notes.append(
            f"layers {', '.join(map(str, skipped))} mix tokens without heads: their mixers are no writers here"
        )
    return notes
