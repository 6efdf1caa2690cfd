"""Tree probe (AST-Probe): whether a low-rank subspace of a layer's states shows the syntax tree of the text.

    d^_i = |z_(i+1) - z_i|^2        c_i ~ softmax((z_(i+1) - z_i) C)        u_i ~ softmax(z_i U)        z = h B, B [d_model, rank]

h is a leaf's state, the mean over its tokens; d, c and u are the tree in numbers (`_trees.py`): the height of the lowest common ancestor of two
neighbouring leaves, its label, and the label over one leaf. The tree is what they say: a stretch of leaves splits at its largest d^. Of Python the tree is
that of its own `ast` over its tokens. `f1` [layer] is the mean over held-out texts of the F1 of (label, first leaf, last leaf) as multisets. Of dependencies
(kind "conllu") |z_i - z_j|^2 is fitted to the edges between words i and j, and `uuas` is the share of edges in the spanning tree of these distances.

Three texts of four train, by Adam; the others are told of. Beside: trees whose heights, labels or words were dealt anew inside each text, `draws` times,
the same at every layer (`null_mean`, `null_high`, and `p` that dealt trees are read as well at ANY layer); a random subspace with C and U alone learned
(`random`); the probe on a network of new weights (`untrained`); and `floor`, what needs no model: trees that branch to the right with each word's
commonest labels, or neighbours joined, and `gain` over it with ends. A probe under the floor shows nothing, however far above the null, and the best
of many layers is chosen on the texts that it is told of. One pass over the texts for each of the two networks, 2 + `draws` fits a layer.

Hernandez Lopez et al. 2022, "AST-Probe: Recovering abstract syntax trees from hidden representations of pre-trained language models"; distances after
Hewitt and Manning 2019. Their code counts repeated nodes twice, so that its recall can pass 1. Judge by F1: heights alone fit at rank 1. At
rank = d_model the penalty leaves no more than a turn. It shows what can be read, not what the model uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.errors import one_of
from patchbay.find._dependencies import Sentence, of_conllu
from patchbay.find._python_trees import of_python
from patchbay.find._states import depth, exceeded
from patchbay.find._tree_fit import fit
from patchbay.find._tree_problems import Constituency, Dependency, constituency, dependency
from patchbay.find._trees import Parsed, of_brackets
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.model.tokens import tokenize, warn_of_unknown
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.results.untrained import untrained
from patchbay.signal.port import PatchbayError, Port

Kind = Literal["python", "brackets", "conllu"]
READ: dict[str, Callable[[str], Parsed | Sentence]] = {
    "python": of_python,
    "brackets": of_brackets,
    "conllu": of_conllu,
}
LEAVES = (2, 200)  # of a text: fewer have no split, more take pairs by the ten thousand
LEAST = 4  # texts: three to train on and one to tell of


@method(paper="hernandezlopez2022")
def tree_probe(
    model: Model,
    texts: list[str],
    *,
    kind: Kind = "python",
    rank: int | None = None,
    steps: int = 200,
    draws: int = 3,
    batch_size: int = 16,
    seed: int = 0,
) -> Result:
    """Held-out F1 of the trees that a subspace of each layer's states shows, against dealt trees, a random subspace and no training.

    `texts`: pieces of Python, such as functions; trees in brackets, "(S (NP the cat) (VP sat))"; or sentences in CoNLL-U, one a text. Main variable
    `f1` [layer] with ends, or `uuas`; the row `embed` is what the tokens alone say.

    `kind`: what the texts are, "python", "brackets" or "conllu". `rank`: dimensions of the subspace; half of d_model, at most 64, without. `steps`:
    updates of the probes, of 32 texts each. `draws`: dealings of the trees that make the null.
    """
    one_of("kind", kind, READ)
    rank = min(64, max(1, model.d_model // 2)) if rank is None else rank
    if not 1 <= rank <= model.d_model or steps < 1 or draws < 1:
        raise PatchbayError(
            f"rank={rank}, steps={steps}, draws={draws}: rank 1 to {model.d_model}, a step and a draw or more"
        )
    read, places, encoded, notes = _read(model, texts, kind)
    order = torch.randperm(len(read), generator=torch.Generator().manual_seed(seed)).tolist()
    held, train = sorted(order[: len(read) // 4]), sorted(order[len(read) // 4 :])
    asked: Constituency | Dependency = (
        dependency([one for one in read if isinstance(one, Sentence)], draws, seed)
        if kind == "conllu"
        else constituency([one for one in read if isinstance(one, Parsed)], train, draws, seed)
    )
    names, ports = depth(model)
    rows = [
        _told(asked, x, train, held, rank, steps, seed) for x in _states(model, encoded, places, ports, batch_size)
    ]  # [layer], each [problem, text, measure]
    fresh = untrained(model, seed)
    if isinstance(fresh, str):
        notes.append(f"no untrained network to read: {fresh}")
        bare = None
    else:
        states = _states(fresh, encoded, places, ports, batch_size)
        bare = torch.stack([_told(asked.alone(), x, train, held, rank, steps, seed)[0, :, 0].mean() for x in states])
    return _result(
        asked, torch.stack(rows), bare, asked.floor(train, held), names, notes, (len(train), len(held), rank)
    )


def _told(
    asked: Constituency | Dependency, x: Tensor, train: list[int], held: list[int], rank: int, steps: int, seed: int
) -> Tensor:
    """Scores of held-out texts by the probes of one layer, [problem, text, measure]; x [text, leaf, width], NaN beyond a text."""
    frozen = torch.arange(len(asked)) == 1
    seen = x[train][~x[train].isnan().any(-1)]  # [leaf, width]
    centre = seen.mean(0)
    size = (seen - centre).square().mean().sqrt()
    scaled = ((x - centre) / (size if size > 0 else 1.0)).nan_to_num(0.0)
    fitted = fit(scaled[train], asked.target(train, x.shape[1]), frozen, rank, steps, seed)
    return asked.scores(fitted, scaled[held], held)


# --- texts and states -----------------------------------------------------------------------------------


def _read(
    model: Model, texts: Any, kind: str
) -> tuple[list[Parsed | Sentence], list[list[list[int]]], list[list[int]], list[str]]:
    """Each text once with its tree, the tokens of its leaves, its ids; and what was left out."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(one, str) for one in texts):
        raise PatchbayError(f"texts: a list of texts of kind {kind!r} is needed, got {type(texts).__name__}")
    read, places, encoded, long = [], [], [], 0
    for one in dict.fromkeys(texts):
        parsed = READ[kind](one)
        ids, found = _tokens(model, parsed)
        if not LEAVES[0] <= len(parsed.spans) <= LEAVES[1] or len(ids) > (model.longest_prompt or len(ids)):
            long += 1
            continue
        read.append(parsed)
        places.append(found)
        encoded.append(ids)
    notes = [f"{len(texts) - len(set(texts))} texts that came again were left out"] * (len(set(texts)) < len(texts))
    if long:
        notes.append(
            f"{long} texts were left out: {LEAVES[0]} to {LEAVES[1]} leaves, and no more tokens than the model takes"
        )
    warn_of_unknown(model._need_tokenizer(), [one.text for one in read], encoded)
    if len(read) < LEAST:
        said = f" ({'; '.join(notes)})" if notes else ""
        raise PatchbayError(f"{len(read)} texts with a tree that can be read: {LEAST} or more are needed{said}")
    return read, places, encoded, notes


