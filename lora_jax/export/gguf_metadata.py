"""The metadata of a GGUF file from a Hugging Face config.json, and what llama.cpp does not have of a family."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from lora_jax.export.gguf_tokenizer import GgufTokenizer
from lora_jax.kernels.rope import RopeConfig, inverse_frequencies
from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.registry import config_from_hf

# Hugging Face's `architectures[0]` -> llama.cpp's architecture.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Mistral3ForConditionalGeneration": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo2",
    "SmolLM3ForCausalLM": "smollm3",
    "GraniteForCausalLM": "granite",
}
# Rows of q and k are permuted where llama.cpp rotates neighbouring features instead of halves of a head.
PERMUTED = ("llama", "smollm3", "granite")
PLUS_ONE = ("gemma", "gemma2", "gemma3")  # llama.cpp multiplies by the weight; Hugging Face's weight is one less
_WITH_BIASES = ("llama", "qwen2")
_YARN_BETAS = (32.0, 1.0)  # beta_fast, beta_slow: the defaults of transformers and llama.cpp


@dataclass(frozen=True)
class ModelShape:
    """What is written of a model."""

    architecture: str  # llama.cpp's
    decoder: DecoderConfig

    @property
    def period(self) -> int:
        """Every so many layers one has no window; 1 if layers are alike or in no such order."""
        windows = self.decoder.windows
        pattern = [window is None for window in windows]
        for period in range(2, len(windows) + 2):
            if pattern == [(i + 1) % period == 0 for i in range(len(windows))]:
                return period
        return 1


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Reads config.json. Raises ValueError for what llama.cpp does not have."""
    architecture = next(iter(config.get("architectures") or ()), None)
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"GGUF export does not know the architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}"
        )
    shape = ModelShape(ARCHITECTURES[architecture], config_from_hf(dict(config)))
    if reason := _why_not(shape):
        raise ValueError(f"GGUF export: llama.cpp's architecture {shape.architecture!r} has no {reason}")
    return shape


def _why_not(shape: ModelShape) -> str | None:
    """What of a model the file cannot express; it would load and compute something else."""
    c, name = shape.decoder, shape.architecture
    biases = c.qkv_bias or c.out_bias or c.mlp_bias
    if biases and name not in _WITH_BIASES:
        return "biases (attention_bias, mlp_bias)"
    if c.rope.kind == "longrope" and name != "phi3":
        return "rope type 'longrope'"
    if c.rope.kind == "yarn" and not c.rope.truncate:
        return "yarn rope scaling with truncate=False"
    if name in ("gemma", "gemma2") and not c.tie_embeddings:
        return "head of its own (tie_word_embeddings=False)"
    if name == "gemma2" and (c.softcap is None or c.logit_softcap is None or shape.period != 2):
        return "layers other than one with and one without a window in turn, or scores without caps"
    if name == "gemma3" and shape.period == 1 and any(c.windows):
        return f"layers with windows in the order {c.windows}"
    # Theirs is 1 / sqrt(head_dim), but in the largest model of a family 1 / sqrt(hidden / heads).
    largest = {"gemma2": 46, "gemma3": 62}.get(name)
    width = c.hidden_size / c.num_heads if c.num_layers == largest else c.head_dim
    if name in PLUS_ONE and not np.isclose(c.attention_scale or c.head_dim**-0.5, width**-0.5):
        return f"query_pre_attn_scalar of {(c.attention_scale or 0) ** -2:.6g}, only {width:.6g}"
    if (
        name == "olmo2"
        and c.local_rope is not None
        and c.local_rope != RopeConfig(c.rope.theta, original_max_position=c.max_position, max_position=c.max_position)
    ):
        return f"rotation of layers with a window but with the base of the others, {c.rope.theta:.6g}"
    if name == "smollm3" and c.nope_layers != tuple(range(3, c.num_layers, 4)):
        return f"layers without rotation but every fourth (no_rope_layers), got {c.nope_layers}"
    if name == "granite" and c.head_dim * c.num_heads != c.hidden_size:
        return f"heads of {c.head_dim} features on a width of {c.hidden_size}"
    return None


