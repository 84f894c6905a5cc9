"""Grouped matmul in Pallas-Triton, for NVIDIA GPUs from Ampere on.

Idea: the rows of every expert are cut into blocks; XLA computes which expert and which rows a block has (a few
integers), so a program knows its tile from three small loads and the grid stays static. NF4 experts are decoded into a
16-bit stack before, one kernel for all of them; the adapter's second factor is one more step of the main loop, so its
product costs no memory traffic. Operations: 2 M N K, plus what the last block of each expert overhangs.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lora_jax.kernels import dispatch
from lora_jax.kernels.grouped.xla import FEW_ROWS, Joined, in_stack, row_ranges
from lora_jax.kernels.nf4 import triton as nf4
from lora_jax.kernels.nf4.format import BLOCK, NF4Layer, NF4Weight

__all__ = ["Tile", "block_map", "choose_tile", "dense", "grouped_matmul", "grouped_outer", "tiles", "why_not"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Block sizes of one program and how Triton compiles it."""

    rows: int  # rows of one expert
    cols: int  # columns of the output
    depth: int  # contracted features in one step
    warps: int
    stages: int
    swizzle: int = 8  # row blocks that follow each other before the next column block: they share the weight in L2


# Tiles by the rows an expert has on average, from that number on.
HOPPER = {
    0: Tile(16, 64, 128, 4, 4),
    32: Tile(64, 128, 64, 4, 4),
    128: Tile(128, 256, 64, 8, 3),
}
AMPERE = {
    0: Tile(16, 64, 64, 4, 4),
    32: Tile(64, 128, 32, 4, 4),
    128: Tile(128, 128, 32, 8, 3),
}
THIN = Tile(64, 16, 64, 4, 4)  # for products with as many columns as the ranks of adapters
OUTER = Tile(64, 64, 0, 4, 3)
FEW = Tile(16, 32, 128, 4, 3)


def tiles(capability: int) -> list[Tile]:
    """Every tile that `choose_tile` may return on a GPU of a compute capability such as 90."""
    return [*(HOPPER if capability >= 90 else AMPERE).values(), THIN]


def choose_tile(rows: float, columns: int) -> Tile:
    """The tile for experts of `rows` rows on average and an output of `columns` columns, for the device at hand."""
    if dispatch.interpret():
        return Tile(16, 32, 32, 4, 1)
    if columns <= 64:
        return dataclasses.replace(THIN, cols=max(16, pl.next_power_of_2(columns)))
    table = HOPPER if plgpu.get_gpu_info().compute_capability >= 90 else AMPERE
    return table[max(least for least in table if least <= rows)]


def why_not(x: jax.Array, w: jax.Array | NF4Weight | NF4Layer | Joined) -> str | None:
    """Why these kernels cannot serve x [M, K] and w [E, N, K], or None."""
    if isinstance(w, Joined):
        return next(filter(None, (why_not(x, one) for one in w.weights)), None)
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in 16 bits, x is {x.dtype}"
    if not isinstance(w, NF4Weight | NF4Layer):
        return None
    if math.prod(w.shape) > 2**32:
        return f"more than 2^32 weights {w.shape} overflow its 32-bit indices"
    return nf4.why_not(x, in_stack(w))


def dense(w: jax.Array | NF4Weight | NF4Layer | Joined) -> jax.Array:
    """The experts [E, N, K] in 16 bits."""
    if isinstance(w, jax.Array):
        return w
    weights = [in_stack(nf4.in_reach(one)) for one in (w.weights if isinstance(w, Joined) else (w,))]
    experts = jnp.arange(w.shape[0], dtype=jnp.int32)
    return jax.vmap(lambda e: nf4.dequantize(*(NF4Layer(one.stack, one.index + e) for one in weights)))(experts)


