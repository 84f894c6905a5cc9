"""The linear layer of LoRA and QLoRA, y = x W^T + scale (dropout(x) A) B, with a backward pass that never keeps W."""

import functools
import importlib
import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.kernels.dispatch import on_gpu, resolve, tuning, why_not_hopper
from lora_jax.kernels.nf4 import xla
from lora_jax.kernels.nf4.format import NF4Layer, NF4Weight, cut

__all__ = ["choose", "dropout", "lora_matmul"]


def lora_matmul(
    x: jax.Array,
    w: jax.Array | NF4Weight | NF4Layer,
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
      w: base weight [N, K], an array or an NF4Weight, alone or as a layer of a stack.
      a, b: LoRA factors [K, R] and [R, N], usually float32; both None for no adapter.
      scale: factor of the adapter's product, alpha / R in the paper.
      dropout_rate: probability in [0, 1) that an input element of the adapter is zeroed; needs `dropout_key`.
      dropout_key: JAX random key; the mask is drawn again in backward instead of being kept.
      implementation: "triton" (decodes an NF4 weight at the speed of memory and adds the adapter inside one cuBLAS
        matmul), "triton_in_loop" (decodes it inside the matmul: for few rows), "mosaic" (the same with Hopper's
        instructions; it reorders the weight on every call), "xla", or None for the one that was fastest when this GPU
        was measured (`lora_jax.tools.tune_kernels`).

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
    chosen = choose(rows, w, a, implementation)
    w = cut(w) if "xla" in chosen[:2] else w  # the kernels read a layer where it lies, or cut it out themselves
    if a is None or b is None:
        y = _base(rows, w, chosen)
    else:
        y = _lora(rows, w, a, b, dropout_key if dropout_rate else None, float(scale), float(dropout_rate), chosen)
    return y.reshape(*x.shape[:-1], n)  # pyright: ignore[reportAttributeAccessIssue]


class Choice(NamedTuple):
    """Who computes what; hashable, so that custom_vjp can carry it."""

    forward: str
    dx: str
    tiles: Hashable = None  # of "triton_in_loop" in forward; None for its own choice


def choose(x, w, a, implementation) -> Choice:
    """The implementations for x [M, K] and a weight; only kernels that come into question are imported."""
    tuned = _tuned(x.shape[0], *w.shape)
    names = []
    for direction, first in (("forward", tuned.forward), ("dx", tuned.dx)):
        supported: dict[str, Any] = {"xla": None}
        for name in ("triton", "triton_in_loop", "mosaic"):
            supported[name] = functools.partial(_why_not, name, direction, x, w, a)
        names.append(resolve("lora_matmul", implementation, supported, on_gpu(first, "triton")))
    return Choice(*names, tuned.tiles if names[0] == "triton_in_loop" else None)


# A measurement says something of shapes up to 15 times smaller or larger.
_FAR = math.log(15)


def _tuned(m, n, k) -> Choice:
    """What was measured to be fastest on this GPU for the nearest shape; where nothing was measured, the prologue."""
    shapes = tuning("lora_matmul")
    if not shapes:
        return Choice("triton", "triton")
    far, nearest = min(
        ((abs(math.log(one["n"] / n)) + abs(math.log(one["k"] / k)), one) for one in shapes), key=lambda pair: pair[0]
    )
    if far > _FAR:
        return Choice("triton", "triton")
    row = next(row for row in nearest["rows"] if row["m"] is None or m <= row["m"])
    return Choice(row["forward"], row["dx"], tuple(sorted(row.get("tiles", {}).items())) or None)


def _why_not(name, direction, x, w, a) -> str | None:
    if name == "triton":
        from lora_jax.kernels.nf4 import triton

        return triton.why_not(x, w, a)
    if name == "triton_in_loop":
        from lora_jax.kernels.nf4 import triton_matmul

        return triton_matmul.why_not(x, w, a)
    if (reason := why_not_hopper()) is not None:
        return reason
    from lora_jax.kernels.nf4 import mosaic

    return mosaic.why_not(x, w, a, transposed=direction == "dx")


def _module(name) -> Any:
    """The functions `base_matmul`, `base_matmul_transposed`, `forward` and `input_gradient` of an implementation."""
    if name == "xla":
        return xla
    module = {"triton": "triton_lora", "triton_in_loop": "triton_matmul", "mosaic": "mosaic"}[name]
    return importlib.import_module(f"lora_jax.kernels.nf4.{module}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _base(x, w, choice):
    options = {"tiles": choice.tiles} if choice.tiles else {}
    return _module(choice.forward).base_matmul(x, w, **options).astype(x.dtype)


def _base_fwd(x, w, choice):
    return _base(x, w, choice), w


def _base_bwd(choice, w, dy):
    return _module(choice.dx).base_matmul_transposed(dy, w).astype(dy.dtype), None


_base.defvjp(_base_fwd, _base_bwd)


def _forward(x, w, a, b, key, scale, rate, choice):
    """(y [M, N], dropout(x) A [M, R], or None if it has to be computed again)."""
    a, b = a.astype(x.dtype), (scale * b).astype(x.dtype)
    options = {"tiles": choice.tiles} if choice.tiles else {}
    if key is None:
        return _module(choice.forward).forward(x, w, a, b, **options)
    thin = _dot(dropout(x, key, rate), a).astype(x.dtype)
    return (_module(choice.forward).base_matmul(x, w, **options) + _dot(thin, b)).astype(x.dtype), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _lora(x, w, a, b, key, scale, rate, choice):
    return _forward(x, w, a, b, key, scale, rate, choice)[0]


def _lora_fwd(x, w, a, b, key, scale, rate, choice):
    y, thin = _forward(x, w, a, b, key, scale, rate, choice)
    thin = None if thin is None else checkpoint_name(thin, "thin")  # small, and saves a pass over x in backward
    return y, (x, w, a, b, key, thin)


def _lora_bwd(scale, rate, choice, residuals, dy):
    x, w, a, b, key, thin = residuals
    a16, b16 = a.astype(x.dtype), (scale * b).astype(x.dtype)
    dropped = dropout(x, key, rate)
    dx, dthin = _module(choice.dx).input_gradient(dy, w, a16, b16) if key is None else (None, None)
    if dthin is None:
        dthin = _dot(dy, b16.T).astype(x.dtype)  # [M, R]
    if dx is None:
        dx_adapter = dropout(_dot(dthin, a16.T), key, rate)
        dx = (_module(choice.dx).base_matmul_transposed(dy, w) + dx_adapter).astype(x.dtype)
    if thin is None:
        thin = _dot(dropped, a16).astype(x.dtype)  # [M, R]
    da = _dot(dropped.T, dthin).astype(a.dtype)
    db = (scale * _dot(thin.T, dy)).astype(b.dtype)
    return dx, None, da, db, None


_lora.defvjp(_lora_fwd, _lora_bwd)


def _dot(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def dropout(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """Zeroes elements with probability `rate` and scales the others by 1 / (1 - rate); its own transpose."""
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
