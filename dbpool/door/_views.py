"""The door's answers: page, statistics, metrics and health, from what the workers published."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from dbpool import _sign_in
from dbpool._http import retry_after
from dbpool._sign_in import SignIn
from dbpool.diagnosis._host import is_overdue
from dbpool.door._pages import (
    STATIC,
    Response,
    form_page,
    json_answer,
    page,
    prefix_of,
    read_form,
    redirect,
    static_file,
)
from dbpool.errors import ConfigError
from dbpool.metrics import PoolState
from dbpool.monitor import Monitor, Query
from dbpool.processes import Processes
from dbpool.report import Report
from dbpool.settings.app import AppSettings

logger = logging.getLogger("dbpool")

_LOCAL: Final = re.compile(r"(?:localhost|127(?:\.\d+){3}|\[::1\])(?::\d+)?", re.IGNORECASE)
_START_TIMEOUT: Final = 60.0  # seconds in which there need be no worker yet
_QUIET_START: Final = 10.0  # seconds in which that is not logged
_SERVING: Final = frozenset({PoolState.UP, PoolState.DEGRADED})


class Views:
    """The answers of one application's door.

    *find* returns the processes of the application, and raises `ConfigError` while there are none.
    Liveness fails once no worker has published for *worker_timeout* seconds.
    """

    def __init__(
        self, settings: AppSettings, find: Callable[[], Processes], worker_timeout: float = 30.0
    ) -> None:
        self._settings = settings
        self._sign_in = SignIn(settings.token) if settings.token else None
        self._find = find
        self._worker_timeout = max(30.0, worker_timeout)
        self._started = monotonic()
        self._monitor: Monitor | None = None
        self._directory: Path | None = None
        self._logged = ""  # why there is nothing to serve
        self._public = {
            "/health/live": self._live, "/health/ready": self._ready, "/health": self._health,
        }  # fmt: skip
        self._restricted = {"/stats": self._stats, "/metrics": self._metrics, "/": self._page}

    def respond(self, target: str, headers: Mapping[str, str]) -> Response:
        """Return the answer to a GET of that target; header names are in lower case."""
        try:
            parts = urlsplit(target)
            path = parts.path.rstrip("/") or "/"
            query = parse_qs(parts.query)
        except ValueError:
            return json_answer(400, error="malformed address")
        if public := self._public.get(path):
            return public(query, headers)
        if match := STATIC.fullmatch(path):
            return static_file(match[1])
        if path == "/sign-in":
            return self._offer_form(headers)
        if restricted := self._restricted.get(path):
            try:
                return self._denied(headers, path) or restricted(query, headers)
            except ConfigError as ex:  # there is no application yet, or there are several
                return json_answer(503, {"Retry-After": retry_after(5.0)}, error=str(ex))
            except _WrongQuery as ex:
                return json_answer(400, error=str(ex))
        return json_answer(404, error="there is no such page")

    def submit(self, target: str, headers: Mapping[str, str], form: bytes) -> Response:
        """Return the answer to a form that a browser sends to that target."""
        path = target.partition("?")[0]
        if not takes_form(target):
            return json_answer(501, error="this address accepts no forms")
        if self._sign_in is None or self._settings.details == "always":
            return redirect("/", headers)
        if _sign_in.is_cross_site(headers):
            return json_answer(403, error=_sign_in.FOREIGN)
        path_of_cookie, secure = prefix_of(headers) + "/", _sign_in.came_by_https(headers)
        if path == "/sign-out":
            return redirect(
                "/sign-in", headers, self._sign_in.withdraw(path_of_cookie, is_secure=secure)
            )
        offered, wanted = read_form(form)
        if (problem := self._sign_in.attempt(offered)) is not None:
            return form_page(problem, headers, wanted)
        wanted = f"/{wanted}" if wanted in ("stats", "metrics") else "/"
        return redirect(wanted, headers, self._sign_in.issue(path_of_cookie, is_secure=secure))

    def tick(self) -> None:
        """Watch the pools if no worker does."""
        if (monitor := self._watching()) is not None:
            monitor.try_tick()

    def close(self) -> None:
        """Stop watching."""
        if self._monitor is not None:
            self._monitor.close()

    def is_deserted(self) -> bool:
        """Whether no worker is alive."""
        return not self._reports()

    def _watching(self) -> Monitor | None:
        """Return the monitor of the application's directory, None while there is none."""
        try:
            processes = self._find()
        except ConfigError as ex:
            self._log(str(ex))
            return None
        self._logged = ""
        if self._monitor is None or processes.directory() != self._directory:
            self.close()
            self._monitor = Monitor({}, processes, is_reader=True)
            self._directory = processes.directory()
        return self._monitor

    def _log(self, reason: str) -> None:
        """Log once why there is nothing to serve, unless the workers may still start."""
        if reason != self._logged and monotonic() - self._started > _QUIET_START:
            self._logged = reason
            logger.warning("door: there is nothing to serve: %s", reason)

    def _reports(self) -> list[Report]:
        """Return the reports of the living workers, none while there is no application."""
        try:
            return self._find().collect_each()
        except (ConfigError, OSError):
            return []

    def _denied(self, headers: Mapping[str, str], path: str = "") -> Response | None:
        """Return the answer for a client that may not see details, None for one that may."""
        if self._settings.details == "always":
            # Another site's host name may lead a browser here (DNS rebinding).
            is_local = _LOCAL.fullmatch(headers.get("host", "")) is not None
            return None if is_local else json_answer(403, error="open to localhost alone")
        if (denied := _sign_in.denial(self._sign_in, headers)) is None:
            return None
        if "text/html" in headers.get("accept", ""):
            return form_page(denied.problem, headers, path[1:])
        challenge = {"WWW-Authenticate": denied.challenges[0]} if denied.challenges else {}
        return json_answer(_sign_in.status_of(denied.problem), challenge, error=denied.reason)

    def _offer_form(self, headers: Mapping[str, str]) -> Response:
        if self._sign_in is None or self._denied(headers) is None:
            return redirect("/", headers)
        return form_page(_sign_in.MISSING, headers, status=200)

    # Health

    def _live(self, query: object, headers: object) -> Response:
        ages = [process.age for report in self._reports() for process in report.processes]
        is_starting = not ages and monotonic() - self._started < _START_TIMEOUT
        if is_starting or min(ages, default=self._worker_timeout + 1) <= self._worker_timeout:
            return json_answer(200, status=PoolState.UP)
        return json_answer(503, {"Retry-After": retry_after(5.0)}, status=PoolState.DOWN)

    def _ready(self, query: object, headers: object) -> Response:
        return self._readiness()

    def _health(self, query: object, headers: Mapping[str, str]) -> Response:
        if self._denied(headers) is not None:
            return self._readiness()
        monitor = self._watching()
        return self._readiness(findings=[] if monitor is None else monitor.findings())

    def _readiness(self, **more: Any) -> Response:
        fresh = [
            report
            for report in self._reports()
            if not any(is_overdue(each.age, each.interval) for each in report.processes)
        ]
        words: dict[str, PoolState] = {}
        for report in fresh:
            for name, pool in report.pools.items():
                words[name] = max(words.get(name, PoolState.NONE), _word(pool), key=_BEST.index)
        required = [words.get(name, PoolState.STARTING) for name in self._settings.required]
        status = min(required, key=_BEST.index, default=PoolState.UP)  # or nothing is required
        if status in _SERVING:
            are_all_up = set(words.values()) <= {PoolState.UP}
            status = PoolState.UP if are_all_up else PoolState.DEGRADED
            return json_answer(200, status=status, databases=words, **more)
        return json_answer(
            503, {"Retry-After": retry_after(1.0)}, status=status, databases=words, **more
        )

    # Details

    def _stats(self, query: Mapping[str, list[str]], headers: object) -> Response:
        wanted = _parse(query)
        return json_answer(200, **wanted.trim(self._report(wanted.include)))

    def _report(self, wanted: Collection[str]) -> dict[str, Any]:
        report = self._find().collect_others(usage="endpoints" in wanted) or Report({})
        monitor = self._watching()
        return report.to_json() if monitor is None else monitor.extend(report, wanted)

    def _metrics(self, query: Mapping[str, list[str]], headers: Mapping[str, str]) -> Response:
        _parse(query)
        try:
            from dbpool.prometheus import expose
        except ConfigError as ex:  # the package is not installed; the message names it
            return json_answer(501, error=str(ex))
        wants_endpoints = self._settings.endpoint_metrics
        report = self._find().collect_others(usage=wants_endpoints) or Report({})
        monitor = self._watching()
        findings = () if monitor is None else monitor.findings(report.to_json())
        body, content_type = expose(report, headers.get("accept", ""), findings)
        return Response(200, body, content_type)

    def _page(self, query: object, headers: Mapping[str, str]) -> Response:
        hidden = "" if _sign_in.is_signed_in(self._sign_in, headers) else "hidden"
        return page("live.html", headers, hidden=hidden)


def takes_form(target: str) -> bool:
    """Whether a browser may send a form to that target."""
    return target.partition("?")[0] in ("/sign-in", "/sign-out")


class _WrongQuery(ValueError):
    """A parameter of a query is wrong; the text is for the reader."""


def _parse(query: Mapping[str, list[str]]) -> Query:
    try:
        wanted = Query.parse_all(query)
    except ValueError as ex:
        raise _WrongQuery(str(ex)) from None
    if wanted.scope == "process":
        raise _WrongQuery("scope is all here: the door answers for all processes")
    return wanted


# The best of all workers counts: requests are served while any of them can.
_BEST: Final = (
    PoolState.NONE, PoolState.STOPPED, PoolState.STARTING, PoolState.DOWN, PoolState.DEGRADED,
    PoolState.UP,
)  # fmt: skip


def _word(pool: Any) -> PoolState:
    is_full = pool.waiting > 0 and pool.active >= pool.max_size
    return PoolState.DEGRADED if pool.state == PoolState.UP and is_full else pool.state
