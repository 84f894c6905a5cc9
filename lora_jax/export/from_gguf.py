"""A GGUF file of llama.cpp as a Hugging Face folder: weights dequantised, config.json and tokenizer from its fields.

Names and orders of the tensors are those that `gguf_layout.pieces` gives, turned round, so that export and import
cannot disagree. What a file does not say is not guessed: other architectures, rotations and tokenizers are refused.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from lora_jax.export.aside import folder_aside
from lora_jax.export.from_gguf_tokenizer import write_tokenizer
from lora_jax.export.gguf_layout import Piece, pieces
from lora_jax.export.gguf_metadata import model_shape, rope_factors
from lora_jax.export.safetensors_writer import Contents, write_checkpoint
from lora_jax.models.decoder import Decoder

__all__ = ["gguf_to_hf"]

# llama.cpp's architecture -> Hugging Face's class and model_type, of models without and with experts
_CLASSES = {
    ("llama", False): ("LlamaForCausalLM", "llama"),
    ("llama", True): ("MixtralForCausalLM", "mixtral"),
    ("qwen2", False): ("Qwen2ForCausalLM", "qwen2"),
    ("qwen3", False): ("Qwen3ForCausalLM", "qwen3"),
    ("qwen3moe", True): ("Qwen3MoeForCausalLM", "qwen3_moe"),
    ("gemma", False): ("GemmaForCausalLM", "gemma"),
    ("gemma2", False): ("Gemma2ForCausalLM", "gemma2"),
}
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_BLOCK = 1 << 22  # elements dequantised at a time
# Files hold the factors of Llama 3's rotation, not what they were computed from: those of the published models.
_LLAMA3_FACTORS = (8.0, 32.0, 16.0)


def gguf_to_hf(path: str | Path, folder: Path, *, dtype: str | None = None, overwrite: bool = False) -> Path:
    """Writes a Hugging Face folder with the weights of a GGUF file; returns the folder.

    Args:
      path: the file, or the first of its parts (NAME-00001-of-00003.gguf).
      folder: appears when everything is written and read back.
      dtype: "float32", "float16" or "bfloat16"; None for the file's own, or bfloat16 if that is quantised.
      overwrite: replace an existing folder.

    Raises:
      FileNotFoundError: the file, or one of its parts, is not there.
      ValueError: it is no GGUF file, is cut short, or holds an architecture, rotation or tokenizer that is not known.
      FileExistsError, OSError: the folder exists, cannot be written, or the disk is full.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; known are {', '.join(_DTYPES)}")
    file = _File.open(Path(path))
    config = _config(file)
    dtype = dtype or file.dtype
    config["torch_dtype"] = dtype
    shape = model_shape(config)
    _check_rotation(file, rope_factors(shape))
    slots = Decoder(shape.decoder, np.float32).slots()
    places = {name: _only(pieces(name, slot.shape, shape.layout)) for name, slot in slots.items()}
    _check_tensors(file, places)
    shapes = {name: slot.shape for name, slot in slots.items()}

    def blocks(name: str) -> Iterator[np.ndarray]:
        for block in _values(file, places[name]):
            if not np.isfinite(block).all() or (dtype == "float16" and np.abs(block).max(initial=0) > 65504):
                raise ValueError(f"{path}: {places[name].name} holds values that are not finite in {dtype}")
            yield block.astype(_DTYPES[dtype])

    with folder_aside(folder, overwrite, kept=[Path(path)]) as aside:
        write_checkpoint(aside, Contents(shapes, {name: _DTYPES[dtype] for name in shapes}, blocks), 5 * 10**9)
        special = write_tokenizer(file.fields, aside, config["max_position_embeddings"])
        config |= {name: special.get(name) for name in ("bos_token_id", "pad_token_id")}
        config["eos_token_id"] = (special["eos_token_id"] or [None])[0]
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (aside / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    return folder


@dataclasses.dataclass(frozen=True)
class _File:
    """What the parts of a file hold together."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, gguf.ReaderTensor]

    @staticmethod
    def open(path: Path) -> "_File":
        first = _read(path)
        fields = {name: field.contents() for name, field in first.fields.items()}
        count = fields.get("split.count") or 1
        readers = [first]
        if count > 1:
            if fields.get("split.no"):
                raise ValueError(f"{path} is part {fields['split.no'] + 1} of {count}; name the first one")
            name = path.name.replace(f"-00001-of-{count:05}", "-{:05}-of-" + f"{count:05}")
            readers += [_read(path.with_name(name.format(i + 1))) for i in range(1, count)]
        tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        return _File(path, fields, tensors)

    @property
    def dtype(self) -> str:
        """Name of the dtype of most weights."""
        types = [tensor.tensor_type for tensor in self.tensors.values() if len(tensor.shape) > 1]
        most = max(set(types), key=types.count)
        return {GgmlType.F32: "float32", GgmlType.F16: "float16"}.get(most, "bfloat16")

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.path} has no field {self.fields['general.architecture']}.{key}")
        return value

    def get(self, key: str) -> Any:
        """A field of the architecture, or None. Floats as short as they were before they became float32."""
        value = self.fields.get(f"{self.fields['general.architecture']}.{key}")
        return float(f"{value:.7g}") if isinstance(value, float) else value


def _read(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path} is no GGUF file, or is truncated or corrupted ({error}); copy it again") from None
    if "general.architecture" not in reader.fields:
        raise ValueError(f"{path} has no field general.architecture; it is not a model, or is corrupted")
    return reader


def _config(file: _File) -> dict[str, Any]:
    """config.json in the form that hub files have."""
    architecture, kind = file.fields["general.architecture"], file.fields.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"{file.path} holds no model but {kind!r}: an adapter goes on its base with --lora")
    key = (architecture, bool(file.get("expert_count")))
    if key not in _CLASSES:
        known = ", ".join(sorted({name for name, _ in _CLASSES}))
        raise ValueError(f"{file.path}: the architecture {architecture!r} cannot be converted; known are {known}")
    name, model_type = _CLASSES[key]
    heads, hidden = file["attention.head_count"], file["embedding_length"]
    config = {
        "architectures": [name],
        "model_type": model_type,
        "hidden_act": "silu",
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in file.tensors else 0,
        "hidden_size": hidden,
        "intermediate_size": file["feed_forward_length"],
        "num_hidden_layers": file["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("attention.head_count_kv") or heads,
        "head_dim": file.get("attention.key_length") or hidden // heads,
        "max_position_embeddings": file["context_length"],
        "rms_norm_eps": file["attention.layer_norm_rms_epsilon"],
        "rope_theta": file.get("rope.freq_base") or 10000.0,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_rope_scaling(file),
    }
    if model_type == "llama":
        config |= {
            "attention_bias": "blk.0.attn_q.bias" in file.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        }
    if model_type == "mixtral":
        config |= {"num_local_experts": file["expert_count"], "num_experts_per_tok": file["expert_used_count"]}
    if model_type == "qwen3_moe":
        config |= {"num_experts": file["expert_count"], "num_experts_per_tok": file["expert_used_count"]}
        config |= {"moe_intermediate_size": file["expert_feed_forward_length"], "norm_topk_prob": True}
    if model_type.startswith("gemma"):
        config |= {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    if model_type == "gemma2":
        config |= {
            "attn_logit_softcapping": file["attn_logit_softcapping"],
            "final_logit_softcapping": file["final_logit_softcapping"],
            "sliding_window": file["attention.sliding_window"],
            # As llama.cpp has it, which takes the width of a head but in the largest model.
            "query_pre_attn_scalar": hidden // heads if config["num_hidden_layers"] == 46 else config["head_dim"],
        }
    return config


def _rope_scaling(file: _File) -> dict[str, Any]:
    kind = file.get("rope.scaling.type") or "none"
    if "rope_freqs.weight" in file.tensors:
        return {"rope_scaling": _llama3(file)}
    if kind == "none":
        return {}
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": file["rope.scaling.factor"]}}
    if kind == "yarn" and file.get("rope.scaling.attn_factor") is None:
        names = {"factor": "factor", "original_max_position_embeddings": "original_context_length"}
        names |= {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        given = {name: file.get(f"rope.scaling.{field}") for name, field in names.items()}
        return {"rope_scaling": {"rope_type": "yarn"} | {k: v for k, v in given.items() if v is not None}}
    raise ValueError(
        f"{file.path}: the rope scaling {kind!r} cannot be converted; known are linear, yarn and Llama 3's"
    )


def _llama3(file: _File) -> dict[str, Any]:
    """The parameters of Llama 3's rotation whose factors are those of the file; `_check_rotation` compares them."""
    largest = float(np.max(file.tensors["rope_freqs.weight"].data))
    factor = min(_LLAMA3_FACTORS, key=lambda factor: abs(factor - largest))
    parameters = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **parameters}


