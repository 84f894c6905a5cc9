"""Checkpoints of a training run: `output_dir/checkpoint-N/`, written by Orbax, complete or not there at all.

    checkpoint-N/
      arrays/                  LoRA parameters and optimizer state (Orbax)
      trainer_state.json       step, fingerprint of data and settings, log history
      adapter_model.safetensors, adapter_config.json   the same adapter in PEFT's form, if the model can write it
      manifest.json            size and CRC-32 of every other file, written last

Everything is written into a folder of another name, which is renamed to `checkpoint-N` when it is complete and on disk:
a process killed at any moment leaves the older checkpoints as they were. One that is deleted is renamed first, too, so
that none is ever there by half. The manifest shows later damage (a truncated copy, a failing disk) before any of it is
used. This module is the only one that knows Orbax.

With several processes all of them save and restore, in a folder that they share: each writes its part of the arrays,
the first one everything else.
"""

import json
import os
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.distributed import gather, is_first, together

_NAME = re.compile(r"checkpoint-(\d+)")
_LEFT_OVER = re.compile(r"\.checkpoint-\d+\.(unfinished|deleted)")
_MANIFEST = "manifest.json"
_STATE = "trainer_state.json"
_ARRAYS = "arrays"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not fit what it is to be restored into."""


@dataclass(frozen=True)
class Restored:
    """What `restore` read back."""

    lora: Any  # the pytree given to `restore`, with the saved values
    opt_state: Any  # likewise
    state: dict[str, Any]  # the `state` given to `save`


class Checkpointer:
    """Writes the checkpoints of one output folder in the background, one at a time.

    Args:
        output_dir: the folder that holds `checkpoint-N`; made if absent. What an interrupted save left is removed.
        keep: how many of the newest checkpoints to keep; None keeps all.

    Attributes:
        best: the step of a checkpoint that is kept in any case, as one of these; None for none.
    """

    def __init__(self, output_dir: str | os.PathLike[str], *, keep: int | None = None) -> None:
        self.output_dir = Path(output_dir).resolve()  # Orbax wants absolute paths
        self.keep = keep
        self.best: int | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saving = ""
        try:
            with together(f"preparing {self.output_dir}"):
                if is_first():
                    self._prepare()
        except OSError as error:
            raise CheckpointError(
                f"Cannot write to output_dir {self.output_dir}: {error}. Choose an output_dir that can be written."
            ) from error

    def _prepare(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for path in self.output_dir.iterdir():
            if _LEFT_OVER.fullmatch(path.name):
                shutil.rmtree(path)

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, which may be there or not."""
        return self.output_dir / f"checkpoint-{step}"

    def save(
        self,
        step: int,
        lora: Any,
        opt_state: Any,
        state: Mapping[str, Any],
        *,
        write_extra: Callable[[Path], None] | None = None,
        wait: bool = False,
    ) -> Path:
        """Start writing `checkpoint-{step}`; returns its path while a thread writes it.

        The arrays are copied to the host before this returns, so the caller may donate them to the next step. An error
        of the save before is raised here (CheckpointError).

        Args:
            step: number of completed optimizer steps.
            lora: pytree of arrays.
            opt_state: pytree of arrays.
            state: JSON-able values to have back from `restore`.
            write_extra: called with the unfinished folder, to put more files there; in every process. Runs before this
                returns, since it may read arrays that the next step takes over.
            wait: return only when the checkpoint is complete.
        """
        self.wait()
        from orbax.checkpoint import v1 as ocp

        final = self.path(step)
        unfinished = self.output_dir / f".checkpoint-{step}.unfinished"
        self._saving = final.name
        try:
            with together(f"saving {final.name}"):
                if is_first():
                    if unfinished.exists():
                        shutil.rmtree(unfinished)
                    unfinished.mkdir()
                    (unfinished / _STATE).write_text(json.dumps(dict(state), indent=1))
            if write_extra is not None:
                write_extra(unfinished)
            response = ocp.save_async(str(unfinished / _ARRAYS), _by_path(lora, opt_state))
        except Exception as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise self._explain(error) from error

        def finish() -> None:
            try:
                response.result()  # in the first process it is there when all have written
                if is_first():
                    self._finish(unfinished, final)
            except BaseException as error:  # handed to the training thread by wait()
                self._error = error
                shutil.rmtree(unfinished, ignore_errors=True)

        # Not a daemon: a program that ends normally finishes the save first.
        self._thread = threading.Thread(target=finish, name=f"save {final.name}")
        self._thread.start()
        if wait:
            self.wait()
        return final

    def _finish(self, unfinished: Path, final: Path) -> None:
        _write_manifest(unfinished)
        before = _put_aside(final) if final.exists() else None  # a rerun of this step: the new one is on disk by now
        os.replace(unfinished, final)
        _sync(self.output_dir)
        if before is not None:
            shutil.rmtree(before)
        self._delete_old()

    def wait(self, *, alone: bool = False) -> None:
        """Return when no save is running. Raises CheckpointError if the last one failed.

        All processes must call it, and have the error if one has, unless each is to wait `alone`.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        failures = [] if alone else gather(None if error is None else _first_line(error))
        if error is not None:
            raise self._explain(error) from error
        for number, text in enumerate(failures):
            if text is not None:
                raise self._explain(RuntimeError(f"process {number}: {text}"))

    def delete_after(self, step: int) -> None:
        """Remove every checkpoint of a later step."""
        self.wait()
        with together("removing checkpoints"):
            for path in list_checkpoints(self.output_dir) if is_first() else ():
                if step_of(path) > step:
                    shutil.rmtree(_put_aside(path))

    def _delete_old(self) -> None:
        if self.keep is None:
            return
        *older, newest = list_checkpoints(self.output_dir)
        rest = [path for path in older if step_of(path) != self.best]
        spare = max(
            0, self.keep - 1 - (len(older) - len(rest))
        )  # beside the newest, which a resume needs, and the best
        for path in rest[: len(rest) - spare]:
            shutil.rmtree(_put_aside(path))

    def _explain(self, error: BaseException) -> CheckpointError:
        try:
            free = f" {shutil.disk_usage(self.output_dir).free / 2**20:.0f} MiB are free there."
        except OSError:
            free = ""
        kept = [path.name for path in list_checkpoints(self.output_dir)]
        return CheckpointError(
            f"Could not save {self._saving} in {self.output_dir}: {_first_line(error)}.{free} "
            f"Complete checkpoints there: {', '.join(kept) or 'none'}. Free some space or choose another output_dir; a "
            "smaller save_total_limit needs less."
        )


def list_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The folders `checkpoint-N` of an output folder, by rising N; whether they are intact is not looked at."""
    folder = Path(output_dir)
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of a folder named `checkpoint-N`."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named checkpoint-N.")
    return int(match[1])


