"""Answers a pool's errors: with 503, and when to try again."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from typing import Any, Final

from flask import Flask, Response, current_app, jsonify, request
from werkzeug.exceptions import HTTPException
from werkzeug.http import HTTP_STATUS_CODES

from dbpool._http import retry_after
from dbpool.errors import (
    CommitUncertain,
    DatabaseUnavailable,
    PoolClosed,
    PoolError,
    PoolExhausted,
    PoolTimeout,
    TooManyRequests,
)
from dbpool.flask._rate_limit import RateLimit, times

logger = logging.getLogger("dbpool")

_ERRORS: Final = (PoolError, PoolClosed, TooManyRequests)
# Attributes in which libraries keep the driver's error that they wrap, beside `__cause__`.
_WRAPPED_ERRORS: Final = ("orig", "original_exc")
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
    """Answer a pool's errors with 503, as JSON or HTML, by the client's `Accept`.

    That includes errors of libraries that wrap them. The application's own handlers for the same
    exceptions stay in place, and so does one for psycopg_pool's `PoolTimeout`.
    """
    existing = app.error_handler_spec[None][None]
    answer = partial(_answer, RateLimit())
    for error in _ERRORS:
        if error not in existing:
            app.register_error_handler(error, answer)
    # The least specific handler of all: the application's own handlers come first.
    if Exception not in existing:
        app.register_error_handler(Exception, _answer_wrapped)


def _answer_wrapped(exc: Exception) -> Any:
    """Answer an exception that wraps a pool's error; raise any other as if it were unhandled."""
    if isinstance(exc, HTTPException):
        return _answer_http(exc)
    found = _wrapped(exc)
    if found is None:
        raise exc
    return current_app.handle_user_exception(found)


def _answer_http(exc: HTTPException) -> Any:
    """Answer as without this handler, unless it is Flask's own 500 for a pool's error.

    Flask looks for no other handler of an error that is raised around the view: by a session, say,
    or a function of after_request. Its 500 for any other error comes here a second time.
    """
    original = getattr(exc, "original_exception", None)
    if original is None and current_app.trap_http_exception(exc):
        raise exc
    found = None if isinstance(original, HTTPException) else _wrapped(original)
    with suppress(Exception):  # of the application's own handler, for which there is none
        return exc if found is None else current_app.handle_user_exception(found)
    return exc


def _wrapped(exc: object, depth: int = 0) -> Exception | None:
    """Return the pool's error that *exc* wraps, if there is one.

    SQLAlchemy, Django and others chain it as the cause; peewee and pony keep it as an attribute.
    `__context__` does not count: an error raised without `from` does not wrap the one it followed.
    """
    if depth > _MAX_DEPTH or not isinstance(exc, Exception):
        return None
    if isinstance(exc, _ERRORS):
        return exc
    if isinstance(exc, ExceptionGroup):  # of a task group; if it holds a bug too, it is a bug
        members = [_wrapped(each, depth + 1) for each in exc.exceptions]
        return members[0] if all(members) else None
    candidates = [exc.__cause__, *(vars(exc).get(name) for name in _WRAPPED_ERRORS)]
    found = (_wrapped(each, depth + 1) for each in candidates)
    return next(filter(None, found), None)


def _answer(limit: RateLimit, exc: Exception) -> Any:
    # More general than ours, and so not found by Flask; code written for psycopg_pool has it.
    own = current_app.error_handler_spec[None][None].get(PoolTimeout)
    if own is not None and isinstance(exc, PoolTimeout):
        return current_app.ensure_sync(own)(exc)
    # The client learns no more than it needs: hosts, roles and holders stay in the log. For errors
    # that many requests get at once the pool logs one line per episode.
    status = 500 if isinstance(exc, CommitUncertain) else 503
    if not isinstance(exc, (DatabaseUnavailable, PoolExhausted, TooManyRequests)):
        _log(exc, status, limit)
    if isinstance(exc, CommitUncertain):
        reason = "the outcome of the request is unknown"
    elif isinstance(exc, DatabaseUnavailable):
        reason = "the database is unavailable"
    else:
        reason = "the service is busy"
    if prefers_html():
        title = f"{status} {HTTP_STATUS_CODES[status]}"
        page = _PAGE.format(title=title, reason=reason.capitalize())
        answer = Response(page, mimetype="text/html")
    else:
        answer = json_error(status, reason)
    answer.status_code = status
    answer.headers["Cache-Control"] = "no-store"
    answer.headers["X-Content-Type-Options"] = "nosniff"
    if status == 503:  # not 500: what may have been committed must not be tried again
        answer.headers["Retry-After"] = retry_after(getattr(exc, "retry_after", 0.0))
    return answer


def _log(exc: Exception, status: int, limit: RateLimit) -> None:
    """Log what the pool does not; a closed one once a minute, for it answers every request."""
    name, is_closed = type(exc).__name__, isinstance(exc, PoolClosed)
    if count := limit.count((name, request.endpoint)) if is_closed else 1:
        text = "endpoint %s answers %d: %s: %s%s"
        logger.warning(text, request.endpoint, status, name, exc, times(count))


def prefers_html() -> bool:
    """Whether the client would rather have HTML than JSON: a browser that opens a page."""
    try:
        wanted = request.accept_mimetypes.best_match(["application/json", "text/html"])
    except Exception:  # noqa: BLE001  # parsers fail in many ways at what a stranger sends
        return False
    return wanted == "text/html"


def json_error(status: int, reason: str) -> Response:
    """Make an answer in JSON that says what is wrong."""
    answer = jsonify(error=reason)
    answer.status_code = status
    return answer
