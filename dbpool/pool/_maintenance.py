"""Maintenance: what the watchdog does for a pool, twice a second or more often."""

from __future__ import annotations

from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import psycopg

from dbpool.holders import ConnectionRecord
from dbpool.liveness import cancel
from dbpool.pool import _fork
from dbpool.pool._bag import Step
from dbpool.pool._supply import Supply

if TYPE_CHECKING:
    from dbpool.pool._seam import PoolBase

# A primary that moved may make many statements fail at once; one drain is enough. And how long it
# is between two looks for a standby that is preferred.
_MOVED_INTERVAL: Final = 5.0

# Seconds between two runs: twice the longest heals what was interrupted.
MIN_INTERVAL: Final = 0.05
MAX_INTERVAL: Final = 0.5
_CANCEL_SECONDS: Final = 1.0  # for all cancel requests of one run


class Maintenance:
    """Shrinks, replaces, heals and reports, away from the callers' threads."""

    def __init__(self, supply: Supply) -> None:
        self.supply = supply
        self.store = supply.store
        self.notices = supply.notices
        self._moved_at = float("-inf")
        self._standby_due = 0.0

    def run(self, pool: PoolBase[Any], now: float) -> None:
        """Do all that is due."""
        self.send_cancels()
        with _fork.process.log_lock:
            self.notices.end_episodes(pool.timeout)
            pool._heal()
            self.shrink(pool.max_idle)
            self._look_for_standby(pool, now)
            slow = pool.settings.slow_acquire
            if slow and (began := self.store.mark_slow(now - slow)):
                self.notices.slow_acquire([now - each for each in began], self.store.snapshot())
            limit = pool.settings.leak_after
            if limit and (held := self.store.mark_held_long(now - limit)):
                self.notices.held_long(held, limit)

    def shrink(self, max_idle: float) -> None:
        """Close what has been idle for *max_idle* beyond min_size, or is past its lifetime."""
        now, store = monotonic(), self.store
        spare = store.size - store.min_size
        if spare > 0:
            store.evict_idle("idle", lambda record: record.idle_since <= now - max_idle, spare)
        if not store.breaker.is_failing:
            store.evict_idle("expired", lambda record: record.expires_at <= now)
        self.supply.close_evicted()

    def send_cancels(self) -> None:
        """Send the cancel requests, one after the other, for a second at most."""
        deadline = monotonic() + _CANCEL_SECONDS
        with suppress(IndexError):  # there are no more
            while (remaining := deadline - monotonic()) > 0.0:
                request = self.store.bag.cancels.popleft()
                if not self.store.breaker.is_failing:
                    with suppress(psycopg.Error):
                        cancel(request, remaining)

    def check(self, pool: PoolBase[Any]) -> None:
        """Ping every idle connection, within ping_timeout each; replace those that fail.

        Once a ping has timed out, the others that have been idle for long go with it.
        """
        answered: set[ConnectionRecord] = set()
        with Step(pool) as owner:
            for idle in list(self.store.bag.idle):
                conn = self.store.take_idle(owner, idle)
                if conn and self.supply.ping(conn, pool.settings.ping_timeout, answered):
                    answered.add(conn._record)
                    self.store.add(conn, is_fresh=True)

    # Failover

    def on_read_only_error(self, conn: Any) -> None:
        """Replace all connections if a statement failed because the server became read-only.

        That is so where the conninfo asked for a server that can write, and the transaction was
        not read-only itself, or where the server says that its role changed.
        """
        record: ConnectionRecord = conn._record
        standby = conn.pgconn.parameter_status(b"in_hot_standby")
        has_moved = standby != record.standby or (record.read_write and not conn.read_only)
        if has_moved and (now := monotonic()) >= self._moved_at + _MOVED_INTERVAL:
            self._moved_at = now
            self.notices.moved()
            self.supply.replace_all()

    def _look_for_standby(self, pool: PoolBase[Any], now: float) -> None:
        """Have a worker look now and then whether a standby is back, while the primary serves."""
        is_due = now >= self._standby_due and not self.store.breaker.is_failing
        if is_due and any(self._on_primary(record) for record in list(self.store.bag.records)):
            self._standby_due = now + _MOVED_INTERVAL
            pool._threads.jobs.put(lambda pool: pool._maintenance.return_to_standby(pool))

    def return_to_standby(self, pool: PoolBase[Any]) -> None:
        """Replace the connections to a primary if a new one would be to a standby."""
        connector = self.supply.connector
        try:
            conn = connector.open(pool, connector.params(pool))
        except Exception:  # noqa: BLE001  # whatever it is, the connections in use are better
            return
        standby = conn.pgconn.parameter_status(b"in_hot_standby")
        conn.close()
        if standby == b"on":
            self.notices.standby_back(self.store.expire(self._on_primary))
            self.supply.close_evicted()

    def _on_primary(self, record: ConnectionRecord) -> bool:
        """Whether a connection that prefers a standby is to a primary.

        What an idle one says now may be read; of one that is out, what it said at first counts.
        """
        if not record.prefers_standby or (conn := record.ref()) is None:
            return False
        is_idle = record.owner is None and not conn.closed
        standby = conn.pgconn.parameter_status(b"in_hot_standby") if is_idle else record.standby
        return bool(standby == b"off")
