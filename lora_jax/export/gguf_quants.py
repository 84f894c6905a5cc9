"""Quantisation to llama.cpp's block types: its own bytes on the CPU, nearly all of them on a GPU.

The arithmetic is in `gguf_blocks`. Large arrays run compiled by XLA, on all cores; small ones, for which compiling
would take longer, in NumPy. XLA flushes subnormal numbers on the CPU and llama.cpp does not: blocks of values so small
that a product may become one are done in NumPy as well.
"""

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from jax import lax

from lora_jax.export.gguf_blocks import NUMPY, Arrays, encode, sum_of_squares_over

__all__ = ["BLOCK_TYPES", "quantize"]

BLOCK_TYPES = (
    GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1,
    GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K,
)  # fmt: skip
_CPU_CHUNK, _GPU_CHUNK, _NUMPY_CHUNK = 1 << 17, 1 << 22, 1 << 16  # elements at a time; compiled ones are padded to it
_NUMPY_UP_TO = 1 << 15  # elements that are not worth a padded chunk
# The searches compare products of up to eight values, which for Q3_K reach 256 x^8: not subnormal from 9e-6 on. With
# weights w they reach w^3 scale^2, with a scale of at least 1/63 of the largest value.
_SMALL, _SMALL_WEIGHTED = np.float32(2e-5), np.float32(3e-32)


