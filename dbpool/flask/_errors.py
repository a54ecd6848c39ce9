"""What a client is told when a pool could not serve: 503, and when to come back."""

from __future__ import annotations

import logging
import math
from typing import Final

from flask import Flask, Response, jsonify, request

from dbpool.errors import (
    CommitUncertain,
    DatabaseUnavailable,
    PoolClosed,
    PoolError,
    TooManyRequests,
)

logger = logging.getLogger("dbpool")

_PAGE: Final = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>503 Service Unavailable</title>
<h1>{reason}</h1>
"""


def register_error_handlers(app: Flask) -> None:
    """Answer a pool's errors with 503, as JSON or HTML by what the client accepts.

    Handlers of the application's own for the same exceptions stay.
    """
    theirs = app.error_handler_spec[None][None]
    for error in (PoolError, PoolClosed, TooManyRequests):
        if error not in theirs:
            app.register_error_handler(error, _answer)


def _answer(exc: Exception) -> Response:
    # The client learns no more than it needs: hosts, roles and holders stay in the log. Of an
    # outage and of a full queue the pool's own log and counters tell, not every request.
    if not isinstance(exc, (DatabaseUnavailable, TooManyRequests)):
        logger.warning("endpoint %s answers 503: %s: %s", request.endpoint, type(exc).__name__, exc)
    if isinstance(exc, CommitUncertain):
        reason = "the outcome of the request is unknown"
    elif isinstance(exc, DatabaseUnavailable):
        reason = "the database is unavailable"
    else:
        reason = "the service is busy"
    wanted = request.accept_mimetypes.best_match(["application/json", "text/html"])
    if wanted == "text/html":
        page = _PAGE.format(reason=reason.capitalize())
        answer = Response(page, mimetype="text/html")
    else:
        answer = jsonify(error=reason)
    answer.status_code = 503
    answer.headers["Cache-Control"] = "no-store"
    if not isinstance(exc, CommitUncertain):  # trying that again could do it twice
        answer.headers["Retry-After"] = retry_after(getattr(exc, "retry_after", 0.0))
    return answer


def retry_after(seconds: float | None) -> str:
    """Return a `Retry-After`: whole seconds, at least one."""
    return str(max(1, math.ceil(seconds or 0.0)))
