"""A QLoRA run of a real (tiny) Llama, killed without warning and resumed, ends with the same bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

CHILD = """
import sys, time
from pathlib import Path
import numpy as np
import lora_jax
from lora_jax.checkpoint import latest_checkpoint
from tests import tiny

model_folder, out = map(Path, sys.argv[1:3])

class Tell:
    def on_step_end(self, args, state, control, **kwargs):
        print(state.global_step, flush=True)
        time.sleep(0.2)  # lets a save begin

model = lora_jax.get_peft_model(tiny.open_model(model_folder, "nf4-double"), r=4, lora_dropout=0.1, verbose=False)
rng = np.random.default_rng(0)
rows = [rng.integers(0, 320, n).tolist() for n in rng.integers(5, 40, 30)]
rows = [{"input_ids": ids, "labels": ids} for ids in rows]
args = lora_jax.SFTConfig(
    output_dir=str(out), max_steps=10, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
    packing=True, max_length=48, save_strategy="steps", save_steps=2, save_total_limit=2,
)
trainer = lora_jax.SFTTrainer(model, args, train_dataset=rows, callbacks=[Tell])
trainer.train(resume_from_checkpoint=latest_checkpoint(out) is not None)
trainer.save_model(out / "final")
print("done", flush=True)
"""


def run_until(model: Path, out: Path, line: str) -> str:
    """Starts or resumes the run, kills it when it prints `line` ("done": lets it end), and returns what it said."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", CHILD, str(model), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    found = any(got.strip() == line for got in process.stdout)
    if found and line != "done":
        process.send_signal(signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert found, said
    return said


@pytest.mark.turns("resumed runs end with the same bits")
def test_a_killed_llama_run_ends_with_the_same_bits(tmp_path):
    model = tiny.write_folder(tmp_path / "model", tokenizer=False)
    run_until(model, tmp_path / "whole", "done")
    resumed = 0
    for line in ("3", "6", "9", "done"):
        resumed += "Continuing after step" in run_until(model, tmp_path / "killed", line)
    assert resumed >= 2  # the first may be killed before its first checkpoint is complete
    name = Path("final") / "adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
