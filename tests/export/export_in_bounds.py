"""Exports a sharded model under a memory limit; a process of its own, started by test_memory.py.

Prints, for each target, by how many bytes the resident memory rose above what the model and the program take. Every
target is written twice and the second time counts, so that what is imported and compiled once does not.
"""

import ctypes
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from lora_jax import get_peft_model
from tests import tiny


def resident(field: str) -> int:
    """VmRSS, VmHWM (its peak) or VmData of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    """`export_in_bounds.py FOLDER OUT LIMIT`: model, where to, and how many bytes the export may take."""
    folder, out, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    model = tiny.open_model(folder, "nf4-double", "bfloat16")
    tiny.randomize_adapter(get_peft_model(model, r=4, verbose=False))
    for name, save in targets(model, out, shard).items():
        save()
        shutil.rmtree(out)
        ctypes.CDLL(None).malloc_trim(0)  # what has been freed shall not serve the export
        resource.setrlimit(resource.RLIMIT_DATA, (resident("VmData") + limit, resource.RLIM_INFINITY))
        Path("/proc/self/clear_refs").write_text("5")  # begins VmHWM anew
        before = resident("VmRSS")
        save()
        print(json.dumps([name, resident("VmHWM") - before]), flush=True)
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        shutil.rmtree(out)


def targets(model, out: Path, shard: int) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""

    def merged(method: str) -> Callable[[], object]:
        options = {"save_method": method, "max_shard_size": shard, "verbose": False}
        return lambda: model.save_pretrained_merged(out / method, **options)

    def gguf(*types: str) -> Callable[[], object]:
        return lambda: model.save_pretrained_gguf(out / types[-1], None, types, verbose=False)

    several = ("f32", "f16", "q8_0", "q4_k_m")
    return {name: merged(name) for name in ("merged_16bit", "merged_4bit")} | {
        "gguf q4_k_m": gguf("q4_k_m"),
        f"gguf {' '.join(several)}": gguf(*several[::-1]),
    }


if __name__ == "__main__":
    main()
