"""What the tests of the pool share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dbpool import Pool
from tests.fake import FakeServer
from tests.pools import MakePool


@pytest.fixture
def make_pool(make_pool: MakePool, fake: FakeServer) -> MakePool:
    """Make pools of the fake server, or of another."""

    def make(where: Any = fake, **options: Any) -> Pool[Any]:
        return make_pool(where, **{"timeout": 10, "outage_grace": 30, **options})

    return make


@pytest.fixture
def pool(fake: FakeServer) -> Iterator[Pool[Any]]:
    """A pool whose connections are fake, for what it does around them."""
    with fake.pool(max_size=4, timeout=5) as pool:
        yield pool


@pytest.fixture
def server_pool(dsn: str) -> Iterator[Pool]:
    """A pool on PostgreSQL, for what it says and how it answers."""
    with Pool(dsn, max_size=4, timeout=5) as pool:
        yield pool
