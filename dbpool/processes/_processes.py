"""`Processes`: writes the file of this process, and collects the reports of all."""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import stat
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

from dbpool._per_process import PerProcess, Starter
from dbpool._secrets import safe_repr
from dbpool.diagnosis.endpoints import MAX_NAMES, Rows, UsageCounter, merge
from dbpool.metrics import Snapshot
from dbpool.processes._archive import ALIVE, MAX_FILES, USAGE, Archive, part_to_json
from dbpool.processes._files import STATS_DIR, NoLocks, ProcessLock, start_time, write
from dbpool.report import SCHEMA, Process, Report, read_text

logger = logging.getLogger("dbpool")

PUBLISH_INTERVAL: Final = 1.0  # seconds
_MAX_INTERVAL: Final = 20.0  # seconds: the more there is to write, the less often
# What a process writes in all stays below 4 KiB a second: steps, findings and journal come on top.
_BYTES_A_SECOND: Final = 2000
_USAGE_INTERVAL: Final = 5.0  # seconds at least between two writes of the use by endpoint
_USAGE_BYTES_A_SECOND: Final = 350
_MAX_ROWS: Final = 400  # of it, in all pools
_MAX_BYTES: Final = 52 * 1024  # of both files of a process
WRITE_TIMEOUT: Final = 1.0  # seconds that a publication waits for another of this process

_starter: Starter[Processes] = Starter()
publish_from_the_start = _starter.start  # in a server's worker, before any of them is asked
_threads: int | None = None  # that this process serves requests with, if that is known


def set_threads(number: int) -> None:
    """Say with how many threads this process serves requests; it reports that from now on."""
    global _threads  # noqa: PLW0603
    _threads = number


class HasStats(Protocol):
    """All that is needed of a pool; one of dbpool's also counts the use by endpoint."""

    def stats(self) -> Snapshot:
        """Return a snapshot."""


class _ProcessState:
    """The state of one process: a child inherits no thread, and perhaps a lock that is held."""

    def __init__(self) -> None:
        self.started_at = time.monotonic()
        self.start_time = start_time(os.getpid()) or "0"
        # Tells apart the applications of one name in a process, and processes of one pid in
        # several pid namespaces.
        self.number = int.from_bytes(os.urandom(6), "big")
        self.starting = threading.Lock()
        self.is_publishing = False
        self.retry_at = 0.0  # when to try again to start the thread
        self.stop = threading.Event()
        self.alive: ProcessLock | None = None
        self.size = 0  # of the file as written last, in bytes
        self.usage_due = 0.0  # when to write the use by endpoint again
        self.leaks = 0  # as they were when it was written
        self.serving: weakref.WeakSet[Any] | None = None  # the threads that serve a request now
        # Held from the snapshot until it is written, so that no older one comes after a newer.
        self.writing = threading.Lock()


