"""The specification of `lora_matmul`: plain JAX that XLA compiles for any device."""

import jax
import jax.numpy as jnp

from lora_jax.kernels.nf4.format import NF4Weight, dequantize

__all__ = ["base_matmul", "base_matmul_transposed", "forward", "input_gradient"]


def base_matmul(x: jax.Array, w: jax.Array | NF4Weight) -> jax.Array:
    """x [M, K] times W^T for W [N, K]: [M, N] in float32 accumulation, not yet rounded."""
    return jax.lax.dot_general(x, _dense(w, x), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def base_matmul_transposed(dy: jax.Array, w: jax.Array | NF4Weight) -> jax.Array:
    """dy [M, N] times W for W [N, K]: [M, K] in float32 accumulation, not yet rounded."""
    return jnp.dot(dy, _dense(w, dy), preferred_element_type=jnp.float32)


def forward(x: jax.Array, w: jax.Array | NF4Weight, a: jax.Array, b: jax.Array) -> tuple[jax.Array, None]:
    """(x W^T + x a b [M, N] in the dtype of x, None) for a [K, R], b [R, N]: x a is computed again in backward."""
    return (base_matmul(x, w) + _thin_product(x, a, b)).astype(x.dtype), None


def input_gradient(dy: jax.Array, w: jax.Array | NF4Weight, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(dy W + (dy b^T) a^T [M, K], dy b^T [M, R]) for dy [M, N], both in its dtype."""
    thin = jnp.dot(dy, b.T, preferred_element_type=jnp.float32).astype(dy.dtype)
    dx = base_matmul_transposed(dy, w) + jnp.dot(thin, a.T, preferred_element_type=jnp.float32)
    return dx.astype(dy.dtype), thin


def _thin_product(x, a, b):
    thin = jnp.dot(x, a, preferred_element_type=jnp.float32).astype(x.dtype)
    return jnp.dot(thin, b, preferred_element_type=jnp.float32)


def _dense(w: jax.Array | NF4Weight, like: jax.Array) -> jax.Array:
    """The weight in the dtype of the activations. Lives for one matmul."""
    if not isinstance(w, NF4Weight):
        return w.astype(like.dtype)
    # In a loop over stacked layers XLA moves part of the unpacking out of the loop, for all layers at once; it does not
    # move work across a barrier.
    return dequantize(jax.lax.optimization_barrier(w), like.dtype)
