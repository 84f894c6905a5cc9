"""The gated feed-forward layer of LoRA and QLoRA as one function: down(act(gate(x)) up(x)), with its own backward."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.kernels.dispatch import resolve
from lora_jax.kernels.kept import named
from lora_jax.kernels.nf4.shared_input import Projection, lora_matmuls, preference, project

__all__ = ["ACTIVATIONS", "Projection", "lora_mlp"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype),
}


def lora_mlp(
    x: jax.Array,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str = "silu",
    implementation: str | None = None,
) -> jax.Array:
    """Returns down(act(gate(x)) up(x)), with gradients for x and all six factors; weights and biases are frozen.

    Backward keeps x, gate(x) and up(x), the last two named "gate" and "up" for rematerialisation, and the products of
    the adapters' A with their inputs, [M, 16] or a little more each, named "thin"; never a decoded weight.

    Args:
      x: activations [..., K].
      gate, up: projections K -> F.
      down: projection F -> K.
      activation: a key of ACTIVATIONS.
      implementation: "triton", which fuses the activation with the products of the adapters, "xla", the composition
        of `lora_matmuls` and `lora_matmul` (which choose for themselves), or None to choose.

    Raises:
      NotImplementedError: the named implementation cannot do this call.
    """
    rows = x.reshape(-1, x.shape[-1])
    supported = {"xla": None, "triton": lambda: _why_not(rows, gate, up, down, activation)}
    if resolve("lora_mlp", implementation, supported, preference(rows, (gate, up))) == "xla":
        g, u = lora_matmuls(x, (gate, up))
        g, u = named(g, "gate"), named(u, "up")
        return project(ACTIVATIONS[activation](g) * u, down)
    scales = tuple(float(p.scale) for p in (gate, up, down))
    factors = tuple((p.a, p.b) for p in (gate, up, down))
    y = _mlp(rows, (gate.w, up.w, down.w), factors, scales, activation)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _why_not(x, gate, up, down, activation) -> str | None:
    from lora_jax.kernels.nf4 import triton, triton_mlp, triton_shared

    if activation not in triton_mlp.ACTIVATIONS:
        return f"its activations are {', '.join(triton_mlp.ACTIVATIONS)}, not {activation}"
    for name, p in (("gate", gate), ("up", up), ("down", down)):
        if p.a is None or p.b is None:
            return f"{name} has no adapter"
        if p.bias is not None or p.gain is not None:
            return f"{name} has a bias or a gain"
        if p.dropout_rate:
            return f"{name}'s adapter has dropout"
        if p.a.shape[1] > triton_mlp.MAX_RANK:
            return f"{name} has rank {p.a.shape[1]}, at most {triton_mlp.MAX_RANK} is possible"
    if (reason := triton_shared.why_not(x, (gate, up))) is not None:
        return reason
    if (reason := triton.why_not(x, down.w)) is not None:
        return f"down: {reason}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _mlp(x, weights, factors, scales, activation):
    return _mlp_fwd(x, weights, factors, scales, activation)[0]


def _adapters(weights, factors, scales, dtype):
    """The factors as operands of the extended matmuls: those of gate and up, which share x, and those of down."""
    from lora_jax.kernels.nf4.triton_shared import adapters

    both = adapters(weights[:2], factors[:2], scales[:2], dtype)
    return both, adapters(weights[2:], factors[2:], scales[2:], dtype)


def _mlp_fwd(x, weights, factors, scales, activation):
    from lora_jax.kernels.nf4 import triton, triton_mlp, triton_shared
    from lora_jax.kernels.nf4.triton_lora import dot_t

    both, down = _adapters(weights, factors, scales, x.dtype)
    f = weights[0].shape[0]
    (g, u), thin_x = triton_shared.forward(x, weights[:2], both)
    g, u = named(g, "gate"), named(u, "up")
    h = triton_mlp.forward(g, u, down.a, activation=activation)
    y = dot_t(h, triton.dequantize(weights[2], beside=down.b[0]))
    thin_x, thin_h = (checkpoint_name(t, "thin") for t in (thin_x, h[:, f : f + down.a.shape[1]]))
    return y, (x, g, u, thin_x, thin_h, weights, factors)


def _mlp_bwd(scales, activation, residuals, dy):
    from lora_jax.kernels.nf4 import triton, triton_mlp, triton_shared
    from lora_jax.kernels.nf4.triton_lora import dot

    x, g, u, thin_x, thin_h, weights, factors = residuals
    both, down = _adapters(weights, factors, scales, x.dtype)
    dh = dot(dy, triton.dequantize(weights[2], beside=down.b[0]))  # [dh of the base, dy B^T]
    backward = functools.partial(triton_mlp.backward, activation=activation)
    dg, du, da_down, db_gate, db_up = backward(g, u, dh, thin_x, both.widths, down.a)
    dx, dthin = triton_shared.input_gradient_of_two((dg, du), weights[:2], both)
    da = _wide(x.T, dthin)
    ranks = [a.shape[1] for a, _ in factors]
    gradients = (
        (da[:, both.columns[0]], scales[0] * db_gate[:, : ranks[0]].T),
        (da[:, both.columns[1]], scales[1] * db_up[:, : ranks[1]].T),
        (da_down[:, : ranks[2]], scales[2] * _wide(thin_h.T, dy)[: ranks[2]]),
    )
    return dx, None, jax.tree.map(lambda d, factor: d.astype(factor.dtype), gradients, factors)


_mlp.defvjp(_mlp_fwd, _mlp_bwd)


def _wide(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)
