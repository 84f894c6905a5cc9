"""Export to GGUF, the file format of llama.cpp.

A GGUF file holds metadata (shape of the model, tokenizer, chat template) and then the tensors. Tensor by tensor, the
source is read, converted and written, so that memory holds one tensor and its converted copy; or one linear layer of
all experts of a layer, converted, and that of one expert. The finished file is read back and compared with the source
before it takes its name.

File types: "f32"; "f16"; "bf16"; "q8_0" (blocks of 32 int8 and one float16 scale). As in llama.cpp's own converter,
norms, biases and routers are float32 in all of them.
"""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lora_jax.export.gguf_layout import Layout, Piece, pieces
from lora_jax.export.gguf_metadata import (
    ModelShape,
    add_model,
    add_tokenizer,
    model_shape,
    rope_factors,
    unsupported,
)
from lora_jax.export.gguf_tokenizer import GgufTokenizer, read_tokenizer
from lora_jax.export.hf import copy_small_files
from lora_jax.export.merge import merged_tensors
from lora_jax.models.decoder import Decoder
from lora_jax.reporting import console, say

if TYPE_CHECKING:
    from lora_jax.model import CausalLM

FILE_TYPES = {
    "f32": (gguf.LlamaFileType.ALL_F32, GgmlType.F32),
    "f16": (gguf.LlamaFileType.MOSTLY_F16, GgmlType.F16),
    "bf16": (gguf.LlamaFileType.MOSTLY_BF16, GgmlType.BF16),
    "q8_0": (gguf.LlamaFileType.MOSTLY_Q8_0, GgmlType.Q8_0),
}
_CHUNK = 1 << 22  # elements converted or compared at a time
_F16_MAX = 65504.0


class TensorSource(Protocol):
    """One tensor of the model, read when it is needed."""

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
    """One tensor of the file to write."""

    name: str  # in the GGUF
    parts: list[_Part]  # one, or one for each expert
    type: GgmlType

    @property
    def stacked(self) -> bool:
        return self.parts[0].piece.expert is not None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.parts[0].piece.shape
        return (len(self.parts), *shape) if self.stacked else shape

    @property
    def nbytes(self) -> int:
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
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
    *,
    merge_base: str = "dequantized",
    overwrite: bool = False,
    verbose: bool = True,
) -> list[Path]:
    """Writes base and adapter merged into one model, as one GGUF file for each type asked for.

    Args:
      model: it is not changed.
      folder: where to; made if it does not exist. Files are named after the model and the type.
      tokenizer: only its chat template is used, if it is not the one of the source.
      quantization_method: "f32", "f16", "bf16", "q8_0", or several of them.
      merge_base: "dequantized" or "original", see `lora_jax.export.merge`.
      overwrite: replace files that exist.
      verbose: show progress.

    Raises:
      FileExistsError: a file of that name exists and `overwrite` is False.
      ValueError, OSError: as `write_gguf`.
    """
    types = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
    types = [name.lower() for name in types]
    if unknown := [name for name in types if name not in FILE_TYPES]:
        raise ValueError(f"quantization_method {unknown[0]!r} is not known; choose from {', '.join(FILE_TYPES)}")
    base = Path(model.name_or_path).name
    paths = [folder / f"{base}.{name.upper()}.gguf" for name in types]
    if not overwrite and (existing := [path for path in paths if path.exists()]):
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
        for path, name in zip(paths, types, strict=True):
            write_gguf(path, tensors, model.hf_config, small, name, name=base, progress=verbose)
    return paths


def write_gguf(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorSource],
    hf_config: Mapping[str, Any],
    tokenizer_dir: str | os.PathLike[str],
    file_type: str,
    *,
    name: str | None = None,
    verify: bool = True,
    progress: bool = True,
) -> Path:
    """Write one GGUF file that llama.cpp and the programs built on it load; return its path.

    Args:
      path: the file to write. It appears when it is complete; an older file of that name stays until then.
      tensors: Hugging Face name -> tensor, float32, linear weights as [out, in].
      hf_config: the model's config.json.
      tokenizer_dir: folder with tokenizer.json, tokenizer_config.json, generation_config.json, chat template; and
        config.json, which decides what class of tokenizer transformers makes.
      file_type: "f32", "f16", "bf16" or "q8_0". Rows that do not divide by 32 are float16 in a q8_0 file.
      name: `general.name` in the file; by default the file's name.
      verify: read the file back and compare every tensor with its source (see `verify_gguf`).
      progress: show a progress bar.

    What the file cannot express is printed (to stderr).

    Raises:
      ValueError: unknown file type or architecture; tensors missing, unknown, of another shape than the config says,
        not finite, or too large for float16; a tokenizer or rope scaling that llama.cpp does not have; verification
        failed.
      FileNotFoundError: no tokenizer in `tokenizer_dir`, or no folder to write to.
      OSError: the file could not be written (disk full). Nothing is left behind.
    """
    path, tokenizer_dir = Path(path), Path(tokenizer_dir)
    if file_type not in FILE_TYPES:
        raise ValueError(f"GGUF file type {file_type!r} is not known; choose one of {', '.join(FILE_TYPES)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write the GGUF file {path}: it is a folder")
    shape = model_shape(hf_config)
    plan, notes = _plan(tensors, shape, FILE_TYPES[file_type][1])
    tokenizer = read_tokenizer(tokenizer_dir, shape.decoder.vocab_size)
    for note in notes + tokenizer.notes + unsupported(shape):
        say(f"GGUF: {note}")

    # Beside the target, so that the rename stays within one file system.
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    writer = gguf.GGUFWriter(scratch, shape.architecture)
    disk = _Disk(path, sum(tensor.nbytes for tensor in plan))
    try:
        with disk.explained():
            if shutil.disk_usage(path.parent).free < disk.needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write(writer, plan, shape, tokenizer, file_type, name or path.stem, disk, progress)
        with disk.explained():
            writer.close()
        if verify:
            verify_gguf(scratch, tensors, progress=progress)
        with disk.explained():
            os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):  # what could not be written cannot be flushed either
            writer.close()
        scratch.unlink(missing_ok=True)
    return path


