"""The Pallas-Triton forms of NF4 matmuls, one or several, and of the feed-forward layer; without a GPU interpreted."""

import collections
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from lora_jax.kernels.dispatch import using
from lora_jax.kernels.nf4 import dequantize, lora_matmul, quantize, triton, triton_mlp
from lora_jax.kernels.nf4.format import NF4Layer, NF4Weight, beside_all_scales
from lora_jax.kernels.nf4.mlp import lora_mlp
from lora_jax.kernels.nf4.shared_input import Projection, lora_matmuls
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


@pytest.mark.parametrize("double", [False, True])
def test_decoding_layers_of_a_stack(double):
    """Two weights that lie in stacks of three, as one call; also if only the second-level scales lie there."""
    rng = np.random.default_rng(1)
    single = [[quantize(normal(rng, n, 192, dtype=jnp.float32), double) for _ in range(3)] for n in (8, 4)]
    stacks = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *ws) for ws in single]
    beside = normal(rng, 12, 64)
    run = jax.jit(lambda stacks, i, x: triton.dequantize(*(NF4Layer(s, i) for s in stacks), beside=x))

    @jax.jit
    def run_beside(ones, stacks, i, x):
        return triton.dequantize(*(beside_all_scales(*pair, i) for pair in zip(ones, stacks, strict=True)), beside=x)

    for i in range(3):
        want = jnp.concatenate([dequantize(ws[i], jnp.bfloat16) for ws in single])
        got = run(stacks, jnp.int32(i), beside)
        np.testing.assert_array_equal(bits(got), bits(jnp.concatenate([want, beside], axis=1)))
        ones = [NF4Weight(ws[i].packed, ws[i].absmax) for ws in single]
        got = run_beside(ones, stacks, jnp.int32(i), beside)
        np.testing.assert_array_equal(bits(got), bits(jnp.concatenate([want, beside], axis=1)))


def test_decoding_several_weights_at_once():
    """Weights of other heights, doubly quantised or not."""
    rng = np.random.default_rng(0)
    weights = [
        quantize(normal(rng, n, 192, dtype=jnp.float32), double) for n, double in ((8, True), (4, False), (6, True))
    ]
    want = jnp.concatenate([dequantize(w, jnp.bfloat16) for w in weights])
    beside = normal(rng, 18, 128)
    got = jax.jit(lambda weights, x: triton.dequantize(*weights, beside=x))(weights, beside)
    np.testing.assert_array_equal(bits(got), bits(jnp.concatenate([want, beside], axis=1)))
    np.testing.assert_array_equal(bits(jax.jit(triton.dequantize)(*weights)), bits(want))


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
        pytest.param(m, shape, rank, double, marks=pytest.mark.rotate(f"{m} rows"))
        for m, shape, rank, double in [
            (33, (128, 64), 8, True),
            (3, (64, 192), 16, False),
            (1, (77, 64), 1, True),
            (20, (48, 128), 70, True),
            (17, (128, 64), 64, True),
        ]
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


def test_refusals_of_lora_matmul():
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


# Several layers of one input, and the feed-forward layer.


SCALES = (0.5, 0.7, 1.3)


def projections(weights, factors, biases=(None,) * 3):
    return [Projection(w, *ab, s, b) for w, ab, s, b in zip(weights, factors, SCALES, biases, strict=True)]


def layers_of(m, shapes, ranks, seed):
    """x, weights and factors of three layers, the weights in float64 as well; rank 0 is no adapter."""
    cases = [
        case(m, shape, max(rank, 1), seed % 2 == i % 2, seed + 100 * i)
        for i, (shape, rank) in enumerate(zip(shapes, ranks, strict=True))
    ]
    weights = tuple(one[1] for one in cases)
    factors = tuple(one[2:4] if rank else (None, None) for one, rank in zip(cases, ranks, strict=True))
    dense = [np.asarray(dequantize(w, jnp.bfloat16), np.float64) for w in weights]
    return cases[0][0], weights, factors, dense


