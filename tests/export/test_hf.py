"""Merged folders: the same model again, and the source's small files as they were."""

import errno
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import lora_jax
from lora_jax import get_peft_model
from lora_jax.export.hf import chat_template_of
from lora_jax.export.merge import merged_tensors
from lora_jax.export.peft import adapter_tensors
from lora_jax.hf_checkpoint import Checkpoint
from lora_jax.kernels.nf4 import dequantize, quantize
from tests import tiny
from tests.export.tiny_gguf import random_weights

IDS = tiny.ids(2, 12)
NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("tiny") / "model", tiny.config(torch_dtype="bfloat16"))


@pytest.fixture(scope="module")
def full(base, tmp_path_factory) -> Path:
    """The same with everything that a hub repository may hold."""
    folder = tmp_path_factory.mktemp("tiny") / "full"
    shutil.copytree(base, folder)
    for name in ("special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json"):
        (folder / name).write_bytes(b'{"odd":   "spacing\\u00e9", "n": 1}\r\n')
    for name in ("tokenizer.model", "merges.txt", "tekken.json"):
        (folder / name).write_bytes(bytes(range(256)))
    (folder / "README.md").write_text("not copied")
    (folder / "pytorch_model.bin").write_text("not copied")
    return folder


def adapted(folder: Path, nf4: str | None = "nf4-double", **options):
    model = tiny.open_model(folder, nf4)
    return tiny.randomize_adapter(get_peft_model(model, r=4, lora_alpha=8, verbose=False, **options), scale=0.05)


@pytest.fixture(scope="module")
def model(base):
    return adapted(base)


def delta(model, name: str = NAME) -> np.ndarray:
    """scale (A B)^T of one module in float64."""
    tensors = adapter_tensors(model)
    a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    return 2.0 * b @ a


def leaves(model) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(model.split()[1:])]


@pytest.mark.parametrize("nf4", [None, "nf4", "nf4-double"])
def test_reloaded_folder_computes_the_same(base, tmp_path, nf4):
    model = adapted(base, nf4)
    before, want = leaves(model), np.asarray(model.logits(IDS))
    model.save_pretrained_merged(tmp_path / "merged", dtype="float32", verbose=False)
    for x, y in zip(leaves(model), before, strict=True):
        np.testing.assert_array_equal(x, y)  # the model is as it was
    again, _ = lora_jax.from_pretrained(tmp_path / "merged", load_in_4bit=False, progress=False)
    assert again.module.dtype == np.float32
    # W x + (x A) B against (W + A B) x, in float32 with logits that reach 8.
    np.testing.assert_allclose(again.logits(IDS), want, atol=2e-5)
    plain = np.asarray(tiny.open_model(base, nf4).logits(IDS))
    assert np.abs(want - plain).max() > 0.1


def test_merge_bases(base, model):
    weight = Checkpoint(base).read(f"{NAME}.weight")
    dequantized = np.asarray(dequantize(quantize(jnp.asarray(weight)), jnp.float32))
    got = {kind: merged_tensors(model, kind)[f"{NAME}.weight"].read() for kind in ("dequantized", "original")}
    # The product is summed in float32 over a rank of 4.
    np.testing.assert_allclose(got["dequantized"], dequantized + delta(model), atol=1e-6)
    np.testing.assert_allclose(got["original"], weight.astype(np.float32) + delta(model), atol=1e-6)
    assert np.abs(got["original"] - got["dequantized"]).max() > 0.01  # the error of quantisation
    norm = "model.norm.weight"
    for kind in got:
        np.testing.assert_array_equal(merged_tensors(model, kind)[norm].read(), Checkpoint(base).read(norm))


