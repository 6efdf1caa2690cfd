"""Relevance: gradient times input with a backward pass that conserves, RelP or AttnLRP.

    relevance = signal . g,   or (signal - signal of the twin) . g

g is the gradient of the score after these changes (`_rules.py`): scales of norms are constants, act(x) = x (act(x) / x) with a constant ratio, each
factor of a product gets half, and patterns are constants ("relp") or get softmax's own gradient with a quarter for q and k and half for v
("attnlrp"). The score is the right answer's logit, less the mean of the wrong ones where there are any; of a text, the logit of its most likely next
token. One forward and two backward passes.

Under "relp" the relevance of the stream that enters the first block, summed over all tokens, and that of all biases, `biases`, are the score: to
rounding, in every model, and checked in each call; a family that computes what no rule is for is refused by the difference. In models
without biases it is the score itself. Softmax with its own gradient does not conserve: what "attnlrp" leaves over is `rest`.

Jafari, Eberle, Khakzar and Nanda 2025, "RelP: Faithful and Efficient Circuit Discovery in Language Models via Relevance Patching"; Achtibat et
al. 2024, "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers". Routers' choices are constants here, as patterns are.

An attribution, no proof, and conservation is no faithfulness: on small trained models plain attribution patching is nearer to exact patching of MLP
outputs than relevance against the twin is (a test holds the numbers). Prove with `prove.activation_patching`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.errors import one_of
from patchbay.find._lens import shared_tokens
from patchbay.find._rules import Rule, Rules, kinds
from patchbay.model.given import by_length
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

Site = Literal["embed", "head", "neuron", "attn_out", "mlp_out"]
SIGNALS = {"embed": "resid_in", "head": "attn.z", "neuron": "mlp.act", "attn_out": "attn.out", "mlp_out": "mlp.out"}
NEAR = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 0.2,
}  # of all relevance, either sign; norms of many families compute in float32


@method(paper="jafari2025", unit="logits")
def relevance(
    model: Model,
    task: Task | str,
    *,
    rule: Rule = "relp",
    site: Site = "embed",
    against: Literal["zero", "twin"] = "zero",
    batch_size: int = 8,
) -> Result:
    """How much of the answer's logit each token, head, neuron or layer's write has, by conserving rules; mean over prompts.

    Main variable `relevance` [position] (site embed; positions count from the end, what stands before those that all prompts have is `earlier`),
    [layer, head], [layer, neuron] or [layer], with `low` and `high`; `score`, `biases` and `rest`.

    `task`: a task, or one text, which needs no answer. `rule`: "relp" or "attnlrp". `site`: what relevance is of: embed (tokens), head (z), neuron,
    attn_out or mlp_out. `against`: the signal itself ("zero"), or its difference from the corrupted twin's ("twin"), as relevance patching has it.
    """
    for name, value, known in (
        ("rule", rule, ("relp", "attnlrp")),
        ("site", site, SIGNALS),
        ("against", against, ("zero", "twin")),
    ):
        one_of(name, value, known)
    prompts, right, wrong, twins = _asked(model, task, against)
    ports = [Port("resid_in", 0)] if site == "embed" else _ports(model, SIGNALS[site])
    n = min(map(len, prompts))
    values: dict[int, Tensor] = {}
    totals = torch.zeros(len(prompts), 4, dtype=torch.float64)  # score, biases, rest, earlier
    size = (
        1 if any("experts.out" in model.signals(i) for i in range(model.n_layers)) else batch_size
    )  # tokens of several prompts share an expert
    for batch, rows in enumerate(by_length(prompts, size)):
        some = [list(prompts[i]) for i in rows]
        answers = [(right[i] if right else None, wrong[i] if wrong else ()) for i in rows]
        if rule == "attnlrp" and batch == 0:
            _Pass(
                model, some, answers, "relp", []
            )  # which conserves, or says that the family has more than there are rules for
        found = _Pass(model, some, answers, rule, ports)
        base = None if twins is None else run(model, [list(twins[i]) for i in rows], taps=ports, logits="last")
        each, earlier = _values(site, ports, found, base, n)
        for i, value, told, before in zip(rows, each, found.told, earlier, strict=True):
            values[i], totals[i] = value, torch.cat([told, before[None]])
    return _result(model, site, torch.stack([values[i] for i in range(len(prompts))]), totals, prompts, n)


def _asked(model: Model, task: Task | str, against: str) -> tuple[Sequence[Sequence[int]], Any, Any, Any]:
    """Prompts, right and wrong tokens (None of a text), and twins where they are asked for."""
    if not isinstance(task, Task):
        if against == "twin":
            raise PatchbayError('against="twin" needs a task with corrupted twins: a text alone has none')
        return model.encode(task), None, None, None
    task.check(model.vocab_size)
    if against == "twin":
        if task.corrupted is None:
            raise PatchbayError(
                f'task {task.name} has no corrupted twins, which against="twin" needs: make it with corrupted='
            )
        uneven = [i for i, (a, b) in enumerate(zip(task.clean, task.corrupted, strict=True)) if len(a) != len(b)]
        if uneven:
            raise PatchbayError(
                f"task {task.name}: twins of prompts {uneven[:5]} have another length: differences are place by place"
            )
    return task.clean, task.right, task.wrong, task.corrupted if against == "twin" else None


def _ports(model: Model, signal: str) -> list[Port]:
    ports = [Port(signal, layer) for layer in range(model.n_layers) if signal in model.signals(layer)]
    if not ports:
        model.require(Port(signal, 0))  # raises, and says what the family lacks
    return ports


class _Pass:
    """One run under the rules: its trace, its gradients at `ports`, and of each prompt score, biases and rest."""

    def __init__(
        self,
        model: Model,
        prompts: list[list[int]],
        answers: list[tuple[int | None, Sequence[int]]],
        rule: str,
        ports: list[Port],
    ) -> None:
        start = Port("resid_in", 0)
        with torch.enable_grad(), Rules(rule) as rules:
            self.trace = run(model, prompts, taps=[*dict.fromkeys([start, *ports])], logits="last", grad=True)
            logits = self.trace.last_logits
        if not kinds(self.trace.logits):
            raise PatchbayError(
                f"{model.family.name}: a step of this model is no function of torch that rules could be given for: relevance ends there"
            )
        with torch.enable_grad():
            scores = torch.stack([_score(row, *answer) for row, answer in zip(logits, answers, strict=True)])
            entering, *self.gradients = self.trace.gradient(scores.sum(), start, *ports)
            biases = rules.biases(scores, self.trace[start], entering)
        tokens = (self.trace[start].detach().double() * entering.double()).sum(-1).cpu()  # [prompt, position]
        self.scores = scores.detach().double().cpu()
        rest = self.scores - tokens.sum(1) - biases
        self.told = torch.stack([self.scores, biases, rest], 1)  # [prompt, 3]
        off = float((rest.abs() / (tokens.abs().sum(1) + biases.abs() + self.scores.abs()).clamp_min(1e-30)).max())
        if rule == "relp" and not off <= NEAR[model.dtype]:
            raise PatchbayError(
                f"{model.family.name}: relevance is not conserved: {off:.2g} of it is neither the tokens' nor the biases' (allowed {NEAR[model.dtype]:.0e}). "
                "This family computes something that no rule is for; possible: prove.attribution_patching, find.direct_logit_attribution"
            )


def _score(logits: Tensor, right: int | None, wrong: Sequence[int]) -> Tensor:
    token = int(logits.argmax()) if right is None else right
    return logits[token] - logits[list(wrong)].mean() if len(wrong) else logits[token]


def _values(site: str, ports: list[Port], found: _Pass, base: Trace | None, n: int) -> tuple[Tensor, Tensor]:
    """Relevance [prompt, ...] of the site, and of tokens before the last n [prompt]."""
    products = []
    for port, gradient in zip(ports, found.gradients, strict=True):
        signal = found.trace[port].detach()
        products.append((signal if base is None else signal - base[port]).double().cpu() * gradient.double().cpu())
    none = torch.zeros(len(products[0]), dtype=torch.float64)
    if site == "embed":
        tokens = products[0].sum(-1)
        return tokens[:, -n:], tokens[:, :-n].sum(1)
    if site in ("attn_out", "mlp_out"):
        return _grid(ports, [x.sum((1, 2)) for x in products]), none
    return _grid(ports, [x.sum((1, 3)) if site == "head" else x.sum(1) for x in products]), none


def _grid(ports: list[Port], rows: list[Tensor]) -> Tensor:
    """[prompt, layer] or [prompt, layer, head or neuron]; NaN where a layer has none."""
    shape = (
        len(rows[0]),
        1 + max(port.layer or 0 for port in ports),
        *(() if rows[0].ndim == 1 else (max(x.shape[1] for x in rows),)),
    )
    grid = torch.full(shape, torch.nan, dtype=torch.float64)
    for port, row in zip(ports, rows, strict=True):
        if row.ndim == 1:
            grid[:, port.layer or 0] = row
        else:
            grid[:, port.layer or 0, : row.shape[1]] = row
    return grid


def _result(
    model: Model, site: str, values: Tensor, totals: Tensor, prompts: Sequence[Sequence[int]], n: int
) -> Result:
    axes = {"embed": ("position",), "head": ("layer", "head"), "neuron": ("layer", "neuron")}.get(site, ("layer",))
    mean, low, high = maths.intervals(values)
    variables: dict[str, Any] = {"relevance": (mean, axes, "logits")}
    if len(values) > 1:
        variables |= {"low": (low, axes, "logits"), "high": (high, axes, "logits")}
    names = ("score", "biases", "rest", "earlier") if site == "embed" else ("score", "biases", "rest")
    variables |= {name: (totals[:, i].mean(), (), "logits") for i, name in enumerate(names)}
    score, biases, rest, earlier = totals.mean(0).tolist()
    note = f"the score is {score:.3g} logits: tokens have {score - biases - rest:.3g}, biases {biases:.3g}, {rest:.2g} is left over"
    embed = site == "embed"
    return Result(
        variables,
        coords={"position": list(range(-n, 0))} if embed else {},
        tables={"tokens": shared_tokens(model, prompts, n)} if embed else {},
        notes=[note + (f"; tokens before the last {n} have {earlier:.3g}" if earlier else "")],
    )