def latest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest intact checkpoint of an output folder, or None. Damaged ones are named on stderr and passed over."""
    for path in reversed(list_checkpoints(output_dir)):
        problem = find_damage(path)
        if problem is None:
            return path
        print(f"lora-jax: {path} is damaged ({problem}); trying the one before it.", file=sys.stderr)
    return None


def find_damage(checkpoint: str | os.PathLike[str]) -> str | None:
    """What is wrong with the files of a checkpoint, by its manifest, or None. Reads every file once."""
    folder = Path(checkpoint)
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        for name, (size, crc) in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if _crc32(path) != crc:
                return f"{name} has other content than was written"
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} or a file it lists cannot be read: {_first_line(error)}"
    return None


def read_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """The `state` that was given to `save`."""
    return json.loads((Path(checkpoint) / _STATE).read_text())


def restore(checkpoint: str | os.PathLike[str], lora: Any, opt_state: Any) -> Restored:
    """Read a checkpoint into pytrees of the same structure, shapes, dtypes and shardings as those given.

    Args:
        checkpoint: a folder `checkpoint-N`.
        lora: pytree of arrays as it is to be; only structure, shapes, dtypes and shardings are used.
        opt_state: likewise.

    Raises:
        CheckpointError: the folder is absent or damaged, or holds parameters of another model, adapter or optimizer.
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(checkpoint).resolve()
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint {folder}. Give a folder named checkpoint-N.")
    if (problem := find_damage(folder)) is not None:
        raise CheckpointError(
            f"{folder} is damaged: {problem}. Use another checkpoint, or resume_from_checkpoint=True for the newest "
            "intact one."
        )
    wanted = _by_path(lora, opt_state, copy=False)
    saved = ocp.metadata(str(folder / _ARRAYS)).metadata
    _check_fits(folder, saved, wanted)
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x)) for name, x in wanted.items()}
    arrays: dict[str, Any] = dict(ocp.load(str(folder / _ARRAYS), abstract))

    def fill(prefix: str, tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: arrays[_name(prefix, path)], tree)

    return Restored(fill("lora", lora), fill("opt_state", opt_state), read_state(folder))


def _name(prefix: str, path: Any) -> str:
    return f"{prefix}{jax.tree_util.keystr(path)}"


def _by_path(lora: Any, opt_state: Any, *, copy: bool = True) -> dict[str, Any]:
    """{name: leaf} of both trees: a checkpoint depends on names and shapes, not on Python classes."""
    named = {
        _name(prefix, path): leaf
        for prefix, tree in (("lora", lora), ("opt_state", opt_state))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return {name: _host_copy(leaf) for name, leaf in named.items()} if copy else named


def _host_copy(leaf: Any) -> Any:
    # A view of a CPU array would change under the writing thread when the next step takes the buffer over, so copy.
    # Arrays spread over several processes cannot be copied here; Orbax copies those off the device itself.
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf
    return np.array(leaf)


def _sharding(leaf: Any) -> Any:
    return getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _check_fits(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    problems = [f"{name} is only in the checkpoint" for name in saved if name not in wanted]
    problems += [f"{name} is not in the checkpoint" for name in wanted if name not in saved]
    for name in wanted.keys() & saved.keys():
        got, want = (tuple(saved[name].shape), saved[name].dtype), (tuple(wanted[name].shape), wanted[name].dtype)
        if got != want:
            problems.append(f"{name} is {got[1]}{list(got[0])} in the checkpoint and {want[1]}{list(want[0])} here")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{folder} was saved from another model, adapter or optimizer: {'; '.join(sorted(problems)[:3])}{more}. "
            "Resume with the model, LoRA settings and optimizer it was saved with, or choose another output_dir."
        )


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {}
    for path in files:
        _sync(path)
        manifest[path.relative_to(folder).as_posix()] = (path.stat().st_size, _crc32(path))
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync(folder / _MANIFEST)
    for directory in {path.parent for path in files} | {folder}:
        _sync(directory)


def _put_aside(checkpoint: Path) -> Path:
    """Give a checkpoint that is to be deleted a name that nobody takes for one; returns the new path."""
    aside = checkpoint.with_name(f".{checkpoint.name}.deleted")
    if aside.exists():
        shutil.rmtree(aside)
    return checkpoint.rename(aside)


def _sync(path: Path) -> None:
    """Have the file or folder on disk before going on, so that a rename never overtakes the data it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
