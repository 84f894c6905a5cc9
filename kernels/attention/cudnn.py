"""cuDNN's fused attention through jax.nn: rows that are neither packed nor left-padded, 16-bit, without softcap."""

import jax
import jax.numpy as jnp

from lora_jax.kernels.dispatch import default_platform

__all__ = ["attention", "why_not"]

_MULTIPLE = 64


def why_not(q: jax.Array, k: jax.Array, *, plain: bool, softcap: float | None) -> str | None:
    """The reason why cuDNN cannot do this call, or None if it can."""
    if default_platform() != "gpu":
        return f"it needs an NVIDIA GPU, JAX runs on {default_platform()}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q must be bfloat16 or float16, got {q.dtype}"
    if not plain:
        return "segment_start and query_offset are not supported"
    if softcap is not None:
        return "softcap is not supported"
    if q.shape[1] != k.shape[1]:
        return f"queries and keys must be of one length, got {q.shape[1]} and {k.shape[1]}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"head_dim must be a multiple of 8 and at most 128, got {q.shape[-1]}"
    return None


def attention(q, k, v, *, window: int | None, scale: float):
    """See `flash_attention`."""
    # cuDNN's backward pass refuses some odd lengths. Keys after the end are seen by no real query.
    length = q.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, -length % _MULTIPLE), (0, 0), (0, 0))) for x in (q, k, v))
    # jax.nn counts the keys to the left of the query, flash_attention counts the query itself too.
    local = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, scale=scale, local_window_size=local, implementation="cudnn"
    )
    return out[:, :length]
