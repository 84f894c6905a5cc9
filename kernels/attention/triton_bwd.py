"""Flash attention backward in Pallas-Triton: one kernel for dk and dv, one for dq, both deterministic.

Idea: the weights are computed again from q, k and the saved log-sum-exp (FlashAttention-2). The first kernel holds a
block of keys of one key head and walks over the queries that see it, of all query heads of the group, so that dk and
dv are sums inside one program; it works on the transposed scores, which leaves the weights in registers as the first
operand of both products. The second one holds a block of queries and walks over keys as in forward. No atomics: every
output is written once, by one program, in one order.

Operations: 7 products of T S H (5 if dq could be added up across programs, which costs atomics and their random
order), halved by causality. Blocks are skipped and masked as in forward.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lora_jax.kernels.attention.triton import (
    LOG2E,
    Config,
    block_ranges,
    capped,
    choose,
    dot,
    dot_parts,
    exp2,
    for_blocks,
    load_rows,
    load_vector,
    parts,
    sees,
    store_rows,
    visible_keys,
)
from lora_jax.kernels.dispatch import interpret

__all__ = ["backward"]

# As triton.FORWARD.
KEYS = (
    (90, 128, Config(64, 128, 8, 3)),
    (90, 192, Config(64, 128, 8, 2)),
    (90, 256, Config(32, 64, 4, 3)),
    (86, 64, Config(32, 64, 4, 2)),
    (86, 128, Config(32, 64, 4, 1)),
    (86, 256, Config(16, 32, 4, 1)),
    (80, 64, Config(64, 64, 4, 2)),
    (80, 128, Config(32, 128, 8, 2)),
    (80, 256, Config(32, 32, 4, 1)),
)
VALUES = (  # dv alone
    (90, 256, Config(64, 64, 4, 3)),
    (86, 256, Config(16, 32, 4, 1)),
    (80, 256, Config(32, 32, 4, 1)),
)
QUERIES = (
    (90, 64, Config(128, 64, 8, 3)),
    (90, 128, Config(128, 32, 8, 3)),
    (90, 192, Config(128, 32, 8, 3)),
    (90, 256, Config(128, 32, 8, 3)),
    (86, 64, Config(64, 32, 4, 2)),
    (86, 128, Config(64, 32, 4, 1)),
    (86, 256, Config(32, 16, 4, 1)),
    (80, 64, Config(64, 64, 4, 2)),
    (80, 128, Config(128, 32, 8, 2)),
    (80, 256, Config(32, 32, 4, 1)),
)


# Most dimensions of k and v together whose gradients fit in the registers; above, dk and dv have a kernel each.
TOGETHER = 320


def _keys_kernel(*refs, config, scale, softcap, lower, group, want):
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, lo_ref, hi_ref, ranges_ref, *out_refs = refs
    block_q, block_k = config.block_q, config.block_k
    length, keys = q_ref.shape[0], k_ref.shape[0]
    k_limit = keys if keys % block_k else None
    start_k = pl.program_id(1) * block_k
    k = load_rows(k_ref, start_k, block_k, k_limit)
    v = load_rows(v_ref, start_k, block_k, k_limit)

    def step(masked, block, head, sums):
        sums = dict(zip(want, sums, strict=True))
        start = block * block_q
        limit = length if masked and length % block_q else None
        q = load_rows(q_ref, start, block_q, limit, head)
        dout = load_rows(dout_ref, start, block_q, limit, head)
        lse = load_vector(lse_ref, start, block_q, limit, head)
        delta = load_vector(delta_ref, start, block_q, limit, head)
        # Both products first: the second runs on the tensor cores beside the exponentials of the first.
        s = dot_parts(k, q)  # [block_k, block_q]
        dp = dot_parts(v, dout) if "dk" in want else 0.0
        s, factor = capped(s, scale, softcap)
        p = exp2(s, factor, -lse[None, :])
        if masked:
            lo = lo_ref[pl.ds(start, block_q)] if lower else None
            p = jnp.where(sees(start_k, block_k, lo, hi_ref[pl.ds(start, block_q)], 0), p, 0.0)
        if "dv" in want:
            sums["dv"] = _add_products(sums["dv"], p, dout)
        if "dk" in want:
            ds = p * (dp - delta[None, :])
            sums["dk"] = _add_products(sums["dk"], ds if softcap is None else ds * (1 - s * s), q)
        return tuple(sums[name] for name in want)

    zeros = [tuple(jnp.zeros((block_k, size), jnp.float32) for _, size in parts(ref.shape[-1])) for ref in out_refs]
    sums = for_blocks(ranges_ref, step, tuple(zeros), repeat=group)
    for name, ref, tiles in zip(want, out_refs, sums, strict=True):
        store_rows(ref, start_k, [x * scale for x in tiles] if name == "dk" else tiles, k_limit)


def _add_products(sums, weights, tiles):
    """sums + weights tiles, part by part; weights are rounded to the tiles' dtype."""
    return tuple(total + dot(weights.astype(x.dtype), x) for total, x in zip(sums, tiles, strict=True))


