"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb", **how: Any) -> Iterator[IO[Any]]:
    """A file to write, which becomes `path` at the end: whatever happens, what is there is the old file or the new one.

    It is on disk when the context ends; after an exception the old one stays and nothing else is left. After a kill a
    hidden file may be left beside it. Raises OSError.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with open(handle, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are for their owner alone; these are as others are.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_unfinished(path: Path) -> None:
    """Removes what a kill left of `path` being written. Raises OSError."""
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink(missing_ok=True)


def write_durably(path: Path, content: bytes) -> None:
    """A file that is on the disk when this returns. Raises OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def move_durably(made: Path, path: Path) -> None:
    """A file that is whole takes the place of another. Raises OSError."""
    with made.open("rb+") as file:
        os.fsync(file.fileno())
    made.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Brings the names of a folder's files to disk, where the system has that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path, force: bool) -> None:
    """Makes a folder for results; without `force` it must not hold anything. Raises FileExistsError, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    if not force and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder}: expected no such folder, or an empty one; --force writes into it all the same"
        )


def check_absent(path: Path, force: bool) -> None:
    """Raises FileExistsError for a path that exists, unless with `force`."""
    if path.exists() and not force:
        raise FileExistsError(f"{path}: it exists; --force replaces it")
