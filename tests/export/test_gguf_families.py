"""GGUF files of every family: against llama.cpp's own converter, and in llama.cpp against our own logits.

Those equal transformers' (tests/models/test_families.py). One model of each family runs, chosen by the commit;
`--all-configs` runs all.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax import get_peft_model
from lora_jax.export.gguf_metadata import model_shape
from lora_jax.export.peft import adapter_tensors
from lora_jax.fused_experts import assemble, parts_of
from lora_jax.kernels.nf4.mlp import ACTIVATIONS
from lora_jax.models.decoder import Decoder, DecoderConfig
from lora_jax.models.registry import ARCHITECTURES, config_from_hf
from tests import tiny
from tests.export.tiny_gguf import bpe_folder
from tests.llamacpp import LlamaCpp, centred_difference

VOCAB = 640
IDS = [int(i) for i in np.random.default_rng(1).integers(3, 600, 100)]  # beyond every window and original context
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
    "long_factor": [4.0, 3.0, 5.0, 7.0, 2.0, 1.5],
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 1.7}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 7}
QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
QWEN2_MOE = {**QWEN_MOE, "shared_expert_intermediate_size": 96}
QWEN3_MOE = {**QWEN_MOE, "head_dim": 24, "norm_topk_prob": True}
GPT_OSS = {"num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 16, "sliding_window": 7}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.6,
    "rms_norm_eps": 1e-6,
}
V2 = {**DEEPSEEK, "topk_method": "greedy", "scoring_func": "softmax"}
V3 = {**DEEPSEEK, "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "n_shared_experts": 1}

# "family, what is special about it" -> class, and what it has other fields than `tiny.config()` for.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama, llama3, tied, biases": (
        "LlamaForCausalLM",
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "mistral": ("MistralForCausalLM", {"head_dim": 24}),
    "mistral3": ("Mistral3ForConditionalGeneration", {"head_dim": 24, "rope_theta": 1e6}),
    "qwen2": ("Qwen2ForCausalLM", {"rope_theta": 1e6}),
    "qwen2, yarn, tied": ("Qwen2ForCausalLM", {"rope_scaling": YARN, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 24}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 32, "rope_theta": 1e4}),
    "gemma2": ("Gemma2ForCausalLM", {**GEMMA, "attn_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3ForCausalLM", {**GEMMA, "num_hidden_layers": 8, "vocab_size": 604}),
    "gemma3, linear": (
        "Gemma3ForCausalLM",
        {
            **GEMMA,
            "vocab_size": 604,
            "sliding_window_pattern": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "gemma3, text part": (
        "Gemma3ForConditionalGeneration",
        {**GEMMA, "vocab_size": 604, "sliding_window_pattern": 2, "rope_theta": 1e6},
    ),
    "phi3": ("Phi3ForCausalLM", {"rope_theta": 1e4, "original_max_position_embeddings": 256}),
    "phi3, longrope, partial": (
        "Phi3ForCausalLM",
        {"rope_scaling": LONGROPE, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64},
    ),
    "olmo2": ("Olmo2ForCausalLM", {"rope_theta": 5e5}),
    "olmo3": (
        "Olmo3ForCausalLM",
        {"rope_theta": 5e5, "sliding_window": 7, "rope_scaling": {**YARN, "rope_theta": 5e5}},
    ),
    "smollm3": ("SmolLM3ForCausalLM", {"rope_theta": 5e6, "num_hidden_layers": 5}),
    "granite": ("GraniteForCausalLM", {**GRANITE, "rope_theta": 1e6}),
    "granite, llama3": ("GraniteForCausalLM", {**GRANITE, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "glm4": ("Glm4ForCausalLM", {"head_dim": 24, "rope_theta": 1e4, "attention_bias": True}),
    "glm4, yarn, no biases": (
        "Glm4ForCausalLM",
        {"rope_scaling": YARN, "partial_rotary_factor": 0.75, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "exaone4": (
        "Exaone4ForCausalLM",
        {"sliding_window": None, "layer_types": ["full_attention"] * 4, "rope_theta": 1e6},
    ),
    "exaone4, windows, llama3": (
        "Exaone4ForCausalLM",
        {
            "num_hidden_layers": 64,
            "intermediate_size": 64,
            "sliding_window": 7,
            "sliding_window_pattern": "LLLG",
            "layer_types": ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(64)],
            "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        },
    ),
    "seed_oss": ("SeedOssForCausalLM", {"head_dim": 24, "rope_theta": 1e7, "attention_bias": True}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, wide heads, tied": (
        "MixtralForCausalLM",
        {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 24, "tie_word_embeddings": True},
    ),
    "qwen2-moe": ("Qwen2MoeForCausalLM", QWEN2_MOE),
    "qwen2-moe, yarn, no biases": ("Qwen2MoeForCausalLM", {**QWEN2_MOE, "rope_scaling": YARN, "qkv_bias": False}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", QWEN3_MOE),
    "qwen3-moe, yarn, tied": ("Qwen3MoeForCausalLM", {**QWEN3_MOE, "rope_scaling": YARN, "tie_word_embeddings": True}),
    "gpt-oss": ("GptOssForCausalLM", {**GPT_OSS, **PLAIN}),
    "gpt-oss, yarn": ("GptOssForCausalLM", {**GPT_OSS, "rope_scaling": {**YARN, "truncate": True}}),
    "gpt-oss, other windows": (
        "GptOssForCausalLM",
        {**GPT_OSS, **PLAIN, "layer_types": ["full_attention", "sliding_attention", *["full_attention"] * 2]},
    ),
    "deepseek-v2": ("DeepseekV2ForCausalLM", V2),
    "deepseek-v2, lite, yarn": (
        "DeepseekV2ForCausalLM",
        {
            **V2,
            "q_lora_rank": None,
            "num_hidden_layers": 27,
            "n_group": 1,
            "topk_group": 1,
            "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**V3, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "deepseek-v3, no groups, tied": (
        "DeepseekV3ForCausalLM",
        {
            **V3,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "first_k_dense_replace": 2,
            "tie_word_embeddings": True,
        },
    ),
}
# What llama.cpp loads, and announces or is known to compute otherwise.
INEXACT = {
    "gpt-oss, as published": (
        "GptOssForCausalLM",
        {**GPT_OSS, "rope_scaling": {**YARN, "truncate": False}},
        "llama.cpp rounds the bounds",
    ),
    "deepseek-v2, groups": (
        "DeepseekV2ForCausalLM",
        {**V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        "some tokens will go to other experts",
    ),
}
NOT_BY_CONVERTER = ["granite, llama3"]  # llama.cpp runs them, its converter does not know them
# `model_type` of config.json where it is not the name of the file that reads it.
MODEL_TYPES = {
    "Gemma3ForCausalLM": "gemma3_text",
    "Mistral3ForConditionalGeneration": "mistral3",
    "Olmo3ForCausalLM": "olmo3",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}
TEXT_TYPES = {"gemma3": "gemma3_text", "mistral3": "mistral"}
FUSED = "GptOssForCausalLM"  # is published with the experts of a layer in one tensor


def one_of_each_family(names) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.rotate(name.split(",")[0])) for name in names]


def config_json(architecture: str, **changes: Any) -> dict[str, Any]:
    """config.json of a small model of any family."""
    kind = MODEL_TYPES.get(architecture, ARCHITECTURES[architecture])
    fields = {**tiny.config(), "num_hidden_layers": 4, "vocab_size": VOCAB, "model_type": kind, **changes}
    fields |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    fields = {k: v for k, v in fields.items() if k != "hidden_act" and (k in changes or k != "tie_word_embeddings")}
    if architecture.endswith("ForConditionalGeneration"):
        text = {name: value for name, value in fields.items() if name != "architectures"}
        fields = {"model_type": kind, "text_config": {**text, "model_type": TEXT_TYPES[kind]}, "vision_config": {}}
    return {**fields, "architectures": [architecture]}


def write_model(folder: Path, architecture: str, **changes: Any) -> Path:
    """A folder with random weights of any family, and a tokenizer that fits."""
    fields = config_json(architecture, **changes)
    config = config_from_hf(fields)
    rng = np.random.default_rng(0)
    slots = Decoder(config, jnp.float32).slots()
    weights = {name: random_values(rng, config, name, slot.shape) for name, slot in slots.items()}
    tiny.write_folder(folder, fields, weights, tokenizer=False)
    if architecture == FUSED:
        fuse_experts(folder, weights, architecture)
    bpe_folder(folder / "tokenizer", "gpt-2")
    for file in (folder / "tokenizer").iterdir():
        file.rename(folder / file.name)
    (folder / "tokenizer").rmdir()
    return folder


def random_values(rng: np.random.Generator, config: DecoderConfig, name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.normal(size=shape)
    if name.endswith("norm.weight"):
        noise = 0.2 * noise + (0 if config.norm_plus_one else 1)
    elif name.endswith("correction_bias"):
        noise *= 0.2  # of scores between 0 and 1
    elif name.endswith(("bias", "sinks")):
        noise *= 0.5
    elif name.endswith("embed_tokens.weight") and not config.tie_embeddings:
        noise /= config.embedding_scale
    else:
        head = name.endswith(("lm_head.weight", "embed_tokens.weight"))
        noise *= (2.0 if head else 1.5 if "self_attn" in name else 1.0) / shape[-1] ** 0.5
    return noise.astype(np.float32)


def fuse_experts(folder: Path, weights: dict[str, np.ndarray], architecture: str) -> None:
    """Writes the experts of a layer in one tensor, as gpt-oss is published but for MXFP4."""
    config = json.loads((folder / "config.json").read_text())
    experts, d, f = (config[name] for name in ("num_local_experts", "hidden_size", "intermediate_size"))
    shapes = {"gate_up_proj": (d, 2 * f), "down_proj": (f, d), "gate_up_proj_bias": (2 * f,), "down_proj_bias": (d,)}
    wholes = {
        f"model.layers.{layer}.mlp.experts.{name}": (experts, *shape)
        for layer in range(config["num_hidden_layers"])
        for name, shape in shapes.items()
    }
    parts = parts_of(wholes, wholes.__getitem__, architecture)
    tensors = {name: weight for name, weight in weights.items() if name not in parts}
    for whole, shape in wholes.items():
        own = {name: part for name, part in parts.items() if part.whole == whole}
        tensors[whole] = assemble(own, shape, weights.__getitem__)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# What llama.cpp computes.


def gelu_from_a_table(x: jax.Array) -> jax.Array:
    """As llama.cpp has it on CPUs: in float16, for inputs of float16; log-probabilities differ by 2e-3 for that."""
    narrow = x.astype(jnp.float16).astype(jnp.float32)
    return jax.nn.gelu(narrow, approximate=True).astype(jnp.float16).astype(x.dtype)


@pytest.mark.parametrize("name", one_of_each_family(MODELS))
def test_llamacpp_computes_the_same(name, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "gelu_tanh", gelu_from_a_table)
    architecture, changes = MODELS[name]
    model = tiny.open_model(write_model(tmp_path / "model", architecture, **changes))
    (path,) = model.save_pretrained_gguf(tmp_path, quantization_method="f32", verbose=False)  # reads it back
    ours = np.asarray(jax.nn.log_softmax(model.logits(np.array([IDS]))[0, -1]))
    with LlamaCpp(path, model.config.vocab_size) as server:
        difference = np.abs(centred_difference(server.logprobs(IDS), ours)).max()
    # Float32 both; log-probabilities reach -12; measured up to 5e-5. Gemma's up to 3e-4: an input of its activation
    # that is rounded to another float16 here than there is off by 1e-3.
    assert difference <= (2e-3 if "gemma" in name else 2e-4)
    assert ("long factors" in capfd.readouterr().err) == ("longrope" in name)


@pytest.mark.turns("exports of mixtures")
def test_an_adapter_on_experts_in_nf4(tmp_path):
    architecture, changes = MODELS["deepseek-v3"]
    model = tiny.open_model(write_model(tmp_path / "model", architecture, **changes), "nf4-double")
    model = tiny.randomize_adapter(get_peft_model(model, r=4, verbose=False))
    assert any(".experts." in name for name in adapter_tensors(model))
    ours = np.asarray(jax.nn.log_softmax(model.logits(np.array([IDS]))[0, -1]))
    (path,) = model.save_pretrained_gguf(tmp_path, quantization_method="f32", verbose=False)
    with LlamaCpp(path, VOCAB) as server:
        difference = np.abs(centred_difference(server.logprobs(IDS), ours)).max()
    assert difference <= 5e-4  # float32, and merged weights are rounded once more than a product with its adapter


@pytest.mark.parametrize("name", INEXACT)
def test_what_llamacpp_computes_otherwise_is_announced(name, tmp_path, capfd):
    architecture, changes, note = INEXACT[name]
    model = tiny.open_model(write_model(tmp_path / "model", architecture, **changes))
    (path,) = model.save_pretrained_gguf(tmp_path, quantization_method="f32", verbose=False)
    assert note in capfd.readouterr().err
    ours = np.asarray(jax.nn.log_softmax(model.logits(np.array([IDS]))[0, -1]))
    with LlamaCpp(path, VOCAB) as server:
        difference = np.abs(centred_difference(server.logprobs(IDS), ours)).max()
    assert difference > 5e-4  # else the announcement is out of date


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("Qwen3ForCausalLM", {"attention_bias": True}, "'qwen3' has no biases"),
        ("Qwen2ForCausalLM", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, "'qwen2' has no rope type 'llama3'"),
        ("Qwen2MoeForCausalLM", {**QWEN2_MOE, "mlp_only_layers": [2]}, "'qwen2moe' has no layers without experts"),
        ("Qwen2MoeForCausalLM", {**QWEN2_MOE, "norm_topk_prob": True}, r"experts that are normalised \(norm_topk_prob"),
        ("Qwen2MoeForCausalLM", {**QWEN2_MOE, "tie_word_embeddings": True}, "head that is the embedding"),
        ("Qwen3MoeForCausalLM", {**QWEN3_MOE, "norm_topk_prob": False}, "experts that are not normalised"),
        ("Qwen3MoeForCausalLM", {**QWEN3_MOE, "attention_bias": True}, "'qwen3moe' has no biases"),
        ("GptOssForCausalLM", {**GPT_OSS, **PLAIN, "swiglu_limit": 6.0}, r"swiglu_limit of \(1.702, 6.0\), only"),
        ("GptOssForCausalLM", {**GPT_OSS, **PLAIN, "attention_bias": False}, "attention without biases"),
        ("GptOssForCausalLM", {**GPT_OSS, **PLAIN, "layer_types": ["full_attention"] * 4}, "model without windows"),
        ("GptOssForCausalLM", {**GPT_OSS, **PLAIN, "tie_word_embeddings": True}, "head that is the embedding"),
        ("DeepseekV2ForCausalLM", {**V2, "q_lora_rank": None}, "q_lora_rank=None in a model of 4 layers"),
        ("DeepseekV2ForCausalLM", {**V2, "attention_bias": True}, "'deepseek2' has no biases"),
        ("DeepseekV2ForCausalLM", {**V2, "rope_scaling": YARN}, "yarn rope scaling but with mscale equal"),
        ("DeepseekV2ForCausalLM", {**V2, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ("DeepseekV3ForCausalLM", {**V3, "rope_interleave": False}, "rotation of halves of a head"),
        ("DeepseekV3ForCausalLM", {**V3, "topk_group": 4}, "choice of 4 of 4 groups of 8 experts"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 144}, "'gemma2' has no query_pre_attn_scalar of 144, only 16"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 16, "final_logit_softcapping": None}, "scores without caps"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 16, "layer_types": ["full_attention"] * 4}, "window in turn"),
        ("GemmaForCausalLM", {"tie_word_embeddings": False}, r"head of its own \(tie_word_embeddings=False\)"),
        ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}, r"every fourth \(no_rope_layers\), got \(1, 3\)"),
        ("GraniteForCausalLM", {"head_dim": 32}, "heads of 32 features on a width of 64"),
        ("Exaone4ForCausalLM", {"sliding_window": 7}, "windows in a model of 4 layers, only in one of 64"),
        ("Exaone4ForCausalLM", {"sliding_window": None, "head_dim": 32}, "heads of 32 features on a width of 64"),
        ("SeedOssForCausalLM", {"attention_out_bias": True}, "'seed_oss' has no biases"),
        ("Glm4ForCausalLM", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, "'glm4' has no rope type 'llama3'"),
        ("Olmo2ForCausalLM", {"rope_scaling": {**YARN, "truncate": False}}, "yarn rope scaling with truncate=False"),
    ],
)
def test_what_llamacpp_does_not_have_is_refused(architecture, changes, message):
    changes = changes if "kv_lora_rank" in changes else {"head_dim": 16, **changes}
    with pytest.raises(ValueError, match=f"GGUF export: llama.cpp's architecture .*{message}"):
        model_shape(config_json(architecture, **changes))


def test_windows_that_are_lost_are_announced(tmp_path, capfd):
    folder = write_model(tmp_path / "model", "Phi3ForCausalLM", sliding_window=50)
    tiny.open_model(folder).save_pretrained_gguf(tmp_path, quantization_method="f32", verbose=False)
    assert "no sliding window for this architecture: right up to 50 tokens" in capfd.readouterr().err


# llama.cpp's own converter.

# Of ours alone: what llama.cpp would else derive from other fields, take for granted, or not need; what the tokenizer
# does where its settings do not say so.
REDUNDANT = {
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window_pattern",
    "vocab_size",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "expert_gating_func",
    "expert_group_count",
    "expert_group_used_count",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.unknown_token_id",
}


CONVERTER_TYPES = ("f32", "f16", "bf16", "q8_0")  # that llama.cpp's converter writes too
CONVERTED = [name for name in [*MODELS, *INEXACT] if name not in NOT_BY_CONVERTER]


@pytest.fixture(scope="module")
def converted(oracle, request, tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """converted(name) -> a model's folder, and what the names of its files by the converter begin with.

    One process of the converter for all models that this session's tests ask for.
    """
    models, files = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("files")
    asked = {item.callspec.params["name"] for item in request.session.items if "converted" in item.fixturenames}
    for name in asked:
        architecture, changes, *_ = (MODELS | INEXACT)[name]
        write_model(models / name, architecture, **changes)
    oracle("gguf_convert.py", models, files)
    return lambda name: (models / name, files / name)


@pytest.mark.oracle
@pytest.mark.parametrize("name", one_of_each_family(CONVERTED))
def test_files_equal_those_of_the_converter(name, converted, tmp_path):
    """Every tensor byte for byte, and every field that it writes."""
    folder, prefix = converted(name)
    model = tiny.open_model(folder)
    ours = model.save_pretrained_gguf(tmp_path, quantization_method=list(CONVERTER_TYPES), verbose=False)
    for path, type in zip(ours, CONVERTER_TYPES, strict=True):
        got, want = gguf.GGUFReader(path), gguf.GGUFReader(f"{prefix}.{type}.gguf")
        tensors = {tensor.name: tensor for tensor in got.tensors}
        assert tensors.keys() == {tensor.name for tensor in want.tensors}
        for tensor in want.tensors:
            same = tensors[tensor.name]
            assert (same.tensor_type, same.shape.tolist()) == (tensor.tensor_type, tensor.shape.tolist()), tensor.name
            if tensor.name == "rope_freqs.weight":  # a quotient of two float32, theirs of float64
                np.testing.assert_allclose(same.data, tensor.data, rtol=2**-22)
            else:
                np.testing.assert_array_equal(same.data, tensor.data, err_msg=tensor.name)
        compare_fields(got, want)


def compare_fields(got: gguf.GGUFReader, want: gguf.GGUFReader) -> None:
    fields, wanted = ({name: field.contents() for name, field in file.fields.items()} for file in (got, want))
    architecture = wanted["general.architecture"]
    guessed = {f"general.{name}" for name in ("name", "basename", "finetune", "version")}  # from the folder's name
    different = {name: (fields.get(name), value) for name, value in wanted.items() if fields.get(name) != value}
    assert not different.keys() - guessed - {"GGUF.kv_count"}, different
    added = {name.removeprefix(f"{architecture}.") for name in fields.keys() - wanted.keys()}
    assert added <= REDUNDANT, added - REDUNDANT
