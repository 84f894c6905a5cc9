"""4-bit NormalFloat weights (bitsandbytes' NF4) and the matmul of such a weight with a LoRA adapter beside it."""

from lora_jax.kernels.nf4.format import NF4Weight, dequantize, quantize
from lora_jax.kernels.nf4.matmul import lora_matmul

__all__ = ["NF4Weight", "dequantize", "lora_matmul", "quantize"]
