"""rms_norm against the formula in float64: values and both gradients, Llama's and Gemma's form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels.rms_norm import add_rms_norm, branch_rms_norm, rms_norm

NORMS = [
    pytest.param(norm, implementation, marks=pytest.mark.rotate(f"{norm.__name__} {implementation}"))
    for norm in (rms_norm, add_rms_norm, branch_rms_norm)
    for implementation in ("xla", "triton")
]


@pytest.mark.parametrize(("norm", "implementation"), NORMS)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 8), (37, 77), (3, 4096)])  # of 77 and less a program has several rows
def test_values_and_gradients_against_float64(shape, dtype, plus_one, norm, implementation):
    rng = np.random.default_rng(0)
    x, residual, dout, dtotal = (jnp.asarray(rng.normal(size=shape) * scale, dtype) for scale in (3.0, 3.0, 1.0, 1.0))
    weight = jnp.asarray(rng.normal(size=shape[-1]), dtype)

    def f(*args):
        return norm(*args, 1e-5, plus_one=plus_one, implementation=implementation)

    def exact(*args):
        *summands, w = args
        x = sum(summands)
        out = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * (w + plus_one)
        return out if norm is rms_norm else (x, out)

    inputs = (x, residual, weight) if norm is add_rms_norm else (x, weight)
    cotangents = dout if norm is rms_norm else (dtotal, dout)
    out, pull = jax.vjp(jax.jit(f), *inputs)
    got = jax.tree.leaves((out, pull(cotangents)))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda z: jnp.asarray(np.asarray(z, np.float64)), (inputs, cotangents))
        want, want_pull = jax.vjp(exact, *wide[0])
        want = [np.asarray(z) for z in jax.tree.leaves((want, want_pull(wide[1])))]
    # Sums of 4096 terms in float32; bfloat16 rounds by up to 2^-9: the sum, the normalised value, the product.
    tolerance = 2e-6 if dtype == jnp.float32 else 3 * 2.0**-9
    assert [z.dtype for z in got] == [dtype] * len(got)
    for g, w in zip(got, want, strict=True):
        assert np.linalg.norm(np.asarray(g, np.float64) - w) < tolerance * np.linalg.norm(w)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_a_row_of_zeros_is_finite(implementation):
    x = jnp.zeros((2, 16), jnp.bfloat16)
    f = functools.partial(rms_norm, weight=jnp.ones(16, jnp.bfloat16), eps=1e-6, implementation=implementation)
    out, pull = jax.vjp(f, x)
    assert not np.asarray(out, np.float32).any()
    assert np.isfinite(np.asarray(pull(jnp.ones_like(x))[0], np.float32)).all()


def test_backward_keeps_one_number_a_row():
    x = jax.ShapeDtypeStruct((6, 64), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((64,), jnp.bfloat16)
    saved = jax.tree.leaves(jax.eval_shape(lambda x, w: jax.vjp(lambda x: rms_norm(x, w, 1e-5), x)[1], x, w))
    assert sorted(s.shape for s in saved) == [(6, 1), (6, 64), (64,)]
    assert [s.dtype for s in saved if s.shape == (6, 64)] == [jnp.bfloat16]


def test_the_kernel_says_what_it_cannot_do():
    with pytest.raises(NotImplementedError, match="'triton' cannot do this call: the last axis must have 1 to 16384"):
        rms_norm(jnp.ones((1, 20000)), jnp.ones(20000), 1e-5, implementation="triton")
