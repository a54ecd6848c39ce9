"""`Monitor`: looks at the pools of a host each second, keeps their history, says what is wrong."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, Final, Protocol

from dbpool.diagnosis import Finding, Scene, Severity, Watch, diagnose
from dbpool.diagnosis._scene import mapping, number, rows
from dbpool.diagnosis.history import History, Recorder, slot_of
from dbpool.diagnosis.journal import Journal, Reporter
from dbpool.diagnosis.usage import Usage
from dbpool.diagnosis.watching import Watcher
from dbpool.errors import describe
from dbpool.monitor._episodes import Episodes
from dbpool.monitor._inspector import Inspector
from dbpool.monitor._shelf import Record, Shelf
from dbpool.report import Report

logger = logging.getLogger("dbpool")

INTERVAL: Final = 1.0  # seconds between two looks
_CALM_INTERVAL: Final = 5.0  # seconds between two writes of what has not changed
_JOURNAL_INTERVAL: Final = 10.0
_FRESH: Final = 8.0  # seconds that findings of another process are believed
_ADDED_UP_AFTER: Final = 2.0  # seconds after a step, when all processes have written it
_CLOSING: Final = 3.0  # seconds
_STALL: Final = 15.0  # seconds that a pause between two looks is remembered
_SLOW_HOLD: Final = 3.0  # seconds
_SHOWN: Final = ("history", "journal", "endpoints")
_LEVELS: Final = {
    Severity.NOTICE: logging.INFO,
    Severity.WARNING: logging.WARNING,
    Severity.CRITICAL: logging.ERROR,
}


class Collects(Protocol):
    """What is needed of `dbpool.processes.Processes`."""

    app: str

    def directory(self) -> Path | None:
        """Return the directory that the processes share."""

    def collect(self, scope: str = "all") -> Report:
        """Return the report of this process."""

    def collect_others(self) -> Report | None:
        """Return the report of all that publish, this process among them."""


class _ProcessState:
    """What belongs to one process alone; a child begins anew."""

    def __init__(self) -> None:
        self.started = monotonic()
        self.starting = threading.Lock()
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None
        self.recorders: dict[str, Recorder] = {}
        self.record: Record | None = None
        self.shelf: Shelf | None = None
        self.key = f"{os.getpid()}-{os.urandom(6).hex()}"
        self.history: dict[str, History] = {}  # of this process, where it is alone
        self.watching: _Watching | None = None


class Monitor:
    """Watches the pools of an application, and says what is wrong with them.

    Each process keeps its own history; one of those that share a directory watches all, asks the
    servers while callers wait for long (unless *blockers* is false), logs each finding as it
    begins, and leaves what it found for the others to show. *queries* shows statements, too.
    """

    def __init__(
        self,
        databases: Mapping[str, Any],
        processes: Collects,
        *,
        blockers: bool = True,
        queries: bool = False,
    ) -> None:
        self._databases = databases
        self._processes = processes
        self._blockers = blockers
        self._queries = queries
        self._states: dict[int, _ProcessState] = {}
        self._complained: set[str] = set()

    def start(self) -> None:
        """Watch from now on, in a thread of this process; cheap if it does already."""
        state = self._state()
        if state.thread is None and state.starting.acquire(blocking=False):
            try:
                if state.thread is None:
                    thread = threading.Thread(
                        None, self._run, "dbpool-monitor", (state,), daemon=True
                    )
                    with suppress(RuntimeError):  # no thread can be had: tried again later
                        thread.start()
                        state.thread = thread
                        atexit.register(self.close)
            finally:
                state.starting.release()

    def close(self) -> None:
        """Stop, close what was opened, and let another process watch."""
        state = self._states.get(os.getpid())
        if state is not None:
            state.stop.set()
            if state.thread is not None and state.thread is not threading.current_thread():
                state.thread.join(_CLOSING)
        atexit.unregister(self.close)

    def findings(self) -> list[dict[str, Any]]:
        """Return what is wrong now, as `/stats` shows it; DB00 alone where nothing is."""
        known = self._known("findings")
        found = rows(known.get("findings"))
        if found and 0 <= monotonic() - number(known.get("at")) <= _FRESH:
            return [dict(each) for each in found]
        report = self._report().to_json()
        return [finding.to_json() for finding in diagnose(Scene.read(report))]

    def extend(self, report: dict[str, Any], include: Collection[str] = ()) -> dict[str, Any]:
        """Return a report with `findings`, and with those of history, journal and endpoints wanted."""
        more: dict[str, Any] = {"findings": self.findings()}
        if "history" in include:
            more["history"] = self._history_json()
        kept = self._known("journal") if {"journal", "endpoints"} & set(include) else {}
        if "journal" in include:
            more["journal"] = [dict(line) for line in rows(kept.get("journal"))]
        if "endpoints" in include:
            more["endpoints"] = dict(mapping(kept.get("endpoints")))
        return report | more

    def tick(self) -> None:
        """Take one look. `start` has it done each second."""
        state, now = self._state(), monotonic()
        self._record(state, now)
        if state.shelf is None or state.shelf.lead(now):
            if state.watching is None:
                state.watching = _Watching(
                    self._databases, state.shelf, self._blockers, self._queries
                )
            watching = state.watching
            history = state.history
            if state.shelf is not None:
                history = watching.add_up(list(self._databases), now)
            watching.look(self._report().to_json(), history, now)
        elif state.watching is not None:  # another took over while this one was silent
            state.watching.close()
            state.watching = None

    def _state(self) -> _ProcessState:
        pid = os.getpid()
        return self._states.get(pid) or self._states.setdefault(pid, _ProcessState())

    def _run(self, state: _ProcessState) -> None:
        try:
            while not state.stop.wait(INTERVAL):
                try:
                    self.tick()
                except Exception as ex:  # noqa: BLE001  # watching never harms what it watches
                    self._complain(f"watching failed: {describe(ex)}")
        finally:
            self.release()

    def release(self) -> None:
        """Close what looks opened, and let another process watch."""
        state = self._state()
        if state.watching is not None:
            state.watching.close()
        if state.record is not None:
            state.record.close()
        if state.shelf is not None:
            with suppress(OSError):
                state.shelf.give_up()

    def _record(self, state: _ProcessState, now: float) -> None:
        """Take this process's own part in the history."""
        if state.shelf is None and (directory := self._processes.directory()) is not None:
            for inherited in self._states.values():  # of uWSGI, which runs no hooks at a fork
                if inherited is not state and inherited.record is not None:
                    inherited.record.abandon()
            state.shelf = Shelf(directory, self._processes.app, state.key)
            state.record = state.shelf.record(list(self._databases))
        for name, pool in self._databases.items():
            recorder = state.recorders.setdefault(name, Recorder(state.started))
            ended = recorder.sample(pool.stats(), now)
            if ended is None:
                continue
            if state.record is not None:
                state.record.write(name, *ended)
            else:
                state.history.setdefault(name, History()).add(*ended)

    def _report(self) -> Report:
        return self._processes.collect_others() or self._processes.collect("process")

    def _known(self, ending: str) -> Mapping[str, Any]:
        """Return what the watching process says: of this one, or of the file that it wrote."""
        state = self._state()
        if state.watching is not None:
            return state.watching.said.get(ending, {})
        return {} if state.shelf is None else mapping(state.shelf.load(ending))

    def _history_json(self) -> dict[str, Any]:
        state, now = self._state(), monotonic()
        known = state.history if state.shelf is None else state.shelf.history(now)
        until = time.time() - now % 5.0
        pools = {name: history.to_json(now) for name, history in known.items()}
        return {"step": 5.0, "until": round(until, 1), "pools": pools}

    def _complain(self, text: str) -> None:
        if text not in self._complained and len(self._complained) < 20:
            self._complained.add(text)
            logger.warning("diagnosis: %s", text)


