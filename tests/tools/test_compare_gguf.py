"""Whole files beside llama-quantize's, and what measures them."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from lora_jax.export.gguf_imatrix import read_imatrix
from lora_jax.tools import bench_export, compare_gguf
from lora_jax.tools.llama_quantize import LlamaQuantize, fetch_llama_quantize
from tests.export.tiny_gguf import hf_config, random_weights, reference_logprobs


@pytest.fixture(scope="module")
def llama() -> LlamaQuantize:
    try:
        return LlamaQuantize(fetch_llama_quantize())
    except OSError as error:
        pytest.skip(f"llama.cpp's libraries could not be fetched: {error}")


@pytest.mark.slow
@pytest.mark.usefixtures("llama")
def test_whole_files_are_llama_quantizes(smollm2: Path, tmp_path: Path) -> None:
    rows = compare_gguf.compare(smollm2, tmp_path, ["q4_k_m", "q2_k"], tokens=20)
    assert [(row["type"], row["importance"]) for row in rows] == [
        *(("f32", False), ("q4_k_m", False), ("q2_k", False)),
        *(("q4_k_m", True), ("q2_k", True)),
    ]
    for row in rows:
        assert row["tensors"] == 272 and row["types that differ"] == row["bytes that differ"] == 0
        # the program, not the function that is called here, writes where an importance matrix came from
        assert row["metadata"] == [] or (row["importance"] and len(row["metadata"]) == 5)
        assert row["perplexity"] == pytest.approx(row["perplexity, llama-quantize"], rel=5e-3)


@pytest.mark.slow
def test_speed_is_measured(llama: LlamaQuantize, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = bench_export.bench_blocks(llama, ["Q8_0"], runs=1, threads=1)
    assert row["M values/cpu s"] > 0 and row["times llama.cpp's cpu seconds"] > 0
    assert "Q8_0: runs 1" in capsys.readouterr().out


def test_importance_is_the_mean_square_of_inputs(tmp_path: Path) -> None:
    """Where the second layer adds nothing and norms have no weights, its inputs are what the head reads."""
    config, ids = hf_config(rope_theta=1e4), [5, 99, 300, 7]
    weights = random_weights(config)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.1.{name}.weight"][:] = 0
    for name in ("norm", "layers.1.input_layernorm", "layers.1.post_attention_layernorm"):
        weights[f"model.{name}.weight"][:] = 1
    found = compare_gguf.importance(weights, config, ids)
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert found.keys() == {f"blk.{i}.{name}.weight" for i in range(2) for name in names}
    # Log-probabilities are head @ h less a number; from 640 of them h, of 64, follows.
    head = np.concatenate([weights["lm_head.weight"], np.ones((640, 1))], axis=1, dtype=np.float64)
    logprobs = [reference_logprobs(config, weights, ids[: i + 1]) for i in range(len(ids))]
    h = np.stack([np.linalg.lstsq(head, row)[0][:-1] for row in logprobs])
    for name in ("attn_q", "ffn_gate"):
        np.testing.assert_allclose(found[f"blk.1.{name}.weight"], (h * h).mean(0), rtol=1e-4)  # float32
    compare_gguf.write_imatrix(tmp_path / "imatrix", found)
    read = read_imatrix(tmp_path / "imatrix")
    assert read.dataset == "pydoc_data.topics" and read.weights.keys() == found.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(read.of(name, (1, values.size)), values.astype(np.float32))


def write(path: Path, tensors: dict[str, np.ndarray], name: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    for key, values in tensors.items():
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_differences_are_counted(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    a = write(tmp_path / "a", {"one": x, "two": x, "three": x}, "model")
    b = write(tmp_path / "b", {"one": x, "two": x + 1, "three": x.astype(np.float16), "four": x}, "other")
    same = {"tensors": 3, "types that differ": 0, "bytes that differ": 0, "metadata": []}
    assert compare_gguf.differences(a, a) == same
    found = compare_gguf.differences(a, b)
    assert found.pop("metadata") == ["GGUF.tensor_count", "general.name"]
    assert found == {"tensors": 4, "types that differ": 2, "bytes that differ": 1}
