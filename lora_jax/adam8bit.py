"""Adam with 8-bit state, in bitsandbytes' format and by its algorithm.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861): both moments of Adam are stored as
one byte an element and one float32 for 256 elements, about 2.03 bytes a parameter in place of 8. A step reads them back
to float32, does Adam's arithmetic there, takes the update from the fresh float32 moments, and stores those again.

A moment is read as one flat sequence, whatever the shape of the leaf, and cut into blocks of 256, the last one short.
A block keeps absmax = max |x|, and for every element the index of the value of the dynamic map (`dynamic_map`; signed
for the first moment, unsigned for the second) that is nearest to x / absmax. Details are those of bitsandbytes' CUDA
kernel: the exact middle of two values goes to the even index, and a negative first moment is never stored as zero. Its
CPU code has no rule for the sign, and rounds x / absmax to a grid of 65,536 points in [-1, 1] first, 3e-5 apart where
the map has values down to 6e-7 (signed) and 3e-7 (unsigned). In a block of zeros the indices mean nothing; here they
are those of zero.

What to expect of the format: a second moment below 1.6e-7 of the largest of its block is stored as zero. Where
gradients stay below 4e-4 of the largest of their block, steps are up to 1 / sqrt(1 - b2) times as long, 32 at 0.999.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.kernels.nf4.format import dynamic_map

__all__ = ["BLOCK", "MIN_SIZE", "Quantized", "ScaleByAdam8bitState", "dequantize", "quantize", "scale_by_adam8bit"]

BLOCK = 256
MIN_SIZE = 4096  # elements; smaller leaves keep float32 state, as with bitsandbytes' min_8bit_size


class Quantized(NamedTuple):
    """A block-wise 8-bit tensor of n elements."""

    codes: jax.Array  # uint8, the tensor's shape: indices into the dynamic map
    absmax: jax.Array  # float32 [ceil(n / 256)], the largest absolute value of each block


class ScaleByAdam8bitState(NamedTuple):
    """State of `scale_by_adam8bit`. `mu` and `nu` are trees of the parameters' structure."""

    count: jax.Array  # int32 [], updates done
    mu: Any  # first moments: `Quantized`, or float32 of the leaf's shape for leaves of less than MIN_SIZE elements
    nu: Any  # second moments, likewise


