"""The rules of the store, the wait queue and the breaker hold in any sequence of steps.

No server is needed. After every step no connection is lost, waiters are in order, and the
sizes add up.
"""

from __future__ import annotations

import gc
from queue import SimpleQueue
from typing import Any
from weakref import ref

import psycopg
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)
from psycopg_pool import PoolClosed

from dbpool.breaker import Attempt
from dbpool.events import Emitter
from dbpool.holders import ConnectionRecord, Owner, current
from dbpool.pool._store import Store
from dbpool.pool._waiting import Waiter
from tests.clock import Clock

GRACE = 2.0
KINDS = ["refused", "password", "saturated", "timeout"]


class Session:
    """Stands for a connection: the store asks it only whether it is closed, and its pool."""

    closed = False
    _pool = None
    _record: ConnectionRecord

    class pgconn:  # noqa: N801  # psycopg's name
        transaction_status = 0  # idle

    def close(self) -> None:
        self.closed = True


class Caller:
    """A thread that wants a connection: it waits for one, holds one, or is done."""

    def __init__(self, waiter: Waiter, step: Owner) -> None:
        self.waiter = waiter
        self.step: Owner | None = step
        self.conn: Any = None


class Pools(RuleBasedStateMachine):
    """Steps of callers, workers, the watchdog and the garbage collector, in any order."""

    callers: Bundle[Caller] = Bundle("callers")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.store = Store(
            "rules", (1, 3), GRACE, Emitter(), SimpleQueue()
        )  # a rule does what a worker would do
        self.store.breaker.clock = self.clock
        self.store.open()
        self.waiting: list[Caller] = []  # in the order in which they came
        self.made = 0
        self.is_closed = False

    # Callers

    @rule(
        target=callers,
        timeout=st.floats(0.0, 5.0),
        max_waiting=st.integers(0, 2),
        other=st.none() | consumes(callers),
    )
    def check_out(self, timeout: float, max_waiting: int, other: Caller | None) -> Caller:
        """Ask for a connection; *other* returns one after this caller found none idle."""
        step = Owner()
        waiter = Waiter(ref(step), self.clock.now, self.clock.now + timeout)
        caller = Caller(waiter, step)
        caller.conn = self.store.take_idle(ref(step))
        if other is not None:
            self.return_conn(other)
        if caller.conn is None:
            try:
                self.store.join(waiter, max_waiting, close_returns=False)
            except PoolClosed:
                assert self.is_closed
                waiter.is_over = True
                return caller
            if waiter.is_waiting:
                self.waiting.append(caller)
            self.collect_answers([caller])
        if caller.conn is not None:
            self.hold(caller)
        return caller

    def hold(self, caller: Caller) -> None:
        """Do what a checkout does once it has a connection."""
        record = caller.conn._record
        assert record.owner is not None
        assert record.owner() is caller.step, "another caller has it too"
        record.thread, record.since = current.thread, self.clock.now

    def collect_answers(self, extra: list[Caller] | None = None) -> None:
        """Let served callers go on, and check that they were served in their order."""
        served = [caller for caller in self.waiting if caller.waiter.conn is not None]
        waiting = [caller for caller in self.waiting if caller.waiter.is_waiting]
        if served and waiting:
            assert max(map(self.waiting.index, served)) < min(map(self.waiting.index, waiting))
        for caller in [*served, *(extra or [])]:
            if caller.waiter.conn is not None and caller.conn is None:
                caller.conn = caller.waiter.conn
                self.hold(caller)
        self.waiting = [caller for caller in self.waiting if caller.waiter.is_waiting]

    @rule(caller=consumes(callers), is_verified=st.booleans())
    def put_back(self, caller: Caller, is_verified: bool) -> None:
        self.return_conn(caller, is_verified=is_verified)

    def return_conn(self, caller: Caller, *, is_verified: bool = True) -> None:
        if caller.conn is None or caller.conn._record.is_reaped or caller.step is None:
            self.forget(caller)
            return
        conn, caller.conn = caller.conn, None
        assert self.store.end_use(conn._record, ref(caller.step)) is not None
        self.store.add(conn, is_verified=is_verified)
        assert self.store.end_use(conn._record, ref(caller.step)) is None, "not twice"
        self.collect_answers()

    def forget(self, caller: Caller) -> None:
        """Drop a caller that is done; one that waits is kept, as only this machine knows it."""
        if caller in self.waiting:
            return
        self.drop(caller)

    @rule(caller=consumes(callers))
    def interrupt(self, caller: Caller) -> None:
        """An exception ends a caller's step, at whatever point it is."""
        if caller.step is None:
            return
        new_owner = Owner()
        for conn in self.store.recover(ref(caller.step), ref(new_owner)):
            self.store.add(conn, is_verified=False)
        if caller in self.waiting:
            self.waiting.remove(caller)
        self.drop(caller)
        self.collect_answers()

    @rule(caller=consumes(callers))
    def collect(self, caller: Caller) -> None:
        """The garbage collector takes a caller's step, and the connection with it."""
        if caller in self.waiting:
            self.waiting.remove(caller)
            self.store.waiting.discard(caller.waiter)
        self.drop(caller)

    def drop(self, caller: Caller) -> None:
        caller.step = caller.conn = None
        caller.waiter.conn = None
        gc.collect(0)

    @precondition(lambda self: self.waiting)
    @rule()
    def time_out(self) -> None:
        first = self.waiting[0]
        self.clock.now = max(self.clock.now, first.waiter.deadline)
        expired = [c for c in self.waiting if c.waiter.deadline <= self.clock.now]
        number, error = self.store.time_out(first.waiter)
        assert number >= 1
        assert error is not None
        assert first.waiter.is_over
        assert not first.waiter.is_rejected
        over = [caller for caller in self.waiting if caller.waiter.is_over]
        assert over == [caller for caller in expired if caller in over], "in order, and expired"
        self.collect_answers()

    # Workers

    @precondition(lambda self: self.store.breaker.attempts)
    @rule(succeeds=st.booleans(), kind=st.sampled_from(KINDS), data=st.data())
    def work(self, succeeds: bool, kind: str, data: st.DataObject) -> None:
        attempts = sorted(self.store.breaker.attempts, key=id)
        attempt: Attempt = data.draw(st.sampled_from(attempts))
        if not self.store.admit(attempt):
            return
        attempt.started = self.clock.now
        if succeeds:
            conn: Any = Session()
            record = ConnectionRecord(-1, b"off", lambda _: False, ())
            record.expires_at = float("inf")
            conn._record = record
            record.ref = record.owner = ref(conn, self.store.collected.append)
            self.store.connected(conn, attempt)
            del conn
            self.made += 1
        else:
            error = psycopg.OperationalError("refused")
            is_retry = self.store.failed(attempt, error, kind)
            assert is_retry == (self.store.breaker.retry is attempt)
        self.collect_answers()

    @rule(seconds=st.floats(0.0, 3.0))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    # The watchdog and users

    @rule()
    def heal(self) -> None:
        gc.collect(0)
        self.store.heal(close_returns=False, has_idle_workers=False)
        self.collect_answers()
        unowned = [r for r in self.store.bag.records if (r.owner or r.ref)() is None]
        assert unowned == []

    @rule(reason=st.sampled_from(["dead", "expired"]))
    def evict_idle(self, reason: str) -> None:
        self.store.evict_idle(reason, lambda record: True)

    @rule(smallest=st.integers(0, 2), more=st.integers(1, 3))
    def resize(self, smallest: int, more: int) -> None:
        self.store.resize(smallest, smallest + more)

    @rule()
    def close_evicted(self) -> None:
        while self.store.bag.to_close:
            self.store.bag.to_close.popleft().close()

    @precondition(lambda self: self.made > 5)
    @rule()
    def close(self) -> None:
        self.is_closed = True
        self.store.close()
        assert all(caller.waiter.is_over for caller in self.waiting)
        assert not self.store.bag.idle
        self.waiting = []

    # What always holds

    @invariant()
    def sizes_add_up(self) -> None:
        stats = self.store.snapshot()
        assert stats.active + stats.idle + stats.connecting == stats.size
        assert min(stats.active, stats.idle, stats.connecting, stats.waiting) >= 0
        if self.is_closed:
            assert (stats.size, stats.waiting) == (0, 0)

    @invariant()
    def idle_connections_are_recorded_and_have_no_owner(self) -> None:
        records = [conn._record for conn in self.store.bag.idle]
        assert len(set(map(id, records))) == len(records)
        for record in records:
            assert record in self.store.bag.records
            assert record.owner is None
            assert not record.since

    @invariant()
    def no_caller_waits_if_a_connection_is_idle_or_the_breaker_open(self) -> None:
        if any(waiter.is_waiting for waiter in self.store.waiting):
            assert not self.store.bag.idle
            assert not self.store.breaker.is_open

    @invariant()
    def waiters_are_queued_in_order(self) -> None:
        queued = [waiter for waiter in self.store.waiting if waiter.is_waiting]
        assert queued == [caller.waiter for caller in self.waiting if caller.waiter.is_waiting]

    @invariant()
    def no_idle_connection_is_closed(self) -> None:
        assert not any(conn.closed for conn in self.store.bag.idle)

    @invariant()
    def one_attempt_at_a_time_in_an_outage(self) -> None:
        breaker = self.store.breaker
        if breaker.retry is not None:
            assert breaker.retry in breaker.attempts
            assert breaker.is_failing

    @invariant()
    def counters_match_the_records(self) -> None:
        counters = self.store.snapshot().counters
        known = len(self.store.bag.records)
        assert counters.connects == self.made
        if not self.is_closed:
            assert known + sum(counters.discarded.values()) == self.made


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
