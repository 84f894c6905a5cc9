"""`flash_attention`: the one signature of attention, and the choice of its implementation."""

import jax
import jax.numpy as jnp

from lora_jax.kernels.attention import cudnn, xla
from lora_jax.kernels.dispatch import default_platform, resolve

__all__ = ["flash_attention"]


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_start: jax.Array | None = None,
    query_offset: jax.Array | int = 0,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal softmax attention, softmax(scale q k^T + mask) v, in float32 arithmetic.

    The query at index t of its row stands at position t + query_offset of the keys and sees key j iff

        max(segment_start[t], t + query_offset - window + 1) <= j <= t + query_offset.

    Args:
      q: queries [B, T, N, H].
      k: keys [B, S, K, H]; query head n reads key head n // (N / K).
      v: values [B, S, K, H].
      segment_start: int32 [B, T], the first key each query may see (start of its document in a packed row, or the
        number of padding tokens in a left-padded row); None for 0.
      query_offset: position of the first query among the keys; above 0 with a key/value cache.
      window: number of keys a query sees, itself included; None for all.
      softcap: c in c tanh(scores / c), applied before the mask (Gemma 2); None for none.
      scale: factor of the scores; None for 1 / sqrt(H).
      implementation: "xla", "cudnn", or None to choose by device and arguments.

    Returns:
      [B, T, N, H] in the dtype of q.

    Raises:
      ValueError: shapes do not fit or window is below 1.
      NotImplementedError: the named implementation cannot do this call.
    """
    (batch, length, heads, dim), kv_heads = q.shape, k.shape[2]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != dim or heads % kv_heads:
        raise ValueError(
            f"flash_attention: q {q.shape} wants k and v of shape [{batch}, S, K, {dim}] with K a divisor of {heads}; "
            f"got k {k.shape}, v {v.shape}"
        )
    if segment_start is not None and segment_start.shape != (batch, length):
        raise ValueError(f"flash_attention: segment_start must be [{batch}, {length}], got {segment_start.shape}")
    if window is not None and window < 1:
        raise ValueError(f"flash_attention: window counts the keys a query sees and must be at least 1, got {window}")
    scale = dim**-0.5 if scale is None else float(scale)
    plain = segment_start is None and isinstance(query_offset, int) and query_offset == 0
    supported = {"xla": None, "cudnn": cudnn.why_not(q, k, plain=plain, softcap=softcap)}
    # cuDNN would be tried on a machine without a GPU only when it is named.
    preference = ("cudnn", "xla") if default_platform() == "gpu" else ("xla",)
    if resolve("flash_attention", implementation, supported, preference) == "cudnn":
        return cudnn.attention(q, k, v, window=window, scale=scale)
    if segment_start is None:
        segment_start = jnp.zeros((batch, length), jnp.int32)
    return xla.attention(q, k, v, segment_start, query_offset, window=window, softcap=softcap, scale=scale)
