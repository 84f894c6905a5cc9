"""Importance matrices as llama.cpp's llama-imatrix writes them: for each linear layer, how large its inputs are."""

import struct
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

__all__ = ["Imatrix", "read_imatrix"]


@dataclass(frozen=True)
class Imatrix:
    """Mean squares of the inputs of linear layers."""

    path: Path
    weights: dict[str, np.ndarray]  # name of the tensor in the file -> float32 [K], or of each expert [E, K]
    dataset: str | None  # what it was computed on
    chunks: int  # on how many pieces of text

    def of(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The weights for a tensor of this shape, [K] or [E, K]; None if there are none.

        Raises ValueError if they are of another shape, except for the embedding, whose rows are looked up.
        """
        weights = self.weights.get(name)
        if weights is None:
            return None
        experts = shape[0] if len(shape) == 3 else 1
        if weights.size != experts * shape[-1]:
            if name == "token_embd.weight":
                return None
            raise ValueError(
                f"{self.path} has {weights.size} values for {name}, wanted {experts} x {shape[-1]}: "
                "it belongs to another model"
            )
        return weights.reshape(experts, -1) if len(shape) == 3 else weights.reshape(-1)


def read_imatrix(path: str | Path) -> Imatrix:
    """Read llama-imatrix' output, a GGUF file or (until 2025) one of its own format.

    Raises ValueError for a file that is neither, is cut off, or holds values that are not finite; OSError if it cannot
    be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    try:
        weights, dataset, chunks = (_read_gguf if is_gguf else _read_dat)(path)
    except (ValueError, IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        what = "is not a whole importance matrix of llama-imatrix"
        raise ValueError(f"{path} {what} ({error}); make it again, or take another file") from error
    for name, values in weights.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{path} holds NaN or infinity for {name}; make it again")
    return Imatrix(path, weights, dataset, chunks)


def _read_gguf(path: Path) -> tuple[dict[str, np.ndarray], str | None, int]:
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in reader.tensors}
    weights = {}
    for name in (name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")):
        sums, counts = tensors[f"{name}.in_sum2"].reshape(-1), tensors[f"{name}.counts"].reshape(-1, 1)
        sums, counts = sums.reshape(len(counts), -1), np.round(counts)
        # an expert that was never chosen weighs all its inputs alike
        weights[name] = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32)
    if not weights:
        raise ValueError("it has no sums of squares")
    fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("imatrix.")}
    for key in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"):
        if key not in fields:
            raise ValueError(f"it has no field {key}")
    datasets = fields["imatrix.datasets"]
    return weights, datasets[0] if datasets else None, int(fields["imatrix.chunk_count"])


def _read_dat(path: Path) -> tuple[dict[str, np.ndarray], str | None, int]:
    data = path.read_bytes()
    parts = _Reader(data)
    weights = {}
    entries = parts.integer()
    if entries < 1:
        raise ValueError(f"it says to have {entries} entries")
    for _ in range(entries):
        name = parts.text()
        calls, count = parts.integer(), parts.integer()
        if count < 1:
            raise ValueError(f"{name} has {count} values")
        values = np.frombuffer(parts.take(4 * count), "<f4")
        weights[name] = values / np.float32(calls) if calls > 0 else values
    chunks = parts.integer() if parts.left() else 0
    return weights, parts.text() if parts.left() else None, chunks


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int) -> bytes:
        if count < 0 or count > self.left():
            raise ValueError(f"{count} bytes are wanted at {self.at}, {self.left()} are there")
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self) -> int:
        return struct.unpack("<i", self.take(4))[0]

    def text(self) -> str:
        return self.take(self.integer()).decode()
