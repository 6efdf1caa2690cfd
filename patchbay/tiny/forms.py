"""The forms of the small trained models, before training: plain transformers models of a few layers, none with dropout."""

from collections.abc import Callable

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

END_ID, N_CONTEXT, N_LAYERS = 0, 128, 3
ROUTER_BALANCE = 0.01
"""Weight of the expert load-balancing loss."""


def _gpt2(n_vocab: int, n_layers: int, n_heads: int) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=n_vocab, n_positions=N_CONTEXT, n_embd=128, n_layer=n_layers, n_head=n_heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh",
            bos_token_id=END_ID, eos_token_id=END_ID, pad_token_id=END_ID,
        )
    )  # fmt: skip


def _tiny(n_vocab: int) -> PreTrainedModel:
    return _gpt2(n_vocab, N_LAYERS, 4)


def _tiny_wide(n_vocab: int) -> PreTrainedModel:
    return _gpt2(n_vocab, 4, 8)


def _tiny_llama(n_vocab: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=n_vocab, max_position_embeddings=N_CONTEXT, hidden_size=128, intermediate_size=352, num_hidden_layers=N_LAYERS,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
            bos_token_id=END_ID, eos_token_id=END_ID, pad_token_id=END_ID,
        )
    )  # fmt: skip


def _tiny_moe(n_vocab: int) -> PreTrainedModel:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=n_vocab, max_position_embeddings=N_CONTEXT, hidden_size=128, intermediate_size=352, num_hidden_layers=N_LAYERS,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=176, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=True,
            router_aux_loss_coef=ROUTER_BALANCE, bos_token_id=END_ID, eos_token_id=END_ID, pad_token_id=END_ID,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[int], PreTrainedModel]] = {
    "tiny": _tiny,
    "tiny-wide": _tiny_wide,
    "tiny-llama": _tiny_llama,
    "tiny-moe": _tiny_moe,
}
