"""The NF4 format: 4-bit NormalFloat codes with one scale for 64 weights, bit for bit as bitsandbytes stores it.

A weight [N, K] is read row by row as one flat sequence and cut into blocks of 64. A block keeps `absmax = max |w|` and,
for every weight, the index of the nearest of 16 quantiles of a normal distribution scaled to [-1, 1]. Two indices share
a byte, the first in the high nibble. With double quantisation the absmax values, less their mean, are themselves stored
as 8-bit indices into a logarithmic table, with one float32 scale for 256 of them.

Sources: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv 2305.14314), section 3 and appendix E;
Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861) for the 8-bit table.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

__all__ = [
    "BLOCK",
    "CODE",
    "NESTED_BLOCK",
    "NF4Layer",
    "NF4Weight",
    "beside_all_scales",
    "cut",
    "dequantize",
    "dequantize_absmax",
    "dynamic_map",
    "nested_code",
    "quantize",
    "quantize_absmax",
    "select",
    "with_one_index",
]

BLOCK = 64
NESTED_BLOCK = 256

# Appendix E of the QLoRA paper, in the digits bitsandbytes ships.
CODE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 values of the dynamic 8-bit data type, ascending, float32 [256].

    Seven decades, each with twice as many values as the one below it (signed: 1 to 64 of either sign; unsigned: 2 to
    128): the midpoints of an even division of [0.1, 1], times a power of ten. With them 0 and 1. The division is
    rounded as torch.linspace rounds it (one fused multiply-add for each value, from the nearer end), since bitsandbytes
    builds its table with that.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        n = 2**exponent if signed else 2 ** (exponent + 1)
        step = float((np.float32(1) - np.float32(0.1)) / np.float32(n))
        i = np.arange(n + 1)
        from_low, from_high = float(np.float32(0.1)) + step * i, 1.0 - step * (n - i)
        edges = np.where(i < (n + 1) // 2, from_low, from_high).astype(np.float32)
        middle = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        values += [*middle, *-middle] if signed else [*middle]
    return np.sort(np.array(values, np.float32))


def nested_code() -> np.ndarray:
    """The table that double-quantised scales are indices into: `dynamic_map(signed=True)`."""
    return dynamic_map(True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4Weight:
    """An NF4-quantised weight of logical shape [..., N, K]; leading axes stack weights of equal shape.

    With double quantisation `absmax` holds uint8 indices and the three `nested_*` fields are set; without it
    `absmax` is float32 and they are None.
    """

    packed: jax.Array  # uint8 [..., N, K/2], the first weight of a pair in the high nibble
    absmax: jax.Array  # float32 or uint8 [..., N, K/64], or flat [..., ceil(N K / 64)] where 64 does not divide K
    nested_absmax: jax.Array | None = None  # float32 [..., ceil(N K / 64 / 256)]
    nested_offset: jax.Array | None = None  # float32 [...]
    nested_code: jax.Array | None = None  # float32 [..., 256]

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., N, K]."""
        return (*self.packed.shape[:-1], 2 * self.packed.shape[-1])

    @property
    def double_quantized(self) -> bool:
        """Whether the absmax values are quantised too."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes that all arrays of the weight take."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @staticmethod
    def abstract(shape: tuple[int, ...], double_quantized: bool) -> "NF4Weight":
        """The weight with `jax.ShapeDtypeStruct` in place of arrays. Raises ValueError for an odd K."""
        *lead, n, k = shape
        if k % 2:
            raise ValueError(
                f"NF4 packs two weights of a row in a byte, so the input dimension must be even; got {shape}"
            )
        blocks = -(-n * k // BLOCK)
        absmax = (*lead, n, k // BLOCK) if k % BLOCK == 0 else (*lead, blocks)
        make = jax.ShapeDtypeStruct
        packed = make((*lead, n, k // 2), np.uint8)
        if not double_quantized:
            return NF4Weight(packed, make(absmax, np.float32))  # pyright: ignore[reportArgumentType]
        nested = (make((*lead, -(-blocks // NESTED_BLOCK)), np.float32), make((*lead,), np.float32))
        return NF4Weight(packed, make(absmax, np.uint8), *nested, make((*lead, 256), np.float32))  # pyright: ignore


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4Layer:
    """One weight [N, K], or all experts' [E, N, K], of a stack that is not cut out of it: a kernel that can reads it
    where it lies.

    To cut it out would be a copy in every layer, since a kernel's operands are whole arrays.
    """

    stack: NF4Weight  # [L, N, K] or [L, E, N, K]
    index: jax.Array  # int32 []
    # int32 [], of the second-level scales if they lie elsewhere: one layer's codes may stand beside all layers' scales.
    nested_index: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [N, K] or [E, N, K]."""
        return self.stack.shape[1:]

    def cut(self) -> NF4Weight:
        """The weight in arrays of its own."""
        return NF4Weight(*(None if x is None else _entry(x, at) for x, at in self._places()))

    def _places(self) -> list[tuple[jax.Array | None, jax.Array]]:
        """The arrays of the stack, and the entry of each that is the weight's."""
        w, nested = self.stack, self.index if self.nested_index is None else self.nested_index
        of_nested = (w.nested_absmax, w.nested_offset, w.nested_code)
        return [(w.packed, self.index), (w.absmax, self.index), *((x, nested) for x in of_nested)]


