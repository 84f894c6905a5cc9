"""The block formats of llama.cpp, values to bytes, in its own arithmetic: float32, sums in its order.

Formats and searches are those of ggml (ggml-quants.c, MIT), written anew over many blocks at once: element i of all
blocks is one array, so that a sum over a block is a chain of additions of arrays and has llama.cpp's order. One text
serves NumPy and JAX; `Arrays` holds what differs. A search does not keep the codes of its best trial but that trial's
scale and minimum, from which it makes them once at the end.

Names: a block has 256 values (32 in the legacy types) and sub-blocks of 32 or 16, each with a scale, and a minimum in
the types that have one. A code is the small integer that stands for a value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GgmlType

__all__ = ["NUMPY", "Array", "Arrays", "encode", "sum_of_squares_over"]

Array = Any  # of NumPy or JAX; float32 unless said otherwise. Arguments `weights` and `sigma2` may be None
_Columns = list[Array]  # element i of every block, [blocks] each
_EPS = np.float32(1e-15)  # blocks below it count as zeros
_F32 = np.float32


@dataclass(frozen=True)
class Arrays:
    """NumPy or JAX."""

    xp: Any  # the module
    loop: Callable[[int, Callable[[Any, Any], Any], Any], Any]  # (count, body(i, carry) -> carry, carry) -> carry
    columns: Callable[[Array], _Columns]  # [blocks, width] -> width arrays, each contiguous in memory
    put: Callable[[Array, Any, Array], Array]  # (array, i, value) -> array with value at i; it may be the same array
    if_any: Callable[[Array, Callable[[], Array]], Array]  # (condition, make) -> make() if it holds anywhere, or zeros
    fenced: Callable[[Array], Array]  # float32, unchanged: what a compiler must compute as it is written
    spread: Callable[[Array, Array], Array]  # (value, like) -> value, in like's shape without the compiler knowing
    quotient: Callable[[Array, Array], Array]  # float32 a / b, rounded correctly
    sqrt: Callable[[Array], Array]  # of float32, rounded correctly

    def mul(self, a: Array, b: Array) -> Array:
        """a * b, rounded, whatever it is added to: a compiler would fuse them and round only the sum."""
        return self.fenced(a * b)

    def div(self, a: Array, b: Array) -> Array:
        """a / b, rounded: a compiler would make a * (c / b) of a / (b / c), and a * (1 / b) where b is repeated."""
        if np.broadcast_shapes(np.shape(a), np.shape(b)) != np.shape(b):
            b = self.spread(b, a)
        return self.fenced(self.quotient(a, b))


def _numpy_loop(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    for i in range(count):
        carry = body(i, carry)
    return carry


def _numpy_if_any(condition: np.ndarray, make: Callable[[], np.ndarray]) -> Any:
    return make() if condition.any() else _F32(0)


def _numpy_put(array: np.ndarray, i: int, value: np.ndarray) -> np.ndarray:
    array[i] = value
    return array


NUMPY = Arrays(
    xp=np,
    loop=_numpy_loop,
    columns=lambda x: list(np.ascontiguousarray(x.T)),
    put=_numpy_put,
    if_any=_numpy_if_any,
    fenced=lambda x: x,
    spread=lambda value, like: value,
    quotient=np.divide,
    sqrt=np.sqrt,
)


def sum_of_squares_over(type: GgmlType) -> str | None:
    """Over what `encode` wants the sum of squares if it is given weights: "row", "block", or nothing."""
    if type in (GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1):
        return "row"
    return "block" if type in (GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q5_K) else None


def encode(m: Arrays, type: GgmlType, x: Array, weights: Array = None, sigma2: Array = None) -> Array:
    """Blocks as bytes.

    Args:
      m: the module to compute with.
      type: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 or a K-quant.
      x: float32 [blocks, 256], or [blocks, 32] for a type without K.
      weights: the importance of each value, of x's shape; without it the values themselves decide.
      sigma2: with weights, the mean of the squares of x over its row or block (`sum_of_squares_over`), [blocks].

    Returns uint8 [blocks, bytes of a block].
    """
    if type == GgmlType.Q8_0:
        return _q8_0(m, x)
    if type in (GgmlType.Q4_0, GgmlType.Q5_0):
        return _without_minimum(m, x, weights, sigma2, 4 if type == GgmlType.Q4_0 else 5)
    if type in (GgmlType.Q4_1, GgmlType.Q5_1):
        return _with_minimum(m, x, weights, sigma2, 4 if type == GgmlType.Q4_1 else 5)
    if type == GgmlType.Q2_K:
        return _q2_k(m, x, weights, sigma2)
    if type == GgmlType.Q3_K:
        return _q3_k(m, x, weights, sigma2)
    if type in (GgmlType.Q4_K, GgmlType.Q5_K):
        return _q45_k(m, x, weights, sigma2, 4 if type == GgmlType.Q4_K else 5)
    if type == GgmlType.Q6_K:
        return _q6_k(m, x, weights)
    raise ValueError(f"no blocks of type {type.name}")


# Small parts.


def _nearest(m: Arrays, x: Array) -> Array:
    """Rounded to nearest even, int32; beyond 2^22 what llama.cpp makes of it, which reads the bits of a sum."""
    bits = (x + _F32(12582912)).view(np.int32)
    return (bits & np.int32(0x7FFFFF)) - np.int32(0x400000)


def _code(m: Arrays, x: Array, low: int, high: int) -> Array:
    """Rounded and clipped, float32."""
    return m.xp.minimum(m.xp.maximum(_nearest(m, x), low), high).astype(np.float32)


def _sum(terms: _Columns) -> Array:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _largest(m: Arrays, columns: _Columns) -> Array:
    """The largest, or 0."""
    largest = m.xp.zeros_like(columns[0])
    for x in columns:
        largest = m.xp.where(x > largest, x, largest)
    return largest


def _largest_by_magnitude(m: Arrays, columns: _Columns) -> tuple[Array, Array]:
    """(the value, its magnitude), of the first if there are several."""
    value = magnitude = m.xp.zeros_like(columns[0])
    for x in columns:
        more = m.xp.abs(x) > magnitude
        value, magnitude = m.xp.where(more, x, value), m.xp.where(more, m.xp.abs(x), magnitude)
    return value, magnitude


def _range(m: Arrays, columns: _Columns) -> tuple[Array, Array]:
    low = high = columns[0]
    for x in columns[1:]:
        low, high = m.xp.where(x < low, x, low), m.xp.where(x > high, x, high)
    return low, high


def _half(x: Array) -> tuple[Array, Array]:
    """(float16's bytes [blocks, 2], its value in float32)."""
    half = x.astype(np.float16)
    return half[:, None].view(np.uint8), half.astype(np.float32)


def _where_positive(m: Arrays, condition: Array, value: Array) -> Array:
    return m.xp.where(condition > 0, value, _F32(0))


def _pack(m: Arrays, parts: list[Array], bits: int) -> Array:
    """Codes, uint8 of one shape, as one byte: the first in the lowest bits."""
    packed = parts[0]
    for i, part in enumerate(parts[1:], 1):
        packed = packed | (part << np.uint8(bits * i))
    return packed


def _joined(m: Arrays, *parts: Array) -> Array:
    return m.xp.concatenate(parts, axis=1)


def _root_weights(m: Arrays, columns: _Columns, weights: Array, sigma2: Array) -> _Columns:
    return [m.mul(w, m.sqrt(sigma2 + m.mul(x, x))) for w, x in zip(m.columns(weights), columns, strict=True)]


# Searches for the scale of one sub-block. `w` are the weights of the error of each value.


def _search_with_minimum(
    m: Arrays, x: _Columns, w: _Columns, top: int, steps: np.ndarray, absolute: bool, clipped_first: bool
) -> tuple[Array, Array, Callable[[], _Columns]]:
    """x ~ scale * code + minimum with codes 0 ... top and minimum <= 0: tries scales, and fits both to the codes.

    Each trial starts from the best minimum so far (make_qkx2_quants; with `clipped_first` make_qkx3_quants, which
    clips before it rounds). Returns (scale, -minimum, function that makes the codes).
    """
    where = m.xp.where
    low, high = _range(m, x)
    sum_w, sum_x = _sum(w), _sum([m.mul(a, b) for a, b in zip(w, x, strict=True)])
    low = where(low > 0, _F32(0), low)
    flat = high == low

    def error(scale: Array, minimum: Array, codes: _Columns) -> Array:
        terms = []
        for xi, wi, code in zip(x, w, codes, strict=True):
            difference = m.mul(scale, code) + minimum - xi
            squared = m.xp.abs(difference) if absolute else difference * difference
            terms.append(m.mul(wi, squared))
        return _sum(terms)

    def codes_of(inverse: Array, minimum: Array, clip: bool) -> _Columns:
        scaled = [m.mul(inverse, xi - minimum) for xi in x]
        if clip:
            return [where(v > 0, _code(m, where(v < top, v, _F32(top)), 0, top), _F32(0)) for v in scaled]
        return [_code(m, v, 0, top) for v in scaled]

    first = m.div(_F32(top), high - low)
    scale = m.div(_F32(1), first)
    start = (error(scale, low, codes_of(first, low, False)), scale, low, first, low)
    tried = m.xp.asarray(steps)

    def attempt(step: Any, best: tuple[Array, ...]) -> tuple[Array, ...]:
        best_error, _, minimum, _, _ = best
        inverse = m.div(tried[step], high - minimum)
        codes = codes_of(inverse, minimum, clipped_first)
        weighted = [m.mul(wi, code) for wi, code in zip(w, codes, strict=True)]
        sum_l = _sum(weighted)
        sum_l2 = _sum([m.mul(wl, code) for wl, code in zip(weighted, codes, strict=True)])
        sum_xl = _sum([m.mul(wl, xi) for wl, xi in zip(weighted, x, strict=True)])
        determinant = m.mul(sum_w, sum_l2) - m.mul(sum_l, sum_l)
        fit = m.div(m.mul(sum_w, sum_xl) - m.mul(sum_x, sum_l), determinant)
        fit_minimum = m.div(m.mul(sum_l2, sum_x) - m.mul(sum_l, sum_xl), determinant)
        above = fit_minimum > 0
        fit, fit_minimum = where(above, m.div(sum_xl, sum_l2), fit), where(above, _F32(0), fit_minimum)
        trial = error(fit, fit_minimum, codes)
        better = (determinant > 0) & (trial < best_error)
        now = (trial, fit, fit_minimum, inverse, minimum)
        return tuple(where(better, a, b) for a, b in zip(now, best, strict=True))

    best = m.loop(len(steps), attempt, start)
    _, scale, minimum, inverse, minimum_then = best

    def codes() -> _Columns:
        made = codes_of(inverse, minimum_then, clipped_first)
        if clipped_first:  # trials only; it matters where the inverse of a scale overflows
            plain = codes_of(first, low, False)
            untried = (inverse == first) & (minimum_then == low)
            made = [where(untried, a, b) for a, b in zip(plain, made, strict=True)]
        return [where(flat, _F32(0), code) for code in made]

    return where(flat, _F32(0), scale), where(flat, -low, -minimum), codes


def _steps(start: float, step: float, count: int, top: int) -> np.ndarray:
    return (_F32(start) + _F32(step) * np.arange(count + 1, dtype=np.float32)) + _F32(top)


def _search_symmetric(m: Arrays, x: _Columns, top: int, w: _Columns) -> tuple[Array, Callable[[], _Columns]]:
    """x ~ scale * (code - top) with codes 0 ... 2 top - 1 (make_qx_quants). Returns (scale, function for the codes)."""
    where = m.xp.where
    value, magnitude = _largest_by_magnitude(m, x)
    zeros = magnitude < _EPS

    def sums(inverse: Array) -> tuple[Array, Array]:
        codes = [_code(m, m.mul(inverse, xi), -top, top - 1) for xi in x]
        sum_xl = _sum([m.mul(m.mul(wi, xi), code) for wi, xi, code in zip(w, x, codes, strict=True)])
        sum_l2 = _sum([m.mul(m.mul(wi, code), code) for wi, code in zip(w, codes, strict=True)])
        return sum_xl, sum_l2

    first = m.div(_F32(-top), value)
    sum_xl, sum_l2 = sums(first)
    scale = where(sum_l2 != 0, m.div(sum_xl, sum_l2), _F32(0))
    shifts = np.array([shift for shift in range(-9, 10) if shift], np.float32)
    tried = m.xp.asarray(-(_F32(top) + _F32(0.1) * shifts))

    def attempt(step: Any, best: tuple[Array, ...]) -> tuple[Array, ...]:
        _, quality, _ = best
        inverse = m.div(tried[step], value)
        sum_xl, sum_l2 = sums(inverse)
        better = (sum_l2 > 0) & (m.mul(sum_xl, sum_xl) > m.mul(quality, sum_l2))
        fit = m.div(sum_xl, sum_l2)
        return tuple(where(better, a, b) for a, b in zip((fit, m.mul(fit, sum_xl), inverse), best, strict=True))

    scale, _, inverse = m.loop(len(shifts), attempt, (scale, m.mul(scale, sum_xl), first))

    def codes() -> _Columns:
        return [where(zeros, _F32(0), _code(m, m.mul(inverse, xi), -top, top - 1) + top) for xi in x]

    return where(zeros, _F32(0), scale), codes


def _search_by_descent(m: Arrays, x: _Columns, top: int) -> tuple[Array, Callable[[], _Columns]]:
    """As `_search_symmetric` with weights x^2, by changing one code at a time, five times over (make_q3_quants)."""
    where = m.xp.where
    value, magnitude = _largest_by_magnitude(m, x)
    zeros = magnitude < _EPS
    inverse = m.div(_F32(-top), value)
    codes = [_code(m, m.mul(inverse, xi), -top, top - 1) for xi in x]
    w = [m.mul(xi, xi) for xi in x]
    scale, codes = _descend(m, x, w, codes, lambda v: _code(m, v, -top, top - 1), lambda code: code, False)
    return where(zeros, _F32(0), scale), lambda: [where(zeros, _F32(0), code + top) for code in codes]


def _descend(
    m: Arrays,
    x: _Columns,
    w: _Columns,
    start: _Columns,
    rounded: Callable[[Array], Array],
    stored: Callable[[Array], Array],
    positive: bool,
) -> tuple[Array, _Columns]:
    """The scale and codes that fit x best by weights w, changing one code at a time, five times over.

    start: float32; rounded: the code of a value; stored: what is kept of a code; positive: whether the sum of squares
    of the other codes must be positive too.
    """
    where, count = m.xp.where, len(x)
    wx = [m.mul(wi, xi) for wi, xi in zip(w, x, strict=True)]
    sum_xl = _sum([m.mul(a, code) for a, code in zip(wx, start, strict=True)])
    sum_l2 = _sum([m.mul(m.mul(wi, code), code) for wi, code in zip(w, start, strict=True)])
    tx, tw, twx = m.xp.stack(x), m.xp.stack(w), m.xp.stack(wx)

    def change(step: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        sum_xl, sum_l2, codes = state
        i = step % count
        xi, wi, wxi, code = tx[i], tw[i], twx[i], codes[i]
        rest_xl = sum_xl - m.mul(wxi, code)
        rest_l2 = sum_l2 - m.mul(m.mul(wi, code), code)
        new = rounded(m.div(m.mul(xi, rest_l2), rest_xl))
        new_xl, new_l2 = rest_xl + m.mul(wxi, new), rest_l2 + m.mul(m.mul(wi, new), new)
        gain = m.mul(m.mul(new_xl, new_xl), sum_l2) > m.mul(m.mul(sum_xl, sum_xl), new_l2)
        better = (rest_xl > 0) & ((rest_l2 if positive else new_l2) > 0) & (new != code) & gain
        codes = m.put(codes, i, where(better, stored(new), code))
        return where(better, new_xl, sum_xl), where(better, new_l2, sum_l2), codes

    kept = m.xp.stack([stored(code) for code in start])
    sum_xl, sum_l2, codes = m.loop(5 * count, change, (sum_xl, sum_l2, kept))
    return where(sum_l2 > 0, m.div(sum_xl, sum_l2), _F32(0)), [codes[i] for i in range(count)]


def _search_of_scales(m: Arrays, x: _Columns, top: int, w: _Columns) -> tuple[Array, _Columns]:
    """x ~ scale * code with codes 0 ... top, as llama.cpp codes the scales of a block (make_qp_quants).

    Returns (scale, codes in int32). A negative value leaves a code that is taken as a byte, as llama.cpp does.
    """
    where = m.xp.where

    def rounded(v: Array) -> Array:
        return m.xp.minimum(_nearest(m, v), top).astype(np.float32)

    def as_byte(code: Array) -> Array:
        return (code.astype(np.int32) & 255).astype(np.float32)

    def error(scale: Array, codes: _Columns) -> Array:
        terms = []
        for xi, wi, code in zip(x, w, codes, strict=True):
            difference = xi - m.mul(scale, code)
            terms.append(m.mul(m.mul(wi, difference), difference))
        return _sum(terms)

    largest = _largest(m, x)
    zeros = largest < _EPS
    inverse = m.div(_F32(top), largest)
    best = error(m.div(_F32(1), inverse), [as_byte(_nearest(m, m.mul(inverse, xi))) for xi in x])
    tried = m.xp.asarray(_F32(0.1) * np.array([-4, -3, -2, -1, 1, 2, 3, 4], np.float32) + _F32(top))

    def attempt(step: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        best, inverse = state
        trial_inverse = m.div(tried[step], largest)
        trial = error(m.div(_F32(1), trial_inverse), [rounded(m.mul(trial_inverse, xi)) for xi in x])
        better = trial < best
        return where(better, trial, best), where(better, trial_inverse, inverse)

    _, inverse = m.loop(len(tried), attempt, (best, inverse))
    start = [rounded(m.mul(inverse, xi)) for xi in x]
    scale, codes = _descend(m, x, w, start, rounded, as_byte, True)
    return where(zeros, _F32(0), scale), [where(zeros, 0, code.astype(np.int32)) for code in codes]


def _coded_scales(
    m: Arrays, scale: Array, minimum: Array, weights: Array, count: int, top: int
) -> tuple[list[Array], list[_Columns]]:
    """Scales and minima, [blocks * count], coded alike: ([scale, that of the minima], [codes, those of the minima])."""
    both = _per_block(m.xp.concatenate([scale, minimum]), count)
    half, codes = _search_of_scales(m, both, top, _per_block(m.xp.concatenate([weights, weights]), count))
    blocks = len(half) // 2
    return [half[:blocks], half[blocks:]], [[c[:blocks] for c in codes], [c[blocks:] for c in codes]]


# K-quants.


def _per_block(columns_or_flat: Array, count: int) -> _Columns:
    """[blocks * count] -> `count` arrays [blocks]."""
    table = columns_or_flat.reshape(-1, count)
    return [table[:, j] for j in range(count)]


def _requantized(
    m: Arrays, x: Array, scale: Array, minimum: Array | None, low: int, high: int, searched: Callable[[], _Columns]
) -> Array:
    """Codes, uint8 [blocks, 256], for the scales as stored; where one is zero, llama.cpp leaves those of its search.

    x: [blocks, 256]; scale, minimum: [blocks, sub-blocks]; low, high: range of the codes before `low` is subtracted.
    """
    parts = x.reshape(*scale.shape, -1)
    shifted = parts if minimum is None else parts + minimum[..., None]
    codes = _code(m, m.div(shifted, scale[..., None]), low, high) - low
    lost = (scale == 0)[..., None]
    kept = m.if_any(lost, lambda: m.xp.stack(searched(), axis=-1).reshape(parts.shape))
    return m.xp.where(lost, kept, codes).astype(np.uint8).reshape(x.shape)


def _planes_of_two_bits(m: Arrays, codes: Array) -> Array:
    """[blocks, 256] codes 0 ... 3 -> [blocks, 64]: of each 128, those 32 apart share a byte."""
    parts = codes.reshape(-1, 2, 4, 32)
    return _pack(m, [parts[:, :, k] for k in range(4)], 2).reshape(-1, 64)


def _high_bits(m: Arrays, bits: Array) -> Array:
    """[blocks, 256] bits -> [blocks, 32]: those 32 apart share a byte."""
    parts = bits.reshape(-1, 8, 32)
    return _pack(m, [parts[:, k] for k in range(8)], 1)


def _q2_k(m: Arrays, x: Array, weights: Array, sigma2: Array) -> Array:
    subs = m.columns(x.reshape(-1, 16))
    if weights is None:
        w = [m.xp.abs(v) for v in subs]
        scale, minimum, searched = _search_with_minimum(m, subs, w, 3, _steps(-0.5, 0.1, 15, 3), True, False)
        scales, minima = _per_block(scale, 16), _per_block(minimum, 16)
        coded, halves = [], []
        for values in (scales, minima):
            largest = _largest(m, values)
            inverse = _where_positive(m, largest, m.div(_F32(15), largest))
            coded.append([_nearest(m, m.mul(inverse, v)) & 255 for v in values])
            halves.append(_where_positive(m, largest, m.div(largest, _F32(15))))
    else:
        w = _root_weights(m, subs, weights.reshape(-1, 16), m.xp.repeat(sigma2, 16))
        scale, minimum, searched = _search_with_minimum(m, subs, w, 3, _steps(-0.9, 0.05, 36, 3), False, True)
        halves, coded = _coded_scales(m, scale, minimum, _sum(w), 16, 15)
    (d_bytes, d), (dmin_bytes, dmin) = _half(halves[0]), _half(halves[1])
    packed = m.xp.stack([(s | (low << 4)) & 255 for s, low in zip(*coded, strict=True)], axis=1)
    d_sub = d[:, None] * (packed & 15).astype(np.float32)
    min_sub = m.mul(dmin[:, None], (packed >> 4).astype(np.float32))
    codes = _requantized(m, x, d_sub, min_sub, 0, 3, searched)
    return _joined(m, packed.astype(np.uint8), _planes_of_two_bits(m, codes), d_bytes, dmin_bytes)


def _q3_k(m: Arrays, x: Array, weights: Array, sigma2: Array) -> Array:
    subs = m.columns(x.reshape(-1, 16))
    if weights is None:
        scale, searched = _search_by_descent(m, subs, 4)
        scales = _per_block(scale, 16)
        largest, _ = _largest_by_magnitude(m, scales)
        inverse = m.div(_F32(-32), largest)
        coded = [m.xp.clip(_nearest(m, m.mul(inverse, s)), -32, 31) + 32 for s in scales]
        coded = [m.xp.where(largest != 0, code, 0) for code in coded]
        half = m.xp.where(largest != 0, m.div(_F32(1), inverse), _F32(0))
    else:
        w = _root_weights(m, subs, weights.reshape(-1, 16), m.xp.repeat(_F32(2) * sigma2, 16))
        scale, searched = _search_symmetric(m, subs, 4, w)
        half, found = _search_symmetric(m, _per_block(scale, 16), 32, _per_block(_sum(w), 16))
        coded = [code.astype(np.int32) for code in found()]
    d_bytes, d = _half(half)
    table = m.xp.stack(coded, axis=1)
    d_sub = d[:, None] * (table - 32).astype(np.float32)
    codes = _requantized(m, x, d_sub, None, -4, 3, searched)
    table = table.astype(np.uint8)
    low, high = table & 15, table >> 4
    packed = _joined(m, low[:, :8] | (low[:, 8:] << 4), _pack(m, [high[:, 4 * k : 4 * k + 4] for k in range(4)], 2))
    return _joined(m, _high_bits(m, codes >> 2), _planes_of_two_bits(m, codes & 3), packed, d_bytes)


def _q45_k(m: Arrays, x: Array, weights: Array, sigma2: Array, bits: int) -> Array:
    top = (1 << bits) - 1
    subs = m.columns(x.reshape(-1, 32))
    if weights is None:
        average = m.sqrt(m.div(_sum([m.mul(v, v) for v in subs]), _F32(32)))
        w = [average + m.xp.abs(v) for v in subs]
        steps = _steps(-1, 0.1, 20, top) if bits == 4 else _steps(-0.5, 0.1, 15, top)
        scale, minimum, searched = _search_with_minimum(m, subs, w, top, steps, False, False)
        coded, halves = [], []
        for values in (_per_block(scale, 8), _per_block(minimum, 8)):
            largest = _largest(m, values)
            inverse = _where_positive(m, largest, m.div(_F32(63), largest))
            coded.append([m.xp.minimum(_nearest(m, m.mul(inverse, v)) & 255, 63) for v in values])
            halves.append(m.div(largest, _F32(63)))
    else:
        w = _root_weights(m, subs, weights.reshape(-1, 32), m.xp.repeat(_F32(2) * sigma2, 8))
        scale, minimum, searched = _search_with_minimum(m, subs, w, top, _steps(-0.9, 0.05, 36, top), False, True)
        halves, coded = _coded_scales(m, scale, minimum, _sum(w), 8, 63)
        if bits == 5:
            coded = [[m.xp.minimum(code, 63) for code in codes] for codes in coded]
    (d_bytes, d), (dmin_bytes, dmin) = _half(halves[0]), _half(halves[1])
    packed, d_code, min_code = _packed_scales(m, *coded)
    min_sub = m.mul(dmin[:, None], min_code)
    codes = _requantized(m, x, d[:, None] * d_code, min_sub, 0, top, searched)
    parts = (codes & 15).reshape(-1, 4, 2, 32)
    low = (parts[:, :, 0] | (parts[:, :, 1] << 4)).reshape(-1, 128)
    if bits == 4:
        return _joined(m, d_bytes, dmin_bytes, packed, low)
    return _joined(m, d_bytes, dmin_bytes, packed, _high_bits(m, codes >> 4), low)


def _packed_scales(m: Arrays, scales: _Columns, minima: _Columns) -> tuple[Array, Array, Array]:
    """Eight codes of 6 bits of each kind -> (uint8 [blocks, 12], the codes of either in float32 [blocks, 8])."""
    s, low = scales, minima
    head = [s[j] | ((s[j + 4] >> 4) << 6) for j in range(4)] + [low[j] | ((low[j + 4] >> 4) << 6) for j in range(4)]
    packed = [v & 255 for v in head + [(s[j] & 15) | ((low[j] & 15) << 4) for j in range(4, 8)]]
    # as llama.cpp reads them, since a code above 63 (from a negative value) spills into its neighbour
    s = [v & 63 for v in packed[:4]] + [(packed[j + 8] & 15) | ((packed[j] >> 6) << 4) for j in range(4)]
    low = [v & 63 for v in packed[4:8]] + [(packed[j + 8] >> 4) | ((packed[j + 4] >> 6) << 4) for j in range(4)]
    stack = m.xp.stack
    return stack(packed, 1).astype(np.uint8), stack(s, 1).astype(np.float32), stack(low, 1).astype(np.float32)


def _q6_k(m: Arrays, x: Array, weights: Array) -> Array:
    subs = m.columns(x.reshape(-1, 16))
    w = [m.mul(v, v) for v in subs] if weights is None else m.columns(weights.reshape(-1, 16))
    scale, searched = _search_symmetric(m, subs, 32, w)
    scales = _per_block(scale, 16)
    largest, magnitude = _largest_by_magnitude(m, scales)
    inverse = m.div(_F32(-128), largest)
    d_bytes, d = _half(m.div(_F32(1), inverse))
    table = m.xp.minimum(m.xp.stack([_nearest(m, m.mul(inverse, s)) for s in scales], axis=1), 127)
    codes = _requantized(m, x, d[:, None] * table.astype(np.float32), None, -32, 31, searched)
    parts = codes.reshape(-1, 2, 4, 32)
    low = parts & 15
    low = m.xp.stack([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], axis=2).reshape(-1, 128)
    high = _pack(m, [parts[:, :, k] >> 4 for k in range(4)], 2).reshape(-1, 64)
    block = _joined(m, low, high, table.astype(np.int8).view(np.uint8), d_bytes)
    return m.xp.where((magnitude < _EPS)[:, None], np.uint8(0), block)


# Legacy types.


def _q8_0(m: Arrays, x: Array) -> Array:
    _, magnitude = _largest_by_magnitude(m, m.columns(x))
    scale = m.div(magnitude, _F32(127))
    inverse = m.xp.where(scale != 0, m.div(_F32(1), scale), _F32(0))
    scaled = x * inverse[:, None]
    # halves away from zero
    whole = m.xp.trunc(scaled)
    codes = whole + m.xp.trunc(_F32(2) * (scaled - whole))
    return _joined(m, _half(scale)[0], codes.astype(np.int8).view(np.uint8))


def _nibbles(m: Arrays, codes: Array, bits: int, *head: Array) -> Array:
    """uint8 codes [blocks, 32] after the head; the fifth bits, if there are, before the others."""
    low = codes & 15
    nibbles = low[:, :16] | (low[:, 16:] << 4)
    if bits == 4:
        return _joined(m, *head, nibbles)
    high = (codes >> 4).reshape(-1, 4, 8)
    return _joined(m, *head, _pack(m, [high[:, :, k] for k in range(8)], 1), nibbles)


def _without_minimum(m: Arrays, x: Array, weights: Array, sigma2: Array, bits: int) -> Array:
    columns, top = m.columns(x), 1 << (bits - 1)
    if weights is None:
        scale = m.div(_largest_by_magnitude(m, columns)[0], _F32(-top))
        inverse = m.xp.where(scale != 0, m.div(_F32(1), scale), _F32(0))
        codes = (m.mul(x, inverse[:, None]) + _F32(top + 0.5)).astype(np.int32)
        codes = m.xp.minimum(codes.astype(np.int8), 2 * top - 1)
    else:
        scale, found = _search_symmetric(m, columns, top, _root_weights(m, columns, weights, sigma2))
        codes = m.xp.stack(found(), axis=1)
    return _nibbles(m, codes.astype(np.uint8), bits, _half(scale)[0])


def _with_minimum(m: Arrays, x: Array, weights: Array, sigma2: Array, bits: int) -> Array:
    columns, top = m.columns(x), (1 << bits) - 1
    if weights is None:
        minimum, high = _range(m, columns)
        scale = m.div(high - minimum, _F32(top))
        inverse = m.xp.where(scale != 0, m.div(_F32(1), scale), _F32(0))
        codes = (m.mul(x - minimum[:, None], inverse[:, None]) + _F32(0.5)).astype(np.int32)
        codes = m.xp.minimum(codes.astype(np.int8), top)
    else:
        w = _root_weights(m, columns, weights, sigma2)
        scale, negative, found = _search_with_minimum(m, columns, w, top, _steps(-0.9, 0.05, 36, top), False, True)
        minimum, codes = -negative, m.xp.stack(found(), axis=1)
    return _nibbles(m, codes.astype(np.uint8), bits, _half(scale)[0], _half(minimum)[0])