class _Watching:
    """What the one process keeps that watches all: memory, the servers' views, what it said."""

    def __init__(
        self, databases: Mapping[str, Any], shelf: Shelf | None, blockers: bool, queries: bool
    ) -> None:
        self._shelf = shelf
        self._watcher, self._reporter = Watcher(), Reporter()
        self._usage, self._episodes = Usage(), Episodes()
        self._inspectors = {
            name: Inspector(pool, queries=queries) for name, pool in databases.items() if blockers
        }
        self._poolers = frozenset(
            name for name, pool in databases.items() if pool.settings.pooler == "transaction"
        )
        before = mapping(shelf.load("journal")) if shelf is not None else {}
        self._journal = Journal.from_json(before.get("journal"))
        self._deaths = {str(k): number(v) for k, v in mapping(before.get("deaths")).items()}
        self._history: dict[str, History] = {}
        self._added_up = -1
        self._looked: float | None = None
        self._stalls: list[tuple[float, float]] = []  # when, and how long
        self._written: dict[str, tuple[float, object]] = {}
        self.said: dict[str, dict[str, Any]] = {}

    def add_up(self, names: list[str], now: float) -> dict[str, History]:
        """Add up the steps of all processes, once each has ended for all; return the history."""
        assert self._shelf is not None
        for name, is_orderly in self._shelf.ended().items():
            if not is_orderly and name not in self._deaths:
                self._deaths[name] = time.time()
        self._deaths = dict(list(self._deaths.items())[-20:])
        slot = slot_of(now - _ADDED_UP_AFTER)
        if slot != self._added_up:
            self._shelf.add_up(names, self._history, now)
            self._history = self._shelf.history(now)
            self._added_up = slot
        return self._history

    def look(self, report: dict[str, Any], history: Mapping[str, History], now: float) -> None:
        """Take a look at the pools, find what is wrong, and say it."""
        wall = time.time()
        watches = self._watcher.look(report, wall)
        self._usage.look(report, now)
        lines = self._reporter.look(report, wall)
        self._journal = self._journal.add(lines)
        self._inspect(report, watches, wall)
        scene = Scene.read(
            report,
            now=wall,
            steps={name: each.last(now) for name, each in history.items()},
            watches=watches,
            views={name: each.view for name, each in self._inspectors.items() if each.view},
            poolers=self._poolers,
            deaths=tuple(self._deaths.values()),
            stalled=self._stalled(now),
        )
        found = diagnose(scene)
        self._log(found, now)
        self._say(found, now)

    def _inspect(self, report: Any, watches: Mapping[str, Watch], wall: float) -> None:
        for pool in Scene.read(report, now=wall).pools:
            if (inspector := self._inspectors.get(pool.name)) is not None:
                inspector.tick(is_needed=_needs_look(pool, watches.get(pool.name, Watch()), wall))

    def _stalled(self, now: float) -> float:
        """Return the longest pause between two looks of late."""
        pause, self._looked = now - (self._looked or now), now
        self._stalls = [each for each in self._stalls if now - each[0] <= _STALL]
        self._stalls.append((now, pause))
        return max(pause for _, pause in self._stalls)

    def _log(self, found: Collection[Finding], now: float) -> None:
        for finding, count in self._episodes.due(found, now):
            where = "" if finding.pool is None else f"pool {finding.pool!r}: "
            again = f" (seen {count} times)" if count > 1 else ""
            extra = {"dbpool": {"event": "finding", **finding.to_json()}}
            logger.log(
                _LEVELS[finding.severity],
                "%s%s %s%s. %s", where, finding.code, finding.title, again, finding.to_json()["do"],
                extra=extra,
            )  # fmt: skip

    def _say(self, found: Collection[Finding], now: float) -> None:
        ids = [(finding.id, finding.severity) for finding in found]
        is_calm = all(severity is Severity.OK for _, severity in ids)
        self.said["findings"] = {"at": now, "findings": [finding.to_json() for finding in found]}
        self._write("findings", ids, _CALM_INTERVAL if is_calm else 2.0, now)
        self.said["journal"] = {
            "journal": self._journal.to_json(),
            "endpoints": self._usage.to_json(),
            "deaths": self._deaths,
        }
        self._write("journal", None, _JOURNAL_INTERVAL, now)

    def _write(self, ending: str, what: object, interval: float, now: float) -> None:
        """Write what was said if it changed, or some time ago: writes are bounded."""
        at, before = self._written.get(ending, (-interval, object()))
        if self._shelf is not None and (what != before or now - at >= interval):
            self._written[ending] = now, what
            self._shelf.save(ending, self.said[ending])

    def close(self) -> None:
        """Close the connections to the servers."""
        for inspector in self._inspectors.values():
            inspector.close()


def _needs_look(pool: Any, watch: Watch, wall: float) -> bool:
    """Whether callers have waited for more than a second, or statements take long."""
    if watch.waiting_since is not None and wall - watch.waiting_since >= 1.0:
        return True
    return any(
        holder.seconds >= _SLOW_HOLD and holder.status in ("query", "unknown")
        for holder in pool.holders
    )
