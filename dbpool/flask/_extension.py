"""The extension: pools for an application, and what a request may leave behind."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final, Unpack

from flask import (
    Flask,
    appcontext_pushed,
    appcontext_tearing_down,
    current_app,
    g,
    request,
)

from dbpool import holders
from dbpool._options import Options
from dbpool._secrets import conceal
from dbpool.databases import Databases, settings_from_config
from dbpool.errors import describe
from dbpool.events import validate_listeners
from dbpool.flask._async_views import follow_async_views
from dbpool.flask._errors import register_error_handlers
from dbpool.health import Health
from dbpool.pool import Pool
from dbpool.processes import Processes
from dbpool.settings.app import AppSettings, find_dotenv

logger = logging.getLogger("dbpool")

KEY: Final = "dbpool"
_BEGUN: Final = "_dbpool_begun"
_ENDPOINT: Final = "_dbpool_endpoint"
_OUTER: Final = "dbpool.outer_endpoint"

_LOG_INTERVAL: Final = 60.0  # seconds between two lines about connections forgotten at one place
_MAX_REPEATS: Final = 256  # places that are remembered


class _Repeats:
    """Counts what happens again and again, so that it is logged once a minute."""

    def __init__(self) -> None:
        self._counts: dict[object, tuple[float, int]] = {}  # when it was logged, how often since

    def count(self, key: object) -> int:
        """Count it once more; return how often since it was logged, 0 if that is not due yet."""
        # Without a lock, which a fork could leave locked: the worst is a line too many.
        now = monotonic()
        logged, count = self._counts.get(key, (-math.inf, 0))
        is_due = now - logged >= _LOG_INTERVAL
        if len(self._counts) >= _MAX_REPEATS:
            self._counts.clear()
        self._counts[key] = (now, 0) if is_due else (logged, count + 1)
        return count + 1 if is_due else 0


@dataclass(frozen=True)
class State:
    """What one application has: `app.extensions["dbpool"]`."""

    databases: Databases
    health: Health
    processes: Processes
    settings: AppSettings
    warned: set[str] = field(default_factory=set)  # of what, so that it is said once
    forgotten: _Repeats = field(default_factory=_Repeats)


class DBPool:
    """The pools of the application at hand.

    `db.pool` is the default one, `db["replica"]` another; both need an application context.
    *listeners* hear the events of all pools, *options* go to every `Pool`: `configure`,
    `kwargs`, `connection_class` ...
    """

    def __init__(
        self, app: Flask | None = None, *, listeners: Iterable[Any] = (), **options: Unpack[Options]
    ) -> None:
        app, self._listeners = conceal(app), validate_listeners(listeners)
        self._options: Options = conceal(options)
        del options  # as they came they would show a password to whoever looks at this frame
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Give *app* its pools, set by `app.config["DBPOOL_…"]`, else by the environment.

        The `.env` that `DBPOOL_DOTENV` names, else the nearest one in the working directory or
        above, is read too, not under `TESTING`. Nothing connects: the pools open on first use.
        Raises `ConfigError` for wrong settings, `RuntimeError` when the application has its
        pools already.
        """
        if KEY in app.extensions:
            raise RuntimeError("dbpool is initialised on this application already")
        dotenv = {} if app.testing else find_dotenv(app.config)
        settings = AppSettings.from_config(app.config, dotenv=dotenv)
        databases = Databases(
            settings_from_config(app.config, dotenv=dotenv), self._listeners, **self._options
        )
        own = State(
            databases=databases,
            health=Health(databases, settings.required),
            processes=Processes(databases, directory=settings.stats_dir, app=app.name),
            settings=settings,
        )
        # First, as Flask refuses it when the application has begun to serve.
        app.before_request(_enter)
        app.teardown_request(_leave)
        if settings.error_handlers:
            register_error_handlers(app)
        follow_async_views(app)
        app.extensions[KEY] = own
        appcontext_pushed.connect(_begin, app)
        # Comes after the application's own teardown, which may return what a view took.
        appcontext_tearing_down.connect(_end, app)

    @property
    def databases(self) -> Databases:
        """All pools of the current application."""
        return state().databases

    @property
    def health(self) -> Health:
        """The health of the current application, to add checks to."""
        return state().health

    @property
    def pool(self) -> Pool[Any]:
        """The default pool of the current application."""
        return state().databases.default

    def __getitem__(self, name: str) -> Pool[Any]:
        return state().databases[name]


def state() -> State:
    """Return what the current application has; a clear error if it has nothing."""
    found: State | None = current_app.extensions.get(KEY)
    if found is None:
        raise RuntimeError(f"call DBPool().init_app(app) on {current_app.name!r} first")
    return found


def _begin(app: Flask, **extra: Any) -> None:
    setattr(g, _BEGUN, monotonic())


def _enter() -> None:
    """Name what this thread serves from now on."""
    own = state()
    own.processes.start()
    if own.settings.details == "always" and not own.warned:
        _warn_of_open_views(own, request.environ.get("SERVER_NAME", ""))
    if request.endpoint is not None:
        who = holders.here.who
        request.environ[_OUTER], who.endpoint = who.endpoint, request.endpoint
        g.setdefault(_ENDPOINT, request.endpoint)


def _warn_of_open_views(own: State, address: str) -> None:
    if own.settings.is_open_to_others(address):
        own.warned.add("open views")
        logger.warning(
            "DBPOOL_DETAILS=always on a server that listens on %s: everybody who reaches it sees"
            " all details; set DBPOOL_TOKEN instead",
            address,
        )


def _leave(exc: BaseException | None) -> None:
    """Name what this thread serves again: requests may nest, as a test client's do."""
    if _OUTER in request.environ:
        holders.here.who.endpoint = request.environ.pop(_OUTER)


def _end(app: Flask, **extra: Any) -> None:
    """Take back what was checked out in this application context and is still held.

    Nothing is committed here: the answer is on its way and could not say that it failed.
    """
    begun, endpoint = g.pop(_BEGUN, math.inf), g.pop(_ENDPOINT, None)
    for pool in state().databases.values():
        try:
            _take_back(pool, begun, endpoint)
        except Exception as ex:  # noqa: BLE001  # one failure must not stop the rest
            logger.error(
                "pool %r: a connection could not be taken back: %s", pool.name, describe(ex)
            )


def _take_back(pool: Pool[Any], since: float, endpoint: str | None) -> None:
    for holder in pool.return_held(since):
        count = state().forgotten.count((pool.name, holder.where, endpoint))
        if count:
            logger.error(
                "pool %r: a connection checked out at %s was still held when the request ended"
                " (endpoint %s): it was rolled back and closed; a response that is streamed takes"
                " its connection inside its generator%s",
                pool.name,
                holder.where,
                endpoint,
                f" ({count} times since it was logged last)" if count > 1 else "",
            )
