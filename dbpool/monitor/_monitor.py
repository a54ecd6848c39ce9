"""`Monitor`: looks at the pools of a host each second, keeps their history, says what is wrong."""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, Final, Protocol

from dbpool._per_process import PerProcess, Starter
from dbpool.diagnosis import Scene, diagnose, endpoints
from dbpool.diagnosis._scene import mapping, number, rows, text
from dbpool.diagnosis.endpoints import Rows
from dbpool.diagnosis.history import History, Recorder
from dbpool.errors import describe
from dbpool.metrics import PoolState, Snapshot
from dbpool.monitor._looks import Pauses, Pings
from dbpool.monitor._shared_files import Record, SharedFiles
from dbpool.monitor._watching import Watching
from dbpool.report import Report

logger = logging.getLogger("dbpool")

INTERVAL: Final = 1.0  # seconds between two looks
_CLOSING: Final = 3.0  # seconds

_starter: Starter[Monitor] = Starter()
watch_from_the_start = _starter.start  # in a server's worker


def close_all() -> None:
    """Stop all monitors of this process."""
    for monitor in _starter:
        monitor.close()


atexit.register(close_all)


class Collects(Protocol):
    """The part of `dbpool.processes.Processes` that the monitor needs."""

    app: str

    def directory(self) -> Path | None:
        """Return the directory that the processes share."""

    def collect(self, scope: str = "all", *, usage: bool = False) -> Report:
        """Return the report of this process, with the use by endpoint if that is wanted."""

    def collect_others(self, *, usage: bool = False) -> Report | None:
        """Return the report of all that publish, this process among them."""


class _ProcessState:
    """The state of one process; a child begins with a new one."""

    def __init__(self) -> None:
        self.started = monotonic()
        self.starting = threading.Lock()
        # Its put() may be called by a garbage collection, that of an Event may not.
        self.stops: queue.SimpleQueue[None] = queue.SimpleQueue()  # gevent's, if it patched
        self.thread: threading.Thread | None = None
        self.recorders: dict[str, Recorder] = {}
        self.record: Record | None = None
        self.shared: SharedFiles | None = None
        self.key = f"{os.getpid()}-{os.urandom(6).hex()}"
        self.history: dict[str, History] = {}  # of this process, where it is alone
        self.watching: Watching | None = None
        self.pauses, self.pings = Pauses(), Pings()

    def is_stopped(self, seconds: float) -> bool:
        """Wait for the end for at most *seconds*; return whether it came."""
        with suppress(queue.Empty):
            self.stops.get(timeout=seconds)
            return True
        return False

    def release(self) -> None:
        """Close what watching has opened, and let another process watch."""
        if self.watching is not None:
            self.watching.close()
        with suppress(OSError):
            if self.record is not None:
                self.record.close()
            if self.shared is not None:
                self.shared.give_up()


