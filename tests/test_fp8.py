"""Checkpoints in FP8 with scales: decoded exactly, loaded, exported, refused."""

import json
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.export.merge import merged_tensors
from lora_jax.fp8 import decode_fp8
from lora_jax.hf_checkpoint import Checkpoint, read_json
from lora_jax.kernels.nf4 import NF4Weight, dequantize, quantize
from lora_jax.models.decoder import Decoder
from lora_jax.models.registry import config_from_hf
from tests import tiny

BLOCK = (128, 128)
E4M3 = ml_dtypes.float8_e4m3fn
# Sizes that blocks of 128 do not divide, as DeepSeek-V3's kv_a_proj_with_mqa [576, 7168].
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 160,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 136,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 144,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
# Sizes that whole blocks make up.
QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}


def values(codes: np.ndarray) -> np.ndarray:
    """The float64 of bytes by the formula of the format: a sign, four bits of exponent (bias 7), three of mantissa."""
    codes = codes.astype(np.int64)
    sign, exponent, mantissa = codes >> 7, (codes >> 3) & 15, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    return np.where((codes & 127) == 127, np.nan, value) * np.where(sign == 1, -1.0, 1.0)


def reference(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """float64 [N, K]: every weight times the scale of its block."""
    n, k = codes.shape
    rows, columns = np.arange(n) // block[0], np.arange(k) // block[1]
    return values(codes) * scales.astype(np.float64)[rows[:, None], columns]


def to_fp8(weight: np.ndarray, block: tuple[int, int], dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    """(the weight in float8, scales such that the largest number of a block is 448)."""
    n, k = weight.shape
    rows, columns = np.arange(n) // block[0], np.arange(k) // block[1]
    scales = np.zeros((rows[-1] + 1, columns[-1] + 1), np.float32)
    np.maximum.at(scales, (rows[:, None], columns[None]), np.abs(weight))
    scales = (scales / 448).astype(dtype)
    return (weight / scales.astype(np.float32)[rows[:, None], columns]).astype(E4M3), scales


def write_fp8(folder: Path, changes: dict, *, scale_dtype=np.float32, block=BLOCK, seed=0, **files):
    """A random model whose linears but for routers are in FP8, and its weights in float64: (folder, weights)."""
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    hf = tiny.config(**changes, quantization_config=quantization)
    rng = np.random.default_rng(seed)
    stored, plain = {}, {}
    for name, slot in Decoder(config_from_hf(hf), np.float32).slots().items():
        weight = np.float32(rng.normal(size=slot.shape) / slot.shape[-1] ** 0.5)
        if "_proj" in name and name.endswith(".weight"):
            stored[name], stored[f"{name}_scale_inv"] = codes, scales = to_fp8(weight, block, scale_dtype)
            plain[name] = reference(codes.view(np.uint8), scales, block)
        else:
            stored[name] = plain[name] = np.float32(1 + 0.2 * weight if "norm" in name else weight)
    tiny.write_folder(folder, hf, stored, tokenizer=False, **files)
    return folder, plain


# ---- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "block", "dtype"),
    [
        ((576, 300), (128, 128), np.float32),
        ((1, 1), (128, 128), np.float32),
        ((257, 128), (128, 128), ml_dtypes.bfloat16),
        ((7, 70), (3, 32), np.float16),
    ],
)
def test_decoding_equals_the_formula_in_float64(shape, block, dtype):
    rng = np.random.default_rng(shape[0])
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes.flat[:256] = np.arange(256)[: codes.size]  # every byte, both NaNs among them
    grid = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    scales = rng.uniform(1e-3, 2, grid).astype(dtype)
    want = reference(codes, scales, block)
    # 4 bits times 24 are exact in float64, so that this is the product rounded once.
    np.testing.assert_array_equal(decode_fp8(codes, scales, block), want.astype(np.float32))


def test_one_scale_for_a_whole_weight():
    codes = np.random.default_rng(0).integers(0, 127, (5, 9)).astype(np.uint8)
    for scale in (np.float32(0.37), np.array([0.37], np.float32), np.array([[0.37]], np.float32)):
        got = decode_fp8(codes, np.asarray(scale), None)
        np.testing.assert_array_equal(got, (values(codes) * np.float64(np.float32(0.37))).astype(np.float32))


# ---- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "dtype"), [(DEEPSEEK, np.float32), (QWEN, ml_dtypes.bfloat16)], ids=["V3", "Qwen"])
def test_weights_are_loaded_and_rounded_once(tmp_path, changes, dtype):
    folder, plain = write_fp8(tmp_path, changes, scale_dtype=dtype, shards=3)  # a scale may be in another file
    got = merged_tensors(tiny.open_model(folder))
    assert got.keys() == plain.keys()
    for name, tensor in got.items():
        np.testing.assert_array_equal(tensor.read(), plain[name].astype(np.float32), err_msg=name)
    rounded = merged_tensors(tiny.open_model(folder, dtype=jnp.bfloat16))
    for name, tensor in rounded.items():
        once = plain[name].astype(np.float32).astype(ml_dtypes.bfloat16)
        want = plain[name] if "correction_bias" in name else once  # which decides between near equals
        np.testing.assert_array_equal(tensor.read(), want.astype(np.float32), err_msg=name)


def test_weights_go_straight_to_nf4(tmp_path):
    """They are not rounded to 16 bits on the way."""
    folder, plain = write_fp8(tmp_path, DEEPSEEK)
    model = tiny.open_model(folder, "nf4", jnp.bfloat16)
    count = 0
    for name, tensor in merged_tensors(model).items():
        if isinstance(model.module.slots()[name].variable.get_value(), NF4Weight):
            count += 1
            want = dequantize(quantize(jnp.asarray(plain[name], jnp.float32), False), jnp.float32)
            np.testing.assert_array_equal(tensor.read(), want, err_msg=name)
    for name, tensor in merged_tensors(model, "original").items():
        np.testing.assert_array_equal(tensor.read(), plain[name].astype(np.float32), err_msg=name)
    assert count == 2 * 5 + 3 + 3 * 4 + 3  # attention, the MLP, experts and the one for all


def save_changed(folder: Path, change) -> None:
    tensors = load_bytes(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_bytes(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder as they are stored; the library reads no FP8 into numpy."""
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    dtypes = {"F8_E4M3": E4M3, "F32": np.float32, "BF16": ml_dtypes.bfloat16}
    header = {k: v for k, v in json.loads(data[8:start]).items() if k != "__metadata__"}
    return {
        name: np.frombuffer(data, np.uint8, entry["data_offsets"][1] - entry["data_offsets"][0], start + first)
        .view(dtypes[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in header.items()
        for first in [entry["data_offsets"][0]]
    }


def test_experts_in_one_tensor(tmp_path):
    """The layout of transformers 5: rows of gate, rows of up; the scales have the same axes."""
    folder, plain = write_fp8(tmp_path, QWEN)

    def fuse(tensors):
        for layer in range(2):
            block = f"model.layers.{layer}.mlp.experts"
            for ending, scale in ((".weight", ""), (".weight_scale_inv", "_scale_inv")):
                parts = {
                    linear: [tensors.pop(f"{block}.{e}.{linear}{ending}") for e in range(3)]
                    for linear in ("gate_proj", "up_proj", "down_proj")
                }
                both = [np.concatenate(pair) for pair in zip(parts["gate_proj"], parts["up_proj"], strict=True)]
                tensors[f"{block}.gate_up_proj{scale}"] = np.stack(both)
                tensors[f"{block}.down_proj{scale}"] = np.stack(parts["down_proj"])

    save_changed(folder, fuse)
    got = merged_tensors(tiny.open_model(folder))
    assert got.keys() == plain.keys()
    for name, tensor in got.items():
        np.testing.assert_array_equal(tensor.read(), plain[name].astype(np.float32), err_msg=name)


def test_scales_of_activations_are_not_needed(tmp_path):
    """Files of models whose activations are in FP8 too, with one scale a weight (Mistral)."""
    hf = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    folder, plain = write_fp8(tmp_path, hf, block=(10**6, 10**6))

    def scalars(tensors):
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = tensors[name].reshape(())
            tensors[name.replace("weight_scale_inv", "activation_scale")] = np.array(0.3, np.float32)

    save_changed(folder, scalars)
    hf = read_json(folder / "config.json")
    hf["quantization_config"] |= {"weight_block_size": None, "activation_scheme": "static"}
    (folder / "config.json").write_text(json.dumps(hf))
    for name, tensor in merged_tensors(tiny.open_model(folder)).items():
        np.testing.assert_array_equal(tensor.read(), plain[name].astype(np.float32), err_msg=name)


def test_only_one_tensor_is_in_memory(tmp_path):
    """A byte and a float32 for each weight, and one row of blocks."""
    weight = np.random.default_rng(0).normal(size=(1280, 2048)).astype(np.float32)
    stored, scales = to_fp8(weight, BLOCK)
    tensors = {f"{i}.weight": stored for i in range(4)} | {f"{i}.weight_scale_inv": scales for i in range(4)}
    quantization = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    checkpoint = Checkpoint(
        tiny.write_folder(tmp_path, tiny.config(quantization_config=quantization), tensors, tokenizer=False)
    )
    tracemalloc.start()
    for name in checkpoint.names:
        checkpoint.read(name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 5.5 * weight.size + 10**6


# ---- against transformers -----------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize(("changes", "block"), [(QWEN, BLOCK), (DEEPSEEK, (8, 8))], ids=["Qwen", "V3"])
def test_transformers_decodes_the_same(oracle, tmp_path, changes, block):
    """It takes only weights that whole blocks make up."""
    folder, _ = write_fp8(tmp_path / "model", changes, block=block)
    oracle("hf_weights.py", folder, tmp_path / "weights.safetensors")
    want = load_file(tmp_path / "weights.safetensors")
    hf = read_json(folder / "config.json")
    del hf["quantization_config"]
    plain = tiny.write_folder(tmp_path / "plain", hf, want, tokenizer=False)  # transformers' names and layout
    plain = merged_tensors(tiny.open_model(plain))
    for name, tensor in merged_tensors(tiny.open_model(folder)).items():
        np.testing.assert_array_equal(tensor.read(), plain[name].read(), err_msg=name)
    ids = tiny.ids(1, 23)
    np.savez(tmp_path / "in.npz", prompt_0=ids[0])
    oracle("hf_logits.py", folder, tmp_path / "in.npz", tmp_path / "out.npz")
    logits = np.load(tmp_path / "out.npz")["prompt_0"]
    assert logits.std() > 0.3
    # Float32 sums of up to 256 terms in another order, through two layers.
    np.testing.assert_allclose(tiny.open_model(folder).logits(ids)[0], logits, rtol=0, atol=1e-4)


# ---- layers that predict further tokens, and export ---------------------------------------------------------------


def test_further_layers_are_left_out_and_kept_in_files(tmp_path):
    """DeepSeek-V3 has one after its last layer, in FP8 as well."""
    folder, plain = write_fp8(tmp_path / "model", {**DEEPSEEK, "num_nextn_predict_layers": 1})
    rng = np.random.default_rng(1)
    more = {name: rng.normal(size=(160,)).astype(np.float32) for name in ("enorm.weight", "shared_head.norm.weight")}
    weight = rng.normal(size=(160, 320)).astype(np.float32)
    more["eh_proj.weight"], more["eh_proj.weight_scale_inv"] = to_fp8(weight, BLOCK)
    save_changed(folder, lambda tensors: tensors.update({f"model.layers.2.{k}": v for k, v in more.items()}))
    model = tiny.open_model(folder)
    assert merged_tensors(model).keys() == plain.keys()
    model.save_pretrained_merged(tmp_path / "saved", dtype="float32", verbose=False)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    scales = more.pop("eh_proj.weight_scale_inv")
    more["eh_proj.weight"] = reference(more["eh_proj.weight"].view(np.uint8), scales, BLOCK).astype(np.float32)
    want = plain | {f"model.layers.2.{name}": tensor for name, tensor in more.items()}
    assert saved.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(saved[name], tensor.astype(np.float32), err_msg=name)
    config = read_json(tmp_path / "saved" / "config.json")
    assert "quantization_config" not in config
    assert config["num_nextn_predict_layers"] == 1
    assert merged_tensors(tiny.open_model(tmp_path / "saved")).keys() == plain.keys()


def test_layers_after_the_last_are_refused_elsewhere(tmp_path):
    folder, _ = write_fp8(tmp_path, DEEPSEEK)
    save_changed(folder, lambda tensors: tensors.update({"model.layers.2.enorm.weight": np.ones(160, np.float32)}))
    with pytest.raises(
        ValueError, match=r"holds tensors that this architecture does not have: model\.layers\.2\.enorm"
    ):
        tiny.open_model(folder)


# ---- refused ------------------------------------------------------------------------------------------------------

NAME = "model.layers.0.self_attn.o_proj.weight"


def edit_quantization(**changes):
    def edit(folder: Path) -> None:
        hf = read_json(folder / "config.json")
        hf["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(hf))

    return edit


def drop_quantization(folder: Path) -> None:
    hf = read_json(folder / "config.json")
    del hf["quantization_config"]
    (folder / "config.json").write_text(json.dumps(hf))


def edit_tensor(name: str, change):
    return lambda folder: save_changed(folder, lambda tensors: tensors.update({name: change(tensors[name])}))


SUPPORTED = r"16-bit checkpoints, bitsandbytes' NF4 .*FP8 .*'fp8'.*MXFP4 \('mxfp4'\) can be read"
METHODS = ["gptq", "awq", "compressed-tensors", "fbgemm_fp8", "modelopt", "torchao", "hqq", "aqlm", "quanto", "eetq"]
REFUSED = {
    **{m: (edit_quantization(quant_method=m), f"is quantised with '{m}'; {SUPPORTED}") for m in METHODS},
    "format": (edit_quantization(fmt="e5m2"), "fmt='e5m2' of quantization_config is not implemented, only 'e4m3'"),
    "fp4": (edit_quantization(expert_dtype="fp4"), "expert_dtype='fp4' .* only 'fp8'"),
    "block": (
        edit_quantization(weight_block_size=[128]),
        r"weight_block_size must be two whole numbers .* got \[128\]",
    ),
    "other block": (
        edit_quantization(weight_block_size=[64, 128]),
        r"model\.layers\.0\..*: scales are \[\d, \d\], blocks of 64 x 128 want \[\d, \d\]",
    ),
    "no config": (drop_quantization, "holds weights in FP8, config.json has no quantization_config of quant_method"),
    "no scale": (
        lambda folder: save_changed(folder, lambda tensors: tensors.pop(f"{NAME}_scale_inv")),
        r"o_proj\.weight is stored as F8_E4M3 without a weight_scale_inv; only F8_E4M3 with scales",
    ),
    "other scale": (edit_tensor(f"{NAME}_scale_inv", lambda s: s.astype(E4M3).view(np.uint8)), "is stored as uint8"),
    "few scales": (edit_tensor(f"{NAME}_scale_inv", lambda s: s[:1, :1]), r"o_proj\.weight: scales are \[1, 1\], bl"),
    "E5M2": (edit_tensor(NAME, lambda w: w.view(ml_dtypes.float8_e5m2)), r"stored as F8_E5M2; only F8_E4M3 with"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path):
    edit, message = REFUSED[case]
    folder, _ = write_fp8(tmp_path, DEEPSEEK)
    edit(folder)
    with pytest.raises(ValueError, match=message):
        tiny.open_model(folder)
