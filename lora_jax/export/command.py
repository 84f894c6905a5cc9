"""What `lora-jax export` does: several targets of one model, each checked before any of them appears."""

import contextlib
import dataclasses
import errno
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_jax.config import did_you_mean
from lora_jax.export import verify
from lora_jax.export.aside import folder_aside
from lora_jax.export.gguf import save_ggufs
from lora_jax.export.gguf_lora import ADAPTER_TYPES
from lora_jax.export.gguf_mixtures import file_types
from lora_jax.export.hf import dtype_of_merged, merged_contents
from lora_jax.export.peft import adapter_tensors, read_adapter
from lora_jax.export.verify import Answers, Check
from lora_jax.reporting import console

if TYPE_CHECKING:
    from lora_jax.model import CausalLM

__all__ = ["Target", "export", "parse_targets"]

_METHODS = {"hf": "merged_16bit", "bnb-4bit": "merged_4bit"}
_PLAIN = ("peft", *_METHODS)
_OF_GGUF = ("gguf", "ollama", "ollama-lora")  # with a type of GGUF file
_OF_ADAPTER = ("peft", "gguf-lora", "ollama-lora")
_DEFAULT_TYPES = {"gguf-lora": "f32", "ollama": "q8_0", "ollama-lora": "q8_0"}


@dataclasses.dataclass(frozen=True)
class Target:
    """One thing to write."""

    kind: str  # name of its folder: "peft", "hf", "bnb-4bit", "gguf", "gguf-lora", "ollama" or "ollama-lora"
    type: str = ""  # of the GGUF file

    def __str__(self) -> str:
        return f"{self.kind}:{self.type}" if self.type else self.kind


def parse_targets(names: Iterable[str]) -> list[Target]:
    """Targets by their names, such as "hf" and "gguf:q4_k_m".

    Raises:
      ValueError: a name is unknown; those that exist.
    """
    targets: dict[Target, None] = {}
    for name in names:
        kind, _, type = name.lower().partition(":")
        type = type or _DEFAULT_TYPES.get(kind, "")
        if kind in _OF_GGUF and type:
            targets |= dict.fromkeys(Target(kind, known) for known in file_types(type))
        elif (kind == "gguf-lora" and type in ADAPTER_TYPES) or (kind in _PLAIN and not type):
            targets[Target(kind, type)] = None
        else:
            kinds = [*_PLAIN, *(f"gguf-lora:{t}" for t in ADAPTER_TYPES), *(f"{k}:TYPE" for k in _OF_GGUF)]
            every = ", ".join(f"gguf:{t}" for t in file_types(None))
            hint = did_you_mean(kind, [*_PLAIN, "gguf-lora", *_OF_GGUF])
            raise ValueError(f"--to {name} is unknown; there are {', '.join(kinds)}; with a TYPE as in {every}.{hint}")
    for kind in ("ollama", "ollama-lora"):
        if len(types := [t.type for t in targets if t.kind == kind]) > 1:
            raise ValueError(f"--to {kind} is for one type, got {', '.join(types)}: the folder is of one model")
    return list(targets)


