"""How many requests fail while gunicorn reloads, recycles its workers, or stops.

Eight clients, each with a connection per request. What gunicorn's listener held when it was closed
is reset, with a database or without: those are counted too; a refused connection is not.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import urllib.error
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench._report import Cell, Table
from tests.gunicorn_site import Site, conf_of
from tests.postgres import served

REQUESTS = 2000
CLIENTS = 8
PATHS = {"dbpool": "/", "no database": "/db/health/live"}
CLASSES = ("gthread", "sync", "gevent")


def run(quick: bool) -> Table:
    """Do each to each class of workers, with a query per request and without."""
    table = Table("stops", f"Failed of {REQUESTS:,} requests", list(PATHS))
    with served() as server:
        for worker_class in CLASSES[: 1 if quick else None]:
            for title, (options, number) in {
                "reloaded three times": ({}, signal.SIGHUP),
                "workers recycled": ({"max_requests": REQUESTS // 5}, None),
                "stopped": ({}, signal.SIGTERM),
            }.items():
                for name, path in PATHS.items():
                    found = _once(server.conninfo, worker_class, path, options, number)
                    failed = found.total() - found["ok"]
                    kinds = ", ".join(sorted(found.keys() - {"ok"}))
                    text = f"{failed}{f' ({kinds})' if kinds else ''}"
                    table.put(f"{worker_class}, {title}", name, Cell(text, {"failed": failed}))
    return table


def _once(
    dsn: str, worker_class: str, path: str, options: dict[str, int], number: int | None
) -> Counter[str]:
    """Send the requests, and the signal after each third of them; a stop ends them."""
    stopped = threading.Event()
    with tempfile.TemporaryDirectory() as directory:
        more = conf_of(worker_class, workers=2)
        site = Site(Path(directory), dsn, more=more, max_requests=options.get("max_requests", 0))

        def ask(n: int) -> str | None:
            if number is not None and n % (REQUESTS // 3) == REQUESTS // 3 - 1:
                site.process.send_signal(number)
            return None if stopped.is_set() else _outcome(site, path, stopped)

        try:
            with ThreadPoolExecutor(CLIENTS) as threads:
                found = list(threads.map(ask, range(REQUESTS)))
        finally:
            site.kill()
    return Counter(each for each in found if each is not None)


def _outcome(site: Site, path: str, stopped: threading.Event) -> str | None:
    try:
        site.get(path)
    except urllib.error.HTTPError as ex:
        return str(ex.code)
    except OSError as ex:
        reason = getattr(ex, "reason", ex)
        if isinstance(reason, ConnectionRefusedError):
            stopped.set()
            return None
        return type(reason).__name__
    return "ok"
