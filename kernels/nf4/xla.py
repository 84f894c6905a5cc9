"""The specification of `lora_matmul`: plain JAX that XLA compiles for any device."""

import jax
import jax.numpy as jnp

from lora_jax.kernels.nf4.format import NF4Weight, dequantize

__all__ = ["base_matmul", "base_matmul_transposed"]


def base_matmul(x: jax.Array, w: jax.Array | NF4Weight) -> jax.Array:
    """x [M, K] times W^T for W [N, K]: [M, N] in float32 accumulation, not yet rounded."""
    return jax.lax.dot_general(x, _dense(w, x), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def base_matmul_transposed(dy: jax.Array, w: jax.Array | NF4Weight) -> jax.Array:
    """dy [M, N] times W for W [N, K]: [M, K] in float32 accumulation, not yet rounded."""
    return jnp.dot(dy, _dense(w, dy), preferred_element_type=jnp.float32)


def _dense(w: jax.Array | NF4Weight, like: jax.Array) -> jax.Array:
    """The weight in the dtype of the activations. Lives for one matmul."""
    if not isinstance(w, NF4Weight):
        return w.astype(like.dtype)
    # In a loop over stacked layers XLA moves part of the unpacking out of the loop, for all layers at once; it does not
    # move work across a barrier.
    return dequantize(jax.lax.optimization_barrier(w), like.dtype)
