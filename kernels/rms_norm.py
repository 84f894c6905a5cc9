"""Root-mean-square layer normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

import jax
import jax.numpy as jnp

__all__ = ["rms_norm"]


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, x [..., D], weight [D]; arithmetic in float32.

    The normalised value is rounded to the dtype of x before it is multiplied, as Hugging Face's Llama does it.
    """
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * normed.astype(x.dtype)
