"""The language-model head and its cross-entropy in one op that never holds the logits of all tokens."""

from lora_jax.kernels.loss.linear_cross_entropy import Head, linear_cross_entropy

__all__ = ["Head", "linear_cross_entropy"]
