"""Checks what a client sent; invalid input is answered with 400 and a reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flask import abort, request
from werkzeug.exceptions import BadRequest

MAX_BIGINT = 2**63 - 1
MAX_TITLE, MAX_BODY = 200, 20_000


@dataclass(frozen=True, slots=True)
class Draft:
    """A note as a client wrote it; `version` is the version that the client had read."""

    title: str
    body: str = ""
    version: int | None = None

    @classmethod
    def from_request(cls, *, versioned: bool = False) -> Draft:
        sent = _json_object()
        wanted = {"title", "body", "version"} if versioned else {"title", "body"}
        if unknown := sorted(sent.keys() - wanted):
            abort(400, f"unknown field {unknown[0][:50]!r}")
        return cls(
            title=_title(sent),
            body=_text(sent, "body", MAX_BODY),
            version=_version(sent) if versioned else None,
        )


def number_in_query(name: str, default: int, *, lowest: int, highest: int) -> int:
    number = number_or_none(name, lowest=lowest, highest=highest)
    return default if number is None else number


def number_or_none(name: str, *, lowest: int, highest: int) -> int | None:
    """Return a parameter of the query string, None if it is missing."""
    given = request.args.get(name)
    if given is None:
        return None
    # A bigint has at most 19 digits. int() alone would also accept spaces, signs and underscores.
    is_number = given.isascii() and given.isdigit() and len(given) <= 19
    if not is_number or not lowest <= int(given) <= highest:
        abort(400, f"{name} must be a number from {lowest} to {highest}")
    return int(given)


def _json_object() -> dict[str, Any]:
    if not request.is_json:
        abort(400, "the body must be JSON, sent with Content-Type: application/json")
    # A body that is sent in chunks, without a length, is cut at the limit.
    limit = request.max_content_length
    if request.content_length is None and limit and len(request.get_data()) >= limit:
        abort(413)
    try:
        sent = request.get_json()
    except (BadRequest, RecursionError):
        abort(400, "the body is not valid JSON")
    if not isinstance(sent, dict):
        abort(400, "the body must be a JSON object")
    return sent


def _title(sent: dict[str, Any]) -> str:
    title = _text(sent, "title", MAX_TITLE).strip()
    return title or abort(400, "title is missing or empty")


def _text(sent: dict[str, Any], name: str, max_length: int) -> str:
    text = sent.get(name, "")
    if not isinstance(text, str):
        abort(400, f"{name} must be a string")
    if len(text) > max_length:
        abort(400, f"{name} must not be longer than {max_length} characters")
    # PostgreSQL cannot store NUL or surrogates; JSON can contain both, as \u0000 and \ud800.
    if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in text):
        abort(400, f"{name} contains a character that cannot be stored")
    return text


def _version(sent: dict[str, Any]) -> int:
    version = sent.get("version")
    if not isinstance(version, int) or isinstance(version, bool):
        abort(400, "version must be given: the number of the version that was read")
    if not 1 <= version <= MAX_BIGINT:
        abort(400, f"version must be a number from 1 to {MAX_BIGINT}")
    return version
