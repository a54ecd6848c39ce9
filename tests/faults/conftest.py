"""Pools that must work again after a fault of their server."""

from __future__ import annotations

from typing import Any

import pytest

from dbpool import Pool
from tests.pools import MakePool
from tests.postgres import Server

# Dead connections are noticed soon. A test that expects an outage sets a shorter grace itself.
_DEFAULTS = {"timeout": 10, "outage_grace": 30, "ping_timeout": 0.3, "connect_timeout": 2}


@pytest.fixture
def make_pool(make_pool: MakePool, own_server: Server) -> MakePool:
    """Make pools on the private server, or on the server that the test names."""

    def make(conninfo: Any = None, *, server: Server = own_server, **options: Any) -> Pool[Any]:
        merged: dict[str, Any] = {"name": "faults", **_DEFAULTS, **options}
        return make_pool(server if conninfo is None else conninfo, server=server, **merged)

    return make
