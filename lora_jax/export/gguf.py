"""Export to GGUF, the file format of llama.cpp.

A GGUF file holds metadata (shape of the model, tokenizer, chat template) and then the tensors. Some rows of a tensor at
a time, the source is read, converted to each type asked for and written to every file, so that memory holds one tensor
as its source has it, whatever the number of files. The finished files are read back and compared with the source in the
same way before they take their names.

File types are those of `gguf_mixtures.FILE_TYPES`: "f32", "f16", "bf16", "q8_0", and those of 2 to 6 bits, whose blocks
are llama-quantize's (see `gguf_quants`), as is the choice which tensor gets more bits. As in llama.cpp's own converter,
norms, biases and routers are float32 in all of them.
"""

import collections
import contextlib
import errno
import functools
import glob
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lora_jax.export.gguf_imatrix import Imatrix, read_imatrix
from lora_jax.export.gguf_layout import Layout, Piece, pieces, unchanged
from lora_jax.export.gguf_metadata import (
    ModelShape,
    add_model,
    add_tokenizer,
    model_shape,
    rope_factors,
    unsupported,
)
from lora_jax.export.gguf_mixtures import FILE_TYPES, MixedModel, file_types, tensor_types
from lora_jax.export.gguf_quants import quantize
from lora_jax.export.gguf_tokenizer import GgufTokenizer, read_tokenizer
from lora_jax.export.hf import copy_small_files
from lora_jax.export.merge import merged_tensors
from lora_jax.models.decoder import Decoder
from lora_jax.reporting import console, say

if TYPE_CHECKING:
    from lora_jax.model import CausalLM

__all__ = [
    "FILE_TYPES",
    "TensorSource",
    "file_types",
    "save_gguf",
    "save_ggufs",
    "verify_gguf",
    "write_gguf",
    "write_ggufs",
]

_CHUNK, _GPU_CHUNK = 1 << 20, 1 << 22  # elements converted at a time; a GPU is given as many as it takes at once
_AT_ONCE = 3  # chunks of a GPU: one is copied to it, one computed, one copied back
_COMPARED = 1 << 19  # elements compared at a time, which takes ten arrays of them
_F16_MAX = 65504.0
# Largest error of a type without importance: a share of the block's largest magnitude (half as much again as the worst
# found in blocks from smooth to nearly all zero; a search for the least square lets single values go), and what half a
# unit of a subnormal float16 scale makes with the largest codes.
_SHARES = {
    GgmlType.Q4_0: (0.14, 8),
    GgmlType.Q4_1: (0.08, 16),
    GgmlType.Q5_0: (0.07, 16),
    GgmlType.Q5_1: (0.04, 32),
    GgmlType.Q2_K: (0.93, 60),
    GgmlType.Q3_K: (0.4, 128),
    GgmlType.Q4_K: (0.18, 1008),
    GgmlType.Q5_K: (0.09, 2016),
    GgmlType.Q6_K: (0.035, 4096),
}
_SHARE_WEIGHTED = 1.25  # a value of no importance may be given up, or even overshot


class TensorSource(Protocol):
    """One tensor of the model, read when it is needed.

    It may have `blocks() -> iterator of np.ndarray`, too, the values some rows (entries of the first axis) at a time.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that `read` returns."""
        ...

    def read(self) -> np.ndarray:
        """The values, float32."""
        ...


@dataclass(frozen=True)
class _Part:
    """A tensor of the model that is one of the file's, or one expert's share of it."""

    hf_name: str
    source: TensorSource
    piece: Piece


@dataclass(frozen=True)
class _Planned:
    """One tensor of the files to write."""

    name: str  # in the GGUF
    parts: list[_Part]  # one, or one for each expert

    @property
    def stacked(self) -> bool:
        return self.parts[0].piece.expert is not None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.parts[0].piece.shape
        return (len(self.parts), *shape) if self.stacked else shape

    def nbytes(self, type: GgmlType) -> int:
        block, block_bytes = gguf.GGML_QUANT_SIZES[type]
        return math.prod(self.shape) // block * block_bytes


