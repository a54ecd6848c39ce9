"""Private PostgreSQL servers, quick to start, which tests may stop, kill or freeze."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import psycopg
from psycopg.conninfo import make_conninfo

from dbpool.embedded import Cluster, _programs
from dbpool.errors import classify

from .waiting import free_port, until

__all__ = [
    "Server",
    "binaries",
    "copy",
    "free_port",
    "kill_tree",
    "new_directory",
    "served",
    "until",
]

# The programs of the server to test with, for example Debian's in /usr/lib/postgresql/15/bin; by
# default those that come with the tests. The sample application keeps its own.
CHOSEN_BIN = os.environ.get("TEST_POSTGRES_BIN")

# Over TCP all roles but the superuser need a password.
_HBA = """\
local all all trust
host all postgres 127.0.0.1/32 trust
host all all 127.0.0.1/32 scram-sha-256
"""
_SETTINGS: dict[str, object] = {
    "listen_addresses": "127.0.0.1",
    "fsync": "off",
    "max_connections": 100,
    "logging_collector": "off",
    # In the data directory, so that it is removed with it after a postmaster was killed.
    "dynamic_shared_memory_type": "mmap",
}
_STOPPED = {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP}
_MODES = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
_MEMORY = Path("/dev/shm")
_MIN_FREE_BYTES = 512 * 2**20  # bytes; a container's default of 64 MB is too little


def binaries() -> Path:
    """Return the folder of PostgreSQL's programs."""
    return Path(CHOSEN_BIN) if CHOSEN_BIN else _programs.binaries()


def memory() -> Path:
    """Return a folder for temporary files, in memory if there is room."""
    with suppress(OSError):
        stats = os.statvfs(_MEMORY)
        if os.access(_MEMORY, os.W_OK) and stats.f_bavail * stats.f_frsize >= _MIN_FREE_BYTES:
            return _MEMORY
    return Path("/tmp")


def new_directory() -> Path:
    """Make a directory that the server's user may enter, in memory if there is room."""
    path = Path(tempfile.mkdtemp(prefix="dbpool-pg-", dir=memory()))
    path.chmod(0o755)
    os.chown(path, *_programs.account_of(_programs.server_user()))
    pipe = _reaper().stdin
    assert pipe is not None
    pipe.write(f"{path}\n".encode())
    pipe.flush()
    return path


@cache
def _reaper() -> subprocess.Popen[bytes]:
    """A process that ends the servers of a test run that was killed."""
    command = [sys.executable, "-c", "from tests.postgres import reap; reap()"]
    root = Path(__file__).parent.parent
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd=root)


def reap() -> None:
    """At the end of standard input, stop the servers in the directories it named; remove these."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for directory in map(Path, sys.stdin.read().splitlines()):
        for pid in _programs.servers_in(directory / "data"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGQUIT)
        shutil.rmtree(directory, ignore_errors=True)


def copy(template: Path) -> Path:
    """Return a new directory with a copy of the template's data directory in `data`."""
    directory = new_directory()
    subprocess.run(["cp", "-a", template, directory / "data"], check=True, timeout=60)
    return directory