class Processes:
    """Publishes the pools of this process, and reports on those of all that share a directory.

    *databases* maps names to pools. The directory is *directory*, else `DBPOOL_STATS_DIR`, which
    the gunicorn hooks set; it must be private to the user. Without one the process reports only on
    itself. *app* tells apart applications that share a directory.
    """

    def __init__(
        self,
        databases: Mapping[str, HasStats],
        directory: str | os.PathLike[str] | None = None,
        app: str = "app",
    ) -> None:
        self._pools = {read_text(name): pool for name, pool in databases.items()}
        for pool in self._pools.values():
            _count_usage(pool)
        self._directory = directory
        self.app = re.sub(r"[^A-Za-z0-9_]+", "_", app)
        self._warned: set[str] = set()
        self._state = PerProcess(_ProcessState)
        _starter.add(self)

    def begin_request(self, thread: object) -> None:
        """Count a thread as busy, until `end_request`. Both are for a framework's adapter."""
        state = self._state()
        if state.serving is None:
            state.serving = weakref.WeakSet()
        state.serving.add(thread)

    def end_request(self, thread: object) -> None:
        """Count the thread as free again."""
        if (serving := self._state().serving) is not None:
            serving.discard(thread)

    def start(self) -> bool:
        """Start publishing, about once a second, in a thread of this process.

        Calling it again costs little. Returns false if the directory cannot be used or no thread
        can be started; call it again later.
        """
        state = self._state()
        is_due = not state.is_publishing and time.monotonic() >= state.retry_at
        if is_due and state.starting.acquire(blocking=False):  # else another thread does it
            try:
                self._start(state)
            finally:
                state.starting.release()
        return state.is_publishing or self._named_directory() is None

    def close(self) -> None:
        """Publish once more, and stop."""
        state = self._state.known()
        if state is not None and not state.stop.is_set():
            state.is_publishing = True
            state.stop.set()
            self.publish()
        atexit.unregister(self.close)

    def publish(self) -> bool:
        """Write this process's file; return false if that fails, which is logged once."""
        return self._publish() is not None

    def collect(self, scope: str = "all", *, usage: bool = False) -> Report:
        """Return the report of all processes, or only of this one if *scope* is "process".

        Without a directory it is always that of this process; `Report.scope` says which it is. With
        *usage* the report includes the use by endpoint, which other processes write less often.
        """
        self.start()
        # Use what was published of this process: a report of another is never ahead of it.
        own = self._publish() if scope == "all" else None
        found = own or self._describe()
        if usage:
            found = replace(found, usage=self._usage())
        if own is None:
            return found
        others = self._collect(own.processes[0].key, usage=usage)
        return replace(found.as_of(time.monotonic()).merge(*others), scope="all")

    def collect_others(self, *, usage: bool = False) -> Report | None:
        """Return the report of all other processes; None if there is no directory."""
        if self.directory() is None:
            return None
        return Report({}, time=time.time()).merge(*self._collect("", usage=usage))

    def collect_each(self) -> list[Report]:
        """Return the reports of the other living processes, none if there is no directory."""
        parts = [] if self.directory() is None else self._collect("")
        return [part for part in parts if part.processes]

    def report(self, scope: str = "all") -> dict[str, Any]:
        """Return what `collect` does, as JSON types."""
        return self.collect(scope).to_json()

    def _start(self, state: _ProcessState) -> None:
        """Start the thread unless it runs. The caller holds `starting`."""
        if state.is_publishing:
            return
        state.retry_at = time.monotonic() + PUBLISH_INTERVAL
        if self.directory() is None:
            return
        thread = threading.Thread(None, self._run, "dbpool-stats", (state.stop,), daemon=True)
        try:
            thread.start()
        except RuntimeError as ex:
            self._warn("thread", f"cannot be published yet: {ex}")
            return
        state.is_publishing = True
        atexit.register(self.close)

    def _run(self, stop: threading.Event) -> None:
        if _starter.is_started:
            self.publish()
        while not stop.wait(self.interval):
            self.publish()

    @property
    def interval(self) -> float:
        """Return the seconds between two publications: one, or more if there is much to write."""
        return min(max(PUBLISH_INTERVAL, self._state().size / _BYTES_A_SECOND), _MAX_INTERVAL)

    def _publish(self) -> Report | None:
        """Write this process's file and return its content, None if that fails."""
        directory = self.directory()
        if directory is None:
            return None
        state = self._state()
        if not state.writing.acquire(timeout=WRITE_TIMEOUT):
            self._warn("stall", f"a write to {directory} takes longer than {WRITE_TIMEOUT:g} s")
            return None
        try:
            own = self._describe()
            path = directory / f"{self.app}-{own.processes[0].key}.json"
            self._hold_alive(state, path.with_suffix(ALIVE))
            state.size = write(path, part_to_json(own))
            leaks = sum(pool.counters.leaks for pool in own.pools.values())
            self._write_usage(state, path.with_suffix(USAGE), leaks)
        except OSError as ex:
            self._warn("write", f"cannot write statistics to {directory}: {ex.strerror}")
            return None
        finally:
            state.writing.release()
        return own

    def _write_usage(self, state: _ProcessState, path: Path, leaks: int) -> None:
        """Write the use by endpoint now and then, and at the end. The caller holds `writing`.

        It is written at once where *leaks*, the count of forgotten connections, grew from zero.
        """
        now = time.monotonic()
        is_due = now >= state.usage_due or state.stop.is_set() or bool(leaks and not state.leaks)
        if (usage := self._usage()) and is_due:
            state.leaks = leaks
            fitting = _fitting(usage, _MAX_BYTES - state.size)
            size = write(path, {"schema": SCHEMA, "usage": fitting})
            state.usage_due = now + max(_USAGE_INTERVAL, size / _USAGE_BYTES_A_SECOND)

    def _usage(self) -> dict[str, Rows]:
        """Return the use of this process's pools by endpoint, where there is any."""
        counters = {name: getattr(pool, "usage", None) for name, pool in self._pools.items()}
        return {name: rows for name, x in counters.items() if x is not None and (rows := x.rows())}

    def _hold_alive(self, state: _ProcessState, path: Path) -> None:
        """Hold this process's lock from its first file on. The caller holds `writing`."""
        if state.alive is None:
            for inherited in self._state.inherited():  # of uWSGI, which runs no hooks at a fork
                if inherited.alive is not None:
                    inherited.alive.close()
            with suppress(NoLocks):  # then the pid has to do
                state.alive = ProcessLock(path)

    def _describe(self) -> Report:
        """Return the report of only this process."""
        state, now = self._state(), time.monotonic()
        process = Process(
            pid=os.getpid(),
            start=state.start_time,
            number=state.number,
            written=now,
            uptime=now - state.started_at,
            interval=self.interval,
            threads=_threads,
            busy=None if state.serving is None else len(state.serving),
        )
        pools = {name: _of_this_process(pool.stats()) for name, pool in self._pools.items()}
        return Report(pools, (process,), "process", time.time())

    def _collect(self, own_key: str, *, usage: bool = False) -> list[Report]:
        """Return the reports of all processes except the one with that key."""
        directory = self.directory()
        if directory is None:
            return []
        archived, *living = Archive(directory, self.app, self._warn).collect(own_key, usage=usage)
        now = time.monotonic()
        return [archived, *(part.as_of(now) for part in living)]

    def _named_directory(self) -> Path | None:
        name = self._directory or os.environ.get(STATS_DIR)
        return Path(name) if name else None

    def directory(self) -> Path | None:
        """Return the shared directory, None if there is none that is private to this user."""
        path = self._named_directory()
        if path is None:
            return None
        try:
            found = path.lstat()
        except OSError as ex:
            self._warn("directory", f"cannot use {safe_repr(str(path))}: {ex.strerror}")
            return None
        if problem := describe_access(found):
            message = f"{safe_repr(str(path))} is not a directory private to this user: {problem}"
            self._warn("directory", message)
            return None
        return path

    def _warn(self, subject: str, message: str) -> None:
        """Log a warning, once for each subject."""
        if subject not in self._warned and len(self._warned) < MAX_FILES:
            self._warned.add(subject)
            logger.warning("statistics: %s", message)


