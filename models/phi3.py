"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini (dense, text): a Llama with fused projections, longrope, and partial rotation.

Queries, keys and values are one matrix `qkv_proj`, gate and up one `gate_up_proj`; each takes one adapter, as in PEFT.
"""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config, partial_rotation, refuse, required, windows_from_hf

__all__ = ["config_from_hf"]

DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' Phi3Config. Raises ValueError."""
    hf = {**DEFAULTS, **hf}
    refuse(hf, attention_bias=False, mlp_bias=False, lm_head_bias=False)
    hf, rotary_dim = partial_rotation(hf)
    rope = hf["rope_parameters"]
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    # Older files call longrope "su" or "yarn". The original context stands beside the dict and counts.
    rope["rope_type"] = "longrope" if kind in ("su", "yarn") else kind
    rope["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    for name in ("short_factor", "long_factor"):
        if rope.get(name) is not None and len(rope[name]) != rotary_dim // 2:
            raise ValueError(
                f"config.json: {name} has {len(rope[name])} numbers; {rotary_dim} rotated features of a head want "
                f"{rotary_dim // 2}"
            )
    layers = required(hf, "num_hidden_layers")
    return decoder_config(
        hf,
        fused_qkv=True,
        fused_gate_up=True,
        rotary_dim=rotary_dim,
        windows=windows_from_hf({}, hf.get("sliding_window"), [True] * layers),
    )
