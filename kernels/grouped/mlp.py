"""The gated feed-forward layers of experts as one function, with its own backward."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.kernels.dispatch import on_gpu, resolve
from lora_jax.kernels.grouped.grouped import (
    block_diagonal,
    grouped_lora_matmuls,
    kernel_rank,
    module,
    padded,
    why_not_joined,
)
from lora_jax.kernels.grouped.xla import Joined
from lora_jax.kernels.kept import named
from lora_jax.kernels.nf4.mlp import ACTIVATIONS
from lora_jax.kernels.nf4.shared_input import Projection

__all__ = ["clamped_swiglu", "grouped_lora_mlp"]


def clamped_swiglu(gate: jax.Array, up: jax.Array, alpha: float, limit: float) -> jax.Array:
    """min(gate, c) sigmoid(alpha min(gate, c)) (clip(up, -c, c) + 1), c being the limit (gpt-oss)."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def grouped_lora_mlp(
    x: jax.Array,
    gate: Projection,
    up: Projection,
    down: Projection,
    group_sizes: jax.Array,
    weights: jax.Array,
    *,
    activation: str = "silu",
    clamp: tuple[float, float] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """down(weight act(gate(x)) up(x)) of every row's expert.

    It is the input of down that is multiplied by the row's weight, so that backward, for the gradient of the weights,
    need not compute again what down makes of it. gate(x) and up(x) are named "gate" and "up" for rematerialisation,
    and the products of adapters' A with their inputs "thin".

    Args:
      x: activations [M, K], sorted by expert.
      gate, up, down: the layers of all experts, w [E, F, K] twice and [E, K, F], a [E, K, R] and b [E, R, F] or None,
        gate's and up's bias [E, F] or None; down has none.
      group_sizes: int32 [E], rows of each expert; rows past the sum belong to no expert and give zeros.
      weights: float32 [M].
      activation: a key of ACTIVATIONS.
      clamp: (alpha, limit) of `clamped_swiglu`, which then takes the place of the activation.
      implementation: "triton", which fuses the activation's backward with the products of the adapters, "xla", the
        composition of `grouped_lora_matmuls`, or None to choose.

    Returns:
      [M, K] in the dtype of x.

    Raises:
      NotImplementedError: the named implementation cannot do this call.
    """
    supported = {"xla": None, "triton": functools.partial(_why_not, x, gate, up, down, activation, clamp)}
    if resolve("grouped_lora_mlp", implementation, supported, on_gpu("triton")) == "xla":
        ys = grouped_lora_matmuls(x, (gate, up), group_sizes)
        g, u = (
            named(y + _of_rows(p.bias, group_sizes, y), name)
            for y, p, name in zip(ys, (gate, up), ("gate", "up"), strict=True)
        )
        return grouped_lora_matmuls(_gated(g, u, weights, activation, clamp), [down], group_sizes)[0]
    scales = tuple(float(p.scale) for p in (gate, up, down))
    factors = tuple(padded(p.a, p.b) for p in (gate, up, down))  # pyright: ignore[reportArgumentType]
    bias = None if gate.bias is None or up.bias is None else jnp.concatenate([gate.bias, up.bias], axis=1)
    frozen = Joined((gate.w, up.w)), down.w, bias  # pyright: ignore[reportArgumentType]
    return _mlp(x, weights, group_sizes, frozen, factors, scales, activation, clamp)


def _why_not(x, gate, up, down, activation, clamp) -> str | None:
    from lora_jax.kernels.grouped import triton_gated

    if x.dtype != jnp.bfloat16:
        return f"it computes in bfloat16, x is {x.dtype}"
    if clamp is None and activation not in triton_gated.ACTIVATIONS:
        return f"its activations are {', '.join(triton_gated.ACTIVATIONS)}, not {activation}"
    for name, p in (("gate", gate), ("up", up), ("down", down)):
        if p.a is None or p.b is None:
            return f"{name} has no adapter"
        if p.dropout_rate:
            return f"{name}'s adapter has dropout"
        if kernel_rank(p.a.shape[2]) > triton_gated.MAX_RANK:
            return f"{name} has rank {p.a.shape[2]}, at most {triton_gated.MAX_RANK} is possible"
    if gate.a.shape[2] != up.a.shape[2] or (gate.bias is None) != (up.bias is None):
        return "gate and up differ in rank, or in having a bias"
    if gate.w.shape[1] % 16:
        return f"it takes features of experts that are multiples of 16, got {gate.w.shape[1]}"
    return why_not_joined(x, (gate, up))


