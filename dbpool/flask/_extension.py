"""The extension: an application's pools, and the return of connections that a request forgot."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import wraps
from time import monotonic
from typing import Any, Final, Unpack

from flask import (
    Flask,
    appcontext_pushed,
    current_app,
    g,
    request,
)

from dbpool import holders
from dbpool._gevent import describe_late_patching
from dbpool._secrets import conceal
from dbpool._sign_in import SignIn
from dbpool.databases import Databases, settings_from_config
from dbpool.errors import describe
from dbpool.events import validate_listeners
from dbpool.flask._async_views import follow_async_views
from dbpool.flask._errors import register_error_handlers
from dbpool.flask._rate_limit import RateLimit, times
from dbpool.health import Health
from dbpool.monitor import Monitor
from dbpool.pool import Pool
from dbpool.pool._options import Options
from dbpool.processes import Processes
from dbpool.processes._files import STATS_DIR
from dbpool.settings.app import AppSettings, find_dotenv
from dbpool.settings.origins import describe_settings

logger = logging.getLogger("dbpool")

KEY: Final = "dbpool"
_PUSHED_AT: Final = "_dbpool_pushed_at"
_ENDPOINT: Final = "_dbpool_endpoint"
_BEGUN: Final = "dbpool.begun"
_STREAMING: Final = "_dbpool_streaming"


_OTHERS: Final = {  # where a request names the server's address, or a client's
    "SERVER_NAME": "that listens on",
    "REMOTE_ADDR": "that is reached by",
    "HTTP_X_FORWARDED_FOR": "that is reached, through a proxy, by",
}


@dataclass(frozen=True)
class State:
    """What belongs to one application: `app.extensions["dbpool"]`."""

    databases: Databases
    health: Health
    processes: Processes
    settings: AppSettings
    monitor: Monitor
    sign_in: SignIn | None = None  # where a token is set
    pools: tuple[Pool[Any], ...] = ()  # all of *databases*
    publishing_pids: set[int] = field(default_factory=set)  # where `Processes.start` is done
    warned: set[str] = field(default_factory=set)
    repeats: RateLimit = field(default_factory=RateLimit)  # of what each request may log


class DBPool:
    """The pools of the current application.

    `db.pool` is the default pool, `db["replica"]` another one; both need an application context.
    *listeners* hear the events of all pools. Every `Pool` gets *options*: `configure`, `kwargs`,
    `connection_class` ...
    """

    def __init__(
        self, app: Flask | None = None, *, listeners: Iterable[Any] = (), **options: Unpack[Options]
    ) -> None:
        app, self._listeners = conceal(app), validate_listeners(listeners)
        self._options: Options = conceal(options)
        del options  # unconcealed they would show a password in this frame
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Give *app* its pools, configured by `app.config["DBPOOL_…"]`, else by the environment.

        Unless `TESTING` is set, this also reads the `.env` that `DBPOOL_DOTENV` names, else the
        nearest one in the working directory or above. It does not connect: the pools open on first
        use. Raises `ConfigError` for wrong settings, `RuntimeError` if *app* has pools already.
        """
        if KEY in app.extensions:
            raise RuntimeError("dbpool is initialised on this application already")
        dotenv = {} if app.testing else find_dotenv(app.config)
        settings = AppSettings.from_config(app.config, dotenv=dotenv)
        databases = Databases(
            settings_from_config(app.config, dotenv=dotenv), self._listeners, **self._options
        )
        processes = Processes(databases, directory=settings.stats_dir, app=app.name)
        own = State(
            databases=databases,
            health=Health(databases, settings.required),
            processes=processes,
            settings=settings,
            monitor=Monitor(
                databases,
                processes,
                blockers=settings.blockers,
                queries=settings.show_queries,
                settings=describe_settings(
                    {name: pool.settings for name, pool in databases.items()},
                    app.config,
                    dotenv,
                    settings,
                ),
            ),
            sign_in=SignIn(settings.token) if settings.token else None,
            pools=tuple(databases.values()),
        )
        # First: Flask refuses this if the application serves requests already.
        app.before_request(_before_request)
        functions = app.before_request_funcs[None]
        functions.insert(0, functions.pop())  # the others may check out, or answer the request
        if settings.error_handlers:
            register_error_handlers(app)
        follow_async_views(app)
        app.extensions[KEY] = own
        _warn_of_missing_door(settings)
        app.shell_context_processor(lambda: {"db": self, "pool": own.databases.default})
        appcontext_pushed.connect(_on_appcontext_pushed, app)
        _follow_teardown(app)

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
    """Return the state of the current application; raise `RuntimeError` if it has none."""
    found: State | None = current_app.extensions.get(KEY)
    if found is None:
        raise RuntimeError(f"call DBPool().init_app(app) on {current_app.name!r} first")
    return found


