"""Writes safetensors files one tensor at a time; the library's own writer wants all tensors of a file in memory."""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

__all__ = ["write_checkpoint", "write_file"]

_INDEX = "model.safetensors.index.json"
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_checkpoint(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: np.dtype,
    max_shard_bytes: int,
) -> None:
    """Writes model.safetensors, or numbered shards and their index, and reads every byte back.

    Args:
      folder: existing folder.
      shapes: every tensor's shape by name; they are written in this order.
      read: gives a tensor in `dtype`; called once for each.
      dtype: of all tensors.
      max_shard_bytes: a file grows to this size at most, unless one tensor alone is larger.

    Raises:
      OSError: a file does not hold what was written to it.
    """
    shards = _split(shapes, dtype.itemsize, max_shard_bytes)
    total = len(shards)
    files = ["model.safetensors" if total == 1 else f"model-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    for file, names in zip(files, shards, strict=True):
        write_file(folder / file, {name: shapes[name] for name in names}, read, dtype)
    if total > 1:
        size = sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        n_bytes = int(np.prod(shape)) * itemsize
        if shards[-1] and size + n_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n_bytes
    return shards


def write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], dtype: np.dtype
) -> None:
    """Writes one file and reads it back; arguments and errors as in `write_checkpoint`.

    The format: length of the header (8 bytes, little endian), header as JSON, then the tensors' bytes.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype.name], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data, which should be aligned
    checksums = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = np.ascontiguousarray(read(name))
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(f"{name}: want {shape} {dtype}, got {tensor.shape} {tensor.dtype}")
            data = tensor.reshape(-1).view(np.uint8)
            file.write(data)
            checksums[name] = zlib.crc32(data)
    _verify(path, checksums)


def _verify(path: Path, checksums: dict[str, int]) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="numpy", backend="pread") as file:
        for name, checksum in checksums.items():
            if zlib.crc32(np.ascontiguousarray(file.get_tensor(name)).reshape(-1).view(np.uint8)) != checksum:
                raise OSError(f"{path}: {name} does not read back as it was written; the disk may be failing")
