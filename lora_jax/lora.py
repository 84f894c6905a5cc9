"""LoRA adapters: which layers get one, how it starts, and how many parameters that trains."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.config import Names, did_you_mean, explained, resolve_names, say_once
from lora_jax.kernels.nf4 import NF4Weight
from lora_jax.lora_init import check_kind, from_weights, norms_of_rows, starts_in_weight
from lora_jax.model import CausalLM
from lora_jax.models.decoder import Block, Decoder, full_names
from lora_jax.models.linear import Embedding, Linear
from lora_jax.models.moe import ExpertLinear, Router
from lora_jax.models.streamed import to_device

__all__ = [
    "DEFAULT_TARGETS",
    "LoraConfig",
    "adapter_shapes",
    "add_adapters",
    "for_decoder",
    "get_peft_model",
    "parameter_counts",
    "print_trainable_parameters",
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


# Fields of PEFT's LoraConfig that are not below.
_NAMES = Names(
    aliases={"rank": "r", "alpha": "lora_alpha", "lora_rank": "r"},
    no_effect={
        "task_type": "every model here is a causal language model",
        "inference_mode": "generation and training use the same model",
        "base_model_name_or_path": "the model knows where it came from",
        "revision": "the model knows where it came from",
        "auto_mapping": "classes are found by the architecture's name",
        "peft_type": "every adapter here is LORA",
        "ensure_weight_tying": "where head and embeddings are one matrix, they are trained as one",
        "runtime_config": "it is about torch",
        "megatron_core": "there is no Megatron here",
    },
    refused={
        "bias": (("none",), "biases stay frozen; leave it out"),
        "lora_bias": ((False,), "adapters have no bias; leave it out"),
        "fan_in_fan_out": ((False,), "no implemented architecture stores its weights that way round"),
        "exclude_modules": ((None,), "write target_modules as a regular expression that leaves them out"),
        "target_parameters": ((None, []), "name the experts' linears in target_modules; exports choose PEFT's form"),
        "layer_replication": ((None,), "leave it out"),
        "trainable_token_indices": ((None,), 'train the whole matrix with modules_to_save=["embed_tokens"]'),
        "use_qalora": ((False,), "leave it out"),
        "qalora_group_size": ((16, None), "leave it out"),
        "alora_invocation_tokens": ((None,), "leave it out"),
        "megatron_config": ((None,), "leave it out"),
        "eva_config": ((None,), "leave it out, and choose another init_lora_weights"),
        "corda_config": ((None,), "leave it out, and choose another init_lora_weights"),
        "lora_ga_config": ((None,), "leave it out, and choose another init_lora_weights"),
        "arrow_config": ((None,), "leave it out"),
        "velora_config": ((None,), "leave it out"),
        "monteclora_config": ((None,), "leave it out"),
        "kasa_config": ((None,), "leave it out"),
        "use_bdlora": ((None,), "leave it out"),
    },
)


@explained(_NAMES)
@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """An adapter's shape, with PEFT's field names.

    PEFT's other fields are accepted where they ask for nothing. Raises TypeError for an unknown name, ValueError for a
    value out of range and for what is not implemented.
    """

    r: int = 16  # rank
    lora_alpha: float = 16  # the product is scaled by lora_alpha / r
    lora_dropout: float = 0.0  # probability that an input element of the adapter is zeroed in training
    target_modules: tuple[str, ...] | str | None = None  # names, "all-linear" (None is the same), regex of full names
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) instead (Kalajdzievski, arXiv 2312.03732)
    layers_to_transform: tuple[int, ...] | None = None  # numbers of the layers that get one; None for all
    modules_to_save: tuple[str, ...] = ()  # "lm_head", "embed_tokens": trained as whole copies
    random_state: int = 3407  # seed of A
    use_dora: bool = False  # the rows of W + s (A B)^T are normed and get trained lengths (arXiv 2402.09353)
    # True: B = 0 and A uniform. "gaussian": A normal. "pissa", "pissa_niter_N" (N steps of a faster decomposition),
    # "olora", "loftq": see lora_jax.lora_init.
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)  # name or regex of names' ends -> its r
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)  # likewise -> its lora_alpha
    layers_pattern: str | None = None  # name of the list of layers, for layers_to_transform; there is only "layers"
    loftq_config: Mapping[str, Any] | None = None  # for "loftq": loftq_bits 4 and loftq_iter 1 are what there is

    def __post_init__(self):
        """Makes tuples of lists. Raises ValueError for values outside their range."""
        layers, pattern = self.layers_to_transform, self.layers_pattern
        plain = {
            "target_modules": self.target_modules,
            "layers_to_transform": (layers,) if isinstance(layers, int) else layers,
            "modules_to_save": self.modules_to_save or (),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value if value is None or isinstance(value, str) else tuple(value))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                where = "r" if name == "r" else f"rank_pattern[{name!r}]"
                raise ValueError(
                    f"{where} is the rank of the adapter and must be a whole number of at least 1, got {rank!r}"
                )
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is a probability in [0, 1), got {self.lora_dropout!r}")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not 0 < alpha < math.inf:
                raise ValueError(f"lora_alpha must be a number above 0, got {alpha!r}")
        if self.layers_to_transform == ():
            raise ValueError("layers_to_transform is empty: no layer would get an adapter; None is for all layers")
        if pattern is not None:
            patterns = {pattern} if isinstance(pattern, str) else set(pattern)
            if not patterns <= {"layers", "model.layers"}:
                raise ValueError(
                    f"layers_pattern={pattern!r}: the list of layers is called 'layers' in every model here"
                )
            object.__setattr__(self, "layers_pattern", "layers")
        if unknown := set(self.modules_to_save) - {"lm_head", "embed_tokens"}:
            raise ValueError(
                f"modules_to_save: {sorted(unknown)} cannot be trained whole; 'lm_head', 'embed_tokens' can"
            )
        self._check_start()

    def _check_start(self) -> None:
        kind = self.start
        if starts_in_weight(kind) and self.lora_dropout:
            raise ValueError(
                f"init_lora_weights={kind!r} with lora_dropout={self.lora_dropout}: the adapter is the principal part "
                "of the weight, which dropout would discard; set lora_dropout=0"
            )
        if kind not in ("default", "gaussian") and self.use_dora:
            raise ValueError(f"use_dora=True and init_lora_weights={kind!r} are not implemented together; use one")
        wanted = {"loftq_bits": 4, "loftq_iter": 1}
        given = dict(self.loftq_config or {})
        if unknown := {k: v for k, v in given.items() if v != wanted.get(k)}:
            raise ValueError(
                f"loftq_config={unknown}: there is {wanted} only, since further iterations change the base weights, "
                "and the adapter would fit no base but that one"
            )
        if given and kind != "loftq":
            raise ValueError('loftq_config is for init_lora_weights="loftq"')

    @property
    def start(self) -> str:
        """How it starts: "default", "gaussian", or one of `lora_init.FROM_WEIGHT`."""
        return check_kind(self.init_lora_weights)

    @property
    def scale(self) -> float:
        """Factor of the adapter's product, of modules that no pattern names."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its full name."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float:
        """The lora_alpha of a module, by its full name."""
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha)

    def scale_of(self, module: str) -> float:
        """Factor of the adapter's product, of one module."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that is the module's name, or a regex of its end, as PEFT reads patterns."""
    return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


