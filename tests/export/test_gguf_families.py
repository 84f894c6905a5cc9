"""GGUF files of every dense family in llama.cpp, against our own logits, which equal transformers'."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels.nf4.mlp import ACTIVATIONS
from lora_jax.models.decoder import Decoder
from lora_jax.models.registry import config_from_hf
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
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2ForCausalLM", {"rope_theta": 1e6}),
    "qwen2, yarn, tied": ("Qwen2ForCausalLM", {"rope_scaling": YARN, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 24}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 32, "rope_theta": 1e4}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 7, "attn_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 7, "num_hidden_layers": 8},
    ),
    "gemma3, linear": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 7,
            "sliding_window_pattern": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi3": ("Phi3ForCausalLM", {"rope_theta": 1e4}),
    "phi3, longrope, partial": (
        "Phi3ForCausalLM",
        {"rope_scaling": LONGROPE, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64},
    ),
    "olmo2": ("Olmo2ForCausalLM", {"rope_theta": 5e5}),
    "olmo3": ("Olmo3ForCausalLM", {"rope_theta": 1e4, "sliding_window": 7, "rope_scaling": YARN}),
    "smollm3": ("SmolLM3ForCausalLM", {"rope_theta": 5e6, "num_hidden_layers": 5}),
    "granite": ("GraniteForCausalLM", {**GRANITE, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
}


def write_model(folder: Path, architecture: str, **changes: Any) -> Path:
    """A folder with random weights of any dense family, and a tokenizer that fits."""
    fields = {**tiny.config(), "num_hidden_layers": 4, "vocab_size": VOCAB, "architectures": [architecture], **changes}
    fields = {k: v for k, v in fields.items() if k != "hidden_act" and (k in changes or k != "tie_word_embeddings")}
    config = config_from_hf(fields)
    rng = np.random.default_rng(0)

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.normal(size=shape)
        if name.endswith("norm.weight"):
            return 0.2 * noise + (0 if config.norm_plus_one else 1)
        if name.endswith("bias"):
            return 0.5 * noise
        if name.endswith("embed_tokens.weight") and not config.tie_embeddings:
            return noise / config.embedding_scale
        gain = 2.0 if name.endswith(("lm_head.weight", "embed_tokens.weight")) else 1.5 if "self_attn" in name else 1.0
        return gain * noise / shape[-1] ** 0.5

    slots = Decoder(config, jnp.float32).slots()
    weights = {name: values(name, slot.shape).astype(np.float32) for name, slot in slots.items()}
    tiny.write_folder(folder, fields, weights, tokenizer=False)
    bpe_folder(folder / "tokenizer", "gpt-2")
    for file in (folder / "tokenizer").iterdir():
        file.rename(folder / file.name)
    return folder


def gelu_from_a_table(x: jax.Array) -> jax.Array:
    """As llama.cpp has it on CPUs: in float16, for inputs of float16; log-probabilities differ by 2e-3 for that."""
    narrow = x.astype(jnp.float16).astype(jnp.float32)
    return jax.nn.gelu(narrow, approximate=True).astype(jnp.float16).astype(x.dtype)


@pytest.mark.parametrize("name", MODELS)
def test_llamacpp_computes_the_same(name, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "gelu_tanh", gelu_from_a_table)
    architecture, changes = MODELS[name]
    model = tiny.open_model(write_model(tmp_path / "model", architecture, **changes))
    (path,) = model.save_pretrained_gguf(tmp_path, quantization_method="f32", verbose=False)  # reads it back
    ours = np.asarray(jax.nn.log_softmax(model.logits(np.array([IDS]))[0, -1]))
    with LlamaCpp(path, VOCAB) as server:
        difference = np.abs(centred_difference(server.logprobs(IDS), ours)).max()
    assert difference <= 5e-4  # float32 both; log-probabilities reach -12; measured 1e-5 to 1.1e-4
    assert ("long factors" in capfd.readouterr().err) == ("longrope" in name)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("Qwen3ForCausalLM", {"attention_bias": True}, "'qwen3' has no biases"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 144}, "'gemma2' has no query_pre_attn_scalar of 144, only 16"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 16, "final_logit_softcapping": None}, "scores without caps"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 16, "layer_types": ["full_attention"] * 4}, "window in turn"),
        ("GemmaForCausalLM", {"tie_word_embeddings": False}, r"head of its own \(tie_word_embeddings=False\)"),
        ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}, r"every fourth \(no_rope_layers\), got \(1, 3\)"),
        ("GraniteForCausalLM", {"head_dim": 32}, "heads of 32 features on a width of 64"),
        ("Olmo2ForCausalLM", {"rope_scaling": {**YARN, "truncate": False}}, "yarn rope scaling with truncate=False"),
    ],
)
def test_what_llamacpp_does_not_have_is_refused(architecture, changes, message, tmp_path):
    changes = {"head_dim": 16, **changes}
    model = tiny.open_model(write_model(tmp_path / "model", architecture, **changes))
    with pytest.raises(ValueError, match=message):
        model.save_pretrained_gguf(tmp_path, quantization_method="f32", verbose=False)
    assert not list(tmp_path.glob("*.gguf"))


def test_windows_that_are_lost_are_announced(tmp_path, capfd):
    folder = write_model(tmp_path / "model", "Phi3ForCausalLM", sliding_window=50)
    tiny.open_model(folder).save_pretrained_gguf(tmp_path, quantization_method="f32", verbose=False)
    assert "no sliding window for this architecture: right up to 50 tokens" in capfd.readouterr().err
