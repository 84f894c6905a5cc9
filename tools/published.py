"""Published configurations, as their config.json has them, with the number of parameters that the hub counts."""

from typing import Any

__all__ = ["DEEPSEEK_V3", "GEMMA_3_4B", "PUBLISHED"]

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
# ---- dense models -------------------------------------------------------------------------------------------------

# (architecture, layers, hidden, intermediate, heads, heads of keys, vocabulary, longest row, more), parameters
LLAMA_3_1 = {
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
EXAONE = {
    "rms_norm_eps": 1e-5,
    "rope_scaling": {**LLAMA_3_1["rope_scaling"], "factor": 16.0},
    "rope_theta": 1000000,
}
LLLG = ["sliding_attention"] * 3 + ["full_attention"]
LLAMA_3_2 = {**LLAMA_3_1["rope_scaling"], "factor": 32.0}
DENSE = {
    "Llama-3.1-8B": (("LlamaForCausalLM", 32, 4096, 14336, 32, 8, 128256, 131072), LLAMA_3_1, 8_030_261_248),
    "Llama-3.2-1B": (
        ("LlamaForCausalLM", 16, 2048, 8192, 32, 8, 128256, 131072),
        {**LLAMA_3_1, "head_dim": 64, "rope_scaling": LLAMA_3_2, "tie_word_embeddings": True},
        1_235_814_400,
    ),
    "Llama-3.2-3B": (
        ("LlamaForCausalLM", 28, 3072, 8192, 24, 8, 128256, 131072),
        {**LLAMA_3_1, "head_dim": 128, "rope_scaling": LLAMA_3_2, "tie_word_embeddings": True},
        3_212_749_824,
    ),
    "Llama-3.1-70B": (("LlamaForCausalLM", 80, 8192, 28672, 64, 8, 128256, 131072), LLAMA_3_1, 70_553_706_496),
    "Yi-34B": (
        ("LlamaForCausalLM", 60, 7168, 20480, 56, 8, 64000, 4096),
        {"rope_theta": 5000000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        34_388_917_248,
    ),
    "Yi-1.5-9B": (
        ("LlamaForCausalLM", 48, 4096, 11008, 32, 4, 64000, 4096),
        {"rope_theta": 5000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
        8_829_407_232,
    ),
    "Mistral-7B-v0.1": (
        ("MistralForCausalLM", 32, 4096, 14336, 32, 8, 32000, 32768),
        {"rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False},
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (
        ("MistralForCausalLM", 32, 4096, 14336, 32, 8, 32768, 32768),
        {"rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False},
        7_248_023_552,
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
    "Qwen3-14B": (
        ("Qwen3ForCausalLM", 40, 5120, 17408, 40, 8, 151936, 40960),
        {"head_dim": 128, "max_window_layers": 40, "rope_theta": 1000000, "sliding_window": None},
        14_768_307_200,
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
    "GLM-4-9B-0414": (
        ("Glm4ForCausalLM", 40, 4096, 13696, 32, 2, 151552, 32768),
        {
            "attention_bias": True,
            "head_dim": 128,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        },
        9_400_279_040,
    ),
    "GLM-4-32B-0414": (
        ("Glm4ForCausalLM", 61, 6144, 23040, 48, 2, 151552, 32768),
        {
            "attention_bias": False,
            "head_dim": 128,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        },
        32_566_081_536,
    ),
    "EXAONE-4.0-1.2B": (
        ("Exaone4ForCausalLM", 30, 2048, 4096, 32, 8, 102400, 65536),
        {
            **EXAONE,
            "head_dim": 64,
            "layer_types": ["full_attention"] * 30,
            "sliding_window": None,
            "sliding_window_pattern": None,
            "tie_word_embeddings": True,
        },
        1_279_391_488,
    ),
    "EXAONE-4.0-32B": (
        ("Exaone4ForCausalLM", 64, 5120, 27392, 40, 8, 102400, 131072),
        {**EXAONE, "head_dim": 128, "sliding_window": 4096, "sliding_window_pattern": "LLLG", "layer_types": LLLG * 16},
        32_003_216_384,
    ),
    "Seed-OSS-36B-Instruct": (
        ("SeedOssForCausalLM", 64, 5120, 27648, 80, 8, 155136, 524288),
        {
            "attention_bias": True,
            "attention_out_bias": False,
            "head_dim": 128,
            "mlp_bias": False,
            "rope_scaling": {"rope_type": "default"},
            "rope_theta": 10000000.0,
            "tie_word_embeddings": False,
        },
        36_151_104_512,
    ),
}
NAMES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
NAMES += ("vocab_size", "max_position_embeddings")


# ---- mixtures of experts ------------------------------------------------------------------------------------------

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MIXTRAL_8X22B = {
    **MIXTRAL_8X7B,
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "max_position_embeddings": 65536,
    "num_attention_heads": 48,
    "num_hidden_layers": 56,
}
QWEN_MOE_A27B = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}

DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
DEEPSEEK_V3 = {  # without the layer that predicts a further token
    **DEEPSEEK_V2_LITE,
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "rope_scaling": {**DEEPSEEK_V2_LITE["rope_scaling"], "mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
GPT_OSS_120B = {
    **GPT_OSS_20B,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "num_hidden_layers": 36,
    "num_local_experts": 128,
}


# ---- models that read images too, whose files leave out what is the class's default -------------------------------


def gemma_3(**text):
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    text |= {"sliding_window": 1024}
    return {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}


GEMMA_3_4B = gemma_3(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)
GEMMA_3_12B = gemma_3(
    hidden_size=3840,
    intermediate_size=15360,
    num_hidden_layers=48,
    num_attention_heads=16,
    num_key_value_heads=8,
)
GEMMA_3_27B = gemma_3(
    hidden_size=5376,
    intermediate_size=21504,
    num_hidden_layers=62,
    num_attention_heads=32,
    num_key_value_heads=16,
    head_dim=128,
    query_pre_attn_scalar=168,
)


# Name -> (config.json, number of parameters as the hub counts them in the safetensors). Of Gemma 3 those of the text
# part: all less the 416,866,032 of the vision tower and its projection, 1152 (D + 1).
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    name: ({"architectures": [first], **dict(zip(NAMES, sizes, strict=True)), **more}, count)
    for name, ((first, *sizes), more, count) in DENSE.items()
}
PUBLISHED |= {
    "Mixtral-8x7B": (MIXTRAL_8X7B, 46_702_792_704),
    "Mixtral-8x22B": (MIXTRAL_8X22B, 140_620_634_112),
    "Qwen1.5-MoE-A2.7B": (QWEN_MOE_A27B, 14_315_784_192),
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, 30_532_122_624),
    "gpt-oss-20b": (GPT_OSS_20B, 20_914_757_184),
    "gpt-oss-120b": (GPT_OSS_120B, 116_829_156_672),
    "DeepSeek-V2-Lite": (DEEPSEEK_V2_LITE, 15_706_484_224),
    "DeepSeek-V3": (DEEPSEEK_V3, 671_026_419_200),
    "gemma-3-4b": (GEMMA_3_4B, 4_300_079_472 - 416_866_032 - 1152 * 2561),
    "gemma-3-12b": (GEMMA_3_12B, 12_187_325_040 - 416_866_032 - 1152 * 3841),
    "gemma-3-27b": (GEMMA_3_27B, 27_432_406_640 - 416_866_032 - 1152 * 5377),
}
