"""LoRA adapters: which layers get one, how it starts, and how many parameters that trains."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.model import CausalLM
from lora_jax.models.decoder import Block, Decoder, full_names
from lora_jax.models.linear import Embedding, Linear
from lora_jax.models.moe import ExpertLinear

__all__ = [
    "DEFAULT_TARGETS",
    "LoraConfig",
    "adapter_shapes",
    "add_adapters",
    "for_decoder",
    "get_peft_model",
    "parameter_counts",
    "regex_of",
    "target_names_for_peft",
]

# The linears of a block of most architectures, all of which get an adapter unless told otherwise.
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Names that a model with fused projections does not have -> what it has instead.
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
_FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
# Names that a model whose head is its embedding matrix has for both.
_TIED = {"lm_head": "embed_tokens"}
_ROUTERS = ("gate", "router", "shared_expert_gate")  # of mixtures of experts: they get an adapter only by their name


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """An adapter's shape, with PEFT's field names."""

    r: int = 16  # rank
    lora_alpha: float = 16  # the product is scaled by lora_alpha / r
    lora_dropout: float = 0.0  # probability that an input element of the adapter is zeroed in training
    target_modules: tuple[str, ...] | str | None = None  # names, "all-linear" (None is the same), regex of full names
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) instead (Kalajdzievski, arXiv 2312.03732)
    layers_to_transform: tuple[int, ...] | None = None  # numbers of the layers that get one; None for all
    modules_to_save: tuple[str, ...] = ()  # "lm_head", "embed_tokens": trained as whole copies
    random_state: int = 3407  # seed of A

    def __post_init__(self):
        """Makes tuples of lists. Raises ValueError for values outside their range."""
        layers = self.layers_to_transform
        plain = {
            "target_modules": self.target_modules,
            "layers_to_transform": (layers,) if isinstance(layers, int) else layers,
            "modules_to_save": self.modules_to_save or (),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value if value is None or isinstance(value, str) else tuple(value))
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r is the rank of the adapter and must be a whole number of at least 1, got {self.r!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is a probability in [0, 1), got {self.lora_dropout!r}")
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha must be a number above 0, got {self.lora_alpha!r}")
        if self.layers_to_transform == ():
            raise ValueError("layers_to_transform is empty: no layer would get an adapter; None is for all layers")
        if unknown := set(self.modules_to_save) - {"lm_head", "embed_tokens"}:
            raise ValueError(
                f"modules_to_save: {sorted(unknown)} cannot be trained whole; 'lm_head', 'embed_tokens' can"
            )

    @property
    def scale(self) -> float:
        """Factor of the adapter's product."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def get_peft_model(
    model: CausalLM,
    peft_config: LoraConfig | None = None,
    *,
    r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
    use_rslora: bool = False,
    layers_to_transform: int | Iterable[int] | None = None,
    modules_to_save: Sequence[str] | None = None,
    random_state: int = 3407,
    verbose: bool = True,
) -> CausalLM:
    """Adds LoRA adapters to a model, in place, and returns it.

    A starts uniform in +-1 / sqrt(K), B at zero (PEFT's default for linear layers), so the model is unchanged until it
    is trained.

    Args:
      model: from `from_pretrained`.
      peft_config: all settings in one; otherwise they are taken from the arguments below.
      r: rank.
      lora_alpha: the adapter's product is scaled by lora_alpha / r.
      lora_dropout: probability that an input element of an adapter is zeroed in training.
      target_modules: names of linear layers ("q_proj", "lm_head" ...), "all-linear" (all but lm_head), or a regex that
        must match a module's full name ("model.layers.3.mlp.up_proj"); None for all linears of a block. The experts of
        a layer get adapters together; a router ("gate") gets one only if it is in a list of names or a regex.
      use_rslora: scale by lora_alpha / sqrt(r).
      layers_to_transform: numbers of the layers that get an adapter; None for all.
      modules_to_save: "embed_tokens" or "lm_head", trained as a whole copy instead of by an adapter. Where head and
        embeddings are one matrix, either name, here and among the targets, means that matrix, in both its places, as
        with PEFT's `ensure_weight_tying`.
      random_state: seed of A.
      verbose: print how many parameters are trained.

    Raises:
      ValueError: the model has an adapter already, a target matches nothing, or a setting is out of range.
    """
    if peft_config is None:
        peft_config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=target_modules,  # pyright: ignore[reportArgumentType] (LoraConfig makes tuples)
            use_rslora=use_rslora,
            layers_to_transform=layers_to_transform,  # pyright: ignore[reportArgumentType]
            modules_to_save=modules_to_save,  # pyright: ignore[reportArgumentType]
            random_state=random_state,
        )
    if model.lora_config is not None:
        raise ValueError("the model has an adapter already; load the base model again to start another")
    peft_config = for_decoder(model.module, peft_config)
    add_adapters(model.module, peft_config)
    model.lora_config = peft_config
    if verbose:
        trainable, total = parameter_counts(model)
        print(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")
    return model


def for_decoder(decoder: Decoder, config: LoraConfig) -> LoraConfig:
    """The same adapter, "lm_head" being called "embed_tokens" where these are one matrix."""
    if decoder.lm_head is not None:
        return config
    names = {"modules_to_save": config.modules_to_save}
    if isinstance(config.target_modules, tuple):
        names["target_modules"] = config.target_modules
    once = {field: tuple(dict.fromkeys(_TIED.get(name, name) for name in found)) for field, found in names.items()}
    return dataclasses.replace(config, **once)  # pyright: ignore[reportArgumentType]


def add_adapters(decoder: Decoder, config: LoraConfig) -> None:
    """Puts fresh adapters and trained copies into a decoder, cutting its stacks where only some layers get one.

    Raises:
      ValueError: a target matches nothing, or a layer does not exist.
    """
    config = for_decoder(decoder, config)
    layers = range(decoder.config.num_layers)
    targets = _target_names(decoder, config)
    _cut_stacks(decoder, [frozenset(_targets_of_layer(decoder, targets, i)) for i in layers])
    key = jax.random.key(config.random_state)
    for name, stack, module in decoder.named_modules():
        if not isinstance(module, Linear | Embedding):
            continue
        mine = {full for full, _ in full_names(name, stack, module)}
        if mine & targets:
            if missing := sorted(mine - targets):
                raise ValueError(f"target_modules: all experts of a layer get an adapter or none, not {missing[0]}")
            n, k = module.features
            lead = module.weight.get_value().shape[:-2]
            # The name keys the draw, so that the start does not depend on which other modules are adapted.
            rng = jax.random.fold_in(key, _hash(name))
            if stack is not None:
                rng = _fold_in_each(rng, stack.first + jnp.arange(stack.count))
            if isinstance(module, ExpertLinear):
                rng = jax.vmap(lambda rng, n=module.experts: _fold_in_each(rng, jnp.arange(n)))(rng)
            module.lora_a = nnx.LoRAParam(_uniform(rng, k, config.r))
            module.lora_b = nnx.LoRAParam(jnp.zeros((*lead, config.r, n), jnp.float32))
            module.scale, module.dropout = config.scale, config.lora_dropout
        if name.rpartition(".")[2] in config.modules_to_save:
            module.trained = nnx.LoRAParam(jnp.array(module.weight.get_value(), jnp.float32))


def parameter_counts(model: CausalLM) -> tuple[int, int]:
    """(trained, all) parameters; an NF4 weight counts its logical size."""
    trained = sum(np.size(leaf) for leaf in jax.tree.leaves(model.split()[1]))
    frozen = sum(math.prod(slot.shape) for slot in model.module.slots().values())
    return trained, trained + frozen


def adapter_shapes(model: CausalLM, config: LoraConfig) -> dict[str, tuple[int, int]]:
    """(K, N) of every module that `get_peft_model` would give an adapter, by full name; raises as that does."""
    slots, config = model.module.slots(), for_decoder(model.module, config)
    shapes = {name: slots[f"{name}.weight"].shape for name in sorted(_target_names(model.module, config))}
    # An embedding looks up rows: its input dimension is the first.
    return {name: (n, k) if name.endswith("embed_tokens") else (k, n) for name, (n, k) in shapes.items()}


def target_names_for_peft(model: CausalLM) -> list[str] | str:
    """`target_modules` as PEFT understands it: a regex as it is, otherwise a list of names.

    "all-linear" is written out, since which modules that means depends on the reader's version; so is a regex beside
    `layers_to_transform`, which PEFT does not take together, and so is everything of a model that reads images too,
    whose vision tower has modules of the same names. Of a mixture of experts, whose names transformers 5 has changed,
    PEFT takes the last parts of names, or else a regex that matches experts without their numbers, too.
    """
    assert model.lora_config is not None
    targets = model.lora_config.target_modules
    adapted = _target_names(model.module, model.lora_config)
    if model.config.hf_prefix != "model":
        return sorted(adapted)
    if targets is None or targets == "all-linear":
        return sorted({name.rpartition(".")[2] for name in adapted})
    if model.config.moe is not None:
        everything = dataclasses.replace(model.lora_config, target_modules=".*", modules_to_save=(), lora_dropout=0.0)
        others = _target_names(model.module, everything) - adapted
        last = {name.rpartition(".")[2] for name in adapted}
        return regex_of(adapted) if last & {name.rpartition(".")[2] for name in others} else sorted(last)
    if isinstance(targets, str) and model.lora_config.layers_to_transform is not None:
        return sorted(adapted)
    return targets if isinstance(targets, str) else sorted(targets)


def regex_of(names: Iterable[str]) -> str:
    """A regular expression that the full names of some modules match, and no others.

    It matches all experts of a layer, and names without the expert's number.
    """
    layers: dict[str, set[int]] = {}
    for name in names:
        before, found, after = re.sub(r"\.experts\.\d+\.", ".experts.", name).partition(".layers.")
        number, _, rest = after.partition(".")
        layers.setdefault(f"{before}{found}*.{rest}" if found else name, set()).update([int(number)] if found else [])
    return "|".join(
        re.escape(name)
        .replace(r"\*", f"({'|'.join(map(str, sorted(numbers)))})")
        .replace(r"\.experts\.", r"\.experts(\.\d+)?\.")
        .replace("block_sparse_moe", "(block_sparse_moe|mlp)")
        for name, numbers in sorted(layers.items())
    )


def _target_names(decoder: Decoder, config: LoraConfig) -> set[str]:
    """Full names of the modules that get an adapter."""
    layers = set(range(decoder.config.num_layers))
    selected = layers if config.layers_to_transform is None else set(config.layers_to_transform)
    if outside := sorted(selected - layers):
        raise ValueError(f"layers_to_transform names {outside}, the model has layers 0 to {max(layers)}")
    names = [
        full
        for name, stack, module in decoder.named_modules()
        if isinstance(module, Linear | Embedding)
        for full, index in full_names(name, stack, module)
        # A module outside the layers is in no selection of layers, as PEFT has it.
        if (config.layers_to_transform is None if stack is None else stack.first + _layer(index) in selected)
    ]
    chosen = _matching(names, config)
    trained = {name.rpartition(".")[2] for name in chosen}
    if twice := trained & set(config.modules_to_save):
        raise ValueError(f"{sorted(twice)}: either target_modules or modules_to_save, not both")
    heads = {"lm_head", *_ROUTERS} | ({"embed_tokens"} if decoder.lm_head is None else set())
    if config.lora_dropout and (without := trained & heads):
        name = min(without)
        raise ValueError(f"lora_dropout on {name} is not implemented; leave {name} out, or train without dropout")
    return chosen


def _layer(index) -> int:
    return index[0] if isinstance(index, tuple) else index


def _matching(names: list[str], config: LoraConfig) -> set[str]:
    """Those of the modules that target_modules means."""
    wanted = config.target_modules
    if wanted is None or wanted == "all-linear":
        return {name for name in names if name.rpartition(".")[2] not in ("lm_head", "embed_tokens", *_ROUTERS)}
    if isinstance(wanted, str):
        try:
            chosen = {name for name in names if re.fullmatch(wanted, name)}
        except re.error as error:
            raise ValueError(f"target_modules={wanted!r} is not a regular expression: {error}") from None
        unmatched = [] if chosen else [wanted]
    else:
        chosen = {name for name in names if not _endings(name).isdisjoint(wanted)}
        there = set().union(*map(_endings, names))
        unmatched = [w for w in wanted if w not in there]
    known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    if unmatched:
        parts = {w: _FUSED[w] for w in unmatched if _FUSED.get(w) in known.split(", ")}
        hint = "".join(f"; {part} is a part of {whole} in this model" for part, whole in parts.items())
        which = ", ".join(map(repr, unmatched))
        raise ValueError(f"target_modules: {which} matches no module; there are {known}{hint}")
    if not chosen and not config.modules_to_save:
        raise ValueError("target_modules is empty: nothing would be trained")
    return chosen


def _endings(name: str) -> set[str]:
    """ "a.b.c" -> "a.b.c", "b.c", "c"."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _targets_of_layer(decoder: Decoder, targets: set[str], layer: int) -> list[str]:
    patterns = {name for name, stack, _ in decoder.named_modules() if stack is not None}
    return [pattern for pattern in patterns if pattern.format(layer).replace("*", "0") in targets]


def _cut_stacks(decoder: Decoder, kinds: list) -> None:
    """Cuts the decoder's stacks so that all layers of one have the same kind."""
    stacks = []
    for stack in decoder.layers:
        layers = list(range(stack.first, stack.first + stack.count))
        starts = [i for i in layers if i == layers[0] or kinds[i] != kinds[i - 1]]
        if len(starts) == 1:
            stacks.append(stack)
            continue
        pieces = [(a, b - a) for a, b in zip(starts, [*starts[1:], layers[-1] + 1], strict=True)]
        stacks.extend(_cut(stack, pieces))
    decoder.layers = nnx.List(stacks)


def _cut(stack: Block, pieces: list[tuple[int, int]]) -> list[Block]:
    """The stack as several: (first layer, count) each. Leaf by leaf, so that the weights are not held twice."""
    graph, state = nnx.split(stack)
    leaves, structure = jax.tree.flatten(state)
    parts: list[list] = [[] for _ in pieces]
    for leaf in leaves:
        for part, (first, count) in zip(parts, pieces, strict=True):
            part.append(leaf[first - stack.first :][:count])
        leaf.delete()
    blocks = []
    for part, (first, count) in zip(parts, pieces, strict=True):
        block = nnx.merge(graph, jax.tree.unflatten(structure, part))
        block.first, block.count = first, count
        blocks.append(block)
    return blocks


def _uniform(rng: jax.Array, k: int, r: int) -> jax.Array:
    """A [..., K, R] uniform in +-1 / sqrt(K), float32: PEFT's kaiming_uniform with a = sqrt(5). One key a layer."""

    def draw(key):
        return jax.random.uniform(key, (k, r), jnp.float32, -(k**-0.5), k**-0.5)

    for _ in range(rng.ndim):
        draw = jax.vmap(draw)
    return draw(rng)


def _fold_in_each(rng: jax.Array, numbers: jax.Array) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(rng, i))(numbers)


def _hash(name: str) -> int:
    """A number of 31 bits that is the same in every process."""
    import zlib

    return zlib.crc32(name.encode()) & 0x7FFFFFFF