def grouped_matmul(
    x: jax.Array,
    w: jax.Array | NF4Weight | NF4Layer | Joined,
    group_sizes: jax.Array,
    *,
    contract: int,
    thin: jax.Array | None = None,
    b: jax.Array | None = None,
    tile: Tile | None = None,
) -> jax.Array:
    """As `xla.grouped_matmul`; x is 16-bit, R a power of two and at least 16. `tile` is for tuning."""
    m, experts, d = x.shape[0], w.shape[0], w.shape[2 - contract]
    if isinstance(w, NF4Weight | NF4Layer) and contract and tile is None and m <= FEW_ROWS * experts:
        return few_rows(x, w, group_sizes, thin, b)
    tile = tile or choose_tile(m / experts, d)
    w = dense(w)
    blocks = -(-m // tile.rows) + experts  # never more are needed; the last ones zero the rows of no expert
    expert, start, end = block_map(group_sizes, m, tile.rows, blocks)
    kernel = functools.partial(_matmul, contract=contract, tile=tile, blocks=blocks, experts=experts)
    adapter = () if thin is None else (thin, b)
    return pl.pallas_call(
        kernel,
        grid=(blocks * -(-d // tile.cols),),
        out_shape=jax.ShapeDtypeStruct((m, d), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=dispatch.interpret(),
        name="grouped_matmul",
    )(expert, start, end, x, w, *adapter)


def block_map(group_sizes, m: int, rows: int, blocks: int):
    """Expert, first row and row after the last one of every block; a pseudo-expert E owns the rows left over."""
    starts, ends = row_ranges(group_sizes)
    total = ends[-1]
    starts, ends = jnp.append(starts, total), jnp.append(ends, m)
    last_block = jnp.cumsum((ends - starts + rows - 1) // rows)
    block = jnp.arange(blocks, dtype=jnp.int32)
    expert = jnp.sum(block[:, None] >= last_block[None], axis=1, dtype=jnp.int32)
    owner = jnp.minimum(expert, group_sizes.shape[0])
    first_block = jnp.append(0, last_block[:-1])[owner]
    start = starts[owner] + (block - first_block) * rows
    unused = expert > group_sizes.shape[0]
    return owner, jnp.where(unused, m, start).astype(jnp.int32), jnp.where(unused, m, ends[owner]).astype(jnp.int32)


def _matmul(expert_ref, start_ref, end_ref, x_ref, w_ref, *refs, contract, tile, blocks, experts):
    o_ref = refs[-1]
    (m, c), d = x_ref.shape, o_ref.shape[1]
    pid = pl.program_id(0)
    # Row blocks run fastest within a band of `swizzle` of them: together they read a column block of the weight once.
    columns = -(-d // tile.cols)
    band = pid // (tile.swizzle * columns)
    height = jnp.minimum(blocks - band * tile.swizzle, tile.swizzle)
    inside = pid % (tile.swizzle * columns)
    block, column = band * tile.swizzle + inside % height, inside // height
    e, start, end = expert_ref[block], start_ref[block], end_ref[block]

    @pl.when(start < end)
    def _():
        rows = jnp.minimum(
            start + jnp.arange(tile.rows), m - 1
        )  # what is read for rows beyond the last is never stored
        cols, in_cols = _indices(column * tile.cols, tile.cols, d)
        weight = jnp.minimum(e, experts - 1)

        def step(i, acc):
            depth, in_depth = _indices(i * tile.depth, tile.depth, c)
            xs = x_ref[_tile(rows, depth)]
            ws = w_ref[weight, *_tile(cols, depth)].T if contract else w_ref[weight, *_tile(depth, cols)]
            if c % tile.depth:
                xs, ws = jnp.where(in_depth[None], xs, 0), jnp.where(in_depth[:, None], ws, 0)
            return acc + plgpu.dot(xs, ws)

        steps = jnp.where(e < experts, jnp.int32(-(-c // tile.depth)), jnp.int32(0))
        acc = jax.lax.fori_loop(jnp.int32(0), steps, step, jnp.zeros((tile.rows, tile.cols), jnp.float32))
        if len(refs) == 3:
            acc += _adapter(refs[0], refs[1], e, weight, rows, cols, experts)
        _store(o_ref, acc, start, end, column * tile.cols, in_cols)


def _adapter(thin_ref, b_ref, e, weight, rows, cols, experts):
    """The adapter's product, to be added to the accumulator; it is the factor that is zeroed for the pseudo-expert:
    a select on the product would hold a second accumulator in registers."""
    rank = jnp.arange(thin_ref.shape[1])
    thin = thin_ref[_tile(rows, rank)]
    return plgpu.dot(jnp.where(e < experts, thin, jnp.zeros_like(thin)), b_ref[weight, *_tile(rank, cols)])


def _store(o_ref, acc, start, end, first, in_cols):
    """Stores the rows of an expert that a tile holds; what the mask leaves out may lie outside the array."""
    rows, cols = start + jnp.arange(acc.shape[0]), first + jnp.arange(acc.shape[1])
    plgpu.store(o_ref.at[_tile(rows, cols)], acc.astype(o_ref.dtype), mask=(rows < end)[:, None] & in_cols[None])


def few_rows(
    x: jax.Array,
    w: NF4Weight | NF4Layer,
    group_sizes: jax.Array,
    thin: jax.Array | None = None,
    b: jax.Array | None = None,
    *,
    tile: Tile = FEW,
) -> jax.Array:
    """`grouped_matmul` with contract=1 for so few rows that reading the weights is the cost: decodes in the main loop.

    Only experts that have rows are read: 0.52 bytes a weight. x is split into its even and odd features, so that the
    two nibbles of a byte never have to be interleaved.
    """
    (m, k), (experts, n, _) = x.shape, w.shape
    blocks = -(-m // tile.rows) + experts
    halves = jnp.moveaxis(x.reshape(m, k // 2, 2), 2, 0)
    first = in_stack(nf4.in_reach(w))
    packed, *scales = nf4.arrays(first.stack)
    adapter = () if thin is None else (thin, b)
    return pl.pallas_call(
        functools.partial(_few_rows, tile=tile, experts=experts, scales=len(scales)),
        grid=(blocks, -(-n // tile.cols)),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=dispatch.interpret(),
        name="grouped_matmul_few_rows",
    )(*block_map(group_sizes, m, tile.rows, blocks), first.index.reshape(1), halves, packed, *scales, *adapter)


def _few_rows(expert_ref, start_ref, end_ref, first_ref, x_ref, packed_ref, *refs, tile, experts, scales):
    scale_refs, adapter_refs, o_ref = refs[:scales], refs[scales:-1], refs[-1]
    (_, m, half), n = x_ref.shape, o_ref.shape[1]
    block, first = pl.program_id(0), pl.program_id(1) * tile.cols
    e, start, end = expert_ref[block], start_ref[block], end_ref[block]
    depth = tile.depth // 2  # bytes of a step

    @pl.when(start < end)
    def _():
        rows = jnp.minimum(start + jnp.arange(tile.rows), m - 1)
        cols, in_cols = _indices(first, tile.cols, n)
        weight = jnp.minimum(e, experts - 1)
        entry = first_ref[0] + weight

        def step(i, acc):
            at, in_depth = _indices(i * depth, depth, half)
            blocks, _ = _indices(i * (tile.depth // BLOCK), tile.depth // BLOCK, half * 2 // BLOCK)
            absmax = nf4.load_absmax(scale_refs, *_tile(cols, blocks), half * 2 // BLOCK, (entry,), (entry,))
            pairs = nf4.pairs(packed_ref[entry, *_tile(cols, at)], _spread(absmax))
            for part, word in enumerate((pairs << 16, pairs & jnp.int32(-65536))):
                ws = jax.lax.bitcast_convert_type(word, jnp.float32).astype(x_ref.dtype)
                xs = x_ref[part, *_tile(rows, at)]
                if half % depth:
                    xs, ws = jnp.where(in_depth[None], xs, 0), jnp.where(in_depth[None], ws, 0)
                acc += plgpu.dot(xs, ws.T)
            return acc

        steps = jnp.where(e < experts, jnp.int32(-(-half // depth)), jnp.int32(0))
        acc = jax.lax.fori_loop(jnp.int32(0), steps, step, jnp.zeros((tile.rows, tile.cols), jnp.float32))
        if adapter_refs:
            acc += _adapter(adapter_refs[0], adapter_refs[1], e, weight, rows, cols, experts)
        _store(o_ref, acc, start, end, first, in_cols)


def _spread(absmax):
    """[C, blocks] -> [C, bytes]: every scale for the 32 bytes of its block."""
    rows, blocks = absmax.shape
    return jnp.broadcast_to(absmax[:, :, None], (rows, blocks, BLOCK // 2)).reshape(rows, blocks * BLOCK // 2)


def grouped_outer(x: jax.Array, y: jax.Array, group_sizes: jax.Array, *, tile: Tile = OUTER) -> jax.Array:
    """As `xla.grouped_outer`, float32 [E, C, R]; R is a power of two and at least 16."""
    (_, c), r, experts = x.shape, y.shape[1], group_sizes.shape[0]
    starts, ends = row_ranges(group_sizes)
    return pl.pallas_call(
        functools.partial(_outer, tile=tile),
        grid=(-(-c // tile.cols), experts),
        out_shape=jax.ShapeDtypeStruct((experts, c, r), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=dispatch.interpret(),
        name="grouped_outer",
    )(starts, ends, x, y)


def _outer(start_ref, end_ref, x_ref, y_ref, o_ref, *, tile):
    (m, c), r = x_ref.shape, y_ref.shape[1]
    first, e = pl.program_id(0) * tile.cols, pl.program_id(1)
    cols, in_cols = _indices(first, tile.cols, c)
    rank = jnp.arange(r)
    start, end = start_ref[e], end_ref[e]

    def step(i, acc):
        at = start + i * tile.rows
        rows = jnp.minimum(at + jnp.arange(tile.rows), m - 1)
        inside = (at + jnp.arange(tile.rows) < end)[:, None]
        xs = plgpu.load(x_ref.at[_tile(rows, cols)], mask=jnp.broadcast_to(inside, (tile.rows, tile.cols)), other=0.0)
        ys = plgpu.load(y_ref.at[_tile(rows, rank)], mask=jnp.broadcast_to(inside, (tile.rows, r)), other=0.0)
        return acc + plgpu.dot(xs.T, ys)

    steps = (end - start + tile.rows - 1) // tile.rows
    acc = jax.lax.fori_loop(jnp.int32(0), steps, step, jnp.zeros((tile.cols, r), jnp.float32))
    plgpu.store(
        o_ref.at[e, *_tile(first + jnp.arange(tile.cols), rank)],
        acc,
        mask=jnp.broadcast_to(in_cols[:, None], (tile.cols, r)),
    )


def _indices(first, size: int, limit: int):
    """`size` indices from `first`, held at the last element where the array ends, and whether each is inside."""
    index = first + jnp.arange(size)
    # Without the minimum Triton sees that neighbours are contiguous, and loads 16 bytes at once.
    return index if limit % size == 0 else jnp.minimum(index, limit - 1), index < limit


def _tile(rows, cols):
    shape = (rows.shape[0], cols.shape[0])
    return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(cols[None], shape)
