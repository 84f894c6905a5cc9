"""`SFTConfig`: the settings of a training run, under Hugging Face's and TRL's names.

A script written for `trl.SFTConfig` keeps its arguments. Each name falls in one of four groups: a field below does what
it does in Hugging Face; an alias is another name for a field; a name that only concerns torch is accepted with a note;
everything else is refused, with the nearest valid name or with what to do instead. Nothing is ignored in silence.
"""

import dataclasses
import difflib
import functools
import importlib.util
import math
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw", "adamw_hf", "adamw_jax")
_ADAMW_8BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
_ADAMW_PAGED = ("paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit")
# Trackers: the module that each needs, and how it is installed.
TRACKERS = {
    "tensorboard": ("tensorboardX", "pip install tensorboardX"),
    "wandb": ("wandb", "pip install wandb"),
    "trackio": ("trackio", "pip install trackio"),
}
_REPORTERS = ("none", "jsonl", *TRACKERS)

_ALIASES = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "activation_checkpointing": "gradient_checkpointing",
}

# Names of the torch world that have nothing to act on here. Accepted, and said once.
_NO_EFFECT = {
    "dataloader_num_workers": "batches are prepared while the device runs",
    "dataloader_pin_memory": "JAX has no pinned-memory loader",
    "dataloader_persistent_workers": "there are no loader processes",
    "dataloader_prefetch_factor": "there are no loader processes",
    "dataset_num_proc": "rows are tokenized in this process",
    "remove_unused_columns": "columns that are not needed are never read",
    "ddp_find_unused_parameters": "there is no DistributedDataParallel",
    "ddp_timeout": "there is no DistributedDataParallel",
    "gradient_checkpointing_kwargs": "recomputation is chosen by gradient_checkpointing alone",
    "tf32": "matmul precision follows the model's dtype",
    "log_level": "messages are few and always shown",
    "skip_memory_metrics": "memory is read from the device at no cost",
    "torch_empty_cache_steps": "there is no torch cache",
    "use_cache": "training never builds a KV cache",
    "optim_args": "AdamW takes its arguments from adam_beta1, adam_beta2, adam_epsilon and weight_decay",
    "activation_checkpointing_kwargs": "recomputation is chosen by gradient_checkpointing alone",
    "average_tokens_across_devices": "the loss is always the mean over all label tokens of a step",
    "bf16_full_eval": "evaluation runs in the model's dtype",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "include_num_input_tokens_seen": "num_tokens is in every record",
    "log_level_replica": "messages are few and always shown",
    "log_on_each_node": "messages are few and always shown",
    "trackio_space_id": "the environment variable TRACKIO_SPACE_ID says so to trackio",
    "prediction_loss_only": "evaluation computes the loss alone",
    "eval_do_concat_batches": "evaluation computes the loss alone",
    "eval_accumulation_steps": "evaluation computes the loss alone",
    "eval_use_gather_object": "evaluation computes the loss alone",
    "batch_eval_metrics": "evaluation computes the loss alone",
    "save_on_each_node": "the first process writes",
    "save_safetensors": "adapters are always written as safetensors",
    "full_determinism": "runs repeat bit for bit on the same device and software",
    "accelerator_config": "there is no Accelerate",
    "dataloader_multiprocessing_context": "there are no loader processes",
    "dataloader_in_order": "there are no loader processes",
    "ddp_bucket_cap_mb": "there is no DistributedDataParallel",
    "ddp_broadcast_buffers": "there is no DistributedDataParallel",
    "ddp_static_graph": "there is no DistributedDataParallel",
    "ddp_backend": "there is no DistributedDataParallel",
    "local_rank": "JAX knows its processes",
    "no_cuda": "the device is JAX's; set JAX_PLATFORMS=cpu to train on the CPU",
    "use_cpu": "the device is JAX's; set JAX_PLATFORMS=cpu to train on the CPU",
    "hub_token": "nothing is uploaded while training runs",
    "hub_model_id": "nothing is uploaded while training runs",
    "hub_private_repo": "nothing is uploaded while training runs",
    "hub_strategy": "nothing is uploaded while training runs",
    "hub_always_push": "nothing is uploaded while training runs",
    "hub_revision": "nothing is uploaded while training runs",
    "trackio_bucket_id": "trackio keeps its runs on this machine",
    "trackio_static_space_id": "trackio keeps its runs on this machine",
    "enable_jit_checkpoint": "a signal saves the step in progress anyway",
    "dataset_batch_size": "rows are tokenized one by one",
    "pad_to_multiple_of": "rows are padded to a few lengths, so that few programs are compiled",
    "padding_free": "packing=True packs without any example seeing another",
    "packing_strategy": "packing never cuts an example",
    "activation_offloading": 'gradient_checkpointing="offload" moves activations to the host\'s memory',
    "num_of_sequences": "packing knows the lengths of all examples",
    "chars_per_token": "packing knows the lengths of all examples",
    "length_column_name": "lengths are counted",
    "disable_log_stats": "there is no vLLM",
}