def _entry(x: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, at, keepdims=False, allow_negative_indices=False)


def beside_all_scales(one: NF4Weight, stack: NF4Weight, index: jax.Array) -> NF4Layer | NF4Weight:
    """Entry `index` of a stack, of which `one` has the codes and scales but not the second-level scales.

    Those stay where they are in the stack: three small copies a weight for every use would take longer than to gather
    or fetch it does. But where 64 does not divide K, no kernel reads a stack.
    """
    layer = NF4Layer(dataclasses.replace(stack, packed=one.packed[None], absmax=one.absmax[None]), jnp.int32(0), index)
    return layer if one.shape[-1] % BLOCK == 0 else layer.cut()


def cut(w):
    """An NF4Layer as an NF4Weight; anything else as it is."""
    return w.cut() if isinstance(w, NF4Layer) else w


def with_one_index(w):
    """An NF4Layer whose arrays all have its `index`, for kernels that take one; anything else as it is."""
    if not isinstance(w, NF4Layer) or w.nested_index is None:
        return w
    return NF4Layer(jax.tree.map(lambda x: x[None], w.cut()), jnp.int32(0))


def quantize(w: jax.Array, double_quantize: bool = True) -> NF4Weight:
    """Quantises one weight [N, K] of any float dtype; the bytes equal bitsandbytes' `quantize_4bit`.

    Every step is elementwise or a maximum, so the result does not depend on the device. One exception: the mean that
    double quantisation subtracts is a sum of many terms, whose last bit depends on their order.

    Raises:
      ValueError: w is not two-dimensional or its K is odd.
    """
    if w.ndim != 2:
        raise ValueError(f"quantize wants one weight of shape [N, K], got shape {w.shape}")
    spec = NF4Weight.abstract(w.shape, double_quantize)
    flat = _pad_to(w.reshape(-1).astype(jnp.float32), BLOCK)
    blocks = flat.reshape(-1, BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    scaled = _scale_to_unit(blocks, absmax)
    if w.size % BLOCK:  # bitsandbytes divides in a block that is cut short
        scaled = scaled.at[-1].set(blocks[-1] / jnp.where(absmax[-1] > 0, absmax[-1], 1))
    codes = _nearest(scaled, CODE).reshape(-1)[: w.size]
    packed = (codes[0::2] << 4 | codes[1::2]).astype(jnp.uint8).reshape(spec.packed.shape)
    if not double_quantize:
        return NF4Weight(packed, absmax.reshape(spec.absmax.shape))
    indices, *nested = quantize_absmax(absmax)
    return NF4Weight(packed, indices.reshape(spec.absmax.shape), *nested)  # pyright: ignore[reportArgumentType]


def quantize_absmax(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Quantises the float32 scales of one weight, of any shape: (`absmax`, `nested_*`) of an NF4Weight."""
    # The barrier keeps XLA from summing where it computes the scales, in an order that depends on how.
    flat = jax.lax.optimization_barrier(absmax.reshape(-1))
    offset = jnp.mean(flat)
    centred = _pad_to(flat - offset, NESTED_BLOCK).reshape(-1, NESTED_BLOCK)
    nested_absmax = jnp.max(jnp.abs(centred), axis=1)
    indices = _nearest(_scale_to_unit(centred, nested_absmax), nested_code())
    indices = indices.reshape(-1)[: absmax.size].astype(jnp.uint8).reshape(absmax.shape)
    return indices, nested_absmax, offset, jnp.asarray(nested_code())


def dequantize(w: NF4Weight, dtype: DTypeLike) -> jax.Array:
    """Returns the weight [..., N, K]: code times absmax in float32, rounded once to `dtype`."""
    one = functools.partial(_dequantize_one, dtype=dtype)
    for _ in range(w.packed.ndim - 2):
        one = jax.vmap(one)
    return one(w)


def dequantize_absmax(w: NF4Weight) -> jax.Array:
    """Returns the float32 scales of one weight, in the shape of `w.absmax`."""
    if w.nested_absmax is None or w.nested_code is None or w.nested_offset is None:
        return w.absmax
    scale = jnp.repeat(w.nested_absmax, NESTED_BLOCK)[: w.absmax.size].reshape(w.absmax.shape)
    # bitsandbytes rounds the product before it adds the offset. Without the barrier XLA contracts both into one
    # fused multiply-add, and about a third of the scales differ in their last bit.
    product = jax.lax.optimization_barrier(jnp.take(w.nested_code, w.absmax.astype(jnp.int32)) * scale)
    return product + w.nested_offset


def _dequantize_one(w: NF4Weight, dtype: DTypeLike) -> jax.Array:
    """`dequantize` of a weight without leading axes."""
    n, half = w.packed.shape
    # Both nibbles are looked up and then interleaved. Shifting a doubled byte reads shorter, but XLA splits that into
    # several passes: a training step of an 8B model took 70 ms and 4 GiB more.
    values = jnp.stack([select(w.packed >> 4, CODE), select(w.packed & 15, CODE)], axis=-1)
    absmax = dequantize_absmax(w)
    if absmax.ndim == 2:
        return (values.reshape(n, -1, BLOCK) * absmax[..., None]).reshape(n, 2 * half).astype(dtype)
    scale = jnp.repeat(absmax, BLOCK)[: n * 2 * half]
    return (values.reshape(-1) * scale).reshape(n, 2 * half).astype(dtype)


def select(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """table[codes] for a table of 16, as a tree of selects on the four bits.

    1.5x faster than a gather on a GPU, it fuses, and it works inside a Pallas kernel.
    """
    level = list(table)
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        level = [jnp.where(is_set, level[i + 1], level[i]) for i in range(0, len(level), 2)]
    return level[0]


def _nearest(x: jax.Array, table: np.ndarray) -> jax.Array:
    """Index of the nearest table entry; an exact midpoint goes to the lower index. uint8."""
    midpoints = (table[:-1] + table[1:]) / np.float32(2)
    if len(table) <= 16:  # a sum of comparisons fuses into one pass
        return sum((x > m).astype(jnp.uint8) for m in midpoints)  # pyright: ignore[reportReturnType]
    # As many as 255 comparisons, but one pass: a binary search is a loop of gathers, and took a GPU longer.
    return jnp.sum(x[..., None] > midpoints, axis=-1, dtype=jnp.uint8)


def _scale_to_unit(blocks: jax.Array, absmax: jax.Array) -> jax.Array:
    """blocks / absmax within [-1, 1], by multiplication with the rounded reciprocal as bitsandbytes does it."""
    # Blocks of zeros stay zeros. So do blocks of subnormal numbers, which devices flush to zero as they please.
    empty = absmax < np.finfo(np.float32).tiny
    # The barrier keeps XLA from turning the product into a division, which rounds differently.
    reciprocal = jax.lax.optimization_barrier(jnp.where(empty, 0, 1 / jnp.where(empty, 1, absmax)))
    return jnp.clip(blocks * reciprocal[:, None], -1, 1)


def _pad_to(flat: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(flat, (0, -flat.size % multiple))