# Arguments of Unsloth's get_peft_model that are no field of LoraConfig.
_UNSLOTH = Names(
    aliases=_NAMES.aliases,
    no_effect={
        **_NAMES.no_effect,
        "max_seq_length": "it was given to from_pretrained",
        "temporary_location": "nothing is written",
        "unsloth_tiled_mlp": "the feed-forward layer is computed in parts where a plan of rematerialisation says so",
    },
    refused={
        **_NAMES.refused,
        "qat_scheme": ((None,), "quantisation-aware training is not implemented"),
        "finetune_vision_layers": ((False, None), "models of text only are trained"),
        "finetune_audio_layers": ((False, None), "models of text only are trained"),
        "finetune_language_layers": ((True, None), "they are all that there is"),
        "finetune_attention_modules": ((True, None), "leave q_proj, k_proj, v_proj, o_proj out of target_modules"),
        "finetune_mlp_modules": ((True, None), "leave gate_proj, up_proj, down_proj out of target_modules"),
        "finetune_last_n_layers": ((None,), "give the numbers of these layers as layers_to_transform"),
    },
)


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
    use_gradient_checkpointing: bool | str | None = None,
    verbose: bool = True,
    **more: Any,
) -> CausalLM:
    """Adds LoRA adapters to a model, in place, and returns it.

    A starts uniform in +-1 / sqrt(K), B at zero (PEFT's default for linear layers), so the model is unchanged until it
    is trained; so it is with every `init_lora_weights` but "loftq".

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
      use_gradient_checkpointing: for scripts written for Unsloth; `SFTConfig(gradient_checkpointing=...)` decides.
      verbose: print how many parameters are trained.
      more: the other fields of `LoraConfig`: use_dora, init_lora_weights, rank_pattern, alpha_pattern ...

    Raises:
      ValueError: the model has an adapter already, a target matches nothing, or a setting is out of range.
      TypeError: an unknown argument.
    """
    if peft_config is None:
        fields = [field.name for field in dataclasses.fields(LoraConfig)]
        peft_config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=target_modules,  # pyright: ignore[reportArgumentType] (LoraConfig makes tuples)
            use_rslora=use_rslora,
            layers_to_transform=layers_to_transform,  # pyright: ignore[reportArgumentType]
            modules_to_save=modules_to_save,  # pyright: ignore[reportArgumentType]
            random_state=random_state,
            **resolve_names("get_peft_model", more, fields, _UNSLOTH),
        )
    elif more:
        raise ValueError(f"get_peft_model: got peft_config and {', '.join(more)}; put all settings into peft_config")
    if use_gradient_checkpointing is False:
        say_once(
            "get_peft_model: use_gradient_checkpointing=False has no effect; SFTConfig(gradient_checkpointing=False) "
            "turns recomputation off, which costs memory and changes no number."
        )
    if model.lora_config is not None:
        raise ValueError("the model has an adapter already; load the base model again to start another")
    peft_config = for_decoder(model.module, peft_config)
    original = _original_weights(model) if peft_config.start == "loftq" else None
    add_adapters(model.module, peft_config, original)
    model.lora_config = peft_config
    if model.mesh is not None:
        model.shard(model.mesh)
    if verbose:
        print_trainable_parameters(model)
    return model


