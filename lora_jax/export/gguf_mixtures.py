"""Types of GGUF files, by name, and which tensor has which type in each: llama.cpp's mixtures.

A mixture gives more bits to the tensors whose errors cost most: the head, values of attention, `ffn_down`, and first
and last layers. The rules are those of llama.cpp's src/llama-quant.cpp (`llama_tensor_get_type`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import gguf
from gguf import GGMLQuantizationType as GgmlType
from gguf import LlamaFileType as FileType

from lora_jax.config import did_you_mean

__all__ = ["FILE_TYPES", "MixedModel", "file_types", "tensor_types"]

# Name -> (llama.cpp's file type, type of most tensors).
FILE_TYPES = {
    "f32": (FileType.ALL_F32, GgmlType.F32),
    "f16": (FileType.MOSTLY_F16, GgmlType.F16),
    "bf16": (FileType.MOSTLY_BF16, GgmlType.BF16),
    "q8_0": (FileType.MOSTLY_Q8_0, GgmlType.Q8_0),
    "q6_k": (FileType.MOSTLY_Q6_K, GgmlType.Q6_K),
    "q5_k_m": (FileType.MOSTLY_Q5_K_M, GgmlType.Q5_K),
    "q5_k_s": (FileType.MOSTLY_Q5_K_S, GgmlType.Q5_K),
    "q5_1": (FileType.MOSTLY_Q5_1, GgmlType.Q5_1),
    "q5_0": (FileType.MOSTLY_Q5_0, GgmlType.Q5_0),
    "q4_k_m": (FileType.MOSTLY_Q4_K_M, GgmlType.Q4_K),
    "q4_k_s": (FileType.MOSTLY_Q4_K_S, GgmlType.Q4_K),
    "q4_1": (FileType.MOSTLY_Q4_1, GgmlType.Q4_1),
    "q4_0": (FileType.MOSTLY_Q4_0, GgmlType.Q4_0),
    "q3_k_l": (FileType.MOSTLY_Q3_K_L, GgmlType.Q3_K),
    "q3_k_m": (FileType.MOSTLY_Q3_K_M, GgmlType.Q3_K),
    "q3_k_s": (FileType.MOSTLY_Q3_K_S, GgmlType.Q3_K),
    "q2_k": (FileType.MOSTLY_Q2_K, GgmlType.Q2_K),
    "q2_k_l": (FileType.MOSTLY_Q2_K, GgmlType.Q2_K),  # with embedding and head in Q8_0
}
# llama.cpp's and Unsloth's. llama.cpp's mixture of the name Q3_K_XS is no more; Q3_K_S is the next larger.
_ALIASES = {
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "q3_k": "q3_k_m",
    "q3_k_xs": "q3_k_s",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "fp16": "f16",
    "fp32": "f32",
}
# What stands in for a type whose blocks of 256 do not divide a row.
_IN_BLOCKS_OF_32 = {
    GgmlType.Q2_K: GgmlType.Q4_0,
    GgmlType.Q3_K: GgmlType.Q4_0,
    GgmlType.Q4_K: GgmlType.Q5_0,
    GgmlType.Q5_K: GgmlType.Q5_1,
    GgmlType.Q6_K: GgmlType.Q8_0,
}
_PLAIN = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class MixedModel:
    """What of a model decides its mixture."""

    architecture: str  # llama.cpp's
    layers: int
    heads: int
    kv_heads: int  # as in the file: 1 for latent attention
    experts: int  # of a layer; 0 without

    @property
    def queries_per_key(self) -> int:
        """Heads that share a key and value."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for one of 70B, whose values are few: it knows them by their layers."""
        if self.architecture == "llama":
            return self.layers == 80 and self.experts != 8 and self.heads != self.kv_heads
        return self.architecture == "qwen2" and self.layers == 80


def file_types(names: str | Sequence[str] | None, dtype: str = "bf16") -> list[str]:
    """Names that users know to the keys of `FILE_TYPES`, each once, in their order.

    Args:
      names: llama.cpp's or Unsloth's, in either case; None stands for all there are.
      dtype: what "not_quantized" means.

    Raises ValueError for a name that is not known, and for types that need llama.cpp's own tables (IQ, TQ).
    """
    if names is None:
        return list(FILE_TYPES)
    found = []
    for given in [names] if isinstance(names, str) else names:
        name = str(given).lower().replace("-", "_")
        name = dtype if name == "not_quantized" else _ALIASES.get(name, name)
        if name not in FILE_TYPES:
            codebook = re.match(r"(iq\d|tq\d|mxfp4|nvfp4)", name)
            why = "is one of the types that are not written here" if codebook else "is not known"
            advice = ", ".join([*FILE_TYPES, *_ALIASES, "not_quantized"])
            more = "; write f16 and use llama-quantize with an importance matrix" if codebook else ""
            hint = "" if codebook else f".{did_you_mean(name, [*FILE_TYPES, *_ALIASES])}"
            raise ValueError(f"GGUF file type {given!r} {why}; choose one of {advice}{more}{hint}")
        if name not in found:
            found.append(name)
    if not found:
        raise ValueError(f"no GGUF file type was given; choose one of {', '.join(FILE_TYPES)}")
    return found


