"""Model folders from one format to another, without a training run.

    python -m lora_jax.tools.convert gguf-to-hf model.Q4_K_M.gguf FOLDER [--dtype bfloat16]
    python -m lora_jax.tools.convert hf-to-orbax FOLDER OUT
    python -m lora_jax.tools.convert orbax-to-hf FOLDER OUT
    python -m lora_jax.tools.convert checkpoint-to-peft RUN/checkpoint-100 OUT
    python -m lora_jax.tools.convert peft-to-gguf ADAPTER OUT [--dtype f32]

A folder of `hf-to-orbax` holds config.json and the tokenizer as they were, and the tensors by their Hugging Face names
in Orbax checkpoints, `tensors-00001-of-00002` ..., each of one file of safetensors: as much as is in memory at once.
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.export.aside import folder_aside
from lora_jax.export.hf import copy_small_files
from lora_jax.export.safetensors_writer import Contents, write_checkpoint
from lora_jax.hf_checkpoint import read_json, resolve_folder

__all__ = ["checkpoint_to_peft", "hf_to_orbax", "orbax_to_hf", "peft_to_gguf"]

_SHARDS = "tensors-{:05}-of-{:05}"


def hf_to_orbax(source: str | Path, folder: Path, *, overwrite: bool = False) -> Path:
    """Writes the tensors of a Hugging Face folder as Orbax checkpoints; returns the folder.

    Args:
      source: folder or hub id.
      folder: appears when everything is written and read back.
      overwrite: replace an existing folder.

    Raises:
      FileNotFoundError, ValueError: the source is not there or damaged.
      FileExistsError, OSError: the folder exists, cannot be written, or does not read back as it was written.
    """
    from orbax.checkpoint import v1 as ocp
    from safetensors.numpy import load_file

    source = resolve_folder(source)
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{source} holds no safetensors")
    with folder_aside(folder, overwrite, kept=[source]) as aside:
        for i, file in enumerate(files):
            path, tensors = aside.absolute() / _SHARDS.format(i + 1, len(files)), load_file(file)
            ocp.save(str(path), tensors)
            _compare(tensors, ocp.load(str(path)), path)
        shutil.copyfile(source / "config.json", aside / "config.json")
        copy_small_files(source, aside)
    return folder


def _compare(want: dict[str, np.ndarray], got: Any, path: Path) -> None:
    for name, tensor in want.items():
        if not np.array_equal(np.asarray(got[name]).view(np.uint8), tensor.view(np.uint8)):
            raise OSError(f"{path}: {name} does not read back as it was written; the disk may be failing")


def orbax_to_hf(source: Path, folder: Path, *, overwrite: bool = False) -> Path:
    """Writes a folder of `hf_to_orbax` as safetensors, of as many files; returns the folder. Raises as that."""
    from orbax.checkpoint import v1 as ocp

    paths = sorted(path for path in source.glob("tensors-*-of-*") if path.is_dir())
    if not paths or len(paths) != int(paths[0].name[-5:]):
        raise FileNotFoundError(f"{source} does not hold all its tensors-N-of-M; it is not of hf-to-orbax, or damaged")
    read_json(source / "config.json")
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, np.dtype] = {}
    where: dict[str, Path] = {}
    for path in paths:
        for name, about in ocp.metadata(str(path.absolute())).metadata.items():
            shapes[name], dtypes[name], where[name] = tuple(about.shape), np.dtype(about.dtype), path.absolute()
    loaded: dict[Path, Any] = {}

    def blocks(name: str) -> Iterator[np.ndarray]:
        if where[name] not in loaded:
            loaded.clear()  # one at a time
            loaded[where[name]] = ocp.load(str(where[name]))
        yield np.asarray(loaded[where[name]][name])

    largest = max(
        sum(np.prod(shapes[n]) * dtypes[n].itemsize for n in shapes if where[n] == path.absolute()) for path in paths
    )
    with folder_aside(folder, overwrite, kept=[source]) as aside:
        write_checkpoint(aside, Contents(shapes, dtypes, blocks), int(largest))
        shutil.copyfile(source / "config.json", aside / "config.json")
        copy_small_files(source, aside)
    return folder


def checkpoint_to_peft(checkpoint: Path, folder: Path, *, overwrite: bool = False) -> Path:
    """Writes the adapter of a training run's checkpoint as a PEFT folder; returns the folder.

    Raises:
      CheckpointError: it is damaged.
      FileNotFoundError: it is no checkpoint with an adapter.
    """
    from lora_jax.checkpoint import CheckpointError, find_damage

    names = ("adapter_config.json", "adapter_model.safetensors")
    if missing := [name for name in names if not (checkpoint / name).is_file()]:
        raise FileNotFoundError(f"{checkpoint} holds no {missing[0]}; name a folder checkpoint-N of a training run")
    if (damage := find_damage(checkpoint)) is not None:
        raise CheckpointError(f"{checkpoint} is damaged: {damage}; take an older one")
    with folder_aside(folder, overwrite, kept=[checkpoint]) as aside:
        for name in names:
            shutil.copyfile(checkpoint / name, aside / name)
    return folder


def peft_to_gguf(adapter: Path, folder: Path, file_type: str = "f32", *, overwrite: bool = False) -> Path:
    """Writes a PEFT adapter as a GGUF file for llama.cpp; returns the file. The base model is loaded for it.

    Raises as `lora_jax.loading.from_pretrained` and `lora_jax.export.gguf_lora.save_gguf_lora`.
    """
    from lora_jax.loading import from_pretrained

    model, _ = from_pretrained(adapter)
    return model.save_pretrained_gguf_lora(folder, file_type, overwrite=overwrite)


def main() -> None:
    """Read the arguments and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["gguf-to-hf", "hf-to-orbax", "orbax-to-hf", "checkpoint-to-peft", "peft-to-gguf"]
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", help="of gguf-to-hf and peft-to-gguf")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that exists")
    args = parser.parse_args()
    given: dict[str, Any] = {"overwrite": args.overwrite}
    if args.dtype is not None:
        given |= {"gguf-to-hf": {"dtype": args.dtype}, "peft-to-gguf": {"file_type": args.dtype}}[args.kind]
    if args.kind == "gguf-to-hf":
        from lora_jax.export.from_gguf import gguf_to_hf

        print(gguf_to_hf(args.source, args.out, **given))
    elif args.kind == "hf-to-orbax":
        print(hf_to_orbax(args.source, args.out, **given))
    else:
        convert = {"orbax-to-hf": orbax_to_hf, "checkpoint-to-peft": checkpoint_to_peft, "peft-to-gguf": peft_to_gguf}
        print(convert[args.kind](Path(args.source), args.out, **given))


if __name__ == "__main__":
    main()
