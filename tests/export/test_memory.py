"""Host memory of an export: below 1.2 times the largest shard of the model.

An export holds a few blocks of 4 M values, about 150 MB whatever the model, and of the model one tensor. A shard of a
real model has 5 GB; that of the one here is as small as the bound allows.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import pytest

from tests import tiny
from tests.export.tiny_gguf import random_weights

SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 16000, "torch_dtype": "bfloat16"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc")
def test_exports_take_less_than_a_shard(tmp_path):
    hf = tiny.config(**SIZES)
    weights = {name: w.astype(ml_dtypes.bfloat16) for name, w in random_weights(hf).items()}
    large = tiny.write_folder(tmp_path / "large", hf, weights, shards=2)
    largest = max(file.stat().st_size for file in large.glob("*.safetensors"))
    script = Path(__file__).with_name("export_in_bounds.py")
    limit = int(1.2 * largest)
    done = subprocess.run(
        [sys.executable, str(script), *(str(tmp_path / n) for n in ("large", "out")), str(limit)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "MALLOC_ARENA_MAX": "2"},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = dict(json.loads(line) for line in done.stdout.splitlines())
    print({name: f"{peak / largest:.2f} of a shard of {largest / 1e6:.0f} MB" for name, peak in peaks.items()})
    assert peaks.keys() == {"merged_16bit", "merged_4bit", "gguf q4_k_m", "gguf f32 f16 q8_0 q4_k_m"}
    assert max(peaks.values()) <= limit
