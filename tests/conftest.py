"""What all tests share: the environment JAX starts in, markers, the real model, and the torch oracles."""

import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORACLES = ROOT / "tests" / "oracles"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-configs",
        action="store_true",
        default=os.environ.get("LORA_JAX_ALL") == "1",
        help="run every parameter set of tests marked `rotate`, and all marked `turns` (also: LORA_JAX_ALL=1)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Before jax is imported, and inherited by the subprocesses that tests start. Four CPU devices let sharded code run
    # anywhere and cost nothing where one is used; the compilation cache serves those subprocesses and later runs.
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4"]
    if not config.getoption("--all-configs") and shutil.which("nvidia-smi") is None:
        # Compiling is most of what the tests do: LLVM's optimisation would take a quarter of all their time on a CPU.
        # With every configuration programs are compiled as users' are.
        flags.append("--xla_backend_optimization_level=0")
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.rootpath / ".pytest_cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    # GPUs multiply float32 in 19 bits unless told otherwise; the tests' float32 means float32.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    # A test that reaches for the network shall fail at once, not wait for it.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


# One parameter set of each test marked `rotate`, chosen by the commit; of each family that `rotate(family)` names. Then
# one test of those marked `turns(family)`, of all files.


@functools.cache
def _commit() -> str:
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip()[:12] if git.returncode == 0 else "no commit"


@pytest.hookimpl(trylast=True)  # after -k, -m and node ids have made their choice
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all-configs"):
        _choose(config, items, "rotate", lambda item, *family: (" ".join([_function(item), *family]), item.nodeid))
        _choose(config, items, "turns", lambda item, family: (family, _function(item)))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and (reason := _why_no_gpu()):
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


def _function(item: pytest.Item) -> str:
    return item.nodeid.split("[")[0]


def _choose(
    config: pytest.Config, items: list[pytest.Item], marker: str, places: Callable[..., tuple[str, str]]
) -> None:
    """Keeps one member of each family; `places(item, *arguments of the marker)` says (family, member)."""
    commit = _commit()
    where = {item: places(item, *mark.args) for item in items if (mark := item.get_closest_marker(marker))}
    families: dict[str, list[str]] = {}
    for family, member in dict.fromkeys(where.values()):
        families.setdefault(family, []).append(member)
    chosen = {
        name: members[zlib.crc32(f"{commit} {name}".encode()) % len(members)] for name, members in families.items()
    }
    left_out = {item for item, (family, member) in where.items() if member != chosen[family]}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))
    config.stash.setdefault(_ROTATION, []).extend(
        f"{marker} ({commit}): {member}, 1 of {len(families[name])}"
        for name, member in chosen.items()
        if len(families[name]) > 1
    )


_ROTATION = pytest.StashKey[list[str]]()


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    return config.stash.get(_ROTATION, [])


def pytest_collection_finish() -> None:
    # What was imported stays: looking through it for garbage would take a tenth of the time of tracing.
    gc.collect()
    gc.freeze()


def _why_no_gpu() -> str | None:
    import jax

    if jax.default_backend() == "gpu":
        return None
    return f"needs an NVIDIA GPU; JAX's backend here is {jax.default_backend()!r}"


# The real model and the oracles.


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The SmolLM2-135M-Instruct folder, float32, converted on the first use."""
    from lora_jax.tools.smollm2 import fetch_smollm2

    return fetch_smollm2()


@pytest.fixture(scope="session")
def oracle() -> Callable[..., str]:
    """`oracle("script.py", *arguments) -> stdout`: run tests/oracles/script.py where torch and PEFT are installed."""
    configured = os.environ.get("LORA_JAX_ORACLE_PYTHON")
    python = Path(configured or ROOT / ".venv-oracles" / "bin" / "python")
    if not python.is_file():
        if configured:
            pytest.fail(f"LORA_JAX_ORACLE_PYTHON names {python}, which does not exist", pytrace=False)
        pytest.skip("needs the torch oracle environment: make test-oracles")

    def run(script: str, *arguments: object, timeout: float = 600) -> str:
        command = [str(python), str(ORACLES / script), *map(str, arguments)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode != 0:
            raise RuntimeError(f"{script} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    return run


@pytest.fixture(scope="session")
def compile_for_gpus() -> Callable[..., list[Any]]:
    """`compile_for_gpus("script.py", *arguments)`: run a script of tests/ that compiles for absent GPUs.

    Returns the JSON of each line that it prints. With `same_jax` the test is skipped if the compiler is of another
    version than jax.
    """
    cuda = ROOT / ".cuda"
    toolkit = cuda / "nvidia" / "cu13"

    def run(script: str, *arguments: str, same_jax: bool = True) -> list[Any]:
        if not (cuda / "jax_cuda13_plugin").is_dir():
            pytest.skip("the CUDA compiler is not in .cuda: `make cuda-compiler` puts it there (265 MB)")
        if same_jax:
            plugin = next(cuda.glob("jax_cuda13_plugin-*.dist-info")).name
            if f"-{metadata.version('jax')}." not in plugin:
                pytest.skip(f"the CUDA compiler in .cuda is of another version than jax: {plugin}")
        environment = {
            **os.environ,
            # Before the rest, for the plugin alone: the GPU builds of jax itself may be installed or not.
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(cuda)]),
            "PATH": f"{toolkit / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={toolkit} --xla_gpu_autotune_level=0",
        }
        ignored = "ignore:The Pallas Triton backend:DeprecationWarning"
        command = [sys.executable, "-W", ignored, str(ROOT / "tests" / script), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run
