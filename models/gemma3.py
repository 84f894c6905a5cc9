"""Gemma 3, text: a Gemma 2 that normalises queries and keys instead of capping scores, with two rotations.

Five layers with a window are followed by one without; the former rotate by a base of their own. Of a model that reads
images too (`Gemma3ForConditionalGeneration`) the text part is loaded and trained, and the rest is left alone.
"""

from typing import Any

from lora_jax.models import gemma2
from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.gemma import gemma_config
from lora_jax.models.hf_config import refuse, required, ropes_from_hf, text_part, windows_from_hf

__all__ = ["config_from_hf"]

DEFAULTS = {
    **gemma2.DEFAULTS,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' Gemma3TextConfig. Raises ValueError."""
    hf, prefix = text_part(hf, tied=True)
    hf = {**DEFAULTS, **hf}
    refuse(hf, attn_logit_softcapping=None)  # no published model has it
    if prefix != "model":
        refuse(hf, final_logit_softcapping=None)  # transformers' class would not cap
    period = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    sliding = [(i + 1) % period > 0 for i in range(required(hf, "num_hidden_layers"))]
    rope, local_rope = ropes_from_hf(hf, 1e6, 1e4)
    return gemma_config(
        hf,
        hf_prefix=prefix,
        norms="both",
        qk_norm="head",
        rope=rope,
        local_rope=local_rope,
        windows=windows_from_hf(hf, hf["sliding_window"], sliding),
        attention_scale=required(hf, "query_pre_attn_scalar") ** -0.5,
        logit_softcap=hf["final_logit_softcapping"],
    )