@dataclass(frozen=True)
class _Computed:
    """A tensor that is not in the checkpoint."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self) -> np.ndarray:
        return self.values


def save_gguf(
    model: "CausalLM",
    folder: Path,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "f16",
    **options: Any,
) -> list[Path]:
    """As `save_ggufs`; returns the files, in the order of the types; all parts of those that are split."""
    written = save_ggufs(model, folder, tokenizer, quantization_method, **options)
    return [path for files in written.values() for path in files]


def save_ggufs(
    model: "CausalLM",
    folder: Path,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "f16",
    *,
    merge_base: str = "dequantized",
    overwrite: bool = False,
    verbose: bool = True,
    imatrix: str | os.PathLike[str] | None = None,
    max_shard_size: int | str | None = None,
    device: Any = None,
) -> dict[str, list[Path]]:
    """Writes base and adapter merged into one model, as one GGUF file for each type asked for, all in one pass.

    Args:
      model: it is not changed.
      folder: where to; made if it does not exist. Files are named after the model and the type.
      tokenizer: only its chat template is used, if it is not the one of the source.
      quantization_method: a type's name or several, as `file_types` understands them: "f16", "q8_0", "q4_k_m" ...;
        also Unsloth's "not_quantized", "fast_quantized", "quantized".
      merge_base: "dequantized" or "original", see `lora_jax.export.merge`.
      overwrite: replace files that exist.
      verbose: show progress.
      imatrix, max_shard_size, device: as `write_ggufs`.

    Returns the parts of the file of each type, a key of `FILE_TYPES`.

    Raises:
      FileExistsError: a file of that name exists and `overwrite` is False.
      ValueError, OSError: as `write_ggufs`.
    """
    stored = str(model.hf_config.get("torch_dtype") or model.hf_config.get("dtype") or "bfloat16")
    types = file_types(quantization_method, {"float16": "f16", "float32": "f32"}.get(stored, "bf16"))
    base = Path(model.name_or_path).name
    paths = {name: folder / f"{base}.{name.upper()}.gguf" for name in types}
    parts = (old for path in paths.values() for old in (path, *_shards_of(path)))
    if not overwrite and (existing := [path for path in parts if path.exists()]):
        raise FileExistsError(f"{existing[0]} exists; choose another folder or pass overwrite=True")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(error.errno, f"{folder} cannot be written ({error.strerror}); choose another place") from None
    tensors = merged_tensors(model, merge_base)
    with tempfile.TemporaryDirectory() as small:
        copy_small_files(model.source, Path(small), tokenizer)
        # transformers reads from it which class of tokenizer to make, which may add tokens
        (Path(small) / "config.json").write_text(json.dumps(model.hf_config), encoding="utf-8")
        options = {"imatrix": imatrix, "max_shard_size": max_shard_size, "device": device}
        return write_ggufs(paths, tensors, model.hf_config, small, name=base, progress=verbose, **options)


def write_gguf(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorSource],
    hf_config: Mapping[str, Any],
    tokenizer_dir: str | os.PathLike[str],
    file_type: str,
    **options: Any,
) -> Path:
    """Write one GGUF file, and return its path or, if it is split, that of its first part; see `write_ggufs`."""
    (name,) = file_types(file_type)
    return write_ggufs({name: path}, tensors, hf_config, tokenizer_dir, **options)[name][0]


def write_ggufs(
    paths: Mapping[str, str | os.PathLike[str]],
    tensors: Mapping[str, TensorSource],
    hf_config: Mapping[str, Any],
    tokenizer_dir: str | os.PathLike[str],
    *,
    name: str | None = None,
    verify: bool = True,
    progress: bool = True,
    imatrix: str | os.PathLike[str] | None = None,
    max_shard_size: int | str | None = None,
    device: Any = None,
) -> dict[str, list[Path]]:
    """Write GGUF files that llama.cpp and the programs built on it load, of several types, reading each tensor once.

    Args:
      paths: type, a key of `FILE_TYPES` -> the file to write. They appear when all are complete; older files of those
        names stay until then. In all of them but f32, f16 and bf16, tensors whose rows do not divide by the blocks of
        their type are of another: of one with blocks of 32, as in llama-quantize, or float16.
      tensors: Hugging Face name -> tensor, float32, linear weights as [out, in].
      hf_config: the model's config.json.
      tokenizer_dir: folder with tokenizer.json, tokenizer_config.json, generation_config.json, chat template; and
        config.json, which decides what class of tokenizer transformers makes.
      name: `general.name` in the files; by default a file's name.
      verify: read the files back and compare every tensor with its source (see `verify_gguf`).
      progress: show a progress bar.
      imatrix: an importance matrix from llama-imatrix; types below 8 bits then spend their accuracy where it says.
      max_shard_size: bytes, or "5GB", "500MB" (powers of 1000); larger files are split, as llama-gguf-split does, into
        FILE-00001-of-00003.gguf and so on, of which llama.cpp is given the first.
      device: a jax.Device that quantises; by default the CPU, with llama-quantize's bytes. See `gguf_quants.quantize`.

    Returns the parts of each file, in the order of `paths`. What a file cannot express is printed (to stderr).

    Raises:
      ValueError: unknown file type or architecture; tensors missing, unknown, of another shape than the config says,
        not finite, or too large for the type; a tokenizer or rope scaling that llama.cpp does not have; an importance
        matrix that is cut off or of another model; verification failed.
      FileNotFoundError: no tokenizer in `tokenizer_dir`, or no folder to write to.
      OSError: a file could not be written (disk full). Nothing is left behind.
    """
    tokenizer_dir = Path(tokenizer_dir)
    if unknown := [name for name in paths if name not in FILE_TYPES]:
        file_types(unknown[0])  # raises, or
        raise ValueError(f"GGUF file type {unknown[0]!r} is another name of {file_types(unknown[0])[0]!r}: use that")
    for path in map(Path, paths.values()):
        if not path.parent.is_dir():
            raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
        if path.is_dir():
            raise IsADirectoryError(f"cannot write the GGUF file {path}: it is a folder")
    limit = _bytes_of(max_shard_size)
    shape = model_shape(hf_config)
    weights = None if imatrix is None else read_imatrix(Path(imatrix))
    plan = _plan(tensors, shape)
    tokenizer = read_tokenizer(tokenizer_dir, shape.decoder.vocab_size)
    files, notes = [], []
    for type_name, path in paths.items():
        types, fallbacks = tensor_types(
            type_name, {tensor.name: tensor.shape for tensor in plan}, _mixed(shape), weights is not None
        )
        files.append(_File(type_name, Path(path), types, {t.name: t.nbytes(types[t.name]) for t in plan}))
        notes += _fallback_notes(types, fallbacks)
    for note in [*notes, *_unweighted(weights, plan), *tokenizer.notes, *unsupported(shape)]:
        say(f"GGUF: {note}")

    disk = _Disk([file.path for file in files], sum(file.total for file in files))
    try:
        with disk.explained():
            if shutil.disk_usage(files[0].path.parent).free < disk.needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for file in files:
            file.open(plan, shape, tokenizer, tokenizer.model_name(name or file.path.stem), weights, limit, disk)
        _write(files, plan, weights, disk, progress, device)
        if verify:
            _verify([file.scratch_shards() for file in files], tensors, progress, [file.checksums for file in files])
        written = {}
        with disk.explained():
            for file in files:
                written[file.type_name] = file.rename()
    finally:
        for file in files:
            file.close()
    return written


def _mixed(shape: ModelShape) -> MixedModel:
    c = shape.decoder
    kv_heads = c.num_kv_heads if c.mla is None else 1
    experts = 0 if c.moe is None else c.moe.num_experts
    return MixedModel(shape.architecture, c.num_layers, c.num_heads, kv_heads, experts)


def _bytes_of(size: int | str | None) -> int:
    """Bytes; 0 for no limit."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(size or 0), re.IGNORECASE)
    count = 0 if found is None else int(float(found[1]) * 1000 ** " KMGT".index((found[2] or " ").upper()))
    if found is None or (size and count < 1):
        raise ValueError(f"max_shard_size={size!r} is no size; give bytes, or something like '5GB' or '500MB'")
    return count


