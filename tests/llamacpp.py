"""llama.cpp as a test oracle: that which exports are checked with."""

from lora_jax.export.llamacpp import LlamaCpp, centred_difference

__all__ = ["LlamaCpp", "centred_difference"]
