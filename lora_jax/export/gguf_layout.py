"""Where each tensor of a model stands in a GGUF file: its name there, and the order of its values.

The order is that of llama.cpp's own converter. Most tensors are as Hugging Face has them, but for these:

* queries and keys of families whose rotation turns neighbouring features: rows of a head are interleaved;
* Gemma's norms are stored as 1 + weight;
* the experts of a layer are one tensor for each of their linear layers, [experts, N, K];
* DeepSeek's `kv_b_proj` is two, since llama.cpp multiplies it into queries and results of attention instead of making
  keys and values (the absorption of arXiv 2405.04434, section 2.1.2): `attn_k_b` [heads, rank, features of a key],
  which is transposed, and `attn_v_b` [heads, features of a value, rank].
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import gguf
import numpy as np

__all__ = ["Layout", "Piece", "pieces", "unchanged"]

# Rows of q and k are permuted where llama.cpp rotates neighbouring features instead of halves of a head.
_PERMUTED = ("llama", "mistral3", "smollm3", "granite")
_PLUS_ONE = ("gemma", "gemma2", "gemma3")  # llama.cpp multiplies by the weight; Hugging Face's weight is one less


@dataclasses.dataclass(frozen=True)
class Layout:
    """What of a model decides where its tensors go."""

    architecture: str  # llama.cpp's name
    layers: int
    heads: int
    kv_heads: int
    latent: tuple[int, int] | None = None  # features, of each head, that `kv_b_proj` makes for keys and for values


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor of the model, or a part of it, in the file."""

    name: str  # of the file's tensor
    expert: int | None  # its place in that, which is a stack; None if it is the whole
    shape: tuple[int, ...]  # in the file
    reorder: Callable[[np.ndarray], np.ndarray]  # Hugging Face's values -> the file's, of that shape; or `unchanged`


def pieces(hf_name: str, shape: tuple[int, ...], layout: Layout) -> list[Piece]:
    """Where a tensor of Hugging Face's name and shape goes; nowhere if it is computed from the configuration.

    Raises ValueError for a name that the architecture does not have.
    """
    if hf_name.endswith("rotary_emb.inv_freq"):
        return []
    if hf_name.endswith("kv_b_proj.weight") and layout.latent is not None:
        return _keys_and_values(hf_name, shape[-1], layout)
    expert = re.search(r"\.experts\.(\d+)\.", hf_name)
    name = _name(hf_name if expert is None else hf_name.replace(expert[0], ".experts.", 1), hf_name, layout)
    return [Piece(name, None if expert is None else int(expert[1]), shape, _order(name, layout))]


def _name(stacked: str, hf_name: str, layout: Layout) -> str:
    name = stacked.replace("model.language_model.", "model.", 1)
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    if name.endswith(".sinks"):
        name += ".weight"
    found = None
    if name.endswith((".weight", ".bias")):
        found = _name_map(layout.architecture, layout.layers).get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ValueError(
            f"tensor {hf_name!r} has no place in a GGUF file of the {layout.architecture} architecture with "
            f"{layout.layers} layers; merge adapters first"
        )
    return found


@functools.cache
def _name_map(architecture: str, layers: int) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map({name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], layers)


def _order(name: str, layout: Layout) -> Callable[[np.ndarray], np.ndarray]:
    heads = {"attn_q": layout.heads, "attn_k": layout.kv_heads}.get(name.split(".")[-2])
    if heads is not None and layout.architecture in _PERMUTED:
        return functools.partial(_interleaved, heads)
    if name.endswith("norm.weight") and layout.architecture in _PLUS_ONE:
        return lambda weight: weight + np.float32(1)
    return unchanged


def unchanged(values: np.ndarray) -> np.ndarray:
    """The values: any part of them is the same part in the file."""
    return values


def _interleaved(heads: int, values: np.ndarray) -> np.ndarray:
    """Hugging Face rotates dimension j with j + half, llama.cpp neighbours: [2, half] becomes [half, 2]."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _keys_and_values(hf_name: str, rank: int, layout: Layout) -> list[Piece]:
    assert layout.latent is not None
    key, value = layout.latent

    def keys(weight: np.ndarray) -> np.ndarray:
        return weight.reshape(layout.heads, key + value, rank)[:, :key].swapaxes(1, 2)

    def values(weight: np.ndarray) -> np.ndarray:
        return weight.reshape(layout.heads, key + value, rank)[:, key:]

    return [
        Piece(_name(hf_name.replace("kv_b_proj", linear), hf_name, layout), None, (layout.heads, *matrix), reorder)
        for linear, matrix, reorder in (("k_b_proj", (rank, key), keys), ("v_b_proj", (value, rank), values))
    ]
