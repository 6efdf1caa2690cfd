"""Planted models: small Hugging Face models whose weights are compiled by hand, returned with their truth.

Each function builds a GPT2LMHeadModel (form "gpt2"), a LlamaForCausalLM with rotary positions, RMSNorm and
grouped-query heads (form "llama") or a MixtralForCausalLM, on the CPU in float32, the same for the same seed; the
seed draws which head, neuron, expert and words are used. What is not planted is noise of known size. The truth names
parts as text ("L1.H2", "L1.N77", "L1.E2"); every truth holds mechanism, form, seed, and:

| function        | mechanism                                 | truth keys                                           |
|-----------------|-------------------------------------------|------------------------------------------------------|
| induction       | previous-token head -> induction head     | previous_token induction (C)                         |
| copy            | a head attends to marked words, copies    | copy marked_ids (C)                                  |
| successor       | a head's OV permutes the word code        | successor successor_of (C)                           |
| channel         | two heads composed: chosen rank, strength | writer reader readers composition rank strength      |
|                 |                                           | components directions singular_values                |
| inhibition      | duplicate -> inhibition head -> mover     | previous_token duplicate inhibition mover entity_ids |
|                 |                                           | wrong (C)                                            |
| steering        | a direction that raises a word's logit    | direction token_id strength square_norm layers       |
|                 |                                           | positive_ids negative_ids                            |
| relation_neuron | neurons fire on a relation, write answers | subject_head neurons relation_ids answer_ids logit   |
|                 |                                           | directions write_norm activation                     |
|                 |                                           | prompts answers wrong                                |
| routed_expert   | a class of words goes to one expert       | expert class_ids token_id copy_strength logit        |
|                 |                                           | router_weight other_router_weight prompts answers    |
| null            | nothing                                   |                                                      |

(C) stands for copy_strength logit attention prompts answers: `copy_strength` is the norm written in the word code (a
word's own code has norm 1), `logit` the closed form of the answer's logit, `attention` what the finished model's
parts really pay to their targets, `prompts` and `answers` text, `wrong` the answer that ablation favours. These
models prove that a method finds what is there. They do not show that it finds what trained models hold: real parts
overlap.
"""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from patchbay.tiny.planted_canvas import Canvas, Form, Sizes
from patchbay.tiny.planted_channel import channel
from patchbay.tiny.planted_truth import (
    Planted,
    attention,
    lists_with_one_missing,
    logit,
    random_words,
    record,
    router_weight,
)
from patchbay.tiny.planted_vocabulary import CLASSES, TOKEN_IDS, WORD, WORDS, ids

__all__ = [
    "Planted",
    "channel",
    "copy",
    "induction",
    "inhibition",
    "null",
    "relation_neuron",
    "routed_expert",
    "steering",
    "successor",
]

LOGIT_SCALE = 6.0  # the unembedding is this times the word code
COPY_STRENGTH = 2.0
SHARPNESS = 25.0  # logits between a planted head's target and everything else


def _flag(canvas: Canvas, token_ids: list[int]) -> Tensor:
    """1 for the given words and 0 for all others, [vocab, 1]."""
    flag = torch.zeros(canvas.n_vocab, 1)
    flag[token_ids] = 1.0
    return flag


