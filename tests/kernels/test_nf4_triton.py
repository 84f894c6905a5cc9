"""The Pallas-Triton forms of the NF4 matmul and of the feed-forward layer; without a GPU in the interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels.nf4 import dequantize, lora_matmul, quantize, triton
from lora_jax.kernels.nf4.mlp import Projection, lora_mlp
from lora_jax.kernels.nf4.triton_adapter import add_product, extend, padded_rank


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.int16)


def normal(rng: np.random.Generator, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), dtype)


def relative(got, want) -> float:
    got = np.asarray(got, np.float64)
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(8, 128), (6, 64), (5, 192), (4, 1024)])
def test_decoding_equals_the_definition_bit_for_bit(shape, double):
    """Also with an adapter's columns or rows beside it. Equal bits leave no element unwritten."""
    rng = np.random.default_rng(0)
    w = quantize(normal(rng, *shape, dtype=jnp.float32), double)
    want = dequantize(w, jnp.bfloat16)
    np.testing.assert_array_equal(bits(jax.jit(triton.dequantize)(w)), bits(want))
    beside, below = normal(rng, shape[0], 64), normal(rng, 64, shape[1])
    got = jax.jit(lambda w, x: triton.dequantize(w, beside=x))(w, beside)
    np.testing.assert_array_equal(bits(got), bits(jnp.concatenate([want, beside], axis=1)))
    got = jax.jit(lambda w, x: triton.dequantize(w, below=x))(w, below)
    np.testing.assert_array_equal(bits(got), bits(jnp.concatenate([want, below], axis=0)))


@pytest.mark.parametrize(("m", "k", "rank"), [(16, 128, 16), (5, 64, 16), (33, 192, 32), (2, 64, 64)])
def test_extended_activations(m, k, rank):
    rng = np.random.default_rng(1)
    x, a = normal(rng, m, k), normal(rng, k, rank)
    got = extend(x, a)
    assert got.shape == (m, k + 64)
    np.testing.assert_array_equal(bits(got[:, :k]), bits(x))
    np.testing.assert_array_equal(bits(got[:, k + rank :]), 0)
    wide = [np.asarray(z, np.float64) for z in (x, a, got[:, k : k + rank])]
    # One rounding to bfloat16, at most 2^-9 of each value.
    assert relative(wide[2], wide[0] @ wide[1]) < 2**-9
    assert relative(add_product(got, a.T), wide[0] + wide[2] @ wide[1].T) < 2**-9


def test_ranks_are_padded():
    assert [padded_rank(r) for r in (1, 16, 17, 64, 65)] == [(16, 64), (16, 64), (32, 64), (64, 64), (128, 128)]


def case(m, shape, rank, double=True, seed=2):
    n, k = shape
    rng = np.random.default_rng(seed)
    w = quantize(normal(rng, n, k, dtype=jnp.float32) / k**0.5, double)
    a, b = normal(rng, k, rank, dtype=jnp.float32) / k**0.5, normal(rng, rank, n, dtype=jnp.float32) / rank**0.5
    return normal(rng, m, k), w, a, b, normal(rng, m, n)


def wide_gradients(f, args, dy):
    """[f(args), *gradients] in float64."""
    with jax.enable_x64(True):
        wide = lambda z: jnp.asarray(np.asarray(z, np.float64))  # noqa: E731
        y, pull = jax.vjp(f, *jax.tree.map(wide, args))
        return [np.asarray(z) for z in jax.tree.leaves((y, pull(wide(dy))))]


