"""Matmul of rows grouped by expert with a stack of NF4 weights and their adapters (mixture of experts)."""

from lora_jax.kernels.grouped.grouped import grouped_lora_matmul, grouped_lora_matmuls
from lora_jax.kernels.grouped.mlp import clamped_swiglu, grouped_lora_mlp

__all__ = ["clamped_swiglu", "grouped_lora_matmul", "grouped_lora_matmuls", "grouped_lora_mlp"]
