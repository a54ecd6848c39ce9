"""Who may see more than status words.

Never decided by address: behind a proxy all clients are local.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from flask import Response, current_app, jsonify, request
from werkzeug import Response as AnyResponse
from werkzeug.exceptions import HTTPException

from dbpool._sign_in import CLOSED
from dbpool.flask._errors import prefers_html
from dbpool.flask._extension import KEY, State
from dbpool.flask._signing import ask_for_token, is_signed_in

logger = logging.getLogger("dbpool")

Authorize = Callable[[], object]
View = Callable[[State], AnyResponse]


def public(view: View) -> Callable[[], AnyResponse]:
    """Make a view function for Flask, open to everybody."""

    @wraps(view)
    def run() -> AnyResponse:
        return view(current_app.extensions[KEY])  # `create_blueprint` has made sure of it

    return run


def restricted(view: View, authorize: Authorize | None) -> Callable[[], AnyResponse]:
    """Make a view function for Flask, only for clients that may see details."""

    @wraps(view)
    def run() -> AnyResponse:
        own: State = current_app.extensions[KEY]
        denied = access_denied(own, authorize)
        if denied is None:
            return view(own)
        if authorize is None and prefers_html():
            return ask_for_token(own, is_wrong=_offered_token() is not None)
        return denied

    return run


def access_denied(own: State, authorize: Authorize | None) -> AnyResponse | None:
    """Return the response for a client that may not see details, None for one that may.

    The application's own *authorize* decides if there is one, else the token: 401 if a token
    would help, 403 if none is set.
    """
    settings = own.settings
    if authorize is not None:
        return _call(authorize)
    if settings.details == "always":
        return None
    if not settings.token:
        return _error(403, CLOSED)
    assert own.sign_in is not None
    offered = _offered_token()
    if is_signed_in(own) or (offered is not None and own.sign_in.is_token(offered)):
        return None
    reason = "send the token as a Bearer token, or as the password of HTTP Basic"
    answer = _error(401, reason if offered is None else f"wrong token: {reason}")
    if "X-Requested-With" not in request.headers:  # the page, whose reader sees no dialog
        answer.headers.add("WWW-Authenticate", 'Basic realm="dbpool", charset="UTF-8"')
    answer.headers.add("WWW-Authenticate", 'Bearer realm="dbpool"')
    return answer


def _call(authorize: Authorize) -> AnyResponse | None:
    """Call the application's function. Only True gives access: a mistake in it must not."""
    verdict = current_app.ensure_sync(authorize)()
    if verdict is True:
        return None
    if verdict is False or verdict is None:
        return _error(403, "forbidden")
    if isinstance(verdict, HTTPException):
        raise verdict  # the application's error handlers may have an answer for it
    if isinstance(verdict, (AnyResponse, tuple)) and (answer := _response(verdict)) is not None:
        return answer
    if inspect.iscoroutine(verdict):
        verdict.close()  # else Python warns that it was never awaited
    logger.error(
        "authorize returned %s: it must return True, False or None, a response as a view may"
        " return it, or an HTTPException; nothing is shown",
        type(verdict).__name__,
    )
    return _error(500, "access could not be decided")


def _response(verdict: Any) -> AnyResponse | None:
    """Make a response of what *authorize* returned, such as a redirect; None if it is none."""
    try:
        answer = current_app.make_response(verdict)
    except Exception:  # noqa: BLE001  # a tuple may hold anything
        return None
    return answer if 200 <= answer.status_code <= 599 else None


def _offered_token() -> bytes | None:
    """Return the token that the client sent; None if there is none, or it cannot be read."""
    try:
        given = request.authorization
        if given is None:
            return None
        offered = {"bearer": given.token, "basic": given.password}.get(given.type)
        return None if offered is None else offered.encode()
    except Exception:  # noqa: BLE001  # parsers fail in many ways at what a stranger sends
        return None


def _error(status: int, reason: str) -> Response:
    answer = jsonify(error=reason)
    answer.status_code = status
    return answer
