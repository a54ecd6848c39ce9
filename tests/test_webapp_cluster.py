"""`python -m webapp.cluster` runs two databases on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from .postgres import free_port, until

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin") is None,
    reason="needs pgbouncer",
)


def _ignore_as_in_background() -> None:
    """Ignore the signals that a shell has its background jobs ignore."""
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)


class Running:
    """The running command and its application."""

    def __init__(self, output: Path, **environ: str) -> None:
        self.port = free_port()
        self._output = output
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "webapp.cluster"],
                cwd=ROOT,
                env={**os.environ, "PORT": str(self.port), "WEB_CONCURRENCY": "1", **environ},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_ignore_as_in_background,  # noqa: PLW1509  # nothing else runs in it
            )

    def await_ready(self, seconds: float = 40.0) -> None:
        until(self._is_ready, seconds, pause=0.1)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.output()
        try:
            return bool(self.get("/db/health/ready")["databases"]["replica"] == "up")
        except OSError:
            return False

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return dict(json.loads(answer.read()))

    def post(self, path: str, **data: str) -> None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=10).close()

    def output(self) -> str:
        return self._output.read_text()

    @property
    def folder(self) -> Path:
        found = re.search(r"host=(%2Ftmp%2Fdbpool-cluster-\w+)%2Frun", self.output())
        assert found, self.output()
        return Path(found[1].replace("%2F", "/"))

    def descendants(self) -> list[psutil.Process]:
        return list(psutil.Process(self.process.pid).children(recursive=True))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def start(**environ: str) -> Running:
        made.append(Running(tmp_path / "output", **environ))
        return made[-1]

    yield start
    for running in made:
        if running.process.poll() is None:
            running.process.send_signal(signal.SIGINT)
            running.process.wait(30)


def ends(processes: list[psutil.Process]) -> None:
    with suppress(AssertionError):
        until(lambda: not any(_runs(process) for process in processes), 20.0, pause=0.05)
    assert [process.cmdline() for process in processes if _runs(process)] == []


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_it_serves_two_databases_and_ends_without_a_trace(start: Callable[..., Running]) -> None:
    running = start()
    running.await_ready()
    running.post("/notes", title="from here")
    health = running.get("/db/health")["databases"]
    assert (health["default"]["role"], health["replica"]["role"]) == ("primary", "standby")
    assert set(running.get("/db/stats")["pools"]) == {"default", "replica"}
    until(lambda: "the standby, the database replica" in running.output())
    kill_bouncer_and_standby(running)  # the command restarts them
    until(lambda: titles(running) == ["from here"], 20.0, pause=0.1)
    running.await_ready()
    folder, processes = running.folder, running.descendants()
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(20) == 0
    assert not folder.exists()
    ends(processes)


def kill_bouncer_and_standby(running: Running) -> None:
    children = psutil.Process(running.process.pid).children()
    killed = [
        process
        for process in children
        if process.name() == "pgbouncer" or process.cwd().endswith("/standby")
    ]
    assert len(killed) == 2
    for process in killed:
        process.kill()
    ends(killed)


def titles(running: Running) -> list[str] | None:
    try:
        return [note["title"] for note in running.get("/notes")["notes"]]
    except OSError:
        return None


def test_no_process_outlives_the_killed_command(start: Callable[..., Running]) -> None:
    running = start()
    running.await_ready()
    until(lambda: "the standby, the database replica" in running.output())
    folder, processes = running.folder, running.descendants()
    running.process.kill()
    running.process.wait(10)
    ends(processes)
    until(lambda: not folder.exists())


def test_a_port_in_use_ends_it_at_once(start: Callable[..., Running]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        running = start(PORT=str(port))
        assert running.process.wait(30) == 1
    assert running.output().startswith(f"webapp: port {port} is in use")