def _tokens(model: Model, parsed: Parsed | Sentence) -> tuple[list[int], list[list[int]]]:
    """A text's ids, and for each leaf the positions of the tokens that it shares characters with."""
    tokenizer = model._need_tokenizer()
    try:
        found = tokenizer(parsed.text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError:
        raise PatchbayError("leaves need a fast tokenizer, which says which letters each token has") from None
    bare, offsets = list(found["input_ids"]), found["offset_mapping"]
    ids = list(tokenize(tokenizer, [parsed.text])[0])
    first = len(ids) - len(bare)
    places = [[first + i for i, (a, b) in enumerate(offsets) if a < end and b > start] for start, end in parsed.spans]
    if ids[first:] != bare or not all(places):
        lacks = next((span for span, own in zip(parsed.spans, places, strict=True) if not own), None)
        what = parsed.text[slice(*lacks)] if lacks else parsed.text[:40]
        raise PatchbayError(f"no token of this tokenizer lies in {what!r} of the text {parsed.text[:40]!r}")
    return ids, places


def _states(
    model: Model, encoded: list[list[int]], places: list[list[list[int]]], ports: list[Port], batch_size: int
) -> list[Tensor]:
    """Of each port the leaves' states, float64 [text, leaf, width], NaN beyond a text's leaves."""
    widest = max(map(len, places))
    found = [torch.full((len(encoded), widest, model.d_model), torch.nan) for _ in ports]
    for begin in range(0, len(encoded), batch_size):
        trace = run(model, encoded[begin : begin + batch_size], taps=ports, logits="last")
        for out, port in zip(found, ports, strict=True):
            states = trace[port].float().cpu()
            for row, leaves in enumerate(places[begin : begin + batch_size]):
                out[begin + row, : len(leaves)] = torch.stack([states[row, own].mean(0) for own in leaves])
    return [out.double() for out in found]


# --- what came of it ------------------------------------------------------------------------------------


def _result(
    asked: Constituency | Dependency,
    scores: Tensor,
    bare: Tensor | None,
    floor: Tensor,
    names: list[str],
    notes: list[str],
    counts: tuple[int, int, int],
) -> Result:
    """scores [layer, problem, text, measure]; bare [layer]; floor [text]."""
    main, unit = asked.measures[0], asked.unit
    own, null = scores[:, 0, :, 0], scores[:, 2:, :, 0].mean(-1)  # [layer, text], [layer, draw]
    mean, low, high = maths.intervals(own.T)
    variables: dict[str, Any] = {main: mean, "low": low, "high": high}
    variables |= {name: scores[:, 0, :, i].mean(-1) for i, name in enumerate(asked.measures) if i}
    variables |= {
        "null_mean": null.mean(1),
        "null_high": null.quantile(0.95, dim=1),
        "random": scores[:, 1, :, 0].mean(-1),
    }
    variables |= {"untrained": bare} if bare is not None else {}
    told: dict[str, Any] = {
        name: (value, ("layer",), "correlation" if name == "spearman" else unit) for name, value in variables.items()
    }
    told["p"] = (exceeded(mean, null.amax(0)[:, None]), ("layer",), "p value")
    told["floor"] = (floor.mean(), (), unit)
    gain, gain_low, gain_high = maths.intervals((own - floor).T)
    more = {"gain": gain, "gain_low": gain_low, "gain_high": gain_high}
    told |= {name: (value, ("layer",), unit) for name, value in more.items()}
    best = int(mean.argmax())
    said = (
        f"{names[best]} shows most: {main} {float(mean[best]):.2f}; dealt trees {float(null[best].mean()):.2f}, a random subspace "
        f"{float(variables['random'][best]):.2f}"
        + ("" if bare is None else f", an untrained network {float(bare[best]):.2f}")
        + f"; without a model {float(floor.mean()):.2f}, difference "
        f"{float(gain[best]):+.2f}{maths.between(float(gain_low[best]), float(gain_high[best]), '+.2f')}"
        + ("" if float(gain_low[best]) > 0 else ": NOT above what needs no model")
    )
    size = f"{counts[0]} texts trained the probes of rank {counts[2]}, {counts[1]} others are told of"
    return Result(told, coords={"layer": names}, notes=[said, size, *notes])
