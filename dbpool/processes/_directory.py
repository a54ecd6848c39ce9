"""Makes, finds and removes the directory in which processes share their statistics.

A gunicorn master makes one, and holds the lock on a file in it for as long as it lives.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os.path import samestat
from pathlib import Path
from typing import Final, NamedTuple

from dbpool.processes._files import ProcessLock, is_held, start_time

DIRECTORY_NAME: Final = re.compile(r"dbpool-stats-\d+-[0-9a-f]{12}")
_LOCK: Final = ".master"
EXITS: Final = "exits"  # how workers ended that did not end as they should, by pid


class Directory(NamedTuple):
    """A directory that a master made: it is removed by the process *pid*, not by its children."""

    path: Path
    pid: int
    lock: ProcessLock

    def remove(self) -> None:
        """Remove it, if this process made it and no other directory has taken its place."""
        if self.pid != os.getpid():
            return
        with suppress(OSError), _opened(self.path) as fd:
            if samestat(os.stat(_LOCK, dir_fd=fd), os.fstat(self.lock.fd)):
                _empty(fd)
                self.path.rmdir()
        self.lock.close()


def make_directory(first_parent: str | None, uid: int, gid: int) -> Directory:
    """Make a directory private to that user, and remove those that dead masters left behind.

    Raises `OSError`, which says why it failed in each place.
    """
    failed: dict[str, str] = {}
    for parent in _parents(first_parent):
        try:
            _sweep(parent, uid)
            return _make(parent, uid, gid)
        except OSError as ex:
            failed[str(parent)] = ex.strerror or str(ex)
    raise OSError("; ".join(f"{parent}: {reason}" for parent, reason in failed.items()))


def find_directories() -> list[Path]:
    """Return the directories of this user's masters that run now.

    Those of masters in other containers only where none runs in this one. Root, who may read those
    of all users, gets them if it has none of its own, to be told whose they are.
    """
    parents = dict.fromkeys(_parents(None))
    paths = [path for parent in parents for path in _named(parent)]
    held = [path for path in paths if is_held(path / _LOCK) and os.access(path, os.R_OK)]
    own = [path for path in held if _is_own(path)]
    found = own or (held if os.geteuid() == 0 else [])
    return [path for path in found if _is_of_local_process(path)] or found


def is_in_memory(path: Path) -> bool | None:
    """Whether a directory is in memory, None if the system does not say."""
    try:
        device = path.stat().st_dev
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts:  # 36 35 98:0 /root /mount options - type source options
        before, _, after = line.partition(" - ")
        if before.split()[2] == number:
            return after.split()[0] in ("tmpfs", "ramfs")
    return None


def leave_file(path: Path, text: str, uid: int, gid: int) -> None:
    """Write a file for that user into a directory of `make_directory`, at once; raise `OSError`."""
    with _opened(path.parent) as directory:
        new = f".{path.name}-{os.urandom(6).hex()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(new, flags, 0o600, dir_fd=directory)
        try:
            os.write(fd, text.encode())
            if (uid, gid) != (os.geteuid(), os.getegid()):
                os.fchown(fd, uid, gid)
            os.rename(new, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            os.close(fd)


def _parents(worker_tmp_dir: str | None) -> Iterator[Path]:
    """Yield the places where the directory may be, memory first: a write to a disk can stall."""
    if worker_tmp_dir:
        yield Path(worker_tmp_dir).absolute()
    yield Path("/dev/shm")  # noqa: S108  # made 0700 inside
    try:
        # Asked last, and only if need be: it tries to write, and fails without any /tmp.
        yield Path(tempfile.gettempdir())
    except OSError:
        return


def _named(parent: Path) -> list[Path]:
    try:
        return [path for path in parent.iterdir() if DIRECTORY_NAME.fullmatch(path.name)]
    except OSError:
        return []


def _is_own(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.geteuid()
    except OSError:  # it was removed meanwhile
        return False


def _is_of_local_process(path: Path) -> bool:
    pid = int(path.name.split("-")[2])
    try:
        return (path / _LOCK).read_text() == start_time(pid)
    except OSError:
        return False


def _sweep(parent: Path, uid: int) -> None:
    """Remove directories that dead masters of this user left: those whose lock nobody holds."""
    for path in _named(parent):
        with suppress(OSError), _opened(path) as fd:
            held = is_held(_LOCK, dir_fd=fd)
            if os.fstat(fd).st_uid == uid and not held:
                if held is False:  # without a lock file it is not a master's, or empty
                    _empty(fd)
                path.rmdir()


def _make(parent: Path, uid: int, gid: int) -> Directory:
    """Make a directory private to that user; it gets its final name once its lock is held."""
    new = Path(tempfile.mkdtemp(prefix=".dbpool-", dir=parent))
    with _opened(new) as fd:
        if os.fstat(fd).st_uid != os.geteuid() or os.listdir(fd):  # noqa: PTH208  # a descriptor
            raise PermissionError(errno.EPERM, "somebody else replaces files in it")
        try:
            lock = ProcessLock(_LOCK, dir_fd=fd)
            os.write(lock.fd, (start_time(os.getpid()) or "").encode())
            if (uid, gid) != (os.geteuid(), os.getegid()):
                os.fchown(lock.fd, uid, gid)
                os.fchown(fd, uid, gid)
            path = new.rename(parent / f"dbpool-stats-{os.getpid()}-{os.urandom(6).hex()}")
        except OSError:
            with suppress(OSError):
                _empty(fd)
                new.rmdir()
            raise
    return Directory(path, os.getpid(), lock)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a directory, to use it only by its descriptor.

    The master may be root. If its workers' user may write to the parent, that user can put another
    directory, or a link, under the name.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _empty(fd: int) -> None:
    """Remove the files of a directory, the lock last, since `_sweep` looks for that."""
    for name in sorted(os.listdir(fd), key=_LOCK.__eq__):
        os.unlink(name, dir_fd=fd)
