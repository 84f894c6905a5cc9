"""Exports a sharded model under a memory limit; a process of its own, started by test_memory.py.

Prints, for each target, by how many bytes the resident memory rose above what the model and the program take. Before
that a small model is exported, so that what is imported and compiled once does not count.
"""

import ctypes
import json
import resource
import sys
from pathlib import Path

from lora_jax import get_peft_model
from tests import tiny


def resident(field: str) -> int:
    """VmRSS, VmHWM (its peak) or VmSize of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    """`export_in_bounds.py SMALL LARGE OUT LIMIT`: the folders, and how many bytes the export may take."""
    small, large, out, limit = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    shard = max(file.stat().st_size for file in large.glob("*.safetensors"))
    model = None
    for folder in (small, large):
        model = tiny.open_model(folder, "nf4-double", "bfloat16")
        tiny.randomize_adapter(get_peft_model(model, r=4, verbose=False))
        for method in ("merged_16bit", "merged_4bit"):
            ctypes.CDLL(None).malloc_trim(0)  # what loading has freed shall not serve the export
            if folder == large:
                resource.setrlimit(resource.RLIMIT_DATA, (resident("VmData") + limit, resource.RLIM_INFINITY))
                Path("/proc/self/clear_refs").write_text("5")  # begins VmHWM anew
            before = resident("VmRSS")
            model.save_pretrained_merged(
                out / folder.name / method, save_method=method, max_shard_size=shard, verbose=False
            )
            if folder == large:
                print(json.dumps([method, resident("VmHWM") - before]))


if __name__ == "__main__":
    main()
