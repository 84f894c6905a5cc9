"""lm_head logits on Hopper, with the softmax statistics taken in the matmul's epilogue (Pallas Mosaic GPU).

Idea: after a plain matmul the logits [M, V] are read once for the log-sum-exp and once more for the gradient. Here each
tile's epilogue, which still holds the float32 logits in registers, writes the maximum and the sum of exponentials of
every row of the tile, [V / tile, M] float32, and the logits less that maximum in float16. Rounding the difference
rather than the logit keeps the entries that matter exact: an entry e nats below its tile's maximum is off by at most
2^-12 e, and weighs exp(-e). So logits cost half the bytes of float32, are read once, and the gradient overwrites them.

Bytes: W once for every group of rows, x from L2, 2 M V written. Operations: 2 M V D on the tensor cores.
"""

# pyright: reportAbstractUsage=false, reportPrivateImportUsage=false
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lora_jax.kernels.dispatch import default_platform

__all__ = ["ROWS", "Config", "logits_and_statistics", "why_not"]

ROWS = 256  # the number of rows must be a multiple of this

_FLOOR = -60000.0  # float16 ends at -65504; exp(-60000) is 0
_LOG2E = 1.4426950408889634


def why_not(x: jax.Array, w: jax.Array) -> str | None:
    """The reason why this kernel cannot do this call, or None if it can."""
    if default_platform() != "gpu":
        return f"it needs an NVIDIA GPU of the Hopper family, JAX runs on {default_platform()}"
    if (capability := getattr(jax.devices()[0], "compute_capability", None)) != "9.0":
        return f"it needs a GPU of the Hopper family (compute capability 9.0), this one has {capability}"
    if x.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        return f"x and the weight must be bfloat16, got {x.dtype} and {w.dtype}"
    if w.shape[0] % 256 or w.shape[1] % 64:
        return f"V must be a multiple of 256 and D of 64, got {w.shape}"
    return None


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of one of the two compute warpgroups."""

    tile_m: int = 128
    tile_n: int = 128
    tile_k: int = 64
    stages: int = 4
    cluster: bool = False  # pairs of blocks that take neighbouring rows and load w once for both
    split_rows: bool = False  # the two warpgroups share columns and split rows, or the other way round
    delay: int = 0  # tensor-core operations left running when the next block of K is asked for
    store_m: int = 64
    store_n: int = 32


CONFIG = Config()


def logits_and_statistics(x: jax.Array, w: jax.Array, config: Config | None = None):
    """Logits relative to their tile's maximum, and each tile's maximum and sum of exponentials.

    Args:
      x: [M, D] bfloat16.
      w: [V, D] bfloat16.

    Returns:
      (differences float16 [M, V], maxima float32 [V / tile_n, M], sums float32 [V / tile_n, M]).
    """
    config = config or CONFIG
    (rows, _), (vocab, _) = x.shape, w.shape
    mesh = jax.sharding.get_abstract_mesh().abstract_device
    sms = mesh.num_cores if mesh else jax.devices()[0].core_count
    pair = 2 if config.cluster else 1
    stats = jax.ShapeDtypeStruct((vocab // config.tile_n, rows), jnp.float32)
    return plgpu.kernel(
        functools.partial(_kernel, config=config),
        out_type=(jax.ShapeDtypeStruct((rows, vocab), jnp.float16), stats, stats),
        grid=(sms // pair,),
        grid_names=("sm",),
        cluster=(pair,),
        cluster_names=("pair",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, w)


def _kernel(x_gmem, w_gmem, out_gmem, max_gmem, sum_gmem, *, config: Config):
    (rows, dim), vocab = x_gmem.shape, w_gmem.shape[0]
    tile_m, tile_n, tile_k = config.tile_m, config.tile_n, config.tile_k
    cta_m, cta_n = (2 * tile_m, tile_n) if config.split_rows else (tile_m, 2 * tile_n)
    pair = 2 if config.cluster else 1
    tiles_m, tiles_n = rows // (cta_m * pair), vocab // cta_n
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    swizzle = 2 * config.store_n
    out_transforms = (plgpu.TilingTransform((8, config.store_n)), plgpu.SwizzleTransform(swizzle))

    def pipeline(body, context):
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(dim // tile_k,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec(
                    (cta_m, tile_k),
                    lambda k: (0, k),
                    transforms=transforms,
                    memory_space=plgpu.SMEM,
                    delay_release=config.delay,
                ),
                plgpu.BlockSpec(
                    (cta_n, tile_k),
                    lambda k: (0, k),
                    transforms=transforms,
                    memory_space=plgpu.SMEM,
                    delay_release=config.delay,
                    collective_axes=("pair",) if config.cluster else (),
                ),
            ],
            wg_axis="wg",
            num_compute_wgs=2,
            max_concurrent_steps=config.stages,
            compute_context=context,
        )

    def nothing(*_, **__):
        """Stands in for the pipeline's functions where only its memory is asked for."""

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(nothing, nothing).get_allocations(x_gmem, w_gmem),
        out_smem=plgpu.SMEM((2, 2, config.store_m, config.store_n), jnp.float16, transforms=out_transforms),
        max_smem=plgpu.SMEM((2, tile_m), jnp.float32),
        sum_smem=plgpu.SMEM((2, tile_m), jnp.float32),
        collective_axes="wg",
    )
    def _(allocations, out_smem, max_smem, sum_smem):
        wg = lax.axis_index("wg")

        @plgpu.nd_loop((tiles_m * tiles_n,), collective_axes="sm")
        def _(loop):
            (index,) = loop.index
            # Rows innermost: all rows of a few columns of tiles run at once, so that w is read from memory once.
            row0 = (lax.rem(index, tiles_m) * pair + lax.axis_index("pair")) * cta_m
            column0 = lax.div(index, tiles_m) * cta_n
            row = row0 + wg * tile_m if config.split_rows else row0
            column = column0 if config.split_rows else column0 + wg * tile_n

            def context(run):
                @functools.partial(pl.run_scoped, acc_ref=plgpu.ACC((tile_m, tile_n), jnp.float32))
                def _(acc_ref):
                    run(acc_ref)
                    logits = acc_ref[...]
                    maximum = jnp.max(logits, axis=1)
                    below = logits - lax.broadcast_in_dim(maximum, logits.shape, [0])
                    total = jnp.sum(jnp.exp2(below * _LOG2E), axis=1)
                    below = jnp.maximum(below, _FLOOR).astype(jnp.float16)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    max_smem.at[wg][...] = maximum
                    sum_smem.at[wg][...] = total
                    plgpu.commit_smem()
                    at = (lax.div(column, tile_n), pl.ds(row, tile_m))
                    plgpu.copy_smem_to_gmem(max_smem.at[wg], max_gmem.at[at])
                    plgpu.copy_smem_to_gmem(sum_smem.at[wg], sum_gmem.at[at])
                    pieces = [
                        (i, j) for i in range(0, tile_m, config.store_m) for j in range(0, tile_n, config.store_n)
                    ]
                    for n, (i, j) in enumerate(pieces):
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                        slot = out_smem.at[wg, n % 2]
                        slot[...] = below[i : i + config.store_m, j : j + config.store_n]
                        plgpu.commit_smem()
                        place = (pl.ds(row + i, config.store_m), pl.ds(column + j, config.store_n))
                        plgpu.copy_smem_to_gmem(slot, out_gmem.at[place])

            def body(_, x_smem, w_smem, acc_ref):
                x_part = x_smem.at[pl.ds(wg * tile_m, tile_m)] if config.split_rows else x_smem
                w_part = w_smem if config.split_rows else w_smem.at[pl.ds(wg * tile_n, tile_n)]
                plgpu.wgmma(acc_ref, x_part, plgpu.transpose_ref(w_part, (1, 0)))
                plgpu.wgmma_wait(config.delay)
                return acc_ref

            pipeline(body, context)(
                x_gmem.at[pl.ds(row0, cta_m)], w_gmem.at[pl.ds(column0, cta_n)], allocations=allocations
            )

    plgpu.wait_smem_to_gmem(0)
