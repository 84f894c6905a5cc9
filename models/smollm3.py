"""SmolLM3: a Llama that rotates nothing in every fourth layer (Yang et al., arXiv 2501.18795)."""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config, required, windows_from_hf

__all__ = ["config_from_hf"]

DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2e6,
    "tie_word_embeddings": True,
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' SmolLM3Config. Raises ValueError."""
    hf = {**DEFAULTS, **hf}
    layers, interval = required(hf, "num_hidden_layers"), hf.get("no_rope_layer_interval", 4)
    rotated = hf.get("no_rope_layers") or [(i + 1) % interval for i in range(layers)]  # 0 for a layer without rotation
    if len(rotated) < layers:
        raise ValueError(f"config.json: no_rope_layers names {len(rotated)} layers, num_hidden_layers={layers}")
    nope = [not rotated[i] for i in range(layers)]
    window = hf.get("sliding_window") if hf.get("use_sliding_window", False) else None
    return decoder_config(
        hf,
        nope_layers=tuple(i for i in range(layers) if nope[i]),
        windows=windows_from_hf(hf, window, nope),
    )
