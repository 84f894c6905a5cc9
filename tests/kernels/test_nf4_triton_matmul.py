"""The Triton matmuls of NF4 weights, in interpret mode where there is no GPU, against float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels import dispatch
from lora_jax.kernels.nf4 import dequantize, lora_matmul, matmul, quantize
from lora_jax.kernels.nf4 import triton_matmul as tm
from lora_jax.kernels.nf4.format import CODE, NF4Layer
from lora_jax.kernels.nf4.triton_gemv import Gemv

SCALE = 2.0


def float64(x):
    return np.asarray(x.astype(jnp.float32)).astype(np.float64)


def problem(m, n, k, rank, double_quantize, seed=0):
    """x [m, k], dy [m, n], weight, LoRA factors (None for rank 0)."""
    rng = np.random.default_rng(seed)
    w = quantize(jnp.asarray(rng.normal(size=(n, k)) * 0.02, jnp.float32), double_quantize)
    x, dy = (jnp.asarray(rng.normal(size=(m, size)), jnp.bfloat16) for size in (k, n))
    if not rank:
        return x, dy, w, None, None
    a = jnp.asarray(rng.normal(size=(k, rank)) / np.sqrt(k), jnp.float32)
    return x, dy, w, a, jnp.asarray(rng.normal(size=(rank, n)) * 0.02, jnp.float32)


def forward64(x, w, a, b):
    base = float64(x) @ float64(dequantize(w, jnp.float32)).T
    return base if a is None else base + SCALE * (float64(x) @ float64(a)) @ float64(b)


def each(*cases):
    """Each of them at every commit, with one set of the other parameters."""
    return [pytest.param(*case, marks=pytest.mark.rotate(f"{case[0]} rows")) for case in cases]


def check(run, want, standard, bound):
    """Every output is written, two runs are equal, the error is at most `bound` times the standard computation's."""
    got = run()
    assert got.shape == want.shape
    assert got.dtype == jnp.bfloat16
    assert np.isfinite(float64(got)).all()  # interpret mode fills outputs with NaN before the kernel runs
    np.testing.assert_array_equal(float64(got), float64(run()))
    error, usual = (np.linalg.norm(float64(y) - want) for y in (got, standard))
    assert error <= bound * usual, (error / usual, np.abs(want).max())


@pytest.mark.parametrize(("left", "double_quantize"), [(True, True), (False, False)])
@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "blocks", "splits"),
    each((1, 130, 256, 16, 2, 2), (3, 77, 192, 5, 1, 3), (16, 64, 64, 0, 1, 1), (33, 77, 256, 17, 4, 1)),
)
def test_few_rows(m, n, k, rank, blocks, splits, left, double_quantize):
    x, _, w, a, b = problem(m, n, k, rank, double_quantize)
    config = tm.FewRows(bn=64, blocks=blocks, splits=splits, weight_left=left, together=m > 1)
    assert tm.why_not(x, w, a, b) is None
    standard = lora_matmul(x, w, a, b, SCALE, implementation="xla")
    # The weight's only rounding is half of the standard one's: 0.8 times its error, and some chance with few outputs.
    check(lambda: tm.matmul(x, w, a, b, SCALE, config=config), forward64(x, w, a, b), standard, 1.0)


@pytest.mark.parametrize("double_quantize", [True, False])
@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "rows", "blocks"),
    each((1, 64, 256, 16, 4, 4), (3, 77, 192, 5, 4, 2), (4, 33, 704, 40, 8, 4), (2, 40, 64, 0, 16, 1)),
)
def test_gemv(m, n, k, rank, rows, blocks, double_quantize):
    x, _, w, a, b = problem(m, n, k, rank, double_quantize)
    standard = lora_matmul(x, w, a, b, SCALE, implementation="xla")
    config = Gemv(rows=rows, blocks=blocks)
    # The weight is not rounded to bf16, as it is in the standard computation.
    check(lambda: tm.matmul(x, w, a, b, SCALE, config=config), forward64(x, w, a, b), standard, 1.0)


