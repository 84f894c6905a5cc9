"""`lora_jax.doctor`: what it finds, on machines that are made up, and the kernels it runs."""

import os
import stat
from importlib import metadata

import jax
import numpy as np
import pytest

from lora_jax import doctor
from lora_jax.doctor import TOLERANCE, check, check_kernels

GIB = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes up what nvidia-smi, the packages and JAX say."""

    def make(*, smi=None, plugin=None, plugin_version=None, pool=None, backend="cpu", capability="9.0"):
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\n" + ("exit 9\n" if smi is None else f'echo "{smi}"\n'))
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        real = metadata.version

        def version(name):
            if "cuda" in name:
                if plugin is None or plugin not in name:
                    raise metadata.PackageNotFoundError(name)
                return plugin_version or real("jaxlib")
            return real(name)

        class Device:
            device_kind, compute_capability = "NVIDIA H100", capability

            def memory_stats(self):
                return {"bytes_limit": pool}

        monkeypatch.setattr(doctor.metadata, "version", version)
        if backend == "gpu":
            monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
            monkeypatch.setattr(jax, "devices", lambda: [Device()])
            monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
        return {finding.what: finding for finding in check(kernels=False)}

    return make


H100 = "NVIDIA H100 80GB HBM3, {driver}, 81920, {used}"


def test_a_machine_without_a_gpu(machine, monkeypatch, tmp_path):
    found = machine()
    assert found["GPU"].state == "wrong" and "check the driver" in found["GPU"].fix  # nvidia-smi fails
    assert found["JAX"].state == "note" and "with an NVIDIA GPU" in found["JAX"].fix
    assert found["packages"].state == found["Python"].state == "ok"
    assert f"jax {jax.__version__}" in found["packages"].text
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert next(f for f in check(kernels=False) if f.what == "GPU").state == "-"


def test_a_gpu_that_all_is_well_with(machine):
    smi = H100.format(driver="580.65.06", used=4)
    found = machine(smi=smi, plugin="cuda13", backend="gpu", pool=int(0.92 * 80 * GIB))
    assert found["GPU 0"].text == "NVIDIA H100 80GB HBM3, 80.0 GiB, driver 580.65.06"
    assert {found[name].state for name in ("GPU 0", "CUDA", "JAX", "memory pool")} == {"ok"}
    assert "compute capability 9.0" in found["JAX"].text and "73.6 of 80.0 GiB (92 %)" in found["memory pool"].text
    assert "other programs" not in found


@pytest.mark.parametrize(
    ("machine_is", "what", "state", "fix"),
    [
        (dict(driver="580.1"), "CUDA", "wrong", 'pip install "lora-jax[cuda13]"'),
        (dict(driver="550.1"), "CUDA", "wrong", 'pip install "lora-jax[cuda12]"'),
        (dict(driver="470.1"), "driver", "wrong", "newer NVIDIA driver"),
        (dict(driver="550.1", plugin="cuda13"), "CUDA", "wrong", "pip uninstall jax-cuda13-plugin"),
        (dict(plugin="cuda13", plugin_version="0.1.0"), "CUDA", "wrong", "jax-cuda13-plugin=="),
        (dict(plugin="cuda13", backend="cpu"), "JAX", "wrong", "see the line on CUDA"),
        (dict(plugin="cuda13", capability="7.5"), "JAX", "note", "Ampere"),
        (dict(plugin="cuda13", pool=60 * GIB), "memory pool", "note", "XLA_CLIENT_MEM_FRACTION=0.92"),
        (dict(plugin="cuda13", used=30000), "other programs", "note", "--memory-limit"),
    ],
)
def test_what_is_wrong_with_a_gpu(machine, machine_is, what, state, fix):
    smi = H100.format(driver=machine_is.pop("driver", "580.1"), used=machine_is.pop("used", 4))
    found = machine(**{"smi": smi, "backend": "gpu", "pool": int(0.92 * 80 * GIB), **machine_is})
    assert found[what].state == state
    assert fix in found[what].fix
    if what == "JAX" and state == "wrong":
        assert "memory pool" not in found


def test_a_package_of_the_wrong_version(machine, monkeypatch):
    wanted = ["jax<0.1", "no-such-package>=2", 'xllamacpp>=2026; extra == "demo"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: wanted)
    found = machine()
    assert found["jax"].state == "wrong" and found["jax"].fix == 'pip install "jax<0.1"'
    assert found["no-such-package"].text == "not installed"
    assert "xllamacpp" not in found


@pytest.mark.rotate
@pytest.mark.parametrize("op", sorted(doctor._ops()))
def test_kernels_agree_in_the_interpreter(op):
    if jax.default_backend() == "gpu":
        pytest.skip("`lora-jax doctor` runs them compiled there")
    found = list(check_kernels({op}, interpret=True))
    assert found and all(f.state in ("ok", "-") and op in f.what for f in found)
    assert op == "linear_cross_entropy" or any(f.state == "ok" for f in found)


@pytest.mark.gpu
def test_kernels_agree_on_the_gpu():
    found = list(check_kernels())
    assert not [f for f in found if f.state == "wrong"]
    assert sum(f.state == "ok" for f in found) >= 8


def test_kernels_that_fail(monkeypatch):
    rng = np.random.default_rng(0)
    good = rng.standard_normal(100)

    def make():
        def run(name):
            if name == "other":
                raise NotImplementedError("op: implementation='other' cannot do this call: it is too old")
            if name == "broken":
                raise RuntimeError("ptxas: no\nmore")
            return [good if name == "xla" else good + {"near": 0.5, "far": 2.0}[name] * TOLERANCE * abs(good).mean()]

        return run

    monkeypatch.setattr(doctor, "_ops", lambda: {"op": (make, ("near", "far", "other", "broken"))})
    near, far, other, broken = check_kernels(interpret=True)
    assert (near.state, far.state, other.state, broken.state) == ("ok", "wrong", "-", "wrong")
    assert other.text == "it is too old" and "RuntimeError: ptxas: no" in broken.text and "report it" in far.fix
    assert [f.state for f in check_kernels()] == ["-"] or jax.default_backend() == "gpu"
