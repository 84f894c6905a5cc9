"""Loading under other libraries' names: transformers', PEFT's and Unsloth's.

`AutoModelForCausalLM` and a class for each architecture; `FastLanguageModel`. Their other arguments are accepted where
ignoring them changes no result, which is said once; the others are refused by name.

The classes of architectures are made of `models.registry.ARCHITECTURES` when they are asked for. They only load: what
they return is a `CausalLM` in every case, as from `lora_jax.from_pretrained`, since one decoder runs all architectures.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from lora_jax.config import Names, resolve_names
from lora_jax.loading import from_pretrained, load
from lora_jax.lora import get_peft_model
from lora_jax.model import CausalLM
from lora_jax.models.registry import ARCHITECTURES

__all__ = [
    "AutoModelForCausalLM",
    "AutoPeftModelForCausalLM",
    "BitsAndBytesConfig",
    "FastLanguageModel",
    "FastModel",
    "PeftModel",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "prepare_model_for_kbit_training",
]

_CACHE = "set the environment variable HF_HOME, which tokenizers and data sets follow, too"
_NAMES = Names(
    aliases={"torch_dtype": "dtype", "use_auth_token": "token"},
    no_effect={
        "device_map": "weights are put on JAX's devices",
        "trust_remote_code": "code of a model repository is never run",
        "low_cpu_mem_usage": "weights are read tensor by tensor anyway",
        "attn_implementation": "attention is chosen by device and shape",
        "use_cache": "training never builds a KV cache, and generation always does",
        "use_safetensors": "only safetensors files are read",
        "use_gradient_checkpointing": "SFTConfig(gradient_checkpointing=...) decides",
        "use_exact_model_name": "names are never replaced by others",
        "fix_tokenizer": "tokenizers are used as they are",
        "fast_inference": "generation runs in JAX, there is no vLLM",
        "gpu_memory_utilization": "there is no vLLM; XLA_CLIENT_MEM_FRACTION bounds what JAX takes",
        "max_lora_rank": "it is about vLLM, which there is none of",
        "disable_log_stats": "it is about vLLM, which there is none of",
        "random_state": "loading draws no random numbers",
        "text_only": "the text model is all that is loaded",
        "unsloth_tiled_mlp": "the feed-forward layer is computed in parts where a plan of rematerialisation says so",
        "float32_mixed_precision": "trained parameters are float32, activations of the model's dtype",
        "device_map_planner_kwargs": "weights are put on JAX's devices",
    },
    refused={
        "load_in_8bit": ((False, None), "use load_in_4bit=True (NF4), or load_in_4bit=False for 16 bits"),
        "load_in_fp8": ((False, None), "checkpoints in FP8 are read, but weights are held in NF4 or 16 bits"),
        "full_finetuning": ((False, None), "only adapters, embeddings and head are trained; use get_peft_model"),
        "qat_scheme": ((None,), "quantisation-aware training is not implemented"),
        "rope_scaling": ((None,), "put 'rope_scaling' into the config.json of a copy of the model"),
        "float8_kv_cache": ((False, None), "the key/value cache has the model's dtype"),
        "resize_model_vocab": ((None,), "the vocabulary stays as it is; get_chat_template adds no tokens"),
        "num_labels": ((None,), "only causal language models are trained"),
        "auto_model": ((None,), "use lora_jax.AutoModelForCausalLM"),
        "cache_dir": ((None,), _CACHE),
        "local_files_only": ((False, None), "set the environment variable HF_HUB_OFFLINE=1"),
        "config": ((None,), "change config.json in a copy of the model"),
        "target_parameters": ((None,), "name the experts' linears in target_modules of get_peft_model"),
    },
)  # fmt: skip


def _load_options(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `lora_jax.from_pretrained` that another library's call means."""
    given = dict(given)
    quantization = given.pop("quantization_config", None)
    if given.pop("load_in_16bit", None):
        if given.get("load_in_4bit"):
            raise ValueError(f"{where}: got load_in_4bit=True and load_in_16bit=True; give one")
        given["load_in_4bit"] = False
    if quantization is not None:
        if given.get("load_in_4bit") is not None:
            raise ValueError(f"{where}: got load_in_4bit and quantization_config, which both say how; give one")
        given |= _from_bitsandbytes(where, quantization)
    return {**_DEFAULTS, **resolve_names(where, given, _DEFAULTS, _NAMES)}


