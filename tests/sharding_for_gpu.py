"""Compiles a sharded step for four H100s that are not there: `python sharding_for_gpu.py selective`.

Needs what kernels/compile_for_gpu.py needs (see there). Prints one line of JSON: how many layers the model has; for
each gather of frozen weights, in the order of the program, how many arrays it brings, and how many matmuls and
attention kernels stand between its start and its end; and the operations that copy gathered weights.
"""

import json
import re
import sys
from typing import Any

import lora_jax
from lora_jax.kernels import dispatch
from lora_jax.optim import make_optimizer
from lora_jax.tools.bench_scaling import Job, lower
from lora_jax.tools.bench_step import SHAPES, abstract_model, hf_config
from tests.kernels.compile_for_gpu import devices

LAYERS, DEVICES = 3, 4
COPY = re.compile(r"= u8\[(\d+),\d+\]\S* (?:fusion|copy|slice|concatenate|transpose)\(")


def compiled_step(remat: str) -> str:
    """The program, scheduled."""
    shape = {**SHAPES["llama3.2-1b"], "num_hidden_layers": LAYERS}
    model = lora_jax.get_peft_model(abstract_model(hf_config(shape)), r=16, verbose=False)
    optimizer, _ = make_optimizer(lora_jax.SFTConfig(output_dir="unused"), 1000)
    job = Job(f"fsdp={DEVICES}", 2, 2048, remat)
    return lower(model, optimizer, job, devices("sm_90", DEVICES), False)["step"].compile().as_text()


def main() -> None:
    """Compiles and counts."""
    # This process has no device, and compiles for some.
    dispatch.default_platform = lambda: "gpu"
    dispatch.compute_capability = lambda: "9.0"
    gathers: list[dict[str, Any]] = []
    under_way, copies = False, []
    for line in compiled_step(sys.argv[1]).splitlines():
        if " all-gather-start(" in line and "u8[" in line:
            arrays = line.split(" all-gather-start(")[0].count("u8[") // 2  # what goes in, and what comes out
            gathers.append({"arrays": arrays, "matmuls_beside": 0, "attention_beside": 0})
            under_way = True
        elif " all-gather-done(" in line and "u8[" in line:
            under_way = False
        elif under_way and "cublas" in line and " custom-call(" in line:
            gathers[-1]["matmuls_beside"] += 1
        elif under_way and "mosaic_gpu" in line and " custom-call(" in line:
            gathers[-1]["attention_beside"] += 1
        elif (match := COPY.search(line)) and int(match[1]) in (2048, 8192):  # rows of whole weights
            copies.append(line.split(" = ")[0].strip())
    print(json.dumps({"layers": LAYERS, "gathers": gathers, "copies": copies}))


if __name__ == "__main__":
    main()
