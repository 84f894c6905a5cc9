"""grouped_lora_matmul against the definition written out in float64, row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels.dispatch import why_not_hopper
from lora_jax.kernels.grouped import grouped_lora_matmul, grouped_lora_matmuls, xla
from lora_jax.kernels.nf4 import dequantize, quantize
from lora_jax.kernels.nf4.format import NF4Layer, NF4Weight, beside_all_scales
from lora_jax.kernels.nf4.shared_input import Projection
from tests.jaxprs import equations

ROUTING = {  # rows of 4 experts, and rows in all
    "even": ([8, 8, 8, 8], 32),
    "skewed, empty experts": ([0, 29, 0, 3], 32),
    "rows left over": ([5, 0, 7, 1], 20),
    "one row": ([0, 0, 1, 0], 1),
    "no row routed": ([0, 0, 0, 0], 3),
    "odd": ([17, 1, 40, 19], 77),
}


def case(experts, n, k, rank, m, base, dtype, seed=0):
    """(x, weight, dense float64 weights, a, b, dy)."""
    rng = np.random.default_rng(seed)
    draw = lambda *s: rng.normal(size=s)  # noqa: E731
    w = jnp.asarray(draw(experts, n, k) / np.sqrt(k), jnp.float32)
    if base == "float":
        weight = w.astype(dtype)
        dense = weight
    else:
        one = [quantize(part, base == "nf4-double") for part in w]
        weight = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one)
        dense = dequantize(weight, dtype)
    a, b = draw(experts, k, rank) / np.sqrt(k), draw(experts, rank, n) / np.sqrt(rank)
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    return jnp.asarray(draw(m, k), dtype), weight, np.asarray(dense, np.float64), a, b, jnp.asarray(draw(m, n), dtype)


def reference(x, dense, sizes, a, b, scale, dy):
    """y, dx, da, db in float64, one row at a time."""
    x, a, b, dy = (np.asarray(z, np.float64) for z in (x, a, b, dy))
    y, dx, da, db = np.zeros((len(x), dense.shape[1])), np.zeros_like(x), np.zeros_like(a), np.zeros_like(b)
    for row, e in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        whole = dense[e].T + scale * a[e] @ b[e]
        y[row], dx[row] = x[row] @ whole, dy[row] @ whole.T
        outer = scale * np.outer(x[row], dy[row])
        da[e] += outer @ b[e].T
        db[e] += a[e].T @ outer
    return y, dx, da, db


def relative(got, want) -> float:
    got = np.asarray(got, np.float64)
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def run(x, weight, sizes, a, b, dy, scale=0.7, implementation=None):
    """y and all gradients. Compiled once for all calls that differ in numbers alone."""
    return _run(x, weight, jnp.asarray(sizes, jnp.int32), a, b, dy, scale, implementation, xla.BLOCK_ROWS)


@functools.partial(jax.jit, static_argnums=(6, 7, 8))
def _run(x, weight, sizes, a, b, dy, scale, implementation, _block_rows):
    def f(x, a, b):
        return grouped_lora_matmul(x, weight, sizes, a, b, scale, implementation=implementation)

    y, pull = jax.vjp(f, x, a, b)
    return y, *pull(dy)


def check(implementation, routing, shape, rank, base, dtype):
    sizes, m = ROUTING[routing]
    x, weight, dense, a, b, dy = case(4, *shape, rank, m, base, dtype)
    got = run(x, weight, sizes, a, b, dy, implementation=implementation)
    want = reference(x, dense, sizes, a, b, 0.7, dy)
    # Sums of up to a few hundred products in float32: 1e-5. With bfloat16 operands each factor is rounded to 2^-9.
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert got[0].dtype == x.dtype
    for name, g, w in zip(("y", "dx", "da", "db"), got, want, strict=True):
        assert relative(g, w) < tolerance, name
    for g in got[:2]:
        assert not np.asarray(g, np.float32)[sum(sizes) :].any()  # rows of no expert
    for name, one, again in zip(
        "yxab", got, run(x, weight, sizes, a, b, dy, implementation=implementation), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(again), err_msg=name)


@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_gradients_against_float64(routing, dtype):
    check("xla", routing, (96, 128), 5, "nf4-double", dtype)


@pytest.mark.parametrize(("base", "shape"), [("float", (50, 36)), ("nf4", (48, 96)), ("nf4-double", (96, 64))])
def test_bases_and_odd_shapes(base, shape):
    check("xla", "odd", shape, 3, base, jnp.float32)


def test_blocks_of_rows_overhang_into_the_next_expert(monkeypatch):
    """The rows of an expert are taken in blocks; the last one reads and must leave alone the rows that follow."""
    monkeypatch.setattr(xla, "BLOCK_ROWS", 16)
    for routing in ("odd", "rows left over", "skewed, empty experts"):
        check("xla", routing, (64, 64), 4, "float", jnp.float32)


def test_without_an_adapter_and_single_expert():
    x, weight, dense, _, _, dy = case(1, 64, 128, 2, 9, "nf4-double", jnp.float32)
    sizes = jnp.asarray([9], jnp.int32)
    y, pull = jax.vjp(lambda x: grouped_lora_matmul(x, weight, sizes), x)
    assert relative(y, np.asarray(x, np.float64) @ dense[0].T) < 1e-5
    assert relative(pull(dy)[0], np.asarray(dy, np.float64) @ dense[0]) < 1e-5
    assert grouped_lora_matmul(x[:0], weight, sizes * 0).shape == (0, 64)


def test_rows_of_no_expert_may_hold_anything():
    sizes, m = ROUTING["rows left over"]
    x, weight, _, a, b, dy = case(4, 64, 64, 4, m, "float", jnp.float32)
    want = run(x, weight, sizes, a, b, dy)
    got = run(x.at[sum(sizes) :].set(jnp.nan), weight, sizes, a, b, dy.at[sum(sizes) :].set(jnp.nan))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(g), np.asarray(w))


def test_frozen_weights_are_no_residual():
    """Backward keeps x, the packed weights, A and B: nothing of the size of the dense weights."""
    x, weight, _, a, b, _ = case(4, 192, 256, 4, 24, "nf4-double", jnp.float32)
    sizes = jnp.asarray([6, 6, 6, 6], jnp.int32)
    _, pull = jax.vjp(lambda x, a, b: grouped_lora_matmul(x, weight, sizes, a, b), x, a, b)
    kept = {leaf.shape for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")}
    assert (4, 192, 128) in kept
    assert max(int(np.prod(shape)) for shape in kept) == 4 * 192 * 128


def test_refuses():
    x, w, _, a, b, _ = case(4, 64, 128, 4, 8, "float", jnp.float32)
    sizes = jnp.asarray([2, 2, 2, 2], jnp.int32)
    with pytest.raises(ValueError, match=r"does not fit weights .* want \[M, 128\]"):
        grouped_lora_matmul(x[:, 1:], w, sizes)
    with pytest.raises(ValueError, match=r"4 experts want \(4,\)"):
        grouped_lora_matmul(x, w, sizes[1:])
    with pytest.raises(ValueError, match="both LoRA factors"):
        grouped_lora_matmul(x, w, sizes, a)
    with pytest.raises(ValueError, match="do not fit"):
        grouped_lora_matmul(x, w, sizes, a, b[:, 1:])
    with pytest.raises(ValueError, match="'cuda' is unknown; known are"):
        grouped_lora_matmul(x, w, sizes, a, b, implementation="cuda")


@pytest.mark.parametrize(("implementation", "dtype"), [("xla", jnp.float32), ("triton", jnp.bfloat16)])
def test_dropout(implementation, dtype):
    """As the definition for the mask that was drawn, which one-hot adapters show."""
    sizes, m = ROUTING["odd"]
    x, weight, dense, a, b, dy = case(4, 96, 64, 3, m, "nf4-double", dtype)
    how = dict(dropout_rate=0.4, dropout_key=jax.random.key(5), implementation=implementation)
    call = functools.partial(grouped_lora_matmul, group_sizes=jnp.asarray(sizes, jnp.int32), **how)
    zero, eye = jnp.zeros((4, 96, 64), dtype), jnp.broadcast_to(jnp.eye(64), (4, 64, 64))
    mask = np.asarray(call(jnp.ones_like(x), zero, a=eye, b=jnp.eye(64, 96)[None].repeat(4, 0)), np.float64)[:, :64]
    assert np.isin((0.6 * mask).round(2), (0, 1)).all()
    assert abs((mask == 0).mean() - 0.4) < 0.03  # 4928 draws: 4 standard deviations
    y, pull = jax.vjp(lambda x, a, b: call(x, weight, a=a, b=b, scale=0.7), x, a, b)
    got = y, *pull(dy)
    keep = (mask > 0) / 0.6
    zeros = np.zeros_like(dense)
    base = reference(x, dense, sizes, 0 * a, 0 * b, 0.7, dy)
    adapter = reference(np.asarray(x, np.float64) * keep, zeros, sizes, a, b, 0.7, dy)
    want = base[0] + adapter[0], base[1] + keep * adapter[1], *adapter[2:]
    # Without dropout the same bars; in bfloat16 dx is rounded twice more.
    for name, g, w in zip(("y", "dx", "da", "db"), got, want, strict=True):
        assert relative(g, w) < (1e-5 if dtype == jnp.float32 else 2e-2), name
    with pytest.raises(ValueError, match="needs a dropout_key"):
        grouped_lora_matmul(x, weight, jnp.asarray(sizes, jnp.int32), a, b, dropout_rate=0.1)


@pytest.mark.parametrize(
    ("routing", "shape", "rank", "base"),
    [
        pytest.param("odd", (96, 64), 5, "nf4-double", marks=pytest.mark.rotate("NF4")),
        pytest.param("rows left over", (50, 36), 3, "float", marks=pytest.mark.rotate("float")),  # no divisor of tiles
        pytest.param("skewed, empty experts", (64, 128), 16, "nf4", marks=pytest.mark.rotate("NF4")),
        # Few rows an expert, K no multiple of the step.
        pytest.param("even", (48, 192), 4, "nf4-double", marks=pytest.mark.rotate("NF4")),
        pytest.param("no row routed", (64, 64), 2, "float", marks=pytest.mark.rotate("float")),
    ],
)
def test_triton_in_the_interpreter(routing, shape, rank, base):
    check("triton", routing, shape, rank, base, jnp.bfloat16)


# ---- experts of one layer in a stack of layers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("implementation", "routing", "dtype"),
    [
        pytest.param("xla", "odd", jnp.float32, marks=pytest.mark.rotate("xla")),
        pytest.param("triton", "odd", jnp.bfloat16, marks=pytest.mark.rotate("decoded before")),
        pytest.param("triton", "rows left over", jnp.bfloat16, marks=pytest.mark.rotate("few rows: in the loop")),
    ],
)
@pytest.mark.parametrize("base", ["nf4", "nf4-double"])
def test_layers_of_a_stack_equal_those_cut_out_bit_for_bit(implementation, routing, dtype, base):
    sizes, m = ROUTING[routing]
    x, _, _, a, b, dy = case(4, 96, 64, 3, m, base, dtype)
    layers = [case(4, 96, 64, 3, m, base, dtype, seed)[1] for seed in (1, 2, 3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    for index, alone in enumerate(layers):
        ways = [NF4Layer(stack, jnp.int32(index))]
        if isinstance(alone, NF4Weight) and alone.double_quantized:
            ways.append(beside_all_scales(NF4Weight(alone.packed, alone.absmax), stack, jnp.int32(index)))
        want = run(x, alone, sizes, a, b, dy, implementation=implementation)
        for got in (run(x, way, sizes, a, b, dy, implementation=implementation) for way in ways):
            _equal_bits(got, want)


def _equal_bits(got, want):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(g, np.float32), np.asarray(w, np.float32))


@pytest.mark.parametrize("rows", [100, 5])
def test_experts_of_a_stack_are_not_copied(rows):
    """Forward and backward take nothing out of the packed stack: they only merge its leading axes."""
    stack = NF4Weight.abstract((3, 4, 96, 64), True)
    shapes = [((rows, 64), jnp.bfloat16), ((4,), jnp.int32), ((4, 64, 3), jnp.float32), ((4, 3, 96), jnp.float32)]

    def f(x, sizes, a, b, stack, index):
        w = NF4Layer(stack, index)
        y, pull = jax.vjp(lambda x, a, b: grouped_lora_matmul(x, w, sizes, a, b, implementation="triton"), x, a, b)
        return pull(y)

    jaxpr = jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(*s) for s in shapes), stack, jax.ShapeDtypeStruct((), jnp.int32))
    read = [e for e in equations(jaxpr.jaxpr) if any(getattr(v.aval, "shape", ()) == (3, 4, 96, 32) for v in e.invars)]
    assert read
    assert {e.primitive.name for e in read} <= {"reshape", "jit", "custom_vjp_call"}


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
@pytest.mark.parametrize(
    ("sizes", "m", "rank", "shape"),
    [
        ((256, 256, 256, 256), 1024, 16, (512, 256)),
        ((130, 0, 711, 173), 1111, 5, (512, 256)),  # rows left over, an empty expert, no multiple of 8
        ((1, 2, 3, 1000), 1006, 33, (512, 256)),
        ((0, 0, 0, 0), 600, 16, (512, 256)),
        ((130, 0, 711, 173), 1111, 16, (192, 384)),  # widths of narrower tiles
        ((1, 2, 3, 1000), 1006, 33, (128, 192)),
    ],
)
def test_many_rows(implementation, sizes, m, rank, shape, monkeypatch):
    if implementation == "mosaic" and (reason := why_not_hopper()):
        pytest.skip(reason)
    monkeypatch.setitem(ROUTING, "many", (list(sizes), m))
    check(implementation, "many", shape, rank, "nf4-double", jnp.bfloat16)


# ---- several weights that multiply the same rows --------------------------------------------------------------------


def check_joined(implementation, sizes, m, widths, k, ranks, base="nf4-double", dtype=jnp.bfloat16):
    """Against the reference of each weight; the gradient of the rows is the sum."""
    sizes = jnp.asarray(sizes, jnp.int32)
    cases = [case(4, n, k, r, m, base, dtype, seed) for seed, (n, r) in enumerate(zip(widths, ranks, strict=True))]
    x, scales = cases[0][0], (0.7, 1.5)
    weights, factors = [c[1] for c in cases], [c[3:5] for c in cases]

    def f(x, factors):
        layers = [Projection(w, a, b, s) for w, (a, b), s in zip(weights, factors, scales, strict=True)]
        return grouped_lora_matmuls(x, layers, sizes, implementation=implementation)

    ys, pull = jax.vjp(jax.jit(f), x, factors)
    dx, dfactors = pull([c[5] for c in cases])
    want = [reference(x, dense, sizes, a, b, s, dy) for (_, _, dense, a, b, dy), s in zip(cases, scales, strict=True)]
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2  # as in `check`
    assert relative(dx, want[0][1] + want[1][1]) < tolerance
    for y, (da, db), (want_y, _, want_da, want_db) in zip(ys, dfactors, want, strict=True):
        assert y.dtype == x.dtype
        for got, wanted in ((y, want_y), (da, want_da), (db, want_db)):
            assert relative(got, wanted) < tolerance
    return jax.make_jaxpr(f)(x, factors)


@pytest.mark.parametrize("routing", ["odd", "rows left over"])
@pytest.mark.parametrize(
    ("implementation", "base", "dtype"),
    [
        pytest.param("xla", "nf4", jnp.float32, marks=pytest.mark.rotate("xla")),
        pytest.param("triton", "nf4-double", jnp.bfloat16, marks=pytest.mark.rotate("triton")),
        pytest.param("triton", "float", jnp.bfloat16, marks=pytest.mark.rotate("triton")),
    ],
)
def test_several_weights(routing, implementation, base, dtype):
    sizes, m = ROUTING[routing]
    check_joined(implementation, sizes, m, (96, 64), 64, (3, 5), base, dtype)


@pytest.mark.turns("grouped products of several weights")
@pytest.mark.parametrize(("rows", "calls"), [(77, 2), (20, 4)])
def test_many_rows_are_read_once_for_several_weights(rows, calls):
    """One product with all adapters' first factors and one with all weights; few rows are multiplied one by one."""
    sizes = [rows, 0, 0, 0]
    jaxpr = check_joined("triton", sizes, rows, (96, 64), 64, (3, 5))
    names = [str(e.params.get("name", "")) for e in equations(jaxpr.jaxpr)]
    assert sum(name.startswith("grouped_matmul") for name in names) == calls


@pytest.mark.turns("grouped products of several weights")
def test_one_weight_of_several_without_an_adapter():
    sizes = jnp.asarray([40, 0, 30, 7], jnp.int32)
    cases = [case(4, n, 64, 4, 77, "nf4-double", jnp.bfloat16) for n in (96, 64)]
    x = cases[0][0]
    for adapters in ((), (0,), (1,)):
        layers = [Projection(c[1], *(c[3:5] if i in adapters else ())) for i, c in enumerate(cases)]
        ys = grouped_lora_matmuls(x, layers, sizes, implementation="triton")
        for y, layer in zip(ys, layers, strict=True):
            want = grouped_lora_matmul(x, layer.w, sizes, layer.a, layer.b, implementation="xla")
            assert relative(y, np.asarray(want, np.float64)) < 2e-2  # as in `check`


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
@pytest.mark.parametrize(("widths", "k"), [((512, 256), 256), ((192, 192), 384), ((704, 704), 512)])
def test_several_weights_of_many_rows(implementation, widths, k):
    if implementation == "mosaic" and (reason := why_not_hopper()):
        pytest.skip(reason)
    check_joined(implementation, (130, 0, 711, 173), 1111, widths, k, (16, 8))
