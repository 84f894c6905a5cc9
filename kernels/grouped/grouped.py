"""The linear layer of LoRA in a mixture of experts: every row is multiplied by the weight and adapter of its expert."""

import functools
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.kernels.dispatch import on_gpu, resolve
from lora_jax.kernels.nf4.format import NF4Layer, NF4Weight
from lora_jax.kernels.nf4.matmul import dropout

__all__ = ["grouped_lora_matmul"]


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
    pad = 0 if name == "xla" else _kernel_rank(a.shape[2]) - a.shape[2]  # zeros that change nothing
    a, b = jnp.pad(a, ((0, 0), (0, 0), (0, pad))), jnp.pad(b, ((0, 0), (0, pad), (0, 0)))
    return _lora(x, w, group_sizes, a, b, dropout_key if dropout_rate else None, float(scale), dropout_rate, name)


def _kernel_rank(rank: int) -> int:
    """The rank that the kernels work with."""
    from lora_jax.kernels.nf4.triton_adapter import padded_rank

    return padded_rank(rank)[0]


def _choose(implementation: str | None, x, w) -> str:
    supported = {name: functools.partial(_why_not, name, x, w) for name in ("xla", "triton", "mosaic")}
    return resolve("grouped_lora_matmul", implementation, supported, on_gpu("mosaic", "triton"))


def _why_not(name: str, x, w) -> str | None:
    return _module(name).why_not(x, w)


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
    return op.grouped_matmul(x, w, group_sizes, contract=1, thin=thin, b=(scale * b).astype(x.dtype)), thin


def _lora_fwd(x, w, group_sizes, a, b, key, scale, rate, name):
    y, thin = _forward(x, w, group_sizes, a, b, key, scale, rate, name)
    thin = checkpoint_name(thin, "thin")  # small, and saves a pass over x in backward
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
