"""The 8-bit form of what a layer keeps, and how a layer is split around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels.kept import Policy, block_of, dequantize, named, quantize, quantized_bytes


@pytest.mark.parametrize(
    ("features", "block"), [(64, 32), (80, 20), (96, 32), (256, 32), (576, 32), (14336, 32), (7, 7), (62, 31)]
)
def test_blocks_are_full(features, block):
    assert block_of(features) == block


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(3, 5, 96), (7, 576), (2, 7)])
def test_error_of_an_element(shape, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape) * np.exp(3 * rng.normal(size=(*shape[:-1], 1))), dtype)
    codes, scales = quantize(x)
    block = block_of(shape[-1])
    assert (codes.dtype, codes.shape) == (jnp.int8, shape)
    assert (scales.dtype, scales.shape) == (jnp.bfloat16, (*shape[:-1], shape[-1] // block))
    assert codes.nbytes + scales.nbytes == quantized_bytes(x.size, shape[-1])
    y = dequantize(codes, scales, dtype)
    assert y.dtype == dtype
    exact, got = (np.asarray(z, np.float64).reshape(-1, block) for z in (x, y))
    most = np.abs(exact).max(axis=1, keepdims=True)
    # Half a step of 1/127; the scale is rounded by up to 2^-9, the result to the dtype.
    cut = 2**-9 + (2**-9 if dtype == jnp.bfloat16 else 2**-22)
    assert (np.abs(got - exact) <= most * (0.5 / 127 + cut)).all()
    assert np.linalg.norm(got - exact) > 1e-3 * np.linalg.norm(exact)
    # With the scale, which is kept, they are as near as they can be.
    steps = np.asarray(scales, np.float64).reshape(-1, 1)
    nearest = np.clip(np.round(exact / steps), -127, 127)
    assert np.mean(np.asarray(codes).reshape(-1, block) == nearest) > 0.999  # ties in float32 and float64
    again = quantize(y)[0]
    assert np.mean(np.asarray(again) == np.asarray(codes)) > 0.99


def test_zeros_small_and_infinite_blocks():
    x = jnp.asarray([[0.0] * 4, [1e-42, 0, -1e-42, 0], [1.0, -jnp.inf, 2.0, 0], [1.0, jnp.nan, 2.0, 0]], jnp.float32)
    y = np.asarray(dequantize(*quantize(x), jnp.float32))
    assert (y[0] == 0).all()
    assert np.abs(y[1]).max() < 1e-38
    assert not np.isfinite(y[2:]).any()  # what overflowed is seen in the gradients


def test_a_layer_goes_on_with_the_tensor_and_backward_with_the_rounded_one():
    """f(x, w) = sin(3 x) w: its gradients are cos(3 x) 3 w and sin(3 x), of which the second is kept in 8 bits."""
    x, w = (jnp.asarray(np.random.default_rng(seed).normal(size=(5, 96)), jnp.float32) for seed in range(2))

    def f(x, w):
        return named(jnp.sin(3 * x), "gate") * w

    layer = jax.checkpoint(f, policy=Policy(quantized=frozenset({"gate"})))
    assert np.array_equal(layer(x, w), f(x, w))
    y, pull = jax.vjp(jax.jit(layer), x, w)
    assert np.array_equal(y, jax.jit(f)(x, w))
    dx, dw = pull(jnp.ones_like(y))
    rounded = dequantize(*quantize(jnp.sin(3 * x)), jnp.float32)
    # sin may differ in its last bit between programs, and moves a code to its neighbour where it is on the edge. A
    # scale on the edge moves its whole block, one of 15: it did so on an H100.
    assert np.mean(np.asarray(dw) == np.asarray(rounded)) > 0.8
    assert np.abs(dw - rounded).max() <= 1.1 / 127
    assert np.abs(dx - 3 * jnp.cos(3 * x) * w).max() < 1e-5

    for policy in (Policy(), Policy(saved=frozenset({"gate"})), Policy(quantized=frozenset({"up"}))):
        other = jax.checkpoint(f, policy=policy)
        assert np.array_equal(jax.grad(lambda w: other(x, w).sum())(w), jnp.sin(3 * x))  # noqa: B023
    assert np.array_equal(jax.vmap(layer)(x, w), f(x, w))
