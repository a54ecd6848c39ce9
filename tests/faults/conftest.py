"""Pools that must be whole again after whatever was done to their server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dbpool import Pool
from tests.faults.support import MakePool, assert_whole, within
from tests.postgres import Server, until

# So that outages take as long as they must and no longer.
_QUICK = {"timeout": 10, "outage_grace": 0.3, "ping_timeout": 0.3, "connect_timeout": 2}
_CLOSING = 2.0


@pytest.fixture
def make_pool(own_server: Server) -> Iterator[MakePool]:
    """Make pools; after the test nothing of them is lost, and nothing stays behind."""
    pools: list[Pool[Any]] = []

    def make(conninfo: Any = None, **options: Any) -> Pool[Any]:
        where = own_server.conninfo if conninfo is None else conninfo
        pool: Pool[Any] = Pool(where, name="faults", **{**_QUICK, **options})
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        if not pool.closed:
            until(lambda pool=pool: not pool._out)  # type: ignore[misc]
            assert_whole(pool)
        with within(_CLOSING + 0.3):
            pool.close()
        stats = pool.stats()
        numbers = (stats.size, stats.active, stats.idle, stats.connecting, stats.waiting)
        assert numbers == (0, 0, 0, 0, 0)
    if own_server.is_running():
        until(lambda: not own_server.backends("dbpool:faults"))
