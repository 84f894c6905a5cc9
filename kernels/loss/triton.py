"""Softmax less one-hot, written over the logits that mosaic.py left (Pallas-Triton).

XLA makes one good pass of this too, but into a second array [C, V]: it does not reuse the buffer of a kernel with
several results. Bytes: 2 C V read and 2 C V written; bound by memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lora_jax.kernels.dispatch import interpret

__all__ = ["gradient"]

_ROWS = 16  # of a program; its columns are those of one tile


def gradient(
    below: jax.Array, maximum: jax.Array, lse: jax.Array, labels: jax.Array, softcap: float | None = None
) -> jax.Array:
    """Derivative of the summed cross-entropy by the logits, bfloat16 [C, V]; zero where a label is negative.

    Args:
      below: float16 [C, V], logits less `maximum` of their tile of columns; overwritten.
      maximum: float32 [tiles, C].
      lse: float32 [C], log-sum-exp of all logits of a row.
      labels: int32 [C].
      softcap: c, if the logits are c tanh(raw logits / c): the derivative is by the raw ones.
    """
    (rows, vocab), tile = below.shape, below.shape[1] // maximum.shape[0]
    block = pl.BlockSpec((_ROWS, tile), lambda i, j: (i, j))
    vector = pl.BlockSpec((_ROWS,), lambda i, j: (i,))
    return pl.pallas_call(
        functools.partial(_kernel, tile=tile, softcap=softcap),
        grid=(rows // _ROWS, vocab // tile),
        in_specs=[block, pl.BlockSpec((None, _ROWS), lambda i, j: (j, i)), vector, vector],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((rows, vocab), jnp.bfloat16),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret(),
        name="cross_entropy_gradient",
    )(lax.bitcast_convert_type(below, jnp.bfloat16), maximum, lse, labels)  # an alias needs one dtype


def _kernel(below_ref, maximum_ref, lse_ref, labels_ref, out_ref, *, tile: int, softcap: float | None):
    labels = labels_ref[...]
    below = lax.bitcast_convert_type(below_ref[...], jnp.float16).astype(jnp.float32)
    maximum = maximum_ref[...]
    weight = jnp.exp(below + (maximum - lse_ref[...])[:, None])
    column = pl.program_id(1) * tile + lax.broadcasted_iota(jnp.int32, below.shape, 1)
    weight -= jnp.where(column == labels[:, None], 1.0, 0.0)
    if softcap is not None:
        ratio = (below + maximum[:, None]) * (1 / softcap)
        weight *= 1 - ratio * ratio
    out_ref[...] = jnp.where((labels >= 0)[:, None], weight, 0.0).astype(out_ref.dtype)
