"""The notebooks run from top to bottom, in a process of their own, and draw their pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
# What each prints, and the files it writes into its temporary folder.
SAID = {
    "quickstart": ("adapter/adapter_model.safetensors", ["adapter_model.safetensors"]),
    "data_and_chat_templates": ("--- ShareGPT", ["lengths.png", "report.md"]),
    "long_context_and_memory": ("auto", ["memory.png", "throughput.png"]),
    "export": ("FROM ./SmolLM2-135M-Instruct.Q8_0.gguf", ["adapter_model.safetensors", "Modelfile", "sizes.png"]),
    "several_gpus": ("data 2 x fsdp 4  losses off by", ["meshes.png", "scaling.png"]),
    "own_step_in_jax": ("divergence from the base", ["adapter_model.safetensors", "loss.png"]),
}


@pytest.mark.turns("real models and whole programs")
@pytest.mark.rotate
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook: Path, smollm2: Path, tmp_path: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"), encoding="utf-8")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(notebook.parents[1]), "MPLBACKEND": "agg"}
    # They run for longer than they compile, and twice as long if they are compiled without optimisation.
    environment["XLA_FLAGS"] = environment["XLA_FLAGS"].replace("--xla_backend_optimization_level=0", "")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, files = SAID[notebook.stem]
    assert said in done.stdout
    for name in files:
        assert any(path.stat().st_size for path in tmp_path.rglob(name)), name


def test_notebooks_are_stripped() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(SAID)
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        assert all(not c.get("outputs") and c.get("execution_count") is None for c in cells), notebook
        assert len({c["id"] for c in cells}) == len(cells)
