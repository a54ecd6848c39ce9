"""The files in which the processes of a host share history, findings and journal."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from dbpool.diagnosis._rows import LARGEST, Layout, decode, encode, header, known_names
from dbpool.diagnosis._scene import mapping, number
from dbpool.diagnosis.history import STEPS, History, Step, merged, slot_of
from dbpool.processes._directory import EXITS
from dbpool.processes._files import NoLocks, ProcessLock, is_held, locked, read, write

_KEY: Final = re.compile(r"\d+-[0-9a-f]+")
_MAX_FILES: Final = 256
_LEASE: Final = 5.0  # seconds after which a silent watcher is passed over
_OWN_STEPS: Final = 24  # of each process; the one that watches adds them up in time
_OWN_ROWS: Final = 60  # in the file of one process, if it has many pools
_LATE: Final = 3  # steps that are added up again, as a process may be late


class _StepFile:
    """A file of steps; see `dbpool.diagnosis._rows`."""

    def __init__(self, fd: int, names: Sequence[str], rows: int, **more: Any) -> None:
        self._fd = fd
        self._names = known_names(names)
        self._layout = Layout(len(self._names), rows)
        os.pwrite(fd, header(self._names, rows, **more), 0)

    def write(self, pool: str, slot: int, step: Step) -> None:
        name = pool[:40]
        if name in self._names:
            place = self._layout.place(self._names.index(name), slot)
            os.pwrite(self._fd, encode(slot, step), place)


class Record:
    """The last steps of this process. The lock on the file says that the process lives."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._names = known_names(names)
        self._rows = max(5, min(_OWN_STEPS, _OWN_ROWS // max(1, len(self._names))))
        self._lock: ProcessLock | None = None
        with suppress(NoLocks):  # without locks nobody could tell when it may be removed
            self._lock = ProcessLock(path)
            try:
                self._file = _StepFile(self._lock.fd, names, self._rows, pid=os.getpid())
            except OSError:  # the disk is full, say: the next try must not find the file
                path.unlink(missing_ok=True)
                self._lock.close()
                raise

    def write(self, pool: str, slot: int, step: Step) -> None:
        """Write one step."""
        if self._lock is not None and self._lock.fd >= 0:
            self._file.write(pool, slot, step)

    def abandon(self) -> None:
        """Close a copy of another process's file, which a fork made."""
        if self._lock is not None:
            self._lock.close()

    def close(self) -> None:
        """Record that the process ends as it should."""
        if self._lock is not None and self._lock.fd >= 0:
            with suppress(OSError):
                fd, pid = self._lock.fd, os.getpid()
                os.pwrite(fd, header(self._names, self._rows, pid=pid, closed=True), 0)
            self._lock.close()


class SharedFiles:
    """The files of one application in *directory*; *key* tells this process from all others."""

    def __init__(self, directory: Path, app: str, key: str) -> None:
        self._directory = directory
        self._app = app
        self.key = key

    def _path(self, ending: str) -> Path:
        return self._directory / f"{self._app}.{ending}"

    # History

    def record(self, names: Sequence[str]) -> Record:
        """Begin this process's own history."""
        return Record(self._record_path(self.key), names)

    def history(self, now: float) -> dict[str, History]:
        """Return the history of all processes together; *now* is monotonic."""
        return {name: each.around(now) for name, each in _read(self._path("history"))[1].items()}

    def ended(self) -> dict[str, bool]:
        """Return the processes that have ended of late, and whether they said so before."""
        gone = {path.stem: _read(path)[0] for path in self._files() if is_held(path) is False}
        return {name: known.get("closed") is True for name, known in gone.items() if known}

    def exits(self) -> dict[int, int]:
        """Return the exit codes that gunicorn's master knows, by pid; below 0 a signal."""
        known = mapping(_load(self._directory / EXITS)).items()
        return {read_pid(pid): code for pid, code in known if type(code) is int}

    def add_up(self, names: Sequence[str], known: Mapping[str, History], now: float) -> None:
        """Add the last steps of all processes up to those *known* so far, of pools of all *names*."""
        parts = {path: _read(path)[1] for path in self._files()}
        end = slot_of(now)
        before = _read(self._path("history"))[0].get("pools") or []
        after = known_names([*before, *names])  # the rows of those before stay where they are
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._path("history"), flags, 0o600)
        try:
            file = _StepFile(fd, after, STEPS)
            if before != after:
                _write_all(file, known)
            for name, history in merged(parts.values()).items():
                old = known.get(name, History()).steps
                for slot, step in history.steps.items():
                    is_late = slot >= end - _LATE and slot in old and not _is_same(old[slot], step)
                    if slot < end and (slot not in old or is_late):
                        file.write(name, slot, step)
        finally:
            os.close(fd)
        for path, pools in parts.items():
            # Until then the file of an ended process is added up with the others.
            is_old = all(max(history.steps, default=0) < end - _LATE for history in pools.values())
            if is_old and is_held(path) is False:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self._directory.glob(f"{self._app}-*-*.steps"))[:_MAX_FILES]

    # What the watching process says

    def lead(self, now: float, *, is_reader: bool = False) -> bool:
        """Be the one process that watches, or go on being it; *now* is monotonic.

        Another may take over once this one has been silent for five seconds; from a reader, which
        has no pools and so cannot ask a server, a worker takes over at once.
        """
        if not self._is_free(now, is_reader):
            return False
        with locked(self._path("lease.lock")) as is_locked:
            is_free = is_locked and self._is_free(now, is_reader)
            if is_free:
                self.save("lease", {"key": self.key, "at": now, "reader": is_reader})
            return is_free

    def _is_free(self, now: float, is_reader: bool) -> bool:
        lease = mapping(self.load("lease"))
        is_stale = not 0 <= now - number(lease.get("at")) <= _LEASE
        is_lesser = lease.get("reader") is True and not is_reader
        key = str(lease.get("key"))
        return is_stale or is_lesser or key == self.key or self._is_dead(key)

    def _is_dead(self, key: str) -> bool:
        """Whether the process with that key was killed; false in doubt."""
        return bool(_KEY.fullmatch(key)) and is_held(self._record_path(key)) is False

    def _record_path(self, key: str) -> Path:
        return self._directory / f"{self._app}-{key}.steps"

    def give_up(self) -> None:
        """Let another process watch."""
        if mapping(self.load("lease")).get("key") == self.key:
            self._path("lease").unlink(missing_ok=True)

    def save(self, ending: str, data: Any) -> int:
        """Write a file of the application atomically; return its size in bytes."""
        return write(self._path(ending), data)

    def load(self, ending: str) -> Any:
        """Return what such a file holds, None if it cannot be read."""
        return _load(self._path(ending))


def read_pid(text: str) -> int:
    """Return the pid that is written there, 0 if none is."""
    return int(text) if len(text) < 10 and text.isdecimal() else 0


def _load(path: Path) -> Any:
    with suppress(OSError, ValueError):
        return read(path)
    return None


def _is_same(one: Step, other: Step) -> bool:
    """Whether two steps are the same in a file, which rounds them."""
    return encode(0, one) == encode(0, other)


def _write_all(file: _StepFile, histories: Mapping[str, History]) -> None:
    for name, history in histories.items():
        for slot, step in history.steps.items():
            file.write(name, slot, step)


def _read(path: Path) -> tuple[Mapping[str, Any], dict[str, History]]:
    """Return a history file's header and content, nothing if it is not one of this user's."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return {}, {}
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return {}, {}
        try:
            return decode(file.read(LARGEST))
        except (ValueError, RecursionError):
            return {}, {}
