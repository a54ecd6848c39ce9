"""Decides which clients may see more than status words.

A client's address never counts: behind a proxy all clients are local.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from flask import current_app, request
from werkzeug import Response as AnyResponse
from werkzeug.exceptions import HTTPException

from dbpool._sign_in import denial, status_of
from dbpool.flask._errors import json_error, prefers_html
from dbpool.flask._extension import KEY, State
from dbpool.flask._signing import show_form

logger = logging.getLogger("dbpool")

Authorize = Callable[[], object]
View = Callable[[State], AnyResponse]


def public(view: View) -> Callable[[], AnyResponse]:
    """Make a view function for Flask, open to everybody."""

    @wraps(view)
    def run() -> AnyResponse:
        return view(current_app.extensions[KEY])  # registering the blueprint has checked this

    return run


def restricted(view: View, authorize: Authorize | None) -> Callable[[], AnyResponse]:
    """Make a view function for Flask, only for clients that may see details."""

    @wraps(view)
    def run() -> AnyResponse:
        own: State = current_app.extensions[KEY]
        denied = access_denied(own, authorize)
        return view(own) if denied is None else denied

    return run


def access_denied(own: State, authorize: Authorize | None) -> AnyResponse | None:
    """Return the response for a client that may not see details, None for one that may.

    The application's own *authorize* decides if there is one, else the token: 401 if a token
    would help, 403 if none is set. A browser gets the form.
    """
    if authorize is not None:
        return _call(authorize)
    if own.settings.details == "always" or not (denied := denial(own.sign_in, request.headers)):
        return None
    if prefers_html():
        return show_form(denied.problem)
    answer = json_error(status_of(denied.problem), denied.reason)
    for challenge in denied.challenges:
        answer.headers.add("WWW-Authenticate", challenge)
    return answer


def _call(authorize: Authorize) -> AnyResponse | None:
    """Call the application's function. Only True gives access, so that a mistake does not."""
    verdict = current_app.ensure_sync(authorize)()
    if verdict is True:
        return None
    if verdict is False or verdict is None:
        return json_error(403, "forbidden")
    if isinstance(verdict, HTTPException):
        raise verdict  # the application's error handlers may have an answer for it
    if isinstance(verdict, (AnyResponse, tuple)) and (answer := _response(verdict)) is not None:
        return answer
    if inspect.iscoroutine(verdict):
        verdict.close()  # otherwise Python warns that it was never awaited
    logger.error(
        "authorize returned %s: it must return True, False, None, a response (as views return"
        " it), or an HTTPException; access is denied",
        type(verdict).__name__,
    )
    return json_error(500, "access could not be decided")


def _response(verdict: Any) -> AnyResponse | None:
    """Make a response from what *authorize* returned, such as a redirect; None if it is not one."""
    try:
        answer = current_app.make_response(verdict)
    except Exception:  # noqa: BLE001  # a tuple may hold anything
        return None
    return answer if 200 <= answer.status_code <= 599 else None