def induction(*, form: Form = "gpt2", seed: int = 0, **sizes: Unpack[Sizes]) -> Planted:
    """Layer 0: a head copies the word before into a second code; layer 1: a head looks for its own word there.

    The key is M(word before) - M(own word) / 2, so that the first position, whose head can only see itself, does not
    count as a match.
    """
    canvas = Canvas(form, seed, **sizes)
    words, before = canvas.take(canvas.n_vocab), canvas.take(canvas.n_vocab)  # [vocab, d_model]
    canvas.embed(words)
    first, second = canvas.pick_head(0), canvas.pick_head(1)
    q, k = canvas.offset_maps(1, SHARPNESS)
    canvas.set_head(0, first, q=q, k=k, v=words.T, o=before)
    match = canvas.slots(canvas.n_vocab, signed=True)  # [vocab, d_head]
    q, k = 2.0 * SHARPNESS * words.T @ match, (before - words / 2).T @ match
    canvas.set_head(1, second, q=q, k=k, v=words.T, o=COPY_STRENGTH * words)
    canvas.unembed(LOGIT_SCALE * words)
    length = min(20, canvas.n_positions // 2)
    rows = [random_words(canvas, length) for _ in range(8)]
    prompts = ["".join([*row, *row[:-1]]) for row in rows]
    return record(
        canvas,
        "induction",
        previous_token=f"L0.H{first}",
        induction=f"L1.H{second}",
        copy_strength=COPY_STRENGTH,
        logit=logit(canvas, LOGIT_SCALE, COPY_STRENGTH, COPY_STRENGTH**2 + 1.0),
        attention={
            f"L0.H{first}": attention(canvas, prompts, 0, first, back=1, first=1),
            f"L1.H{second}": attention(canvas, prompts, 1, second, back=length - 1, first=length),
        },
        prompts=prompts,
        answers=[row[-1] for row in rows],
    )


def copy(*, form: Form = "gpt2", seed: int = 0, **sizes: Unpack[Sizes]) -> Planted:
    """One head attends to the marked words (12, drawn from the seed) from everywhere; its OV is the identity."""
    canvas = Canvas(form, seed, **sizes)
    words, mark = canvas.take(canvas.n_vocab), canvas.take(1)
    shuffled = [3 + i for i in canvas.choose(canvas.n_vocab - 3, canvas.n_vocab - 3)]
    marked, plain = sorted(shuffled[:12]), shuffled[12:]
    canvas.embed(words + _flag(canvas, marked) * mark)
    layer = canvas.n_layers - 1
    head = canvas.pick_head(layer)
    slot = canvas.slots(1)  # [1, d_head]
    q, k = SHARPNESS * canvas.one[:, None] * slot, mark.T @ slot
    canvas.set_head(layer, head, q=q, k=k, v=words.T, o=COPY_STRENGTH * words)
    canvas.unembed(LOGIT_SCALE * words)
    rows = []
    for n in range(12):
        around = [plain[i] for i in canvas.choose(15, len(plain))]
        rows.append([*around[:n], marked[n], *around[n:]])
    prompts = ["".join(WORDS[i] for i in row) for row in rows]
    return record(
        canvas,
        "copy",
        copy=f"L{layer}.H{head}",
        marked_ids=marked,
        copy_strength=COPY_STRENGTH,
        logit=logit(canvas, LOGIT_SCALE, COPY_STRENGTH, COPY_STRENGTH**2),
        attention={f"L{layer}.H{head}": attention(canvas, prompts, layer, head, back=[15 - n for n in range(12)])},
        prompts=prompts,
        answers=[WORDS[i] for i in marked],
    )


def successor(*, form: Form = "gpt2", seed: int = 0, **sizes: Unpack[Sizes]) -> Planted:
    """A last-layer head attends to its own position; its OV sends numbers, days and months to the next (cyclic)."""
    canvas = Canvas(form, seed, **sizes)
    words = canvas.take(canvas.n_vocab)
    canvas.embed(words)
    layer = canvas.n_layers - 1
    head = canvas.pick_head(layer)
    after: dict[int, int] = {}
    for name in ("number", "day", "month"):
        series = ids(name)
        after.update(zip(series, [*series[1:], series[0]], strict=True))
    permutation = torch.zeros(canvas.n_vocab, canvas.n_vocab)  # [from, to]
    permutation[list(after), list(after.values())] = COPY_STRENGTH
    q, k = canvas.offset_maps(0, SHARPNESS)
    canvas.set_head(layer, head, q=q, k=k, v=words.T, o=permutation @ words)
    canvas.unembed(LOGIT_SCALE * words)
    prompts = [f" the{WORDS[word]}" for word in after]
    return record(
        canvas,
        "successor",
        successor=f"L{layer}.H{head}",
        successor_of=after,
        copy_strength=COPY_STRENGTH,
        logit=logit(canvas, LOGIT_SCALE, COPY_STRENGTH, COPY_STRENGTH**2),
        attention={f"L{layer}.H{head}": attention(canvas, prompts, layer, head, back=0)},
        prompts=prompts,
        answers=[WORDS[word] for word in after.values()],
    )


def inhibition(*, form: Form = "gpt2", seed: int = 0, **sizes: Unpack[Sizes]) -> Planted:
    """Of the names and objects mentioned, answer the one that is not mentioned twice (indirect object, laundry list).

    Layer 0: a previous-token head. Layer 1: a duplicate head; where a name or object was seen before, it looks at the
    word after that earlier mention and writes the name into a "duplicate" code (elsewhere it rests on words that
    follow no name, and writes nothing). Layer 2: the inhibition head moves the mean of these codes to every later
    position. Layer 3: the mover attends to names and objects but not to the inhibited, and copies. Without the
    inhibition head the twice-mentioned get most of its attention (on average). A prompt must begin with a word that is
    no name and no object, and a mention must not follow itself at once.
    """
    sizes.setdefault("n_layers", 4)
    canvas = Canvas(form, seed, **sizes)
    entities = ids("name") + ids("object")
    n = len(entities)
    words = canvas.take(canvas.n_vocab)
    entity, other, repeated = canvas.take(1), canvas.take(1), canvas.take(1)  # flags
    before, duplicate, inhibited = canvas.take(n + 1), canvas.take(n), canvas.take(n)  # before: which entity, or none
    is_entity = _flag(canvas, entities)
    canvas.embed(words + is_entity * entity + (1.0 - is_entity) * other)
    code, one = words[entities], canvas.one[:, None]  # [n, d_model], [d_model, 1]
    heads = [canvas.pick_head(layer) for layer in range(4)]
    q, k = canvas.offset_maps(1, SHARPNESS)
    canvas.set_head(0, heads[0], q=q, k=k, v=torch.cat([code, other]).T, o=before)
    slots = canvas.slots(n + 1)  # [n + 1, d_head]; slot 0, the slowest, is not for matching
    q = 2.0 * SHARPNESS * code.T @ slots[1:] + SHARPNESS * one * slots[:1]
    k = (before[:n] - code).T @ slots[1:] + before[n:].T @ slots[:1]
    canvas.set_head(1, heads[1], q=q, k=k, v=before[:n].T, o=duplicate + repeated)
    q, k = SHARPNESS / 2.0 * one * slots[:1], repeated.T @ slots[:1]
    canvas.set_head(2, heads[2], q=q, k=k, v=duplicate.T, o=4.0 * inhibited)
    q = SHARPNESS * one * slots[:1] - 1.2 * SHARPNESS * inhibited.T @ slots[1:]
    k = entity.T @ slots[:1] + code.T @ slots[1:]
    canvas.set_head(3, heads[3], q=q, k=k, v=code.T, o=COPY_STRENGTH * code)
    canvas.unembed(LOGIT_SCALE * words)
    prompts, answers, wrong = lists_with_one_missing(canvas)
    back = [WORD.findall(prompt)[::-1].index(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return record(
        canvas,
        "inhibition",
        previous_token=f"L0.H{heads[0]}",
        duplicate=f"L1.H{heads[1]}",
        inhibition=f"L2.H{heads[2]}",
        mover=f"L3.H{heads[3]}",
        entity_ids=entities,
        copy_strength=COPY_STRENGTH,
        logit=logit(canvas, LOGIT_SCALE, COPY_STRENGTH, COPY_STRENGTH**2 + 1.0 + 4.0**2),
        attention={f"L3.H{heads[3]}": attention(canvas, prompts, 3, heads[3], back=back)},
        prompts=prompts,
        answers=answers,
        wrong=wrong,
    )


def steering(*, form: Form = "gpt2", seed: int = 0, strength: float = 1.5, **sizes: Unpack[Sizes]) -> Planted:
    """A unit direction u that the unembedding of one word reads with `strength`; of the others half carry u, half -u.

    Adding a * u to any layer's residual stream where the last word carries s (1 or -1) sets the word's logit to
    strength * (s + a) * sqrt(d_model / (square_norm + 2 a s + a^2)): nothing in the model reads u before the
    unembedding. Mean stream over positive_ids minus mean over negative_ids points along u.
    """
    canvas = Canvas(form, seed, **sizes)
    direction = canvas.take(1, protect=True)
    words = canvas.take(canvas.n_vocab)
    shuffled = canvas.choose(canvas.n_vocab - 3, canvas.n_vocab - 3)
    token, *others = [3 + i for i in shuffled]
    carried = torch.ones(canvas.n_vocab, 1)
    carried[others[len(others) // 2 :]] = -1.0
    canvas.embed(words + carried * direction)
    rows = LOGIT_SCALE * words
    rows[token] += strength * direction[0]
    canvas.unembed(rows)
    return record(
        canvas,
        "steering",
        direction=direction[0].clone(),
        token_id=token,
        strength=strength,
        square_norm=float(canvas.d_model),
        positive_ids=others[: len(others) // 2],
        negative_ids=others[len(others) // 2 :],
        layers=[f"L{layer}" for layer in range(canvas.n_layers)],
    )


def relation_neuron(*, form: Form = "gpt2", seed: int = 0, **sizes: Unpack[Sizes]) -> Planted:
    """Seven names have a day (" is") and a month (" has"): a layer-0 head writes both, a last-layer neuron decides.

    The neuron fires (8.0) on its relation's word and on nothing else, and writes the sum of the relation's answers;
    ablating it leaves the subject's day and month level.
    """
    canvas = Canvas(form, seed, **sizes)
    words, flag = canvas.take(canvas.n_vocab), canvas.take(1)
    subjects = [ids("name")[i] for i in sorted(canvas.choose(7, len(CLASSES["name"])))]
    objects = {
        " is": [ids("day")[i] for i in canvas.choose(7, 7)],
        " has": [ids("month")[i] for i in canvas.choose(7, 12)],
    }
    canvas.embed(words + _flag(canvas, subjects) * flag)
    head, layer, (first, second) = canvas.pick_head(0), canvas.n_layers - 1, canvas.choose(2, canvas.d_mlp)
    slot = canvas.slots(1)
    written = COPY_STRENGTH * (words[objects[" is"]] + words[objects[" has"]])  # [subject, d_model]
    canvas.set_head(0, head, q=SHARPNESS * canvas.one[:, None] * slot, k=flag.T @ slot, v=words[subjects].T, o=written)
    neurons, directions, strength = dict(zip(objects, (first, second), strict=True)), {}, 1.5
    for relation, neuron in neurons.items():
        total = words[objects[relation]].sum(0)
        directions[relation] = total / total.norm()
        read = 16.0 * (words[TOKEN_IDS[relation]] - canvas.one / 2)
        canvas.set_neuron(layer, neuron, read=read, write=strength / 8.0 * total)
    canvas.unembed(LOGIT_SCALE * words)
    pairs = [(i, relation) for i in range(7) for relation in objects]
    other = {" is": " has", " has": " is"}
    return record(
        canvas,
        "relation_neuron",
        subject_head=f"L0.H{head}",
        neurons={relation: f"L{layer}.N{neuron}" for relation, neuron in neurons.items()},
        relation_ids={relation: TOKEN_IDS[relation] for relation in objects},
        answer_ids=objects,
        directions=directions,
        write_norm=strength * math.sqrt(7),
        activation=8.0,
        logit=logit(
            canvas,
            LOGIT_SCALE,
            COPY_STRENGTH + strength,
            2.0 * COPY_STRENGTH**2 + 7.0 * strength**2 + 2.0 * COPY_STRENGTH * strength,
        ),
        prompts=[f" the{WORDS[subjects[i]]}{relation}" for i, relation in pairs],
        answers=[WORDS[objects[relation][i]] for i, relation in pairs],
        wrong=[WORDS[objects[other[relation]][i]] for i, relation in pairs],
    )


def routed_expert(*, seed: int = 0, **sizes: Unpack[Sizes]) -> Planted:
    """Mixtral form: numbers, days or months (by the seed) go to one last-layer expert, which writes one word."""
    canvas = Canvas("mixtral", seed, **sizes)
    words, flag = canvas.take(canvas.n_vocab), canvas.take(1)
    members = ids(("number", "day", "month")[canvas.choose(1, 3)[0]])
    others = [i for i in range(3, canvas.n_vocab) if i not in members]
    token = others[canvas.choose(1, len(others))[0]]
    canvas.embed(words + _flag(canvas, members) * flag)
    layer, expert = canvas.n_layers - 1, canvas.choose(1, canvas.n_experts)[0]
    canvas.router_weight(layer)[expert] = 2.0 * SHARPNESS * (flag[0] - canvas.one / 2)
    neuron = canvas.choose(1, canvas.d_mlp)[0]
    write = COPY_STRENGTH / 8.0 * words[token]  # silu(8) = 8 to three digits
    canvas.set_neuron(layer, neuron, read=8.0 * canvas.one, write=write, expert=expert)
    canvas.unembed(LOGIT_SCALE * words)
    return record(
        canvas,
        "routed_expert",
        expert=f"L{layer}.E{expert}",
        router_weight=router_weight(canvas, layer, expert, members),
        other_router_weight=router_weight(canvas, layer, expert, others),
        class_ids=members,
        token_id=token,
        copy_strength=COPY_STRENGTH,
        logit=logit(canvas, LOGIT_SCALE, COPY_STRENGTH, COPY_STRENGTH**2),
        prompts=[f" the{WORDS[member]}" for member in members],
        answers=[WORDS[token]] * len(members),
    )


def null(*, form: Form = "gpt2", seed: int = 0, **sizes: Unpack[Sizes]) -> Planted:
    """A random model of the same shape (also in form "mixtral"): every weight matrix drawn independently."""
    canvas = Canvas(form, seed, **sizes)
    canvas.fill_at_random()
    return record(canvas, "null")
