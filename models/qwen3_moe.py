"""Qwen3-MoE (30B-A3B, 235B-A22B, Coder): a Qwen3 with many small experts in its layers, none of them shared."""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config, required
from lora_jax.models.moe import MoEConfig
from lora_jax.models.qwen2_moe import sparse_layers

__all__ = ["config_from_hf"]

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' Qwen3MoeConfig. Raises ValueError."""
    # transformers 5 writes the number of experts under the name that other families have for it.
    hf = {**DEFAULTS, "num_experts": hf.get("num_local_experts", DEFAULTS["num_experts"]), **hf}
    moe = MoEConfig(
        num_experts=required(hf, "num_experts"),
        top_k=required(hf, "num_experts_per_tok"),
        intermediate_size=required(hf, "moe_intermediate_size"),
        layers=sparse_layers(hf),
        normalize=bool(hf["norm_topk_prob"]),
    )
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    windows = (window,) * required(hf, "num_hidden_layers")
    return decoder_config(hf, windows=windows, qk_norm="head", mlp_bias=False, moe=moe)
