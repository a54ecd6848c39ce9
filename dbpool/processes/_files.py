"""Files that processes of one host share, which are written completely or not at all; and locks.

Imports the standard library alone: the gunicorn master imports this too.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import tempfile
import time
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

STATS_DIR: Final = "DBPOOL_STATS_DIR"  # the variable that names the directory they share
MAX_FILE_BYTES: Final = 1 << 20  # bytes of a file that is read, before and after decompression
_COMPRESSED_ABOVE: Final = 2 << 10  # bytes; a smaller file stays readable for people
LOCK_TIMEOUT: Final = 0.2  # seconds


@cache
def _clock_ticks_are_kept() -> bool:
    return Path("/proc/self/stat").exists()


def start_time(pid: int) -> str | None:
    """Return when that process started, in the kernel's ticks; None if there is no such process.

    Together they tell a process from a later one with the same pid. "0" if the system does not
    say. Processes in other pid namespaces, those of containers, are not visible: see
    `ProcessLock`.
    """
    if not _clock_ticks_are_kept():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "0"
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:  # noqa: PTH123  # many, often
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in b"ZX" else fields[19].decode()


def write(path: Path, data: object) -> int:
    """Write atomically: a reader finds the old file or the new one. Return the size in bytes.

    The file is JSON, compressed by zlib if it is long.
    """
    content = json.dumps(data, separators=(",", ":")).encode()  # dump() would not use the C encoder
    if len(content) > _COMPRESSED_ABOVE:
        content = zlib.compress(content, 1)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise
    return len(content)


def read(path: Path) -> Any:
    """Read a file that `write` wrote; raise `OSError` or `ValueError` if it is not one."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise ValueError("it is not a file of this user")
        if found.st_size > MAX_FILE_BYTES:
            raise ValueError("it is too large")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return json.loads(_decompressed(file.read()))
    except RecursionError as ex:
        raise ValueError("it is nested too deeply") from ex
    finally:
        os.close(fd)


def _decompressed(content: bytes) -> bytes:
    """Return what was compressed, and JSON as it is; raise `ValueError` for anything else."""
    if not content.startswith(b"x"):  # as zlib begins, but no JSON does
        return content
    decompressor = zlib.decompressobj()
    try:
        found = decompressor.decompress(content, MAX_FILE_BYTES)
    except zlib.error as ex:
        raise ValueError("it is damaged") from ex
    if not decompressor.eof:
        raise ValueError("it is too large or not complete")
    return found


class _LockFile:
    """An open file whose lock belongs only to this process.

    A forked child closes it: a lock lasts until the last copy of its descriptor is closed, and
    the child may outlive this process.
    """

    def __init__(self, path: str | Path, flags: int, dir_fd: int | None = None) -> None:
        flags |= os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self.fd = os.open(path, flags, 0o600, dir_fd=dir_fd)
        _lock_files.add(self)

    def close(self) -> None:
        """Close the file, which releases the lock unless a copy is still open."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            self.close()


_lock_files: weakref.WeakSet[_LockFile] = weakref.WeakSet()


def _close_inherited() -> None:
    for file in list(_lock_files):
        file.close()


os.register_at_fork(after_in_child=_close_inherited)


class NoLocks(OSError):
    """The file system does not support locks."""


class ProcessLock(_LockFile):
    """A new file, locked for as long as this process lives.

    Other processes ask `is_held` whether its maker lives, also from another pid namespace.
    Raises `NoLocks`, or another `OSError` if no file can be made.
    """

    def __init__(self, path: str | Path, dir_fd: int | None = None) -> None:
        super().__init__(path, os.O_EXCL, dir_fd)
        # Who asks `is_held` just now has it for a moment.
        if not _lock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB):
            os.unlink(path, dir_fd=dir_fd)
            self.close()
            raise NoLocks(errno.ENOLCK, os.strerror(errno.ENOLCK))


def is_held(path: str | Path, dir_fd: int | None = None) -> bool | None:
    """Whether the maker of a `ProcessLock` is alive; None if the file is missing, true in doubt."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(path, flags, dir_fd=dir_fd)
    except FileNotFoundError:
        return None
    except OSError:
        return True
    try:
        # A shared lock: two that ask at the same time do not take each other for the maker.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(fd)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock between processes; yields whether it was acquired in time."""
    try:
        file = _LockFile(path, 0)
    except OSError:
        yield False
        return
    try:
        yield _lock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        file.close()


def _lock(fd: int, how: int) -> bool:
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(fd, how)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)
        except OSError:  # there are no locks
            return False
        else:
            return True
