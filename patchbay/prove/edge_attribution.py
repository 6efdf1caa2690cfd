"""Edge attribution patching (EAP, EAP-IG): the effect of corrupting every edge between two parts, from gradients.

    effect(u -> v) = sum over positions of (u's output, clean - corrupted) . d score / d (the stream that v reads)

in the task's unit, positive where the model needs the edge (turned round for kl; the papers write corrupted - clean).
An edge goes from a writer u (the embedding, a head, a mixer without heads, an MLP) to a later reader v (a head's q, a
key/value group's k or v, what else attention reads, an MLP, the logits). The gradient at v's own reading of the
stream goes through the norm before it, rotary positions and all, by the model's own graph; where a family norms what
attention adds, a head's output is carried through that norm to first order. `steps` = 1 is EAP, the gradient of the
clean run; more is EAP-IG: the mean gradient over runs whose embeddings lie k / steps of the way from the corrupted
twin's to the clean prompt's, k = 1..steps. The gradients of all that reads the embedding sum to its own, so the edges
out of it sum to the gap between the runs as steps grow: `from_embed` beside `gap`.

`exact` edges, spread evenly over the ranking, are also patched one by one (`exact` [edit]: what corrupting that edge
alone costs), and the agreement is reported. Cost: two runs, and for each step a run, its backward pass, and a short
one for each q, k and v. Intervals are 95 % bootstraps over prompts; `p` flips signs prompt by prompt, `p_adjusted` is
over all edges (Benjamini and Hochberg).

Syed, Rager and Conmy 2023, "Attribution Patching Outperforms Automated Circuit Discovery"; Hanna, Pezzelle and
Belinkov 2024, "Have Faith in Faithfulness". An estimate, no proof: edges through saturated attention or far moves are
misjudged; `prove.circuit` tests a set of edges.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from patchbay import maths
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.prove._cells import batches, check_twins, intervals, p_values, rounding
from patchbay.prove._first_order import agreed, along, check_smooth
from patchbay.prove._graph import QKV, Graph, Mixed, Outputs, head_outputs, outputs
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

SHOWN = 30  # edges in the table of the strongest


@method(paper="syed2023")
def edge_attribution(model: Model, task: Task, *, steps: int = 1, exact: int = 0, batch_size: int = 16) -> Result:
    """The first-order effect of corrupting each edge from a writer to a reader of the stream, for all edges at once.

    Main variable `effect` [edit], one entry an edge ("L0.H1 -> L1.KV0.k"), with `low`, `high`, `p`, `p_adjusted`;
    `from_embed`, the sum over edges out of the embedding, beside `gap` = `clean` - `corrupted`. With `exact` above 0 also
    `exact` [edit] (NaN where not patched), `spearman` and `overlap`. The table "edges" holds the strongest.

    `steps`: runs between the twins whose gradients are averaged; 1 is EAP, more is EAP-IG. `exact`: how many edges,
    spread over the ranking, are also patched one by one.
    """
    check_twins(model, task)
    check_smooth(task, steps)
    if exact < 0:
        raise PatchbayError(f"exact={exact}: how many edges are patched one by one, 0 or more")
    graph = Graph(model)
    effects, clean, corrupted = estimate(graph, task, steps, batch_size)  # effects [prompt, edge]
    mean, low, high = intervals(effects)
    p, adjusted = p_values(effects, rounding(clean, corrupted))
    named = {"effect": mean, "low": low, "high": high, "p": p, "p_adjusted": adjusted}
    gap = task.sign * (clean - corrupted)
    out = torch.tensor([writer == 0 for writer, _ in graph.edges])
    scalars = {"from_embed": mean[out].sum(), "gap": gap.mean(), "clean": clean.mean(), "corrupted": corrupted.mean()}
    notes = _notes(graph, mean, adjusted, float(scalars["from_embed"]), float(gap.mean()), task.unit, steps)
    more: dict[str, tuple[Tensor | float, tuple[str, ...], str]]
    more = {name: (value, (), task.unit) for name, value in scalars.items()}
    if exact:
        named["exact"] = _exact(graph, task, mean, exact, batch_size)
        found, note = agreed(mean, named["exact"], rounding(clean, corrupted), "edges")
        more |= found
        notes.append(note)
    units = {"p": "probability", "p_adjusted": "probability"}
    labels = [graph.label(edge) for edge in graph.edges]
    order = mean.abs().argsort(descending=True, stable=True)[:SHOWN].tolist()
    variables: dict[str, tuple[Tensor | float, tuple[str, ...], str]]
    variables = {name: (value, ("edit",), units.get(name, task.unit)) for name, value in named.items()}
    return Result(
        variables | more,
        coords={"edit": labels},
        notes=notes,
        tables={
            "edges": [{"edge": labels[i]} | {name: float(value[i]) for name, value in named.items()} for i in order]
        },
    )


def estimate(
    graph: Graph, task: Task, steps: int, batch_size: int, instead: Outputs | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Effects [prompt, edge] of the twin's outputs, or of others `instead`; scores of the clean and the corrupted run [prompt]."""
    model, valid = graph.model, graph.valid
    effects = torch.zeros(len(task), len(graph.edges), dtype=torch.float64)
    scores = torch.zeros(2, len(task), dtype=torch.float64)
    for prompts in batches(task, batch_size):
        some = task[prompts]
        sides = [[list(ids) for ids in side] for side in (some.clean, some.corrupted or ())]
        pair = [outputs(graph, sides[0]), instead or outputs(graph, sides[1])]
        whole = torch.zeros(len(prompts), *valid.shape, dtype=torch.float64)  # [prompt, writer, reader]
        for trace, score in along(model, some, _taps(graph), steps):
            change = torch.cat(_change(graph, pair, trace), 2).flatten(3).float()  # [prompt, position, writer, d_model]
            for readers, gradient in _gradients(graph, trace, score):  # gradient [reader, prompt, position, d_model]
                product = torch.einsum("ptwd,rptd->pwr", change, gradient.float())
                whole[:, :, readers] += product.double().cpu() / steps
        effects[prompts] = task.sign * whole[:, valid]
        logits = [run(model, side, logits="last").last_logits for side in sides]
        for row, last in zip(scores, logits, strict=True):
            row[prompts] = some.score(last, logits[0]).double().cpu()
    return effects, scores[0], scores[1]


