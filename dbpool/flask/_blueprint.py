"""The blueprint: health, statistics, metrics and the live page."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from typing import Any, Final, NoReturn

from flask import Blueprint, Response, abort, jsonify, render_template, request
from flask.blueprints import BlueprintSetupState
from werkzeug import Response as AnyResponse

from dbpool._secrets import conceal
from dbpool.databases import shown_name
from dbpool.errors import ConfigError
from dbpool.flask._access import Authorize, access_denied
from dbpool.flask._errors import retry_after
from dbpool.flask._extension import KEY, state
from dbpool.health import DEGRADED, UP

logger = logging.getLogger("dbpool")

View = Callable[[], AnyResponse]

# Everything the page loads comes from here, none of it inline.
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}
_PAGE: Final = "dbpool/live.html"


class _Blueprint(Blueprint):
    def send_static_file(self, filename: str) -> Response:
        try:
            return super().send_static_file(filename)
        except OSError as ex:
            if ex.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            _refuse(503, "no file can be opened: too many are open")


def create_blueprint(name: str = "dbpool", authorize: Authorize | None = None) -> Blueprint:
    """Make the blueprint, to be registered after `DBPool.init_app`.

    *authorize* takes the place of the token: it is called in the request. Only True shows the
    details; False and None refuse them with 403. A response, what else a view may return as a
    tuple, or an `HTTPException`, returned or raised, is the answer instead. Anything else is an
    error: it is logged, answered with 500, and shows nothing.
    """
    authorize = conceal(authorize)
    if authorize is not None and not callable(authorize):
        raise TypeError(f"authorize must be callable, not {shown_name(authorize)}")
    blueprint = _Blueprint(name, __name__, template_folder="templates", static_folder="static")
    blueprint.record_once(_prepare)
    blueprint.record(_protect_errors)
    blueprint.after_request(_protect)

    def trusted(view: View) -> View:
        @wraps(view)
        def guarded() -> AnyResponse:
            refused = access_denied(state().settings, authorize)
            return view() if refused is None else refused

        return guarded

    def health() -> AnyResponse:
        try:
            is_stranger = access_denied(state().settings, authorize) is not None
        except Exception as ex:  # noqa: BLE001  # a rule may abort, or need the database that is down
            logger.info("health is told in words only: %s", type(ex).__name__)
            is_stranger = True
        return _ready() if is_stranger else _detail()

    views: dict[str, View] = {
        "/health/live": _live,
        "/health/ready": _ready,
        "/health": health,
        "/stats": trusted(_stats),
        "/metrics": trusted(_metrics),
        "/": trusted(_index),
    }
    for rule, view in views.items():
        # A probe takes a redirect for an answer: with or without the last slash is the same.
        blueprint.add_url_rule(
            rule, view.__name__.lstrip("_"), view, strict_slashes=False, methods=["GET"]
        )
    return blueprint


def _prepare(setup: BlueprintSetupState) -> None:
    if KEY not in setup.app.extensions:
        raise RuntimeError("call DBPool().init_app(app) before registering dbpool's blueprint")
    # Loaded now: when the process has no file descriptor left, it could not be loaded any more,
    # and that is when the numbers are wanted. What is wrong with them is told when they are used.
    with suppress(Exception):
        setup.app.jinja_env.get_template(_PAGE)
    with suppress(Exception):
        import dbpool.prometheus  # noqa: F401


def _protect(response: Response) -> Response:
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    if not (request.endpoint or "").endswith(".static"):
        response.headers.setdefault("Cache-Control", "no-store")
    return response


def _protect_errors(setup: BlueprintSetupState) -> None:
    """Protect what the application answers below the blueprint's prefix: 404 and 405."""
    prefix = f"{setup.url_prefix or ''}/"

    def protect(response: Response) -> Response:
        is_ours = request.url_rule is None and request.path.startswith(prefix)
        return _protect(response) if is_ours else response

    if prefix != "/":
        setup.app.after_request(protect)


def _live() -> AnyResponse:
    return jsonify(state().health.live())


def _ready() -> AnyResponse:
    ready = state().health.ready()
    return _judged(ready.to_json(), ready.retry_after)


def _detail() -> AnyResponse:
    detail = state().health.detail()
    return _judged(detail, detail["retry_after"])


def _judged(health: Mapping[str, Any], seconds: float | None) -> Response:
    answer = jsonify(health)
    if health["status"] not in (UP, DEGRADED):
        answer.status_code = 503
        answer.headers["Retry-After"] = retry_after(seconds)
    return answer


def _stats() -> AnyResponse:
    return jsonify(state().processes.report(_scope()))


def _metrics() -> AnyResponse:
    try:
        from dbpool.prometheus import expose
    except ConfigError as ex:  # the package is not installed; the message names it
        _refuse(501, str(ex))
    report = state().processes.collect(_scope())
    body, content_type = expose(report, request.headers.get("Accept", ""))
    return Response(body, content_type=content_type)


def _index() -> AnyResponse:
    return Response(render_template(_PAGE), headers=_HEADERS, mimetype="text/html")


def _scope() -> str:
    scope = request.args.get("scope", "all")
    if scope not in ("all", "process"):
        _refuse(400, "scope is all or process")
    return scope


def _refuse(status: int, reason: str) -> NoReturn:
    answer = jsonify(error=reason)
    answer.status_code = status
    abort(answer)