def _queries_kernel(*refs, config, scale, softcap, lower):
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, lo_ref, hi_ref, ranges_ref, dq_ref = refs
    block_q, block_k = config.block_q, config.block_k
    length, keys = q_ref.shape[0], k_ref.shape[0]
    q_limit = length if length % block_q else None
    start_q = (pl.num_programs(1) - 1 - pl.program_id(1)) * block_q
    q = load_rows(q_ref, start_q, block_q, q_limit)
    dout = load_rows(dout_ref, start_q, block_q, q_limit)
    lse = load_vector(lse_ref, start_q, block_q, q_limit)
    delta = load_vector(delta_ref, start_q, block_q, q_limit)

    def step(masked, block, _, dq):
        start = block * block_k
        limit = keys if masked and keys % block_k else None
        k = load_rows(k_ref, start, block_k, limit)
        s, dp = dot_parts(q, k), dot_parts(dout, load_rows(v_ref, start, block_k, limit))
        s, factor = capped(s, scale, softcap)
        p = exp2(s, factor, -lse[:, None])
        if masked:
            lo = lo_ref[pl.ds(start_q, block_q)] if lower else None
            p = jnp.where(sees(start, block_k, lo, hi_ref[pl.ds(start_q, block_q)], 1), p, 0.0)
        ds = p * (dp - delta[:, None])
        if softcap is not None:
            ds = ds * (1 - s * s)
        return _add_products(dq, ds, k)

    dq = tuple(jnp.zeros((block_q, size), jnp.float32) for _, size in parts(q_ref.shape[-1]))
    dq = for_blocks(ranges_ref, step, dq)
    store_rows(dq_ref, start_q, [x * scale for x in dq], q_limit)


def _keys_gradient(q, k, v, dout, lse, delta, lo, hi, config, want=("dk", "dv"), **options):
    """Those of dk, dv that are wanted; lse in units of log2, lo and hi [B or 1, T]."""
    (batch, length, heads, dim), (_, keys, kv_heads, value_dim) = q.shape, v.shape
    group = heads // kv_heads
    lo, hi, _, ranges = block_ranges(lo, hi, keys, config)
    row = (lambda b: b) if lo.shape[0] == batch else (lambda b: 0)
    grouped = [pl.BlockSpec((None, length, group, d), lambda n, i, b: (b, 0, n, 0)) for d in (dim, value_dim)]
    single = [pl.BlockSpec((None, keys, None, d), lambda n, i, b: (b, 0, n, 0)) for d in (dim, value_dim)]
    statistic = pl.BlockSpec((None, group, length), lambda n, i, b: (b, n, 0))
    bounds = pl.BlockSpec((None, lo.shape[1]), lambda n, i, b: (row(b), 0))
    return pl.pallas_call(
        functools.partial(_keys_kernel, config=config, group=group, want=want, **options),
        # The first keys are seen by the most queries: the longest programs start first.
        grid=(kv_heads, ranges.shape[1], batch),
        in_specs=[
            grouped[0],
            *single,
            grouped[1],
            statistic,
            statistic,
            bounds,
            bounds,
            pl.BlockSpec((None, None, 4), lambda n, i, b: (row(b), i, 0)),
        ],
        out_specs=[{"dk": single[0], "dv": single[1]}[name] for name in want],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in ({"dk": k, "dv": v}[name] for name in want)],
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret(),
        name="flash_attention_dkv",
    )(q, k, v, dout, lse, delta, *map(jnp.asarray, (lo, hi, ranges)))


