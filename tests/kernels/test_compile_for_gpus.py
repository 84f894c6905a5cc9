"""Every Pallas-Triton kernel, with every configuration of its table, compiles for four GPUs on any machine."""

import pytest

FAMILIES = ["attention", "grouped", "loss", "nf4_in_loop", "nf4_prologue", "rms_norm"]


_CASES = [
    pytest.param(capability, quarter, marks=pytest.mark.rotate("Hopper" if capability == "sm_90" else "older GPUs"))
    for capability in ("sm_80", "sm_86", "sm_89", "sm_90")
    for quarter in "0123"
]


@pytest.mark.parametrize(("capability", "quarter"), _CASES)
def test_kernels_compile(capability, quarter, compile_for_gpus):
    results = compile_for_gpus("kernels/compile_for_gpu.py", capability, "--quarter", quarter, same_jax=False)
    failed = [f"{one['name']}: {one['error'][:500]}" for one in results if one["error"]]
    assert not failed, "\n".join(failed)
    assert {one["family"] for one in results} == set(FAMILIES), "a family of kernels yielded nothing to compile"
