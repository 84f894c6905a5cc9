"""What a training run shows and leaves behind: progress bar, `metrics.jsonl`, `loss_curve.png`."""

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as EtaColumn

console = Console(stderr=True)  # stdout is left to the user's program


def say(*texts: Any) -> None:
    """Print lines above the progress bar. Strings are taken as they are: a path may hold brackets."""
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
    """Draw the loss over the steps, with the evaluations if there are any, as a PNG."""
    # The object interface: pyplot would keep global state and might want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
    """Replace a file by another in one step."""
    aside = path.with_name(f".{path.name}.unfinished")
    aside.write_bytes(data)
    os.replace(aside, path)
