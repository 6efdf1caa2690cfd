"""Latent language: which language's (or class's) tokens the layers say, by logit lens.

    probability[layer, group] = mean over prompts of the lens probability of all of the group's tokens,
                                lens[layer] = softmax(unembed(final_norm(stream after the layer)))

at the prompt's last token. A group is a block of the vocabulary or the tokens that the answer may begin with, prompt by prompt;
tokens that two groups share are taken out of both. `null_high`: 95 % of what as many random other tokens get, `draws` times;
low and high are a 95 % bootstrap over prompts. Beside it, by layer: `entropy` of the lens (nats), `kl` of
the lens to the model's own output (nats; a lens far from it is not to be trusted), and the token energy

    energy = sqrt(mean over v of (u_v . h)^2) / sqrt(mean over v, w of (u_v . u_w)^2),    u_v unit rows of the unembedding,
                                                                                        h the normed stream of length 1

which is 1 where the unembedding is orthonormal and low where the state lies outside what tokens speak of. The table
`leading` says which group leads at each layer, by how much (95 % bootstrap), with p by sign flips, Benjamini-Hochberg over layers.
One forward pass and one unembedding for each layer.

Zhong et al. 2024, "Beyond English-Centric LLMs: What Language Do Multilingual Language Models Think in?", after
Wendler et al. 2024.

The lens was made for the last layer: that a group's tokens are not seen does not show that its language is not in use, and mass
on a large group may be chance, hence the null. Whether the model needs the detour is for `prove.activation_patching` to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.find._states import depth, lens, token_ids
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

Groups = list[dict[str, list[int]]]  # of each prompt


@method(paper="zhong2024", unit="probability")
def latent_language(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    groups: Mapping[str, Sequence[Any]],
    *,
    draws: int = 50,
    seed: int = 0,
    batch_size: int = 16,
) -> Result:
    """Lens probability of each group's tokens after every layer, with the lens's entropy, token energy and divergence.

    `groups`: name -> tokens (ids, or texts that are single tokens), the same for all prompts, or one list of them for each prompt.

    `draws`: random groups of as many tokens that make the null.
    """
    encoded = model.encode(prompts)
    if draws < 1:
        raise PatchbayError(f"draws={draws}: at least one random group, for the null")
    per_prompt, n_shared = _groups(model, groups, len(encoded))
    names, ports = depth(model)
    gram = _gram(model)
    control = _random_groups(per_prompt, model.vocab_size, draws, seed)
    seen: dict[str, list[Tensor]] = {"said": [], "control": [], "entropy": [], "energy": [], "kl": []}
    for start in range(0, len(encoded), batch_size):
        piece = slice(start, min(start + batch_size, len(encoded)))
        trace = run(model, encoded[piece], taps=ports, logits="last")
        own = trace.last_logits.double().cpu()
        cells: dict[str, list[Tensor]] = {key: [] for key in seen}
        for port in ports:
            normed, logits = lens(model, trace.last(port))
            likely = logits.double().cpu().log_softmax(-1)  # [prompt, vocab]
            cells["said"].append(_mass(likely.exp(), per_prompt[piece]))
            cells["control"].append(torch.stack([_mass(likely.exp(), drawn[piece]) for drawn in control], 1))
            cells["entropy"].append(-(likely.exp() * likely.clamp_min(-1e4)).sum(-1))
            cells["energy"].append(_energy(normed.double().cpu(), gram))
            cells["kl"].append(maths.kl(own, likely))
        for key, rows in cells.items():
            seen[key].append(torch.stack(rows))  # [layer, prompt, ...]
    found = {key: torch.cat(rows, 1) for key, rows in seen.items()}
    leading, notes = _leading(found["said"], found["control"], list(groups), names)
    notes += [f"{n_shared} tokens that groups share were taken out"] if n_shared else []
    return Result(
        _variables(found), coords={"layer": names, "condition": list(groups)}, tables={"leading": leading}, notes=notes
    )


def _variables(found: dict[str, Tensor]) -> dict[str, Any]:
    said, grid = found["said"], ("layer", "condition")  # [layer, prompt, group]
    ends = [[maths.bootstrap_interval(said[i, :, g]) for g in range(said.shape[2])] for i in range(len(said))]
    mean, low, high = torch.tensor(ends, dtype=torch.float64).unbind(-1)  # each [layer, group]
    null = found["control"].mean(1)  # [layer, draw, group]
    by_layer = {"entropy": "nats", "energy": "token energy", "kl": "nats"}
    several = {"low": (low, grid, "probability"), "high": (high, grid, "probability")} if said.shape[1] > 1 else {}
    return {
        "probability": (mean, grid, "probability"),
        **several,
        "null_mean": (null.mean(1), grid, "probability"),
        "null_high": (null.quantile(0.95, dim=1), grid, "probability"),
        **{key: (found[key].mean(1), ("layer",), unit) for key, unit in by_layer.items()},
    }


def _groups(model: Model, groups: Mapping[str, Sequence[Any]], n_prompts: int) -> tuple[Groups, int]:
    """Ids of each group for each prompt without those that two groups share there, and how many were taken out at most."""
    if not isinstance(groups, Mapping) or len(groups) < 2:
        raise PatchbayError("groups map two names or more to their tokens, such as {'en': [...], 'fr': [...]}")
    listed: dict[str, list[list[int]]] = {}
    for name, tokens in groups.items():
        rows = list(tokens)
        if rows and all(isinstance(row, list | tuple) for row in rows):
            if len(rows) != n_prompts:
                raise PatchbayError(f"group {name!r} has {len(rows)} lists of tokens for {n_prompts} prompts")
            listed[name] = [token_ids(model, row, f"group {name!r}, prompt {i}") for i, row in enumerate(rows)]
        else:
            listed[name] = [token_ids(model, rows, f"group {name!r}")] * n_prompts
    out, most = [], 0
    for n in range(n_prompts):
        counts = Counter(token for rows in listed.values() for token in rows[n])
        shared = {token for token, count in counts.items() if count > 1}
        own = {name: [token for token in rows[n] if token not in shared] for name, rows in listed.items()}
        empty = next((name for name, tokens in own.items() if not tokens), None)
        if empty is not None:
            raise PatchbayError(f"group {empty!r} shares all its tokens with others in prompt {n}: nothing is left")
        out.append(own)
        most = max(most, len(shared))
    return out, most


def _random_groups(per_prompt: Groups, n_vocab: int, draws: int, seed: int) -> list[Groups]:
    """As many random tokens as each group has, from outside all groups where there are enough, else from everywhere."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(own: dict[str, list[int]]) -> dict[str, list[int]]:
        taken = {token for tokens in own.values() for token in tokens}
        free = [token for token in range(n_vocab) if token not in taken]
        pools = {name: free if len(free) >= 2 * len(tokens) else list(range(n_vocab)) for name, tokens in own.items()}
        orders = {name: torch.randperm(len(pool), generator=generator).tolist() for name, pool in pools.items()}
        return {name: [pools[name][i] for i in orders[name][: len(tokens)]] for name, tokens in own.items()}

    known: dict[tuple[tuple[int, ...], ...], list[dict[str, list[int]]]] = {}  # prompts of the same groups share draws
    keys = [tuple(tuple(tokens) for tokens in own.values()) for own in per_prompt]
    for key, own in zip(keys, per_prompt, strict=True):
        if key not in known:
            known[key] = [drawn(own) for _ in range(draws)]
    return [[known[key][draw] for key in keys] for draw in range(draws)]


