"""GLM-4 (0414): a Llama with four norms a layer, biases on q, k and v, and half of each head rotated, by neighbours.

Gate and up are one matrix `gate_up_proj`, which takes one adapter, as in PEFT.
"""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config, partial_rotation

__all__ = ["config_from_hf"]

DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' Glm4Config. Raises ValueError."""
    hf, rotary_dim = partial_rotation({**DEFAULTS, **hf}, default=0.5)
    return decoder_config(
        hf,
        norms="both, as GLM names them",
        fused_gate_up=True,
        rotary_dim=rotary_dim,
        interleaved=True,
        out_bias=False,
        mlp_bias=False,
    )
