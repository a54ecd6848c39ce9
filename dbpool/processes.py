"""The statistics of all worker processes on this host, merged.

Each process keeps one file with its snapshot in a directory that they share; whoever is asked
reads them all. What has died is folded into an archive, so that totals never fall. A process
lives while the lock on its file `….alive` is held, which also processes of other pid namespaces
see: containers may share the directory.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import stat
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, Protocol

from dbpool._files import STATS_DIR, LifeSign, NoLocks, is_held, locked, read, start_time, write
from dbpool._secrets import safe_repr
from dbpool.metrics import Snapshot, count, seconds, text

__all__ = ["SCHEMA", "Processes"]

logger = logging.getLogger("dbpool")

SCHEMA: Final = 2
_ALIVE: Final = ".alive"
_EVERY: Final = 1.0  # seconds between two publications
_PATIENCE: Final = 1.0  # seconds that a publication waits for another of this process
_MOST: Final = 1024  # files that are read
_LAST_PID: Final = (1 << 31) - 1

_known: weakref.WeakSet[Processes] = weakref.WeakSet()
_from_the_start = False  # whether each publishes before it is asked for a report


def publish_from_the_start() -> None:
    """Have each of this process publish now, and those still to be made: no report waits for it."""
    global _from_the_start  # noqa: PLW0603  # a process is a server's worker, or is not
    _from_the_start = True
    for processes in list(_known):
        processes.start()


class Pooled(Protocol):
    """What is asked of a pool."""

    def stats(self) -> Snapshot:
        """Return a snapshot."""


class _Life:
    """What belongs to one process alone: a child inherits no thread, and no lock that is free."""

    def __init__(self) -> None:
        self.born = time.monotonic()
        self.starting = threading.Lock()
        self.is_started = False
        self.start_at = 0.0  # not before
        self.stop = threading.Event()
        # Tells apart the applications of one name in a process, and processes of one pid in
        # several pid namespaces.
        self.number = int.from_bytes(os.urandom(6), "big")
        self.sign: LifeSign | None = None
        # Held from the snapshot until it is written, so that no older one comes after a newer.
        self.writing = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Record:
    """What one process says of itself. `written` is on the system's monotonic clock."""

    pid: int
    start: str
    number: int
    written: float
    uptime: float
    pools: Mapping[str, Snapshot]

    @property
    def key(self) -> str:
        return f"{self.pid}-{self.start}-{self.number}"

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "pid": self.pid,
            "start": self.start,
            "number": self.number,
            "written": self.written,
            "uptime": self.uptime,
            "pools": {name: snapshot.to_json() for name, snapshot in self.pools.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> _Record:
        try:
            _check_schema(data)
            return cls(
                pid=count(data["pid"], _LAST_PID),
                start=text(data["start"]),
                number=count(data["number"]),
                written=seconds(data["written"]),
                uptime=seconds(data["uptime"]),
                pools=_pools_from_json(data["pools"]),
            )
        except (AttributeError, KeyError, TypeError) as ex:
            raise ValueError("this is no record") from ex


class Processes:
    """Publishes the pools of this process, and reports on those of all that share a directory.

    The directory is *directory*, else `DBPOOL_STATS_DIR`, which the gunicorn hooks set; it must
    be private to the user. Without one the process answers for itself alone.
    """

    def __init__(
        self,
        databases: Mapping[str, Pooled],
        directory: str | os.PathLike[str] | None = None,
        app: str = "app",
    ) -> None:
        self._databases = databases
        self._directory = directory
        self._app = re.sub(r"[^A-Za-z0-9_]+", "_", app)
        self._complained: set[str] = set()
        self._lives: dict[int, _Life] = {}
        _known.add(self)
        if _from_the_start:
            self.start()

    def start(self) -> None:
        """Publish each second from now on, in a thread of this process. Cheap when it does.

        Without a directory, or when the system has no thread left, that is tried again later.
        """
        life = self._life()
        if life.is_started or time.monotonic() < life.start_at:
            return
        if life.starting.acquire(blocking=False):  # else another thread does it
            try:
                self._start(life)
            finally:
                life.starting.release()

    def close(self) -> None:
        """Publish for the last time and stop."""
        life = self._lives.get(os.getpid())
        if life is not None and not life.stop.is_set():
            life.is_started = True
            life.stop.set()
            self.publish()
        atexit.unregister(self.close)

    def publish(self) -> bool:
        """Write this process's file; false if that is not possible, which is logged once."""
        return self._publish() is not None

    def report(self, scope: str = "all") -> dict[str, Any]:
        """Return the statistics as `/stats` shows them, of all processes or of this one.

        `scope` in the answer says which it is; ages and uptimes are in seconds.
        """
        self.start()
        # What is told of this process is what the others read, so that theirs is never less.
        published = self._publish() if scope == "all" else None
        if published is None:
            return _report([self._own()], {}, "process")
        archived, others = self._others(published.key)
        return _report([published, *others], archived, "all")

    def survey(self) -> dict[str, Any] | None:
        """Return the same from outside, without a part in it; None if there is no directory."""
        if self._shared() is None:
            return None
        archived, others = self._others("")
        return _report(others, archived, "all")

    def _life(self) -> _Life:
        # setdefault() is atomic: no lock, which a fork could leave locked for ever.
        return self._lives.get(os.getpid()) or self._lives.setdefault(os.getpid(), _Life())

    def _start(self, life: _Life) -> None:
        """Start the thread, unless it is. `starting` is held."""
        if life.is_started:
            return
        life.start_at = time.monotonic() + _EVERY
        if self._shared() is None:
            return
        thread = threading.Thread(None, self._run, "dbpool-stats", (life.stop,), daemon=True)
        try:
            thread.start()
        except RuntimeError as ex:
            self._complain("thread", f"cannot be published yet: {ex}")
            return
        life.is_started = True
        atexit.register(self.close)

    def _run(self, stop: threading.Event) -> None:
        if _from_the_start:
            self.publish()
        while not stop.wait(_EVERY):
            self.publish()

    def _publish(self) -> _Record | None:
        """Write this process's file and return what is in it, None if that is not possible."""
        directory = self._shared()
        if directory is None:
            return None
        life = self._life()
        if not life.writing.acquire(timeout=_PATIENCE):
            self._complain("stall", f"a write to {directory} takes longer than {_PATIENCE:g} s")
            return None
        try:
            record = self._own()
            path = directory / f"{self._app}-{record.key}.json"
            self._show_life(life, path.with_suffix(_ALIVE))
            write(path, record.to_json())
        except OSError as ex:
            self._complain("write", f"cannot write statistics to {directory}: {ex.strerror}")
            return None
        finally:
            life.writing.release()
        return record

    def _show_life(self, life: _Life, path: Path) -> None:
        """Hold the life sign of this process from its first file on. `writing` is held."""
        if life.sign is None:
            for inherited in self._lives.values():  # of uWSGI, which runs no hooks at a fork
                if inherited.sign is not None:
                    inherited.sign.close()
            with suppress(NoLocks):  # then the pid has to do
                life.sign = LifeSign(path)

    def _own(self) -> _Record:
        now = time.monotonic()
        return _Record(
            pid=os.getpid(),
            start=start_time(os.getpid()) or "0",
            number=self._life().number,
            written=now,
            uptime=now - self._life().born,
            pools={text(name): pool.stats() for name, pool in self._databases.items()},
        )

    def _shared(self) -> Path | None:
        """The directory that is shared, if there is one and it is ours alone."""
        name = self._directory or os.environ.get(STATS_DIR)
        if not name:
            return None
        path = Path(name)
        try:
            found = path.lstat()
        except OSError as ex:
            self._complain("directory", f"cannot use {safe_repr(str(path))}: {ex.strerror}")
            return None
        private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
        if not private or found.st_uid != os.geteuid():
            named = safe_repr(str(path))
            self._complain("directory", f"{named} is no directory private to this user")
            return None
        return path

    def _others(self, own_key: str) -> tuple[dict[str, Snapshot], list[_Record]]:
        """Return the archive and the records of the other living processes."""
        directory = self._shared()
        if directory is None:
            return {}, []
        with locked(directory / f"{self._app}.lock") as is_locked:
            archive = directory / f"{self._app}.archive"
            folded, pools = self._read_archive(archive)
            living: list[_Record] = []
            dead: dict[Path, _Record] = {}
            for path in sorted(directory.glob(f"{self._app}-*-*.json"))[:_MOST]:
                record = self._read_record(path)
                if record is None or record.key == own_key:
                    continue
                is_alive = is_held(path.with_suffix(_ALIVE))
                if is_alive is None:  # the file system keeps no locks
                    is_alive = start_time(record.pid) == record.start
                if is_alive:
                    living.append(record)
                else:
                    dead[path] = record
            ended = [record.pools for record in dead.values() if record.key not in folded]
            pools = _merged(pools, *({n: _ended(s) for n, s in each.items()} for each in ended))
            if dead and is_locked:
                self._write_archive(archive, dead, pools)
        return pools, living

    def _write_archive(
        self, archive: Path, dead: Mapping[Path, _Record], pools: Mapping[str, Snapshot]
    ) -> None:
        """Write the archive, then remove the files: a crash in between counts nothing twice."""
        data = {
            "schema": SCHEMA,
            "folded": [record.key for record in dead.values()],
            "pools": {name: snapshot.to_json() for name, snapshot in pools.items()},
        }
        try:
            write(archive, data)
            for path in dead:
                path.with_suffix(_ALIVE).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        except OSError as ex:
            self._complain("archive", f"cannot archive statistics: {ex.strerror}")

    def _read_archive(self, path: Path) -> tuple[set[str], dict[str, Snapshot]]:
        try:
            data = read(path)
            _check_schema(data)
            return set(map(text, data["folded"])), _pools_from_json(data["pools"])
        except FileNotFoundError:
            return set(), {}
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as ex:
            self._complain(path.name, f"{path} cannot be used: {ex}")
            return set(), {}

    def _read_record(self, path: Path) -> _Record | None:
        try:
            return _Record.from_json(read(path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as ex:
            self._complain(path.name, f"{path} cannot be used: {ex}")
            return None

    def _complain(self, subject: str, message: str) -> None:
        if subject not in self._complained and len(self._complained) < _MOST:
            self._complained.add(subject)
            logger.warning("statistics: %s", message)


def _report(records: list[_Record], pools: dict[str, Snapshot], scope: str) -> dict[str, Any]:
    """Merge what processes say of themselves with the archive's *pools*."""
    now = time.monotonic()
    records = [_aged(record, max(0.0, now - record.written)) for record in records]
    pools = _merged(pools, *(record.pools for record in records))
    # A process is as young as the youngest of its parts: one may be closed.
    latest = {(r.pid, r.start): r for r in sorted(records, key=attrgetter("written"))}
    return {
        "schema": SCHEMA,
        "time": time.time(),
        "scope": scope,
        "processes": [
            {"pid": r.pid, "age": max(0.0, now - r.written), "uptime": r.uptime}
            for _, r in sorted(latest.items())
        ],
        "pools": {name: snapshot.to_json() for name, snapshot in pools.items()},
    }


def _aged(record: _Record, seconds: float) -> _Record:
    """The same *seconds* later: what it held then, it has held for that much longer."""

    def later(pool: Snapshot) -> Snapshot:
        left = pool.breaker.retry_after
        breaker = replace(pool.breaker, retry_after=left and max(0.0, left - seconds))
        holders = (replace(holder, seconds=holder.seconds + seconds) for holder in pool.holders)
        return replace(pool, breaker=breaker, holders=tuple(holders))

    pools = {name: later(pool) for name, pool in record.pools.items()}
    return replace(record, uptime=record.uptime + seconds, pools=pools)


def _ended(snapshot: Snapshot) -> Snapshot:
    """What stays of a pool whose process has ended: totals, no sizes."""
    return Snapshot(
        counters=snapshot.counters,
        wait=snapshot.wait,
        use=snapshot.use,
        connect=snapshot.connect,
    )


def _merged(*parts: Mapping[str, Snapshot]) -> dict[str, Snapshot]:
    """Merge the pools of one name."""
    found: dict[str, list[Snapshot]] = {}
    for part in parts:
        for name, snapshot in part.items():
            found.setdefault(name, []).append(snapshot)
    return {name: first.merge(*rest) for name, (first, *rest) in found.items()}


def _check_schema(data: Any) -> None:
    if data["schema"] != SCHEMA:
        raise ValueError("it is of another version")


def _pools_from_json(data: Any) -> dict[str, Snapshot]:
    return {text(name): Snapshot.from_json(snapshot) for name, snapshot in data.items()}
