"""What a pool may be given by keyword: as a user's type checker sees it, and as it is resolved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Final, TypedDict

from psycopg_pool.abc import KwargsParam

from dbpool._secrets import safe_key, safe_repr
from dbpool.errors import ConfigError
from dbpool.events import runs_when_called
from dbpool.settings import Settings
from dbpool.settings._conninfo import insist_on_types
from dbpool.settings._parsing import did_you_mean, nearest, parse_number

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
    slow_acquire: Seconds
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


_SETTINGS: Final = frozenset(field.name for field in fields(Settings)) - {"explicit"}
# Those that are the parent's parameters too, and then its parameters that are no settings.
_SHARED: Final = "name min_size max_size timeout max_waiting max_lifetime max_idle"
_CALLBACKS: Final = ("configure", "check", "reset", "reconnect_failed")
_PARENT_ONLY: Final = frozenset(Options.__annotations__) - _SETTINGS


def resolve(
    conninfo: Any, connection_class: Any, settings: Any, options: dict[str, Any]
) -> tuple[Settings, dict[str, Any]]:
    """Return the settings of a pool, and the parameters of its parent.

    Raises `ConfigError` for what is unknown, or would fail only once it is used.
    """
    chosen = {name: options.pop(name) for name in _SETTINGS & options.keys()}
    if unknown := sorted(options.keys() - _PARENT_ONLY):
        meant = did_you_mean(nearest(unknown[0], _SETTINGS | _PARENT_ONLY))
        raise ConfigError(f"Pool() has no option {safe_key(unknown[0])!r}{meant}")
    if not runs_when_called(getattr(connection_class, "connect", None)):  # AsyncConnection's
        raise ConfigError("connection_class must be a subclass of psycopg.Connection")
    for name in _CALLBACKS:
        if not runs_when_called(options.get(name) or print):
            hint = ' (session_reset="session" resets the session)' if name == "reset" else ""
            raise ConfigError(f"{name} must be callable, without async or yield{hint}")
    insist_on_types(*(None if callable(x) else x for x in (conninfo, options.get("kwargs"))))
    for name in options.keys() & {"reconnect_timeout", "num_workers"}:
        count: dict[str, Any] = {"time": "", "whole": True} if name == "num_workers" else {}
        options[name] = parse_number(options[name], name, **count)
    found = _settings(conninfo, settings, chosen, options.get("kwargs"))
    shared = {name: getattr(found, name) for name in _SHARED.split()}
    return found, options | shared | {"connection_class": connection_class}


def _settings(conninfo: Any, settings: Any, chosen: dict[str, Any], kwargs: Any) -> Settings:
    if not isinstance(settings, Settings | None):
        raise ConfigError(f"settings must be a dbpool.Settings, not {safe_repr(settings)}")
    if chosen.get("max_size", 0) is None:  # the parent's "as min_size"
        del chosen["max_size"]
        built = _settings(conninfo, settings, chosen, kwargs)
        return replace(built, max_size=built.min_size, explicit=built.explicit | {"max_size"})
    if chosen.get("name", "") is None:  # the parent's "think of one"
        del chosen["name"]
    if isinstance(conninfo, str) and conninfo:
        chosen["conninfo"] = conninfo
    explicit = frozenset(chosen)
    if settings is not None:
        return replace(settings, explicit=settings.explicit | explicit, **chosen)
    if conninfo or kwargs:
        return Settings(explicit=explicit, **chosen)
    return Settings.from_env(**chosen)
