"""Reading config.json: the fields that most families share, in the form of hub files and in that of transformers 5."""

from collections.abc import Sequence
from typing import Any

from lora_jax.kernels.rope import RopeConfig
from lora_jax.models.decoder import DecoderConfig

__all__ = [
    "activation_from_hf",
    "decoder_config",
    "further_layers",
    "partial_rotation",
    "refuse",
    "required",
    "rope_from_hf",
    "ropes_from_hf",
    "text_part",
    "windows_from_hf",
]

# Hugging Face's names of the activations -> ours.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# Each kind of rotation, and what it needs beside its base.
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}
_ROPE_NUMBERS = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
_ROPE_NUMBERS += ("mscale", "mscale_all_dim", "truncate")
_ROPE_LISTS = ("short_factor", "long_factor")
_ROPE_KNOWN = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
_ROPE_KNOWN |= {*_ROPE_NUMBERS, *_ROPE_LISTS}


def decoder_config(hf: dict[str, Any], **fields: Any) -> DecoderConfig:
    """The configuration of a decoder.

    Args:
      hf: config.json, with the family's own defaults filled in; for what is still absent Llama's are taken.
      fields: of DecoderConfig, where a family differs from what is read here.

    Raises:
      ValueError: a field is missing or has a value that is not implemented.
    """
    hidden, heads, layers = (required(hf, n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    kv_heads = heads if hf.get("num_key_value_heads") is None else required(hf, "num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(f"config.json: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}")
    if hf.get("head_dim") is None and hidden % heads:
        raise ValueError(f"config.json: num_attention_heads={heads} must divide hidden_size={hidden}")
    bias = bool(hf.get("attention_bias", False))
    read: dict[str, Any] = {
        "architecture": hf["architectures"][0],
        "vocab_size": required(hf, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": required(hf, "intermediate_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": hidden // heads if hf.get("head_dim") is None else required(hf, "head_dim"),
        "max_position": hf.get("max_position_embeddings", 2048),
        "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "windows": (None,) * layers,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bool(hf.get("mlp_bias", False)),
    }
    if "activation" not in fields:
        read["activation"] = activation_from_hf(hf, "hidden_act")
    if "rope" not in fields:
        read["rope"] = rope_from_hf(hf)
    return DecoderConfig(**{**read, **fields})


def activation_from_hf(hf: dict[str, Any], field: str) -> str:
    """Our name of the activation that a field of config.json names, "silu" if it is absent. Raises ValueError."""
    name = hf.get(field, "silu")
    if name not in _ACTIVATIONS:
        raise ValueError(f"config.json: {field} is {name!r}; implemented are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def rope_from_hf(hf: dict[str, Any]) -> RopeConfig:
    """Reads the rotary embedding in both its forms.

    Hub files have `rope_theta` and `rope_scaling` (its kind under "rope_type" or, older, "type"); transformers 5 writes
    one dict `rope_parameters` with everything in it.

    Raises:
      ValueError: the kind is unknown, a number it needs is missing, or one is there that is not implemented.
    """
    parameters = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _ROPE_NEEDS:
        raise ValueError(f"config.json: rope type {kind!r} is not implemented; known are {', '.join(_ROPE_NEEDS)}")
    if missing := [name for name in _ROPE_NEEDS[kind] if parameters.get(name) is None]:
        raise ValueError(f"config.json: rope type {kind!r} needs a number {missing[0]!r}; got {parameters}")
    if unknown := sorted(name for name, value in parameters.items() if value is not None and name not in _ROPE_KNOWN):
        raise ValueError(f"config.json: {unknown[0]!r} of the rotation is not implemented; known are {_ROPE_KNOWN}")
    if (hf.get("partial_rotary_factor") or parameters.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor is not implemented for this architecture")
    max_position = hf.get("max_position_embeddings", 2048)
    original = parameters.get("original_max_position_embeddings") or max_position
    given = {name: parameters[name] for name in _ROPE_NUMBERS if parameters.get(name) is not None}
    given |= {name: tuple(map(float, parameters[name])) for name in _ROPE_LISTS if kind == "longrope"}
    factor = parameters.get("factor")
    if factor is None:
        factor = max_position / original if kind == "longrope" else 1.0
    return RopeConfig(
        theta=float(parameters.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        kind=kind,
        factor=float(factor),
        original_max_position=original,
        max_position=max_position,
        **given,
    )


def ropes_from_hf(hf: dict[str, Any], theta: float, local_theta: float) -> tuple[RopeConfig, RopeConfig]:
    """The rotation of layers that see everything and that of layers with a window, where these differ.

    Hub files have `rope_theta` and `rope_scaling` for the former, `rope_local_base_freq` for the latter; transformers
    5 writes `rope_parameters` with a dict for each kind of layer. The bases given here are for absent ones.

    Raises:
      ValueError: as `rope_from_hf`.
    """
    both = hf.get("rope_parameters")
    if both is None:
        both = {
            "full_attention": {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_scaling") or {})},
            "sliding_attention": {"rope_theta": hf.get("rope_local_base_freq")},
        }
    elif unknown := set(both) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"config.json: rope_parameters holds {sorted(unknown)[0]!r}; this architecture has a dict for "
            "full_attention and one for sliding_attention in it"
        )
    plain = {name: value for name, value in hf.items() if not name.startswith("rope_")}
    return (
        rope_from_hf({**plain, "rope_theta": theta, "rope_parameters": both.get("full_attention")}),
        rope_from_hf({**plain, "rope_theta": local_theta, "rope_parameters": both.get("sliding_attention")}),
    )


def partial_rotation(hf: dict[str, Any], default: float = 1.0) -> tuple[dict[str, Any], int]:
    """config.json without the share of a head's features that are rotated, and how many these are.

    `partial_rotary_factor` stands beside `rope_scaling` in hub files, in `rope_parameters` in those of transformers 5.
    """
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    share = rope.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or default
    head_dim = hf.get("head_dim") or required(hf, "hidden_size") // required(hf, "num_attention_heads")
    hf = {name: value for name, value in hf.items() if name not in ("partial_rotary_factor", "rope_scaling")}
    return {**hf, "rope_parameters": rope}, int(head_dim * share)


def text_part(hf: dict[str, Any], *, tied: bool) -> tuple[dict[str, Any], str]:
    """The fields of the language model, and where its class keeps it.

    Args:
      hf: config.json, of a language model or of one that reads images too.
      tied: whether head and embeddings are one matrix if the file does not say so.
    """
    if "text_config" not in hf:
        return {"tie_word_embeddings": tied, **hf}, "model"
    tied = hf.get("tie_word_embeddings", tied)
    text = {"tie_word_embeddings": tied, **hf["text_config"], "architectures": hf["architectures"]}
    return text, "model.language_model"


def windows_from_hf(hf: dict[str, Any], window: int | None, sliding: Sequence[bool]) -> tuple[int | None, ...]:
    """How many keys a query sees, for each layer.

    Args:
      hf: config.json; its `layer_types`, if it has them, say which layers have a window.
      window: that of a layer with one; None if no layer has one.
      sliding: for each layer, whether it has one, if `layer_types` do not say so.

    Raises:
      ValueError: a kind of layer is unknown, or there are too few or too many.
    """
    kinds = hf.get("layer_types")
    if kinds is not None:
        if len(kinds) != len(sliding):
            raise ValueError(f"config.json: layer_types names {len(kinds)} layers, num_hidden_layers={len(sliding)}")
        if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"config.json: layer_types holds {sorted(unknown)[0]!r}; implemented are full_attention and "
                "sliding_attention"
            )
        sliding = [kind == "sliding_attention" for kind in kinds]
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"config.json: sliding_window must be a whole number above 0 or null, got {window!r}")
    return tuple(window if slides else None for slides in sliding)


def further_layers(hf: dict[str, Any]) -> tuple[str, ...]:
    """Beginnings of the names of the layers that predict tokens after the next one (DeepSeek-V3, R1).

    They stand after the last layer in the files (arXiv 2412.19437, section 2.2). Neither transformers' class nor
    this decoder has them; nothing else depends on them.
    """
    first, number = hf.get("num_hidden_layers", 0), hf.get("num_nextn_predict_layers") or 0
    return tuple(f"model.layers.{layer}." for layer in range(first, first + number))


def refuse(hf: dict[str, Any], **only: Any) -> None:
    """Raises ValueError for a field whose value is neither absent nor null nor the only one that is implemented."""
    for field, value in only.items():
        if (got := hf.get(field)) is not None and got != value:
            raise ValueError(f"config.json: {field}={got!r} is not implemented for this architecture, only {value!r}")


def required(hf: dict[str, Any], name: str) -> int:
    """A whole number above zero of config.json, or a ValueError that names it."""
    number = hf.get(name)
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"config.json: {name} must be a whole number above 0, got {number!r}")
    return number