def rope_factors(shape: ModelShape) -> dict[str, np.ndarray]:
    """Tensors of what llama.cpp divides each rotation frequency by, float32 [rotated features / 2], by their name."""
    rope, dim = shape.decoder.rope, shape.decoder.rotary_dim or shape.decoder.head_dim
    if rope.kind == "llama3":
        plain, _ = inverse_frequencies(RopeConfig(theta=rope.theta), dim)
        scaled, _ = inverse_frequencies(rope, dim)
        return {"rope_freqs.weight": (np.asarray(plain) / np.asarray(scaled)).astype(np.float32)}
    if rope.kind == "longrope":
        names = {"rope_factors_long.weight": rope.long_factor, "rope_factors_short.weight": rope.short_factor}
        return {name: np.array(factors, np.float32) for name, factors in names.items()}
    return {}


def unsupported(shape: ModelShape) -> list[str]:
    """What llama.cpp will do differently, for the user."""
    notes, c = [], shape.decoder
    betas = [c.rope.beta_fast, c.rope.beta_slow]
    if c.rope.kind == "yarn" and betas != list(_YARN_BETAS):
        notes.append(
            "llama.cpp does not read the yarn betas of this architecture from the file; "
            f"run it with --yarn-beta-fast {betas[0]} --yarn-beta-slow {betas[1]}"
        )
    if c.rope.kind == "dynamic":
        notes.append(f"dynamic rope scaling is not written: right up to {c.max_position} tokens, not beyond")
    if c.rope.kind == "longrope":
        notes.append(
            "llama.cpp takes the long factors of the rotation, whatever the length of the text, if its context (-c) is "
            f"above {c.rope.original_max_position} tokens"
        )
    window = min((w for w in c.windows if w is not None), default=None)
    if not _has_windows(shape) and window is not None and window < c.max_position:
        notes.append(
            f"llama.cpp has no sliding window for this architecture: right up to {window} tokens; "
            "beyond, it attends to all of them"
        )
    return notes


def _has_windows(shape: ModelShape) -> bool:
    """Whether llama.cpp implements the windows of this model."""
    return shape.architecture in ("gemma2", "gemma3", "olmo2")


def add_model(writer: gguf.GGUFWriter, shape: ModelShape, file_type: gguf.LlamaFileType, name: str) -> None:
    """Add what describes the model; the writer knows its tensors already."""
    c = shape.decoder
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(c.num_layers)
    writer.add_context_length(c.max_position)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_rope_dimension_count(c.rotary_dim or c.head_dim)
    writer.add_rope_freq_base(c.rope.theta)
    _add_windows(writer, shape)
    _add_scales(writer, shape)
    if c.rope.kind in ("linear", "yarn", "longrope"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(c.rope.kind))
    if c.rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_factor(c.rope.factor)
    if c.rope.kind == "yarn":
        _add_yarn(writer, c.rope)
    if c.rope.kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(c.rope.original_max_position)
        writer.add_rope_scaling_attn_factors(inverse_frequencies(c.rope, 2 * len(c.rope.short_factor))[1])


def _add_windows(writer: gguf.GGUFWriter, shape: ModelShape) -> None:
    c = shape.decoder
    window = next((w for w in c.windows if w is not None), None)
    if shape.architecture == "phi3":
        writer.add_sliding_window(window or 0)  # read, and not used; 0 tells Phi-4 from its predecessors
    elif window is not None:
        writer.add_sliding_window(window)
    if window is not None and shape.architecture == "gemma3":
        writer.add_sliding_window_pattern(shape.period)
    if window is not None and shape.architecture == "olmo2":
        writer.add_sliding_window_pattern([w is not None for w in c.windows])
    if c.local_rope is not None and shape.architecture == "gemma3":
        writer.add_rope_freq_base_swa(c.local_rope.theta)


def _add_scales(writer: gguf.GGUFWriter, shape: ModelShape) -> None:
    c = shape.decoder
    if shape.architecture == "granite":
        writer.add_attention_scale(c.attention_scale or c.head_dim**-0.5)
        writer.add_embedding_scale(c.embedding_scale)
        writer.add_residual_scale(c.residual_scale)
        writer.add_logit_scale(1 / c.logit_scale)
    if c.softcap is not None:
        writer.add_attn_logit_softcapping(c.softcap)
    if c.logit_softcap is not None:
        writer.add_final_logit_softcapping(c.logit_softcap)


def _add_yarn(writer: gguf.GGUFWriter, rope: RopeConfig) -> None:
    writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)
    writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
    # Both scale cos and sin: llama.cpp by `attn_factor` times its own 1 + 0.1 ln(factor).
    if rope.attention_factor is not None or (rope.mscale and rope.mscale_all_dim):
        wanted = inverse_frequencies(rope, 2)[1]
        writer.add_rope_scaling_attn_factors(wanted / (1 + 0.1 * np.log(max(rope.factor, 1))))


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
