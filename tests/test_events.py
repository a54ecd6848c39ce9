"""Events: which ones are sent, in which order, and that no listener harms the pool."""

from __future__ import annotations

import gc
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import pytest

from dbpool import Pool, PoolExhausted
from dbpool.events import (
    CheckedIn,
    CheckedOut,
    Closed,
    Connected,
    ConnectFailed,
    Discarded,
    Emitter,
    Event,
    HeldLong,
    Leaked,
    Listener,
    LoggingListener,
    Opened,
    ReturnedLate,
    name_of,
)
from tests.fake import FakeServer
from tests.postgres import until


def test_the_life_of_a_pool_in_events(fake: FakeServer) -> None:
    received: list[Event] = []
    with fake.pool(max_size=1, listeners=[received.append]) as pool:
        with pool.connection():
            with pytest.raises(PoolExhausted):
                pool.getconn(timeout=0.01)
    names = [name_of(event) for event in received]
    assert sorted(names) == sorted(
        ["opened", "connected", "checked_out", "wait_timed_out", "checked_in", "closed"]
    )
    assert names.index("checked_out") < names.index("wait_timed_out") < names.index("checked_in")
    assert names[-1] == "closed"
    assert {event.pool for event in received} == {"default"}


def test_the_events_of_a_connection_that_is_not_returned(fake: FakeServer) -> None:
    received: list[Event] = []
    with fake.pool(max_size=1, leak_after=0.1, listeners=[received.append]) as pool:
        conn = pool.getconn()
        until(lambda: any(isinstance(event, HeldLong) for event in received))
        pool.putconn(conn)
        del conn
        pool.getconn()
        gc.collect()
        assert pool.fetch_value("select 1") == 1
        until(lambda: any(isinstance(event, Leaked) for event in received))
    (held,) = [event for event in received if isinstance(event, HeldLong)]
    (leaked,) = [event for event in received if isinstance(event, Leaked)]
    (late,) = [event for event in received if isinstance(event, ReturnedLate)]
    (lost,) = [event for event in received if isinstance(event, Discarded)]
    assert late.where == held.holder.where
    assert late.seconds >= held.holder.seconds >= 0.1
    assert "in until" in held.stack
    assert "test_the_events_of_a_connection" in leaked.holder.where
    assert lost.reason == "collected"


def test_a_listener_class_gets_the_events_it_has_methods_for(fake: FakeServer) -> None:
    class Uses(Listener):
        def __init__(self) -> None:
            self.uses: list[float] = []

        def checked_in(self, event: CheckedIn) -> None:
            self.uses.append(event.use)

    listener = Uses()
    with fake.pool(listeners=[listener]) as pool:
        pool.fetch_value("select 1")
        pool.fetch_value("select 1")
    assert len(listener.uses) == 2


def test_a_listener_that_raises_stops_no_other_listener(
    caplog: pytest.LogCaptureFixture,
) -> None:
    received: list[Event] = []

    def broken(event: Event) -> None:
        raise ValueError("not today")

    emitter = Emitter([broken, received.append])
    for event in (Opened("p"), Opened("p"), Closed("p")):
        emitter.emit(event)
    emitter.close(5)
    assert received == [Opened("p"), Opened("p"), Closed("p")]
    messages = [r.message for r in caplog.records if "a listener failed" in r.message]
    assert [c.split()[4] for c in messages] == ["opened:", "closed:"]


def test_a_raising_listener_breaks_no_checkout(
    fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: Event) -> None:
        raise ValueError("not today")

    with fake.pool(listeners=[broken]) as pool:
        assert pool.fetch_value("select 1") == 1
        assert pool.stats().active == 0


def test_a_listener_that_hangs_blocks_no_caller(fake: FakeServer) -> None:
    release, received = threading.Event(), list[Event]()

    def hanging(event: Event) -> None:
        release.wait(30)
        received.append(event)

    pool = fake.pool(max_size=2, listeners=[hanging])
    for _ in range(1000):
        assert pool.fetch_value("select 1") == 1
    with pool.connection(), pytest.raises(PoolExhausted):
        pool.resize(1, 1)
        pool.getconn(timeout=0.01)
    assert not received
    started = monotonic()
    pool.close(timeout=0.5)
    assert 0.5 <= monotonic() - started < 2.0
    release.set()
    until(lambda: bool(received) and isinstance(received[-1], Closed), 5.0)
    assert sum(isinstance(event, CheckedIn) for event in received) == 1001


