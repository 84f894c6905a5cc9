"""The Pallas-Triton attention kernels in interpret mode, against the formula in float64: values and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels import dispatch
from lora_jax.kernels.attention import triton, triton_bwd


def reference(q, k, v, sinks, first, offset, window, softcap, scale):
    """(out, log-sum-exp); a query that sees nothing and has no sink gets zeros."""
    repeat = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeat, axis=2), jnp.repeat(v, repeat, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    t, s = jnp.arange(q.shape[1])[:, None] + offset, jnp.arange(k.shape[1])[None]
    seen = (s <= t) & (s >= first[..., None])
    if window is not None:
        seen &= s > t - window
    weights = jnp.where(seen[:, None], jnp.exp(scores), 0)  # the scores of the tests are small
    total = weights.sum(-1) + (0 if sinks is None else jnp.exp(sinks)[None, :, None])
    out = jnp.einsum("bnts,bsnh->btnh", weights / jnp.where(total == 0, 1, total)[..., None], v)
    return out, jnp.log(total)


def packed_rows(batch, length, seed=0):
    """Random documents packed into rows: the start of its document for every token."""
    starts = np.random.default_rng(seed).random((batch, length)) < 4 / length
    starts[:, 0] = True
    return np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1).astype(np.int32)


# T and S against blocks of 16 by 16; heads, key heads, head_dim and the values' one.
CASES = {
    "plain": dict(length=48, heads=(4, 2), dims=(32, 32)),
    "one token": dict(length=1, heads=(3, 1), dims=(16, 16)),
    "odd, split head_dim": dict(length=37, heads=(2, 2), dims=(80, 80)),
    "values narrower": dict(length=33, heads=(2, 1), dims=(48, 32)),
    "packed": dict(length=70, heads=(4, 2), dims=(16, 16), packed=True),
    "window": dict(length=70, heads=(2, 1), dims=(16, 16), window=20),
    "window of one key": dict(length=20, heads=(2, 1), dims=(16, 16), window=1),
    "softcap": dict(length=35, heads=(2, 1), dims=(16, 16), softcap=1.5),
    "sinks": dict(length=35, heads=(4, 2), dims=(16, 16), sinks=True),
    "cache": dict(length=19, keys=60, offset=37, heads=(2, 1), dims=(16, 16)),
    "queries before the first key": dict(length=40, keys=30, offset=-9, heads=(2, 1), dims=(16, 16)),
    "all crossed": dict(
        length=45, keys=58, offset=13, heads=(6, 2), dims=(48, 32), packed=True, window=23, softcap=2.0, sinks=True
    ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.rotate(f"{i // 3}")) for i, name in enumerate(CASES)]
)
def test_values_and_gradients_against_float64(name, dtype):
    case = dict(CASES[name])
    length, (heads, kv_heads), (dim, value_dim) = case["length"], case["heads"], case["dims"]
    keys, offset, window, softcap = (case.get(x) for x in ("keys", "offset", "window", "softcap"))
    keys, offset = keys or length, offset or 0
    rng = np.random.default_rng(0)
    shapes = ((2, length, heads, dim), (2, keys, kv_heads, dim), (2, keys, kv_heads, value_dim))
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    dout = jnp.asarray(rng.normal(size=(2, length, heads, value_dim)), dtype)
    sinks = jnp.asarray(rng.normal(size=heads), jnp.float32) if case.get("sinks") else None
    first = packed_rows(2, length) if case.get("packed") else None
    options = dict(window=window, softcap=softcap, scale=0.2)

    @jax.jit
    def run(q, k, v, sinks, dout, first, offset):
        out, lse = triton.forward(q, k, v, first, offset, sinks=sinks, **options)
        grads = triton_bwd.backward(q, k, v, out, lse, dout, first, sinks=sinks, query_offset=offset, **options)
        return out, lse, grads

    out, lse, grads = run(q, k, v, sinks, dout, first, offset)
    with jax.enable_x64(True):
        wide = [None if x is None else jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, sinks, dout)]
        start = np.zeros((2, length), np.int32) if first is None else first
        (want, want_lse), pull = jax.vjp(
            lambda *x: reference(*x, *([None] * (4 - len(x))), start, offset, **options),
            *[x for x in wide[:4] if x is not None],
        )
        want_grads = [np.asarray(x) for x in pull((wide[4], jnp.zeros_like(want_lse)))]
        want, want_lse = np.asarray(want), np.asarray(want_lse)
    # float32: sums of up to 58 terms. bfloat16: weights and score gradients are rounded to 2^-9 each, outputs too.
    tolerance = 3e-6 if dtype == jnp.float32 else 1.5e-2
    if softcap and dtype == jnp.float32 and not dispatch.interpret():
        tolerance = 3e-5  # the hardware's tanh: relative error up to 2^-11, 1.1e-5 found
    assert out.dtype == dtype and lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, want_lse, atol=3e-6 if dtype == jnp.float32 else 1e-5, rtol=1e-6)
    assert len(grads) == len(want_grads)
    for got, wanted in zip((out, *grads), (want, *want_grads), strict=True):
        error = np.abs(np.asarray(got, np.float64) - wanted).max()
        assert error <= tolerance * max(1.0, np.abs(wanted).max()), (got.shape, error)


def test_static_and_traced_bounds_agree():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 40, 2, 16)), jnp.float32) for _ in range(3))
    options = dict(window=None, softcap=None, scale=0.3, sinks=None)
    plain = triton.forward(q, k, v, None, 0, **options)
    traced = triton.forward(q, k, v, jnp.zeros((1, 40), jnp.int32), jnp.int32(0), **options)
    for x, y in zip(plain, traced, strict=True):
        np.testing.assert_array_equal(x, y)


def test_packed_rows_equal_separate_documents():
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 59, 2, 16)), jnp.float32) for _ in range(3))
    cuts = [0, 7, 32, 59]
    first = np.concatenate([np.full(b - a, a, np.int32) for a, b in zip(cuts, cuts[1:], strict=False)])[None]
    options = dict(window=None, softcap=None, scale=0.3, sinks=None)
    packed, _ = triton.forward(q, k, v, first, 0, **options)
    for a, b in zip(cuts, cuts[1:], strict=False):
        alone, _ = triton.forward(q[:, a:b], k[:, a:b], v[:, a:b], None, 0, **options)
        np.testing.assert_allclose(packed[:, a:b], alone, atol=1e-6)  # other blocks: other order of float32 sums


@pytest.mark.parametrize("seed", range(4))
def test_block_ranges_skip_only_what_nobody_sees(seed):
    rng = np.random.default_rng(seed)
    length, keys = int(rng.integers(1, 200)), int(rng.integers(1, 200))
    # In no order at all: left padding, packed rows and windows are the easy cases.
    lo = rng.integers(0, keys, (2, length)).astype(np.int32)
    hi = rng.integers(-1, keys, (2, length)).astype(np.int32)
    if seed % 2:  # rows with whole blocks
        lo, hi = np.sort(lo // 4, 1), np.sort(np.minimum(hi + 60, keys - 1), 1)
    config = triton.Config(block_q=16, block_k=32, num_warps=4, num_stages=1)
    lo, hi, of_queries, of_keys = triton.block_ranges(lo, hi, keys, config)
    key = np.arange(-(-keys // 32) * 32)
    seen = (lo[..., None] <= key) & (key <= hi[..., None])
    seen = seen.reshape(2, lo.shape[1] // 16, 16, -1, 32).transpose(0, 1, 3, 2, 4)  # [B, query blocks, key blocks, ..]
    for table, blocks in ((of_queries, seen), (of_keys, seen.swapaxes(1, 2))):
        rows = blocks.reshape(-1, *blocks.shape[2:])
        for (begin, full_begin, full_end, end), row in zip(table.reshape(-1, 4), rows, strict=True):
            assert 0 <= begin <= full_begin <= full_end <= end <= len(row)
            assert not row[:begin].any() and not row[end:].any()
            assert row[full_begin:full_end].all()
    if seed % 2:
        jnp_tables = triton.block_ranges(jnp.asarray(lo), jnp.asarray(hi), keys, config)
        for x, y in zip(jnp_tables, (lo, hi, of_queries, of_keys), strict=True):
            np.testing.assert_array_equal(x, y)


def test_refusals_say_what_is_wrong():
    q = jnp.zeros((1, 4, 2, 64), jnp.bfloat16)
    assert triton.why_not(q, q, q) is None
    assert "bfloat16, float16 or float32" in triton.why_not(q, q.astype(jnp.float32), q)
    wide = jnp.zeros((1, 4, 2, 512), jnp.bfloat16)
    assert "at most 256, got 512" in triton.why_not(wide, wide, wide)
    assert "scale must be positive" in triton.why_not(q, q, q, scale=-1.0)
