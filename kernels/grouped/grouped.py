"""The linear layer of LoRA in a mixture of experts: every row is multiplied by the weight and adapter of its expert."""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lora_jax.kernels.dispatch import on_gpu, resolve
from lora_jax.kernels.grouped.xla import FEW_ROWS, Joined
from lora_jax.kernels.nf4.format import NF4Layer, NF4Weight
from lora_jax.kernels.nf4.matmul import dropout
from lora_jax.kernels.nf4.shared_input import Projection

__all__ = [
    "block_diagonal",
    "grouped_lora_matmul",
    "grouped_lora_matmuls",
    "kernel_rank",
    "module",
    "padded",
    "why_not_joined",
]

MOST_RANK = 64  # of adapters together, that the Mosaic kernel's last step takes


def grouped_lora_matmul(
    x: jax.Array,
    w: jax.Array | NF4Weight | NF4Layer,
    group_sizes: jax.Array,
    a: jax.Array | None = None,
    b: jax.Array | None = None,
    scale: float = 1.0,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """y[rows of e] = x[rows of e] W[e]^T + scale (dropout(x[rows of e]) A[e]) B[e].

    The weights are frozen: their gradient is zero by definition. Backward keeps x, W as it is stored, A and B.

    Args:
      x: activations [M, K], bfloat16 or float32, sorted by expert: the first group_sizes[0] rows belong to expert 0,
        and so on. Matmuls run in this dtype and accumulate in float32.
      w: base weights [E, N, K], an array or a stacked NF4Weight, alone or as a layer of a stack [L, E, N, K], which is
        read where it lies.
      group_sizes: int32 [E], rows of each expert; zeros are fine. Rows past the sum belong to no expert: their output
        and input gradient are zero.
      a, b: LoRA factors [E, K, R] and [E, R, N], usually float32; both None for no adapter.
      scale: factor of the adapter's product.
      dropout_rate: probability in [0, 1) that an input element of the adapters is zeroed, every row by itself; needs
        `dropout_key`.
      dropout_key: JAX random key; the mask is drawn again in backward instead of being kept.
      implementation: "xla", "triton", "mosaic", or None to choose by device and arguments.

    Returns:
      [M, N] in the dtype of x.

    Raises:
      ValueError: shapes do not fit, only one of a and b is given, or dropout is asked for without a key.
      NotImplementedError: the named implementation cannot do this call.
    """
    e, n, k = w.shape
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"grouped_lora_matmul: x {x.shape} does not fit weights [E, N, K] = {w.shape}: want [M, {k}]")
    if group_sizes.shape != (e,):
        raise ValueError(f"grouped_lora_matmul: group_sizes has shape {group_sizes.shape}, {e} experts want ({e},)")
    if (a is None) != (b is None):
        raise ValueError("grouped_lora_matmul: give both LoRA factors a and b, or neither")
    if a is not None and b is not None and (a.shape[:2] != (e, k) or b.shape != (e, a.shape[2], n)):
        raise ValueError(
            f"grouped_lora_matmul: LoRA factors {a.shape} and {b.shape} do not fit "
            f"[E, K, R] = [{e}, {k}, R], [E, R, N] = [{e}, R, {n}]"
        )
    if dropout_rate and dropout_key is None:
        raise ValueError(f"grouped_lora_matmul: dropout_rate={dropout_rate} needs a dropout_key")
    name = _choose(implementation, x, w)
    if x.shape[0] == 0:
        return jnp.zeros((0, n), x.dtype)
    if a is None or b is None:
        return _base(x, w, group_sizes, name)
    a, b = (a, b) if name == "xla" else padded(a, b)
    return _lora(x, w, group_sizes, a, b, dropout_key if dropout_rate else None, float(scale), dropout_rate, name)


def grouped_lora_matmuls(
    x: jax.Array, projections: Sequence[Projection], group_sizes: jax.Array, *, implementation: str | None = None
) -> list[jax.Array]:
    """`grouped_lora_matmul` of several layers that multiply the same rows.

    Args:
      x: activations [M, K], sorted by expert.
      projections: the layers, with w [E, N_i, K], a [E, K, R_i] and b [E, R_i, N_i] or None, without bias and gain.
      group_sizes: int32 [E], rows of each expert.
      implementation: as for `grouped_lora_matmul`.

    Returns:
      [M, N_i] for each, in the dtype of x.

    Raises:
      ValueError, NotImplementedError: as `grouped_lora_matmul`.
    """
    joined: Any = Joined(tuple(p.w for p in projections))  # pyright: ignore[reportArgumentType]
    if why_not_joined(x, projections) is not None or _choose(implementation, x, joined) == "xla":
        return [
            grouped_lora_matmul(
                x,
                p.w,
                group_sizes,
                p.a,
                p.b,
                p.scale,
                dropout_rate=p.dropout_rate,
                dropout_key=p.dropout_key,
                implementation=implementation,
            )
            for p in projections
        ]
    factors = [padded(p.a, p.b) for p in projections if p.a is not None and p.b is not None]
    if not factors:
        y = grouped_lora_matmul(x, joined, group_sizes, implementation=implementation)
    else:
        a = jnp.concatenate([a for a, _ in factors], axis=2)
        b = [p.scale * b for p, (_, b) in zip(projections, factors, strict=True)]
        y = grouped_lora_matmul(x, joined, group_sizes, a, block_diagonal(b), implementation=implementation)
    ends = np.cumsum([p.w.shape[1] for p in projections])
    return jnp.split(y, ends[:-1], axis=1)


