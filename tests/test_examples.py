"""The examples run as they are written, on a tiny model, and what they train falls."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.turns("real models and whole programs")
@pytest.mark.rotate
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    assert len(example.read_text().splitlines()) < 60
    model = tiny.write_folder(tmp_path / "model")
    command = [sys.executable, "-W", "error", str(example), str(model)]
    environment = {**os.environ, "PYTHONPATH": str(example.parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", done.stdout)]
    assert len(losses) >= 8
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])  # an adapter of a random model learns that much
