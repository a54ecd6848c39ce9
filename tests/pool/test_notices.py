"""What the pool logs about long holds, leaks and slow checkouts."""

from __future__ import annotations

import gc
import logging
import threading
import time
from time import monotonic

import pytest

from dbpool import Pool, events
from tests.fake import FakeServer
from tests.postgres import until
from tests.threads import Task


def test_a_log_handler_may_use_the_pool(fake: FakeServer) -> None:
    inside, proceed = threading.Event(), threading.Event()

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg == "mine":
                inside.set()
                proceed.wait(10)
                own.stats()

    handler, logger = Counting(), logging.getLogger("dbpool")
    logger.addHandler(handler)
    try:
        with fake.pool(max_size=1) as own:
            logging_one = Task(logger.error, "mine")
            assert inside.wait(10)
            own.getconn()
            gc.collect()
            maintenance = Task(own.maintain, monotonic())
            time.sleep(0.2)  # gives maintenance time to log something
            proceed.set()
            logging_one.result(10)
            maintenance.result(10)
    finally:
        logger.removeHandler(handler)


def test_a_log_handler_that_ends_its_thread_does_not_end_maintenance(fake: FakeServer) -> None:
    ended: list[str] = []

    class Ending(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "has been held" in record.getMessage() and not ended:
                ended.append(record.getMessage())
                raise SystemExit

    handler, logger = Ending(), logging.getLogger("dbpool")
    logger.addHandler(handler)
    try:
        with fake.pool(leak_after=0.1) as pool, pool.connection():
            until(lambda: ended)
            with pool.connection():
                until(lambda: pool.stats().counters.held_long == 2)
    finally:
        logger.removeHandler(handler)


def test_maintenance_logs_no_error_for_an_idle_connection_that_its_user_closed(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Pool(dsn, kwargs={"target_session_attrs": "prefer-standby"}) as pool:
        conn = pool.getconn()
        pool.putconn(conn)
        conn.close()
        pool.maintain(monotonic() + 10.0)  # when it looks for a standby again
    assert [r.message for r in caplog.records if r.levelno >= logging.ERROR] == []


def test_what_is_held_long_is_reported_once_with_the_holders_stack(
    fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    def held() -> list[str]:
        return [r.message for r in caplog.records if "has been held" in r.message]

    with fake.pool(leak_after=0.1) as pool:
        conn = pool.getconn()
        until(held)
        assert "test_what_is_held_long_is_reported_once" in held()[0]
        assert "in until" in held()[0]
        pool.putconn(conn)
        assert "came back after" in caplog.messages[-1]
        counters = pool.stats().counters
        assert (counters.leaks, counters.held_long, counters.returned_late) == (0, 1, 1)
    assert len(held()) == 1
    extras = [vars(record)["dbpool"] for record in caplog.records if "dbpool" in vars(record)]
    assert [extra["event"] for extra in extras] == ["held_long", "returned_late"]
    assert extras[0]["pool"] == "default"
    assert extras[0]["holder"]["thread"] == "MainThread"


def test_a_leak_names_the_ended_thread_not_one_that_reuses_its_ident(pool: Pool) -> None:
    held = Task(pool.getconn, name="culprit").result()
    done = threading.Event()
    # One of these threads gets the culprit's ident.
    innocent = [Task(done.wait, name=f"innocent-{number}") for number in range(20)]
    assert [holder.thread for holder in pool.holders()] == ["culprit (ended)"]
    done.set()
    for task in innocent:
        task.result()
    pool.putconn(held)


def test_slow_checkouts_send_an_event_each_and_log_one_warning(
    fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    received: list[events.SlowAcquire] = []

    class SlowListener(events.Listener):
        def slow_acquire(self, event: events.SlowAcquire) -> None:
            received.append(event)

    with Pool(
        fake.conninfo,
        connection_class=fake.connection_class,
        max_size=1,
        timeout=30,
        slow_acquire=0.1,
        listeners=[SlowListener()],
    ) as own:
        conn = own.getconn()
        waiting = [Task(own.getconn) for _ in range(2)]
        until(lambda: len(received) == 2)
        for task in waiting:  # all get a connection
            own.putconn(conn)
            conn = task.result()
        own.putconn(conn)
    assert min(event.seconds for event in received) >= 0.1

    def lines() -> list[logging.LogRecord]:
        found = (
            r for r in caplog.records if getattr(r, "dbpool", {}).get("event") == "slow_acquire"
        )
        return list(found)

    until(lines)  # the events come before it
    (line,) = lines()
    assert line.levelname == "WARNING"
    assert "1 of 1 checked out; held longest: MainThread" in line.getMessage()


def test_slow_acquire_zero_logs_no_slow_checkout(
    fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    with Pool(
        fake.conninfo,
        connection_class=fake.connection_class,
        max_size=1,
        slow_acquire=0,
        leak_after=0.2,
    ) as own:
        conn = own.getconn()
        waiting = Task(own.getconn)
        until(lambda: "held for" in caplog.text)  # the watchdog has run
        own.putconn(conn)
        own.putconn(waiting.result())
    assert "has waited" not in caplog.text
