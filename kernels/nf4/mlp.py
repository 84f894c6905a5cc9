"""The gated feed-forward layer of LoRA and QLoRA as one function: down(silu(gate(x)) up(x)), with its own backward."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.kernels.dispatch import on_gpu, resolve
from lora_jax.kernels.nf4.format import NF4Weight
from lora_jax.kernels.nf4.matmul import lora_matmul

__all__ = ["Projection", "lora_mlp"]


class Projection(NamedTuple):
    """A frozen weight and its adapter: y = x W^T + scale x A B."""

    w: jax.Array | NF4Weight  # [N, K]
    a: jax.Array | None = None  # [K, R]
    b: jax.Array | None = None  # [R, N]
    scale: float = 1.0


def lora_mlp(
    x: jax.Array, gate: Projection, up: Projection, down: Projection, *, implementation: str | None = None
) -> jax.Array:
    """Returns down(silu(gate(x)) up(x)), with gradients for x and all six factors; weights are frozen.

    Backward keeps x, gate(x) and up(x), the last two named "gate" and "up" for rematerialisation, and the products of
    x with A, [M, 64]; never a decoded weight.

    Args:
      x: activations [..., K].
      gate, up: projections K -> F.
      down: projection F -> K.
      implementation: "triton", which fuses the activation with the products of the adapters, "xla", the composition
        of `lora_matmul`, or None to choose.

    Raises:
      NotImplementedError: the named implementation cannot do this call.
    """
    supported = {"xla": None, "triton": lambda: _why_not(x, gate, up, down)}
    chosen = resolve("lora_mlp", implementation, supported, on_gpu("triton"))
    if chosen == "xla":
        return _composed(x, gate, up, down)
    rows = x.reshape(-1, x.shape[-1])
    scales = tuple(float(p.scale) for p in (gate, up, down))
    factors = tuple(f for p in (gate, up, down) for f in (p.a, p.b))
    y = _mlp(rows, (gate.w, up.w, down.w), factors, scales)
    return y.reshape(*x.shape[:-1], -1)  # pyright: ignore[reportAttributeAccessIssue]


def _why_not(x, gate, up, down) -> str | None:
    from lora_jax.kernels.nf4 import triton

    for name, p in (("gate", gate), ("up", up), ("down", down)):
        if p.a is None or p.b is None:
            return f"{name} has no adapter"
        if (reason := triton.why_not(x, p.w, p.a)) is not None:
            return f"{name}: {reason}"
    return None


def _composed(x, gate, up, down):
    g = checkpoint_name(lora_matmul(x, gate.w, gate.a, gate.b, gate.scale), "gate")
    u = checkpoint_name(lora_matmul(x, up.w, up.a, up.b, up.scale), "up")
    return lora_matmul(jax.nn.silu(g) * u, down.w, down.a, down.b, down.scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mlp(x, weights, factors, scales):
    return _mlp_fwd(x, weights, factors, scales)[0]


def _padded(factors, scales, dtype):
    """The factors as operands of the extended matmuls.

    Returns:
      (A of gate and up side by side [K, S], A of down [F, R], B of gate, up [F, E] and down [K, E'] as columns beside
      the weights, each with its scale).
    """
    from lora_jax.kernels.nf4.triton_adapter import padded_rank
    from lora_jax.kernels.nf4.triton_lora import columns

    ag, bg, au, bu, ad, bd = factors
    width, extra = padded_rank(ag.shape[1] + au.shape[1])
    rank, extra_down = padded_rank(ad.shape[1])
    a_in = columns(jnp.concatenate([ag, au], axis=1), width)
    beside = (
        columns((scales[0] * bg).T, extra),
        jnp.pad((scales[1] * bu).T, ((0, 0), (ag.shape[1], extra - ag.shape[1] - au.shape[1]))),
        columns((scales[2] * bd).T, extra_down),
    )
    return a_in.astype(dtype), columns(ad, rank).astype(dtype), tuple(c.astype(dtype) for c in beside)


def _mlp_fwd(x, weights, factors, scales):
    from lora_jax.kernels.nf4 import triton, triton_adapter, triton_mlp
    from lora_jax.kernels.nf4.triton_lora import dot_t

    a_in, a_down, (bg, bu, bd) = _padded(factors, scales, x.dtype)
    f, k = weights[0].shape
    extended = triton_adapter.extend(x, a_in)
    g = checkpoint_name(dot_t(extended, triton.dequantize(weights[0], beside=bg)), "gate")
    u = checkpoint_name(dot_t(extended, triton.dequantize(weights[1], beside=bu)), "up")
    h = triton_mlp.forward(g, u, a_down)
    y = dot_t(h, triton.dequantize(weights[2], beside=bd))
    thin_in, thin_h = extended[:, k : k + a_in.shape[1]], h[:, f : f + a_down.shape[1]]
    return y, (x, g, u, thin_in, thin_h, weights, factors)


def _mlp_bwd(scales, residuals, dy):
    from lora_jax.kernels.nf4 import triton, triton_adapter, triton_mlp
    from lora_jax.kernels.nf4.triton_lora import dot

    x, g, u, thin_in, thin_h, weights, factors = residuals
    a_in, a_down, (bg, bu, bd) = _padded(factors, scales, x.dtype)
    k = x.shape[1]
    dh = dot(dy, triton.dequantize(weights[2], beside=bd))  # [dh of the base, dy B^T]
    dg, du, dad, dbg, dbu = triton_mlp.backward(g, u, dh, thin_in, a_down)
    dx_gate = dot(dg, triton.dequantize(weights[0], beside=bg))
    dx_up = dot(du, triton.dequantize(weights[1], beside=bu))
    dx = triton_adapter.add_product(dx_gate, a_in.T, dx_up)
    thin = slice(k, k + a_in.shape[1])
    da_in = _wide(x.T, dx_gate[:, thin] + dx_up[:, thin])  # either is zero where the other is not
    rg, ru, rd = (factors[i].shape[1] for i in (0, 2, 4))
    gradients = (
        da_in[:, :rg],
        scales[0] * dbg[:rg],
        da_in[:, rg : rg + ru],
        scales[1] * dbu[rg : rg + ru],
        dad[:, :rd],
        scales[2] * _wide(thin_h.T, dy)[:rd],
    )
    return dx, None, tuple(d.astype(p.dtype) for d, p in zip(gradients, factors, strict=True))


_mlp.defvjp(_mlp_fwd, _mlp_bwd)


def _wide(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)
