"""Root-mean-square layer normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

import functools

import jax
import jax.numpy as jnp

__all__ = ["rms_norm"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(x: jax.Array, weight: jax.Array, eps: float, plus_one: bool = False) -> jax.Array:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, x [..., D], weight [D]; arithmetic in float32.

    The normalised value is rounded to the dtype of x before it is multiplied, as Hugging Face's Llama does it. With
    `plus_one` the factor is 1 + weight and everything is rounded once, at the end, as its Gemma does it.
    """
    return _forward(x, weight, eps, plus_one)[0]


def _forward(x, weight, eps: float, plus_one: bool):
    """Backward needs x, which the layer keeps anyway, and one number a row."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    normed = wide * inverse
    if plus_one:
        out = (normed * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    else:
        out = weight.astype(x.dtype) * normed.astype(x.dtype)
    return out, (x, weight, inverse)


def _backward(eps: float, plus_one: bool, residuals, dout):
    del eps
    x, weight, inverse = residuals
    normed = x.astype(jnp.float32) * inverse
    dout = dout.astype(jnp.float32)
    factor = weight.astype(jnp.float32) + (1 if plus_one else 0)
    dnormed = dout * factor
    dx = inverse * (dnormed - normed * jnp.mean(dnormed * normed, axis=-1, keepdims=True))
    dweight = jnp.sum(dout * normed, axis=tuple(range(x.ndim - 1)))  # dropped by XLA where the weight is frozen
    return dx.astype(x.dtype), dweight.astype(weight.dtype)


rms_norm.defvjp(_forward, _backward)
