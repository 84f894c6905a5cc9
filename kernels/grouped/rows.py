"""The rows of token-expert pairs, and their sums by token: gathers, forward and backward.

`order` has the pairs, numbered token by token, in the order of their experts; `place` is where each pair is among
them, its inverse. Gathers take as long as what they write; adding rows up where they belong would take longer, and
come out otherwise every time.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lora_jax.kernels import dispatch

__all__ = ["rows_of_pairs", "sums_of_pairs", "take_rows"]

_ROWS, _COLS = 16, 512  # of a program


@jax.custom_vjp
def rows_of_pairs(x: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """The token of every pair: x [M, D], order and place int32 [M k] -> [M k, D]."""
    return take_rows(x, order // (order.size // x.shape[0]))


def _rows_of_pairs_fwd(x, order, place):
    return rows_of_pairs(x, order, place), (order, place, x.shape[0])


def _rows_of_pairs_bwd(residuals, dy):
    order, place, tokens = residuals
    return sums_of_pairs(dy, order, place, tokens).astype(dy.dtype), None, None


rows_of_pairs.defvjp(_rows_of_pairs_fwd, _rows_of_pairs_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def sums_of_pairs(y: jax.Array, order: jax.Array, place: jax.Array, tokens: int) -> jax.Array:
    """The sum of every token's pairs, the transpose of `rows_of_pairs`: y [M k, D] -> float32 [M, D]."""
    return y.at[place].get(mode="clip").reshape(tokens, -1, y.shape[-1]).sum(axis=1, dtype=jnp.float32)


def _sums_of_pairs_fwd(y, order, place, tokens):
    return sums_of_pairs(y, order, place, tokens), (order, place, y[:0])


def _sums_of_pairs_bwd(tokens, residuals, dy):
    order, place, like = residuals
    del tokens
    return rows_of_pairs(dy.astype(like.dtype), order, place), None, None


sums_of_pairs.defvjp(_sums_of_pairs_fwd, _sums_of_pairs_bwd)


def take_rows(x: jax.Array, index: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """x[index]: x [M, D], index int32 [N], from 0 to M - 1 -> [N, D].

    Args:
      implementation: "xla", "triton", or None to choose.

    Raises:
      NotImplementedError: the named implementation cannot do this call.
    """
    supported = {"xla": None, "triton": None if x.size and index.size else "there are no rows"}
    if dispatch.resolve("take_rows", implementation, supported, dispatch.on_gpu("triton")) == "xla":
        return x.at[index].get(mode="clip")
    n, d = index.shape[0], x.shape[1]
    return pl.pallas_call(
        _take_rows,
        # All rows of some columns, which stay in the L2 cache, then others.
        grid=(pl.cdiv(n, _ROWS), pl.cdiv(d, _COLS)),
        out_shape=jax.ShapeDtypeStruct((n, d), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=dispatch.interpret(),
        name="take_rows",
    )(index, x)


def _take_rows(index_ref, x_ref, out_ref):
    (n, d), dtype = out_ref.shape, out_ref.dtype
    rows = pl.program_id(0) * _ROWS + jnp.arange(_ROWS, dtype=jnp.int32)
    cols = pl.program_id(1) * _COLS + jnp.arange(_COLS, dtype=jnp.int32)
    inside = jnp.broadcast_to((rows < n)[:, None] & (cols < d)[None], (_ROWS, _COLS))
    taken = plgpu.load(index_ref.at[rows], mask=rows < n, other=0)
    at = jnp.broadcast_to(cols[None], inside.shape)
    value = plgpu.load(x_ref.at[jnp.broadcast_to(taken[:, None], inside.shape), at], mask=inside, other=0)
    plgpu.store(out_ref.at[jnp.broadcast_to(rows[:, None], inside.shape), at], value.astype(dtype), mask=inside)