# Names whose request cannot be honoured: {name: (values that ask for nothing, what to do instead)}.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "fp16": ((False, None), "use bf16=True; float16 would need loss scaling"),
    "torch_compile": ((False, None), "leave it out: the step is compiled by XLA anyway"),
    "deepspeed": ((None, ""), "leave it out; LoRA state is small"),
    "fsdp": ((None, "", []), "leave it out"),
    "push_to_hub": ((False, None), "upload the folder written by save_model() with huggingface_hub"),
    "neftune_noise_alpha": ((None, 0, 0.0), "leave it out; it is not implemented"),
    "label_smoothing_factor": ((0, 0.0, None), "leave it out; it is not implemented"),
    "auto_find_batch_size": ((False, None), "give per_device_train_batch_size; running out of memory says what fits"),
    "group_by_length": ((False, None), "use packing=True, which wastes less than grouping"),
    "logging_strategy": (("steps",), "use logging_steps"),
    "dataset_kwargs": ((None, {}), "leave it out"),
    "eval_packing": ((None,), "leave it out; packing applies to training alone"),
    "resume_from_checkpoint": ((None, False), "pass it to trainer.train(resume_from_checkpoint=...)"),
    "do_train": ((True, False, None), "call trainer.train() or trainer.evaluate()"),
    "eval_delay": ((0, 0.0, None), "leave it out"),
    "loss_type": (("nll", None), "leave it out; the loss is token-level cross-entropy"),
    "use_liger_kernel": ((False, None), "leave it out; the loss here never forms the logits either"),
    "liger_kernel_config": ((None,), "leave it out; the loss here never forms the logits"),
    "restore_callback_states_from_checkpoint": ((False, None), "leave it out; callbacks keep their own state"),
    "fp16_full_eval": ((False, None), "evaluation runs in the model's dtype"),
    "torch_compile_backend": ((None,), "leave it out: the step is compiled by XLA anyway"),
    "torch_compile_mode": ((None,), "leave it out: the step is compiled by XLA anyway"),
    "fsdp_config": ((None, {}), "leave it out"),
    "parallelism_config": ((None,), "leave it out"),
    "optim_target_modules": ((None,), "leave it out: optimizers on projected gradients are not implemented"),
    "include_for_metrics": ((None, []), "write a callback with on_evaluate"),
    "save_only_model": ((False, None), "checkpoints hold what an exact resume needs; trainer.save_model() writes less"),
    "ignore_data_skip": ((False, None), "a resumed run continues with the rows that come next"),
    "dataloader_drop_last": ((False, None), "leave it out; the last rows are trained on"),
    "label_names": ((None,), "leave it out; the column is called labels"),
    "train_sampling_strategy": ((None, "random"), "leave it out; rows are shuffled by data_seed"),
    "shuffle_dataset": ((False, None), "leave it out; rows are shuffled by data_seed, packed ones too"),
    "model_init_kwargs": ((None, {}), "load the model first, by from_pretrained"),
    "chat_template_path": ((None,), "set tokenizer.chat_template, or call get_chat_template"),
    "eos_token": ((None,), "set tokenizer.eos_token"),
    "pad_token": ((None,), "set tokenizer.pad_token; padding is masked whatever it is"),
    "do_eval": ((False, True, None), "set eval_strategy"),
    "do_predict": ((False, None), "call lora_jax.generate_text"),
    "debug": (("", None, []), "leave it out"),
    "jit_mode_eval": ((False, None), "leave it out"),
    "use_dft_loss": ((False, None), "leave it out; the loss is token-level cross-entropy"),
}  # fmt: skip