def print_trainable_parameters(model: CausalLM) -> None:
    """Prints how many parameters are trained, of how many."""
    trainable, total = parameter_counts(model)
    print(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")


def _original_weights(model: CausalLM) -> Callable[[str], np.ndarray]:
    """Reads tensors of the checkpoint that the model's NF4 weights were made of."""
    from lora_jax.hf_checkpoint import Checkpoint

    how = 'init_lora_weights="loftq" makes up for what NF4 takes from the weights'
    leaves = jax.tree.leaves(model.split()[2], is_leaf=lambda leaf: isinstance(leaf, NF4Weight))
    if not any(isinstance(leaf, NF4Weight) for leaf in leaves):
        raise ValueError(f"{how}, and this model has none in NF4: load it with load_in_4bit=True")
    checkpoint = Checkpoint(model.source)
    if quantized := [name for name in model.module.slots() if checkpoint.quant_state(name)]:
        raise ValueError(
            f"{how}, and {model.source} holds {quantized[0]} in NF4 only: load the 16-bit model with load_in_4bit=True"
        )
    return checkpoint.read


def for_decoder(decoder: Decoder, config: LoraConfig) -> LoraConfig:
    """The same adapter by the names of a decoder.

    "lm_head" is called "embed_tokens" where these are one matrix. Where projections are fused, the names of all parts
    of one mean the whole.
    """
    fused = {"gate_up_proj": decoder.config.fused_gate_up, "qkv_proj": decoder.config.fused_qkv}
    if any(fused.values()) and isinstance(config.target_modules, tuple):
        targets = dict.fromkeys(config.target_modules)
        for whole in (name for name, is_one in fused.items() if is_one):
            parts = [part for part, its in _FUSED.items() if its == whole]
            if set(parts) <= set(targets):
                targets = {name: None for name in targets if name not in parts} | {whole: None}
                say_once(f"target_modules: {', '.join(parts)} are one layer of this model, {whole}, which is adapted.")
        config = dataclasses.replace(config, target_modules=tuple(targets))
    if decoder.lm_head is not None:
        return config
    names = {"modules_to_save": config.modules_to_save}
    if isinstance(config.target_modules, tuple):
        names["target_modules"] = config.target_modules
    once = {field: tuple(dict.fromkeys(_TIED.get(name, name) for name in found)) for field, found in names.items()}
    return dataclasses.replace(config, **once)  # pyright: ignore[reportArgumentType]


def add_adapters(decoder: Decoder, config: LoraConfig, original: Callable[[str], np.ndarray] | None = None) -> None:
    """Puts fresh adapters and trained copies into a decoder, cutting its stacks where layers get different ones.

    Args:
      decoder: without an adapter.
      config: the adapter.
      original: reads a tensor of the checkpoint that the weights were quantised from; for "loftq".

    Raises:
      ValueError: a target matches nothing, or a layer does not exist.
    """
    config = for_decoder(decoder, config)
    layers = range(decoder.config.num_layers)
    targets = _target_names(decoder, config)
    _check_kinds_of_modules(decoder, config, targets)
    _cut_stacks(decoder, [frozenset(_targets_of_layer(decoder, targets, i, config)) for i in layers])
    key = jax.random.key(config.random_state)
    for name, stack, module in decoder.named_modules():
        if not isinstance(module, Linear | Embedding):
            continue
        mine = {full for full, _ in full_names(name, stack, module)}
        if mine & targets:
            if missing := sorted(mine - targets):
                raise ValueError(f"target_modules: all experts of a layer get an adapter or none, not {missing[0]}")
            shapes = {(config.rank_of(full), config.scale_of(full)) for full in mine}
            if len(shapes) > 1:
                raise ValueError(f"rank_pattern, alpha_pattern: all experts of a layer get the same, not {name}")
            ((rank, scale),) = shapes
            # The name keys the draw, so that the start does not depend on which other modules are adapted.
            rng = jax.random.fold_in(key, _hash(name))
            if stack is not None:
                rng = _fold_in_each(rng, stack.first + jnp.arange(stack.count))
            if isinstance(module, ExpertLinear):
                rng = jax.vmap(lambda rng, n=module.experts: _fold_in_each(rng, jnp.arange(n)))(rng)
            start = config.start
            pair = None
            if isinstance(module, Linear) and start not in ("default", "gaussian"):
                pair = from_weights(start, name, stack, module, rank, scale, rng, original)
            if pair is None:
                n, k = module.features
                lead = module.weight.get_value().shape[:-2]
                draw = _normal if start == "gaussian" else _uniform
                pair = draw(rng, k, rank), jnp.zeros((*lead, rank, n), jnp.float32)
            elif starts_in_weight(start):
                assert isinstance(module, Linear)
                module.start_a, module.start_b = (nnx.Param(jnp.array(part)) for part in pair)
            module.lora_a, module.lora_b = map(nnx.LoRAParam, pair)
            module.scale, module.dropout = scale, config.lora_dropout
            if config.use_dora:
                assert isinstance(module, Linear)
                norms = norms_of_rows(module.weight.get_value(), stack)
                module.lora_magnitude, module.weight_norm = nnx.LoRAParam(norms), nnx.Param(jnp.array(norms))
        if name.rpartition(".")[2] in config.modules_to_save:
            module.trained = nnx.LoRAParam(jnp.array(to_device(module.weight.get_value()), jnp.float32))


def _check_kinds_of_modules(decoder: Decoder, config: LoraConfig, targets: set[str]) -> None:
    """Refuses what only plain linear layers have, and ranks beyond theirs, before anything is changed."""
    special = {"use_dora=True": config.use_dora}
    special[f"init_lora_weights={config.init_lora_weights!r}"] = starts_in_weight(config.start)
    asked = [what for what, wanted in special.items() if wanted]
    start = config.start
    for name, stack, module in decoder.named_modules() if asked or start == "loftq" else ():
        if not isinstance(module, Linear | Embedding):
            continue
        mine = targets & {full for full, _ in full_names(name, stack, module)}
        head = config.use_dora and name == "lm_head"
        if isinstance(module, Linear) and start not in ("default", "gaussian"):
            for full in mine:
                if (rank := config.rank_of(full)) > min(module.features):
                    raise ValueError(
                        f"init_lora_weights={start!r}: {full} is [N, K] = {list(module.features)} and has no {rank} "
                        "singular vectors; lower r, or give that module less by rank_pattern"
                    )
        if asked and mine and (head or isinstance(module, Embedding | ExpertLinear | Router)):
            raise ValueError(
                f"{asked[0]} is not implemented for {min(mine)}; leave {name.rpartition('.')[2]} out of target_modules"
                ", or train without it"
            )


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
        near = did_you_mean(unmatched[0], known.split(", "))
        raise ValueError(f"target_modules: {which} matches no module; there are {known}{hint}.{near}")
    if not chosen and not config.modules_to_save:
        raise ValueError("target_modules is empty: nothing would be trained")
    return chosen


def _endings(name: str) -> set[str]:
    """ "a.b.c" -> "a.b.c", "b.c", "c"."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _targets_of_layer(decoder: Decoder, targets: set[str], layer: int, config: LoraConfig) -> list[tuple]:
    """What a layer gets: (pattern of its name, rank, scale) of every target."""
    patterns = {name for name, stack, _ in decoder.named_modules() if stack is not None}
    names = {pattern: pattern.format(layer).replace("*", "0") for pattern in patterns}
    return [(p, config.rank_of(name), config.scale_of(name)) for p, name in names.items() if name in targets]


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


def _normal(rng: jax.Array, k: int, r: int) -> jax.Array:
    """A [..., K, R] normal with standard deviation 1 / R, float32, as PEFT's "gaussian". One key a layer."""
    draw = jax.vmap(lambda key: jax.random.normal(key, (k, r), jnp.float32) / r)
    a = draw(rng.reshape(-1))
    return a.reshape(*rng.shape, k, r)


def _fold_in_each(rng: jax.Array, numbers: jax.Array) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(rng, i))(numbers)


def _hash(name: str) -> int:
    """A number of 31 bits that is the same in every process."""
    import zlib

    return zlib.crc32(name.encode()) & 0x7FFFFFFF
