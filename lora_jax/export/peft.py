"""Adapters in PEFT's format, written and read: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.export.aside import folder_aside
from lora_jax.export.peft_experts import LAYOUTS, config_of_fused, default_layout, fuse, modules_of, separate
from lora_jax.export.safetensors_writer import Contents, write_file
from lora_jax.hf_checkpoint import read_json
from lora_jax.models.decoder import full_names
from lora_jax.models.linear import Embedding, Linear, factors, layer_of, set_layer, value
from lora_jax.reporting import say

if TYPE_CHECKING:
    from lora_jax.lora import LoraConfig
    from lora_jax.model import CausalLM

__all__ = ["Adapter", "adapter_tensors", "base_of_adapter", "load_adapter", "put_on", "read_adapter", "save_adapter"]
__all__ += ["take_off", "written_config"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROOT, _BASE = "base_model.model.", ".base_layer.weight"
_LINEAR, _EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE = "lora_magnitude_vector"
# Settings of PEFT that change what an adapter means and are not implemented, with the value that turns each off.
_UNSUPPORTED = {
    "use_qalora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "exclude_modules": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}


# Starts of PEFT after which the base is another one.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclasses.dataclass(frozen=True)
class _Part:
    """Where one tensor of the adapter lives: a variable, or one layer of a stacked one."""

    owner: "nnx.Module"
    attribute: str  # lora_a, lora_b, lora_magnitude or trained
    index: int | tuple[int, int] | None
    transposed: bool  # PEFT keeps A as [R, K] and B as [N, R]

    @property
    def array(self):
        if self.attribute in ("lora_a", "lora_b"):
            return factors(self.owner, self.index)[self.attribute == "lora_b"]  # pyright: ignore[reportArgumentType]
        whole = value(getattr(self.owner, self.attribute))
        return whole if self.index is None else layer_of(whole, self.index)

    def write(self, tensor: np.ndarray) -> None:
        variable = getattr(self.owner, self.attribute)
        new = jnp.asarray(tensor.T if self.transposed else tensor, jnp.float32)
        variable.set_value(new if self.index is None else set_layer(value(variable), new, self.index))


def adapter_tensors(model: "CausalLM") -> dict[str, np.ndarray]:
    """The adapter as float32 tensors under PEFT's names, of an adapter as `written_config` describes it."""
    parts = _parts(model)
    return {k: np.ascontiguousarray(np.asarray(p.array).T if p.transposed else p.array) for k, p in parts.items()}


def written_config(model: "CausalLM") -> "LoraConfig":
    """The adapter that is written, an ordinary one on the original base.

    One that started as a part of the weights (PiSSA, OLoRA) has twice its rank, with the start subtracted, and the same
    scale; see `lora_jax.models.linear.factors`. That is PEFT's own conversion of those (`path_initial_model_for_...`).

    Raises:
      ValueError: the model has no adapter.
    """
    from lora_jax.lora_init import starts_in_weight

    config = model.lora_config
    if config is None:
        raise ValueError("the model has no adapter to save; make one with get_peft_model")
    plain = dataclasses.replace(config, init_lora_weights=True, loftq_config=None)
    if not starts_in_weight(config.start):
        return plain
    factor = math.sqrt(2) if config.use_rslora else 2
    return dataclasses.replace(
        plain,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: factor * alpha for name, alpha in config.alpha_pattern.items()},
    )


