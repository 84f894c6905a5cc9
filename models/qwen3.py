"""Qwen3, dense: a Qwen2 without biases that normalises every head of queries and keys before their rotation."""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config
from lora_jax.models.qwen2 import DEFAULTS, windows_of

__all__ = ["config_from_hf"]


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' Qwen3Config. Raises ValueError."""
    hf = {**DEFAULTS, "head_dim": 128, **hf}
    return decoder_config(hf, windows=windows_of(hf), qk_norm="head", mlp_bias=False)
