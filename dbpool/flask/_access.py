"""Who may see more than status words. Never judged by address: behind a proxy all are local."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from flask import Response, jsonify, request

from dbpool.settings import AppSettings

Rule = Callable[[], object]


def is_trusted(settings: AppSettings, authorize: Rule | None) -> bool:
    """Whether the request at hand may see details: by the application's rule, else by token."""
    if authorize is not None:
        return bool(authorize())
    return settings.details == "always" or _has_token(settings.token)


def _has_token(token: str | None) -> bool:
    given = request.authorization
    if token is None or given is None:
        return False
    if given.type == "bearer":
        offered = given.token
    elif given.type == "basic":
        offered = given.password
    else:
        return False
    return hmac.compare_digest((offered or "").encode(), token.encode())


def refusal(settings: AppSettings, authorize: Rule | None) -> Response:
    """The answer for who may not: 401 where a token would help, else 403."""
    if settings.token is None or authorize is not None:
        answer = jsonify(error="forbidden")
        answer.status_code = 403
        return answer
    answer = jsonify(error="a token is needed")
    answer.status_code = 401
    answer.headers.add("WWW-Authenticate", 'Basic realm="dbpool", charset="UTF-8"')
    answer.headers.add("WWW-Authenticate", 'Bearer realm="dbpool"')
    return answer
