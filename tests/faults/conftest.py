"""Pools that must be whole again after whatever was done to their server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from dbpool import Pool
from tests.postgres import Server, until

from .steps import assert_whole
from .support import MakePool

# Dead connections are told soon, an outage by who expects one.
_DEFAULTS = {"timeout": 10, "outage_grace": 30, "ping_timeout": 0.3, "connect_timeout": 2}
_CLOSING = 2.3  # seconds: what close() may take, and a little for a slow machine


@pytest.fixture
def make_pool(own_server: Server) -> Iterator[MakePool]:
    """Make pools; after the test nothing of them is lost, and nothing stays behind."""
    made: list[tuple[Pool[Any], Server]] = []

    def make(conninfo: Any = None, *, server: Server = own_server, **options: Any) -> Pool[Any]:
        where = server.conninfo if conninfo is None else conninfo
        pool: Pool[Any] = Pool(where, name="faults", **{**_DEFAULTS, **options})
        made.append((pool, server))
        return pool

    yield make
    for pool, server in made:
        server.thaw()
        assert_whole(pool)
        _close(pool)
    for pool, server in made:
        if server.is_running():
            name = f"dbpool:{pool.name}"
            until(lambda server=server, name=name: not server.backends(name))  # type: ignore[misc]


def _close(pool: Pool[Any]) -> None:
    began = time.monotonic()
    pool.close()
    taken = time.monotonic() - began
    assert taken < _CLOSING, f"close() took {taken:.2f} s"
    stats = pool.stats()
    numbers = (stats.size, stats.active, stats.idle, stats.connecting, stats.waiting)
    assert numbers == (0, 0, 0, 0, 0)
