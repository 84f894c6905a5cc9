"""Gemma 1: a Llama whose norms multiply by 1 + weight, with scaled embeddings and GELU in its MLP."""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config, refuse, required

__all__ = ["config_from_hf", "gemma_config"]

DEFAULTS = {"vocab_size": 256000, "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' GemmaConfig. Raises ValueError."""
    hf = {**DEFAULTS, **hf}
    # The first files say "gelu", by which they mean its approximation with tanh, as those after them say.
    for field in ("hidden_act", "hidden_activation"):
        hf[field] = "gelu_pytorch_tanh" if hf.get(field) in ("gelu", None) else hf[field]
    return gemma_config(hf)


def gemma_config(hf: dict[str, Any], **fields: Any) -> DecoderConfig:
    """What all Gemmas share; `fields` as for `decoder_config`."""
    hf = {"tie_word_embeddings": True, **hf}
    refuse(hf, use_bidirectional_attention=False, hidden_activation="gelu_pytorch_tanh")
    shared = {
        "activation": "gelu_tanh",
        "norm_plus_one": True,
        "embedding_scale": required(hf, "hidden_size") ** 0.5,
        "mlp_bias": False,
    }
    return decoder_config(hf, **{**shared, **fields})