def linear(x, dense, factors, i):
    """Layer i in the precision of its arguments."""
    a, b = factors[i]
    y = x @ dense[i].T
    return y if a is None else y + SCALES[i] * (x @ a) @ b


@pytest.mark.parametrize(
    ("m", "k", "sizes", "ranks"),
    [
        (37, 128, (128, 64, 64), (8, 16, 40)),  # merged forward, more than 64 columns
        # one matmul each, one layer without adapter
        pytest.param(3, 64, (96, 64, 48), (4, 0, 1), marks=pytest.mark.rotate("few rows")),
        pytest.param(1, 192, (64, 32, 40), (16, 16, 16), marks=pytest.mark.rotate("few rows")),
    ],
)
def test_lora_matmuls_are_no_worse_than_the_composition(m, k, sizes, ranks):
    def draw(seed):
        x, weights, factors, dense = layers_of(m, [(n, k) for n in sizes], ranks, seed)
        rng = np.random.default_rng(seed)
        biases = (normal(rng, sizes[0]), None, normal(rng, sizes[2]))
        dy = normal(rng, m, sum(sizes))
        wide = [0 if b is None else np.asarray(b, np.float64) for b in biases]
        definition = lambda x, factors: jnp.concatenate([linear(x, dense, factors, i) + wide[i] for i in range(3)], 1)  # noqa: E731
        return (weights, biases), (x, factors), dy, wide_gradients(definition, (x, factors), dy)

    def run(implementation, frozen, x, factors):
        weights, biases = frozen
        return jnp.concatenate(lora_matmuls(x, projections(weights, factors, biases), implementation=implementation), 1)

    draws = [draw(seed) for seed in draws_of(m)]
    found = {"triton": errors(functools.partial(run, "triton"), draws)}
    # On a CPU, as XLA on a GPU keeps float32 between some operations of small arrays.
    with using(lora_matmul="xla"), jax.default_device(jax.devices("cpu")[0]):
        found["xla"] = errors(functools.partial(run, "xla"), draws)
    assert np.max(found["triton"] / found["xla"]) < 1.1, found


@pytest.mark.parametrize(
    ("m", "k", "f", "ranks", "activation"),
    [
        pytest.param(37, 128, 192, (16, 8, 16), "silu", marks=pytest.mark.rotate("many rows")),
        pytest.param(64, 64, 128, (8, 8, 8), "silu", marks=pytest.mark.rotate("many rows")),
        pytest.param(3, 64, 128, (4, 20, 1), "silu", marks=pytest.mark.rotate("few rows")),
        pytest.param(1, 64, 64, (40, 40, 40), "silu", marks=pytest.mark.rotate("few rows")),
        pytest.param(37, 128, 192, (16, 8, 16), "gelu_tanh", marks=pytest.mark.rotate("many rows")),
    ],
)
def test_lora_mlp_is_no_worse_than_the_composition(m, k, f, ranks, activation):
    def draw(seed):
        x, weights, factors, dense = layers_of(m, ((f, k), (f, k), (k, f)), ranks, seed)
        dy = normal(np.random.default_rng(seed), m, k)

        def definition(x, factors):
            act = jax.nn.silu if activation == "silu" else jax.nn.gelu  # which is the approximation, by default
            h = act(linear(x, dense, factors, 0)) * linear(x, dense, factors, 1)
            return linear(h, dense, factors, 2)

        return weights, (x, factors), dy, wide_gradients(definition, (x, factors), dy)

    def run(implementation, weights, x, factors):
        return lora_mlp(x, *projections(weights, factors), activation=activation, implementation=implementation)

    draws = [draw(seed) for seed in draws_of(m)]
    found = {"triton": errors(functools.partial(run, "triton"), draws)}
    # On a CPU, as XLA on a GPU keeps float32 between some operations of small arrays.
    with using(lora_matmul="xla"), jax.default_device(jax.devices("cpu")[0]):
        found["xla"] = errors(functools.partial(run, "xla"), draws)
    assert np.max(found["triton"] / found["xla"]) < 1.1, found


