"""NF4 and lora_matmul against definitions written out in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax.kernels.nf4 import NF4Weight, dequantize, lora_matmul, quantize
from lora_jax.kernels.nf4.format import CODE, NF4Layer, beside_all_scales, cut, nested_code, with_one_index
from lora_jax.kernels.nf4.shared_input import Projection, halves, project

SHAPES = [(64, 128), (96, 192), (5, 96), (7, 10), (300, 576)]  # 64 divides K, and does not


def numpy_quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes [n], absmax [blocks]) of the definition, in numpy float32."""
    flat = w.astype(np.float32).reshape(-1)
    blocks = np.pad(flat, (0, -flat.size % 64)).reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=1)
    scaled = np.clip(blocks * (np.float32(1) / np.maximum(absmax, np.float32(1e-38)))[:, None], -1, 1)
    if flat.size % 64:
        scaled[-1] = blocks[-1] / absmax[-1]
    midpoints = (CODE[1:] + CODE[:-1]) / np.float32(2)
    return np.searchsorted(midpoints, scaled, side="left").reshape(-1)[: flat.size], absmax


def hard_cases(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Random weights with zeros, exact midpoints, tiny and huge blocks among them."""
    w = rng.normal(size=shape).astype(np.float32)
    flat = w.reshape(-1)
    if flat.size >= 64 * 6:
        flat[:64] = 0
        flat[64:128] = rng.normal(size=64) * 1e-30
        flat[128:192] = rng.normal(size=64) * 1e30
        midpoints = (CODE[1:] + CODE[:-1]) / np.float32(2)
        flat[192:256] = np.resize(np.append(midpoints, 1.0), 64)  # absmax 1, every other value halfway between codes
        flat[256:320] = 1e-44  # a subnormal absmax
    return w


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_quantize_equals_the_definition(shape, dtype):
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore"):
        w = np.nan_to_num(hard_cases(rng, shape).astype(dtype), posinf=6e4, neginf=-6e4)
    if w.dtype == np.float32:
        w[np.abs(w) < 1e-38] = 0  # XLA's CPU backend flushes subnormals
    codes, absmax = numpy_quantize(w)
    for got in (quantize(jnp.asarray(w), False), jax.jit(quantize, static_argnums=1)(w, False)):
        np.testing.assert_array_equal(np.asarray(got.packed).reshape(-1), codes[0::2] << 4 | codes[1::2])
        np.testing.assert_array_equal(np.asarray(got.absmax).reshape(-1), absmax)
        assert got.shape == shape
        assert not got.double_quantized
        for out in (jnp.float32, jnp.bfloat16):
            want = (CODE[codes] * np.repeat(absmax, 64)[: codes.size]).astype(out).reshape(shape)
            np.testing.assert_array_equal(np.asarray(dequantize(got, out)), want)


@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantization_rounds_twice(shape):
    """absmax = round(round(code * scale) + offset): a fused multiply-add would differ in a third of the values."""
    w = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    q = jax.jit(quantize)(w)
    assert q.double_quantized
    assert q.absmax.dtype == np.uint8
    indices = np.asarray(q.absmax).reshape(-1)
    scale = np.repeat(np.asarray(q.nested_absmax), 256)[: indices.size]
    absmax = nested_code()[indices] * scale + np.asarray(q.nested_offset)  # numpy rounds each operation
    codes, exact = numpy_quantize(w)
    want = (CODE[codes] * np.repeat(absmax, 64)[: codes.size]).reshape(shape)
    np.testing.assert_array_equal(np.asarray(jax.jit(dequantize, static_argnums=1)(q, jnp.float32)), want)
    # The nearest of the 256 values: the gaps of the table are at most 1/64 of the largest, half of that is the error.
    assert np.abs(absmax - exact).max() <= np.asarray(q.nested_absmax).max() / 128 + 1e-6


def test_stacked_weights_dequantize_like_single_ones():
    ws = np.random.default_rng(2).normal(size=(3, 16, 128)).astype(np.float32)
    single = [quantize(jnp.asarray(w)) for w in ws]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single)
    assert stacked.shape == (3, 16, 128)
    want = np.stack([dequantize(w, jnp.float32) for w in single])
    np.testing.assert_array_equal(np.asarray(dequantize(stacked, jnp.float32)), want)


def test_abstract_matches_what_quantize_makes():
    for shape in SHAPES:
        for double in (False, True):
            got = jax.eval_shape(lambda w, double=double: quantize(w, double), jax.ShapeDtypeStruct(shape, jnp.float32))
            want = NF4Weight.abstract(shape, double)
            assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), want)


def test_bytes_of_a_weight():
    q = quantize(jnp.asarray(np.random.default_rng(3).normal(size=(1024, 1024)).astype(np.float32)))
    bits = 8 * q.nbytes / 1024**2
    assert 4.125 < bits < 4.14  # 4 + 8/64 + 32/64/256, and the table


def test_errors_name_what_was_got():
    with pytest.raises(ValueError, match=r"even; got \(4, 7\)"):
        quantize(jnp.ones((4, 7)))
    with pytest.raises(ValueError, match=r"\[N, K\], got shape \(4,\)"):
        quantize(jnp.ones(4))


# lora_matmul


def reference(x, w, a, b, scale, mask=None):
    """y = x W^T + scale (mask * x) A B, differentiable."""
    y = x @ w.T
    if a is not None:
        y = y + scale * ((x if mask is None else x * mask) @ a) @ b
    return y


def case(shape, rank, m, seed=0):
    n, k = shape
    rng = np.random.default_rng(seed)
    draw = lambda *s: rng.normal(size=s)  # noqa: E731
    return draw(m, k), draw(n, k) / np.sqrt(k), draw(k, rank) / np.sqrt(k), draw(rank, n) / np.sqrt(rank), draw(m, n)


@pytest.mark.parametrize("base", ["float", "nf4", "nf4-double"])
@pytest.mark.parametrize(
    ("shape", "rank", "m"), [((64, 128), 8, 33), ((96, 192), 1, 1), ((10, 96), 5, 4), ((7, 10), 3, 2)]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lora_matmul_and_all_gradients_against_float64(base, shape, rank, m, dtype):
    x, w, a, b, dy = case(shape, rank, m)
    weight = jnp.asarray(w, dtype) if base == "float" else quantize(jnp.asarray(w, jnp.float32), base == "nf4-double")
    x, dy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)

    def loss(x, a, b):
        y = lora_matmul(x, weight, a, b, 0.7)
        return jnp.sum((y * dy).astype(jnp.float32)), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x, a, b)
    with jax.enable_x64(True):
        wide = lambda z: jnp.asarray(np.asarray(z, np.float64))  # noqa: E731
        dense = wide(weight if base == "float" else dequantize(weight, dtype))
        args = (wide(x), wide(a), wide(b))
        want = np.asarray(reference(args[0], dense, args[1], args[2], 0.7))
        want_grads = jax.grad(lambda *t: jnp.sum(reference(t[0], dense, t[1], t[2], 0.7) * wide(dy)), (0, 1, 2))(*args)
        want_grads = [np.asarray(g) for g in want_grads]
    # Sums of up to a few hundred products in float32: 1e-5. With bfloat16 operands each factor is rounded to 2^-9.
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert y.dtype == dtype
    assert relative(y, want) < tolerance
    for got, wanted in zip(grads, want_grads, strict=True):
        assert relative(got, wanted) < tolerance


def relative(got, want) -> float:
    got = np.asarray(got, np.float64)
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_without_an_adapter():
    x, w, _, _, dy = case((64, 128), 4, 9)
    q = quantize(jnp.asarray(w, jnp.float32))
    x, dy = jnp.asarray(x, jnp.float32), jnp.asarray(dy, jnp.float32)
    y, pull = jax.vjp(lambda x: lora_matmul(x.reshape(3, 3, -1), q).reshape(9, -1), x)
    dense = np.asarray(dequantize(q, jnp.float32), np.float64)
    assert relative(y, np.asarray(x, np.float64) @ dense.T) < 1e-5
    assert relative(pull(dy)[0], np.asarray(dy, np.float64) @ dense) < 1e-5


def test_dropout_is_a_mask_on_the_adapter_path_alone():
    x, w, a, b, dy = (jnp.asarray(z, jnp.float32) for z in case((64, 128), 4, 50))
    key = jax.random.key(7)
    f = lambda x, a, b: lora_matmul(x, w, a, b, 0.5, dropout_rate=0.25, dropout_key=key)  # noqa: E731
    mask = np.asarray(jax.random.bernoulli(key, 0.75, x.shape)) / 0.75
    assert 0.7 < (mask > 0).mean() < 0.8
    y, pull = jax.vjp(f, x, a, b)
    want, want_pull = jax.vjp(lambda x, a, b: reference(x, w, a, b, 0.5, mask), x, a, b)
    assert relative(y, np.asarray(want)) < 1e-5
    for got, wanted in zip(pull(dy), want_pull(dy), strict=True):
        assert relative(got, np.asarray(wanted)) < 1e-5
    other = lora_matmul(x, w, a, b, 0.5, dropout_rate=0.25, dropout_key=jax.random.key(8))
    assert not np.array_equal(np.asarray(y), np.asarray(other))


def test_the_frozen_weight_is_no_residual():
    """Backward keeps x, the packed weight, A and B: nothing of the shape of the dense weight."""
    n, k, m = 192, 256, 24
    x, w, a, b, _ = (jnp.asarray(z, jnp.float32) for z in case((n, k), 4, m))
    q = quantize(w)
    _, pull = jax.vjp(lambda x, a, b: lora_matmul(x, q, a, b, 1.0), x, a, b)
    kept = {leaf.shape for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")}
    assert (n, k // 2) in kept
    assert (n, k) not in kept
    assert (k, n) not in kept


def test_lora_matmul_refuses():
    x, w, a, b, _ = (jnp.asarray(z, jnp.float32) for z in case((64, 128), 4, 3))
    with pytest.raises(ValueError, match="x has 127 features"):
        lora_matmul(x[:, 1:], w, a, b)
    with pytest.raises(ValueError, match="both LoRA factors"):
        lora_matmul(x, w, a)
    with pytest.raises(ValueError, match="do not fit"):
        lora_matmul(x, w, a[:, 1:], b)
    with pytest.raises(ValueError, match="needs a dropout_key"):
        lora_matmul(x, w, a, b, dropout_rate=0.1)
    with pytest.raises(ValueError, match="'cuda' is unknown; known are xla"):
        lora_matmul(x, w, a, b, implementation="cuda")


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("place", ["stack", "scales in a stack", "alone"])
def test_halves_of_a_fused_layer_are_its_rows(double, place):
    """Codes and scales are where they were, bit for bit; the products, and gradients of A, B and x, follow."""
    rng = np.random.default_rng(0)
    weights = [quantize(jnp.asarray(rng.normal(size=(512, 128)), jnp.float32), double) for _ in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *weights)
    beside = beside_all_scales(NF4Weight(weights[2].packed, weights[2].absmax), stack, jnp.int32(2))
    w = {"stack": NF4Layer(stack, jnp.int32(2)), "scales in a stack": beside, "alone": weights[2]}[place]
    sizes = ((5, 128), (128, 4), (4, 512), 512, (5, 512))
    x, a, b, bias, dy = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)

    def whole(x, a, b):
        return project(x, Projection(w, a, b, 0.5, bias))

    def apart(x, a, b):
        parts = halves(Projection(w, a, b, 0.5, bias))
        assert parts is not None
        return jnp.concatenate([project(x, part) for part in parts], axis=1)

    decoded = [dequantize(cut(part.w), jnp.float32) for part in halves(Projection(w)) or ()]
    np.testing.assert_array_equal(jnp.concatenate(decoded), dequantize(weights[2], jnp.float32))
    (want, pull_want), (got, pull_got) = jax.vjp(whole, x, a, b), jax.vjp(apart, x, a, b)
    for one, other in zip((got, *pull_got(dy)), (want, *pull_want(dy)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)  # float32 sums in another order


@pytest.mark.parametrize("k", [128, 96])  # 64 divides it, or no kernel reads a stack
@pytest.mark.parametrize("double", [True, False])
def test_a_layer_whose_scales_are_in_a_stack(double, k):
    """The arrays are the layer's, bit for bit, as a weight and as a layer with one index."""
    rng = np.random.default_rng(0)
    weights = [quantize(jnp.asarray(rng.normal(size=(300, k)), jnp.float32), double) for _ in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *weights)
    w = beside_all_scales(NF4Weight(weights[1].packed, weights[1].absmax), stack, jnp.int32(1))
    assert isinstance(w, NF4Layer) == (k % 64 == 0)
    one = with_one_index(w)
    assert not isinstance(one, NF4Layer) or one.nested_index is None
    assert w.shape == one.shape == (300, k)
    for got in (cut(w), cut(one)):
        jax.tree.map(np.testing.assert_array_equal, got, weights[1])


def test_halves_that_share_scales_are_none():
    rng = np.random.default_rng(0)
    odd = quantize(jnp.asarray(rng.normal(size=(96, 64)), jnp.float32))  # 48 blocks each, of 256 that share a scale
    assert halves(Projection(odd)) is None
    assert halves(Projection(jnp.zeros((4, 64)))) is None
