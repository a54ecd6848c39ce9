"""What happened to the pools, in at most a hundred lines: down, back, full, workers, settings.

Pure. Lines are made of what changed between two reports, by the one process that watches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from dbpool._secrets import mask
from dbpool.diagnosis._finding import count, duration, ending
from dbpool.diagnosis._scene import PoolScene, Process, Scene, number, rows, text

__all__ = ["LINES", "Journal", "Line", "Reporter", "death"]

LINES: Final = 100
_LONGEST: Final = 120  # characters of a line's text
_MAX_POOLS: Final = 256
_MAX_PROCESSES: Final = 1024


@dataclass(frozen=True, slots=True, order=True)
class Line:
    """One thing that happened; `time` is Unix time, `pool` is "" for the host."""

    time: float
    pool: str
    event: str
    text: str

    def to_json(self) -> dict[str, Any]:
        """Return it as `/stats` shows it."""
        return asdict(self) | {"time": round(self.time, 1), "pool": self.pool or None}


class Journal:
    """The last `LINES` lines, oldest first."""

    def __init__(self, lines: Iterable[Line] = ()) -> None:
        self.lines: tuple[Line, ...] = tuple(sorted(set(lines)))[-LINES:]

    def add(self, lines: Iterable[Line]) -> Journal:
        """Return a journal that has these lines too."""
        return Journal((*self.lines, *lines))

    def merge(self, *others: Journal) -> Journal:
        """Return the lines of all, each once; the order of merging changes nothing."""
        return Journal(line for journal in (self, *others) for line in journal.lines)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the lines, the latest first."""
        return [line.to_json() for line in reversed(self.lines)]

    @classmethod
    def from_json(cls, data: Any) -> Journal:
        """Read what `to_json` made; lines that cannot be read are left out."""
        read = ((row, text(row.get("event")), text(row.get("text"))) for row in rows(data))
        return cls(
            Line(number(row.get("time")), text(row.get("pool")) or "", event, shortened(about))
            for row, event, about in read
            if event and about
        )


def death(pid: int, code: int | None, now: float) -> Line:
    """Return the line for a worker that died; *code* is its exit code, below 0 a signal."""
    how = "" if code is None else f" {ending(code)}"
    return Line(now, "", "worker died", f"worker {pid} died{how}")


def shortened(words: str) -> str:
    """Return a line's text: printable, without a secret, and not too long."""
    words = mask(words)
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 1]}…"


class Reporter:
    """Says what changed from one report to the next."""

    def __init__(self) -> None:
        self._pools: dict[str, _Pool] = {}
        self._processes: dict[int, float] | None = None  # pid to start, Unix time

    def look(
        self,
        report: Mapping[str, Any],
        now: float,
        dead: Collection[int] = (),
    ) -> list[Line]:
        """Take the next report; return the lines for what is new in it.

        *dead* are the pids of workers that did not end as they should: `death` has their lines.
        """
        scene = Scene.read(report, now=now)
        lines = [*self._of_processes(scene.processes[:_MAX_PROCESSES], now, dead)]
        pools = scene.pools[:_MAX_POOLS]
        self._pools = {pool.name: self._pools.get(pool.name) or _Pool() for pool in pools}
        for pool in pools:
            for event, words in self._pools[pool.name].look(pool):
                lines.append(Line(now, pool.name, event, shortened(words)))
        return lines

    def _of_processes(
        self, processes: Iterable[Process], now: float, dead: Collection[int]
    ) -> Iterable[Line]:
        before = self._processes
        after = {each.pid: now - each.uptime for each in processes}
        self._processes = after
        if before is None:
            return
        for pid, started in after.items():
            # The same pid again is another worker if it started at another time.
            if pid not in before or started - before[pid] > 2.0:
                yield Line(now, "", "worker started", f"worker {pid} started")
        for pid in before.keys() - after.keys() - set(dead):
            yield Line(now, "", "worker ended", f"worker {pid} ended")


class _Pool:
    """What is remembered of one pool between two reports."""

    def __init__(self) -> None:
        self._is_known = False
        self._down_since: float | None = None
        self._short_since: float | None = None
        self._totals = dict.fromkeys(_TOTALS, 0.0)
        self._size = 0

    def look(self, pool: PoolScene) -> Iterable[tuple[str, str]]:
        totals = {name: number(pool.counters.get(name)) for name in _TOTALS}
        grown = {name: int(max(0, totals[name] - self._totals[name])) for name in _TOTALS}
        if not self._is_known:
            grown = dict.fromkeys(_TOTALS, 0)
        yield from self._availability(pool, grown["circuit_opened"])
        yield from self._shortage(pool)
        if grown["leaks"]:
            yield "forgotten", f"{count(grown['leaks'], 'connection')} forgotten by the application"
        if self._is_known and pool.max_size != self._size:
            yield "resized", f"max_size of all workers went from {self._size} to {pool.max_size}"
        self._is_known, self._totals, self._size = True, totals, pool.max_size

    def _availability(self, pool: PoolScene, opened: int) -> Iterable[tuple[str, str]]:
        error = text(pool.breaker.get("last_error")) or "unknown"
        if pool.state == "down" and self._down_since is None:
            self._down_since = number(pool.breaker.get("since"), pool.now)
            yield "down", f"down: {error}"
        elif pool.state != "down" and self._down_since is not None:
            lasted = max(0.0, pool.now - self._down_since)
            self._down_since = None
            yield "back", f"back after {duration(lasted)}"
        elif pool.state != "down" and opened:
            yield "back", "down and back between two looks"

    def _shortage(self, pool: PoolScene) -> Iterable[tuple[str, str]]:
        is_full = pool.waiting > 0 and 0 < pool.max_size <= pool.active
        if is_full and self._short_since is None:
            self._short_since = pool.now
            yield "full", f"all {pool.max_size} connections in use, callers wait"
        elif not pool.waiting and self._short_since is not None:
            lasted, self._short_since = pool.now - self._short_since, None
            yield "relieved", f"nobody waits any more, after {duration(max(0.0, lasted))}"


_TOTALS: Final = ("leaks", "circuit_opened")
