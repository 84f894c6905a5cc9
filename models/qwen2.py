"""Qwen2, Qwen2.5 and what is published in their format (QwQ, DeepSeek-R1-Distill-Qwen, Qwen2.5-Coder, -Math).

Differs from Llama: biases on q, k and v; a sliding window, if it is used at all, from layer `max_window_layers` on.
"""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config, required, windows_from_hf

__all__ = ["config_from_hf", "windows_of"]

DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "vocab_size": 151936}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' Qwen2Config. Raises ValueError."""
    hf = {**DEFAULTS, **hf}
    return decoder_config(hf, windows=windows_of(hf), qkv_bias=True, out_bias=False, mlp_bias=False)


def windows_of(hf: dict[str, Any]) -> tuple[int | None, ...]:
    """The window of each layer; published checkpoints name one and do not use it."""
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    first = hf.get("max_window_layers", 28)
    return windows_from_hf(hf, window, [i >= first for i in range(required(hf, "num_hidden_layers"))])
