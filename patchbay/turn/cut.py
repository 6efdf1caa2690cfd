"""Cut: heads and neurons taken out of a model for real, as a smaller Hugging Face model that computes what zeroing them computes.

Of every layer as many heads go, and as many neurons: the checkpoint's config has one count for all. With grouped queries whole groups go,
or as many queries of each. A head's rows of W_Q (of W_K and W_V with its group) and columns of W_O are left out, a neuron's of the MLP's
up, gate and down projections; `head_dim` stays, rotary positions and norms of queries and keys stay. A config of that size is made, checked by
transformers' own rules and filled; Llama, whose config wants heads to divide the width, becomes a Mistral without a window, which is the same
computation. Nothing is believed until, on `texts`, the small model's logits are those of the whole one with the parts set to 0 (`difference`): an
architecture that cannot have such a size, or computes something else in it, is refused with what failed.

Result [condition] (as it is, cut): `loss`, the mean next-token loss over the texts in nats, `parameters`; `random` [draw], the loss with as many
random parts of each kind set to 0 in every layer, `p`; `difference`. The seconds of a run of each stand in the provenance. Cost: 2 + draws runs over the texts.

Mugnaini et al. 2025, "Efficient LLMs with AMP: Attention Heads and MLP Pruning", which cuts what `find.head_importance` and
`find.neuron_importance` score lowest, the same share of every layer. What is cut is gone: a loss that stays on these texts says nothing of others.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.files import write_folder
from patchbay.model.linear import in_first
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.model.placing import follow
from patchbay.model.run import run
from patchbay.results.method import method, seeded
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port

KINDS = ("head", "neuron")
CLOSE = 1e-4  # of the largest logit: what rounding in another order may differ by
HEADS, GROUPS = "num_attention_heads", "num_key_value_heads"
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")  # how configs name the number of neurons


@method(paper="mugnaini2025")
def cut(
    model: Model,
    parts: list[Part] | Part,
    texts: list[str] | list[list[int]],
    *,
    folder: str | None = None,
    draws: int = 10,
    batch_size: int = 16,
    seed: int = 0,
) -> Result:
    """A model without `parts`, written to `folder`, that computes what this one does with them set to 0; and what that costs on `texts`.

    `parts`: heads and neurons, as many of each in every layer. `texts`: on which both are compared, and the loss is taken.

    `folder`: where the checkpoint is written (new, loadable by transformers); without, it is only made and compared. `draws`: random
    parts of as many, as the control.
    """
    if draws < 1:
        raise PatchbayError(f"draws={draws}: a cut needs random controls, at least 1")
    plan = _planned(model, [parts] if isinstance(parts, Part) else list(dict.fromkeys(parts)))
    rows = model.encode(texts)
    if any(len(ids) < 2 for ids in rows):
        raise PatchbayError("texts: the loss needs a next token, so two tokens or more in each")
    target = None if folder is None else Path(folder)
    if target is not None and target.exists():
        raise PatchbayError(f"{target} is already there; a cut is written to a new folder")
    (plain, slow), (zeroed, _) = (_losses(model, rows, edits, batch_size) for edits in ([], plan.zeros()))
    small = load(_small(model, plan), tokenizer=model.tokenizer)
    after, fast = _losses(small, rows, [], batch_size)
    difference = max(float((a - b).abs().max()) for a, b in zip(zeroed[1], after[1], strict=True))
    largest = max(float(a.abs().max()) for a in zeroed[1])
    if not difference <= CLOSE * largest:
        raise PatchbayError(
            f"a {model.config.model_type} of this size computes something else than this model with the parts set to 0 (logits differ by {difference:.3g}); use "
            "the knob, pb.turn.scale(parts, 0.0)"
        )
    rng = random.Random(f"cut-{seed}")
    drawn = torch.stack([_losses(model, rows, plan.others(rng).zeros(), batch_size)[0][0].mean() for _ in range(draws)])
    if target is not None:
        write_folder(target, lambda fresh: _save(small, fresh))
    counts = [sum(p.numel() for p in one.hf.parameters()) for one in (model, small)]
    loss = torch.stack([plain[0].mean(), after[0].mean()])
    p = maths.draws_p(-float(loss[1]), -drawn)
    return Result(
        {
            "loss": (loss, ("condition",), "nats per token"),
            "parameters": (torch.tensor(counts).double(), ("condition",), "parameters"),
            "random": (drawn, ("draw",), "nats per token"),
            "p": (p, (), "probability"),
            "difference": (difference, (), "logits"),
        },
        coords={"condition": ["as it is", "cut"]},
        notes=[
            f"{plan.said} are cut: {counts[0]:,} -> {counts[1]:,} parameters, loss {float(loss[0]):.3f} -> {float(loss[1]):.3f} nats per token, with as many random "
            f"parts at 0 {float(drawn.mean()):.3f} (p = {p:.2g}); the cut model's logits differ from those of zeroing by {difference:.2g}"
        ],
        provenance={"seconds_of_a_run": {"as it is": slow, "cut": fast}},
    )


# --- what goes ------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """The heads and neurons that go, by layer, out of those that there are."""

    model: Model
    heads: list[list[int]]
    neurons: list[list[int]]

    @property
    def said(self) -> str:
        return f"{len(self.heads[0])} heads and {len(self.neurons[0])} neurons of each of {len(self.heads)} layers"

    def zeros(self) -> list[Edit]:
        """What they write, times 0."""
        made = []
        for layer, (heads, neurons) in enumerate(zip(self.heads, self.neurons, strict=True)):
            if heads:
                stay = torch.ones(self.model.n_heads(layer), 1)
                stay[heads] = 0.0
                made.append(edit.scale(Port("attn.z", layer), stay))
            if neurons:
                stay = torch.ones(self.model.n_neurons(layer))
                stay[neurons] = 0.0
                made.append(edit.scale(Port("mlp.act", layer), stay))
        return made

    def others(self, rng: random.Random) -> Plan:
        """As many others drawn at random, of each kind in every layer: whole groups where whole groups go."""
        model = self.model
        neurons = [
            rng.sample(range(model.n_neurons(i)), len(some)) if some else [] for i, some in enumerate(self.neurons)
        ]
        return Plan(model, [self._heads(rng, i, some) for i, some in enumerate(self.heads)], neurons)

    def _heads(self, rng: random.Random, layer: int, some: list[int]) -> list[int]:
        if not some:
            return []
        each = self.model.n_heads(layer) // self.model.n_groups(layer)
        whole = kept_groups(self.model, layer, some) is not None
        if whole:
            groups = rng.sample(range(self.model.n_groups(layer)), len(some) // each)
            return [group * each + i for group in groups for i in range(each)]
        n = len(some) // self.model.n_groups(layer)
        return [group * each + i for group in range(self.model.n_groups(layer)) for i in rng.sample(range(each), n)]


def kept_groups(model: Model, layer: int, heads: Sequence[int]) -> list[int] | None:
    """The key/value groups that stay where whole groups go; None where as many queries of each go."""
    each = model.n_heads(layer) // model.n_groups(layer)
    counts = [sum(head // each == group for head in heads) for group in range(model.n_groups(layer))]
    return [group for group, n in enumerate(counts) if not n] if set(counts) <= {0, each} else None


def _planned(model: Model, parts: list[Part]) -> Plan:
    if not parts:
        raise PatchbayError("no parts to cut were given")
    plan = Plan(model, [[] for _ in range(model.n_layers)], [[] for _ in range(model.n_layers)])
    for part in parts:
        if part.kind not in KINDS or part.index is None:
            raise PatchbayError(
                f"{part}: cut are heads and neurons, such as L0.H1 and L0.N5; a layer, an expert or a feature is turned off by a knob"
            )
        model.require(part.port())
        (plan.heads if part.kind == "head" else plan.neurons)[part.layer or 0].append(part.index)
    for kind, rows in (("heads", plan.heads), ("neurons", plan.neurons)):
        counts = [len(row) for row in rows]
        if len(set(counts)) > 1:
            listed = ", ".join(f"L{i}: {n}" for i, n in enumerate(counts[:8]))
            raise PatchbayError(
                f"{kind} go from the layers by {listed}: a {model.config.model_type} config has one count for all layers; give as many of each"
            )
        sizes = (
            [model.n_heads(i) if kind == "heads" else model.n_neurons(i) for i in range(model.n_layers)]
            if counts[0]
            else []
        )
        if counts[0] and counts[0] >= min(sizes):
            raise PatchbayError(f"{counts[0]} {kind} of {min(sizes)} go from a layer: nothing would be left")
    for layer, heads in enumerate(plan.heads):
        each = model.n_heads(layer) // max(1, model.n_groups(layer)) if heads else 1
        counts = (
            [sum(head // each == group for head in heads) for group in range(model.n_groups(layer))] if heads else []
        )
        if heads and kept_groups(model, layer, heads) is None and len(set(counts)) > 1:
            raise PatchbayError(
                f"L{layer}: {counts} of {each} queries go from its key/value groups: whole groups, or as many of each, can be cut"
            )
    return plan


# --- the small model ------------------------------------------------------------------------------------


def _small(model: Model, plan: Plan) -> nn.Module:
    """A model of the size that is left, with the weights that are left. Raises PatchbayError where its architecture has no such size."""
    hf: Any = model.hf
    config, kind = _config(model, plan)
    try:
        with seeded(0):
            small = kind._from_config(config, dtype=model.dtype) if hasattr(kind, "_from_config") else kind(config)
    except Exception as error:  # whatever a config's own rules say
        raise PatchbayError(
            f"a {model.config.model_type} cannot have this size ({str(error).splitlines()[0]:.200}); use the knob, pb.turn.scale(parts, 0.0)"
        ) from error
    kept = _kept(model, plan)
    state = {}
    for name, value in hf.state_dict().items():
        for axis, places in kept.get(name, ()):
            value = value.index_select(axis, places.to(value.device))
        state[name] = value.clone()
    own = small.state_dict()
    odd = [name for name in own if name not in state or own[name].shape != state[name].shape]
    if odd or len(own) != len(state):
        name = odd[0] if odd else next(iter(set(state) - set(own)))
        raise PatchbayError(
            f"a {model.config.model_type} of this size has another {name} ({tuple(own[name].shape) if name in own else 'none'}) than what is left of this "
            "model's; use the knob, pb.turn.scale(parts, 0.0)"
        )
    small.load_state_dict(state)
    return small.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _config(model: Model, plan: Plan) -> tuple[Any, Any]:
    """The config of the size that is left, and the class that has it."""
    hf: Any = model.hf
    config, kind = copy.deepcopy(hf.config), type(hf)
    if getattr(config, HEADS, None) is None:
        raise PatchbayError(f"a {config.model_type} config has no {HEADS}: use the knob, pb.turn.scale(parts, 0.0)")
    n, width = model.n_heads(0), model.n_neurons(0) if plan.neurons[0] else 0
    wanted: dict[str, Any] = {}
    if plan.heads[0]:
        wanted = {"head_dim": model.d_head(0), HEADS: n - len(plan.heads[0])}
        groups = kept_groups(model, 0, plan.heads[0])
        if hasattr(config, GROUPS):
            wanted[GROUPS] = model.n_groups(0) if groups is None else len(groups)
    if plan.neurons[0]:
        named = next((name for name in WIDTHS if hasattr(config, name)), None)
        if named is None:
            raise PatchbayError(
                f"a {config.model_type} config does not name how many neurons a layer has; use the knob, pb.turn.scale(parts, 0.0)"
            )
        wanted[named] = width - len(plan.neurons[0])
    if config.model_type == "llama" and plan.heads[0] and config.hidden_size % wanted[HEADS]:
        config, kind = _mistral(config, wanted)
    for name, value in wanted.items():
        try:
            setattr(config, name, value)
        except Exception as error:
            raise PatchbayError(
                f"a {config.model_type} config takes no {name}={value} ({str(error).splitlines()[0]:.120}); use the knob, pb.turn.scale(parts, 0.0)"
            ) from error
    return config, kind


def _mistral(config: Any, wanted: dict[str, Any]) -> tuple[Any, Any]:
    """A Llama's config as a Mistral's without a window: the same computation, whose heads need not divide its width."""
    from transformers import MistralConfig, MistralForCausalLM

    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise PatchbayError(
            "a llama with biases cannot have this size: Mistral, which could, has none; use the knob, pb.turn.scale(parts, 0.0)"
        )
    said = {
        k: v
        for k, v in config.to_dict().items()
        if k
        not in ("model_type", "architectures", "transformers_version", "attention_bias", "mlp_bias", "pretraining_tp")
    }
    return MistralConfig(**(said | wanted | {"sliding_window": None})), MistralForCausalLM


def _kept(model: Model, plan: Plan) -> dict[str, list[tuple[int, Tensor]]]:
    """Name of a parameter -> (axis, places that stay), for all that becomes smaller."""
    names = {id(module): name for name, module in model.hf.named_modules()}
    found: dict[str, list[tuple[int, Tensor]]] = {}

    def note(module: Any, out: Tensor | None, into: Tensor | None) -> None:
        turned = in_first(module)
        for places, axis in ((out, int(turned)), (into, int(not turned))):
            if places is not None:
                found.setdefault(f"{names[id(module)]}.weight", []).append((axis, places))
        if out is not None and getattr(module, "bias", None) is not None:
            found[f"{names[id(module)]}.bias"] = [(0, out)]

    for layer, at in enumerate(model.modules):
        if plan.heads[layer]:
            _keep_heads(model, layer, at, plan.heads[layer], note, found, names)
        if plan.neurons[layer]:
            gone = set(plan.neurons[layer])
            stay = torch.tensor([n for n in range(model.n_neurons(layer)) if n not in gone])
            fused = at.mlp_gate is at.mlp_up and at.mlp_gate is not None
            both = torch.cat([stay, stay + model.n_neurons(layer)])
            for module in {id(m): m for m in (at.mlp_up, at.mlp_gate) if m is not None}.values():
                twice = fused or getattr(module, "out_features", 0) == 2 * model.n_neurons(layer)
                note(module, both if twice else stay, None)
            note(at.mlp_proj, None, stay)
    return found


def _keep_heads(
    model: Model,
    layer: int,
    at: Any,
    gone: list[int],
    note: Any,
    found: dict[str, list[tuple[int, Tensor]]],
    names: dict[int, str],
) -> None:
    family, width = model.family, model.d_head(layer)
    n, groups = model.n_heads(layer), model.n_groups(layer)
    if family.qkv not in ("separate", "packed", "interleaved"):
        raise PatchbayError(
            f"{model.config.model_type}: its queries, keys and values are {family.qkv}, of which no head can be cut; use the knob, pb.turn.scale(parts, 0.0)"
        )
    stay = [head for head in range(n) if head not in set(gone)]
    left = kept_groups(model, layer, gone)
    left = list(range(groups)) if left is None else left

    def places(which: Sequence[int], start: int = 0) -> Tensor:
        return torch.cat([torch.arange(start + i * width, start + (i + 1) * width) for i in which])

    modules = [follow(at.attn, name) for name in family.qkv_modules]
    if len(modules) == 1:
        if family.qkv != "packed":
            raise PatchbayError(
                f"{model.config.model_type}: its queries, keys and values are interleaved, of which no head can be cut; use the knob, pb.turn.scale(parts, 0.0)"
            )
        note(modules[0], torch.cat([places(stay), places(left, n * width), places(left, (n + groups) * width)]), None)
    else:
        for module, which in zip(modules, (stay, left, left), strict=True):
            note(module, places(which), None)
    note(at.attn_proj, None, places(stay))
    for name, parameter in at.attn.named_parameters():
        if "sink" in name and parameter.shape == (n,):
            found[f"{names[id(at.attn)]}.{name}"] = [(0, torch.tensor(stay))]


# --- what it costs --------------------------------------------------------------------------------------


def _losses(
    model: Model, rows: list[list[int]], edits: list[Edit], batch_size: int
) -> tuple[tuple[Tensor, list[Tensor]], float]:
    """((loss of each text [text], its logits), seconds of the runs)."""
    losses, logits, spent = [], [], 0.0
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        begun = time.perf_counter()
        trace = run(model, some, edits=edits)
        spent += time.perf_counter() - begun
        for i, ids in enumerate(some):
            own = trace.logits[i, : len(ids)].double().cpu()
            said = own[:-1].log_softmax(-1)
            losses.append(-said.gather(1, torch.tensor(ids[1:])[:, None]).mean())
            logits.append(own)
    return (torch.stack(losses), logits), spent


def _save(small: Model, folder: Path) -> None:
    small.hf.save_pretrained(folder)
    if small.tokenizer is not None:
        small.tokenizer.save_pretrained(folder)
