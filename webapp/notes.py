"""The notes API, in JSON: a request that succeeds takes one statement in one round trip."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, abort, jsonify, make_response, url_for
from psycopg import sql
from psycopg.rows import dict_row

from dbpool.flask import DBPool
from webapp.validation import MAX_BIGINT, Draft, number_in_query, number_or_none

db = DBPool()
blueprint = Blueprint("notes", __name__)

MAX_PAGE, DEFAULT_PAGE = 100, 20

_COLUMNS = sql.SQL("id, title, body, version, created, updated")
_PAGE = sql.SQL("select {} from notes where id > %s order by id limit %s").format(_COLUMNS)
_READ = sql.SQL("select {} from notes where id = %s").format(_COLUMNS)
_CREATE = sql.SQL("insert into notes (title, body) values (%s, %s) returning {}").format(_COLUMNS)
_UPDATE = sql.SQL(
    "update notes set title = %s, body = %s, version = version + 1, updated = now()"
    " where id = %s and version = %s returning {}"
).format(_COLUMNS)
_DELETE = "delete from notes where id = %s and version = coalesce(%s, version)"

Note = dict[str, Any]


@blueprint.get("")
def list_notes() -> Response:
    """List one page, oldest first. `next` is the URL of the next page, also if notes change."""
    limit = number_in_query("limit", DEFAULT_PAGE, lowest=1, highest=MAX_PAGE)
    after = number_in_query("after", 0, lowest=0, highest=MAX_BIGINT)
    # One row more than asked for shows whether there is a next page.
    rows = db.pool.fetch_all(_PAGE, [after, limit + 1], row_factory=dict_row)
    page, more = rows[:limit], rows[limit:]
    following = url_for(".list_notes", limit=limit, after=page[-1]["id"]) if more else None
    return jsonify(notes=[_public(note) for note in page], next=following)


@blueprint.post("")
def create_note() -> Response:
    draft = Draft.from_request()
    note = db.pool.fetch_one(_CREATE, [draft.title, draft.body], row_factory=dict_row)
    assert note is not None  # an insert returns its row
    response = _answer(note, 201)
    response.headers["Location"] = url_for(".read_note", number=note["id"])
    return response


@blueprint.get("/<int:number>")
def read_note(number: int) -> Response:
    return _answer(_existing(number))


@blueprint.put("/<int:number>")
def update_note(number: int) -> Response:
    """Replace the note, unless it has changed since the client read it."""
    draft = Draft.from_request(versioned=True)
    values = [draft.title, draft.body, _known(number), draft.version]
    note = db.pool.fetch_one(_UPDATE, values, row_factory=dict_row)
    return _answer(note) if note else _stale(number)


@blueprint.delete("/<int:number>")
def delete_note(number: int) -> Response:
    """Delete the note; with `?version=`, only if that is still its version."""
    version = number_or_none("version", lowest=1, highest=MAX_BIGINT)
    deleted = db.pool.execute(_DELETE, [_known(number), version])
    return make_response("", 204) if deleted else _stale(number)


def _known(number: int) -> int:
    """Refuse a number that is too large for an id, before the database raises an error."""
    if number > MAX_BIGINT:
        abort(404, "there is no such note")
    return number


def _existing(number: int) -> Note:
    note: Note | None = db.pool.fetch_one(_READ, [_known(number)], row_factory=dict_row)
    return note or abort(404, f"there is no note {number}")


def _stale(number: int) -> Response:
    """Answer why a conditional change matched no row: the note is gone, or has another version."""
    current = _existing(number)["version"]
    response = jsonify(error=f"note {number} has changed to version {current}", version=current)
    response.status_code = 409
    return response


def _answer(note: Note, status: int = 200) -> Response:
    response = jsonify(_public(note))
    response.status_code = status
    return response


def _public(note: Note) -> Note:
    times = {key: note[key].isoformat() for key in ("created", "updated")}
    return {**note, **times}