def save_adapter(model: "CausalLM", folder: Path, *, overwrite: bool = False, expert_layout: str | None = None) -> Path:
    """Writes the adapter so that PEFT, transformers, vLLM and llama.cpp's converter load it, and reads it back.

    Args:
      model: with an adapter.
      folder: where to.
      overwrite: replace an existing folder.
      expert_layout: of adapters on experts: "separate", with one for each linear of each expert, under the names of
        published checkpoints; or "fused", with PEFT's `target_parameters`, one for all experts of a layer. None for
        "separate" unless PEFT would not load that right with transformers 5: it knows no single experts of gpt-oss
        and Qwen2-MoE, forgets about layers without an adapter and MLPs beside experts (DeepSeek), and takes no dropout
        there ("fused" leaves it out).

    Raises:
      ValueError: the model has no adapter, a value in it is not finite, or the layout is unknown or impossible.
      FileExistsError, OSError: the folder exists, cannot be written, or the disk is full.
    """
    written = written_config(model)
    if expert_layout not in (None, *LAYOUTS):
        raise ValueError(f"expert_layout={expert_layout!r} is unknown; known are {', '.join(LAYOUTS)}, or None")
    if expert_layout == "fused" and model.config.moe is None:
        raise ValueError(f"expert_layout='fused' is for mixtures of experts; {model.config.architecture} has none")
    tensors, config = adapter_tensors(model), _peft_config(model, written)
    if config.get("ensure_weight_tying"):
        tensors |= _tied_head(model, tensors)
    modules = _modules(model)
    adapted = [name for name, has_adapter in modules.items() if has_adapter]
    layout = expert_layout or default_layout(model.config, adapted, written.lora_dropout)
    if layout == "fused":
        if written.rank_pattern or written.alpha_pattern:
            raise ValueError(
                "rank_pattern and alpha_pattern cannot be written together with experts in PEFT's fused layout; train "
                "with one rank and alpha, or export the merged model"
            )
        tensors = fuse(tensors, model.config, written.r)
        config = config_of_fused(config, modules, model.config)
    if bad := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise ValueError(f"the adapter is not finite in {bad[0]} ({len(bad)} tensors); nothing was written")
    with folder_aside(folder, overwrite, kept=[model.source]) as aside:
        # Not the library's writer: its errors hide that the disk is full.
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        dtypes = dict.fromkeys(shapes, np.dtype(np.float32))
        write_file(aside / _WEIGHTS, Contents(shapes, dtypes, lambda name: [tensors[name]]))
        (aside / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def base_of_adapter(folder: Path) -> str:
    """Name or path of the model that an adapter folder belongs to. Raises ValueError if it names none."""
    name = read_json(folder / _CONFIG).get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{folder / _CONFIG} names no base_model_name_or_path; load the base model, then load_adapter")
    return name


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter off its model: what `load_adapter` puts on one."""

    config: "LoraConfig"
    tensors: dict[str, np.ndarray]  # float32 by PEFT's names; of experts, those of single ones


def load_adapter(model: "CausalLM", folder: str | Path) -> "CausalLM":
    """Puts a PEFT adapter on a base model, in place, to use it or to continue its training.

    Raises:
      FileNotFoundError: the folder or a file of it is missing.
      ValueError: the model has an adapter already, the adapter uses a feature that is not implemented, or it was made
        for another model.
    """
    if model.lora_config is not None:
        raise ValueError("the model has an adapter already; load the base model again to put another on it")
    return put_on(model, read_adapter(model, folder))


def put_on(model: "CausalLM", adapter: Adapter) -> "CausalLM":
    """Puts an adapter that was read for this model on it, in place, instead of the one it may have.

    Raises:
      ValueError: the adapter was made for another model; nothing is changed.
    """
    from lora_jax.lora import get_peft_model

    _check_tensors(model, adapter.config, adapter.tensors, "put_on")
    if model.lora_config is not None:
        take_off(model)
    get_peft_model(model, adapter.config, verbose=False)
    for name, part in _parts(model).items():
        part.write(adapter.tensors[name])
    return model


def take_off(model: "CausalLM") -> Adapter:
    """Removes the model's adapter, in place, and returns it, as it would be written.

    Raises:
      ValueError: the model has no adapter.
    """
    adapter = Adapter(written_config(model), adapter_tensors(model))
    for _, _, module in model.module.named_modules():
        for attribute in ("lora_a", "lora_b", "start_a", "start_b", "lora_magnitude", "trained"):
            if getattr(module, attribute, None) is not None:
                setattr(module, attribute, nnx.data(None))
    model.lora_config = None
    return adapter


def read_adapter(model: "CausalLM", folder: str | Path) -> Adapter:
    """Reads a PEFT adapter for a base model, which is not changed; errors as of `load_adapter`.

    That it names another base is said (to stderr): one model has several names.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from lora_jax.lora import for_decoder, regex_of

    folder = Path(folder)
    peft = _read_config(folder)
    if not (folder / _WEIGHTS).exists():
        raise FileNotFoundError(
            f"{folder} holds no {_WEIGHTS}; an adapter saved as adapter_model.bin must be converted"
        )
    try:
        tensors = load_file(folder / _WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / _WEIGHTS} is truncated or corrupted ({error}); copy it again") from None
    tensors = _without_base(model, tensors, folder)
    if model.module.lm_head is None:
        tensors = _without_tied_head(model, tensors, folder)
    if peft.get("target_parameters"):
        try:
            tensors = separate(tensors, peft, model.config)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        peft |= {"target_modules": regex_of(modules_of(tensors)), "layers_to_transform": None}
        peft |= {"rank_pattern": {}, "alpha_pattern": {}}  # of experts alone, for gate and up together
    config = for_decoder(model.module, _lora_config(peft))
    _check_tensors(model, config, tensors, folder)
    base = peft.get("base_model_name_or_path")
    if base and Path(base).name != Path(model.name_or_path).name:
        say(f"{folder}: the adapter was trained on {base}, and is put on {model.name_or_path}")
    return Adapter(config, {name: tensor.astype(np.float32) for name, tensor in tensors.items()})


def _tied_head(model: "CausalLM", tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What PEFT saves of a head that is the embedding matrix, beside the matrix's own: the same, transposed."""
    embedding, head = f"{_ROOT}{model.config.hf_prefix}.embed_tokens", f"{_ROOT}lm_head"
    pairs = {".lora_A.weight": ".lora_embedding_B", ".lora_B.weight": ".lora_embedding_A"}
    tied = {head + a: tensors[embedding + b].T for a, b in pairs.items() if embedding + b in tensors}
    return tied | {head + w: tensors[embedding + w] for w in (".weight",) if embedding + w in tensors}


def _without_tied_head(model: "CausalLM", tensors: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """Drops the head's tensors, which must be the embeddings' transposed: this model trains them as one matrix."""
    tied = _tied_head(model, tensors)
    heads = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{_ROOT}lm_head.")}
    if tied.keys() != heads.keys() or not all(np.array_equal(tied[name], heads[name]) for name in heads):
        raise ValueError(
            f"{folder}: the adapter changes head and embeddings apart from each other, which are one matrix in "
            f"{model.source} (tie_word_embeddings): train it with PEFT's ensure_weight_tying=True, or give the base a "
            "matrix for each"
        )
    return {name: tensor for name, tensor in tensors.items() if name not in heads}


def _without_base(model: "CausalLM", tensors: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """Drops the base weights that PEFT saves beside adapters on embeddings and head, if they are those of the model."""
    slots = model.module.slots()
    embedding = slots[f"{model.config.hf_prefix}.embed_tokens.weight"]
    base = {name for name in tensors if name.endswith(_BASE)}
    for name in base:
        # A head that is the embedding matrix has none of its own.
        slot = slots.get(f"{name.removeprefix(_ROOT).removesuffix(_BASE)}.weight", embedding)
        mine = np.asarray(value(slot.variable))
        if mine.shape != tensors[name].shape or not np.array_equal(mine, tensors[name].astype(mine.dtype)):
            raise ValueError(
                f"{folder}: {name} is not the weight of {model.source}: the adapter was made for another model, or for "
                "one whose vocabulary was changed"
            )
    return {name: tensor for name, tensor in tensors.items() if name not in base}


def _check_tensors(model: "CausalLM", config: "LoraConfig", tensors: dict[str, np.ndarray], folder: Path | str) -> None:
    """Refuses an adapter of another model before the model is changed."""
    from lora_jax.lora import adapter_shapes

    wanted = {}
    for module, (k, n) in adapter_shapes(model, config).items():
        a, b = _EMBEDDING if module.endswith("embed_tokens") else _LINEAR
        rank = config.rank_of(module)
        wanted[f"{_ROOT}{module}.{a}"] = (rank, k)
        wanted[f"{_ROOT}{module}.{b}"] = (n, rank)
        if config.use_dora:
            wanted[f"{_ROOT}{module}.{_MAGNITUDE}"] = (n,)
    for name, slot in model.module.slots().items():
        if name.removesuffix(".weight").rpartition(".")[2] in config.modules_to_save:
            wanted[f"{_ROOT}{name}"] = slot.shape
    other = f"{folder}: the adapter was made for another model"
    if unknown := sorted(set(tensors) - set(wanted)):
        raise ValueError(f"{other}: {model.source} has no place for {unknown[0]} ({len(unknown)} such tensors)")
    if missing := sorted(set(wanted) - set(tensors)):
        raise ValueError(f"{other}, or is damaged: it lacks {missing[0]} ({len(missing)} such tensors)")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            got = list(tensors[name].shape)
            raise ValueError(f"{other}: {name} has shape {got}, {model.source} wants {list(shape)}")


def _parts(model: "CausalLM") -> dict[str, _Part]:
    """Every tensor of the adapter by PEFT's name."""
    parts = {}
    for name, stack, module in model.module.named_modules():
        for full, index in full_names(name, stack, module):
            for attribute, suffix, transposed in _attributes(module):
                parts[f"{_ROOT}{full}.{suffix}"] = _Part(module, attribute, index, transposed)
    return parts


def _modules(model: "CausalLM") -> dict[str, bool]:
    """Full name of every module that may have an adapter -> whether it has one."""
    return {
        full: module.lora_a is not None
        for name, stack, module in model.module.named_modules()
        if isinstance(module, Linear | Embedding)
        for full, _ in full_names(name, stack, module)
    }


def _attributes(module) -> Iterator[tuple[str, str, bool]]:
    """(attribute, PEFT's ending, transposed) of what is trained in one module."""
    if getattr(module, "lora_a", None) is not None:
        a, b = _EMBEDDING if isinstance(module, Embedding) else _LINEAR
        yield "lora_a", a, True
        yield "lora_b", b, True
    if getattr(module, "lora_magnitude", None) is not None:
        yield "lora_magnitude", _MAGNITUDE, False
    if getattr(module, "trained", None) is not None:
        yield "trained", "weight", False


def _peft_config(model: "CausalLM", config: "LoraConfig") -> dict[str, Any]:
    from lora_jax.lora import target_names_for_peft

    targets = target_names_for_peft(model)
    layers = None if isinstance(targets, str) else config.layers_to_transform  # a regex has them in it
    embedding = model.module.embed_tokens
    tied = model.module.lm_head is None and (embedding.lora_a is not None or embedding.trained is not None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets,
        "modules_to_save": list(config.modules_to_save) or None,
        "layers_to_transform": None if layers is None else sorted(layers),
        "layers_pattern": None if layers is None else "layers",
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        **({"rank_pattern": dict(config.rank_pattern)} if config.rank_pattern else {}),
        **({"alpha_pattern": dict(config.alpha_pattern)} if config.alpha_pattern else {}),
        **({"ensure_weight_tying": True} if tied else {}),
    }


def _read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json; raises ValueError for what is not implemented."""
    config = read_json(folder / _CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type is {config.get('peft_type')!r}; only 'LORA' adapters can be loaded")
    fused = config.get("target_parameters")
    for name, off in _UNSUPPORTED.items():
        if config.get(name) and config[name] != off:
            raise ValueError(f"{folder}: the adapter has {name}={config[name]!r}, which is not implemented")
    start = str(config.get("init_lora_weights"))
    if start.startswith(_CHANGES_BASE):
        raise ValueError(
            f"{folder}: the adapter has init_lora_weights={start!r}, so it belongs on a base whose weights that start "
            "changed; save it in PEFT with path_initial_model_for_weight_conversion, which makes it an ordinary one"
        )
    for name in ("rank_pattern", "alpha_pattern") if fused else ():
        if any(not key.endswith("gate_up_proj") for key in config.get(name) or ()):
            raise ValueError(
                f"{folder}: the adapter has {name}={config[name]!r}, which is not implemented beside target_parameters"
            )
    needed = ("r", "lora_alpha") if fused else ("r", "lora_alpha", "target_modules")
    if missing := [name for name in needed if config.get(name) is None]:
        raise ValueError(f"{folder / _CONFIG} has no {missing[0]!r}; copy or save the adapter again")
    return config


def _lora_config(peft: dict[str, Any]) -> "LoraConfig":
    from lora_jax.lora import LoraConfig

    targets = peft["target_modules"]
    return LoraConfig(
        r=peft["r"],
        lora_alpha=peft["lora_alpha"],
        lora_dropout=peft.get("lora_dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        use_rslora=peft.get("use_rslora", False),
        use_dora=bool(peft.get("use_dora")),
        rank_pattern=peft.get("rank_pattern") or {},
        alpha_pattern=peft.get("alpha_pattern") or {},
        layers_to_transform=peft.get("layers_to_transform"),
        # PEFT may add the full name.
        modules_to_save=tuple(dict.fromkeys(name.rpartition(".")[2] for name in peft.get("modules_to_save") or ())),
    )
