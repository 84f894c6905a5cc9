"""How much memory and time a training step takes, before anything is loaded; and the fastest plan that fits a GPU.

Memory is counted part by part from the shapes of the model. What the compiler needs for the work on one layer was
counted in programs it compiled for an H100 and an RTX 4090; tests compile more and hold the sum to 8 %. Seconds are
operations and bytes over the rates that kernels reach, as they were measured on an H100; other cards are assumed to
reach the same share of what their makers state, so compare plans by them rather than cards.
"""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_jax.cards import GIB, HOST_LIMIT, Card, parse_bytes, this_card
from lora_jax.kernels.kept import quantized_bytes
from lora_jax.lora_init import starts_in_weight
from lora_jax.remat import ALL, NAMES, QUANTIZABLE, RematPlan

if TYPE_CHECKING:
    from lora_jax.config import SFTConfig
    from lora_jax.lora import LoraConfig
    from lora_jax.model import CausalLM
    from lora_jax.models.decoder import DecoderConfig

__all__ = ["MEMORY_FRACTION", "Memory", "Workload", "budget_of", "choose", "explain", "fits", "largest", "memory"]
__all__ += ["model_flops", "of_config", "of_step", "refuse_what_cannot_fit", "scans_layers", "seconds"]

# JAX takes 3/4 of a GPU unless told otherwise; more than this leaves too little for CUDA itself.
MEMORY_FRACTION = 0.92

MOST_WRITTEN_OUT = 48  # layers that a step writes out instead of looping over them: 25 s to compile for 32

# Shares of the stated rates that whole steps reached (H100, Llama-3.1-8B's shape, 2 x 2048 tokens, rank 16).
_MATMUL, _ATTENTION, _ELEMENTWISE, _COPY, _DECODE = 0.745, 0.45, 0.68, 0.88, 0.68
_LONG_ATTENTION = 0.6  # with many keys
_ATTENTION_BACKWARD = 2.0  # times as long as forward, less the one forward
_MOSAIC = 1.11  # times what cuDNN takes for attention on a long row, see kernels/attention/attention.py
_OVERLAP = 0.97  # share of a layer's time in which copies are under way
_LINK = 0.84  # of the rate between host and device, while kernels run; large copies reached 0.66 to 0.8
_PAIR_PASSES = (4.0, 5.0, 2.0)  # over [M k, D] of tokens' pairs with experts: forward, backward, computing again
_ROUNDING_PASSES = 4.0  # over a tensor kept in 8 bits: its largest values, its codes (half a pass more), decoding it


