"""The whole path on a small real model: fine-tune, score before and after, export, run the export in llama.cpp.

    python -m lora_jax.tools.demo                    # SmolLM2-135M-Instruct, fetched and converted on the first run
    python -m lora_jax.tools.demo --model FOLDER     # any chat model that is here

The task is in `lora_jax.tools.demo_task`. Base model and trained model get the same prompts, and an answer counts only
if it is exactly the wanted JSON.
"""

import argparse
import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_jax.tools.demo_task import Row, Task, make_task, score

__all__ = ["Settings", "run_demo"]

_MAX_NEW_TOKENS = 56  # the longest answer has 42 tokens of SmolLM2


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line sets."""

    model: Path | None = None  # folder of a model with a chat template; None for SmolLM2-135M-Instruct
    out: Path | None = None  # a new folder; None for the next free outputs/demo-N
    rows: int = 960  # training rows, all different
    test_rows: int = 40  # rows of each of the two test sets
    epochs: float = 1.0  # passes over the training rows
    learning_rate: float = 2e-3  # peak, falling linearly to 0
    batch_size: int = 8  # rows of one step
    seed: int = 0  # of task, adapter and data order
    dtype: str | None = None  # "bfloat16" or "float32"; None for the faster one on this machine
    gguf: tuple[str, ...] = ("q8_0", "f16")  # types of GGUF files to write and run
    llama_rows: int = 20  # test rows, half from either set, that llama.cpp answers with each file


def run_demo(settings: Settings) -> dict[str, Any]:
    """Runs the demo, prints its table and returns what `result.json` in the out folder holds.

    Raises:
      FileExistsError: the out folder exists and holds something.
      ValueError: the model has no chat template, or a setting is out of range.
      Whatever loading, training and exporting raise.
    """
    began = time.perf_counter()
    console = Console()
    task = make_task(settings.rows, settings.test_rows, seed=settings.seed)
    out = _new_folder(settings.out)
    from lora_jax.step import use_compile_cache

    use_compile_cache()
    import jax

    from lora_jax import from_pretrained, get_peft_model

    device = jax.devices()[0]
    dtype = settings.dtype or faster_dtype()
    console.print(
        f"Device: {device.device_kind} ({device.platform}), computing in {dtype}. Results go to {out}", markup=False
    )
    model, tokenizer = from_pretrained(_model_folder(settings.model), load_in_4bit=True, dtype=dtype)
    if not tokenizer.chat_template:
        raise ValueError(f"{settings.model} has no chat template; the demo wants a model made for conversations")

    times: dict[str, float] = {"load": time.perf_counter() - began}
    with _timed(times, "answer before", console):
        before = _answers(model, tokenizer, task)
    get_peft_model(model, r=16, lora_alpha=16, random_state=settings.seed, verbose=False)
    with _timed(times, "train", console):
        training = _train(model, tokenizer, task, out, settings)
    with _timed(times, "answer after", console):
        after = _answers(model, tokenizer, task)
    with _timed(times, "export", console):
        model.save_pretrained(out / "adapter")
        model.save_pretrained_merged(out / "merged", tokenizer)
        files = model.save_pretrained_gguf(out / "gguf", tokenizer, list(settings.gguf))
    with _timed(times, "llama.cpp", console):
        llama = _llama_cpp(dict(zip(settings.gguf, files, strict=True)), task, after, settings.llama_rows)

    seen = len(task.test_seen)
    result = {
        "model": str(model.name_or_path),
        "device": device.device_kind,
        "dtype": dtype,
        "settings": json.loads(json.dumps(dataclasses.asdict(settings), default=str)),
        "test_rows": {"seen_templates": seen, "unseen_templates": len(task.test_unseen)},
        "exact_before": _scores(before, task),
        "exact_after": _scores(after, task),
        "llama_cpp": llama,
        "training": training,
        "peak_memory_bytes": peak_memory(),
        "seconds": {k: round(v, 1) for k, v in times.items()} | {"all": round(time.perf_counter() - began, 1)},
        "files": {str(p.relative_to(out)): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()},
        "sample": {"order": task.test_unseen[0].text, "before": before[seen], "after": after[seen]},
        "answers": [
            {"order": row.text, "wanted": row.answer, "before": b, "after": a}
            for row, b, a in zip(task.test_seen + task.test_unseen, before, after, strict=True)
        ],
    }
    _write_json(out / "result.json", result)
    console.print(_table(result, out))
    return result


def faster_dtype() -> str:
    """bfloat16 on a GPU; on a CPU whichever of the two multiplies matrices faster, as few CPUs can do bfloat16."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() != "cpu":
        return "bfloat16"
    seconds = {}
    for dtype in ("float32", "bfloat16"):
        x, w = jnp.ones((1024, 512), dtype), jnp.ones((512, 1536), dtype)
        multiply = jax.jit(lambda x, w: x @ w)
        multiply(x, w).block_until_ready()
        runs = []
        for _ in range(5):
            began = time.perf_counter()
            multiply(x, w).block_until_ready()
            runs.append(time.perf_counter() - began)
        seconds[dtype] = min(runs)
    return min(seconds, key=lambda dtype: seconds[dtype])


