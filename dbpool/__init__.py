"""A PostgreSQL connection pool for thread-based WSGI applications, over psycopg_pool."""

from __future__ import annotations

from dbpool.databases import Databases
from dbpool.errors import (
    CommitUncertain,
    ConfigError,
    DatabaseMisconfigured,
    DatabaseUnavailable,
    PoolClosed,
    PoolError,
    PoolExhausted,
    PoolTimeout,
    TooManyRequests,
)
from dbpool.pool import Pool
from dbpool.settings import Settings

__version__ = "0.1.0"

__all__ = [
    "CommitUncertain",
    "ConfigError",
    "DatabaseMisconfigured",
    "DatabaseUnavailable",
    "Databases",
    "Pool",
    "PoolClosed",
    "PoolError",
    "PoolExhausted",
    "PoolTimeout",
    "Settings",
    "TooManyRequests",
]
