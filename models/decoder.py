"""The decoder that all families share: embeddings, a loop over stacked transformer blocks, norm and head.

Equal consecutive layers are one `Block` whose arrays have a leading layer axis; `jax.lax.scan` runs over it, so that
compile time does not grow with depth. A family says what differs in its `DecoderConfig`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from lora_jax.kernels import parallel
from lora_jax.kernels.attention import flash_attention
from lora_jax.kernels.kept import dequantize, named, quantize
from lora_jax.kernels.loss import Head
from lora_jax.kernels.nf4.format import BLOCK, NF4Layer, NF4Weight, beside_all_scales
from lora_jax.kernels.nf4.mlp import ACTIVATIONS, lora_mlp
from lora_jax.kernels.nf4.shared_input import halves, lora_matmuls
from lora_jax.kernels.rope import RopeConfig, apply_rope, rope_tables
from lora_jax.models.linear import Embedding, Linear, RMSNorm, entry, value
from lora_jax.models.mla import LatentAttention, LatentConfig
from lora_jax.models.moe import ExpertLinear, MoE, MoEConfig, Router, RouterLoad
from lora_jax.models.streamed import Streamed, is_on_host

__all__ = ["Block", "Cache", "Decoder", "DecoderConfig", "Slot", "full_names"]

# Hugging Face's names of a layer's norms: before and after attention, before and after the MLP.
NORMS: dict[str, tuple[str | None, ...]] = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "both, as GLM names them": (
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
}

# The tensors of a checkpoint that a leaf module may have.
ATTRIBUTES = ("weight", "bias", "e_score_correction_bias")


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
    fused_qkv: bool = False  # q, k and v are one qkv_proj
    fused_gate_up: bool = False  # gate and up are one gate_up_proj
    activation: str = "silu"  # of the gate: a key of ACTIVATIONS
    norms: str = "pre"  # of a layer: a key of NORMS
    norm_plus_one: bool = False  # norms multiply by 1 + weight
    qk_norm: str | None = None  # queries and keys are normalised before rotation, each "head" or the "projection"
    rotary_dim: int | None = None  # only so many features of a head, the first, are rotated; None for all
    interleaved: bool = False  # the two features of a rotation are neighbours, not half of those rotated apart
    local_rope: RopeConfig | None = None  # the rotation of layers with a window; None for that of the others
    nope_layers: tuple[int, ...] = ()  # layers without rotation
    attention_scale: float | None = None  # factor of the scores; None for 1 / sqrt(head_dim)
    softcap: float | None = None  # c in c tanh(scores / c)
    embedding_scale: float = 1.0  # factor of the embeddings
    residual_scale: float = 1.0  # factor of what attention and MLP add
    logit_scale: float = 1.0  # factor of the logits
    logit_softcap: float | None = None  # c in c tanh(logits / c)
    sinks: bool = False  # each head has the score of one more key, whose value is zero
    hf_prefix: str = "model"  # where Hugging Face's class keeps the decoder; lm_head stands beside it
    mla: LatentConfig | None = None  # the attention is multi-head latent attention
    moe: MoEConfig | None = None  # what takes the place of the MLP in some layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far.

    For each stack of layers [n, B, S, K, H]; or what `quantize` of kernels/kept.py makes of that, codes and scales.
    """

    keys: tuple[jax.Array | tuple[jax.Array, jax.Array], ...]
    values: tuple[jax.Array | tuple[jax.Array, jax.Array], ...]
    length: jax.Array  # int32 []: tokens held


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass needs beside its input."""

    cos: jax.Array  # [B, T, H / 2]; with `kinds` [kinds, B, T, H / 2], and so the next two
    sin: jax.Array
    segment_start: jax.Array | None  # int32 [B, T]
    query_offset: jax.Array | int
    dropout_key: jax.Array | None
    kinds: np.ndarray | None = None  # number of each layer's kind; None if all layers are of one
    mlp_rows: int | None = None  # rows of the feed-forward layer that are computed at a time; None for all
    counted: jax.Array | None = None  # [B, T]: 1 or True for tokens whose way through the experts is summed up

    def of_layer(self, layer: jax.Array) -> "Context":
        """The context of one layer."""
        if self.kinds is None:
            return self
        kind = jnp.asarray(self.kinds)[layer]
        tables = (self.cos, self.sin, self.segment_start)
        cos, sin, start = (t if t is None else jax.lax.dynamic_index_in_dim(t, kind, 0, False) for t in tables)
        return dataclasses.replace(self, cos=cos, sin=sin, segment_start=start, kinds=None)

    def key(self, layer: jax.Array, site: int) -> jax.Array | None:
        """The dropout key of one linear of one layer."""
        if self.dropout_key is None:
            return None
        return jax.random.fold_in(jax.random.fold_in(self.dropout_key, layer), site)


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one tensor of a Hugging Face checkpoint lives in the model."""

    owner: nnx.Module  # the Linear, Embedding, RMSNorm or Attention
    attribute: str  # one of ATTRIBUTES, or "sinks"
    index: int | tuple[int, int] | None  # position in the stack (and expert), None for a module that is not stacked

    @property
    def variable(self) -> nnx.Param:
        """The variable that holds the tensor."""
        return getattr(self.owner, self.attribute)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the checkpoint."""
        shape = tuple(value(self.variable).shape)
        return shape[0 if self.index is None else 2 if isinstance(self.index, tuple) else 1 :]


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, *, lead: tuple[int, ...], dtype: DTypeLike):
        d, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        linear = functools.partial(Linear, d, lead=lead, dtype=dtype, bias=config.qkv_bias)
        if config.fused_qkv:
            self.qkv_proj = linear(q + 2 * kv)
        else:
            self.q_proj, self.k_proj, self.v_proj = linear(q), linear(kv), linear(kv)
        self.o_proj = Linear(q, d, lead=lead, dtype=dtype, bias=config.out_bias)
        if config.qk_norm is not None:
            widths = (config.head_dim,) * 2 if config.qk_norm == "head" else (q, kv)
            self.q_norm, self.k_norm = (_norm(config, width, lead, dtype) for width in widths)
        self.sinks = nnx.Param(jax.ShapeDtypeStruct((*lead, config.num_heads), dtype)) if config.sinks else None
        self.qk_norm, self.interleaved = config.qk_norm, config.interleaved
        self.head_dim, self.kv_dim = config.head_dim, kv
        self.scale, self.softcap = config.attention_scale, config.softcap
        # Where layers differ in their windows, these are in each layer's segment_start.
        self.window = config.windows[0] if len(set(config.windows)) == 1 else None

    def __call__(self, x, context: Context, layer, update_cache: Callable):
        """x [B, T, D] -> (output [B, T, D], whatever `update_cache` returns beside keys and values)."""
        q, k, v = self._project(x, context, layer)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*x.shape[:2], -1, self.head_dim) for y in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        v = named(v, "v")
        q, k = (apply_rope(y, context.cos, context.sin, interleaved=self.interleaved) for y in (q, k))
        q, k = named(q, "q"), named(k, "k")
        k, v, cache = update_cache(k, v)
        out = flash_attention(
            q,
            k,
            v,
            segment_start=context.segment_start,
            query_offset=context.query_offset,
            window=self.window,
            softcap=self.softcap,
            scale=self.scale,
            sinks=value(self.sinks),
        )
        return parallel.leave(self.o_proj(out.reshape(*x.shape[:2], -1), context.key(layer, 3))), cache

    def _project(self, x, context: Context, layer) -> Sequence[jax.Array]:
        """q, k, v: [B, T, features] each."""
        x = parallel.enter(x)
        if hasattr(self, "qkv_proj"):
            qkv = self.qkv_proj(x, context.key(layer, 0))
            return jnp.split(qkv, (qkv.shape[-1] - 2 * self.kv_dim, qkv.shape[-1] - self.kv_dim), axis=-1)
        layers = (self.q_proj, self.k_proj, self.v_proj)
        return lora_matmuls(x, [one.projection(context.key(layer, site)) for site, one in enumerate(layers)])


class MLP(nnx.Module):
    """Gated feed-forward layer, down(activation(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, lead: tuple[int, ...], dtype: DTypeLike):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        linear = functools.partial(Linear, d, lead=lead, dtype=dtype, bias=bias)
        if config.fused_gate_up:
            self.gate_up_proj = linear(2 * f)
        else:
            self.gate_proj, self.up_proj = linear(f), linear(f)
        self.down_proj = Linear(f, d, lead=lead, dtype=dtype, bias=bias)
        self.activation = config.activation

    def __call__(self, x: jax.Array, context: Context, layer: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        rows = context.mlp_rows
        # A part draws the dropout of another part again, since it has the same key.
        if rows is None or context.dropout_key is not None or x.size // x.shape[-1] <= rows:
            return self._rows(x, functools.partial(context.key, layer))
        graph, trained, frozen = nnx.split(self, nnx.LoRAParam, ...)

        def of_part(part, trained, frozen):
            return nnx.merge(graph, trained, frozen)._rows(part)

        return _by_parts(of_part, x.reshape(-1, x.shape[-1]), trained, frozen, rows).reshape(x.shape)

    def _rows(self, x: jax.Array, key: Callable[[int], jax.Array | None] = lambda site: None) -> jax.Array:
        if hasattr(self, "gate_up_proj"):
            both = halves(self.gate_up_proj.projection(key(4)))
        else:
            both = self.gate_proj.projection(key(4)), self.up_proj.projection(key(5))
        if both is not None:
            down = self.down_proj.projection(key(6))
            return parallel.leave(lora_mlp(parallel.enter(x), *both, down, activation=self.activation))
        gate, up = jnp.split(self.gate_up_proj(x, key(4)), 2, axis=-1)
        gate, up = named(gate, "gate"), named(up, "up")
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up, key(6))


def _by_parts(f: Callable, x: jax.Array, trained, frozen, rows: int) -> jax.Array:
    """f(x, trained, frozen) [M, D] of x [M, D], `rows` rows at a time, one part after the other; none is kept.

    Backward computes every part again. Results take the place of what they are computed from, so that no array for
    them has to be there before the first.
    """
    count, left = divmod(x.shape[0], rows)

    def run(x, trained, frozen):
        def one(start, size, y):
            return _set_rows(y, f(_rows_of(y, start, size), trained, frozen), start)

        y = jax.lax.fori_loop(0, count, lambda i, y: one(i * rows, rows, y), x)
        return one(count * rows, left, y) if left else y

    def forward(x, trained, frozen):
        return run(x, trained, frozen), (x, trained, frozen)

    def backward(kept, dy):
        x, trained, frozen = kept

        def one(start, size, dx, sums):
            _, pullback = jax.vjp(lambda *at: f(*at, frozen), _rows_of(x, start, size), trained)
            of_part, more = pullback(_rows_of(dx, start, size))
            return _set_rows(dx, of_part, start), jax.tree.map(jnp.add, sums, more)

        state = (dy, jax.tree.map(jnp.zeros_like, trained))
        state = jax.lax.fori_loop(0, count, lambda i, state: one(i * rows, rows, *state), state)
        return *(one(count * rows, left, *state) if left else state), None

    parts = jax.custom_vjp(run)
    parts.defvjp(forward, backward)
    return parts(x, trained, frozen)


def _rows_of(x: jax.Array, start, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, allow_negative_indices=False)


def _set_rows(x: jax.Array, rows: jax.Array, start) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0, allow_negative_indices=False)


