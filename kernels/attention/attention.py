"""`flash_attention`: the one signature of attention, the choice of its implementation, and its backward rule."""

import dataclasses
import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.kernels.attention import cudnn, xla
from lora_jax.kernels.dispatch import on_gpu, resolve
from lora_jax.kernels.kept import named
from lora_jax.kernels.parallel import index, size, to_heads, to_sequence

__all__ = ["flash_attention"]

IMPLEMENTATIONS = ("xla", "cudnn", "triton", "mosaic")
MANY_QUERIES = 16384
_FEW_QUERIES = 16  # below this the kernels, which share out blocks of queries, leave most of a GPU idle


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
    sinks: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal softmax attention, softmax(scale q k^T + mask) v, in float32 arithmetic.

    The query at index t of its row stands at position t + query_offset of the keys and sees key j iff

        max(segment_start[t], t + query_offset - window + 1) <= j <= t + query_offset.

    The output carries the name "attention" for `jax.checkpoint` policies, and the log-sum-exp of the scores, which
    the kernels keep for backward, "attention_lse": where both are saved, backward does not run the forward kernel.

    Args:
      q: queries [B, T, N, H].
      k: keys [B, S, K, H]; query head n reads key head n // (N / K).
      v: values [B, S, K, Hv]; Hv may differ from H.
      segment_start: int32 [B, T], the first key each query may see (start of its document in a packed row, or the
        number of padding tokens in a left-padded row); None for 0.
      query_offset: position of the first query among the keys; above 0 with a key/value cache.
      window: number of keys a query sees, itself included; None for all.
      softcap: c in c tanh(scores / c), applied before the mask (Gemma 2); None for none.
      scale: factor of the scores; None for 1 / sqrt(H).
      sinks: [N], for each query head the score of one more key whose value is zero (gpt-oss); it is neither scaled
        nor capped. None for none.
      implementation: "xla", "cudnn" (its gradients differ from run to run in the last bits), "triton", "mosaic"
        (Hopper), or None to choose by device and arguments.

    Returns:
      [B, T, N, Hv] in the dtype of q.

    Raises:
      ValueError: shapes do not fit or window is below 1.
      NotImplementedError: the named implementation cannot do this call.
    """
    _check_shapes(q, k, v, segment_start, sinks)
    if window is not None and window < 1:
        raise ValueError(f"flash_attention: window counts the keys a query sees and must be at least 1, got {window}")
    if size("context") > 1:
        options: Any = dict(window=window, softcap=softcap, scale=scale, implementation=implementation)
        return _over_context(q, k, v, segment_start, sinks, options)
    return _attention(q, k, v, segment_start, query_offset, window, softcap, scale, sinks, implementation)


def _over_context(q, k, v, segment_start, sinks, options) -> jax.Array:
    """Attention of rows whose tokens are shared out: each device takes some heads of all tokens, and so equal work."""
    if segment_start is not None:
        segment_start = jax.lax.all_gather(segment_start, "context", axis=1, tiled=True)
    if sinks is not None:
        heads = sinks.shape[0] // size("context")
        sinks = jax.lax.dynamic_slice_in_dim(sinks, index("context") * heads, heads)
    q, k, v = to_heads(q), to_heads(k), to_heads(v)
    return to_sequence(_attention(q, k, v, segment_start, 0, sinks=sinks, **options))


def _attention(q, k, v, segment_start, query_offset, window, softcap, scale, sinks, implementation) -> jax.Array:
    """`flash_attention` of arguments that fit, whose keys are all here."""
    factor: float = q.shape[-1] ** -0.5 if scale is None else float(scale)
    features = dict(segment_start=segment_start, query_offset=query_offset, window=window, softcap=softcap, sinks=sinks)
    plain = segment_start is None and window is None and softcap is None and sinks is None

    def why_not(name: str):
        return None if name == "xla" else lambda: _module(name).why_not(q, k, v, **features)

    supported = {name: why_not(name) for name in IMPLEMENTATIONS}
    chosen = resolve("flash_attention", implementation, supported, _preference(plain, q.shape[1]))
    if chosen == "xla":
        if segment_start is None:
            segment_start = jnp.zeros(q.shape[:2], jnp.int32)
        out = xla.attention(
            q, k, v, segment_start, query_offset, window=window, softcap=softcap, scale=factor, sinks=sinks
        )
        return named(out, "attention")
    static = query_offset if isinstance(query_offset, int) else None
    options = _Options(chosen, window, softcap, factor, static)
    return _fused(q, k, v, segment_start, query_offset if static is None else None, sinks, options)


def _check_shapes(q, k, v, segment_start, sinks) -> None:
    (batch, length, heads, dim), (_, keys, kv_heads, _) = q.shape, k.shape
    if k.shape != (batch, keys, kv_heads, dim) or v.shape[:3] != k.shape[:3] or v.ndim != 4 or heads % kv_heads:
        raise ValueError(
            f"flash_attention: q {q.shape} wants k of shape [{batch}, S, K, {dim}] and v [{batch}, S, K, Hv] with K a "
            f"divisor of {heads}; got k {k.shape}, v {v.shape}"
        )
    if segment_start is not None and segment_start.shape != (batch, length):
        raise ValueError(f"flash_attention: segment_start must be [{batch}, {length}], got {segment_start.shape}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"flash_attention: sinks must be [{heads}], one for each query head, got {sinks.shape}")


def _preference(plain: bool, queries: int) -> tuple[str, ...]:
    """Implementations in the order to try them. Without a GPU the others run only when they are named.

    H100, 32 / 8 heads of 128, microseconds of kernels. Forward and backward: 1 x 8192 Mosaic 3500, cuDNN 3525, Triton
    4463; 2 x 2048 Mosaic 530, cuDNN 632; 1 x 32768 cuDNN 54692, Mosaic 60900; the same in a window of 4096 cuDNN 13911,
    Mosaic 14599. Forward over a cache of 4096 keys: one query XLA 16, Triton 109 (in
    8 rows 159, 192); 512 queries XLA 498, Triton 80. All but cuDNN give the same bits every time, so it is for the
    rows where it is faster by far: of a whole step with 1 x 32768 tokens, 4565 and 4406 ms.
    """
    if queries < _FEW_QUERIES:
        return ("xla",)
    if not plain:
        return on_gpu("mosaic", "triton", "cudnn")
    return on_gpu("cudnn", "mosaic", "triton") if queries >= MANY_QUERIES else on_gpu("mosaic", "cudnn", "triton")


def _module(name: str) -> ModuleType:
    """A file of this folder, imported late: Pallas takes a second to import and is not needed everywhere."""
    return importlib.import_module(f"lora_jax.kernels.attention.{name}")


@dataclasses.dataclass(frozen=True)
class _Options:
    """The static arguments of `_fused`."""

    implementation: str
    window: int | None
    softcap: float | None
    scale: float
    query_offset: int | None  # None if it is an array


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _fused(q, k, v, segment_start, query_offset, sinks, options: _Options):
    return _forward(q, k, v, segment_start, query_offset, sinks, options)[0]


def _fused_fwd(q, k, v, segment_start, query_offset, sinks, options: _Options):
    out, lse = _forward(q, k, v, segment_start, query_offset, sinks, options)
    # Without the barrier XLA of jax 0.11 runs the kernel twice where a loop over layers keeps `out`: once for what
    # follows, and once more to write `out` where it is kept without a copy.
    out = jax.lax.optimization_barrier(out)
    out, lse = named(out, "attention"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segment_start, query_offset, sinks, out, lse)


def _fused_bwd(options: _Options, residuals, dout):
    q, k, v, segment_start, query_offset, sinks, out, lse = residuals
    grads = _backward(q, k, v, out, lse, dout, segment_start, query_offset, sinks, options)
    dsinks = None if sinks is None else grads[3].astype(sinks.dtype)
    return *grads[:3], None, None, dsinks


_fused.defvjp(_fused_fwd, _fused_bwd)


def _forward(q, k, v, segment_start, query_offset, sinks, options: _Options) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, Hv], log-sum-exp of the scores float32 [B, N, T])."""
    common: dict[str, Any] = dict(window=options.window, scale=options.scale)
    if options.implementation == "cudnn":
        return cudnn.forward(q, k, v, **common)
    common["softcap"] = options.softcap
    if options.implementation == "mosaic":
        return _module("mosaic").forward(q, k, v, segment_start, **common)
    offset = options.query_offset if query_offset is None else query_offset
    return _module("triton").forward(q, k, v, segment_start, offset, sinks=sinks, **common)


def _backward(q, k, v, out, lse, dout, segment_start, query_offset, sinks, options: _Options) -> tuple:
    """(dq, dk, dv), with sinks also dsinks."""
    common: dict[str, Any] = dict(window=options.window, scale=options.scale)
    if options.implementation == "cudnn":
        return cudnn.backward(q, k, v, out, lse, dout, **common)
    common["softcap"] = options.softcap
    if options.implementation == "mosaic":
        return _module("mosaic").backward(q, k, v, out, lse, dout, segment_start, **common)
    offset = options.query_offset if query_offset is None else query_offset
    return _module("triton_bwd").backward(
        q, k, v, out, lse, dout, segment_start, sinks=sinks, query_offset=offset, **common
    )