def tensor_types(
    file_type: str, shapes: Mapping[str, tuple[int, ...]], model: MixedModel, weighted: bool = False
) -> tuple[dict[str, GgmlType], dict[str, GgmlType]]:
    """(type of each tensor of the file, what the mixture wants for those that have another for their width).

    Args:
      file_type: a key of `FILE_TYPES`.
      shapes: of all tensors, by their names in the file, the last axis being that of a row.
      model: its shape.
      weighted: whether there is an importance matrix.
    """
    mixture = _Mixture(file_type, shapes, model, weighted)
    types, fallbacks = {}, {}
    for name in sorted(shapes, key=lambda name: (_layer(name), name)):  # llama.cpp's order, which it counts in
        if not is_narrowed(name, shapes[name]):
            types[name] = GgmlType.F32
            continue
        wanted = mixture.type_of(name)
        types[name] = _that_fits(wanted, shapes[name][-1])
        if types[name] != wanted:
            fallbacks[name] = wanted
    return types, fallbacks


def is_narrowed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is in the type of the file; the others are float32, as llama.cpp wants them."""
    return len(shape) > 1 and name.endswith(".weight") and not re.search(r"_norm\.|\.ffn_gate_inp(_shexp)?\.", name)


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _that_fits(type: GgmlType, width: int) -> GgmlType:
    if width % gguf.GGML_QUANT_SIZES[type][0]:
        type = _IN_BLOCKS_OF_32.get(type, type)
    return GgmlType.F16 if width % gguf.GGML_QUANT_SIZES[type][0] else type


class _Mixture:
    """Asked for the tensors in llama.cpp's order: it counts those of each kind."""

    def __init__(self, file_type: str, shapes: Mapping[str, tuple[int, ...]], model: MixedModel, weighted: bool):
        self.name, self.shapes, self.model, self.weighted = file_type, shapes, model, weighted
        self.main = FILE_TYPES[file_type][1]
        self.tied = "output.weight" not in shapes
        self.values = sum(_kind(name) == "values" for name in shapes)
        self.values_seen = self.down_seen = 0

    def type_of(self, name: str) -> GgmlType:
        kind = _kind(name)
        if self.name in _PLAIN:
            return self.main
        if kind == "head" or (kind == "embedding" and self.tied):
            return self._head(name)
        if kind == "embedding":
            return GgmlType.Q8_0 if self.name == "q2_k_l" else self.main
        if kind == "values":
            return self._values()
        if kind == "keys":
            return GgmlType.Q8_0 if self.model.experts == 8 else self.main
        if kind == "down":
            return self._down(name)
        return self._attention_output() if kind == "attention output" else self.main

    def _head(self, name: str) -> GgmlType:
        if self.name == "q2_k_l" or self.main == GgmlType.Q8_0:
            return GgmlType.Q8_0
        divides = self.shapes[name][-1] % gguf.GGML_QUANT_SIZES[self.main][0] == 0
        return GgmlType.Q6_K if divides else GgmlType.Q8_0

    def _values(self) -> GgmlType:
        type, index = self.main, self.values_seen
        self.values_seen += 1
        if self.name in ("q2_k", "q2_k_l"):
            type = GgmlType.Q4_K if self.model.queries_per_key >= 4 else GgmlType.Q3_K
        elif self.name == "q3_k_m":
            type = GgmlType.Q5_K if index < 2 else GgmlType.Q4_K
        elif self.name == "q3_k_l" or (self.name == "q4_k_s" and index < 4):
            type = GgmlType.Q5_K
        elif self.name in ("q4_k_m", "q5_k_m") and _more_bits(index, self.values):
            type = GgmlType.Q6_K
        if self.model.is_70b and type in (GgmlType.Q3_K, GgmlType.Q4_K):
            type = GgmlType.Q5_K
        return GgmlType.Q8_0 if self.model.experts == 8 else type

    def _down(self, name: str) -> GgmlType:
        layers = self.model.layers
        # the experts of a layer, and the shared one, are of one layer
        layer = _layer(name) if self.model.experts > 1 else self.down_seen
        self.down_seen += 1
        if self.name in ("q2_k", "q2_k_l"):
            return GgmlType.Q3_K
        if self.name == "q3_k_m":
            return GgmlType.Q5_K if layer < layers // 16 else GgmlType.Q4_K
        if self.name == "q3_k_l" or (self.name == "q4_k_s" and layer < layers // 8):
            return GgmlType.Q5_K
        if self.name in ("q4_k_m", "q5_k_m") and _more_bits(layer, layers):
            return GgmlType.Q6_K
        if self.weighted and layer < layers // 8:
            return {"q4_0": GgmlType.Q4_1, "q5_0": GgmlType.Q5_1}.get(self.name, self.main)
        return self.main

    def _attention_output(self) -> GgmlType:
        if self.model.experts == 8:
            small = ("q2_k", "q2_k_l", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m")
            return GgmlType.Q5_K if self.name in small else self.main
        types = {"q2_k": GgmlType.Q3_K, "q2_k_l": GgmlType.Q3_K, "q3_k_m": GgmlType.Q4_K, "q3_k_l": GgmlType.Q5_K}
        return types.get(self.name, self.main)


def _kind(name: str) -> str:
    if name == "output.weight":
        return "head"
    if name == "token_embd.weight":
        return "embedding"
    # Queries, keys and values in one (Phi-3) count as values.
    parts = (
        ("values", r"attn_(qkv|kv_b|v)\.weight"),
        ("keys", r"attn_k\.weight"),
        ("attention output", r"attn_output\.weight"),
        ("down", "ffn_down"),
    )
    return next((kind for kind, pattern in parts if re.search(pattern, name)), "other")


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