def _queries_gradient(q, k, v, dout, lse, delta, lo, hi, config, **options):
    """dq; lse in units of log2, lo and hi [B or 1, T]."""
    (batch, length, heads, dim), (_, keys, kv_heads, value_dim) = q.shape, v.shape
    group = heads // kv_heads
    lo, hi, ranges, _ = block_ranges(lo, hi, keys, config)
    blocks = ranges.shape[1]
    row = (lambda b: b) if lo.shape[0] == batch else (lambda b: 0)
    of_q = [pl.BlockSpec((None, length, None, d), lambda n, i, b: (b, 0, n, 0)) for d in (dim, value_dim)]
    of_k = [pl.BlockSpec((None, keys, None, d), lambda n, i, b: (b, 0, n // group, 0)) for d in (dim, value_dim)]
    statistic = pl.BlockSpec((None, None, length), lambda n, i, b: (b, n, 0))
    bounds = pl.BlockSpec((None, lo.shape[1]), lambda n, i, b: (row(b), 0))
    return pl.pallas_call(
        functools.partial(_queries_kernel, config=config, **options),
        grid=(heads, blocks, batch),
        in_specs=[
            of_q[0],
            *of_k,
            of_q[1],
            statistic,
            statistic,
            bounds,
            bounds,
            pl.BlockSpec((None, None, 4), lambda n, i, b: (row(b), blocks - 1 - i, 0)),
        ],
        out_specs=of_q[0],
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret(),
        name="flash_attention_dq",
    )(q, k, v, dout, lse, delta, *map(jnp.asarray, (lo, hi, ranges)))


def backward(
    q, k, v, out, lse, dout, segment_start, *, window, softcap, scale, sinks, query_offset, configs=(None, None)
):
    """Gradients of `triton.forward`.

    Args:
      q, k, v, segment_start, window, softcap, scale, sinks, query_offset: as given to forward.
      out: [B, T, N, Hv], forward's.
      lse: float32 [B, N, T], forward's.
      dout: [B, T, N, Hv], the gradient of out.
      configs: block sizes of the dk, dv kernel and of the dq kernel; None for those of the tables.

    Returns:
      (dq, dk, dv), and dsinks if sinks are given, in the dtypes of q, k, v and sinks.
    """
    dim = max(q.shape[-1], v.shape[-1])
    dout = dout.astype(q.dtype)
    delta = jnp.einsum("btnh,btnh->bnt", out, dout, preferred_element_type=jnp.float32)
    lo, hi = visible_keys(q.shape[0], q.shape[1], k.shape[1], segment_start, query_offset, window)
    lower = segment_start is not None or window is not None
    options = dict(scale=scale, softcap=softcap, lower=lower)
    args = (q, k, v, dout, lse * LOG2E, delta, lo, hi)  # kernels take powers of 2
    of_keys, of_values = (configs[0] or choose(table, dim, q.dtype) for table in (KEYS, VALUES))
    if q.shape[-1] + v.shape[-1] <= TOGETHER:
        dk, dv = _keys_gradient(*args, of_keys, want=("dk", "dv"), **options)
    else:
        (dk,) = _keys_gradient(*args, of_keys, want=("dk",), **options)
        (dv,) = _keys_gradient(*args, of_values, want=("dv",), **options)
    dq = _queries_gradient(*args, configs[1] or choose(QUERIES, dim, q.dtype), **options)
    if sinks is None:
        return dq, dk, dv
    weight = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse)
    return dq, dk, dv, -(weight * delta).sum((0, 2)).astype(sinks.dtype)