@pytest.mark.parametrize("double_quantize", [True, False])
@pytest.mark.parametrize(
    ("m", "rank", "config"),
    each(
        (1, 16, Gemv(rows=8, blocks=2)),
        (3, 0, Gemv(rows=4, blocks=4)),
        (5, 16, tm.FewRows(blocks=1, splits=3)),
        (9, 5, tm.FewRows(blocks=1, splits=1, weight_left=True, together=False)),
        (65, 5, tm.ManyRows(bm=32, bn=64, group=2)),
    ),
)
def test_layers_of_a_stack(m, rank, config, double_quantize, monkeypatch):
    """Bitwise what the weight gives that is cut out; for few rows nothing is cut."""
    x, _, _, a, b = problem(m, 77, 192, rank, double_quantize)
    single = [problem(1, 77, 192, 0, double_quantize, seed)[2] for seed in (3, 4, 5)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single)
    run = jax.jit(lambda w: tm.matmul(x, w, a, b, SCALE, config=config))
    wanted = [float64(run(w)) for w in single]
    if m <= tm.MAX_FEW:
        monkeypatch.setattr(NF4Layer, "cut", lambda layer: pytest.fail("the layer was cut out"))
    for i, want in enumerate(wanted):
        np.testing.assert_array_equal(float64(run(NF4Layer(stack, jnp.int32(i)))), want)


@pytest.mark.parametrize(("left", "double_quantize"), [(True, False), (False, True)])
@pytest.mark.parametrize(("m", "n", "k", "rank", "bk"), each((77, 130, 128, 16, 64), (128, 64, 256, 0, 128)))
def test_many_rows(m, n, k, rank, bk, left, double_quantize):
    x, _, w, a, b = problem(m, n, k, rank, double_quantize)
    config = tm.ManyRows(bm=32, bn=64, bk=bk, group=2, weight_left=left)
    standard = lora_matmul(x, w, a, b, SCALE, implementation="xla")
    # Two roundings of the weight, 3.0e-4 and 6.3e-4, beside that of the result: 1.08 times the standard error.
    check(lambda: tm.matmul(x, w, a, b, SCALE, config=config), forward64(x, w, a, b), standard, 1.1)


@pytest.mark.parametrize("double_quantize", [True, False])
@pytest.mark.parametrize(("m", "n", "k", "rank", "bn"), each((77, 130, 128, 16, 64), (64, 64, 256, 0, 128)))
def test_many_rows_transposed(m, n, k, rank, bn, double_quantize):
    x, dy, w, a, b = problem(m, n, k, rank, double_quantize)
    config = tm.ManyRows(bm=32, bn=bn, bk=32, group=2)
    want = float64(dy) @ float64(dequantize(w, jnp.float32))
    if a is not None:
        want = want + SCALE * (float64(dy) @ float64(b).T) @ float64(a).T
    _, pullback = jax.vjp(lambda x: lora_matmul(x, w, a, b, SCALE, implementation="xla"), x)
    check(lambda: tm.many_rows_transposed(dy, w, a, b, SCALE, config=config), want, pullback(dy)[0], 1.1)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 77, 64), (9, 77, 64), (40, 130, 320), (65, 64, 128)])
def test_chosen_configuration(m, n, k):
    x, _, w, a, b = problem(m, n, k, 4, True)
    standard = lora_matmul(x, w, a, b, SCALE, implementation="xla")
    check(lambda: tm.matmul(x, w, a, b, SCALE), forward64(x, w, a, b), standard, 1.1)


@pytest.mark.parametrize(("m", "rank"), [(3, 5), (70, 16), (9, 0), (40, 16)])
def test_as_an_implementation_of_lora_matmul(m, rank):
    """Values and every gradient."""
    x, dy, w, a, b = problem(m, 77, 128, rank, True)
    args = (x,) if a is None else (x, a, b)

    def run(implementation):
        y, pull = jax.vjp(
            lambda x, *ab: lora_matmul(x, w, *(ab or (None, None)), SCALE, implementation=implementation), *args
        )
        return y, *pull(dy)

    with jax.enable_x64(True):
        dense = jnp.asarray(float64(dequantize(w, jnp.float32)))
        linear = lambda x, *ab: x @ dense.T + (SCALE * (x @ ab[0]) @ ab[1] if ab else 0)  # noqa: E731
        y, pull = jax.vjp(linear, *(jnp.asarray(float64(z)) for z in args))
        wanted = [np.asarray(z) for z in (y, *pull(jnp.asarray(float64(dy))))]
    for got, usual, want in zip(run("triton_in_loop"), run("xla"), wanted, strict=True):
        error, standard = (np.linalg.norm(float64(z) - want) for z in (got, usual))
        assert error <= 1.1 * standard, (error, standard, np.linalg.norm(want))