def _taps(graph: Graph) -> list[Port]:
    """The streams, what is read off them, and z where a norm follows attention."""
    taps = [Port("resid_out", graph.model.n_layers - 1)]
    for layer in range(graph.model.n_layers):
        has = graph.model.signals(layer)
        read = sorted({_whole(graph.readers[i]).signal for i in graph.of(layer, *QKV, "attn.out", "mlp.in")})
        more = ["resid_mid"] * ("resid_mid" in has) + ["attn.z"] * (graph.norm_after(layer) is not None)
        taps += [Port(signal, layer) for signal in ("resid_in", *more, *read)]
    return taps


def _whole(reader: Port) -> Port:
    """The signal whose gradient is carried back to the reader's stream; that of an MLP's input may be attention's input too."""
    return Port("mlp.out" if reader.signal == "mlp.in" else reader.signal, reader.layer)


def _change(graph: Graph, pair: list[Outputs], trace: Trace) -> list[Tensor]:
    """Clean minus corrupted of what each group puts into the stream, each [prompt, position, writer, d_model]."""
    out = []
    for i, group in enumerate(graph.groups):
        change = pair[0].values[i] - pair[1].values[i]
        if graph.writers[group.writers.start].kind == "head":
            norm = graph.norm_after(group.layer)
            if norm is not None:  # to first order, from where this run stands
                z = trace[Port("attn.z", group.layer)].detach()
                here = head_outputs(graph.model, group.layer, z).sum(-2, keepdim=True) + pair[0].bias[i]
                change = torch.func.jvp(norm, (here.expand_as(change).contiguous(),), (change,))[1]
            change = change * graph.model.residual_scale
        out.append(change.detach())
    return out


def _gradients(graph: Graph, trace: Trace, score: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """Readers that stand together, and d score / d their own reading of the stream: [reader, prompt, position, d_model]."""
    last = Port("resid_out", graph.model.n_layers - 1)
    ports = [last, *dict.fromkeys(_whole(port) for port in graph.readers if port.layer is not None)]
    found = dict(zip(ports, trace.gradient(score, *ports), strict=True))
    for layer in range(graph.model.n_layers):
        stream = trace[Port("resid_in", layer)]
        readers = graph.of(layer, *QKV, "attn.out")
        pieces: list[Tensor] = []
        for port in (graph.readers[i] for i in readers):
            whole = _whole(port)
            gradient = found[whole]
            if port.index is not None:
                gradient = torch.zeros_like(gradient)
                gradient[:, port.index] = found[whole][:, port.index]
            through = torch.autograd.grad(trace[whole], stream, gradient, retain_graph=True)[0]
            pieces.append(through - sum(pieces) if port.index is None else through)  # attn.out: what q, k and v are not
        yield readers, torch.stack(pieces)
        if mlp := graph.of(layer, "mlp.in"):
            sequential = "resid_mid" in graph.model.signals(layer)
            stream = trace[Port("resid_mid", layer)] if sequential else stream
            whole = _whole(graph.readers[mlp[0]])
            yield mlp, torch.autograd.grad(trace[whole], stream, found[whole], retain_graph=True)[0][None]
    yield [len(graph.readers) - 1], found[last][None]


def _exact(graph: Graph, task: Task, mean: Tensor, n: int, batch_size: int) -> Tensor:
    """The mean effect [edge] of corrupting one edge alone, for `n` edges spread evenly over the ranking; NaN for the others."""
    ranked = mean.abs().argsort(descending=True, stable=True)
    chosen = ranked[torch.linspace(0, len(ranked) - 1, min(n, len(ranked))).round().long()]
    keep = graph.valid.repeat(len(chosen) + 1, 1, 1)  # the last one is whole
    for circuit, edge in enumerate(chosen.tolist()):
        keep[circuit][graph.edges[edge]] = False
    total = torch.zeros(len(chosen), dtype=torch.float64)
    for prompts in batches(task, batch_size):
        some = task[prompts]
        mixed = Mixed(graph, some.clean, outputs(graph, some.corrupted or ()))
        logits = mixed.logits(keep)
        scores = torch.stack([some.score(one, logits[-1]).double().cpu() for one in logits])  # [circuit, prompt]
        total += task.sign * (scores[-1] - scores[:-1]).sum(1)
    out = torch.full_like(mean, torch.nan)
    out[chosen] = total / len(task)
    return out


def _notes(graph: Graph, mean: Tensor, adjusted: Tensor, sent: float, gap: float, unit: str, steps: int) -> list[str]:
    order = mean.abs().argsort(descending=True, stable=True)[:5].tolist()
    strongest = ", ".join(f"{graph.label(graph.edges[i])} {float(mean[i]):.3g}" for i in order)
    clear = maths.clear(adjusted, "edges")
    more = "; more steps bring the two together" if abs(sent - gap) > 0.1 * abs(gap) else ""
    return [
        f"of {len(mean)} edges the strongest: {strongest}" + (f"; {clear}" if clear else ""),
        f"edges out of the embedding sum to {sent:.3g} {unit}, the gap between the runs is {gap:.3g} ({steps} steps){more}",
    ]
