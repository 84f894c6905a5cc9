"""Mixtral 8x7B and 8x22B: a Mistral with eight experts in every layer, of which each token goes to two."""

from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config, refuse, required, windows_from_hf
from lora_jax.models.moe import MoEConfig

__all__ = ["config_from_hf"]

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' MixtralConfig. Raises ValueError."""
    hf = {**DEFAULTS, **hf}
    refuse(hf, router_jitter_noise=0.0)
    layers = required(hf, "num_hidden_layers")
    moe = MoEConfig(
        num_experts=required(hf, "num_local_experts"),
        top_k=required(hf, "num_experts_per_tok"),
        intermediate_size=required(hf, "intermediate_size"),
        layers=tuple(range(layers)),
        normalize=True,
        block="block_sparse_moe",
        projections=("w1", "w3", "w2"),
    )
    windows = windows_from_hf({}, hf.get("sliding_window"), (True,) * layers)
    return decoder_config(hf, windows=windows, qkv_bias=False, out_bias=False, mlp_bias=False, moe=moe)
