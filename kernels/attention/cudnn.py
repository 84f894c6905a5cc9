"""cuDNN's fused attention: causal rows, with a window or not, that are neither packed nor left-padded; 16-bit.

`jax.nn.dot_product_attention` keeps its log-sum-exp to itself, so under `jax.checkpoint` backward would run the forward
kernel again. This file calls the two halves of that function, which are private to JAX, and it alone does so;
tests/kernels/test_attention.py notices when they change.

Backward is not deterministic: on an H100 (cuDNN 9.19, 1 x 4096, 32 / 8 heads of 128) none of 30 repeats gave the bits
of the first. "mosaic", "triton" and "xla" are deterministic. Its error is that of the XLA computation in the output and
in dq, 1.3 times that in dk and dv (3.0e-3 against 2.4e-3 of the norm).
"""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lora_jax.kernels.dispatch import default_platform

__all__ = ["backward", "forward", "why_not"]

# cuDNN's backward pass refuses some odd lengths. Keys after the end are seen by no real query.
_MULTIPLE = 64


def why_not(q, k, v, *, segment_start, query_offset, window, softcap, sinks) -> str | None:
    """The reason why cuDNN cannot do this call, or None if it can."""
    del window
    if default_platform() != "gpu":
        return f"it needs an NVIDIA GPU, JAX runs on {default_platform()}"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must all be bfloat16 or all float16, got {q.dtype}, {k.dtype}, {v.dtype}"
    if segment_start is not None or not isinstance(query_offset, int) or query_offset != 0:
        return "segment_start and query_offset are not supported"
    if softcap is not None:
        return "softcap is not supported"
    if sinks is not None:
        return "sinks are not supported"
    if q.shape[1] != k.shape[1]:
        return f"queries and keys must be of one length, got {q.shape[1]} and {k.shape[1]}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"head_dim must be a multiple of 8 and at most 128, got {q.shape[-1]}"
    if v.shape[-1] != q.shape[-1]:
        return f"keys and values must have one head_dim, got {q.shape[-1]} and {v.shape[-1]}"
    return None


def forward(q, k, v, *, window: int | None, scale: float) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] and the log-sum-exp of the scores, float32 [B, N, T]."""
    length = q.shape[1]
    q, k, v = _padded(length, q, k, v)
    rule, extra = _private("_dot_product_attention_fwd_rule")
    static = (*_static(scale, window), *extra["score_mod"], _cudnn_version(), True)
    (out, lse), _ = rule(*_operands(q, k, v), *extra["score_mod_args"], *static)
    return out[:, :length], lse[:, :, :length]


def backward(q, k, v, out, lse, dout, *, window: int | None, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients with respect to q, k and v.

    A padded query is 0, so its scores are 0: with lse 0 and dout 0 it adds nothing to any gradient.
    """
    length = q.shape[1]
    q, k, v, out, dout = _padded(length, q, k, v, out, dout)
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, q.shape[1] - length)))
    rule, extra = _private("_dot_product_attention_bwd_rule")
    residuals = (*_operands(q, k, v), *extra["score_mod_args"], lse, out)
    dq, dk, dv, *_ = rule(*_static(scale, window), *extra["score_mod"], _cudnn_version(), False, residuals, dout)
    return dq[:, :length], dk[:, :length], dv[:, :length]


def _padded(length: int, *arrays: jax.Array) -> list[jax.Array]:
    return [jnp.pad(x, ((0, 0), (0, -length % _MULTIPLE), (0, 0), (0, 0))) for x in arrays]


def _operands(q, k, v) -> tuple[jax.Array, ...]:
    """q, k, v; then bias, lengths, offsets and page tables, all unused."""
    return (q, k, v, *(jnp.zeros(0, q.dtype),) * 7)


def _static(scale: float, window: int | None) -> tuple:
    """Scale, dropout's seed and rate, (has bias, wants its gradient), mask, layout and window."""
    from jax._src.cudnn.fused_attention_stablehlo import AttentionLayout, MaskType

    return scale, 42, 0.0, (False, False), MaskType.CAUSAL, AttentionLayout.BTNH.value, window


def _private(name: str) -> tuple[Callable, dict[str, tuple]]:
    """A rule of JAX and the arguments that JAX 0.12 added to it, empty on 0.11."""
    from jax._src.cudnn import fused_attention_stablehlo

    rule = getattr(fused_attention_stablehlo, name)
    new = "score_mod" in inspect.signature(rule).parameters
    return rule, {"score_mod": (None,) if new else (), "score_mod_args": ((),) if new else ()}


def _cudnn_version() -> int:
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo.check_cudnn_version()