def _from_bitsandbytes(where: str, quantization: Any) -> dict[str, Any]:
    """load_in_4bit and double_quantize of a BitsAndBytesConfig, transformers' or ours, or a dict."""

    def get(name: str, default: Any) -> Any:
        held = quantization.get(name) if isinstance(quantization, Mapping) else getattr(quantization, name, None)
        return default if held is None else held

    if get("load_in_8bit", False):
        raise ValueError(f"{where}: load_in_8bit is not supported: {_NAMES.refused['load_in_8bit'][1]}.")
    kind = get("bnb_4bit_quant_type", "fp4")  # the default of bitsandbytes
    if get("load_in_4bit", False) and kind != "nf4":
        raise ValueError(f'{where}: bnb_4bit_quant_type is {kind!r}; wanted "nf4", the only 4-bit format here')
    return {"load_in_4bit": get("load_in_4bit", False), "double_quantize": get("bnb_4bit_use_double_quant", False)}


@dataclasses.dataclass(frozen=True)
class BitsAndBytesConfig:
    """What transformers' class of this name says of quantisation; no bitsandbytes is used."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "fp4"  # only "nf4" can be loaded
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: Any = None  # not looked at: `dtype` of from_pretrained is that of the activations


class AutoModelForCausalLM:
    """Loads a causal language model of any architecture that is implemented, and no tokenizer."""

    architecture: ClassVar[str | None] = None
    """`architectures[0]` of the config.json of all models that this class loads; None for any."""

    def __init__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"{name} has no instances: {name}.from_pretrained(folder) returns a lora_jax.CausalLM")

    @classmethod
    def from_pretrained(cls, model_name: str | Path, **options: Any) -> CausalLM:
        """The model that `lora_jax.from_pretrained` returns, without its tokenizer, which need not be there.

        Args:
          model_name: local folder, hub id, or a folder with a PEFT adapter (whose base model is loaded too).
          options: those of `lora_jax.from_pretrained`, with the same defaults (`load_in_4bit=True` among them), and
            transformers' (`quantization_config`, `torch_dtype` ...).

        Raises:
          ValueError: the model is of another architecture than this class's, or an option asks for what is not there.
          TypeError: an unknown option.
          As `lora_jax.from_pretrained` besides.
        """
        options = _load_options(f"{cls.__name__}.from_pretrained", options)
        return load(model_name, architecture=cls.architecture, with_tokenizer=False, **options)[0]


AutoPeftModelForCausalLM = AutoModelForCausalLM  # which takes adapter folders, too


class FastLanguageModel:
    """Unsloth's names for `lora_jax.from_pretrained` and `get_peft_model`."""

    def __init__(self) -> NoReturn:
        raise TypeError("FastLanguageModel has no instances: FastLanguageModel.from_pretrained(...) returns a model")

    @staticmethod
    def from_pretrained(
        model_name: str | Path,
        max_seq_length: int | None = None,
        dtype: Any = None,
        load_in_4bit: bool | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> tuple[CausalLM, Any]:
        """`lora_jax.from_pretrained`, in NF4 unless told otherwise.

        Args:
          model_name: local folder, hub id, or a folder with a PEFT adapter (whose base model is loaded too).
          max_seq_length: longest row that will be trained on; None for what the model was made for.
          dtype: "bfloat16" or "float32"; None for the checkpoint's own.
          load_in_4bit: None for True, unless `load_in_16bit` or `quantization_config` says otherwise.
          token: hub token for gated repositories.
          options: others of `lora_jax.from_pretrained`, of Unsloth and of transformers.

        Returns:
          (model, tokenizer).

        Raises:
          ValueError, TypeError: an option asks for what is not there, or is unknown; or as `lora_jax.from_pretrained`.
        """
        given = {"max_seq_length": max_seq_length, "dtype": dtype, "token": token, **options}
        given |= {} if load_in_4bit is None else {"load_in_4bit": load_in_4bit}
        return load(model_name, **_load_options("FastLanguageModel.from_pretrained", given))

    get_peft_model = staticmethod(get_peft_model)

    @staticmethod
    def for_inference(model: CausalLM) -> CausalLM:
        """The model itself, which generates at any time."""
        return model

    @staticmethod
    def for_training(model: CausalLM, **options: Any) -> CausalLM:
        """The model itself, which trains at any time."""
        resolve_names("for_training", options, (), _NAMES)
        return model


FastModel = FastLanguageModel


class PeftModel:
    """PEFT's name for `lora_jax.load_adapter`."""

    def __init__(self) -> NoReturn:
        raise TypeError("PeftModel has no instances: PeftModel.from_pretrained(model, folder) returns the model")

    @staticmethod
    def from_pretrained(model: CausalLM, model_id: str | Path, **options: Any) -> CausalLM:
        """Puts a PEFT adapter of a folder or the hub on a base model, in place; it can be trained further."""
        from lora_jax.export.peft import load_adapter
        from lora_jax.hf_checkpoint import resolve_folder

        known = {"revision", "token", "is_trainable", "adapter_name"}
        options = resolve_names("PeftModel.from_pretrained", options, known, _NAMES)
        where = {name: options[name] for name in ("revision", "token") if name in options}
        return load_adapter(model, resolve_folder(model_id, **where))


def prepare_model_for_kbit_training(model: CausalLM, *_: Any, **__: Any) -> CausalLM:
    """The model itself: its base is frozen, and trained parameters are float32, without that."""
    return model


def is_bfloat16_supported() -> bool:
    """True: every device that JAX runs on computes in bfloat16."""
    return True


is_bf16_supported = is_bfloat16_supported


_DEFAULTS: dict[str, Any] = from_pretrained.__kwdefaults__ or {}

_TEXT = "only models of text are trained; lora_jax.FastLanguageModel loads the text model of some that see"
_RL = "only supervised fine-tuning is implemented (lora_jax.SFTTrainer)"
# Classes of other libraries that scripts import, and why there is none of their kind.
NOT_THERE = {
    **dict.fromkeys(
        ("FastVisionModel", "FastDiffusionModel", "FastSentenceTransformer", "UnslothVisionDataCollator"), _TEXT
    ),
    **dict.fromkeys(
        [
            f"{method}{kind}"
            for method in ("DPO", "ORPO", "CPO", "KTO", "BCO", "GRPO", "RLOO", "PPO", "GKD", "OnlineDPO", "Reward")
            for kind in ("Trainer", "Config")
        ],
        _RL,
    ),
}


def _not_there(name: str) -> type:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{name} is not implemented: {NOT_THERE[name]}")

    names = ("from_pretrained", "get_peft_model", "for_inference", "for_training")
    doc = f"Refused: {NOT_THERE[name]}."
    return type(name, (), {"__doc__": doc, "__new__": refuse} | {method: staticmethod(refuse) for method in names})


def __getattr__(name: str) -> type:
    if name in NOT_THERE:
        return globals().setdefault(name, _not_there(name))
    if name not in ARCHITECTURES:
        raise AttributeError(f"module 'lora_jax.auto' has no attribute {name!r}")
    doc = f"Loads a `{name}`, refusing every other architecture, and no tokenizer."
    made = type(name, (AutoModelForCausalLM,), {"__doc__": doc, "__module__": __name__, "architecture": name})
    globals()[name] = made  # the next access finds the same class
    return made