def test_original_without_an_adapter_is_the_source(base, tmp_path):
    model = tiny.open_model(base, "nf4-double", jnp.bfloat16)
    model.save_pretrained_merged(tmp_path / "merged", merge_base="original", verbose=False)
    want, got = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert set(got) == set(want)
    for name, tensor in got.items():
        assert tensor.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tensor, want[name], err_msg=name)
    # Nothing changes, so config.json is the source's, byte for byte.
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_original_of_a_prequantised_source_is_refused(tmp_path):
    weights = random_weights(tiny.config())
    q = quantize(jnp.asarray(weights[f"{NAME}.weight"]), False)
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": list(q.shape)}).encode()
    weights[f"{NAME}.weight"] = np.asarray(q.packed).reshape(-1, 1)
    weights[f"{NAME}.weight.absmax"] = np.asarray(q.absmax).reshape(-1)
    weights[f"{NAME}.weight.quant_map"] = lora_jax.kernels.nf4.format.CODE
    weights[f"{NAME}.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(state, np.uint8)
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = tiny.write_folder(tmp_path / "bnb", tiny.config(quantization_config=quantization), weights)
    model = adapted(folder, target_modules=["down_proj"])
    with pytest.raises(
        ValueError, match=r"merge_base='original': .*bnb holds 1 weights in NF4 only; use 'dequantized'"
    ):
        model.save_pretrained_merged(tmp_path / "merged", merge_base="original", verbose=False)
    assert not (tmp_path / "merged").exists()
    model.save_pretrained_merged(tmp_path / "merged", dtype="float32", verbose=False)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == tiny.config()  # without quantization_config, and the dtype is the source's
    got = load_file(tmp_path / "merged" / "model.safetensors")[f"{NAME}.weight"]
    np.testing.assert_allclose(got, np.asarray(dequantize(q, jnp.float32)) + delta(model), atol=1e-6)
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(random_weights(tiny.config()))


@pytest.mark.parametrize(
    ("stored", "asked", "want"),
    [
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float16"),
        ("float32", None, "bfloat16"),
        ("bfloat16", "float16", "float16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_dtypes(tmp_path, stored, asked, want):
    base = tiny.write_folder(tmp_path / "base", tiny.config(torch_dtype=stored), tokenizer=False)
    model = adapted(base, None, target_modules=["down_proj"])
    model.save_pretrained_merged(tmp_path / "merged", dtype=asked, verbose=False)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == tiny.config(torch_dtype=want)
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert tensor.dtype == tiny.DTYPES[want]
        np.testing.assert_array_equal(tensor, merged_tensors(model)[name].read().astype(tiny.DTYPES[want]))


def test_config_of_transformers_5_keeps_its_form(tmp_path):
    hf = tiny.config(dtype="float32", unknown_field={"é": [1, None]}, torch_dtype="float32")
    del hf["torch_dtype"]
    weights = random_weights(hf)
    model = tiny.open_model(tiny.write_folder(tmp_path / "base", hf, weights))
    model.save_pretrained_merged(tmp_path / "merged", verbose=False)
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == {**hf, "dtype": "bfloat16"}


def test_small_files_are_copied_byte_for_byte(full, tmp_path):
    tiny.open_model(full, dtype=jnp.bfloat16).save_pretrained_merged(tmp_path / "merged", verbose=False)
    written = {p.name for p in (tmp_path / "merged").iterdir()}
    copied = {p.name for p in full.iterdir()} - {"README.md", "pytorch_model.bin"}
    assert written == copied
    for name in copied - {"model.safetensors"}:
        assert (tmp_path / "merged" / name).read_bytes() == (full / name).read_bytes(), name


def test_a_changed_chat_template_is_written(tmp_path):
    from transformers import AutoTokenizer

    base = tiny.write_folder(tmp_path / "base")
    model = tiny.open_model(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model.save_pretrained_merged(tmp_path / "same", tokenizer, verbose=False)
    assert not (tmp_path / "same" / "chat_template.jinja").exists()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|eot|>", "<|end|>\n")
    model.save_pretrained_merged(tmp_path / "changed", tokenizer, verbose=False)
    again = AutoTokenizer.from_pretrained(tmp_path / "changed")
    assert again.chat_template == tokenizer.chat_template
    assert again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi<|end|>\n"


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, None),
        ({"tokenizer_config.json": '{"chat_template": "a"}'}, "a"),
        ({"tokenizer_config.json": '{"chat_template": "a"}', "chat_template.jinja": "é\n"}, "é\n"),
        ({"tokenizer_config.json": "{}", "chat_template.json": '{"chat_template": "c"}'}, "c"),
        (
            {
                "tokenizer_config.json": '{"chat_template": [{"name": "t", "template": "x"}, '
                '{"name": "default", "template": "d"}]}'
            },
            "d",
        ),
    ],
)
def test_chat_template_of(tmp_path, files, want):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert chat_template_of(tmp_path) == want


def test_shards_and_their_index(model, tmp_path):
    limit = 40_000
    folder = model.save_pretrained_merged(tmp_path / "merged", max_shard_size=limit, verbose=False)
    whole = model.save_pretrained_merged(tmp_path / "whole", verbose=False)
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    want = load_file(whole / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in want.values())}
    assert set(index["weight_map"]) == set(want)
    for file in files:
        with safe_open(folder / file, "numpy") as opened:
            names = list(opened.keys())
            assert opened.metadata() == {"format": "pt"}
            assert sum(want[name].nbytes for name in names) <= limit or len(names) == 1
            for name in names:
                assert index["weight_map"][name] == file
                np.testing.assert_array_equal(opened.get_tensor(name), want[name])
    assert Checkpoint(folder).read("lm_head.weight").shape == (tiny.VOCAB, 64)
    # The data of a file begins at a multiple of 8, as readers that map it want.
    data = (whole / "model.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_merging_twice_gives_the_same_bytes(model, tmp_path):
    for name in ("a", "b", "a"):
        model.save_pretrained_merged(tmp_path / name, overwrite=True, verbose=False)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_tied_models_write_one_matrix(tmp_path):
    base = tiny.write_folder(tmp_path / "base", tiny.config(tie_word_embeddings=True), tokenizer=False)
    model = adapted(base)
    model.save_pretrained_merged(tmp_path / "merged", dtype="float32", verbose=False)
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    # float32, logits up to 12: below 2e-5, but 2.2e-5 where LLVM does not optimise, and sums have another order
    np.testing.assert_allclose(tiny.open_model(tmp_path / "merged").logits(IDS), model.logits(IDS), atol=5e-5)


def test_lora_only_and_messages(model, tmp_path, capsys):
    model.save_pretrained_merged(tmp_path / "adapter", save_method="lora")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    model.save_pretrained_merged(tmp_path / "merged", merge_base="original")
    assert "into the 16-bit weights of the source (merge_base='original') as bfloat16" in capsys.readouterr().out


# Refused; nothing is left behind.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_method": "merged_8bit"}, "save_method='merged_8bit' is unknown; known are merged_16bit, merged_4bit, "),
        ({"merge_base": "quantised"}, "merge_base='quantised' is unknown; known are dequantized, original"),
        ({"dtype": "int8"}, "dtype='int8' is unknown; known are bfloat16, float16, float32"),
    ],
)
def test_unknown_options(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        model.save_pretrained_merged(tmp_path / "merged", verbose=False, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, "bfloat16", r"down_proj\.weight is not finite after merging; the adapter has diverged"),
        (np.inf, "float32", r"down_proj\.weight is not finite"),
        (1e6, "float16", r"down_proj\.weight exceeds the range of float16; use dtype='bfloat16'"),
    ],
)
def test_values_that_cannot_be_written(base, tmp_path, value, dtype, message):
    model = adapted(base, target_modules=["down_proj"])
    variable = model.module.layers[0].mlp.down_proj.lora_b
    variable.set_value(variable.get_value().at[1, 0, 5].set(value))
    with pytest.raises(ValueError, match=message):
        model.save_pretrained_merged(tmp_path / "merged", dtype=dtype, verbose=False)
    assert not list(tmp_path.iterdir())


