"""Fixtures that all tests of the pool use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dbpool import Pool
from tests.fake import FakeServer
from tests.pools import MakePool


@pytest.fixture
def make_pool(make_pool: MakePool, fake: FakeServer) -> MakePool:
    """Make pools on the fake server, or on the server that the test names."""

    def make(target: Any = fake, **options: Any) -> Pool[Any]:
        return make_pool(target, **{"timeout": 10, "outage_grace": 30, **options})

    return make


@pytest.fixture
def pool(fake: FakeServer) -> Iterator[Pool[Any]]:
    """A pool on the fake server, for tests of what the pool does around its connections."""
    with fake.pool(max_size=4, timeout=5) as pool:
        yield pool


@pytest.fixture
def server_pool(dsn: str) -> Iterator[Pool]:
    """A pool on PostgreSQL, for tests that depend on what PostgreSQL answers."""
    with Pool(dsn, max_size=4, timeout=5) as pool:
        yield pool
