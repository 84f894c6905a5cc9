"""`SFTTrainer`: supervised fine-tuning with the interface of TRL's trainer, over the pure `train_step`.

The loop itself is in `lora_jax.loop`. For one of your own use `make_train_step` and any optax optimizer.
"""

import contextlib
import dataclasses
import inspect
import itertools
import math
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from lora_jax import checkpoint as ckpt
from lora_jax.batches import BatchIterator, Example, eval_batches
from lora_jax.config import Names, SFTConfig, resolve_names, say_once
from lora_jax.distributed import agree, is_first, several, together
from lora_jax.loop import Run, TrainerControl, TrainerState, TrainOutput
from lora_jax.sharding import fetch, put_batch, row_shards

if TYPE_CHECKING:
    from lora_jax.model import CausalLM

__all__ = ["SFTConfig", "SFTTrainer", "TrainOutput", "TrainerControl", "TrainerState"]

# Arguments of TRL's SFTTrainer that cannot be honoured here, and what to do instead.
_REFUSED = {
    "compute_metrics": "use a callback with on_evaluate",
    "preprocess_logits_for_metrics": "logits are never formed in training",
    "optimizer_cls_and_kwargs": "pass optimizers=(an optax transformation, a schedule or None)",
    "model_init": "load the model first",
    "data_collator": "batches are built by lora_jax.batches; give rows with input_ids and labels for masks of your own",
}
# Arguments that earlier versions of TRL's SFTTrainer took, and now SFTConfig does.
_OF_ARGS = ("max_seq_length", "max_length", "packing", "dataset_text_field", "dataset_num_proc", "dataset_batch_size")
_OF_ARGS += ("dataset_kwargs", "neftune_noise_alpha", "num_of_sequences", "chars_per_token", "eval_packing")
_NAMES = Names(
    no_effect={"infer_schema": "rows are read as they are", "use_cache": "training never builds a KV cache"},
    refused={name: ((None,), instead) for name, instead in _REFUSED.items()},
)
# Methods of transformers' Trainer that subclasses override, which nothing here would call.
_HOOKS = {
    "compute_loss": "pass compute_loss_func",
    "training_step": "write a loop over lora_jax.make_train_step",
    "prediction_step": "use a callback with on_evaluate",
    "create_optimizer": "pass optimizers=(an optax transformation, a schedule or None)",
    "create_scheduler": "pass optimizers=(an optax transformation, its schedule)",
    "create_optimizer_and_scheduler": "pass optimizers=(an optax transformation, its schedule)",
    "get_train_dataloader": "give the rows as train_dataset",
    "get_eval_dataloader": "give the rows as eval_dataset",
    "log": "use a callback with on_log",
}
# Collators that only pad and copy labels, which is done here anyway.
_PLAIN_COLLATORS = ("DataCollatorForSeq2Seq", "DataCollatorWithPadding", "DefaultDataCollator", "default_data_collator")


