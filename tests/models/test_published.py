"""Published configurations, as their config.json has them: the model is built without arrays and counted."""

import math

import jax.numpy as jnp
import pytest

from lora_jax.models.decoder import Decoder
from lora_jax.models.registry import config_from_hf

GRANITE = {
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12.0,
    "hidden_act": "silu",
    "logits_scaling": 16.0,
    "mlp_bias": False,
    "residual_multiplier": 0.22,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
}
SMOLLM3 = {
    "attention_bias": False,
    "hidden_act": "silu",
    "layer_types": ["full_attention"] * 36,
    "max_window_layers": 28,
    "mlp_bias": False,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
}
# (architecture, layers, hidden, intermediate, heads, heads of keys, vocabulary, longest row, more), parameters
PUBLISHED = {
    "Llama-3.1-8B": (
        ("LlamaForCausalLM", 32, 4096, 14336, 32, 8, 128256, 131072),
        {"rope_theta": 500000.0, "tie_word_embeddings": False},
        8_030_261_248,
    ),
    "Yi-1.5-9B": (
        ("LlamaForCausalLM", 48, 4096, 11008, 32, 4, 64000, 4096),
        {"rope_theta": 5000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
        8_829_407_232,
    ),
    "Mistral-Nemo-2407": (
        ("MistralForCausalLM", 40, 5120, 14336, 32, 8, 131072, 131072),
        {"head_dim": 128, "rope_theta": 1000000.0, "sliding_window": None},
        12_247_782_400,
    ),
    "Mistral-Small-24B-2501": (
        ("MistralForCausalLM", 40, 5120, 32768, 32, 8, 131072, 32768),
        {"head_dim": 128, "rope_theta": 100000000.0, "sliding_window": None},
        23_572_403_200,
    ),
    "Qwen2.5-7B": (
        ("Qwen2ForCausalLM", 28, 3584, 18944, 28, 4, 152064, 131072),
        {"max_window_layers": 28, "rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False},
        7_615_616_512,
    ),
    "Qwen3-8B": (
        ("Qwen3ForCausalLM", 36, 4096, 12288, 32, 8, 151936, 40960),
        {"head_dim": 128, "max_window_layers": 36, "rope_theta": 1000000, "sliding_window": None},
        8_190_735_360,
    ),
    "gemma-7b": (
        ("GemmaForCausalLM", 28, 3072, 24576, 16, 16, 256000, 8192),
        {"head_dim": 256, "hidden_act": "gelu", "rope_scaling": None, "rope_theta": 10000.0},
        8_537_680_896,
    ),
    "gemma-2-9b": (
        ("Gemma2ForCausalLM", 42, 3584, 14336, 16, 8, 256000, 8192),
        {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        9_241_705_984,
    ),
    "Phi-3-mini-4k-instruct": (
        ("Phi3ForCausalLM", 32, 3072, 8192, 32, 32, 32064, 4096),
        {"attention_bias": False, "rope_scaling": None, "sliding_window": 2047, "tie_word_embeddings": False},
        3_821_079_552,
    ),
    "Phi-3-mini-128k-instruct": (
        ("Phi3ForCausalLM", 32, 3072, 8192, 32, 32, 32064, 131072),
        {
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 48, "long_factor": [30.5] * 48},
            "sliding_window": 262144,
        },
        3_821_079_552,
    ),
    "phi-4": (
        ("Phi3ForCausalLM", 40, 5120, 17920, 40, 10, 100352, 16384),
        {"original_max_position_embeddings": 16384, "rope_theta": 250000, "sliding_window": None},
        14_659_507_200,
    ),
    "Phi-4-mini-instruct": (
        ("Phi3ForCausalLM", 32, 3072, 8192, 24, 8, 200064, 131072),
        {
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "longrope", "short_factor": [1] * 48, "long_factor": [40.0] * 48},
            "sliding_window": 262144,
            "tie_word_embeddings": True,
        },
        3_836_021_760,
    ),
    "OLMo-2-1124-7B": (
        ("Olmo2ForCausalLM", 32, 4096, 11008, 32, 32, 100352, 4096),
        {"rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False},
        7_298_617_344,
    ),
    "SmolLM3-3B": (("SmolLM3ForCausalLM", 36, 2048, 11008, 16, 4, 128256, 65536), SMOLLM3, 3_075_098_624),
    "granite-3.1-8b-base": (
        ("GraniteForCausalLM", 40, 4096, 12800, 32, 8, 49155, 131072),
        GRANITE,
        8_170_848_256,
    ),
}
NAMES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
NAMES += ("vocab_size", "max_position_embeddings")


def number_of_parameters(config) -> int:
    return sum(math.prod(slot.shape) for slot in Decoder(config, jnp.bfloat16).slots().values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name):
    (architecture, *sizes), more, want = PUBLISHED[name]
    config = config_from_hf({"architectures": [architecture], **dict(zip(NAMES, sizes, strict=True)), **more})
    assert number_of_parameters(config) == want


def test_gemma_3_4b():
    """Its file leaves out what is the class's default; the text part, of 4,300,079,472 with the vision tower."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = config_from_hf(
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    )
    assert number_of_parameters(config) == 3_880_263_168
    assert config.windows == ((1024,) * 5 + (None,)) * 5 + (1024,) * 4
    assert (config.rope.theta, config.rope.kind, config.rope.factor) == (1e6, "linear", 8.0)
    assert (config.local_rope.theta, config.local_rope.kind) == (1e4, "default")
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.attention_scale) == (8, 4, 256, 1 / 16)