def _fallback_notes(types: Mapping[str, GgmlType], fallbacks: Mapping[str, GgmlType]) -> list[str]:
    """What has another type for its width, for the user."""
    notes = []
    for type, wanted in dict.fromkeys((types[name], wanted) for name, wanted in fallbacks.items()):
        names = [name for name in fallbacks if (types[name], fallbacks[name]) == (type, wanted)]
        block = 32 if type == GgmlType.F16 else 256
        told = "float16" if type == GgmlType.F16 else type.name
        notes.append(
            f"{len(names)} tensors are {told}, not {wanted.name}: their rows do not divide by {block} "
            f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        )
    return notes


def _unweighted(weights: Imatrix | None, plan: list[_Planned]) -> list[str]:
    """Whether the importance matrix lacks linear layers, for the user."""
    if weights is None:
        return []
    layers = [t.name for t in plan if re.match(r"blk\.\d+\.(attn|ffn)_\w+\.weight$", t.name) and len(t.shape) > 1]
    missing = [name for name in layers if name not in weights.weights and "ffn_gate_inp" not in name]
    if not missing:
        return []
    return [f"{weights.path} says nothing of {len(missing)} of {len(layers)} linear layers ({missing[0]}, ...)"]


def _shards_of(path: Path) -> list[Path]:
    """The parts of a split file that are there."""
    return sorted(
        path.parent.glob(f"{glob.escape(path.stem)}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].gguf")
    )


