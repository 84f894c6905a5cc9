"""The documents: links lead somewhere, commands and arguments exist, Python is Python, YAML is read."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

import lora_jax
from lora_jax import cli
from lora_jax.settings import read_settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
OURS = [page for page in PAGES if page.name not in ("README.md", "coming-from-unsloth.md") or page.parent != ROOT]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_options_exist(page: Path) -> None:
    root: Any = typer.main.get_command(cli.app)
    for line in re.findall(r"^lora-jax (.*)$", "\n".join(blocks(page, "")), re.MULTILINE):
        command, words = root, line.split()
        while hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command, words = command.commands[words[0]], words[1:]
        options = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        assert {word for word in words if re.match(r"-{1,2}[a-z]", word)} <= options, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_is_python_and_its_arguments_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "lora_jax"):
                continue
            parameters = inspect.signature(getattr(lora_jax, node.func.attr)).parameters
            given = {keyword.arg for keyword in node.keywords if keyword.arg}
            # `generate_text` hands its options on.
            known = {*parameters, *inspect.signature(lora_jax.generate).parameters}
            assert given <= known, (node.func.attr, given - known)


@pytest.mark.parametrize("page", OURS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_yaml_is_read(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        (tmp_path / "run.yaml").write_text(block)
        assert read_settings(tmp_path / "run.yaml")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_make_targets_and_modules_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", text, re.MULTILINE)) <= {
        pair for name in targets for pair in ((name, ""), ("", name))
    }
    for module in re.findall(r"python -m lora_jax\.([\w.]+)", text):
        assert (ROOT / "lora_jax" / (module.replace(".", "/") + ".py")).exists(), module


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index or page.name == "scaling.md"


def test_documented_modules_exist() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    names = re.search(r"DOCUMENTED := \$\(addprefix lora_jax\.,(.*?)\)", makefile)[1].split()
    for name in names:
        path = ROOT / "lora_jax" / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), name


def test_public_names_have_docstrings() -> None:
    for name in lora_jax.__all__:
        assert inspect.getdoc(getattr(lora_jax, name)), name
