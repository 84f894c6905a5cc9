"""The linear layers of LoRA and QLoRA that read the same activations (q, k and v, or gate and up) as one function."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.kernels.dispatch import on_gpu, resolve
from lora_jax.kernels.nf4.format import BLOCK, NESTED_BLOCK, NF4Layer, NF4Weight, with_one_index
from lora_jax.kernels.nf4.matmul import choose, lora_matmul

__all__ = ["Projection", "halves", "lora_matmuls", "preference", "project"]


class Projection(NamedTuple):
    """A frozen linear layer and its adapter: y = gain (x W^T + scale (dropout(x) A) B) + bias."""

    w: jax.Array | NF4Weight | NF4Layer  # [N, K]
    a: jax.Array | None = None  # [K, R]
    b: jax.Array | None = None  # [R, N]
    scale: float = 1.0
    bias: jax.Array | None = None  # [N], frozen
    dropout_rate: float = 0.0
    dropout_key: jax.Array | None = None
    gain: jax.Array | None = None  # [N], float32, DoRA's; None for 1


def halves(p: Projection) -> tuple[Projection, Projection] | None:
    """The two layers [N, K] that one of [2N, K] is, as checkpoints have it that fuse gate and up; both share its A.

    Nothing is copied: a stack of L such weights is one of 2L. None where the weight is not in NF4, or scales of the
    second level belong to both halves.
    """
    w = with_one_index(p.w)
    w = w if isinstance(w, NF4Layer) else NF4Layer(jax.tree.map(lambda x: x[None], w), jnp.int32(0))
    if not isinstance(stack := w.stack, NF4Weight) or len(w.shape) != 2 or w.shape[0] % 2 or w.shape[1] % BLOCK:
        return None
    n, k = w.shape[0] // 2, w.shape[1]
    if stack.double_quantized and n * k // BLOCK % NESTED_BLOCK:
        return None

    def apart(x: jax.Array | None) -> Any:
        return None if x is None else x.reshape(2 * len(x), x.shape[1] // 2, *x.shape[2:])

    def twice(x: jax.Array | None) -> Any:
        return None if x is None else jnp.repeat(x, 2, axis=0)

    both = NF4Weight(
        apart(stack.packed),
        apart(stack.absmax),
        apart(stack.nested_absmax),
        twice(stack.nested_offset),
        twice(stack.nested_code),
    )

    def half(i: int) -> Projection:
        columns = slice(i * n, (i + 1) * n)
        b, bias, gain = (None if x is None else x[..., columns] for x in (p.b, p.bias, p.gain))
        return p._replace(w=NF4Layer(both, 2 * w.index + i), b=b, bias=bias, gain=gain)

    return half(0), half(1)


def project(x: jax.Array, p: Projection) -> jax.Array:
    """One linear layer: x [..., K] -> [..., N]; see `lora_matmul`, which may choose the implementation."""
    y = lora_matmul(x, p.w, p.a, p.b, p.scale, dropout_rate=p.dropout_rate, dropout_key=p.dropout_key)
    return _with_gain_and_bias(y, p)


def _with_gain_and_bias(y: jax.Array, p: Projection) -> jax.Array:
    y = y if p.gain is None else (y * p.gain).astype(y.dtype)
    return y if p.bias is None else y + p.bias.astype(y.dtype)


def lora_matmuls(
    x: jax.Array, projections: Sequence[Projection], *, implementation: str | None = None
) -> tuple[jax.Array, ...]:
    """Several linear layers of the same x, with gradients for x and all factors; weights and biases are frozen.

    Backward keeps x, the products of x with all A (named "thin" for rematerialisation) and the weights as they are
    stored, never a decoded one.

    Args:
      x: activations [..., K].
      projections: any number of layers K -> N_i; ranks and scales may differ, and some may have no adapter.
      implementation: "triton", which passes once over x for all adapters and computes the gradient of x in one matmul,
        "xla", the composition of `lora_matmul`, or None to choose.

    Returns:
      ([..., N_i] for each projection) in the dtype of x.

    Raises:
      ValueError: shapes do not fit.
      NotImplementedError: the named implementation cannot do this call.
    """
    projections = tuple(projections)
    for p in projections:
        if x.shape[-1] != p.w.shape[-1]:
            raise ValueError(f"lora_matmuls: x has {x.shape[-1]} features, a weight [N, K] = {p.w.shape} wants others")
        if (p.a is None) != (p.b is None):
            raise ValueError("lora_matmuls: give both LoRA factors a and b of a projection, or neither")
    rows = x.reshape(-1, x.shape[-1])
    supported = {"xla": None, "triton": lambda: _why_not(rows, projections)}
    if resolve("lora_matmuls", implementation, supported, preference(rows, projections)) == "xla":
        return tuple(project(x, p) for p in projections)
    ys = _shared(
        rows,
        tuple(p.w for p in projections),
        tuple((p.a, p.b) for p in projections),
        tuple(float(p.scale) for p in projections),
    )
    ys = [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]
    return tuple(_with_gain_and_bias(y, p) for y, p in zip(ys, projections, strict=True))


def preference(x: jax.Array, projections: Sequence[Projection]) -> tuple[str, ...]:
    """What to try for x [M, K]: the fused form where it is made of what `lora_matmul` would choose for every weight.

    For few rows that is another form, which decodes the weight inside the matmul.
    """
    names = on_gpu("triton")
    if names == ("xla",) or any(set(choose(x, p.w, p.a, None)[:2]) != {"triton"} for p in projections):
        return ("xla",)
    return names


def _why_not(x, projections) -> str | None:
    from lora_jax.kernels.nf4 import triton_shared

    return triton_shared.why_not(x, projections)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _shared(x, weights, factors, scales):
    return _shared_fwd(x, weights, factors, scales)[0]


def _shared_fwd(x, weights, factors, scales):
    from lora_jax.kernels.nf4 import triton_shared

    beside = triton_shared.adapters(weights, factors, scales, x.dtype)
    ys, thin = triton_shared.forward(x, weights, beside)
    return tuple(ys), (x, checkpoint_name(thin, "thin"), weights, factors)


def _shared_bwd(scales, residuals, dys):
    from lora_jax.kernels.nf4 import triton_shared

    x, thin, weights, factors = residuals
    beside = triton_shared.adapters(weights, factors, scales, x.dtype)
    dy = jnp.concatenate(dys, axis=1)
    dx, dthin = triton_shared.input_gradient(dy, weights, beside)
    da, db = _wide(x.T, dthin), _wide(thin.T, dy)
    ends = itertools.accumulate(d.shape[1] for d in dys)
    gradients = []
    for (a, b), scale, columns, d, end in zip(factors, scales, beside.columns, dys, ends, strict=True):
        if a is None:
            gradients.append((None, None))
            continue
        db_own = scale * db[columns, end - d.shape[1] : end]
        gradients.append((da[:, columns].astype(a.dtype), db_own.astype(b.dtype)))
    return dx, None, tuple(gradients)


_shared.defvjp(_shared_fwd, _shared_bwd)


def _wide(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)
