"""`make dev` reloads the application whenever a source file changes."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from webapp import ROOT
from webapp.reload import INTERVAL_SECONDS, Sources

from .waiting import free_port, until

# -- what counts as a change -----------------------------------------------------------------


class ChangeDetector:
    """A watcher of sources, on a clock that the tests move."""

    def __init__(self, root: Path) -> None:
        self.now = 0.0
        self._sources = Sources(root, clock=lambda: self.now)

    def poll(self) -> list[str]:
        self.now += INTERVAL_SECONDS
        return [path.as_posix() for path in self._sources.changed()]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("dbpool/flask/templates/live.html", "dbpool/pool.py", "webapp/notes.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    return tmp_path


def test_a_change_is_reported_once_after_the_last_write(tree: Path) -> None:
    detector = ChangeDetector(tree)
    assert detector.poll() == []
    (tree / "dbpool/pool.py").write_text("22")
    assert detector.poll() == [], "reported before the writes ended"
    (tree / "webapp/notes.py").write_text("22")
    assert detector.poll() == [], "reported although another write followed"
    assert detector.poll() == ["dbpool/pool.py", "webapp/notes.py"]
    assert detector.poll() == []


@pytest.mark.parametrize(
    "name", ["dbpool/new/__init__.py", "webapp/new.css", "dbpool/new.js", "dbpool/names.txt"]
)
def test_files_that_come_and_go_are_changes(tree: Path, name: str) -> None:
    detector = ChangeDetector(tree)
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text("")
    assert (detector.poll(), detector.poll()) == ([], [name])
    (tree / name).unlink()
    assert (detector.poll(), detector.poll()) == ([], [name])


@pytest.mark.parametrize(
    "name", ["dbpool/__pycache__/pool.cpython-313.pyc", "webapp/.#notes.py", "webapp/notes.py~", "README.py"]
)  # fmt: skip
def test_files_written_by_python_and_editors_are_no_change(tree: Path, name: str) -> None:
    detector = ChangeDetector(tree)
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text("")
    assert (detector.poll(), detector.poll()) == ([], [])


def test_files_are_checked_once_per_interval(tree: Path) -> None:
    detector = ChangeDetector(tree)
    (tree / "dbpool/pool.py").write_text("22")
    assert detector.poll() == []
    detector.now -= INTERVAL_SECONDS / 2
    assert detector.poll() == []
    detector.now += INTERVAL_SECONDS / 2
    assert detector.poll() == ["dbpool/pool.py"]


# -- `python -m webapp --reload` -------------------------------------------------------------


class Site:
    """A served copy of the checkout."""

    def __init__(self, checkout: Path, dsn: str) -> None:
        self.checkout = checkout
        for folder in ("dbpool", "webapp"):
            shutil.copytree(ROOT / folder, checkout / folder)
        self.port = free_port()
        self.log = checkout / "output"
        environ = {"DATABASE_URL": dsn, "PORT": str(self.port), "DBPOOL_DETAILS": "always"}
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "webapp", "--reload"],
                cwd=checkout,
                env={**os.environ, **environ},
                stdout=output,
                stderr=output,
            )

    def get(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read().decode()
            assert answer.status == 200, body
            return body
        finally:
            connection.close()

    def append(self, name: str, text: str) -> None:
        with (self.checkout / name).open("a") as file:
            file.write(text)

    def marks(self) -> set[str]:
        return set(re.findall(r"^MARK (\S+)$", self.log.read_text(), re.MULTILINE))

    def mark(self, *names: str) -> None:
        """Change the files so that each prints when it runs."""
        for name in names:
            self.append(name, f"\nprint('MARK {name}', flush=True)\n")


@pytest.fixture
def site(tmp_path: Path, dsn: str) -> Iterator[Site]:
    site = Site(tmp_path, dsn)
    try:
        until(lambda: "Serving" in site.log.read_text(), 60)
        yield site
    finally:
        site.process.send_signal(signal.SIGINT)
        try:
            assert site.process.wait(10) == 0
        finally:
            site.process.kill()


def test_every_source_is_reloaded_and_no_request_fails(site: Site) -> None:
    stop = threading.Event()
    failed: list[Exception] = []
    served = 0

    def ask() -> None:
        nonlocal served
        while not stop.is_set():
            try:
                site.get("/notes")
                served += 1
            except (AssertionError, OSError, http.client.HTTPException) as ex:
                failed.append(ex)

    requester = threading.Thread(target=ask)
    requester.start()
    try:
        sources = ["dbpool/__init__.py", "dbpool/gunicorn.py", "webapp/notes.py",
                   "webapp/gunicorn.conf.py"]  # fmt: skip
        site.mark(*sources)
        until(lambda: site.marks() == set(sources), 30)
        (page,) = site.checkout.glob("dbpool/**/live.html")
        site.append(str(page.relative_to(site.checkout)), "<!-- MARKED -->")
        until(lambda: "<!-- MARKED -->" in site.get("/db/"), 30)
        before = served
        until(lambda: served > before, 30)
    finally:
        stop.set()
        requester.join(60)
    assert failed == []
    assert "webapp: reloading, changed: dbpool/__init__.py, " in site.log.read_text()


@pytest.mark.parametrize("mistake", ["this is no Python", "raise RuntimeError('broken')"])
def test_a_corrected_source_is_served_without_a_manual_restart(site: Site, mistake: str) -> None:
    path = site.checkout / "webapp/notes.py"
    original = path.read_text()
    path.write_text(f"{original}\n{mistake}\n")
    until(lambda: mistake in site.log.read_text(), 30)
    path.write_text(original)
    assert '"notes"' in site.get("/notes")
