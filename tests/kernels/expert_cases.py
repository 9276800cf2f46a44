"""Tiny models with fused experts, of each layout that transformers has."""

import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

HIDDEN, INNER, EXPERTS, CHOSEN = 16, 24, 4, 2
_SIZES = {
    "vocab_size": 40, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
    "num_experts_per_tok": CHOSEN, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": EXPERTS}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM, Qwen3MoeConfig,
        {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "norm_topk_prob": True},
    ),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": EXPERTS, "num_key_value_heads": 2}),
    # Biases, gate and up interleaved, weights [E, K, N].
    "gpt_oss": (
        GptOssForCausalLM, GptOssConfig,
        {"num_local_experts": EXPERTS, "layer_types": ["full_attention"] * 2},
    ),
}  # fmt: skip


def tiny_moe(family, **changes):
    model, config, sizes = FAMILIES[family]
    torch.manual_seed(0)
    made = model(config(**{**_SIZES, **sizes, **changes})).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("_bias"):  # of gpt-oss's experts, which start at zero
                parameter.normal_(std=0.1)
    return made
