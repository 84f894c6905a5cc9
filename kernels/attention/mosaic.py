"""Flash attention for Hopper in Pallas Mosaic GPU: forward kernel, and the list of what they can do.

Idea (FlashAttention-3): a block of 128 queries of one head belongs to two compute warpgroups of 64 rows, and a third
warpgroup keeps TMA copies of keys and values in flight. A compute warpgroup starts the scores of the next block of keys
before the product with the values of this one, so that its softmax runs beside its own matmul; the two take turns, so
that one's softmax also runs beside the other's matmuls. Blocks of keys are visited from the diagonal down: the first
one holds the mask, and every row has a real maximum from there on. Blocks that no query of the block sees are not
visited. One CTA per SM walks over tiles, longest first, there and back, so that all end together; it loads the next
queries while the last output is stored. Query heads of a group read the same key/value head; nothing is repeated.

Operations: 4 T^2 H / 2 per head; bytes: q, k, v, out once from memory (keys and values again from the L2 cache).

Measured once on an H100 80GB HBM3, bf16, 1 x 8192 causal, 32/8 heads of 128, cuDNN in the same run, TFLOP/s. Forward:
633 by kernel times, cuDNN 621; 569 by the wall clock of 12 calls in one program, cuDNN 561. Forward and backward: 545,
cuDNN 542; by the wall clock 491, cuDNN 482. The clocks differ by 11 % for both; the cause is not known. What is left:
the scores' accumulator is set to zero by instructions, since Mosaic has no wgmma that overwrites, and the sums of the
weights are reduced across lanes at every block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from lora_jax.kernels.dispatch import sm_count, why_not_hopper

__all__ = ["backward", "forward", "why_not"]

plgpu: Any = mosaic_gpu  # the types that it declares leave out half of it
LOG2E = 1.4426950408889634
ROWS = 64  # queries of a compute warpgroup
MASKED = -1e30  # finite: a row that sees nothing gets a mean of its values rather than NaN


def why_not(q, k, v, *, segment_start, query_offset, window, softcap, sinks) -> str | None:
    """The reason why these kernels cannot do this call, or None if they can."""
    del segment_start, window
    if (reason := why_not_hopper()) is not None:
        return reason
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must all be bfloat16 or all float16, got {q.dtype}, {k.dtype}, {v.dtype}"
    if not isinstance(query_offset, int) or query_offset != 0:
        return "query_offset is not supported"
    if softcap is not None:
        return "softcap is not supported"
    if sinks is not None:
        return "sinks are not supported"
    if q.shape[1] != k.shape[1]:
        return f"queries and keys must be of one length, got {q.shape[1]} and {k.shape[1]}"
    if q.shape[-1] not in (64, 128):
        return f"head_dim must be 64 or 128, got {q.shape[-1]}"
    if v.shape[-1] != q.shape[-1]:
        return f"keys and values must have one head_dim, got {q.shape[-1]} and {v.shape[-1]}"
    return None


def forward(q, k, v, segment_start, *, window, softcap, scale) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] in the dtype of q and the log-sum-exp of the scores, float32 [B, N, T].

    Raises:
      ValueError: softcap is given, or scale is not positive.
    """
    if softcap is not None or scale <= 0:
        raise ValueError(f"mosaic attention: softcap must be None and scale positive, got {softcap}, {scale}")
    length = q.shape[1]
    first = first_keys(segment_start, window, q.shape[0], length)
    out, lse = run_forward(*in_eights(q, k, v), first, scale)
    return out[:, :length], lse[:, :, :length]


def backward(q, k, v, out, lse, dout, segment_start, *, window, softcap, scale):
    """Gradients with respect to q, k and v, in their dtypes; two runs agree bitwise. See mosaic_bwd.py."""
    from lora_jax.kernels.attention import mosaic_bwd  # it imports this file

    del softcap
    length = q.shape[1]
    first = first_keys(segment_start, window, q.shape[0], length)
    q, k, v, out, dout = in_eights(q, k, v, out, dout)
    dq, dk, dv = mosaic_bwd.run_backward(q, k, v, out, lse, dout, first, scale)
    return dq[:, :length], dk[:, :length], dv[:, :length]


