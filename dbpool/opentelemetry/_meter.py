"""Meter: the instruments of one provider, for the pools that it watches in this process.

A checkout does nothing for them: the pool's own histograms count it as always. What these have
gained is recorded each second and at each collection, outside the pool's lock. The API takes one
value at a time, so values are made up such that their number, their buckets and their sum are exact.
"""

from __future__ import annotations

import logging
import os
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from math import inf, nextafter
from operator import sub
from typing import Any, Final
from weakref import WeakKeyDictionary, ref

from opentelemetry.metrics import MeterProvider, Observation

from dbpool import __version__
from dbpool._per_process import PerProcess
from dbpool.metrics import BOUNDS, HistogramSnapshot, Metrics, PoolState, Snapshot
from dbpool.pool import Pool, _fork
from dbpool.report import merge

logger = logging.getLogger("dbpool")

POOL_NAME: Final = "db.client.connection.pool.name"
BOUNDARIES: Final = BOUNDS[::4]  # two to a decade, as in `/metrics`
RECORD_INTERVAL: Final = 1.0  # seconds
LOCK_TIMEOUT: Final = 10.0  # seconds that a collection waits for what is being recorded

_MAX_GONE: Final = 100  # pools that ended while nothing collected

_PREFIX: Final = "db.client.connection."
_STATE: Final = f"{_PREFIX}state"
_TIMES: Final = {
    "wait": ("wait_time", "The time it took to obtain an open connection from the pool."),
    "use": ("use_time", "The time between borrowing a connection and returning it to the pool."),
    "connect": ("create_time", "The time it took to create a new connection."),
}
_SIZES: Final = (
    ("max", "max_size", "{connection}", "The maximum number of open connections allowed."),
    ("idle.max", "max_size", "{connection}", "The maximum number of idle connections allowed."),
    ("idle.min", "min_size", "{connection}", "The minimum number of idle connections kept."),
    ("pending_requests", "waiting", "{request}", "The number of callers waiting for a connection."),
)


class _Watched:
    """A pool, and what has been recorded of it in this process."""

    def __init__(self, pool: Pool[Any]) -> None:
        self.pool = ref(pool)
        self.name = pool.name
        self.attributes = {POOL_NAME: pool.name}
        self.metrics = pool._store.metrics  # outlives the pool, so its last checkouts count too
        self.pid = os.getpid()
        self.seen = Snapshot()

    def begin_in_child(self) -> bool:
        """Begin at zero after a fork; return whether the parent recorded anything before."""
        if self.pid == os.getpid():
            return False
        had_recorded = self.seen.wait.count > 0
        self.pid, self.seen, self.metrics = os.getpid(), Snapshot(), Metrics()
        return had_recorded

    def snapshot(self) -> Snapshot:
        """Return the pool's numbers, or the last ones of a pool that is gone."""
        if (pool := self.pool()) is None:
            return self.metrics.snapshot(())
        self.metrics = pool._store.metrics
        return pool.stats()


