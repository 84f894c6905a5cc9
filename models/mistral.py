"""Mistral 7B v0.1 to v0.3 and Nemo: a Llama with a sliding window and, in Nemo, heads wider than hidden / heads."""

import dataclasses
from typing import Any

from lora_jax.models import llama
from lora_jax.models.decoder import DecoderConfig

__all__ = ["config_from_hf"]


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' MistralConfig. Raises ValueError."""
    hf = {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, **hf}
    # Absent means 4096 (the class's default), null means none: v0.1 has a window, v0.2 and later have null.
    window = hf.get("sliding_window", 4096)
    config = llama.config_from_hf({**hf, "attention_bias": False, "mlp_bias": False})
    return dataclasses.replace(config, windows=(window,) * config.num_layers)
