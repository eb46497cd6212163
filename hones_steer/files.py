"""Files and folders that appear whole or not at all.

What is written goes into a hidden sibling of its final place, is synced to the disk, and is then renamed. A failure or
an interrupt removes the sibling; a process that is killed leaves it, as `.hones-….tmp`, which nothing reads.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hones_steer.errors import DataError, HonesError

_PREFIX, _SUFFIX = ".hones-", ".tmp"


def write_atomically(
    path: str | os.PathLike[str], data: bytes, *, parents: bool = True, error_type: type[HonesError] = DataError
) -> None:
    """Write a file: whatever happens, `path` holds the whole new file, or what was there before.

    Missing parent folders are made, unless `parents` is False.

    Raises:
        DataError: the file cannot be written (disk full, no permission). `error_type` replaces DataError.
    """
    with _named_errors(Path(path), error_type), new_file(path, parents=parents) as temporary:
        temporary.write_bytes(data)


@contextmanager
def new_file(path: str | os.PathLike[str], *, parents: bool = True) -> Iterator[Path]:
    """Give the block a path to write a file to; the file replaces `path` when the block ends well.

    Raises:
        OSError: the file cannot be written.
    """
    with _renamed_to(Path(path), parents) as temporary:
        yield temporary


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the block an empty folder to write into; it becomes `path` when the block ends well.

    Raises:
        DataError: `path` exists and is not an empty folder, or it cannot be written (disk full, no permission).
    """
    target = Path(path)
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise DataError(f"{target}: exists already; name a new folder")
    with _named_errors(target, DataError), _renamed_to(target, True) as temporary:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _sync(file)


def is_leftover(path: Path) -> bool:
    """Whether this is a file that a killed process was writing."""
    return path.name.startswith(_PREFIX) and path.name.endswith(_SUFFIX) and path.is_file()


@contextmanager
def _named_errors(target: Path, error_type: type[HonesError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise error_type(f"{target}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _renamed_to(target: Path, parents: bool) -> Iterator[Path]:
    """Give the block a sibling of `target` to create; on failure remove it, and the parents that were made for it."""
    temporary = target.with_name(f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")
    made = [folder for folder in target.parents if not folder.exists()] if parents else []
    try:
        if parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        with suppress(OSError):  # the file is in place; some file systems cannot sync a folder
            _sync(target.parent)
    except BaseException:  # an interrupt leaves nothing behind either
        _remove(temporary, made)
        raise


def _remove(temporary: Path, made: Iterable[Path]) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    for remove in (temporary.unlink, *(folder.rmdir for folder in made)):
        with suppress(OSError):  # not there, or another process has written into the folder
            remove()


def _sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