def verify_gguf(path: str | os.PathLike[str], tensors: Mapping[str, TensorSource], *, progress: bool = False) -> None:
    """Read a GGUF file back and compare every tensor, dequantised, with its source.

    Bounds per element x: float32 equal; float16 and bfloat16 half a unit in the last place of x; Q8_0 half the block's
    scale d, plus what rounding d to float16 makes of up to 127 steps (127 * 2^-11 d; 127 * 2^-25 where d is subnormal).
    Smaller types: a share of the largest magnitude of the block, see `_SHARES`. `write_ggufs` also compares checksums.

    Args:
      path: the file, or the first part of one that is split.
      tensors: as `write_ggufs` got them.
      progress: show a progress bar.

    Raises ValueError that names the first tensor that is missing, too many, of another shape, or outside its bound.
    """
    path = Path(path)
    parts = [path]
    if found := re.fullmatch(r"(.*)-00001-of-(\d{5})", path.stem):
        parts = [path.with_name(f"{found[1]}-{i + 1:05d}-of-{found[2]}.gguf") for i in range(int(found[2]))]
    _verify([parts], tensors, progress)


def _verify(
    files: list[list[Path]],
    tensors: Mapping[str, TensorSource],
    progress: bool,
    checksums: Sequence[Mapping[str, int]] = (),
) -> None:
    """As `verify_gguf`, of several files, each a list of parts, reading each source once.

    checksums: for each file, CRC-32 of the bytes of each tensor as they were written.
    """
    readers = [[gguf.GGUFReader(part) for part in parts] for parts in files]
    weighted = [parts[0].get_field("quantize.imatrix.entries_count") is not None for parts in readers]
    layout = _layout_of_file(readers[0][0])
    for reader in (reader for parts in readers for reader in parts):
        reader.fields.clear()  # a tokenizer's take 100 MB
    written = [{tensor.name: tensor for part in parts for tensor in part.tensors} for parts in readers]
    if "output.weight" not in written[0]:  # the head is tied to the embedding
        tensors = {hf_name: tensor for hf_name, tensor in tensors.items() if hf_name != "lm_head.weight"}
    places = {hf_name: pieces(hf_name, tuple(tensor.shape), layout) for hf_name, tensor in tensors.items()}
    counts = collections.Counter(piece.name for parts in places.values() for piece in parts)
    for parts, own in zip(files, written, strict=True):
        extra = {name for name in own.keys() - counts.keys() if not name.startswith("rope_f")}
        missing = counts.keys() - own.keys()
        if extra or missing:
            raise ValueError(
                f"{parts[0]} does not hold the model: missing {sorted(missing)}, not in the model {sorted(extra)}"
            )
    where = [
        {tensor.name: part for part, reader in zip(*pair, strict=True) for tensor in reader.tensors}
        for pair in zip(files, readers, strict=True)
    ]
    for own, paths, sums in zip(written, where, checksums, strict=False):
        if wrong := [name for name in own if name in sums and _checksum(paths[name], own[name]) != sums[name]]:
            raise ValueError(f"{paths[wrong[0]]}: {wrong[0]} was not read back as it was written; is the disk sound?")
    total = len(files) * sum(math.prod(piece.shape) for parts in places.values() for piece in parts)
    with _progress_bar("verifying", total, progress) as advance:
        for hf_name, piece in ((hf_name, piece) for hf_name, parts in places.items() for piece in parts):
            want = piece.shape if piece.expert is None else (counts[piece.name], *piece.shape)
            for own, paths in zip(written, where, strict=True):
                if (got := tuple(int(n) for n in reversed(own[piece.name].shape))) != want:
                    raise ValueError(
                        f"{paths[piece.name]}: {piece.name} has shape {got}, but {hf_name} makes it {want}"
                    )
            for start, rows in _rows(hf_name, tensors[hf_name], piece):
                for own, paths, by_importance in zip(written, where, weighted, strict=True):
                    tensor, path = own[piece.name], paths[piece.name]
                    data = _read_rows(path, tensor, piece, start, len(rows))
                    what = f"{path}: {piece.name} ({tensor.tensor_type.name}, from {hf_name})"
                    _compare(data, tensor.tensor_type, rows, by_importance, start, what)
                    advance(rows.size)


