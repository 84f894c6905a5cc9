"""Seed-OSS: a Llama with biases on q, k and v, and heads wider than hidden / heads."""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config

__all__ = ["config_from_hf"]

DEFAULTS = {
    "vocab_size": 155136,
    "hidden_size": 4096,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 524288,
    "attention_bias": True,
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' SeedOssConfig. Raises ValueError."""
    hf = {**DEFAULTS, **hf}
    return decoder_config(hf, out_bias=bool(hf.get("attention_out_bias", False)))
