"""Patchscopes: a state of one prompt, written into a placeholder of another, and what the model says of it (SelfIE).

    v = resid_in of layer l at one token of `prompts`;     x = resid_in of layer `into` at the placeholder tokens of `target`
    replace   x <- v            add   x <- x + |x| v / |v|           then generate

in "cat -> cat; 135 -> 135; hello -> hello; ?" the placeholder is the last token, in "Tell me about _ _ _" it is several. What is
generated is the model's guess at what the state holds; it is fluent whatever was written, so that each text stands beside two others:
of a random direction as long as v, and of the state of another prompt (the next one). In numbers, of the first token generated:

    kl[prompt, layer]   = KL(law under v | law under the random direction), in nats      kl_other the same against the other prompt's state

0 where the state says no more than noise does, or no more than another's. A state written where it was read changes nothing, bit for
bit. One run for the states, one generation for each of the three.

Ghandeharioun et al. 2024, "Patchscopes: A Unifying Framework for Inspecting Hidden Representations of Language Models"; placeholders of
several tokens as in SelfIE (Chen et al. 2024); "add" is what the code of activation oracles does, where its text says that it replaces. It
shows what the model makes of a state at a place where it never stood, not what its own layers read from it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.errors import one_of
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port

Way = Literal["replace", "add"]


@method(paper="ghandeharioun2024")
def patchscopes(
    model: Model,
    prompts: list[str] | list[list[int]],
    target: str | list[int],
    *,
    placeholder: str | int | list[int] = -1,
    layers: list[int] | None = None,
    into: int | list[int] | None = None,
    way: Way = "replace",
    max_new_tokens: int = 8,
    batch_size: int = 32,
) -> Result:
    """What the model says in `target`, generated greedily, when the state at the end of each of `prompts` stands at its placeholder.

    `prompts`: whose last token's state is read; several. `target`: the prompt that is continued. Main variable `kl` [prompt, layer];
    `kl_other`; the table "said" holds the text of each prompt and layer, and those of its controls.

    `placeholder`: a token of the target by its text (each place where it stands), or positions; the last one without. `layers`: of the
    source, whose input is read; all without. `into`: the layer of the target whose input is written; without, the layer that was read; of a list
    each, with each layer that is read (`kl` [prompt, layer, into]), as the paper sweeps them.
    `way`: put the state in the token's place ("replace"), or "add" it, as long as what is there. `max_new_tokens`: how many.
    """
    one_of("way", way, ("replace", "add"))
    sources = model.encode(prompts)
    [aim] = model.encode([target])
    pairs = _pairs(model, layers, into, max_new_tokens)
    places = _places(model, aim, placeholder)
    tried = sorted({layer for layer, _ in pairs})
    states = _states(model, sources, tried, batch_size)  # [layer, prompt, d_model]
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(states.shape, generator=generator).to(states)
    random = random / random.norm(dim=-1, keepdim=True) * states.norm(dim=-1, keepdim=True)
    kinds = {"text": states, "random": random, "other": states.roll(-1, 1)}
    laws: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    texts: dict[str, list[list[list[int]]]] = {kind: [] for kind in kinds}
    for layer, at in pairs:
        for kind, values in kinds.items():
            law, ids = _said(model, aim, places, at, values[tried.index(layer)], way, max_new_tokens, batch_size)
            laws[kind].append(law)
            texts[kind].append(ids)
    swept = isinstance(into, list)
    shown = [
        {"prompt": n, "layer": layer}
        | ({"into": at} if swept else {})
        | {kind: _text(model, ids[i][n]) for kind, ids in texts.items()}
        for n in range(len(sources))
        for i, (layer, at) in enumerate(pairs)
    ]
    others = {"kl": "random"} | ({"kl_other": "other"} if len(sources) > 1 else {})  # one prompt has no other
    numbers = {name: _grid(model, pairs, laws["text"], laws[kind], swept) for name, kind in others.items()}
    return _result(model, aim, places, numbers, shown, swept)


def _pairs(model: Model, layers: list[int] | None, into: int | list[int] | None, n: int) -> list[tuple[int, int]]:
    """Layers that are read, each with one that is written."""
    tried = list(range(model.n_layers)) if layers is None else sorted(set(layers))
    written = [] if into is None else sorted(set(into)) if isinstance(into, list) else [into]
    beyond = [i for i in (*tried, *written) if not 0 <= i < model.n_layers]
    if beyond or not tried or into == [] or n < 1:
        raise PatchbayError(
            f"layers={layers}, into={into}, max_new_tokens={n}: layers are 0 to {model.n_layers - 1}, and at least one token"
        )
    return [(layer, at) for layer in tried for at in (written or [layer])]


def _result(
    model: Model,
    aim: list[int],
    places: list[int],
    numbers: dict[str, Tensor],
    shown: list[dict[str, Any]],
    swept: bool,
) -> Result:
    """What `patchscopes` returns."""
    least = int((numbers["kl"] < 0.01).sum())  # NaN where nothing was asked
    said = (
        f"{len(shown)} states were written into token{'s' * (len(places) > 1)} {', '.join(map(str, places))} of {_text(model, aim)!r}; {least} of them say less "
        "than 0.01 nats more than a random direction of their length; the table holds what each control says"
    )
    notes = [said]
    if swept:
        mean = numbers["kl"].mean(0).nan_to_num(-torch.inf)
        layer, at = divmod(int(mean.argmax()), model.n_layers)
        notes.append(
            f"most is said of the input of layer {layer} written into layer {at}: {float(mean.max()):.3g} nats"
        )
    axes = ("prompt", "layer", "into") if swept else ("prompt", "layer")
    return Result({name: (value, axes, "nats") for name, value in numbers.items()}, notes=notes, tables={"said": shown})


def _places(model: Model, aim: list[int], placeholder: str | int | list[int]) -> list[int]:
    """The positions of the placeholder in the target, from its start."""
    if isinstance(placeholder, str):
        token = model.token_id(placeholder)
        places = [i for i, one in enumerate(aim) if one == token]
    else:
        asked = [placeholder] if isinstance(placeholder, int) else list(placeholder)
        places = sorted({i % len(aim) for i in asked if -len(aim) <= i < len(aim)}) if asked else []
        places = places if all(-len(aim) <= i < len(aim) for i in asked) else []
    if not places:
        raise PatchbayError(
            f"placeholder={placeholder!r}: it stands nowhere in the target of {len(aim)} tokens, {_text(model, aim)!r}"
        )
    return places


def _text(model: Model, ids: list[int]) -> str:
    return model.decode(ids) if model.tokenizer is not None else " ".join(map(str, ids))


def _states(model: Model, sources: list[list[int]], layers: list[int], batch_size: int) -> Tensor:
    """What each layer reads at the last token, [layer, prompt, d_model]."""
    ports = [Port("resid_in", layer) for layer in layers]
    pieces = []
    for start in range(0, len(sources), batch_size):
        trace = run(model, sources[start : start + batch_size], taps=ports, logits="last")
        pieces.append(torch.stack([trace.last(port) for port in ports]))
    return torch.cat(pieces, 1)


def written(port: Port, values: Tensor, there: Tensor, places: list[int], way: str) -> Edit:
    """Each row's state [row, d_model] in the places of its copy of the target; `there` [place, d_model] is what stands there."""
    if way == "replace":
        return edit.replace(port, values[:, None].expand(-1, len(places), -1), positions=tuple(places))
    unit = values / values.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return edit.add(port, unit[:, None] * there.norm(dim=-1)[None, :, None], positions=tuple(places))


