"""Pallas-Triton kernel that decodes NF4 weights into bfloat16, bit for bit as bitsandbytes does.

Idea: every lane of a warp keeps one of the 16 code values (lanes 16 to 31 repeat them), and a weight is looked up by a
warp shuffle whose source lane is the 4-bit code: one shift and one shuffle a weight, where a tree of selects takes 15.
A thread decodes 8 bytes. The double-quantised scale is decoded by the same
thread, with its two roundings. About 7 instructions a weight: 15 us of issue slots for 14336 x 4096 on an H100.

Bytes: 0.5 read and 2 written a weight (plus 1/64): 147 MB for 14336 x 4096, which is 50 us at the 2.95 TB/s that a
device copy reaches.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lora_jax.kernels import dispatch
from lora_jax.kernels.nf4.format import BLOCK, CODE, NESTED_BLOCK, NF4Layer, NF4Weight, select

__all__ = ["arrays", "asm", "dequantize", "in_reach", "lane_table", "load_absmax", "pairs", "why_not"]

_TILE = 2048  # bytes of a row that one program decodes
_BYTES = 2048  # bytes of all its rows: 8 for each of 256 threads


def why_not(x: jax.Array, w: jax.Array | NF4Weight | NF4Layer, a: jax.Array | None = None) -> str | None:
    """Why these kernels cannot serve x [M, K] and w [N, K] with an adapter a [K, R], or None."""
    if not isinstance(w, NF4Weight | NF4Layer):
        return "the weight is not NF4"
    n, k = w.shape
    if x.dtype != jnp.bfloat16:
        return f"it computes in bfloat16, x is {x.dtype}"
    if k % BLOCK or (isinstance(w, NF4Weight) and w.absmax.ndim != 2):
        return f"a row of K = {k} weights must be whole blocks of {BLOCK}"
    # A dot of fewer than 16 elements compiles for a GPU, to wrong numbers.
    if a is not None and k > n and n % 16:
        return f"with an adapter and K = {k} > N it takes N that are multiples of 16, got N = {n}"
    if n * k // 2 >= 2**31:
        return f"more than 2^32 weights ([N, K] = [{n}, {k}]) overflow its 32-bit indices"
    return None


def dequantize(
    *weights: NF4Weight | NF4Layer, beside: jax.Array | None = None, below: jax.Array | None = None
) -> jax.Array:
    """Decodes weights to bfloat16, one below the other, with room for adapters that the same kernel copies in.

    Args:
      weights: one or more [N_i, K] without leading axes, K a multiple of 64. N is the sum of their N_i.
      beside: bfloat16 [N, E], returned as columns K to K + E; E is 64 times a power of two.
      below: bfloat16 [E, K], returned as rows N to N + E. At most one of the two.

    Returns:
      bfloat16 [N, K], [N, K + E] or [N + E, K].
    """
    counts, half = [w.shape[0] for w in weights], weights[0].shape[1] // 2
    n, tile = sum(counts), math.gcd(half, _TILE)
    rows = math.gcd(*counts, _BYTES // tile)
    grid, shape = (n // rows, half // tile), (n, half)
    extra = []
    if beside is not None:
        extra = [_as_pairs(beside)]
        grid, shape = (n // rows, half // tile + 1), (n, half + beside.shape[1] // 2)
    elif below is not None:
        extra = [_as_pairs(below)]
        rows = math.gcd(rows, below.shape[0])
        grid, shape = ((n + below.shape[0]) // rows, half // tile), (n + below.shape[0], half)
    operands = [arrays(in_reach(w)) for w in weights]
    sizes = tuple(len(one) for one in operands)
    # Pairs of bfloat16 are written as 32-bit words; the bit casts around the kernel cost nothing.
    words = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, n=n, rows=rows, tile=tile, beside=beside is not None),
        grid=grid,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=max(1, rows * tile // 256), num_stages=1),
        interpret=dispatch.interpret(),
        name="nf4_dequantize",
    )(*itertools.chain(*operands), *extra)
    return jax.lax.bitcast_convert_type(words, jnp.bfloat16).reshape(shape[0], 2 * shape[1])


def in_reach(w: NF4Weight | NF4Layer) -> NF4Weight | NF4Layer:
    """The weight, cut out of a stack whose elements a kernel cannot all count.

    Pallas counts in 64 bits where an array is larger than 2^32 bytes, but 2^31 are too many for 32.
    """
    return w.cut() if isinstance(w, NF4Layer) and 2**31 <= w.stack.packed.size <= 2**32 else w


def arrays(w: NF4Weight | NF4Layer) -> list[jax.Array]:
    """[codes, scales], what double-quantised scales are decoded with, and the indices in the stack if it is in one.

    These are one number, or two where the second-level scales have one of their own.
    """
    index = [_indices(w)] if isinstance(w, NF4Layer) else []
    w = w.stack if isinstance(w, NF4Layer) else w
    if w.nested_absmax is None or w.nested_offset is None or w.nested_code is None:
        return [w.packed, w.absmax, *index]
    return [w.packed, w.absmax, w.nested_absmax, w.nested_offset.reshape(-1), w.nested_code, *index]


def _indices(w: NF4Layer) -> jax.Array:
    return w.index.reshape(1) if w.nested_index is None else jnp.stack([w.index, w.nested_index])


def _as_pairs(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1, 2), jnp.int32)


def _kernel(*refs, sizes, n, rows, tile, beside):
    """Rows [i rows, (i + 1) rows) and bytes [j tile, (j + 1) tile) of the weights, or their share of the adapter."""
    weight_refs, extra_refs, out_ref = refs[: sum(sizes)], refs[sum(sizes) : -1], refs[-1]
    half = refs[0].shape[-1]
    row, col = pl.program_id(0) * rows, pl.program_id(1) * tile

    def decode():
        first = start = 0
        for size in sizes:
            mine = weight_refs[start : start + size]
            end = first + mine[0].shape[-2]
            one = functools.partial(_decode, mine, out_ref, first, row - first, col, rows, tile)
            one() if len(sizes) == 1 else pl.when(jnp.logical_and(row >= first, row < end))(one)
            first, start = end, start + size

    if not extra_refs:
        return decode()
    rest = pl.program_id(1) == half // tile if beside else pl.program_id(0) >= n // rows
    pl.when(jnp.logical_not(rest))(decode)

    @pl.when(rest)
    def _():
        if beside:
            out_ref[pl.ds(row, rows), pl.ds(half, extra_refs[0].shape[1])] = extra_refs[0][pl.ds(row, rows), :]
        else:
            out_ref[pl.ds(row, rows), pl.ds(col, tile)] = extra_refs[0][pl.ds(row - n, rows), pl.ds(col, tile)]


def _decode(refs, out_ref, first, row, col, rows, tile):
    """Decodes a tile of a weight; the weight's first row is row `first` of the output."""
    packed_ref, *scale_refs = refs
    entry = nested = ()
    if packed_ref.ndim == 3:
        indices = scale_refs.pop()
        entry, nested = (indices[0],), (indices[indices.shape[0] - 1],)
    cols = pl.ds(col, tile)
    lines = row + jnp.arange(rows, dtype=jnp.int32)[:, None]
    blocks = (col + jnp.arange(tile, dtype=jnp.int32)[None]) >> (BLOCK // 2).bit_length() - 1
    lines, blocks = (jnp.broadcast_to(i, (rows, tile)) for i in (lines, blocks))
    absmax = load_absmax(scale_refs, lines, blocks, packed_ref.shape[-1] // (BLOCK // 2), entry, nested)
    out_ref[pl.ds(first + row, rows), cols] = pairs(packed_ref[*entry, pl.ds(row, rows), cols], absmax)


def load_absmax(refs, rows, blocks, blocks_in_row, entry=(), nested=()):
    """The float32 scales of the blocks in some rows.

    `entry` is () for a weight and (number,) for one of a stack, `nested` the same for its second-level scales.
    """
    if len(refs) == 1:
        return refs[0][*entry, rows, blocks]
    absmax_ref, nested_ref, offset_ref, code_ref = refs
    code = code_ref[*nested, absmax_ref[*entry, rows, blocks].astype(jnp.int32)]
    at = jax.lax.shift_right_logical(rows * blocks_in_row + blocks, NESTED_BLOCK.bit_length() - 1)
    offset = offset_ref[nested[0] if nested else 0]
    return _rounded("add", _rounded("mul", code, nested_ref[*nested, at]), jnp.broadcast_to(offset, code.shape))


def _rounded(op, x, y):
    """x * y or x + y, rounded: never one half of a fused multiply-add."""
    if dispatch.interpret():
        return jax.lax.optimization_barrier(x * y if op == "mul" else x + y)
    return asm(f"{op}.rn.f32 $0, $1, $2;", (x, y), "=f,f,f", jnp.float32)


def pairs(codes, absmax):
    """Weights of bytes as int32: the bfloat16 of the high nibble in the low half, and the other above."""
    if dispatch.interpret():
        halves = [select(codes.astype(jnp.int32) >> shift & 15, CODE) * absmax for shift in (4, 0)]
        low, high = (jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.int32) for x in halves)
        return low | high << 16
    # Equal for all elements, so that the compiler keeps one register of it; each lane has its own value.
    table = asm(lane_table(), (jnp.zeros((1, 1), jnp.int32),), "=r,r", jnp.int32)
    table = jnp.broadcast_to(table, codes.shape)
    return asm(_lookup_four_bytes(), (codes, absmax, table), "=r,=r,=r,=r,r,f,f,f,f,r,r,r,r", jnp.int32, pack=4)


def asm(code, args, constraints, dtype, pack=1):
    """An elementwise function in PTX assembly with one result of `dtype`."""
    out = [jax.ShapeDtypeStruct(args[0].shape, dtype)]
    return plgpu.elementwise_inline_asm(code, args=args, constraints=constraints, pack=pack, result_shape_dtypes=out)[0]


@functools.cache
def lane_table() -> str:
    """Assembly: $0 = CODE[lane % 16], by a tree of selects on the bits of the lane's number."""
    lines = [".reg .pred p<4>; .reg .b32 lane, bit, s<15>; mov.u32 lane, %laneid;"]
    lines += [f"and.b32 bit, lane, {1 << i}; setp.ne.u32 p{i}, bit, 0;" for i in range(4)]
    level, count = [f"0f{value:08X}" for value in CODE.view(np.uint32)], 0
    for bit in range(4):
        pairs, level = list(zip(level[0::2], level[1::2], strict=True)), []
        for low, high in pairs:
            lines.append(f"selp.b32 s{count}, {high}, {low}, p{bit};")
            level.append(f"s{count}")
            count += 1
    return "{ " + " ".join(lines) + f" mov.b32 $0, {level[0]}; }}"


@functools.cache
def _lookup_four_bytes() -> str:
    """Assembly: $0 to $3 = bfloat16 pairs of the four bytes in $4, with scales $5 to $8 and this lane's code in $9."""
    lines = [".reg .b32 i, j; .reg .f32 f, g;"]
    for byte in range(4):
        lines += [
            f"shr.u32 i, $4, {8 * byte + 4}; shr.u32 j, $4, {8 * byte};",
            # Segments of 16 lanes: the hardware takes the index modulo 16.
            "shfl.sync.idx.b32 f, $9, i, 0x101f, -1; shfl.sync.idx.b32 g, $9, j, 0x101f, -1;",
            f"mul.rn.f32 f, f, ${5 + byte}; mul.rn.f32 g, g, ${5 + byte}; cvt.rn.bf16x2.f32 ${byte}, g, f;",
        ]
    return "{ " + " ".join(lines) + " }"
