"""lm_head logits on Hopper, with the softmax statistics taken in the matmul's epilogue (Pallas Mosaic GPU).

Idea: after a plain matmul the logits [M, V] are read once for the log-sum-exp and once more for the gradient. Here each
tile's epilogue, which still holds the float32 logits in registers, writes the maximum and the sum of exponentials of
every row of the tile, [V / 128, M] float32, and the logits less that maximum in float16. Rounding the difference
rather than the logit keeps the entries that matter exact: an entry e below its tile's maximum is off by at most
2^-12 e, and weighs exp(-e). So logits cost half the bytes of float32, are read once, and the gradient overwrites them.

Bytes: W once for every group of rows, x from L2, 2 M V written. Operations: 2 M V D on the tensor cores; what is left
is the epilogue, about 5 % of the time, which runs beside the next tile's loads but not beside its products.

H100, M 1024, V 128256, D 4096: 1.40 ms (768 TFLOP/s; cuBLAS needs 1.40 ms for float32 logits alone). Loss and gradient,
T 4096: 11.6 ms of kernels, 12.9 ms when repeated until the card throttles, where float32 logits in XLA take 14.5; the
gradient is as near to float64 as with float32 logits. Neither pairs of blocks that share W by multicast, nor one
product left in flight, nor 64 x 256 tiles changed that by more than 1 %.
"""

# pyright: reportAbstractUsage=false, reportPrivateImportUsage=false
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lora_jax.kernels.dispatch import sm_count, why_not_hopper

__all__ = ["ROWS", "logits_and_statistics", "why_not"]

ROWS = 256  # of a block, whose two compute warpgroups take half each; M must be a multiple
_HALF = ROWS // 2
_COLUMNS = 128  # of a block; the statistics are of one row's piece of this width
_DEPTH = 64  # of D at once
_STAGES = 4
_STORE = (64, 32)  # of a tile written at once
_SLOTS = 3  # of this size for each warpgroup
_FLOOR = -60000.0  # float16 ends at -65504; exp(-60000) is 0
_LOG2E = 1.4426950408889634


def why_not(x: jax.Array, w: jax.Array) -> str | None:
    """The reason why this kernel cannot do this call, or None if it can."""
    if (reason := why_not_hopper()) is not None:
        return reason
    if x.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        return f"x and the weight must be bfloat16, got {x.dtype} and {w.dtype}"
    if w.shape[0] % _COLUMNS or w.shape[1] % _DEPTH:
        return f"V must be a multiple of {_COLUMNS} and D of {_DEPTH}, got {w.shape}"
    return None


