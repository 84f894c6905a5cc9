"""EXAONE 4.0: a Llama with its norms after attention and MLP, and norms of every head of queries and keys.

Where layers have a window, those without one rotate nothing.
"""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config, required, windows_from_hf

__all__ = ["config_from_hf"]

DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' Exaone4Config. Raises ValueError."""
    hf = {**DEFAULTS, **hf}
    layers, window, period = required(hf, "num_hidden_layers"), hf["sliding_window"], hf["sliding_window_pattern"]
    if window is None:
        windows = (None,) * layers
    elif hf.get("layer_types") is None and not isinstance(period, int):
        raise ValueError(f"config.json: sliding_window_pattern={period!r} must be a number, or layer_types be there")
    else:
        sliding = [isinstance(period, int) and (i + 1) % period > 0 for i in range(layers)]
        windows = windows_from_hf(hf, window, sliding)
    return decoder_config(
        hf,
        norms="post",
        qk_norm="head",
        windows=windows,
        nope_layers=() if window is None else tuple(i for i in range(layers) if windows[i] is None),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
