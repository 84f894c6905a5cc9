"""Gemma 2: a Gemma 1 with a window in every other layer, norms before and after attention and MLP, and capped scores.

Scores and logits are capped by c tanh(x / c); scores are scaled by `query_pre_attn_scalar`, not by the width of a head.
"""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.gemma import gemma_config
from lora_jax.models.hf_config import required, windows_from_hf

__all__ = ["config_from_hf"]

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' Gemma2Config. Raises ValueError."""
    hf = {**DEFAULTS, **hf}
    sliding = [i % 2 == 0 for i in range(required(hf, "num_hidden_layers"))]
    return gemma_config(
        hf,
        norms="both",
        windows=windows_from_hf(hf, hf["sliding_window"], sliding),
        attention_scale=required(hf, "query_pre_attn_scalar") ** -0.5,
        softcap=hf["attn_logit_softcapping"],
        logit_softcap=hf["final_logit_softcapping"],
    )
