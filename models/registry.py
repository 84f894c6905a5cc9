"""Which file reads which checkpoint."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # lora_jax/__init__.py reads the names below, and must not import JAX
    from lora_jax.models.decoder import DecoderConfig

__all__ = ["ARCHITECTURES", "config_from_hf"]

# Hugging Face's `architectures[0]` -> module of lora_jax.models
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Mistral3ForConditionalGeneration": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
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
    "GptOssForCausalLM": "gpt_oss",
    "DeepseekV2ForCausalLM": "deepseek",
    "DeepseekV3ForCausalLM": "deepseek",
}


def config_from_hf(hf: dict[str, Any]) -> "DecoderConfig":
    """The decoder's configuration of a parsed config.json.

    Raises:
      ValueError: the architecture is missing or unknown (those known are listed), or a field is wrong.
    """
    name: Any = (hf.get("architectures") or [None])[0]
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        remote = " (the code beside it, which its auto_map names, is not run)" if "auto_map" in hf else ""
        raise ValueError(f"config.json: architecture {name!r} is not implemented{remote}; known are {known}")
    family = importlib.import_module(f"lora_jax.models.{ARCHITECTURES[name]}")
    return family.config_from_hf(hf)