def verify_gguf(path: str | os.PathLike[str], tensors: Mapping[str, TensorSource], *, progress: bool = False) -> None:
    """Read a GGUF file back and compare every tensor, dequantised, with its source.

    Bounds per element x: float32 equal; float16 and bfloat16 half a unit in the last place of x; Q8_0 half the block's
    scale d, plus what rounding d to float16 makes of up to 127 steps (127 * 2^-11 d; 127 * 2^-25 where d is subnormal).

    Raises ValueError that names the first tensor that is missing, too many, of another shape, or outside its bound.
    """
    reader = gguf.GGUFReader(path)
    written = {tensor.name: tensor for tensor in reader.tensors}
    layout = _layout_of_file(reader)
    if "output.weight" not in written:  # the head is tied to the embedding
        tensors = {hf_name: tensor for hf_name, tensor in tensors.items() if hf_name != "lm_head.weight"}
    places = {hf_name: pieces(hf_name, tuple(tensor.shape), layout) for hf_name, tensor in tensors.items()}
    counts = Counter(piece.name for parts in places.values() for piece in parts)
    extra = {name for name in written.keys() - counts.keys() if not name.startswith("rope_f")}
    missing = counts.keys() - written.keys()
    if extra or missing:
        raise ValueError(f"{path} does not hold the model: missing {sorted(missing)}, not in the model {sorted(extra)}")
    total = sum(math.prod(piece.shape) for parts in places.values() for piece in parts)
    with _progress_bar("verifying", total, progress) as advance:
        for hf_name, parts in places.items():
            values = tensors[hf_name].read() if parts else np.empty(0)
            for piece in parts:
                tensor = written[piece.name]
                want = piece.shape if piece.expert is None else (counts[piece.name], *piece.shape)
                if (got := tuple(int(n) for n in reversed(tensor.shape))) != want:
                    raise ValueError(f"{path}: {piece.name} has shape {got}, but {hf_name} makes it {want}")
                data = tensor.data if piece.expert is None else tensor.data[piece.expert]
                what = f"{path}: {piece.name} ({tensor.tensor_type.name}, from {hf_name})"
                _compare(data, tensor.tensor_type, piece.reorder(values), what, advance)


def _compare(data: np.ndarray, type: GgmlType, expected: np.ndarray, what: str, advance: Callable[[int], None]) -> None:
    """Compares what was read, by rows of its first axis, with the values that were to be written."""
    for part in _row_chunks(expected.shape):
        got, want = gguf.quants.dequantize(data[part], type), expected[part]
        bad = ~(np.abs(got - want) <= _bound(want, type))  # written so that NaN counts as bad
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"{what}: {got[where]} was read back at {(part.start + where[0], *where[1:])} where {want[where]} "
                f"was to be written; {int(bad.sum())} elements of these rows differ by more than the type allows"
            )
        advance(want.size)


def _bound(x: np.ndarray, type: GgmlType) -> np.ndarray | float:
    if type == GgmlType.F32:
        return 0.0
    if type in (GgmlType.F16, GgmlType.BF16):
        bits, smallest = (11, -25) if type == GgmlType.F16 else (8, -134)
        # |x| is in [2^(e-1), 2^e): half a unit in the last of `bits` binary digits is 2^(e-1-bits).
        exponent = np.frexp(x)[1]
        return np.ldexp(np.float32(1), np.maximum(exponent - 1 - bits, smallest))
    blocks = x.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    # 1e-5: both sides are computed in float32
    bound = 0.5 * scale * (1 + 1e-5) + 127 * np.maximum(scale * 2.0**-11, 2.0**-25)
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


