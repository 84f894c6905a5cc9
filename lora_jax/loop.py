"""The training loop of `SFTTrainer`: what happens between two steps, and what is known of a run while it lasts.

The loop keeps the device busy: the numbers of a step are read while the next one runs, and nothing waits for the device
but logging to callbacks, evaluation and saving.
"""

import dataclasses
import datetime
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import numpy as np

from lora_jax import checkpoint as ckpt
from lora_jax.batches import BatchIterator
from lora_jax.distributed import (
    Preemption,
    ProcessError,
    agree,
    check_shared_folder,
    explain_lost_peer,
    is_first,
    several,
)
from lora_jax.guards import StopSignals, TrainableCheck, check_finite, explain_out_of_memory, is_out_of_memory
from lora_jax.optim import keep_on_host, make_optimizer, stop_at_nonfinite
from lora_jax.reporting import (
    MetricsFile,
    ProgressBar,
    Trackers,
    changed_settings,
    describe_adapter,
    device_memory,
    plot_loss,
    read_metrics,
    say,
    versions,
    write_report,
    write_run,
)
from lora_jax.sharding import describe, put_batch, put_beside
from lora_jax.step import PlannedStep, bytes_held

if TYPE_CHECKING:
    from lora_jax.trainer import SFTTrainer

__all__ = ["Run", "TrainOutput", "TrainerControl", "TrainerState"]


class TrainOutput(NamedTuple):
    """What `SFTTrainer.train` returns."""

    global_step: int  # optimizer steps completed, those before a resume included
    training_loss: float  # mean over the steps of this call
    metrics: dict[str, float]  # run time and speed


@dataclass
class TrainerState:
    """Where training stands, with the names of `transformers.TrainerState`."""

    global_step: int = 0  # optimizer steps completed
    max_steps: int = 0  # optimizer steps of the whole run
    epoch: float = 0.0  # passes over the data completed
    num_train_epochs: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)  # one dict per log and evaluation
    logging_steps: int = 0
    eval_steps: int = 0
    save_steps: int = 0
    train_batch_size: int = 0
    best_metric: float | None = None  # best value of args.metric_for_best_model so far
    best_global_step: int | None = None  # the step it was found at
    best_model_checkpoint: str | None = None  # the folder of that step, once it is saved
    is_world_process_zero: bool = True
    is_local_process_zero: bool = True
    is_hyper_param_search: bool = False


