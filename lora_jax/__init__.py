"""LoRA and QLoRA fine-tuning of large language models in JAX.

Importing this package starts no JAX backend and imports neither flax nor transformers, so that memory settings can
still be made afterwards. The public names below are loaded at their first use; so is a class for each architecture of
`models.registry`, under transformers' name for it (`LlamaForCausalLM`).
"""

import importlib
from typing import TYPE_CHECKING, Any

from lora_jax.models.registry import ARCHITECTURES as _ARCHITECTURES

if TYPE_CHECKING:
    from lora_jax.auto import AutoModelForCausalLM
    from lora_jax.config import SFTConfig
    from lora_jax.export.peft import load_adapter
    from lora_jax.generation import generate, generate_text
    from lora_jax.loading import from_pretrained
    from lora_jax.lora import LoraConfig, get_peft_model
    from lora_jax.model import CausalLM
    from lora_jax.step import make_eval_step, make_train_step, train_step
    from lora_jax.trainer import SFTTrainer

_MODULE_OF_NAME = {
    "AutoModelForCausalLM": "lora_jax.auto",
    "CausalLM": "lora_jax.model",
    "LoraConfig": "lora_jax.lora",
    "SFTConfig": "lora_jax.config",
    "SFTTrainer": "lora_jax.trainer",
    "from_pretrained": "lora_jax.loading",
    "generate": "lora_jax.generation",
    "generate_text": "lora_jax.generation",
    "get_peft_model": "lora_jax.lora",
    "load_adapter": "lora_jax.export.peft",
    "make_eval_step": "lora_jax.step",
    "make_train_step": "lora_jax.step",
    "train_step": "lora_jax.step",
    **dict.fromkeys(_ARCHITECTURES, "lora_jax.auto"),
}

__all__ = [
    "AutoModelForCausalLM",
    "CausalLM",
    "LoraConfig",
    "SFTConfig",
    "SFTTrainer",
    "from_pretrained",
    "generate",
    "generate_text",
    "get_peft_model",
    "load_adapter",
    "make_eval_step",
    "make_train_step",
    "train_step",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _MODULE_OF_NAME:
        value = getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
    else:
        raise AttributeError(f"module 'lora_jax' has no attribute {name!r}; it has {', '.join(_MODULE_OF_NAME)}")
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF_NAME, "__version__"])


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("lora-jax")
    except metadata.PackageNotFoundError:  # run from a source folder that was never installed
        return "0+unknown"
