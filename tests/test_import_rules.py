"""Which way imports point, and what importing the package does not do (see lora_jax/__init__.py)."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A part may import itself and those before it.
ORDER = ("lora_jax.kernels", "lora_jax.models", "lora_jax", "lora_jax.tools")
LINKED = ("kernels", "models", "tools")
FOLDERS = {
    "lora_jax.kernels": "kernels",
    "lora_jax.models": "models",
    "lora_jax": "lora_jax",
    "lora_jax.tools": "tools",
}


def _sources(folder: str) -> list[Path]:
    # rglob does not enter the symlinks lora_jax/kernels, lora_jax/models, lora_jax/tools.
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if ".ipynb_checkpoints" not in path.parts]


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import in the file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), path.name)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            else:
                # "from lora_jax import kernels" imports lora_jax.kernels.
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _part(name: str) -> str | None:
    """The entry of ORDER that a dotted name belongs to."""
    parts = [part for part in ORDER if name == part or name.startswith(f"{part}.")]
    return max(parts, key=len, default=None)


def test_nobody_imports_by_bare_or_relative_names() -> None:
    # "import kernels" would be another package or a second copy of every class of ours.
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for folder in (*FOLDERS.values(), "tests")
        for path in _sources(folder)
        for line, name in _imports(path)
        if name.split(".")[0] in LINKED or name.startswith(".")
    ]
    assert not wrong


@pytest.mark.parametrize("part", ORDER)
def test_dependencies_point_one_way(part: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in _sources(FOLDERS[part])
        for line, name in _imports(path)
        if (target := _part(name)) and ORDER.index(target) > ORDER.index(part)
    ]
    assert not wrong


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders(name: str) -> None:
    # With an __init__.py, "import kernels" from the repository's root would find ours before the installed package.
    assert not (ROOT / name / "__init__.py").exists()
    assert (ROOT / "lora_jax" / name).is_symlink()
    assert os.readlink(ROOT / "lora_jax" / name) == f"../{name}"


def _run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    loaded = _run("import sys, lora_jax; dir(lora_jax); lora_jax.__version__; print(*sys.modules)").split()
    assert not {"jax", "flax", "transformers", "torch", "numpy"} & set(loaded)


def test_every_public_name_resolves() -> None:
    _run("import lora_jax\nfor name in dir(lora_jax): getattr(lora_jax, name)")


def test_no_public_name_is_also_a_module() -> None:
    # "import lora_jax.x" puts the module in place of the function lora_jax.x, or not, depending on what came first.
    import lora_jax

    assert not [name for name in lora_jax.__all__ if (ROOT / "lora_jax" / f"{name}.py").exists()]


def test_unknown_name_is_an_attribute_error() -> None:
    import lora_jax

    with pytest.raises(AttributeError, match="from_pretrain.*Did you mean .*from_pretrained"):
        _ = lora_jax.from_pretrain


def test_importing_every_module_starts_no_backend_and_no_torch() -> None:
    modules = []
    for part, folder in FOLDERS.items():
        for path in _sources(folder):
            dotted = ".".join((part, *path.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(".__init__")
            if not path.stem.startswith(("triton", "mosaic", "__main__")):  # may need a GPU's libraries
                modules.append(dotted)
    assert len(modules) > 3
    script = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    bridge = sys.modules.get("jax._src.xla_bridge")
    assert bridge is None or not bridge._backends, f"importing {{name}} started a JAX backend: {{bridge._backends}}"
    assert "torch" not in sys.modules, f"importing {{name}} imported torch"
"""
    _run(script)
