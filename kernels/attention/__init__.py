"""Causal attention with grouped key/value heads, sliding windows, softcap and exact packing."""

from lora_jax.kernels.attention.attention import flash_attention

__all__ = ["flash_attention"]