def test_events_beyond_the_queues_bound_are_dropped_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    release, received = threading.Event(), list[Event]()

    def slow(event: Event) -> None:
        release.wait(30)
        received.append(event)

    emitter = Emitter([slow])
    emitted = [CheckedOut("p", float(n)) for n in range(Emitter.MAX_QUEUED + 100)]
    for event in emitted:
        emitter.emit(event)
    release.set()
    emitter.close(10)
    # One event may have left the queue already.
    assert len(received) in (Emitter.MAX_QUEUED, Emitter.MAX_QUEUED + 1)
    assert received == emitted[: len(received)]
    assert [r.message for r in caplog.records] == [
        "pool 'p': its listeners are too slow, events are dropped"
    ]


def test_events_of_many_threads_all_arrive_one_at_a_time(fake: FakeServer) -> None:
    in_listener, overlapping, received = threading.Lock(), list[Event](), list[Event]()

    def listener(event: Event) -> None:
        if not in_listener.acquire(blocking=False):
            overlapping.append(event)
            return
        received.append(event)
        in_listener.release()

    with fake.pool(max_size=4, listeners=[listener]) as pool, ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(pool.fetch_value, "select 1") for _ in range(800)]:
            assert future.result() == 1
    assert not overlapping
    assert sum(isinstance(event, CheckedOut) for event in received) == 800
    assert sum(isinstance(event, CheckedIn) for event in received) == 800


def test_a_return_after_close_sends_an_event(fake: FakeServer) -> None:
    received: list[Event] = []
    pool = fake.pool(listeners=[received.append])
    conn = pool.getconn()
    pool.close()
    assert isinstance(received[-1], Closed)
    pool.putconn(conn)
    until(lambda: isinstance(received[-1], CheckedIn), 5.0)


def test_a_listener_may_close_the_pool(fake: FakeServer) -> None:
    def closing(event: Event) -> None:
        if isinstance(event, CheckedIn):
            pool.close()

    pool: Pool = fake.pool(listeners=[closing])
    assert pool.fetch_value("select 1") == 1
    until(lambda: pool.closed, 5.0)


def listening_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "dbpool-listeners"]


def test_the_thread_ends_with_the_pool(fake: FakeServer) -> None:
    pool: Pool = fake.pool(listeners=[lambda event: None])
    assert not listening_threads()
    pool.fetch_value("select 1")
    until(lambda: len(listening_threads()) == 1)  # two may start at once; one of them ends
    del pool
    gc.collect()
    until(lambda: not listening_threads(), 5.0)


def test_without_listeners_there_is_no_listener_thread(fake: FakeServer) -> None:
    with fake.pool() as pool:
        pool.fetch_value("select 1")
        assert not listening_threads()


def test_a_listener_may_use_the_pool(fake: FakeServer) -> None:
    """No listener is called under a lock."""
    answers: list[Any] = []

    def use_pool(event: Event) -> None:
        if isinstance(event, Connected):
            answers.append(pool.stats().size)

    pool: Pool = fake.pool(listeners=[use_pool])
    with pool:
        pool.fetch_value("select 1")
        until(lambda: answers)  # before the pool closes, as its size is 0 then
    assert answers == [1]


def test_no_event_is_built_without_listeners(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("an event was built")

    monkeypatch.setattr(Event, "__init__", refuse)
    for event in (CheckedOut, CheckedIn, Connected):
        monkeypatch.setattr(event, "__init__", refuse)
    with fake.pool() as pool:
        assert pool.fetch_value("select 1") == 1


def test_the_logging_listener_logs_the_events_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dbpool"):
        LoggingListener()(CheckedOut("main", 0.25))
    (record,) = caplog.records
    assert record.message == "pool 'main': checked_out wait=0.25"
    assert vars(record)["dbpool"] == {"event": "checked_out", "pool": "main", "wait": 0.25}


def test_the_logging_listener_logs_one_short_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="dbpool"):
        LoggingListener()(ConnectFailed("main", 0.0123456789, "refused\nby it", "refused"))
    assert caplog.messages == [
        r"pool 'main': connect_failed seconds=0.01235 error='refused\nby it' kind='refused'"
    ]
