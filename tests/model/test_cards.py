"""Cards of parts: what a head and a neuron read and write, as tokens, from the weights."""

from typing import Any

import torch
from click.testing import CliRunner
from torch import nn

import patchbay as pb
from patchbay.cli import cli
from patchbay.model.cards import part_card
from patchbay.tiny.twins import twin


def nearest_to_itself(hf: Any, before: nn.Module) -> None:
    """Norms of gain 1 and tokens of one length, so that each token is the nearest to its own direction."""
    for norm in (before, hf.model.norm):
        norm.weight.fill_(1.0)
    for weight in (hf.get_input_embeddings().weight, hf.get_output_embeddings().weight):
        weight /= weight.norm(dim=1, keepdim=True)


def test_a_neuron_that_copies_one_token_into_another_says_so() -> None:
    """Its input column is token 7's embedding and its output row token 9's unembedding, through norms of gain 1."""
    hf = twin("llama")
    with torch.no_grad():
        mlp = hf.model.layers[1].mlp
        nearest_to_itself(hf, hf.model.layers[1].post_attention_layernorm)
        mlp.up_proj.weight[3] = hf.get_input_embeddings().weight[7]
        mlp.down_proj.weight[:, 3] = hf.get_output_embeddings().weight[9]
    reads, writes = part_card(pb.load(hf), "L1.N3")["words"]
    assert (reads["does"], reads["most"][0]) == ("reads", "7")
    assert (writes["does"], writes["most"][0]) == ("writes", "9")
    assert "7" not in reads["least"]


def test_a_head_whose_map_is_one_pair_of_tokens_says_so() -> None:
    hf = twin("llama")
    with torch.no_grad():
        attention = hf.model.layers[0].self_attn
        nearest_to_itself(hf, hf.model.layers[0].input_layernorm)
        d_head = attention.head_dim
        attention.v_proj.weight[:d_head] = 0.0  # group 0, of heads 0 and 1
        attention.v_proj.weight[0] = hf.get_input_embeddings().weight[5]
        attention.o_proj.weight[:, d_head : 2 * d_head] = 0.0  # head 1
        attention.o_proj.weight[:, d_head] = hf.get_output_embeddings().weight[6]
    rows = part_card(pb.load(hf), "L0.H1")["words"][:2]
    ends = [[row["most"][0], row["least"][0]] for row in rows]
    end = ends[0].index("5")  # a singular direction has no sign, but its ends are paired
    assert ends[1][end] == "6"
    assert rows[0]["direction"].startswith("1 (100 %")


def test_cards_print_and_other_parts_have_no_words() -> None:
    model = pb.load("tiny")
    assert part_card(model, "L1.attn")["words"] == []
    assert part_card(pb.load("tiny-moe"), "L1.E2")["words"] == []
    first = part_card(model, "L1.N5")["words"][1]["most"][0].strip()
    shown = CliRunner().invoke(cli, ["show", "tiny", "L1.N5"])
    assert shown.exit_code == 0, shown.output
    assert first in shown.output
    assert "in the weights" in shown.output