class Monitor:
    """Watches the pools of an application, and says what is wrong with them.

    *databases* maps names to pools, *processes* is a `Processes`. Of the processes that share a
    directory, one watches the pools of all. It logs each new finding, and shares its findings with
    the others, which show them. Unless *blockers* is false, it asks the servers who blocks whom
    while callers wait for long. With *queries*, findings include SQL.
    """

    def __init__(
        self,
        databases: Mapping[str, Any],
        processes: Collects,
        *,
        blockers: bool = True,
        queries: bool = False,
        is_reader: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._databases = databases
        self._processes = processes
        self._blockers = blockers
        self._queries = queries
        self._is_reader = is_reader
        self._settings = settings or {}
        self._state = PerProcess(_ProcessState)
        self._warned: set[str] = set()
        _starter.add(self)

    def start(self) -> None:
        """Start watching, in a thread of this process. Calling it again costs little.

        The thread ends when the monitor or all its pools are closed.
        """
        state = self._state()
        if state.thread is None and state.starting.acquire(blocking=False):
            try:
                if state.thread is None:
                    self._start(state)
            finally:
                state.starting.release()

    def _start(self, state: _ProcessState) -> None:
        # The thread keeps no monitor alive, and so no pool.
        arguments = (weakref.ref(self, lambda _: state.stops.put(None)), state)
        thread = threading.Thread(None, _run, "dbpool-monitor", arguments, daemon=True)
        with suppress(RuntimeError):  # no thread can be had: tried again later
            thread.start()
            state.thread = thread

    def close(self) -> None:
        """Stop, close what watching opened, and let another process watch."""
        state = self._state.known()
        if state is not None:
            state.stops.put(None)
            if state.thread is not None and state.thread is not threading.current_thread():
                state.thread.join(_CLOSING)
            state.release()

    def findings(self, report: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Return the current findings as plain JSON, as in `/stats`; only DB00 if nothing is wrong.

        If no process watches yet, the findings come from *report*, by default the current one.
        """
        if found := rows(self._found().get("findings")):
            return [dict(each) for each in found]
        report = _facts_of(self._report()) if report is None else report
        return [finding.to_json() for finding in diagnose(Scene.read(report))]

    def extend(self, report: Report, include: Collection[str] = ()) -> dict[str, Any]:
        """Return a report as JSON, with `findings` and with those of `INCLUDES` that are wanted.

        For the endpoints it must have its `usage`.
        """
        shown = report.to_json()
        more: dict[str, Any] = {"findings": self.findings(shown)}
        if "history" in include:
            more["history"] = self._history_json()
        kept = self._known("journal") if {"journal", "endpoints"} & set(include) else {}
        if "journal" in include:
            more["journal"] = [dict(line) for line in rows(kept.get("journal"))]
        if "endpoints" in include:
            seen = mapping(kept.get("endpoints"))
            more["endpoints"] = {
                name: endpoints.to_json(report.usage.get(name, {}), mapping(seen.get(name)))
                for name in report.pools
            }
        if "workers" in include:
            more["workers"] = report.workers_to_json()
        if about := {"servers", "settings"} & set(include):
            known = self._known("about")
            more |= {part: dict(mapping(known.get(part))) for part in about}
        if "settings" in include:
            more["settings"] = more["settings"] or dict(self._settings)
        return shown | more

    def tick(self) -> None:
        """Take one look; `start` does so each second."""
        state, now = self._state(), monotonic()
        state.pauses.look(now)
        stats = {name: pool.stats() for name, pool in self._databases.items()}
        if os.environ.get("DBPOOL_SERVE") and not self._is_reader:
            state.pings.look(self._databases, stats, now)
        short = self._record(state, stats, now)
        if state.shared is None or state.shared.lead(now, is_reader=self._is_reader):
            if state.watching is None:
                state.watching = Watching(
                    self._databases, state.shared, self._blockers, self._queries, self._settings
                )
            watching, report, history = state.watching, _facts_of(self._report()), state.history
            if state.shared is not None:
                history = watching.add_up([*self._databases, *report["pools"]], now)
            stalled = state.pauses.look(monotonic())  # it may have stood still since `now`
            watching.look(report, history, now, stalled=stalled, usage=self._usage)
        elif state.watching is not None:  # another took over while this one was silent
            state.watching.close()
            state.watching = None
        self._suspect(short)

    def is_over(self) -> bool:
        """Whether all pools are closed."""
        return all(pool.state == PoolState.STOPPED for pool in self._databases.values())

    def try_tick(self) -> None:
        """Take one look; log each kind of error of the look itself once."""
        try:
            self.tick()
        except OSError as ex:
            self._warn_once(f"watching failed: {ex.strerror or describe(ex)}")
        except Exception as ex:  # noqa: BLE001  # watching never harms what it watches
            self._warn_once(f"watching failed: {describe(ex)}")

    def _shared(self, state: _ProcessState) -> SharedFiles | None:
        if state.shared is None and (directory := self._processes.directory()) is not None:
            state.shared = SharedFiles(directory, self._processes.app, state.key)
        return state.shared

    def _record(self, state: _ProcessState, stats: Mapping[str, Snapshot], now: float) -> list[str]:
        """Record this process's part of the history; return the pools that are full."""
        short = []
        if self._is_reader:
            self._shared(state)
        elif state.record is None and (shared := self._shared(state)) is not None:
            for inherited in self._state.inherited():  # of uWSGI, which runs no hooks at a fork
                if inherited.record is not None:
                    inherited.record.abandon()
            state.record = shared.record(list(self._databases))
        for name, each in stats.items():
            if each.waiting or 0 < each.max_size <= each.active:
                short.append(name)
            recorder = state.recorders.setdefault(name, Recorder(state.started))
            if (ended := recorder.sample(each, now)) is None:
                continue
            if state.record is not None:
                state.record.write(name, *ended)
            else:
                state.history.setdefault(name, History()).add(*ended)
        return short

    def _usage(self) -> Mapping[str, Rows]:
        """Return the use by endpoint of all processes."""
        return self._report(usage=True).usage

    def _report(self, *, usage: bool = False) -> Report:
        with suppress(OSError):  # no more files can be opened
            if (found := self._processes.collect_others(usage=usage)) is not None:
                return found
        return self._processes.collect("process", usage=usage)

    def _found(self) -> Mapping[str, Any]:
        """Return the last findings, unless they are too old."""
        known = self._known("findings")
        is_valid = 0 <= monotonic() - number(known.get("at")) <= number(known.get("valid"))
        return known if is_valid else {}

    def _suspect(self, short: Collection[str]) -> None:
        """Put the findings into the errors of these pools, and none into those of the others."""
        found = mapping(self._found().get("suspicions")) if short else {}
        for name, pool in self._databases.items():
            pool.suspicion = (name in short and text(found.get(name))) or ""

    def _known(self, ending: str) -> Mapping[str, Any]:
        """Return what the watching process found, be it this one or another that wrote a file."""
        state = self._state()
        if state.watching is not None:
            return state.watching.published.get(ending, {})
        shared = self._shared(state)
        return {} if shared is None else mapping(shared.load(ending))

    def _history_json(self) -> dict[str, Any]:
        state, now = self._state(), monotonic()
        shared = self._shared(state)
        known = state.history if shared is None else shared.history(now)
        until = time.time() - now % 5.0
        pools = {name: history.to_json(now) for name, history in known.items()}
        minute = {name: history.minute(now) for name, history in known.items()}
        return {"step": 5.0, "until": round(until, 1), "pools": pools, "minute": minute}

    def _warn_once(self, text: str) -> None:
        if text not in self._warned and len(self._warned) < 20:
            self._warned.add(text)
            logger.warning("diagnosis: %s", text)


def _run(monitor: weakref.ref[Monitor], state: _ProcessState) -> None:
    """Look each second until the monitor is gone, closed, or has nothing left to look at."""
    try:
        while (found := monitor()) is not None and not found.is_over():
            found.try_tick()  # the first at once: a worker that is killed soon is missed then
            del found
            if state.is_stopped(INTERVAL):
                return
    finally:
        state.release()


def _facts_of(report: Report) -> dict[str, Any]:
    """Return the input of a diagnosis, in the format of `/stats` but without histograms."""
    return {
        "time": report.time,
        "processes": [vars(process) for process in report.processes],
        "pools": {
            name: {
                **vars(pool),
                "breaker": vars(pool.breaker),
                "counters": vars(pool.counters),
                "holders": [vars(holder) for holder in pool.holders],
            }
            for name, pool in report.pools.items()
        },
    }
