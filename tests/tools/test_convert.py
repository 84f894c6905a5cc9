"""Converters between formats, without a training run."""

import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import get_peft_model
from lora_jax.checkpoint import CheckpointError, _write_manifest
from lora_jax.hf_checkpoint import Checkpoint
from lora_jax.tools import convert
from tests import tiny


@pytest.fixture
def source(tmp_path) -> Path:
    return tiny.write_folder(tmp_path / "model", tiny.config(torch_dtype="bfloat16"), shards=3)


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    convert.main()


def test_orbax_and_back(source, tmp_path, monkeypatch):
    run(monkeypatch, "hf-to-orbax", source, tmp_path / "orbax")
    names = sorted(path.name for path in (tmp_path / "orbax").iterdir())
    assert [name for name in names if name.startswith("tensors")] == [f"tensors-0000{i}-of-00003" for i in (1, 2, 3)]
    run(monkeypatch, "orbax-to-hf", tmp_path / "orbax", tmp_path / "back")
    want, got = Checkpoint(source), Checkpoint(tmp_path / "back")
    assert set(want.names) == set(got.names)
    for name in want.names:
        assert got.read(name).dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(got.read(name), want.read(name), err_msg=name)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    (tmp_path / "orbax" / "tensors-00002-of-00003").rename(tmp_path / "orbax" / "lost")
    with pytest.raises(FileNotFoundError, match="does not hold all its tensors-N-of-M"):
        convert.orbax_to_hf(tmp_path / "orbax", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="holds no safetensors"):
        convert.hf_to_orbax(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters(source, tmp_path, monkeypatch):
    model = tiny.randomize_adapter(get_peft_model(tiny.open_model(source), r=4, verbose=False))
    folder = model.save_pretrained(tmp_path / "checkpoint-3")
    _write_manifest(folder)
    run(monkeypatch, "checkpoint-to-peft", folder, tmp_path / "peft")
    want, got = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "peft"))
    assert got.keys() == want.keys() and all(np.array_equal(got[name], want[name]) for name in want)
    run(monkeypatch, "peft-to-gguf", tmp_path / "peft", tmp_path / "gguf", "--dtype", "f16")
    reader = gguf.GGUFReader(tmp_path / "gguf" / "model-lora.F16.gguf")
    assert len(reader.tensors) == len(want)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        convert.checkpoint_to_peft(folder, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="holds no adapter_config.json"):
        convert.checkpoint_to_peft(source, tmp_path / "out")


def test_gguf(source, tmp_path, monkeypatch, capsys):
    (path,) = tiny.open_model(source).save_pretrained_gguf(tmp_path, quantization_method="bf16", verbose=False)
    run(monkeypatch, "gguf-to-hf", path, tmp_path / "back")
    assert str(tmp_path / "back") in capsys.readouterr().out
    want, got = Checkpoint(source), Checkpoint(tmp_path / "back")
    for name in want.names:
        np.testing.assert_array_equal(got.read(name), want.read(name), err_msg=name)
