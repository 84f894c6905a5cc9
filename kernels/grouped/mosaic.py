"""Grouped matmul in Pallas Mosaic GPU, for Hopper (sm_90).

Idea: one block of threads for each SM walks over the tiles of the output; two of its warpgroups multiply (wgmma), a
third keeps copies of the next steps in flight (TMA). XLA computes which expert and which rows a block of rows has. Row
blocks begin at multiples of 8 rows, as TMA wants it, so the first and last block of an expert may hold rows of its
neighbours: those are computed and not stored. Whole pieces of 64 rows leave by one TMA store from swizzled shared
memory, the others by several of 32, 16, ... 1 rows. NF4 experts are decoded into a 16-bit stack before; the adapter's
second factor is one more step of the main loop.

Operations: 2 M N K, plus what the first and last block of each expert overhang; a warpgroup whose 64 rows are all
overhang does not multiply.

Measured on an H100, 8192 rows of 8 experts, random routing, rank 16: 4096 -> 14336 1.38 ms or 698 TFLOP/s, and
14336 -> 4096 1.40 ms or 688, beside 1.58 and 1.59 of the Triton kernel. Three steps in shared memory are as fast as
four, or faster where K is long; tiles of 256 x 128, or 4, 16 or 32 row blocks beside each other, are slower.
With 32 experts of 2048 rows, 2880 -> 5760 and back (tiles of 192 columns): 713 and 719 TFLOP/s, where the Triton kernel
reaches 582 and 145; 2048 -> 1408 (of 128): 597; 128 experts of 1024 rows, 2048 -> 1536 and back: 663 and 668.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lora_jax.kernels.dispatch import sm_count, why_not_hopper
from lora_jax.kernels.grouped import triton
from lora_jax.kernels.grouped.triton import grouped_outer
from lora_jax.kernels.grouped.xla import Joined, row_ranges
from lora_jax.kernels.nf4.format import NF4Layer, NF4Weight

__all__ = ["Tile", "choose_tile", "grouped_matmul", "grouped_outer", "why_not"]

LEAST_ROWS = 64  # of an expert on average, below which the Triton kernels are taken
PIECE = 64  # rows and columns that one warpgroup stores at a time


@dataclasses.dataclass(frozen=True)
class Tile:
    """The share of the output that a block of threads computes at a time."""

    rows: int = 128
    cols: int = 256  # the two warpgroups take half of the columns each
    depth: int = 64  # contracted features in one step
    stages: int = 3  # steps in shared memory at once
    steady: bool = False  # load the next tile during the end of this one, at the price of fewer steps in flight
    swizzle: int = 8  # row blocks that follow each other before the next column block: they share the weight in L2


TILES = Tile(), Tile(cols=192, stages=4), Tile(cols=128, stages=4)  # the best first


def choose_tile(columns: int) -> Tile | None:
    """The tile for an output of so many columns, or None where none fits."""
    return next((tile for tile in TILES if columns % tile.cols == 0), None)


def why_not(x: jax.Array, w: jax.Array | NF4Weight | NF4Layer | Joined) -> str | None:
    """Why this kernel cannot serve x [M, K] and w [E, N, K], or None."""
    if (reason := why_not_hopper()) is not None:
        return reason
    if any(choose_tile(n) is None for n in w.shape[1:]):
        return f"N and K must be multiples of 128 or 192, got [E, N, K] = {w.shape}"
    return triton.why_not(x, w)


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
    """As `xla.grouped_matmul`; R is 16, 32 or 64. `tile` is for tuning."""
    m, experts, d = x.shape[0], w.shape[0], w.shape[2 - contract]
    rank = 16 if thin is None else thin.shape[1]
    tile = tile or choose_tile(d)
    # The thin products of the adapters, few rows, large ranks.
    if tile is None or x.shape[1] % 64 or rank > 64 or m < max(128, LEAST_ROWS * experts):
        return triton.grouped_matmul(x, w, group_sizes, contract=contract, thin=thin, b=b)
    if m % 8:  # bulk copies take 8 rows at a time
        x = jnp.pad(x, ((0, -m % 8), (0, 0)))
        thin = None if thin is None else jnp.pad(thin, ((0, -m % 8), (0, 0)))
        return grouped_matmul(x, w, group_sizes, contract=contract, thin=thin, b=b, tile=tile)[:m]
    blocks = (m + 8 * experts) // tile.rows + experts + 2
    kernel = functools.partial(_kernel, contract=contract, tile=tile, experts=experts)
    adapter = () if thin is None else (thin, b)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, d), x.dtype),
        grid=(sm_count(),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*_block_map(group_sizes, m, tile.rows, blocks), x, triton.dense(w), *adapter)


def _block_map(group_sizes, m: int, rows: int, blocks: int):
    """Expert, first row computed, first and end of the expert's rows for every block [4, blocks]; blocks used [1].

    A pseudo-expert E owns the rows left over.
    """
    starts, ends = row_ranges(group_sizes)
    starts, ends = jnp.append(starts, ends[-1]), jnp.append(ends, m)
    first = starts // 8 * 8
    last_block = jnp.cumsum(jnp.where(ends > starts, (ends - first + rows - 1) // rows, 0))
    block = jnp.arange(blocks, dtype=jnp.int32)
    owner = jnp.minimum(jnp.sum(block[:, None] >= last_block[None], axis=1, dtype=jnp.int32), group_sizes.shape[0])
    at = first[owner] + (block - jnp.append(0, last_block[:-1])[owner]) * rows
    table = jnp.stack([owner, at, starts[owner], ends[owner]])
    return table.astype(jnp.int32), last_block[-1:].astype(jnp.int32)


def _swizzled(cols: int):
    """How a tile with rows of `cols` 16-bit numbers, or their first 64, lies in shared memory for wgmma."""
    swizzle = plgpu.find_swizzle(min(cols, 64) * 16)
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)  # pyright: ignore


def _kernel(table, used, x, w, *refs, contract, tile, experts):
    """One block of threads: its tiles of the output, one after the other."""
    *factors, out = refs
    thin, b = factors if factors else (out, out)  # stand-ins, not touched without an adapter
    (_, c), d, dtype = x.shape, out.shape[1], out.dtype
    rank = thin.shape[1] if factors else 16
    rows, columns = tile.rows // 2, d // tile.cols
    pipeline = functools.partial(_pipeline, contract=contract, tile=tile, steps=c // tile.depth)
    some_w = w.at[0].at[pl.ds(0, tile.cols)] if contract else w.at[0].at[:, pl.ds(0, tile.cols)]

    @functools.partial(
        pl.run_scoped,
        buffers=pipeline(_nothing, _nothing).get_allocations(x.at[pl.ds(0, tile.rows)], some_w),
        # A piece for each computing warpgroup, laid out for the store of a whole one or of single rows.
        pieces=plgpu.RefUnion(
            plgpu.SMEM((2, PIECE, PIECE), dtype, transforms=_swizzled(PIECE)), plgpu.SMEM((2, PIECE, PIECE), dtype)
        ),
        thin_smem=plgpu.SMEM((tile.rows, rank), dtype, transforms=_swizzled(rank)),
        b_smem=plgpu.SMEM((rank, tile.cols), dtype, transforms=_swizzled(rank)),
        arrived=plgpu.Barrier(num_arrivals=2),
        consumed=plgpu.Barrier(num_arrivals=2),
        collective_axes="wg",
    )
    def _(buffers, pieces, thin_smem, b_smem, arrived, consumed):
        swizzled, plain = pieces
        wg, sm, sms = lax.axis_index("wg"), lax.axis_index("sm"), lax.axis_size("sm")
        count = used[0]
        mine = (count * columns - sm + sms - 1) // sms

        def one_tile(i, _):
            block, column = _position(sm + i * sms, count, columns, tile.swizzle)
            col = column * tile.cols
            e, first, start, end = (table[j, block] for j in range(4))
            first = pl.multiple_of(first, 8)
            weight = jnp.minimum(e, experts - 1)
            row = pl.multiple_of(first + wg * rows, 8)
            has_rows = (row < end) & (row + rows > start) & (e < experts)

            def context(main_loop):
                @functools.partial(pl.run_scoped, acc=plgpu.ACC((rows, tile.cols), jnp.float32))  # pyright: ignore
                def _(acc):
                    if factors:

                        @pl.when(wg == 0)
                        def _():
                            pl.when(i > 0)(lambda: plgpu.barrier_wait(consumed))
                            plgpu.copy_gmem_to_smem(thin.at[pl.ds(first, tile.rows)], thin_smem, arrived)
                            b_part = b.at[weight].at[:, pl.ds(pl.multiple_of(col, PIECE), tile.cols)]
                            plgpu.copy_gmem_to_smem(b_part, b_smem, arrived)

                    main_loop(acc)
                    if factors:
                        plgpu.barrier_wait(arrived)
                        mine_of_thin = thin_smem.at[pl.ds(pl.multiple_of(wg * rows, PIECE), rows)]
                        _when(has_rows, lambda: plgpu.wgmma(acc, mine_of_thin, b_smem))
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(consumed)
                    _store(acc[...].astype(dtype), out, swizzled.at[wg], plain.at[wg], row, col, start, end)

            def step(_, x_smem, w_smem, acc):
                x_part = x_smem.at[pl.ds(pl.multiple_of(wg * rows, PIECE), rows)]
                _when(has_rows, lambda: plgpu.wgmma(acc, x_part, w_smem.T if contract else w_smem))
                plgpu.wgmma_wait(_delay(tile))
                return acc

            state = None
            if tile.steady:
                states = plgpu.PipelinePipeline
                state = jnp.where(i == 0, states.START, jnp.where(i == mine - 1, states.STOP, states.STEADY))
            columns_of = (pl.ds(col, tile.cols), slice(None)) if contract else (slice(None), pl.ds(col, tile.cols))
            w_part = w.at[weight].at[columns_of]
            pipeline(step, context, state)(x.at[pl.ds(first, tile.rows)], w_part, allocations=buffers)
            return ()

        lax.fori_loop(0, mine, one_tile, ())

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _nothing(*_, **__):
    """Stands for what a pipeline calls where only its buffers are asked for."""


def _when(condition, f):
    pl.when(condition)(f)


def _delay(tile) -> int:
    """Steps that may still be in flight when the next one starts; a pipeline over tiles wants none."""
    return 0 if tile.steady else 1


def _pipeline(step, context, state=None, *, contract, tile, steps):
    """The main loop: blocks of x [rows, depth] and of the weight [cols, depth] or [depth, cols]."""
    spec = functools.partial(plgpu.BlockSpec, memory_space=plgpu.SMEM, delay_release=_delay(tile))
    if contract:
        w_spec = spec((tile.cols, tile.depth), lambda k: (0, k), transforms=_swizzled(tile.depth))
    else:
        w_spec = spec((tile.depth, tile.cols), lambda k: (k, 0), transforms=_swizzled(tile.cols))
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        memory_registers=40,
        in_specs=[spec((tile.rows, tile.depth), lambda k: (0, k), transforms=_swizzled(tile.depth)), w_spec],
        wg_axis="wg",
        num_compute_wgs=2,
        max_concurrent_steps=tile.stages,
        compute_context=context,
        pipeline_state=state,
    )


def _position(index, blocks, columns: int, swizzle: int):
    """Row block and column block of a tile; row blocks run fastest within bands of `swizzle` of them."""
    band = index // (swizzle * columns)
    height = jnp.minimum(blocks - band * swizzle, swizzle)
    inside = index - band * (swizzle * columns)
    return band * swizzle + inside % height, inside // height


def _store(result, out, swizzled, plain, row, col, start, end):
    """Writes the rows from start to end of the tile [rows, cols] at (row, col)."""
    for i in range(0, result.shape[0], PIECE):
        for j in range(0, result.shape[1], PIECE):
            part = result[i : i + PIECE, j : j + PIECE]
            _store_piece(part, out, swizzled, plain, row + i, pl.ds(col + j, PIECE), start, end)


def _store_piece(part, out, swizzled, plain, row, cols, start, end):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    whole = (row >= start) & (row + PIECE <= end)

    @pl.when(whole)
    def _():
        swizzled[...] = part
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(swizzled, out.at[pl.ds(row, PIECE), cols])

    @pl.when(jnp.logical_not(whole))
    def _():
        plain[...] = part
        plgpu.commit_smem()
        skip = jnp.clip(start - row, 0, PIECE)
        valid = jnp.clip(end - row, skip, PIECE) - skip
        for size in (32, 16, 8, 4, 2, 1):

            @pl.when(valid & size != 0)
            def _(size=size):
                at = skip + (valid & ~(2 * size - 1))
                plgpu.copy_smem_to_gmem(plain.at[pl.ds(at, size)], out.at[pl.ds(row + at, size), cols])
