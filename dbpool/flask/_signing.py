"""Signing in and out in a browser: the form, and the cookie that stands for the token."""

from __future__ import annotations

from flask import Response, redirect, request, url_for
from werkzeug import Response as AnyResponse

from dbpool._sign_in import (
    FOREIGN,
    MAX_BODY,
    MISSING,
    PAGE_HEADERS,
    UNMEASURED,
    came_by_https,
    form_for,
    is_cross_site,
    is_signed_in,
)
from dbpool.flask._errors import json_error
from dbpool.flask._extension import State
from dbpool.flask._pages import render_page


def sign_in(own: State) -> AnyResponse:
    """Sign in a browser that sends the form with the token; show the form to any other."""
    is_known = own.settings.details == "always" or is_signed_in(own.sign_in, request.headers)
    if own.sign_in is None or is_known:
        return redirect(url_for(".index"), 303)
    if request.method != "POST":
        return show_form(MISSING, 200)
    if is_cross_site(request.headers):
        return json_error(403, FOREIGN)
    # Without a length it could be endless.
    if request.content_length is None or request.content_length > MAX_BODY:
        return json_error(413, UNMEASURED)
    problem = own.sign_in.attempt(request.form.get("token", ""))
    if problem is not None:
        return show_form(problem)
    answer = redirect(url_for(_next_view()), 303)
    cookie = own.sign_in.issue(url_for(".index"), is_secure=_is_secure())
    answer.headers.add("Set-Cookie", cookie)
    return answer


def sign_out(own: State) -> AnyResponse:
    """Have the browser forget its cookie."""
    if own.sign_in is None:
        return redirect(url_for(".index"), 303)
    if is_cross_site(request.headers):
        return json_error(403, FOREIGN)
    answer = redirect(url_for(".sign_in"), 303)
    cookie = own.sign_in.withdraw(url_for(".index"), is_secure=_is_secure())
    answer.headers.add("Set-Cookie", cookie)
    return answer


def show_form(problem: str, status: int | None = None) -> AnyResponse:
    """Show the form that asks for the token, with what was wrong about the request."""
    form = form_for(problem, request.headers, status)
    page = render_page("sign-in.html", next=_next_view().lstrip("."), **form.values)
    return Response(page, form.status, PAGE_HEADERS | form.headers, mimetype="text/html")


def _next_view() -> str:
    """Return the view that was asked for."""
    wanted = request.form.get("next") or (request.endpoint or "").rpartition(".")[2]
    return f".{wanted}" if wanted in ("stats", "metrics") else ".index"


def _is_secure() -> bool:
    return request.is_secure or came_by_https(request.headers)
