"""The merged model as a Hugging Face folder that transformers 4 and 5, vLLM and llama.cpp's converter load."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from rich.progress import Progress

from lora_jax.export.aside import folder_aside
from lora_jax.export.bnb import nf4_names, quantization_config, quantized
from lora_jax.export.merge import as_stored, merged_tensors, tensors_beside
from lora_jax.export.safetensors_writer import Contents, write_checkpoint
from lora_jax.hf_checkpoint import Checkpoint

if TYPE_CHECKING:
    from lora_jax.model import CausalLM

__all__ = ["SAVE_METHODS", "copy_small_files", "dtype_of_merged", "merged_contents", "save_merged"]

# Copied byte for byte: what turns text into ids and back, and how to generate.
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
SAVE_METHODS = ("merged_16bit", "merged_4bit", "lora")
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}


def save_merged(
    model: "CausalLM",
    folder: Path,
    tokenizer: Any = None,
    *,
    save_method: str = "merged_16bit",
    merge_base: str = "dequantized",
    dtype: str | None = None,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    verbose: bool = True,
) -> Path:
    """Writes base and adapter merged into one model, one tensor at a time, and reads every byte back.

    config.json is the source's without `quantization_config`; tokenizer, chat template and generation_config.json are
    copied byte for byte.

    Args:
      model: it is not changed, so that saving twice gives the same files.
      folder: where to; it appears when everything is written.
      tokenizer: only its chat template is used, if it is not the one of the source.
      save_method: "merged_16bit"; "merged_4bit" for linear layers in NF4 as bitsandbytes stores it (see
        `lora_jax.export.bnb`); or "lora" for the adapter alone.
      merge_base: "dequantized" or "original", see `lora_jax.export.merge`.
      dtype: "bfloat16", "float16" or "float32"; None for the source's own if that has 16 bits, else bfloat16.
      max_shard_size: bytes of one file at most.
      overwrite: replace an existing folder.
      verbose: show progress and what was merged.

    Raises:
      FileExistsError, OSError: the folder exists, cannot be written, or the disk is full.
      FileNotFoundError: the folder that the model was loaded from is gone.
      ValueError: unknown method, base or dtype, a weight that float16 cannot hold, or one that is not finite.
    """
    if save_method == "lora":
        return model.save_pretrained(folder, overwrite=overwrite)
    if save_method not in SAVE_METHODS:
        raise ValueError(f"save_method={save_method!r} is unknown; known are {', '.join(SAVE_METHODS)}")
    name = dtype_of_merged(model, dtype)
    if not (model.source / "config.json").exists():
        raise FileNotFoundError(f"{model.source} is gone: its config.json and tokenizer belong into the merged folder")
    contents = merged_contents(model, save_method, merge_base, name)
    bar = Progress(disable=not verbose, transient=True)
    with folder_aside(folder, overwrite, kept=[model.source]) as aside, bar as progress:
        task = progress.add_task("Writing merged weights", total=len(contents.shapes))

        def blocks(key: str) -> Iterator[np.ndarray]:
            progress.advance(task)
            yield from contents.blocks(key)

        write_checkpoint(aside, dataclasses.replace(contents, blocks=blocks), max_shard_size)
        quantization = quantization_config(model, name) if save_method == "merged_4bit" else None
        _write_config(model.hf_config, model.source / "config.json", aside / "config.json", name, quantization)
        copy_small_files(model.source, aside, tokenizer)
    if verbose:
        base = {"dequantized": "the weights it was trained on", "original": "the 16-bit weights of the source"}
        kind = "NF4" if save_method == "merged_4bit" else name
        print(f"merged the adapter into {base[merge_base]} (merge_base={merge_base!r}) as {kind}")
        if save_method == "merged_4bit" and model.config.moe is not None:
            print(f"the experts are in {name}: transformers' bitsandbytes integration quantises linear layers only")
    return folder


def dtype_of_merged(model: "CausalLM", dtype: str | None = None) -> str:
    """Name of the dtype that a merged model is written in. Raises ValueError if that is unknown."""
    stored = model.hf_config.get("dtype") or model.hf_config.get("torch_dtype")
    name = dtype or (stored if stored in ("bfloat16", "float16") else "bfloat16")
    if name not in _DTYPES:
        raise ValueError(f"dtype={name!r} is unknown; known are {', '.join(_DTYPES)}")
    return name


def merged_contents(model: "CausalLM", save_method: str, merge_base: str, dtype: str) -> Contents:
    """The tensors of the folder that `save_merged` writes; arguments and errors as there."""
    tensors = merged_tensors(model, merge_base)
    weights = nf4_names(model) if save_method == "merged_4bit" else set()
    if model.config.hf_prefix != "model" or model.config.moe is not None:
        source = Checkpoint(model.source)
        weights = {source.stored_name(name) for name in weights}
        tensors = as_stored(source, tensors | tensors_beside(model))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    narrow = _DTYPES[dtype]

    def blocks(name: str) -> Iterator[np.ndarray]:
        return (_round(name, block, narrow) for block in tensors[name].blocks())

    contents = Contents(shapes, {name: narrow for name in shapes}, blocks)
    return quantized(contents, tensors, weights) if weights else contents


def copy_small_files(source: Path, folder: Path, tokenizer: Any = None) -> None:
    """Copies tokenizer, chat template and generation settings; a template changed in `tokenizer` is written beside."""
    for file in _COPIED:
        if (source / file).exists():
            shutil.copyfile(source / file, folder / file)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str) and template != chat_template_of(source):
        # transformers reads this file before the entry of tokenizer_config.json.
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def chat_template_of(folder: Path) -> str | None:
    """The chat template that a model folder holds, or None."""
    if (path := folder / "chat_template.jinja").exists():
        return path.read_text(encoding="utf-8")
    for file in ("chat_template.json", "tokenizer_config.json"):
        path = folder / file
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.exists() else None
        if isinstance(template, list):  # several named templates
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        if template is not None:
            return template
    return None


def _round(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if not np.isfinite(tensor).all():
        raise ValueError(f"{name} is not finite after merging; the adapter has diverged, so nothing was written")
    if dtype == np.float16 and np.abs(tensor).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError(f"{name} exceeds the range of float16; use dtype='bfloat16'")
    return tensor.astype(dtype)


def _write_config(
    config: dict[str, Any], source: Path, target: Path, dtype: str, quantization: dict[str, Any] | None
) -> None:
    """config.json with that `quantization_config` and the dtype that was written; its bytes if nothing changes."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    new = {k: v for k, v in config.items() if k != "quantization_config"}
    if new.get(key) != dtype:
        new[key] = dtype
    if quantization is not None:
        new["quantization_config"] = quantization
    if new == config:
        shutil.copyfile(source, target)
    else:
        target.write_text(json.dumps(new, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
