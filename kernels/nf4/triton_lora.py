"""The LoRA linear layer as one exact cuBLAS matmul of extended operands, with Pallas-Triton kernels around it.

y = [x, x A, 0] [W, B^T, 0]^T adds the adapter in the float32 accumulation of the matmul: 64 more columns of K, and one
pass over x. Where K > N the cheaper pass is over y: [y, x A] = x [W; A^T]^T, then y + (x A) B. Backward mirrors both.
The kernel that decodes W writes B^T or A^T beside it.
"""

import jax
import jax.numpy as jnp

from lora_jax.kernels.nf4.format import NF4Weight
from lora_jax.kernels.nf4.triton import dequantize, why_not
from lora_jax.kernels.nf4.triton_adapter import add_product, extend, padded_rank

__all__ = ["base_matmul", "base_matmul_transposed", "columns", "dot", "dot_t", "forward", "input_gradient", "why_not"]


def base_matmul(x: jax.Array, w: NF4Weight) -> jax.Array:
    """x [M, K] times W^T: [M, N] in the dtype of x."""
    return dot_t(x, dequantize(w))


def base_matmul_transposed(dy: jax.Array, w: NF4Weight) -> jax.Array:
    """dy [M, N] times W: [M, K] in the dtype of dy."""
    return dot(dy, dequantize(w))


def forward(x: jax.Array, w: NF4Weight, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(x W^T + x a b [M, N], x a [M, R] or None where it takes the matmul to recompute it) for a [K, R], b [R, N]."""
    n, k = w.shape
    rank = a.shape[1]
    a, b, extra = _padded(a, b)
    if k <= n:
        extended = extend(x, a)
        return dot_t(extended, dequantize(w, beside=columns(b.T, extra))), extended[:, k : k + rank]
    y = dot_t(x, dequantize(w, below=columns(a, extra).T))
    return add_product(y, b), None


def input_gradient(dy: jax.Array, w: NF4Weight, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(dy W + (dy b^T) a^T [M, K], dy b^T [M, R]) for dy [M, N]."""
    n, k = w.shape
    rank = a.shape[1]
    a, b, extra = _padded(a, b)
    if k <= n:
        dx = dot(dy, dequantize(w, beside=columns(b.T, extra)))
        return add_product(dx, a.T), dx[:, k : k + rank]
    extended = extend(dy, b.T)
    return dot(extended, dequantize(w, below=columns(a, extra).T)), extended[:, n : n + rank]


def _padded(a, b):
    rank, extra = padded_rank(a.shape[1])
    return columns(a, rank), columns(b.T, rank).T, extra


def columns(x, count):
    """x [M, N] with zero columns up to `count`."""
    return jnp.pad(x, ((0, 0), (0, count - x.shape[1])))


def dot_t(x, w):
    """x [M, K] times W^T for W [N, K], rounded once."""
    product = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=_sum_type(x))
    return product.astype(x.dtype)


def dot(x, w):
    """x [M, N] times W [N, K], rounded once."""
    return jnp.dot(x, w, preferred_element_type=_sum_type(x)).astype(x.dtype)


def _sum_type(x):
    """XLA makes a sum of products of a single row, and rounds every product to the type of the result."""
    return jnp.float32 if x.shape[0] == 1 else x.dtype