class SFTTrainer:
    """Fine-tunes the adapter of a model on a data set.

    Args:
        model: a `CausalLM`, with an adapter or together with `peft_config`.
        args: the settings; default `SFTConfig()`.
        train_dataset: a file, a folder, a `datasets.Dataset` or an iterable of rows; see `lora_jax.data.load_rows`.
        eval_dataset: likewise.
        processing_class: the tokenizer. Not needed for rows that hold `input_ids`.
        tokenizer: another name for `processing_class`.
        peft_config: a `LoraConfig` for a model that has no adapter yet.
        formatting_func: makes the text of a row.
        callbacks: objects with any of on_train_begin, on_epoch_begin, on_step_begin, on_step_end, on_log, on_evaluate,
            on_save, on_epoch_end, on_train_end(args, state, control, **kwargs); `transformers.TrainerCallback` works.
        optimizers: (an optax transformation, its schedule or None) in place of what `args` describe. The transformation
            includes the learning rate; the schedule is only shown.
        compute_loss_func: a loss in place of the cross-entropy, of training and of evaluation, as in transformers but
            on JAX arrays: see `lora_jax.step.LossFunction`. It needs the logits of all tokens of a micro-batch.
        more: what earlier versions of TRL took here and now `SFTConfig` takes (`max_seq_length`, `packing`,
            `dataset_text_field`); transformers' `data_collator`s that only pad, which have no effect.

    Raises:
        ValueError: arguments that contradict each other, or data that cannot be trained on.
        TypeError: an unknown argument, or a subclass that overrides a method of transformers' trainer.
        NotImplementedError: `compute_loss_func` with a mesh that shares out more than rows.
    """

    def __init__(
        self,
        model: "CausalLM",
        args: SFTConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        tokenizer: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[Mapping[str, Any]], str] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        compute_loss_func: Callable[..., Any] | None = None,
        **more: Any,
    ) -> None:
        of_args = _settle(more)
        if hooks := [name for name in _HOOKS if hasattr(self, name)]:
            raise TypeError(f"{type(self).__name__}: {hooks[0]} would never be called. Instead {_HOOKS[hooks[0]]}.")
        if args is not None and not isinstance(args, SFTConfig):
            raise TypeError(f"SFTTrainer: args is a {type(args).__name__}; wanted a lora_jax.SFTConfig.")
        if tokenizer is not None and processing_class is not None and tokenizer is not processing_class:
            raise ValueError(
                "SFTTrainer: got processing_class and tokenizer, which are two names for one thing, with different "
                "values. Give only processing_class."
            )
        self.args = _with_settings(args or SFTConfig(), of_args)
        agree("SFTConfig", self.args.to_dict())
        self.model = _with_adapter(model, peft_config)
        self.mesh = getattr(self.model, "mesh", None)
        wanted = self.args.mesh if self.mesh is None or self.args.mesh != "auto" else None
        if (mesh := wanted or self.mesh) is not None:  # a fresh adapter is not on the mesh yet
            if self.args.optim_is_paged:
                raise ValueError(
                    f"SFTTrainer: optim={self.args.optim!r} keeps its state on the host, which is not possible with a "
                    "mesh. Use 'adamw_8bit' or 'adamw_torch'."
                )
            self.mesh = self.model.shard(mesh).mesh
        elif several():
            raise ValueError(
                'SFTTrainer: there are several processes and no mesh over their devices. Set mesh="auto", or sizes '
                'such as mesh={"data": 2, "fsdp": 8}.'
            )
        self._row_shards = row_shards(self.mesh)
        self.processing_class = processing_class if processing_class is not None else tokenizer
        self.callbacks: list[Any] = [c() if isinstance(c, type) else c for c in callbacks or ()]
        self.state = TrainerState()
        self.control = TrainerControl()
        self.max_length = self.args.max_length or getattr(model, "max_seq_length", None) or 1024
        self._formatting_func = formatting_func
        self._optimizers = optimizers
        self._compute_loss_func = compute_loss_func
        self._responses: tuple[str, str, bool] | None = None
        self._train_rows_read = self._load(train_dataset, self._rows_needed())
        self._eval_rows_read = self._load(eval_dataset)
        self._train_examples = self._tokenize(self._train_rows_read)
        self._eval_examples = self._tokenize(self._eval_rows_read)
        if self.args.eval_strategy != "no" and self._eval_examples is None:
            raise ValueError(
                f"SFTTrainer: eval_strategy={self.args.eval_strategy!r} wants an eval_dataset; got none. Pass one, or "
                "set eval_strategy='no'."
            )
        self._batches = None if self._train_examples is None else self._make_batches(self._train_examples)
        self._eval_step: Callable[..., Any] | None = None

    # ---- what users call -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Train, from the start or from a checkpoint.

        On SIGTERM or Ctrl-C the step in progress is finished and saved; then the program ends (SystemExit) or
        KeyboardInterrupt is raised. However this ends, `model` holds the parameters of the last good step.

        Args:
            resume_from_checkpoint: True for the newest intact checkpoint in `output_dir`, or a folder `checkpoint-N`.
                Data order, optimizer and random numbers continue exactly.

        Raises:
            FloatingPointError: a loss or gradient was not finite; names step and parameter.
            RuntimeError: a trainable parameter has no gradient.
            CheckpointError: a checkpoint cannot be written or does not fit.
            MemoryError: the device is too small; says what would fit.
        """
        if self._batches is None:
            raise ValueError("SFTTrainer.train: there is no train_dataset. Pass one to SFTTrainer.")
        start_from = self._find_start(resume_from_checkpoint)  # before anything in output_dir changes
        return Run(self, self._batches, start_from).run()

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Mean loss per label token over a data set; the default is the trainer's eval_dataset.

        Returns:
            {"eval_loss", "eval_num_label_tokens", "eval_runtime", "epoch"}; also appended to `state.log_history`.
        """
        examples = self._eval_examples if eval_dataset is None else self._tokenize(self._load(eval_dataset))
        if examples is None:
            raise ValueError("SFTTrainer.evaluate: there is no eval_dataset. Pass one here or to SFTTrainer.")
        began = time.perf_counter()
        _, lora, frozen = self.model.split()
        if self._eval_step is None:
            self._eval_step = self._make_eval_step()
        sums = [
            self._eval_step(lora, frozen, self._placed(self.model.with_embeddings(batch)))
            for batch in eval_batches(examples, self._eval_rows, max_length=self.max_length)
        ]
        sums = jax.device_get(sums)
        tokens = sum(int(s["num_label_tokens"]) for s in sums)
        metrics = {
            "eval_loss": float(math.fsum(float(s["loss_sum"]) for s in sums) / tokens),
            "eval_num_label_tokens": tokens,
            "eval_runtime": round(time.perf_counter() - began, 3),
            "epoch": self.state.epoch,
        }
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        self._call("on_log", logs=dict(metrics))
        self._call("on_evaluate", metrics=metrics)
        return metrics

    def _placed(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch if self.mesh is None else put_batch(batch, self.mesh)

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Write the adapter as a PEFT folder, with the tokenizer if there is one.

        Args:
            output_dir: a new folder (FileExistsError if it holds something); default `args.output_dir`, where an
                adapter written before is replaced and everything else stays.
        """
        if output_dir is None:
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self._write_adapter_into(folder, self.processing_class)
            return folder
        path = Path(output_dir)
        with _adapter_here(self.model), together(f"saving the adapter in {path}"):
            if is_first():
                path = Path(self.model.save_pretrained(path))
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(path)
        return path

    def _write_adapter_into(self, folder: Path, tokenizer: Any = None) -> None:
        """The files of the adapter into a folder that holds others, each whole or not at all."""
        with _adapter_here(self.model), together(f"saving the adapter in {folder}"):
            if is_first():
                self._write_adapter(folder, tokenizer)

    def _write_adapter(self, folder: Path, tokenizer: Any) -> None:
        aside = folder / ".adapter.unfinished"
        shutil.rmtree(aside, ignore_errors=True)
        self.model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        for path in sorted(aside.iterdir()):
            os.replace(path, folder / path.name)
        aside.rmdir()

    def train_on_responses(self, instruction_part: str, response_part: str, last_only: bool = False) -> None:
        """Tokenises the data again, to train on responses alone; `chat_templates.train_on_responses_only` explains."""
        self._responses = instruction_part, response_part, last_only
        self._train_examples = self._tokenize(self._train_rows_read)
        self._eval_examples = self._tokenize(self._eval_rows_read)
        self._batches = None if self._train_examples is None else self._make_batches(self._train_examples)

    @property
    def tokenizer(self) -> Any:
        """Another name for `processing_class`."""
        return self.processing_class

    @property
    def train_dataset(self) -> "TokenisedRows | None":
        """What is trained on: rows with `input_ids`, `attention_mask` and `labels`."""
        return None if self._train_examples is None else TokenisedRows(self._train_examples)

    @property
    def eval_dataset(self) -> "TokenisedRows | None":
        """What is evaluated on, likewise."""
        return None if self._eval_examples is None else TokenisedRows(self._eval_examples)

    def add_callback(self, callback: Any) -> None:
        """Add a callback, or a class of one."""
        self.callbacks.append(callback() if isinstance(callback, type) else callback)

    # ---- preparation -----------------------------------------------------------------------------------------------

    def _rows_needed(self) -> int | None:
        """How many rows `max_steps` can use, so that a source without an end can be read; None for all."""
        if self.args.max_steps <= 0 or self.args.packing:
            return None
        return self.args.max_steps * self.args.gradient_accumulation_steps * self._train_rows

    @property
    def _train_rows(self) -> int:
        """Rows of one micro-batch on all devices."""
        return self.args.per_device_train_batch_size * self._row_shards

    @property
    def _eval_rows(self) -> int:
        return self.args.per_device_eval_batch_size * self._row_shards

    def _load(self, dataset: Any, limit: int | None = None) -> Sequence[Mapping[str, Any]] | None:
        if dataset is None:
            return None
        from lora_jax.data import load_rows

        endless = not hasattr(dataset, "__len__") and not isinstance(dataset, str | Path)
        if endless and limit is None and self.args.packing and self.args.max_steps > 0:
            return self._load_for_packing(dataset)
        return load_rows(dataset, limit=limit if endless else None)

    def _load_for_packing(self, dataset: Any) -> Sequence[Mapping[str, Any]]:
        """As many rows of a stream as fill all steps: how many that are is known when they are tokenised."""
        from lora_jax.data import load_rows

        stream, rows, tokens = iter(dataset), [], 0
        wanted = self.args.max_steps * self.args.gradient_accumulation_steps * self._train_rows * self.max_length
        while tokens < wanted and (part := list(itertools.islice(stream, 256))):
            rows += load_rows(part)
            tokens += sum(map(len, self._tokenize(part, quiet=True) or ()))
        return load_rows(rows)

    def _tokenize(self, rows: Sequence[Mapping[str, Any]] | None, quiet: bool = False) -> list[Example] | None:
        if rows is None:
            return None
        from lora_jax.data import tokenize_rows

        if self.processing_class is None and "input_ids" not in rows[0]:
            raise ValueError(
                "SFTTrainer: rows of text want a tokenizer; got none. Pass processing_class=tokenizer (from_pretrained "
                "returns it), or rows that hold input_ids."
            )
        with warnings.catch_warnings():
            if quiet:
                warnings.simplefilter("ignore")
            examples = tokenize_rows(
                rows,
                self.processing_class,
                max_length=self.max_length,
                dataset_text_field=self.args.dataset_text_field,
                formatting_func=self._formatting_func,
                completion_only_loss=self.args.completion_only_loss,
                assistant_only_loss=self.args.assistant_only_loss,
                responses=None if self._responses is None else self._responses[:2],
                last_response_only=self._responses is not None and self._responses[2],
                share_out=True,
                progress=not self.args.disable_tqdm and not quiet,
            )
        vocabulary = getattr(self.model.config, "vocab_size", None)
        highest = max(int(example.input_ids.max()) for example in examples)
        if vocabulary is not None and highest >= vocabulary:
            raise ValueError(
                f"SFTTrainer: the data holds token id {highest}, but the model has {vocabulary} tokens. Use the "
                "tokenizer that belongs to the model."
            )
        return examples

    def _make_batches(self, examples: list[Example]) -> BatchIterator:
        return BatchIterator(
            examples,
            batch_size=self._train_rows,
            accumulation=self.args.gradient_accumulation_steps,
            max_length=self.max_length,
            packing=self.args.packing,
            attention_mask=self.args.router_aux_loss_coef is not None,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def _make_train_step(self, optimizer: Any) -> Callable[..., Any]:
        from lora_jax.kernels.dispatch import default_platform
        from lora_jax.step import make_train_step, use_compile_cache

        if default_platform() == "gpu":  # where a step takes half a minute to compile
            use_compile_cache()
        args = self.args
        scan = True if args.scan_layers is None and not args.packing else args.scan_layers
        return make_train_step(
            self.model,
            optimizer,
            remat=args.remat,
            memory_budget=args.memory_budget,
            quantized_activations=args.quantized_activations,
            scan_layers=scan,
            router_aux_loss_coef=args.router_aux_loss_coef,
            compute_loss_func=self._compute_loss_func,
        )

    def _make_eval_step(self) -> Callable[..., Any]:
        from lora_jax.step import make_eval_step

        return make_eval_step(self.model, self._compute_loss_func)

    def _find_start(self, resume: bool | str | Path | None) -> Path | None:
        """The checkpoint to resume from. Raises ValueError if the run would meet checkpoints of another run."""
        output_dir = Path(self.args.output_dir)
        start = None
        if resume is True:
            start = ckpt.latest_checkpoint(output_dir)
            if start is None:
                raise ValueError(
                    f"SFTTrainer.train: resume_from_checkpoint=True, but {output_dir} holds no intact checkpoint. "
                    "Train without it, or name a folder checkpoint-N."
                )
        elif resume:
            start = Path(resume)
        # With resume=True later ones are damaged (that was said), and are replaced as training gets there.
        after = 0 if start is None else ckpt.step_of(start)
        later = [] if resume is True else [p for p in ckpt.list_checkpoints(output_dir) if ckpt.step_of(p) > after]
        if later and not self.args.overwrite_output_dir:
            raise ValueError(
                f"SFTTrainer.train: {output_dir} already holds {later[-1].name}, which this run would mix with its own "
                "checkpoints. Continue it with train(resume_from_checkpoint=True), choose another output_dir, or set "
                "overwrite_output_dir=True to delete it."
            )
        return start

    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same for a resumed run to see the same data in the same order, and the same base."""
        crc = 0
        for example in self._train_examples or ():
            crc = zlib.crc32(example.labels.tobytes(), zlib.crc32(example.input_ids.tobytes(), crc))
        hf_config = getattr(self.model, "hf_config", None)
        return {
            "base_model": None if hf_config is None else zlib.crc32(repr(sorted(hf_config.items())).encode()),
            "examples": len(self._train_examples or ()),
            "tokens_crc32": crc,
            "per_device_train_batch_size": self._train_rows,  # of all devices: their number may change
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "packing": self.args.packing,
            "max_length": self.max_length,
            "seed": self.args.seed,
            "data_seed": self.args.data_seed,
        }

    # ---- callbacks -------------------------------------------------------------------------------------------------

    def _call(self, event: str, **kwargs: Any) -> None:
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is None:
                continue
            answer = method(
                self.args,
                self.state,
                self.control,
                model=self.model,
                processing_class=self.processing_class,
                train_dataloader=self._batches,
                eval_dataloader=self._eval_examples,
                **kwargs,
            )
            self.control = self.control if answer is None else answer


@contextlib.contextmanager
def _adapter_here(model: Any) -> Iterator[None]:
    """While the block runs the adapter's arrays are on this host, whole, if they were spread over several processes."""
    if not several():
        yield
        return
    _, lora, frozen = model.split()
    beside = fetch(frozen, only=("start_a", "start_b", "weight_norm"))  # what PiSSA and DoRA keep of the start
    nnx.update(model.module, fetch(lora), beside)
    try:
        yield
    finally:
        nnx.update(model.module, lora, frozen)


def _with_adapter(model: Any, peft_config: Any) -> Any:
    has_adapter = getattr(model, "lora_config", None) is not None
    if peft_config is None:
        if not has_adapter:
            raise ValueError(
                "SFTTrainer: the model has no adapter, so there is nothing to train. Call "
                "lora_jax.get_peft_model(model) first, or pass peft_config=LoraConfig(...)."
            )
        return model
    if has_adapter:
        raise ValueError("SFTTrainer: the model has an adapter already; got peft_config as well. Drop one of the two.")
    from lora_jax.lora import LoraConfig, get_peft_model

    if not isinstance(peft_config, LoraConfig):
        raise TypeError(
            f"SFTTrainer: peft_config is a {type(peft_config).__module__}.{type(peft_config).__name__}; wanted a "
            "lora_jax.LoraConfig (it has PEFT's field names)."
        )
    return get_peft_model(model, peft_config, verbose=False)


class TokenisedRows(Sequence):
    """Examples as rows: dicts of lists of equal length."""

    def __init__(self, examples: Sequence[Example]):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return TokenisedRows(self._examples[index])
        example = self._examples[index]
        ids = example.input_ids.tolist()
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": example.labels.tolist()}


def _settle(more: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among SFTTrainer's other arguments; refuses what cannot be honoured."""
    more, collator = dict(more), more.get("data_collator")
    name = getattr(collator, "__name__", type(collator).__name__)
    pads = name in _PLAIN_COLLATORS or (
        name == "DataCollatorForLanguageModeling" and not getattr(collator, "mlm", False)
    )
    if collator is not None and pads:
        say_once(f"SFTTrainer: data_collator has no effect: {name} pads, which is done here anyway.")
        del more["data_collator"]
    known = [p for p in inspect.signature(SFTTrainer).parameters if p != "more"]
    given = resolve_names("SFTTrainer", more, [*known, *_OF_ARGS], _NAMES)
    return {name: value for name, value in given.items() if value is not None}


def _with_settings(args: SFTConfig, settings: Mapping[str, Any]) -> SFTConfig:
    """The config with settings that SFTTrainer was given, under any of their names."""
    given = SFTConfig(**settings)  # refuses what it must
    names = {"max_length" if name == "max_seq_length" else name for name in settings}
    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    return dataclasses.replace(args, **{name: getattr(given, name) for name in names & fields})
