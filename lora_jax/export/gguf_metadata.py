"""The metadata of a GGUF file from a Hugging Face config.json, and what llama.cpp does not have of a family."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from lora_jax.export.gguf_layout import Layout
from lora_jax.export.gguf_tokenizer import GgufTokenizer
from lora_jax.kernels.rope import RopeConfig, inverse_frequencies
from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.mla import LatentConfig
from lora_jax.models.registry import config_from_hf

# Hugging Face's `architectures[0]` -> llama.cpp's architecture.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Mistral3ForConditionalGeneration": "mistral3",
    "MixtralForCausalLM": "llama",
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
    "Glm4ForCausalLM": "glm4",
    "Exaone4ForCausalLM": "exaone4",
    "SeedOssForCausalLM": "seed_oss",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "GptOssForCausalLM": "gpt-oss",
    "DeepseekV2ForCausalLM": "deepseek2",
    "DeepseekV3ForCausalLM": "deepseek2",
}
# What of a linear layer's biases llama.cpp reads; of the others there are none.
_WITH_BIASES: dict[str, tuple[str, ...]] = dict.fromkeys(("qwen2", "qwen2moe", "glm4", "seed_oss"), ("qkv",))
_WITH_BIASES |= {"llama": ("qkv", "out", "mlp"), "gpt-oss": ("qkv", "out")}
_WITH_FREQUENCY_FACTORS = ("llama", "mistral3", "granite", "exaone4")  # that rotate by the factors of Llama 3
_WITH_WINDOWS = ("gemma2", "gemma3", "olmo2", "gpt-oss", "exaone4")
_WITH_YARN_BETAS = ("mistral3",)  # that read them from the file
_LATENT_EPS = 1e-6  # of the norms of DeepSeek's short vectors, whatever that of the others is
_EXAONE_WITH_WINDOWS = 64  # layers of the one EXAONE 4 in which llama.cpp has windows
_GPT_OSS_CLAMP = (1.702, 7.0)  # alpha and limit, constants in llama.cpp
_YARN_BETAS = (32.0, 1.0)  # beta_fast, beta_slow: the defaults of transformers and llama.cpp


@dataclass(frozen=True)
class ModelShape:
    """What is written of a model."""

    architecture: str  # llama.cpp's
    decoder: DecoderConfig

    @property
    def layout(self) -> Layout:
        """Where its tensors go in the file."""
        c = self.decoder
        latent = None if c.mla is None else (c.mla.plain_dim, c.mla.value_dim)
        return Layout(self.architecture, c.num_layers, c.num_heads, c.num_kv_heads, latent)

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
    biases = {"qkv": c.qkv_bias, "out": c.out_bias, "mlp": c.mlp_bias}
    if any(has for linear, has in biases.items() if linear not in _WITH_BIASES.get(name, ())):
        return "biases (attention_bias, mlp_bias)"
    if c.rope.kind == "longrope" and name != "phi3":
        return "rope type 'longrope'"
    if c.rope.kind == "llama3" and name not in _WITH_FREQUENCY_FACTORS:
        return "rope type 'llama3'"
    if c.rope.kind == "yarn" and not c.rope.truncate and name != "gpt-oss":  # whose published models have it
        return "yarn rope scaling with truncate=False"
    if c.moe is not None:
        return _why_not_experts(shape)
    if name in ("gemma", "gemma2") and not c.tie_embeddings:
        return "head of its own (tie_word_embeddings=False)"
    if name == "gemma2" and (c.softcap is None or c.logit_softcap is None or shape.period != 2):
        return "layers other than one with and one without a window in turn, or scores without caps"
    if name == "gemma3" and shape.period == 1 and any(c.windows):
        return f"layers with windows in the order {c.windows}"
    # Theirs is 1 / sqrt(head_dim), but in the largest model of a family 1 / sqrt(hidden / heads).
    largest = {"gemma2": 46, "gemma3": 62}.get(name)
    width = c.hidden_size / c.num_heads if c.num_layers == largest else c.head_dim
    if name in ("gemma", "gemma2", "gemma3") and not np.isclose(c.attention_scale or c.head_dim**-0.5, width**-0.5):
        return f"query_pre_attn_scalar of {(c.attention_scale or 0) ** -2:.6g}, only {width:.6g}"
    if name == "olmo2" and (local := c.local_rope) is not None:
        plain = RopeConfig(local.theta, original_max_position=c.max_position, max_position=c.max_position)
        if local != plain:
            return f"rotation of layers with a window but a plain one, got {local}"
    if name == "smollm3" and c.nope_layers != tuple(range(3, c.num_layers, 4)):
        return f"layers without rotation but every fourth (no_rope_layers), got {c.nope_layers}"
    if name == "exaone4" and any(c.windows) and c.num_layers != _EXAONE_WITH_WINDOWS:
        return f"windows in a model of {c.num_layers} layers, only in one of {_EXAONE_WITH_WINDOWS}"
    if name in ("granite", "exaone4") and c.head_dim * c.num_heads != c.hidden_size:
        return f"heads of {c.head_dim} features on a width of {c.hidden_size}"
    return None


def _why_not_experts(shape: ModelShape) -> str | None:
    c, name = shape.decoder, shape.architecture
    assert c.moe is not None
    if name == "deepseek2":
        return _why_not_deepseek(shape)
    if len(c.moe.layers) != c.num_layers:
        return "layers without experts (mlp_only_layers, decoder_sparse_step)"
    normalized = name != "qwen2moe"
    if c.moe.normalize != normalized:
        return f"weights of experts that are {'not ' * normalized}normalised (norm_topk_prob={c.moe.normalize})"
    if name in ("qwen2moe", "gpt-oss") and c.tie_embeddings:
        return "head that is the embedding (tie_word_embeddings=True)"
    if name == "qwen2moe" and c.head_dim * c.num_heads != c.hidden_size:
        return f"heads of {c.head_dim} features on a width of {c.hidden_size}"
    if name == "gpt-oss":
        if c.moe.clamp != _GPT_OSS_CLAMP:
            return f"swiglu_alpha and swiglu_limit of {c.moe.clamp}, only {_GPT_OSS_CLAMP}"
        if not (c.qkv_bias and c.out_bias):
            return "attention without biases (attention_bias=False)"
        if not any(c.windows):
            return "model without windows (sliding_window, layer_types)"
    return None


def _why_not_deepseek(shape: ModelShape) -> str | None:
    c = shape.decoder
    assert c.moe is not None and c.mla is not None
    if not c.interleaved:
        return "rotation of halves of a head (rope_interleave=False)"
    # It tells V2-Lite, whose queries have no short vector, by its number of layers.
    lite = c.num_layers in (26, 27) or (c.num_layers == 48 and c.vocab_size == 128256)
    if lite != (c.mla.query_rank is None):
        return f"q_lora_rank={c.mla.query_rank} in a model of {c.num_layers} layers"
    if c.rope.kind not in ("default", "yarn"):
        return f"rope type {c.rope.kind!r}"
    # The scores are multiplied as mscale_all_dim says, and the rotated features are not scaled.
    if c.rope.kind == "yarn" and not (c.rope.mscale_all_dim and inverse_frequencies(c.rope, 2)[1] == 1):
        return "yarn rope scaling but with mscale equal to mscale_all_dim"
    number, kept = c.moe.groups or (1, 1)
    if number > 1 and not (kept < number < c.moe.num_experts):
        return f"choice of {kept} of {number} groups of {c.moe.num_experts} experts (n_group, topk_group)"
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
    if c.rope.kind == "yarn" and betas != list(_YARN_BETAS) and shape.architecture not in _WITH_YARN_BETAS:
        notes.append(
            "llama.cpp does not read the yarn betas of this architecture from the file; "
            f"run it with --yarn-beta-fast {betas[0]} --yarn-beta-slow {betas[1]}"
        )
    if c.rope.kind == "yarn" and not c.rope.truncate:
        notes.append(
            "llama.cpp rounds the bounds between which yarn mixes frequencies, this model does not (truncate=False): "
            "its logits differ from this model's, as in every GGUF file of it"
        )
    if c.rope.kind == "dynamic":
        notes.append(f"dynamic rope scaling is not written: right up to {c.max_position} tokens, not beyond")
    if c.rope.kind == "longrope":
        notes.append(
            "llama.cpp takes the long factors of the rotation, whatever the length of the text, if its context (-c) is "
            f"above {c.rope.original_max_position} tokens"
        )
    window = min((w for w in c.windows if w is not None), default=None)
    if shape.architecture not in _WITH_WINDOWS and window is not None and window < c.max_position:
        notes.append(
            f"llama.cpp has no sliding window for this architecture: right up to {window} tokens; "
            "beyond, it attends to all of them"
        )
    if c.mla is not None and c.rms_norm_eps != _LATENT_EPS:
        notes.append(
            f"llama.cpp takes {c.rms_norm_eps} for {_LATENT_EPS} in the norms of latent vectors (rms_norm_eps)"
        )
    if c.moe is not None and c.moe.groups is not None and not c.moe.sigmoid:
        notes.append(
            "llama.cpp takes a group of experts to be as good as its two best, this model as its best: some tokens "
            "will go to other experts"
        )
    return notes


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
    if c.mla is None:
        writer.add_head_count_kv(c.num_kv_heads)
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    else:
        _add_latent(writer, c.mla)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_rope_dimension_count(c.rotary_dim or c.head_dim)
    writer.add_rope_freq_base(c.rope.theta)
    _add_experts(writer, shape)
    _add_windows(writer, shape)
    _add_scales(writer, shape)
    if c.rope.kind in ("linear", "yarn", "longrope"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(c.rope.kind))
    if c.rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_factor(c.rope.factor)
    if c.rope.kind == "yarn":
        _add_yarn(writer, shape)
    if shape.architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(c.rope.original_max_position)
    if c.rope.kind == "longrope":
        writer.add_rope_scaling_attn_factors(inverse_frequencies(c.rope, 2 * len(c.rope.short_factor))[1])


def _add_latent(writer: gguf.GGUFWriter, latent: LatentConfig) -> None:
    """llama.cpp attends to the short vector of keys and values, as if that and the rotated key were of one head."""
    writer.add_head_count_kv(1)
    writer.add_key_length(latent.key_value_rank + latent.rotated_dim)
    writer.add_value_length(latent.key_value_rank)
    writer.add_key_length_mla(latent.plain_dim + latent.rotated_dim)
    writer.add_value_length_mla(latent.value_dim)
    writer.add_kv_lora_rank(latent.key_value_rank)
    if latent.query_rank is not None:
        writer.add_q_lora_rank(latent.query_rank)


def _add_experts(writer: gguf.GGUFWriter, shape: ModelShape) -> None:
    moe = shape.decoder.moe
    if moe is None:
        return
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.top_k)
    if shape.architecture != "llama":
        writer.add_expert_feed_forward_length(moe.intermediate_size)
    if shape.architecture == "qwen2moe":
        assert moe.shared_size is not None
        writer.add_expert_shared_feed_forward_length(moe.shared_size)
    if shape.architecture == "deepseek2":
        number, kept = moe.groups or (1, 1)
        writer.add_expert_group_count(number)
        writer.add_expert_group_used_count(kept)
        functions = gguf.ExpertGatingFuncType
        writer.add_expert_gating_func(functions.SIGMOID if moe.sigmoid else functions.SOFTMAX)
        writer.add_leading_dense_block_count(shape.decoder.num_layers - len(moe.layers))
        writer.add_expert_shared_count((moe.shared_size or 0) // moe.intermediate_size)
        writer.add_expert_weights_scale(moe.scale)
        if moe.normalize:
            writer.add_expert_weights_norm(True)


def _add_windows(writer: gguf.GGUFWriter, shape: ModelShape) -> None:
    c = shape.decoder
    window = next((w for w in c.windows if w is not None), None)
    if shape.architecture == "phi3":
        writer.add_sliding_window(window or 0)  # read, and not used; 0 tells Phi-4 from its predecessors
    elif window is not None and shape.architecture in _WITH_WINDOWS:
        writer.add_sliding_window(window)
    if window is not None and shape.architecture == "gemma3":
        writer.add_sliding_window_pattern(shape.period)
    windows = [w is not None for w in c.windows]
    # of gpt-oss, llama.cpp takes one in every other layer for granted
    usual = shape.architecture == "gpt-oss" and windows == [i % 2 == 0 for i in range(c.num_layers)]
    if window is not None and shape.architecture in ("olmo2", "gpt-oss", "exaone4") and not usual:
        writer.add_sliding_window_pattern(windows)
    if c.local_rope is not None and shape.architecture in ("gemma3", "olmo2"):
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


def _add_yarn(writer: gguf.GGUFWriter, shape: ModelShape) -> None:
    rope = shape.decoder.rope
    writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)
    writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
    if shape.architecture == "deepseek2":
        assert rope.mscale_all_dim is not None
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope.mscale_all_dim)  # a tenth, which llama.cpp makes whole again
    # Both scale cos and sin: llama.cpp by `attn_factor` times its own 1 + 0.1 ln(factor).
    elif rope.attention_factor is not None or (rope.mscale and rope.mscale_all_dim):
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
