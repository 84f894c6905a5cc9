"""GGUF files back into Hugging Face folders: the same model, tokenizer and settings."""

import json
import unicodedata

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.export.from_gguf import gguf_to_hf
from lora_jax.export.gguf_lora import save_gguf_lora
from lora_jax.export.gguf_tokenizer import CUTS
from lora_jax.hf_checkpoint import Checkpoint, read_json
from lora_jax.loading import load_tokenizer
from lora_jax.lora import get_peft_model
from lora_jax.models.registry import config_from_hf
from tests import tiny
from tests.export.test_gguf_families import LLAMA3, MODELS, write_model
from tests.export.tiny_gguf import TRICKY, bpe_folder, spm_folder

PUBLISHED_LLAMA3 = {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 8192}
CASES = {
    "llama": {},
    "llama, llama3, tied, biases": {"rope_scaling": PUBLISHED_LLAMA3},
    "mistral": {},
    "qwen2, yarn, tied": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "mixtral": {},
    "qwen3-moe": {},
}


def export(name: str, tmp_path, type: str = "f32"):
    architecture, changes = MODELS[name]
    source = write_model(tmp_path / "model", architecture, **{**changes, **CASES[name]})
    (path,) = tiny.open_model(source).save_pretrained_gguf(tmp_path, quantization_method=type, verbose=False)
    return source, path


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.rotate) for name in CASES])
def test_there_and_back(name, tmp_path):
    source, path = export(name, tmp_path)
    gguf_to_hf(path, tmp_path / "back")
    want, got = (Checkpoint(folder) for folder in (source, tmp_path / "back"))
    assert set(got.names) == set(want.names)
    for key in want.names:
        # Gemma's norms were stored as 1 + w, which rounds them.
        limit = 1.2e-7 if "gemma" in name and key.endswith("norm.weight") else 0
        np.testing.assert_allclose(got.read(key), want.read(key), rtol=0, atol=limit, err_msg=key)
    configs = [config_from_hf(read_json(folder / "config.json")) for folder in (source, tmp_path / "back")]
    if name == "mistral":  # in llama.cpp a Llama
        assert configs[1].architecture == "LlamaForCausalLM"
    ids = tiny.ids(1, 20)
    outputs = [tiny.open_model(folder).logits(ids) for folder in (source, tmp_path / "back")]
    np.testing.assert_allclose(outputs[1], outputs[0], atol=2e-5 if "gemma" in name else 1e-6)
    assert (
        load_tokenizer(tmp_path / "back")("Some text 12")["input_ids"]
        == load_tokenizer(source)("Some text 12")["input_ids"]
    )


@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_dtypes(type, tmp_path):
    source, path = export("llama", tmp_path, type)
    gguf_to_hf(path, tmp_path / "back")
    wanted = {"f16": np.dtype(np.float16), "q8_0": np.dtype(jnp.bfloat16)}[type]
    tensors, weights = load_file(tmp_path / "back" / "model.safetensors"), load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.dtype == wanted
        # half a unit of float16; half a step of 127 to the largest of 32, and bfloat16's half unit
        limit = 2.0**-11 if type == "f16" else 1 / 254 + 2.0**-8
        assert np.abs(tensor.astype(np.float32) - weights[name]).max() <= limit * np.abs(weights[name]).max() * 1.001
    assert read_json(tmp_path / "back" / "config.json")["torch_dtype"] == wanted.name
    gguf_to_hf(path, tmp_path / "wide", dtype="float32")
    assert load_file(tmp_path / "wide" / "model.safetensors")["model.norm.weight"].dtype == np.float32


KINDS = ["gpt-2", "smollm", *CUTS, "spm", "spm gemma"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers(kind, tmp_path):
    model = tiny.open_model(tiny.write_folder(tmp_path / "model", tiny.config(vocab_size=640), tokenizer=False))
    if kind.startswith("spm"):
        folder = spm_folder(tmp_path / "t", prefix="gemma" if "gemma" in kind else "always")
    else:
        folder = bpe_folder(tmp_path / "t", kind)
    for file in folder.iterdir():
        file.replace(tmp_path / "model" / file.name)
    (path,) = model.save_pretrained_gguf(tmp_path, quantization_method="f32", verbose=False)
    gguf_to_hf(path, tmp_path / "back")
    want, got = load_tokenizer(tmp_path / "model"), load_tokenizer(tmp_path / "back")
    for text in [*TRICKY, "<|eot|> and <user> and <s>", " two  spaces ", ""]:
        if kind == "qwen2":  # what is read normalises, as the published tokenizers do and that of the test does not
            text = unicodedata.normalize("NFC", text)
        assert got(text)["input_ids"] == want(text)["input_ids"], text
        ids = want(text, add_special_tokens=False)["input_ids"]
        if kind != "spm gemma":  # that of the test strips a space, Gemma's does not
            assert got.decode(ids) == want.decode(ids), text
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(got, name) == getattr(want, name), name
    settings = [read_json(tmp_path / name / "generation_config.json")["eos_token_id"] for name in ("model", "back")]
    assert settings[1] == ([settings[0]] if isinstance(settings[0], int) else settings[0])


def test_what_cannot_be_read(tmp_path):
    source, path = export("llama", tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        gguf_to_hf(tmp_path / "none.gguf", tmp_path / "out")
    with pytest.raises(ValueError, match="dtype='int8' is unknown; known are float32"):
        gguf_to_hf(path, tmp_path / "out", dtype="int8")
    (tmp_path / "text.gguf").write_text("not a model " * 20)
    whole = path.read_bytes()
    for name, data in {
        "text": b"not a model " * 20,
        "short": whole[:-5000],
        "header": whole[:900],
        "empty": b"",
    }.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
        with pytest.raises(ValueError, match="is no GGUF file, or is truncated or corrupted"):
            gguf_to_hf(tmp_path / f"{name}.gguf", tmp_path / "out")
    lora = save_gguf_lora(get_peft_model(tiny.open_model(source), r=4, verbose=False), tmp_path)
    with pytest.raises(ValueError, match="holds no model but 'adapter'"):
        gguf_to_hf(lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_architectures_and_rotations(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="'mamba' cannot be converted; known are gemma, gemma2, llama"):
        gguf_to_hf(tmp_path / "other.gguf", tmp_path / "out")
    architecture, changes = MODELS["llama, llama3, tied, biases"]  # factors of no published model
    source = write_model(tmp_path / "model", architecture, **changes)
    (path,) = tiny.open_model(source).save_pretrained_gguf(tmp_path, quantization_method="f32", verbose=False)
    with pytest.raises(ValueError, match="are not those of a published Llama 3"):
        gguf_to_hf(path, tmp_path / "out")


@pytest.mark.slow
def test_smollm2_is_as_before(smollm2, tmp_path):
    """The converter of the demo's model, which knows it alone, makes the same of the same file."""
    from lora_jax.tools.smollm2 import fetch_gguf

    gguf_to_hf(fetch_gguf(), tmp_path / "back", dtype="float32")
    want, got = Checkpoint(smollm2), Checkpoint(tmp_path / "back")
    assert set(want.names) == set(got.names)
    for name in want.names:
        np.testing.assert_array_equal(got.read(name), want.read(name), err_msg=name)
    new, old = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", smollm2))
    assert config_from_hf(new) == config_from_hf(old)
    tokenizers = [load_tokenizer(folder) for folder in (tmp_path / "back", smollm2)]
    for text in TRICKY:
        assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
