"""Every error of the application as JSON: `{"error": "the reason"}`."""

from __future__ import annotations

import random

import psycopg
from flask import Flask, Response, jsonify
from werkzeug.exceptions import HTTPException, InternalServerError


def init_app(app: Flask) -> None:
    """Register the handlers; dbpool's handlers for its own errors are more specific and win."""
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(psycopg.OperationalError, _operational)
    app.register_error_handler(psycopg.errors.UndefinedTable, _undefined_table)


def _http(exc: HTTPException) -> Response:
    # Its own response has the headers that belong to the status: Allow, WWW-Authenticate …
    response = exc.get_response()
    reason = exc.description or exc.name
    if isinstance(exc, InternalServerError):
        reason = "internal error"
    answer = jsonify(error=reason)
    answer.status_code = response.status_code
    for key, value in response.headers.items():
        if key.lower() not in {"content-type", "content-length"}:
            answer.headers[key] = value
    return answer


def _operational(exc: psycopg.OperationalError) -> Response:
    """Answer for a statement that did not end: lost connection, timeout, shutdown."""
    return _unavailable("the database did not complete the request")


def _undefined_table(exc: psycopg.errors.UndefinedTable) -> Response:
    return _unavailable("the tables are missing: run python -m webapp.schema")


def _unavailable(reason: str) -> Response:
    answer = jsonify(error=reason)
    answer.status_code = 503
    # Random, so that clients do not all come back at once.
    answer.headers["Retry-After"] = str(random.randint(1, 3))  # noqa: S311  # no secret
    return answer
