"""The parts of answers: JSON, the blueprint's templates, and the files that they load."""

from __future__ import annotations

import json
import mimetypes
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qs

from dbpool import _sign_in
from dbpool._http import FILES, read_template, render

STATIC: Final = re.compile(r"/static/([a-z-]+\.(?:js|css|svg))")
_PATHS: Final = {"index": "/", "stats": "/stats", "sign_in": "/sign-in", "sign_out": "/sign-out"}
_PREFIX: Final = re.compile(r"(?:/[\w.~-]{1,99}){1,9}", re.ASCII)  # in X-Forwarded-Prefix
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    **_sign_in.PAGE_HEADERS,
}


@dataclass(frozen=True)
class Response:
    """An answer; `headers` are in addition to those that every answer has."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def all_headers(self) -> dict[str, str]:
        """Return all headers, in the order to send them."""
        known = {"Content-Type": self.content_type, "Content-Length": str(len(self.body))}
        return {**known, **_HEADERS, **self.headers}


def read_form(form: bytes) -> tuple[str, str]:
    """Return the token in a form, and the view to show after it."""
    try:
        fields = parse_qs(form.decode("ascii", "replace"), max_num_fields=9)
    except ValueError:
        return "", ""
    return fields.get("token", [""])[0], fields.get("next", [""])[0]


def form_page(
    problem: str, headers: Mapping[str, str], wanted: str = "", status: int | None = None
) -> Response:
    """Return the form that asks for the token, with what was wrong about the request."""
    form = _sign_in.form_for(problem, headers, status)
    return page("sign-in.html", headers, form.status, form.headers, next=wanted, **form.values)


def page(
    name: str,
    headers: Mapping[str, str],
    status: int = 200,
    more: Mapping[str, str] | None = None,
    /,
    **values: str,
) -> Response:
    """Fill in a template of the blueprint."""
    prefix = prefix_of(headers)

    def url_for(view: str, file: str | None) -> str:
        return prefix + (f"/static/{file}" if file else _PATHS[view])

    page = render(read_template(name), url_for, **values)
    return Response(status, page.encode(), "text/html; charset=utf-8", more or {})


def redirect(path: str, headers: Mapping[str, str], cookie: str = "") -> Response:
    more = {"Location": prefix_of(headers) + path}
    return Response(303, b"", headers=more | ({"Set-Cookie": cookie} if cookie else {}))


def prefix_of(headers: Mapping[str, str]) -> str:
    """Return the path prefix that a proxy in front has removed, "" if there is none."""
    prefix = headers.get("x-forwarded-prefix", "").rstrip("/")
    return prefix if _PREFIX.fullmatch(prefix) else ""


def static_file(name: str) -> Response:
    try:
        body = (FILES / "static" / name).read_bytes()
    except OSError:
        return json_answer(404, error="there is no such file")
    return Response(200, body, mimetypes.guess_type(name)[0] or "application/octet-stream")


def json_answer(
    status: int, headers: Mapping[str, str] | None = None, /, **content: Any
) -> Response:
    return Response(
        status, json.dumps(content, separators=(",", ":")).encode(), headers=headers or {}
    )
