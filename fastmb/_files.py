"""Writing a file so that whoever reads it, whatever happens, finds the old one or the new one, whole."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def replace(path: str | os.PathLike[str], parts: Iterable[bytes | memoryview]) -> None:
    """Make `parts`, one after the other, the content of the file at `path`; a symbolic link is followed.

    They go to a temporary file in the same folder, which takes the place of the other when the disk has all of it.
    A process that is killed may leave the temporary file, ``.<name>.tmp``; the next one to save there writes over it.
    Several that save at once wait for one another.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.tmp")
    with open(_lock(temporary), "wb") as file:
        try:
            file.truncate(0)
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(FileNotFoundError):
                temporary.unlink()
            raise
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _lock(path: Path) -> int:
    """A descriptor of the file at `path`, made if need be, that no other process or thread has locked."""
    while True:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it has become somebody's target while this one waited