def _checksum(path: Path, tensor: gguf.ReaderTensor) -> int:
    checksum, end = 0, tensor.data_offset + tensor.n_bytes
    for offset in range(tensor.data_offset, end, _CHUNK):
        checksum = zlib.crc32(_read(path, offset, min(_CHUNK, end - offset)), checksum)
    return checksum


def _read_rows(path: Path, tensor: gguf.ReaderTensor, piece: Piece, start: int, count: int) -> np.ndarray:
    """Entries of the first axis of a tensor, or of an expert's share of it, uint8 [count, ..., bytes of a row]."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    whole = math.prod(piece.shape) // block * block_bytes
    each = whole // piece.shape[0]
    offset = tensor.data_offset + (piece.expert or 0) * whole + start * each
    return _read(path, offset, count * each).reshape(count, *piece.shape[1:-1], -1)


def _read(path: Path, offset: int, count: int) -> np.ndarray:
    """Bytes of a file. Read, not mapped: pages of a mapping stay in memory, and would be the whole file in the end."""
    return np.fromfile(path, np.uint8, count, offset=offset)


def _compare(data: np.ndarray, type: GgmlType, want: np.ndarray, weighted: bool, start: int, what: str) -> None:
    """Compares rows that were read, from row `start` on, with the values that were to be written."""
    for part in _row_chunks(want.shape, _COMPARED):
        x = want[part]
        got = gguf.quants.dequantize(data[part], type).reshape(x.shape)
        bad = ~(np.abs(got - x) <= _bound(x, type, weighted))  # written so that NaN counts as bad
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"{what}: {got[where]} was read back at {(start + part.start + where[0], *where[1:])} where {x[where]} "
                f"was to be written; {int(bad.sum())} elements of these rows differ by more than the type allows"
            )


def _bound(x: np.ndarray, type: GgmlType, weighted: bool) -> np.ndarray | float:
    if type == GgmlType.F32:
        return 0.0
    if type in (GgmlType.F16, GgmlType.BF16):
        bits, smallest = (11, -25) if type == GgmlType.F16 else (8, -134)
        # |x| is in [2^(e-1), 2^e): half a unit in the last of `bits` binary digits is 2^(e-1-bits).
        exponent = np.frexp(x)[1]
        return np.ldexp(np.float32(1), np.maximum(exponent - 1 - bits, smallest))
    if type == GgmlType.Q8_0:
        blocks = x.reshape(-1, 32)
        scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
        # 1e-5: both sides are computed in float32
        bound = 0.5 * scale * (1 + 1e-5) + 127 * np.maximum(scale * 2.0**-11, 2.0**-25)
        return np.broadcast_to(bound, blocks.shape).reshape(x.shape)
    share, steps = _SHARES[type]
    share = _SHARE_WEIGHTED if weighted else share
    blocks = x.reshape(-1, gguf.GGML_QUANT_SIZES[type][0])
    bound = share * np.abs(blocks).max(axis=1, keepdims=True) + steps * np.float32(2.0**-25)
    return np.broadcast_to(bound, blocks.shape).reshape(x.shape)


def _field(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF file has no field {key!r}")
    return field.contents()


def _layout_of_file(reader: gguf.GGUFReader) -> Layout:
    name = _field(reader, "general.architecture")
    fields = ("block_count", "attention.head_count", "attention.head_count_kv")
    layers, heads, kv_heads = (_field(reader, f"{name}.{field}") for field in fields)
    latent = None
    if reader.get_field(f"{name}.attention.key_length_mla") is not None:
        fields = ("attention.key_length_mla", "rope.dimension_count", "attention.value_length_mla")
        key, rotated, value = (_field(reader, f"{name}.{field}") for field in fields)
        latent = (key - rotated, value)
    return Layout(name, layers, heads, kv_heads, latent)


# The plan: which tensors, under which names.


def _plan(tensors: Mapping[str, TensorSource], shape: ModelShape) -> list[_Planned]:
    decoder, layout = shape.decoder, shape.layout
    expected = {name: slot.shape for name, slot in Decoder(decoder, np.float32).slots().items()}
    if missing := [hf_name for hf_name in expected if hf_name not in tensors]:
        raise ValueError(f"{len(missing)} tensors of the model are missing: {', '.join(missing[:5])}")
    for hf_name in tensors.keys() - expected.keys():
        tied_head = hf_name == "lm_head.weight" and decoder.tie_embeddings
        # (raises where the name is unknown)
        if not tied_head and pieces(hf_name, tuple(tensors[hf_name].shape), layout):
            raise ValueError(f"tensor {hf_name!r} does not belong to a model as config.json has it")
    parts: dict[str, list[_Part]] = {}
    for name, factors in rope_factors(shape).items():
        parts[name] = [_Part(name, _Computed(factors), Piece(name, None, factors.shape, unchanged))]
    for hf_name, size in expected.items():
        source = tensors[hf_name]
        if tuple(source.shape) != size:
            raise ValueError(f"{hf_name} has shape {tuple(source.shape)}, but config.json asks for {size}")
        for piece in pieces(hf_name, size, layout):
            parts.setdefault(piece.name, []).append(_Part(hf_name, source, piece))
    return [_Planned(name, sorted(own, key=lambda part: part.piece.expert or 0)) for name, own in parts.items()]


# Writing.


@dataclass(frozen=True)
class _Disk:
    """Where the files go."""

    paths: list[Path]
    needed: int  # bytes

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Say of an error of the disk which file, how large, and that nothing is lost."""
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(self.paths[0].parent).free
            unchanged = "The file of that name is unchanged. " if any(p.exists() for p in self.paths) else ""
            message = (
                f"could not write {', '.join(map(str, self.paths))} ({error.strerror or error}): it takes "
                f"{self.needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free there. {unchanged}"
                "Free some space, choose another folder, or a smaller file type (q8_0, q4_k_m)"
            )
            raise OSError(error.errno, message) from error


