"""LoRA and QLoRA fine-tuning of large language models in JAX.

Importing this package starts no JAX backend and imports neither flax nor transformers, so that memory settings can
still be made afterwards. The public names below are loaded at their first use; so is a class for each architecture of
`models.registry`, under transformers' name for it (`LlamaForCausalLM`).
"""

import difflib
import importlib
import re
from typing import TYPE_CHECKING, Any

from lora_jax.models.registry import ARCHITECTURES as _ARCHITECTURES

if TYPE_CHECKING:
    from transformers import TextStreamer

    from lora_jax.auto import (
        AutoModelForCausalLM,
        AutoPeftModelForCausalLM,
        BitsAndBytesConfig,
        FastLanguageModel,
        FastModel,
        PeftModel,
        is_bf16_supported,
        is_bfloat16_supported,
        prepare_model_for_kbit_training,
    )
    from lora_jax.chat_templates import (
        get_chat_template,
        standardize_data_formats,
        standardize_sharegpt,
        train_on_responses_only,
    )
    from lora_jax.config import SFTConfig
    from lora_jax.config import SFTConfig as TrainingArguments
    from lora_jax.config import SFTConfig as UnslothTrainingArguments
    from lora_jax.export.peft import load_adapter
    from lora_jax.generation import generate, generate_text
    from lora_jax.loading import from_pretrained
    from lora_jax.lora import LoraConfig, get_peft_model
    from lora_jax.memory_limit import limit_memory
    from lora_jax.model import CausalLM
    from lora_jax.step import make_eval_step, make_train_step, train_step
    from lora_jax.trainer import SFTTrainer
    from lora_jax.trainer import SFTTrainer as Trainer
    from lora_jax.trainer import SFTTrainer as UnslothTrainer

_FAMILIAR = ("AutoPeftModelForCausalLM", "BitsAndBytesConfig", "FastLanguageModel", "FastModel", "PeftModel")
_FAMILIAR += ("is_bf16_supported", "is_bfloat16_supported", "prepare_model_for_kbit_training")
_CHAT = ("get_chat_template", "standardize_data_formats", "standardize_sharegpt", "train_on_responses_only")
# Names of transformers and of Unsloth.
_RENAMED = {"Trainer": "SFTTrainer", "UnslothTrainer": "SFTTrainer"}
_RENAMED |= {"TrainingArguments": "SFTConfig", "UnslothTrainingArguments": "SFTConfig"}
# Classes of other libraries that are refused by name when they are used (`lora_jax.auto.NOT_THERE`).
_REFUSED = re.compile(r"(DPO|ORPO|CPO|KTO|BCO|GRPO|RLOO|PPO|GKD|OnlineDPO|Reward)(Trainer|Config)|FastVisionModel|"
                      r"FastDiffusionModel|FastSentenceTransformer|UnslothVisionDataCollator")  # fmt: skip
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
    "limit_memory": "lora_jax.memory_limit",
    "load_adapter": "lora_jax.export.peft",
    "make_eval_step": "lora_jax.step",
    "make_train_step": "lora_jax.step",
    "train_step": "lora_jax.step",
    **dict.fromkeys(_FAMILIAR, "lora_jax.auto"),
    **dict.fromkeys(_CHAT, "lora_jax.chat_templates"),
    **dict.fromkeys(_ARCHITECTURES, "lora_jax.auto"),
}

__all__ = [
    "AutoModelForCausalLM",
    "AutoPeftModelForCausalLM",
    "BitsAndBytesConfig",
    "CausalLM",
    "FastLanguageModel",
    "FastModel",
    "LoraConfig",
    "PeftModel",
    "SFTConfig",
    "SFTTrainer",
    "TextStreamer",
    "Trainer",
    "TrainingArguments",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "from_pretrained",
    "generate",
    "generate_text",
    "get_chat_template",
    "get_peft_model",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "limit_memory",
    "load_adapter",
    "make_eval_step",
    "make_train_step",
    "prepare_model_for_kbit_training",
    "standardize_data_formats",
    "standardize_sharegpt",
    "train_on_responses_only",
    "train_step",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _RENAMED:
        value = __getattr__(_RENAMED[name])
    elif name == "TextStreamer":
        value = importlib.import_module("transformers").TextStreamer
    elif name in _MODULE_OF_NAME or _REFUSED.fullmatch(name):
        value = getattr(importlib.import_module(_MODULE_OF_NAME.get(name, "lora_jax.auto")), name)
    else:
        near = difflib.get_close_matches(name, _MODULE_OF_NAME, n=1, cutoff=0.8)
        hint = f". Did you mean {near[0]!r}?" if near else f"; it has {', '.join(_MODULE_OF_NAME)}"
        raise AttributeError(f"module 'lora_jax' has no attribute {name!r}{hint}")
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF_NAME, *_RENAMED, "TextStreamer", "__version__"])


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("lora-jax")
    except metadata.PackageNotFoundError:  # run from a source folder that was never installed
        return "0+unknown"
