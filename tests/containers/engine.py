"""Docker's commands, a compose project in a checkout, and HTTP requests to its services."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.waiting import until
from webapp import ROOT


def docker(*command: str, cwd: Path | None = None, **environ: str) -> str:
    """Run a docker command and return its output; fail with its error."""
    done = attempt(*command, cwd=cwd, **environ)
    assert done.returncode == 0, f"docker {' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def attempt(
    *command: str, cwd: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", *command],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def inspect(container: str) -> Any:
    return json.loads(docker("inspect", container))[0]


def logs(container: str) -> str:
    done = attempt("logs", container)
    return done.stdout + done.stderr


def copy_checkout(target: Path) -> None:
    """Copy the files that git tracks, readable only by their owner as with umask 077."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    for path in [target, *target.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)


class Answer(NamedTuple):
    status: int
    body: str

    def json(self) -> Any:
        return json.loads(self.body)


def request(
    port: int, path: str, method: str = "GET", body: Any = None, token: str | None = None
) -> Answer:
    """Send a request to a local port, without a proxy."""
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return Answer(answer.status, answer.read().decode())
    finally:
        connection.close()


def answers(port: int, path: str) -> bool:
    try:
        return request(port, path).status == 200
    except (OSError, http.client.HTTPException):
        return False


class Load:
    """Clients that write notes until stopped, each one request after the other."""

    def __init__(self, port: int, clients: int) -> None:
        self.clients = clients
        self.written = 0
        self.failed: list[str] = []
        self._port = port
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write) for _ in range(clients)]

    def _write(self) -> None:
        while not self._stop.is_set():
            try:
                answer = request(self._port, "/notes", "POST", {"title": "a note"})
            except (OSError, http.client.HTTPException) as ex:
                self.failed.append(repr(ex))
            else:
                if answer.status == 201:
                    self.written += 1
                else:
                    self.failed.append(f"{answer.status} {answer.body}")

    def kinds(self) -> dict[str, int]:
        """The number of failures of each kind."""
        return dict(Counter(self.failed))

    def await_requests(self, requests: int = 50) -> None:
        """Wait until that many more notes are written."""
        wanted = self.written + requests
        until(lambda: self.written >= wanted, 60, pause=0.01)

    @contextmanager
    def running(self) -> Iterator[Load]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(60)


class Project:
    """A project of docker compose, in a checkout of its own."""

    def __init__(self, checkout: Path, environ: Mapping[str, str]) -> None:
        self.checkout = checkout
        self.environ = {"COMPOSE_PROJECT_NAME": "dbpool-test", **environ}

    def __call__(self, *command: str, **environ: str) -> str:
        return docker("compose", *command, cwd=self.checkout, **self.environ, **environ)

    def container(self, service: str) -> str:
        return self("ps", "--all", "--quiet", service).strip()

    def logs(self, service: str) -> str:
        return self("logs", "--no-color", "--no-log-prefix", service)

    def set(self, **settings: str) -> None:
        """Write `.env`."""
        lines = [f"{name}={value}\n" for name, value in settings.items()]
        (self.checkout / ".env").write_text("".join(lines))


def until_true(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait as `until` does, but longer and with longer pauses, as each check starts a process."""
    until(condition, seconds, pause=0.1)