def did_you_mean(text: Any, known: Collection[str]) -> str:
    """ " Did you mean 'x'?" for what is nearly one of the known, otherwise nothing: for the end of a message."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(text).lower(), names, n=1)
    return f" Did you mean {names[near[0]]!r}?" if near else ""


_said: set[str] = set()


def say_once(message: str) -> None:
    """Print a note to stderr, the first time only."""
    if message not in _said:
        _said.add(message)
        print(f"lora-jax: {message}", file=sys.stderr)


@dataclass(frozen=True)
class Names:
    """What other libraries' names for arguments mean here; values of `refused` are (harmless values, what to do)."""

    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    no_effect: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name -> why
    refused: Mapping[str, tuple[tuple[Any, ...], str]] = dataclasses.field(default_factory=dict)


def resolve_names(where: str, given: Mapping[str, Any], known: Collection[str], names: Names) -> dict[str, Any]:
    """The arguments under their own names, without those that have no effect, which are named once.

    Args:
        where: who was called, for messages.
        given: arguments by name.
        known: names that are passed on as they are.
        names: the other ones.

    Raises:
        ValueError: an argument asks for what is not there, or one setting is given twice.
        TypeError: an unknown name; says the nearest known one.
    """
    resolved: dict[str, Any] = {name: value for name, value in given.items() if name in known}
    for name, value in given.items():
        if name in known:
            continue
        if name in names.aliases:
            target = names.aliases[name]
            if resolved.get(target, value) != value:
                raise ValueError(
                    f"{where}: got {target}={resolved[target]!r} and {name}={value!r}, which are two names for one "
                    f"setting. Give only {target}."
                )
            resolved[target] = value
        elif name in names.no_effect:
            say_once(f"{where}: {name} has no effect: {names.no_effect[name]}.")
        elif name in names.refused:
            harmless, instead = names.refused[name]
            if not any(value is h or (value == h and type(value) is type(h)) for h in harmless):
                raise ValueError(f"{where}: {name}={_short(value)} is not supported: {instead}.")
        else:
            candidates = sorted({*known, *names.aliases})
            near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Valid names: {', '.join(candidates)}."
            raise TypeError(f"{where}: unknown argument {name!r}. {hint}")
    return resolved


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def explained[C](names: Names) -> Callable[[type[C]], type[C]]:
    """Makes a dataclass resolve other names and explain wrong ones (the generated `__init__` says only TypeError)."""

    def decorate(cls: type[C]) -> type[C]:
        generated: Any = cls.__init__
        fields = [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]

        @functools.wraps(generated)  # keeps the signature with its defaults for help() and IDEs
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            generated(self, *args, **resolve_names(cls.__name__, kwargs, fields, names))

        cls.__init__ = __init__
        return cls

    return decorate


