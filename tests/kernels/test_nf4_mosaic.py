"""The Mosaic GPU kernel of lora_matmul: tables, layout and rounding anywhere, the kernel itself on a Hopper GPU."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax.kernels.nf4 import mosaic
from lora_jax.kernels.nf4.format import CODE, NF4Weight, dequantize, quantize

FACTOR = mosaic._FACTOR


def byte_permute(low: int, high: int, selectors: np.ndarray) -> np.ndarray:
    """PTX `prmt` for one selector at a time: bits 0 to 2 choose a byte, bit 3 replaces it by copies of its sign."""
    table = np.array([(word >> 8 * i) & 255 for word in (low, high) for i in range(4)])
    chosen = table[selectors & 7]
    return np.where(selectors & 8, np.where(chosen & 128, 255, 0), chosen)


def table_values() -> np.ndarray:
    """What the kernel's two byte planes make of the 16 renumbered codes, as float64."""
    s = np.arange(16)
    planes = []
    for words in (mosaic._tables()[1][:4], mosaic._tables()[1][4:]):
        planes.append(byte_permute(*words[:2], s) ^ byte_permute(*words[2:], s ^ 8))
    return (planes[0] | planes[1] << 8).astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)


def weight(n: int, k: int, double: bool) -> NF4Weight:
    return quantize(0.02 * jax.random.normal(jax.random.key(n + k), (n, k)), double)


def bf16(v: np.ndarray) -> np.ndarray:
    return v.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def rms(v: np.ndarray) -> float:
    return float(np.sqrt(np.mean(v**2)))


def kernel_weight(w: NF4Weight) -> np.ndarray:
    """The bf16 weight that the kernel multiplies by, from its blocks: layout, look-up and rounding in numpy."""
    n, k = w.shape
    blocks = np.asarray(jax.jit(mosaic.tile_weight)(w).blocks).view(np.uint32).reshape(n // 64, k // 64, 576)
    nn, kk = np.arange(n)[:, None], np.arange(k)[None, :]
    warp, half, row = nn % 64 // 16, nn % 16 // 8, nn % 8
    j, chunk, quad, element = kk % 64 // 16, kk % 16 // 8, kk % 8 // 2, kk % 2
    words = blocks[nn // 64, kk // 64, warp * 128 + half * 64 + j // 2 * 32 + row * 4 + quad]
    code = words >> (16 * (j % 2) + 8 * chunk + 4 * element) & 15
    pair = blocks[nn // 64, kk // 64, 512 + warp * 16 + row * 2 + half]
    hi, lo = ((v & 0xFFFF).astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64) for v in (pair, pair >> 16))
    value = table_values()[code]
    return bf16(value * hi + bf16(value * lo))


def test_tables_hold_the_codes_within_half_a_bf16_ulp():
    values = table_values()[mosaic._tables()[0]] / FACTOR
    # bf16 has 8 significant bits; the zero is the least normal number instead
    np.testing.assert_allclose(values, CODE, rtol=2**-8, atol=1e-37)
    assert sorted(mosaic._tables()[0]) == list(range(16))


@pytest.mark.parametrize("double", [False, True])
def test_kernel_weight_is_the_weight(double):
    w = weight(128, 192, double)
    exact = np.asarray(dequantize(w, jnp.float32), np.float64)
    # Two roundings to bf16, of code and of product, each at most 2^-8 of the value, and 2^-15 for the split scale.
    np.testing.assert_allclose(kernel_weight(w), exact, rtol=2**-7 + 2**-13, atol=1e-30)


def test_total_error_is_at_most_1_1_times_that_of_bf16():
    w = weight(256, 1024, True)
    exact = np.asarray(dequantize(w, jnp.float32), np.float64)
    x = np.asarray(jax.random.normal(jax.random.key(1), (64, 1024), jnp.bfloat16)).astype(np.float64)
    truth = x @ exact.T
    error, standard = rms(bf16(x @ kernel_weight(w).T) - truth), rms(bf16(x @ bf16(exact).T) - truth)
    assert error <= 1.1 * standard


def test_why_not_names_what_it_cannot_do():
    x = jnp.zeros((65, 128), jnp.bfloat16)
    w = NF4Weight.abstract((128, 128), True)
    assert mosaic.why_not(x, w) is None
    assert "float32" in str(mosaic.why_not(x.astype(jnp.float32), w))
    assert "[N, K] = [64, 128]" in str(mosaic.why_not(x, NF4Weight.abstract((64, 128), True)))
    assert "K of 64" in str(mosaic.why_not(x, NF4Weight.abstract((128, 96), True)))
    assert "not NF4" in str(mosaic.why_not(x, jnp.zeros((128, 128), jnp.bfloat16)))


def problem(m, k, n, r, double, transposed):
    keys = jax.random.split(jax.random.key(m), 3)
    x = jax.random.normal(keys[0], (m, n if transposed else k), jnp.bfloat16)
    a = jax.random.normal(keys[1], (k, r)) / k**0.5 if r else None
    b = 0.02 * jax.random.normal(keys[2], (r, n)) if r else None
    return x, weight(n, k, double), a, b


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "n", "r", "double"),
    [(256, 512, 256, 0, False), (77, 128, 384, 8, True), (1, 256, 128, 80, True), (4097, 128, 256, 16, True)],
)
def test_kernel_against_float64(m, k, n, r, double, transposed):
    x, w, a, b = problem(m, k, n, r, double, transposed)
    op = mosaic.matmul_transposed if transposed else mosaic.matmul
    f = jax.jit(lambda x, w, a, b: op(x, w, a, b, 2.0))
    y = np.asarray(f(x, w, a, b)).astype(np.float64)
    np.testing.assert_array_equal(y, np.asarray(f(x, w, a, b)).astype(np.float64))

    dense = np.asarray(dequantize(w, jnp.float32), np.float64)
    host = np.asarray(x).astype(np.float64)
    truth = host @ (dense if transposed else dense.T)
    standard = host @ bf16(dense if transposed else dense.T)
    if a is not None and b is not None:
        first, second = ((2.0 * b).T, a.T) if transposed else (a, 2.0 * b)
        truth = truth + host @ np.asarray(first, np.float64) @ np.asarray(second, np.float64)
        standard = standard + bf16(host @ bf16(np.asarray(first))) @ bf16(np.asarray(second))
    assert rms(y - truth) <= 1.1 * rms(bf16(standard) - truth)
