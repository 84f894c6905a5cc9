"""Backward of what lies between the matmuls of experts, in Pallas-Triton: h = weight act(gate) up, with the adapters.

As kernels/nf4/triton_mlp.py does for one feed-forward layer, on rows that are sorted by expert. A program has a few
columns and a stretch of rows of one expert, and walks over them: it reads gate, up and the gradient of h once, writes
the gradients of gate and up over them, and sums the gradients of down's A and of gate's and up's B over its rows, and
that of every row's weight over its columns. A second kernel adds up the stretches of every expert; they are as long as
an expert has rows on average, so that one that gets many is not waited for. Tiles are transposed, for the reason given
in triton_mlp.py.

Bytes for M rows of F features: 2 M F (2 + 1) read, 4 M F written. Measured on an H100, 128 experts of about 1024 rows,
F = 768, rank 16, before rows were cut into stretches: 496 us, 2.0 TB/s; XLA and kernels for the sums take 1140.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lora_jax.kernels import dispatch
from lora_jax.kernels.grouped.triton import block_map
from lora_jax.kernels.nf4.triton_adapter import load, store
from lora_jax.kernels.nf4.triton_mlp import ACTIVATIONS, MAX_RANK, sigmoid

__all__ = ["ACTIVATIONS", "MAX_RANK", "backward"]

_LEAST = 512  # rows of a stretch
_SUMMED = 1024  # numbers that a program of the second kernel adds up


def backward(
    y: jax.Array,
    dh: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    thin: jax.Array,
    dthin: jax.Array,
    bias: jax.Array | None,
    *,
    activation: str,
    clamp: tuple[float, float] | None,
    block: int = 32,
    cols: int = 64,
    warps: int = 4,
    stages: int = 3,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of gate, up, the rows' weights, and the adapters around.

    Args:
      y: gate and up side by side [M, 2 F], without biases, rows sorted by expert; F a multiple of 16.
      dh: gradient of h [M, F].
      weights: float32 [M].
      group_sizes: int32 [E].
      thin: products of the input with gate's and with up's A side by side [M, 2 R].
      dthin: products of the output's gradient with down's B [M, S].
      bias: of gate and up side by side [E, 2 F], or None.
      activation: of ACTIVATIONS; not looked at where there is a clamp.
      clamp: (alpha, limit) of gpt-oss's activation (see `clamped_swiglu` in mlp.py).
      block, cols: rows and columns of a tile.
      warps, stages: of a program, and of its pipeline of loads.

    Returns:
      (gradient of y [M, 2 F], in its place if it is of no more use; that of weights, float32 [M]; and float32 sums over
      the rows of every expert: h^T dthin [E, F, S], dgate^T thin [E, F, R] and dup^T thin [E, F, R]).
      Rows of no expert keep what y has there; their weights have no gradient.
    """
    (m, f), experts = dh.shape, group_sizes.shape[0]
    cols = min(cols, f & -f)
    length = max(_LEAST, pl.next_power_of_2(pl.cdiv(m, experts)))  # of a stretch
    stretches = pl.cdiv(m, length) + experts
    owner, start, end = block_map(group_sizes, m, length, stretches)
    end = jnp.where(owner < experts, jnp.minimum(end, start + length), start)
    r, s = thin.shape[1] // 2, dthin.shape[1]
    shapes = [
        jax.ShapeDtypeStruct(y.shape, y.dtype),
        jax.ShapeDtypeStruct((f // cols, m), jnp.float32),
        jax.ShapeDtypeStruct((stretches, f, s + 2 * r), jnp.float32),
    ]
    how: Any = {"activation": activation, "clamp": clamp, "block": block, "cols": cols, "biased": bias is not None}
    dy, dweights, sums = pl.pallas_call(
        functools.partial(_kernel, **how),
        grid=(f // cols, stretches),
        out_shape=shapes,
        input_output_aliases={0: 0},  # a program overwrites what it alone has read
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=dispatch.interpret(),
        name="grouped_gated_backward",
    )(y, dh, weights, thin, dthin, owner, start, end, *(() if bias is None else (bias,)))
    dweights = jnp.where(jnp.arange(m) < jnp.sum(group_sizes), dweights.sum(axis=0), 0.0)
    sums = _sum_of_stretches(sums.reshape(stretches, -1), pl.cdiv(group_sizes, length)).reshape(experts, f, -1)
    return dy, dweights, sums[:, :, :s], sums[:, :, s : s + r], sums[:, :, s + r :]


def _kernel(
    y_ref,
    dh_ref,
    weights_ref,
    thin_ref,
    dthin_ref,
    owner_ref,
    start_ref,
    end_ref,
    *refs,
    activation,
    clamp,
    block,
    cols,
    biased,
):
    dy_ref, dweights_ref, sums_ref = refs[biased:]
    f, s, r = dh_ref.shape[1], dthin_ref.shape[1], thin_ref.shape[1] // 2
    part, stretch = pl.program_id(0), pl.program_id(1)
    of_gate, of_up = pl.ds(part * cols, cols), pl.ds(f + part * cols, cols)
    start, end = start_ref[stretch], end_ref[stretch]

    @pl.when(start < end)
    def _():
        biases = [0.0, 0.0]
        if biased:
            e = owner_ref[stretch]
            biases = [refs[0][e, at].astype(jnp.float32)[:, None] for at in (of_gate, of_up)]

        def body(i, totals):
            first = start + i * block
            rows, inside = pl.ds(first, block), first + jnp.arange(block, dtype=jnp.int32) < end
            mask = inside[:, None]
            gate, up, dh = (
                load(ref, (rows, at), mask).T.astype(jnp.float32)
                for ref, at in ((y_ref, of_gate), (y_ref, of_up), (dh_ref, of_gate))
            )
            weight = plgpu.load(weights_ref.at[rows], mask=inside, other=0.0)[None, :]
            thin_gate, thin_up = (load(thin_ref, (rows, pl.ds(at, r)), mask) for at in (0, r))
            dthin = load(dthin_ref, (rows, pl.ds(0, s)), mask)
            act, slope, up, inside_up = _activation(gate + biases[0], up + biases[1], activation, clamp)
            h = act * up
            plgpu.store(dweights_ref.at[part, rows], jnp.sum(dh * h, axis=0), mask=inside)
            dh *= weight
            dgate = (dh * up * slope).astype(dy_ref.dtype)
            dup = jnp.where(inside_up, dh * act, 0.0).astype(dy_ref.dtype)
            store(dy_ref, (rows, of_gate), dgate.T, mask)
            store(dy_ref, (rows, of_up), dup.T, mask)
            products = ((h * weight).astype(dy_ref.dtype), dthin), (dgate, thin_gate), (dup, thin_up)
            return tuple(total + plgpu.dot(a, b) for total, (a, b) in zip(totals, products, strict=True))

        zeros = tuple(jnp.zeros((cols, width), jnp.float32) for width in (s, r, r))
        totals = jax.lax.fori_loop(jnp.int32(0), (end - start + block - 1) // block, body, zeros)
        for at, total in zip((0, s, s + r), totals, strict=True):
            sums_ref[stretch, of_gate, pl.ds(at, total.shape[1])] = total


def _sum_of_stretches(x: jax.Array, counts: jax.Array) -> jax.Array:
    """Adds up the first counts[0] rows of x, the next counts[1], and so on: float32 [S, N], int32 [E] -> [E, N]."""
    n, experts = x.shape[1], counts.shape[0]
    ends = jnp.cumsum(counts)
    cols = min(_SUMMED, n & -n)
    return pl.pallas_call(
        functools.partial(_add_rows, cols=cols),
        grid=(n // cols, experts),
        out_shape=jax.ShapeDtypeStruct((experts, n), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=dispatch.interpret(),
        name="sum_of_stretches",
    )(x, ends - counts, ends)


def _add_rows(x_ref, start_ref, end_ref, out_ref, *, cols):
    e, columns = pl.program_id(1), pl.ds(pl.program_id(0) * cols, cols)
    zero = jnp.zeros(cols, jnp.float32)
    out_ref[e, columns] = jax.lax.fori_loop(start_ref[e], end_ref[e], lambda i, total: total + x_ref[i, columns], zero)


def _activation(gate, up, activation, clamp):
    """(act(gate), its derivative, the factor that up is, whether up's gradient passes)."""
    passes = inside_up = True
    if clamp is None:
        z, slope = ACTIVATIONS[activation]
    else:
        alpha, limit = clamp
        z, slope = lambda x: alpha * x, lambda x: alpha
        passes, inside_up = gate <= limit, jnp.abs(up) <= limit
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit) + 1
    of_gate = sigmoid(z(gate))
    act = gate * of_gate
    return act, jnp.where(passes, of_gate * (1 + (gate - act) * slope(gate)), 0.0), up, inside_up
