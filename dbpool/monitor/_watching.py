"""The state of the one process that watches all: memory, the servers' views, its findings."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from dbpool.diagnosis import (
    Death,
    Finding,
    PoolScene,
    Scene,
    ServerView,
    Severity,
    Watch,
    diagnose,
    suspicions,
)
from dbpool.diagnosis._scene import mapping, number
from dbpool.diagnosis.endpoints import Rows
from dbpool.diagnosis.history import History, slot_of
from dbpool.diagnosis.journal import Journal, Reporter, death
from dbpool.diagnosis.usage import Usage
from dbpool.diagnosis.watching import Watcher
from dbpool.monitor._episodes import Episodes
from dbpool.monitor._forgotten import Forgotten
from dbpool.monitor._inspector import Inspector
from dbpool.monitor._shared_files import SharedFiles, read_pid

logger = logging.getLogger("dbpool")

_INTERVAL: Final = 2.0  # seconds between two writes of the same findings
_CALM_INTERVAL: Final = 5.0  # where nothing is wrong
_JOURNAL_INTERVAL: Final = 10.0
_ABOUT_INTERVAL: Final = 60.0
_BYTES_A_SECOND: Final = 250  # of each file
_MAX_FINDINGS: Final = 20
_GRACE: Final = 6.0  # seconds that findings are believed beyond their next write
_ADDED_UP_AFTER: Final = 2.0  # seconds after a step, when all processes have written it
_SLOW_HOLD: Final = 2.0  # seconds in one statement
_LONG_WAIT: Final = 1.0
_SERVERS_TIMEOUT: Final = 0.8  # seconds that a look at the pools waits for those at the servers
_OVERLAP: Final = 5.0  # seconds in which the process that watched before may still write
_MAX_DEATHS: Final = 20
_CLOCK_STEP: Final = 2.0  # seconds
_LEVELS: Final = {
    Severity.NOTICE: logging.INFO,
    Severity.WARNING: logging.WARNING,
    Severity.CRITICAL: logging.ERROR,
}


class Watching:
    """The state of the one process that watches all: memory, the servers' views, its findings."""

    def __init__(
        self,
        databases: Mapping[str, Any],
        shared: SharedFiles | None,
        blockers: bool,
        queries: bool,
        settings: Mapping[str, Any],
    ) -> None:
        self._shared, self._settings = shared, settings
        self._watcher, self._reporter = Watcher(), Reporter()
        self._usage, self._episodes, self._forgotten = Usage(), Episodes(), Forgotten()
        self._inspectors = {
            name: Inspector(pool, queries=queries) for name, pool in databases.items() if blockers
        }
        self._poolers = frozenset(
            name for name, pool in databases.items() if pool.settings.pooler == "transaction"
        )
        self._inherits_until: float | None = None
        self._journal, self._deaths = Journal(), dict[str, float]()
        self._exits: Mapping[int, int] = {}
        self._inherit()
        self._history: dict[str, History] = {}
        self._added_up = -1
        self._clock = 0.0  # by how much the wall clock was ahead of the monotonic one
        self._written: dict[str, tuple[float, object]] = {}
        self._sizes: dict[str, int] = {}  # of the files as written last
        self.published: dict[str, dict[str, Any]] = {}

    def _inherit(self) -> None:
        """Take over the journal and the deaths from the process that watched before."""
        before = mapping(self._shared.load("journal")) if self._shared is not None else {}
        deaths = {str(k): number(v) for k, v in mapping(before.get("deaths")).items()}
        self._journal = self._journal.merge(Journal.from_json(before.get("journal")))
        self._deaths = deaths | self._deaths

    def add_up(self, names: list[str], now: float) -> dict[str, History]:
        """Add up the steps of all processes, once each has ended for all; return the history."""
        assert self._shared is not None
        if self._inherits_until is None:
            self._inherits_until = now + _OVERLAP
        if now < self._inherits_until:
            self._inherit()
        self._exits = self._shared.exits()
        for name, is_orderly in self._shared.ended().items():
            pid = _pid_of(name)
            if name not in self._deaths and (not is_orderly or pid in self._exits):
                self._deaths[name] = time.time()
                line = death(pid, self._exits.get(pid), self._deaths[name])
                self._journal = self._journal.add([line])
        self._deaths = dict(list(self._deaths.items())[-_MAX_DEATHS:])
        slot = slot_of(now - _ADDED_UP_AFTER)
        if slot != self._added_up:
            self._shared.add_up(names, self._history, now)
            self._history = self._shared.history(now)
            self._added_up = slot
        return self._history

    def look(
        self,
        report: dict[str, Any],
        history: Mapping[str, History],
        now: float,
        *,
        stalled: float,
        usage: Callable[[], Mapping[str, Rows]],
    ) -> None:
        """Take a look at the pools, find what is wrong, and say it.

        *stalled* is for how long this process stood still of late; *usage* reads the use by endpoint.
        """
        wall = time.time()
        if abs(wall - now - self._clock) > _CLOCK_STEP:  # it was set: no time before compares
            self._watcher = Watcher()
        self._clock = wall - now
        watches = self._forgotten.look(self._watcher.look(report, wall), usage)
        self._usage.look(report, now)
        lines = self._reporter.look(report, wall, set(map(_pid_of, self._deaths)))
        self._journal = self._journal.add(lines)
        self._inspect(report, watches, wall)
        scene = Scene.read(
            report,
            now=wall,
            steps={name: each.last(now) for name, each in history.items()},
            watches=watches,
            views=self._views(),
            poolers=self._poolers,
            deaths=tuple(
                Death(at, self._exits.get(_pid_of(name))) for name, at in self._deaths.items()
            ),
            stalled=stalled,
        )
        found = diagnose(scene)
        self._log(found, now)
        self._publish(found, report, now)

    def _views(self) -> dict[str, ServerView]:
        views = {name: each.view() for name, each in self._inspectors.items()}
        return {name: view for name, view in views.items() if view is not None}

    def _inspect(self, report: Any, watches: Mapping[str, Watch], wall: float) -> None:
        for pool in Scene.read(report, now=wall).pools:
            if (inspector := self._inspectors.get(pool.name)) is not None:
                since = watches.get(pool.name, Watch()).waiting_since
                is_urgent = since is not None and wall - since >= _LONG_WAIT
                inspector.tick(is_needed=is_urgent or _is_held_long(pool), is_urgent=is_urgent)
        deadline = time.monotonic() + _SERVERS_TIMEOUT
        for inspector in self._inspectors.values():
            inspector.wait(deadline - time.monotonic())

    def _log(self, found: Collection[Finding], now: float) -> None:
        for finding, count in self._episodes.due(found, now):
            where = "" if finding.pool is None else f"pool {finding.pool!r}: "
            again = f" (seen in {count} looks)" if count > 1 else ""
            extra = {"dbpool": {"event": "finding", **finding.to_json()}}
            logger.log(
                _LEVELS[finding.severity],
                "%s%s %s%s. %s", where, finding.code, finding.title, again, finding.to_json()["do"],
                extra=extra,
            )  # fmt: skip

    def _publish(self, found: Collection[Finding], report: Mapping[str, Any], now: float) -> None:
        found = list(found)[:_MAX_FINDINGS]
        # Where nothing is wrong, the text names the pools that report, with sums over the workers.
        reported = sorted(report["pools"]), len(report["processes"])
        ids = [*reported, *((finding.id, finding.severity) for finding in found)]
        is_calm = all(finding.severity is Severity.OK for finding in found)
        interval = self._interval("findings", _CALM_INTERVAL if is_calm else _INTERVAL)
        self.published["findings"] = {
            "at": now,
            "valid": _GRACE + interval,
            # Before the first report nothing is known: a reader diagnoses the report that it has.
            "findings": [each.to_json() for each in found]
            if report["pools"] or not is_calm
            else [],
            "suspicions": suspicions(found),
        }
        self._write("findings", ids, interval, now)
        self.published["journal"] = {
            "journal": self._journal.to_json(),
            "endpoints": self._usage.to_json(),
            "deaths": self._deaths,
        }
        # Who watches next needs to know of all deaths: it may be the end of this process that is next.
        deaths = tuple(self._deaths)
        self._write("journal", deaths, self._interval("journal", _JOURNAL_INTERVAL), now)
        views = self._views()
        servers = {name: view.about() for name, view in views.items() if view.facts}
        self.published["about"] = {"settings": self._settings, "servers": servers}
        known = {name: view.time for name, view in views.items()}
        self._write("about", known, self._interval("about", _ABOUT_INTERVAL), now)

    def _interval(self, ending: str, least: float) -> float:
        """Return the pause between two writes of a file, which is longer for a larger file."""
        return max(least, self._sizes.get(ending, 0) / _BYTES_A_SECOND)

    def _write(self, ending: str, what: object, interval: float, now: float) -> None:
        """Write a result if it changed, or if it was last written some time ago."""
        at, before = self._written.get(ending, (-interval, object()))
        if self._shared is not None and (what != before or now - at >= interval):
            self._written[ending] = now, what
            self._sizes[ending] = self._shared.save(ending, self.published[ending])

    def close(self) -> None:
        """Close the connections to the servers."""
        for inspector in self._inspectors.values():
            inspector.close()


def _pid_of(name: str) -> int:
    """Return the pid in the name of a process's history, `app-4711-c0ffee`."""
    return read_pid("".join(name.split("-")[1:2]))


def _is_held_long(pool: PoolScene) -> bool:
    """Whether a connection has been in one statement for long, as callers who wait may know."""
    # Those may have begun to wait before the last report.
    least = _LONG_WAIT if pool.waiting else _SLOW_HOLD
    return any(
        holder.seconds >= least and holder.status in ("query", "unknown") for holder in pool.holders
    )
