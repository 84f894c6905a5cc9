"""NF4 weights that read the same activations, with their adapters: extended cuBLAS matmuls, Triton kernels around them.

As in triton_lora, an adapter rides in the base matmul: y_i = [x, x A_1, x A_2 ... 0] [W_i, 0, B_i^T, 0 ...]^T. All
weights share one extension of x, so x is passed over once, and backward is one matmul for all of them: the weights
decoded one below the other, times [dy_1, dy_2, ...], sum the gradients of x in the accumulator, and the extra columns
give every dy_i B_i^T.

For q, k and v of an 8B model (K 4096, N 4096 + 1024 + 1024, M 4096 rows, rank 16) that saves, forward, two passes over
x (134 MB) and four launches, and the matmuls of one wave that k and v would be; backward two arrays of M K written and
three read.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.kernels.nf4.triton import dequantize
from lora_jax.kernels.nf4.triton import why_not as why_not_one
from lora_jax.kernels.nf4.triton_adapter import add_product, extend, padded_rank
from lora_jax.kernels.nf4.triton_lora import columns, dot, dot_t

__all__ = ["Adapters", "adapters", "forward", "input_gradient", "input_gradient_of_two", "why_not"]

_MAX_COLUMNS = 256  # of all adapters: `extend` keeps a tile of all A and of their products in registers


class Adapters(NamedTuple):
    """The factors of several adapters as operands of the extended matmuls."""

    a: jax.Array  # [K, S], all A side by side, each padded with zeros to a power of two of at least 16; so is S
    b: tuple[jax.Array, ...]  # for each weight [N_i, E], its scaled B^T in the columns of its A; E is 64 or more
    columns: tuple[slice, ...]  # of each adapter among the S, without padding
    widths: tuple[int, ...]  # the same with padding


def why_not(x: jax.Array, projections: Sequence) -> str | None:
    """Why these functions cannot serve x [M, K] and the projections, or None."""
    for place, p in enumerate(projections):
        if (reason := why_not_one(x, p.w)) is not None:
            return f"projection {place}: {reason}"
        if p.a is not None and p.dropout_rate:
            return f"projection {place}: its adapter has dropout, so it does not share its input with the others"
    ranks = [p.a.shape[1] for p in projections if p.a is not None]
    if not ranks:
        return "no projection has an adapter"
    if (total := sum(padded_rank(rank)[0] for rank in ranks)) > _MAX_COLUMNS:
        return f"the ranks {ranks} take {total} columns together, at most {_MAX_COLUMNS} are possible"
    n, k = sum(p.w.shape[0] for p in projections), x.shape[1]
    if n * (k + _MAX_COLUMNS) // 2 >= 2**31:
        return f"more than 2^32 weights together ([N, K] = [{n}, {k}]) overflow its 32-bit indices"
    return None


def adapters(weights: Sequence, factors: Sequence, scales: Sequence[float], dtype) -> Adapters:
    """The operands of adapters (A [K, R_i], B [R_i, N_i]), one for each weight [N_i, K]; (None, None) for none."""
    ranks = [0 if a is None else a.shape[1] for a, _ in factors]
    widths = [padded_rank(rank)[0] if rank else 0 for rank in ranks]
    starts = [0, *itertools.accumulate(widths)]
    total, extra = padded_rank(starts[-1])
    parts = [columns(a, width) for (a, _), width in zip(factors, widths, strict=True) if a is not None]
    beside = []
    for w, (_, b), scale, start, rank in zip(weights, factors, scales, starts, ranks, strict=False):
        if b is None:
            beside.append(jnp.zeros((w.shape[0], extra), dtype))
        else:
            beside.append(jnp.pad((scale * b).T.astype(dtype), ((0, 0), (start, extra - start - rank))))
    a = columns(jnp.concatenate(parts, axis=1), total).astype(dtype)
    slices = tuple(slice(start, start + rank) for start, rank in zip(starts, ranks, strict=False))
    return Adapters(a, tuple(beside), slices, tuple(widths))


def forward(x: jax.Array, weights: Sequence, beside: Adapters) -> tuple[list[jax.Array], jax.Array]:
    """([y_i [M, N_i]], x A [M, S])."""
    k = x.shape[1]
    extended = extend(x, beside.a)
    thin = extended[:, k : k + beside.a.shape[1]]
    sizes = [w.shape[0] for w in weights]
    if sum(sizes) > 2 * k:  # wide matmuls gain nothing from being one, and parts of its result have to be copied
        return [dot_t(extended, dequantize(w, beside=b)) for w, b in zip(weights, beside.b, strict=True)], thin
    y = dot_t(extended, dequantize(*weights, beside=jnp.concatenate(beside.b)))
    return jnp.split(y, np.cumsum(sizes)[:-1], axis=1), thin


def input_gradient(dy: jax.Array, weights: Sequence, beside: Adapters) -> tuple[jax.Array, jax.Array]:
    """(gradient of x [M, K], dy_i B_i^T side by side [M, S]) for all dy_i side by side, [M, sum of N_i]."""
    return _input_gradient(dot(dy, dequantize(*weights, beside=jnp.concatenate(beside.b))), beside)


def input_gradient_of_two(dys: Sequence, weights: Sequence, beside: Adapters) -> tuple[jax.Array, jax.Array]:
    """The same for two arrays dy_i [M, N_i]; what the first gives is rounded before the second is added."""
    # The matmul adds up, so this costs no pass over the results.
    first, second = (dot(dy, dequantize(w, beside=b)) for dy, w, b in zip(dys, weights, beside.b, strict=True))
    return _input_gradient(first + second, beside)


def _input_gradient(dx, beside: Adapters):
    k, total = beside.a.shape
    return add_product(dx, beside.a.T), dx[:, k : k + total]
