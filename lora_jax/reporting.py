"""What a run shows and leaves behind: progress bar, `metrics.jsonl`, `loss_curve.png`, `report.md`, trackers."""

import dataclasses
import importlib
import io
import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as EtaColumn

from lora_jax.distributed import is_first

if TYPE_CHECKING:
    from lora_jax.config import SFTConfig

RUN_FILE = "run.json"  # what a run was: model, adapter, data, settings, versions, device, how it ended

console = Console(stderr=True)  # stdout is left to the user's program


def say(*texts: Any) -> None:
    """Print lines above the progress bar, in the first process. Strings are not markup: a path may hold brackets."""
    if is_first():
        console.print(*texts, sep="\n", markup=False, highlight=False, soft_wrap=True)


class ProgressBar:
    """Loss, learning rate, gradient norm, tokens/s, device memory and remaining time of a run."""

    def __init__(self, total: int, start: int, *, enabled: bool = True) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            EtaColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=console,
            disable=not enabled,
        )
        self._task: TaskID = self._progress.add_task("training", total=total, completed=start, numbers="")

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def describe(self, what: str) -> None:
        """Say what is going on instead of "training"."""
        self._progress.update(self._task, description=what)

    def show(self, record: dict[str, Any]) -> None:
        """Show one step's record of `metrics.jsonl`."""
        rate = record["learning_rate"]
        parts = [
            f"loss {record['loss']:.4f}",
            *([] if rate is None else [f"lr {rate:.2e}"]),
            f"grad {record['grad_norm']:.3f}",
            f"{record['tokens_per_second']:,.0f} tok/s",
        ]
        if (memory := device_memory()) is not None:
            parts.append(f"{memory['peak_bytes_in_use'] / 2**30:.1f} GiB")
        self._progress.update(self._task, completed=record["step"], numbers="  ".join(parts), description="training")


def device_memory() -> dict[str, int] | None:
    """bytes_in_use, peak_bytes_in_use and bytes_limit of the first device; None if the backend does not say (CPU)."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    return stats if stats and "peak_bytes_in_use" in stats else None


class MetricsFile:
    """`metrics.jsonl`: one object per optimizer step and one per evaluation, told apart by their keys.

    Args:
        path: the file. What it holds of steps after `keep_until` is dropped, so that a resumed run has no step twice.
        keep_until: step of the checkpoint a run resumes from; 0 starts anew.
    """

    def __init__(self, path: Path, keep_until: int = 0) -> None:
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= keep_until] if keep_until else []
        write_aside(path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; it is with the operating system when this returns."""
        if is_first():
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line that a killed process left half written is not one."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def plot_loss(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Draw the loss over the steps, with the evaluations if there are any, as a PNG; without matplotlib, say so."""
    # The object interface: pyplot would keep global state and might want a display.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        say(f"matplotlib is not installed, so {path.name} was not drawn: pip install matplotlib")
        return

    records = list(records)
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    evaluated = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), linewidth=1, color="tab:blue", label="training")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), marker="o", color="tab:orange", label="evaluation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per label token (nats)")
    axes.grid(alpha=0.3)
    if train or evaluated:
        axes.legend()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_aside(path, buffer.getvalue())


def write_aside(path: Path, data: bytes) -> None:
    """Replace a file by another in one step; with several processes the first one does."""
    if not is_first():
        return
    aside = path.with_name(f".{path.name}.unfinished")
    aside.write_bytes(data)
    os.replace(aside, path)


# ---- report -------------------------------------------------------------------------------------------------------