@pytest.mark.parametrize(
    ("m", "f", "tiles"),
    [
        (48, 128, {}),
        (37, 192, dict(block=16, parts=3)),
        (3, 48, dict(block=64, cols=16, parts=2)),
        (1, 64, dict(parts=1)),
        (37, 128, dict(activation="gelu_tanh")),
    ],
)
def test_backward_of_the_gated_activation(m, f, tiles):
    """Gates from -30 to 30 too; every form of tiles, also where a part has no rows."""
    rng = np.random.default_rng(4)
    gate = jnp.asarray(rng.normal(size=(m, f)) * rng.choice([1, 10], (m, 1)), jnp.bfloat16)
    up, dh, a = normal(rng, m, f), normal(rng, m, f + 64), normal(rng, f, 32) / 8
    thin = normal(rng, m, 64)
    got = jax.jit(functools.partial(triton_mlp.backward, widths=(16, 32), **tiles))(gate, up, dh, thin, a=a)
    wide = [np.asarray(z, np.float64) for z in (gate, up, dh, thin, a)]
    gate, up, dh, thin, a = wide
    dthin, dh = dh[:, f : f + 32], dh[:, :f] + dh[:, f : f + 32] @ a.T
    if "activation" in tiles:
        tanh = np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
        act = gate * (1 + tanh) / 2
        slope = (1 + tanh) / 2 + gate * (1 - tanh**2) / 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * gate**2)
    else:
        sigmoid = 1 / (1 + np.exp(-gate))
        act, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    dgate, dup = dh * up * slope, dh * act
    want = (dgate, dup, (act * up).T @ dthin, dgate.T @ thin[:, :16], dup.T @ thin[:, 16:48])
    # Every term is rounded to bfloat16 once, by at most 2^-8 of itself.
    for one, other in zip(got, want, strict=True):
        assert relative(one, other) < 2**-8


