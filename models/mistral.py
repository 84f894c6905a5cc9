"""Mistral 7B v0.1 to v0.3, Nemo and Small: a Llama with a sliding window or heads wider than hidden / heads.

Of a model that reads images too (`Mistral3ForConditionalGeneration`, Small 3.1 and later) the text part is loaded and
trained, and the rest is left alone.
"""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config, required, text_part, windows_from_hf

__all__ = ["config_from_hf"]


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' MistralConfig. Raises ValueError."""
    hf, prefix = text_part(hf, tied=False)
    hf = {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, **hf}
    # Absent means 4096 (the class's default), null means none: v0.1 has a window, v0.2 and later have null.
    windows = windows_from_hf({}, hf.get("sliding_window", 4096), (True,) * required(hf, "num_hidden_layers"))
    return decoder_config(hf, hf_prefix=prefix, windows=windows, qkv_bias=False, out_bias=False, mlp_bias=False)
