"""Reading a Hugging Face checkpoint: which folder, files and tensors; nothing is loaded before it is asked for."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_jax.fp8 import ACTIVATION_SCALE, SCALE, block_size, decode_fp8
from lora_jax.fused_experts import BLOCKS, SCALES, Part, decode_mxfp4, parts_of, renamed

__all__ = ["Checkpoint", "QuantState", "read_json", "resolve_folder"]

# Dtypes of safetensors whose bytes can be taken as they are.
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "U8": np.uint8}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# What a repository holds beside weights: configuration, tokenizer, chat template.
_SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt", "*.tiktoken"]
# Files of models that read images too name their language model otherwise than the classes of transformers do.
_STORED_PREFIXES = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}


@dataclasses.dataclass(frozen=True)
class QuantState:
    """The description that bitsandbytes stores beside an NF4 weight."""

    shape: tuple[int, int]
    nested_offset: float | None  # None without double quantisation
    blocksize: int = 64  # weights of one scale

    @property
    def parts(self) -> tuple[str, ...]:
        """Endings of the tensors that stand beside the weight."""
        nested = () if self.nested_offset is None else (".nested_absmax", ".nested_quant_map")
        return (".absmax", ".quant_map", *nested)


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON file that holds one object. Raises FileNotFoundError or ValueError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} holds no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); it may be truncated: copy or download it again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold one JSON object, got a {type(content).__name__}")
    return content


def resolve_folder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    only_config: bool = False,
) -> Path:
    """The local folder of a model: the path itself, or a hub repository's snapshot, downloaded unless it is cached.

    Of a repository only the configuration, the tokenizer and the safetensors named by the index are fetched; with
    `only_config` config.json alone.
    With HF_HUB_OFFLINE=1 the cache alone is used.

    Raises:
      FileNotFoundError: no such folder and no such repository, or it is not in the cache while offline.
      PermissionError: the repository is gated or private.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"{path} is a file; a model is a folder with config.json and *.safetensors")
    name = str(name_or_path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {path}; give a local folder or a hub id such as 'meta-llama/Llama-3.1-8B'")

    from huggingface_hub import errors, snapshot_download

    download = functools.partial(snapshot_download, name, revision=revision, token=token)
    try:
        if only_config:
            return Path(download(allow_patterns=["config.json"]))
        folder = Path(download(allow_patterns=_SMALL_FILES))
        return Path(download(allow_patterns=[*_SMALL_FILES, *_weight_files(folder)]))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated: accept its licence on the hub and log in with `hf auth login`, or pass token=; ({error})"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"no folder {path} and no repository {name!r} on the hub; a private one needs `hf auth login` or token="
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"repository {name!r} has no revision {revision!r}") from None
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HfHubHTTPError,
        ConnectionError,
    ) as error:
        raise FileNotFoundError(
            f"no folder {path}; the hub could not be reached and {name!r} is not in the local cache ({error})"
        ) from None


def _weight_files(folder: Path) -> list[str]:
    """Files with weights that a folder's index, or its kind, asks for."""
    if (folder / "adapter_config.json").exists():
        return ["adapter_model.safetensors"]
    return sorted(set(_weight_map(folder / _INDEX).values())) if (folder / _INDEX).exists() else [_SINGLE]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no 'weight_map'; copy or download it again")
    return weight_map