def _mass(likely: Tensor, per_prompt: Groups) -> Tensor:
    """Probability of each prompt's groups: likely [prompt, vocab] -> [prompt, group]."""
    return torch.stack(
        [
            torch.stack([row[tokens].sum() for tokens in own.values()])
            for row, own in zip(likely, per_prompt, strict=True)
        ]
    )


def _gram(model: Model) -> Tensor:
    """Mean over the vocabulary of u u^T, u the unit rows of the unembedding: [d_model, d_model]."""
    total = torch.zeros(model.d_model, model.d_model, dtype=torch.float64)
    for rows in model.unembed.weight.detach().split(8192):
        unit = rows.double().cpu()
        unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        total += unit.T @ unit
    return total / model.vocab_size


def _energy(normed: Tensor, gram: Tensor) -> Tensor:
    """Token energy of normed states [prompt, d_model]: [prompt]. |gram| is the root mean square of (u_v . u_w)."""
    unit = normed / normed.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    return ((unit @ gram) * unit).sum(-1).clamp_min(0.0).sqrt() / gram.norm()


def _leading(
    said: Tensor, control: Tensor, names: list[str], layers: list[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The leading group of each layer and its lead over the next: said [layer, prompt, group], control [layer, prompt, draw, group]."""
    null = control.mean(1).quantile(0.95, dim=1)  # [layer, group]
    rows: list[dict[str, Any]] = []
    ps = []
    for layer, cells, chance in zip(layers, said, null, strict=True):
        first, second = cells.mean(0).topk(2).indices.tolist()
        lead = maths.paired_interval(cells[:, first], cells[:, second])
        ps.append(maths.permutation_p(cells[:, first], cells[:, second], n=2000))
        row = {"layer": layer, "group": names[first], "probability": float(cells[:, first].mean())}
        row |= {"null_high": float(chance[first]), "next": names[second]}
        rows.append(row | {"lead": lead.mean, "low": lead.low, "high": lead.high})
    for row, p in zip(rows, maths.benjamini_hochberg(torch.tensor(ps)).tolist(), strict=True):
        row["p"] = p
    runs: list[list[str]] = []
    for row in rows:
        said_here = row["group"] if row["p"] < 0.05 and row["probability"] > row["null_high"] else "none clearly"
        if not runs or runs[-1][0] != said_here:
            runs.append([said_here, row["layer"], row["layer"]])
        runs[-1][2] = row["layer"]
    shown = ", ".join(f"{name} ({a} to {b})" if a != b else f"{name} ({a})" for name, a, b in runs)
    return rows, [f"leading (p < 0.05, and above random tokens): {shown}"]
