"""The decoder that all families share: embeddings, a loop over stacked transformer blocks, norm and head.

Equal consecutive layers are one `Block` whose arrays have a leading layer axis; `jax.lax.scan` runs over it, so that
compile time does not grow with depth. A family says what differs in its `DecoderConfig`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from lora_jax.kernels.attention import flash_attention
from lora_jax.kernels.loss import Head
from lora_jax.kernels.rope import RopeConfig, apply_rope, rope_tables
from lora_jax.models.linear import Embedding, Linear, RMSNorm, value

__all__ = ["Block", "Cache", "Decoder", "DecoderConfig", "Slot"]

# Where Hugging Face checkpoints keep the parts of a decoder.
HF_NAMES = {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
HF_LAYER = "model.layers.{}"


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What the decoder needs to know of a model; made from config.json by the family's `config_from_hf`."""

    architecture: str  # Hugging Face's class name
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # longest row the model was made for
    rms_norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool  # lm_head is the embedding matrix
    windows: tuple[int | None, ...]  # for each layer, how many keys a query sees; None for all
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far."""

    keys: tuple[jax.Array, ...]  # for each stack of layers [n, B, S, K, H]
    values: tuple[jax.Array, ...]
    length: jax.Array  # int32 []: tokens held


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass needs beside its input."""

    cos: jax.Array
    sin: jax.Array
    segment_start: jax.Array | None
    query_offset: jax.Array | int
    dropout_key: jax.Array | None

    def key(self, layer: jax.Array, site: int) -> jax.Array | None:
        """The dropout key of one linear of one layer."""
        if self.dropout_key is None:
            return None
        return jax.random.fold_in(jax.random.fold_in(self.dropout_key, layer), site)


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one tensor of a Hugging Face checkpoint lives in the model."""

    owner: nnx.Module  # the Linear, Embedding or RMSNorm
    attribute: str  # "weight" or "bias"
    index: int | None  # position in the stack, None for a module that is not stacked

    @property
    def variable(self) -> nnx.Param:
        """The variable that holds the tensor."""
        return getattr(self.owner, self.attribute)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the checkpoint."""
        shape = tuple(value(self.variable).shape)
        return shape if self.index is None else shape[1:]


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, window: int | None, *, lead: tuple[int, ...], dtype: DTypeLike):
        d, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(d, q, lead=lead, dtype=dtype, bias=config.qkv_bias)
        self.k_proj = Linear(d, kv, lead=lead, dtype=dtype, bias=config.qkv_bias)
        self.v_proj = Linear(d, kv, lead=lead, dtype=dtype, bias=config.qkv_bias)
        self.o_proj = Linear(q, d, lead=lead, dtype=dtype, bias=config.out_bias)
        self.head_dim = config.head_dim
        self.window = window

    def __call__(self, x, context: Context, layer, update_cache: Callable):
        """x [B, T, D] -> (output [B, T, D], whatever `update_cache` returns beside keys and values)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x, context.key(layer, 0)).reshape(heads)
        k = self.k_proj(x, context.key(layer, 1)).reshape(heads)
        v = checkpoint_name(self.v_proj(x, context.key(layer, 2)).reshape(heads), "v")
        q = checkpoint_name(apply_rope(q, context.cos, context.sin), "q")
        k = checkpoint_name(apply_rope(k, context.cos, context.sin), "k")
        k, v, cache = update_cache(k, v)
        out = flash_attention(
            q, k, v, segment_start=context.segment_start, query_offset=context.query_offset, window=self.window
        )
        return self.o_proj(out.reshape(*x.shape[:2], -1), context.key(layer, 3)), cache


class MLP(nnx.Module):
    """Gated feed-forward layer, down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, lead: tuple[int, ...], dtype: DTypeLike):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(d, f, lead=lead, dtype=dtype, bias=bias)
        self.up_proj = Linear(d, f, lead=lead, dtype=dtype, bias=bias)
        self.down_proj = Linear(f, d, lead=lead, dtype=dtype, bias=bias)

    def __call__(self, x: jax.Array, context: Context, layer: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        gate = checkpoint_name(self.gate_proj(x, context.key(layer, 4)), "gate")
        up = checkpoint_name(self.up_proj(x, context.key(layer, 5)), "up")
        return self.down_proj(jax.nn.silu(gate) * up, context.key(layer, 6))


class Block(nnx.Module):
    """Layers `first` to `first + count - 1` of the model, all alike, stacked."""

    def __init__(self, config: DecoderConfig, first: int, count: int, dtype: DTypeLike):
        lead, d, eps = (count,), config.hidden_size, config.rms_norm_eps
        self.first, self.count = first, count
        self.input_layernorm = RMSNorm(d, eps, lead=lead, dtype=dtype)
        self.self_attn = Attention(config, config.windows[first], lead=lead, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(d, eps, lead=lead, dtype=dtype)
        self.mlp = MLP(config, lead=lead, dtype=dtype)

    def __call__(self, x, context: Context, layer, update_cache: Callable):
        """One layer: x [B, T, D] -> (x, cache). `layer` is its number in the model."""
        attended, cache = self.self_attn(self.input_layernorm(x), context, layer, update_cache)
        x = checkpoint_name(x + attended, "residual")
        return x + self.mlp(self.post_attention_layernorm(x), context, layer), cache


class Decoder(nnx.Module):
    """A causal language model."""

    def __init__(self, config: DecoderConfig, dtype: DTypeLike, layer_kinds: Sequence[Hashable] | None = None):
        """Makes a model without arrays.

        Args:
          config: the architecture.
          dtype: of weights and activations.
          layer_kinds: one value a layer; neighbours with different values are not stacked together (because their
            weights are not stored alike). None if all are alike.
        """
        self.config = config
        self.dtype = np.dtype(dtype)  # of the activations
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        kinds = [(window, layer_kinds and layer_kinds[i]) for i, window in enumerate(config.windows)]
        layers = []
        for _, run in itertools.groupby(range(config.num_layers), key=kinds.__getitem__):
            run = list(run)
            layers.append(Block(config, run[0], len(run), dtype))
        self.layers = nnx.List(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, lead=(), dtype=dtype)
        tied = config.tie_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, lead=(), dtype=dtype)

    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_start: jax.Array | None = None,
        *,
        cache: Cache | None = None,
        checkpoint: Callable | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states after the final norm; `head()` turns them into logits.

        Args:
          input_ids: int32 [B, T].
          positions: int32 [B, T], position of each token in its document; None for 0, 1, ... T-1.
          segment_start: int32 [B, T], first index (of the row, or of the cache) each token may see; None for 0.
          cache: keys and values of earlier tokens; these tokens are appended.
          checkpoint: wraps the function of one layer, as `jax.checkpoint` does; None keeps everything for backward.
          dropout_key: key for the adapters' dropout; None for no dropout.

        Returns:
          (hidden states [B, T, D], the cache with the new tokens, or None without one).
        """
        offset = 0 if cache is None else cache.length
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]) + offset, input_ids.shape)
        cos, sin = rope_tables(self.config.rope, self.config.head_dim, positions)
        context = Context(cos, sin, segment_start, offset, dropout_key)
        x = self.embed_tokens(input_ids, self.dtype)
        if cache is None:
            for stack in self.layers:
                x = _run_stack(stack, x, context, checkpoint)
            return self.norm(x), None
        keys, values = [], []
        for stack, k, v in zip(self.layers, cache.keys, cache.values, strict=True):
            x, k, v = _run_stack_with_cache(stack, x, context, k, v)
            keys.append(k)
            values.append(v)
        cache = Cache(tuple(keys), tuple(values), cache.length + input_ids.shape[1])
        return self.norm(x), cache

    def head(self) -> Head:
        """The head of the loss."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).head()

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `length` tokens a row."""
        c = self.config
        shapes = [(s.count, batch, length, c.num_kv_heads, c.head_dim) for s in self.layers]
        keys, values = (tuple(jnp.zeros(shape, self.dtype) for shape in shapes) for _ in range(2))
        return Cache(keys, values, jnp.int32(0))

    def named_modules(self) -> Iterator[tuple[str, Block | None, Linear | Embedding | RMSNorm]]:
        """(Hugging Face name, its stack, module) of every leaf module.

        Modules of a stack have `{}` in their name in place of the layer's number; others have None for a stack.
        """
        for attribute, name in HF_NAMES.items():
            if (module := getattr(self, attribute)) is not None:
                yield name, None, module
        for stack in self.layers:
            for name, module in _leaf_modules(stack, HF_LAYER):
                yield name, stack, module

    def slots(self) -> dict[str, Slot]:
        """Every tensor of this model's Hugging Face checkpoint, by name."""
        slots = {}
        for name, stack, module in self.named_modules():
            for attribute in ("weight", "bias"):
                if getattr(module, attribute, None) is None:
                    continue
                if stack is None:
                    slots[f"{name}.{attribute}"] = Slot(module, attribute, None)
                    continue
                for index in range(stack.count):
                    slots[f"{name.format(stack.first + index)}.{attribute}"] = Slot(module, attribute, index)
        return slots


def _leaf_modules(module: nnx.Module, prefix: str) -> Iterator[tuple[str, Linear | Embedding | RMSNorm]]:
    for name, child in vars(module).items():
        if isinstance(child, Linear | Embedding | RMSNorm):
            yield f"{prefix}.{name}", child
        elif isinstance(child, nnx.Module):
            yield from _leaf_modules(child, f"{prefix}.{name}")


def _run_stack(stack: Block, x: jax.Array, context: Context, checkpoint: Callable | None) -> jax.Array:
    """Runs all layers of a stack. The body closes over nothing that is differentiated, which scan would stack up."""
    graph, state = nnx.split(stack)

    def body(x, layer):
        index, state = layer
        return nnx.merge(graph, state)(x, context, index, lambda k, v: (k, v, None))[0]

    body = body if checkpoint is None else checkpoint(body)
    layers = jnp.arange(stack.first, stack.first + stack.count)
    return jax.lax.scan(lambda x, layer: (body(x, layer), None), x, (layers, state))[0]


def _run_stack_with_cache(stack: Block, x: jax.Array, context: Context, keys: jax.Array, values: jax.Array):
    """Runs all layers of a stack, writing their keys and values in place: (x, keys, values)."""
    graph, state = nnx.split(stack)

    def body(carry, layer):
        x, keys, values = carry
        index, state = layer
        at = index - stack.first

        def update(k, v):
            start = (at, 0, context.query_offset, 0, 0)
            new_keys = jax.lax.dynamic_update_slice(keys, k[None], start)
            new_values = jax.lax.dynamic_update_slice(values, v[None], start)
            return new_keys[at], new_values[at], (new_keys, new_values)

        x, (keys, values) = nnx.merge(graph, state)(x, context, index, update)
        return (x, keys, values), None

    layers = jnp.arange(stack.first, stack.first + stack.count)
    return jax.lax.scan(body, (x, keys, values), (layers, state))[0]