@explained(Names(_ALIASES, _NO_EFFECT, _REFUSED))
@dataclass(frozen=True)
class SFTConfig:
    """Settings of supervised fine-tuning, with the names and meanings of `transformers.TrainingArguments` and TRL.

    `max_seq_length` is accepted for `max_length`, `evaluation_strategy` for `eval_strategy`. Raises TypeError for an
    unknown name or a value of the wrong type, ValueError for a value out of range or a contradiction.
    """

    # --- where results go
    output_dir: str = "trainer_output"  # checkpoints, metrics.jsonl and loss_curve.png are written here
    overwrite_output_dir: bool = False  # True deletes the checkpoints that an earlier run left in output_dir

    # --- how much is trained, on what batches
    per_device_train_batch_size: int = 8  # rows of one micro-batch
    per_device_eval_batch_size: int = 8  # rows of one evaluation batch
    gradient_accumulation_steps: int = 1  # micro-batches of one optimizer step; the result is that of one large batch
    num_train_epochs: float = 3.0  # passes over the data; not used when max_steps is positive
    max_steps: int = -1  # optimizer steps; -1 means num_train_epochs decides

    # --- optimizer (AdamW as torch's)
    learning_rate: float = 2e-4  # peak learning rate
    lr_scheduler_type: str = "linear"  # one of SCHEDULERS, each by Hugging Face's formula
    lr_scheduler_kwargs: dict[str, Any] | None = None  # e.g. {"min_lr_rate": 0.1} for cosine_with_min_lr
    warmup_steps: float = 0  # steps of linear warmup from 0; a fraction below 1 is a share of all steps
    warmup_ratio: float = 0.0  # share of all steps, rounded up; give this or warmup_steps
    weight_decay: float = 0.0  # decoupled: each step multiplies weights by 1 - lr * weight_decay
    optim: str = (
        "adamw_torch"  # or adamw_8bit (state in 8 bits); paged_adamw_8bit, paged_adamw_32bit: state on the host
    )
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8  # added outside the square root
    loraplus_lr_ratio: float | None = None  # LoRA+: B learns this many times faster than A (arXiv 2402.12354)
    loraplus_lr_embedding: float = 1e-6  # with it: peak learning rate of adapters on embeddings
    embedding_learning_rate: float | None = None  # peak learning rate of modules_to_save; None: learning_rate
    max_grad_norm: float | None = 1.0  # gradients are scaled down to this global norm; 0 or None turns it off
    # What backward recomputes: True everything, False nothing, a preset (full, selective, offload, none), "auto" for
    # the fastest plan that fits the device, or a plan: a list of groups of layers, see lora_jax.remat.
    gradient_checkpointing: bool | str | list[dict[str, Any]] = True
    memory_budget: str | int | None = None  # for "auto": bytes, or text such as "20GB"; None: what JAX may take
    # For "auto": whether tensors may be kept for backward in 8 bits where that is faster; gradients are a little off.
    quantized_activations: bool = False
    # True for a loop over layers in the compiled step, False to write them out: faster, but each shape of batch takes
    # longer to compile (25 s instead of 13 for 32 layers). None: written out on a GPU if packing makes all batches
    # alike.
    scan_layers: bool | None = None
    # Devices that share the work: "auto" for all, or sizes such as {"data": 2, "fsdp": 4}, see lora_jax.sharding. Batch
    # sizes are then of each device that has rows of its own. None: the mesh that the model was loaded on, or one.
    mesh: str | dict[str, Any] | None = None
    bf16: bool = True  # no effect: the dtype is that of the loaded model

    # --- randomness
    seed: int = 42  # dropout, and the order of the data unless data_seed is given
    data_seed: int | None = None  # order of the data

    # --- data
    max_length: int | None = None  # tokens per row; None: the model's max_seq_length if it has one, else 1024
    packing: bool = False  # several examples per row, without any seeing another
    dataset_text_field: str = "text"  # the column of plain-text rows
    completion_only_loss: bool | None = None  # None: loss on the completion alone if rows have prompt and completion
    assistant_only_loss: bool | None = None  # None: loss on the assistant's turns alone if rows have messages
    # Mixtures of experts: coefficient of the loss that keeps experts evenly loaded, part of the training loss but not
    # of eval_loss. None: without it, as transformers does unless output_router_logits is set.
    router_aux_loss_coef: float | None = None

    # --- logging, evaluation, checkpoints. Steps below 1 are a share of all steps.
    logging_steps: float = 10  # how often log_history and on_log get an entry; metrics.jsonl has every step
    logging_first_step: bool = False  # an entry for step 1 as well
    # Trackers that get every log: "tensorboard", "wandb", "trackio", or several. metrics.jsonl is always written.
    report_to: str | list[str] | None = "none"
    run_name: str | None = None  # what trackers call the run; None: the name of output_dir
    project: str = "lora-jax"  # the project of a wandb or trackio run
    logging_dir: str | None = None  # where TensorBoard's files go; None: output_dir/tensorboard
    disable_tqdm: bool | None = None  # True: no progress bar
    eval_strategy: str = "no"  # no, steps or epoch
    eval_steps: float | None = None  # None: logging_steps
    eval_on_start: bool = False  # evaluate before the first step
    # What evaluations are compared by: "eval_loss", or what a callback's on_evaluate put into `metrics`; None: nothing,
    # or the loss where one of the next settings needs it.
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None  # None: unless the metric's name ends in "loss"
    load_best_model_at_end: bool = False  # the model ends as it was at its best evaluation, which is always saved
    save_strategy: str = "steps"  # no, steps, epoch, or best: evaluations better than all before
    save_steps: float = 500  # steps and epoch also save at the end
    save_total_limit: int | None = None  # newest checkpoints to keep, the best among them if it is wanted; None: all

    def __post_init__(self) -> None:
        if self.gradient_checkpointing == "unsloth":  # what it calls its own way of recomputing everything
            object.__setattr__(self, "gradient_checkpointing", True)
        for name in ("output_dir", "logging_dir"):
            if isinstance(value := getattr(self, name), Path):
                object.__setattr__(self, name, str(value))
        if self.keeps_best and self.metric_for_best_model is None:
            object.__setattr__(self, "metric_for_best_model", "loss")
        if self.greater_is_better is None and isinstance(self.metric_for_best_model, str):
            object.__setattr__(self, "greater_is_better", not self.metric_for_best_model.endswith("loss"))
        _check_types(self)
        _check_ranges(self)
        _check_choices(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SFTConfig":
        """A config from a mapping such as a YAML file's or parsed flags.

        Text that is a number is read as one where a number is wanted: YAML reads `2e-4` (no dot) as text.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"SFTConfig.from_dict: got {type(values).__name__}, wanted a mapping of names to values.")
        kinds = typing.get_type_hints(cls)
        return cls(**{name: _number_from_text(value, kinds.get(name)) for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """All settings by name."""
        return dataclasses.asdict(self)

    @property
    def max_seq_length(self) -> int | None:
        """Another name for `max_length`."""
        return self.max_length

    @property
    def keeps_best(self) -> bool:
        """Whether the best evaluation's parameters are saved and stay."""
        return bool(self.load_best_model_at_end) or self.save_strategy == "best"

    @property
    def optim_bits(self) -> int:
        """Bits of each element of the optimizer's state, 8 or 32."""
        return 8 if self.optim in _ADAMW_8BIT else 32

    @property
    def optim_is_paged(self) -> bool:
        """Whether the optimizer's state lies in pinned host memory between steps."""
        return self.optim in _ADAMW_PAGED

    @property
    def remat(self) -> str | list[dict[str, Any]]:
        """What `make_train_step` takes: "full" for gradient_checkpointing=True, "none" for False, else as it is."""
        if isinstance(self.gradient_checkpointing, bool):
            return "full" if self.gradient_checkpointing else "none"
        return self.gradient_checkpointing

    def get_warmup_steps(self, total_steps: int) -> int:
        """Warmup steps of a run of `total_steps`, rounded as Hugging Face does (a share is rounded up)."""
        share = self.warmup_ratio or (self.warmup_steps if self.warmup_steps < 1 else 0)
        return math.ceil(total_steps * share) if share else int(self.warmup_steps)


def _number_from_text(value: Any, kind: Any) -> Any:
    kinds = typing.get_args(kind) or (kind,)
    if not isinstance(value, str) or str in kinds or not {int, float} & set(kinds):
        return value
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def _is_a(value: Any, kind: Any) -> bool:
    """Whether `value` fits a field's annotation; an int is a float, a bool is neither."""
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, k) for k in typing.get_args(kind))
    kind = typing.get_origin(kind) or kind
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _check_types(config: SFTConfig) -> None:
    for name, kind in typing.get_type_hints(SFTConfig).items():
        value = getattr(config, name)
        if not _is_a(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else str(kind)
            raise TypeError(f"SFTConfig: {name}={value!r} is of type {type(value).__name__}; wanted {wanted}.")


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": (lambda v: 0 < v < math.inf, "a number above 0"),
    "per_device_train_batch_size": (lambda v: v >= 1, "at least 1"),
    "per_device_eval_batch_size": (lambda v: v >= 1, "at least 1"),
    "gradient_accumulation_steps": (lambda v: v >= 1, "at least 1"),
    "num_train_epochs": (lambda v: 0 < v < math.inf, "a number above 0"),
    "max_steps": (lambda v: v == -1 or v >= 1, "at least 1, or -1 to let num_train_epochs decide"),
    "warmup_steps": (lambda v: 0 <= v < 1 or v == int(v) >= 1, "a whole number, or a share of all steps below 1"),
    "warmup_ratio": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "weight_decay": (lambda v: 0 <= v < math.inf, "0 or above"),
    "loraplus_lr_ratio": (lambda v: 0 < v < math.inf, "a number above 0, usually from 2 to 20"),
    "loraplus_lr_embedding": (lambda v: 0 < v < math.inf, "a number above 0"),
    "embedding_learning_rate": (lambda v: 0 < v < math.inf, "a number above 0"),
    "adam_beta1": (lambda v: 0 <= v < 1, "from 0 to below 1"),
    "adam_beta2": (lambda v: 0 <= v < 1, "from 0 to below 1"),
    "adam_epsilon": (lambda v: 0 < v < math.inf, "a number above 0"),
    "max_grad_norm": (lambda v: 0 <= v < math.inf, "0 (off) or above"),
    "seed": (lambda v: 0 <= v < 2**32, "from 0 to 2**32 - 1"),
    "data_seed": (lambda v: 0 <= v < 2**32, "from 0 to 2**32 - 1"),
    "router_aux_loss_coef": (lambda v: 0 <= v < math.inf, "0 or above, or None to leave that loss out"),
    "max_length": (lambda v: v >= 2, "at least 2 tokens (one to read and one to predict)"),
    "logging_steps": (lambda v: 0 < v < 1 or v == int(v) >= 1, "a whole number, or a share of all steps below 1"),
    "eval_steps": (lambda v: 0 < v < 1 or v == int(v) >= 1, "a whole number, or a share of all steps below 1"),
    "save_steps": (lambda v: 0 < v < 1 or v == int(v) >= 1, "a whole number, or a share of all steps below 1"),
    "save_total_limit": (lambda v: v >= 1, "at least 1, or None to keep all"),
}