class _File:
    """A file that is being written, under other names beside its own, so that renaming stays on one file system."""

    def __init__(self, type_name: str, path: Path, types: dict[str, GgmlType], sizes: dict[str, int]):
        self.type_name, self.path, self.types, self.sizes = type_name, path, types, sizes
        self.total = sum(sizes.values())
        self.scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self.writer: gguf.GGUFWriter | None = None
        self.parts = 1
        self.part_of: dict[str, int] = {}  # which part of a split file a tensor is in
        self.checksums: dict[str, int] = {}  # CRC-32 of each tensor written

    def open(
        self,
        plan: list[_Planned],
        shape: ModelShape,
        tokenizer: GgufTokenizer,
        name: str,
        weights: Imatrix | None,
        limit: int,
        disk: _Disk,
    ) -> None:
        """Write all but the tensors. The header names every tensor with its place, so that they can follow singly."""
        writer = self.writer = gguf.GGUFWriter(self.scratch, shape.architecture, split_max_size=limit)
        for tensor in plan:
            # the numpy type only matters where it is uint8
            numbers, size = np.dtype(np.float32), self.sizes[tensor.name]
            writer.add_tensor_info(tensor.name, tensor.shape, numbers, size, self.types[tensor.name])
        self.parts = len(writer.tensors)
        self.part_of = {key: i for i, part in enumerate(writer.tensors) for key in part}
        add_model(writer, shape, FILE_TYPES[self.type_name][0], name)
        if weights is not None:
            writer.add_string("quantize.imatrix.file", weights.path.name)
            if weights.dataset:
                writer.add_string("quantize.imatrix.dataset", weights.dataset)
            writer.add_uint32("quantize.imatrix.entries_count", len(weights.weights))
            if weights.chunks:
                writer.add_uint32("quantize.imatrix.chunks_count", weights.chunks)
        add_tokenizer(writer, tokenizer)
        with disk.explained():
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()

    def write(self, name: str, data: np.ndarray) -> None:
        """Write bytes of a tensor after those that are there; tensors must come in the plan's order."""
        assert self.writer is not None and self.writer.fout is not None
        out = self.writer.fout[self.part_of[name]]
        if name not in self.checksums:
            self.writer.write_padding(out, out.tell())
        out.write(data)
        self.checksums[name] = zlib.crc32(data, self.checksums.get(name, 0))

    def finish(self) -> None:
        assert self.writer is not None and self.writer.fout is not None
        for file in self.writer.fout:
            self.writer.write_padding(file, file.tell())
        self.writer.flush()
        for file in self.writer.fout or ():  # the rename must not reach the disk before the data
            os.fsync(file.fileno())
        self.writer.close()

    def scratch_shards(self) -> list[Path]:
        return _part_names(self.scratch, self.parts)

    def rename(self) -> list[Path]:
        parts = _part_names(self.path, self.parts)
        stale = {self.path, *_shards_of(self.path)} - set(parts)
        for scratch, part in zip(self.scratch_shards(), parts, strict=True):
            os.replace(scratch, part)
        for old in stale:  # of another split
            old.unlink(missing_ok=True)
        return parts

    def close(self) -> None:
        if self.writer is not None:
            with contextlib.suppress(OSError):  # what could not be written cannot be flushed either
                self.writer.close()
        for part in self.scratch_shards():
            part.unlink(missing_ok=True)


