"""The blueprint: health, statistics, metrics and the live page."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Final

from flask import Blueprint, Response, abort, jsonify, render_template, request
from flask.blueprints import BlueprintSetupState

from dbpool.flask._access import Rule, is_trusted, refusal
from dbpool.flask._errors import retry_after
from dbpool.flask._extension import KEY, state
from dbpool.health import Readiness

View = Callable[[], Response]

_CSP: Final = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"


def create_blueprint(name: str = "dbpool", authorize: Rule | None = None) -> Blueprint:
    """Make the blueprint, to be registered after `DBPool.init_app`.

    *authorize* takes the place of the token: called in the request, what it returns says
    whether details may be seen.
    """
    blueprint = Blueprint(name, __name__, template_folder="templates", static_folder="static")
    blueprint.record_once(_insist_on_init_app)
    blueprint.after_request(_forbid_storing)

    def trusted(view: View) -> View:
        @wraps(view)
        def guarded() -> Response:
            settings = state().settings
            return view() if is_trusted(settings, authorize) else refusal(settings, authorize)

        return guarded

    def health() -> Response:
        if not is_trusted(state().settings, authorize):
            return _ready()
        detail = state().health.detail()
        answer = jsonify(detail)
        answer.status_code = 200 if detail["status"] in ("up", "degraded") else 503
        return answer

    def index() -> Response:
        answer = Response(render_template("dbpool/live.html", name=name))
        answer.headers["Content-Security-Policy"] = _CSP
        answer.headers["X-Content-Type-Options"] = "nosniff"
        return answer

    views: dict[str, View] = {
        "/health/live": _live,
        "/health/ready": _ready,
        "/health": health,
        "/stats": trusted(_stats),
        "/metrics": trusted(_metrics),
        "/": trusted(index),
    }
    for rule, view in views.items():
        blueprint.add_url_rule(
            rule, view.__name__.lstrip("_"), view, strict_slashes=False, methods=["GET"]
        )
    return blueprint


def _insist_on_init_app(setup: BlueprintSetupState) -> None:
    if KEY not in setup.app.extensions:
        raise RuntimeError("call DBPool().init_app(app) before registering dbpool's blueprint")


def _forbid_storing(response: Response) -> Response:
    if not (request.endpoint or "").endswith(".static"):
        response.headers.setdefault("Cache-Control", "no-store")
    return response


def _live() -> Response:
    return jsonify(state().health.live())


def _ready() -> Response:
    ready: Readiness = state().health.ready()
    answer = jsonify(ready.to_json())
    if not ready.is_ready:
        answer.status_code = 503
        answer.headers["Retry-After"] = retry_after(ready.retry_after)
    return answer


def _scope() -> str:
    scope = request.args.get("scope", "all")
    if scope not in ("all", "process"):
        abort(400, "scope is all or process")
    return scope


def _stats() -> Response:
    return jsonify(state().processes.report(_scope()))


def _metrics() -> Response:
    from dbpool.prometheus import expose

    body, content_type = expose(
        state().processes.report(_scope()), request.headers.get("Accept", "")
    )
    return Response(body, content_type=content_type)
