"""What the tests of the pool share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dbpool import Pool


@pytest.fixture
def pool(dsn: str) -> Iterator[Pool]:
    with Pool(dsn, max_size=4, timeout=5) as pool:
        yield pool
