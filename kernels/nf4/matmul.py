"""The linear layer of LoRA and QLoRA, y = x W^T + scale (dropout(x) A) B, with a backward pass that never keeps W."""

import functools

import jax
import jax.numpy as jnp

from lora_jax.kernels.dispatch import on_gpu, resolve
from lora_jax.kernels.nf4 import xla
from lora_jax.kernels.nf4.format import NF4Weight

__all__ = ["lora_matmul"]


def lora_matmul(
    x: jax.Array,
    w: jax.Array | NF4Weight,
    a: jax.Array | None = None,
    b: jax.Array | None = None,
    scale: float = 1.0,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies by a frozen weight and adds a low-rank adapter (Hu et al., arXiv 2106.09685, section 4.1).

    The weight is frozen: its gradient is zero by definition. Backward keeps x, W as it is stored, A and B; the
    dequantised weight lives for one matmul.

    Args:
      x: activations [..., K], bfloat16 or float32; matmuls run in this dtype and accumulate in float32.
      w: base weight [N, K], an array or an NF4Weight.
      a, b: LoRA factors [K, R] and [R, N], usually float32; both None for no adapter.
      scale: factor of the adapter's product, alpha / R in the paper.
      dropout_rate: probability in [0, 1) that an input element of the adapter is zeroed; needs `dropout_key`.
      dropout_key: JAX random key; the mask is drawn again in backward instead of being kept.
      implementation: "triton" (decodes an NF4 weight at the speed of memory and adds the adapter inside one cuBLAS
        matmul), "xla", or None to choose.

    Returns:
      [..., N] in the dtype of x.

    Raises:
      ValueError: shapes do not fit, only one of a and b is given, or dropout is asked for without a key.
      NotImplementedError: the named implementation cannot do this call.
    """
    n, k = w.shape
    if x.shape[-1] != k:
        raise ValueError(f"lora_matmul: x has {x.shape[-1]} features, the weight [N, K] = [{n}, {k}] wants {k}")
    if (a is None) != (b is None):
        raise ValueError("lora_matmul: give both LoRA factors a and b, or neither")
    if a is not None and b is not None and (a.shape[0] != k or b.shape[1] != n or a.shape[1] != b.shape[0]):
        raise ValueError(f"lora_matmul: LoRA factors {a.shape} and {b.shape} do not fit [K, R] = [{k}, R], [R, {n}]")
    if dropout_rate and dropout_key is None:
        raise ValueError(f"lora_matmul: dropout_rate={dropout_rate} needs a dropout_key")
    rows = x.reshape(-1, k)
    chosen = _choose(rows, w, a, implementation)
    if a is None or b is None:
        y = _base(rows, w, chosen)
    else:
        y = _lora(rows, w, a, b, dropout_key if dropout_rate else None, float(scale), float(dropout_rate), chosen)
    return y.reshape(*x.shape[:-1], n)  # pyright: ignore[reportAttributeAccessIssue]


def _choose(x, w, a, implementation):
    """The implementation for x [M, K] and a weight; only the chosen kernels are imported."""
    supported = {"xla": None, "triton": lambda: _triton().why_not(x, w, a)}
    return resolve("lora_matmul", implementation, supported, on_gpu("triton"))


def _triton():
    from lora_jax.kernels.nf4 import triton_lora

    return triton_lora


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _base(x, w, implementation):
    return _matmuls(implementation).base_matmul(x, w).astype(x.dtype)


def _base_fwd(x, w, implementation):
    return _base(x, w, implementation), w


def _base_bwd(implementation, w, dy):
    return _matmuls(implementation).base_matmul_transposed(dy, w).astype(dy.dtype), None


_base.defvjp(_base_fwd, _base_bwd)


def _matmuls(implementation):
    return _triton() if implementation == "triton" else xla


def _forward(x, w, a, b, key, scale, rate, implementation):
    """(y [M, N], dropout(x) A [M, R], or None if it has to be computed again)."""
    a, b = a.astype(x.dtype), (scale * b).astype(x.dtype)
    if implementation == "triton" and key is None:
        return _triton().forward(x, w, a, b)
    thin = _dot(_dropout(x, key, rate), a).astype(x.dtype)
    return (_matmuls(implementation).base_matmul(x, w) + _dot(thin, b)).astype(x.dtype), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _lora(x, w, a, b, key, scale, rate, implementation):
    return _forward(x, w, a, b, key, scale, rate, implementation)[0]


def _lora_fwd(x, w, a, b, key, scale, rate, implementation):
    y, thin = _forward(x, w, a, b, key, scale, rate, implementation)
    return y, (x, w, a, b, key, thin)


def _lora_bwd(scale, rate, implementation, residuals, dy):
    x, w, a, b, key, thin = residuals
    a16, b16 = a.astype(x.dtype), (scale * b).astype(x.dtype)
    dropped = _dropout(x, key, rate)
    if implementation == "triton" and key is None:
        dx, dthin = _triton().input_gradient(dy, w, a16, b16)
    else:
        dthin = _dot(dy, b16.T).astype(x.dtype)  # [M, R]
        dx_adapter = _dropout(_dot(dthin, a16.T), key, rate)
        dx = (_matmuls(implementation).base_matmul_transposed(dy, w) + dx_adapter).astype(x.dtype)
    if thin is None:
        thin = _dot(dropped, a16).astype(x.dtype)  # [M, R]
    da = _dot(dropped.T, dthin).astype(a.dtype)
    db = (scale * _dot(thin.T, dy)).astype(b.dtype)
    return dx, None, da, db, None


_lora.defvjp(_lora_fwd, _lora_bwd)


def _dot(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _dropout(x, key, rate):
    """Zeroes elements with probability `rate` and scales the others by 1 / (1 - rate); its own transpose."""
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
