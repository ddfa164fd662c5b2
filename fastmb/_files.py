"""Writing a file so that whoever reads it, whatever happens, finds the old one or the new one, whole."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 23  # bytes
_NAME = 60  # characters of a name, 4 bytes each at most, that the temporary one has: 255 bytes are allowed


def replace(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Make what `write` writes to the file it is given the content of the file at `path`; a symbolic link is followed.

    That is a temporary file in the same folder, which takes the place of the other when the disk has all of it.
    A process that is killed may leave the temporary file, ``.<name>.tmp`` (of a long name the beginning); the next one
    to save there writes over it. Several that save at once wait for one another.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:_NAME]}.tmp")
    with open(_lock(temporary), "wb") as file:
        try:
            file.truncate(0)
            write(file)
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


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise an `OSError` that names the argument `path` unless `replace` can make a file there."""
    import tempfile

    target, got = Path(os.path.realpath(path)), repr(os.fspath(path))
    if target.is_dir():
        raise IsADirectoryError(f"path must be that of a file; got the folder {got}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists; got {got}")
    try:
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise OSError(error.errno, f"path must be in a folder where files can be made; got {got}") from error


def send(file: BinaryIO, part: memoryview) -> None:
    """Write `part`, and have the system begin to move it to the disk, so that an fsync later has less to wait for."""
    for start in range(0, len(part), _CHUNK):
        piece = part[start : start + _CHUNK]
        file.write(piece)
        if len(piece) == _CHUNK:
            with suppress(OSError):  # a hint
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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
