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
    kind: str = "default"  # default | linear | dynamic | yarn | llama3 | longrope
    factor: float = 1.0  # by how much the context is stretched
    original_max_position: int = 0  # context length before stretching
    max_position: int = 0  # the config's max_position_embeddings
    low_freq_factor: float = 1.0  # llama3: wavelengths above original / low are stretched in full
    high_freq_factor: float = 4.0  # llama3: wavelengths below original / high are kept
    beta_fast: float = 32.0  # yarn: dimensions with more rotations than this are kept
    beta_slow: float = 1.0  # yarn: dimensions with fewer rotations than this are stretched in full
    attention_factor: float | None = None  # yarn, longrope: factor of cos and sin; None for their formulas
    mscale: float | None = None  # yarn, DeepSeek's form
    mscale_all_dim: float | None = None  # yarn, DeepSeek's form
    truncate: bool = True  # yarn: round the bounds of the ramp to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: of each wavelength, in documents within the original context
    long_factor: tuple[float, ...] = ()  # longrope: of each wavelength, in longer documents

    @property
    def depends_on_length(self) -> bool:
        """Whether the angles of a document change with its length."""
        return self.kind in ("dynamic", "longrope")

    @property
    def switches_at(self) -> int | None:
        """Length beyond which all keys of a document are rotated otherwise than before; None if there is none."""
        return self.original_max_position if self.kind == "longrope" else None


def inverse_frequencies(
    config: RopeConfig, dim: int, length: jax.Array | int = 0
) -> tuple[np.ndarray | jax.Array, float]:
    """Angular frequencies [dim / 2], radians a position, and the factor for cos and sin.

    Args:
      config: the scaling.
      dim: number of rotated features of a head.
      length: tokens of the document, which only the kinds "dynamic" and "longrope" depend on; an array [..., 1] gives
        frequencies [..., dim / 2].

    Sources: linear, Chen et al. (arXiv 2306.15595); dynamic, NTK-aware interpolation; yarn, Peng et al.
    (arXiv 2309.00071), equations 17 to 23; llama3, the Llama 3.1 release; longrope, Ding et al. (arXiv 2402.13753).

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
    if config.kind == "longrope":
        short, long = (
            (1 / (np.asarray(f, np.float32) * (config.theta**exponents).astype(np.float32))).astype(np.float32)
            for f in (config.short_factor, config.long_factor)
        )
        is_long = jnp.asarray(length) > config.original_max_position
        return jnp.where(is_long, long, short), _longrope_attention_factor(config)
    raise ValueError(
        f"rope type {config.kind!r} is unknown; known are default, linear, dynamic, yarn, llama3, longrope"
    )


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


def _longrope_attention_factor(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor
    return math.sqrt(1 + math.log(config.factor) / math.log(config.original_max_position)) if config.factor > 1 else 1.0


def rope_tables(config: RopeConfig, dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, dim / 2] in float32 for positions [B, T], which count up by one within each document."""
    lengths = document_lengths(positions)[..., None] if config.depends_on_length else 0
    frequencies, factor = inverse_frequencies(config, dim, lengths)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * np.float32(factor), jnp.sin(angles) * np.float32(factor)


def document_lengths(positions: jax.Array) -> jax.Array:
    """For each token the length of its document up to the end of the row, int32 [B, T], from positions [B, T]."""
    goes_on = positions[:, 1:] == positions[:, :-1] + 1
    ends = jnp.pad(~goes_on, ((0, 0), (0, 1)), constant_values=True)
    index = jnp.arange(positions.shape[1])
    end = jax.lax.cummin(jnp.where(ends, index, positions.shape[1]), axis=1, reverse=True)
    return jnp.take_along_axis(positions, end, axis=1) + 1


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Rotates the first 2 R features of x [B, T, heads, H]; feature i pairs with i + R. cos, sin: [B, T, R].

    Interleaved, feature 2 i pairs with 2 i + 1, and they come out at i and i + R: no score can tell in what order the
    features of queries and keys are.
    """
    # No kernel: on an H100 XLA takes 67 us for q and k, 4096 x (32 + 8) x 128, both ways; copying as much takes 57.
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    half = cos.shape[-1]
    if interleaved:
        first, second, rest = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2], x[..., 2 * half :]
    else:
        first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
