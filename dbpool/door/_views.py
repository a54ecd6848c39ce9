"""What the door answers: page, statistics, metrics and health, from what the workers published."""

from __future__ import annotations

import binascii
import hmac
import json
import logging
import mimetypes
import re
from base64 import b64decode
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from dbpool.errors import ConfigError
from dbpool.metrics import PoolState
from dbpool.monitor import INCLUDES, Monitor
from dbpool.processes import Processes
from dbpool.report import Report
from dbpool.settings.app import AppSettings

logger = logging.getLogger("dbpool")

_FILES: Final = Path(__file__).parent.parent / "flask"  # the blueprint's page and what it loads
_PAGE: Final = _FILES / "templates" / "dbpool" / "live.html"
_STATIC: Final = re.compile(r"/static/([a-z-]+\.(?:js|css|svg))")
_LINK: Final = re.compile(r"\{\{ url_for\('\.(\w+)'(?:, filename='([\w.-]+)')?\) \}\}")
_LOCAL: Final = re.compile(r"(?:localhost|127(?:\.\d+){3}|\[::1\])(?::\d+)?", re.IGNORECASE)
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}
_FRESH: Final = 10.0  # seconds that what a worker says of its databases counts
_START: Final = 60.0  # seconds in which there need be no worker yet
_SERVING: Final = frozenset({PoolState.UP, PoolState.DEGRADED})


