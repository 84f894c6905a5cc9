"""flash_attention against the formula in float64: values, gradients, windows, softcap, packing, sinks, caches."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels.attention import flash_attention

IMPLEMENTATIONS = ["xla", pytest.param("cudnn", marks=pytest.mark.gpu)]


def reference(q, k, v, first, offset=0, window=None, softcap=None, scale=None, sinks=None):
    """One query at a time of one head at a time would be slower, not clearer: the whole mask at once."""
    batch, length, heads, dim = q.shape
    repeat = heads // k.shape[2]
    k, v = jnp.repeat(k, repeat, axis=2), jnp.repeat(v, repeat, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    t, s = jnp.arange(length)[:, None] + offset, jnp.arange(k.shape[1])[None]
    seen = (s <= t) & (s >= first[..., None])
    if window is not None:
        seen &= s > t - window
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    total = jnp.sum(jnp.exp(scores), axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks)[:, None, None]
    return jnp.einsum("bnts,bsnh->btnh", jnp.exp(scores) / total, v)


def arrays(batch, length, keys, heads, kv_heads, dim, dtype, seed=0, value_dim=None):
    rng = np.random.default_rng(seed)
    value_dim = value_dim or dim
    shapes = [(batch, length, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, value_dim)]
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes], rng.normal(size=(batch, length, heads, value_dim))


def segments(batch, length, seed=0):
    """Random documents packed into rows: the start of its document for every token."""
    rng = np.random.default_rng(seed)
    starts = rng.random((batch, length)) < 4 / length
    starts[:, 0] = True
    return np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1).astype(np.int32)


CASES = [
    dict(length=37, heads=4, kv_heads=2, dim=16),
    dict(length=1, heads=3, kv_heads=1, dim=8),
    dict(length=130, heads=6, kv_heads=6, dim=24, window=7),
    dict(length=64, heads=4, kv_heads=1, dim=16, softcap=3.0, scale=0.4),
    dict(length=90, heads=4, kv_heads=2, dim=16, packed=True),
    dict(length=1100, heads=2, kv_heads=1, dim=8, packed=True, window=50, softcap=5.0),  # several blocks of queries
    dict(length=513, heads=2, kv_heads=2, dim=8),
    dict(length=40, heads=4, kv_heads=2, dim=24, value_dim=16),
    dict(length=50, heads=4, kv_heads=2, dim=16, sinks=True, packed=True, window=9),
    dict(length=530, heads=2, kv_heads=1, dim=8, sinks=True, value_dim=16),
]


_VALUES = [
    pytest.param(implementation, case, id=f"{implementation}-{number}", marks=marks)
    for number, case in enumerate(CASES)
    for implementation, marks in (("xla", pytest.mark.rotate(f"{number}")), ("cudnn", pytest.mark.gpu))
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("implementation", "case"), _VALUES)
def test_values_and_gradients_against_float64(case, dtype, implementation):
    case = dict(case)
    packed, length, with_sinks = case.pop("packed", False), case.pop("length"), case.pop("sinks", False)
    shape = [case.pop(name) for name in ("heads", "kv_heads", "dim")]
    inputs, dout = arrays(2, length, length, *shape, dtype, value_dim=case.pop("value_dim", None))
    if implementation == "cudnn" and (dtype == jnp.float32 or packed or "softcap" in case or length == 1):
        pytest.skip("cuDNN cannot do this, and says so (tested below)")
    if implementation == "cudnn" and (with_sinks or inputs[0].shape[3] != inputs[2].shape[3]):
        pytest.skip("cuDNN cannot do this, and says so (tested below)")
    first = segments(2, length) if packed else np.zeros((2, length), np.int32)
    if with_sinks:
        inputs.append(jnp.asarray(np.random.default_rng(1).normal(size=shape[0]), dtype))

    def f(q, k, v, sinks=None):
        start = jnp.asarray(first) if packed else None
        return flash_attention(q, k, v, segment_start=start, sinks=sinks, implementation=implementation, **case)

    out, pull = jax.vjp(jax.jit(f), *inputs)
    grads = pull(jnp.asarray(dout, dtype))
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(z, np.float64)) for z in inputs]

        def exact(q, k, v, sinks=None):
            return reference(q, k, v, first, sinks=sinks, **case)

        want, want_pull = jax.vjp(exact, *wide)
        want_grads = want_pull(jnp.asarray(np.asarray(jnp.asarray(dout, dtype), np.float64)))
        want, want_grads = np.asarray(want), [np.asarray(g) for g in want_grads]
    # float32 sums of up to 1100 terms; bfloat16 rounds q, k, v and the weights to 2^-9 each.
    tolerance = 5e-6 if dtype == jnp.float32 else 2e-2
    assert out.dtype == dtype
    for got, wanted in zip((out, *grads), (want, *want_grads), strict=True):
        got = np.asarray(got, np.float64)
        assert np.isfinite(got).all()
        assert np.linalg.norm(got - wanted) < tolerance * np.linalg.norm(wanted) + 1e-12


def test_a_packed_row_equals_its_documents_alone():
    (q, k, v), _ = arrays(1, 60, 60, 4, 2, 16, jnp.float32)
    first = np.repeat([0, 25, 40], [25, 15, 20])[None].astype(np.int32)
    out = flash_attention(q, k, v, segment_start=jnp.asarray(first))
    for a, b in ((0, 25), (25, 40), (40, 60)):
        alone = flash_attention(q[:, a:b], k[:, a:b], v[:, a:b])
        np.testing.assert_allclose(out[:, a:b], alone, atol=2e-6)  # sums in another order


@pytest.mark.parametrize("window", [None, 5])
def test_with_a_cache_queries_stand_at_their_offset(window):
    (q, k, v), _ = arrays(2, 30, 30, 4, 2, 16, jnp.float32)
    first = jnp.asarray(np.array([[3] * 30, [0] * 30], np.int32))  # the first row has three padding tokens
    whole = flash_attention(q, k, v, segment_start=first, window=window)
    empty = jnp.full((2, 10, 2, 16), 1e4)  # unwritten slots must not be seen
    keys, values = jnp.concatenate([k, empty], 1), jnp.concatenate([v, empty], 1)
    step = jax.jit(
        lambda q, first, i: flash_attention(q, keys, values, segment_start=first, query_offset=i, window=window)
    )
    for i in (5, 17, 29):
        part = step(q[:, i : i + 1], first[:, i : i + 1], i)
        np.testing.assert_allclose(part, whole[:, i : i + 1], atol=2e-6)


def test_a_token_that_sees_nothing_is_finite():
    (q, k, v), dout = arrays(1, 4, 4, 2, 2, 8, jnp.float32)
    first = jnp.asarray([[9, 9, 0, 0]], jnp.int32)
    out, pull = jax.vjp(lambda q: flash_attention(q, k, v, segment_start=first), q)
    assert np.isfinite(np.asarray(out)).all()
    assert np.isfinite(np.asarray(pull(jnp.asarray(dout, jnp.float32))[0])).all()


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Lets the cuDNN path be traced and lowered, though not run, on any machine."""
    monkeypatch.setattr("lora_jax.kernels.attention.cudnn.default_platform", lambda: "gpu")
    monkeypatch.setattr("lora_jax.kernels.attention.cudnn._cudnn_version", lambda: 91000)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(
    ("saved", "forward_calls"), [(("attention", "attention_lse"), 1), (("attention",), 2), ((), 2)]
)
def test_cudnn_forward_is_not_run_again_where_both_names_are_saved(pretend_gpu, saved, forward_calls, window):
    spec = [jax.ShapeDtypeStruct((1, 100, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    policy = jax.checkpoint_policies.save_only_these_names(*saved)

    @jax.jit
    def f(q, k, v):
        layer = jax.checkpoint(
            lambda q: flash_attention(2 * q, k, v, window=window, implementation="cudnn"), policy=policy
        )
        out, pull = jax.vjp(layer, q)
        return out, pull(q)

    program = f.trace(*spec).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in program.splitlines() if "custom_call @__cudnn$fmhaSoftmax" in line]
    backward = [line for line in calls if "fmhaSoftmaxBackward(" in line]
    assert len(backward) == 1
    assert len(calls) - len(backward) == forward_calls


def test_the_private_rules_of_jax_are_as_cudnn_py_knows_them():
    """Names and order of the arguments that cudnn.py passes by position; jax 0.12 added score_mod."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    operands = "query key value bias q_seqlen kv_seqlen q_offsets kv_offsets page_table_k page_table_v".split()
    static = "scale seed dropout_rate variadic_args mask_type layout sliding_window_length".split()
    forward = list(inspect.signature(private._dot_product_attention_fwd_rule).parameters)
    backward = list(inspect.signature(private._dot_product_attention_bwd_rule).parameters)
    if "score_mod" in forward:
        assert forward == [*operands, "score_mod_args", *static, "score_mod", "cudnn_version", "return_residual"]
        assert backward == [*static, "score_mod", "cudnn_version", "return_residual", "res", "grad_output"]
    else:
        assert forward == [*operands, *static, "cudnn_version", "return_residual"]
        assert backward == [*static, "is_training", "return_residual", "res", "grad_output"]
    assert private.MaskType.CAUSAL.value == 2
    assert private.AttentionLayout.BTNH.value == 0
    assert list(inspect.signature(private.check_cudnn_version).parameters) == []


def test_errors():
    (q, k, v), _ = arrays(1, 8, 8, 4, 2, 16, jnp.float32)
    with pytest.raises(ValueError, match="K a divisor of 4"):
        flash_attention(q, jnp.ones((1, 8, 3, 16)), jnp.ones((1, 8, 3, 16)))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        flash_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match=r"segment_start must be \[1, 8\]"):
        flash_attention(q, k, v, segment_start=jnp.zeros((1, 7), jnp.int32))
    with pytest.raises(NotImplementedError, match="'cudnn' cannot do this call"):
        flash_attention(q, k, v, softcap=1.0, implementation="cudnn")
    with pytest.raises(ValueError, match=r"sinks must be \[4\]"):
        flash_attention(q, k, v, sinks=jnp.zeros(3))
    with pytest.raises(ValueError, match="known are xla, cudnn"):
        flash_attention(q, k, v, implementation="flash")
