"""Device time of a function: kernels alone (CUPTI), or many calls inside one compiled program.

Working sets rotate, so that weights come from device memory and not from the L2 cache; every call waits for the one
before, so that XLA neither merges calls nor runs them beside each other.
"""

import collections
import gzip
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

__all__ = ["kernel_times", "time_us", "trace_totals"]


def _program(fn: Callable, sets: Sequence[tuple]) -> Any:
    """Calls fn on every set in turn; returns one element of every result."""
    ends = []
    fn = jax.jit(fn)  # traced and lowered once
    for args in sets:
        args, ends = jax.lax.optimization_barrier((args, ends))  # the next call starts when the last one has ended
        # Whole results are computed, behind the barrier, though only their first elements are wanted.
        result = jax.lax.optimization_barrier(fn(*args))
        ends = [*ends, *(leaf.ravel()[:1] for leaf in jax.tree.leaves(result))]
    return ends


def time_us(fn: Callable, sets: Sequence[tuple], *, repeats: int = 10, calls: int | None = None) -> float:
    """Median microseconds of one call of fn, over `repeats` runs of a program of `calls` calls.

    Args:
      fn: any JAX function.
      sets: argument tuples, used in turn; together 200 MB or more if they shall not stay in the L2 cache.
      repeats: timed runs, after two warm ones.
      calls: calls in one program; None for one a set. More calls hide the launch of the program (about 50 us).
    """
    calls = calls or len(sets)
    chosen = [sets[i % len(sets)] for i in range(calls)]
    program = jax.jit(lambda chosen: _program(fn, chosen))
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(program(chosen))
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[2:]) / calls


def kernel_times(fn: Callable, sets: Sequence[tuple], *, repeats: int = 5) -> list[tuple[str, float]]:
    """(name, microseconds) of every kernel of one call, averaged over the sets and `repeats` (2 or more) runs.

    Needs CUPTI, so no other profiler may be attached. The sum leaves out the gaps between kernels.
    """
    from jax.experimental.mosaic.gpu import profiler

    program = jax.jit(lambda sets: _program(fn, sets))
    runs: Any = profiler.measure(program, aggregate=False, iterations=repeats)(list(sets))[1]
    totals: dict[str, float] = {}
    for one in runs:
        for name, milliseconds in one:
            if name.startswith("loop_slice_fusion") and milliseconds < 3e-3:
                continue  # reads one element of a result, for `_program`
            totals[name] = totals.get(name, 0.0) + 1e3 * milliseconds
    count = repeats * len(sets)
    return sorted(((name, total / count) for name, total in totals.items()), key=lambda item: -item[1])


def trace_totals(folder: Path) -> list[tuple[str, int, float]]:
    """(name without its number, calls, milliseconds) of the GPU's kernels and copies in a `jax.profiler.trace` folder.

    Copies on streams of their own run beside kernels, so the sum can exceed the time of the step.
    """
    trace = max(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = (e for e in events if e.get("ph") == "M" and "name" in e.get("args", {}))
    names = {(e["pid"], e.get("tid"), e["name"]): e["args"]["name"] for e in named}
    totals: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for e in events:
        if e.get("ph") != "X":
            continue
        process = names.get((e["pid"], None, "process_name"), "")
        thread = names.get((e["pid"], e["tid"], "thread_name"), "")
        if "GPU" in process and "Stream" in thread:
            total = totals[re.sub(r"[._]\d+$", "", e["name"])]
            total[0] += 1
            total[1] += e["dur"] / 1e3
    return sorted(((name, int(count), ms) for name, (count, ms) in totals.items()), key=lambda row: -row[2])
