"""The lines of the log: time, level, pid, the request that caused it, and what happened.

They are text for people, or one JSON object in each line with `WEBAPP_LOG=json`. gunicorn's
configuration runs this file in the master, so it imports only the standard library.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flask import Flask

_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_access = logging.getLogger("webapp.access")

_JSON_LOGGERS = {
    "webapp.access": {"level": "INFO"},
    "gunicorn.access": {"level": "WARNING"},  # it would quote the query string
    "gunicorn.error": {"handlers": ["stderr"], "propagate": False},
}


def init_app(app: Flask) -> None:
    """Give each request an id: that of its `X-Request-ID`, or a new one. The response carries it.

    Also log each request, with its path only, since a query string may contain anything. Requests
    for dbpool's own views are not logged: machines make them all the time.
    """
    from flask import Response, g, request

    @app.before_request
    def begin() -> None:
        given = request.headers.get("X-Request-ID", "")
        g.request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        g.request_began = time.monotonic()

    @app.after_request
    def end(response: Response) -> Response:
        response.headers["X-Request-ID"] = g.request_id
        if not (request.endpoint or "").startswith("dbpool."):
            spent, answer = time.monotonic() - g.request_began, response.status_code
            _access.info("%s %s %d in %.1f ms", request.method, request.path, answer, 1000 * spent)
        return response


def config(kind: str) -> dict[str, Any]:
    """Return the configuration of all loggers, gunicorn's too, for `logging.config.dictConfig`.

    As text there is no line for each request.
    """
    is_json = kind == "json"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": JSONFormatter if is_json else TextFormatter}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": "line",
                "stream": "ext://sys.stderr",
            }
        },
        "root": {"level": "INFO", "handlers": ["stderr"]},
        "loggers": _JSON_LOGGERS if is_json else {"webapp.access": {"level": "WARNING"}},
    }


class TextFormatter(logging.Formatter):
    """A line for people, in gunicorn's format: `[time] [pid] [level] logger: text`."""

    def __init__(self) -> None:
        super().__init__(
            "[%(asctime)s] [%(process)d] [%(levelname)s] %(name)s: %(message)s",
            "%Y-%m-%d %H:%M:%S %z",
        )

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """Add the request, if there is one."""
        found = current_request()
        text = super().formatMessage(record)
        return f"{text} [request {found['id']} {found['endpoint']}]" if found else text


class JSONFormatter(logging.Formatter):
    """One JSON object in each line; the fields of a pool's event are under `dbpool`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "pid": record.process,
            "logger": record.name,
            "text": record.getMessage(),
        }
        if found := current_request():
            line["request"] = found
        if details := getattr(record, "dbpool", None):
            line["dbpool"] = details
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def current_request() -> dict[str, str | None] | None:
    """Return the id and the endpoint of the request that this thread serves, None outside of one."""
    flask = sys.modules.get("flask")  # not in the master
    if flask is None or not flask.has_request_context():
        return None
    return {"id": flask.g.get("request_id"), "endpoint": flask.request.endpoint}