class Checkpoint:
    """The tensors of a folder's safetensors, read one at a time, by the names that transformers' classes have for them.

    Weights in FP8 or MXFP4 are decoded when they are read; their scales have no names of their own here.

    Raises:
      FileNotFoundError: no safetensors, or the index names files that are not there.
      ValueError: a file is truncated or corrupted.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._headers: dict[str, tuple[int, dict[str, Any]]] = {}
        self._kept: dict[tuple, np.ndarray] = {}  # what was read last of rows that take turns
        index = folder / _INDEX
        if index.exists():
            self._where = weight_map = _weight_map(index)
            if missing := sorted(f for f in set(weight_map.values()) if not (folder / f).exists()):
                raise FileNotFoundError(f"{index} names files that are not in the folder: {', '.join(missing)}")
            for file in sorted(set(weight_map.values())):
                absent = {name for name, where in weight_map.items() if where == file} - set(self._open(file).keys())
                if absent:
                    raise ValueError(f"{folder / file} lacks tensors that {_INDEX} places there: {_some(absent)}")
        elif (folder / _SINGLE).exists():
            self._where = dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)
        else:
            raise FileNotFoundError(_no_safetensors(folder))
        self._stored = {_name_in_class(name): name for name in self._where}
        self._where = {_name_in_class(name): file for name, file in self._where.items()}
        self._scales = self._take_scales_out()
        self._mxfp4: set[str] = set()
        self._parts: dict[str, Part] = {}
        self._parts = self._split_fused_experts()

    def _take_scales_out(self) -> dict[str, tuple[str, str]]:
        """Removes the scales of weights in FP8: name of each weight in the files -> its scale's file and name there."""
        scales = {}
        for name in [name for name in self._where if name.endswith(SCALE)]:
            if (weight := name.removesuffix(SCALE)) in self._where:
                scales[self._stored[weight]] = self._where.pop(name), self._stored.pop(name)
                linear = weight.rpartition(".")[0] if weight.endswith(".weight") else weight
                for other in (f"{linear}.{ACTIVATION_SCALE}", f"{linear}_{ACTIVATION_SCALE}"):
                    self._where.pop(other, None)
        return scales

    def _split_fused_experts(self) -> dict[str, Part]:
        """Puts the tensors of single experts in place of those that hold all of them."""
        if not any(name.rpartition(".")[0].endswith(".experts") for name in self._where):
            return {}
        architecture = (read_json(self.folder / "config.json").get("architectures") or [None])[0]
        files, stored = self._where, self._stored
        self._mxfp4 = {name.removesuffix(BLOCKS) for name in files if name.endswith(BLOCKS)}
        for name in self._mxfp4:
            files[name], stored[name] = files[name + BLOCKS], stored[name + BLOCKS].removesuffix(BLOCKS)
        parts = parts_of(files, self.whole_shape, architecture)
        hidden = {part.whole for part in parts.values()}
        hidden |= {name + ending for name in self._mxfp4 for ending in (BLOCKS, SCALES)}
        kept = {renamed(name, architecture): name for name in files if name not in hidden}
        kept |= {name: part.whole for name, part in parts.items()}
        self._where = {name: files[old] for name, old in kept.items()}
        self._stored = {name: stored[old] for name, old in kept.items()}
        return parts

    def _open(self, file: str):
        from safetensors import SafetensorError, safe_open

        if file not in self._files:
            try:
                # pread rather than mmap: mapped pages would count as memory of this process.
                self._files[file] = safe_open(self.folder / file, framework="numpy", backend="pread")
            except SafetensorError as error:
                raise ValueError(
                    f"{self.folder / file} is truncated or corrupted ({error}); copy or download it again"
                ) from None
        return self._files[file]

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._where)

    def stored_name(self, name: str) -> str:
        """The name in the files of a tensor, or of that which it is a part of."""
        return self._stored[name]

    def part(self, name: str) -> Part | None:
        """What a tensor is a part of in the files; None if it stands alone."""
        return self._parts.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        shape = self.whole_shape(name)
        return self._parts[name].shape(shape) if name in self._parts else shape

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, or of that which it is a part of, in the files."""
        file, stored = self._open(self._where[name]), self._stored[name]
        if stored in self._mxfp4:
            experts, n, groups, _ = file.get_slice(stored + BLOCKS).get_shape()
            return experts, 32 * groups, n
        return tuple(file.get_slice(stored).get_shape())

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the dtype it is stored in; float32 if that is FP8, bfloat16 if it is MXFP4.

        Raises:
          ValueError: it is in an eight-bit format that cannot be decoded.
        """
        file, stored = self._open(self._where[name]), self._stored[name]
        if name in self._parts or file.get_slice(stored).get_dtype().startswith("F8"):
            shape = self.shape(name)
            return self.read_rows(name, 0, shape[0], shape[0]).reshape(shape)
        return self._for_blocks_of_64(name, file.get_tensor(stored))

    def read_rows(self, name: str, start: int, stop: int, rows: int) -> np.ndarray:
        """Rows start to stop of a tensor that has `rows` of them, or that holds so many one after the other; as `read`.

        Nothing else is read, but what lies between rows that take turns with others; that is kept until the next such
        call, so that asking for the others next reads nothing.
        """
        stored, part = self._stored[name], self._parts.get(name)
        experts, expert, n, chosen, as_columns = 1, 0, rows, range(start, stop), False
        dtype = self._dtype(name)
        if part is not None:
            experts, *matrix = self.whole_shape(name)
            expert, n = part.expert, matrix[part.transposed]
            chosen = range(n)[part.rows][start:stop]
            if part.transposed and dtype in _NUMPY and stored not in self._mxfp4:
                return np.ascontiguousarray(self._columns_in_file(name, expert, chosen).T)
            if as_columns := part.transposed and stored not in self._mxfp4:  # FP8, whose scales are of blocks
                n, chosen = matrix[0], range(matrix[0])
        numbers = range(expert * n + chosen.start, expert * n + chosen.stop, chosen.step)
        state = self.quant_state(weight) if (weight := name.rpartition(".")[0]) in self._states else None
        if stored in self._mxfp4:
            blocks, scales = (self._rows_in_file(name, stored + end, numbers, experts * n) for end in (BLOCKS, SCALES))
            return decode_mxfp4(blocks.reshape(*scales.shape, 16), scales)
        if part is None and ((dtype not in _NUMPY and dtype[:2] != "F8") or (state and state.blocksize != 64)):
            return self.read(name).reshape(rows, -1)[start:stop]
        array = self._rows_in_file(name, stored, numbers, experts * n)
        if dtype.startswith("F8"):
            array = self._decoded_fp8(name, array, None if part is None else expert, chosen, n)
        return array if part is None or not as_columns else part.take(array)[start:stop]

    def _dtype(self, name: str) -> str:
        """The dtype of a tensor, or of what it is a part of, as its file writes it; that of MXFP4's blocks."""
        stored, (_, entries) = self._stored[name], self._header(self._where[name])
        return entries[stored + BLOCKS if stored in self._mxfp4 else stored]["dtype"]

    def _rows_in_file(self, name: str, stored: str, numbers: range, rows: int) -> np.ndarray:
        """Some rows [len(numbers), K] of a tensor of the files that has `rows` of them one after the other.

        `name` is of the tensor that is asked for, `stored` of that in its file. Of FP8 these are the bytes.
        """
        start, entries = self._header(self._where[name])
        entry = entries[stored]
        dtype, size = np.dtype(_NUMPY.get(entry["dtype"], np.uint8)), math.prod(entry["shape"])
        if size % rows:  # a damaged checkpoint, of which is said what is wrong when shapes are compared
            return self._open(self._where[name]).get_tensor(stored).reshape(1, -1)
        span, length = _with_what_is_between(numbers), size // rows
        first = start + entry["data_offsets"][0] + span.start * length * dtype.itemsize
        array = self._read_runs(name, (1, len(span) * length), dtype, first, 0, keep=numbers.step > 1)
        return array.reshape(-1, length)[numbers.start - span.start :: numbers.step]

    def _columns_in_file(self, name: str, expert: int, numbers: range) -> np.ndarray:
        """Some columns [K, len(numbers)] of an expert's matrix [K, N] in a tensor [experts, K, N] of the files."""
        start, entries = self._header(self._where[name])
        entry = entries[self._stored[name]]
        (_, k, n), dtype = entry["shape"], np.dtype(_NUMPY[entry["dtype"]])
        span = _with_what_is_between(numbers)
        first = start + entry["data_offsets"][0] + (expert * k * n + span.start) * dtype.itemsize
        array = self._read_runs(name, (k, len(span)), dtype, first, n * dtype.itemsize, keep=numbers.step > 1)
        return array[:, numbers.start - span.start :: numbers.step]

    def _read_runs(
        self, name: str, shape: tuple[int, int], dtype: np.dtype, offset: int, stride: int, *, keep: bool
    ) -> np.ndarray:
        """An array of that shape, [runs, values], from a tensor's file: a run at byte `offset`, the next `stride` on.

        Not by the library's slices, for which it reads the whole tensor.
        """
        place = self._where[name], offset, shape
        if keep and place in self._kept:
            return self._kept[place]
        array = np.empty(shape, dtype)
        whole = memoryview(array.view(np.uint8)).cast("B")
        size = len(whole) // shape[0]
        if size == stride:  # one after the other
            size = len(whole)
        with (self.folder / self._where[name]).open("rb", buffering=0) as file:
            for run in range(len(whole) // size):
                rest, at = whole[run * size : (run + 1) * size], offset + run * stride
                while rest and (count := os.preadv(file.fileno(), [rest], at)):
                    rest, at = rest[count:], at + count
        if keep:
            array.flags.writeable = False
            self._kept = dict([*self._kept.items(), (place, array)][-2:])  # MXFP4 is read in two parts
        return array

    def _header(self, file: str) -> tuple[int, dict[str, Any]]:
        """Where the tensors' bytes begin in a file, and what it says of each.

        It begins with the length of what it says, 8 bytes, little endian, and that, as JSON.
        """
        if file not in self._headers:
            with (self.folder / file).open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                self._headers[file] = 8 + length, json.loads(stream.read(length))
        return self._headers[file]

    def _for_blocks_of_64(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """Scales of larger blocks, as often as there are blocks of 64 in one: the same weights.

        A group of 256 scales becomes several with the scale of the group.
        """
        weight, _, ending = name.rpartition(".")
        if ending not in ("absmax", "nested_absmax") or (state := self.quant_state(weight)) is None:
            return tensor
        if state.blocksize == 64:
            return tensor
        group = 256 if ending == "nested_absmax" else 1
        have, want = (-(-state.shape[0] * state.shape[1] // (size * group)) for size in (state.blocksize, 64))
        if tensor.size != have:
            raise ValueError(
                f"{self.folder}: {name} holds {tensor.size} scales, a weight {list(state.shape)} in NF4 with blocks of "
                f"{state.blocksize} has {have}"
            )
        return np.repeat(tensor, state.blocksize // 64)[:want]

    def _decoded_fp8(self, name: str, codes: np.ndarray, expert: int | None, rows: range, of: int) -> np.ndarray:
        """Those rows of a weight, or of an expert's matrix, that has `of` of them; float32."""
        stored, dtype = self._stored[name], self._dtype(name)
        if dtype != "F8_E4M3" or stored not in self._scales:
            beside = "" if stored in self._scales else f" without a {stored.rpartition('.')[2]}{SCALE}"
            raise ValueError(
                f"{self.folder}: {name} is stored as {dtype}{beside}; only F8_E4M3 with scales can be decoded: use the "
                "16-bit checkpoint"
            )
        file, scale_name = self._scales[stored]
        scales = self._open(file).get_tensor(scale_name)
        if scales.dtype.kind != "f" and scales.dtype.name != "bfloat16":
            raise ValueError(f"{self.folder}: {scale_name} is stored as {scales.dtype}, wanted a 16- or 32-bit float")
        scales = scales if expert is None else scales[expert]
        try:
            return decode_fp8(codes, scales, self._fp8_block, rows, of)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {name}: {error}") from None

    @functools.cached_property
    def _fp8_block(self) -> tuple[int, int] | None:
        quantization = read_json(self.folder / "config.json").get("quantization_config") or {}
        if quantization.get("quant_method") != "fp8":
            raise ValueError(
                f"{self.folder} holds weights in FP8, config.json has no quantization_config of quant_method 'fp8'"
            )
        return block_size(quantization)

    def quant_state(self, name: str) -> QuantState | None:
        """How the weight `name` is quantised, or None for a plain tensor.

        Raises:
          ValueError: it is quantised in a way that is not NF4 with blocks of 64 or a multiple of it.
        """
        if (key := self._states.get(name)) is None:
            return None
        try:
            state = json.loads(self.read(key).tobytes())
            kind, shape = state["quant_type"], tuple(state["shape"])
            blocks = (state["blocksize"], state.get("nested_blocksize", 256))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder}: {key} is damaged ({error!r}); download it again") from None
        if kind != "nf4" or blocks[1] != 256 or blocks[0] % 64 or not blocks[0]:
            raise ValueError(
                f"{self.folder}: {name} is quantised as {kind} with blocks of {blocks[0]} (nested {blocks[1]}); "
                "only nf4 with 64 or a multiple of it (nested 256) is implemented: use the 16-bit checkpoint"
            )
        return QuantState(shape, state.get("nested_offset"), blocks[0])

    @functools.cached_property
    def _states(self) -> dict[str, str]:
        """Name of the quantisation state by that of its weight."""
        return {name.partition(".quant_state.")[0]: name for name in self._where if ".quant_state." in name}

    def check_names(
        self,
        wanted: dict[str, tuple[int, ...]],
        ignored: Iterable[str] = (),
        *,
        within: str = "",
        beside: tuple[str, ...] = (),
    ) -> None:
        """Checks that the checkpoint holds exactly the wanted tensors in the wanted shapes.

        Args:
          wanted: shape of each tensor by name.
          ignored: endings of names that may be there beside the wanted ones.
          within: beginning of the names that must be wanted; others may be there.
          beside: beginnings of names that may be there all the same.

        Raises:
          ValueError: tensors are missing, unknown, or of another shape.
        """
        states = {name: self.quant_state(name) for name in wanted}
        parts = {name + part for name, state in states.items() if state for part in state.parts}
        if missing := (set(wanted) | parts) - set(self._where):
            raise ValueError(f"{self.folder} lacks tensors that config.json implies: {_some(missing)}")
        known = set(wanted) | parts | set(self._states.values())
        others = {name for name in set(self._where) - known if not name.startswith(beside)}
        unknown = {name for name in others if name.startswith(within) and not name.endswith(tuple(ignored))}
        if unknown:
            raise ValueError(f"{self.folder} holds tensors that this architecture does not have: {_some(unknown)}")
        for name, shape in wanted.items():
            state = states[name]
            got = self.shape(name) if state is None else state.shape
            if got != shape:
                raise ValueError(f"{self.folder}: {name} has shape {list(got)}, config.json implies {list(shape)}")


def _with_what_is_between(numbers: range) -> range:
    """All numbers of the turns that these are of: 6, 7, 8, 9 for range(7, 10, 2), and for range(6, 9, 2) too."""
    step = numbers.step
    return range(numbers.start // step * step, (numbers[-1] // step + 1) * step)


def _name_in_class(stored: str) -> str:
    for prefix, name in _STORED_PREFIXES.items():
        if stored.startswith(prefix):
            return name + stored.removeprefix(prefix)
    return stored


def _some(names: set[str]) -> str:
    """The first few of some names."""
    first = sorted(names)[:5]
    return ", ".join(first) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _no_safetensors(folder: Path) -> str:
    pickles = sorted(p.name for pattern in ("*.bin", "*.bin.index.json", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when read and are not loaded. "
            "Convert them once, in an environment with PyTorch: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder, safe_serialization=True)"
        )
    return f"{folder} holds no {_SINGLE} and no {_INDEX}"
