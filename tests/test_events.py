"""Events: what is told, in which order, and that a listener can do no harm."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from dbpool import Pool, PoolExhausted
from dbpool.events import (
    CheckedIn,
    CheckedOut,
    Closed,
    Connected,
    Emitter,
    Event,
    Listener,
    LoggingListener,
    Opened,
    name_of,
)


def test_the_life_of_a_pool_in_events(dsn: str) -> None:
    heard: list[Event] = []
    with Pool(dsn, max_size=1, listeners=[heard.append]) as pool:
        with pool.connection():
            with pytest.raises(PoolExhausted):
                pool.getconn(timeout=0.01)
    names = [name_of(event) for event in heard]
    assert sorted(names) == sorted(
        ["opened", "connected", "checked_out", "wait_timed_out", "checked_in", "closed"]
    )
    assert names.index("checked_out") < names.index("wait_timed_out") < names.index("checked_in")
    assert names[-1] == "closed"
    assert {event.pool for event in heard} == {"default"}


def test_a_class_hears_the_events_it_has_methods_for(dsn: str) -> None:
    class Uses(Listener):
        def __init__(self) -> None:
            self.uses: list[float] = []

        def checked_in(self, event: CheckedIn) -> None:
            self.uses.append(event.use)

    listener = Uses()
    with Pool(dsn, listeners=[listener]) as pool:
        pool.fetch_value("select 1")
        pool.fetch_value("select 1")
    assert len(listener.uses) == 2


def test_every_listener_is_told_also_after_one_that_raises(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise ValueError("not today")

    emitter = Emitter([broken, heard.append])
    for event in (Opened("p"), Opened("p"), Closed("p")):
        emitter.emit(event)
    assert heard == [Opened("p"), Opened("p"), Closed("p")]
    complaints = [r.message for r in caplog.records if "a listener failed" in r.message]
    assert [c.split()[4] for c in complaints] == ["opened:", "closed:"]


def test_a_raising_listener_breaks_no_checkout(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Event) -> None:
        raise ValueError("not today")

    with Pool(dsn, listeners=[broken]) as pool:
        assert pool.fetch_value("select 1") == 1
        assert pool.stats().active == 0


def test_a_listener_may_use_the_pool(dsn: str) -> None:
    """None is called under a lock."""
    answers: list[Any] = []

    def curious(event: Event) -> None:
        if isinstance(event, Connected):
            answers.append(pool.stats().size)

    pool: Pool = Pool(dsn, listeners=[curious])
    with pool:
        pool.fetch_value("select 1")
    assert answers == [1]


def test_no_event_is_built_when_nobody_listens(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("an event was built")

    monkeypatch.setattr(Event, "__init__", refuse)
    for event in (CheckedOut, CheckedIn, Connected):
        monkeypatch.setattr(event, "__init__", refuse)
    with Pool(dsn) as pool:
        assert pool.fetch_value("select 1") == 1


def test_the_logging_listener_gives_the_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dbpool"):
        LoggingListener()(CheckedOut("main", 0.25))
    (record,) = caplog.records
    assert record.message == "pool 'main': checked_out"
    assert vars(record)["dbpool"] == {"event": "checked_out", "pool": "main", "wait": 0.25}
