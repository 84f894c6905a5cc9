"""Granite 3, dense: a Llama with factors for the embeddings, the scores, what each layer adds, and the logits."""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config

__all__ = ["config_from_hf"]


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' GraniteConfig. Raises ValueError."""
    return decoder_config(
        {"vocab_size": 32000, **hf},
        embedding_scale=float(hf.get("embedding_multiplier", 1.0)),
        attention_scale=float(hf.get("attention_multiplier", 1.0)),
        residual_scale=float(hf.get("residual_multiplier", 1.0)),
        logit_scale=1 / float(hf.get("logits_scaling", 1.0)),
    )
