"""Which file reads which checkpoint."""

import importlib
from typing import Any

from lora_jax.models.decoder import DecoderConfig

__all__ = ["ARCHITECTURES", "config_from_hf"]

# Hugging Face's `architectures[0]` -> module of lora_jax.models
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """The decoder's configuration of a parsed config.json.

    Raises:
      ValueError: the architecture is missing or unknown (those known are listed), or a field is wrong.
    """
    names = hf.get("architectures") or [None]
    if names[0] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"config.json: architecture {names[0]!r} is not implemented; known are {known}")
    family = importlib.import_module(f"lora_jax.models.{ARCHITECTURES[names[0]]}")
    return family.config_from_hf(hf)
