"""Take the README's picture of the live page: `python tools/take_picture.py`, with Chromium installed.

Serves the sample application with a PostgreSQL of its own, puts it under load, has a session lock
the table that the load needs, and writes docs/images/page.png.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import psycopg

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "page.png"
SIZE = "1200,920"
LOADED_FOR, LOCKED_FOR = 75.0, 3.0  # seconds
CLIENTS = 14


def main() -> None:
    """Serve, load, lock, and take the picture."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("DATABASE_URL", "DBPOOL_"))}
    environ |= {"PORT": str(port), "WEB_CONCURRENCY": "3", "DBPOOL_MAX_SIZE": "4"}
    with tempfile.TemporaryDirectory() as place, (Path(place) / "log").open("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "webapp"], cwd=ROOT, env=environ, stdout=log, stderr=log
        )
        try:
            site = f"http://127.0.0.1:{port}"
            wait_for(f"{site}/db/health/ready")
            for _ in range(CLIENTS):
                threading.Thread(target=use, args=(site,), daemon=True).start()
            time.sleep(LOADED_FOR)
            found = re.search(r"psql '(.*?)'", Path(log.name).read_text())
            assert found, "the application did not say how its database is reached"
            with psycopg.connect(found[1], application_name="nightly report") as conn:
                conn.execute("lock table notes in access exclusive mode")
                time.sleep(LOCKED_FOR)
                take(f"{site}/db/", place)
        finally:
            server.terminate()
            server.wait(30)


def wait_for(url: str) -> None:
    """Wait until *url* is answered with 200."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise SystemExit(f"{url} does not answer")


def use(site: str) -> None:
    """Read notes, and write one now and then, for ever."""
    body = json.dumps({"title": "note"}).encode()
    write = urllib.request.Request(
        f"{site}/notes", data=body, headers={"Content-Type": "application/json"}
    )
    while True:
        request = write if random.random() < 0.2 else f"{site}/notes?limit=5"
        with suppress(OSError), urllib.request.urlopen(request, timeout=30) as answer:
            answer.read()
        time.sleep(random.random() * 0.05)


def take(url: str, place: str) -> None:
    """Have Chromium draw the page after it has asked for the numbers some times."""
    subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={place}/profile", f"--window-size={SIZE}",
         "--virtual-time-budget=7000", f"--screenshot={PICTURE}", url],
        check=True, timeout=120, stderr=subprocess.DEVNULL,
    )  # fmt: skip


if __name__ == "__main__":
    main()
