"""Pallas-Triton kernels that put the thin products of an adapter into one pass over the activations.

An exact LoRA product costs no matmul of its own if it rides in the base matmul: [x, x A, 0] times [W, B^T, 0]^T. Then
x A is a by-product of writing the extended activations, and in backward dy B^T is a by-product of dy [W, B^T, 0].

Bytes for bfloat16 x [M, K]: `extend` reads and writes M K (67 MB for 4096 x 4096: 23 us at 2.95 TB/s), so does
`add_product`. Both do 2 M K R operations on tensor cores, which is nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lora_jax.kernels import dispatch

__all__ = ["add_product", "extend", "padded_rank"]


def padded_rank(rank: int) -> tuple[int, int]:
    """(power of two of at least 16 that holds the rank, columns E of an extended operand: 64 or more)."""
    padded = max(16, 1 << (rank - 1).bit_length())
    return padded, max(64, padded)


def extend(
    x: jax.Array, a: jax.Array, *, block: int = 16, step: int = 256, warps: int = 4, stages: int = 3
) -> jax.Array:
    """Returns [x, x a, 0], bfloat16 [M, K + E], for x [M, K] and a [K, R], R a power of two from 16 on."""
    m, k = x.shape
    extra = padded_rank(a.shape[1])[1]
    step = _divisor(k, step)
    return pl.pallas_call(
        functools.partial(_extend_kernel, block=block, step=step, extra=extra),
        grid=(pl.cdiv(m, block),),
        out_shape=jax.ShapeDtypeStruct((m, k + extra), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=dispatch.interpret(),
        name="lora_extend",
    )(x, a)


def _extend_kernel(x_ref, a_ref, out_ref, *, block, step, extra):
    (m, k), r = x_ref.shape, a_ref.shape[1]
    rows = pl.ds(pl.program_id(0) * block, block)
    mask = row_mask(m, block, pl.cdiv(m, block), pl.program_id(0) * block)

    def body(i, total):
        cols = pl.ds(i * step, step)
        x = load(x_ref, (rows, cols), mask)
        store(out_ref, (rows, cols), x, mask)
        return total + plgpu.dot(x, a_ref[cols, :])

    total = jax.lax.fori_loop(0, k // step, body, jnp.zeros((block, r), jnp.float32))
    store_thin(out_ref, rows, k, total, extra, mask)


def store_thin(out_ref, rows, first, thin, extra, mask):
    """Writes a thin product and the zeros that fill it up to `extra` columns."""
    width = thin.shape[1]
    store(out_ref, (rows, pl.ds(first, width)), thin.astype(out_ref.dtype), mask)
    done = width
    while done < extra:
        store(out_ref, (rows, pl.ds(first + done, done)), jnp.zeros((thin.shape[0], done), out_ref.dtype), mask)
        done *= 2


def add_product(y: jax.Array, b: jax.Array, *more: jax.Array, block=64, cols=128, warps=4) -> jax.Array:
    """Returns y[:, :N] + y[:, N : N + R] b for extended y [M, N + E] and b [R, N]: bfloat16 [M, N].

    With `more` arrays like y, y stands for the sum of all; sums are float32.
    """
    (m, _), (_, n) = y.shape, b.shape
    cols = _divisor(n, cols)
    return pl.pallas_call(
        functools.partial(_add_kernel, block=block, cols=cols),
        grid=(pl.cdiv(m, block), n // cols),
        out_shape=jax.ShapeDtypeStruct((m, n), y.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=dispatch.interpret(),
        name="lora_add_product",
    )(b, y, *more)


def _add_kernel(b_ref, *refs, block, cols):
    y_refs, out_ref = refs[:-1], refs[-1]
    m, (r, n) = out_ref.shape[0], b_ref.shape
    rows, part = pl.ds(pl.program_id(0) * block, block), pl.ds(pl.program_id(1) * cols, cols)
    mask = row_mask(m, block, pl.cdiv(m, block), pl.program_id(0) * block)
    y = sum(load(ref, (rows, part), mask).astype(jnp.float32) for ref in y_refs)
    thin = sum(load(ref, (rows, pl.ds(n, r)), mask).astype(jnp.float32) for ref in y_refs)
    y += plgpu.dot(thin.astype(out_ref.dtype), b_ref[:, part])
    store(out_ref, (rows, part), y.astype(out_ref.dtype), mask)


def row_mask(m: int, block: int, blocks: int, first) -> jax.Array | None:
    """Which of the rows first to first + block exist, [block, 1]; None if all blocks of the grid are whole."""
    if m == block * blocks:
        return None
    return (first + jnp.arange(block, dtype=jnp.int32) < m)[:, None]


def load(ref, index, mask):
    """ref[index] with zeros in rows that do not exist."""
    if mask is None:
        return ref[index]
    shape = tuple(i.size for i in index)
    return plgpu.load(ref.at[index], mask=jnp.broadcast_to(mask, shape), other=0)


def store(ref, index, value, mask):
    """ref[index] = value in rows that exist."""
    if mask is None:
        ref[index] = value
    else:
        plgpu.store(ref.at[index], value, mask=jnp.broadcast_to(mask, value.shape))


def _divisor(size: int, at_most: int) -> int:
    """The largest power of two up to `at_most` that divides size."""
    return min(at_most, size & -size)
