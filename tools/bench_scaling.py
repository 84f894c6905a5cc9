"""Speed, memory, traffic and losses of training steps on several devices of one machine, with random NF4 weights.

    python -m lora_jax.tools.bench_scaling --meshes fsdp=4 fsdp=2 data=1 data=2 data=4 --out results.json
    python -m lora_jax.tools.bench_scaling --model llama3.3-70b --losses 3 \\
        --meshes fsdp=4 tensor=2,fsdp=2@4x2048 fsdp=2 data=1
    python -m lora_jax.tools.bench_scaling --meshes context=8@1x131072@full --losses 0

A mesh takes the first devices. After @ its case: rows x tokens of each device that has rows of its own, so that on
meshes of "data" and "fsdp" the work of a device is the same; then what backward recomputes (`lora_jax.remat`).

Time on such machines is dear, so one process measures all meshes: it compiles their programs side by side, then fills a
mesh with weights, takes its steps, frees it and goes on. What fails is reported, and a process that ends or says
nothing for --timeout seconds is replaced by one for the meshes that are left.

Each mesh reports the median time of a step, tokens/s, its share of the tokens/s that a device reached alone
(efficiency, of the same case), what the compiler counts of a device's memory and the most that the allocator has seen,
the bytes that a device receives (lora_jax.tools.collectives), clocks, and the first losses. Those are compared with
losses of one device on the same global batches, which it takes in parts where it must, and so is the first gradient's
norm. They differ by rounding: activations are bfloat16, and sums over devices and matmuls of other shapes add up in
another order, which Adam amplifies where a gradient is nearly zero. While an 8B model learns two rows by heart, losses
of two programs for one GPU come to differ by 1.5e-3 of 3.4; with other rows they differ by tenths of themselves.

Weights are random bytes, made where they shall lie, the same on every mesh.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from lora_jax.plan import MEMORY_FRACTION
from lora_jax.tools.bench_step import SHAPES, abstract_model, environment, hf_config, random_weights, token_ids

# What fits one device of 80 GB too, so that efficiency compares the same work.
REMAT = {"llama3.3-70b": "full"}
TOLERANCE = 5e-3  # relative, of each of the first losses
NORM_TOLERANCE = 1e-2  # relative, of the first gradient's norm
BAR = 0.90  # of efficiency


@dataclasses.dataclass(frozen=True)
class Job:
    """One mesh and its case."""

    mesh: str  # "data=2,fsdp=4"
    rows: int  # of each device that has rows of its own, in a micro-batch
    length: int  # tokens of a row
    remat: str
    accumulation: int = 1
    reference: bool = False  # for its losses alone

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis."""
        return parse_mesh(self.mesh)

    @property
    def devices(self) -> int:
        """Devices that take part."""
        return math.prod(self.sizes.values())

    @property
    def batch(self) -> tuple[int, int]:
        """(rows, tokens of a row) of a step, of all devices."""
        shares = math.prod(n for axis, n in self.sizes.items() if axis in ("data", "fsdp", "expert"))
        return self.rows * shares * self.accumulation, self.length

    @property
    def name(self) -> str:
        """For people."""
        parts = f" x {self.accumulation}" if self.accumulation > 1 else ""
        return f"{self.mesh} {self.rows}x{self.length}{parts} {self.remat}{' (losses)' if self.reference else ''}"


