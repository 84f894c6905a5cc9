"""Quantised GGUF files against llama.cpp's own code, which xllamacpp holds: bytes of blocks, and types of tensors.

`llama_quantize_types.json` holds, for shapes of models of all families, how many tensors llama.cpp (b11434,
`llama_quant_compute_types`) gives each type, and the CRC-32 of the list of types in its order of tensors.
"""

import collections
import ctypes
import errno
import functools
import importlib.util
import json
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from safetensors import safe_open

from lora_jax.export import gguf as gguf_export
from lora_jax.export import gguf_quants
from lora_jax.export.gguf import FILE_TYPES, file_types, verify_gguf, write_gguf, write_ggufs
from lora_jax.export.gguf_imatrix import read_imatrix
from lora_jax.export.gguf_mixtures import MixedModel, tensor_types
from lora_jax.export.gguf_quants import BLOCK_TYPES, quantize
from lora_jax.models.decoder import Decoder
from lora_jax.models.registry import config_from_hf
from tests.export.tiny_gguf import ArraySource, bpe_folder, hf_config, random_weights, reference_logprobs, sources
from tests.llamacpp import LlamaCpp

K_QUANTS = [type for type in BLOCK_TYPES if type.name.endswith("_K")]
QUANTIZED = [name for name in FILE_TYPES if name not in ("f32", "f16", "bf16")]