def scale_by_adam8bit(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Rescale updates by Adam with block-wise 8-bit state; takes the place of `optax.scale_by_adam`.

    One update is, at step t = 1, 2, ... and with Q the quantisation of this module,

        m = b1 Q(m) + (1 - b1) g,  v = b2 Q(v) + (1 - b2) g^2
        update = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    in float32 throughout. Leaves are updated one after the other, so that no more than one leaf's moments are in
    float32 at a time. A gradient that is not finite makes its update, and the state of its block, not finite; the CUDA
    kernel of bitsandbytes passes over it. See the module for the format, and for what to expect of it.

    Args:
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added outside the square root.
    """

    def init(params: Any) -> ScaleByAdam8bitState:
        mu, nu = (jax.tree.map(_zero_moment, params) for _ in range(2))  # not shared: they are donated
        return ScaleByAdam8bitState(jnp.zeros([], jnp.int32), mu, nu)

    def update(updates: Any, state: ScaleByAdam8bitState, params: Any = None) -> tuple[Any, ScaleByAdam8bitState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        correct1, correct2 = _bias_correction(b1, count), _bias_correction(b2, count)

        def one_leaf(gradient: jax.Array, mu: Any, nu: Any) -> tuple[jax.Array, Any, Any]:
            g = gradient.astype(jnp.float32)
            m = b1 * _read(mu, signed=True) + (1 - b1) * g
            v = b2 * _read(nu, signed=False) + (1 - b2) * jnp.square(g)
            new = (m / correct1) / (jnp.sqrt(v / correct2) + eps)
            return new.astype(gradient.dtype), _write(m, signed=True), _write(v, signed=False)

        gradients, tree = jax.tree.flatten(updates)
        done: list[tuple[jax.Array, Any, Any]] = []
        for g, mu, nu in zip(gradients, tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu), strict=True):
            if done:  # on a CPU XLA would otherwise have the moments of all leaves in float32 at once
                mu, nu, _ = jax.lax.optimization_barrier((mu, nu, done[-1][1:]))
            done.append(one_leaf(g, mu, nu))
        new_updates, mu, nu = (tree.unflatten([leaf[i] for leaf in done]) for i in range(3))
        return new_updates, ScaleByAdam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def quantize(x: jax.Array, signed: bool) -> Quantized:
    """Store an array of any shape in 8 bits an element; the unsigned form wants x >= 0.

    NaN and infinity make the absmax of their block so, and with it every value read back from the block.
    """
    blocks = _blocks(x.astype(jnp.float32))
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    # The bound is for blocks of zeros, and of subnormal numbers, which devices flush to zero as they please.
    unit = blocks / jnp.maximum(absmax, np.finfo(np.float32).tiny)[:, None]
    return Quantized(_unblock(_nearest(unit, signed), x.shape), absmax)


def dequantize(q: Quantized, signed: bool) -> jax.Array:
    """The values of a quantised tensor, float32 of its shape."""
    values = _looked_up(dynamic_map(signed), _blocks(q.codes))
    return _unblock(values * q.absmax[:, None], q.codes.shape)


def _zero_moment(parameter: jax.Array) -> Any:
    if parameter.size < MIN_SIZE:
        return jnp.zeros_like(parameter, jnp.float32)
    # All zero, as bitsandbytes starts. Both arrays lie on the devices that the parameter lies on.
    absmax = jnp.zeros_like(jnp.max(_blocks(parameter), axis=-1), jnp.float32)
    return Quantized(jnp.zeros_like(parameter, jnp.uint8), absmax)


def _read(moment: Any, signed: bool) -> jax.Array:
    return dequantize(moment, signed) if isinstance(moment, Quantized) else moment


def _write(moment: jax.Array, signed: bool) -> Any:
    return moment if moment.size < MIN_SIZE else quantize(moment, signed)


def _bias_correction(decay: float, count: jax.Array) -> jax.Array:
    """1 - decay^count, by way of expm1: 1 - 0.999 in float32 is off by 1e-5 of itself."""
    return -jnp.expm1(count * math.log(decay)) if decay else jnp.ones([])


def _blocks(x: jax.Array) -> jax.Array:
    """[blocks, 256], padded with zeros."""
    return jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)


def _unblock(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return blocks.reshape(-1)[: math.prod(shape)].reshape(shape)


def _nearest(unit: jax.Array, signed: bool) -> jax.Array:
    """Indices (uint8) of the map's values nearest to `unit`, float32 in [-1, 1], or in [0, 1] if not signed.

    Within a decade the map is evenly spaced, so the rank of |unit| among its values from zero up is a linear function
    there. From decade to decade the slope falls by five, so everywhere the rank is the least of seven lines. That is
    right to half a step, and one comparison decides between the two indices that are left. A search over 255 midpoints
    would take eight look-ups, each waiting for the one before, which XLA does not fuse into one pass.
    """
    ranks = []
    for decade in range(7):
        values = 2.0**decade if signed else 2.0 ** (decade + 1)  # in [0.1, 1] * 10^(decade - 6)
        before = values if signed else values - 1  # zero and the values of the decades below
        slope = values / 0.9
        ranks.append(slope * 10.0 ** (6 - decade) * jnp.abs(unit) + (before - slope * 0.1))
    lower = (functools.reduce(jnp.minimum, ranks) - 0.5).astype(jnp.int32)
    if signed:  # the map is zero at index 127, and symmetric but for the 1.0 at its end
        lower = jnp.where(unit < 0, 126 - lower, 127 + lower)
    lower = jnp.clip(lower, 0, 254)  # also keeps the look-up in bounds for NaN
    upper_from = _looked_up(_borders(signed), lower)
    return (lower + (unit > upper_from)).astype(jnp.uint8)


def _looked_up(table: np.ndarray, index: jax.Array) -> jax.Array:
    """table[index]; indices are in bounds, and XLA writes out what it takes to make sure of it."""
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


@functools.cache
def _borders(signed: bool) -> np.ndarray:
    """Where rounding goes from one index to the next, float32 [255]: index i + 1 begins above `_borders[i]`."""
    values = dynamic_map(signed)
    borders = (values[:-1] + values[1:]) * np.float32(0.5)
    borders[1::2] = np.nextafter(borders[1::2], np.float32(-2))  # the middle itself goes to the even index above
    if signed:
        borders[126] = -np.finfo(np.float32).tiny  # what is negative stays so
    return borders