PACKAGES = ("lora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "tokenizers")
PACKAGES += ("safetensors", "datasets", "gguf")
_CUDA_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on, as far as they are installed."""
    found = {}
    for name in (*PACKAGES, *_CUDA_PLUGINS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def changed_settings(args: "SFTConfig") -> dict[str, Any]:
    """The settings that are not the defaults."""
    defaults = type(args)().to_dict()
    return {name: value for name, value in args.to_dict().items() if value != defaults[name]}


def write_run(folder: Path, *, anew: bool = False, **facts: Any) -> None:
    """Add facts to the `run.json` of a folder, or with `anew` begin one; facts of the same name are replaced."""
    path = folder / RUN_FILE
    known = json.loads(path.read_text()) if path.exists() and not anew else {}
    write_aside(path, (json.dumps({**known, **facts}, indent=1, default=str) + "\n").encode())


def write_report(folder: Path) -> None:
    """Write `report.md`, for people, from what a run left in its folder; with several processes the first one does."""
    if not is_first():
        return
    run = json.loads((folder / RUN_FILE).read_text())
    write_aside(folder / "report.md", _report(folder, run, read_metrics(folder / "metrics.jsonl")).encode())


def _report(folder: Path, run: Mapping[str, Any], records: list[dict[str, Any]]) -> str:
    rows = {name: run[name] for name in ("model", "adapter", "data", "batches", "device") if run.get(name)}
    rows |= _numbers(records)
    if run.get("peak_bytes"):
        rows["peak memory of the device"] = f"{run['peak_bytes'] / 2**30:.2f} GiB"
    if "seconds" in run:
        rows["time"] = f"{run['seconds']:,.0f} s, {run['compile_seconds']:,.0f} s of them compiling"
    rows |= {name: run[name] for name in ("began", "ended") if run.get(name)}
    lines = [f"# {folder.resolve().name}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    if (folder / "loss_curve.png").exists():
        lines += ["", "![loss](loss_curve.png)"]
    lines += ["", "## Files", ""]
    known = {"adapter_model.safetensors": "the adapter, in PEFT's format", "metrics.jsonl": "every step's numbers"}
    known |= {"train_config.yaml": "settings; `lora-jax train --config` reads it", RUN_FILE: "what this page says"}
    lines += [f"- `{name}`: {what}" for name, what in known.items() if (folder / name).exists()]
    checkpoints = [p.name for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    checkpoints.sort(key=lambda name: int(name.split("-")[1]))
    lines += [f"- {', '.join(f'`{name}`' for name in checkpoints)}: to resume from"] if checkpoints else []
    lines += ["", "## Settings that are not the defaults", "", "```yaml"]
    lines += [f"{name}: {json.dumps(value, default=str)}" for name, value in run.get("settings", {}).items()]
    lines += ["```", "", "## Versions", "", "```"]
    lines += [f"{name}=={version}" for name, version in run.get("versions", {}).items()]
    return "\n".join([*lines, "```", ""])


def _numbers(records: list[dict[str, Any]]) -> dict[str, str]:
    """What the steps and evaluations of a run come to."""
    steps, found = [r for r in records if "loss" in r], {}
    if steps:
        last = steps[-max(1, len(steps) // 10) :]
        ends = f"{steps[0]['loss']:.4f} at first, {statistics.fmean(r['loss'] for r in last):.4f}"
        found["steps"] = f"{steps[-1]['step']:,}, {steps[-1]['epoch']:g} epochs"
        found["loss"] = f"{ends} in the last {len(last)} steps" if len(last) > 1 else f"{ends} at last"
        found["tokens"] = f"{sum(r['num_tokens'] for r in steps):,}"
        found["tokens/s"] = f"{statistics.median(r['tokens_per_second'] for r in steps):,.0f} (median of the steps)"
    if evaluated := [r for r in records if "eval_loss" in r]:
        best = min(evaluated, key=lambda r: r["eval_loss"])
        found["evaluation loss"] = f"{evaluated[-1]['eval_loss']:.4f}, least {best['eval_loss']:.4f}"
        found["evaluation loss"] += f" at step {best['step']}"
    return found


# ---- trackers -----------------------------------------------------------------------------------------------------


class Trackers:
    """The trackers that `report_to` names. One that fails is told of and left; training goes on.

    Args:
        args: settings of the run.
        config: what the tracker shall know of the run beside its numbers.
    """

    def __init__(self, args: "SFTConfig", config: Mapping[str, Any]) -> None:
        names = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
        names = names if is_first() else []
        made = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
        self._running = {name: made[name](args, dict(config)) for name in dict.fromkeys(names) if name in made}

    def log(self, numbers: Mapping[str, Any], step: int) -> None:
        """Pass on one log or evaluation: "loss" as "train/loss", "eval_loss" as "eval/loss"."""
        named = {}
        for name, value in numbers.items():
            if isinstance(value, int | float) and name != "step":
                kind, short = ("eval", name[5:]) if name.startswith("eval_") else ("train", name)
                named[f"{kind}/{short}"] = value
        self._each(lambda tracker: tracker.log(named, step))

    def finish(self) -> None:
        """End the run."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, do: Any) -> None:
        for name, tracker in list(self._running.items()):
            try:
                do(tracker)
            except Exception as error:
                say(f"{name} failed and gets no more numbers (metrics.jsonl has them all): {error!r}")
                del self._running[name]


def _run_name(args: "SFTConfig") -> str:
    return args.run_name or Path(args.output_dir).resolve().name


class _TensorBoard:
    def __init__(self, args: "SFTConfig", config: dict[str, Any]) -> None:
        folder = args.logging_dir or str(Path(args.output_dir) / "tensorboard")
        self._writer = importlib.import_module("tensorboardX").SummaryWriter(logdir=folder)
        self._writer.add_text("run", f"```\n{json.dumps(config, indent=1, default=str)}\n```", 0)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, args: "SFTConfig", config: dict[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(project=args.project, name=_run_name(args), config=config, dir=args.output_dir)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, args: "SFTConfig", config: dict[str, Any]) -> None:
        self._trackio = importlib.import_module("trackio")
        self._trackio.init(project=args.project, name=_run_name(args), config=config)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._trackio.log(numbers, step=step)

    def finish(self) -> None:
        self._trackio.finish()


def describe_adapter(config: Any, trained: int, total: int) -> str:
    """An adapter in a line: its settings that are not the defaults, and its size."""
    if not dataclasses.is_dataclass(config):
        return f"{trained:,} of {total:,} parameters"
    defaults = type(config)()
    always = ("r", "lora_alpha")
    parts = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name in always or getattr(config, field.name) != getattr(defaults, field.name)
    ]
    return f"{', '.join(parts)}; {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)"
