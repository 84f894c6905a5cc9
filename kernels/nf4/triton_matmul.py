"""NF4 + LoRA matmuls whose weight is never written: dequantised on its way into the tensor cores, by Pallas-Triton.

Idea. A code is looked up with byte permutations instead of a tree of 15 selects: the sixteen bf16 values are eight
32-bit registers (low bytes, high bytes), `prmt` picks four bytes by four codes at once, and two registers of the
result are the bf16 pairs in the order in which the tensor core wants them: 21 integer operations for 8 weights, 2.6 a
weight.

The other look-up (`shuffle`) keeps the table across the 32 lanes of a warp and fetches a value from the lane that the
code numbers: one shift and one shuffle a weight. Both are written so that the bytes never pass through a table in
memory.

Numbers. The table holds CODE * 1.4367 rounded to bf16, and absmax is divided by 1.4367 in float32. That factor
minimises the rounding of the sixteen values (weighted by how often normal weights take them): root mean square 3.0e-4
of absmax, where the weight rounded to bf16 has 6.3e-4. Few rows scale the float32 accumulator of each block of 64, so
nothing else is rounded: the result is more exact than the standard computation. With many rows that costs too much;
the weight is scaled in float32 and rounded to bf16 before the product (7.0e-4, the error of the result at most 1.09
times the standard one's).

A single row: triton_gemv.py.

Few rows (decoding in batches), M <= 64. Limit: the packed bytes, 29 MB or 10 us for 4096 -> 14336 on an H100; the
look-ups take longer today (see below). Programs split N, and K where N alone does not fill the GPU; they write float32
partial sums, and x A in a few more programs of the same kernel; a second kernel adds all of it up in a fixed order,
with (x A) B. No atomics: two runs are bitwise equal.

Many rows. Limit: the tensor cores. Each weight is looked up M / bm times, programs run in an order that keeps the rows
of x in the L2 cache, loads are pipelined, x A is a thin matmul before and (x A) B is added to the accumulator at the
end.

Measured on an H100, kernels alone, weights from memory, double quantisation, rank 16, permutations: 4096 -> 14336 with
16 and 64 rows 31.4 and 50.1 us (cuBLAS with a bf16 weight 45 and 50), of which the sum of the parts is 3 and 5;
14336 -> 4096 with 16 rows 41 us; 4096 rows -> 14336 1073 us with x A, 455 TFLOP/s in the kernel (cuBLAS 595 us); 128,
256 and 512 rows 67, 89 and 169 us, beside 119, 125 and 162 of the form that decodes first; dx with 4096 rows 1247 us,
45 of them dy B^T. Shuffles in place of permutations take 7 to 25 % longer. The time of few rows does not depend on
tiles, and grows with the number of `prmt` as if an SM did 16 lanes of it a clock: that is the limit, not the memory.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lora_jax.kernels.dispatch import interpret
from lora_jax.kernels.nf4 import triton_gemv
from lora_jax.kernels.nf4.format import BLOCK, CODE, NESTED_BLOCK, NF4Layer, NF4Weight, cut, select, with_one_index
from lora_jax.kernels.nf4.triton import arrays, in_reach
from lora_jax.kernels.nf4.triton_adapter import padded_rank
from lora_jax.kernels.nf4.triton_gemv import Gemv

__all__ = [
    "FewRows",
    "ManyRows",
    "base_matmul",
    "base_matmul_transposed",
    "choose",
    "few_rows",
    "forward",
    "input_gradient",
    "many_rows",
    "many_rows_transposed",
    "matmul",
    "why_not",
]

# Chosen so that the sixteen products lie close to bf16 numbers: see "Numbers" above.
_STRETCH = np.float32(1.4367)
_TABLE = (CODE * _STRETCH).astype(ml_dtypes.bfloat16)
_INVERSE = np.float32(1) / _STRETCH
MAX_FEW = 64


@dataclasses.dataclass(frozen=True)
class FewRows:
    """Tiles of `few_rows`; K / 64 must be a multiple of splits * blocks."""

    bn: int = 64  # weight rows of a program, power of two
    blocks: int = 4  # blocks of 64 along K in one step of its loop, power of two
    splits: int = 2  # programs along K
    warps: int = 4
    stages: int = 1  # of Triton's software pipeline
    weight_left: bool = False  # W x^T (64 weight rows at a time) instead of x W^T (16 rows of x at a time)
    together: bool = True  # scales of a step are loaded as one tile
    shuffle: bool = False  # look codes up by lane shuffles instead of byte permutations


@dataclasses.dataclass(frozen=True)
class ManyRows:
    """Tiles of `many_rows` and `many_rows_transposed`."""

    bm: int = 128  # rows of x of a program, power of two
    bn: int = 128  # output columns of a program, power of two
    bk: int = 64  # step along the sum, power of two
    group: int = 8  # row blocks that run over all columns together, for the L2 cache
    warps: int = 8
    stages: int = 3
    weight_left: bool = False  # W x^T with W in registers instead of x W^T with W in shared memory
    shuffle: bool = False  # look codes up by lane shuffles instead of byte permutations


# (at most this many rows, tiles), measured: see the top of the file.
_FEW = ((16, FewRows(stages=3)), (MAX_FEW, FewRows(stages=3, weight_left=True)))
_MANY = ((128, ManyRows(bn=64, warps=4)), (math.inf, ManyRows(bm=256, bn=64, warps=4)))
_PROGRAMS = 448  # few rows: K is split until about so many programs share the work


def why_not(x, w, a=None, b=None) -> str | None:
    """Reason why the kernels of this file cannot multiply x [M, K] by w [N, K] with factors a, b; None if they can."""
    if not isinstance(w, NF4Weight | NF4Layer):
        return "the weight is not NF4"
    if len(w.shape) != 2:
        return f"it takes one weight [N, K], got shape {w.shape}"
    n, k = w.shape
    if k % BLOCK:
        return f"K must be a multiple of {BLOCK}, got K = {k}"
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, got {x.dtype}"
    if n * k // 2 >= 2**31:
        return f"the packed weight must be smaller than 2 GiB, got {n} x {k}"
    if a is not None and a.shape[1] > 256:
        return f"the rank must be at most 256, got {a.shape[1]}"
    return None


def choose(m: int, n: int, k: int) -> Gemv | FewRows | ManyRows:
    """The configuration for x [m, k] and w [n, k], from measurements on an H100; each also compiles for sm_80 to 89."""
    if m == 1:
        return triton_gemv.choose(n)
    if m > MAX_FEW:
        return _many(m)
    config = next(config for limit, config in _FEW if m <= limit)
    blocks = math.gcd(config.blocks, k // BLOCK)
    wanted = max(1, _PROGRAMS // -(-n // config.bn))
    splits = next(s for s in range(wanted, 0, -1) if k // BLOCK // blocks % s == 0)
    return dataclasses.replace(config, blocks=blocks, splits=splits)


def base_matmul(x: jax.Array, w: NF4Weight | NF4Layer, tiles=None) -> jax.Array:
    """x [M, K] times W^T: [M, N] in the dtype of x. `tiles`: pairs (field, value) that replace those of `choose`."""
    return matmul(x, w, config=_replaced(x, w, tiles))


def base_matmul_transposed(dy: jax.Array, w: NF4Weight | NF4Layer) -> jax.Array:
    """dy [M, N] times W: [M, K] in the dtype of dy."""
    return many_rows_transposed(dy, w, config=_many(dy.shape[0]))


def forward(x: jax.Array, w: NF4Weight | NF4Layer, a: jax.Array, b: jax.Array, tiles=None) -> tuple[jax.Array, None]:
    """(x W^T + x a b [M, N], None) for a [K, R], b [R, N]: x a is computed again in backward."""
    return matmul(x, w, a, b, config=_replaced(x, w, tiles)), None


def input_gradient(dy: jax.Array, w: NF4Weight | NF4Layer, a: jax.Array, b: jax.Array) -> tuple[jax.Array, None]:
    """(dy W + (dy b^T) a^T [M, K], None) for dy [M, N]."""
    return many_rows_transposed(dy, w, a, b, config=_many(dy.shape[0])), None


def _replaced(x, w, tiles):
    config = choose(x.shape[0], *w.shape)
    return config if tiles is None else dataclasses.replace(config, **dict(tiles))


def _many(m: int) -> ManyRows:
    return next(config for limit, config in _MANY if m <= limit)


def matmul(x: jax.Array, w: NF4Weight | NF4Layer, a=None, b=None, scale: float = 1.0, *, config=None) -> jax.Array:
    """y = x W^T + scale (x a) b for x [M, K] bfloat16, w [N, K], a [K, R], b [R, N]; returns [M, N] in bfloat16.

    `config` is a Gemv, FewRows or ManyRows, None for the measured one. A layer of a stack is read where it lies, but
    for many rows it is cut out. Raises NotImplementedError if `why_not` objects.
    """
    if (reason := why_not(x, w, a, b)) is not None:
        raise NotImplementedError(f"nf4 matmul (triton): {reason}")
    config = config or choose(x.shape[0], *w.shape)
    if isinstance(config, Gemv):
        return triton_gemv.gemv(x, w, a, b, scale, config=config)
    if isinstance(config, FewRows):
        return few_rows(x, w, a, b, scale, config=config)
    return many_rows(x, w, a, b, scale, config=config)


def few_rows(
    x: jax.Array, w: NF4Weight | NF4Layer, a=None, b=None, scale: float = 1.0, *, config: FewRows
) -> jax.Array:
    """`matmul` for at most 64 rows, bound by the bytes of the weight."""
    (m, k), n = x.shape, w.shape[0]
    if m > MAX_FEW:
        raise ValueError(f"few_rows takes at most {MAX_FEW} rows, got {m}")
    if k // BLOCK % (config.splits * config.blocks):
        raise ValueError(f"{config} does not fit K = {k}: splits * blocks must divide K / {BLOCK} = {k // BLOCK}")
    rank, lora = _padded_rank(a), a is not None
    rows, thin = max(16, pl.next_power_of_2(m)), -(-16 // config.splits) if lora else 0
    kernel = functools.partial(_few_kernel, m=m, n=n, k=k, rows=rows, rank=rank, thin=thin, config=config)
    out = [jax.ShapeDtypeStruct((config.splits, m, n), jnp.float32)]
    out += [jax.ShapeDtypeStruct((thin * config.splits, m, rank), jnp.float32)] if lora else []
    inputs = dict(x=x, table=_table_words(), **_weight_arrays(w), **({"a": a} if lora else {}))
    grid = (thin + -(-n // config.bn), config.splits)
    parts = _call(kernel, "nf4_few_rows", inputs, out, grid, config.warps, config.stages)
    inputs = {"parts": parts[0]}
    if lora:
        inputs |= {"thin": parts[1].reshape(parts[1].shape[0], -1), "b": b}
    bm, bn = min(rows, 16), 128
    kernel = functools.partial(_sum_kernel, scale=scale, bm=bm, bn=bn, thin_shape=out[-1].shape)
    out = [jax.ShapeDtypeStruct((m, n), x.dtype)]
    return _call(kernel, "nf4_few_rows_sum", inputs, out, (-(-n // bn), -(-m // bm)), 4, 1)[0]


def _few_kernel(refs, parts, thin_parts: Any = None, *, m, n, k, rows, rank, thin, config):
    """Partial sums of a tile of W x^T or x W^T over one part of K; the first `thin` columns of programs do x A."""
    column, split = pl.program_id(0), pl.program_id(1)
    row = jnp.arange(rows)
    row_ok = row < m

    def base():
        out = (column - thin) * config.bn + jnp.arange(config.bn)
        out_ok = out < n
        table = _load_table(refs["table"], config.shuffle)
        entry = (refs["index"][0],) if "index" in refs else ()
        steps = k // BLOCK // config.splits // config.blocks

        def step(i, acc):
            first = (split * steps + i) * config.blocks
            scales = _scales_of_group(refs, entry, out, out_ok, first, config, k // BLOCK)
            for j in range(config.blocks):
                half = (first + j) * (BLOCK // 2) + jnp.arange(BLOCK // 2)
                packed = refs["packed"].at[*entry, out[:, None], half[None, :]]
                packed = plgpu.load(packed, mask=out_ok[:, None], other=0)
                column_of_x = (first + j) * BLOCK + jnp.arange(BLOCK)
                x = plgpu.load(refs["x"].at[row[:, None], column_of_x[None, :]], mask=row_ok[:, None], other=0)
                w = _values(packed, table)
                if config.weight_left:
                    acc += plgpu.dot(w, x, trans_b=True) * scales[j][:, None]
                else:
                    acc += plgpu.dot(x, w, trans_b=True) * scales[j][None, :]
            return acc

        shape = (config.bn, rows) if config.weight_left else (rows, config.bn)
        acc = jax.lax.fori_loop(0, steps, step, jnp.zeros(shape, jnp.float32))
        index, mask = (row[:, None], out[None, :]), row_ok[:, None] & out_ok[None, :]
        if config.weight_left:
            index, mask = (row[None, :], out[:, None]), row_ok[None, :] & out_ok[:, None]
        plgpu.store(parts.at[split, *index], acc, mask=mask)

    def adapter():
        part, lane = column * config.splits + split, jnp.arange(rank)
        acc = jnp.zeros((rows, rank), jnp.float32)
        per_part = -(-k // (thin * config.splits * 128)) * 128
        for i in range(0, per_part, 128):
            col = part * per_part + i + jnp.arange(128)
            mask = row_ok[:, None] & (col < k)[None, :]
            x = plgpu.load(refs["x"].at[row[:, None], col[None, :]], mask=mask, other=0)
            mask = (col < k)[:, None] & (lane < refs["a"].shape[1])[None, :]
            acc += plgpu.dot(
                x, plgpu.load(refs["a"].at[col[:, None], lane[None, :]], mask=mask, other=0).astype(x.dtype)
            )
        plgpu.store(thin_parts.at[part, row[:, None], lane[None, :]], acc, mask=row_ok[:, None])

    if thin:
        pl.when(column < thin)(adapter)
        pl.when(column >= thin)(base)
    else:
        base()


def _sum_kernel(refs, y, *, scale, bm, bn, thin_shape):
    """Adds the partial sums in order, then scale (x A) B."""
    (m, n), splits = y.shape, refs["parts"].shape[0]
    row, col = pl.program_id(1) * bm + jnp.arange(bm), pl.program_id(0) * bn + jnp.arange(bn)
    row_ok, col_ok = row < m, col < n
    index, mask = (row[:, None], col[None, :]), row_ok[:, None] & col_ok[None, :]
    acc = jnp.zeros((bm, bn), jnp.float32)
    for split in range(splits):
        acc += plgpu.load(refs["parts"].at[split, *index], mask=mask, other=0)
    if "b" in refs:
        count, _, rank = thin_shape
        lane = jnp.arange(rank)
        part = jnp.arange(pl.next_power_of_2(count))
        cell = pl.program_id(1) * (bm * rank) + jnp.arange(bm * rank)
        thin_ok = (part < count)[:, None] & (cell < m * rank)[None, :]
        thin = plgpu.load(refs["thin"].at[part[:, None], cell[None, :]], mask=thin_ok, other=0)
        thin = jnp.sum(thin, axis=0).reshape(bm, rank)
        mask_b = (lane < refs["b"].shape[0])[:, None] & col_ok[None, :]
        b = plgpu.load(refs["b"].at[lane[:, None], col[None, :]], mask=mask_b, other=0) * np.float32(scale)
        acc += plgpu.dot(thin.astype(y.dtype), b.astype(y.dtype))
    plgpu.store(y.at[index], acc.astype(y.dtype), mask=mask)


def many_rows(
    x: jax.Array, w: NF4Weight | NF4Layer, a=None, b=None, scale: float = 1.0, *, config: ManyRows
) -> jax.Array:
    """`matmul` for any number of rows, bound by the tensor cores."""
    (m, k), n = x.shape, w.shape[0]
    inputs = dict(x=x, table=_table_words(), **_weight_arrays(cut(w)))
    if a is not None and b is not None:
        rank = _padded_rank(a)
        thin = jnp.dot(x, a.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
        inputs |= dict(thin=_pad_rank(thin, rank), b=_pad_rank((scale * b).astype(x.dtype).T, rank))
    kernel = functools.partial(_many_kernel, k=k, config=config)
    out = [jax.ShapeDtypeStruct((m, n), x.dtype)]
    grid = (-(-m // config.bm) * -(-n // config.bn),)
    return _call(kernel, "nf4_many_rows", inputs, out, grid, config.warps, config.stages)[0]


def _many_kernel(refs, y, *, k, config):
    """One tile of x W^T + (x A) B, or of its transpose."""
    (m, n), bm, bn, bk = y.shape, config.bm, config.bn, config.bk
    row_tile, col_tile = _tile(m, n, config)
    row, col = row_tile * bm + jnp.arange(bm), col_tile * bn + jnp.arange(bn)
    row_ok, col_ok = row < m, col < n
    table = _load_table(refs["table"], config.shuffle)
    left = config.weight_left

    def step(i, acc):
        x = _load(refs["x"], row, i * bk + jnp.arange(bk), row_ok if m % bm else None)
        packed = _load(refs["packed"], col, i * (bk // 2) + jnp.arange(bk // 2), col_ok if n % bn else None)
        w = _scaled(refs, packed, table, col, i * (bk // BLOCK), k // BLOCK, col_ok if n % bn else None)
        return acc + (plgpu.dot(w, x, trans_b=True) if left else plgpu.dot(x, w, trans_b=True))

    acc = jax.lax.fori_loop(0, k // bk, step, jnp.zeros((bn, bm) if left else (bm, bn), jnp.float32))
    if "b" in refs:
        lane = jnp.arange(refs["b"].shape[1])
        thin, b = _load(refs["thin"], row, lane, row_ok), _load(refs["b"], col, lane, col_ok)
        acc += plgpu.dot(b, thin, trans_b=True) if left else plgpu.dot(thin, b, trans_b=True)
    index, mask = (row[:, None], col[None, :]), row_ok[:, None] & col_ok[None, :]
    if left:
        index, mask = (row[None, :], col[:, None]), row_ok[None, :] & col_ok[:, None]
    plgpu.store(y.at[index], acc.astype(y.dtype), mask=mask if m % bm or n % bn else None)


def many_rows_transposed(
    dy: jax.Array, w: NF4Weight | NF4Layer, a=None, b=None, scale=1.0, *, config: ManyRows
) -> jax.Array:
    """dx = dy W + scale (dy b^T) a^T for dy [M, N] bfloat16: [M, K] in bfloat16. `config.bn` must divide K."""
    (m, _n), k = dy.shape, w.shape[1]
    if k % config.bn or config.bn % BLOCK:
        raise ValueError(f"{config}: bn must be a multiple of {BLOCK} and divide K = {k}")
    inputs = dict(x=dy, table=_table_words(), **_weight_arrays(cut(w)))
    if a is not None and b is not None:
        rank = _padded_rank(a)
        thin = jnp.dot(dy, (scale * b).astype(dy.dtype).T, preferred_element_type=jnp.float32).astype(dy.dtype)
        inputs |= dict(thin=_pad_rank(thin, rank), a=_pad_rank(a.astype(dy.dtype), rank))
    kernel = functools.partial(_transposed_kernel, config=config)
    out = [jax.ShapeDtypeStruct((m, k), dy.dtype)]
    grid = (-(-m // config.bm) * (k // config.bn),)
    return _call(kernel, "nf4_many_rows_transposed", inputs, out, grid, config.warps, config.stages)[0]


def _transposed_kernel(refs, dx, *, config):
    """One tile of dy W + (dy B^T) A^T."""
    (m, k), n, bm, bn, bk = dx.shape, refs["x"].shape[1], config.bm, config.bn, config.bk
    row_tile, col_tile = _tile(m, k, config)
    row, col = row_tile * bm + jnp.arange(bm), col_tile * bn + jnp.arange(bn)
    row_ok = row < m
    half = col_tile * (bn // 2) + jnp.arange(bn // 2)
    table = _load_table(refs["table"], config.shuffle)

    def step(i, acc):
        out = i * bk + jnp.arange(bk)  # rows of W
        out_ok = out < n if n % bk else None
        packed = _load(refs["packed"], out, half, out_ok)
        w = _scaled(refs, packed, table, out, col_tile * (bn // BLOCK), k // BLOCK, out_ok)
        mask = None
        if m % bm or n % bk:
            mask = row_ok[:, None] & (out < n)[None, :]
        dy = plgpu.load(refs["x"].at[row[:, None], out[None, :]], mask=mask, other=None if mask is None else 0)
        return acc + plgpu.dot(dy, w)

    acc = jax.lax.fori_loop(0, -(-n // bk), step, jnp.zeros((bm, bn), jnp.float32))
    if "a" in refs:
        lane = jnp.arange(refs["a"].shape[1])
        acc += plgpu.dot(_load(refs["thin"], row, lane, row_ok), _load(refs["a"], col, lane, None), trans_b=True)
    mask = row_ok[:, None] if m % bm else None
    plgpu.store(dx.at[row[:, None], col[None, :]], acc.astype(dx.dtype), mask=mask)


def _tile(m, n, config):
    """(row tile, column tile) of this program: `group` row tiles go over all columns before the next ones begin."""
    rows, cols = -(-m // config.bm), -(-n // config.bn)
    first = pl.program_id(0) // (config.group * cols) * config.group
    size = jnp.minimum(rows - first, config.group)
    within = pl.program_id(0) % (config.group * cols)
    return first + within % size, within // size


def _load(ref, row, col, row_ok):
    """The tile of a matrix at these rows and columns; rows that are not ok are 0."""
    mask = None if row_ok is None else row_ok[:, None]
    return plgpu.load(ref.at[row[:, None], col[None, :]], mask=mask, other=None if mask is None else 0)


def _call(kernel, name, inputs, out, grid, warps, stages):
    """Runs `kernel(refs by name, *output refs)` with whole arrays as refs."""
    params = None if interpret() else plgpu.CompilerParams(num_warps=warps, num_stages=stages)
    call = pl.pallas_call(kernel, grid=grid, out_shape=out, name=name, interpret=interpret(), compiler_params=params)
    return call(inputs)


def _weight_arrays(w: NF4Weight | NF4Layer) -> dict[str, jax.Array]:
    """The weight's arrays by name; of a layer those of its whole stack, and its `index`."""
    w = in_reach(with_one_index(w))
    whole = w.stack if isinstance(w, NF4Layer) else w
    names = ["packed", "absmax"] + ["nested_absmax", "nested_offset", "nested_code"] * whole.double_quantized
    return dict(zip(names + ["index"] * isinstance(w, NF4Layer), arrays(w), strict=True))


