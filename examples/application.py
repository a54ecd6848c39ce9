"""An application factory for Flask: DATABASE_URL=postgresql://… flask --app examples/application run

The live page is at /db/ once DBPOOL_TOKEN is set; the probes at /db/health/live and
/db/health/ready need no token.
"""

from collections.abc import Mapping
from typing import Any

from flask import Flask, request
from flask.typing import ResponseReturnValue

from dbpool.flask import DBPool, create_blueprint

db = DBPool()


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Make the application; nothing connects before the first request."""
    app = Flask(__name__)
    app.config.update(config or {})
    db.init_app(app)
    app.register_blueprint(create_blueprint(), url_prefix="/db")
    app.add_url_rule("/notes", view_func=list_notes)
    app.add_url_rule("/notes", view_func=add_note, methods=["POST"])
    app.cli.command("init-db")(make_tables)
    return app


def make_tables() -> None:
    """Make the tables: flask --app examples/application init-db"""
    db.pool.execute("create table if not exists notes (id serial primary key, title text not null)")


def list_notes() -> ResponseReturnValue:
    """Answer with all notes: one statement, one round trip."""
    rows = db.pool.fetch_all("select id, title from notes order by id")
    return [{"id": number, "title": title} for number, title in rows]


def add_note() -> ResponseReturnValue:
    """Add a note in a transaction, which is rolled back if anything in it fails."""
    with db.pool.connection() as conn:
        row = conn.execute(
            "insert into notes (title) values (%s) returning id", [request.json["title"]]
        ).fetchone()
    assert row is not None
    return {"id": row[0]}, 201
