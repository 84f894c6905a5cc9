"""OLMo 2 and OLMo 3: a Llama with its norms after attention and MLP, and norms of queries and keys over all heads.

OLMo 3 has a window in three of four layers, and stretches the rotation of the fourth only.
"""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config, refuse, required, ropes_from_hf, windows_from_hf

__all__ = ["config_from_hf"]

DEFAULTS = {"vocab_size": 50304, "rms_norm_eps": 1e-5}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' classes. Raises ValueError."""
    hf = {**DEFAULTS, **hf}
    refuse(hf, clip_qkv=None)
    shared = {"norms": "post", "qk_norm": "projection", "mlp_bias": False}
    if hf["architectures"][0] == "Olmo2ForCausalLM":
        return decoder_config(hf, **shared)
    # As in transformers' Olmo3Config: the `rope_theta` of hub files is that of the layers that see everything; those
    # with a window keep 500000, unless `rope_parameters` name theirs.
    rope, local_rope = ropes_from_hf(hf, hf.get("rope_theta") or 500000.0, 500000.0)
    sliding = [(i + 1) % 4 > 0 for i in range(required(hf, "num_hidden_layers"))]
    windows = windows_from_hf(hf, hf.get("sliding_window", 4096), sliding)
    return decoder_config(hf, **shared, rope=rope, local_rope=local_rope, windows=windows)