def _check_ranges(config: SFTConfig) -> None:
    for name, (is_good, wanted) in _RANGES.items():
        value = getattr(config, name)
        if value is None:
            continue
        if not math.isfinite(value) or not is_good(value):
            raise ValueError(f"SFTConfig: got {name}={value!r}; wanted {wanted}.")


def _check_choices(config: SFTConfig) -> None:
    intervals = ("no", "steps", "epoch")
    for name, choices in {
        "lr_scheduler_type": SCHEDULERS,
        "optim": tuple(dict.fromkeys(_ADAMW + _ADAMW_8BIT + _ADAMW_PAGED)),
        "eval_strategy": intervals,
        "save_strategy": (*intervals, "best"),
    }.items():
        value = getattr(config, name)
        if value not in choices:
            hint = did_you_mean(value, choices)
            raise ValueError(f"SFTConfig: got {name}={value!r}; wanted one of {', '.join(choices)}.{hint}")
    reporters = [config.report_to] if isinstance(config.report_to, str) else config.report_to or []
    for reporter in reporters:
        if reporter not in _REPORTERS:
            raise ValueError(
                f"SFTConfig: got report_to={reporter!r}; wanted one of {', '.join(_REPORTERS)}."
                f"{did_you_mean(reporter, _REPORTERS)} Every step is in output_dir/metrics.jsonl; for another tracker "
                "pass a callback with on_log(args, state, control, logs)."
            )
        module, install = TRACKERS.get(reporter, ("sys", ""))
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"SFTConfig: report_to={reporter!r} needs the package {module}, not installed: {install}")
    if config.warmup_steps and config.warmup_ratio:
        raise ValueError(
            f"SFTConfig: got warmup_steps={config.warmup_steps} and warmup_ratio={config.warmup_ratio}, which say the "
            "same thing twice. Give one."
        )
    if config.lr_scheduler_type == "constant" and (config.warmup_steps or config.warmup_ratio):
        raise ValueError(
            "SFTConfig: lr_scheduler_type='constant' has no warmup. Use 'constant_with_warmup', or drop the warmup."
        )
    if config.eval_strategy == "no" and config.eval_steps is not None:
        raise ValueError(
            f"SFTConfig: eval_steps={config.eval_steps} does nothing with eval_strategy='no'. Add "
            "eval_strategy='steps', or drop eval_steps."
        )
    if config.keeps_best and "no" in (config.eval_strategy, config.save_strategy):
        asked = "load_best_model_at_end=True" if config.load_best_model_at_end else "save_strategy='best'"
        raise ValueError(
            f"SFTConfig: {asked} with eval_strategy={config.eval_strategy!r}, save_strategy={config.save_strategy!r}: "
            "the best is found by evaluating and kept by saving. Set both to 'steps' or 'epoch'."
        )
    if config.memory_budget is not None and config.gradient_checkpointing != "auto":
        raise ValueError(
            f"SFTConfig: memory_budget={config.memory_budget!r} does nothing with gradient_checkpointing="
            f'{config.gradient_checkpointing!r}. Set gradient_checkpointing="auto", or drop memory_budget.'
        )
    if config.quantized_activations and config.gradient_checkpointing != "auto":
        raise ValueError(
            "SFTConfig: quantized_activations=True does nothing with gradient_checkpointing="
            f'{config.gradient_checkpointing!r}. Set gradient_checkpointing="auto", or give a plan with save_quantized.'
        )
    if config.assistant_only_loss and config.completion_only_loss:
        raise ValueError(
            "SFTConfig: got assistant_only_loss=True and completion_only_loss=True. Rows with messages want the first, "
            "rows with prompt and completion the second."
        )
