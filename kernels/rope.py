"""Rotary position embedding (Su et al., arXiv 2104.09864) in Hugging Face's half-split layout, and its scaled forms."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["RopeConfig", "apply_rope", "inverse_frequencies", "rope_tables"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions become angles; the fields have the names of Hugging Face's `rope_scaling`."""

    theta: float = 10000.0  # base of the geometric series of wavelengths
    kind: str = "default"  # default | linear | dynamic | yarn | llama3
    factor: float = 1.0  # by how much the context is stretched
    original_max_position: int = 0  # context length before stretching
    max_position: int = 0  # the config's max_position_embeddings
    low_freq_factor: float = 1.0  # llama3: wavelengths above original / low are stretched in full
    high_freq_factor: float = 4.0  # llama3: wavelengths below original / high are kept
    beta_fast: float = 32.0  # yarn: dimensions with more rotations than this are kept
    beta_slow: float = 1.0  # yarn: dimensions with fewer rotations than this are stretched in full
    attention_factor: float | None = None  # yarn: factor of cos and sin; None for its formula
    mscale: float | None = None  # yarn, DeepSeek's form
    mscale_all_dim: float | None = None  # yarn, DeepSeek's form
    truncate: bool = True  # yarn: round the bounds of the ramp to whole dimensions


def inverse_frequencies(
    config: RopeConfig, dim: int, length: jax.Array | int = 0
) -> tuple[np.ndarray | jax.Array, float]:
    """Angular frequencies [dim / 2], radians a position, and the factor for cos and sin.

    Args:
      config: the scaling.
      dim: number of rotated features of a head.
      length: longest row of the batch, which only the kind "dynamic" depends on.

    Sources: linear, Chen et al. (arXiv 2306.15595); dynamic, NTK-aware interpolation; yarn, Peng et al.
    (arXiv 2309.00071), equations 17 to 23; llama3, the Llama 3.1 release.

    Raises:
      ValueError: unknown kind.
    """
    exponents = np.arange(0, dim, 2) / dim
    # Rounded to float32 twice, as PyTorch does it: at position 2000 the last bit of a frequency is 1e-4 of an angle.
    base = 1 / (config.theta**exponents).astype(np.float32)
    if config.kind == "default":
        return base, 1.0
    if config.kind == "linear":
        return base / config.factor, 1.0
    if config.kind == "dynamic":
        original = config.max_position
        stretch = config.factor * jnp.maximum(length, original) / original - (config.factor - 1)
        return (config.theta * stretch ** (dim / (dim - 2))) ** -exponents.astype(np.float32), 1.0
    if config.kind == "llama3":
        return _llama3(config, base), 1.0
    if config.kind == "yarn":
        return _yarn(config, base, dim), _yarn_attention_factor(config)
    raise ValueError(f"rope type {config.kind!r} is unknown; known are default, linear, dynamic, yarn, llama3")


def _llama3(config: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Keeps short wavelengths, stretches long ones, and blends between."""
    rotations = config.original_max_position * base / (2 * math.pi)  # turns within the original context
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = np.clip((rotations - low) / (high - low), 0, 1)
    return (keep * base + (1 - keep) * base / config.factor).astype(np.float32)


def _yarn(config: RopeConfig, base: np.ndarray, dim: int) -> np.ndarray:
    def dimension_of(rotations: float) -> float:
        turns = config.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp may not be a division by zero
    stretch = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return ((1 - stretch) * base + stretch * base / config.factor).astype(np.float32)


def _yarn_attention_factor(config: RopeConfig) -> float:
    def mscale(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return mscale(config.mscale) / mscale(config.mscale_all_dim)
    return mscale()


def rope_tables(config: RopeConfig, dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, dim / 2] in float32 for positions [B, T]."""
    frequencies, factor = inverse_frequencies(config, dim, jnp.max(positions) + 1)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * np.float32(factor), jnp.sin(angles) * np.float32(factor)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, T, heads, H]; feature i pairs with i + H/2. cos, sin: [B, T, H/2]."""
    # No kernel: on an H100 XLA takes 67 us for q and k, 4096 x (32 + 8) x 128, both ways; copying as much takes 57.
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
