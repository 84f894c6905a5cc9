"""grouped_lora_mlp against its definition in float64, and the gathers of token-expert pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels.dispatch import why_not_hopper
from lora_jax.kernels.grouped import grouped_lora_mlp, triton_gated
from lora_jax.kernels.grouped.rows import rows_of_pairs, sums_of_pairs, take_rows
from lora_jax.kernels.nf4 import dequantize, quantize
from lora_jax.kernels.nf4.shared_input import Projection

E, SCALES = 4, (0.7, 1.3, 0.9)
CLAMP = 1.702, 2.5  # (alpha, limit)


def case(k, f, ranks, m, biased, dtype=jnp.bfloat16, seed=0):
    """(x, weights of rows, quantised weights, their values, factors, biases, dy) of 4 experts."""
    rng = np.random.default_rng(seed)
    draw = lambda *s: rng.normal(size=s)  # noqa: E731
    packed, values = [], []
    for n, inner in ((f, k), (f, k), (k, f)):
        one = [quantize(jnp.asarray(w, jnp.float32), True) for w in draw(E, n, inner) / np.sqrt(inner)]
        packed.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *one))
        values.append(np.asarray(dequantize(packed[-1], dtype), np.float64))
    factors = [
        (jnp.asarray(draw(E, inner, r) / np.sqrt(inner), jnp.float32), jnp.asarray(draw(E, r, n) / r, jnp.float32))
        for (n, inner), r in zip(((f, k), (f, k), (k, f)), ranks, strict=True)
    ]
    biases = [jnp.asarray(draw(E, f), dtype) if biased else None for _ in range(2)]
    x, dy = (jnp.asarray(draw(m, k), dtype) for _ in range(2))
    return x, jnp.asarray(rng.uniform(0.1, 1, m), jnp.float32), packed, values, factors, biases, dy


def definition(x, weights, factors, values, biases, expert, activation, clamp):
    """y [M, K] in float64; `expert` has the number of every row's expert, E for none."""
    at = np.minimum(expert, E - 1)

    def linear(x, i):
        (a, b), w = factors[i], values[i]
        y = jnp.einsum("mk,mnk->mn", x, w[at])
        return y + SCALES[i] * jnp.einsum("mr,mrn->mn", jnp.einsum("mk,mkr->mr", x, a[at]), b[at])

    gate, up = (linear(x, i) + (0 if biases[i] is None else biases[i][at]) for i in range(2))
    if clamp is not None:
        alpha, limit = clamp
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit) + 1
        act = gate * jax.nn.sigmoid(alpha * gate)
    else:
        act = jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return jnp.where((expert < E)[:, None], linear(weights[:, None] * act * up, 2), 0)


def check(sizes, m, k, f, ranks, *, activation="silu", clamp=None, biased=False, implementation="triton"):
    x, weights, packed, values, factors, biases, dy = case(k, f, ranks, m, biased)
    sizes_, expert = jnp.asarray(sizes, jnp.int32), np.repeat(np.arange(E + 1), (*sizes, m - sum(sizes)))

    def f_(x, weights, factors):
        layers = [Projection(w, a, b, s) for w, (a, b), s in zip(packed, factors, SCALES, strict=True)]
        gate, up = (p._replace(bias=b) for p, b in zip(layers[:2], biases, strict=True))
        how = {"activation": activation, "clamp": clamp, "implementation": implementation}
        return grouped_lora_mlp(x, gate, up, layers[2], sizes_, weights, **how)

    y, pull = jax.vjp(jax.jit(f_), x, weights, factors)
    got = y, *pull(dy)
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda z: jnp.asarray(np.asarray(z, np.float64)), tree)  # noqa: E731
        how = {"values": wide(values), "biases": wide(biases), "expert": expert}
        exact = functools.partial(definition, **how, activation=activation, clamp=clamp)
        y, pull = jax.vjp(exact, wide(x), wide(weights), wide(factors))
        want = jax.tree.map(np.asarray, (y, *pull(wide(dy))))
    for name, g, w in zip(("y", "dx", "dweights", "dfactors"), got, want, strict=True):
        for one, exactly in zip(jax.tree.leaves(g), jax.tree.leaves(w), strict=True):
            one = np.asarray(one, np.float64)
            assert np.isfinite(one).all(), name
            # Each factor of a product, and each result in between, is rounded to bfloat16: 2^-9 of itself. At a clamp's
            # limit gradients jump, and rounding takes some numbers to its other side.
            assert np.linalg.norm(one - exactly) < (2e-2 if clamp is None else 4e-2) * max(
                np.linalg.norm(exactly), 1e-30
            ), name
            if name in ("y", "dx", "dweights"):
                assert not one[sum(sizes) :].any(), name  # rows of no expert


@pytest.mark.rotate
@pytest.mark.parametrize(
    ("sizes", "m", "options"),
    [
        ((30, 0, 41, 19), 100, {}),  # an empty expert, rows of none
        ((1, 70, 0, 8), 79, {"activation": "gelu_tanh"}),
        ((40, 3, 20, 17), 80, {"clamp": CLAMP, "biased": True}),
    ],
)
def test_all_gradients_against_float64(sizes, m, options, monkeypatch):
    monkeypatch.setattr(triton_gated, "_LEAST", 16)  # rows of a stretch: experts with more have several
    check(sizes, m, 64, 128, (16, 16, 8), **options)


def test_the_composition_and_odd_ranks():
    check((30, 0, 41, 19), 100, 64, 64, (3, 5, 7), implementation="xla", clamp=CLAMP, biased=True)
    with pytest.raises(NotImplementedError, match="differ in rank"):
        check((30, 0, 41, 19), 100, 64, 64, (3, 5, 7))


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "f"), [(512, 768), (320, 704), (192, 192)])  # the expert of 711 has two stretches
@pytest.mark.parametrize("options", [{}, {"clamp": CLAMP, "biased": True}])
def test_many_rows(k, f, options):
    if reason := why_not_hopper():
        pytest.skip(reason)
    check((130, 0, 711, 173), 1111, k, f, (16, 16, 16), **options)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_rows_are_taken(implementation):
    x = jax.random.normal(jax.random.key(0), (37, 700), jnp.bfloat16)
    index = jax.random.randint(jax.random.key(1), (101,), 0, 37)
    got = take_rows(x, index, implementation=implementation)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(x, np.float32)[np.asarray(index)])


def test_pairs_and_their_sums_are_transposes():
    """<rows(x), y> = <x, sums(y)>, and so for both gradients, which are the one and the other."""
    tokens, k, d = 9, 3, 20
    rng = np.random.default_rng(0)
    order = rng.permutation(tokens * k)
    place = np.argsort(order)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((tokens, d), (tokens * k, d)))
    rows, pull = jax.vjp(lambda x: rows_of_pairs(x, order, place), x)
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(x)[order // k])
    sums, pull_sums = jax.vjp(lambda y: sums_of_pairs(y, order, place, tokens), y)
    want = np.zeros((tokens, d))
    np.add.at(want, order // k, np.asarray(y, np.float64))
    np.testing.assert_allclose(np.asarray(sums), want, rtol=1e-5, atol=1e-6)  # three float32 are added
    np.testing.assert_allclose(np.asarray(pull(y)[0]), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(pull_sums(x)[0]), np.asarray(rows))
