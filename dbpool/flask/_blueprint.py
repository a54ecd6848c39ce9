"""The blueprint: health, statistics, metrics and the live page."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, NoReturn

from flask import Blueprint, Response, abort, jsonify, request
from flask.blueprints import BlueprintSetupState
from werkzeug import Response as AnyResponse
from werkzeug.exceptions import HTTPException

from dbpool._http import retry_after
from dbpool._secrets import conceal
from dbpool._sign_in import PAGE_HEADERS, is_signed_in
from dbpool.databases import safe_name
from dbpool.errors import ConfigError
from dbpool.flask._access import Authorize, access_denied, public, restricted
from dbpool.flask._errors import json_error
from dbpool.flask._extension import KEY, State
from dbpool.flask._pages import render_page, template
from dbpool.flask._rate_limit import times
from dbpool.flask._signing import sign_in, sign_out
from dbpool.metrics import PoolState
from dbpool.monitor import Query

logger = logging.getLogger("dbpool")

_PAGE: Final = "live.html"
_PATHS: Final = ("/health/live", "/health/ready", "/health", "/stats", "/metrics", "/", "/sign-in",
                 "/sign-out")  # fmt: skip


class _Blueprint(Blueprint):
    def register(self, app: Any, options: dict[str, Any]) -> None:
        if not (options.get("url_prefix") or "").strip("/"):
            # Without a prefix, Flask finds the application's own static files in place of these.
            self.static_url_path = "/dbpool-static"
        super().register(app, options)

    def send_static_file(self, filename: str) -> Response:
        try:
            return super().send_static_file(filename)
        except OSError as ex:
            if ex.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            _refuse(503, "too many files are open")


def create_blueprint(name: str = "dbpool", authorize: Authorize | None = None) -> Blueprint:
    """Create the blueprint; register it after `DBPool.init_app`.

    *authorize* replaces the token and is called in the request. Only True opens the detailed views;
    False and None are answered with 403. A response, a tuple as a view may return it, or an
    `HTTPException`, returned or raised, becomes the answer. Anything else is an error: it is
    logged, and answered with 500.
    """
    authorize = conceal(authorize)
    if authorize is not None and not callable(authorize):
        raise TypeError(f"authorize must be callable, not {safe_name(authorize)}")
    blueprint = _Blueprint(name, __name__, static_folder="static")
    blueprint.record_once(_prepare)
    blueprint.record(_harden_errors)
    blueprint.after_request(_harden)

    def health(own: State) -> AnyResponse:
        try:
            is_denied = access_denied(own, authorize) is not None
        except HTTPException:  # its answer to those who may not see details
            is_denied = True
        except Exception as ex:  # noqa: BLE001  # it may need the database that is down
            is_denied, kind = True, type(ex).__name__
            if count := own.repeats.count(("authorize", kind)):
                logger.info("health shows status words only: %s%s", kind, times(count))
        return _ready(own) if is_denied else _detail(own)

    views = (
        public(_live),
        public(_ready),
        public(health),
        restricted(_stats, authorize),
        restricted(_metrics, authorize),
        restricted(_index, authorize),
    )
    for rule, view in zip(_PATHS, views, strict=False):
        # No redirect to the path with or without a slash: a probe takes it for an answer.
        blueprint.add_url_rule(
            rule, view.__name__.lstrip("_"), view, strict_slashes=False, methods=["GET"]
        )
    # An application with a function of its own has its own way to sign in, too.
    forms = (sign_in, sign_out) if authorize is None else (_not_found, _not_found)
    blueprint.add_url_rule("/sign-in", "sign_in", public(forms[0]), methods=["GET", "POST"])
    blueprint.add_url_rule("/sign-out", "sign_out", public(forms[1]), methods=["POST"])
    return blueprint


def _prepare(setup: BlueprintSetupState) -> None:
    if KEY not in setup.app.extensions:
        raise RuntimeError("call DBPool().init_app(app) before registering dbpool's blueprint")
    # Loaded now: later the process may have run out of file descriptors, and just then the numbers
    # are needed. An error here is raised again when the view is used.
    with suppress(Exception):
        template(_PAGE)
    with suppress(Exception):
        import dbpool.prometheus  # noqa: F401


def _harden(response: Response) -> Response:
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    if not (request.endpoint or "").endswith(".static"):
        response.headers.setdefault("Cache-Control", "no-store")
    return response


def _harden_errors(setup: BlueprintSetupState) -> None:
    """Harden what the application answers in the blueprint's place: 404 and 405."""
    base = (setup.url_prefix or "").rstrip("/")

    def harden(response: Response) -> Response:
        path = request.path.removeprefix(base)
        is_below = request.path.startswith(base) and path[:1] in ("", "/")
        is_ours = is_below if base else path in _PATHS
        return _harden(response) if is_ours and request.url_rule is None else response

    setup.app.after_request(harden)


def _live(own: State) -> AnyResponse:
    return jsonify(own.health.live())


def _ready(own: State) -> AnyResponse:
    ready = own.health.ready()
    return _health_response(ready.to_json(), ready.retry_after)


def _detail(own: State) -> AnyResponse:
    detail = own.health.detail() | {"findings": own.monitor.findings()}
    return _health_response(detail, detail["retry_after"])


def _health_response(health: Mapping[str, Any], seconds: float | None) -> Response:
    answer = jsonify(health)
    if health["status"] not in (PoolState.UP, PoolState.DEGRADED):
        answer.status_code = 503
        answer.headers["Retry-After"] = retry_after(seconds)
    return answer


def _stats(own: State) -> AnyResponse:
    query = _query()
    found = own.processes.collect(query.scope, usage="endpoints" in query.include)
    report = own.monitor.extend(found, query.include)
    if "servers" in query.include:
        report["servers"] |= own.health.servers()
    return jsonify(query.trim(report))


def _metrics(own: State) -> AnyResponse:
    try:
        from dbpool.prometheus import expose
    except ConfigError as ex:  # the package is not installed; the message names it
        _refuse(501, str(ex))
    report = own.processes.collect(_query().scope, usage=own.settings.endpoint_metrics)
    findings = own.monitor.findings()
    body, content_type = expose(report, request.headers.get("Accept", ""), findings)
    return Response(body, content_type=content_type)


def _index(own: State) -> AnyResponse:
    hidden = "" if is_signed_in(own.sign_in, request.headers) else "hidden"
    page = render_page(_PAGE, hidden=hidden)
    return Response(page, headers=PAGE_HEADERS, mimetype="text/html")


def _not_found(own: State) -> AnyResponse:
    abort(404)


def _query() -> Query:
    try:
        return Query.parse_all(request.args.to_dict(flat=False))
    except ValueError as ex:
        _refuse(400, str(ex))


def _refuse(status: int, reason: str) -> NoReturn:
    abort(json_error(status, reason))
