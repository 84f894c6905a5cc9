"""Flash attention forward on tensor cores, in Pallas-Triton: the implementation for every NVIDIA GPU from Ampere on.

Idea: one program holds a block of queries of one head and walks over the blocks of keys that it sees, keeping the
running maximum and sum of an online softmax (FlashAttention-2). What a query sees is the interval of keys [lo, hi]:
causality, a cache's offset, packed documents, windows and ragged ends are all in these two numbers, which XLA computes
with one pass over the rows. From them come four block numbers per program (`ranges`): blocks nobody sees are never
visited, blocks that every query of the program sees wholly run without a mask, the few others with one.

Operations: 4 T S H multiply-adds' worth of FLOPs a head, halved by causality; bytes: q, k, v and out once, keys again
from the L2 cache. The limit is the tensor cores, then the exponentials (one a score; softcap adds a tanh).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lora_jax.kernels.dispatch import interpret

__all__ = ["Config", "forward", "why_not"]

LOG2E = math.log2(math.e)
# Running maximum of a row that has seen nothing: finite, so that no difference of infinities arises.
NOTHING = -1e30


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes and compiler options of one kernel."""

    block_q: int  # queries in a tile: a power of two, at least 16
    block_k: int  # keys in a tile: a power of two, at least 16
    num_warps: int  # a multiple of 4 for Hopper's wgmma
    num_stages: int  # depth of the software pipeline: tiles in shared memory at once


# (least compute capability, most head_dim, config): the first line that fits. Tiles of sm_86 and sm_89 fit 100 KB of
# shared memory, those of sm_80 164 KB, those of sm_90 228 KB.
FORWARD = (
    (90, 64, Config(128, 128, 8, 3)),
    (90, 128, Config(128, 64, 8, 3)),
    (90, 192, Config(128, 64, 8, 2)),
    (90, 256, Config(128, 64, 8, 2)),
    (86, 64, Config(128, 64, 4, 3)),
    (86, 128, Config(128, 32, 8, 3)),
    (86, 256, Config(64, 32, 8, 2)),
    (80, 64, Config(128, 64, 4, 3)),
    (80, 128, Config(128, 64, 8, 3)),
    (80, 256, Config(64, 64, 8, 2)),
)


def why_not(q, k, v, *, segment_start=None, query_offset=0, window=None, softcap=None, scale=None, sinks=None):
    """The reason why the kernels cannot do this call (its arguments are those of `forward`), or None if they can."""
    del segment_start, query_offset, window, sinks
    dtypes = {q.dtype, k.dtype, v.dtype}
    if len(dtypes) > 1 or q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"q, k and v must all be bfloat16, float16 or float32, got {q.dtype}, {k.dtype}, {v.dtype}"
    for name, dim in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
        if dim % 16 or not 16 <= dim <= 256:
            return f"head_dim must be a multiple of 16 and at most 256, got {dim} of {name}"
    if scale is not None and scale <= 0:
        return f"scale must be positive, got {scale}"
    if softcap is not None and softcap <= 0:
        return f"softcap must be positive, got {softcap}"
    return None


def choose(table, dim: int, dtype) -> Config:
    """The line of a table of configurations for the device at hand."""
    if interpret():
        return Config(16, 16, 4, 1)
    if dtype == jnp.float32:  # for tests: no tensor core multiplies it whole
        return Config(32, 32, 4, 1)
    capability = plgpu.get_gpu_info().compute_capability
    if capability >= 120:  # consumer Blackwell: 100 KB of shared memory and no wgmma, as Ada
        capability = 89
    fitting = [config for least, most, config in table if capability >= least and dim <= most]
    if not fitting:
        raise NotImplementedError(f"flash_attention: implementation='triton' needs sm_80 or newer, got sm_{capability}")
    return fitting[0]


def visible_keys(batch, length, keys, segment_start, query_offset, window):
    """First and last key of each query, int32 [B or 1, T]; lo > hi if it sees none. numpy if known at trace time."""
    static = segment_start is None and isinstance(query_offset, int)
    xp = np if static else jnp
    position = xp.arange(length, dtype=np.int32)[None] + query_offset
    hi = xp.clip(position, -1, keys - 1)
    lo = xp.zeros((1, length), np.int32) if segment_start is None else segment_start.astype(np.int32)
    if window is not None:
        lo = xp.maximum(lo, position - window + 1)
    if not static:
        lo, hi = jnp.broadcast_to(lo, (batch, length)), jnp.broadcast_to(hi, (batch, length))
    return xp.maximum(lo, 0).astype(np.int32), hi.astype(np.int32)