def why_not_joined(x: jax.Array, projections: Sequence[Projection]) -> str | None:
    """Why one matmul with all weights cannot be, or would not be faster than one for each; None if it is.

    Rows and their gradients are read and written once instead of once for each. Few rows are multiplied by weights that
    are decoded on the way; weights in 16 bits would have to be copied; every adapter has dropout of its own.
    """
    for p in projections:
        if not isinstance(p.w, NF4Weight | NF4Layer):
            return "the weights are not all NF4"
        if p.dropout_rate:
            return "an adapter has dropout"
    experts, adapters = projections[0].w.shape[0], [p.a for p in projections if p.a is not None]
    if 0 < len(adapters) < len(projections):
        return "some of the layers have no adapter"
    if x.shape[0] <= FEW_ROWS * experts:
        return f"{x.shape[0]} rows are few for {experts} experts"
    if (rank := sum(kernel_rank(a.shape[2]) for a in adapters)) > MOST_RANK:
        return f"the ranks are {rank} together, at most {MOST_RANK} are possible"
    return None


def block_diagonal(parts: Sequence[jax.Array]) -> jax.Array:
    """[E, R_i, N_i] each -> [E, R_1 + R_2 ..., N_1 + N_2 ...], zero outside of the blocks."""
    total, rows, before = sum(part.shape[2] for part in parts), [], 0
    for part in parts:
        rows.append(jnp.pad(part, ((0, 0), (0, 0), (before, total - before - part.shape[2]))))
        before += part.shape[2]
    return jnp.concatenate(rows, axis=1)


def padded(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """LoRA factors with zeros, which change nothing, up to a rank that the kernels work with."""
    pad = (0, kernel_rank(a.shape[2]) - a.shape[2])
    return jnp.pad(a, ((0, 0), (0, 0), pad)), jnp.pad(b, ((0, 0), pad, (0, 0)))


def kernel_rank(rank: int) -> int:
    """The rank that the kernels work with."""
    from lora_jax.kernels.nf4.triton_adapter import padded_rank

    return padded_rank(rank)[0]


def _choose(implementation: str | None, x, w) -> str:
    supported = {name: functools.partial(_why_not, name, x, w) for name in ("xla", "triton", "mosaic")}
    return resolve("grouped_lora_matmul", implementation, supported, on_gpu("mosaic", "triton"))


def _why_not(name: str, x, w) -> str | None:
    return _module(name).why_not(x, w)


def module(x: jax.Array, *weights: Any) -> ModuleType:
    """The file whose matmuls serve x and all weights."""
    chosen = {_choose(None, x, w) for w in weights}
    return _module(next(name for name in ("xla", "triton", "mosaic") if name in chosen))


def _module(name: str) -> ModuleType:
    """A file of this folder, imported late: Pallas takes a second to import and is not needed everywhere."""
    return importlib.import_module(f"lora_jax.kernels.grouped.{name}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _base(x, w, group_sizes, name):
    return _module(name).grouped_matmul(x, w, group_sizes, contract=1)


def _base_fwd(x, w, group_sizes, name):
    return _base(x, w, group_sizes, name), (w, group_sizes)


def _base_bwd(name, residuals, dy):
    w, group_sizes = residuals
    return _module(name).grouped_matmul(dy, w, group_sizes, contract=0), None, None


_base.defvjp(_base_fwd, _base_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _lora(x, w, group_sizes, a, b, key, scale, rate, name):
    return _forward(x, w, group_sizes, a, b, key, scale, rate, name)[0]


def _forward(x, w, group_sizes, a, b, key, scale, rate, name):
    """(y [M, N], dropout(x) A [M, R])."""
    op = _module(name)
    thin = op.grouped_matmul(dropout(x, key, rate), a.astype(x.dtype), group_sizes, contract=0)
    thin = checkpoint_name(thin, "thin")  # small, and saves passes over x in backward
    return op.grouped_matmul(x, w, group_sizes, contract=1, thin=thin, b=(scale * b).astype(x.dtype)), thin


def _lora_fwd(x, w, group_sizes, a, b, key, scale, rate, name):
    y, thin = _forward(x, w, group_sizes, a, b, key, scale, rate, name)
    return y, (x, w, group_sizes, a, b, key, thin)


def _lora_bwd(scale, rate, name, residuals, dy):
    x, w, group_sizes, a, b, key, thin = residuals
    op, a_t = _module(name), jnp.swapaxes(a.astype(x.dtype), 1, 2)
    dthin = op.grouped_matmul(dy, (scale * b).astype(x.dtype), group_sizes, contract=1)  # [M, R]
    da = op.grouped_outer(dropout(x, key, rate), dthin, group_sizes)
    db = scale * jnp.swapaxes(op.grouped_outer(dy, thin, group_sizes), 1, 2)
    if key is None:
        dx = op.grouped_matmul(dy, w, group_sizes, contract=0, thin=dthin, b=a_t)
    else:  # the mask is of the adapter's share alone
        dx = op.grouped_matmul(dy, w, group_sizes, contract=0)
        dx += dropout(op.grouped_matmul(dthin, a_t, group_sizes, contract=0), key, rate)
    return dx, None, None, da.astype(a.dtype), db.astype(b.dtype), None


_lora.defvjp(_lora_fwd, _lora_bwd)