@pytest.fixture(scope="module")
def ggml() -> Callable[..., np.ndarray]:
    """ggml(values [rows, K], type, importance [K] or None) -> llama.cpp's bytes."""
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    chunk = ctypes.CDLL(spec.origin).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def run(values: np.ndarray, type: GgmlType, importance: np.ndarray | None = None) -> np.ndarray:
        assert values.dtype == np.float32 and values.flags.c_contiguous
        block, size = gguf.GGML_QUANT_SIZES[type]
        out = np.zeros((len(values), values.shape[1] // block * size), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        assert chunk(type, values.ctypes.data, out.ctypes.data, 0, *values.shape, weights) == out.nbytes
        return out

    return run


def hard_values(kind: str, rows: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, rows, width])
    x = rng.standard_normal((rows, width), np.float32)
    groups = (rows, width // 16)
    if kind == "heavy tails":
        x = x**5
    elif kind == "zeros":
        x *= rng.random(x.shape) < 0.05
        x[: rows // 3] = 0
    elif kind == "constant groups":
        x = np.repeat(rng.standard_normal(groups), 16, 1) + x * (np.arange(rows) % 2)[:, None] * 1e-6
    elif kind == "groups of all sizes":
        x = x * np.repeat(10.0 ** rng.uniform(-30, 2, groups), 16, 1)
    elif kind == "rows of all sizes":  # from subnormal numbers to what float16 scales cannot hold
        x = x * 10.0 ** rng.uniform(-42, 4, (rows, 1))
    elif kind == "one sign":
        x = -np.abs(x) - 1
    return np.ascontiguousarray(x, np.float32)


def importance(width: int, scale: float = 1.0) -> np.ndarray:
    weights = (np.random.default_rng(width).uniform(0, 1, width) ** 4 * 10 * scale).astype(np.float32)
    weights[::37] = 0
    return weights


HARD = ["smooth", "heavy tails", "zeros", "constant groups", "groups of all sizes", "rows of all sizes", "one sign"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("type", BLOCK_TYPES, ids=lambda type: type.name)
def test_bytes_equal_llamacpp(type: GgmlType, weighted: bool, ggml: Callable[..., np.ndarray]) -> None:
    """NumPy: small arrays."""
    for width in (256, 512, 2880):
        if width % gguf.GGML_QUANT_SIZES[type][0]:
            continue
        for kind in HARD:
            x = hard_values(kind, 9, width)
            weights = importance(width, 1e-7 if kind == "heavy tails" else 1.0) if weighted else None
            got = quantize(x, type, weights)
            np.testing.assert_array_equal(got, ggml(x, type, weights), err_msg=f"{kind}, width {width}")


def _compiled_cases() -> list[Any]:
    cases = [(type, weighted) for type in BLOCK_TYPES for weighted in (False, True)]
    cases.remove((GgmlType.Q8_0, True))
    always = [(GgmlType.Q4_K, False), (GgmlType.Q6_K, False)]
    name = {case: f"{case[0].name}{'-weighted' * case[1]}" for case in cases}
    rotating = [case for case in cases if case not in always]
    return [pytest.param(*case, id=name[case]) for case in always] + [
        pytest.param(*case, id=name[case], marks=pytest.mark.rotate("others")) for case in rotating
    ]


@pytest.mark.parametrize(("type", "weighted"), _compiled_cases())
def test_compiled_bytes_equal_llamacpp(type: GgmlType, weighted: bool, ggml: Callable[..., np.ndarray]) -> None:
    """XLA: large arrays, whose last chunk is not full; blocks of tiny numbers are done over in NumPy."""
    width = 2048
    x = np.concatenate([hard_values(kind, 12, width, seed=1) for kind in HARD])
    assert x.size > gguf_quants._CPU_CHUNK and x.size % gguf_quants._CPU_CHUNK > gguf_quants._NUMPY_UP_TO
    weights = importance(width) if weighted else None
    np.testing.assert_array_equal(quantize(x, type, weights), ggml(x, type, weights))


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("type", BLOCK_TYPES, ids=lambda type: type.name)
def test_a_gpu_differs_in_few_blocks(type: GgmlType, weighted: bool) -> None:
    """From the bytes made on the CPU, which the tests above show to be llama.cpp's."""
    x = np.random.default_rng(0).standard_normal((1024, 2048), np.float32) * np.float32(0.02)
    weights = importance(2048) if weighted else None
    want, got = quantize(x, type, weights), quantize(x, type, weights, device=jax.devices("gpu")[0])
    block, size = gguf.GGML_QUANT_SIZES[type]
    different = (got != want).reshape(-1, size).any(axis=1)
    assert different.mean() <= 1e-3
    errors = [np.square(gguf.quants.dequantize(data, type) - x).sum() for data in (got, want)]
    assert errors[0] <= errors[1] * (1 + 1e-4)


@pytest.mark.parametrize("type", BLOCK_TYPES, ids=lambda type: type.name)
def test_the_error_is_within_what_verification_allows(type: GgmlType) -> None:
    from lora_jax.export.gguf import _bound

    for kind in HARD:
        x = np.clip(hard_values(kind, 9, 512, seed=2), -6e4, 6e4)
        error = np.abs(gguf.quants.dequantize(quantize(x, type), type) - x)
        assert (error <= _bound(x, type, False)).all(), kind


def test_leading_axes_and_arguments() -> None:
    x = hard_values("smooth", 6, 512)
    flat = quantize(x, GgmlType.Q4_K)
    np.testing.assert_array_equal(quantize(x.reshape(2, 3, 512), GgmlType.Q4_K), flat.reshape(2, 3, -1))
    np.testing.assert_array_equal(quantize(x, GgmlType.F32), x.view(np.uint8))
    with pytest.raises(ValueError, match="rows of 96 values do not divide into Q4_K's blocks of 256"):
        quantize(x[:, :96], GgmlType.Q4_K)
    with pytest.raises(ValueError, match="cannot quantise to IQ2_XS; there are Q8_0, Q4_0"):
        quantize(x, GgmlType.IQ2_XS)
    with pytest.raises(ValueError, match=r"importance has shape \(256,\), wanted \(512,\)"):
        quantize(x, GgmlType.Q4_K, np.ones(256, np.float32))


# Which tensor has which type.


def dense(layers: int, hidden: int, ff: int, kv: int, *, tied: bool = False, qkv: bool = False, bias: bool = False):
    shapes = {"token_embd.weight": (1000, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        shapes["output.weight"] = (1000, hidden)
    for i in range(layers):
        own: dict[str, tuple[int, ...]] = {"attn_output.weight": (hidden, hidden), "ffn_up.weight": (ff, hidden)}
        own |= {"ffn_down.weight": (hidden, ff), "attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
        if qkv:
            own["attn_qkv.weight"] = (hidden + 2 * kv, hidden)
        else:
            own |= {"attn_q.weight": (hidden, hidden), "ffn_gate.weight": (ff, hidden)}
            own |= {"attn_k.weight": (kv, hidden), "attn_v.weight": (kv, hidden)}
        if bias:
            own |= {"attn_q.bias": (hidden,), "attn_v.bias": (kv,), "ffn_down.bias": (hidden,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in own.items()}
    return shapes


def sparse(layers: int, hidden: int, ff: int, kv: int, experts: int, *, shared: int = 0, first: int = 0):
    shapes = dense(layers, hidden, ff, kv)
    for i in range(first, layers):
        block = f"blk.{i}.ffn_"
        for name in ("up", "gate", "down"):
            del shapes[f"{block}{name}.weight"]
        shapes |= {f"{block}gate_inp.weight": (experts, hidden), f"{block}down_exps.weight": (experts, hidden, ff)}
        shapes |= {f"{block}{name}_exps.weight": (experts, ff, hidden) for name in ("up", "gate")}
        if shared:
            shapes |= {f"{block}{name}_shexp.weight": (shared, hidden) for name in ("up", "gate")}
            shapes[f"{block}down_shexp.weight"] = (hidden, shared)
    return shapes


def latent(layers: int):
    shapes = sparse(layers, 512, 256, 64, 64, shared=512, first=1)
    for i in range(layers):
        block = f"blk.{i}.attn_"
        for name in ("q", "k", "v"):
            del shapes[f"{block}{name}.weight"]
        shapes |= {f"{block}q_a.weight": (1536, 512), f"{block}q_b.weight": (3072, 1536)}
        shapes |= {f"{block}kv_a_mqa.weight": (576, 512), f"{block}kv_a_norm.weight": (512,)}
        shapes |= {f"{block}k_b.weight": (16, 512, 128), f"{block}v_b.weight": (16, 128, 512)}
    return shapes


MIXED = {
    "llama 8B": (dense(32, 512, 1792, 128), MixedModel("llama", 32, 32, 8, 0)),
    "llama 70B": (dense(80, 512, 1792, 64), MixedModel("llama", 80, 64, 8, 0)),
    "llama 2 7B": (dense(32, 512, 1280, 512), MixedModel("llama", 32, 32, 32, 0)),
    "smollm2": (dense(30, 576, 1536, 192, tied=True), MixedModel("llama", 30, 9, 3, 0)),
    "width 80": (dense(3, 80, 208, 80), MixedModel("llama", 3, 4, 2, 0)),
    "gemma2": (dense(26, 512, 2048, 256, tied=True), MixedModel("gemma2", 26, 8, 4, 0)),
    "phi3": (dense(32, 512, 1024, 512, qkv=True), MixedModel("phi3", 32, 32, 32, 0)),
    "qwen2 0.5B": (dense(24, 896, 4864, 128, tied=True, bias=True), MixedModel("qwen2", 24, 14, 2, 0)),
    "mixtral": (sparse(32, 512, 1024, 128, 8), MixedModel("llama", 32, 32, 8, 8)),
    "qwen3 30B": (sparse(48, 512, 768, 128, 128), MixedModel("qwen3moe", 48, 32, 4, 128)),
    "qwen2moe": (sparse(24, 512, 1408, 512, 60, shared=1408), MixedModel("qwen2moe", 24, 16, 16, 60)),
    "gpt-oss": (sparse(24, 2880, 2880, 512, 32), MixedModel("gpt-oss", 24, 64, 8, 32)),
    "deepseek2": (latent(27), MixedModel("deepseek2", 27, 16, 1, 64)),
    "one layer": (dense(1, 256, 512, 256), MixedModel("llama", 1, 2, 2, 0)),
}


@pytest.mark.parametrize("model", MIXED)
def test_types_of_tensors_equal_llama_quantize(model: str) -> None:
    table = json.loads((Path(__file__).parent / "llama_quantize_types.json").read_text())
    shapes, mixed = MIXED[model]
    for file_type in QUANTIZED:
        if (model, file_type) == ("width 80", "q2_k_l"):
            continue  # llama-quantize makes no such file: it has no other type for an embedding it was told to have
        types, _ = tensor_types(file_type, shapes, mixed)
        ordered = [types[name].name for name in types]  # in llama.cpp's order
        counts = " ".join(f"{type}:{count}" for type, count in sorted(collections.Counter(ordered).items()))
        assert f"{counts} {zlib.crc32(','.join(ordered).encode()):08x}" == table[f"{model} {file_type}"], file_type


def test_mixtures_with_importance_and_of_large_qwen() -> None:
    shapes, mixed = MIXED["llama 8B"]
    types, _ = tensor_types("q4_0", shapes, mixed, weighted=True)
    assert [types[f"blk.{i}.ffn_down.weight"].name for i in (0, 3, 4)] == ["Q4_1", "Q4_1", "Q4_0"]
    shapes = dense(80, 512, 1024, 512)
    types, _ = tensor_types("q4_k_s", shapes, MixedModel("qwen2", 80, 8, 8, 0))
    assert types["blk.40.attn_v.weight"] == GgmlType.Q5_K
    types, _ = tensor_types("q4_k_s", shapes, MixedModel("llama", 80, 8, 8, 0))
    assert types["blk.40.attn_v.weight"] == GgmlType.Q4_K


def test_names() -> None:
    assert file_types(["not_quantized", "fast_quantized", "quantized"]) == ["bf16", "q8_0", "q4_k_m"]
    assert file_types("not_quantized", "f16") == ["f16"]
    assert file_types(["Q4_K", "q4_k_m", "q2_k_l", "q3_k_xs", "Q5_K", "q6_k"]) == [
        "q4_k_m", "q2_k_l", "q3_k_s", "q5_k_m", "q6_k",
    ]  # fmt: skip
    assert file_types(None) == list(FILE_TYPES)
    with pytest.raises(
        ValueError, match=r"'q9_k' is not known; choose one of f32, f16, .*q2_k_l.*not_quantized. Did you mean 'q._k'"
    ):
        file_types("q9_k")
    with pytest.raises(ValueError, match=r"'iq2_xxs' is one of the types that are not written here; choose .* matrix"):
        file_types(["q4_0", "iq2_xxs"])
    with pytest.raises(ValueError, match="no GGUF file type was given"):
        file_types([])


# Whole files.


@pytest.fixture
def numpy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes longer than these files do."""
    monkeypatch.setattr(gguf_quants, "_NUMPY_UP_TO", 1 << 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bpe_folder(tmp_path_factory.mktemp("tokenizer") / "gpt-2", "gpt-2")


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}


def write_all(tmp_path: Path, folder: Path, config: dict[str, Any], weights: Any, types: list[str], **options: Any):
    paths = {name: tmp_path / f"{name}.gguf" for name in types}
    tensors = {name: ArraySource(w) if isinstance(w, np.ndarray) else w for name, w in weights.items()}
    return write_ggufs(paths, tensors, config, folder, progress=False, **options)


def tensors_of(*paths: Path) -> dict[str, Any]:
    return {tensor.name: tensor for path in paths for tensor in gguf.GGUFReader(path).tensors}


def expect_bytes(
    path: Path, exact: dict[str, Any], ggml: Callable[..., np.ndarray], weights: dict[str, np.ndarray] | None = None
) -> None:
    """Every tensor of a quantised file is what llama.cpp makes of that of the float32 file."""
    for name, tensor in tensors_of(path).items():
        if tensor.tensor_type == GgmlType.F32:
            np.testing.assert_array_equal(tensor.data, exact[name].data)
            continue
        values = np.ascontiguousarray(exact[name].data)
        own = (weights or {}).get(name)
        if values.ndim == 2:
            want = ggml(values, tensor.tensor_type, own)
        else:
            experts = [None] * len(values) if own is None else [np.ascontiguousarray(w) for w in own]
            want = np.stack([ggml(v, tensor.tensor_type, w) for v, w in zip(values, experts, strict=True)])
        np.testing.assert_array_equal(tensor.data, want, err_msg=name)


@pytest.mark.usefixtures("numpy_only")
def test_every_type_in_one_pass(
    tmp_path: Path, folder: Path, ggml: Callable[..., np.ndarray], capfd: pytest.CaptureFixture[str]
) -> None:
    class Counting(ArraySource):
        def read(self) -> np.ndarray:
            reads[id(self)] += 1
            return super().read()

    reads: collections.Counter[int] = collections.Counter()
    config = hf_config(**WIDE)
    weights = random_weights(config)
    counted = {name: Counting(w) for name, w in weights.items()}
    written = write_all(tmp_path, folder, config, counted, list(FILE_TYPES))
    assert set(reads.values()) == {2}  # to write, and to verify
    assert "do not divide" not in capfd.readouterr().err
    exact = tensors_of(tmp_path / "f32.gguf")
    for name in QUANTIZED:
        (path,) = written[name]
        expect_bytes(path, exact, ggml)
        fields = gguf.GGUFReader(path).fields
        assert fields["general.file_type"].contents() == FILE_TYPES[name][0]
        assert fields["general.quantization_version"].contents() == 2
    expected = reference_logprobs(config, weights, IDS)
    # They run in llama.cpp. Random weights are far from the best case: 0.18 and 0.5 were found; garbage is above 5.
    for name, limit in (("q4_k_m", 0.4), ("q2_k_l", 1.5)):
        with LlamaCpp(tmp_path / f"{name}.gguf", config["vocab_size"]) as llama:
            found = llama.logprobs(IDS)
        assert -1e-3 <= np.sum(np.exp(expected) * (expected - found)) <= limit


def test_chunks_of_a_gpu_come_in_order() -> None:
    began: list[int] = []

    def one(i: int) -> int:
        began.append(i)
        time.sleep(0.02 if i % 3 == 0 else 0)
        return i

    for at_once in (1, 3):
        assert list(gguf_export._in_turn((functools.partial(one, i) for i in range(10)), at_once)) == list(range(10))
    assert sorted(began) == sorted([*range(10)] * 2)
    bad = iter([lambda: 1, lambda: 1 // 0, lambda: 3])
    with pytest.raises(ZeroDivisionError):
        list(gguf_export._in_turn(bad, 3))


IDS = [int(i) for i in np.random.default_rng(1).integers(3, 600, 40)]


@pytest.mark.parametrize("type", BLOCK_TYPES, ids=lambda type: type.name)
def test_real_weights(type: GgmlType, smollm2: Path, ggml: Callable[..., np.ndarray]) -> None:
    """SmolLM2; of its 576 columns, those that blocks of 256 divide."""
    with safe_open(smollm2 / "model.safetensors", "numpy") as file:
        for name in ("embed_tokens", "layers.0.self_attn.q_proj", "layers.7.mlp.down_proj"):
            x = file.get_slice(f"model.{name}.weight")[:128]
            width = x.shape[1] - x.shape[1] % gguf.GGML_QUANT_SIZES[type][0]
            x = np.ascontiguousarray(x[:, :width])
            np.testing.assert_array_equal(quantize(x, type), ggml(x, type), err_msg=name)


def test_other_types_for_narrow_rows_are_announced(
    tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = hf_config(intermediate_size=72)
    write_all(tmp_path, folder, config, random_weights(config), ["q4_k_m"])
    told = capfd.readouterr().err
    assert "12 tensors are Q5_0, not Q4_K: their rows do not divide by 256 (token_embd.weight, " in told
    assert "1 tensors are Q8_0, not Q6_K: their rows do not divide by 256 (blk.1.attn_v.weight)" in told
    assert "1 tensors are float16, not Q6_K: their rows do not divide by 32 (blk.1.ffn_down.weight)" in told


MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 3, "num_experts_per_tok": 2}


def save_imatrix(path: Path, weights: dict[str, np.ndarray], counts: float = 3.0) -> None:
    """As llama-imatrix does: sums over `counts` tokens, for each expert."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in weights.items():
        sums = np.atleast_2d(values)
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", np.full((len(sums), 1), counts, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_old_imatrix(path: Path, weights: dict[str, np.ndarray], calls: int = 3) -> None:
    data = struct.pack("<i", len(weights))
    for name, values in weights.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size)
        data += values.astype("<f4").tobytes()
    path.write_bytes(data + struct.pack("<ii", 7, 8) + b"text.txt")


@pytest.mark.usefixtures("numpy_only")
@pytest.mark.parametrize("save", [save_imatrix, save_old_imatrix])
def test_importance_matrix(save: Callable[..., None], tmp_path: Path, folder: Path, ggml: Callable[..., np.ndarray]):
    """Of linear layers and of experts, in either form of the file."""
    config = hf_config(**WIDE | {"num_hidden_layers": 1} | MIXTRAL)
    slots = Decoder(config_from_hf(config), np.float32).slots()
    rng = np.random.default_rng(0)
    model = {name: rng.standard_normal(slot.shape, np.float32) * np.float32(0.1) for name, slot in slots.items()}
    write_all(tmp_path, folder, config, model, ["f32"])
    exact = tensors_of(tmp_path / "f32.gguf")
    sums = {}
    for name, tensor in exact.items():
        if name.startswith("blk.") and tensor.data.ndim > 1 and "gate_inp" not in name:
            experts = tensor.data.shape[:-2]
            sums[name] = rng.uniform(0, 9, (*experts, tensor.data.shape[-1])).astype(np.float32)
    save(tmp_path / "imatrix", sums)
    means = {name: values / np.float32(3) for name, values in sums.items()}
    types = ["q4_k_m", "q5_1"]
    written = write_all(tmp_path, folder, config, model, types, imatrix=tmp_path / "imatrix")
    for (path,) in written.values():
        expect_bytes(path, exact, ggml, means)
        fields = gguf.GGUFReader(path).fields
        assert fields["quantize.imatrix.entries_count"].contents() == len(sums)
        assert fields["quantize.imatrix.chunks_count"].contents() == 7
        assert fields["quantize.imatrix.dataset"].contents() == "text.txt"


@pytest.mark.parametrize("save", [save_imatrix, save_old_imatrix])
def test_bad_importance_matrices(save: Callable[..., None], tmp_path: Path, folder: Path, capfd: Any) -> None:
    path = tmp_path / "imatrix"
    values = np.random.default_rng(0).uniform(0, 1, 64).astype(np.float32)
    save(path, {"blk.0.attn_q.weight": values, "blk.0.attn_k.weight": values})
    whole = path.read_bytes()
    for length in (0, 3, 17, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="imatrix is not a whole importance matrix"):
            read_imatrix(path)
    save(path, {"blk.0.attn_q.weight": np.where(np.arange(64) == 5, np.nan, values).astype(np.float32)})
    with pytest.raises(ValueError, match=r"holds NaN or infinity for blk.0.attn_q.weight"):
        read_imatrix(path)
    config = hf_config()
    save(path, {"blk.0.attn_q.weight": values[:32]})
    with pytest.raises(ValueError, match=r"has 32 values for blk.0.attn_q.weight, wanted 1 x 64: it belongs to anoth"):
        write_all(tmp_path, folder, config, random_weights(config), ["q4_0"], imatrix=path)
    assert "says nothing of 13 of 14 linear layers (blk.1." in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["imatrix"]


@pytest.mark.usefixtures("numpy_only")
def test_split_files(tmp_path: Path, folder: Path) -> None:
    config = hf_config(**WIDE)
    weights = random_weights(config)
    (whole,) = write_all(tmp_path, folder, config, weights, ["q4_k_m"])["q4_k_m"]
    want = tensors_of(whole)
    parts = write_all(tmp_path, folder, config, weights, ["q4_k_m"], max_shard_size="300KB")["q4_k_m"]
    assert len(parts) > 2 and not whole.exists()  # which would be another model's, were it kept
    assert [p.name for p in parts] == [f"q4_k_m-{i + 1:05d}-of-{len(parts):05d}.gguf" for i in range(len(parts))]
    for i, part in enumerate(parts):
        fields = {key: field.contents() for key, field in gguf.GGUFReader(part).fields.items()}
        found = [fields[f"split.{key}"] for key in ("no", "count", "tensors.count")]
        assert found == [i, len(parts), len(want)]
        assert sum(t.n_bytes for t in gguf.GGUFReader(part).tensors) <= 300_000
    got = tensors_of(*parts)
    assert list(got) == list(want)
    for name in want:
        np.testing.assert_array_equal(got[name].data, want[name].data)
    verify_gguf(parts[0], sources(weights))
    with LlamaCpp(parts[0], config["vocab_size"]) as llama, pytest.raises(ValueError, match="no size"):
        llama.logprobs(IDS)
        write_all(tmp_path, folder, config, weights, ["q4_k_m"], max_shard_size="big")


@pytest.mark.usefixtures("numpy_only")
@pytest.mark.parametrize("file_type", ["q4_k_m", "q2_k", "q4_0"])
def test_verification_finds_a_wrong_element(file_type: str, tmp_path: Path, folder: Path) -> None:
    """A change by twice the block's largest magnitude: more than any type lets one value go."""
    config = hf_config(**WIDE)
    weights = random_weights(config)
    write_all(tmp_path, folder, config, weights, [file_type])
    name = "model.layers.0.mlp.down_proj.weight"
    changed = weights[name].copy()
    changed[3, 5] += 2 * np.abs(changed).max()
    with pytest.raises(ValueError, match="was read back at"):
        verify_gguf(tmp_path / f"{file_type}.gguf", sources(weights | {name: changed}))


@pytest.mark.usefixtures("numpy_only")
def test_verification_finds_a_changed_byte(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = gguf_export._File.write

    def flip(file: Any, name: str, data: np.ndarray) -> None:
        write(file, name, data)
        out = file.writer.fout[file.part_of[name]]
        out.seek(-1, 1)
        out.write(bytes([data.reshape(-1)[-1] ^ 1]))

    monkeypatch.setattr(gguf_export._File, "write", flip)
    config = hf_config(**WIDE)
    with pytest.raises(ValueError, match="was not read back as it was written"):
        write_all(tmp_path, folder, config, random_weights(config), ["q4_k_m"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("numpy_only")
@pytest.mark.parametrize("calls", [0, 7, 15])
def test_a_disk_that_fills_leaves_nothing(
    calls: int, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = gguf_export._File.write, iter(range(calls))

    def full(*arguments: Any) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(gguf_export._File, "write", full)
    config = hf_config(**WIDE)
    with pytest.raises(OSError, match=r"could not write .*q4_k_m.gguf, .*q8_0.gguf .*No space left") as caught:
        write_all(tmp_path, folder, config, random_weights(config), ["q4_k_m", "q8_0"], max_shard_size="300KB")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_type_by_another_name_is_refused_where_keys_are_wanted(tmp_path: Path, folder: Path) -> None:
    config = hf_config()
    with pytest.raises(ValueError, match="'quantized' is another name of 'q4_k_m'"):
        write_all(tmp_path, folder, config, random_weights(config), ["quantized"])
    path = write_gguf(
        tmp_path / "x.gguf", sources(random_weights(config)), config, folder, "Q4_K", progress=False, verify=False
    )
    assert gguf.GGUFReader(path).fields["general.file_type"].contents() == FILE_TYPES["q4_k_m"][0]
