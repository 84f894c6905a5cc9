"""Weights that checkpoints hold in FP8 with scales (DeepSeek-V3 and R1, Qwen3-*-FP8), decoded.

A weight [N, K] is stored in float8_e4m3fn (Micikevicius et al., arXiv 2209.05433); beside it stands `weight_scale_inv`,
one factor for each block of `weight_block_size` (128 x 128) weights, the last blocks of rows and columns cut off
(DeepSeek-V3, arXiv 2412.19437, section 3.3.2). Without a block size there is one factor for the whole weight.
`activation_scale`, which some files hold too, is of kernels that multiply in FP8 and is not needed.
"""

import math
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["ACTIVATION_SCALE", "SCALE", "block_size", "decode_fp8"]

SCALE, ACTIVATION_SCALE = "_scale_inv", "activation_scale"  # endings of names
# The float32 of every byte: several times as fast as numpy's cast of the dtype.
_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def block_size(quantization: dict[str, Any]) -> tuple[int, int] | None:
    """(rows, columns) that share a scale, or None if a whole weight does.

    Args:
      quantization: `quantization_config` of config.json, whose quant_method is "fp8".

    Raises:
      ValueError: it is not a format that is described above.
    """
    for field, only in (("fmt", "e4m3"), ("expert_dtype", "fp8")):
        if quantization.get(field, only) != only:
            raise ValueError(
                f"config.json: {field}={quantization[field]!r} of quantization_config is not implemented, only {only!r}"
            )
    block = quantization.get("weight_block_size")
    if block is None:
        return None
    if len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise ValueError(f"config.json: weight_block_size must be two whole numbers above 0 or null, got {block!r}")
    return block[0], block[1]


def decode_fp8(
    codes: np.ndarray,
    scales: np.ndarray,
    block: tuple[int, int] | None,
    rows: range | None = None,
    of: int | None = None,
) -> np.ndarray:
    """codes uint8 [N, K], the bytes of float8_e4m3fn -> float32 [N, K]; every product is rounded once.

    Args:
      codes: the weight, or some rows of it.
      scales: of the whole weight, float [ceil(rows / rows of a block), ceil(K / columns of a block)], or one number
        without blocks.
      block: (rows, columns) that share a scale.
      rows: numbers of the rows; None if these are all.
      of: rows of the whole weight; None if these are all.

    Raises:
      ValueError: there are too few or too many scales.
    """
    n, k = codes.shape
    rows, whole = range(n) if rows is None else rows, n if of is None else of
    high, wide = block or (whole, k)
    want = (math.ceil(whole / high), math.ceil(k / wide))
    if scales.size != math.prod(want) or (block and scales.shape != want):
        raise ValueError(f"scales are {list(scales.shape)}, blocks of {high} x {wide} want {list(want)}")
    scales, of_rows = scales.astype(np.float32).reshape(want), np.asarray(rows) // high
    weight = np.empty((n, k), np.float32)
    for i in range(of_rows[0], of_rows[-1] + 1):
        part = slice(*np.searchsorted(of_rows, (i, i + 1)))
        np.multiply(_VALUES[codes[part]], np.repeat(scales[i], wide)[:k], out=weight[part])
    return weight