def _plan(
    tensors: Mapping[str, TensorSource], shape: ModelShape, main_type: GgmlType
) -> tuple[list[_Planned], list[str]]:
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
        parts[name] = [_Part(name, _Computed(factors), Piece(name, None, factors.shape, lambda values: values))]
    for hf_name, size in expected.items():
        source = tensors[hf_name]
        if tuple(source.shape) != size:
            raise ValueError(f"{hf_name} has shape {tuple(source.shape)}, but config.json asks for {size}")
        for piece in pieces(hf_name, size, layout):
            parts.setdefault(piece.name, []).append(_Part(hf_name, source, piece))
    plan, fallbacks = [], []
    for name, own in parts.items():
        type = main_type if _is_narrowed(name, own[0].piece.shape) else GgmlType.F32
        if own[0].piece.shape[-1] % gguf.GGML_QUANT_SIZES[type][0]:
            type = GgmlType.F16
            fallbacks.append(name)
        plan.append(_Planned(name, sorted(own, key=lambda part: part.piece.expert or 0), type))
    notes = []
    if fallbacks:
        notes.append(
            f"{len(fallbacks)} tensors are float16, not {main_type.name}: their rows do not divide by 32 "
            f"({', '.join(fallbacks[:3])}{', ...' if len(fallbacks) > 3 else ''})"
        )
    return plan, notes


def _is_narrowed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is in the type of the file; the others are float32, as llama.cpp wants them."""
    return len(shape) > 1 and name.endswith(".weight") and not re.search(r"_norm\.|\.ffn_gate_inp(_shexp)?\.", name)


# Writing.


@dataclass(frozen=True)
class _Disk:
    """Where the file goes."""

    path: Path
    needed: int  # bytes

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Say of an error of the disk which file, how large, and that nothing is lost."""
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(self.path.parent).free
            unchanged = "The file of that name is unchanged. " if self.path.exists() else ""
            message = (
                f"could not write {self.path} ({error.strerror or error}): it takes {self.needed / 1e9:.3f} GB, "
                f"{free / 1e9:.3f} GB are free there. {unchanged}"
                "Free some space, choose another folder, or a smaller file type (q8_0)"
            )
            # numpy, unlike open files, does not say why it could not write
            raise OSError(error.errno or errno.EIO, message) from error


def _write(
    writer: gguf.GGUFWriter,
    plan: list[_Planned],
    shape: ModelShape,
    tokenizer: GgufTokenizer,
    file_type: str,
    name: str,
    disk: _Disk,
    progress: bool,
) -> None:
    # The header names every tensor with its place, so that the data can follow one by one.
    for tensor in plan:
        # the numpy type only matters where it is uint8
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
    add_model(writer, shape, FILE_TYPES[file_type][0], name)
    add_tokenizer(writer, tokenizer)
    with disk.explained():
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    with _progress_bar(f"writing {file_type}", disk.needed, progress) as advance:
        for tensor in plan:
            data = _converted(tensor)
            with disk.explained():
                writer.write_tensor_data(data)
            del data  # before the next one is made
            advance(tensor.nbytes)
    with disk.explained():
        writer.flush()
        for file in writer.fout or ():  # the rename must not reach the disk before the data
            os.fsync(file.fileno())


@contextlib.contextmanager
def _progress_bar(what: str, total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not enabled) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


def _converted(tensor: _Planned) -> np.ndarray:
    """The tensor's values as they stand in the file: float32, or bytes [..., bytes of a row]."""
    if not tensor.stacked:
        return _converted_part(tensor.parts[0], tensor.type)
    stack = None
    for i, part in enumerate(tensor.parts):
        data = _converted_part(part, tensor.type)
        if stack is None:
            stack = np.empty((len(tensor.parts), *data.shape), data.dtype)
        stack[i] = data
    assert stack is not None
    return stack


def _converted_part(part: _Part, type: GgmlType) -> np.ndarray:
    values, wanted = part.source.read(), tuple(part.source.shape)
    if values.dtype != np.float32 or values.shape != wanted:
        raise ValueError(f"{part.hf_name} was read as {values.dtype} {values.shape}, wanted float32 {wanted}")
    values = np.ascontiguousarray(part.piece.reorder(values))
    for rows in _row_chunks(values.shape):
        _check_range(values[rows], part.hf_name, type)
    if type == GgmlType.F32:
        return values
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]
    out = np.empty((*values.shape[:-1], values.shape[-1] // block * block_bytes), np.uint8)
    for rows in _row_chunks(values.shape):
        out[rows] = gguf.quants.quantize(values[rows], type).view(np.uint8)
    return out


def _check_range(values: np.ndarray, hf_name: str, type: GgmlType) -> None:
    largest = np.abs(values).max()
    if not np.isfinite(largest):
        raise ValueError(f"{hf_name} holds NaN or infinity: the model is broken, nothing was written")
    limit = {GgmlType.F16: _F16_MAX, GgmlType.Q8_0: 127 * _F16_MAX}.get(type)
    if limit is not None and largest > limit:
        raise ValueError(
            f"{hf_name} holds {largest:.6g}, more than {type.name} can ({limit:.6g}); "
            "export with file type bf16 instead"
        )


def _row_chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, _CHUNK // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))
