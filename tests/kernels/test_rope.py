"""Rotary embedding: lengths of documents, the kinds that depend on them, rotation of a part of each head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels.rope import RopeConfig, apply_rope, document_lengths, inverse_frequencies, rope_tables

RNG = np.random.default_rng(0)
LONGROPE = RopeConfig(
    kind="longrope",
    factor=8.0,
    original_max_position=10,
    max_position=80,
    short_factor=tuple(1 + RNG.random(6)),
    long_factor=tuple(2 + RNG.random(6)),
)
DYNAMIC = RopeConfig(kind="dynamic", factor=2.0, original_max_position=10, max_position=10)


def test_document_lengths():
    # Three documents in a row; one of one token at its end; padding on the left, whose positions are 0; a row alone.
    positions = [
        [0, 1, 2, 0, 1, 0, 1, 2],
        [0, 1, 2, 3, 4, 5, 6, 0],
        [0, 0, 0, 0, 1, 2, 3, 4],
        [7, 8, 9, 10, 11, 12, 13, 14],
    ]
    want = [[3, 3, 3, 2, 2, 3, 3, 3], [7, 7, 7, 7, 7, 7, 7, 1], [1, 1, 1, 5, 5, 5, 5, 5], [15] * 8]
    np.testing.assert_array_equal(document_lengths(jnp.array(positions)), want)


@pytest.mark.parametrize("config", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_tables_of_packed_documents_are_their_own(config):
    lengths = (9, 17, 10, 11)
    packed = rope_tables(config, 12, jnp.concatenate([jnp.arange(n) for n in lengths])[None])
    alone = [rope_tables(config, 12, jnp.arange(n)[None]) for n in lengths]
    for i in range(2):
        # The same float32 arithmetic, perhaps with another order of compilation; angles reach 17.
        np.testing.assert_allclose(packed[i][0], np.concatenate([a[i][0] for a in alone]), atol=2e-6)


def test_longrope_is_its_formula():
    """Angles t / (factor_i base^(2i/d)), scaled by sqrt(1 + ln(s) / ln(L)), in float64."""
    for length, factors in ((10, LONGROPE.short_factor), (11, LONGROPE.long_factor)):
        cos, sin = rope_tables(LONGROPE, 12, jnp.arange(length)[None])
        frequencies = 1 / (np.array(factors) * 10000.0 ** (np.arange(6) / 6))
        angles = np.arange(length)[:, None] * frequencies
        scale = np.sqrt(1 + np.log(8) / np.log(10))
        np.testing.assert_allclose(cos[0], scale * np.cos(angles), atol=2e-6)  # float32 angles up to 10
        np.testing.assert_allclose(sin[0], scale * np.sin(angles), atol=2e-6)
    assert inverse_frequencies(LONGROPE, 12)[1] == pytest.approx(scale)
    assert (LONGROPE.switches_at, DYNAMIC.switches_at) == (10, None)


def test_a_part_of_each_head_is_rotated():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 20))
    cos, sin = rope_tables(RopeConfig(), 12, jnp.broadcast_to(jnp.arange(5), (2, 5)))
    got = apply_rope(x, cos, sin)
    np.testing.assert_array_equal(got[..., 12:], x[..., 12:])
    np.testing.assert_allclose(got[..., :12], apply_rope(x[..., :12], cos, sin), atol=1e-6)  # float32, values of 3
    assert np.abs(got - x)[:, 1:, :, :12].max() > 0.5