def test_the_decoded_weights_are_no_residuals():
    x, weights, factors, _ = layers_of(8, ((256, 192), (128, 192), (128, 192)), (4, 4, 4), 2)

    def shared(x, factors):
        return lora_matmuls(x, projections(weights, factors), implementation="triton")

    _, pull = jax.vjp(shared, x, factors)
    assert max(leaf.size for leaf in jax.tree.leaves(pull) if hasattr(leaf, "size")) == weights[0].packed.size
    x, weights, factors, _ = layers_of(8, ((256, 128), (256, 128), (128, 256)), (4, 4, 4), 2)
    _, pull = jax.vjp(
        lambda x, factors: lora_mlp(x, *projections(weights, factors), implementation="triton"), x, factors
    )
    assert max(leaf.size for leaf in jax.tree.leaves(pull) if hasattr(leaf, "size")) == weights[0].packed.size


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(a=None, b=None), "has no adapter"),
        (dict(bias=jnp.zeros(128)), "has a bias"),
        (dict(dropout_rate=0.5, dropout_key=jax.random.key(0)), "dropout"),
        (dict(w=jnp.zeros((128, 64), jnp.bfloat16)), "not NF4"),
        (dict(a=jnp.zeros((64, 65)), b=jnp.zeros((65, 128))), "rank 65"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_fused_layer_refuses_the_composition_does(changes, reason):
    x, weights, factors, _ = layers_of(5, ((128, 64), (128, 64), (64, 128)), (4, 4, 4), 2)
    gate, up, down = projections(weights, factors)
    up = up._replace(**changes)
    with pytest.raises(NotImplementedError, match=reason):
        lora_mlp(x, gate, up, down, implementation="triton")
    got = lora_mlp(x, gate, up, down)
    one = functools.partial(lora_matmul, x)
    g = one(gate.w, gate.a, gate.b, gate.scale)
    u = one(up.w, up.a, up.b, up.scale, dropout_rate=up.dropout_rate, dropout_key=up.dropout_key)
    h = jax.nn.silu(g) * (u if up.bias is None else u + up.bias.astype(u.dtype))
    np.testing.assert_array_equal(bits(got), bits(lora_matmul(h, down.w, down.a, down.b, down.scale)))


def test_refusals_of_lora_matmuls():
    x, weights, factors, _ = layers_of(5, ((128, 64), (128, 64), (64, 64)), (4, 70, 70), 2)
    good = projections(weights, factors)
    refused = functools.partial(lora_matmuls, implementation="triton")
    with pytest.raises(NotImplementedError, match="no projection has an adapter"):
        refused(x, [p._replace(a=None, b=None) for p in good])
    with pytest.raises(NotImplementedError, match=r"ranks \[4, 70, 70\] take 272 columns together, at most 256"):
        refused(x, good)
    with pytest.raises(NotImplementedError, match="projection 1: its adapter has dropout"):
        refused(x, [good[0], good[1]._replace(dropout_rate=0.1, dropout_key=jax.random.key(0))])
    with pytest.raises(NotImplementedError, match="projection 0: it computes in bfloat16"):
        refused(x.astype(jnp.float32), good[:2])
    with pytest.raises(ValueError, match="x has 32 features"):
        lora_matmuls(x[:, :32], good)
    with pytest.raises(ValueError, match="both LoRA factors"):
        lora_matmuls(x, [good[0]._replace(b=None)])
    with pytest.raises(NotImplementedError, match="silu, gelu_tanh, not relu"), using(lora_mlp="triton"):
        lora_mlp(x, *good, activation="relu")


def live_calls(jaxpr, found):
    """Counts dots by their shapes and kernels by name; what no result needs is left out, as compilers do."""
    live = {v for v in jaxpr.outvars if not isinstance(v, jax.extend.core.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if not live.intersection(eqn.outvars):
            continue
        live.update(v for v in eqn.invars if not isinstance(v, jax.extend.core.Literal))
        if eqn.primitive.name == "pallas_call":
            found[eqn.params["name"]] += 1
        elif eqn.primitive.name == "dot_general":
            found[tuple(v.aval.shape for v in eqn.invars)] += 1
        else:
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                live_calls(inner, found)
    return found


def test_what_a_rematerialised_layer_computes_again():
    """With its names kept nothing but the norms; without "thin" the passes that make thin products as well."""
    m, k, f = 48, 128, 192
    shapes = ((k, k), (64, k), (64, k), (f, k), (f, k), (k, f))
    weights = [NF4Weight.abstract(shape, True) for shape in shapes]
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    factors = [(f32((k, 16)), f32((16, n))) for n, k in shapes]
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)

    def layer(x, weights, factors):
        parts = [Projection(w, *ab, 0.5) for w, ab in zip(weights, factors, strict=True)]
        q, k, v = lora_matmuls(jnp.sin(x), parts[:3], implementation="triton")
        q, k, v = (checkpoint_name(y, name) for y, name in ((q, "q"), (k, "k"), (v, "v")))
        x = checkpoint_name(x + jnp.tanh(q) * jnp.concatenate([jnp.sin(k), jnp.cos(v)], 1), "residual")
        return x + lora_mlp(jnp.sin(x), *parts[3:], implementation="triton")

    def run(names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        kept = jax.checkpoint(layer, policy=policy, prevent_cse=False)

        def both(x, weights, factors, dy):
            y, pull = jax.vjp(lambda x, factors: kept(x, weights, factors), x, factors)
            return y, pull(dy)

        return live_calls(jax.make_jaxpr(both)(x, weights, factors, x).jaxpr, collections.Counter())

    found = run(("q", "k", "v", "residual", "gate", "up", "thin"))
    # q, k and v are decoded into one matrix; gate and up apart, whose gradients take their place.
    kernels = dict(nf4_dequantize=8, lora_extend=2, lora_swiglu=1, lora_swiglu_backward=1, lora_add_product=2)
    assert {name: count for name, count in found.items() if isinstance(name, str)} == kernels
    large = {
        shapes: count for shapes, count in found.items() if not isinstance(shapes, str) and min(*sum(shapes, ())) > 32
    }
    assert sum(large.values()) == 8 + 2, large  # 4 forward, 4 backward; the gradients of A from x
    again = run(("q", "k", "v", "residual", "gate", "up"))
    assert (again["lora_extend"], again["lora_swiglu"], again["nf4_dequantize"]) == (4, 2, 8)