def _part_names(path: Path, parts: int) -> list[Path]:
    """As gguf.GGUFWriter names them."""
    return (
        [path]
        if parts == 1
        else [path.with_name(gguf.SHARD_NAME_FORMAT.format(path.stem, i + 1, parts)) for i in range(parts)]
    )


def _write(
    files: list[_File],
    plan: list[_Planned],
    weights: Imatrix | None,
    disk: _Disk,
    progress: bool,
    device: Any,
) -> None:
    on_gpu = device is not None and device.platform != "cpu"

    def work() -> Iterator[Callable[[], tuple[str, dict[GgmlType, np.ndarray]]]]:
        for tensor in plan:
            types = dict.fromkeys(file.types[tensor.name] for file in files)  # files may share one
            importance = None if weights is None else weights.of(tensor.name, tensor.shape)
            for i, part in enumerate(tensor.parts):
                own = importance[i] if tensor.stacked and importance is not None else importance
                chunk = _GPU_CHUNK if on_gpu else _CHUNK
                for start, rows in _rows(part.hf_name, part.source, part.piece, chunk):
                    one = functools.partial(_converted, rows, start, part.hf_name, importance=own, device=device)
                    yield lambda name=tensor.name, types=types, one=one: (
                        name,
                        {type: one(type=type) for type in types},
                    )

    with _progress_bar(f"writing {', '.join(file.type_name for file in files)}", disk.needed, progress) as advance:
        for name, converted in _in_turn(work(), _AT_ONCE if on_gpu else 1):
            for file in files:
                data = converted[file.types[name]]
                with disk.explained():
                    file.write(name, data)
                advance(data.nbytes)
    with disk.explained():
        for file in files:
            file.finish()