def _of_rows(bias: jax.Array | None, group_sizes: jax.Array, like: jax.Array) -> jax.Array | float:
    """What is added to rows [M, N] of experts with a bias [E, N]."""
    if bias is None:
        return 0.0
    return jnp.repeat(bias.astype(like.dtype), group_sizes, axis=0, total_repeat_length=like.shape[0])


def _gated(g, u, weights, activation, clamp):
    h = ACTIVATIONS[activation](g) * u if clamp is None else clamped_swiglu(g, u, *clamp)
    return (h * weights[:, None]).astype(h.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _mlp(x, weights, group_sizes, frozen, factors, scales, activation, clamp):
    return _mlp_fwd(x, weights, group_sizes, frozen, factors, scales, activation, clamp)[0]


def _operands(factors, scales, dtype):
    """A of gate and up side by side, their B in blocks, and down's A and B, in the dtype of the activations."""
    (a_gate, b_gate), (a_up, b_up), (a_down, b_down) = factors
    a, b = jnp.concatenate([a_gate, a_up], axis=2), block_diagonal([scales[0] * b_gate, scales[1] * b_up])
    return [z.astype(dtype) for z in (a, b, a_down, scales[2] * b_down)]


def _mlp_fwd(x, weights, group_sizes, frozen, factors, scales, activation, clamp):
    gate_up, w_down, bias = frozen
    a, b, a_down, b_down = _operands(factors, scales, x.dtype)
    op = module(x, gate_up, w_down)
    f = gate_up.shape[1] // 2
    thin = checkpoint_name(op.grouped_matmul(x, a, group_sizes, contract=0), "thin")
    y = op.grouped_matmul(x, gate_up, group_sizes, contract=1, thin=thin, b=b)
    g, u = named(y[:, :f], "gate"), named(y[:, f:], "up")
    y = jnp.concatenate([g, u], axis=1)  # the same array, unless a plan keeps its halves
    biased = y + _of_rows(bias, group_sizes, y)
    h = _gated(biased[:, :f], biased[:, f:], weights, activation, clamp)
    thin_h = checkpoint_name(op.grouped_matmul(h, a_down, group_sizes, contract=0), "thin")
    out = op.grouped_matmul(h, w_down, group_sizes, contract=1, thin=thin_h, b=b_down)
    return out, (x, y, thin, thin_h, weights, group_sizes, frozen, factors)


def _mlp_bwd(scales, activation, clamp, residuals, dout):
    from lora_jax.kernels.grouped import triton_gated

    x, y, thin, thin_h, weights, group_sizes, (gate_up, w_down, bias), factors = residuals
    a, b, a_down, b_down = _operands(factors, scales, x.dtype)
    op, r = module(x, gate_up, w_down), a.shape[2] // 2
    dthin_h = op.grouped_matmul(dout, b_down, group_sizes, contract=1)
    db_down = op.grouped_outer(dout, thin_h, group_sizes)
    dh = op.grouped_matmul(dout, w_down, group_sizes, contract=0, thin=dthin_h, b=jnp.swapaxes(a_down, 1, 2))
    dy, dweights, da_down, db_gate, db_up = triton_gated.backward(
        y, dh, weights, group_sizes, thin, dthin_h, bias, activation=activation, clamp=clamp
    )
    dthin = op.grouped_matmul(dy, b, group_sizes, contract=1)
    da = op.grouped_outer(x, dthin, group_sizes)
    dx = op.grouped_matmul(dy, gate_up, group_sizes, contract=0, thin=dthin, b=jnp.swapaxes(a, 1, 2))
    gradients = tuple(
        (da, scale * jnp.swapaxes(db, 1, 2))
        for da, db, scale in zip((da[:, :, :r], da[:, :, r:], da_down), (db_gate, db_up, db_down), scales, strict=True)
    )
    gradients = jax.tree.map(lambda d, factor: d.astype(factor.dtype), gradients, factors)
    return dx, dweights.astype(weights.dtype), None, None, gradients


_mlp.defvjp(_mlp_fwd, _mlp_bwd)
