"""A pool's options: those of psycopg_pool, those of the settings, and contradictions."""

from __future__ import annotations

import os
from typing import Any

import pytest

from dbpool import ConfigError, Pool, Settings
from tests.fake import FakeConnection, FakeServer


def test_unknown_options_are_rejected() -> None:
    with pytest.raises(ConfigError, match="max_sise"):
        Pool("host=localhost", max_sise=3)  # type: ignore[call-arg]


def test_name_is_accepted_as_in_psycopg_pool(fake: FakeServer) -> None:
    with fake.pool(name=None) as pool:
        assert pool.fetch_value("select 1") == 1


def test_a_connection_class_gets_its_conninfo_by_position(fake: FakeServer) -> None:
    class Strict(FakeConnection):
        @classmethod
        def connect(cls, conninfo: str, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().connect(conninfo, **kwargs)

    with fake.pool(connection_class=Strict) as pool:
        assert pool.fetch_value("select 1") == 1


def test_min_size_alone_implies_a_max_size(fake: FakeServer) -> None:
    assert fake.pool(min_size=20).max_size == 20
    assert fake.pool(min_size=2).max_size == 10
    assert fake.pool(min_size=2, max_size=None).max_size == 2


def test_settings_and_keywords_combine(fake: FakeServer) -> None:
    pool: Pool = fake.pool("", settings=Settings(conninfo=fake.conninfo, max_size=3), timeout=1.5)
    assert (pool.max_size, pool.timeout) == (3, 1.5)
    assert pool.fetch_value("select 1") == 1
    pool.close()


def test_conninfo_and_kwargs_may_be_callables(fake: FakeServer) -> None:
    with fake.pool(lambda: fake.conninfo, kwargs=lambda: {"autocommit": True}) as pool:
        with pool.connection() as conn:
            assert conn.autocommit


def test_configure_reset_and_check_are_called(fake: FakeServer) -> None:
    calls: list[str] = []
    with fake.pool(
        max_size=1,
        configure=lambda conn: calls.append("configure"),
        check=lambda conn: calls.append("check"),
        reset=lambda conn: calls.append("reset"),
    ) as pool:
        for _ in range(2):
            with pool.connection():
                pass
    assert calls[:3] == ["configure", "check", "reset"]
    assert calls.count("check") == 2


def test_with_close_returns_close_returns_the_connection(fake: FakeServer) -> None:
    with fake.pool(max_size=1, close_returns=True) as pool:
        conn = pool.getconn()
        conn.close()
        assert not conn.closed
        assert pool.stats().idle == 1


def test_server_side_timeouts_are_set_by_default(dsn: str) -> None:
    with Pool(dsn, statement_timeout=7) as pool:
        assert pool.fetch_value("show statement_timeout") == "7s"
        assert pool.fetch_value("show idle_in_transaction_session_timeout") == "1min"
        name = f"dbpool:default@{os.uname().nodename}/{os.getpid()}"
        assert pool.fetch_value("show application_name") == name[:63]
    with Pool(f"{dsn} application_name=shop") as pool:
        assert pool.fetch_value("show application_name") == "shop"