@pytest.mark.parametrize(("m", "rank"), [(3, 5), (70, 0)])
def test_a_layer_as_the_weight_of_lora_matmul(m, rank):
    """Values and every gradient are bitwise those of the weight that is cut out."""
    x, dy, w, a, b = problem(m, 77, 128, rank, True)
    other = problem(m, 77, 128, 0, True, seed=1)[2]
    args = (x,) if a is None else (x, a, b)

    @jax.jit
    def run(w, dy, args):
        call = lambda x, *ab: lora_matmul(x, w, *(ab or (None, None)), SCALE, implementation="triton_in_loop")  # noqa: E731
        y, pull = jax.vjp(call, *args)
        return y, *pull(dy)

    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), other, w)
    for got, want in zip(run(NF4Layer(stack, jnp.int32(1)), dy, args), run(w, dy, args), strict=True):
        np.testing.assert_array_equal(float64(got), float64(want))


def test_the_tuning_table_chooses(monkeypatch):
    rows = [
        {"m": 4, "forward": "triton_in_loop", "dx": "triton", "tiles": {"bn": 128}},
        {"m": None, "forward": "triton", "dx": "xla"},
    ]
    far = [{"m": None, "forward": "mosaic", "dx": "mosaic"}]
    table = ({"n": 4096, "k": 512, "rows": far}, {"n": 64, "k": 128, "rows": rows})
    monkeypatch.setattr(matmul, "tuning", lambda op: table)
    monkeypatch.setattr(matmul, "why_not_hopper", lambda: "no Hopper GPU")
    monkeypatch.setattr(matmul, "on_gpu", lambda *names: (*names, "xla"))
    x, _, w, a, _ = problem(5, 64, 128, 4, True)
    assert matmul.choose(x[:4], w, a, None) == ("triton_in_loop", "triton", (("bn", 128),))
    assert matmul.choose(x, w, a, None) == ("triton", "xla", None)
    assert matmul.choose(x, w, a, "triton_in_loop") == ("triton_in_loop", "triton_in_loop", None)
    with dispatch.using(lora_matmul="triton"):
        assert matmul.choose(x[:4], w, a, None) == ("triton", "triton", None)
    assert matmul.choose(x.astype(jnp.float32), w, a, None) == ("xla", "xla", None)  # the kernels refuse float32
    _, _, wide, _, _ = problem(5, 1024, 512, 0, True)  # Mosaic is nearest, and refused without a Hopper GPU
    assert matmul.choose(problem(5, 1024, 512, 0, True)[0], wide, None, None) == ("triton", "triton", None)
    rows[0]["m"] = None
    assert matmul.choose(x, w, a, None).forward == "triton_in_loop"
    small, _, tiny, _, _ = problem(5, 16, 64, 0, True)  # 8 times smaller
    assert matmul.choose(small, tiny, None, None).forward == "triton_in_loop"
    monkeypatch.setattr(matmul, "_FAR", 2.0)
    assert matmul.choose(small, tiny, None, None).forward == "triton"  # too far to say anything


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_look_up_assembly(shuffle, scaled):
    """The PTX, executed here for all bytes: the values of both codes, in order, and their products with scales."""
    rng = np.random.default_rng(0)
    packed = rng.permutation(np.arange(256, dtype=np.uint8)).reshape(-1, 4)
    scales = rng.uniform(0.01, 0.1, size=4).astype(np.float32)
    high = scales.astype(jnp.bfloat16)
    low = (scales - high.astype(np.float32)).astype(jnp.bfloat16)
    words = np.asarray(tm._table_words()).view(np.uint32)
    if shuffle:
        named = {f"${i + 1}": word for i, word in enumerate(words)}
        lanes = [run_ptx(tm._LANE_ASM, {**named, "%laneid": lane})["$0"] for lane in range(32)]
    table = np.zeros(4, np.uint32) if shuffle else np.repeat(words, 4)
    twice = [x.view(np.uint16).astype(np.uint32) * 0x10001 for x in (high, low)] if scaled else []
    for word in packed:
        inputs = [word.view(np.uint32)[0], *table, *np.concatenate([[], *twice]).astype(np.uint32)]
        registers = {f"${i + 4}": value for i, value in enumerate(inputs)}
        out = run_ptx(tm._look_up_asm(shuffle, scaled), registers, lanes if shuffle else None)
        got = np.array([out[f"${i}"] for i in range(4)], np.uint32).view(np.uint16).view(jnp.bfloat16)
        want = tm._TABLE[np.stack([word >> 4, word & 15], axis=1).reshape(-1)].astype(np.float64)
        if scaled:  # one rounding, of the product with a scale that has 16 bits
            want *= np.repeat(scales, 2)
            np.testing.assert_allclose(got.astype(np.float64), want, rtol=2.0**-8 + 2.0**-16)
        else:
            np.testing.assert_array_equal(got.astype(np.float64), want)


