"""The reference application: a small JSON API over a dbpool pool, run by `make run`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flask import Flask


ROOT = Path(__file__).resolve().parent.parent


def dotenv() -> Path | None:
    """Return the `.env` of this checkout, or the one that DBPOOL_DOTENV names instead.

    Folders above are not searched: a `.env` there may name the database of another project.
    """
    if named := os.environ.get("DBPOOL_DOTENV"):
        return None if named == "off" else Path(named)
    path = ROOT / ".env"
    return path if path.is_file() else None


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Make the application; *config* goes to `app.config` and wins over the environment.

    Raises dbpool.ConfigError for wrong settings. No database is touched: the pools open on first
    use, in the worker that uses them.
    """
    # Imported here, so that `webapp.embedded` can be used without Flask.
    from flask import Flask

    from dbpool.flask import create_blueprint
    from webapp import errors, logs, notes

    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = 256 * 1024  # the longest note, with every character escaped
    app.config["DBPOOL_DOTENV"] = dotenv() or "off"  # the extension would look further up
    app.config.update(config or {})
    logs.init_app(app)
    notes.db.init_app(app)
    errors.init_app(app)
    _require_known_host(app)
    app.register_blueprint(create_blueprint(), url_prefix="/db")
    app.register_blueprint(notes.blueprint, url_prefix="/notes")
    app.add_url_rule("/", "index", _index)
    return app


def _require_known_host(app: Flask) -> None:
    """Answer only requests for the host names in WEBAPP_HOSTS, if that is set.

    Otherwise any website could read an open demo through its visitor's browser, by giving one of
    its own host names the address 127.0.0.1 (DNS rebinding).
    """
    names = {name.strip().lower() for name in os.environ.get("WEBAPP_HOSTS", "").split(",")} - {""}
    if not names:
        return
    from flask import abort, request

    @app.before_request
    def check() -> None:
        if re.sub(r":\d*$", "", request.host).lower() not in names:
            abort(400, "unknown host name: only those in WEBAPP_HOSTS are served")


def _index() -> dict[str, str]:
    return {
        "notes": "/notes",
        "live page": "/db/",
        "ready": "/db/health/ready",
        "stats": "/db/stats",
        "metrics": "/db/metrics",
    }
