"""An adapter alone as a GGUF file, which llama.cpp puts on a base model when it runs (`--lora`), and Ollama by ADAPTER.

For each adapted tensor NAME of the base's file there are NAME.lora_a [R, K] and NAME.lora_b [N, R], float32 or float16;
of experts, [E, R, K] and [E, N, R]; of the embeddings, whose rows are looked up, lora_a is [V, R]. llama.cpp computes

    W x + (alpha / R) lora_b (lora_a x).

Where the base's conversion permutes the rows of W, those of lora_b are permuted likewise; its columns stay, so that
lora_a is PEFT's. Format: llama.cpp, src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

import errno
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from lora_jax.export.aside import file_aside
from lora_jax.export.gguf_layout import Layout, pieces
from lora_jax.export.gguf_metadata import model_shape
from lora_jax.export.peft import adapter_tensors, written_config

if TYPE_CHECKING:
    from lora_jax.model import CausalLM

__all__ = ["ADAPTER_TYPES", "save_gguf_lora", "write_gguf_lora"]

ADAPTER_TYPES = {"f32": (GgmlType.F32, np.dtype(np.float32)), "f16": (GgmlType.F16, np.dtype(np.float16))}
# What llama.cpp multiplies by without looking for an adapter; it would load one, and not apply it.
_NOT_ADAPTED = {"deepseek2": ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "lm_head")}
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")


def save_gguf_lora(model: "CausalLM", folder: Path, file_type: str = "f32", *, overwrite: bool = False) -> Path:
    """Writes the adapter as a GGUF file for llama.cpp's `--lora`; returns its path, FOLDER/NAME-lora.TYPE.gguf.

    It fits GGUF files of the base model that llama.cpp's converter or `save_gguf` has made, of any type.

    Args:
      model: with an adapter.
      folder: made if it does not exist.
      file_type: "f32" or "f16".
      overwrite: replace a file of that name.

    Raises:
      FileExistsError: the file exists and `overwrite` is False.
      ValueError, OSError: as `write_gguf_lora`.
    """
    config = written_config(model)
    if config.use_dora:
        raise ValueError("llama.cpp has no adapters of DoRA (use_dora=True): export the merged model instead")
    if config.modules_to_save:
        raise ValueError(
            f"{', '.join(config.modules_to_save)} is trained whole (modules_to_save), which an adapter in a GGUF file "
            "cannot hold: export the merged model instead"
        )
    if model.config.tie_embeddings and model.module.embed_tokens.lora_a is not None:
        raise ValueError(
            "the adapter changes the embeddings, which are the head too; llama.cpp adapts one of them only: export "
            "the merged model instead"
        )
    name = Path(model.name_or_path).name
    path = folder / f"{name}-lora.{file_type.upper()}.gguf"
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another folder or pass overwrite=True")
    folder.mkdir(parents=True, exist_ok=True)
    return write_gguf_lora(path, adapter_tensors(model), model.hf_config, config.scale_of, file_type, base=name)


def write_gguf_lora(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    hf_config: Mapping[str, Any],
    scale: Callable[[str], float],
    file_type: str = "f32",
    *,
    base: str = "",
) -> Path:
    """Writes the tensors of an adapter as one GGUF file, and reads them back; returns its path.

    Args:
      path: appears when it is complete.
      tensors: float32 by PEFT's names, as `adapter_tensors` gives them; of experts, those of single ones.
      hf_config: the base model's config.json.
      scale: factor of the product, of a module by its full name.
      file_type: "f32" or "f16".
      base: what the base model is called.

    Raises:
      ValueError: unknown type or architecture, tensors that llama.cpp cannot adapt, values that are not finite or too
        large for float16.
      OSError: it could not be written; nothing is left behind, and what was read back was not what was written.
    """
    path = Path(path)
    if file_type not in ADAPTER_TYPES:
        raise ValueError(f"adapters in GGUF files are {' or '.join(ADAPTER_TYPES)}, not {file_type!r}")
    shape = model_shape(hf_config)
    modules = _pairs(tensors)
    alphas = {module: scale(module) * len(pair["A"]) for module, pair in modules.items()}
    alpha = next(iter(alphas.values()))  # the file has one: B of modules with another makes up for it
    for module, pair in modules.items():
        pair["B"] = pair["B"] * np.float32(alphas[module] / alpha)
    converted = _converted(modules, shape.layout, ADAPTER_TYPES[file_type][1])
    with file_aside(path) as scratch:
        writer = gguf.GGUFWriter(scratch, shape.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(path.stem)
        if base:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, base)
        for name, tensor in converted.items():
            writer.add_tensor(name, tensor)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            assert writer.fout is not None
            for tensor in converted.values():  # the library's own way hides why a disk refuses
                writer.write_padding(writer.fout[0], writer.fout[0].tell())
                writer.fout[0].write(np.ascontiguousarray(tensor))
            writer.write_padding(writer.fout[0], writer.fout[0].tell())
        finally:
            writer.close()
        _verify(scratch, path, converted, ADAPTER_TYPES[file_type][0])
    return path


def _pairs(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """ "A" and "B" of every module by its full name."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key} is not of an adapter's A or B: export the merged model instead")
        modules.setdefault(match[1], {})[match[2]] = tensor
    return modules


def _converted(
    modules: Mapping[str, Mapping[str, np.ndarray]], layout: Layout, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """The tensors by their names in the file."""
    lost = {module.rpartition(".")[2] for module in modules} & {*_NOT_ADAPTED.get(layout.architecture, ())}
    if lost:
        raise ValueError(
            f"llama.cpp applies no adapter to {', '.join(sorted(lost))} of its architecture {layout.architecture!r}: "
            "export the merged model, or train with other target_modules"
        )
    out, experts = {}, {}
    for module, pair in modules.items():
        n, k = pair["B"].shape[0], pair["A"].shape[1]
        if module.endswith("embed_tokens"):
            n, k = k, n
        (piece,) = pieces(f"{module}.weight", (n, k), layout)
        # The order of rows does not depend on what stands in a row.
        a, b = (pair["A"].T, pair["B"]) if module.endswith("embed_tokens") else (pair["A"], piece.reorder(pair["B"]))
        for part, values in (("lora_a", a), ("lora_b", b)):
            name = f"{piece.name}.{part}"
            values = _narrowed(np.ascontiguousarray(values), dtype, module)
            if piece.expert is None:
                out[name] = values
            else:
                experts.setdefault(name, {})[piece.expert] = values
    return out | {name: np.stack([own[i] for i in range(len(own))]) for name, own in experts.items()}


def _narrowed(values: np.ndarray, dtype: np.dtype, module: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError(f"the adapter of {module} is not finite; nothing was written")
    largest = np.abs(values).max(initial=0)
    if largest > np.finfo(dtype).max:
        raise ValueError(f"the adapter of {module} holds {largest:.6g}, more than float16 can; use 'f32'")
    return values.astype(dtype)


def _verify(file: Path, path: Path, tensors: Mapping[str, np.ndarray], type: GgmlType) -> None:
    try:
        written = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    except (ValueError, IndexError):  # cut short: numpy does not always notice that it could not write
        written = {}
    same = written.keys() == tensors.keys() and all(
        written[name].tensor_type == type
        and written[name].data.shape == tensor.shape
        and np.array_equal(written[name].data, tensor)
        for name, tensor in tensors.items()
    )
    if not same:
        raise OSError(errno.EIO, f"{path} does not read back as it was written; the disk may be full or failing")
