"""The wheel holds what the repository holds, and works where the repository is not."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("kernels", "models", "tools")  # lora_jax/<name> is a symlink to <name>
DATA = {".json", ".jinja"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: setuptools writes its build/ and *.egg-info beside the sources, and reads stale ones from there.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("lora_jax", *LINKED):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def _expected_files() -> set[str]:
    expected = {"lora_jax/py.typed"}
    for top in ("lora_jax", *LINKED):
        package = top if top == "lora_jax" else f"lora_jax/{top}"
        for path in (ROOT / top).rglob("*"):  # rglob does not enter the symlinks of lora_jax
            if path.is_file() and (path.suffix == ".py" or path.suffix in DATA):
                expected.add(f"{package}/{path.relative_to(ROOT / top).as_posix()}")
    return expected


def test_wheel_lists_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        infos = archive.infolist()
    names = {info.filename for info in infos}
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == _expected_files()
    assert len(names) == len(infos), "a file is in the wheel twice"
    assert not [info.filename for info in infos if (info.external_attr >> 16) & 0o170000 == 0o120000], "symlinks"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_installed_elsewhere_imports_from_there(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", str(wheel)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    script = """
import importlib, importlib.metadata, pkgutil
import lora_jax
print(lora_jax.__file__)
for name in ("kernels", "models", "tools"):
    package = importlib.import_module("lora_jax." + name)
    print(*package.__path__)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        spec = importlib.util.find_spec(module.name)
        print(spec.origin or module.name)
print(importlib.metadata.distribution("lora-jax").locate_file(""))
"""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    places = [Path(line).resolve() for line in done.stdout.splitlines()]
    assert len(places) > 4
    assert not [place for place in places if not place.is_relative_to(site.resolve())]
