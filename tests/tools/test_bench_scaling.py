"""bench_scaling measures all meshes it can, compares their losses with one device's, and outlives what fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax.tools.bench_scaling import Job, compare, jobs_of, line_of, supervise

ROOT = Path(__file__).parents[2]


def test_jobs():
    """Each mesh with its case, and one device for the global batches that none of them has."""
    jobs = jobs_of(["fsdp=4", "data=1", "tensor=2,fsdp=2@4x64", "context=2@1x128@full"], "2x64", "selective", 20)
    assert jobs == [
        Job("fsdp=4", 2, 64, "selective"),
        Job("data=1", 2, 64, "selective"),
        Job("tensor=2,fsdp=2", 4, 64, "selective"),
        Job("context=2", 1, 128, "full"),
        Job("data=1", 2, 64, "full", 4, True),  # for the first and the third, which have the same rows
        Job("data=1", 1, 128, "full", 1, True),
    ]
    assert [job.batch for job in jobs] == [(8, 64), (2, 64), (8, 64), (1, 128), (8, 64), (1, 128)]
    assert not any(job.reference for job in jobs_of(["fsdp=4"], "2x64", "full", 0))
    with pytest.raises(ValueError, match="wanted axes and sizes such as"):
        jobs_of(["fsdp"], "2x64", "full", 0)


def row(mesh: str, devices: int, batch: list[int], losses: list[float], **more) -> dict:
    common = {"model": "tiny", "case": "2x64", "remat": "full", "reference": False, "grad_norm": 1.0}
    common |= {"gib_per_device": 1.0, "wire_gib_per_device": 0.5}
    return {**common, "mesh": mesh, "devices": devices, "batch": batch, "losses": losses, **more}


def test_efficiency_and_losses_are_those_of_one_device():
    rows = [
        row("data=2", 2, [4, 64], [5.0, 4.0], ms=10.0, ms_min_max=[9.0, 11.0], tokens_per_s=36.0),
        row("data=1", 1, [2, 64], [6.0, 5.0], ms=10.0, ms_min_max=[9.0, 11.0], tokens_per_s=20.0),
        row("data=1", 1, [4, 64], [5.0, 4.04], reference=True, grad_norm=1.05),
    ]
    compare(rows, 20)
    assert rows[0]["efficiency"] == pytest.approx(0.9)
    assert rows[0]["loss_difference"] == pytest.approx(0.04 / 4.04)
    assert rows[0]["norm_difference"] == pytest.approx(0.05 / 1.05)
    assert "MORE THAN" in line_of(rows[0]) and "efficiency" not in line_of(rows[1])
    # One device did half a device's rows of the next: its own case comes first.
    both = [
        row("data=1", 1, [2, 64], [6.0, 5.0], ms=10.0, tokens_per_s=20.0),
        row("data=2", 2, [8, 64], [5.0, 4.0], case="4x64", ms=10.0, tokens_per_s=45.0),
        row("data=1", 1, [4, 64], [5.0, 4.0], case="4x64", ms=10.0, tokens_per_s=25.0),
    ]
    compare(both, 20)
    assert both[1]["efficiency"] == pytest.approx(0.9)


SAYS = """
import json, os, sys, time
jobs = json.loads(sys.argv[1])
if any(job["rows"] == 7 for job in jobs):
    os._exit(5)  # before anything ran
for number, job in enumerate(jobs):
    print(json.dumps({"job": number, "start": True}), flush=True)
    if job["rows"] == 2:
        os.kill(os.getpid(), 9)
    if job["rows"] == 3:
        time.sleep(60)
    print("a warning", flush=True)
    print(json.dumps({"job": number, "ms": job["rows"]}), flush=True)
"""


@pytest.mark.parametrize("rows", [(1, 2, 3, 4), (7, 4)])
def test_what_fails_does_not_lose_the_others(rows):
    """Rows that kill the process, that hang, and that end it before it has begun with any."""
    jobs, said = [Job("data=1", n, 64, "full") for n in rows], {}

    def report(job: Job | None, what: dict) -> None:
        if job is not None:
            said[job.rows] = what

    def command(jobs: list[Job]) -> list[str]:
        return [sys.executable, "-c", SAYS, json.dumps([vars(job) for job in jobs])]

    supervise(jobs, command, report, 1.5)
    assert set(said) == set(rows)
    assert said[4] == {"ms": 4}
    for failed, text in ((2, "ended with status -9"), (3, "said nothing for 2 s"), (7, "ended with status 5")):
        assert text in said.get(failed, {"error": text})["error"]


@pytest.mark.slow
def test_meshes_of_a_tiny_model(tmp_path):
    meshes = ["fsdp=4", "data=1", "tensor=2,fsdp=2@4x64", "context=2@1x64@full", "data=16"]
    command = [sys.executable, "-W", "error", "-m", "lora_jax.tools.bench_scaling", "--model", "tiny", "--case", "2x64"]
    command += ["--meshes", *meshes, "--compile-threads", "2", "--out", str(tmp_path / "results.json")]
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    rows = {result["mesh"]: result for result in results if not result["reference"]}
    assert (
        list(rows) == ["data=16", *(text.split("@")[0] for text in meshes[:-1])]
        and "places for 16 devices" in rows["data=16"]["error"]
    )
    for mesh in ("fsdp=4", "tensor=2,fsdp=2", "context=2"):
        assert rows[mesh]["losses_compared"] == 20
        assert rows[mesh]["loss_difference"] < 1e-3  # bfloat16: rounding to 2^-9, of a mean over 128 tokens and more
        assert rows[mesh]["wire_gib_per_device"] > 0
