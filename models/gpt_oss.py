"""gpt-oss-20b and -120b: many experts, a window in every other layer, and a sink for the attention of every head.

Router, experts and attention have biases; experts clamp gate and up (`clamped_swiglu`). The published experts are
in MXFP4, and are read into 16 bits or NF4 as those of any other model.
"""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config, required, windows_from_hf
from lora_jax.models.moe import MoEConfig

__all__ = ["config_from_hf"]

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
DEFAULTS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "attention_bias": True,
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' GptOssConfig. Raises ValueError."""
    hf = {**DEFAULTS, **hf}
    if hf.get("rope_parameters") is None and not hf.get("rope_scaling"):
        hf["rope_scaling"] = YARN  # null is as good as absent for the class; "default" is no scaling
    layers = required(hf, "num_hidden_layers")
    moe = MoEConfig(
        num_experts=required(hf, "num_local_experts"),
        top_k=required(hf, "num_experts_per_tok"),
        intermediate_size=required(hf, "intermediate_size"),
        layers=tuple(range(layers)),
        normalize=True,  # softmax over the experts chosen is softmax over all, normalised
        router="router",
        bias=True,
        clamp=(float(hf["swiglu_alpha"]), float(hf["swiglu_limit"])),
    )
    windows = windows_from_hf(hf, hf["sliding_window"], [i % 2 == 0 for i in range(layers)])
    return decoder_config(hf, windows=windows, mlp_bias=False, sinks=True, moe=moe)
