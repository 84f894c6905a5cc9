"""What a layer keeps from forward to backward: the names of its tensors, and their form of 8 bits.

`jax.checkpoint` saves a named tensor, moves it to the host, or computes it again. `named` and `Policy` add a fourth
way: the tensor is kept as int8 with one scale for each block of its features, 53 % of the bytes of bfloat16. The
forward pass goes on with the exact tensor; backward, and whatever it computes again, starts from the rounded one.

JAX decides what is kept where it splits the equations of a layer into those of the forward pass and those computed
again, and lets a primitive say for itself how it is split. The one here puts an encoder into the first part and a
decoder into the second, where JAX's own offloading puts a copy to the host and one back.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive, Var
from jax.interpreters import ad, batching, mlir
from jax.interpreters.partial_eval import partial_eval_jaxpr_custom_rules

__all__ = ["MAX_BLOCK", "Policy", "block_of", "dequantize", "named", "quantize", "quantized_bytes"]

# Features that share a scale, at most. On a real model rounded keys move gradients by 2.6 % so, by 3.8 % with 64.
MAX_BLOCK = 32


# ---- the form -----------------------------------------------------------------------------------------------------


def block_of(features: int) -> int:
    """Features of a block: the largest divisor of their number up to MAX_BLOCK, so that all blocks are full."""
    return next(n for n in range(min(features, MAX_BLOCK), 0, -1) if features % n == 0)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds every block of the last axis to 255 equal steps from -max |x| to max |x|.

    An element's error is at most half a step, 0.4 % of the largest of its block, and 0.2 % more for what rounding the
    scale cuts off there.

    Args:
      x: floats [..., F].

    Returns:
      (codes int8 [..., F], scales bfloat16 [..., F / block_of(F)]).
    """
    blocks = x.reshape(*x.shape[:-1], -1, block_of(x.shape[-1])).astype(jnp.float32)
    scales = (jnp.abs(blocks).max(axis=-1) / 127).astype(jnp.bfloat16)
    # Codes are of the rounded scale; a block of zeros has any.
    divisors = jnp.maximum(scales.astype(jnp.float32), jnp.finfo(jnp.float32).tiny)[..., None]
    codes = jnp.clip(jnp.round(blocks / divisors), -127, 127).astype(jnp.int8)
    return codes.reshape(x.shape), scales


def dequantize(codes: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """The tensor [..., F] in `dtype`, from what `quantize` returns."""
    blocks = codes.reshape(*scales.shape, -1).astype(jnp.float32)
    return (blocks * scales.astype(jnp.float32)[..., None]).astype(dtype).reshape(codes.shape)


def quantized_bytes(elements: int, features: int) -> int:
    """Bytes of the codes and scales of so many elements, whose last axis has `features`."""
    return elements + 2 * elements // block_of(features)


# ---- keeping it ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy for `jax.checkpoint`: what becomes of the tensors with these names; others are computed again."""

    saved: frozenset[str] = frozenset()
    offloaded: frozenset[str] = frozenset()  # to the host's pinned memory
    quantized: frozenset[str] = frozenset()  # only of tensors named by `named`

    def __call__(self, primitive, *avals, **params):
        """What JAX asks for every equation."""
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=self.saved,
            names_which_can_be_offloaded=self.offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )(primitive, *avals, **params)


def named(x: jax.Array, name: str) -> jax.Array:
    """`checkpoint_name` of a tensor that a `Policy` may also keep in 8 bits. Returns x."""
    return checkpoint_name(_roundable.bind(x, name=name), name)  # pyright: ignore[reportReturnType]


def _batch(args, dims, *, name):
    return _roundable.bind(*args, name=name), dims[0]


_roundable = Primitive("roundable")
_roundable.def_impl(lambda x, *, name: x)
_roundable.def_abstract_eval(lambda x, *, name: x)
ad.primitive_jvps[_roundable] = lambda primals, tangents, *, name: (_roundable.bind(*primals, name=name), tangents[0])
batching.primitive_batchers[_roundable] = _batch
mlir.register_lowering(_roundable, lambda ctx, x, *, name: [x])


def _encode(x, *, name):
    """x itself goes on; its 8-bit form is kept."""
    del name
    # Without the barrier nothing waits for the codes, and the compiler, which may put them off, orders all else worse.
    return list(jax.lax.optimization_barrier((x, *quantize(x))))


def _encoded_avals(x, *, name):
    del name
    *lead, features = x.shape
    scales = (*lead, features // block_of(features))
    return [x, x.update(dtype=jnp.dtype(jnp.int8)), x.update(shape=scales, dtype=jnp.dtype(jnp.bfloat16))]


_encoder = Primitive("encode_kept")
_encoder.multiple_results = True
_encoder.def_impl(_encode)
_encoder.def_abstract_eval(_encoded_avals)
mlir.register_lowering(_encoder, mlir.lower_fun(_encode, multiple_results=True))


def _decode(codes, scales, *, name, dtype):
    del name
    return dequantize(codes, scales, dtype)


_decoder = Primitive("decode_kept")
_decoder.def_impl(_decode)
_decoder.def_abstract_eval(lambda codes, scales, *, name, dtype: codes.update(dtype=dtype))
mlir.register_lowering(_decoder, mlir.lower_fun(_decode, multiple_results=False))


def _split(policy, unknown, instantiated, eqn):
    """How an equation of `named` is split: (forward, computed again, is unknown, is computed again, what is kept)."""
    (x,), (out,), name = eqn.invars, eqn.outvars, eqn.params["name"]
    if unknown[0]:
        return None, eqn, [True], [True], []
    if name not in getattr(policy, "quantized", ()):
        return eqn, eqn, [False], [True], [] if instantiated[0] else [x]
    _, codes, scales = (Var(aval) for aval in _encoded_avals(x.aval, name=name))
    forward = eqn.replace(primitive=_encoder, outvars=[out, codes, scales])
    params = {"name": name, "dtype": x.aval.dtype}
    again = eqn.replace(primitive=_decoder, invars=[codes, scales], params=params)
    return forward, again, [False], [True], [codes, scales]


partial_eval_jaxpr_custom_rules[_roundable] = _split
