"""PostgreSQL servers for tests: private, quick to start, and to be stopped, killed or frozen."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from webapp.embedded import binaries, server_user

_HBA = """\
local all all trust
host all postgres 127.0.0.1/32 trust
host all all 127.0.0.1/32 scram-sha-256
"""


def until(condition: Callable[[], object], seconds: float = 10.0, pause: float = 0.005) -> None:
    """Wait until *condition* holds; fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(pause)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def reachable_directory() -> Path:
    """Make a directory that the server's user owns."""
    path = Path(tempfile.mkdtemp(prefix="dbpool-pg-"))
    if user := server_user():
        path.chmod(0o755)
        shutil.chown(path, user)
    return path


def run(*command: str | Path, timeout: float = 60.0) -> str:
    """Run one of PostgreSQL's programs as the server's user; return what it printed."""
    user = server_user()
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
    done = subprocess.run(
        [str(binaries() / command[0]), *map(str, command[1:])],
        env=environ,
        cwd="/",
        user=user,
        group="nogroup" if user else None,
        extra_groups=[] if user else None,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]} failed: {done.stdout}"
    return done.stdout


class Server:
    """A PostgreSQL server in a directory of its own, on a socket and on TCP 127.0.0.1."""

    def __init__(self, template: Path | None = None, **options: object) -> None:
        self.directory = reachable_directory()
        self.data = self.directory / "data"
        self.port = free_port()
        self.options = {"fsync": "off", "max_connections": 100, **options}
        self._frozen: set[int] = set()
        if template is None:
            run("initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "-E", "UTF8",
                "--no-locale", "--no-sync")  # fmt: skip
            (self.data / "pg_hba.conf").write_text(_HBA)
        else:
            subprocess.run(["cp", "-a", template, self.data], check=True, timeout=60)

    @property
    def conninfo(self) -> str:
        """The superuser's connection string, over TCP."""
        return self.conninfo_for()

    def conninfo_for(self, **params: object) -> str:
        """The connection string with *params* instead of the superuser's."""
        defaults = {
            "host": "127.0.0.1",
            "port": self.port,
            "user": "postgres",
            "dbname": "postgres",
        }
        merged: dict[str, Any] = {**defaults, **params}
        return make_conninfo("", **merged)

    def start(self) -> None:
        """Start, and wait until it accepts connections."""
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": self.directory}
        options = " ".join(f"-c {k}={v}" for k, v in {**settings, **self.options}.items())
        log = self.directory / "log"
        run("pg_ctl", "-D", self.data, "-w", "-t", "30", "-l", log,
            "-o", f"-p {self.port} {options}", "start")  # fmt: skip

    def stop(self, mode: str = "fast") -> None:
        """Stop, by pg_ctl's mode: smart, fast or immediate."""
        run("pg_ctl", "-D", self.data, "-w", "-t", "30", "-m", mode, "stop")

    def restart(self, mode: str = "fast") -> None:
        """Stop and start again."""
        self.stop(mode)
        self.start()

    @property
    def postmaster_pid(self) -> int:
        """The pid of the postmaster."""
        return int((self.data / "postmaster.pid").read_text().splitlines()[0])

    def kill_postmaster(self) -> None:
        """SIGKILL the postmaster alone, and wait until its children have noticed and gone."""
        pid = self.postmaster_pid
        children = _children(pid)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not any(map(_alive, [pid, *children])), 30.0)
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def freeze(self, pids: Iterable[int]) -> None:
        """SIGSTOP these processes of the server."""
        for pid in pids:
            self._frozen.add(pid)
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT whatever is frozen."""
        for pid in self._frozen:
            if _alive(pid):
                os.kill(pid, signal.SIGCONT)
        self._frozen.clear()

    def backends(self, application_name: str | None = None) -> list[int]:
        """Return the pids of the client backends, this question's own left out."""
        with psycopg.connect(self.conninfo, autocommit=True) as conn:
            rows = conn.execute(
                "select pid from pg_stat_activity where backend_type = 'client backend'"
                " and pid <> pg_backend_pid()"
                " and (%(name)s::text is null or application_name = %(name)s)",
                {"name": application_name},
            ).fetchall()
        return [pid for (pid,) in rows]

    def execute(self, statement: str, *params: object) -> list[tuple[Any, ...]]:
        """Run a statement as the superuser, outside any pool."""
        with psycopg.connect(self.conninfo, autocommit=True) as conn:
            cursor = conn.execute(statement.encode(), params or None)
            return cursor.fetchall() if cursor.description else []

    def is_running(self) -> bool:
        """Whether there is a postmaster."""
        try:
            return _alive(self.postmaster_pid)
        except (FileNotFoundError, IndexError, ValueError):
            return False

    def close(self) -> None:
        """Stop at once and remove everything."""
        self.thaw()
        if self.is_running():
            self.stop("immediate")
        shutil.rmtree(self.directory, ignore_errors=True)


def _alive(pid: int) -> bool:
    """Whether that process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _children(pid: int) -> list[int]:
    children = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                children.append(int(entry.name))
    return children