def errors(f, draws):
    """Relative errors of y and of the gradients, each over all draws of (frozen, args, dy, wanted) together.

    f(frozen, *args) is compiled once; two runs are equal. One row has so few numbers in its thin products that the
    rounding of a single draw says nothing: see `draws_of`.
    """
    run = jax.jit(
        lambda frozen, args, dy: (lambda y, pull: (y, pull(dy)))(*jax.vjp(functools.partial(f, frozen), *args))
    )
    results, wanted = [], []
    for frozen, args, dy, want in draws:
        first, second = (jax.tree.leaves(run(frozen, args, dy)) for _ in range(2))
        for one, two in zip(first, second, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
        results.append(first)
        wanted.append(want)
    pairs = ((np.stack([draw[i] for draw in both]) for both in (results, wanted)) for i in range(len(want)))
    return np.array([relative(*pair) for pair in pairs])


def draws_of(m: int) -> range:
    """Seeds: so many that 32 rows or more are seen."""
    return range(2, 3 + 31 // m)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(
    ("m", "shape", "rank", "double"),
    [
        (33, (128, 64), 8, True),
        (3, (64, 192), 16, False),
        (1, (77, 64), 1, True),
        (20, (48, 128), 70, True),
        (17, (128, 64), 64, True),
    ],
)
def test_lora_matmul_is_no_worse_than_the_plain_form(m, shape, rank, double, dropout):
    key = jax.random.key(3)
    mask = np.ones((m, shape[1]))
    if dropout:
        mask = np.asarray(jax.random.bernoulli(key, 1 - dropout, mask.shape)) / (1 - dropout)

    def draw(seed):
        x, w, a, b, dy = case(m, shape, rank, double, seed)
        dense = np.asarray(dequantize(w, jnp.bfloat16), np.float64)
        want = wide_gradients(lambda x, a, b: x @ dense.T + 0.7 * ((x * mask) @ a) @ b, (x, a, b), dy)
        return w, (x, a, b), dy, want

    def ours(w, x, a, b):
        return lora_matmul(x, w, a, b, 0.7, dropout_rate=dropout, dropout_key=key, implementation="triton")

    def plain(w, x, a, b):
        """As PEFT computes it: every matmul and every sum is rounded to bfloat16."""
        a, b = a.astype(x.dtype), b.astype(x.dtype)
        dense = dequantize(w, jnp.bfloat16)
        return x @ dense.T + ((x * mask.astype(x.dtype)) @ a) @ b * jnp.bfloat16(0.7)

    draws = [draw(seed) for seed in draws_of(m)]
    found = {name: errors(f, draws) for name, f in (("plain", plain), ("triton", ours))}
    assert np.max(found["triton"] / found["plain"]) < 1.1, found


def test_without_an_adapter():
    x, w, _, _, dy = case(9, (96, 128), 4)
    dense = np.asarray(dequantize(w, jnp.bfloat16), np.float64)
    want = wide_gradients(lambda x: x @ dense.T, (x,), dy)
    found = errors(lambda w, x: lora_matmul(x, w, implementation="triton"), [(w, (x,), dy, want)])
    assert max(found) < 2**-8


def test_the_decoded_weight_is_no_residual():
    for shape in ((192, 128), (128, 192)):
        x, w, a, b, _ = case(8, shape, 4)
        _, pull = jax.vjp(lambda x, a, b: lora_matmul(x, w, a, b, 1.0, implementation="triton"), x, a, b)  # noqa: B023
        kept = [leaf.size for leaf in jax.tree.leaves(pull) if hasattr(leaf, "size")]
        assert max(kept) == w.packed.size


def test_refusals():
    x, w, a, b, _ = case(4, (64, 128), 4)
    with pytest.raises(NotImplementedError, match="x is float32"):
        lora_matmul(x.astype(jnp.float32), w, a, b, implementation="triton")
    with pytest.raises(NotImplementedError, match="not NF4"):
        lora_matmul(x, dequantize(w, jnp.bfloat16), a, b, implementation="triton")
    x, w, a, b, _ = case(4, (64, 96), 4)
    with pytest.raises(NotImplementedError, match="K = 96"):
        lora_matmul(x, w, a, b, implementation="triton")
    x, w, a, b, _ = case(4, (40, 128), 4)
    with pytest.raises(NotImplementedError, match="N = 40"):
        lora_matmul(x, w, a, b, implementation="triton")


@pytest.mark.parametrize(("m", "k", "f", "rank"), [(32, 64, 128, 8), (37, 128, 192, 16), (1, 64, 64, 40)])
def test_lora_mlp_is_no_worse_than_the_composition(m, k, f, rank):
    scales = (0.5, 0.7, 1.3)

    def draw(seed):
        x, *gate, _ = case(m, (f, k), rank, seed=seed)
        _, *up, _ = case(m, (f, k), rank, seed=seed + 100)
        _, *down, dy = case(m, (k, f), rank, seed=seed + 200)
        weights, factors = (gate[0], up[0], down[0]), (gate[1:], up[1:], down[1:])
        dense = [np.asarray(dequantize(w, jnp.bfloat16), np.float64) for w in weights]

        def definition(x, factors):
            linear = lambda x, i: x @ dense[i].T + scales[i] * (x @ factors[i][0]) @ factors[i][1]  # noqa: E731
            return linear(jax.nn.silu(linear(x, 0)) * linear(x, 1), 2)

        return weights, (x, factors), dy, wide_gradients(definition, (x, factors), dy)

    def run(implementation, weights, x, factors):
        projections = (Projection(w, *ab, s) for w, ab, s in zip(weights, factors, scales, strict=True))
        return lora_mlp(x, *projections, implementation=implementation)

    draws = [draw(seed) for seed in draws_of(m)]
    found = {name: errors(functools.partial(run, name), draws) for name in ("xla", "triton")}
    assert np.max(found["triton"] / found["xla"]) < 1.1, found
