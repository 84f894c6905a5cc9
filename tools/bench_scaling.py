"""Speed, memory and traffic of training steps on several devices of one machine, with random NF4 weights.

    python -m lora_jax.tools.bench_scaling --meshes data=1 data=2 fsdp=2 data=8 fsdp=8 --case 2x2048 --out results.json
    python -m lora_jax.tools.bench_scaling --model llama3.3-70b --meshes fsdp=8 tensor=2,fsdp=4 --case 1x2048
    python -m lora_jax.tools.bench_scaling --meshes context=8 --case 1x131072 --compile-only

A case is rows x tokens of each device that has rows of its own, so that the work of a device is the same on every mesh
of "data" and "fsdp". Every mesh runs in a process of its own, on the first devices, and reports the median time of a
step, tokens/s, its share of the first mesh's tokens/s per device (efficiency), what the compiler counts of a device's
memory, the bytes that a device receives (lora_jax.tools.collectives), and the first losses. Weights are random bytes,
made where they shall lie: a model that fits no single device can be measured too.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lora_jax.tools.bench_step import SHAPES, environment, hf_config, token_ids

SHAPES_HERE: dict[str, dict[str, Any]] = {
    **SHAPES,
    "llama3.3-70b": {**SHAPES["llama3.1-8b"], "hidden_size": 8192, "intermediate_size": 28672,
                     "num_hidden_layers": 80, "num_attention_heads": 64},
}  # fmt: skip


def parse_mesh(text: str) -> dict[str, int]:
    """ "data=2,fsdp=4" as sizes. Raises ValueError for anything else."""
    try:
        return {axis: int(size) for axis, size in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        raise ValueError(f"--meshes {text!r}: wanted axes and sizes such as data=2,fsdp=4") from None


def random_shards(shape: dict[str, Any], mesh: Any):
    """A bfloat16 `CausalLM` on a mesh; packed codes are random bytes, of a scale that keeps activations finite."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from lora_jax import sharding
    from lora_jax.kernels.nf4.format import NF4Weight, nested_code
    from lora_jax.model import CausalLM
    from lora_jax.models.decoder import Decoder
    from lora_jax.models.linear import Linear
    from lora_jax.models.moe import Router
    from lora_jax.models.registry import config_from_hf

    hf = hf_config(shape)
    module = Decoder(config_from_hf(hf), jnp.bfloat16)
    for _, stack, part in module.named_modules():
        if stack is not None and isinstance(part, Linear) and not isinstance(part, Router):
            part.weight.set_value(NF4Weight.abstract(part.weight.get_value().shape, True))
    model = CausalLM(module, hf_config=hf, source=Path("random"))
    sharding.check(model.config, mesh)
    frozen = model.split()[2]

    def fill(path: Any, spec: Any, leaf: Any) -> Any:
        name, seed = jax.tree_util.keystr(path), len(jax.tree_util.keystr(path))

        def make():
            key = jax.random.key(seed)
            if leaf.dtype == np.uint8:
                return jax.random.bits(key, leaf.shape, np.uint8)
            if "nested_code" in name:
                return jnp.broadcast_to(jnp.asarray(nested_code()), leaf.shape)
            if "nested" in name:  # scales of about 0.6 / sqrt(hidden size)
                size = 0.1 if "absmax" in name else 0.6
                return jnp.full(leaf.shape, size * shape["hidden_size"] ** -0.5, leaf.dtype)
            if "norm" in name:
                return jnp.ones(leaf.shape, leaf.dtype)
            return (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

        return jax.jit(make, out_shardings=NamedSharding(mesh, spec))()

    specs = sharding.parameter_specs(frozen, mesh)
    arrays = jax.tree_util.tree_map_with_path(fill, specs, frozen, is_leaf=lambda leaf: isinstance(leaf, P))
    from flax import nnx

    nnx.update(module, arrays)
    return model.shard(mesh)


def run_mesh(args: argparse.Namespace) -> dict[str, Any]:
    """One mesh in this process."""
    import math

    import jax
    import numpy as np

    import lora_jax
    from lora_jax import sharding
    from lora_jax.optim import make_optimizer
    from lora_jax.step import bytes_held
    from lora_jax.tools.collectives import collectives, wire_bytes

    sizes = parse_mesh(args.mesh)
    count = math.prod(sizes.values())
    mesh = sharding.make_mesh(sizes, devices=jax.devices()[:count])
    shape = dict(SHAPES_HERE[args.model])
    if args.layers:
        shape["num_hidden_layers"] = args.layers
    model = random_shards(shape, mesh)
    lora_jax.get_peft_model(model, r=args.rank, verbose=False)
    optimizer, _ = make_optimizer(lora_jax.SFTConfig(output_dir="unused", learning_rate=2e-4), 1000)
    _, lora, frozen = model.split()
    state = sharding.put_beside(optimizer.init(lora), lora, mesh)
    rows, length = map(int, args.case.split("x"))
    rows *= sharding.row_shards(mesh)
    ids = token_ids(rows, length, shape["vocab_size"]).astype(np.int32)[None]
    batch = {"input_ids": ids, "labels": ids}
    step: Any = lora_jax.make_train_step(model, optimizer, remat=args.remat, scan_layers=args.scan_layers)
    start = time.perf_counter()
    compiled = step.lower(lora, state, frozen, batch).compile()
    found = collectives(compiled.as_text())
    result = {
        "model": args.model,
        "layers": shape["num_hidden_layers"],
        "mesh": sizes,
        "devices": count,
        "case": args.case,
        "remat": args.remat,
        "scan_layers": args.scan_layers,
        "compile_s": time.perf_counter() - start,
        "gib_per_device": bytes_held(compiled) / 2**30,
        "wire_gib_per_device": wire_bytes(found) / 2**30,
    }
    if args.compile_only:
        return result
    times, losses = [], []
    for number in range(args.warmup + args.runs):
        start = time.perf_counter()
        steps = 1 if number < args.warmup else args.steps
        for _ in range(steps):
            lora, state, metrics = compiled(lora, state, frozen, batch)
            losses.append(metrics["loss"])
        jax.block_until_ready(losses[-1])
        times.append((time.perf_counter() - start) / steps)
    seconds = float(np.median(times[args.warmup :]))
    stats = jax.devices()[0].memory_stats() or {}
    return result | {
        "ms": 1e3 * seconds,
        "ms_min_max": [1e3 * min(times[args.warmup :]), 1e3 * max(times[args.warmup :])],
        "tokens_per_s": rows * length / seconds,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
        "losses": [float(loss) for loss in losses[:20]],
    }


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", choices=SHAPES_HERE, default="llama3.1-8b")
    made.add_argument("--layers", type=int, help="fewer layers than the model has")
    made.add_argument("--meshes", nargs="+", default=["data=1"], help="such as data=2,fsdp=4")
    made.add_argument("--case", default="2x2048", help="rows x tokens of a device that has rows of its own")
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--remat", default="selective")
    made.add_argument("--scan-layers", action=argparse.BooleanOptionalAction)
    made.add_argument("--compile-only", action="store_true", help="memory and bytes alone")
    made.add_argument("--warmup", type=int, default=3)
    made.add_argument("--steps", type=int, default=4, help="steps of a run, which follow each other without a wait")
    made.add_argument("--runs", type=int, default=5)
    made.add_argument("--timeout", type=float, default=300, help="seconds for one mesh")
    made.add_argument("--out", type=Path)
    made.add_argument("--mesh", help=argparse.SUPPRESS)  # the child process
    return made


def main() -> None:
    """Measures every mesh and prints one line of JSON for each."""
    args = parser().parse_args()
    if args.mesh:
        print(json.dumps(run_mesh(args)), flush=True)
        return
    rows: list[dict[str, Any]] = []
    for mesh in args.meshes:
        parse_mesh(mesh)
        command = [sys.executable, "-m", "lora_jax.tools.bench_scaling", *sys.argv[1:], "--mesh", mesh]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
            failed = {"error": done.stderr[-2000:]}
            row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else failed
        except subprocess.TimeoutExpired:
            row = {"error": f"took more than {args.timeout} s"}
        row.setdefault("mesh", parse_mesh(mesh))
        first = rows[0] if rows else row
        if "tokens_per_s" in row and "tokens_per_s" in first:
            row["efficiency"] = row["tokens_per_s"] / row["devices"] / (first["tokens_per_s"] / first["devices"])
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
