"""Of a checkpoint that is shared out, each process reads the bytes of its share: counted, and equal to the whole's.

How whole checkpoints load into the shares of devices is in test_sharding.py and test_distributed.py.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.hf_checkpoint import Checkpoint
from tests.one_of_several import read_bytes

E, F, D = 5, 96, 128  # experts, features of an expert, width
BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
BLOCK = (16, 32)  # rows and columns that share a scale


def numbers(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32).astype(dtype)


def scales(*shape: int) -> np.ndarray:
    return np.abs(numbers(*shape[:-2], -(-shape[-2] // BLOCK[0]), -(-shape[-1] // BLOCK[1]))) + 0.1


def codes(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape).astype(np.uint8)


EXPERTS = "model.layers.0.mlp.experts"
# Architecture, tensors of the files, tensor to be read, its rows; bytes of a row, rows that are read for every row.
CASES: dict[str, tuple[str, dict[str, np.ndarray], str, int, float, int]] = {
    "16 bits": ("LlamaForCausalLM", {"a.weight": numbers(F, D, dtype=BF16)}, "a.weight", F, 2 * D, 1),
    "FP8": (
        "LlamaForCausalLM",
        {"a.weight": numbers(F + 5, D + 7, dtype=FP8), "a.weight_scale_inv": scales(F + 5, D + 7)},
        "a.weight",
        F + 5,
        D + 7,
        1,
    ),
    "fused": (
        "Qwen3MoeForCausalLM",
        {f"{EXPERTS}.gate_up_proj": numbers(E, 2 * F, D, dtype=BF16)},
        f"{EXPERTS}.3.up_proj.weight",
        F,
        2 * D,
        1,
    ),
    "fused FP8": (
        "Qwen3MoeForCausalLM",
        {
            f"{EXPERTS}.gate_up_proj": numbers(E, 2 * F, D, dtype=FP8),
            f"{EXPERTS}.gate_up_proj_scale_inv": scales(E, 2 * F, D),
        },
        f"{EXPERTS}.3.up_proj.weight",
        F,
        D,
        1,
    ),
    "gate and up in turn": (
        "GptOssForCausalLM",
        {f"{EXPERTS}.gate_up_proj_bias": numbers(E, 2 * F)},
        f"{EXPERTS}.2.up_proj.bias",
        F,
        4,
        2,
    ),
    "MXFP4": (
        "GptOssForCausalLM",
        {
            f"{EXPERTS}.gate_up_proj_blocks": codes(E, 2 * F, D // 32, 16),
            f"{EXPERTS}.gate_up_proj_scales": codes(E, 2 * F, D // 32) // 4 + 96,
        },
        f"{EXPERTS}.4.gate_proj.weight",
        F,
        D / 2 + D / 32,
        2,
    ),
    "MXFP4, down": (
        "GptOssForCausalLM",
        {
            f"{EXPERTS}.down_proj_blocks": codes(E, D, F // 32, 16),
            f"{EXPERTS}.down_proj_scales": codes(E, D, F // 32) // 4 + 96,
        },
        f"{EXPERTS}.0.down_proj.weight",
        D,
        F / 2 + F / 32,
        1,
    ),
    "transposed": (
        "GptOssForCausalLM",
        {f"{EXPERTS}.gate_up_proj": numbers(E, D, 2 * F, dtype=BF16)},
        f"{EXPERTS}.1.up_proj.weight",
        F,
        2 * D,
        2,
    ),
    "transposed, down": (
        "GptOssForCausalLM",
        {f"{EXPERTS}.down_proj": numbers(E, F, D)},
        f"{EXPERTS}.4.down_proj.weight",
        D,
        4 * F,
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_the_whole_and_nothing_else_is_read(case, tmp_path: Path):
    architecture, tensors, name, rows, of_row, factor = CASES[case]
    config: dict[str, Any] = {"architectures": [architecture]}
    if any(ending.endswith("_scale_inv") for ending in tensors):
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": BLOCK}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint, whole = Checkpoint(tmp_path), Checkpoint(tmp_path).read(name)
    assert len(whole) == rows == checkpoint.shape(name)[0]
    of_scales = sum(tensor.nbytes for ending, tensor in tensors.items() if ending.endswith("_scale_inv"))
    checkpoint.read_rows(name, 5, 6, rows)  # headers are read once
    for start, stop in ((0, rows), (0, 1), (rows // 2, rows), (37, 61)):
        before = read_bytes()
        got = checkpoint.read_rows(name, start, stop, rows)
        read = read_bytes() - before - of_scales
        np.testing.assert_array_equal(got.reshape(stop - start, *whole.shape[1:]), whole[start:stop])
        assert got.dtype == whole.dtype
        # Reading the counter itself counts as some 200 bytes.
        wanted = factor * (stop - start) * of_row
        assert wanted - 2 * of_row <= read <= wanted + 300, (case, start, stop)


@pytest.mark.parametrize("case", ["MXFP4", "transposed"])
def test_rows_that_take_turns_are_read_once(case, tmp_path: Path):
    """Those of gate and up, one after the other; not those of other rows or of another expert."""
    architecture, tensors, _, rows, of_row, _ = CASES[case]
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)

    def read(name: str, start: int, stop: int) -> float:
        """In rows of gate or up."""
        before = read_bytes()
        got = checkpoint.read_rows(f"{EXPERTS}.{name}_proj.weight", start, stop, rows)
        count = read_bytes() - before
        np.testing.assert_array_equal(got, Checkpoint(tmp_path).read(f"{EXPERTS}.{name}_proj.weight")[start:stop])
        return round(count / of_row)

    read("0.gate", 0, rows)  # and the header
    assert [read("1.gate", 24, 48), read("1.up", 24, 48), read("1.up", 25, 49)] == pytest.approx([48, 0, 48], abs=4)
    assert [read("2.up", 24, 48), read("2.gate", 24, 48)] == pytest.approx([48, 0], abs=4)


def test_the_values_of_parts(tmp_path: Path):
    """By hand, from the arrays in the file."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GptOssForCausalLM"]}))
    fused, bias = numbers(E, D, 2 * F, dtype=BF16), numbers(E, 2 * F)
    save_file({f"{EXPERTS}.gate_up_proj": fused, f"{EXPERTS}.gate_up_proj_bias": bias}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    np.testing.assert_array_equal(checkpoint.read_rows(f"{EXPERTS}.3.up_proj.weight", 5, 9, F), fused[3, :, 11:19:2].T)
    np.testing.assert_array_equal(checkpoint.read_rows(f"{EXPERTS}.3.gate_proj.bias", 5, 9, F)[:, 0], bias[3, 10:18:2])
