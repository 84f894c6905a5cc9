"""Adapters in PEFT's format, written and read: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from lora_jax.export.aside import folder_aside
from lora_jax.export.safetensors_writer import write_file
from lora_jax.hf_checkpoint import read_json
from lora_jax.models.decoder import full_names
from lora_jax.models.linear import Embedding, layer_of, set_layer, value

if TYPE_CHECKING:
    from flax import nnx

    from lora_jax.lora import LoraConfig
    from lora_jax.model import CausalLM

__all__ = ["adapter_tensors", "base_of_adapter", "load_adapter", "save_adapter"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LINEAR, _EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
# Settings of PEFT that change what an adapter means and are not implemented, with the value that turns each off.
_UNSUPPORTED = {
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "exclude_modules": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}


@dataclasses.dataclass(frozen=True)
class _Part:
    """Where one tensor of the adapter lives: a variable, or one layer of a stacked one."""

    owner: "nnx.Module"
    attribute: str  # lora_a, lora_b or trained
    index: int | tuple[int, int] | None
    transposed: bool  # PEFT keeps A as [R, K] and B as [N, R]

    @property
    def array(self):
        whole = value(getattr(self.owner, self.attribute))
        return whole if self.index is None else layer_of(whole, self.index)

    def write(self, tensor: np.ndarray) -> None:
        variable = getattr(self.owner, self.attribute)
        new = jnp.asarray(tensor.T if self.transposed else tensor, jnp.float32)
        variable.set_value(new if self.index is None else set_layer(value(variable), new, self.index))


def adapter_tensors(model: "CausalLM") -> dict[str, np.ndarray]:
    """The adapter as float32 tensors under PEFT's names."""
    parts = _parts(model)
    return {k: np.ascontiguousarray(np.asarray(p.array).T if p.transposed else p.array) for k, p in parts.items()}


def save_adapter(model: "CausalLM", folder: Path, *, overwrite: bool = False) -> Path:
    """Writes the adapter so that PEFT, transformers, vLLM and llama.cpp's converter load it, and reads it back.

    Raises:
      ValueError: the model has no adapter, or a value in it is not finite.
      FileExistsError, OSError: the folder exists, cannot be written, or the disk is full.
    """
    if model.lora_config is None:
        raise ValueError("the model has no adapter to save; make one with get_peft_model")
    tensors = adapter_tensors(model)
    if bad := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise ValueError(f"the adapter is not finite in {bad[0]} ({len(bad)} tensors); nothing was written")
    with folder_aside(folder, overwrite, kept=[model.source]) as aside:
        # Not the library's writer: its errors hide that the disk is full.
        write_file(
            aside / _WEIGHTS, {k: t.shape for k, t in tensors.items()}, tensors.__getitem__, np.dtype(np.float32)
        )
        (aside / _CONFIG).write_text(json.dumps(_peft_config(model), indent=2) + "\n", encoding="utf-8")
    return folder


def base_of_adapter(folder: Path) -> str:
    """Name or path of the model that an adapter folder belongs to. Raises ValueError if it names none."""
    name = read_json(folder / _CONFIG).get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{folder / _CONFIG} names no base_model_name_or_path; load the base model, then load_adapter")
    return name


def load_adapter(model: "CausalLM", folder: str | Path) -> "CausalLM":
    """Puts a PEFT adapter on a base model, in place, to use it or to continue its training.

    Raises:
      FileNotFoundError: the folder or a file of it is missing.
      ValueError: the model has an adapter already, the adapter uses a feature that is not implemented, or it was made
        for another model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from lora_jax.lora import get_peft_model

    folder = Path(folder)
    if model.lora_config is not None:
        raise ValueError("the model has an adapter already; load the base model again to put another on it")
    config = _read_config(folder)
    if not (folder / _WEIGHTS).exists():
        raise FileNotFoundError(
            f"{folder} holds no {_WEIGHTS}; an adapter saved as adapter_model.bin must be converted"
        )
    try:
        tensors = load_file(folder / _WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / _WEIGHTS} is truncated or corrupted ({error}); copy it again") from None
    _check_tensors(model, config, tensors, folder)
    get_peft_model(model, config, verbose=False)
    for name, part in _parts(model).items():
        part.write(tensors[name])
    return model


def _check_tensors(model: "CausalLM", config: "LoraConfig", tensors: dict[str, np.ndarray], folder: Path) -> None:
    """Refuses an adapter of another model before the model is changed."""
    from lora_jax.lora import adapter_shapes

    wanted = {}
    for module, (k, n) in adapter_shapes(model, config).items():
        a, b = _EMBEDDING if module.endswith("embed_tokens") else _LINEAR
        wanted[f"base_model.model.{module}.{a}"] = (config.r, k)
        wanted[f"base_model.model.{module}.{b}"] = (n, config.r)
    for name, slot in model.module.slots().items():
        if name.removesuffix(".weight").rpartition(".")[2] in config.modules_to_save:
            wanted[f"base_model.model.{name}"] = slot.shape
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
                parts[f"base_model.model.{full}.{suffix}"] = _Part(module, attribute, index, transposed)
    return parts


def _attributes(module) -> Iterator[tuple[str, str, bool]]:
    """(attribute, PEFT's ending, transposed) of what is trained in one module."""
    if getattr(module, "lora_a", None) is not None:
        a, b = _EMBEDDING if isinstance(module, Embedding) else _LINEAR
        yield "lora_a", a, True
        yield "lora_b", b, True
    if getattr(module, "trained", None) is not None:
        yield "trained", "weight", False


def _peft_config(model: "CausalLM") -> dict[str, Any]:
    from lora_jax.lora import target_names_for_peft

    config = model.lora_config
    assert config is not None
    layers = config.layers_to_transform
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": target_names_for_peft(model),
        "modules_to_save": list(config.modules_to_save) or None,
        "layers_to_transform": None if layers is None else sorted(layers),
        "layers_pattern": None if layers is None else "layers",
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _read_config(folder: Path):
    from lora_jax.lora import LoraConfig

    config = read_json(folder / _CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type is {config.get('peft_type')!r}; only 'LORA' adapters can be loaded")
    for name, off in _UNSUPPORTED.items():
        if config.get(name) and config[name] != off:
            raise ValueError(f"{folder}: the adapter has {name}={config[name]!r}, which is not implemented")
    if missing := [name for name in ("r", "lora_alpha", "target_modules") if config.get(name) is None]:
        raise ValueError(f"{folder / _CONFIG} has no {missing[0]!r}; copy or save the adapter again")
    targets = config["target_modules"]
    return LoraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config.get("lora_dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        use_rslora=config.get("use_rslora", False),
        layers_to_transform=config.get("layers_to_transform"),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
    )
