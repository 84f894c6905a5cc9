"""NF4 + LoRA for a single row (decoding), or up to four, without tensor cores, by Pallas-Triton.

Idea. Bound by the packed bytes, 29 MB or 10 us for 4096 -> 14336 on an H100, if nothing else takes longer. A tensor
core needs its operand in an order that costs more than the multiplication of a single row. Here a weight stays where it
was loaded: a lane shuffle turns its code into a float32 (each lane of a warp holds one of the 16 values), and it is
multiplied by the number of x that belongs there. The two codes of a byte belong to an even and an odd column; x is read
as pairs, so that nothing is moved between threads before one sum at the end. Weights are not rounded to bfloat16: the
result is more exact than the standard computation.

Instructions a weight: a shift, a shuffle, a multiply-add, and half of one for the scale: 3.5, which is 7 us of issue
slots for one row and 58.7 M weights, and 8 us of shuffles (32 lanes a clock and SM). Each further row adds 1.5.
A program sums whole rows of the weight, so there are no partial results in memory. x A comes from a small kernel
before, as one sum for each part of K, which every program adds up; XLA makes three kernels of it.

Compiled for sm_90 (nvdisasm), one row, rank 16: 336 instructions a thread and 147 for each further step, 64 registers:
10.6 us of issue slots for 4096 -> 14336. Measured on an H100: 24.7 us with x A (28.5 with 8 warps), so look-ups and
loads do not overlap as they should; two rows take 41 us and four 88, more than the tensor cores' kernel, which is taken
for them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lora_jax.kernels.dispatch import interpret
from lora_jax.kernels.nf4.format import BLOCK, CODE, NF4Layer, NF4Weight, select, with_one_index
from lora_jax.kernels.nf4.triton import arrays, asm, in_reach, lane_table, load_absmax

__all__ = ["MAX_ROWS", "Gemv", "choose", "gemv"]

MAX_ROWS = 4
_BYTES = BLOCK // 2  # of a block
_PARTS = 16  # of K, in the sum of x A: a power of two


@dataclasses.dataclass(frozen=True)
class Gemv:
    """Tiles of `gemv`, powers of two."""

    rows: int = 16  # of the weight, in a program
    blocks: int = 8  # of 64 weights along K, in one step
    warps: int = 4
    stages: int = 2  # of Triton's software pipeline


def choose(n: int) -> Gemv:
    """The tiles for a weight of n rows: smaller ones where there would be too few programs for a GPU."""
    return Gemv() if n >= 8192 else Gemv(rows=8, blocks=16)


def gemv(x: jax.Array, w: NF4Weight | NF4Layer, a=None, b=None, scale: float = 1.0, *, config: Gemv) -> jax.Array:
    """x W^T + scale (x a) b, bfloat16 [M, N], for at most 4 rows x [M, K], w [N, K], a [K, R], b [R, N].

    A layer of a stack is read where it lies.
    """
    (m, k), n = x.shape, w.shape[0]
    if m > MAX_ROWS:
        raise ValueError(f"gemv takes at most {MAX_ROWS} rows, got {m}")
    pairs = jax.lax.bitcast_convert_type(x.reshape(m, k // 2, 2), jnp.int32)
    weight = arrays(in_reach(with_one_index(w)))
    factors = []
    if a is not None and b is not None:
        factors = [_thin_parts(x, a), b]
    return pl.pallas_call(
        functools.partial(_kernel, size=len(weight), scale=scale, config=config),
        grid=(pl.cdiv(n, config.rows),),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret(),
        name="nf4_gemv",
    )(pairs, *weight, *factors)


def _thin_parts(x, a):
    """Sums of x a over parts of K, float32 [parts, M, R]."""
    (m, k), r = x.shape, a.shape[1]
    size = pl.next_power_of_2(-(-k // _PARTS))
    return pl.pallas_call(
        functools.partial(_thin_kernel, size=size),
        grid=(_PARTS,),
        out_shape=jax.ShapeDtypeStruct((_PARTS, m, r), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret(),
        name="nf4_gemv_thin",
    )(x, a)


def _thin_kernel(x_ref, a_ref, out_ref, *, size):
    (m, k), r = x_ref.shape, a_ref.shape[1]
    column, lane = pl.program_id(0) * size + jnp.arange(size), jnp.arange(pl.next_power_of_2(r))
    shape = (size, lane.size)
    mask = _spread((column < k)[:, None], shape) & _spread((lane < r)[None], shape)
    a = plgpu.load(a_ref.at[_spread(column[:, None], shape), _spread(lane[None], shape)], mask=mask, other=0)
    a = a.astype(x_ref.dtype).astype(jnp.float32)
    for index in range(m):
        x = plgpu.load(x_ref.at[index, column], mask=column < k, other=0).astype(jnp.float32)
        plgpu.store(out_ref.at[pl.program_id(0), index, lane], jnp.sum(x[:, None] * a, axis=0), mask=lane < r)


def _kernel(x_ref, *refs, size, scale, config):
    (packed_ref, *scale_refs), factor_refs, y_ref = refs[:size], refs[size:-1], refs[-1]
    entry = (scale_refs.pop()[0],) if packed_ref.ndim == 3 else ()
    (m, half), n = x_ref.shape, y_ref.shape[1]
    total = half // _BYTES
    out_row = pl.program_id(0) * config.rows + jnp.arange(config.rows, dtype=jnp.int32)
    # Shuffles want every lane, so rows and blocks that do not exist are read from the last ones, and count for nothing.
    row = jnp.minimum(out_row, n - 1)
    byte = jnp.arange(_BYTES, dtype=jnp.int32)
    shape = (config.rows, config.blocks, _BYTES)

    def step(i, sums):
        block = i * config.blocks + jnp.arange(config.blocks, dtype=jnp.int32)
        real, block = block < total, jnp.minimum(block, total - 1)
        column = block[:, None] * _BYTES + byte[None, :]
        packed = packed_ref[*entry, _spread(row[:, None, None], shape), _spread(column[None], shape)]
        blocks = _spread(row[:, None], shape[:2]), _spread(block[None], shape[:2])
        absmax = load_absmax(scale_refs, *blocks, total, entry, entry)
        even, odd = _values(packed)
        out = []
        for index in range(m):
            pair = plgpu.load(x_ref.at[index, column], mask=_spread(real[:, None], shape[1:]), other=0)
            low, high = (jax.lax.bitcast_convert_type(bits, jnp.float32) for bits in (pair << 16, pair & ~0xFFFF))
            low, high, scale = (_spread(v, shape) for v in (low[None], high[None], absmax[:, :, None]))
            out.append(_fma(_fma(even, low, odd * high), scale, sums[index]))
        return tuple(out)

    zeros = (jnp.zeros(shape, jnp.float32),) * m
    sums = jax.lax.fori_loop(0, pl.cdiv(total, config.blocks), step, zeros)
    for index in range(m):
        y = jnp.sum(jnp.sum(sums[index], axis=2), axis=1)
        if factor_refs:
            y += scale * _adapter(*factor_refs, index, row)
        plgpu.store(y_ref.at[index, out_row], y.astype(y_ref.dtype), mask=out_row < n)


def _adapter(thin_ref, b_ref, index, row):
    """x[index] A B[:, row], float32."""
    parts, _, rank = thin_ref.shape
    lane = jnp.arange(pl.next_power_of_2(rank), dtype=jnp.int32)
    shape = (parts, lane.size)
    part = _spread(jnp.arange(parts, dtype=jnp.int32)[:, None], shape)
    mask = _spread((lane < rank)[None], shape)
    thin = jnp.sum(plgpu.load(thin_ref.at[part, index, _spread(lane[None], shape)], mask=mask, other=0), axis=0)
    shape = (lane.size, row.size)
    mask = _spread((lane < rank)[:, None], shape)
    b = plgpu.load(b_ref.at[_spread(lane[:, None], shape), _spread(row[None], shape)], mask=mask, other=0)
    return jnp.sum(thin[:, None] * b.astype(jnp.float32), axis=0)


def _fma(x, y, z):
    """x * y + z, rounded once; the compiler leaves a product and a sum apart."""
    return x * y + z if interpret() else asm("fma.rn.f32 $0, $1, $2, $3;", (x, y, z), "=f,f,f,f", jnp.float32)


def _spread(x, shape):
    return jnp.broadcast_to(x, shape)


def _values(packed):
    """float32 values of the high and of the low codes of bytes, without their scale."""
    if interpret():
        return select(packed >> 4, CODE), select(packed & 15, CODE)
    table = asm(lane_table(), (jnp.zeros((1, 1, 1), jnp.int32),), "=r,r", jnp.int32)
    args = (packed, _spread(table, packed.shape))
    constraints = "=f,=f,=f,=f,r,r,r,r,r"
    return tuple(asm(_look_up(shift), args, constraints, jnp.float32, pack=4) for shift in (4, 0))


def _look_up(shift: int) -> str:
    """PTX: floats $0 to $3 of the codes `shift` bits up in the four bytes of $4, by the value of each lane in $5."""
    lines = [".reg .b32 i, f;"]
    for byte in range(4):
        # Segments of 16 lanes: the hardware takes the index modulo 16.
        lines.append(f"shr.u32 i, $4, {8 * byte + shift}; shfl.sync.idx.b32 f, $5, i, 0x101f, -1; mov.b32 ${byte}, f;")
    return "{ " + " ".join(lines) + " }"