def peak_memory() -> int:
    """Bytes: of the device if it counts them (GPU), else of this process."""
    from lora_jax.reporting import device_memory

    if (memory := device_memory()) is not None:
        return memory["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _train(model: Any, tokenizer: Any, task: Task, out: Path, settings: Settings) -> dict[str, float]:
    from lora_jax import SFTConfig, SFTTrainer

    rows = [row.training for row in task.train]
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    args = SFTConfig(
        output_dir=str(out),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        # Pads to the longest row, 114 tokens of SmolLM2, and not to the next multiple of 64: a tenth less to compute.
        max_length=max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])),
        gradient_checkpointing=False,  # so small a model need not compute anything twice
        save_strategy="no",  # a minute's work; the adapter is saved at the end
        seed=settings.seed,
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    output = trainer.train()
    return {"steps": output.global_step, **output.metrics}


def _answers(model: Any, tokenizer: Any, task: Task) -> list[str]:
    """Greedy answers to all test rows at once: every decoding step unpacks the 4-bit weights, however many rows."""
    from lora_jax import generate_text

    prompts = [row.prompt for row in task.test_seen + task.test_unseen]
    return generate_text(model, tokenizer, prompts, batch_size=len(prompts), max_new_tokens=_MAX_NEW_TOKENS)


def _scores(answers: Sequence[str], task: Task) -> dict[str, int]:
    seen = len(task.test_seen)
    return {
        "seen_templates": score(answers[:seen], task.test_seen),
        "unseen_templates": score(answers[seen:], task.test_unseen),
    }


