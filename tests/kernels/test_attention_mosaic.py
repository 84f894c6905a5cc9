"""The Hopper kernels of flash_attention on a Hopper GPU: values, gradients, packing, windows, odd lengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels.attention import flash_attention, mosaic

CASES = [
    dict(batch=2, length=1000, heads=8, kv_heads=2, dim=128),
    dict(batch=1, length=1, heads=4, kv_heads=2, dim=128),
    dict(batch=2, length=77, heads=3, kv_heads=3, dim=64, dtype=jnp.float16),
    dict(batch=1, length=256, heads=2, kv_heads=1, dim=128, scale=0.3),
    dict(batch=2, length=1537, heads=4, kv_heads=1, dim=64, packed=True),
    dict(batch=1, length=2048, heads=8, kv_heads=2, dim=128, window=200),
    dict(batch=2, length=1111, heads=4, kv_heads=2, dim=128, packed=True, window=300),
    dict(batch=1, length=4097, heads=4, kv_heads=1, dim=128),
]


def inputs(batch, length, heads, kv_heads, dim, dtype=jnp.bfloat16, packed=False, **_):
    """q, k, v, dout and the first key of every query, all random."""
    rng = np.random.default_rng(length)
    q, k, v, dout = (
        jnp.asarray(rng.normal(size=(batch, length, n, dim)), dtype) for n in (heads, *(kv_heads,) * 2, heads)
    )
    starts = rng.random((batch, length)) < (4 / length if packed else 0)
    starts[:, 0] = True
    first = np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1).astype(np.int32)
    return q, k, v, dout, jnp.asarray(first) if packed else None


def exact(q, k, v, first, window, scale):
    """The formula, in the precision of its arguments; also the log-sum-exp."""
    length, repeat = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeat, axis=2), jnp.repeat(v, repeat, axis=2)
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q, k)
    scores = jnp.where(visible(first, window, length)[:, None], scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v), jax.nn.logsumexp(scores, axis=-1)


@functools.partial(jax.jit, static_argnames=("window", "scale"))
def standard(q, k, v, dout, first, window, scale):
    """(out, dq, dk, dv) in float32, with the operands of every matmul in the dtype of q, as tensor cores want them.

    dS is one of them. implementation="xla" does not round it on rows of several blocks: its dq is closer there.
    XLA drops a conversion to a smaller type and back; it keeps `reduce_precision`.
    """
    info = jnp.finfo(q.dtype)
    rounding = functools.partial(jax.lax.reduce_precision, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    dtype, group, length = q.dtype, q.shape[2] // k.shape[2], q.shape[1]
    q, k, v, dout = (x.astype(jnp.float32) for x in (q, k, v, dout))
    wide_k, wide_v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q, wide_k, precision="highest")
    weights = jax.nn.softmax(jnp.where(visible(first, window, length)[:, None], scores, -jnp.inf), axis=-1)
    rounded = rounding(weights)
    out = jnp.einsum("bnts,bsnh->btnh", rounded, wide_v, precision="highest")
    delta = jnp.einsum("btnh,btnh->bnt", rounding(out), dout, precision="highest")
    dscores = weights * (jnp.einsum("btnh,bsnh->bnts", dout, wide_v, precision="highest") - delta[..., None])
    dscores = rounding(dscores)
    dq = scale * jnp.einsum("bnts,bsnh->btnh", dscores, wide_k, precision="highest")
    dk = scale * jnp.einsum("bnts,btnh->bsnh", dscores, q, precision="highest")
    dv = jnp.einsum("bnts,btnh->bsnh", rounded, dout, precision="highest")
    dk, dv = (x.reshape(*k.shape[:3], group, k.shape[3]).sum(3) for x in (dk, dv))
    return tuple(x.astype(dtype) for x in (out, dq, dk, dv))


def visible(first, window, length: int):
    """[B or 1, T, T]: whether a query sees a key."""
    t, s = jnp.arange(length)[:, None], jnp.arange(length)[None]
    seen = (s <= t)[None] if first is None else (s <= t) & (s >= first[..., None])
    return seen if window is None else seen & (s > t - window)


def distance(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items() if k != "dtype"))
def test_values_and_gradients_are_as_close_to_float64_as_the_standard_computation(case):
    q, k, v, dout, first = inputs(**case)
    features = dict(segment_start=first, window=case.get("window"), scale=case.get("scale", case["dim"] ** -0.5))
    nothing = dict(query_offset=0, softcap=None, sinks=None)
    if reason := mosaic.why_not(q, k, v, segment_start=first, window=features["window"], **nothing):
        pytest.skip(reason)

    def run(implementation):
        f = jax.jit(lambda *a: flash_attention(*a, implementation=implementation, **features))
        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(dout)

    got, again = run("mosaic"), run("mosaic")
    plain = standard(q, k, v, dout, first, features["window"], features["scale"])
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, dout)]
        want, pull = jax.vjp(lambda *a: exact(*a, first, features["window"], features["scale"])[0], *wide[:3])
        want = [np.asarray(x) for x in (want, *pull(wide[3]))]
    for name, mine, repeated, other, true in zip(("out", "dq", "dk", "dv"), got, again, plain, want, strict=True):
        assert mine.dtype == q.dtype
        assert np.array_equal(mine, repeated), name  # no atomics: bitwise
        if np.linalg.norm(true) < 1e-9:  # dq and dk of a row of one token are 0: float32 rounding of dP - delta is left
            assert np.linalg.norm(np.asarray(mine, np.float64)) < 1e-5, name
        else:
            assert distance(mine, true) <= 1.1 * distance(other, true), name


@pytest.mark.gpu
def test_log_sum_exp():
    q, k, v, _, first = inputs(1, 700, 4, 2, 128, packed=True)
    if reason := mosaic.why_not(q, k, v, segment_start=first, query_offset=0, window=None, softcap=None, sinks=None):
        pytest.skip(reason)
    lse = mosaic.forward(q, k, v, first, window=None, softcap=None, scale=0.1)[1]
    want = exact(*(x.astype(jnp.float32) for x in (q, k, v)), first, None, 0.1)[1]
    np.testing.assert_allclose(lse, want, atol=2e-3)  # tf32 in the reference's product: 2^-11 of scores of a few units


@pytest.mark.gpu
def test_a_packed_row_equals_its_documents_alone():
    q, k, v, dout, _ = inputs(1, 600, 4, 2, 128)
    first = jnp.asarray(np.repeat([0, 250, 400], [250, 150, 200])[None], jnp.int32)
    if reason := mosaic.why_not(q, k, v, segment_start=first, query_offset=0, window=None, softcap=None, sinks=None):
        pytest.skip(reason)

    def run(first, *arrays):
        out, pull = jax.vjp(lambda *a: flash_attention(*a, segment_start=first, implementation="mosaic"), *arrays[:3])
        return out, *pull(arrays[3])

    packed = run(first, q, k, v, dout)
    for a, b in ((0, 250), (250, 400), (400, 600)):
        alone = run(None, *(x[:, a:b] for x in (q, k, v, dout)))
        for one, part in zip(alone, packed, strict=True):
            assert distance(part[:, a:b], one) < 4e-3  # bfloat16 rounding of sums cut into other blocks


def test_what_it_cannot_do_it_says(monkeypatch):
    monkeypatch.setattr("lora_jax.kernels.dispatch.default_platform", lambda: "gpu")
    monkeypatch.setattr("lora_jax.kernels.dispatch.compute_capability", lambda: "9.0")
    q, k = jnp.ones((1, 8, 4, 128), jnp.bfloat16), jnp.ones((1, 8, 2, 128), jnp.bfloat16)
    plain = dict(segment_start=None, query_offset=0, window=None, softcap=None, sinks=None)
    assert mosaic.why_not(q, k, k, **plain) is None
    assert mosaic.why_not(q, k, k, **plain | dict(window=4)) is None
    assert "softcap" in mosaic.why_not(q, k, k, **plain | dict(softcap=50.0))
    assert "sinks" in mosaic.why_not(q, k, k, **plain | dict(sinks=jnp.ones(4)))
    assert "query_offset" in mosaic.why_not(q, k, k, **plain | dict(query_offset=3))
    assert "one length" in mosaic.why_not(q[:, :4], k, k, **plain)
    assert "head_dim" in mosaic.why_not(q[..., :96], k[..., :96], k[..., :96], **plain)
    assert "float32" in mosaic.why_not(q.astype(jnp.float32), k, k, **plain)
    monkeypatch.setattr("lora_jax.kernels.dispatch.compute_capability", lambda: "8.0")
    assert "Hopper" in mosaic.why_not(q, k, k, **plain)


def test_block_lists_hold_every_key_that_a_query_sees():
    starts = np.repeat([0, 130, 600], [130, 470, 100]).astype(np.int32)
    first = mosaic.first_keys(jnp.asarray(starts[None]), 100, 1, 700)
    limits = np.asarray(mosaic.block_limits(first, 128, 128))
    want = np.maximum(starts, np.arange(700) - 99)
    for block in range(6):
        rows = want[block * 128 : (block + 1) * 128]
        assert limits[0, 0, block] == rows.min() // 128
        assert limits[0, 1, block] == -(-rows.max() // 128)
