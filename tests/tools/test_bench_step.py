"""bench_step and its peers train the same model on the same tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def result(stdout: str) -> dict:
    line = next(line for line in stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.oracle
def test_first_losses_agree_with_the_peers(oracle, tmp_path, monkeypatch):
    """PEFT writes the checkpoint of random weights and both take steps on it; later ones depend on A, drawn apart."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    common = ["--checkpoint", tmp_path / "model", "--model", "tiny", "--case", "2x64", "--steps", 1, "--runs", 2]
    peer = result(oracle("../../tools/bench_step_torch.py", "peft", *common))
    command = [sys.executable, "-m", "lora_jax.tools.bench_step", *map(str, common), "--remat-one", "full"]
    done = subprocess.run([*command, "--optim", "adamw_8bit"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ours = result(done.stdout)
    # Of the same weights: both compute in bfloat16, to 2^-9 of each logit.
    assert ours["losses"][0] == pytest.approx(peer["losses"][0], rel=1e-3)
    assert ours["losses"][-1] < ours["losses"][0] and peer["losses"][-1] < peer["losses"][0]
    assert ours.keys() >= {"ms", "tokens_per_s", "peak_gib", "first_step_s", "case", "model"} <= peer.keys()
