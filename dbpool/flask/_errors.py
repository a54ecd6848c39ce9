"""What a client gets when a pool could not serve: 503, and when to come back."""

from __future__ import annotations

import logging
import math
import random
from typing import Any, Final

from flask import Flask, Response, current_app, jsonify, request
from werkzeug.exceptions import HTTPException
from werkzeug.http import HTTP_STATUS_CODES

from dbpool.errors import (
    CommitUncertain,
    DatabaseUnavailable,
    PoolClosed,
    PoolError,
    PoolExhausted,
    TooManyRequests,
)

logger = logging.getLogger("dbpool")

_ERRORS: Final = (PoolError, PoolClosed, TooManyRequests)
# Where libraries keep the error of the driver that they wrap, beside `__cause__`.
_ORIGINALS: Final = ("orig", "original_exc")
_MAX_DEPTH: Final = 5  # wrappers around wrappers

_PAGE: Final = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<h1>{reason}</h1>
"""


def register_error_handlers(app: Flask) -> None:
    """Answer a pool's errors with 503, as JSON or HTML by what the client accepts.

    Also where a library wraps them into errors of its own. Handlers of the application's own
    for the same exceptions stay.
    """
    theirs = app.error_handler_spec[None][None]
    for error in _ERRORS:
        if error not in theirs:
            app.register_error_handler(error, _answer)
    # The least specific handler of all: whatever the application handles itself comes first.
    if Exception not in theirs:
        app.register_error_handler(Exception, _answer_wrapped)


def _answer_wrapped(exc: Exception) -> Any:
    """Answer for an exception that wraps a pool's error; any other goes on as if unhandled."""
    if isinstance(exc, HTTPException):
        # Flask's own 500 for what nobody handled comes here a second time.
        is_last = getattr(exc, "original_exception", None) is not None
        if is_last or not current_app.trap_http_exception(exc):
            return exc
        raise exc
    found = _wrapped(exc)
    if found is None:
        raise exc
    return current_app.handle_user_exception(found)


def _wrapped(exc: object, depth: int = 0) -> Exception | None:
    """Find a pool's error behind the errors of the libraries that it came through.

    SQLAlchemy, Django and others chain it as the cause; peewee and pony keep it as an attribute.
    An error that was raised while another was handled, without `from`, is one of its own.
    """
    if depth > _MAX_DEPTH or not isinstance(exc, Exception):
        return None
    if isinstance(exc, _ERRORS):
        return exc
    if isinstance(exc, ExceptionGroup):  # of a task group; one that holds a bug too is a bug
        members = [_wrapped(each, depth + 1) for each in exc.exceptions]
        return members[0] if all(members) else None
    originals = [exc.__cause__, *(vars(exc).get(name) for name in _ORIGINALS)]
    found = (_wrapped(each, depth + 1) for each in originals)
    return next(filter(None, found), None)


def _answer(exc: Exception) -> Response:
    # The client learns no more than it needs: hosts, roles and holders stay in the log. What befalls
    # many requests at once is told by the pool, once per episode, and not for each of them.
    status = 500 if isinstance(exc, CommitUncertain) else 503
    if not isinstance(exc, (DatabaseUnavailable, PoolExhausted, TooManyRequests)):
        name = type(exc).__name__
        logger.warning("endpoint %s answers %d: %s: %s", request.endpoint, status, name, exc)
    if isinstance(exc, CommitUncertain):
        reason = "the outcome of the request is unknown"
    elif isinstance(exc, DatabaseUnavailable):
        reason = "the database is unavailable"
    else:
        reason = "the service is busy"
    if _prefers_html():
        title = f"{status} {HTTP_STATUS_CODES[status]}"
        page = _PAGE.format(title=title, reason=reason.capitalize())
        answer = Response(page, mimetype="text/html")
    else:
        answer = jsonify(error=reason)
    answer.status_code = status
    answer.headers["Cache-Control"] = "no-store"
    answer.headers["X-Content-Type-Options"] = "nosniff"
    if status == 503:  # what may have happened already must not be tried again blindly
        answer.headers["Retry-After"] = retry_after(getattr(exc, "retry_after", 0.0))
    return answer


def _prefers_html() -> bool:
    try:
        wanted = request.accept_mimetypes.best_match(["application/json", "text/html"])
    except Exception:  # noqa: BLE001  # parsers fail in many ways at what a stranger sends
        return False
    return wanted == "text/html"


def retry_after(seconds: float | None) -> str:
    """Return a `Retry-After`: whole seconds, at least one.

    Up to half as much again, and two seconds at least, is added by chance: clients that were
    refused together should not come back together.
    """
    soonest = max(1, math.ceil(seconds or 0.0))
    return str(random.randint(soonest, soonest + max(2, soonest // 2)))  # noqa: S311  # no secret