@dataclass(frozen=True)
class Response:
    """An answer; `headers` beside those that every answer has."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def all_headers(self) -> dict[str, str]:
        """Return all headers, in the order to send them."""
        known = {"Content-Type": self.content_type, "Content-Length": str(len(self.body))}
        return {**known, **_HEADERS, **self.headers}


class Views:
    """The answers of one application's door.

    *find* returns the processes of the application, and raises `ConfigError` while there are none.
    Liveness fails once no worker has published for *patience* seconds.
    """

    def __init__(
        self, settings: AppSettings, find: Callable[[], Processes], patience: float = 30.0
    ) -> None:
        self._settings = settings
        self._find = find
        self._patience = max(30.0, patience)
        self._started = monotonic()
        self._monitor: Monitor | None = None
        self._directory: Path | None = None
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
            return _json(400, error="this is no address")
        if public := self._public.get(path):
            return public(query, headers)
        if match := _STATIC.fullmatch(path):
            return _static(match[1])
        if restricted := self._restricted.get(path):
            try:
                return self._denied(headers) or restricted(query, headers)
            except ConfigError as ex:  # there is no application yet, or there are several
                return _json(503, {"Retry-After": "5"}, error=str(ex))
        return _json(404, error="there is no such page")

    def tick(self) -> None:
        """Watch in the workers' place while none of them does."""
        if (monitor := self._watching()) is not None:
            monitor.try_tick()

    def close(self) -> None:
        """Stop watching."""
        if self._monitor is not None:
            self._monitor.close()

    def is_deserted(self) -> bool:
        """Whether no worker lives."""
        return not self._reports()

    def _watching(self) -> Monitor | None:
        """Return the monitor of the application's directory, None while there is none."""
        try:
            processes = self._find()
        except ConfigError:
            return None
        if self._monitor is None or processes.directory() != self._directory:
            self.close()
            self._monitor = Monitor({}, processes, is_reader=True)
            self._directory = processes.directory()
        return self._monitor

    def _reports(self) -> list[Report]:
        """Return the reports of the workers that live; none while there is no application."""
        try:
            return self._find().collect_each()
        except (ConfigError, OSError):
            return []

    def _denied(self, headers: Mapping[str, str]) -> Response | None:
        """Return the answer for a client that may not see details, None for one that may."""
        token = self._settings.token
        if self._settings.details == "always":
            # A name of somebody else's may lead a browser here.
            is_local = _LOCAL.fullmatch(headers.get("host", "")) is not None
            return None if is_local else _json(403, error="open to localhost alone")
        if not token:
            reason = "closed: set DBPOOL_TOKEN for this process, and send it, to see this"
            return _json(403, error=reason)
        if hmac.compare_digest(_offered(headers.get("authorization", "")), token.encode()):
            return None
        schemes = 'Basic realm="dbpool", charset="UTF-8"'
        reason = "send the token as a Bearer token, or as the password of HTTP Basic"
        if "authorization" in headers:
            reason = f"wrong token: {reason}"
        return _json(401, {"WWW-Authenticate": schemes}, error=reason)

    # Health

    def _live(self, query: object, headers: object) -> Response:
        ages = [process.age for report in self._reports() for process in report.processes]
        is_starting = not ages and monotonic() - self._started < _START
        if is_starting or min(ages, default=self._patience + 1) <= self._patience:
            return _json(200, status=PoolState.UP)
        return _json(503, {"Retry-After": "5"}, status=PoolState.DOWN)

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
            if all(process.age <= _FRESH for process in report.processes)
        ]
        words: dict[str, PoolState] = {}
        for report in fresh:
            for name, pool in report.pools.items():
                words[name] = max(words.get(name, PoolState.NONE), _word(pool), key=_BEST.index)
        required = [words.get(name, PoolState.STARTING) for name in self._settings.required]
        status = min(required, key=_BEST.index, default=PoolState.STARTING)
        if status in _SERVING:
            is_well = set(words.values()) <= {PoolState.UP}
            status = PoolState.UP if is_well else PoolState.DEGRADED
            return _json(200, status=status, databases=words, **more)
        return _json(503, {"Retry-After": "1"}, status=status, databases=words, **more)

    # Details

    def _stats(self, query: Mapping[str, list[str]], headers: object) -> Response:
        wanted = {name for each in query.get("include", ()) for name in each.split(",") if name}
        if not wanted <= set(INCLUDES):
            return _json(400, error=f"include is a list of {', '.join(INCLUDES)}")
        return _json(200, **self._report(wanted))

    def _report(self, wanted: Collection[str]) -> dict[str, Any]:
        report = self._find().collect_others() or Report({})
        monitor = self._watching()
        return report.to_json() if monitor is None else monitor.extend(report, wanted)

    def _metrics(self, query: object, headers: Mapping[str, str]) -> Response:
        try:
            from dbpool.prometheus import expose
        except ConfigError as ex:  # the package is not installed; the message names it
            return _json(501, error=str(ex))
        report = self._report(())
        body, content_type = expose(report, headers.get("accept", ""), report.get("findings", ()))
        return Response(200, body, content_type)

    def _page(self, query: object, headers: object) -> Response:
        page = _LINK.sub(
            lambda link: f"/static/{link[2]}" if link[2] else "/stats", _PAGE.read_text()
        )
        return Response(200, page.encode(), "text/html; charset=utf-8")


# Of several workers the best counts: requests are served while one of them can.
_BEST: Final = (
    PoolState.NONE, PoolState.STOPPED, PoolState.STARTING, PoolState.DOWN, PoolState.DEGRADED,
    PoolState.UP,
)  # fmt: skip


def _word(pool: Any) -> PoolState:
    is_full = pool.waiting > 0 and pool.active >= pool.max_size
    return PoolState.DEGRADED if pool.state == PoolState.UP and is_full else pool.state


def _offered(header: str) -> bytes:
    """Return what an Authorization header offers as the token, b"" if it cannot be read."""
    scheme, _, value = header.strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode(errors="replace")
    if scheme.lower() == "basic":
        try:
            return b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _static(name: str) -> Response:
    try:
        body = (_FILES / "static" / name).read_bytes()
    except OSError:
        return _json(404, error="there is no such file")
    return Response(200, body, mimetypes.guess_type(name)[0] or "application/octet-stream")


def _json(status: int, headers: Mapping[str, str] | None = None, /, **content: Any) -> Response:
    return Response(status, json.dumps(content).encode(), headers=headers or {})