def block_ranges(lo, hi, keys, config: Config):
    """Block numbers from the keys each query sees.

    Returns:
      lo, hi: padded to whole blocks with queries that see nothing.
      of_queries: int32 [B or 1, query blocks, 4], (begin, full_begin, full_end, end): the program of a query block
        visits key blocks begin to end, those from full_begin to full_end without a mask.
      of_keys: the same for key blocks, [B or 1, key blocks, 4].
    """
    xp = np if isinstance(lo, np.ndarray) else jnp
    padding = ((0, 0), (0, -lo.shape[1] % config.block_q))
    lo = xp.pad(lo, padding, constant_values=keys)
    hi = xp.pad(hi, padding, constant_values=-1)
    low, high = (x.reshape(x.shape[0], -1, config.block_q) for x in (lo, hi))
    bounds = low.min(-1), low.max(-1), high.min(-1), high.max(-1)
    return lo, hi, _key_blocks(xp, *bounds, config.block_k), _query_blocks(xp, *bounds, keys, config.block_k)


def _key_blocks(xp, low_min, low_max, high_min, high_max, block_k):
    """(begin, full_begin, full_end, end) of every query block, from the extremes of its lo and hi."""
    end = (high_max + block_k) // block_k
    begin = xp.minimum(low_min // block_k, end)
    full_begin = xp.clip((low_max + block_k - 1) // block_k, begin, end)
    full_end = xp.clip((high_min + 1) // block_k, full_begin, end)
    return xp.stack([begin, full_begin, full_end, end], axis=-1).astype(np.int32)


def _query_blocks(xp, low_min, low_max, high_min, high_max, keys, block_k):
    """The same of every key block: queries are in no order in general, so every pair of blocks is looked at."""
    first = xp.arange(0, keys, block_k, dtype=np.int32)[:, None]
    last = first + block_k - 1
    low_min, low_max, high_min, high_max = (x[:, None] for x in (low_min, low_max, high_min, high_max))
    visible = (low_min <= last) & (high_max >= first)
    full = (low_max <= first) & (high_min >= last)
    n = visible.shape[-1]
    index = xp.arange(n, dtype=np.int32)
    end = xp.where(visible, index + 1, 0).max(-1)
    begin = xp.minimum(xp.where(visible, index, n).min(-1), end)
    full_begin = xp.minimum(xp.where(full, index, n).min(-1), end)  # of the first run of full blocks
    after = xp.where(~full & (index >= full_begin[..., None]), index, n).min(-1)
    return xp.stack([begin, full_begin, xp.minimum(after, end), end], axis=-1).astype(np.int32)


def parts(dim: int) -> list[tuple[int, int]]:
    """(start, size) of the powers of two that a head dimension is made of: 192 = 128 + 64."""
    sizes = [1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1]
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def load_rows(ref, start, rows: int, limit: int | None, *index):
    """Tiles [rows, part] of ref [rows, *index, H] from row `start`, one a part of H; zeros from row `limit` on."""
    mask = None if limit is None else (start + jnp.arange(rows) < limit)[:, None]
    other = None if limit is None else 0.0
    return [
        plgpu.load(ref.at[(pl.ds(start, rows), *index, pl.ds(at, size))], mask=mask, other=other)
        for at, size in parts(ref.shape[-1])
    ]


def load_vector(ref, start, rows: int, limit: int | None, *index):
    """ref[*index, start : start + rows], zeros from `limit` on."""
    mask = None if limit is None else start + jnp.arange(rows) < limit
    other = None if limit is None else 0.0
    return plgpu.load(ref.at[(*index, pl.ds(start, rows))], mask=mask, other=other)


def store_rows(ref, start, tiles, limit: int | None):
    """Writes tiles [rows, part] to rows `start` and on of ref [rows, H]."""
    rows = tiles[0].shape[0]
    mask = None if limit is None else (start + jnp.arange(rows) < limit)[:, None]
    for (at, size), tile in zip(parts(ref.shape[-1]), tiles, strict=True):
        whole = None if mask is None else jnp.broadcast_to(mask, tile.shape)
        plgpu.store(ref.at[pl.ds(start, rows), pl.ds(at, size)], tile.astype(ref.dtype), mask=whole)


def dot(x, y):
    """x y in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)


def dot_parts(xs, ys):
    """Sum over the parts of the head dimension of x y^T."""
    return functools.reduce(jnp.add, (dot(x, y.T) for x, y in zip(xs, ys, strict=True)))


def exp2(x, factor: jax.typing.ArrayLike = 1.0, offset: jax.typing.ArrayLike = 0.0):
    """2^(factor x + offset) in float32; offset broadcasts to x.

    On a GPU a multiply-add and one approximate power (relative error 2^-22, zero for results below 2^-126): the
    compiler fuses neither by itself, and libdevice's exp2 spends instructions on denormal results.
    """
    if interpret():
        return jnp.exp2(x * factor + offset)
    factor, offset = (jnp.broadcast_to(jnp.asarray(y, jnp.float32), x.shape) for y in (factor, offset))
    [y] = plgpu.elementwise_inline_asm(
        "{ .reg .f32 t; fma.rn.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t; }",
        args=[x, factor, offset],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct.like(x)],
    )
    return y


def tanh(x):
    """tanh of float32, in one instruction on a GPU: relative error 2^-11, a quarter of a bfloat16 rounding."""
    return jnp.tanh(x) if interpret() else plgpu.approx_tanh(x)


def capped(products, scale: float, softcap: float | None):
    """(s, factor): factor * s are the scores in units of log2, for products q k^T."""
    if softcap is None:
        return products, scale * LOG2E
    return tanh(products * (scale / softcap)), softcap * LOG2E


def sees(start, size: int, lo, hi, axis: int):
    """Mask of scores: keys `start` to start + size along `axis`, queries that see [lo, hi] along the other."""
    keys = jnp.expand_dims(start + jnp.arange(size, dtype=jnp.int32), 1 - axis)
    mask = keys <= jnp.expand_dims(hi, axis)
    return mask if lo is None else mask & (keys >= jnp.expand_dims(lo, axis))


def for_blocks(ranges_ref, step, carry, repeat: int = 1):
    """Runs step(masked, block, which, carry) for all blocks of a program, `which` from 0 to repeat for each of them."""
    begin, full_begin, full_end, end = (ranges_ref[i] for i in range(4))
    left = full_begin - begin

    def split(index):
        return jax.lax.div(index, repeat), jax.lax.rem(index, repeat)

    def edge(index, carry):
        block, which = split(index)
        block = jnp.where(block < left, begin + block, full_end + block - left)
        return step(True, block, which, carry)

    def inner(index, carry):
        block, which = split(index)
        return step(False, full_begin + block, which, carry)

    carry = jax.lax.fori_loop(0, (full_end - full_begin) * repeat, inner, carry)
    return jax.lax.fori_loop(0, (left + end - full_end) * repeat, edge, carry)


def _kernel(q_ref, k_ref, v_ref, lo_ref, hi_ref, ranges_ref, *refs, config, scale, softcap, lower):
    sinks_ref, out_ref, lse_ref = refs if len(refs) == 3 else (None, *refs)
    block_q, block_k = config.block_q, config.block_k
    length, keys = q_ref.shape[0], k_ref.shape[0]
    q_limit = length if length % block_q else None
    k_limit = keys if keys % block_k else None
    start_q = (pl.num_programs(1) - 1 - pl.program_id(1)) * block_q
    q = load_rows(q_ref, start_q, block_q, q_limit)

    def step(masked, block, _, carry):
        m, total, acc = carry
        start = block * block_k
        limit = k_limit if masked else None
        s, factor = capped(dot_parts(q, load_rows(k_ref, start, block_k, limit)), scale, softcap)
        if masked:
            lo = lo_ref[pl.ds(start_q, block_q)] if lower else None
            s = jnp.where(sees(start, block_k, lo, hi_ref[pl.ds(start_q, block_q)], 1), s, -jnp.inf)
        m_new = jnp.maximum(m, s.max(axis=1) * factor)
        p = exp2(s, factor, -m_new[:, None])
        alpha = exp2(m - m_new)
        total = total * alpha + p.sum(axis=1)
        v = load_rows(v_ref, start, block_k, limit)
        acc = tuple(a * alpha[:, None] + dot(p.astype(v_ref.dtype), x) for a, x in zip(acc, v, strict=True))
        return m_new, total, acc

    acc = tuple(jnp.zeros((block_q, size), jnp.float32) for _, size in parts(v_ref.shape[-1]))
    if sinks_ref is None:
        m, total = jnp.full((block_q,), NOTHING, jnp.float32), jnp.zeros((block_q,), jnp.float32)
    else:  # the sink is one more logit, without a value
        m = jnp.zeros((block_q,), jnp.float32) + sinks_ref[0] * LOG2E
        total = jnp.ones((block_q,), jnp.float32)
    m, total, acc = for_blocks(ranges_ref, step, (m, total, acc))
    inverse = 1 / jnp.where(total == 0, 1.0, total)
    store_rows(out_ref, start_q, [a * inverse[:, None] for a in acc], q_limit)
    lse = jnp.where(total == 0, -jnp.inf, (m + jnp.log2(total)) * (1 / LOG2E))
    mask = None if q_limit is None else start_q + jnp.arange(block_q) < q_limit
    plgpu.store(lse_ref.at[pl.ds(start_q, block_q)], lse, mask=mask)


def forward(q, k, v, segment_start, query_offset, *, window, softcap, scale, sinks, config: Config | None = None):
    """Attention and its log-sum-exp.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H]; query head n reads key head n // (N / K).
      v: [B, S, K, Hv].
      segment_start: int32 [B, T] or None, the first key each query may see.
      query_offset: int or int32 scalar, position of the first query among the keys.
      window: number of keys a query sees, itself included, or None.
      softcap: c in c tanh(scores / c), or None.
      scale: factor of the scores, positive.
      sinks: [N], one more logit in the denominator of each head, or None.
      config: block sizes; None for those of the table.

    Returns:
      out [B, T, N, Hv] in the dtype of q, zeros for a query that sees nothing; lse float32 [B, N, T], natural
      logarithm, the sink included, -inf for a query that sees nothing.
    """
    (batch, length, heads, dim), (_, keys, kv_heads, value_dim) = q.shape, v.shape
    config = config or choose(FORWARD, max(dim, value_dim), q.dtype)
    group = heads // kv_heads
    lo, hi = visible_keys(batch, length, keys, segment_start, query_offset, window)
    lo, hi, ranges, _ = block_ranges(lo, hi, keys, config)
    blocks = ranges.shape[1]
    row = (lambda b: b) if lo.shape[0] == batch else (lambda b: 0)
    # Programs are started in the order of the grid: the heads of the last, longest block first.
    head = pl.BlockSpec((None, length, None, dim), lambda n, i, b: (b, 0, n, 0))
    vector = pl.BlockSpec((None, lo.shape[1]), lambda n, i, b: (row(b), 0))
    in_specs = [
        head,
        pl.BlockSpec((None, keys, None, dim), lambda n, i, b: (b, 0, n // group, 0)),
        pl.BlockSpec((None, keys, None, value_dim), lambda n, i, b: (b, 0, n // group, 0)),
        vector,
        vector,
        pl.BlockSpec((None, None, 4), lambda n, i, b: (row(b), blocks - 1 - i, 0)),
    ]
    args = [q, k, v, lo, hi, ranges]
    if sinks is not None:
        in_specs.append(pl.BlockSpec((1,), lambda n, i, b: (n,)))
        args.append(sinks.astype(jnp.float32))
    lower = segment_start is not None or window is not None
    kernel = functools.partial(_kernel, config=config, scale=scale, softcap=softcap, lower=lower)
    return pl.pallas_call(
        kernel,
        grid=(heads, blocks, batch),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((None, length, None, value_dim), lambda n, i, b: (b, 0, n, 0)),
            pl.BlockSpec((None, None, length), lambda n, i, b: (b, n, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, length, heads, value_dim), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret(),
        name="flash_attention_forward",
    )(*map(jnp.asarray, args))
