"""Multi-head latent attention: keys and values of all heads are made from one short vector of a token.

DeepSeek-V2 (arXiv 2405.04434, section 2.1). A head's queries and keys have two parts: one without position, made from
that vector, and one that is rotated, whose key all heads share. Here keys and values are expanded before attention.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lora_jax.kernels.attention import flash_attention
from lora_jax.kernels.kept import named
from lora_jax.kernels.rope import apply_rope
from lora_jax.models.linear import Linear, RMSNorm

if TYPE_CHECKING:
    from lora_jax.models.decoder import Context, DecoderConfig

__all__ = ["LatentAttention", "LatentConfig"]

_EPS = 1e-6  # of the norms of the short vectors, whatever that of the others is


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Sizes of multi-head latent attention, in features."""

    query_rank: int | None  # of the short vector of queries; None if there is none
    key_value_rank: int  # of that of keys and values
    plain_dim: int  # of a head's query and key without position
    rotated_dim: int  # and with it
    value_dim: int  # of a head's value


class LatentAttention(nnx.Module):
    """Attention of a layer, with Hugging Face's names."""

    def __init__(self, config: "DecoderConfig", *, lead: tuple[int, ...], dtype: DTypeLike):
        latent = config.mla
        assert latent is not None
        self.latent, self.heads, self.scale = latent, config.num_heads, config.attention_scale
        self.interleaved = config.interleaved
        d, heads, bias = config.hidden_size, config.num_heads, config.qkv_bias
        queries = heads * (latent.plain_dim + latent.rotated_dim)
        if (rank := latent.query_rank) is None:
            self.q_proj = Linear(d, queries, lead=lead, dtype=dtype)
        else:
            self.q_a_proj = Linear(d, rank, lead=lead, dtype=dtype, bias=bias)
            self.q_a_layernorm = RMSNorm(rank, _EPS, lead=lead, dtype=dtype)
            self.q_b_proj = Linear(rank, queries, lead=lead, dtype=dtype)
        rank = latent.key_value_rank
        self.kv_a_proj_with_mqa = Linear(d, rank + latent.rotated_dim, lead=lead, dtype=dtype, bias=bias)
        self.kv_a_layernorm = RMSNorm(rank, _EPS, lead=lead, dtype=dtype)
        self.kv_b_proj = Linear(rank, heads * (latent.plain_dim + latent.value_dim), lead=lead, dtype=dtype)
        self.o_proj = Linear(heads * latent.value_dim, d, lead=lead, dtype=dtype, bias=config.out_bias)

    def __call__(self, x, context: "Context", layer, update_cache: Callable):
        """x [B, T, D] -> (output [B, T, D], whatever `update_cache` returns beside keys and values)."""
        b, t, _ = x.shape
        if self.latent.query_rank is None:
            q = self.q_proj(x, context.key(layer, 0))
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x, context.key(layer, 0))), context.key(layer, 1))
        plain_q, rotated_q = jnp.split(q.reshape(b, t, self.heads, -1), [self.latent.plain_dim], axis=-1)
        short = self.kv_a_proj_with_mqa(x, context.key(layer, 2))
        short, rotated_k = jnp.split(short, [self.latent.key_value_rank], axis=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(short), context.key(layer, 7)).reshape(b, t, self.heads, -1)
        plain_k, v = jnp.split(kv, [self.latent.plain_dim], axis=-1)
        rotate = functools.partial(apply_rope, cos=context.cos, sin=context.sin, interleaved=self.interleaved)
        rotated_q = rotate(rotated_q)
        rotated_k = jnp.broadcast_to(rotate(rotated_k[:, :, None]), rotated_q.shape)
        q = named(jnp.concatenate([plain_q, rotated_q], axis=-1), "q")
        k = named(jnp.concatenate([plain_k, rotated_k], axis=-1), "k")
        k, v, cache = update_cache(k, named(v, "v"))
        start, offset = context.segment_start, context.query_offset
        out = flash_attention(q, k, v, segment_start=start, query_offset=offset, scale=self.scale)
        return self.o_proj(out.reshape(b, t, -1), context.key(layer, 3)), cache
