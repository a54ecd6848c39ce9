"""Several pools in one mapping."""

from __future__ import annotations

from functools import partial

import pytest

from dbpool import Databases, PoolClosed, Settings
from tests.fake import FakeServer


def test_pools_by_name_the_default_first(fake: FakeServer) -> None:
    environ = {
        "DATABASE_URL": fake.conninfo,
        "DBPOOL_DATABASES": "replica",
        "DBPOOL_REPLICA_URL": fake.conninfo,
    }
    with Databases.from_env(environ, connection_class=fake.connection_class) as databases:
        assert list(databases) == ["default", "replica"]
        assert len(databases) == 2
        assert databases.default is databases["default"]
        assert databases["replica"].fetch_value("select 1") == 1
        assert databases.default.closed, "a pool opens when it is used"
        databases.open()
        assert not databases.default.closed
    for pool in databases.values():
        with pytest.raises(PoolClosed):
            pool.getconn()


def test_pools_are_closed_in_reverse_order_although_one_fails(
    fake: FakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    databases = Databases(
        {name: Settings(name=name, conninfo=fake.conninfo) for name in ("a", "b", "c")}
    )
    closed: list[str] = []

    def close_by_name(name: str, timeout: float) -> None:
        closed.append(name)
        if name == "b":
            raise RuntimeError("it is stuck")

    for name, pool in databases.items():
        monkeypatch.setattr(pool, "close", partial(close_by_name, name))
    databases.close()
    assert closed == ["c", "b", "a"]
    assert "'b'" in caplog.text


def test_repr_shows_the_pools_and_no_secret(fake: FakeServer) -> None:
    databases = Databases({"default": Settings(conninfo=fake.conninfo + " password=hunter2")})
    assert repr(databases) == "<Databases [<dbpool.Pool 'default' starting size=0 idle=0>]>"
