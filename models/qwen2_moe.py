"""Qwen1.5-MoE and Qwen2-MoE: a Qwen2 with experts in its layers, and an expert that every token goes through as well.

The result of that shared expert is multiplied by a sigmoid of the token. The weights of the other experts are not
normalised, unless `norm_topk_prob` says so. `decoder_sparse_step` and `mlp_only_layers` leave some layers an MLP.
"""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config, required, windows_from_hf
from lora_jax.models.moe import MoEConfig

__all__ = ["config_from_hf", "sparse_layers"]

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "norm_topk_prob": False,
    "qkv_bias": True,
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' Qwen2MoeConfig. Raises ValueError."""
    hf = {**DEFAULTS, **hf}
    moe = MoEConfig(
        num_experts=required(hf, "num_experts"),
        top_k=required(hf, "num_experts_per_tok"),
        intermediate_size=required(hf, "moe_intermediate_size"),
        layers=sparse_layers(hf),
        normalize=bool(hf["norm_topk_prob"]),
        shared_size=required(hf, "shared_expert_intermediate_size"),
        shared_gate=True,
    )
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    first_full = hf.get("max_window_layers", 28)
    sliding = [i % 2 == 0 and i < first_full for i in range(required(hf, "num_hidden_layers"))]
    windows = windows_from_hf(hf, window, sliding)
    return decoder_config(hf, windows=windows, qkv_bias=bool(hf["qkv_bias"]), out_bias=False, mlp_bias=False, moe=moe)


def sparse_layers(hf: dict[str, Any]) -> tuple[int, ...]:
    """Numbers of the layers with experts."""
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
    return tuple(i for i in range(required(hf, "num_hidden_layers")) if i not in dense and (i + 1) % step == 0)
