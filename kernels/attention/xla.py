"""The specification of `flash_attention`: scores, mask and softmax written out, one block of queries at a time."""

import functools

import jax
import jax.numpy as jnp

__all__ = ["attention"]

# Queries whose scores exist at once. Longer rows are cut into blocks that are recomputed in backward, so that memory
# grows with T rather than with its square.
BLOCK_QUERIES = 512


def attention(q, k, v, segment_start, query_offset, *, window, softcap, scale, sinks=None):
    """See `flash_attention`; every argument is given."""
    batch, length, heads, _ = q.shape
    block = functools.partial(_block, k=k, v=v, sinks=sinks, window=window, softcap=softcap, scale=scale)
    positions = jnp.broadcast_to(jnp.arange(length) + query_offset, (batch, length))
    if length <= BLOCK_QUERIES:
        return block(q, positions, segment_start)
    n_blocks = -(-length // BLOCK_QUERIES)
    padding = n_blocks * BLOCK_QUERIES - length

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, n_blocks, BLOCK_QUERIES, *x.shape[2:]), 1, 0)

    step = jax.checkpoint(lambda args: block(*args), prevent_cse=False)
    out = jax.lax.map(step, (cut(q), cut(positions), cut(segment_start)))
    return jnp.moveaxis(out, 0, 1).reshape(batch, n_blocks * BLOCK_QUERIES, heads, v.shape[3])[:, :length]


def _block(q, positions, segment_start, *, k, v, sinks, window, softcap, scale):
    """Attention of some queries [B, T, N, H] at `positions` [B, T] over all keys."""
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    scores = scale * jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    key = jnp.arange(k.shape[1])
    first = segment_start if window is None else jnp.maximum(segment_start, positions - window + 1)
    seen = (first[..., None] <= key) & (key <= positions[..., None])  # [B, T, S]
    # A finite floor: a row that sees nothing (padding) gets a uniform mean rather than NaN.
    scores = jnp.where(seen[:, None, None], scores, jnp.float32(-1e30))
    if sinks is not None:  # one more key for each head, whose value is zero
        sink = sinks.astype(jnp.float32).reshape(1, kv_heads, heads // kv_heads, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]].astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(batch, length, heads, v.shape[3]).astype(q.dtype)
