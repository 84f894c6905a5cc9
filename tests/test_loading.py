"""Loading: what each file becomes, exactly; hub ids; peak memory; and damaged or foreign input."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax.export.merge import merged_tensors
from lora_jax.hf_checkpoint import Checkpoint, resolve_folder
from lora_jax.kernels.nf4 import NF4Weight, dequantize, quantize
from lora_jax.kernels.nf4.format import CODE
from tests import tiny
from tests.export.tiny_gguf import random_weights

LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def load(folder: Path, **options):
    return lora_jax.from_pretrained(folder, progress=False, **options)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return random_weights(tiny.config())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, weights) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("tiny") / "model", weights=weights)


def assert_holds(model, want: dict[str, np.ndarray], dtype: np.dtype | type = np.float32) -> None:
    """Every tensor equals the wanted one rounded once to `dtype`, bit for bit."""
    got = merged_tensors(model)
    assert set(got) == set(want)
    for name, tensor in got.items():
        np.testing.assert_array_equal(tensor.read(), want[name].astype(dtype).astype(np.float32), err_msg=name)


# What is loaded.


def test_float32_folder_loads_exactly_with_its_tokenizer(folder, weights):
    model, tokenizer = load(folder, load_in_4bit=False)
    assert model.module.dtype == np.float32  # the checkpoint's own
    assert_holds(model, weights)
    assert tokenizer("aé")["input_ids"] == tokenizer.convert_tokens_to_ids(["a", "Ã", "©"])
    assert model.name_or_path == str(folder)
    assert (model.source, model.max_seq_length) == (folder, 256)


def test_the_index_is_followed_and_a_second_copy_ignored(tmp_path, weights):
    folder = tiny.write_folder(tmp_path, weights=weights, shards=3)
    other = {name: w + 1 for name, w in weights.items()}
    save_file(other, folder / "consolidated.safetensors")
    save_file(other, folder / "model.safetensors")  # the index goes before it
    assert_holds(tiny.open_model(folder), weights)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("asked", [None, "bfloat16", "float32", jnp.float32])
def test_dtypes(tmp_path, weights, stored, asked):
    source = {name: w.astype(tiny.DTYPES[stored]) for name, w in weights.items()}
    tiny.write_folder(tmp_path, tiny.config(torch_dtype=stored), source)
    model, _ = load(tmp_path, load_in_4bit=False, dtype=asked)
    own = "bfloat16" if stored == "float16" else stored  # float16 cannot be trained in
    want = np.dtype(own if asked is None else asked)
    assert model.module.dtype == want
    assert {leaf.dtype for leaf in jax.tree.leaves(model.split()[2])} == {want}
    assert_holds(model, source, want.type)


def test_dtype_of_transformers_5_is_read(tmp_path, weights):
    hf = tiny.config(dtype="bfloat16")
    del hf["torch_dtype"]
    tiny.write_folder(tmp_path, hf, weights)
    assert load(tmp_path)[0].module.dtype == jnp.bfloat16


@pytest.mark.parametrize("with_head", [False, True])
def test_tied_embeddings(tmp_path, with_head):
    hf = tiny.config(tie_word_embeddings=True)
    weights = random_weights(hf)
    stored = weights | ({"lm_head.weight": weights["model.embed_tokens.weight"].copy()} if with_head else {})
    model = tiny.open_model(tiny.write_folder(tmp_path, hf, stored))
    assert model.module.lm_head is None
    assert_holds(model, weights)
    np.testing.assert_array_equal(model.module.head().weight, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_nf4_blocks_and_nothing_else(tmp_path, weights, stored, double):
    source = {name: w.astype(tiny.DTYPES[stored]) for name, w in weights.items()}
    tiny.write_folder(tmp_path, tiny.config(torch_dtype=stored), source)
    model, _ = load(tmp_path, double_quantize=double)  # 4 bits are the default
    tensors = merged_tensors(model)
    own = ml_dtypes.bfloat16 if stored == "float16" else tiny.DTYPES[stored]
    for name, slot in model.module.slots().items():
        weight = slot.variable.get_value()
        if any(linear in name for linear in LINEARS):
            assert isinstance(weight, NF4Weight)
            assert weight.double_quantized == double
            # The weight as it is stored, not as activations are computed, is quantised.
            want = np.asarray(dequantize(quantize(jnp.asarray(source[name]), double), jnp.float32))
            # The mean of double quantisation is a sum: its last bit depends on the program it is compiled in.
            np.testing.assert_allclose(tensors[name].read(), want, rtol=1e-6 if double else 0, err_msg=name)
        else:
            assert weight.dtype == own
            np.testing.assert_array_equal(tensors[name].read(), source[name].astype(own).astype(np.float32))


def test_widths_that_64_does_not_divide(tmp_path):
    hf = tiny.config(hidden_size=40, intermediate_size=56)
    weights = random_weights(hf)
    model = tiny.open_model(tiny.write_folder(tmp_path, hf, weights), nf4="nf4")
    name = "model.layers.1.self_attn.k_proj.weight"  # [20, 40]: the last block has 32 weights
    want = np.asarray(dequantize(quantize(jnp.asarray(weights[name]), False), jnp.float32))
    np.testing.assert_array_equal(merged_tensors(model)[name].read(), want)


def test_max_seq_length(folder):
    assert load(folder, max_seq_length=128)[0].max_seq_length == 128
    with pytest.raises(ValueError, match=r"max_seq_length=257 exceeds the 256 positions .* by a 'rope_scaling'"):
        load(folder, max_seq_length=257)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        load(folder, max_seq_length=0)


# Checkpoints that bitsandbytes has quantised.


def prequantize(weights: dict[str, np.ndarray], double: bool, skip: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The tensors as bitsandbytes writes them; names that contain one of `skip` stay as they are."""
    out = {}
    for name, w in weights.items():
        if not any(f".{linear}." in name for linear in LINEARS) or any(part in name for part in skip):
            out[name] = w
            continue
        q = quantize(jnp.asarray(w), double)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape)}
        out[name] = np.asarray(q.packed).reshape(-1, 1)
        out[f"{name}.absmax"] = np.asarray(q.absmax).reshape(-1)
        out[f"{name}.quant_map"] = CODE
        if double:
            out[f"{name}.nested_absmax"] = np.asarray(q.nested_absmax)
            out[f"{name}.nested_quant_map"] = np.asarray(q.nested_code)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(q.nested_offset)}
        text = json.dumps(state).encode()
        out[f"{name}.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
    return out


def bnb_config(**changes):
    return tiny.config(**{"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}, **changes})


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_prequantised_bytes_are_kept_and_stacks_cut(tmp_path, double):
    hf = bnb_config(num_hidden_layers=4)
    weights = random_weights(hf)
    # As unsloth's dynamic quants do it: all of one layer and one linear of another stay in 16 bits.
    stored = prequantize(weights, double, skip=("layers.1.", "layers.3.mlp.down_proj"))
    tiny.write_folder(tmp_path, hf, stored)
    model, _ = load(tmp_path, double_quantize=not double)  # what the checkpoint has goes before the option
    assert [(s.first, s.count) for s in model.module.layers] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    for name, slot in model.module.slots().items():
        weight = slot.variable.get_value()
        if f"{name}.absmax" not in stored:
            np.testing.assert_array_equal(merged_tensors(model)[name].read(), weights[name])
            continue
        assert isinstance(weight, NF4Weight)
        assert weight.double_quantized == double
        one = jax.tree.map(lambda x, i=slot.index: np.asarray(x[i]).reshape(-1), weight)
        np.testing.assert_array_equal(one.packed, stored[name][:, 0])
        np.testing.assert_array_equal(one.absmax, stored[f"{name}.absmax"])
        if double:
            np.testing.assert_array_equal(one.nested_absmax, stored[f"{name}.nested_absmax"])

    # The same weights in float32, all stacked: the cut model computes the same.
    plain = tiny.open_model(tmp_path)
    assert [(s.first, s.count) for s in plain.module.layers] == [(0, 4)]
    ids = tiny.ids(2, 20)
    # Both multiply by the same float32 weights; only the order of sums may differ.
    np.testing.assert_allclose(model.logits(ids), plain.logits(ids), atol=2e-5)


def test_codes_stored_under_another_dtype(tmp_path, weights):
    stored = prequantize(weights, True)
    want = merged_tensors(tiny.open_model(tiny.write_folder(tmp_path / "u8", bnb_config(), stored, tokenizer=False)))
    for name in weights:
        if f"{name}.absmax" in stored:  # bnb_4bit_quant_storage=bfloat16
            stored[name] = stored[name].reshape(-1).view(ml_dtypes.bfloat16).reshape(-1, 1)
    model = tiny.open_model(tiny.write_folder(tmp_path / "bf16", bnb_config(), stored, tokenizer=False))
    assert_holds(model, {name: tensor.read() for name, tensor in want.items()})


# Hub ids.


def cached(root: Path, source: Path, name: str = "someone/tiny") -> Path:
    """Lays a folder out as huggingface_hub's cache has it; returns the cache."""
    repository = root / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(source)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    return root


def test_hub_id_from_the_cache_while_offline(folder, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cached(tmp_path, folder)))
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # tests/conftest.py
    model, tokenizer = load("someone/tiny", load_in_4bit=False)
    assert_holds(model, weights)
    assert model.name_or_path == "someone/tiny"  # adapters name the hub id, not this machine's cache
    assert len(tokenizer) == 259
    with pytest.raises(
        FileNotFoundError, match=r"no folder someone/other; .*'someone/other' is not in the local cache"
    ):
        load("someone/other")


@pytest.mark.parametrize("kind", ["single", "sharded", "adapter"])
def test_only_needed_files_are_asked_for(tmp_path, monkeypatch, kind):
    patterns = []

    def snapshot_download(name, *, revision, token, allow_patterns):
        assert (name, revision, token) == ("someone/tiny", "v2", "secret")
        patterns.append(allow_patterns)
        return str(tmp_path)

    if kind == "sharded":
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    if kind == "adapter":
        (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_folder("someone/tiny", revision="v2", token="secret") == tmp_path
    assert not any("safetensors" in pattern or "bin" in pattern for pattern in patterns[0])
    want = {"single": ["model.safetensors"], "adapter": ["adapter_model.safetensors"]}
    want["sharded"] = ["model-1.safetensors", "model-2.safetensors"]
    assert [p for p in patterns[1] if p.endswith(".safetensors")] == want[kind]


def hub_error(kind, status: int):
    return kind("the hub said no", response=types.SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("raised", "wanted", "message"),
    [
        (hub_error(errors.GatedRepoError, 403), PermissionError, "gated: accept its licence .* `hf auth login`"),
        (
            hub_error(errors.RepositoryNotFoundError, 404),
            FileNotFoundError,
            "no repository 'a/b' on the hub; a private",
        ),
        (hub_error(errors.RevisionNotFoundError, 404), FileNotFoundError, "'a/b' has no revision 'v9'"),
        (hub_error(errors.HfHubHTTPError, 500), FileNotFoundError, "could not be reached"),
        (OSError(28, "No space left on device"), OSError, "No space left on device"),
    ],
)
def test_hub_errors(monkeypatch, raised, wanted, message):
    def snapshot_download(*_, **__):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(wanted, match=message) as caught:
        resolve_folder("a/b", revision="v9")
    assert type(caught.value) is wanted


# Bad input. Every case: (change to a good folder, error, message).


def edit_config(**changes):
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content = {k: v for k, v in (content | changes).items() if v is not ...}
        (folder / "config.json").write_text(json.dumps(content))

    return edit


def write(file: str, content: bytes):
    return lambda folder: (folder / file).write_bytes(content)


def remove(*files: str):
    return lambda folder: [(folder / file).unlink() for file in files]


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def corrupt(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)


def edit_tensors(change):
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def index(weight_map: object):
    def edit(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return edit


def only_bin(name: str):
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(b"pickle")

    return edit


K_PROJ, NORM = "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"
GPTQ = {"quant_method": "gptq", "bits": 4}
BAD_INPUT = {
    "no config": (remove("config.json"), FileNotFoundError, r"tiny holds no config\.json"),
    "config not JSON": (
        write("config.json", b'{"architectures": ['),
        ValueError,
        r"config\.json is not valid JSON .* trunc",
    ),
    "config not UTF-8": (write("config.json", b"\xff\xfe{"), ValueError, r"config\.json is not valid JSON"),
    "config a list": (write("config.json", b"[1]"), ValueError, "one JSON object, got a list"),
    "truncated": (truncate, ValueError, r"model\.safetensors is truncated or corrupted .*copy or download it again"),
    "header": (corrupt, ValueError, r"model\.safetensors is truncated or corrupted"),
    "empty file": (write("model.safetensors", b""), ValueError, r"model\.safetensors is truncated or corrupted"),
    "absent shard": (
        index({NORM: "model-2.safetensors"}),
        FileNotFoundError,
        r"not in the folder: model-2\.safetensors",
    ),
    "shard lacks": (index({"x.weight": "model.safetensors"}), ValueError, r"model\.safetensors lacks .*: x\.weight"),
    "index without map": (index(None), ValueError, "has no 'weight_map'"),
    "index not JSON": (write("model.safetensors.index.json", b"{"), ValueError, r"index\.json is not valid JSON"),
    "shape": (
        edit_config(num_key_value_heads=4),
        ValueError,
        r"k_proj\.weight has shape \[32, 64\], config.json implies \[64",
    ),
    "missing": (
        edit_tensors(lambda t: t.pop(NORM)),
        ValueError,
        r"lacks tensors that config.json implies: model\.norm\.w",
    ),
    "more layers": (edit_config(num_hidden_layers=3), ValueError, r"lacks .* model\.layers\.2.* and 4 more"),
    "unknown": (
        edit_config(num_hidden_layers=1),
        ValueError,
        r"holds tensors that this architecture does not .*layers\.1\.",
    ),
    "biases": (
        edit_tensors(lambda t: t.update({K_PROJ.replace("weight", "bias"): np.ones(32, np.float32)})),
        ValueError,
        r"holds tensors that this architecture does not have: model\.layers\.1\.self_attn\.k_proj\.bias",
    ),
    "architecture": (
        edit_config(architectures=["GPT2LMHeadModel"]),
        ValueError,
        "'GPT2LM.*LlamaForCausalLM, MistralFor",
    ),
    "remote code": (
        edit_config(architectures=["OwnForCausalLM"], auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}),
        ValueError,
        r"'OwnForCausalLM' is not implemented \(the code beside it, which its auto_map names, is not run\); known are",
    ),
    "no architecture": (edit_config(architectures=...), ValueError, "architecture None is not .*known are Llama"),
    "pytorch_model.bin": (only_bin("pytorch_model.bin"), ValueError, ""),
    "sharded bin": (only_bin("pytorch_model.bin.index.json"), ValueError, ""),
    "no weights": (
        remove("model.safetensors"),
        FileNotFoundError,
        r"holds no model\.safetensors and no model\.safet.*index",
    ),
    "no tokenizer": (remove("tokenizer.json"), FileNotFoundError, r"holds no tokenizer \(tokenizer\.json, .*; copy"),
    "gptq": (edit_config(quantization_config=GPTQ), ValueError, "quantised with 'gptq'; 16-bit .* use the original"),
    "awq": (edit_config(quantization_config={"quant_method": "awq"}), ValueError, "quantised with 'awq'"),
    "8 bit": (
        edit_config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ValueError,
        "'bitsandbytes' in 8 bits; 16-bit checkpoints, bitsandbytes' NF4",
    ),
    "integers": (
        edit_tensors(lambda t: t.update({K_PROJ: np.ones((32, 64), np.int32)})),
        ValueError,
        r"k_proj\.weight is stored as int32, wanted a 16- or 32-bit float",
    ),
}
for name in ("pytorch_model.bin", "sharded bin"):
    message = r"only pickled weights \(pytorch_model\.bin.* run code .*safe_serialization=True"
    BAD_INPUT[name] = (BAD_INPUT[name][0], FileNotFoundError, message)


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, tmp_path, weights):
    edit, error, message = BAD_INPUT[case]
    folder = tiny.write_folder(tmp_path / "tiny", weights=weights)
    edit(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(error, match=message):
        load(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_missing_folder_and_file_in_its_place(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nothing here; give a local folder or a hub id such as"):
        load(tmp_path / "nothing here")
    with pytest.raises(FileNotFoundError, match="is a file; a model is a folder"):
        load(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float16", "int8", "float17", np.float16])
def test_bad_dtype(folder, dtype):
    with pytest.raises(ValueError, match=r"dtype='\w+' is not possible; use 'bfloat16' or 'float32'"):
        load(folder, dtype=dtype)


def break_state(**changes):
    def change(tensors, name):
        key = f"{name}.quant_state.bitsandbytes__nf4"
        state = json.loads(tensors[key].tobytes()) | changes
        tensors[key] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return change


def replace(ending: str, value):
    return lambda tensors, name: tensors.update({name + ending: value})


BAD_NF4 = {
    "fp4": (break_state(quant_type="fp4"), "quantised as fp4 with blocks of 64 .*use the 16-bit checkpoint"),
    "block": (break_state(blocksize=96), r"blocks of 96 \(nested 256\); only nf4 with 64"),
    "other block": (break_state(blocksize=128), r"absmax holds 32 scales, .* with blocks of 128 has 16"),
    "nested block": (break_state(nested_blocksize=512), r"\(nested 512\)"),
    "shape": (break_state(shape=[64, 32]), r"k_proj\.weight has shape \[64, 32\], config\.json implies \[32, 64\]"),
    "state": (replace(".quant_state.bitsandbytes__nf4", np.ones(5, np.uint8)), "nf4 is damaged"),
    "state lacks": (
        replace(".quant_state.bitsandbytes__nf4", np.frombuffer(b'{"quant_type": "nf4"}', np.uint8)),
        r"damaged \(KeyError\('shape'\)\)",
    ),
    "no absmax": (lambda t, name: t.pop(f"{name}.absmax"), r"lacks .* k_proj\.weight\.absmax|k_proj\.weight\.absmax"),
    "short absmax": (
        replace(".absmax", np.ones(5, np.uint8)),
        r"absmax is \[5\] uint8, a weight \(32, 64\) in NF4 wants",
    ),
    "absmax dtype": (
        replace(".absmax", np.ones(32, np.float32)),
        r"absmax is \[32\] float32, .* wants \(32, 1\) uint8",
    ),
    "short codes": (replace("", np.ones((9, 1), np.uint8)), r"k_proj\.weight is \[9, 1\] uint8"),
    "other table": (replace(".quant_map", CODE[::-1].copy()), "quant_map is not the NF4 table"),
}


@pytest.mark.parametrize("case", BAD_NF4)
def test_bad_prequantised_input(case, tmp_path, weights):
    change, message = BAD_NF4[case]
    stored = prequantize(weights, True, skip=("layers.0.",))
    change(stored, K_PROJ)
    tiny.write_folder(tmp_path, bnb_config(), stored)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_out_of_memory_says_what_would_fit(folder, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr("lora_jax.loading.load_decoder", full)
    with pytest.raises(MemoryError, match="do not fit on .*load_in_4bit=True needs about a quarter"):
        load(folder, load_in_4bit=False)


# Memory.

_MEASURE = """
import sys, resource
from pathlib import Path
import jax
import jax.numpy as jnp
from lora_jax.hf_checkpoint import Checkpoint, read_json
from lora_jax.kernels.nf4 import quantize
from lora_jax.loading import load_decoder

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

folder = Path(sys.argv[1])
jax.block_until_ready(quantize(jnp.ones((8, 64))))  # the backend and its threads are there
before = peak()
config = read_json(folder / "config.json")
model = load_decoder(Checkpoint(folder), config, nf4="nf4-double", dtype=jnp.bfloat16, progress=False)
jax.block_until_ready(jax.tree.leaves(model))
print(peak() - before)
"""


@pytest.mark.slow
def test_peak_host_memory_is_the_result_and_a_few_tensors(tmp_path):
    """2.2 GB of bfloat16 in shards become NF4 within the result and four float32 copies of the largest tensor."""
    hf = tiny.config(
        vocab_size=2048, hidden_size=4096, intermediate_size=14336, num_hidden_layers=5, num_attention_heads=32
    )
    hf |= {"num_key_value_heads": 8, "torch_dtype": "bfloat16"}
    rng = np.random.default_rng(0)
    pool = rng.normal(0, 0.02, 2**20).astype(ml_dtypes.bfloat16)
    q, kv, d, f = 4096, 1024, 4096, 14336
    shapes = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
    shapes = {f"self_attn.{k}": v for k, v in shapes.items()}
    shapes |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    shapes |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    layer = {name: np.resize(pool, shape) for name, shape in shapes.items()}
    where: dict[str, str] = {}
    for i in range(hf["num_hidden_layers"]):
        file = f"model-{i:05}.safetensors"
        part = {f"model.layers.{i}.{name}.weight": w for name, w in layer.items()}
        if i == 0:
            ends = {"model.embed_tokens.weight": (2048, d), "lm_head.weight": (2048, d), "model.norm.weight": (d,)}
            part |= {name: np.resize(pool, shape) for name, shape in ends.items()}
        save_file(part, tmp_path / file)
        where |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_text(json.dumps(hf))
    total = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert total >= 2 * 10**9
    linears = hf["num_hidden_layers"] * (2 * q * d + 2 * kv * d + 3 * d * f)
    result = int(linears * (0.5 + 1 / 64)) + 2 * 2 * 2048 * d
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", _MEASURE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    extra = int(done.stdout) - result
    largest = 4 * d * f
    print(f"result {result / 1e6:.0f} MB, peak above it {extra / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB")
    assert extra <= 4 * largest


def test_checkpoint_lists_and_reads_one_tensor(folder, weights):
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.names) == set(weights)
    assert NORM in checkpoint
    assert "nothing" not in checkpoint
    assert checkpoint.shape(K_PROJ) == (32, 64)
    np.testing.assert_array_equal(checkpoint.read(K_PROJ), weights[K_PROJ])
