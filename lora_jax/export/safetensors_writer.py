"""Writes safetensors files some rows at a time; the library's own writer wants all tensors of a file in memory."""

import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Contents", "in_rows", "write_checkpoint", "write_file"]

_INDEX = "model.safetensors.index.json"
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}
_BLOCK = 1 << 22  # elements read back at a time


@dataclass(frozen=True)
class Contents:
    """Tensors to write, in this order, and how their values are had."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    blocks: Callable[[str], Iterable[np.ndarray]]  # of a tensor, some entries of its first axis at a time

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor."""
        return {name: math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items()}


def write_checkpoint(folder: Path, contents: Contents, max_shard_bytes: int) -> None:
    """Writes model.safetensors, or numbered shards and their index, and reads every byte back.

    Args:
      folder: existing folder.
      contents: what to write; the values of each tensor are asked for once.
      max_shard_bytes: a file grows to this size at most, unless one tensor alone is larger.

    Raises:
      OSError: a file does not hold what was written to it.
    """
    sizes = contents.sizes
    shards = _split(sizes, max_shard_bytes)
    total = len(shards)
    files = ["model.safetensors" if total == 1 else f"model-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    for file, names in zip(files, shards, strict=True):
        write_file(folder / file, replace(contents, shapes={name: contents.shapes[name] for name in names}))
    if total > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, n_bytes in sizes.items():
        if shards[-1] and size + n_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n_bytes
    return shards


def write_file(path: Path, contents: Contents) -> None:
    """Writes one file and reads it back; raises as `write_checkpoint`.

    The format: length of the header (8 bytes, little endian), header as JSON, then the tensors' bytes.
    """
    shapes, dtypes = contents.shapes, contents.dtypes
    sizes = contents.sizes
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + sizes[name]
        header[name] = {"dtype": _NAMES[dtypes[name].name], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data, which should be aligned
    checksums = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            checksums[name] = rows = 0
            for block in contents.blocks(name):
                if block.shape[1:] != shape[1:] or block.dtype != dtypes[name]:
                    raise ValueError(f"{name}: want rows of {shape} {dtypes[name]}, got {block.shape} {block.dtype}")
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
                file.write(data)
                checksums[name] = zlib.crc32(data, checksums[name])
                rows += len(block)
            if rows != (shape[0] if shape else 1):
                raise ValueError(f"{name}: want {shape}, got {rows} rows")
    _verify(path, checksums)


def _verify(path: Path, checksums: dict[str, int]) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="numpy", backend="pread") as file:
        for name, checksum in checksums.items():
            got = 0
            for block in in_rows(file, name):
                got = zlib.crc32(np.ascontiguousarray(block).reshape(-1).view(np.uint8), got)
            if got != checksum:
                raise OSError(f"{path}: {name} does not read back as it was written; the disk may be failing")


def in_rows(file: Any, name: str) -> Iterator[np.ndarray]:
    """A tensor of an open file, some entries of its first axis at a time."""
    tensor = file.get_slice(name)
    shape = tensor.get_shape()
    if not shape:
        yield file.get_tensor(name)[None]
        return
    rows = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield tensor[start : min(start + rows, shape[0])]
