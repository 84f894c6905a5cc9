"""Outputs are written aside and renamed when they are whole, so that a failure leaves nothing half-written."""

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["file_aside", "folder_aside"]


@contextlib.contextmanager
def folder_aside(folder: Path, overwrite: bool, kept: Iterable[Path] = ()) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `folder` when the block ends without an error.

    Args:
      folder: where to.
      overwrite: replace what is there, all of it.
      kept: what must not be replaced along with it, such as the model that is being exported.

    Raises:
      FileExistsError: the folder exists, holds something, and `overwrite` is False; or it holds the working directory
        or something of `kept`.
      OSError: it cannot be written, or the disk is full; an existing folder is left as it was.
    """
    folder = folder.expanduser().absolute()
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; give the name of a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder or pass overwrite=True")
    for path in (Path.cwd(), *kept):
        if path.resolve().is_relative_to(folder.resolve()):
            raise FileExistsError(f"{folder} holds {path}, which overwriting it would remove; choose another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise type(error)(error.errno, f"{folder} cannot be written ({error.strerror}); choose another place") from None
    try:
        yield aside
        os.chmod(aside, 0o777 & ~_umask())  # mkdtemp makes it private
        _replace(aside, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk is full while writing {folder}; nothing was changed there, make room and save again"
            raise OSError(error.errno, message) from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def file_aside(path: Path) -> Iterator[Path]:
    """Yields the name of a file beside `path` that becomes `path` when the block ends without an error.

    Raises:
      OSError: it cannot be written, or the disk is full; an existing file is left as it was.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield scratch
        os.replace(scratch, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"the disk is full while writing {path}; make room and save again") from error
        raise
    finally:
        scratch.unlink(missing_ok=True)


def _replace(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`, whose former content is removed last."""
    if not folder.exists():
        os.rename(new, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    os.rename(folder, old / "content")
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old / "content", folder)
        old.rmdir()
        raise
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