def _padded_rank(a) -> int:
    """Columns of the adapter's tiles: the tensor core wants 16 or more, Triton powers of two."""
    return 0 if a is None else padded_rank(a.shape[1])[0]


def _pad_rank(x, rank):
    return jnp.pad(x, ((0, 0), (0, rank - x.shape[1])))


def _scales_of_group(refs, entry, out, out_ok, first, config, blocks_of_row):
    """float32 [len(out)] absmax / STRETCH for each block of a step from `first` on; they share a nested scale.

    `entry` is () for a weight and (number of the layer,) for a layer of a stack.
    """
    factor: Any = _INVERSE
    if "nested_code" in refs:
        group = (out * blocks_of_row + first) // NESTED_BLOCK
        factor = plgpu.load(refs["nested_absmax"].at[*entry, group], mask=out_ok, other=0) * _INVERSE

    def decode(stored, factor):
        if "nested_code" not in refs:
            return stored * factor
        code = plgpu.load(refs["nested_code"].at[*entry, stored.astype(jnp.int32)])
        return code * factor + refs["nested_offset"][entry[0] if entry else 0] * _INVERSE

    at = refs["absmax"].at
    if not config.together:
        stored = [plgpu.load(at[*entry, out, first + j], mask=out_ok, other=0) for j in range(config.blocks)]
        return [decode(s, factor) for s in stored]
    block = jnp.arange(config.blocks)
    stored = plgpu.load(at[*entry, out[:, None], (first + block)[None, :]], mask=out_ok[:, None], other=0)
    scales = decode(stored, factor[:, None] if "nested_code" in refs else factor)
    return [jnp.sum(jnp.where((block == j)[None, :], scales, 0), axis=1) for j in range(config.blocks)]


