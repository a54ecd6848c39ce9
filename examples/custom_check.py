"""Readiness that asks more than the database:

DATABASE_URL=postgresql://… flask --app examples/custom_check run, then GET /db/health/ready
"""

import shutil

from flask import Flask

from dbpool.flask import DBPool, create_blueprint

db = DBPool()


def create_app() -> Flask:
    """Make an application that is degraded while its disk is nearly full."""
    app = Flask(__name__)
    db.init_app(app)
    app.register_blueprint(create_blueprint(), url_prefix="/db")
    # Runs in its own thread, for at most 0.3 s. With required=True, a failure would mean 503.
    app.extensions["dbpool"].health.add("disk", has_room, required=False, timeout=0.3)
    return app


def has_room() -> bool:
    """Return whether 100 MB are left. A check is up if it returns True or None."""
    return shutil.disk_usage("/").free > 100 * 2**20
