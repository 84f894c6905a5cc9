"""Llama 1, 2, 3, 3.1, 3.2, 3.3 and everything published in their format (Yi, DeepSeek distils, SmolLM2, TinyLlama).

The shared decoder is a Llama; this file only reads its config.json.
"""

from typing import Any

from lora_jax.kernels.rope import RopeConfig
from lora_jax.models.decoder import DecoderConfig

__all__ = ["config_from_hf", "rope_from_hf"]

_ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' LlamaConfig.

    Raises:
      ValueError: a field is missing or has a value this model does not implement.
    """
    heads = required(hf, "num_attention_heads")
    activation = hf.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"config.json: hidden_act is {activation!r}, this model family is implemented with 'silu'")
    layers, hidden = required(hf, "num_hidden_layers"), required(hf, "hidden_size")
    kv_heads = heads if hf.get("num_key_value_heads") is None else required(hf, "num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(f"config.json: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}")
    if hf.get("head_dim") is None and hidden % heads:
        raise ValueError(f"config.json: num_attention_heads={heads} must divide hidden_size={hidden}")
    bias = bool(hf.get("attention_bias", False))
    return DecoderConfig(
        architecture=hf["architectures"][0],
        vocab_size=required(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=required(hf, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads if hf.get("head_dim") is None else required(hf, "head_dim"),
        max_position=hf.get("max_position_embeddings", 2048),
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=rope_from_hf(hf),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        windows=(None,) * layers,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
    )


def rope_from_hf(hf: dict[str, Any]) -> RopeConfig:
    """Reads the rotary embedding in both its forms.

    Hub files have `rope_theta` and `rope_scaling` (its kind under "rope_type" or, older, "type"); transformers 5 writes
    one dict `rope_parameters` with everything in it.

    Raises:
      ValueError: the kind is unknown or a number it needs is missing.
    """
    parameters = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _ROPE_KINDS:
        raise ValueError(f"config.json: rope type {kind!r} is not implemented; known are {', '.join(_ROPE_KINDS)}")
    needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    needed = {"default": (), "llama3": needed}.get(kind, needed[:1])
    if missing := [name for name in needed if parameters.get(name) is None]:
        raise ValueError(f"config.json: rope type {kind!r} needs a number {missing[0]!r}; got {parameters}")
    max_position = hf.get("max_position_embeddings", 2048)
    original = parameters.get("original_max_position_embeddings") or max_position
    names = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
    names += ("attention_factor", "mscale", "mscale_all_dim", "truncate")
    given = {name: parameters[name] for name in names if parameters.get(name) is not None}
    return RopeConfig(
        theta=float(parameters.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        kind=kind,
        factor=float(parameters.get("factor", 1.0)),
        original_max_position=original,
        max_position=max_position,
        **given,
    )


def required(hf: dict[str, Any], name: str) -> int:
    """A whole number above zero of config.json, or a ValueError that names it."""
    number = hf.get(name)
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"config.json: {name} must be a whole number above 0, got {number!r}")
    return number
