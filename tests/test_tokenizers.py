"""Tokenizers that folders hold as tekken.json or tokenizer.model only, as Mistral publishes them.

The files are those of the package mistral-common, which is downloaded, beside sentencepiece, into the cache: what
transformers takes to read such files is not installed where lora-jax is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lora_jax.loading
from lora_jax.loading import load_tokenizer
from lora_jax.tools.smollm2 import default_cache_dir

ROOT = Path(__file__).parents[1]
PACKAGES = ("mistral-common==1.13.1", "sentencepiece==0.2.3")
SENTENCEPIECE = [
    f"mistral_instruct_tokenizer_{name}" for name in ("240216.model.v2", "240323.model.v3", "241114.model.v7")
]
FILES = ["tokenizer.model.v1", *SENTENCEPIECE, "tekken_240718.json", "tekken_240911.json"]


@pytest.fixture(scope="module")
def packages() -> Path:
    """A folder with the packages and what they need, for PYTHONPATH."""
    folder = default_cache_dir() / "tokenizer-packages"
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--upgrade"]
        done = subprocess.run([*command, "--target", folder, *PACKAGES], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (folder / "complete").touch()
    return folder


@pytest.mark.turns("vocabularies")
@pytest.mark.oracle
@pytest.mark.rotate
@pytest.mark.parametrize("name", FILES)
def test_ids_are_those_of_mistral_and_of_llamacpp(name, packages, tmp_path):
    """Ids of 60 texts with and without BOS: in llama.cpp by the GGUF export, and after saving as tokenizer.json."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path, str(packages)])  # ours first, those last
    file = packages / "mistral_common" / "data" / name
    command = [sys.executable, "-m", "tests.tokenizer_files", file, tmp_path / "work"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["texts"], result["plain"], result["fast"], result["bos"]) == (60, 55, True, 1)
    tekken = name.endswith(".json")
    assert result["size"] == (131072 if tekken else 32000 if name.endswith("v1") else 32768)
    # llama.cpp leaves combining marks out of tekken's words; the export says so.
    known = ["नमस्ते दुनिया"] if tekken else []
    assert result["different"] == {"llama.cpp": known, "mistral-common": [], "saved": []}
    assert ("cuts words at combining marks" in done.stderr) == tekken


@pytest.mark.parametrize(("name", "package"), [("tekken.json", "mistral-common"), ("tokenizer.model", "sentencepiece")])
def test_the_package_that_reads_a_file_is_named(name, package, monkeypatch, tmp_path):
    monkeypatch.setattr(lora_jax.loading, "find_spec", lambda module: None)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ImportError, match=rf"its tokenizer as {name} only, .*: pip install {package} \(or copy"):
        load_tokenizer(tmp_path)


def test_a_file_of_another_name_is_found(tmp_path):
    (tmp_path / "tokenizer.model.v3").touch()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model\.v3 is to be called tokenizer\.model"):
        load_tokenizer(tmp_path)