def _check_rotation(file: _File, wanted: Mapping[str, np.ndarray]) -> None:
    for name in {"rope_freqs.weight"} & (file.tensors.keys() | wanted.keys()):
        got = file.tensors.get(name)
        # a quotient of two float32, here and there
        if got is None or name not in wanted or not np.allclose(got.data, wanted[name], rtol=1e-5):
            raise ValueError(f"{file.path}: the factors of the rotation ({name}) are not those of a published Llama 3")


def _only(found: list[Piece]) -> Piece:
    (piece,) = found
    return piece


def _check_tensors(file: _File, places: Mapping[str, Piece]) -> None:
    """Raises ValueError if the file does not hold exactly the tensors of the model."""
    counts: dict[str, int] = {}
    for piece in places.values():
        counts[piece.name] = counts.get(piece.name, 0) + 1
    if missing := sorted(counts.keys() - file.tensors.keys()):
        raise ValueError(f"{file.path} lacks {len(missing)} tensors of the model: {', '.join(missing[:3])}")
    if unknown := sorted(file.tensors.keys() - counts.keys() - {"rope_freqs.weight"}):
        raise ValueError(f"{file.path} holds {len(unknown)} tensors that are not known: {', '.join(unknown[:3])}")
    for piece in places.values():
        want = piece.shape if piece.expert is None else (counts[piece.name], *piece.shape)
        got = tuple(int(n) for n in reversed(file.tensors[piece.name].shape))
        if got != want:
            raise ValueError(f"{file.path}: {piece.name} has shape {list(got)}, its fields ask for {list(want)}")


def _values(file: _File, piece: Piece) -> Iterator[np.ndarray]:
    """A tensor as Hugging Face has it, float32, some rows at a time."""
    tensor = file.tensors[piece.name]
    data = tensor.data if piece.expert is None else tensor.data[piece.expert]
    # `reorder` moves rows and adds a number; what it makes of 0 and of the rows' numbers tells both.
    n, rest = piece.shape[0], (1,) * (len(piece.shape) - 1)
    added = np.float32(piece.reorder(np.zeros((n, *rest), np.float32)).reshape(-1)[0])
    order = (piece.reorder(np.arange(n, dtype=np.float32).reshape(n, *rest)).reshape(-1) - added).astype(np.int64)
    where = np.empty(n, np.int64)
    where[order] = np.arange(n)
    rows = max(1, _BLOCK // math.prod(piece.shape[1:]))
    for start in range(0, n, rows):
        chosen = np.ascontiguousarray(data[where[start : start + rows]])
        try:
            values = gguf.quants.dequantize(chosen, tensor.tensor_type)
        except NotImplementedError:
            raise ValueError(f"{file.path}: {piece.name} is {tensor.tensor_type.name}, which is not known") from None
        yield values.astype(np.float32, copy=False) - added
