"""What several tests are given: small models, tasks of theirs, and the plainest runs to compare with."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import patchbay as pb
from patchbay.tiny import planted, twins

MIXTURES = (
    "mixtral",
    "qwen3_moe",
    "qwen3_next",
    "olmoe",
    "gpt_oss",
    "deepseek_v3",
    "deepseek_v2",
    "glm4_moe_lite",
    "dots1",
)
MIXTURES += ("flex_olmo", "phimoe", "qwen2_moe", "aria_text", "cohere2_moe", "ernie4_5_moe", "exaone_moe", "glm4_moe")
MIXTURES += ("granitemoe", "hy_v3", "mellum", "minimax_m2", "qwen3_5_moe_text", "solar_open", "granitemoe_swa", "aria")
MIXTURES += ("hunyuan_v1_moe", "jamba", "laguna", "lfm2_moe")


# a process that forks after torch has started its threads has none of them, and waits for them for ever
forks = pytest.mark.skipif(
    torch.get_num_threads() > 1, reason="forks a process, which torch does with one thread alone"
)

# --- models -------------------------------------------------------------------------------------------


@functools.cache
def lent(name: str) -> pb.Model:
    """A random twin, one for all tests of a process: they leave it as it is."""
    return pb.load(twins.twin(name))


@functools.cache
def unhooked(name: str) -> pb.Model:
    """Another one, for tests that look for hooks: transformers leaves its own where `output_attentions` was asked for."""
    return pb.load(twins.twin(name))


def gpt2(seed: int, *, vocab_size: int = 40, n_layer: int = 2, n_positions: int = 64, start: int = 1) -> Any:
    """A random GPT-2 of Hugging Face's, four heads a layer; the random state goes on from it."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "gpt2", vocab_size=vocab_size, n_embd=32, n_layer=n_layer, n_head=4, n_positions=n_positions, bos_token_id=start,
        eos_token_id=start + 1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def llama(seed: int, *, sharpness: float = 1.0) -> Any:
    """A random Llama of Hugging Face's, four heads in two groups; queries that are `sharpness` times as long make patterns uneven."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48,
    )  # fmt: skip
    hf = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.q_proj.weight.mul_(sharpness)
    return hf


# --- tasks --------------------------------------------------------------------------------------------


def pairs(n: int = 3, length: int = 8, seed: int = 0, n_wrong: int = 2, **more: Any) -> pb.Task:
    """Random prompts, twins with two tokens changed, random answers: nothing that a random model knows."""
    rng = random.Random(seed)
    clean = [[rng.randrange(3, 60) for _ in range(length)] for _ in range(n)]
    corrupted = [[rng.randrange(3, 60) if at in (1, 4) else token for at, token in enumerate(ids)] for ids in clean]
    answers = [rng.sample(range(3, 60), 1 + n_wrong) for _ in range(n)]
    right, wrong = [a[0] for a in answers], [a[1:] for a in answers]
    return pb.Task("pairs", clean, right, wrong, corrupted, **more)  # type: ignore[arg-type]


def chain(form: Any, n: int, seed: int = 0, length: int = 8) -> tuple[pb.Model, dict[str, str], pb.Task]:
    """An induction circuit, and twins in which the token before the answer is another one: the whole chain is needed."""
    built = planted.induction(form=form, seed=seed)
    model = pb.load(built.model, built.tokenizer)
    rng = random.Random(seed)
    clean, corrupted, right, wrong = [], [], [], []
    for _ in range(n):
        *row, new = rng.sample(range(3, model.vocab_size), length + 1)
        k = rng.randint(2, length - 2)
        clean.append([*row, row[k]])
        corrupted.append([*row[:k], new, *row[k + 1 :], row[k]])
        right.append(row[k + 1])
        wrong.append([row[k - 1]])
    return model, dict(built.truth), pb.Task("chain", clean, right, wrong, corrupted)  # type: ignore[arg-type]


# --- plain runs ---------------------------------------------------------------------------------------


def generated(model: pb.Model, ids: Tensor, edits: Sequence[Any], n: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy continuation with the cache: the whole text [prompt, position], and the logits of its new tokens."""
    with model.edited(*edits):
        out = model.hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return out.sequences, torch.stack(out.logits, 1)


def entering(modules: Sequence[torch.nn.Module], hf: Any, ids: Sequence[int]) -> list[Tensor]:
    """What enters each of some modules in a plain run of one prompt, [position, feature]."""
    seen: list[Tensor] = []
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])) for module in modules]
    with torch.no_grad():
        hf(torch.tensor([list(ids)]))
    for hook in hooks:
        hook.remove()
    return seen