class Block(nnx.Module):
    """Layers `first` to `first + count - 1` of the model, stacked; their arrays are alike."""

    def __init__(self, config: DecoderConfig, first: int, count: int, dtype: DTypeLike):
        lead = (count,)
        self.first, self.count = first, count
        self.norms = NORMS[config.norms]
        for name in filter(None, self.norms):
            setattr(self, name, _norm(config, config.hidden_size, lead, dtype))
        attention = Attention if config.mla is None else LatentAttention
        self.self_attn = attention(config, lead=lead, dtype=dtype)
        self.mlp_name = "mlp" if config.moe is None or first not in config.moe.layers else config.moe.block
        setattr(self, self.mlp_name, _mlp(config, first, lead, dtype))
        self.residual_scale = config.residual_scale

    def __call__(self, x, context: Context, layer, update_cache: Callable):
        """One layer: x [B, T, D] -> (x, cache, how the tokens that `context.counted` counts fall on its experts).

        `layer` is its number in the model.
        """
        before_attention, after_attention, before_mlp, after_mlp = self.norms
        context = context.of_layer(layer)
        x, y = self._branch(before_attention, x)
        y, cache = self.self_attn(y, context, layer, update_cache)
        x = named(x + scaled(self._norm(after_attention, y), self.residual_scale), "residual")
        x, y = self._branch(before_mlp, x)
        mlp = getattr(self, self.mlp_name)
        y, load = mlp.with_load(y, context, layer) if isinstance(mlp, MoE) else (mlp(y, context, layer), None)
        return x + scaled(self._norm(after_mlp, y), self.residual_scale), cache, load

    def _branch(self, name: str | None, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The residual stream and what attention or MLP get of it."""
        return (x, x) if name is None else getattr(self, name).branch(x)

    def _norm(self, name: str | None, x: jax.Array) -> jax.Array:
        return x if name is None else getattr(self, name)(x)


def _mlp(config: DecoderConfig, layer: int, lead: tuple[int, ...], dtype: DTypeLike) -> MLP | MoE:
    """The MLP of a layer, or what takes its place."""
    moe = config.moe
    if moe is None or layer not in moe.layers:
        return MLP(config, lead=lead, dtype=dtype)
    shared = None
    if moe.shared_size is not None:
        shared = MLP(dataclasses.replace(config, intermediate_size=moe.shared_size), lead=lead, dtype=dtype)
    return MoE(config, moe, shared, lead=lead, dtype=dtype)


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
        stored = layer_kinds or [None] * config.num_layers
        sparse = () if config.moe is None else config.moe.layers
        layers = []
        for _, run in itertools.groupby(range(config.num_layers), key=lambda i: (stored[i], i in sparse)):
            run = list(run)
            layers.append(Block(config, run[0], len(run), dtype))
        self.layers = nnx.List(layers)
        self.norm = _norm(config, config.hidden_size, (), dtype)
        tied = config.tie_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, lead=(), dtype=dtype)

    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_start: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        cache: Cache | None = None,
        checkpoint: Sequence[tuple[int, Callable | None]] | None = None,
        scan: bool = True,
        mlp_rows: int | None = None,
        dropout_key: jax.Array | None = None,
        counted: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Hidden states after the final norm, with the factor of the logits; `head()` turns them into logits.

        Args:
          input_ids: int32 [B, T].
          positions: int32 [B, T], position of each token in its document; None for 0, 1, ... T-1.
          segment_start: int32 [B, T], first index (of the row, or of the cache) each token may see; None for 0.
          inputs_embeds: [B, T, D], rows of the embedding table for `input_ids`, where they were looked up before.
          cache: keys and values of earlier tokens; these tokens are appended.
          checkpoint: for each group of consecutive layers how many there are and what wraps the function of one layer,
            as `jax.checkpoint` does (lora_jax.remat); None, for a group or at all, keeps everything for backward.
          scan: whether the layers are a loop of the compiled program, or written out one after the other: that takes
            longer to compile, and spares the copies into and out of the loop's arrays.
          mlp_rows: tokens that the feed-forward layer computes at a time, which bounds its memory; None for all.
          dropout_key: key for the adapters' dropout; None for no dropout.
          counted: [B, T], 1 or True for the tokens that a `RouterLoad` is asked of; without a cache only.

        Returns:
          (hidden states [B, T, D], the cache with the new tokens), with None for the cache without one, or the
          `RouterLoad` of all layers if `counted` is given.

        Raises:
          ValueError: `counted` is given for a model without experts.
          NotImplementedError: `counted` is given, and its routers score experts by sigmoids.
        """
        offset = 0 if cache is None else cache.length
        if positions is None:
            here = jnp.arange(input_ids.shape[1]) + parallel.first_token(input_ids.shape[1])
            positions = jnp.broadcast_to(here + offset, input_ids.shape)
        keys = (
            input_ids.shape[1] * parallel.size("context") if cache is None else jax.tree.leaves(cache.keys)[0].shape[2]
        )
        context = _context(self.config, positions, segment_start, offset, keys, dropout_key)
        context = dataclasses.replace(context, mlp_rows=mlp_rows, counted=counted)
        x = self.embed_tokens(input_ids, self.dtype, inputs_embeds)
        # Rounded to the dtype first, as Gemma's was when it was trained.
        x *= jnp.asarray(self.config.embedding_scale, x.dtype)
        if cache is None:
            groups = [(self.config.num_layers, None)] if checkpoint is None else checkpoint
            load = None if counted is None else self._no_load()
            for stack, start, count, wrapper in _pieces(self.layers, groups):
                x, load = _run_stack(stack, start, count, x, load, context, wrapper, scan)
            return scaled(self.norm(x), self.config.logit_scale), load
        keys, values = [], []
        for stack, k, v in zip(self.layers, cache.keys, cache.values, strict=True):
            x, k, v = _run_stack_with_cache(stack, x, context, k, v)
            keys.append(k)
            values.append(v)
        cache = Cache(tuple(keys), tuple(values), cache.length + input_ids.shape[1])
        return scaled(self.norm(x), self.config.logit_scale), cache

    def _no_load(self) -> RouterLoad:
        if self.config.moe is None:
            raise ValueError(
                f"{self.config.architecture} has no experts whose load could be counted: leave out router_aux_loss_coef"
            )
        if self.config.moe.sigmoid:
            raise NotImplementedError(
                f"router_aux_loss_coef for {self.config.architecture}: its routers score experts by sigmoids, which "
                "are no probabilities, and pretraining kept them evenly loaded by biases; leave it out"
            )
        return RouterLoad.none(self.config.moe.num_experts)

    def head(self) -> Head:
        """The head of the loss."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).head(self.config.logit_softcap)

    def new_cache(self, batch: int, length: int, quantized: bool = False) -> Cache:
        """An empty cache for `length` tokens a row; quantised, keys and values are rounded to 8 bits."""
        c = self.config
        shapes = [(s.count, batch, length, c.num_kv_heads) for s in self.layers]
        widths = (c.head_dim, c.head_dim if c.mla is None else c.mla.value_dim)

        def empty(shape):
            return quantize(jnp.zeros(shape, self.dtype)) if quantized else jnp.zeros(shape, self.dtype)

        keys, values = (tuple(empty((*shape, width)) for shape in shapes) for width in widths)
        return Cache(keys, values, jnp.int32(0))

    def named_modules(self) -> Iterator[tuple[str, Block | None, Linear | Embedding | RMSNorm]]:
        """(Hugging Face name, its stack, module) of every leaf module.

        Modules of a stack have `{}` in their name in place of the layer's number, and `*` in that of the expert's where
        they have one; others have None for a stack. `full_names` fills in the numbers.
        """
        prefix = self.config.hf_prefix
        yield f"{prefix}.embed_tokens", None, self.embed_tokens
        yield f"{prefix}.norm", None, self.norm
        if self.lm_head is not None:
            yield "lm_head", None, self.lm_head
        for stack in self.layers:
            for name, module in _leaf_modules(stack, f"{prefix}.layers.{{}}"):
                yield name, stack, module

    def block_linears(self) -> Iterator[tuple[str, Block, Linear]]:
        """Those of `named_modules` that are linear layers of the blocks, whose weights are most of the model.

        Routers, which are small and choose, are not among them.
        """
        for name, stack, module in self.named_modules():
            if stack is not None and isinstance(module, Linear) and not isinstance(module, Router):
                yield name, stack, module

    def slots(self) -> dict[str, Slot]:
        """Every tensor of this model's Hugging Face checkpoint, by name."""
        slots = {}
        for name, stack, module in self.named_modules():
            for attribute in ATTRIBUTES:
                if getattr(module, attribute, None) is None:
                    continue
                for full, index in full_names(name, stack, module):
                    slots[f"{full}.{attribute}"] = Slot(module, attribute, index)
        for stack in self.layers if self.config.sinks else ():
            for index in range(stack.count):
                name = f"{self.config.hf_prefix}.layers.{stack.first + index}.self_attn.sinks"
                slots[name] = Slot(stack.self_attn, "sinks", index)
        return slots


def full_names(
    name: str, stack: Block | None, module: nnx.Module
) -> Iterator[tuple[str, int | tuple[int, int] | None]]:
    """Each module of the checkpoint that an entry of `named_modules` holds: its name, and its place in the arrays.

    The place is None for the whole, the number of the layer in the stack, or that and the number of the expert.
    """
    if stack is None:
        yield name, None
        return
    for index in range(stack.count):
        of_layer = name.format(stack.first + index)
        if isinstance(module, ExpertLinear):
            yield from ((of_layer.replace("*", str(expert)), (index, expert)) for expert in range(module.experts))
        else:
            yield of_layer, index


def _norm(config: DecoderConfig, width: int, lead: tuple[int, ...], dtype: DTypeLike) -> RMSNorm:
    return RMSNorm(width, config.rms_norm_eps, lead=lead, dtype=dtype, plus_one=config.norm_plus_one)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """factor * x, rounded once to the dtype of x."""
    return x if factor == 1.0 else (factor * x.astype(jnp.float32)).astype(x.dtype)


def _context(config: DecoderConfig, positions, segment_start, offset, keys: int, dropout_key) -> Context:
    """The context of a forward pass whose queries, at `offset`, see up to `keys` keys.

    Layers may differ in their window and their rotation and still share one stack: both are tables, of which every
    layer takes its own. A window is a later first key, which costs the kernels no more than a window they know of.
    """
    windows = [window if window is not None and window < keys else None for window in config.windows]
    local = config.local_rope or config.rope
    ropes = [
        None if i in config.nope_layers else config.rope if window is None else local
        for i, window in enumerate(config.windows)
    ]
    mixed = len(set(config.windows)) > 1 and any(windows)
    kinds = [(window if mixed else None, rope) for window, rope in zip(windows, ropes, strict=True)]
    distinct = list(dict.fromkeys(kinds))
    cos, sin = zip(*(_rope_tables(config, rope, positions) for _, rope in distinct), strict=True)
    starts = [segment_start] * len(distinct)
    if mixed:
        here = jnp.arange(positions.shape[1], dtype=jnp.int32) + parallel.first_token(positions.shape[1])
        index = jnp.broadcast_to(here + offset, positions.shape)
        segment_start = jnp.zeros_like(index) if segment_start is None else segment_start
        starts = [segment_start if w is None else jnp.maximum(segment_start, index - w + 1) for w, _ in distinct]
    if len(distinct) == 1:
        return Context(cos[0], sin[0], starts[0], offset, dropout_key)
    stacked = None if starts[0] is None else jnp.stack(starts)
    numbers = np.array([distinct.index(kind) for kind in kinds], np.int32)
    return Context(jnp.stack(cos), jnp.stack(sin), stacked, offset, dropout_key, numbers)


def _rope_tables(config: DecoderConfig, rope: RopeConfig | None, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    dim = config.rotary_dim or config.head_dim
    if rope is None:
        shape = (*positions.shape, dim // 2)
        return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    return rope_tables(rope, dim, positions)


def _leaf_modules(module: nnx.Module, prefix: str) -> Iterator[tuple[str, Linear | Embedding | RMSNorm]]:
    for name, child in vars(module).items():
        if isinstance(child, Linear | Embedding | RMSNorm):
            yield f"{prefix}.*.{name}" if isinstance(child, ExpertLinear) else f"{prefix}.{name}", child
        elif isinstance(child, nnx.Module):
            yield from _leaf_modules(child, f"{prefix}.{name}")


def _pieces(stacks: Iterable[Block], groups: Sequence[tuple[int, Callable | None]]) -> Iterator[tuple]:
    """(stack, first entry in it, number of layers, wrapper): the stacks, cut where a group of layers ends."""
    group_of = [number for number, (count, _) in enumerate(groups) for _ in range(count)]
    for stack in stacks:
        layers = range(stack.first, stack.first + stack.count)
        for number, run in itertools.groupby(layers, key=group_of.__getitem__):
            run = list(run)
            yield stack, run[0] - stack.first, len(run), groups[number][1]


def _run_stack(stack: Block, start: int, count: int, x: jax.Array, load, context: Context, wrapper, scan: bool):
    """Runs `count` layers of a stack, from its entry `start` on: x [B, T, D] -> [B, T, D], beside the sum of loads.

    To cut the frozen weights would copy them, so every layer takes its own out of the whole stack, inside of what
    `wrapper` wraps: what is taken outside would be kept for backward. Without a wrapper only scan itself can do that.
    The body closes over nothing that is differentiated, which scan would stack up: the trained leaves, which are small,
    are cut.
    """
    graph, trained, frozen = nnx.split(stack, nnx.LoRAParam, ...)
    buffers = _buffers(frozen)
    gathers = any(isinstance(leaf, parallel.Shard) for leaf in jax.tree.leaves(frozen, is_leaf=_is_nf4))
    if wrapper is None and (buffers or gathers):
        wrapper = parallel.keep_all_but_gathered

    def layer(x, index, trained, weights=None, buffer=None, whole=None):
        x = named(x, "input")
        weights = _entries(frozen, index, buffer, whole) if weights is None else weights
        x, _, load = nnx.merge(graph, trained, weights)(x, context, stack.first + index, lambda k, v: (k, v, None))
        return x, load

    def part(state):
        return state if count == stack.count else jax.tree.map(lambda leaf: leaf[start : start + count], state)

    if not scan or buffers:
        # The gradients of `split` are put together by one concatenation, those of slices would be added up.
        stacks, tree = jax.tree.flatten(part(trained))
        entries = zip(*(jax.lax.split(leaf, (1,) * count) for leaf in stacks), strict=True)
        entries = [jax.tree.unflatten(tree, [leaf.squeeze(0) for leaf in entry]) for entry in entries]
        entries = entries or [jax.tree.unflatten(tree, [])] * count
        gather = functools.partial(_gathered, frozen) if gathers else None
        x, more = _written_out(layer, wrapper, start, x, entries, buffers[start : start + count], gather)
        return x, load if more is None else load + more
    xs = (start + jnp.arange(count), part(trained))
    wrapped, xs = (layer, (*xs, part(frozen))) if wrapper is None else (wrapper(layer), xs)

    def body(carry, xs):
        x, load = carry
        x, more = wrapped(x, *xs)
        return (x, load if more is None else load + more), None

    return jax.lax.scan(body, (x, load), xs)[0]


def _written_out(
    layer: Callable,
    wrapper: Callable | None,
    start: int,
    x: jax.Array,
    entries: Sequence,
    buffers: Sequence,
    gather: Callable[[jax.Array], list] | None,
):
    """Runs layers one after the other: (x, sum of their loads). `entries` are their trained leaves.

    The order of things is ours where the compiler would choose one that takes more memory or time: a layer's backward
    pass begins when that of the next is done, gradients of adapters included (the compiler would put these off, and
    keep what they are computed from, of all layers). What goes to the host has to be there when the layer after the
    next begins, and comes back while backward is at work on the next. So do weights in the host's memory, of which
    there are `buffers`: a layer's are copied while the layer before it is at work, and again for backward. Weights that
    devices share out, which `gather` makes whole for a layer by its number, travel at the same time.
    """
    layer = jax.jit(layer)  # traced once
    wrapped = layer if wrapper is None else wrapper(layer)
    buffers = buffers or (None,) * len(entries)
    last = len(entries) - 1
    backward = jax.jit(lambda pullback, whole, gradients: pullback(whole)(gradients))

    @jax.jit
    def forward(x, i, leaves, buffer, whole):
        out, pullback = jax.vjp(lambda x, leaves: wrapped(x, i, leaves, None, buffer, whole), x, leaves)
        return out, _without(pullback, whole)

    def gather_beside(x, whole, i: int):
        """(x, whole, the weights of layer i, which are not asked for before x and `whole` are there)."""
        if gather is None:
            return x, whole, ()
        x, whole, at = jax.lax.optimization_barrier((x, whole, jnp.int32(start + i)))
        return x, whole, gather(at)

    def one_after_the_other(x, entries, run):
        """`run` for every layer, which gives x; the buffer of the next may be copied from when it begins."""
        buffer, whole, following = buffers[0], () if gather is None else gather(jnp.int32(start)), ()
        for i, leaves in enumerate(entries):
            x, buffers_ahead = _after(x, buffers[i + 1 : i + 2], on_host=True)
            if i < last:
                x, whole, following = gather_beside(x, whole, i + 1)
            x = run(x, i, leaves, buffer, whole)
            buffer = buffers_ahead[0] if buffers_ahead else None
            if i < last:
                whole = following
        return x, whole

    def run(x, entries):
        loads = []

        def ahead(x, i, leaves, buffer, whole):
            x, load = layer(x, jnp.int32(start + i), leaves, None, buffer, whole)
            loads.append(load)
            return x

        return one_after_the_other(x, entries, ahead)[0], _sum(loads)

    def run_forward(x, entries):
        pullbacks, loads = [], []

        def ahead(x, i, leaves, buffer, whole):
            (x, load), pullback = forward(x, jnp.int32(start + i), leaves, buffer, whole)
            pullbacks.append(pullback)
            loads.append(load)
            if i:
                x, pullbacks[i - 1] = _after(x, pullbacks[i - 1], on_host=True)
            return x

        x, whole = one_after_the_other(x, entries, ahead)
        return (x, _sum(loads)), (pullbacks, whole)

    def run_backward(residuals, gradients):
        (pullbacks, whole), (dx, dload) = residuals, gradients
        of_leaves, following = [], ()
        for i in reversed(range(len(pullbacks))):
            if i:
                dx, pullbacks[i - 1] = _after(dx, pullbacks[i - 1], on_host=True)
                dx, whole, following = gather_beside(dx, whole, i - 1)
            if wrapper is not None:  # else the compiler would see that what is computed again was computed before
                dx, pullbacks[i] = _after(dx, pullbacks[i], on_host=False)
            dx, leaves = jax.lax.optimization_barrier(backward(pullbacks[i], whole, (dx, dload)))
            of_leaves.append(leaves)
            whole = following
        return dx, of_leaves[::-1]

    layers = jax.custom_vjp(run)
    layers.defvjp(run_forward, run_backward)
    return layers(x, entries)


def _without(tree: Any, arrays: Any) -> jax.tree_util.Partial:
    """A function that gives the tree for such arrays, and is a pytree of its leaves but for those."""
    leaves, treedef = jax.tree.flatten(tree)
    number_of = {id(array): number for number, array in enumerate(jax.tree.leaves(arrays))}
    numbers = [number_of.get(id(leaf)) for leaf in leaves]

    def whole(kept: list, arrays: Any):
        others, given = iter(kept), jax.tree.leaves(arrays)
        return treedef.unflatten([next(others) if n is None else given[n] for n in numbers])

    return jax.tree_util.Partial(whole, [leaf for leaf, n in zip(leaves, numbers, strict=True) if n is None])


def _buffers(frozen) -> tuple:
    """The layers' weights in the host's memory, see `Streamed`; () if they are on the device."""
    parts = jax.tree.leaves(frozen, is_leaf=lambda leaf: isinstance(leaf, Streamed))
    return next((tuple(part.buffers) for part in parts if isinstance(part, Streamed)), ())


def _sum(loads: list):
    return None if loads[0] is None else functools.reduce(lambda a, b: a + b, loads)


def _after(x: jax.Array, tree, on_host: bool):
    """The same; x and the leaves of `tree` that are (not) in the host's memory are there only when all of them are."""
    leaves, treedef = jax.tree.flatten(tree)
    chosen = [i for i, leaf in enumerate(leaves) if is_on_host(leaf) == on_host]
    if chosen:
        x, waiting = jax.lax.optimization_barrier((x, [leaves[i] for i in chosen]))
        for i, leaf in zip(chosen, waiting, strict=True):
            leaves[i] = leaf
    return x, jax.tree.unflatten(treedef, leaves)


def _is_nf4(leaf) -> bool:
    return isinstance(leaf, NF4Weight | parallel.Shard)


def _entries(frozen, index: jax.Array, buffer: jax.Array | None = None, whole: list | None = None):
    """Entry `index` of all that is stacked.

    `buffer` has those of its weights that are in the host's memory, `whole` those that devices share out.
    """
    if buffer is not None:
        buffer = jax.device_put(buffer, jax.memory.Space.Device)
    leaves, treedef = jax.tree.flatten(frozen, is_leaf=_is_nf4)
    shared = iter(whole or _gathered(frozen, index))

    def one(leaf):
        if isinstance(leaf, parallel.Shard):
            return leaf.with_scales(next(shared), index)
        return _entry(leaf, index, buffer)

    return treedef.unflatten([one(leaf) for leaf in leaves])


def _gathered(frozen, index: jax.Array) -> list:
    """Entry `index` of the weights that devices share out, whole; see `parallel.gathered`."""
    leaves = jax.tree.leaves(frozen, is_leaf=_is_nf4)
    return parallel.gathered([leaf.entry(index) for leaf in leaves if isinstance(leaf, parallel.Shard)])


def _entry(leaf, index: jax.Array, buffer: jax.Array | None):
    """Entry `index` of a stack of arrays or NF4 weights; NF4 weights stay where they are, for the kernels."""
    if not _is_nf4(leaf):
        return entry(leaf, index)
    if isinstance(codes := leaf.packed, Streamed):
        return beside_all_scales(NF4Weight(codes.of(buffer), entry(leaf.absmax, index)), leaf, index)
    layer = NF4Layer(leaf, index)
    return layer if leaf.shape[-1] % BLOCK == 0 else layer.cut()


def _run_stack_with_cache(stack: Block, x: jax.Array, context: Context, keys, values):
    """Runs all layers of a stack, writing their keys and values in place: (x, keys, values).

    Like `_run_stack`, a layer takes its weights out of the whole stack: scan would copy all that it cuts.
    """
    graph, state = nnx.split(stack)

    def body(carry, at, buffer=None):
        x, keys, values = carry
        weights = _entries(state, at, buffer)

        def update(k, v):
            start = (at, 0, context.query_offset, 0, 0)
            new_keys, new_values = _cached(keys, k, start), _cached(values, v, start)
            return _of_cache(new_keys, at, k.dtype), _of_cache(new_values, at, v.dtype), (new_keys, new_values)

        x, (keys, values), _ = nnx.merge(graph, weights)(x, context, stack.first + at, update)
        return (x, keys, values), None

    carry = (x, keys, values)
    if not (buffers := _buffers(state)):
        return jax.lax.scan(body, carry, jnp.arange(stack.count))[0]
    layer = jax.jit(body)  # traced once
    for i, buffer in enumerate(buffers):
        carry, _ = layer(carry, jnp.int32(i), buffer)
    return carry


def _cached(stack, new: jax.Array, start):
    """A stack of keys or values with new ones [B, T, K, H] written into it."""
    parts = quantize(new) if isinstance(stack, tuple) else new
    return jax.tree.map(lambda whole, part: jax.lax.dynamic_update_slice(whole, part[None], start), stack, parts)


def _of_cache(stack, at: jax.Array, dtype) -> jax.Array:
    """One layer's keys or values [B, S, K, H]."""
    layer = jax.tree.map(lambda whole: whole[at], stack)
    return dequantize(*layer, dtype) if isinstance(stack, tuple) else layer