def _scaled(refs, packed, table, out, first, blocks_of_row, out_ok):
    """bf16 weights [len(out), 2 * half] of packed [len(out), half], whose first block is `first`."""
    rows, count = packed.shape[0], packed.shape[1] // (BLOCK // 2)
    block = first + jnp.arange(count)
    scales = _load(refs["absmax"], out, block, out_ok)
    if "nested_code" in refs:
        mask = None if out_ok is None else out_ok[:, None]
        group = (out[:, None] * blocks_of_row + block[None, :]) // NESTED_BLOCK
        factor = plgpu.load(refs["nested_absmax"].at[group], mask=mask, other=None if mask is None else 0) * _INVERSE
        code = plgpu.load(refs["nested_code"].at[scales.astype(jnp.int32)])
        scales = code * factor + refs["nested_offset"][0] * _INVERSE
    else:
        scales = scales * _INVERSE
    scales = jnp.broadcast_to(scales[:, :, None], (rows, count, BLOCK // 2)).reshape(packed.shape)
    return _values(packed, table, scales)


def _table_words() -> jax.Array:
    """int32 [8]: the low bytes of the sixteen table values, four in a word, then the high bytes."""
    bits = _TABLE.view(np.uint16)
    return jnp.asarray(np.concatenate([bits & 255, bits >> 8]).astype(np.uint8).view(np.int32))


def _load_table(ref, shuffle):
    """The table in registers: eight words as int32 [1] each, or one word that differs from lane to lane."""
    words = [ref[pl.ds(i, 1)] for i in range(8)]
    if interpret():
        return words
    if shuffle:
        return [_asm(_LANE_ASM, words, "=r" + ",r" * 8, 1, jnp.int32)]
    # The mask of lower lanes never has its top bit set, but ptxas does not know. It would take the words for equal in
    # all lanes, keep them in uniform registers and copy them back at each use, an instruction a weight.
    asm = "{ .reg .b32 lanes; mov.u32 lanes, %lanemask_lt; shr.u32 lanes, lanes, 31; xor.b32 $0, $1, lanes; }"
    return [_asm(asm, [word], "=r,r", 1, jnp.int32) for word in words]


# PTX: words $1 to $8 of the table -> $0, in each lane the value of code lane % 16 in both halves.
_LANE_ASM = """{ .reg .b32 code, low, high, p, q; .reg .pred upper;
mov.u32 code, %laneid;
and.b32 p, code, 8;
setp.ne.b32 upper, p, 0;
and.b32 code, code, 7;
prmt.b32 p, $1, $2, code;
prmt.b32 q, $3, $4, code;
selp.b32 low, q, p, upper;
prmt.b32 p, $5, $6, code;
prmt.b32 q, $7, $8, code;
selp.b32 high, q, p, upper;
and.b32 low, low, 255;
and.b32 high, high, 255;
shl.b32 high, high, 8;
or.b32 low, low, high;
mul.lo.u32 $0, low, 0x10001;
}"""


def _values(packed, table, scales=None):
    """uint8 [n, h] of two codes a byte, the first in the high nibble -> bf16 [n, 2 h], table values in order.

    With `scales` (float32 [n, h], one for both codes of a byte) they are multiplied by them and rounded once.
    """
    if interpret():
        pair = [select(packed >> 4, _TABLE), select(packed & 15, _TABLE)]
        if scales is not None:
            pair = [(v.astype(jnp.float32) * scales).astype(jnp.bfloat16) for v in pair]
    else:
        args = [packed, *(jnp.broadcast_to(word[:, None], packed.shape) for word in table)]
        if scales is not None:
            high = scales.astype(jnp.bfloat16)
            args += [_twice(high), _twice((scales - high.astype(jnp.float32)).astype(jnp.bfloat16))]
        constraints = "=r,=r,=r,=r,r" + ",r" * (4 * len(args) - 4)
        both = _asm(_look_up_asm(len(table) == 1, scales is not None), args, constraints, 4, jnp.int32)
        pair = [both.astype(jnp.int16), jax.lax.shift_right_logical(both, jnp.int32(16)).astype(jnp.int16)]
        pair = [jax.lax.bitcast_convert_type(v, jnp.bfloat16) for v in pair]
    return jnp.stack(pair, axis=-1).reshape(packed.shape[0], 2 * packed.shape[1])


def _twice(x):
    """The bits of a bf16 number in both halves of an int32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int16).astype(jnp.int32) & 0xFFFF
    return bits | bits << 16


def _asm(code, args, constraints, pack, dtype):
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    return plgpu.elementwise_inline_asm(
        code, args=args, constraints=constraints, pack=pack, result_shape_dtypes=[shape]
    )[0]


@functools.cache
def _look_up_asm(shuffle: bool, scaled: bool) -> str:
    """PTX: four packed bytes $4 -> four registers $0 to $3, each the two bf16 values of a byte, first code below.

    With `shuffle`, operand $5 is a lane's word of the table, and a code is looked up in the lane of that number (the
    fifth bit of the number belongs to another code, so lanes 16 to 31 hold the table again). Without, operand $(5 + 4
    i) is word i of the table (an argument comes once for each of the four bytes). `prmt` picks four of eight bytes by
    three-bit numbers, so both halves of the table are looked up and the codes' fourth bits, spread to whole bytes
    (bit 3 of a selector repeats the sign of the byte), choose between them. Scales come as two bf16 numbers, the
    first rounded and the second what is left: value * first + (value * second) rounds as the product with a scale of
    16 bits would, in two instructions for two weights.
    """
    after = 9 if shuffle else 37
    lines = ["{ .reg .b32 codes, upper, shifted, mask, p, q, l, h, minus_zero;", "mov.b32 minus_zero, 0x80008000;"]

    def finish(out):  # the pair is in p
        if scaled:
            lines.append(f"fma.rn.bf16x2 q, p, ${after + 4 + out}, minus_zero;")
            lines.append(f"fma.rn.bf16x2 ${out}, p, ${after + out}, q;")
        else:
            lines.append(f"mov.b32 ${out}, p;")

    if shuffle:
        for out in range(4):
            for bit, name in ((8 * out + 4, "p"), (8 * out, "q")):
                lines.append(f"shr.u32 codes, $4, {bit};")
                lines.append(f"shfl.sync.idx.b32 {name}, $5, codes, 0x1f, 0xffffffff;")
            lines.append("lop3.b32 p, q, p, 0xffff, 0xD8;")  # the lower half of p, the upper one of q
            finish(out)
        return "\n".join([*lines, "}"])
    low, high = [f"${5 + 4 * i}" for i in range(4)], [f"${5 + 4 * i}" for i in range(4, 8)]
    lines += ["and.b32 codes, $4, 0x77777777;", "shr.u32 upper, codes, 16;", "shl.b32 shifted, $4, 4;"]
    for codes, spread, first in (("codes", "0x9D8C", 0), ("upper", "0xBFAE", 2)):
        lines.append(f"prmt.b32 mask, $4, shifted, {spread};")
        for byte, words in (("l", low), ("h", high)):
            lines.append(f"prmt.b32 p, {words[0]}, {words[1]}, {codes};")
            lines.append(f"prmt.b32 q, {words[2]}, {words[3]}, {codes};")
            lines.append(f"lop3.b32 {byte}, p, q, mask, 0xD8;")  # mask ? q : p
        for out, order in ((first, "0x4051"), (first + 1, "0x6273")):
            lines.append(f"prmt.b32 p, l, h, {order};")
            finish(out)
    return "\n".join([*lines, "}"])
