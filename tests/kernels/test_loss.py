"""linear_cross_entropy against log-softmax written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels.loss import Head, linear_cross_entropy
from lora_jax.kernels.nf4 import dequantize, quantize

M, D, V, R = 37, 64, 103, 4


def parts(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(M, D)), dtype)
    weight = jnp.asarray(rng.normal(size=(V, D)) / 8, dtype)
    labels = rng.integers(0, V, M)
    labels[rng.random(M) < 0.3] = -100
    a, b = jnp.asarray(rng.normal(size=(D, R)) / 8, jnp.float32), jnp.asarray(rng.normal(size=(R, V)), jnp.float32)
    return x, weight, jnp.asarray(labels, jnp.int32), a, b


def reference(x, weight, labels, a=None, b=None, scale=1.0, softcap=None):
    logits = x @ weight.T
    if a is not None:
        logits = logits + scale * (x @ a) @ b
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    return -jnp.sum(jnp.where(labels >= 0, picked, 0))


@pytest.mark.parametrize("chunk", [1, 8, 37, 64, None])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["frozen", "trained", "lora", "nf4"])
def test_loss_and_every_gradient_against_float64(chunk, softcap, kind):
    x, weight, labels, a, b = parts()
    stored = quantize(weight) if kind == "nf4" else weight
    dense = np.asarray(dequantize(stored, jnp.float32) if kind == "nf4" else weight, np.float64)

    def loss(x, trained, a, b):
        head = Head(stored, scale=0.5, softcap=softcap)
        if kind == "trained":
            head = Head(stored, trained, softcap=softcap)
        if kind == "lora":
            head = Head(stored, None, a, b, scale=0.5, softcap=softcap)
        total, count = linear_cross_entropy(x, head, labels, chunk=chunk)
        return 3.0 * total, count

    arguments = (x, weight, a, b)
    (value, count), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*arguments)
    assert int(count) == int((np.asarray(labels) >= 0).sum())
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(z, np.float64)) for z in (x, dense, a, b)]

        def exact(x, w, a, b):
            w = w if kind == "trained" else jnp.asarray(dense)
            adapter = (a, b, 0.5) if kind == "lora" else (None, None, 1.0)
            return 3.0 * reference(x, w, labels, *adapter, softcap=softcap)

        want, want_grads = jax.value_and_grad(exact, argnums=(0, 1, 2, 3))(*wide)
        want, want_grads = float(want), [np.asarray(g) for g in want_grads]
    assert abs(float(value) - want) < 1e-5 * abs(want)  # float32 sums over 103 logits and 37 rows
    for got, wanted in zip(grads, want_grads, strict=True):
        assert np.linalg.norm(np.asarray(got, np.float64) - wanted) <= 1e-5 * np.linalg.norm(wanted) + 1e-12


def test_value_without_gradient_is_the_same():
    x, weight, labels, _, _ = parts()
    total, _ = linear_cross_entropy(x, Head(weight), labels, chunk=8)
    want, _ = jax.value_and_grad(lambda x: linear_cross_entropy(x, Head(weight), labels, chunk=8)[0])(x)
    assert abs(float(total) - float(want)) < 1e-6 * float(want)  # another program, another order of summation


def test_a_large_vocabulary_is_summed_exactly():
    """Float32 sums of 49,152 terms, one by one, would be off by 1e-4; in blocks of 512 by a few roundings of 6e-8."""
    rng = np.random.default_rng(7)
    x, w = rng.normal(size=(9, 16)), 0.3 * rng.normal(size=(49152, 16))
    labels = rng.integers(49152, size=9)
    logits = x @ w.T
    want = (np.log(np.exp(logits).sum(1)) - logits[np.arange(9), labels]).sum()
    got, _ = linear_cross_entropy(jnp.asarray(x, jnp.float32), Head(jnp.asarray(w, jnp.float32)), jnp.asarray(labels))
    assert abs(float(got) / want - 1) < 2e-6


def test_no_labels_give_zero_and_finite_gradients():
    x, weight, _, _, _ = parts()
    labels = jnp.full(M, -100, jnp.int32)
    value, grad = jax.value_and_grad(lambda x: linear_cross_entropy(x, Head(weight), labels)[0])(x)
    assert float(value) == 0
    assert not np.asarray(grad).any()


def test_large_logits_do_not_overflow():
    x, weight, labels, _, _ = parts()
    value, grad = jax.value_and_grad(lambda x: linear_cross_entropy(1e4 * x, Head(weight), labels)[0])(x)
    assert np.isfinite(float(value))
    assert np.isfinite(np.asarray(grad)).all()


def test_bfloat16_inputs():
    x, weight, labels, _, _ = parts(jnp.bfloat16)
    value, grad = jax.value_and_grad(lambda x: linear_cross_entropy(x, Head(weight), labels, chunk=16)[0])(x)
    assert grad.dtype == jnp.bfloat16
    want = float(reference(np.asarray(x, np.float64), np.asarray(weight, np.float64), np.asarray(labels)))
    assert abs(float(value) - want) < 1e-4 * want  # products of bfloat16 are exact in float32


def test_the_logits_of_all_rows_never_exist():
    """In the optimised program no array has rows times vocabulary elements, and temporaries stay below that."""
    rows, vocab, dim = 512, 4096, 16
    spec = (jax.ShapeDtypeStruct((rows, dim), jnp.float32), jax.ShapeDtypeStruct((vocab, dim), jnp.float32))
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    f = jax.grad(lambda x, w, labels: linear_cross_entropy(x, Head(w), labels, chunk=32)[0])
    compiled = jax.jit(f).lower(*spec, labels).compile()
    text = compiled.as_text()
    assert f"[{rows},{vocab}]" not in text
    assert f"[{rows // 32},32,{vocab}]" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < rows * vocab * 4 / 2


@pytest.mark.parametrize("softcap", [None, 10.0])
def test_the_gradient_kernel_of_the_mosaic_path(softcap):
    """Softmax less one-hot from tile-relative float16 logits is as near to float64 as rounding to bfloat16 allows."""
    from lora_jax.kernels.loss import triton

    rng = np.random.default_rng(0)
    rows, vocab, tile = 32, 512, 128
    logits = np.clip(3 * rng.normal(size=(rows, vocab)), -9.5, 9.5)
    labels = rng.integers(0, vocab, rows)
    labels[[3, 17]] = -100
    tiles = logits.reshape(rows, -1, tile)
    maximum = tiles.max(axis=2)
    below = (tiles - maximum[:, :, None]).reshape(rows, vocab)
    lse = np.log(np.exp(logits).sum(axis=1))
    got = triton.gradient(
        jnp.asarray(below, jnp.float16),
        jnp.asarray(maximum.T, jnp.float32),
        jnp.asarray(lse, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        softcap,
    )
    want = np.exp(logits - lse[:, None]) - (np.arange(vocab) == labels[:, None])
    if softcap is not None:
        want *= 1 - (logits / softcap) ** 2
    want[labels < 0] = 0
    rounded = np.asarray(jnp.asarray(want, jnp.bfloat16), np.float64)
    assert not np.asarray(got, np.float32)[labels < 0].any()
    error = np.linalg.norm(np.asarray(got, np.float64) - want)
    assert error <= 1.1 * np.linalg.norm(rounded - want)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_mosaic_is_as_exact_as_float32_logits(kind, softcap):
    """Against float64, for logits as large as a model's: loss, and gradients no worse than 1.1 times XLA's."""
    rng = np.random.default_rng(0)
    rows, dim, vocab = 700, 128, 1024
    x = jnp.asarray(rng.normal(size=(rows, dim)), jnp.bfloat16)
    weight = jnp.asarray(4 * rng.normal(size=(vocab, dim)) / dim**0.5, jnp.bfloat16)
    labels = rng.integers(0, vocab, rows)
    labels[rng.random(rows) < 0.3] = -100

    def loss(x, w, implementation):
        head = Head(weight, w if kind == "trained" else None, softcap=softcap)
        return linear_cross_entropy(x, head, jnp.asarray(labels, jnp.int32), chunk=512, implementation=implementation)[
            0
        ]

    results = {
        name: jax.jit(jax.value_and_grad(lambda x, w, name=name: loss(x, w, name), argnums=(0, 1)))(x, weight)
        for name in ("xla", "mosaic")
    }
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(z, np.float64)) for z in (x, weight)]
        want, want_grads = jax.value_and_grad(lambda x, w: reference(x, w, labels, softcap=softcap), argnums=(0, 1))(
            *wide
        )
        want, want_grads = float(want), [np.asarray(g) for g in want_grads]
    assert abs(float(results["mosaic"][0]) - want) < 1e-5 * want  # as float32 logits
    for i in range(1 if kind == "frozen" else 2):
        error = {
            name: np.linalg.norm(np.asarray(grads[i], np.float64) - want_grads[i])
            for name, (_, grads) in results.items()
        }
        assert error["mosaic"] <= 1.1 * error["xla"]


def test_errors():
    x, weight, labels, a, b = parts()
    with pytest.raises(ValueError, match=r"wants x \[M, 64\]"):
        linear_cross_entropy(x[:, 1:], Head(weight), labels)
    with pytest.raises(ValueError, match="labels"):
        linear_cross_entropy(x, Head(weight), labels[1:])
    with pytest.raises(NotImplementedError, match="'mosaic' cannot do this call: (it needs an NVIDIA GPU|x and the)"):
        linear_cross_entropy(x, Head(weight), labels, implementation="mosaic")
    with pytest.raises(NotImplementedError, match="LoRA"):
        linear_cross_entropy(x, Head(weight, None, a, b), labels, implementation="mosaic")