def in_eights(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays [B, T, ...] with T padded by zeros to a multiple of 8, which the tiles of shared memory ask of TMA.

    Zeros change nothing: no real query sees a key after it, and a query with dout 0 and delta 0 adds 0 to gradients.
    """
    return [jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) for x in arrays]


def padded(length: int) -> int:
    """Length of arrays with one number a query: whole blocks, so that TMA may copy them at any T."""
    return -(-length // (2 * ROWS)) * 2 * ROWS


def first_keys(segment_start, window: int | None, batch: int, length: int) -> jax.Array | None:
    """First key that each query sees, int32 [B, T padded]; None if that is key 0 for all."""
    if window is not None and window >= length:
        window = None
    if segment_start is None and window is None:
        return None
    positions = jnp.arange(length, dtype=jnp.int32)
    first = jnp.zeros((batch, length), jnp.int32) if segment_start is None else segment_start
    if window is not None:
        first = jnp.maximum(first, positions - window + 1)
    first = jnp.minimum(first, positions)  # a query sees itself, whatever it is told: no empty rows
    return jnp.pad(first, ((0, 0), (0, padded(length) - length)), mode="edge")


def smem(shape, dtype):
    """A shared-memory buffer in the layout that wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def snake(ctas: int, tiles: int):
    """(number of tiles of this CTA, function from its round to the tile): there and back over tiles by length."""
    cta = lax.axis_index("cta")
    rounds, rest = divmod(tiles, ctas)

    def tile(i):
        return i * ctas + jnp.where(i % 2 == 0, cta, ctas - 1 - cta)

    return rounds + (tile(jnp.int32(rounds)) < tiles).astype(jnp.int32) if rest else jnp.int32(rounds), tile


@functools.partial(jax.jit, static_argnames=("scale", "block_kv", "stages"))
def run_forward(q, k, v, first, scale, block_kv=None, stages=None):
    """(out, log-sum-exp [B, N, T padded])."""
    batch, length, heads, dim = q.shape
    group = heads // k.shape[2]
    block_q = 2 * ROWS
    block_kv = block_kv or 128
    stages = stages or {64: 4, 128: 2}[dim]
    q_blocks = -(-length // block_q)
    tiles = batch * heads * q_blocks
    ctas = min(sm_count(), tiles)
    c = scale * LOG2E
    limits = block_limits(first, block_q, block_kv)

    def attention_forward(q_ref, k_ref, v_ref, first_ref, limits_ref, out_ref, lse_ref, buffers, barriers):
        q_smem, o_smem, k_smem, v_smem, lse_smem = buffers
        q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = barriers
        wg = lax.axis_index("wg")
        n_tiles, tile_at = snake(ctas, tiles)

        def place(i):
            """(batch, head, first query, blocks of keys: from, mask needed below, to) of the i-th tile."""
            tile = tile_at(i)
            block = q_blocks - 1 - tile // (batch * heads)
            b, head = (tile % (batch * heads)) // heads, tile % heads
            stop = (block * block_q + block_q + block_kv - 1) // block_kv
            stop = jnp.minimum(stop, -(-length // block_kv))
            if first is None:
                return b, head, block * block_q, jnp.int32(0), jnp.int32(0), stop
            return b, head, block * block_q, limits_ref[b, 0, block], limits_ref[b, 1, block], stop

        @pl.when(wg == 2)
        def _memory():
            plgpu.set_max_registers(24, action="decrease")

            def one_tile(i, step):
                b, head, row, start, _, stop = place(i)
                kv_head = head // group

                @pl.when(i > 0)
                def _():
                    plgpu.barrier_wait(q_empty)

                for w in range(2):
                    source = q_ref.at[b, pl.ds(row + w * ROWS, ROWS), head]
                    plgpu.copy_gmem_to_smem(source, q_smem.at[w], q_full.at[w])

                def one_block(j, step):
                    slot = step % stages
                    rows = pl.ds((stop - 1 - j) * block_kv, block_kv)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(k_empty.at[slot])

                    plgpu.copy_gmem_to_smem(k_ref.at[b, rows, kv_head], k_smem.at[slot], k_full.at[slot])

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(v_empty.at[slot])

                    plgpu.copy_gmem_to_smem(v_ref.at[b, rows, kv_head], v_smem.at[slot], v_full.at[slot])
                    return step + 1

                return lax.fori_loop(0, stop - start, one_block, step)

            lax.fori_loop(0, n_tiles, one_tile, jnp.int32(0))

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            q_wg, o_wg, lse_wg = q_smem.at[wg], o_smem.at[wg], lse_smem.at[wg]

            @pl.when(wg == 1)
            def _():
                plgpu.barrier_arrive(turn.at[0])

            def tile_body(i, step, s_ref, o_ref):
                b, head, row, start, clear, stop = place(i)
                row = row + wg * ROWS
                first_row: Any = None
                if first is not None:
                    first_row = plgpu.load(
                        first_ref.at[b, pl.ds(row, ROWS)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
                    )

                def masked(s, block, causal, low):
                    if not causal and not low:
                        return s
                    key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
                    seen: Any = None
                    if causal:
                        query = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA)
                        seen = key + (block * block_kv - row) <= query
                    if low:
                        above = key + block * block_kv >= lax.broadcast_in_dim(first_row, s.shape, [0])
                        seen = above if seen is None else seen & above
                    return jnp.where(seen, s, MASKED)

                def scores(step):
                    """Starts the scores of a block; the wait for them is the caller's."""
                    slot = step % stages
                    s_ref[...] = zeros((ROWS, block_kv))
                    plgpu.barrier_wait(k_full.at[slot])
                    plgpu.wgmma(s_ref, q_wg, k_smem.at[slot].transpose((1, 0)))

                def softmax(s, top, total):
                    new = jnp.maximum(top, s.max(axis=1))
                    alpha = jnp.exp2((top - new) * c)
                    p = jnp.exp2(s * c - lax.broadcast_in_dim(new * c, s.shape, [0]))
                    return new, total * alpha + p.sum(axis=1), alpha, p

                plgpu.barrier_wait(q_full.at[wg])
                plgpu.barrier_wait(turn.at[wg])
                scores(step)
                plgpu.barrier_arrive(turn.at[1 - wg])
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=0)
                plgpu.barrier_arrive(k_empty.at[step % stages])
                s = masked(s, stop - 1, True, first is not None)
                top, total = row_vector(MASKED), row_vector(0.0)
                top, total, alpha, p = lax.optimization_barrier(softmax(s, top, total))
                plgpu.barrier_wait(turn.at[wg])
                p = p.astype(q.dtype)
                o_ref[...] = zeros((ROWS, dim))

                def one_block(j, carry, causal, low):
                    step, top, total, alpha, p = carry
                    scores(step + 1)
                    o = plgpu.wgmma_accumulator_load(o_ref, wait_n=None)
                    o_ref[...] = o * lax.broadcast_in_dim(alpha, o.shape, [0])
                    slot = step % stages
                    plgpu.barrier_wait(v_full.at[slot])
                    plgpu.wgmma(o_ref, p, v_smem.at[slot])
                    plgpu.barrier_arrive(turn.at[1 - wg])
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                    plgpu.barrier_arrive(k_empty.at[(step + 1) % stages])
                    s = masked(s, stop - 1 - j, causal, low)
                    # The wait for the turn is a loop: the assembler moves the softmax behind wgmma_wait without it.
                    top, total, alpha, weights = lax.optimization_barrier(softmax(s, top, total))
                    plgpu.barrier_wait(turn.at[wg])
                    plgpu.wgmma_wait(0)
                    p = weights.astype(q.dtype)  # into the registers of the last weights, now read
                    plgpu.barrier_arrive(v_empty.at[slot])
                    return step + 1, top, total, alpha, p

                carry = (step, top, total, alpha, p)
                # Blocks of keys go down from stop - 1, done above. Those that begin above the first query of the
                # tile hold part of the diagonal, those below `clear` a limit of segment or window.
                n_causal = jnp.minimum(stop - (row - wg * ROWS) // block_kv, stop - start)
                if block_kv % block_q:
                    body = functools.partial(one_block, causal=True, low=first is not None)
                    carry = lax.fori_loop(1, n_causal, body, carry)
                else:
                    n_causal = 1
                n_clear = jnp.maximum(stop - clear, n_causal)
                carry = lax.fori_loop(n_causal, n_clear, functools.partial(one_block, causal=False, low=False), carry)
                if first is not None:
                    carry = lax.fori_loop(
                        n_clear, stop - start, functools.partial(one_block, causal=False, low=True), carry
                    )
                step, top, total, alpha, p = carry
                plgpu.barrier_arrive(q_empty)
                slot = step % stages
                o = plgpu.wgmma_accumulator_load(o_ref, wait_n=None)
                o_ref[...] = o * lax.broadcast_in_dim(alpha, o.shape, [0])
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.wgmma(o_ref, p, v_smem.at[slot])
                plgpu.barrier_arrive(turn.at[1 - wg])
                o = o_ref[...]
                plgpu.barrier_arrive(v_empty.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's output has left its buffer
                o_wg[...] = (o * lax.broadcast_in_dim(1.0 / total, o.shape, [0])).astype(q.dtype)
                lse_wg[...] = top * scale + jnp.log(total)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o_wg, out_ref.at[b, pl.ds(row, ROWS), head])
                plgpu.copy_smem_to_gmem(lse_wg, lse_ref.at[b, head, pl.ds(row, ROWS)])
                return step + 1

            def one_tile(i, step):
                return pl.run_scoped(
                    functools.partial(tile_body, i, step),
                    plgpu.ACC((ROWS, block_kv), jnp.float32),
                    plgpu.ACC((ROWS, dim), jnp.float32),
                )

            lax.fori_loop(0, n_tiles, one_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    kv_buffer = smem((stages, block_kv, dim), q.dtype)
    return plgpu.kernel(
        attention_forward,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, padded(length)), jnp.float32),
        ),
        scratch_types=(
            (
                smem((2, ROWS, dim), q.dtype),
                smem((2, ROWS, dim), q.dtype),
                kv_buffer,
                kv_buffer,
                plgpu.SMEM((2, ROWS), jnp.float32),
            ),
            (
                plgpu.Barrier(num_barriers=2),
                plgpu.Barrier(num_arrivals=2),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_barriers=2),
            ),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
    )(q, k, v, first, limits)


def zeros(shape):
    """A float32 accumulator of zeros."""
    return plgpu.layout_cast(jnp.full(shape, 0.0, jnp.float32), plgpu.Layout.WGMMA)


def row_vector(value: float):
    """A number for each query of a warpgroup."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def block_limits(first, block_q: int, block_kv: int):
    """For each block of queries: block of keys where its keys begin, and from which on all see all: [B, 2, blocks]."""
    if first is None:
        return None
    blocks = first.reshape(first.shape[0], -1, block_q)
    return jnp.stack([blocks.min(-1) // block_kv, -(-blocks.max(-1) // block_kv)], axis=1).astype(np.int32)