def export(
    model: "CausalLM",
    tokenizer: Any,
    targets: Sequence[Target],
    out: Path,
    *,
    merge_base: str = "dequantized",
    overwrite: bool = False,
    answers: bool = True,
    verbose: bool = True,
    imatrix: Path | None = None,
    max_shard_size: int | str | None = None,
    device: Any = None,
) -> list[Check]:
    """Writes every target into a folder of `out` named after its kind, checks all of them, and prints a table.

    The folders appear when all are written and nothing was found wrong. All GGUF files of the merged model, that of
    "ollama" among them, are written in one pass over the weights; a type that "gguf" and "ollama" have in common is one
    file with two names where the file system has links.

    Args:
      model: base and adapter; it is not changed.
      tokenizer: the model's.
      targets: what to write.
      out: made if it does not exist.
      merge_base: "dequantized" or "original", see `lora_jax.export.merge`.
      overwrite: replace folders that exist.
      answers: compare answers to fixed prompts, too; else tensors alone.
      verbose: show progress.
      imatrix, max_shard_size, device: of the merged GGUF files, see `lora_jax.export.gguf.write_ggufs`; those of Ollama
        are not split.

    Returns:
      What was compared.

    Raises:
      ValueError: something written is not what was meant (nothing is left of it), or a target that this model cannot
        have.
      FileExistsError, OSError: a folder exists, cannot be written, or there is too little room on the disk.
    """
    kinds = list(dict.fromkeys(target.kind for target in targets))
    if max_shard_size is not None and "ollama" in kinds:
        raise ValueError("max_shard_size splits GGUF files, and Ollama takes whole ones: export it apart")
    kinds.sort(key=lambda kind: kind == "ollama")  # after "gguf", with which it is written
    if model.lora_config is None and (without := [kind for kind in kinds if kind in _OF_ADAPTER]):
        raise ValueError(f"{model.name_or_path} has no adapter, which --to {without[0]} writes; export the run instead")
    _check_room(model, targets, out)
    checks, sizes = [], {}
    with contextlib.ExitStack() as stack:
        folders = {
            kind: stack.enter_context(folder_aside(out / kind, overwrite, kept=[model.source])) for kind in kinds
        }
        trained = verify.answers_of(model, tokenizer) if answers else None
        of_gguf = {"imatrix": imatrix, "max_shard_size": max_shard_size, "device": device}
        writer = _Writer(model, tokenizer, targets, merge_base, trained, verbose, of_gguf)
        for kind, folder in folders.items():
            for target, files, found in writer.write(kind, folder):
                checks += found
                sizes[str(target)] = sum(file.stat().st_size for file in files)
        console.print(verify.table(checks, sizes))
        if wrong := [check for check in checks if check.passed is False]:
            raise ValueError(
                f"the export of {wrong[0].target} is not the trained model: {wrong[0].what}: {wrong[0].found}"
                f"{f' (allowed: {wrong[0].limit})' if wrong[0].limit else ''}. Nothing was kept"
            )
    return checks


