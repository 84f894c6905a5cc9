"""Checkpoints that hold all experts of a layer in one tensor, read and written as if each had its own.

The model has a tensor for each linear of each expert, and so have most published mixtures of experts. The classes of
transformers 5 hold the experts of a layer in two, and may write them so:

    mlp.experts.gate_up_proj [E, 2 F, D], rows of the gate, then rows of up; mlp.experts.down_proj [E, D, F].

gpt-oss is published so, with biases, axes exchanged ([E, D, 2 F], [E, F, D]) and gate and up taking turns; or in MXFP4
(Open Compute Project, "OCP Microscaling Formats (MX)", 1.0): `_blocks` [E, N, K / 32, 16] hold two numbers of 4 bits a
byte, the first in the low bits, and `_scales` [E, N, K / 32] one power of two for 32 of them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np

__all__ = ["BLOCKS", "SCALES", "Part", "assemble", "decode_mxfp4", "parts_of", "renamed"]

BLOCKS, SCALES = "_blocks", "_scales"
# The numbers of sign, two bits of exponent and one of mantissa.
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of the model that is a part of one in the files: `whole[expert]`, or some of its rows."""

    whole: str  # its name in the files
    expert: int
    rows: slice = slice(None)  # of the expert's matrix [N, K] or bias [N]
    transposed: bool = False  # the files hold the matrix as [K, N]

    def take(self, expert: np.ndarray) -> np.ndarray:
        """The part of the expert's array, as it is in the files."""
        return np.ascontiguousarray((expert.T if self.transposed else expert)[self.rows])

    def put(self, whole: np.ndarray, part: np.ndarray) -> None:
        """Writes the part into its place."""
        expert = whole[self.expert]
        (expert.T if self.transposed else expert)[self.rows] = part

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part of a tensor of that shape."""
        return self.take(np.broadcast_to(np.uint8(0), whole[1:])).shape


def parts_of(
    names: Iterable[str], shape: Callable[[str], tuple[int, ...]], architecture: str | None
) -> dict[str, Part]:
    """The tensors of single experts, by the model's names, that are parts of tensors in the files.

    Args:
      names: of the tensors in the files, those in MXFP4 without their endings.
      shape: gives the shape of one of them, or the one it would have if it were not in MXFP4.
      architecture: Hugging Face's class name.
    """
    gate, up, down = (
        ("w1", "w3", "w2") if architecture == "MixtralForCausalLM" else ("gate_proj", "up_proj", "down_proj")
    )
    gpt_oss = architecture == "GptOssForCausalLM"
    parts = {}
    for name in names:
        block, _, tensor = name.rpartition(".")
        if not block.endswith(".experts") or tensor.removesuffix("_bias") not in ("gate_up_proj", "down_proj"):
            continue
        attribute = "bias" if tensor.endswith("_bias") else "weight"
        transposed = gpt_oss and attribute == "weight"
        experts, *matrix = shape(name)
        n = matrix[1 if transposed else 0]
        if tensor.startswith("down_proj"):
            rows = {down: slice(None)}
        elif gpt_oss:
            rows = {gate: slice(0, n, 2), up: slice(1, n, 2)}
        else:
            rows = {gate: slice(0, n // 2), up: slice(n // 2, n)}
        for expert in range(experts):
            for linear, own in rows.items():
                part = Part(name, expert, own, transposed)
                parts[f"{renamed(block, architecture)}.{expert}.{linear}.{attribute}"] = part
    return parts


def renamed(name: str, architecture: str | None) -> str:
    """The name in published files of a tensor of the class: Mixtral has had others before transformers 5."""
    return name.replace(".mlp.", ".block_sparse_moe.") if architecture == "MixtralForCausalLM" else name


def assemble(parts: Mapping[str, Part], shape: tuple[int, ...], read: Callable[[str], np.ndarray]) -> np.ndarray:
    """A tensor of the files, float32, from its parts (the model's name of each -> Part)."""
    whole = np.empty(shape, np.float32)
    for name, part in parts.items():
        part.put(whole, read(name))
    return whole


def decode_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """blocks uint8 [N, K / 32, 16] and scales uint8 [N, K / 32], exponents plus 127 -> bfloat16 [N, K], exact."""
    values = np.stack([_FP4[blocks & 15], _FP4[blocks >> 4]], axis=-1).reshape(*scales.shape, 32)
    return (
        np.ldexp(values, scales[..., None].astype(np.int32) - 127).reshape(len(scales), -1).astype(ml_dtypes.bfloat16)
    )
