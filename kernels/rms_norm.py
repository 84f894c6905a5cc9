"""Root-mean-square layer normalisation (Zhang and Sennrich, arXiv 1910.07467), alone or after a residual addition."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.kernels.dispatch import on_gpu, resolve

__all__ = ["add_rms_norm", "branch_rms_norm", "rms_norm"]

_HEAD = 256  # features of the largest head


def rms_norm(
    x: jax.Array, weight: jax.Array, eps: float, *, plus_one: bool = False, implementation: str | None = None
) -> jax.Array:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, x [..., D], weight [D]; arithmetic in float32.

    The normalised value is rounded to the dtype of x before it is multiplied, as Hugging Face's Llama does it. With
    `plus_one` the factor is 1 + weight and everything is rounded once, at the end, as its Gemma does it.

    Args:
      x: any floating dtype.
      weight: the gains.
      eps: added to the mean square.
      plus_one: Gemma's form.
      implementation: "xla", "triton", or None to choose.

    Raises:
      NotImplementedError: the named implementation cannot do this call.
    """
    results: Any = _norm(x, weight, None, eps, plus_one, _choose(x, implementation), False)
    return results[0]


def branch_rms_norm(
    x: jax.Array, weight: jax.Array, eps: float, *, plus_one: bool = False, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """(x, `rms_norm` of x), where a branch leaves a residual stream: backward adds both gradients in one pass.

    Unlike with `add_rms_norm`, the norm can be computed again from x alone.
    """
    results: Any = _norm(x, weight, None, eps, plus_one, _choose(x, implementation), True)
    return results[1], results[0]


def add_rms_norm(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    eps: float,
    *,
    plus_one: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(x + residual, `rms_norm` of that); the sum is rounded to the dtype of x first. See `rms_norm`."""
    results: Any = _norm(x, weight, residual, eps, plus_one, _choose(x, implementation), True)
    return results[1], results[0]


def _choose(x: jax.Array, implementation: str | None) -> str:
    def why_not_triton():
        from lora_jax.kernels import rms_norm_triton

        return rms_norm_triton.why_not(x)

    # A head's norm stands between taking queries out of the product with q, k and v and rotating them: XLA does all
    # three at once (a Qwen3 layer of 16,384 tokens: 0.2 ms less).
    preference = ("xla",) if x.dtype == jnp.float32 or x.shape[-1] <= _HEAD else on_gpu("triton")
    return resolve("rms_norm", implementation, {"xla": None, "triton": why_not_triton}, preference)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _norm(x, weight, residual, eps: float, plus_one: bool, implementation: str, two: bool):
    """(norm, x + residual); the second is used only if `two`."""
    return _forward(x, weight, residual, eps, plus_one, implementation, two)[0]


def _forward(x, weight, residual, eps: float, plus_one: bool, implementation: str, two: bool):
    """Backward needs the sum, which the layer keeps anyway, and one number a row."""
    del two
    if implementation == "triton":
        from lora_jax.kernels import rms_norm_triton

        rows = (x.reshape(-1, x.shape[-1]), weight, None if residual is None else residual.reshape(-1, x.shape[-1]))
        out, total, inverse = rms_norm_triton.forward(*rows, eps, plus_one)
        out, total, inverse = out.reshape(x.shape), total.reshape(x.shape), inverse.reshape(*x.shape[:-1], 1)
    else:
        total = x if residual is None else x + residual
        wide = total.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
        normed = wide * inverse
        if plus_one:
            out = (normed * (1 + weight.astype(jnp.float32))).astype(x.dtype)
        else:
            out = weight.astype(x.dtype) * normed.astype(x.dtype)
    added = None if residual is None else ()  # both without arrays: the structure tells backward
    return (out, total), (total, weight, inverse, added)


def _backward(eps: float, plus_one: bool, implementation: str, two: bool, residuals, cotangents):
    del eps
    (dout, dtotal), (total, weight, inverse, added) = cotangents, residuals
    normed, wide = total.astype(jnp.float32) * inverse, dout.astype(jnp.float32)
    # XLA drops this line where the weight is frozen.
    dweight = jnp.sum(wide * normed, axis=tuple(range(total.ndim - 1))).astype(weight.dtype)
    if implementation == "triton":
        from lora_jax.kernels import rms_norm_triton

        rows = [z.reshape(-1, total.shape[-1]) for z in (total, dout, dtotal)]
        dx = rms_norm_triton.backward(
            rows[0], weight, inverse.reshape(-1), rows[1], rows[2] if two else None, plus_one
        ).reshape(total.shape)
    else:
        dnormed = wide * (weight.astype(jnp.float32) + (1 if plus_one else 0))
        dx = inverse * (dnormed - normed * jnp.mean(dnormed * normed, axis=-1, keepdims=True))
        dx = (dx + dtotal.astype(jnp.float32) if two else dx).astype(total.dtype)
    return dx, dweight, None if added is None else dx


_norm.defvjp(_forward, _backward)