@dataclasses.dataclass(frozen=True)
class _Writer:
    """Writes and checks the targets, those of one kind at a time; "gguf" before "ollama"."""

    model: "CausalLM"
    tokenizer: Any
    targets: Sequence[Target]
    merge_base: str
    trained: Answers | None
    verbose: bool
    of_gguf: dict[str, Any]  # options of the merged GGUF files
    for_ollama: dict[str, Path] = dataclasses.field(default_factory=dict)  # type -> file that is there already

    def write(self, kind: str, folder: Path) -> Iterable[tuple[Target, list[Path], list[Check]]]:
        """Yields each target, its files, and what was found."""
        targets = [target for target in self.targets if target.kind == kind]
        if kind == "peft":
            self.model.save_pretrained(folder)
            yield targets[0], _files(folder), [self._check_adapter(folder)]
        elif kind in _METHODS:
            checks = self._write_folder(kind, folder)
            yield targets[0], _files(folder), checks
        elif kind == "gguf":
            for target, parts in self._write_gguf(folder, targets):
                yield target, parts, self._check_gguf(target, parts[0])
        elif kind == "gguf-lora":
            for target in targets:
                path = self.model.save_pretrained_gguf_lora(folder, target.type)
                yield target, [path], [Check(str(target), "tensors", "equal", "bit for bit")]
        else:
            checks = self._write_ollama(targets[0], folder)
            yield targets[0], _files(folder), checks

    def _check_adapter(self, folder: Path) -> Check:
        got, want = read_adapter(self.model, folder).tensors, adapter_tensors(self.model)
        wrong = [name for name in want if name not in got or not np.array_equal(got[name], want[name])]
        found = f"{len(want)} equal" if not wrong else f"{len(wrong)} of {len(want)} differ: {', '.join(wrong[:3])}"
        return Check("peft", "tensors", found, "bit for bit", not wrong and got.keys() == want.keys())

    def _write_folder(self, kind: str, folder: Path) -> list[Check]:
        method, dtype = _METHODS[kind], dtype_of_merged(self.model)
        options: Any = {"save_method": method, "merge_base": self.merge_base, "verbose": self.verbose}
        self.model.save_pretrained_merged(folder, self.tokenizer, **options)
        contents = merged_contents(self.model, method, self.merge_base, dtype)
        checks = [verify.check_tensors(kind, folder, contents)]
        if self.trained is not None and checks[0].passed:
            limit = self._limit("4" if kind == "bnb-4bit" else "bf16")
            own = self.model.module.dtype.name
            checks.append(verify.check_folder(kind, folder, self.trained, own, nf4=kind == "bnb-4bit", limit=limit))
        return checks

    def _write_gguf(self, folder: Path, targets: list[Target]) -> Iterable[tuple[Target, list[Path]]]:
        types = [target.type for target in targets]
        for_ollama = [target.type for target in self.targets if target.kind == "ollama"]
        options: Any = {"merge_base": self.merge_base, "verbose": self.verbose, **self.of_gguf}
        files = save_ggufs(self.model, folder, self.tokenizer, [*types, *for_ollama], **options)
        self.for_ollama.update({type: files[type][0] for type in for_ollama})
        return ((target, files[target.type]) for target in targets)

    def _check_gguf(self, target: Target, path: Path, lora: Path | None = None) -> list[Check]:
        checks = [Check(str(target), "tensors", "read back", "rounding")]  # when written
        if self.trained is not None:
            limit = self._limit(target.type)
            checks.append(verify.check_gguf(str(target), path, self.trained, lora=lora, limit=limit))
        return checks

    def _write_ollama(self, target: Target, folder: Path) -> list[Check]:
        as_adapter = target.kind == "ollama-lora"
        made = None if as_adapter else self.for_ollama.get(target.type)
        options: Any = {"as_adapter": as_adapter, "merge_base": self.merge_base, "verbose": self.verbose}
        options |= {"gguf": made, **{key: self.of_gguf[key] for key in ("imatrix", "device")}}
        self.model.save_pretrained_ollama(folder, self.tokenizer, target.type, **options)
        if made is not None and Target("gguf", target.type) not in self.targets:
            made.unlink()  # it was there for this alone
        files = sorted(folder.glob("*.gguf"))
        lora = next((file for file in files if as_adapter and "-lora." in file.name), None)
        (path,) = (file for file in files if file != lora)
        return self._check_gguf(target, path, lora)

    def _limit(self, type: str) -> float:
        assert self.trained is not None
        exact, same_base = self.model.module.dtype == np.float32, self.merge_base == "dequantized"
        return verify.limit_of(type, self.trained, exact=exact, same_base=same_base)


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file()]


# Bits of a weight in GGUF files of a type that begins so, at least.
_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8": 8.5, "q6": 6.5, "q5": 5.5, "q4": 4.5, "q3": 3.4, "q2": 2.6}


def _check_room(model: "CausalLM", targets: Sequence[Target], out: Path) -> None:
    """Raises OSError if the disk is too small, before anything is written."""
    weights = sum(math.prod(slot.shape) for slot in model.module.slots().values())
    needed = 0
    for target in targets:
        if target.kind == "ollama" and Target("gguf", target.type) in targets:
            continue  # the same file
        if target.kind in _METHODS:
            contents = merged_contents(model, _METHODS[target.kind], "dequantized", dtype_of_merged(model))
            needed += sum(contents.sizes.values())
        elif target.kind in _OF_GGUF:
            needed += weights * next(bits for name, bits in _BITS.items() if target.type.startswith(name)) / 8
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{out} needs {needed / 1e9:.3f} GB for {', '.join(map(str, targets))}, {free / 1e9:.3f} GB are free "
            "there: make room, choose another --out, or fewer or smaller targets",
        )
