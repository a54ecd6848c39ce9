"""Servers for the benchmarks: private, on a copy of one data directory, gone afterwards."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.postgres import Server


@contextlib.contextmanager
def served(**options: object) -> Iterator[Server]:
    """Serve for the length of a block; *options* are configuration parameters."""
    server = Server(_template(), **options)
    try:
        server.start()
        yield server
    finally:
        server.close()


@cache
def _template() -> Path:
    """Making a data directory takes longer than many a benchmark's quick run: one is enough."""
    server = Server()
    atexit.register(server.close)
    return server.data
