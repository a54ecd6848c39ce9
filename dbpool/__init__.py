"""A PostgreSQL connection pool for thread-based WSGI applications, over psycopg_pool.

Names are imported on first use. A gunicorn master imports only `dbpool.gunicorn`: if it imported
more, workers would keep the old version of that even after a reload, and it would be imported before
gevent patches the standard library.
"""

from __future__ import annotations

import atexit
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_MODULES = ("breaker", "databases", "errors", "events", "holders", "liveness", "metrics", "pool",
            "report", "retry", "settings")  # fmt: skip
_HOMES = ("dbpool.errors", "dbpool.settings", "dbpool.pool", "dbpool.databases")  # of `__all__`


if not TYPE_CHECKING:  # with `__getattr__`, a type checker would accept every name

    def __getattr__(name: str) -> object:
        if name not in __all__ and name not in _MODULES:
            message = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(message, name=name, obj=import_module(__name__))  # for suggestions
        # psycopg's modules import one another in circles, so all threads must begin with the same.
        import_module("psycopg_pool")
        if name in _MODULES:
            return import_module(f"dbpool.{name}")
        found = next(m for m in map(import_module, _HOMES) if name in m.__all__)
        return globals().setdefault(name, getattr(found, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


def _close_all() -> None:
    """Close all pools of a process that ends."""
    if (fork := sys.modules.get("dbpool.pool._fork")) is not None:
        fork.close_all(1.0)


# Here and not where pools are: what an application registers before its first pool may use one.
atexit.register(_close_all)
