"""Merged models in NF4 as bitsandbytes stores it: read here, and by transformers with bitsandbytes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax import get_peft_model
from lora_jax.export.bnb import nf4_names
from lora_jax.export.merge import merged_tensors
from lora_jax.fused_experts import parts_of
from lora_jax.hf_checkpoint import Checkpoint
from lora_jax.kernels.nf4 import NF4Weight, dequantize, quantize
from tests import tiny
from tests.export.test_gguf_families import MODELS, write_model

# Dense, tied, biases; experts; fused projections; a width that 64 does not divide; a model that reads images.
CASES = {
    "llama, llama3, tied, biases": {},
    "qwen3": {"hidden_size": 96},
    "mixtral": {},
    "qwen2-moe": {},
    "gpt-oss": {},
    "deepseek-v3": {},
    "phi3": {},
    "gemma3": {},
}
# (On the CPU, bitsandbytes cannot multiply by a weight whose width 64 does not divide.)
READ_BY_TRANSFORMERS = ["llama, llama3, tied, biases", "mixtral", "gpt-oss", "gemma3"]


def write_4bit(name: str, folder: Path):
    """A model with an adapter, merged and written to FOLDER/merged."""
    architecture, changes = MODELS[name]
    source = write_model(folder / "source", architecture, **{**changes, **CASES[name]})
    model = tiny.open_model(source, dtype=jnp.bfloat16)
    model = tiny.randomize_adapter(get_peft_model(model, r=4, verbose=False), scale=0.05)
    model.save_pretrained_merged(folder / "merged", save_method="merged_4bit", dtype="bfloat16", verbose=False)
    return model


def meant(model) -> dict[str, np.ndarray]:
    """What the folder should hold, by the model's names, float32."""
    names = nf4_names(model)
    values = {name: tensor.read() for name, tensor in merged_tensors(model).items()}
    return {
        name: np.asarray(dequantize(jax.jit(quantize)(jnp.asarray(w)), jnp.float32))
        if name in names
        else w.astype(jnp.bfloat16).astype(np.float32)
        for name, w in values.items()
    }


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.rotate) for name in CASES])
def test_reads_back_as_quantised_once(name, tmp_path):
    model = write_4bit(name, tmp_path)
    again = tiny.open_model(tmp_path / "merged", "nf4-double", jnp.bfloat16)
    want, got = meant(model), merged_tensors(again)
    assert got.keys() == want.keys()
    for key, tensor in got.items():
        np.testing.assert_array_equal(tensor.read(), want[key], err_msg=key)
    in_4bit = {key for key, slot in again.module.slots().items() if isinstance(slot.variable.get_value(), NF4Weight)}
    assert in_4bit == nf4_names(model)
    assert not any(".experts." in key or key.startswith("lm_head") for key in in_4bit)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_use_double_quant"]


