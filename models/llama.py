"""Llama 1, 2, 3, 3.1, 3.2, 3.3 and everything published in their format (Yi, DeepSeek distils, SmolLM2, TinyLlama)."""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config

__all__ = ["config_from_hf"]


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json: the shared decoder is a Llama. Raises ValueError."""
    return decoder_config(hf)