def run_ptx(code, registers, lanes=None):
    """The few instructions of the look-up, on Python integers; `lanes` is what every lane holds in $5."""

    def value(name):
        return int(registers[name]) if name in registers else int(name, 0)

    def halves(x):
        return np.array([x], np.uint32).view(np.uint16).view(jnp.bfloat16).astype(np.float64)

    for line in re.sub(r"[{}]|\.reg[^;]*;", "", code).split(";"):
        if not line.strip():
            continue
        name, out, *args = re.split(r"[\s,]+", line.strip())
        if name == "selp.b32":
            result = value(args[0] if value(args[2]) else args[1])
        elif name == "prmt.b32":
            pool, select, result = value(args[0]) | value(args[1]) << 32, value(args[2]), 0
            for i in range(4):
                nibble = select >> 4 * i & 15
                byte = pool >> 8 * (nibble & 7) & 255
                result |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * i
        elif name == "lop3.b32":
            p, q, mask = (value(arg) for arg in args[:3])
            assert args[3] == "0xD8"
            result = p & ~mask | q & mask
        elif name == "shfl.sync.idx.b32":
            assert args[0] == "$5"
            result = lanes[value(args[1]) & 31]
        elif name == "fma.rn.bf16x2":
            x, y, z = (halves(value(arg)) for arg in args)
            result = int((x * y + z).astype(jnp.bfloat16).view(np.uint32)[0])
        else:
            simple = {
                "mov.b32": lambda x: x,
                "mov.u32": lambda x: x,
                "and.b32": lambda x, y: x & y,
                "or.b32": lambda x, y: x | y,
                "shr.u32": lambda x, y: x >> y,
                "shl.b32": lambda x, y: x << y & 0xFFFFFFFF,
                "mul.lo.u32": lambda x, y: x * y & 0xFFFFFFFF,
                "setp.ne.b32": lambda x, y: int(x != y),
            }
            result = simple[name](*(value(arg) for arg in args))
        registers[out] = result
    return registers


def test_table_is_the_code():
    """Stretched and rounded to bf16, the table is nearer to the code than the code rounded to bf16."""
    table = tm._TABLE.astype(np.float64) / tm._STRETCH
    np.testing.assert_allclose(table, CODE, atol=2.0**-9)
    middle = np.abs(CODE) < 0.9  # the ends, 1 and -1, are exact only unstretched
    rounded = CODE.astype(jnp.bfloat16).astype(np.float64)
    assert np.linalg.norm((table - CODE)[middle]) < 0.7 * np.linalg.norm((rounded - CODE)[middle])


def test_why_not_and_errors():
    x, _, w, a, b = problem(4, 64, 128, 4, True)
    assert "bfloat16" in tm.why_not(x.astype(jnp.float32), w, a, b)
    assert "not NF4" in tm.why_not(x, jnp.zeros((64, 128)), a, b)
    odd = quantize(jnp.ones((64, 96)))
    assert "K = 96" in tm.why_not(x[:, :96], odd)
    with pytest.raises(NotImplementedError, match="multiple of 64"):
        tm.matmul(x[:, :96], odd)
    with pytest.raises(ValueError, match="splits"):
        tm.few_rows(x, w, a, b, config=tm.FewRows(splits=3))
    with pytest.raises(ValueError, match="at most 64 rows"):
        tm.few_rows(jnp.zeros((65, 128), jnp.bfloat16), w, config=tm.FewRows())
