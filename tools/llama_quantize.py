"""llama.cpp's own quantisation, to compare exports with: `llama_model_quantize`, which llama-quantize calls.

    python -m lora_jax.tools.llama_quantize          # fetch the libraries (30 MB, with npm), print their folder

The libraries are those of the npm package `@node-llama-cpp/linux-x64` (MIT), built from llama.cpp b11434 for Linux on
x86-64. xllamacpp, which runs files, does not hold this function.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from lora_jax.tools.smollm2 import default_cache_dir

__all__ = ["LlamaQuantize", "fetch_llama_quantize"]

PACKAGE = "@node-llama-cpp/linux-x64@3.22.1"
_LIBRARIES = ("libggml-base.so", "libllama.v0.5.0.so")  # which load what they need


def fetch_llama_quantize(cache_dir: Path | None = None) -> Path:
    """The folder with the libraries: that which LORA_JAX_LLAMA_QUANTIZE names, or one below `cache_dir`.

    Raises FileNotFoundError if they are not there and there is no npm to fetch them with; OSError if that fails.
    """
    configured = os.environ.get("LORA_JAX_LLAMA_QUANTIZE")
    prefix = (cache_dir or default_cache_dir()) / "llama-quantize"
    folder = Path(configured or prefix / "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64")
    if all((folder / name).is_file() for name in _LIBRARIES):
        return folder
    if configured or shutil.which("npm") is None:
        raise FileNotFoundError(f"{folder} does not hold {', '.join(_LIBRARIES)}; install npm, which fetches {PACKAGE}")
    command = ["npm", "install", "--no-save", "--ignore-scripts", "--force", "--prefix", str(prefix), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"npm could not fetch {PACKAGE}:\n{done.stderr[-2000:]}")
    return folder


class _Params(ctypes.Structure):
    """llama_model_quantize_params of llama.h at b11434."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("threads", "file_type", "head_type", "embedding_type")),
        *((f"flag_{i}", ctypes.c_bool) for i in range(6)),
        ("imatrix", ctypes.c_void_p),
        *((f"pointer_{i}", ctypes.c_void_p) for i in range(3)),
        ("max_buffer", ctypes.c_size_t),
    ]


class _Importance(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("values", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t)]


class LlamaQuantize:
    """llama.cpp's libraries, loaded from a folder of `fetch_llama_quantize`."""

    def __init__(self, folder: Path) -> None:
        base, self._llama = (ctypes.CDLL(os.fspath(folder / name)) for name in _LIBRARIES)
        self._chunk = base.ggml_quantize_chunk
        self._chunk.restype = ctypes.c_size_t
        self._chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        self._llama.llama_model_quantize_default_params.restype = _Params
        self._llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
        self._quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self._llama.llama_log_set(self._quiet, None)

    def rows(self, values: np.ndarray, type: GgmlType, importance: np.ndarray | None = None) -> np.ndarray:
        """float32 [rows, K], importance float32 [K] -> llama.cpp's bytes, uint8 [rows, bytes of a row]; one thread."""
        values = np.ascontiguousarray(values, np.float32)
        block, size = gguf.GGML_QUANT_SIZES[type]
        out = np.zeros((len(values), values.shape[1] // block * size), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        assert self._chunk(type, values.ctypes.data, out.ctypes.data, 0, *values.shape, weights) == out.nbytes
        return out

    def file(
        self,
        source: Path,
        out: Path,
        file_type: int,
        *,
        threads: int = 1,
        importance: Mapping[str, np.ndarray] | None = None,
        wide_ends: bool = False,
    ) -> None:
        """What `llama-quantize source out TYPE threads` does.

        Args:
          source: a GGUF file in 16 or 32 bits.
          out: the file to write.
          file_type: llama.cpp's number of the type.
          threads: that quantise.
          importance: float32 by name of tensor, of each column or (experts) of each expert's columns.
          wide_ends: embedding and head in Q8_0, as "q2_k_l" wants them.

        Raises RuntimeError if llama.cpp refuses.
        """
        params = self._llama.llama_model_quantize_default_params()
        params.threads, params.file_type = threads, file_type
        if wide_ends:
            params.head_type = params.embedding_type = GgmlType.Q8_0
        if importance is not None:
            given = {name: np.ascontiguousarray(values, np.float32) for name, values in importance.items()}
            entries = (_Importance * (len(given) + 1))()  # one without a name ends them
            for entry, (name, values) in zip(entries, given.items(), strict=False):
                entry.name, entry.size = name.encode(), values.size
                entry.values = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            params.imatrix = ctypes.cast(entries, ctypes.c_void_p)
        status = self._llama.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params))
        if status != 0:
            raise RuntimeError(f"llama.cpp did not quantise {source} to {out} (status {status})")


if __name__ == "__main__":
    print(fetch_llama_quantize())
