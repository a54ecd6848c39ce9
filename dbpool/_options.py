"""What a pool may be given by keyword, as a user's type checker and editor see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

from psycopg_pool.abc import KwargsParam

Seconds = float | str


class Options(TypedDict, total=False):
    """The fields of `Settings`, then the parameters of `psycopg_pool.ConnectionPool`.

    But for `connection_class`, from which a type checker learns what rows are.
    """

    name: str | None
    conninfo_file: str | None
    password_file: str | None
    min_size: int
    max_size: int | None
    timeout: Seconds
    max_waiting: int
    max_lifetime: Seconds
    max_idle: Seconds
    connect_timeout: int
    statement_timeout: Seconds
    lock_timeout: Seconds
    idle_in_transaction_timeout: Seconds
    keepalives_idle: int
    keepalives_interval: int
    keepalives_count: int
    tcp_user_timeout: Seconds
    ping_after: Seconds
    ping_timeout: Seconds
    outage_grace: Seconds
    leak_after: Seconds
    session_reset: str
    pooler: str
    pipeline_begin: bool
    application_name: str
    libpq: str

    kwargs: KwargsParam | None
    open: bool | None
    configure: Callable[[Any], None] | None
    check: Callable[[Any], None] | None
    reset: Callable[[Any], None] | None
    close_returns: bool
    reconnect_timeout: float
    reconnect_failed: Callable[[Any], None] | None
    num_workers: int