@dataclass
class TrainerControl:
    """What a callback may ask for, with the names of `transformers.TrainerControl`."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False  # refused: steps are counted through, not epoch by epoch
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


@dataclass
class _Step:
    """A step whose numbers are still on the device."""

    number: int
    epoch: float
    metrics: Any
    factors_live: Any  # see TrainableCheck; None when all parameters were seen to train
    tokens: int
    log: bool = False


class Run:
    """One call of `SFTTrainer.train`: the state that lives as long as the loop."""

    def __init__(self, trainer: "SFTTrainer", batches: BatchIterator, resume_from: Path | None) -> None:
        args = trainer.args
        self.trainer, self.args, self.batches, self.resume_from = trainer, args, batches, resume_from
        per_epoch = batches.steps_per_epoch
        total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
        self.total, self.per_epoch = total, per_epoch
        logging_steps = _interval(args.logging_steps, total)
        trainer.state = TrainerState(
            max_steps=total,
            num_train_epochs=math.ceil(total / per_epoch),
            logging_steps=logging_steps,
            eval_steps=logging_steps if args.eval_steps is None else _interval(args.eval_steps, total),
            save_steps=_interval(args.save_steps, total),
            train_batch_size=args.per_device_train_batch_size,
            is_world_process_zero=is_first(),
            is_local_process_zero=is_first(),
        )
        trainer.control = TrainerControl()
        optimizer, self.schedule = trainer._optimizers
        paged = optimizer is None and args.optim_is_paged
        if optimizer is None:
            optimizer, self.schedule = make_optimizer(args, total)
        optimizer = stop_at_nonfinite(optimizer)
        if paged:
            optimizer = keep_on_host(optimizer)
        self.step_function = trainer._make_train_step(optimizer)
        _, lora, self.frozen = trainer.model.split()
        self.lora = _committed(lora)
        self.opt_state = _committed(optimizer.init(lora))
        if trainer.mesh is not None:
            self.opt_state = put_beside(self.opt_state, lora, trainer.mesh)
        self.check = TrainableCheck()
        self.pending: deque[_Step] = deque()  # steps whose numbers have not been read
        self.interval: list[float] = []  # losses since the last log
        self.losses: list[float] = []  # of this call
        self.tokens = 0  # of the steps read, in this call
        self.shapes: set[tuple[int, ...]] = set()  # batch shapes compiled for
        self.compile_seconds = 0.0
        self.saved_step: int | None = None
        self.evaluated_step: int | None = None
        self.fingerprint = trainer._fingerprint()
        agree(
            "data, or the checkpoint to continue from",
            {**self.fingerprint, "checkpoint": resume_from and resume_from.name},
        )
        self.outcome = "finished"
        self.lost_peer = False  # another process has ended

    # ---- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> TrainOutput:
        """Train to the end, to a signal, or to an error."""
        trainer, args = self.trainer, self.args
        output_dir = Path(args.output_dir)
        self.checkpoints = ckpt.Checkpointer(output_dir, keep=args.save_total_limit)
        check_shared_folder(output_dir)
        start = self._restore()
        if args.overwrite_output_dir:
            self.checkpoints.delete_after(start)
        self.metrics_file = MetricsFile(output_dir / "metrics.jsonl", keep_until=start)
        self._introduce(start)
        write_run(output_dir, anew=True, **(facts := self._facts(start)))
        self.trackers = Trackers(args, facts)
        self.bar = ProgressBar(self.total, start, enabled=not args.disable_tqdm and is_first())
        self.began = self.last_read = time.perf_counter()
        try:
            with Preemption() if several() else StopSignals() as signals, self.bar:
                trainer._call("on_train_begin")
                if args.eval_on_start and start == 0:
                    self._evaluate()
                for number in range(start + 1, self.total + 1):
                    if trainer.control.should_training_stop:
                        break
                    self._one_step(number)
                    if isinstance(signals, Preemption):
                        signals.look(number)
                    if signals.received is not None:
                        self._stop_on_signal(signals.received)
                        break
                self._read_all()
                self.checkpoints.wait()
                if args.load_best_model_at_end and signals.received is None:
                    self._load_best()
                output = self._output(start)
                self._callback("on_train_end")
            signals.leave()
        except BaseException as error:
            self.outcome = f"after step {trainer.state.global_step} by {type(error).__name__}: {error}"
            if (text := explain_lost_peer(error)) is not None:
                self.lost_peer = True
                raise ProcessError(text) from error
            raise
        finally:
            self._give_back()
            if not self.lost_peer:  # for the save in progress it would be waited
                self._finish_save()
            self.trackers.finish()
            self._leave_pictures(output_dir)
        return output

    def _one_step(self, number: int) -> None:
        trainer, state, control = self.trainer, self.trainer.state, self.trainer.control
        control.should_save = control.should_evaluate = control.should_log = False
        if (number - 1) % self.per_epoch == 0:
            self._callback("on_epoch_begin")
        self._callback("on_step_begin")
        self._dispatch(number)
        state.global_step, state.epoch = number, number / self.per_epoch
        self._set_due(number)
        self._callback("on_step_end")
        if number % self.per_epoch == 0 or number == self.total:
            self._callback("on_epoch_end")
        control = trainer.control  # callbacks may have put another in its place, here and below
        if control.should_epoch_stop:
            raise ValueError("A callback set control.should_epoch_stop. Use control.should_training_stop instead.")
        self.pending[-1].log = control.should_log
        # Callbacks expect on_log before the next step; without them the device need not wait.
        wanted = control.should_save or control.should_evaluate or control.should_training_stop
        self._read(leave=0 if wanted or (control.should_log and trainer.callbacks) else 1)
        if trainer.control.should_evaluate:
            self._evaluate()
        stopping = trainer.control.should_training_stop and self.args.save_strategy not in ("no", "best")
        if trainer.control.should_save or stopping or (self.args.keeps_best and state.best_global_step == number):
            self._save()

    def _set_due(self, number: int) -> None:
        """Logging, evaluation and saving as Hugging Face's DefaultFlowCallback times them."""
        state, control, args = self.trainer.state, self.trainer.control, self.args
        last, epoch_ends = number == self.total, number % self.per_epoch == 0
        control.should_log = number % state.logging_steps == 0 or (number == 1 and args.logging_first_step)
        due = {"no": False, "steps": number % state.eval_steps == 0 or last, "epoch": epoch_ends or last}
        control.should_evaluate = due[args.eval_strategy]
        due |= {"steps": number % state.save_steps == 0 or last, "best": False}
        control.should_save = due[args.save_strategy]

    def _dispatch(self, number: int) -> None:
        """Start a step on the device."""
        batch: dict[str, Any] = self._batch(number - 1)
        tokens = _count_tokens(batch["labels"])
        # A function of seed and step alone, so that a resumed run draws the same dropout masks.
        batch["seed"] = np.random.SeedSequence([self.args.seed, number]).generate_state(1)[0]
        live = None if self.check.done else self.check.factors_live(self.lora)
        shape = batch["input_ids"].shape
        if self.trainer.mesh is not None:
            batch = put_batch(batch, self.trainer.mesh)
        try:
            if shape not in self.shapes:
                self._compile(batch)
                self.shapes.add(shape)
            self.lora, self.opt_state, metrics = self.step_function(self.lora, self.opt_state, self.frozen, batch)
        except Exception as error:
            if is_out_of_memory(error):
                raise self._out_of_memory(shape) from error
            raise
        self.pending.append(_Step(number, number / self.per_epoch, metrics, live, tokens))

    def _batch(self, index: int) -> dict[str, Any]:
        return self.trainer.model.with_embeddings(self.batches.batch(index))

    def _compile(self, batch: dict[str, Any]) -> None:
        """Compile for a new batch shape, so that its time is not counted as training; the call then finds it done."""
        self._read_all()  # keeps the time of steps in flight out of the compile time
        shape = batch["input_ids"].shape
        self.bar.describe(f"compiling for {list(shape)}")
        began = time.perf_counter()
        self._compiled_step(batch)
        seconds = time.perf_counter() - began
        self.compile_seconds += seconds
        self.last_read += seconds
        self.bar.describe("training")
        say(f"Compiled for batches of {list(shape)} (accumulation, rows, tokens) in {seconds:.1f} s.")
        if isinstance(self.step_function, PlannedStep):
            say(f"Rematerialisation chosen for them: {self.step_function.plans[shape]}.")

    def _compiled_step(self, batch: dict[str, Any]) -> Any:
        arguments = (self.lora, self.opt_state, self.frozen, batch)
        if isinstance(self.step_function, PlannedStep):
            return self.step_function.compile(*arguments)
        return cast(Any, self.step_function).lower(*arguments).compile()

    def _out_of_memory(self, shape: tuple[int, ...]) -> MemoryError:
        memory = device_memory()

        def needed(accumulation: int, rows: int) -> int | None:
            sample = self._batch(0)
            lead = (accumulation, rows, shape[-1])
            small = {k: jax.ShapeDtypeStruct((*lead, *v.shape[3:]), v.dtype) for k, v in sample.items()}
            try:
                return bytes_held(self._compiled_step({**small, "seed": jax.ShapeDtypeStruct((), np.uint32)}))
            except Exception:  # the compiler may run out of memory, too, or give no numbers
                return None

        limit = None if memory is None else memory.get("bytes_limit")
        text = explain_out_of_memory((shape[0], shape[1], shape[2]), needed, limit)
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.lora)):
            text += " The adapter's arrays were lost with the failed step: load the model again."
        return MemoryError(text)

    # ---- reading numbers -------------------------------------------------------------------------------------------

    def _read_all(self) -> None:
        self._read(leave=0)

    def _read(self, leave: int) -> None:
        """Fetch, check and record finished steps, all but the newest `leave`."""
        while len(self.pending) > leave:
            self._record(self.pending.popleft())

    def _record(self, step: _Step) -> None:
        metrics = jax.device_get(step.metrics)
        now = time.perf_counter()
        seconds, self.last_read = now - self.last_read, now
        check_finite(step.number, metrics, self._hint)
        if step.factors_live is not None and not self.check.done:
            self.check.check(step.number, metrics, bool(step.factors_live))
        rate = None if self.schedule is None else float(self.schedule(step.number - 1))
        record = {
            "step": step.number,
            "epoch": round(step.epoch, 4),
            "loss": float(metrics["loss"]),
            "grad_norm": float(metrics["grad_norm"]),
            "learning_rate": rate,
            "num_label_tokens": int(metrics["num_label_tokens"]),
            "num_tokens": step.tokens,
            "seconds": round(seconds, 6),
            "tokens_per_second": round(step.tokens / max(seconds, 1e-9), 1),
        }
        self.metrics_file.append(record)
        self.bar.show(record)
        self.tokens += step.tokens
        self.losses.append(record["loss"])
        self.interval.append(record["loss"])
        if step.log:
            self._log(record)

    def _log(self, record: dict[str, Any]) -> None:
        logs = {k: record[k] for k in ("grad_norm", "learning_rate", "epoch", "num_tokens", "tokens_per_second")}
        logs = {"loss": math.fsum(self.interval) / len(self.interval), **logs}
        self.interval = []
        self.trainer.state.log_history.append({**logs, "step": record["step"]})
        self.trackers.log(logs, record["step"])
        self._callback("on_log", logs=logs)

    def _hint(self) -> str:
        self._finish_save()
        newest = ckpt.list_checkpoints(self.args.output_dir)
        kept = f"the last checkpoint is {newest[-1]}" if newest else "no checkpoint was saved"
        return (
            f"Training stopped; the model holds the parameters from before this step, and {kept}. Usual causes: "
            f"learning_rate={self.args.learning_rate:g} is too high or has no warmup, or max_grad_norm is off."
        )

    # ---- evaluation, checkpoints -----------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        self._give_back()
        began = time.perf_counter()
        self.bar.describe("evaluating")
        metrics = self.trainer.evaluate()
        if self.trainer.state.global_step > 0:
            self._note_best(metrics)
        self.bar.describe("training")
        self.metrics_file.append({"step": self.trainer.state.global_step, **metrics})
        self.trackers.log(metrics, self.trainer.state.global_step)
        say(f"Step {self.trainer.state.global_step}: eval_loss {metrics['eval_loss']:.4f}")
        self.last_read += time.perf_counter() - began

    def _note_best(self, metrics: Mapping[str, float]) -> None:
        """After the callbacks, which compare with the best before, as Hugging Face does."""
        state, name = self.trainer.state, self.args.metric_for_best_model
        if name is None:
            return
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in metrics:
            raise ValueError(f"SFTConfig: metric_for_best_model={name!r} is not among {', '.join(metrics)}.")
        value, best = metrics[name], state.best_metric
        if best is None or (value > best if self.args.greater_is_better else value < best):
            state.best_metric, state.best_global_step = value, state.global_step

    def _load_best(self) -> None:
        """Take over the parameters of the best evaluation."""
        state = self.trainer.state
        step = state.best_global_step
        if step is None or step == state.global_step:
            return
        self.lora = ckpt.restore(self.checkpoints.path(step), self.lora, self.opt_state).lora
        self._give_back()
        metric = self.args.metric_for_best_model
        say(f"Loaded the adapter of step {step}, the best of all evaluations ({metric} {state.best_metric:.4f})")

    def _save(self) -> None:
        state = self.trainer.state
        if self.saved_step == state.global_step:
            return
        if self.args.keeps_best and state.best_global_step is not None:
            self.checkpoints.best = state.best_global_step
            state.best_model_checkpoint = str(self.checkpoints.path(state.best_global_step))
        began = time.perf_counter()
        self._read_all()  # a state that is not finite raises here, before it is written
        self._give_back()
        saved = {
            "global_step": state.global_step,
            "epoch": state.epoch,
            "log_history": state.log_history,
            "best_metric": state.best_metric,
            "best_global_step": state.best_global_step,
            "interval_losses": self.interval,
            "fingerprint": self.fingerprint,
            "args": self.args.to_dict(),
        }
        self.checkpoints.save(
            state.global_step, self.lora, self.opt_state, saved, write_extra=self.trainer._write_adapter_into
        )
        self.saved_step = state.global_step
        self._callback("on_save")
        self.last_read += time.perf_counter() - began

    def _restore(self) -> int:
        """Take over the state of the checkpoint to resume from; returns its step, 0 for none."""
        if self.resume_from is None:
            return 0
        restored = ckpt.restore(self.resume_from, self.lora, self.opt_state)
        saved = restored.state
        then, now = saved["fingerprint"], self.fingerprint
        changed = [f"{k} was {then.get(k)!r} and is {v!r}" for k, v in now.items() if then.get(k) != v]
        if changed:
            raise ckpt.CheckpointError(
                f"{self.resume_from} cannot be continued exactly: {'; '.join(changed)}. Use the same model, data and "
                "settings, or load the adapter in that folder and train anew with another output_dir."
            )
        current = self.args.to_dict()
        fields = ("learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "warmup_steps", "warmup_ratio")
        fields += ("weight_decay", "max_grad_norm")
        for name in fields:
            if saved["args"].get(name) != current[name]:
                say(f"Since the checkpoint {name} has changed: {saved['args'].get(name)} -> {current[name]}")
        self.lora, self.opt_state = restored.lora, restored.opt_state
        self._give_back()
        state = self.trainer.state
        state.global_step, state.epoch = saved["global_step"], saved["epoch"]
        state.log_history, self.interval = saved["log_history"], saved["interval_losses"]
        state.best_metric, state.best_global_step = saved["best_metric"], saved["best_global_step"]
        if self.args.keeps_best and state.best_global_step is not None:
            state.best_model_checkpoint = str(self.checkpoints.path(state.best_global_step))
        self.saved_step = state.global_step
        return state.global_step

    def _stop_on_signal(self, number: int) -> None:
        self._save()
        self.checkpoints.wait()
        step = self.trainer.state.global_step
        say(
            f"Stopped by signal {number} after step {step} of {self.total}; saved as checkpoint-{step}. Continue with "
            "train(resume_from_checkpoint=True)."
        )

    def _give_back(self) -> None:
        """Put the current parameters into the model: those it holds were donated to the first step since."""
        self.trainer.model.update_lora(self.lora)

    def _finish_save(self) -> None:
        """Let a save in progress end, when something else ends the run."""
        try:
            self.checkpoints.wait(alone=True)
        except ckpt.CheckpointError as error:
            say(str(error))

    def _leave_pictures(self, output_dir: Path) -> None:
        """The loss curve, `run.json` and the report."""
        memory = device_memory()
        try:
            plot_loss(read_metrics(self.metrics_file.path), output_dir / "loss_curve.png")
            write_run(
                output_dir,
                ended=f"{_now()}, {self.outcome}",
                seconds=round(time.perf_counter() - self.began, 3),
                compile_seconds=round(self.compile_seconds, 3),
                peak_bytes=None if memory is None else memory.get("peak_bytes_in_use"),
            )
            write_report(output_dir)
        except OSError as error:  # a picture is no reason to hide how the run ended
            say(f"Could not write the report: {error}")

    # ---- words -----------------------------------------------------------------------------------------------------

    def _callback(self, event: str, **kwargs: Any) -> None:
        if self.trainer.callbacks:
            self._give_back()
            self.trainer._call(event, lr_scheduler=self.schedule, optimizer=self.opt_state, **kwargs)

    def _facts(self, start: int) -> dict[str, Any]:
        """What `run.json` says of the run at its beginning."""
        trainer, args, model = self.trainer, self.args, self.trainer.model
        examples = trainer._train_examples or []
        trained = sum(leaf.size for leaf in jax.tree.leaves(self.lora))
        device = jax.devices()[0]
        return {
            "model": getattr(model, "name_or_path", type(model).__name__),
            "adapter": describe_adapter(
                getattr(model, "lora_config", None), trained, _parameter_count(model, self.lora, self.frozen)
            ),
            "data": f"{len(examples):,} examples, {sum(map(len, examples)):,} tokens",
            "batches": f"{args.gradient_accumulation_steps} x {trainer._train_rows} rows of at most "
            f"{trainer.max_length:,} tokens{', packed' if args.packing else ''}",
            "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
            "began": _now() + (f", continuing after step {start}" if start else ""),
            "settings": changed_settings(args),
            "versions": versions(),
        }

    def _introduce(self, start: int) -> None:
        trainer, args = self.trainer, self.args
        examples = trainer._train_examples or []
        trained = sum(leaf.size for leaf in jax.tree.leaves(self.lora))
        total = _parameter_count(trainer.model, self.lora, self.frozen)
        tokens = sum(len(example) for example in examples)
        labels = sum(int((example.labels != -100).sum()) for example in examples)
        rows, micro = trainer._train_rows, args.gradient_accumulation_steps
        if trainer.mesh is not None:
            say(f"Mesh: {describe(trainer.mesh)}")
        say(f"Trainable parameters: {trained:,} of {total:,} ({100 * trained / total:.2f} %)")
        say(f"Examples: {len(examples):,} with {tokens:,} tokens, {labels:,} of them trained on")
        if self.batches.efficiency is not None:
            say(f"Packing: {100 * self.batches.efficiency:.1f} % of computed tokens are real")
        say(
            f"Steps: {self.total:,} of {micro} x {rows} rows, {self.per_epoch:,} per epoch; rows padded to "
            f"{', '.join(map(str, self.batches.buckets))} tokens"
        )
        if start:
            say(f"Continuing after step {start} from {self.resume_from}")
        elif examples and trainer.processing_class is not None:
            from lora_jax.chat import preview

            shown = dataclasses.replace(
                examples[0], input_ids=examples[0].input_ids[:512], labels=examples[0].labels[:512]
            )
            say("First example (bold green is trained on):", preview(shown, trainer.processing_class))

    def _output(self, start: int) -> TrainOutput:
        seconds = time.perf_counter() - self.began
        steps = self.trainer.state.global_step - start
        loss = math.fsum(self.losses) / len(self.losses) if self.losses else float("nan")
        busy = max(seconds - self.compile_seconds, 1e-9)
        metrics = {
            "train_runtime": round(seconds, 3),
            "compile_seconds": round(self.compile_seconds, 3),
            "train_steps_per_second": round(steps / busy, 4),
            "train_tokens_per_second": round(self.tokens / busy, 1),
            "train_loss": loss,
            "epoch": self.trainer.state.epoch,
        }
        self.trainer.state.log_history.append({**metrics, "step": self.trainer.state.global_step})
        self._callback("on_log", logs=dict(metrics))
        return TrainOutput(self.trainer.state.global_step, loss, metrics)


def _committed(tree: Any) -> Any:
    """The arrays bound to their devices, as results of a step are: otherwise the second step would compile again.

    With parameters spread over several devices the scalars of an optimizer stay free to follow them.
    """
    spread = max(len(x.sharding.device_set) for x in jax.tree.leaves(tree))

    def commit(x: jax.Array) -> jax.Array:
        return jax.device_put(x, x.sharding) if len(x.sharding.device_set) == spread else x

    return jax.tree.map(commit, tree)


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(" ", "seconds")


def _interval(steps: float, total: int) -> int:
    """A number of steps; below 1 it is a share of all, rounded up as Hugging Face does."""
    return int(steps) if steps >= 1 else math.ceil(total * steps)


def _count_tokens(labels: np.ndarray) -> int:
    """Tokens of a batch without the padding: up to the last label of each row. `labels` is [A, B, T]."""
    has_label = labels != -100
    ends = labels.shape[-1] - np.argmax(has_label[..., ::-1], axis=-1)
    return int(np.where(has_label.any(-1), ends, 0).sum())


def _parameter_count(model: Any, lora: Any, frozen: Any) -> int:
    from lora_jax.lora import parameter_counts
    from lora_jax.model import CausalLM

    if isinstance(model, CausalLM):
        return parameter_counts(model)[1]
    return sum(leaf.size for leaf in jax.tree.leaves((lora, frozen)))
