"""Backward of flash attention for Hopper in Pallas Mosaic GPU: a kernel for dk and dv and one for dq.

Idea: no atomics, so two runs agree bitwise. Both kernels make the weights P again from the log-sum-exp:

    P = exp(scale q k^T - lse),  dP = dout v^T,  dS = P (dP - delta),  delta = sum(out dout) over the head dim

The first owns 128 keys of a key/value head (64 a warpgroup, transposed scores), walks over the queries of all query
heads of the group from the diagonal on, and sums dv = P^T dout and dk = scale dS^T q in registers: grouped heads are
summed there. The second owns 128 queries of a head and sums dq = scale dS k over its keys. A third warpgroup of each
keeps TMA copies in flight; the next scores are started before the last product is awaited.

Operations: 7 matmuls where a kernel that adds dq into memory needs 5; that is the price of the fixed order.

Accuracy: dS is rounded to the dtype of q, as an operand of the tensor cores must be. xla.py on a CPU came closer to
float32 on rows above 512 tokens: there the error of dq is up to 1.5 times its error, that of dk up to 1.3 times.

Measured once on an H100 80GB HBM3, 1 x 8192, 32/8 heads of 128: dk and dv 1.48 ms (743 TFLOP/s of its 4 matmuls), dq
1.09 ms (754 of its 3), delta 0.05 ms; cuDNN 2.43 ms and 0.23 ms around it. Slower for dq: 128 keys a block (its matmuls
are serialised for want of registers), 3 stages (1.16 ms); no different: q as a register operand (1.10 ms).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from lora_jax.kernels.attention import mosaic
from lora_jax.kernels.attention.mosaic import LOG2E, MASKED, ROWS, padded, plgpu, smem, snake, zeros
from lora_jax.kernels.dispatch import sm_count

__all__ = ["run_backward"]


@functools.partial(jax.jit, static_argnames=("scale", "block_q", "block_kv", "stages_q", "stages_kv"))
def run_backward(q, k, v, out, lse, dout, first, scale, block_q=64, block_kv=None, stages_q=None, stages_kv=None):
    """(dq, dk, dv); lse [B, N, T or less], first [B, T padded] or None."""
    delta = jnp.einsum("btnh,btnh->bnt", out.astype(jnp.float32), dout.astype(jnp.float32))
    lse, delta = (
        jnp.pad(x, ((0, 0), (0, 0), (0, padded(q.shape[1]) - x.shape[2]))) for x in (lse * (-1 / scale), -delta)
    )
    dk, dv = run_dkv(q, k, v, lse, dout, delta, first, scale, block_q, stages_q)
    dq = run_dq(q, k, v, lse, dout, delta, first, scale, block_kv, stages_kv)
    return dq, dk, dv


def run_dkv(q, k, v, lse, dout, delta, first, scale, block_q, stages):
    """dk and dv [B, T, K, H]."""
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    block_kv = 2 * ROWS
    stages = stages or {64: 4, 128: 3}[dim]
    kv_blocks, q_blocks = -(-length // block_kv), -(-length // block_q)
    diagonal = block_kv // block_q  # blocks of queries that meet a block of keys on the diagonal
    tiles = batch * kv_heads * kv_blocks
    ctas = min(sm_count(), tiles)
    c = scale * LOG2E
    stops = None if first is None else query_stops(first, block_q, block_kv, kv_blocks)

    def attention_dkv(
        q_ref,
        k_ref,
        v_ref,
        lse_ref,
        do_ref,
        delta_ref,
        first_ref,
        stops_ref,
        dk_ref,
        dv_ref,
        buffers,
        barriers,
    ):
        k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, first_smem = buffers
        kv_full, kv_empty, q_full, q_empty, do_full, do_empty = barriers
        wg = lax.axis_index("wg")
        n_tiles, tile_at = snake(ctas, tiles)

        def place(i):
            """(batch, key/value head, first key, first and last + 1 block of queries) of the i-th tile."""
            tile = tile_at(i)
            block = tile // (batch * kv_heads)
            b, head = (tile % (batch * kv_heads)) // kv_heads, tile % kv_heads
            stop = jnp.int32(q_blocks) if first is None else stops_ref[b, block]
            return b, head, block * block_kv, block * diagonal, stop

        @pl.when(wg == 2)
        def _memory():
            plgpu.set_max_registers(24, action="decrease")

            def one_tile(i, step):
                b, head, row, start, stop = place(i)

                @pl.when(i > 0)
                def _():
                    plgpu.barrier_wait(kv_empty)

                for w in range(2):
                    rows = pl.ds(row + w * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(k_ref.at[b, rows, head], k_smem.at[w], kv_full.at[w])
                    plgpu.copy_gmem_to_smem(v_ref.at[b, rows, head], v_smem.at[w], kv_full.at[w])

                def one_block(j, step):
                    n = stop - start
                    slot = step % stages
                    q_head = head * group + j // n
                    rows = pl.ds((start + j % n) * block_q, block_q)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(q_empty.at[slot])

                    plgpu.copy_gmem_to_smem(q_ref.at[b, rows, q_head], q_smem.at[slot], q_full.at[slot])
                    plgpu.copy_gmem_to_smem(lse_ref.at[b, q_head, rows], lse_smem.at[slot], q_full.at[slot])
                    if first is not None:
                        plgpu.copy_gmem_to_smem(first_ref.at[b, rows], first_smem.at[slot], q_full.at[slot])

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(do_empty.at[slot])

                    plgpu.copy_gmem_to_smem(do_ref.at[b, rows, q_head], do_smem.at[slot], do_full.at[slot])
                    plgpu.copy_gmem_to_smem(delta_ref.at[b, q_head, rows], delta_smem.at[slot], do_full.at[slot])
                    return step + 1

                return lax.fori_loop(0, group * (stop - start), one_block, step)

            lax.fori_loop(0, n_tiles, one_tile, jnp.int32(0))

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            k_wg, v_wg = k_smem.at[wg], v_smem.at[wg]

            def tile_body(i, step, dk_acc, dv_acc, s_acc, dp_acc):
                b, head, row, start, stop = place(i)
                row = row + wg * ROWS
                dk_acc[...] = zeros((ROWS, dim))
                dv_acc[...] = zeros((ROWS, dim))
                plgpu.barrier_wait(kv_full.at[wg])
                begin = step

                def one_block(block, step, causal):
                    slot = step % stages
                    plgpu.barrier_wait(q_full.at[slot])
                    s_acc[...] = by_column(lse_smem.at[slot], block_q)
                    plgpu.wgmma(s_acc, k_wg, q_smem.at[slot].transpose((1, 0)))
                    plgpu.barrier_wait(do_full.at[slot])
                    dp_acc[...] = by_column(delta_smem.at[slot], block_q)
                    plgpu.wgmma(dp_acc, v_wg, do_smem.at[slot].transpose((1, 0)))
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)  # the last block's products have ended too

                    @pl.when(step > begin)
                    def _():
                        plgpu.barrier_arrive(q_empty.at[(step + stages - 1) % stages])
                        plgpu.barrier_arrive(do_empty.at[(step + stages - 1) % stages])

                    if causal or first is not None:
                        key = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA)
                        if causal:
                            query = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
                            s = jnp.where(key + (row - block * block_q) <= query, s, MASKED)
                        if first is not None:
                            low = plgpu.load(first_smem.at[slot], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                            s = jnp.where(key + row >= lax.broadcast_in_dim(low, s.shape, [1]), s, MASKED)
                    p = jnp.exp2(s * c)
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                    plgpu.wgmma(dv_acc, p.astype(q.dtype), do_smem.at[slot])
                    ds = p * dp
                    plgpu.wgmma(dk_acc, ds.astype(q.dtype), q_smem.at[slot])
                    plgpu.wgmma_wait(1)  # frees the registers of p: without it the matmuls are serialised
                    return step + 1

                def one_head(_, step):
                    middle = jnp.minimum(start + diagonal, stop)
                    step = lax.fori_loop(start, middle, functools.partial(one_block, causal=True), step)
                    return lax.fori_loop(middle, stop, functools.partial(one_block, causal=False), step)

                step = lax.fori_loop(0, group, one_head, step)
                dk, dv = dk_acc[...], dv_acc[...]
                plgpu.barrier_arrive(q_empty.at[(step + stages - 1) % stages])
                plgpu.barrier_arrive(do_empty.at[(step + stages - 1) % stages])
                k_wg[...] = (dk * scale).astype(q.dtype)
                v_wg[...] = dv.astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(k_wg, dk_ref.at[b, pl.ds(row, ROWS), head])
                plgpu.copy_smem_to_gmem(v_wg, dv_ref.at[b, pl.ds(row, ROWS), head])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(kv_empty)
                return step

            def one_tile(i, step):
                return pl.run_scoped(
                    functools.partial(tile_body, i, step),
                    plgpu.ACC((ROWS, dim), jnp.float32),
                    plgpu.ACC((ROWS, dim), jnp.float32),
                    plgpu.ACC((ROWS, block_q), jnp.float32),
                    plgpu.ACC((ROWS, block_q), jnp.float32),
                )

            lax.fori_loop(0, n_tiles, one_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    own = smem((2, ROWS, dim), q.dtype)
    stream = smem((stages, block_q, dim), q.dtype)
    vector = plgpu.SMEM((stages, block_q), jnp.float32)
    return plgpu.kernel(
        attention_dkv,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch_types=(
            (
                *(own, own, stream, stream, vector, vector),
                None if first is None else plgpu.SMEM((stages, block_q), jnp.int32),
            ),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=2),
                plgpu.Barrier(num_arrivals=2),
                plgpu.Barrier(num_arrivals=2 + (first is not None), num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            ),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
    )(q, k, v, lse, dout, delta, first, stops)


def run_dq(q, k, v, lse, dout, delta, first, scale, block_kv, stages):
    """dq [B, T, N, H]."""
    batch, length, heads, dim = q.shape
    group = heads // k.shape[2]
    block_q = 2 * ROWS
    block_kv = block_kv or 64
    stages = stages or {64: 3, 128: 2}[dim] * (128 // block_kv)
    q_blocks = -(-length // block_q)
    tiles = batch * heads * q_blocks
    ctas = min(sm_count(), tiles)
    c = scale * LOG2E
    limits = mosaic.block_limits(first, block_q, block_kv)

    def attention_dq(q_ref, k_ref, v_ref, lse_ref, do_ref, delta_ref, first_ref, limits_ref, dq_ref, buffers, barriers):
        q_smem, do_smem, k_smem, v_smem = buffers
        q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
        wg = lax.axis_index("wg")
        n_tiles, tile_at = snake(ctas, tiles)

        def place(i):
            """(batch, head, first query, blocks of keys: from, mask needed below, diagonal from, to) of a tile."""
            tile = tile_at(i)
            block = q_blocks - 1 - tile // (batch * heads)
            b, head, row = (tile % (batch * heads)) // heads, tile % heads, block * block_q
            stop = jnp.minimum((row + block_q + block_kv - 1) // block_kv, -(-length // block_kv))
            if first is None:
                return b, head, row, jnp.int32(0), jnp.int32(0), row // block_kv, stop
            return b, head, row, limits_ref[b, 0, block], limits_ref[b, 1, block], row // block_kv, stop

        @pl.when(wg == 2)
        def _memory():
            plgpu.set_max_registers(24, action="decrease")

            def one_tile(i, step):
                b, head, row, start, _, _, stop = place(i)
                kv_head = head // group

                @pl.when(i > 0)
                def _():
                    plgpu.barrier_wait(q_empty)

                for w in range(2):
                    rows = pl.ds(row + w * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(q_ref.at[b, rows, head], q_smem.at[w], q_full.at[w])
                    plgpu.copy_gmem_to_smem(do_ref.at[b, rows, head], do_smem.at[w], q_full.at[w])

                def one_block(j, step):
                    slot = step % stages
                    rows = pl.ds(j * block_kv, block_kv)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(k_empty.at[slot])

                    plgpu.copy_gmem_to_smem(k_ref.at[b, rows, kv_head], k_smem.at[slot], k_full.at[slot])

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(v_empty.at[slot])

                    plgpu.copy_gmem_to_smem(v_ref.at[b, rows, kv_head], v_smem.at[slot], v_full.at[slot])
                    return step + 1

                return lax.fori_loop(start, stop, one_block, step)

            lax.fori_loop(0, n_tiles, one_tile, jnp.int32(0))

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            q_wg, do_wg = q_smem.at[wg], do_smem.at[wg]

            def tile_body(i, step, dq_acc, s_acc, dp_acc):
                b, head, row, start, clear, causal_from, stop = place(i)
                row = row + wg * ROWS
                rows = pl.ds(row, ROWS)
                layout = plgpu.Layout.WGMMA.reduce(1)
                lse = plgpu.load(lse_ref.at[b, head, rows], layout=layout, optimized=False)
                delta = plgpu.load(delta_ref.at[b, head, rows], layout=layout, optimized=False)
                if first is not None:
                    low = plgpu.load(first_ref.at[b, rows], layout=layout, optimized=False)
                dq_acc[...] = zeros((ROWS, dim))
                plgpu.barrier_wait(q_full.at[wg])
                begin = step

                def one_block(block, step, causal, masked):
                    slot = step % stages
                    s_acc[...] = by_row(lse, block_kv)
                    plgpu.barrier_wait(k_full.at[slot])
                    plgpu.wgmma(s_acc, q_wg, k_smem.at[slot].transpose((1, 0)))
                    dp_acc[...] = by_row(delta, block_kv)
                    plgpu.barrier_wait(v_full.at[slot])
                    plgpu.wgmma(dp_acc, do_wg, v_smem.at[slot].transpose((1, 0)))
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)  # the last block's product has ended too

                    @pl.when(step > begin)
                    def _():
                        plgpu.barrier_arrive(k_empty.at[(step + stages - 1) % stages])

                    if causal or masked:
                        key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
                        if causal:
                            query = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA)
                            s = jnp.where(key + (block * block_kv - row) <= query, s, MASKED)
                        if masked:
                            s = jnp.where(key + block * block_kv >= lax.broadcast_in_dim(low, s.shape, [0]), s, MASKED)
                    p = jnp.exp2(s * c)
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                    plgpu.barrier_arrive(v_empty.at[slot])
                    ds = p * dp
                    plgpu.wgmma(dq_acc, ds.astype(q.dtype), k_smem.at[slot])
                    return step + 1

                packed = first is not None
                if packed:
                    middle = jnp.minimum(jnp.maximum(clear, start), causal_from)
                    body = functools.partial(one_block, causal=False, masked=True)
                    step = lax.fori_loop(start, middle, body, step)
                else:
                    middle = start
                body = functools.partial(one_block, causal=False, masked=False)
                step = lax.fori_loop(middle, causal_from, body, step)
                body = functools.partial(one_block, causal=True, masked=packed)
                step = lax.fori_loop(jnp.maximum(causal_from, start), stop, body, step)
                dq = dq_acc[...]
                plgpu.barrier_arrive(k_empty.at[(step + stages - 1) % stages])
                q_wg[...] = (dq * scale).astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_wg, dq_ref.at[b, rows, head])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_empty)
                return step

            def one_tile(i, step):
                return pl.run_scoped(
                    functools.partial(tile_body, i, step),
                    plgpu.ACC((ROWS, dim), jnp.float32),
                    plgpu.ACC((ROWS, block_kv), jnp.float32),
                    plgpu.ACC((ROWS, block_kv), jnp.float32),
                )

            lax.fori_loop(0, n_tiles, one_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    own = smem((2, ROWS, dim), q.dtype)
    stream = smem((stages, block_kv, dim), q.dtype)
    return plgpu.kernel(
        attention_dq,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(
            (own, own, stream, stream),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=2),
                plgpu.Barrier(num_arrivals=2),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            ),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
    )(q, k, v, lse, dout, delta, first, limits)


def by_column(ref, columns: int):
    """The accumulator of a product that begins with a number for each column, from shared memory."""
    vector = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (ROWS, columns), [1]), plgpu.Layout.WGMMA)


def by_row(vector, columns: int):
    """The accumulator of a product that begins with a number for each row."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (ROWS, columns), [0]), plgpu.Layout.WGMMA)


def query_stops(first, block_q: int, block_kv: int, kv_blocks: int):
    """For each block of keys, 1 + the last block of queries that sees it or one before: int32 [B, blocks]."""
    lowest = first.reshape(first.shape[0], -1, block_q).min(-1) // block_kv  # [B, blocks of queries]
    sees = lowest[:, None, :] <= jnp.arange(kv_blocks)[:, None]
    number = jnp.arange(1, lowest.shape[1] + 1, dtype=jnp.int32)
    return jnp.where(sees, number, 0).max(-1)