def test_existing_folder_and_the_source_itself(model, base, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty; choose another folder or pass overwrite=True"):
        model.save_pretrained_merged(tmp_path / "merged", verbose=False)
    # Merging into the source would lose the base model, and a second merge would add the adapter twice.
    with pytest.raises(FileExistsError, match="would remove"):
        model.save_pretrained_merged(base, overwrite=True, verbose=False)
    assert (tmp_path / "merged" / "notes").read_text() == "mine"


def test_source_that_is_gone(tmp_path):
    base = tiny.write_folder(tmp_path / "base", tokenizer=False)
    model = adapted(base)
    shutil.rmtree(base)
    for merge_base in ("original", "dequantized"):
        with pytest.raises(FileNotFoundError, match=r"base is gone: its config\.json and tokenizer belong into"):
            model.save_pretrained_merged(tmp_path / "merged", merge_base=merge_base, verbose=False)
    assert not list(tmp_path.iterdir())


class FullDisk:
    """A file that takes `room` bytes."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 5_000, 200_000])
def test_a_full_disk_leaves_the_old_folder(model, tmp_path, monkeypatch, room):
    model.save_pretrained_merged(tmp_path / "merged", verbose=False)
    (tmp_path / "merged" / "notes").write_text("mine")
    before = {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()}
    assert sum(map(len, before.values())) > 230_000
    real = Path.open

    def full(path, mode="r", *arguments, **options):
        file = real(path, mode, *arguments, **options)
        return FullDisk(file, room) if mode == "wb" else file

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="the disk is full while writing .*merged; nothing was changed there"):
        model.save_pretrained_merged(tmp_path / "merged", overwrite=True, verbose=False)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
