"""Speed of writing GGUF files beside llama-quantize's, on the same random tensors and the same CPU cores.

    python -m lora_jax.tools.bench_export --out results.json
    python -m lora_jax.tools.bench_export --blocks Q4_K Q6_K --file-runs 0

First single block types, [1024, 4096] values at a time, without and with importance. Then whole files: two layers of a
model's shape and a vocabulary of as many rows as belong to two layers, which for Llama-3.1-8B is a sixteenth of the
model. Ours and llama.cpp's take turns, run after run, with as many threads as there are cores; reported are medians of
seconds and of CPU seconds (user and system, of all threads), which other programs on the machine disturb less. Both
files must hold the same bytes. llama.cpp's part is `lora_jax.tools.llama_quantize`: it reads a file in float16, where
ours is given the same values in memory.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.tools.bench_step import SHAPES, environment, hf_config
from lora_jax.tools.llama_quantize import LlamaQuantize, fetch_llama_quantize

_LAYERS = 2  # of them one gets more bits in the mixtures _M, as half of those of a large model do


def main() -> None:
    """Measures, prints a line for each case and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3.1-8b", choices=SHAPES)
    parser.add_argument("--type", default="q4_k_m", help="of the files")
    parser.add_argument("--blocks", nargs="*", help="types of blocks; default: all")
    parser.add_argument("--runs", type=int, default=5, help="of each type of blocks")
    parser.add_argument("--file-runs", type=int, default=3, help="of whole files; 0 for none")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    llama, threads = LlamaQuantize(fetch_llama_quantize()), len(os.sched_getaffinity(0))
    result: dict[str, Any] = {"environment": environment() | {"cores": threads}, "model": args.model}
    result["blocks"] = bench_blocks(llama, args.blocks, args.runs, threads)
    if args.file_runs:
        with tempfile.TemporaryDirectory() as folder:
            result["file"] = bench_file(llama, Path(folder), SHAPES[args.model], args.type, args.file_runs, threads)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def bench_blocks(llama: LlamaQuantize, names: list[str] | None, runs: int, threads: int) -> list[dict[str, Any]]:
    """A row for each type of blocks: millions of values in a second and in a CPU second, ours and llama.cpp's."""
    from gguf import GGMLQuantizationType

    from lora_jax.export.gguf_quants import BLOCK_TYPES, quantize

    rng = np.random.default_rng(0)
    values = rng.standard_normal((1024, 4096), np.float32) * np.float32(0.02)
    importance = rng.uniform(0, 1, 4096).astype(np.float32)
    rows = []
    for type in [GGMLQuantizationType[name.upper()] for name in names] if names else BLOCK_TYPES:
        for weights in (None, importance):
            if weights is not None and type == GGMLQuantizationType.Q8_0:
                continue  # which takes none
            ours, theirs = [], []
            quantize(values, type, weights)  # compiles
            for _ in range(runs):
                ours.append(_timed(lambda: quantize(values, type, weights)))  # noqa: B023 (called at once)
                theirs.append(_timed(lambda: _in_threads(llama, values, type, weights, threads)))  # noqa: B023
            row: dict[str, Any] = {"type": type.name, "importance": weights is not None}
            row |= _compared(ours, theirs, values.size)
            rows.append(row)
            print(_line(f"{type.name}{' with importance' if row['importance'] else ''}", row), flush=True)
    return rows


def _in_threads(llama: LlamaQuantize, values: np.ndarray, type: Any, weights: Any, threads: int) -> None:
    """As llama-quantize does: every thread takes some rows at a time."""
    with ThreadPoolExecutor(threads) as pool:
        parts = (values[start : start + 32] for start in range(0, len(values), 32))
        for _ in pool.map(lambda part: llama.rows(part, type, weights), parts):
            pass


class _Half:
    """A tensor in float16, given in float32."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape = values, values.shape

    def read(self) -> np.ndarray:
        return self.values.astype(np.float32)


def bench_file(
    llama: LlamaQuantize, folder: Path, shape: dict[str, Any], file_type: str, runs: int, threads: int
) -> dict[str, Any]:
    """Whole files of one type: as a row of `bench_blocks`, and what it takes to read ours back and compare it.

    Raises ValueError if llama.cpp's file holds other bytes.
    """
    import gguf

    from lora_jax.export.gguf import FILE_TYPES, write_gguf
    from lora_jax.models.decoder import Decoder
    from lora_jax.models.registry import config_from_hf

    vocabulary = shape["vocab_size"] * _LAYERS // shape["num_hidden_layers"] // 32 * 32
    config = hf_config(shape | {"num_hidden_layers": _LAYERS, "vocab_size": vocabulary})
    _write_tokenizer(folder)
    rng = np.random.default_rng(0)
    tensors = {
        name: _Half((rng.standard_normal(slot.shape, np.float32) * np.float32(0.02)).astype(np.float16))
        for name, slot in Decoder(config_from_hf(config), np.float32).slots().items()
    }
    size = sum(tensor.values.size for tensor in tensors.values())
    source, own, other = (folder / f"{name}.gguf" for name in ("f16", "ours", "theirs"))
    write_gguf(source, tensors, config, folder, "f16", verify=False, progress=False)

    def ours(verify: bool = False) -> None:
        write_gguf(own, tensors, config, folder, file_type, verify=verify, progress=False)

    number = int(FILE_TYPES[file_type][0])
    own_times, their_times = [], []
    for _ in range(runs):
        own_times.append(_timed(ours))
        their_times.append(_timed(lambda: llama.file(source, other, number, threads=threads)))
    row: dict[str, Any] = {"type": file_type, "layers": _LAYERS, "vocabulary": vocabulary, "values": size}
    row |= _compared(own_times, their_times, size)
    row["cpu seconds with verification"] = round(_timed(lambda: ours(True))[1], 2)
    found, want = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (own, other))
    different = [name for name, tensor in want.items() if not np.array_equal(found[name].data, tensor.data)]
    row["tensors that differ"] = len(different)
    print(_line(f"file of {file_type}, {size / 1e6:.0f} M values", row), flush=True)
    if different:
        raise ValueError(f"llama-quantize wrote other bytes for {', '.join(different[:3])}")
    return row


def _write_tokenizer(folder: Path) -> None:
    """Bytes alone, as GPT-2 writes them; the rest of the vocabulary is unused."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<end>", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, CPU seconds of this process) that it takes."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    run()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _compared(ours: list[tuple[float, float]], theirs: list[tuple[float, float]], size: int) -> dict[str, Any]:
    row: dict[str, Any] = {"runs": len(ours)}
    for name, i in (("M values/s", 0), ("M values/cpu s", 1)):
        medians = [statistics.median(run[i] for run in runs) for runs in (ours, theirs)]
        row |= {name: round(size / medians[0] / 1e6, 1), f"{name}, llama.cpp": round(size / medians[1] / 1e6, 1)}
        row["times llama.cpp's seconds" if i == 0 else "times llama.cpp's cpu seconds"] = round(
            statistics.median(a[i] / b[i] for a, b in zip(ours, theirs, strict=True)), 2
        )
    return row


def _line(name: str, row: dict[str, Any]) -> str:
    return f"{name}: " + ", ".join(
        f"{key} {value}" for key, value in row.items() if key not in ("type", "importance", "layers", "vocabulary")
    )


if __name__ == "__main__":
    main()
