"""Who may see more than status words. Never judged by address: behind a proxy all are local."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from flask import Response, current_app, jsonify, request
from werkzeug import Response as AnyResponse

from dbpool.app_settings import AppSettings

Rule = Callable[[], object]


def refusal(settings: AppSettings, authorize: Rule | None) -> AnyResponse | None:
    """Return the answer for who may not see details, None for who may.

    The application's own rule decides if there is one, else the token: 401 where one would
    help, 403 where none is set.
    """
    if authorize is not None:
        return _ruled(authorize)
    if settings.details == "always" or _has_token(settings.token):
        return None
    if not settings.token:
        return _refused(403, "closed: set DBPOOL_TOKEN, and send it, to see this")
    answer = _refused(401, "a token is needed")
    answer.headers.add("WWW-Authenticate", 'Basic realm="dbpool", charset="UTF-8"')
    answer.headers.add("WWW-Authenticate", 'Bearer realm="dbpool"')
    return answer


def _ruled(authorize: Rule) -> AnyResponse | None:
    verdict = current_app.ensure_sync(authorize)()
    if isinstance(verdict, (AnyResponse, tuple)):  # such as a redirect to a login page
        return current_app.make_response(verdict)
    return None if verdict else _refused(403, "forbidden")


def _has_token(token: str | None) -> bool:
    given = request.authorization
    if not token or given is None:
        return False
    if given.type == "bearer":
        offered = given.token
    elif given.type == "basic":
        offered = given.password
    else:
        return False
    return hmac.compare_digest((offered or "").encode(), token.encode())


def _refused(status: int, reason: str) -> Response:
    answer = jsonify(error=reason)
    answer.status_code = status
    return answer