def parse_mesh(text: str) -> dict[str, int]:
    """ "data=2,fsdp=4" as sizes. Raises ValueError for anything else."""
    try:
        return {axis: int(size) for axis, size in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        raise ValueError(f"--meshes {text!r}: wanted axes and sizes such as data=2,fsdp=4") from None


def jobs_of(meshes: list[str], case: str, remat: str, losses: int) -> list[Job]:
    """The meshes in their order, then one device for every global batch that has no such mesh, if losses are wanted."""
    jobs = []
    for text in meshes:
        mesh, *more = text.split("@", 2)
        rows, length = map(int, (more[0] if more else case).split("x"))
        jobs.append(Job(mesh, rows, length, more[1] if len(more) > 1 else remat))
        parse_mesh(mesh)
    alone = {job.batch for job in jobs if job.devices == 1}
    for job in list(jobs):
        if losses and job.batch not in alone:
            alone.add(job.batch)
            parts = job.batch[0] // job.rows
            jobs.append(Job("data=1", job.rows, job.length, "full", parts, reference=True))
    return jobs


# ---- the process that measures --------------------------------------------------------------------------------------


def lower(model: Any, optimizer: Any, job: Job, devices: Any, scan_layers: bool | None) -> dict[str, Any]:
    """What a job runs, lowered: "step" and "weights", and the "mesh". The devices may be those of a topology."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import lora_jax
    from lora_jax import sharding

    mesh = sharding.make_mesh(job.sizes, devices=devices[: job.devices])
    sharding.check(model.config, mesh)
    model.mesh = mesh
    remat = json.loads(job.remat) if job.remat.startswith("[") else job.remat
    # Of what is run for its losses alone, time does not matter, and loops compile sooner.
    step: Any = lora_jax.make_train_step(
        model, optimizer, remat=remat, scan_layers=True if job.reference else scan_layers
    )
    _, lora, frozen = model.split()
    state = jax.eval_shape(optimizer.init, lora)

    def placed(tree: Any, specs: Any) -> Any:
        def place(spec: Any, x: Any) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(place, specs, tree, is_leaf=lambda leaf: isinstance(leaf, P))

    lora, frozen = (placed(tree, sharding.parameter_specs(tree, mesh)) for tree in (lora, frozen))
    state = placed(state, sharding.specs_beside(state, lora, mesh))
    rows, length = job.batch
    ids = jax.ShapeDtypeStruct((job.accumulation, rows // job.accumulation, length), np.int32)
    batch = {"input_ids": ids, "labels": ids}
    batch = placed(batch, sharding.batch_specs(batch))
    make = functools.partial(random_weights, frozen, model.config)
    where = jax.tree.map(lambda x: x.sharding, frozen)
    return {
        "mesh": mesh,
        "step": step.lower(lora, state, frozen, batch),
        "weights": jax.jit(make, out_shardings=where).lower(),
    }


def compiled_of(lowered: dict[str, Any], compile_only: bool) -> dict[str, Any]:
    """Compiles what `lower` gives, and counts what it takes: "step", "weights" and "mesh", with "counted"."""
    from lora_jax.step import bytes_held
    from lora_jax.tools.collectives import collectives, wire_bytes

    start = time.perf_counter()
    step = lowered["step"].compile()
    weights = None if compile_only else lowered["weights"].compile()
    counted = {
        "compile_s": time.perf_counter() - start,
        "gib_per_device": bytes_held(step) / 2**30,
        "wire_gib_per_device": wire_bytes(collectives(step.as_text())) / 2**30,
    }
    return {"mesh": lowered["mesh"], "step": step, "weights": weights, "counted": counted}


def measure(model: Any, lora: Any, optimizer: Any, job: Job, programs: dict[str, Any], args: Any) -> dict[str, Any]:
    """Runs a job; the adapter `lora` is on the host."""
    import jax
    import numpy as np

    from lora_jax import sharding

    mesh, compiled = programs["mesh"], programs["step"]
    devices = list(mesh.devices.ravel())
    before = [_peak(device) for device in devices]
    start = time.perf_counter()
    frozen = programs["weights"]()
    state = sharding.put_beside(optimizer.init(lora), lora, mesh)
    lora = sharding.put(lora, mesh)
    rows, length = job.batch
    ids = token_ids(rows, length, model.config.vocab_size).astype(np.int32).reshape(job.accumulation, -1, length)
    batch = sharding.put_batch({"input_ids": ids, "labels": ids}, mesh)
    jax.block_until_ready((frozen, state, lora))
    weights_s, losses, norms = time.perf_counter() - start, [], []

    def run(steps: int, beside: Any = None) -> float:
        """Seconds of a step; as in training, the host does not wait for one before it sends the next."""
        nonlocal lora, state
        start = time.perf_counter()
        for _ in range(steps):
            lora, state, metrics = compiled(lora, state, frozen, batch)
            losses.append(metrics["loss"])
            norms.append(metrics["grad_norm"])
        if beside is not None:
            beside()
        jax.block_until_ready(losses[-1])
        return (time.perf_counter() - start) / steps

    result: dict[str, Any] = {"weights_s": weights_s, "first_step_s": run(1)}  # which sets up what devices share
    if job.reference:
        run(max(1, args.losses - 1))
    else:
        seen: list[str] = []
        once = run(1)
        steps = max(1, min(args.steps, round(1.0 / once)))
        if once < args.seconds / 4:
            run(steps, lambda: seen.extend(clocks()))
        times: list[float] = []
        while len(times) < args.runs and steps * sum(times) < args.seconds:
            times.append(run(steps))
        seconds = float(np.median(times))
        result |= {"ms": 1e3 * seconds, "ms_min_max": [1e3 * min(times), 1e3 * max(times)], "steps": steps * len(times)}
        result |= {"tokens_per_s": rows * length / seconds, "clocks": seen}
        if len(losses) < args.losses and once * args.losses < args.seconds:
            run(args.losses - len(losses))
    peaks = [_peak(device) for device in devices]
    # The allocator never forgets its peak, so it says something of this mesh only where it has grown.
    result["peak_gib"] = max(peaks) / 2**30 if max(peaks) > max(before) else None
    result["losses"] = [float(loss) for loss in losses[: max(args.losses, 3)]]
    result["grad_norm"] = float(norms[0])
    if not np.isfinite(result["losses"]).all():
        raise ValueError(f"losses are not finite: {result['losses']}")
    return result


def _peak(device: Any) -> int:
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def clocks() -> list[str]:
    """Clock (MHz), power (W) and temperature of every NVIDIA GPU; empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []


def work(args: argparse.Namespace, jobs: list[Job]) -> None:
    """Runs all jobs in this process and says so: lines of JSON, {"job": its number, ...}."""
    import jax

    import lora_jax
    from lora_jax.optim import make_optimizer
    from lora_jax.step import use_compile_cache

    def say(number: int | None, **what: Any) -> None:
        print(json.dumps({"job": number, **what}), flush=True)

    use_compile_cache()
    shape = dict(SHAPES[args.model])
    if args.layers:
        shape["num_hidden_layers"] = args.layers
    say(None, environment=environment())
    model = lora_jax.get_peft_model(abstract_model(hf_config(shape)), r=args.rank, verbose=False)
    optimizer, _ = make_optimizer(lora_jax.SFTConfig(output_dir="unused", learning_rate=2e-4), 1000)
    threads = max(1, min(len(jobs), args.compile_threads or (os.cpu_count() or 1) // 4))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        futures: dict[int, Any] = {}
        for number, job in enumerate(jobs):
            if job.reference and not any(jobs[other].batch == job.batch for other in futures):
                say(number, error="the meshes to compare it with failed")
                continue
            try:
                lowered = lower(model, optimizer, job, jax.devices(), args.scan_layers)
            except Exception as error:
                say(number, error=_text(error))
                continue
            say(None, note=f"lowered {job.name}")
            futures[number] = pool.submit(compiled_of, lowered, args.compile_only)
        programs = {}
        names = {future: number for number, future in futures.items()}
        for future in concurrent.futures.as_completed(names):  # nothing else runs while steps are timed
            number = names[future]
            try:
                programs[number] = future.result()
                say(None, note=f"compiled {jobs[number].name} in {programs[number]['counted']['compile_s']:.0f} s")
            except Exception as error:
                say(number, error=_text(error))
    _, lora, _ = model.split()
    lora = jax.device_get(lora)
    for number, job in enumerate(jobs):
        if number not in programs:
            continue
        say(number, start=True)
        mine = programs.pop(number)
        result: dict[str, Any] = {"layers": shape["num_hidden_layers"], **mine["counted"]}
        try:
            if not args.compile_only:
                model.mesh = mine["mesh"]
                result |= measure(model, lora, optimizer, job, mine, args)
        except Exception as error:
            result["error"] = _text(error)
        del mine
        say(number, **result)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:1500]


# ---- the process that waits for it ----------------------------------------------------------------------------------


def supervise(jobs: list[Job], command: Any, report: Any, timeout: float) -> None:
    """Has all jobs done by processes that may fail.

    Args:
      jobs: what is to be done.
      command: gives the words of a command that does a list of jobs, and says so as `work` does.
      report: called with a job (None: all) and what was said of it.
      timeout: seconds without a word after which a process is killed.
    """
    left, together = list(jobs), True
    while left:
        batch = left if together else left[:1]
        env = dict(os.environ)
        if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(env):
            env["XLA_CLIENT_MEM_FRACTION"] = str(MEMORY_FRACTION)
        running: Job | None = None
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command(batch), stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
            lines: queue.Queue[str | None] = queue.Queue()
            reader = threading.Thread(target=_read, args=(process.stdout, lines))
            reader.start()
            why = ""
            while True:
                try:
                    line = lines.get(timeout=timeout)
                except queue.Empty:
                    why = f"said nothing for {timeout:.0f} s"
                    process.kill()
                    break
                if line is None:
                    break
                what = json.loads(line)
                number = what.pop("job")
                if "start" in what:
                    running = batch[number]
                    continue
                job = None if number is None else batch[number]
                report(job, what)
                if job is not None:
                    left = [other for other in left if other is not job]
                    running = None
            code = process.wait()
            reader.join()
            errors.seek(0)
            why = f"{why or f'ended with status {code}'}: {errors.read()[-1500:]}"
        if running is not None:
            report(running, {"error": why})
            left = [other for other in left if other is not running]
        elif left and not together:
            report(left[0], {"error": why})
            left = left[1:]
        elif left:  # it failed before any step: one of them does harm, so each gets a process of its own
            report(None, {"note": f"the process for all meshes failed, {why}"})
            together = False


def _read(stream: Any, lines: queue.Queue) -> None:
    with stream:
        for line in stream:
            if line.startswith("{"):  # libraries may print too
                lines.put(line)
    lines.put(None)


def compare(rows: list[dict[str, Any]], count: int) -> None:
    """Adds efficiency and the distance of losses to rows, from those of one device that are there by now."""
    for row in rows:
        alone = [other for other in rows if other["devices"] == 1 and "losses" in other]
        same = [other for other in alone if other["batch"] == row["batch"] and other is not row]
        if "losses" in row and row["devices"] > 1 and same and count:
            pairs = list(zip(row["losses"][:count], same[0]["losses"][:count], strict=False))
            row["losses_compared"] = len(pairs)
            row["loss_difference"] = max(abs(got / want - 1) for got, want in pairs)
            row["norm_difference"] = abs(row["grad_norm"] / same[0]["grad_norm"] - 1)
        # Rows of a device as alone; where devices share rows ("context", "tensor") the rows of all of them.
        per_device = [other for other in alone if "ms" in other and other["case"].split("x")[1] == str(row["batch"][1])]
        for other in sorted(per_device, key=lambda o: (o["remat"] != row["remat"], o["case"] != row["case"]))[:1]:
            if "ms" in row and row["devices"] > 1:
                row["efficiency"] = row["tokens_per_s"] / row["devices"] / other["tokens_per_s"]


def line_of(row: dict[str, Any]) -> str:
    """A row for people."""
    name = f"{row['model']} {row['mesh']} {row['case']} {row['remat']}{' (losses)' if row['reference'] else ''}:"
    if "error" in row:
        return f"{name} {row['error'][-400:]}"
    parts = [f"compiler {row['gib_per_device']:.2f} GiB", f"received {row['wire_gib_per_device']:.3f} GiB"]
    if row.get("peak_gib"):
        parts.append(f"allocator {row['peak_gib']:.2f} GiB")
    if "ms" in row:
        low, high = row["ms_min_max"]
        parts = [f"{row['ms']:.1f} ms ({low:.1f} to {high:.1f})", f"{row['tokens_per_s']:,.0f} tokens/s", *parts]
    if "efficiency" in row:
        parts.append(f"efficiency {row['efficiency']:.3f}{'' if row['efficiency'] >= BAR else f' (BELOW {BAR})'}")
    if "loss_difference" in row:
        far = row["loss_difference"] > TOLERANCE or row["norm_difference"] > NORM_TOLERANCE
        parts.append(
            f"{row['losses_compared']} losses off by {row['loss_difference']:.1e}, norm by "
            f"{row['norm_difference']:.1e}{f' (MORE THAN {TOLERANCE}, {NORM_TOLERANCE})' if far else ''}"
        )
    if row.get("losses"):
        parts.append(f"loss {row['losses'][0]:.4f} to {row['losses'][-1]:.4f}")
    if row.get("clocks"):
        parts.append("MHz, W, C: " + "; ".join(row["clocks"]))
    return f"{name} {', '.join(parts)}"


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", choices=SHAPES, default="llama3.1-8b")
    made.add_argument("--layers", type=int, help="fewer layers than the model has")
    made.add_argument("--meshes", nargs="+", default=["data=1"], help="such as data=2,fsdp=4 or context=4@1x65536@full")
    made.add_argument("--case", default="2x2048", help="rows x tokens of a device that has rows of its own")
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--remat", help="a preset or JSON; what fits one device of 80 GB unless given")
    made.add_argument("--scan-layers", action=argparse.BooleanOptionalAction)
    made.add_argument("--compile-only", action="store_true", help="memory and bytes alone")
    made.add_argument("--compile-threads", type=int, help="programs compiled at a time; a quarter of the cores")
    made.add_argument("--losses", type=int, default=20, help="losses that are compared with one device; 0 for none")
    made.add_argument("--steps", type=int, default=4, help="of a run, which follow each other without a wait, in 1 s")
    made.add_argument("--runs", type=int, default=4)
    made.add_argument("--seconds", type=float, default=8, help="for one mesh, after which no other run begins")
    made.add_argument("--timeout", type=float, default=150, help="seconds without a word after which a process is lost")
    made.add_argument("--out", type=Path, help="JSON file, written after every mesh")
    made.add_argument("--jobs", help=argparse.SUPPRESS)  # the process that measures
    return made


def main() -> None:
    """Measures every mesh and prints a line for each."""
    args = parser().parse_args()
    if args.jobs:
        work(args, [Job(**job) for job in json.loads(args.jobs)])
        return
    losses = 0 if args.compile_only else args.losses
    jobs = jobs_of(args.meshes, args.case, args.remat or REMAT.get(args.model, "selective"), losses)
    rows: list[dict[str, Any]] = []
    where: dict[str, str] = {}
    began = time.monotonic()

    def report(job: Job | None, what: dict[str, Any]) -> None:
        clock = f"{time.monotonic() - began:5.0f} s "
        if job is None:
            where.update(what.get("environment", {}))
            print(clock + (what.get("note") or " ".join(where.values())), flush=True)
            return
        case = f"{job.rows}x{job.length}"
        about = {"model": args.model, "mesh": job.mesh, "devices": job.devices, "case": case, "batch": list(job.batch)}
        about |= {"accumulation": job.accumulation, "remat": job.remat, "reference": job.reference, "rank": args.rank}
        rows.append({**about, "scan_layers": args.scan_layers, **what})
        compare(rows, args.losses)
        print(clock + line_of(rows[-1]), flush=True)
        if args.out:
            text = json.dumps({"tool": "tools/bench_scaling.py", "environment": where, "results": rows}, indent=1)
            args.out.write_text(text + "\n")

    def command(jobs: list[Job]) -> list[str]:
        listed = json.dumps([dataclasses.asdict(job) for job in jobs])
        return [sys.executable, "-m", "lora_jax.tools.bench_scaling", *sys.argv[1:], "--jobs", listed]

    supervise(jobs, command, report, args.timeout)
    print("\nIn all:\n" + "\n".join(line_of(row) for row in rows if not row["reference"]))


if __name__ == "__main__":
    main()
