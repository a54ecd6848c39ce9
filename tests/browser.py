"""The live page in Debian's Chromium: a site with prepared answers, and a browser."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from flask import Flask, jsonify, request
from werkzeug.serving import make_server

from dbpool.flask import DBPool, create_blueprint
from dbpool.monitor import Query

CHROMIUM: Final = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), ""
)
OPTIONS: Final = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--font-render-hinting=none",
]
TOKEN: Final = "a-token-of-some-length"
NOWHERE: Final = "host=127.0.0.1 port=1 user=u dbname=d"


class Site:
    """An application whose `/stats` gives prepared answers in turn, then always the last."""

    def __init__(self, **config: Any) -> None:
        self.answers: list[dict[str, Any]] = []
        self.requests = 0
        self.sizes: list[int] = []  # of the answers, in bytes
        self.app = Flask("shop")
        self.app.config.update(TESTING=True, DATABASE_URL=NOWHERE, **config)
        DBPool(self.app)
        self.app.register_blueprint(create_blueprint(), url_prefix="/db")
        self._stats = self.app.view_functions["dbpool.stats"]
        self.app.view_functions["dbpool.stats"] = self._answer
        self.url = ""

    def show(self, *answers: dict[str, Any]) -> None:
        """Give these answers from now on."""
        self.requests, self.answers = 0, list(answers)

    def _answer(self) -> Any:
        if not self.answers:
            return self._stats()
        answer = self.answers[min(self.requests, len(self.answers) - 1)]
        self.requests += 1
        query = Query.parse(request.args)
        parts = {"history", "journal", "endpoints", "workers", "servers", "settings"} - {
            *query.include
        }
        response = jsonify(query.trim({key: answer[key] for key in answer.keys() - parts}))
        self.sizes.append(len(response.get_data()))
        return response

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serve on a local port; yields the page's address."""
        server = make_server("127.0.0.1", 0, self.app, threaded=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}/db/"
        try:
            yield self.url
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
            self.app.extensions["dbpool"].databases.close()
