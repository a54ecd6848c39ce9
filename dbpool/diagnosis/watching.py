"""What repeated looks at a report show: who waits since when, and who does the same for long.

Pure: the time comes with each report. One process on a host keeps a `Watcher`, and looks once a
second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from dbpool.diagnosis._scene import Limit, PoolScene, Run, Scene, Watch, key_of, number
from dbpool.errors import FailureKind

_MAX_POOLS: Final = 256
_MAX_HOLDERS: Final = 1000
_SHARES: Final = 10  # looks
_EPISODE: Final = 60.0  # seconds that a connection that was forgotten is spoken of
_REFUSED: Final = 10.0  # seconds
_LIMIT_EPISODE: Final = 10.0  # seconds
_CALM: Final = 2  # looks without a waiting caller that end a wait
_REPORT_AGE: Final = 2.0  # seconds at most until a look shows what began


class _Pool:
    """What is remembered of one pool."""

    def __init__(self) -> None:
        self.waiting_since: float | None = None
        self.unused_since: float | None = None
        self.calm = 0
        self.shares: deque[tuple[int, int]] = deque(maxlen=_SHARES)  # unused, all
        self.runs: dict[tuple[object, ...], Run] = {}
        self.limit: Limit | None = None
        self.totals: Mapping[str, float] | None = None
        self.growth: dict[str, deque[tuple[float, int]]] = {
            name: deque(maxlen=256) for name in _TOTALS
        }

    def look(self, pool: PoolScene) -> None:
        self._look_at_waiting(pool)
        self._look_at_holders(pool)
        self._look_at_limit(pool)
        self._look_at_totals(pool)

    def _look_at_waiting(self, pool: PoolScene) -> None:
        if pool.waiting:
            self.calm = 0
            self.waiting_since = self.waiting_since or pool.now
            if pool.holders:
                unused = sum(holder.is_unused for holder in pool.holders)
                self.shares.append((unused, len(pool.holders)))
        else:
            self.calm += 1
        if self.calm >= _CALM:
            self.waiting_since = self.unused_since = None
            self.shares.clear()
        share = self.unused_share
        if share is None or share < 0.5:
            self.unused_since = None
        elif self.unused_since is None:
            # They did so before the first look that shows callers waiting.
            held = max((h.seconds for h in pool.holders if h.is_unused), default=0.0)
            self.unused_since = pool.now - min(held, _REPORT_AGE)

    @property
    def unused_share(self) -> float | None:
        known = sum(holders for _, holders in self.shares)
        return sum(unused for unused, _ in self.shares) / known if known else None

    def _look_at_holders(self, pool: PoolScene) -> None:
        before, self.runs = self.runs, {}
        for holder in pool.holders[:_MAX_HOLDERS]:
            key = key_of(holder)
            run = before.get(key)
            if run is None or run.status != holder.status or not run.is_of(holder, pool.now):
                run = Run(holder.status, 0, pool.now - holder.seconds)
            self.runs[key] = replace(run, looks=run.looks + 1)

    def _look_at_limit(self, pool: PoolScene) -> None:
        """Remember that a limit was met: an attempt that is given up takes its error with it."""
        limit, error = self.limit, pool.breaker.get("last_error")
        if limit is not None and pool.now - limit.seen > _LIMIT_EPISODE:
            self.limit = limit = None
        if isinstance(error, str) and pool.error_kind == FailureKind.SATURATED:
            since = number(pool.breaker.get("since"), pool.now)
            self.limit = Limit(error, limit.since if limit else since, pool.now)

    def _look_at_totals(self, pool: PoolScene) -> None:
        totals = {
            name: sum(number(pool.counters.get(k)) for k in keys) for name, keys in _TOTALS.items()
        }
        if self.totals is not None:
            for name, total in totals.items():
                if (grown := int(total - self.totals[name])) > 0:
                    self.growth[name].append((pool.now, grown))
        self.totals = totals

    def watch(self, now: float) -> Watch:
        forgotten = self._recent("forgotten", now, _EPISODE)
        nested = self._recent("nested", now, _REFUSED)
        return Watch(
            waiting_since=self.waiting_since,
            limit=self.limit,
            unused_since=self.unused_since,
            unused_share=self.unused_share,
            runs=self.runs,
            forgotten=sum(n for _, n in forgotten),
            forgotten_since=forgotten[0][0] if forgotten else None,
            refused=sum(n for _, n in self._recent("refused", now, _REFUSED)),
            nested=sum(n for _, n in nested),
            nested_since=nested[0][0] if nested else None,
        )

    def _recent(self, name: str, now: float, seconds: float) -> list[tuple[float, int]]:
        # A clock that was set back leaves nothing in the future.
        return [each for each in self.growth[name] if now - seconds <= each[0] <= now]


_TOTALS: Final[Mapping[str, tuple[str, ...]]] = {
    "forgotten": ("leaks",),
    "refused": ("timeouts", "rejected"),
    "nested": ("nested",),
}


class Watcher:
    """Keeps what repeated looks at the same pools show."""

    def __init__(self) -> None:
        self._pools: dict[str, _Pool] = {}

    def look(self, report: Mapping[str, Any], now: float) -> dict[str, Watch]:
        """Take the next look; return what all of them show, by pool."""
        pools = Scene.read(report, now=now).pools[:_MAX_POOLS]
        self._pools = {pool.name: self._pools.get(pool.name) or _Pool() for pool in pools}
        for pool in pools:
            self._pools[pool.name].look(pool)
        return {name: pool.watch(now) for name, pool in self._pools.items()}
