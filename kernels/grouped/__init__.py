"""Matmul of rows grouped by expert with a stack of NF4 weights and their adapters (mixture of experts)."""

from lora_jax.kernels.grouped.grouped import grouped_lora_matmul

__all__ = ["grouped_lora_matmul"]