# ---- the step -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Workload:
    """One training step in numbers. Bytes are those on the device."""

    config: "DecoderConfig"
    weights: int  # bytes of everything frozen
    adapters: int  # bytes of everything trained, in float32
    optimizer: int  # bytes of the optimizer's state
    rank: int  # of the adapters
    batch: int  # rows of a micro-batch
    length: int  # tokens of a row
    accumulation: int = 1  # micro-batches of a step
    itemsize: int = 2  # bytes of an activation
    nf4: bool = True  # weights are decoded for every use
    offload_embedding: bool = False  # the embedding table is not on the device, but its rows for the tokens are
    scan_layers: bool = False  # layers are a loop also where a plan would let them be written out
    streamed: int = 0  # bytes of the layers' weights that the host's memory holds, and the device a layer's at a time
    head_on_host: int = 0  # bytes of the head where the host's memory holds it, and the device only for the loss
    row_devices: int = 1  # that share out a row, of which `length` tokens are here, and its heads in attention
    dora: bool = False  # outputs are scaled by DoRA's gains, and feed-forward layers are no single operation
    whole_logits: bool = False  # a loss of one's own: logits of all tokens of a micro-batch at once

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch * self.length

    def named_bytes(self, layer: int) -> dict[str, int]:
        """Bytes of each named tensor of a layer (lora_jax.remat.NAMES) for one micro-batch."""
        w = layer_widths(self.config, layer)
        features = {"input": w.hidden, "q": w.q, "k": w.k, "v": w.v, "attention": w.attention, "residual": w.hidden}
        # Of q, k and v together, gate and up together, and down, with ranks padded as triton_adapter.py does; and of o.
        padded = max(16, _power_of_two(self.rank))
        thin = _power_of_two(3 * padded) + self.rank
        moe = self.config.moe
        if moe is None or w.pairs == 0 or moe.shared_size is not None:
            thin += _power_of_two(2 * padded) + padded
        thin += (3 * padded + 4) * w.pairs  # and the order of the pairs, two int32
        features |= {"gate": w.mlp, "up": w.mlp, "thin": thin}
        sizes = {name: self.tokens * n * self.itemsize for name, n in features.items()}
        sizes["attention_lse"] = 4 * self.tokens * self.config.num_heads
        return {name: sizes[name] for name in NAMES}

    def kept_bytes(self, layer: int, actions: dict[str, str]) -> dict[str, int]:
        """Bytes of each named tensor of a layer as a plan keeps it, on the device or the host; 0 where it does not."""
        w, sizes = layer_widths(self.config, layer), self.named_bytes(layer)
        last = {"input": w.hidden, "residual": w.hidden, "gate": w.expert, "up": w.expert}
        last |= dict.fromkeys(("q", "k"), w.q // self.config.num_heads)
        last |= dict.fromkeys(("v", "attention"), w.attention // self.config.num_heads)
        kept = {}
        for name, size in sizes.items():
            action = "save" if ALL in actions else actions.get(name, "recompute")
            if action == "save_quantized":
                size = quantized_bytes(size // self.itemsize, last[name])
            kept[name] = 0 if action == "recompute" else size
        return kept


class Widths(NamedTuple):
    """Features that a token has in a layer, and weights of the layer."""

    hidden: int
    q: int
    k: int
    v: int
    attention: int
    mlp: int  # gate's; all of a token's experts together
    expert: int  # gate's of one expert
    qkv: int  # weights that make queries, keys and values
    experts: int  # how many times the weights of gate, up and down are stored that a token uses
    pairs: int  # experts that a token goes to; 0 where there are none


@functools.cache
def layer_widths(c: "DecoderConfig", layer: int) -> Widths:
    """The sizes of one layer of a model."""
    d, heads, keys = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    q, k, v, attention, qkv = heads, keys, keys, heads, d * (heads + 2 * keys)
    if (latent := c.mla) is not None:
        q = k = c.num_heads * (latent.plain_dim + latent.rotated_dim)
        v = attention = c.num_heads * latent.value_dim
        qkv = d * q if latent.query_rank is None else latent.query_rank * (d + q)
        qkv += d * (latent.key_value_rank + latent.rotated_dim)
        qkv += latent.key_value_rank * c.num_heads * (latent.plain_dim + latent.value_dim)
    mlp, expert, experts, pairs = c.intermediate_size, c.intermediate_size, 1, 0
    if (moe := c.moe) is not None and layer in moe.layers:
        expert, experts, pairs = moe.intermediate_size, moe.num_experts // moe.top_k, moe.top_k
        mlp = moe.top_k * expert + (moe.shared_size or 0)
    return Widths(d, q, k, v, attention, mlp, expert, qkv, experts, pairs)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def of_step(model: "CausalLM", lora: Any, opt_state: Any, frozen: Any, batch: dict[str, Any]) -> Workload:
    """The step that a model with an adapter takes with these arguments of `train_step`: arrays, or their shapes.

    Of arrays that are sharded over devices the bytes and rows of one device count; the optimizer's state does not
    where it lies in the host's memory.
    """
    import jax

    from lora_jax.kernels.nf4 import NF4Weight

    assert model.lora_config is not None
    weights = jax.tree.leaves(frozen, is_leaf=lambda leaf: isinstance(leaf, NF4Weight))
    accumulation, rows, length = _local_shape(batch["input_ids"])
    return Workload(
        config=model.config,
        weights=_bytes(frozen),
        adapters=_bytes(lora),
        optimizer=_bytes(opt_state),
        rank=_rank(model.lora_config),
        dora=model.lora_config.use_dora,
        batch=rows,
        length=length,
        accumulation=accumulation,
        itemsize=model.module.dtype.itemsize,
        nf4=any(isinstance(leaf, NF4Weight) for leaf in weights),
        offload_embedding="inputs_embeds" in batch,
        streamed=sum(codes.nbytes for codes in model.streamed_codes()),
        head_on_host=model.head_on_host * _table_bytes(model.config, model.module.dtype.itemsize),
    )


def of_config(
    hf_config: dict[str, Any],
    lora_config: "LoraConfig",
    batch: int,
    length: int,
    *,
    accumulation: int = 1,
    load_in_4bit: bool = True,
    dtype: str | None = None,
    optim: str = "adamw_torch",
    offload_embedding: bool = False,
    offload_head: bool = False,
    offload_layers: bool = False,
    mesh: Any = None,
) -> Workload:
    """The step of a model of which only config.json is known; arguments as those of `from_pretrained` and `SFTConfig`.

    With a mesh, which may be a `jax.sharding.AbstractMesh`, weights, adapters and optimizer are those that one device
    holds; rows are of one device anyway.

    Raises:
      ValueError: the architecture, a target module or a setting is not known.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lora_jax.config import SFTConfig
    from lora_jax.kernels.nf4 import NF4Weight
    from lora_jax.lora import adapter_shapes, for_decoder
    from lora_jax.model import CausalLM
    from lora_jax.models.decoder import Decoder
    from lora_jax.models.registry import config_from_hf
    from lora_jax.optim import make_optimizer
    from lora_jax.sharding import bytes_here, share_of_adapters

    args = SFTConfig(optim=optim)
    config = config_from_hf(hf_config)
    stored = str(dtype or hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16")
    module = Decoder(config, np.dtype(jnp.float32 if stored.endswith("float32") else jnp.bfloat16))
    for _, _, part in module.block_linears() if load_in_4bit else ():
        part.weight.set_value(NF4Weight.abstract(part.weight.get_value().shape, True))
    model = CausalLM(module, hf_config=hf_config, source=Path())
    lora_config = for_decoder(module, lora_config)
    shapes = {name: (k, lora_config.rank_of(name), n) for name, (k, n) in adapter_shapes(model, lora_config).items()}
    trained = [(k, r) for k, r, _ in shapes.values()] + [(r, n) for _, r, n in shapes.values()]
    vocabulary = (config.vocab_size, config.hidden_size)
    trained += [vocabulary for name in lora_config.modules_to_save if name in ("embed_tokens", "lm_head")]
    beside: list[tuple[int, ...]] = []  # frozen, in float32: what DoRA and PiSSA keep of the start
    if lora_config.use_dora:
        norms = [(n,) for _, _, n in shapes.values()]
        trained, beside = trained + norms, beside + norms
    if starts_in_weight(lora_config.start):
        beside += [side for k, r, n in shapes.values() for side in ((k, r), (r, n))]
    lora = [jax.ShapeDtypeStruct(shape, np.float32) for shape in trained]
    state = jax.eval_shape(make_optimizer(args, 1)[0].init, lora)
    frozen, share = model.split()[2], 1.0
    weights = _bytes(frozen)
    if mesh is not None:
        weights, share = bytes_here(frozen, mesh), share_of_adapters(shapes, mesh)
    offload_embedding, offload_head = (on and not config.tie_embeddings for on in (offload_embedding, offload_head))
    table = _table_bytes(config, module.dtype.itemsize)
    held = [part.weight.get_value() for _, _, part in module.block_linears() if offload_layers]
    streamed = sum(_bytes(weight.packed) for weight in held if isinstance(weight, NF4Weight))
    return Workload(
        config=config,
        weights=weights
        + int(share * 4 * sum(map(math.prod, beside)))
        - (offload_embedding + offload_head) * table
        - streamed,
        adapters=int(share * _bytes(lora)),
        optimizer=0 if args.optim_is_paged else int(share * _bytes(state)),
        rank=_rank(lora_config),
        dora=lora_config.use_dora,
        batch=batch,
        length=length,
        accumulation=accumulation,
        itemsize=module.dtype.itemsize,
        nf4=load_in_4bit,
        offload_embedding=offload_embedding,
        streamed=streamed,
        head_on_host=offload_head * table,
    )


def _table_bytes(config: "DecoderConfig", itemsize: int) -> int:
    """Of the embedding table, or of the head."""
    return config.vocab_size * config.hidden_size * itemsize


def _rank(config: "LoraConfig") -> int:
    """Of the factors that the layers multiply by: where a start is subtracted it stands beside A and B."""
    return config.r * (2 if starts_in_weight(config.start) else 1)


def _bytes(tree: Any) -> int:
    """Bytes of arrays on one device."""
    import jax

    from lora_jax.models.streamed import on_device

    leaves = [leaf for leaf in jax.tree.leaves(tree) if on_device(leaf)]
    return sum(math.prod(_local_shape(leaf)) * leaf.dtype.itemsize for leaf in leaves)


def _local_shape(leaf: Any) -> tuple[int, ...]:
    sharding = getattr(leaf, "sharding", None)
    return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)


# ---- memory -------------------------------------------------------------------------------------------------------

# Bytes that the program for a step needs beside what its formula names, counted in compiled programs: in backward,
# [M, F] arrays (less gate and up where they are kept: their gradients take their place), [M, D] arrays and decoded
# weights [F, D] that live at once, and copies of the trained leaves in another layout. The pairs: layers written out,
# layers in a loop. Where layers are written out, what is not computed again does not need its part. DoRA's gains, whose
# gradients need what they scale, come with further [M, F] arrays.
_MLP_ARRAYS, _MORE_WITH_DORA = 3.2, 4.0
_MORE_FUSED = 3.5  # in 16 bits, where one weight makes gate and up: these and their gradients lie together and apart
_HIDDEN_ARRAYS, _DECODED, _LAYOUTS = (6.25, 6.0), (2.65, 3.0), (0.0, 1.0)
_LEAST_HIDDEN_ARRAYS, _LEAST_DECODED = 2.0, 1.0
_MORE_IN_PARTS = 2.5  # of the hidden arrays, where feed-forward layers take rows in parts
_BACKWARD_OF_CUDNN = 3.0  # [M, heads] arrays of attention's backward, which a compiler counts only where there is a GPU
_DECODED_EXPERTS, _LEAST_DECODED_EXPERTS = (2.0, 3.0), 1.4
_PAIR_ARRAYS = 3.5  # [M k, D] of the tokens' pairs with experts: inputs, outputs, and their gradients
_LOSS_HIDDEN_ARRAYS = 3.0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a step by part. Of `loss` and `backward`, which never live at once, the peak has the larger."""

    weights: int
    adapters: int
    optimizer: int
    inputs: int  # rows of an embedding table that is not on the device
    kept: dict[str, int]  # by name, what the layers keep on the device for backward
    loss: int  # working set of lm_head and loss
    backward: int  # gradients, and the working set of one layer
    host: int  # pinned on the host

    @property
    def total(self) -> int:
        """Peak on the device."""
        held = self.weights + self.adapters + self.optimizer + self.inputs + sum(self.kept.values())
        return held + max(self.loss, self.backward)


def memory(work: Workload, plan: RematPlan, card: Card) -> Memory:
    """Estimates the bytes of a step.

    Raises:
      ValueError: the plan is for another number of layers.
    """
    a, rows, groups = work.itemsize, work.tokens, plan.resolve(work.config.num_layers)
    kept: dict[str, int] = dict.fromkeys(NAMES, 0)
    looped = _looped(work, plan)
    host, unnamed, workspace, ahead = 0, 0, 0.0, 0.0
    for layer, count, actions in _by_kind(work.config, groups):
        w, moved = layer_widths(work.config, layer), 0
        for name, size in work.kept_bytes(layer, actions).items():
            if actions.get(name) == "offload":
                moved += size
            else:
                kept[name] += count * size
        host += count * moved
        if ALL in actions:  # the norms' results and the like
            unnamed += count * (3 if looped else 1) * rows * w.hidden * a
            unnamed += 0 if looped or not work.nf4 else count * a * _kept_weights(w)
        arrays = (
            _mlp_arrays(actions)
            + _MORE_WITH_DORA * work.dora
            + _MORE_FUSED * (work.config.fused_gate_up and not work.nf4)
        )
        here = a * arrays * _rows_at_once(work, plan, actions) * w.mlp
        hidden, decoded, least = _HIDDEN_ARRAYS[looped], _DECODED[looped], _LEAST_DECODED
        if w.experts > 1:
            decoded, least = _DECODED_EXPERTS[looped], _LEAST_DECODED_EXPERTS
        if not looped:
            missing = 0 if ALL in actions else len(_missing(actions)) / len(_BUNDLES)
            hidden = _LEAST_HIDDEN_ARRAYS + missing * (hidden - _LEAST_HIDDEN_ARRAYS)
            decoded = least + missing * (decoded - least)
        if plan.mlp_rows is not None:  # the loop over parts has its input, output and their gradients whole
            by_cudnn = _by_cudnn(work, plan.flash_attention)
            here = max(here, a * rows * _BACKWARD_OF_CUDNN * w.attention * by_cudnn)  # never at once
            here += a * rows * (_MORE_IN_PARTS * w.hidden + w.k + w.v)
        here += a * _PAIR_ARRAYS * rows * w.pairs * w.hidden
        here += a * work.config.fused_qkv * rows * (w.q + w.k + w.v)  # together and apart
        here += a * (hidden * rows * w.hidden + decoded * w.experts * w.hidden * w.mlp)
        # While one layer's tensors are in use, those of the next are on their way.
        here += _streamed(work, w) * (1 if looped else 2)
        workspace = max(workspace, here + (0 if looped else moved))
        if not looped:  # the last layer's turn comes after the loss, and what it needs is made or fetched early
            ahead = moved + a * work.nf4 * w.hidden * w.mlp
    gradients = 1 + (work.accumulation > 1) + _LAYOUTS[looped] + (len(groups) > 1)
    loss = _loss_bytes(work, card) + work.adapters * _LAYOUTS[looped]
    loss += _LOSS_HIDDEN_ARRAYS * rows * work.config.hidden_size * a + work.head_on_host + ahead
    return Memory(
        weights=work.weights,
        adapters=work.adapters,
        optimizer=work.optimizer,
        inputs=work.offload_embedding * work.accumulation * rows * work.config.hidden_size * a,
        kept={name: size for name, size in {**kept, "unnamed": unnamed}.items() if size},
        loss=int(loss),
        backward=int(gradients * work.adapters + workspace),
        host=host + work.streamed + work.head_on_host,
    )


def _by_cudnn(work: Workload, implementation: str | None) -> bool:
    """Whether attention is cuDNN's, if a plan names this implementation; see `kernels.attention`."""
    from lora_jax.kernels.attention.attention import MANY_QUERIES
    from lora_jax.kernels.dispatch import named

    return work.length >= MANY_QUERIES and (implementation or named("flash_attention")) in (None, "cudnn")


def _streamed(work: Workload, w: Widths) -> float:
    """Bytes of a layer's weights that are copied to the device when it needs them."""
    if not work.streamed:
        return 0.0
    return (
        work.streamed
        * _weights_of(w)
        / sum(_weights_of(layer_widths(work.config, i)) for i in range(work.config.num_layers))
    )


def _weights_of(w: Widths) -> int:
    """Weights of a layer's linear layers."""
    return w.qkv + w.hidden * w.attention + 3 * w.experts * w.hidden * w.mlp


def _mlp_arrays(actions: dict[str, str]) -> float:
    return _MLP_ARRAYS - (2 if ALL in actions else sum(actions.get(name) == "save" for name in ("gate", "up")))


def _keeps_mlp(actions: dict[str, str]) -> bool:
    return ALL in actions or {"gate", "up"} <= actions.keys()


def _rows_at_once(work: Workload, plan: RematPlan, actions: dict[str, str]) -> int:
    """Tokens whose [M, F] arrays live at once in a layer."""
    return work.tokens if plan.mlp_rows is None or _keeps_mlp(actions) else min(plan.mlp_rows, work.tokens)


def _looped(work: Workload, plan: RematPlan) -> bool:
    """Whether a step on a GPU loops over its layers; see `scans_layers`."""
    return work.scan_layers or _must_loop(plan, work.config.num_layers, work.streamed > 0)


def _kept_weights(w: Widths) -> int:
    """Weights of a layer that stay decoded from forward to backward if everything is kept.

    Where layers are written out, the compiler sees that backward decodes weights as forward did, and does it once.
    """
    return _weights_of(w)


def _by_kind(c: "DecoderConfig", groups: list[tuple[int, dict[str, str]]]) -> Iterator[tuple[int, int, dict[str, str]]]:
    """(number of a layer, how many of its group are like it, their actions): all layers, by what they take."""
    start = 0
    for count, actions in groups:
        kinds = Counter(_kinds(c)[start : start + count])
        start += count
        for layer, number in kinds.items():
            yield layer, number, actions


@functools.cache
def _kinds(c: "DecoderConfig") -> tuple[int, ...]:
    """For every layer the first one that is like it."""
    kinds = [(layer_widths(c, layer), window) for layer, window in enumerate(c.windows)]
    return tuple(kinds.index(kind) for kind in kinds)


def _loss_bytes(work: Workload, card: Card) -> int:
    """Logits of one chunk of rows, and their gradient where it does not lie in the same place."""
    from lora_jax.kernels.loss.linear_cross_entropy import chunk_rows

    if work.whole_logits:  # logits, what a loss makes of them, their gradient in float32 and as the matmul takes it
        return work.tokens * work.config.vocab_size * (3 * 4 + work.itemsize)
    size = 2 if card.hopper and work.itemsize == 2 else 4
    rows = min(chunk_rows(work.config.vocab_size, size), work.tokens)
    return rows * work.config.vocab_size * (size if size == 2 else size + work.itemsize)


# ---- time ---------------------------------------------------------------------------------------------------------

# What backward computes again where it is not kept: names that come out of one operation, which are worth keeping only
# together, and the operation.
_BUNDLES = {
    ("q", "k", "v"): "qkv",
    ("attention", "attention_lse"): "attention",
    ("residual",): "o",
    ("gate",): "gate",
    ("up",): "up",
}


def scans_layers(plan: RematPlan, num_layers: int, streamed: bool = False) -> bool:
    """Whether a step loops over its layers if nobody says: a loop compiles sooner, written out they run faster.

    With feed-forward layers in parts, which is for those who have no memory to spare, a loop takes less of it. Weights
    that are `streamed` from the host are never in a loop, where they would be waited for.
    """
    from lora_jax.kernels.dispatch import default_platform

    return default_platform() != "gpu" or _must_loop(plan, num_layers, streamed)


def _must_loop(plan: RematPlan, num_layers: int, streamed: bool) -> bool:
    return not streamed and (num_layers > MOST_WRITTEN_OUT or plan.mlp_rows is not None)


def _missing(actions: dict[str, str]) -> list[str]:
    """The operations that backward does again."""
    return [op for names, op in _BUNDLES.items() if not all(name in actions for name in names)]


def seconds(work: Workload, plan: RematPlan, card: Card) -> dict[str, float]:
    """Estimates the seconds of a step by part: "forward", "backward", "recomputation", "copies", "head", "optimizer".

    "copies" are kept tensors on their way to and from the host, as far as the GPU waits for them, and where layers are
    a loop into and out of the arrays that hold those of all layers. Raises ValueError if the plan is for another number
    of layers.
    """
    m, a, slow = work.tokens, work.itemsize, _ELEMENTWISE * card.bandwidth * 1e9
    link = _LINK * card.host_bandwidth * 1e9
    forward = backward = again = copies = 0.0
    looped = _looped(work, plan)
    for layer, count, actions in _by_kind(work.config, plan.resolve(work.config.num_layers)):
        w, sizes = layer_widths(work.config, layer), work.kept_bytes(layer, actions)
        cost = _layer_seconds(work, card, layer)
        cost["attention"] *= _MOSAIC if plan.flash_attention == "mosaic" else 1
        # Bytes of norms, rotations, activation, residual additions and adapters, read and written, forward.
        light = m * a * (11 * w.hidden + 2 * w.q + 2 * w.attention + w.k + w.v + 3 * w.mlp) / slow
        # Of the adapters alone dA and dB: two passes over inputs and gradients of all linear layers.
        adapters = m * a * (4 * w.hidden + w.q + w.attention + w.k + w.v + 3 * w.mlp) / slow
        of_pairs = [passes * m * a * w.pairs * w.hidden / slow for passes in _PAIR_PASSES]
        ahead = sum(cost.values()) + light + of_pairs[0]
        back = sum(cost.values()) + _ATTENTION_BACKWARD * cost["attention"] + 1.75 * light + adapters + of_pairs[1]
        forward += count * ahead
        backward += count * back
        fetch = _streamed(work, w) / link
        if ALL in actions:
            if work.nf4 and not looped and not fetch:
                backward -= count * _decode_seconds(card, _kept_weights(w))
            copies += count * sum(max(0.0, fetch - (0 if looped else _OVERLAP * busy)) for busy in (ahead, back))
            copies += count * looped * 2 * sum(sizes.values()) / (_COPY * card.bandwidth * 1e9)
            continue
        # Weights are decoded in every part again: gate, up and down forward, computing them again, and backward.
        parts = -(-m // _rows_at_once(work, plan, actions))
        anew = work.nf4 * (parts - 1) * _decode_seconds(card, 8 * w.experts * w.hidden * w.mlp)
        missing = _missing(actions)
        anew += sum(cost[op] for op in missing) + light * (0.3 + 0.1 * len(missing)) + of_pairs[2]
        rounded = [size for name, size in work.named_bytes(layer).items() if actions.get(name) == "save_quantized"]
        anew += _ROUNDING_PASSES * sum(rounded) / slow
        again += count * anew
        moved = [size / link for name, size in sizes.items() if actions.get(name) == "offload"]
        if looped:
            stacked = sum(size for name, size in sizes.items() if actions.get(name) in ("save", "save_quantized"))
            copies += count * 2 * (stacked / (_COPY * card.bandwidth * 1e9) + sum(moved) + fetch)
        else:
            copies += count * sum(_waiting(moved, busy, fetch) for busy in (ahead, back + anew))
    head = 4 * m * work.config.vocab_size * work.config.hidden_size / (_MATMUL * card.tflops * 1e12)
    copies += work.head_on_host / link
    micro = {"forward": forward, "backward": backward, "recomputation": again, "copies": copies, "head": head}
    parts = {name: work.accumulation * value for name, value in micro.items()}
    return {**parts, "optimizer": 7 * work.adapters / (_COPY * card.bandwidth * 1e9)}


def _waiting(copies: list[float], busy: float, fetch: float = 0.0) -> float:
    """Seconds that the GPU waits for copies that take so many seconds each, while a layer keeps it busy otherwise.

    The compiler has two copies under way at a time: where a layer has more, it waits for the others. (Steps of such
    plans let it have four, which was not timed yet, so that this choice does not count on it.) To `fetch` the next
    layer's weights takes the same link.
    """
    copies = sorted(copies)
    return sum(copies[:-2]) + max(0.0, sum(copies[-2:]) + fetch - _OVERLAP * busy)


def model_flops(work: Workload) -> float:
    """Operations that a step of the model takes, without what is computed again and without the adapters.

    A frozen weight takes 4 for a token, 2 forward and 2 for the gradient of its input; the two products of attention
    forward are five backward.
    """
    total = 4.0 * work.tokens * work.config.vocab_size * work.config.hidden_size
    for layer in range(work.config.num_layers):
        w = layer_widths(work.config, layer)
        total += 4.0 * work.tokens * (w.qkv + w.hidden * w.attention + 3 * w.hidden * w.mlp)
        total += (
            3.5
            * 2
            * work.tokens
            * _mean_keys(work.length * work.row_devices, work.config.windows[layer])
            * (w.q + w.attention)
        )
    return work.accumulation * total


def _layer_seconds(work: Workload, card: Card, layer: int) -> dict[str, float]:
    """Matmuls, with the decoding of their weights, and attention of one layer, forward."""
    w = layer_widths(work.config, layer)
    used = {"qkv": (w.qkv, 1), "o": (w.hidden * w.attention, 1)}
    used |= {name: (w.hidden * w.mlp, w.experts) for name in ("gate", "up", "down")}
    cost = {name: _matmul_seconds(work, card, *weights) for name, weights in used.items()}
    # 2 operations for every query, feature and key that it sees, in each of the two products.
    keys = _mean_keys(work.length * work.row_devices, work.config.windows[layer])
    flops = 2 * work.tokens * keys * (w.q + w.attention)
    reached = min(_LONG_ATTENTION, _ATTENTION * (keys / 1024) ** 0.15)
    return {**cost, "attention": flops / (reached * card.tflops * 1e12)}


def _matmul_seconds(work: Workload, card: Card, parameters: int, stored: int) -> float:
    """One use of a weight, of which `stored` times as much is decoded (0.56 bytes read and 2 written a weight)."""
    flops = 2 * work.tokens * parameters / (_MATMUL * card.tflops * 1e12)
    return flops + work.nf4 * _decode_seconds(card, stored * parameters)


def _decode_seconds(card: Card, weights: int) -> float:
    return weights * 2.56 / (_DECODE * card.bandwidth * 1e9)


def _mean_keys(length: int, window: int | None) -> float:
    """Keys that a query of a causal row sees, on average."""
    if window is None or window >= length:
        return length / 2
    return window - window * window / (2 * length)


# ---- the choice ---------------------------------------------------------------------------------------------------


def budget_of(memory_budget: str | int | None) -> int:
    """Bytes that a step may take: what the user says, or what JAX may take of this device, less 3 % lost in gaps.

    Raises:
      ValueError: the device does not say how much memory it has, or the budget is no amount of memory.
    """
    if memory_budget is not None:
        return parse_bytes(memory_budget)
    if limit := this_card().memory:
        return int(0.97 * limit)
    import jax

    raise ValueError(
        f'remat="auto" fits the step into the memory of the device, and {jax.local_devices()[0]} does not say how much '
        'it has. Give memory_budget="8GB", say, or a preset.'
    )


def fits(need: Memory, budget: int, card: Card) -> bool:
    """Whether a step fits into `budget` bytes of the device, and its offloaded tensors into the host's memory."""
    return need.total <= budget and need.host <= card.host_memory


def choose(work: Workload, card: Card, budget: int, *, quantized_activations: bool = False) -> RematPlan:
    """The fastest plan that needs at most `budget` bytes.

    With `quantized_activations` it may keep tensors in 8 bits, which changes gradients a little.

    Raises:
      MemoryError: no plan fits; the message names a batch and a length that do.
    """
    forms = ("save", "save_quantized") if quantized_activations else ("save",)
    parts = _parts(work, card)
    plans = [plan for form in forms for one in parts if (plan := _choose(work, card, budget, one, form))]
    if not plans:
        raise MemoryError(explain(work, card, budget))
    return min(plans, key=lambda plan: sum(seconds(work, plan, card).values()))


class _Parts(NamedTuple):
    """What makes the working set of a layer smaller, and the step slower."""

    mlp_rows: int | None = None
    flash_attention: str | None = None


def _parts(work: Workload, card: Card) -> list[_Parts]:
    """The ways that may be worth it: with fewer rows at a time decoding costs too much."""
    from lora_jax.kernels.dispatch import named

    ways = [_Parts(), *(_Parts(rows) for rows in (8192, 4096) if work.tokens > rows)]
    if _by_cudnn(work, None) and named("flash_attention") is None and _mosaic_does(work, card):
        ways += [way._replace(flash_attention="mosaic") for way in ways if way.mlp_rows is not None]
    return ways


def _mosaic_does(work: Workload, card: Card) -> bool:
    """Whether Mosaic's attention can take this model's; see kernels/attention/mosaic.py."""
    c = work.config
    odd = c.softcap is not None or c.sinks or c.mla is not None or work.itemsize != 2 or work.row_devices > 1
    return card.hopper and c.head_dim in (64, 128) and not odd


def _choose(work: Workload, card: Card, budget: int, parts: _Parts, form: str) -> RematPlan | None:
    """The fastest plan that works in these parts, or None if none fits.

    For every choice of what goes to the host: from there on greedily, what saves most seconds for its bytes is kept for
    as many layers as fit, then the next.
    """
    layers = work.config.num_layers
    plans = []
    for names in _OFFLOADS:
        if not _whole(names, parts):
            continue
        for count in _counts(work, card, names):
            state = _state(layers, names, count)
            if (plan := _filled(work, card, budget, parts, form, state)) is not None:
                plans.append(plan)
    return min(plans, key=lambda plan: sum(seconds(work, plan, card).values()), default=None)


# What goes to the host: two tensors of a layer at most, see `_waiting`.
_OFFLOADS = [
    (),
    ("input",),
    ("attention",),
    ("gate",),
    ("input", "attention"),
    ("input", "gate"),
    ("attention", "gate"),
    ("gate", "up"),
]


def _counts(work: Workload, card: Card, names: tuple[str, ...]) -> list[int]:
    """The numbers of layers that may well send these tensors to the host: shares of all, and as many as it holds."""
    layers = work.config.num_layers
    if not names:
        return [layers]
    sizes = [sum(work.named_bytes(layer)[name] for name in names) for layer in range(layers)]
    held = int(max(0, card.host_memory - work.streamed) // max(sizes))
    return sorted({min(held, layers), *(math.ceil(share * layers) for share in (1.0, 0.75, 0.5, 0.25))}, reverse=True)


def _state(layers: int, names: tuple[str, ...], count: int) -> list[dict[str, str]]:
    """The actions of every layer if `count` of them, the first, send these tensors to the host and keep no other.

    Of two names with "input" it is the other that only so many layers send.
    """
    first = {"thin": "save", **dict.fromkeys(names, "offload")}
    first |= {"attention_lse": "save"} if "attention" in names else {}
    rest = {name: action for name, action in first.items() if name == "thin" or (name == "input" != names[-1])}
    return [first] * count + [rest] * (layers - count)


def _whole(names: tuple[str, ...], parts: _Parts) -> bool:
    """Whether these tensors exist whole at some time: with `mlp_rows` gate and up are made in parts."""
    return parts.mlp_rows is None or not {"gate", "up"} & set(names)


def _plan_of(state: list[dict[str, str]], parts: _Parts) -> RematPlan:
    groups = [(len(list(run)), actions) for actions, run in itertools.groupby(state)]
    return RematPlan((*groups[:-1], (None, groups[-1][1])), *parts)


def _filled(
    work: Workload, card: Card, budget: int, parts: _Parts, form: str, state: list[dict[str, str]]
) -> RematPlan | None:
    """The plan with these actions of layers, and with what else fits kept on the device; None if it does not fit.

    What is kept is that of the last layers, which is there for the shortest time, as what goes to the host is that of
    the first.
    """
    layers = len(state)

    def plan(state) -> RematPlan:
        return _plan_of(state, parts)

    def time(state) -> float:
        return sum(seconds(work, plan(state), card).values())

    def ok(state) -> bool:
        return fits(memory(work, plan(state), card), budget, card)

    if not ok(state):
        if form != "save_quantized" or any("offload" in actions.values() for actions in state):
            return None
        rounded = {**state[0], "input": form}
        fewer = [rounded] * layers
        if not ok(fewer):
            return None
        exact = _most(layers, lambda n: ok(fewer[n:] + state[layers - n :]))
        return plan(fewer[exact:] + state[layers - exact :])

    def keeping(names, count) -> list[dict[str, str]]:
        more = {name: form if name in QUANTIZABLE else "save" for name in names}
        return [*state[: layers - count], *({**actions, **more} for actions in state[layers - count :])]

    def held(state) -> int:
        return sum(memory(work, plan(state), card).kept.values())

    bundles = [names for names in _BUNDLES if _whole(names, parts)]
    if state[0].get("input") == "offload":  # to keep it costs memory, and spares copies
        bundles.append(("input",))
    while bundles:
        now, bytes_now = time(state), held(state)
        worth = {}
        for names in bundles:
            more = keeping(names, layers)
            worth[names] = (now - time(more)) / max(1, held(more) - bytes_now)
        best = max(bundles, key=lambda names: worth[names])
        if worth[best] <= 0:
            break
        count = _most(layers, lambda n, best=best: ok(keeping(best, n)))
        state = keeping(best, count)
        if count < layers:
            break
        bundles.remove(best)
    everything = [{ALL: "save"}] * layers
    if work.nf4 and not bundles and not _looped(work, plan(state)):  # in a loop it would copy weights
        count = _most(layers, lambda n: ok([*state[: layers - n], *everything[:n]]))
        state = [*state[: layers - count], *everything[:count]]
    return plan(state)


def _most(high: int, condition: Callable[[int], bool]) -> int:
    """The largest number up to `high` that meets a condition which all smaller ones meet; 0 if none does."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if condition(middle) else (low, middle - 1)
    return low


def least(work: Workload, card: Card) -> RematPlan:
    """The plan that needs least memory on the device."""
    return min(_small(work, card), key=lambda plan: memory(work, plan, card).total)


def _small(work: Workload, card: Card) -> list[RematPlan]:
    """Plans of which the one or the other needs least memory; part of the inputs may be too much for the host."""
    layers = work.config.num_layers
    states = [_state(layers, ("input",), count) for count in (0, *_counts(work, card, ("input",)))]
    ways = _parts(work, card)
    return [_plan_of(state, parts) for state in states for parts in ways]


def largest(work: Workload, card: Card, budget: int, plan: RematPlan | None, field: str, step: int = 1) -> int:
    """The largest "batch" or "length", a multiple of `step`, that fits with a plan (None: with some); 0 if none."""

    def ok(n: int) -> bool:
        return _fits(dataclasses.replace(work, **{field: n * step}), card, budget, plan)

    if not ok(1):
        return 0
    high = 2
    while ok(high) and high * step < 2**24:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ok(middle) else (low, middle)
    return low * step


def _fits(work: Workload, card: Card, budget: int, plan: RematPlan | None) -> bool:
    plans = _small(work, card) if plan is None else [plan]
    return any(fits(memory(work, one, card), budget, card) for one in plans)


def explain(work: Workload, card: Card, budget: int, plan: RematPlan | None = None) -> str:
    """Why a step does not fit and what would: with another plan, fewer rows, or shorter ones."""
    need = memory(work, plan or least(work, card), card)
    how = "with any rematerialisation" if plan is None else f"with remat={str(plan)!r}"
    text = (
        f"{work.batch} rows of {work.length} tokens need about {need.total / GIB:.1f} GiB {how}, and "
        f"{budget / GIB:.1f} GiB are there ({need.weights / GIB:.1f} GiB of weights, "
        f"{(need.adapters + need.optimizer) / GIB:.1f} of adapters and optimizer)."
    )
    if need.total <= budget:
        text = (
            f"{work.batch} rows of {work.length} tokens need {need.host / 1e9:.0f} GB of the host's memory, and "
            f"{card.host_memory / 1e9:.0f} GB may be taken: {HOST_LIMIT} lets JAX take more if there is more."
        )
    if plan is not None and _fits(work, card, budget, None):
        return f'{text} With remat="auto" they fit.'
    if (without := _without_table(work)) is not None and _fits(without, card, budget, plan):
        return f"{text} With offload_embedding=True they fit."
    if (without := _without_head(work)) is not None and _fits(without, card, budget, plan):
        return f"{text} With offload_embedding=True and offload_head=True they fit."
    if rows := largest(work, card, budget, plan, "batch"):
        return f"{text} {rows} rows of this length fit."
    one = dataclasses.replace(work, batch=1)
    if length := largest(one, card, budget, plan, "length", 64):
        return f"{text} One row of {length} tokens fits."
    if (streamed := _streaming(work)) is not None and _fits(streamed, card, budget, plan):
        return f"{text} With offload_layers=True, which keeps weights in the host's memory, they fit."
    if work.nf4:
        return f"{text} Not even one short row fits: take a smaller model or a larger GPU."
    return f"{text} Not even one short row fits: load_in_4bit=True needs about a quarter of the memory for weights."


def _without_table(work: Workload) -> Workload | None:
    """The step with the embedding table in the host's memory; None if it is there, or is the head too."""
    if work.offload_embedding or work.config.tie_embeddings:
        return None
    table = _table_bytes(work.config, work.itemsize)
    return dataclasses.replace(work, weights=work.weights - table, offload_embedding=True)


def _without_head(work: Workload) -> Workload | None:
    """The step with embedding table and head in the host's memory; None if the head is there, or is the table."""
    if work.head_on_host or work.config.tie_embeddings:
        return None
    table, work = _table_bytes(work.config, work.itemsize), _without_table(work) or work
    return dataclasses.replace(work, weights=work.weights - table, head_on_host=table)


def _streaming(work: Workload) -> Workload | None:
    """The step with the layers' NF4 weights in the host's memory, about; None if they are there, or not in NF4."""
    if work.streamed or not work.nf4:
        return None
    config = work.config
    weights = sum(_weights_of(layer_widths(config, i)) for i in range(config.num_layers))
    # Two weights a byte. What is left are scales, and tables in 16 bits.
    streamed = min(int(0.9 * work.weights), weights // 2)
    return dataclasses.replace(work, weights=work.weights - streamed, streamed=streamed)


def refuse_what_cannot_fit(
    hf_config: dict[str, Any],
    lora_config: "LoraConfig",
    args: "SFTConfig",
    *,
    load_in_4bit: bool,
    dtype: str | None,
    offload_embedding: bool = False,
    offload_head: bool = False,
    offload_layers: bool = False,
) -> None:
    """Raises MemoryError if a run cannot fit this device, before its weights are loaded.

    Rows are known only later, unless they are packed: what is asked here is whether even short ones could fit. Nothing
    is refused for the 10 % by which the estimate may be too high.

    Raises:
      MemoryError: it cannot fit; says what would.
      ValueError: gradient_checkpointing="auto" on a device that does not say how much memory it has.
    """
    try:
        budget = budget_of(args.memory_budget)
    except ValueError:
        if args.remat == "auto":
            raise
        return
    work = of_config(
        hf_config,
        lora_config,
        args.per_device_train_batch_size,
        args.max_length if args.packing and args.max_length else 64,
        accumulation=args.gradient_accumulation_steps,
        load_in_4bit=load_in_4bit,
        dtype=dtype,
        optim=args.optim,
        offload_embedding=offload_embedding,
        offload_head=offload_head,
        offload_layers=offload_layers,
    )
    plan, card = None if args.remat == "auto" else RematPlan.of(args.remat), this_card()
    if not _fits(work, card, int(1.1 * budget), plan):
        raise MemoryError(explain(work, card, budget, plan))
