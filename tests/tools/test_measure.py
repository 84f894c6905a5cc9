"""Reading a profiler trace."""

import gzip
import json

from lora_jax.tools.measure import trace_totals


def test_kernels_of_a_trace_are_summed_by_name(tmp_path):
    name = lambda kind, pid, tid, text: {"ph": "M", "pid": pid, "name": kind, "args": {"name": text}, **tid}  # noqa: E731
    events = [
        name("process_name", 1, {}, "/host:CPU"),
        name("process_name", 2, {}, "/device:GPU:0"),
        name("thread_name", 2, {"tid": 7}, "Stream #16(Compute)"),
        name("thread_name", 2, {"tid": 8}, "XLA Ops"),
        {"ph": "M", "pid": 2, "name": "process_sort_index", "args": {"sort_index": 2}},
    ]
    times = [("norm_3", 7, 2, 1500), ("norm_4", 7, 2, 500), ("gemm", 7, 2, 4000), ("gemm", 8, 2, 9), ("host", 7, 1, 9)]
    events += [{"ph": "X", "name": n, "tid": tid, "pid": pid, "dur": us} for n, tid, pid, us in times]
    folder = tmp_path / "plugins" / "profile"
    folder.mkdir(parents=True)
    (folder / "vm.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert trace_totals(tmp_path) == [("gemm", 1, 4.0), ("norm", 2, 2.0)]