def _llama_cpp(files: dict[str, Path], task: Task, answers: Sequence[str], count: int) -> dict[str, Any]:
    """Scores of the GGUF files in llama.cpp, and how many answers are those of the model here, letter by letter."""
    seen = len(task.test_seen)
    half = [range(start, start + min(count // 2, n)) for start, n in ((0, seen), (seen, len(task.test_unseen)))]
    chosen = [i for part in half for i in part]
    rows = [(task.test_seen + task.test_unseen)[i] for i in chosen]
    try:
        import xllamacpp as _  # noqa: F401
    except ImportError:
        return {"not run": "llama.cpp is not installed; pip install 'lora-jax[demo]'"}
    results = {}
    for name, path in files.items():
        theirs = _ask_llama_cpp(path, rows)
        same = sum(a.strip() == answers[i].strip() for a, i in zip(theirs, chosen, strict=True))
        results[name] = {"rows": len(rows), "exact": score(theirs, rows), "same_as_jax": same}
    return results


def _ask_llama_cpp(path: Path, rows: Sequence[Row]) -> list[str]:
    import xllamacpp as module

    xllamacpp: Any = module  # compiled, without type stubs
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 512
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = 0
    params.cpuparams.n_threads = max(1, (os.cpu_count() or 1) // 2)  # its threads spin, and crawl on busy cores
    server = xllamacpp.Server(params)
    answers = []
    for row in rows:
        request = {"messages": row.prompt, "temperature": 0, "max_tokens": _MAX_NEW_TOKENS}
        answers.append(server.handle_chat_completions(request)["choices"][0]["message"]["content"] or "")
    return answers


# ---- folders and words --------------------------------------------------------------------------------------------


def _new_folder(wanted: Path | None) -> Path:
    if wanted is None:
        parent = Path("outputs")
        wanted = next(p for n in range(1, 10**6) if not (p := parent / f"demo-{n}").exists())
    if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
        raise FileExistsError(f"{wanted} exists; name a new folder with --out, or leave it out for outputs/demo-N")
    wanted.mkdir(parents=True, exist_ok=True)
    return wanted


def _model_folder(model: Path | None) -> Path:
    if model is not None:
        return model
    from lora_jax.tools.smollm2 import fetch_smollm2

    return fetch_smollm2()


class _timed:
    """Says what begins, and keeps how many seconds it took."""

    def __init__(self, times: dict[str, float], name: str, console: Console):
        self._times, self._name, self._console = times, name, console

    def __enter__(self) -> None:
        self._began = time.perf_counter()
        self._console.print(f"{self._name} ...", style="bold")

    def __exit__(self, *_: object) -> None:
        self._times[self._name] = time.perf_counter() - self._began


def _write_json(path: Path, content: dict[str, Any]) -> None:
    from lora_jax.reporting import write_aside

    write_aside(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _table(result: dict[str, Any], out: Path) -> Table:
    table = Table(title="lora-jax demo: an order in English becomes JSON", show_lines=True, title_style="bold")
    for name in ("", "before", "after"):
        table.add_column(name, overflow="fold")
    for kind, words in (("seen_templates", "known sentences, new values"), ("unseen_templates", "new sentences")):
        rows = result["test_rows"][kind]
        before, after = (f"{result[f'exact_{when}'][kind]} of {rows}" for when in ("before", "after"))
        table.add_row(f"exact answers: {words}", before, after)
    for name, found in result["llama_cpp"].items():
        if isinstance(found, str):
            table.add_row("exact answers in llama.cpp", "", escape(f"NOT RUN: {found}"))
        else:
            n, exact, same = found["rows"], found["exact"], found["same_as_jax"]
            words = f"{exact} of {n}; {same} of {n} letter by letter as here"
            table.add_row(f"exact answers in llama.cpp, {name}", "", words)
    sample = result["sample"]
    table.add_row(f"a sample: {sample['order']}", *(escape(sample[when][:300]) for when in ("before", "after")))
    training, seconds = result["training"], result["seconds"]
    table.add_row("training", "", f"{training['steps']} steps, {training['train_tokens_per_second']:,.0f} tokens/s")
    table.add_row("peak memory", "", f"{result['peak_memory_bytes'] / 2**30:.2f} GiB")
    table.add_row("seconds", "", ", ".join(f"{name} {value:,.0f}" for name, value in seconds.items()))
    big = {name: size for name, size in result["files"].items() if size >= 100_000}
    small = len(result["files"]) - len(big)
    lines = [f"{name}  {size / 1e6:,.1f} MB" for name, size in big.items()] + [f"and {small} small files, result.json"]
    table.add_row(f"files in {out}", "", "\n".join(lines))
    return table


def main() -> None:
    """Parse the command line and run."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it says that without torch it has no models
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="model folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, help="new folder for what is written; default: the next outputs/demo-N")
    parser.add_argument("--rows", type=int, default=defaults.rows, help="training rows (%(default)s)")
    parser.add_argument("--test-rows", type=int, default=defaults.test_rows, help="of each test set (%(default)s)")
    parser.add_argument("--epochs", type=float, default=defaults.epochs, help="passes over them (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate, help="peak (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="rows of a step (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of everything random (%(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the faster one here")
    try:
        run_demo(Settings(**vars(parser.parse_args())))
    except (FileExistsError, FileNotFoundError) as error:
        sys.exit(f"demo: {error}")


if __name__ == "__main__":
    main()
