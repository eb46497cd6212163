"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hones_steer.errors import DataError
from hones_steer.profile import StrPath


@contextmanager
def new_folder(folder: StrPath) -> Iterator[Path]:
    """Within the block, an empty hidden sibling to write into; it becomes `folder` when the block ends well.

    Parents are made. Whatever fails, neither the sibling nor parents made for it are left behind.

    Raises:
        DataError: `folder` exists and is not an empty folder, or it cannot be written (disk full, no permission).
    """
    target = Path(folder)
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise DataError(f"{target}: exists already; name a new folder")
    made = [parent for parent in target.parents if not parent.exists()]
    temporary = target.with_name(f".hones-{secrets.token_hex(8)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for file in (*temporary.iterdir(), temporary):
            sync(file)
        temporary.rename(target)
        sync(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError):
            raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