def _said(
    model: Model, aim: list[int], places: list[int], layer: int, values: Tensor, way: str, n: int, batch_size: int
) -> tuple[Tensor, list[list[int]]]:
    """Under each state [prompt, d_model]: the law of the first token generated [prompt, vocab], and the tokens."""
    port = Port("resid_in", layer)
    there = run(model, [aim], taps=[port], logits="last")[port][0, places]
    laws, texts = [], []
    for some in values.split(batch_size):
        made = written(port, some, there, places, way)
        rows = [list(aim)] * len(some)
        laws.append(run(model, rows, edits=[made], logits="last").last_logits)
        texts += [list(ids) for ids in model.generate(rows, n, edits=[made], new_only=True)]
    return torch.cat(laws), texts


def _grid(model: Model, pairs: list[tuple[int, int]], own: list[Tensor], other: list[Tensor], swept: bool) -> Tensor:
    """KL of the laws [prompt, layer], or [prompt, layer, into] where several were written; NaN where nothing was."""
    n = model.n_layers
    grid = torch.full((len(own[0]), n, n), torch.nan, dtype=torch.float64)
    for (layer, at), a, b in zip(pairs, own, other, strict=True):
        grid[:, layer, at if swept else 0] = maths.kl(a, b).double().cpu()
    return grid if swept else grid[:, :, 0]