class Server(Cluster):
    """A PostgreSQL server in a *directory* of its own, on a socket there and on TCP 127.0.0.1.

    Without a copy of a data directory in it, a new one is made. *options* are configuration
    parameters.
    """

    def __init__(self, directory: Path | None = None, **options: object) -> None:
        self.directory = directory or new_directory()
        self.port = free_port()
        self.options = {**_SETTINGS, "port": self.port, **options}
        self._frozen: set[int] = set()
        super().__init__(self.directory / "data", self.directory / "run", programs=binaries())
        if not self.data.exists():
            self.make("--auth=trust", "--no-sync", "--wal-segsize=1")
            (self.data / "pg_hba.conf").write_text(_HBA)

    @property
    def conninfo(self) -> str:
        """The superuser's connection string, over TCP."""
        return self.conninfo_for()

    def conninfo_for(self, **params: Any) -> str:
        """The connection string with *params* instead of the superuser's."""
        defaults = {
            "host": "127.0.0.1",
            "port": self.port,
            "user": "postgres",
            "dbname": "postgres",
        }
        return make_conninfo("", **{**defaults, **params})

    @property
    def version(self) -> int:
        """Its major version."""
        return int((self.data / "PG_VERSION").read_text())

    # Starting and stopping

    def start(self) -> None:
        """Start, and wait until it accepts connections, or would accept them once promoted."""
        self.serve(self.options)

    def stop(self, mode: str = "fast") -> None:
        """Stop in one of pg_ctl's modes: smart, fast or immediate."""
        self.end(((_MODES[mode], 30.0),))
        assert not self.is_running()

    def restart(self, mode: str = "fast") -> None:
        """Stop and start again."""
        self.stop(mode)
        self.start()

    def reload(self) -> None:
        """Read the configuration again."""
        os.kill(self.postmaster_pid, signal.SIGHUP)

    def demote(self) -> None:
        """Make it a standby at its next start, one that follows no primary."""
        (self.data / "standby.signal").touch()
        os.chown(self.data / "standby.signal", *self.account)

    def promote(self) -> None:
        """Promote a standby."""
        (self.data / "promote").touch()
        os.kill(self.postmaster_pid, signal.SIGUSR1)
        until(lambda: self.execute("select pg_is_in_recovery()") == [(False,)], 30.0)

    def kill_postmaster(self) -> None:
        """SIGKILL only the postmaster, and wait until its children have noticed and ended."""
        children = psutil.Process(self.postmaster_pid).children()
        self.end(((signal.SIGKILL, 30.0),))
        until(lambda: not any(map(_runs, children)), 30.0)

    def power_off(self) -> None:
        """SIGKILL all its processes at once."""
        kill_tree(self.postmaster_pid)
        until(lambda: not self.is_running(), 30.0)

    @property
    def postmaster_pid(self) -> int:
        """The pid of the postmaster."""
        pid = self.pid()
        assert pid is not None
        return pid

    def is_running(self) -> bool:
        """Whether there is a postmaster."""
        return self.pid() is not None

    def close(self) -> None:
        """Stop at once and remove everything."""
        self.thaw()
        if self.has_crashed:
            self.start()  # it removes the killed server's shared memory
        if self.is_running():
            self.stop("immediate")
        shutil.rmtree(self.directory, ignore_errors=True)

    # Its processes

    def freeze(self, pids: Iterable[int]) -> None:
        """SIGSTOP these processes of the server, and wait until they have stopped."""
        for pid in pids:
            self._frozen.add(pid)
            os.kill(pid, signal.SIGSTOP)
            until(lambda pid=pid: psutil.Process(pid).status() in _STOPPED)  # type: ignore[misc]

    def thaw(self) -> None:
        """SIGCONT all frozen processes."""
        while self._frozen:
            with suppress(ProcessLookupError):
                os.kill(self._frozen.pop(), signal.SIGCONT)

    def backends(self, application_name: str | None = None) -> list[int]:
        """Return the pids of the client backends, without the one that asks.

        The processes of one application have names that are equal up to an @.
        """
        rows = self.execute(
            "select pid from pg_stat_activity where backend_type = 'client backend'"
            " and pid <> pg_backend_pid() and (%s::text is null or %s in (application_name, split_part(application_name, '@', 1)))",
            application_name,
            application_name,
        )
        return [pid for (pid,) in rows]

    def execute(self, statement: str, *params: object) -> list[tuple[Any, ...]]:
        """Run a statement as the superuser, outside any pool; wait for a crash recovery to end."""
        with self._connection() as conn:
            cursor = conn.execute(statement.encode(), params or None)
            return cursor.fetchall() if cursor.description else []

    def _connection(self) -> psycopg.Connection[Any]:
        deadline = time.monotonic() + 15.0
        while True:
            try:
                return psycopg.connect(self.conninfo, autocommit=True)
            except psycopg.OperationalError as ex:
                if classify(ex) != "starting" or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


def kill_tree(pid: int) -> None:
    """SIGKILL a postmaster and its children at once, and wait until the children have gone."""
    postmaster = psutil.Process(pid)
    postmaster.suspend()  # so that it starts no more children
    children = postmaster.children()
    for each in (*children, postmaster):
        with suppress(psutil.NoSuchProcess):
            each.kill()
    until(lambda: not any(map(_runs, children)), 30.0)


def _runs(process: psutil.Process) -> bool:
    """Whether the process has not ended; a zombie has."""
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


@contextmanager
def session(server: Server, *statements: str, name: str = "psql") -> Iterator[int]:
    """Open another client's session, in a transaction with these statements."""
    with psycopg.connect(server.conninfo, application_name=name) as conn:
        for statement in statements:
            conn.execute(statement.encode())
        yield conn.info.backend_pid
        with suppress(psycopg.OperationalError):  # the server may have stopped
            conn.rollback()


@contextmanager
def served(**options: object) -> Iterator[Server]:
    """Run a server during a block, on a copy of the template's data directory."""
    with closing(Server(copy(_template().data), **options)) as server:
        server.start()
        yield server


@cache
def _template() -> Server:
    server = Server()
    atexit.register(server.close)
    return server