def quantize(
    values: np.ndarray, type: GgmlType, importance: np.ndarray | None = None, *, device: Any = None
) -> np.ndarray:
    """Rows as they stand in a GGUF file.

    Args:
      values: float32 [..., K], finite.
      type: F32, F16, BF16 or one of `BLOCK_TYPES`; K must divide by its block (256 for K-quants, else 32).
      importance: float32 [K], how much an error in each column matters (mean square of the activations it meets);
        used as llama.cpp uses an importance matrix, not at all for Q8_0.
      device: a jax.Device to compute on. None: on the CPU, with llama.cpp's bytes. On a GPU, at most a few blocks in
        10,000 differ from them, because its compiler rounds some operations otherwise.

    Returns uint8 [..., bytes of a row].

    Raises ValueError for another type, and for shapes that do not fit.
    """
    if type in (GgmlType.F32, GgmlType.F16, GgmlType.BF16):
        data = values if type == GgmlType.F32 else gguf.quants.quantize(values, type)
        return np.ascontiguousarray(data).view(np.uint8)
    if type not in BLOCK_TYPES:
        raise ValueError(f"cannot quantise to {type.name}; there are {', '.join(t.name for t in BLOCK_TYPES)}")
    width, (block, block_bytes) = values.shape[-1], gguf.GGML_QUANT_SIZES[type]
    if width % block:
        raise ValueError(f"rows of {width} values do not divide into {type.name}'s blocks of {block}")
    if type == GgmlType.Q8_0:
        importance = None
    if importance is not None and importance.shape != (width,):
        raise ValueError(f"importance has shape {importance.shape}, wanted ({width},)")
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, block)
    out = np.empty((len(blocks), block_bytes), np.uint8)
    inputs = _inputs(blocks, type, width, importance)
    on_gpu = device is not None and device.platform != "cpu"
    if on_gpu or blocks.size > _NUMPY_UP_TO:
        _run_compiled(inputs, type, out, device or jax.devices("cpu")[0])
    else:
        _run_numpy(inputs, type, out)
    return out.reshape(*values.shape[:-1], width // block * block_bytes)


_Inputs = Callable[[int, int], tuple[np.ndarray, ...]]  # blocks start ... stop -> x, or x, weights, sigma2


def _inputs(blocks: np.ndarray, type: GgmlType, width: int, importance: np.ndarray | None) -> _Inputs:
    if importance is None:
        return lambda start, stop: (blocks[start:stop],)
    block = blocks.shape[1]
    table, per_row, over = importance.astype(np.float32).reshape(-1, block), width // block, sum_of_squares_over(type)
    rows = _sums_of_squares(blocks.reshape(-1, width)) / np.float32(width) if over == "row" else None

    def weighted(start: int, stop: int) -> tuple[np.ndarray, ...]:
        index = np.arange(start, stop)
        x = blocks[start:stop]
        if rows is not None:
            sigma2 = rows[index // per_row]
        else:
            sigma2 = _sums_of_squares(x) / np.float32(block)
        return x, table[index % per_row], sigma2

    return weighted


def _sums_of_squares(rows: np.ndarray) -> np.ndarray:
    """Float32 [rows], added from left to right."""
    sums = np.empty(len(rows), np.float32)
    step = max(1, _NUMPY_CHUNK // rows.shape[1])
    with np.errstate(all="ignore"):
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            sums[start : start + step] = np.cumsum(part * part, axis=1)[:, -1]
    return sums


def _spans(count: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _run_numpy(inputs: _Inputs, type: GgmlType, out: np.ndarray) -> None:
    step = _NUMPY_CHUNK // gguf.GGML_QUANT_SIZES[type][0]
    with np.errstate(all="ignore"):  # what a search divides by zero it does not take
        for start, stop in _spans(len(out), step):
            out[start:stop] = encode(NUMPY, type, *inputs(start, stop))


def _run_compiled(inputs: _Inputs, type: GgmlType, out: np.ndarray, device: Any) -> None:
    on_cpu = device.platform == "cpu"
    chunk = (_CPU_CHUNK if on_cpu else _GPU_CHUNK) // gguf.GGML_QUANT_SIZES[type][0]
    run = _compiled(type, on_cpu)
    zero = jax.device_put(np.int32(0), device)

    def one(span: tuple[int, int]) -> None:
        start, stop = span
        given = inputs(start, stop)
        if on_cpu and given[0].size <= _NUMPY_UP_TO:
            _run_numpy(lambda a, b: tuple(v[a:b] for v in given), type, out[start:stop])
            return
        short = chunk - (stop - start)
        padded = given if not short else tuple(np.pad(v, [(0, short)] + [(0, 0)] * (v.ndim - 1)) for v in given)
        encoded, small = run(zero, *jax.device_put(padded, device))
        out[start:stop] = np.asarray(encoded)[: stop - start]
        if on_cpu and (rare := np.flatnonzero(np.asarray(small)[: stop - start])).size:
            redone = np.empty((rare.size, out.shape[1]), np.uint8)
            _run_numpy(lambda a, b: tuple(v[rare[a:b]] for v in given), type, redone)
            out[start + rare] = redone

    # Two for each core: XLA's own threads do not keep a core busy. On a GPU, one copies while another computes.
    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0)) if on_cpu else 3) as pool:
        for _ in pool.map(one, _spans(len(out), chunk)):
            pass


@functools.cache
def _compiled(type: GgmlType, on_cpu: bool) -> Any:
    def run(zero: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The compiler does not know that it is zero.
        def fenced(x: jax.Array) -> jax.Array:
            return (x.view(np.int32) ^ zero).view(np.float32)

        def spread(value: jax.Array, like: jax.Array) -> jax.Array:
            return (jnp.asarray(value).view(np.int32) ^ (like.view(np.int32) & zero)).view(np.float32)

        def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
            return _rounded(jnp.divide, zero, a, b)

        def sqrt(x: jax.Array) -> jax.Array:
            return _rounded(jnp.sqrt, zero, x)

        exact = (jnp.divide, jnp.sqrt) if on_cpu else (quotient, sqrt)
        arrays = Arrays(jnp, _loop, _columns, _put, _if_any, fenced, spread, *exact)
        return encode(arrays, type, *inputs), _is_small(type, *inputs)

    # A scale in float16 is used as it is stored: without this XLA for GPUs takes it from before it was rounded.
    options: dict[str, Any] = {"xla_allow_excess_precision": False}
    if on_cpu:  # the searches are long chains of arithmetic, which the widest vectors suit
        options["xla_cpu_prefer_vector_width"] = 512
    return jax.jit(run, compiler_options=options)


def _rounded(operation: Callable[..., jax.Array], zero: jax.Array, *inputs: jax.Array) -> jax.Array:
    """A quotient or square root, rounded correctly.

    In float32 XLA for GPUs takes div.full and the like, which are off by up to 2 units in the last place, and then a
    trial scale that puts the largest value exactly between two codes falls to the other one: a tenth of the blocks
    differ. Rounded from float64 they are exact, since its 53 bits are more than twice 24, and 2. The fence keeps LLVM
    from knowing that as well, and going back to float32.
    """
    with jax.enable_x64(True):
        result = operation(*(jnp.asarray(x, np.float64) for x in inputs))
        return (result.view(np.int64) ^ zero.astype(np.int64)).view(np.float64).astype(np.float32)


def _loop(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    return lax.fori_loop(0, count, body, carry)


def _columns(x: jax.Array) -> list[jax.Array]:
    # The barrier makes them arrays of their own; gathered within the loops, they would be read with a stride.
    return list(lax.optimization_barrier(tuple(x[:, i] for i in range(x.shape[1]))))


def _put(array: jax.Array, i: Any, value: jax.Array) -> jax.Array:
    return array.at[i].set(value)


def _if_any(condition: jax.Array, make: Callable[[], jax.Array]) -> jax.Array:
    like = jax.eval_shape(make)
    return lax.cond(condition.any(), make, lambda: jnp.zeros(like.shape, like.dtype))


def _is_small(type: GgmlType, x: jax.Array, weights: jax.Array | None = None, sigma2: jax.Array | None = None) -> Any:
    """Bool [blocks]: subnormal numbers may arise, in a sub-block that is not all zero."""
    width = 16 if type in (GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q6_K) else 32
    # compared as integers, since a comparison would flush as well
    bits = (x.view(np.int32) & 0x7FFFFFFF).reshape(len(x), -1, width)
    largest = bits.max(axis=2)
    small = (largest > 0) & (largest < _SMALL.view(np.int32))
    if weights is not None:
        w = weights if sigma2 is None else weights * jnp.sqrt(sigma2[:, None] + x * x)
        total = w.reshape(bits.shape).sum(axis=2)
        some = (weights.view(np.int32) & 0x7FFFFFFF).reshape(bits.shape).max(axis=2) > 0
        product = total * total * total * jnp.square(largest.view(np.float32))
        small |= (largest > 0) & some & (product < _SMALL_WEIGHTED)
    return small.any(axis=1)
