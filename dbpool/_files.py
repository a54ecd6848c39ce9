"""What processes on one host share: atomic files, a lock, and how to tell a process again."""

from __future__ import annotations

import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

_LARGEST: Final = 1 << 20  # bytes of a file that is read
_LOCK_WAIT: Final = 0.2  # seconds


@cache
def _clock_ticks_are_kept() -> bool:
    return Path("/proc/self/stat").exists()


def start_time(pid: int) -> str | None:
    """Return when that process was started, in the kernel's ticks; None if there is none.

    Together with its pid that tells a process from a later one with the same pid. "0" where
    the system does not say.
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


def write(path: Path, data: object) -> None:
    """Write atomically: a reader finds the old file or the new one."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(json.dumps(data))  # dump() would not use the C encoder
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def read(path: Path) -> Any:
    """Read a file of ours; raise `OSError` or `ValueError` for what is not."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise ValueError("it is not a file of this user")
        if found.st_size > _LARGEST:
            raise ValueError("it is too large")
        with os.fdopen(fd, encoding="utf-8", closefd=False) as file:
            return json.load(file)
    except RecursionError as ex:
        raise ValueError("it is nested too deeply") from ex
    finally:
        os.close(fd)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock between processes; says whether it was had in time."""
    import fcntl

    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield False
        return
    try:
        yield _lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)


def _lock(fd: int, how: int) -> bool:
    import fcntl

    deadline = time.monotonic() + _LOCK_WAIT
    while True:
        try:
            fcntl.flock(fd, how)
        except OSError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)
        else:
            return True
