"""What the tests of the pool share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dbpool import Pool
from tests.fake import FakeServer


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