def describe_access(found: os.stat_result) -> str:
    """Say why statistics must not be kept in what was found there, "" if they may."""
    if not stat.S_ISDIR(found.st_mode):
        return "it is a link" if stat.S_ISLNK(found.st_mode) else "it is a file"
    if found.st_uid != os.geteuid():
        return f"it belongs to uid {found.st_uid}, this process runs as {os.geteuid()}"
    mode = stat.S_IMODE(found.st_mode)
    return f"its mode is {mode:04o}, and must be 0700" if mode & 0o077 else ""


def _fitting(usage: Mapping[str, Rows], room: int) -> dict[str, Rows]:
    """Return the largest rows of each pool, as many as fit into *room* bytes."""
    most = min(MAX_NAMES, _MAX_ROWS // len(usage))
    while True:
        found = {name: merge([rows], most) for name, rows in usage.items()}
        size = len(json.dumps(found, separators=(",", ":"))) + 100
        if size <= room or most <= 1:
            return found
        most = max(1, most * max(0, room) // size)


def _count_usage(pool: Any) -> None:
    """Make a pool count its use by endpoint, if it can and does not yet."""
    if getattr(pool, "usage", pool) is None:
        pool.count_usage(UsageCounter)


def _of_this_process(pool: Snapshot) -> Snapshot:
    holders = tuple(replace(holder, worker=os.getpid()) for holder in pool.holders)
    return replace(pool, holders=holders)