class _ProcessState:
    """The state of one process: a child inherits no thread, and perhaps a lock that is held."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while recording
        self.timeouts: Counter[str] = Counter()  # by the pool's name, also of pools that are gone
        self.thread: threading.Thread | None = None
        self.wake = threading.Event()


class Meter:
    """The instruments of one provider."""

    def __init__(self, provider: MeterProvider) -> None:
        self._watched: dict[_Watched, None] = {}  # in order
        self._known: WeakKeyDictionary[Pool[Any], _Watched] = WeakKeyDictionary()
        self._state = PerProcess(_ProcessState)
        self._warned: set[str] = set()
        meter = provider.get_meter("dbpool", __version__)
        self._histograms = {
            field: meter.create_histogram(
                _PREFIX + name, "s", about, explicit_bucket_boundaries_advisory=BOUNDARIES
            )
            for field, (name, about) in _TIMES.items()
        }
        about = "The number of connections that are currently in the state described."
        meter.create_observable_up_down_counter(
            f"{_PREFIX}count", [self._count], "{connection}", about
        )
        for name, field, unit, about in _SIZES:
            meter.create_observable_up_down_counter(
                _PREFIX + name, [self._size_of(field)], unit, about
            )
        about = "The number of callers that got no connection in time."
        meter.create_observable_counter(f"{_PREFIX}timeouts", [self._timeouts], "{timeout}", about)

    def add(self, pool: Pool[Any]) -> None:
        """Watch a pool; a second call does nothing."""
        watched = self._known.get(pool) or self._known.setdefault(pool, _Watched(pool))
        self._watched[watched] = None
        gone = [each for each in list(self._watched) if each.pool() is None]
        for each in gone[:-_MAX_GONE]:
            self._watched.pop(each, None)

    def remove(self, pools: Collection[Pool[Any]]) -> None:
        """Stop watching these pools, and those that are gone; record what has ended until now."""
        state = self._state()
        with state.lock:
            for watched in list(self._watched):
                if (pool := watched.pool()) is None or pool in pools:
                    if watched.pid == os.getpid():  # else the instruments are the parent's
                        self._record(state, watched)
                    self._watched.pop(watched, None)
        if not self._watched:
            state.wake.set()

    # What is called at a collection

    def _count(self, options: object) -> Iterator[Observation]:
        for name, now in self._observe().items():
            for state, number in (("idle", now.idle), ("used", now.active)):
                yield Observation(number, {POOL_NAME: name, _STATE: state})

    def _size_of(self, field: str) -> Any:
        def observe(options: object) -> Iterator[Observation]:
            for name, now in self._observe().items():
                yield Observation(getattr(now, field), {POOL_NAME: name})

        return observe

    def _timeouts(self, options: object) -> Iterator[Observation]:
        self._observe()
        for name, number in list(self._state().timeouts.items()):
            yield Observation(number, {POOL_NAME: name})

    def _observe(self) -> dict[str, Snapshot]:
        """Record what was gained; return the sizes by the pool's name, added up for equal names."""
        state = self._state()
        found = self.record(state)
        with suppress(RuntimeError):  # out of threads, or the interpreter is ending
            self._start_thread(state)
        return found

    # Recording

    def record(self, state: _ProcessState) -> dict[str, Snapshot]:
        """Record what was gained; return what `_observe` does, nothing if the lock is not free."""
        _fork.notice_fork()
        found: dict[str, list[Snapshot]] = {}
        # A provider might hold a lock of its own here that another thread waits for in `record`.
        if not state.lock.acquire(timeout=LOCK_TIMEOUT):
            return {}
        try:
            for watched in list(self._watched):
                now = self._record(state, watched)
                if watched.pool() is None:
                    self._watched.pop(watched, None)
                    continue
                is_open = now.state != PoolState.STOPPED
                found.setdefault(watched.name, []).extend([now] * is_open)
        finally:
            state.lock.release()
        return {name: merge(*parts) if parts else Snapshot() for name, parts in found.items()}

    def _record(self, state: _ProcessState, watched: _Watched) -> Snapshot:
        """Record what one pool has gained; the lock is held."""
        if watched.begin_in_child():
            self._warn(
                "the provider is the parent's: this process reports again what its parent had"
                " recorded; make a provider after the fork"
            )
        now, seen = watched.snapshot(), watched.seen
        watched.seen = now  # first: whatever fails below, nothing is recorded twice
        state.timeouts[watched.name] += max(0, now.counters.timeouts - seen.counters.timeouts)
        try:
            for field, histogram in self._histograms.items():
                for value, number in gained(getattr(seen, field), getattr(now, field)):
                    for _ in range(number):
                        histogram.record(value, watched.attributes)
        except Exception as ex:  # noqa: BLE001  # of any provider
            self._warn(f"recording failed: {type(ex).__name__}")
        return now

    def _warn(self, text: str) -> None:
        """Log a warning, once."""
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("OpenTelemetry: %s", text)

    def _start_thread(self, state: _ProcessState) -> None:
        """Record each second from now on, so that a collection, or the end, has little to do."""
        if not state.lock.acquire(blocking=False):  # the next collection starts it
            return
        try:
            if state.thread is None and self._watched:
                name = "dbpool-opentelemetry"
                thread = threading.Thread(None, self._run, name, (state,), daemon=True)
                thread.start()
                state.thread = thread
        finally:
            state.lock.release()

    def _run(self, state: _ProcessState) -> None:
        """Record each second, until nothing is watched."""
        while True:
            state.wake.wait(RECORD_INTERVAL)
            state.wake.clear()
            self.record(state)
            with state.lock:
                if not self._watched:
                    state.thread = None
                    return


def gained(old: HistogramSnapshot, new: HistogramSnapshot) -> Iterable[tuple[float, int]]:
    """Return the durations that *new* has in addition to *old*: values, each with its number."""
    counts = [max(0, count) for count in map(sub, new.counts, old.counts)]
    return spread(counts, (new.sum_ns - old.sum_ns) / 1e9, new.max) if any(counts) else ()


def spread(counts: Sequence[int], total: float, longest: float) -> Iterator[tuple[float, int]]:
    """Yield a value for each bucket of `BOUNDS` in *counts*, with its number.

    Each lies in its bucket, none is above *longest*, and all together they make *total* seconds.
    """
    edges = (0.0, *BOUNDS, inf)
    used = [(n, edges[n], min(edges[n + 1], longest)) for n, count in enumerate(counts) if count]
    lowest = sum(counts[n] * low for n, low, _ in used)
    width = sum(counts[n] * (high - low) for n, low, high in used)
    share = min(1.0, max(0.0, (total - lowest) / width)) if width > 0.0 else 1.0
    for n, low, high in used:
        value = min(low + share * (high - low), high)
        if bisect_left(BOUNDS, value) < n:  # a bucket is above its lower bound
            value = nextafter(low, inf)
        yield value, counts[n]
