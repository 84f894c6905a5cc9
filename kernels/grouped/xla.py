"""The specification of `grouped_lora_matmul`: plain JAX that XLA compiles for any device.

Experts are taken one after the other: a weight is dequantised, used for all rows of its expert in blocks of rows, and
dropped. So the work is that of the rows there are (plus what the last block of each expert overhangs), and one dense
expert exists at a time. `jax.lax.ragged_dot` would be shorter, but outside TPUs XLA multiplies every row by every
expert.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lora_jax.kernels.nf4.format import NF4Layer, NF4Weight, dequantize, with_one_index

__all__ = ["Joined", "grouped_matmul", "grouped_outer", "in_stack", "row_ranges", "why_not"]

BLOCK_ROWS = 512
FEW_ROWS = 16  # of an expert on average, up to which the Triton kernels decode weights in the main loop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Joined:
    """Weights [E, N_i, K] that multiply the same rows, taken as one of [E, N_1 + N_2 + ..., K]."""

    weights: tuple[NF4Weight | NF4Layer, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of the one."""
        e, _, k = self.weights[0].shape
        return e, sum(w.shape[1] for w in self.weights), k


def row_ranges(group_sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First row of every expert and the row after its last one, int32 [E] each."""
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    return ends - group_sizes, ends


def in_stack(w: NF4Weight | NF4Layer) -> NF4Layer:
    """The first expert of w [E, N, K] in a stack of all experts [S, N, K], those of all layers if w is one of them."""
    if isinstance(w, NF4Weight):
        return NF4Layer(w, jnp.int32(0))
    w = with_one_index(w)
    # No copy: the leading axes become one.
    stack = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), w.stack)
    return NF4Layer(stack, w.index * w.shape[0])


def why_not(x: jax.Array, w: jax.Array | NF4Weight | NF4Layer | Joined) -> None:
    """There is nothing that the specification cannot do."""


def grouped_matmul(
    x: jax.Array,
    w: jax.Array | NF4Weight | NF4Layer | Joined,
    group_sizes: jax.Array,
    *,
    contract: int,
    thin: jax.Array | None = None,
    b: jax.Array | None = None,
) -> jax.Array:
    """x[rows of e] times w[e], contracting x's features with axis `contract` of w[e], plus thin[rows of e] b[e].

    Args:
      x: [M, C], rows sorted by expert; rows past the sum of group_sizes give zeros.
      w: stacked weights [E, D, C] (contract=1) or [E, C, D] (contract=0), an array, an NF4Weight, an NF4Layer or
        Joined.
      group_sizes: int32 [E].
      contract: axis of w[e] that is contracted.
      thin, b: [M, R] and [E, R, D] in the dtype of x, or None.

    Returns:
      [M, D] in the dtype of x; sums in float32.
    """
    out = jnp.zeros((x.shape[0], w.shape[2 - contract]), jnp.float32)
    if thin is not None and b is not None:
        out = _accumulate(out, thin, b, group_sizes, contract=0)
    return _accumulate(out, x, w, group_sizes, contract=contract).astype(x.dtype)


def _accumulate(out, x, w, group_sizes, *, contract: int):
    m = x.shape[0]
    block = min(BLOCK_ROWS, m)
    starts, ends = row_ranges(group_sizes)
    x = jnp.pad(x, ((0, block), (0, 0)))
    out = jnp.pad(out, ((0, block), (0, 0)))

    def expert(out, e_start_end):
        e, start, end = e_start_end
        dense = _dense(w, e, x.dtype)

        def rows(i, out):
            at = start + i * block
            part = jax.lax.dynamic_slice_in_dim(x, at, block)
            old = jax.lax.dynamic_slice_in_dim(out, at, block)
            new = jax.lax.dot_general(part, dense, (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32)
            inside = at + jnp.arange(block) < end
            return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(inside[:, None], old + new, old), at, 0)

        return jax.lax.fori_loop(0, -(-(end - start) // block), rows, out), None

    out, _ = jax.lax.scan(expert, out, (jnp.arange(w.shape[0]), starts, ends))
    return out[:m]


def grouped_outer(x: jax.Array, y: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """x[rows of e]^T times y[rows of e] for every expert: [M, C], [M, D] -> float32 [E, C, D]."""
    starts, ends = row_ranges(group_sizes)
    row = jnp.arange(x.shape[0])

    def expert(_, start_end):
        inside = ((row >= start_end[0]) & (row < start_end[1]))[:, None]
        mine = jnp.where(inside, x, 0), jnp.where(inside, y, 0)  # both: a row of no expert may hold a NaN
        return None, jax.lax.dot_general(*mine, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    return jax.lax.scan(expert, None, (starts, ends))[1]


def _dense(w: jax.Array | NF4Weight | NF4Layer | Joined, e: jax.Array, dtype) -> jax.Array:
    """Expert e of the stack in the dtype of the activations."""
    if isinstance(w, Joined):
        return jnp.concatenate([_dense(one, e, dtype) for one in w.weights])
    if not isinstance(w, NF4Weight | NF4Layer):
        return jax.lax.dynamic_index_in_dim(w, e, keepdims=False).astype(dtype)
    first = in_stack(w)
    # XLA moves unpacking out of a loop, for all experts at once; it does not move work across a barrier.
    return dequantize(jax.lax.optimization_barrier(NF4Layer(first.stack, first.index + e).cut()), dtype)
