"""Arrays of more than 2^31 elements, whose offsets need more than 32 bits: the last rows equal a run on them alone.

Rows do not depend on each other in any of these operations, so the last rows of a large call and a call on these rows
alone must agree; an offset that overflows reads or writes elsewhere. Needs a GPU with 40 GB.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels.attention import flash_attention
from lora_jax.kernels.dispatch import why_not_hopper
from lora_jax.kernels.grouped import grouped_lora_matmul
from lora_jax.kernels.loss import triton as loss
from lora_jax.kernels.nf4 import NF4Weight, triton, triton_adapter, triton_matmul, triton_mlp
from lora_jax.kernels.nf4.format import NF4Layer
from lora_jax.kernels.rms_norm import rms_norm

pytestmark = pytest.mark.gpu

WIDTH = 4096
ROWS = 2**31 // WIDTH + 512
TAIL = 512


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(seed, shape, dtype=jnp.bfloat16):
    """Random numbers, drawn a piece at a time: a float32 draw of everything would be twice as large again."""
    pieces = 64 if shape[-2] % 64 == 0 else 1
    piece = (*shape[:-2], shape[-2] // pieces, shape[-1])
    drawn = jax.lax.map(
        lambda key: jax.random.normal(key, piece, jnp.bfloat16), jax.random.split(jax.random.key(seed), pieces)
    )
    return jnp.moveaxis(drawn, 0, -3).reshape(shape).astype(dtype)


def nf4(n, k):
    """A random NF4 weight without double quantisation, so that some of its rows are a weight too."""
    packed = jax.random.bits(jax.random.key(0), (n, k // 2), jnp.uint8)
    absmax = jax.random.uniform(jax.random.key(1), (n, k // 64), jnp.float32, 0.01, 0.02)
    return NF4Weight(packed, absmax)


def equal(got, want):
    got, want = np.asarray(got.astype(jnp.float32)), np.asarray(want.astype(jnp.float32))
    assert np.isfinite(want).all()
    assert want.any()
    np.testing.assert_array_equal(got, want)


def test_nf4_dequantize():
    w = nf4(ROWS, WIDTH)
    tail = NF4Weight(w.packed[-TAIL:], w.absmax[-TAIL:])
    equal(jax.jit(triton.dequantize)(w)[-TAIL:], jax.jit(triton.dequantize)(tail))


@pytest.mark.parametrize("rows", [1, 16])
def test_nf4_layers_of_a_stack(rows):
    """The last layer of more than 2^32 bytes, read where it lies, and cut out."""
    n, k, layers = 28672, 8192, 40
    packed, absmax = jax.lax.map(
        lambda key: (jax.random.bits(key, (n, k // 2), jnp.uint8), jax.random.uniform(key, (n, k // 64))),
        jax.random.split(jax.random.key(0), layers),
    )
    layer, x = NF4Layer(NF4Weight(packed, absmax), jnp.int32(layers - 1)), normal(1, (rows, k))
    kernels = [triton_matmul.matmul]
    if why_not_hopper() is None:
        from lora_jax.kernels.nf4 import mosaic_few

        kernels.append(mosaic_few.matmul)
    for kernel in kernels:
        equal(jax.jit(kernel)(x, layer), jax.jit(kernel)(x, layer.cut()))


def test_nf4_adapter():
    x, a = normal(0, (ROWS, WIDTH)), normal(1, (WIDTH, 16))
    got = jax.jit(triton_adapter.extend)(x, a)
    want = jax.jit(triton_adapter.extend)(x[-TAIL:], a)
    del x
    equal(got[-TAIL:], want)
    equal(jax.jit(triton_adapter.add_product)(got, a.T)[-TAIL:], jax.jit(triton_adapter.add_product)(want, a.T))


def test_nf4_mlp():
    gate, up, a = normal(0, (ROWS, WIDTH)), normal(1, (ROWS, WIDTH)), normal(2, (WIDTH, 16))
    run = jax.jit(triton_mlp.forward)
    equal(run(gate, up, a)[-TAIL:], run(gate[-TAIL:], up[-TAIL:], a))


@pytest.mark.parametrize("part", ["value", "gradient"])
def test_rms_norm(part):
    weight = normal(1, (1, WIDTH))[0]
    f = functools.partial(rms_norm, weight=weight, eps=1e-5, implementation="triton")
    run = jax.jit(f if part == "value" else lambda x: jax.vjp(f, x)[1](x)[0])
    x = normal(0, (ROWS, WIDTH))
    equal(run(x)[-TAIL:], run(x[-TAIL:]))


@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
def test_attention(implementation):
    """Packed documents of 512 tokens: the last one alone."""
    q = normal(0, (1, ROWS, 32 * 128)).reshape(1, ROWS, 32, 128)
    k, v = (normal(seed, (1, ROWS, 2 * 128)).reshape(1, ROWS, 2, 128) for seed in (1, 2))
    start = jnp.arange(ROWS, dtype=jnp.int32)[None] // TAIL * TAIL

    def run(q, k, v, start):
        attend = functools.partial(flash_attention, segment_start=start, implementation=implementation)
        out, pull = jax.vjp(attend, q, k, v)
        return [z[:, -TAIL:] for z in (out, *pull(q))]

    got = jax.jit(run)(q, k, v, start)
    want = jax.jit(run)(q[:, -TAIL:], k[:, -TAIL:], v[:, -TAIL:], jnp.zeros((1, TAIL), jnp.int32))
    equal(got[0], want[0])
    for one, other in zip(got[1:], want[1:], strict=True):
        # XLA adds up out * dout of a row in another order: a float32 rounding, which rounds a score's gradient, or the
        # result, to the neighbouring bfloat16.
        one, other = (np.asarray(z.astype(jnp.float32)) for z in (one, other))
        np.testing.assert_allclose(one, other, rtol=2**-7, atol=2e-4)


def test_loss_gradient():
    rows, vocab, tile = 2**31 // 128256 // 16 * 16 + 528, 128256, 256
    below = -jnp.abs(normal(0, (rows, vocab), jnp.float16))
    maximum = jnp.ones((vocab // tile, rows), jnp.float32)
    lse, labels = jnp.full((rows,), 12.0), jnp.arange(rows, dtype=jnp.int32) % vocab
    want = jax.jit(loss.gradient)(below[-TAIL:], maximum[:, -TAIL:], lse[-TAIL:], labels[-TAIL:])
    equal(jax.jit(loss.gradient)(below, maximum, lse, labels)[-TAIL:], want)


def test_experts():
    """The decoded stack has more than 2^31 elements; the last expert alone."""
    experts, n, k = 40, 14336, 4096
    packed = jax.random.bits(jax.random.key(0), (experts, n, k // 2), jnp.uint8)
    absmax = jax.random.uniform(jax.random.key(1), (experts, n, k // 64), jnp.float32, 0.01, 0.02)
    sizes = jnp.full((experts,), 64, jnp.int32)
    x = normal(2, (64 * experts, k))
    run = jax.jit(functools.partial(grouped_lora_matmul, implementation="triton"))
    got = run(x, NF4Weight(packed, absmax), sizes)
    equal(got[-64:], run(x[-64:], NF4Weight(packed[-1:], absmax[-1:]), sizes[-1:]))


@pytest.mark.parametrize(("layers", "rows"), [(20, 1000), (20, 5), (8, 1000)])
def test_experts_of_a_stack(layers, rows):
    """Those of the last layer, read where they lie, and cut out: of more than 2^32 bytes, and of 2^31 to 2^32."""
    experts, n, k = 8, 14336, 4096
    packed, absmax = jax.lax.map(
        lambda key: (
            jax.random.bits(key, (experts, n, k // 2), jnp.uint8),
            jax.random.uniform(key, (experts, n, k // 64)),
        ),
        jax.random.split(jax.random.key(0), layers),
    )
    layer, x = NF4Layer(NF4Weight(packed, absmax), jnp.int32(layers - 1)), normal(1, (rows, k))
    sizes = jnp.bincount(jax.random.randint(jax.random.key(2), (rows,), 0, experts), length=experts).astype(jnp.int32)
    call = jax.jit(functools.partial(grouped_lora_matmul, group_sizes=sizes, implementation="triton"))
    equal(call(x, layer), call(x, layer.cut()))