def test_files(tmp_path):
    """Names, dtypes and shapes as transformers writes them; small, and the same in shards."""
    model = write_4bit("phi3", tmp_path)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    parts = {key.removeprefix(name): t for key, t in tensors.items() if key.startswith(name)}
    assert {ending: (str(t.dtype), t.shape) for ending, t in parts.items()} == {
        "": ("uint8", (64 * 128 // 2, 1)),
        ".absmax": ("uint8", (128,)),
        ".nested_absmax": ("float32", (1,)),
        ".nested_quant_map": ("float32", (256,)),
        ".quant_map": ("float32", (16,)),
        ".quant_state.bitsandbytes__nf4": ("uint8", (256,)),
    }
    model.save_pretrained_merged(
        tmp_path / "shards", save_method="merged_4bit", dtype="bfloat16", max_shard_size=20_000, verbose=False
    )
    shards = Checkpoint(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(shards.read(key), tensor, err_msg=key)


def test_what_it_says(tmp_path, capsys):
    source = write_model(tmp_path / "source", *MODELS["mixtral"][:1], **MODELS["mixtral"][1])
    tiny.open_model(source).save_pretrained_merged(tmp_path / "merged", save_method="merged_4bit")
    out = capsys.readouterr().out
    assert "as NF4" in out and "the experts are in bfloat16" in out


@pytest.mark.turns("checkpoints of bitsandbytes")
@pytest.mark.oracle
def test_transformers_and_bitsandbytes_read_them(oracle, tmp_path):
    for name in ("models", "out"):
        (tmp_path / name).mkdir()
    models = {}
    for name in READ_BY_TRANSFORMERS:
        models[name] = write_4bit(name, tmp_path / name)
        (tmp_path / name / "merged").rename(tmp_path / "models" / name)
    oracle("bnb_load.py", tmp_path / "models", tmp_path / "out")
    for name, model in models.items():
        report = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert not report["missing"] and not report["unexpected"], (name, report)
        got, want = load_file(tmp_path / "out" / f"{name}.safetensors"), meant(model)
        shapes = {key: tensor.shape for key, tensor in got.items() if ".experts." in key}
        parts = parts_of(shapes, shapes.__getitem__, model.config.architecture)
        for key, part in parts.items():
            got[key] = part.take(got[part.whole][part.expert])
        names = {key.replace(".block_sparse_moe.", ".mlp."): key for key in want}
        assert len(report["generated"]) == 12
        assert set(report["quantised"]) == {key.replace(".block_sparse_moe.", ".mlp.") for key in nf4_names(model)}
        for key, ours in names.items():
            np.testing.assert_array_equal(got.get(key, got.get(ours)), want[ours], err_msg=f"{name}: {key}")


@pytest.mark.turns("checkpoints of bitsandbytes")
@pytest.mark.rotate
@pytest.mark.oracle
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_other_block_sizes_are_read(double, oracle, tmp_path):
    rng = np.random.default_rng(0)
    # Half a block of 128 at the end; less than one of 4096; more than a group of 256 scales.
    weights = {"a": rng.normal(size=(37, 64)), "b": rng.normal(size=(6, 130)), "c": rng.normal(size=(600, 320))}
    save_file({n: w.astype(np.float32) for n, w in weights.items()}, tmp_path / "in.safetensors")
    sizes = [64, 128, 256, 4096]
    arguments = ["--blocksizes", *sizes, *(["--double"] if double else [])]
    oracle("bnb_blocks.py", tmp_path / "in.safetensors", tmp_path / "model.safetensors", *arguments)
    from lora_jax.loading import _read_nf4

    checkpoint = Checkpoint(tmp_path)
    for name in weights:
        for size in sizes:
            state = checkpoint.quant_state(f"{size}.{name}")
            assert state.blocksize == size
            got = dequantize(_read_nf4(checkpoint, f"{size}.{name}", state), jnp.float32)
            np.testing.assert_array_equal(got, checkpoint.read(f"{size}.{name}.DEQUANT"), err_msg=f"{size}.{name}")


def test_a_model_in_larger_blocks(tmp_path):
    """Every block of 128 whose two halves have the same largest weight: as if it were in blocks of 64."""
    hf = tiny.config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    plain = tiny.open_model(tiny.write_folder(tmp_path / "source", tiny.config()))
    plain.save_pretrained_merged(tmp_path / "64", save_method="merged_4bit", dtype="float32", verbose=False)
    tensors = load_file(tmp_path / "64" / "model.safetensors")
    for key in [key for key in tensors if key.endswith(".absmax")]:
        weight = key.removesuffix(".absmax")
        tensors[key] = tensors[key][::2].copy()
        state = json.loads(tensors[f"{weight}.quant_state.bitsandbytes__nf4"].tobytes()) | {"blocksize": 128}
        tensors[f"{weight}.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    model, _ = lora_jax.from_pretrained(tiny.write_folder(tmp_path / "128", hf, tensors), progress=False)
    name = "model.layers.1.mlp.up_proj.weight"
    one = tiny.open_model(tmp_path / "64", "nf4-double").module.slots()[name]
    slot = model.module.slots()[name]
    got, want = (np.asarray(s.variable.get_value().absmax[s.index]) for s in (slot, one))
    np.testing.assert_array_equal(got.reshape(-1), np.repeat(want.reshape(-1)[::2], 2))
