"""The metadata of a GGUF file of the llama architecture, from a Hugging Face config.json."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from lora_jax.export.gguf_tokenizer import GgufTokenizer

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_YARN_BETAS = (32.0, 1.0)  # beta_fast, beta_slow: the defaults of transformers and llama.cpp


@dataclass(frozen=True)
class ModelShape:
    """config.json, in either of its forms (hub: rope_theta and rope_scaling; transformers 5: rope_parameters)."""

    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float
    tied: bool
    rope: dict[str, Any]  # rope_type, rope_theta and the arguments of the type
    sliding_window: int | None


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Read config.json. Raises ValueError for what the llama architecture of GGUF does not have."""
    architecture = next(iter(config.get("architectures") or ()), None)
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"GGUF export does not know the architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}"
        )
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in needed if config.get(key) is None]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act is {activation!r}; llama.cpp's llama architecture has only 'silu'")
    mistral = architecture == "MistralForCausalLM"
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return ModelShape(
        vocab=config["vocab_size"],
        hidden=hidden,
        ffn=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        # defaults as in transformers' configurations
        kv_heads=config.get("num_key_value_heads") or (8 if mistral else heads),
        head_dim=config.get("head_dim") or hidden // heads,
        context=config.get("max_position_embeddings") or (4096 * 32 if mistral else 2048),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings", False),
        rope=_rope(config),
        sliding_window=config.get("sliding_window") if mistral else None,
    )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    if rope["rope_type"] not in ("default", "linear", "dynamic", "yarn", "llama3"):
        raise ValueError(
            f"rope scaling {rope['rope_type']!r} is not supported in GGUF export (known: linear, dynamic, yarn, llama3)"
        )
    if rope["rope_type"] != "default" and "factor" not in rope:
        raise ValueError(f"rope scaling {json.dumps(rope)} has no factor")
    if rope.get("truncate") is False:
        raise ValueError("yarn rope scaling with truncate=False does not exist in llama.cpp")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor is {partial}; the llama architecture rotates whole heads")
    return rope


def llama3_rope_factors(shape: ModelShape) -> np.ndarray | None:
    """What llama.cpp divides each rotation frequency by, [head_dim / 2], for Llama 3.1's scaling.

    Wavelengths below original_context / high_freq_factor stay, those above original_context / low_freq_factor are
    stretched by `factor`, between them the frequency is interpolated (Llama 3.1; transformers' "llama3").
    """
    rope = shape.rope
    if rope["rope_type"] != "llama3":
        return None
    keys = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [key for key in keys if key not in rope]:
        raise ValueError(f"rope scaling of type llama3 lacks {', '.join(missing)}: {json.dumps(rope)}")
    low, high, context = (rope[key] for key in keys)
    wavelength = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, shape.head_dim, 2) / shape.head_dim)
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def unsupported(shape: ModelShape) -> list[str]:
    """What llama.cpp will do differently, for the user."""
    notes = []
    betas = [
        shape.rope.get(key) or default for key, default in zip(("beta_fast", "beta_slow"), _YARN_BETAS, strict=True)
    ]
    if shape.rope["rope_type"] == "yarn" and betas != list(_YARN_BETAS):
        notes.append(
            "llama.cpp does not read the yarn betas of this architecture from the file; "
            f"run it with --yarn-beta-fast {betas[0]} --yarn-beta-slow {betas[1]}"
        )
    if shape.rope["rope_type"] == "dynamic":
        notes.append(f"dynamic rope scaling is not written: right up to {shape.context} tokens, not beyond")
    if shape.sliding_window is not None and shape.sliding_window < shape.context:
        notes.append(
            f"llama.cpp has no sliding window for this architecture: right up to {shape.sliding_window} tokens; "
            "beyond, it attends to all of them"
        )
    return notes


def add_model(writer: gguf.GGUFWriter, shape: ModelShape, file_type: gguf.LlamaFileType, name: str) -> None:
    """Add what describes the model; the writer knows its tensors already."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope["rope_theta"])
    if shape.sliding_window is not None:
        writer.add_sliding_window(shape.sliding_window)
    kind = shape.rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(shape.rope["factor"])
    if kind == "yarn":
        _add_yarn(writer, shape)


def _add_yarn(writer: gguf.GGUFWriter, shape: ModelShape) -> None:
    rope = shape.rope
    writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or shape.context)
    writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or _YARN_BETAS[0])
    writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or _YARN_BETAS[1])

    # Both scale cos and sin. llama.cpp by `attn_factor` times its own 1 + 0.1 ln(factor), transformers by:
    def magnitude(strength: float) -> float:
        return 1 + 0.1 * strength * math.log(max(rope["factor"], 1))

    wanted = rope.get("attention_factor")
    if wanted is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        wanted = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    if wanted is not None:
        writer.add_rope_scaling_attn_factors(wanted / magnitude(1))


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: GgufTokenizer) -> None:
    """Add the tokenizer and the chat template."""
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.scores is not None:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.merges is not None:
        writer.add_token_merges(tokenizer.merges)
    for kind, id in tokenizer.special_ids.items():
        getattr(writer, f"add_{kind}_token_id")(id)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    writer.add_add_space_prefix(tokenizer.add_space_prefix)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
