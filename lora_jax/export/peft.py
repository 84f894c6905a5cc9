"""Adapters in PEFT's format, written and read: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from lora_jax.export.aside import folder_aside
from lora_jax.hf_checkpoint import read_json
from lora_jax.models.linear import Embedding, value

if TYPE_CHECKING:
    from flax import nnx

    from lora_jax.model import CausalLM

__all__ = ["adapter_tensors", "base_of_adapter", "load_adapter", "save_adapter"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True)
class _Part:
    """Where one tensor of the adapter lives: a variable, or one layer of a stacked one."""

    owner: "nnx.Module"
    attribute: str  # lora_a, lora_b or trained
    index: int | None
    transposed: bool  # PEFT keeps A as [R, K] and B as [N, R]

    @property
    def array(self):
        whole = value(getattr(self.owner, self.attribute))
        return whole if self.index is None else whole[self.index]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.array.shape)
        return shape[::-1] if self.transposed else shape

    def write(self, tensor: np.ndarray) -> None:
        variable = getattr(self.owner, self.attribute)
        new = jnp.asarray(tensor.T if self.transposed else tensor, jnp.float32)
        variable.set_value(new if self.index is None else value(variable).at[self.index].set(new))


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
    from safetensors.numpy import load_file, save_file

    if model.lora_config is None:
        raise ValueError("the model has no adapter to save; make one with get_peft_model")
    tensors = adapter_tensors(model)
    if bad := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise ValueError(f"the adapter is not finite in {bad[0]} ({len(bad)} tensors); nothing was written")
    with folder_aside(folder, overwrite) as aside:
        save_file(tensors, aside / _WEIGHTS, metadata={"format": "pt"})
        (aside / _CONFIG).write_text(json.dumps(_peft_config(model), indent=2) + "\n", encoding="utf-8")
        written = load_file(aside / _WEIGHTS)
        if any(not np.array_equal(written[name], tensor) for name, tensor in tensors.items()):
            raise OSError(f"{folder}: the adapter does not read back as it was written; the disk may be failing")
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
    config = _read_config(folder)
    if not (folder / _WEIGHTS).exists():
        raise FileNotFoundError(
            f"{folder} holds no {_WEIGHTS}; an adapter saved as adapter_model.bin must be converted"
        )
    try:
        tensors = load_file(folder / _WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / _WEIGHTS} is truncated or corrupted ({error}); copy it again") from None
    _check_shapes(model, tensors, folder)
    get_peft_model(model, config, verbose=False)
    parts = _parts(model)
    if differing := sorted(set(parts) ^ set(tensors)):
        raise ValueError(
            f"{folder}: the adapter was made for another model: its tensors do not match the target modules of "
            f"{model.source}, beginning with {differing[0]}"
        )
    for name, part in parts.items():
        if tensors[name].shape != part.shape:
            raise ValueError(
                f"{folder}: the adapter was made for another model: {name} has shape {list(tensors[name].shape)}, "
                f"{model.source} wants {list(part.shape)}"
            )
        part.write(tensors[name])
    return model


def _check_shapes(model: "CausalLM", tensors: dict[str, np.ndarray], folder: Path) -> None:
    """Refuses an adapter of another model before the model is changed."""
    slots = model.module.slots()
    for name, tensor in tensors.items():
        module, _, kind = name.removeprefix("base_model.model.").partition(".lora_A")
        if not kind:
            continue
        weight = slots.get(f"{module}.weight")
        if weight is None or weight.shape[1] != tensor.shape[1]:
            want = "no such module" if weight is None else f"{weight.shape[1]} input features"
            raise ValueError(
                f"{folder}: the adapter was made for another model: {name} has shape {list(tensor.shape)}, "
                f"{model.source} has {want}"
            )


def _parts(model: "CausalLM") -> dict[str, _Part]:
    """Every tensor of the adapter by PEFT's name."""
    parts = {}
    for name, stack, module in model.module.named_modules():
        for index in range(stack.count) if stack else [None]:
            full = name if stack is None or index is None else name.format(stack.first + index)
            for attribute, suffix, transposed in _attributes(module):
                parts[f"base_model.model.{full}.{suffix}"] = _Part(module, attribute, index, transposed)
    return parts


def _attributes(module) -> Iterator[tuple[str, str, bool]]:
    """(attribute, PEFT's ending, transposed) of what is trained in one module."""
    if getattr(module, "lora_a", None) is not None:
        embedding = isinstance(module, Embedding)
        yield "lora_a", "lora_embedding_A" if embedding else "lora_A.weight", True
        yield "lora_b", "lora_embedding_B" if embedding else "lora_B.weight", True
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
    plain = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}}
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type is {config.get('peft_type')!r}; only 'LORA' adapters can be loaded")
    for name, wanted in plain.items():
        if config.get(name) not in (wanted, None):
            raise ValueError(f"{folder}: {name}={config[name]!r} is not implemented")
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    return LoraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config.get("lora_dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        use_rslora=config.get("use_rslora", False),
        layers_to_transform=None if layers is None else tuple(layers),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
    )