def _in_turn(work: Iterable[Callable[[], Any]], at_once: int) -> Iterator[Any]:
    """What the functions return, in their order; some are run while others are waited for."""
    if at_once == 1:
        yield from (one() for one in work)
        return
    with ThreadPoolExecutor(at_once) as pool:
        waiting: collections.deque[Future] = collections.deque()
        for one in work:
            waiting.append(pool.submit(one))
            if len(waiting) > at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def _progress_bar(what: str, total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not enabled) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


def _rows(hf_name: str, source: TensorSource, piece: Piece, elements: int = _CHUNK) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor's values in the file's order, float32: (first entry of the first axis, some entries) after each other.

    Raises ValueError if the source gives other than it said.
    """
    wanted, start = tuple(source.shape), 0

    def check(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if values.dtype != np.float32 or values.shape != shape:
            raise ValueError(f"{hf_name} was read as {values.dtype} {values.shape}, wanted float32 {shape}")
        return values

    if piece.reorder is unchanged and (blocks := getattr(source, "blocks", None)) is not None:
        parts = (check(block, (len(block), *wanted[1:])) for block in blocks())
    else:
        parts = (piece.reorder(check(values, wanted)) for values in (source.read(),))
    for values in parts:
        for rows in _row_chunks(values.shape, elements):
            yield start + rows.start, np.ascontiguousarray(values[rows])
        start += len(values)
    if start != piece.shape[0]:
        raise ValueError(f"{hf_name} was read as {start} rows, wanted {piece.shape[0]}")


def _converted(
    values: np.ndarray, start: int, hf_name: str, *, type: GgmlType, importance: np.ndarray | None, device: Any
) -> np.ndarray:
    """Rows of a tensor, from row `start` on, as they stand in a file: uint8 [..., bytes of a row]."""
    _check_range(values, hf_name, type)
    if importance is not None and importance.ndim == 2:  # of each matrix in a stack that is one tensor
        each = zip(values, importance[start:], strict=False)
        return np.stack([quantize(matrix, type, own, device=device) for matrix, own in each])
    return quantize(values, type, importance, device=device)


def _check_range(values: np.ndarray, hf_name: str, type: GgmlType) -> None:
    largest = max(values.max(), -values.min())  # NaN is the largest
    if not np.isfinite(largest):
        raise ValueError(f"{hf_name} holds NaN or infinity: the model is broken, nothing was written")
    exact = type in (GgmlType.F32, GgmlType.BF16)
    limit = 127 * _F16_MAX if type == GgmlType.Q8_0 else _F16_MAX
    if not exact and largest > limit:
        raise ValueError(
            f"{hf_name} holds {largest:.6g}, more than {type.name} can ({limit:.6g}); "
            "export with file type bf16 instead"
        )


def _row_chunks(shape: tuple[int, ...], elements: int) -> Iterator[slice]:
    rows = max(1, elements // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))