def logits_and_statistics(x: jax.Array, w: jax.Array, softcap: float | None = None):
    """Logits relative to their tile's maximum, and each tile's maximum and sum of exponentials.

    Args:
      x: [M, D] bfloat16.
      w: [V, D] bfloat16.
      softcap: c in c tanh(logits / c), or None.

    Returns:
      (differences float16 [M, V], maxima float32 [V / 128, M], sums float32 [V / 128, M]).
    """
    (rows, _), (vocab, _) = x.shape, w.shape
    statistics = jax.ShapeDtypeStruct((vocab // _COLUMNS, rows), jnp.float32)
    return plgpu.kernel(
        functools.partial(_kernel, softcap=softcap),
        out_type=(jax.ShapeDtypeStruct((rows, vocab), jnp.float16), statistics, statistics),
        grid=(sm_count(),),
        grid_names=("core",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, w)


def _transforms(width: int) -> tuple:
    """Layout in shared memory of 2-byte rows of `width`."""
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)


def _pipeline(steps: int, body, context):
    """Loads x [256, 64] and w [128, 64] for every step of D."""
    options: dict[str, Any] = dict(transforms=_transforms(_DEPTH), memory_space=plgpu.SMEM)
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        memory_registers=40,
        in_specs=[plgpu.BlockSpec((size, _DEPTH), lambda k: (0, k), **options) for size in (ROWS, _COLUMNS)],
        wg_axis="warpgroup",
        num_compute_wgs=2,
        max_concurrent_steps=_STAGES,
        compute_context=context,
    )


def _nothing(*_, **__) -> None:
    """Stands in for the functions of a pipeline of which only the memory is asked for."""


def _kernel(x_gmem, w_gmem, out_gmem, max_gmem, sum_gmem, *, softcap: float | None):
    (rows, dim), vocab = x_gmem.shape, w_gmem.shape[0]
    row_blocks, column_blocks = rows // ROWS, vocab // _COLUMNS

    @functools.partial(
        pl.run_scoped,
        allocations=_pipeline(dim // _DEPTH, _nothing, _nothing).get_allocations(x_gmem, w_gmem),
        out_smem=plgpu.SMEM((2, _SLOTS, *_STORE), jnp.float16, transforms=_transforms(_STORE[1])),
        max_smem=plgpu.SMEM((2, _HALF), jnp.float32),
        sum_smem=plgpu.SMEM((2, _HALF), jnp.float32),
        collective_axes="warpgroup",
    )
    def _(allocations, out_smem, max_smem, sum_smem):
        half = lax.axis_index("warpgroup")

        @plgpu.nd_loop((row_blocks * column_blocks,), collective_axes="core")
        def _(loop):
            (index,) = loop.index
            # Rows innermost: all rows of a few columns of blocks run at once, so that w is read from memory once.
            block_row, column_block = lax.rem(index, row_blocks) * ROWS, lax.div(index, row_blocks)
            row, column = block_row + half * _HALF, column_block * _COLUMNS

            def context(run):
                @functools.partial(pl.run_scoped, acc_ref=plgpu.ACC((_HALF, _COLUMNS), jnp.float32))
                def _(acc_ref):
                    run(acc_ref)
                    maximum, total, below = _statistics(acc_ref[...], softcap)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    max_smem.at[half][...] = maximum
                    sum_smem.at[half][...] = total
                    plgpu.commit_smem()
                    at = (column_block, pl.ds(row, _HALF))
                    plgpu.copy_smem_to_gmem(max_smem.at[half], max_gmem.at[at])
                    plgpu.copy_smem_to_gmem(sum_smem.at[half], sum_gmem.at[at])
                    _store(below, out_smem.at[half], out_gmem, row, column)

            def body(_, x_smem, w_smem, acc_ref):
                x_half = x_smem.at[pl.ds(half * _HALF, _HALF)]
                plgpu.wgmma(acc_ref, x_half, w_smem.transpose((1, 0)))
                plgpu.wgmma_wait(0)
                return acc_ref

            _pipeline(dim // _DEPTH, body, context)(
                x_gmem.at[pl.ds(block_row, ROWS)], w_gmem.at[pl.ds(column, _COLUMNS)], allocations=allocations
            )

    plgpu.wait_smem_to_gmem(0)


def _statistics(logits, softcap: float | None):
    """Of each row: (maximum, sum of exp(logits - maximum), logits - maximum in float16)."""
    if softcap is not None:  # tanh(z) = 1 - 2 / (1 + exp(2 z)); the hardware's tanh has 11 bits
        logits = softcap - 2 * softcap / (1 + jnp.exp2(logits * (2 * _LOG2E / softcap)))
    maximum = jnp.max(logits, axis=1)
    below = logits - lax.broadcast_in_dim(maximum, logits.shape, [0])
    total = jnp.sum(jnp.exp2(below * _LOG2E), axis=1)
    return maximum, total, jnp.maximum(below, _FLOOR).astype(jnp.float16)


def _store(values, slots, out_gmem, row, column) -> None:
    """Writes a tile through a few buffers in shared memory."""
    height, width = _STORE
    pieces = [(i, j) for i in range(0, _HALF, height) for j in range(0, _COLUMNS, width)]
    for n, (i, j) in enumerate(pieces):
        plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
        slot = slots.at[n % _SLOTS]
        slot[...] = values[i : i + height, j : j + width]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(slot, out_gmem.at[pl.ds(row + i, height), pl.ds(column + j, width)])