def _warn_of_missing_door(settings: AppSettings) -> None:
    """Warn where gunicorn's master does not see DBPOOL_SERVE: the workers read more than it."""
    if settings.serve and STATS_DIR in os.environ and not os.environ.get("DBPOOL_SERVE"):
        logger.warning(
            "DBPOOL_SERVE is not in the environment of the server, so that it starts no door:"
            " of a .env and of app.config it does not know"
        )


def _follow_teardown(app: Flask) -> None:
    """Run ours after the application's own teardown functions, which may return connections.

    Also if one of them raises: Flask calls no other one then, and sends no signal.
    """

    def followed(teardown: Callable[..., None], last: Callable[[], None]) -> Callable[..., None]:
        @wraps(teardown)
        def call(*args: Any, **kwargs: Any) -> None:
            try:
                teardown(*args, **kwargs)
            finally:
                last()

        return call

    request_ends, context_ends = app.do_teardown_request, app.do_teardown_appcontext
    app.do_teardown_request = followed(request_ends, _end_request)  # type: ignore[method-assign]
    app.do_teardown_appcontext = followed(context_ends, _end_context)  # type: ignore[method-assign]


def _on_appcontext_pushed(app: Flask, **extra: Any) -> None:
    setattr(g, _PUSHED_AT, monotonic())
    # The request has ended: `stream_with_context` pushes its context again.
    if (endpoint := g.get(_ENDPOINT)) is not None:
        setattr(g, _STREAMING, _begin_serving(endpoint))


def _begin_serving(endpoint: str) -> tuple[holders.ThreadInfo, str | None]:
    """Let this thread serve that endpoint; return what `_end_serving` needs."""
    thread = holders.current.thread
    outer, thread.endpoint = thread.endpoint, endpoint
    state().processes.begin_request(thread)
    return thread, outer


def _end_serving(thread: holders.ThreadInfo, outer: str | None) -> None:
    """Restore the endpoint: requests may nest, as a test client's do."""
    thread.endpoint = outer
    if outer is None:
        state().processes.end_request(thread)


def _before_request() -> None:
    """Let holders in this thread carry the endpoint of the request."""
    own = state()
    if os.getpid() not in own.publishing_pids:
        if not current_app.testing:  # a test looks when it wants to
            own.monitor.start()
        if late := describe_late_patching():
            logger.warning("%s. Call gevent.monkey.patch_all() before every other import", late)
        if own.processes.start():
            own.publishing_pids.add(os.getpid())
    if own.settings.details == "always" and not own.warned:
        _warn_of_open_views(own)
    if request.endpoint is not None:
        request.environ[_BEGUN] = _begin_serving(request.endpoint)
        g.setdefault(_ENDPOINT, request.endpoint)


def _warn_of_open_views(own: State) -> None:
    """Warn where the server listens for others, or where one of them sent this request.

    Some servers have a name in place of the address on which they listen.
    """
    for key, what in _OTHERS.items():
        address = str(request.environ.get(key) or "").partition(",")[0].strip()
        if own.settings.is_open_to_others(address) and "open views" not in own.warned:
            own.warned.add("open views")
            logger.warning(
                "DBPOOL_DETAILS=always on a server %s %s: everybody who reaches it sees all"
                " details; set DBPOOL_TOKEN instead",
                what,
                address,
            )


def _end_request() -> None:
    begun = request.environ.get(_BEGUN)
    # A copy of the request's context ends here too, but in another thread.
    if begun is not None and begun[0] is holders.current.thread:
        del request.environ[_BEGUN]
        _end_serving(*begun)


def _end_context() -> None:
    _take_back_all()
    if (begun := g.pop(_STREAMING, None)) is not None:
        _end_serving(*begun)


def _take_back_all() -> None:
    """Take back the connections that were acquired in this application context and are still held.

    This never commits: the answer has been sent, and could not say that the commit failed.
    """
    pushed_at, endpoint = g.pop(_PUSHED_AT, math.inf), g.get(_ENDPOINT)
    for pool in state().pools:
        try:
            _take_back(pool, pushed_at, endpoint)
        except Exception as ex:  # noqa: BLE001  # one failure must not stop the others
            logger.error(
                "pool %r: a connection could not be taken back: %s", pool.name, describe(ex)
            )


def _take_back(pool: Pool[Any], since: float, endpoint: str | None) -> None:
    what, advice = "application context ended", ""  # of a task or a command
    if endpoint is not None:
        what = f"request ended (endpoint {endpoint})"
        advice = "; a streamed response must check out its connection inside the generator"
    for holder in pool.return_held(since):
        if count := state().repeats.count((pool.name, holder.where, endpoint)):
            logger.error(
                "pool %r: a connection checked out at %s was still held when the %s: it was rolled"
                " back and closed%s%s",
                pool.name,
                holder.where,
                what,
                advice,
                times(count),
            )
