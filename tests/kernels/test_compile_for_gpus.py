"""Every Pallas-Triton kernel, with every configuration of its table, compiles for four GPUs on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAMILIES = ["attention", "grouped", "loss", "nf4_in_loop", "nf4_prologue", "rms_norm"]
ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / ".cuda"


@pytest.mark.parametrize("capability", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_kernels_compile(capability):
    if not (CUDA / "jax_cuda13_plugin").is_dir():
        pytest.skip("the CUDA compiler is not in .cuda: `make cuda-compiler` puts it there (265 MB)")
    toolkit = CUDA / "nvidia" / "cu13"
    environment = {
        **os.environ,
        # Before the rest, for the plugin alone: the GPU builds of jax itself may be installed or not.
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(CUDA)]),
        "PATH": f"{toolkit / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={toolkit} --xla_gpu_autotune_level=0",
    }
    script = Path(__file__).with_name("compile_for_gpu.py")
    command = [sys.executable, "-W", "ignore:The Pallas Triton backend:DeprecationWarning", str(script), capability]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [f"{one['name']}: {one['error'][:500]}" for one in results if one["error"]]
    assert not failed, "\n".join(failed)
    assert {one["family"] for one in results} == set(FAMILIES), "a family of kernels yielded nothing to compile"
