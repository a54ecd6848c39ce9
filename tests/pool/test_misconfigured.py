"""Errors of configuration: callers fail at once, retries become rare, a correction is noticed."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import psycopg
import pytest

from dbpool import DatabaseMisconfigured, DatabaseUnavailable
from tests.clock import ShiftedClock
from tests.fake import FakeServer
from tests.pools import (
    GRACE,
    SLACK,
    MakePool,
    assert_serves_all,
    await_up,
)
from tests.postgres import until
from tests.threads import Task

SECRET = "s3cr3t-of-theirs"
WRONG_PASSWORD = 'FATAL:  password authentication failed for user "app"'
NO_DATABASE = 'FATAL:  database "shop" does not exist'


def test_a_wrong_password_is_retried_ever_less_often(fake: FakeServer, make_pool: MakePool) -> None:
    fake.refuse(WRONG_PASSWORD)
    tokens = count()  # another at each call
    of_token = partial(make_pool, connection_class=fake.connection_class)
    pools = [make_pool(), of_token(lambda: f"{fake.conninfo} password=token{next(tokens)}")]
    for pool in pools:
        assert isinstance(Task(pool.getconn).error(), DatabaseMisconfigured)
    time.sleep(3.0)  # checks that something does not happen
    # The delays are random, up to 1, 2, 4, 8, 15 s: eight attempts in three seconds happen once
    # in a million runs. In an outage the pool would make a dozen or more.
    assert max(pool.stats().counters.connect_failures for pool in pools) <= 8


def test_a_secret_in_a_users_own_exception_is_masked_too(
    fake: FakeServer, make_pool: MakePool, caplog: pytest.LogCaptureFixture
) -> None:
    class QuotingConnection(psycopg.Connection[Any]):
        @classmethod
        def connect(cls, conninfo: str = "", **kwargs: Any) -> Any:
            raise RuntimeError(f"cannot connect with {kwargs}")

    conninfo = f"{fake.conninfo} password={SECRET}"
    pool = make_pool(conninfo, connection_class=QuotingConnection, timeout=0.1)
    error = Task(pool.getconn).error()
    assert "cannot connect with" in str(error.__cause__)
    shown = f"{error} {error.__cause__!r} {pool.stats().to_json()} {caplog.text}"
    assert SECRET not in shown


def test_a_corrected_conninfo_is_used_within_a_second(
    fake: FakeServer, make_pool: MakePool
) -> None:
    password = {"password": "wrong"}
    fake.refuse(WRONG_PASSWORD, unless=lambda params: params["password"] == SECRET)
    pool = make_pool(
        lambda: f"{fake.conninfo} password={password['password']}",
        connection_class=fake.connection_class,
    )
    assert isinstance(Task(pool.getconn).error(), DatabaseMisconfigured)
    pool.breaker.clock = ShiftedClock(-60.0)  # the next attempt is due in a minute
    password["password"] = SECRET
    await_up(pool)
    assert_serves_all(pool)


def test_a_conninfo_that_is_corrected_during_an_attempt_is_used_within_a_second(
    fake: FakeServer, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: high)  # the longest delays
    password = {"password": "wrong"}

    def is_right(params: dict[str, Any]) -> bool:
        password["password"] = SECRET
        return bool(params["password"] == SECRET)

    fake.refuse(WRONG_PASSWORD, unless=is_right)
    pool = make_pool(
        lambda: f"{fake.conninfo} password={password['password']}",
        connection_class=fake.connection_class,
    )
    assert isinstance(Task(pool.getconn).error(), DatabaseMisconfigured)
    pool.breaker.clock = ShiftedClock(-60.0)  # the next attempt is due in a minute
    await_up(pool)
    assert_serves_all(pool)


def test_a_database_that_is_created_later_is_found(fake: FakeServer, make_pool: MakePool) -> None:
    fake.refuse(NO_DATABASE)
    pool = make_pool()
    with pytest.raises(DatabaseMisconfigured):
        pool.fetch_value("select 1")
    fake.accept()
    await_up(pool, 20.0)  # the pool retries every 1 to 15 s
    assert_serves_all(pool)


def test_wait_raises_the_configuration_error_at_once(fake: FakeServer, make_pool: MakePool) -> None:
    fake.refuse(NO_DATABASE)
    pool = make_pool()
    waiting = Task(pool.wait, 30.0)
    assert isinstance(waiting.error(), DatabaseMisconfigured)
    assert waiting.seconds < SLACK
    assert pool.closed


def test_run_with_a_timeout_raises_a_configuration_error_at_once(
    fake: FakeServer, make_pool: MakePool
) -> None:
    fake.refuse(NO_DATABASE)
    pool = make_pool()
    call = Task(lambda: pool.run(lambda conn: conn.execute("select 1"), timeout=30))
    assert isinstance(call.error(), DatabaseMisconfigured)
    assert call.seconds < SLACK


def test_a_conninfo_function_that_raises_is_called_again(
    fake: FakeServer, make_pool: MakePool
) -> None:
    working: list[bool] = []

    def conninfo() -> str:
        if not working:
            raise LookupError("the vault is sealed")
        return fake.conninfo

    pool = make_pool(conninfo, connection_class=fake.connection_class, outage_grace=GRACE)
    error = Task(pool.getconn).error()
    assert isinstance(error, DatabaseUnavailable)
    assert isinstance(error.__cause__, LookupError)
    working.append(True)
    await_up(pool)
    assert_serves_all(pool)


class KeywordOnlyError(psycopg.Error):
    """An exception that cannot be built from a message alone."""

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(f"{message} ({code})")


KEYWORD_ONLY_ERROR = partial(KeywordOnlyError, code=7)


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, ValueError, KEYWORD_ONLY_ERROR])
def test_a_configure_that_raises_anything_loses_no_capacity(
    fake: FakeServer, make_pool: MakePool, raised: Callable[[str], BaseException]
) -> None:
    failing = [True]

    def configure(conn: psycopg.Connection[Any]) -> None:
        if failing:
            raise raised("not yet")

    pool = make_pool(min_size=3, max_size=3, configure=configure, outage_grace=GRACE)
    assert isinstance(Task(pool.getconn).error(), DatabaseUnavailable)
    until(lambda: len(fake.backends()) <= 1)
    failing.clear()
    await_up(pool)
    assert_serves_all(pool)


@pytest.mark.parametrize(
    "text",
    [
        "FATAL:  unsupported startup parameter in options: statement_timeout",
        "FATAL:  Feature not supported: RDS Proxy currently doesn\u2019t support command-line options.",
    ],
)
def test_the_error_of_a_pooler_without_startup_options_names_the_setting(
    fake: FakeServer, make_pool: MakePool, text: str
) -> None:
    fake.refuse(text)
    error = Task(make_pool().getconn).error()
    assert isinstance(error, DatabaseMisconfigured)
    assert "DBPOOL_POOLER=transaction" in str(error)
