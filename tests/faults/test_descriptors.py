"""A process that may open no more files."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from dbpool import DatabaseMisconfigured, DatabaseUnavailable, Pool
from tests.fake import FakeServer
from tests.pools import GRACE
from tests.postgres import Server, until


@contextmanager
def few_descriptors_left(number: int) -> Iterator[None]:
    """Leave this process no more than *number* descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/dev/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 50, hard))
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(number):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def refused(pool: Pool[Any]) -> DatabaseUnavailable:
    with pytest.raises(DatabaseUnavailable) as caught:
        pool.getconn(timeout=1.0)
    return caught.value


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("left", [0, 1])
def test_a_lack_of_descriptors_is_named_and_is_no_configuration_error(
    server: Server, host: str, left: int
) -> None:
    with Pool(server.conninfo_for(host=host), max_size=2, outage_grace=GRACE) as pool:
        with pool.connection() as conn:
            with few_descriptors_left(left):
                # On a busy machine the first connect may have no answer yet.
                until(lambda: refused(pool).kind != "timeout")
                error = refused(pool)
            assert "Too many open files" in str(error)
            assert "Too many open files" in str(error.__cause__)
            assert not isinstance(error, DatabaseMisconfigured)
            assert error.kind == "descriptors"
            assert conn.execute("select 1").fetchone() == (1,)
        until(lambda: pool.state == "up" and not pool.breaker.is_failing)
        assert pool.fetch_value("select 1") == 1


def test_a_root_without_devices_is_no_lack_of_descriptors(
    monkeypatch: pytest.MonkeyPatch, fake: FakeServer
) -> None:
    """A chroot may have no `/dev`."""
    monkeypatch.setattr(os, "devnull", "/nowhere/null")
    fake.refuse()
    with fake.pool(outage_grace=GRACE) as pool:
        error = refused(pool)
    assert error.kind == "refused"
    assert "No such file" not in str(error)
