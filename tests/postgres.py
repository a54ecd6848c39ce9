"""PostgreSQL servers for tests: private, quick to start, and to be stopped, killed or frozen."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import psycopg
from psycopg.conninfo import make_conninfo

from dbpool.errors import classify
from webapp import embedded
from webapp.embedded import server_user

# The server to test with, if not the newest that comes with the tests: Debian's for example, as
# TEST_POSTGRES_BIN=/usr/lib/postgresql/15/bin. The sample application keeps its own.
CHOSEN_BIN = os.environ.get("TEST_POSTGRES_BIN")

# The superuser needs no password; everybody else does, over TCP.
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
    # In the data directory, so that it goes with it when a postmaster is killed.
    "dynamic_shared_memory_type": "mmap",
}

_MODES = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}

_MEMORY = Path("/dev/shm")
_ROOM = 512 * 2**20  # bytes; a container's default of 64 MB is too little

# Outlives a test run that was killed, and ends the servers that it left. Each line names a
# directory and the postmaster in it, 0 when it is gone.
_REAPER = """
import os, shutil, signal, sys
servers = {}
for line in sys.stdin:
    pid, directory = line.rstrip("\\n").split(" ", 1)
    servers[directory] = int(pid)
for directory, pid in servers.items():
    if pid:
        for number in (signal.SIGCONT, signal.SIGQUIT):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
    shutil.rmtree(directory, ignore_errors=True)
"""


def binaries() -> Path:
    """Return the folder of PostgreSQL's programs."""
    return Path(CHOSEN_BIN) if CHOSEN_BIN else embedded.binaries()


def until(condition: Callable[[], object], seconds: float = 10.0, pause: float = 0.005) -> None:
    """Wait until *condition* holds; fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(pause)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on.

    It is below those that systems give to clients: none takes it while its server is down.
    """
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _directory() -> Path:
    """Make a directory that the server's user owns, in memory if there is room."""
    path = Path(tempfile.mkdtemp(prefix="dbpool-pg-", dir=_memory()))
    _report(0, path)
    if user := server_user():
        path.chmod(0o755)
        shutil.chown(path, user)
    return path


def _memory() -> Path | None:
    with suppress(OSError):
        room = os.statvfs(_MEMORY)
        if os.access(_MEMORY, os.W_OK) and room.f_bavail * room.f_frsize >= _ROOM:
            return _MEMORY
    return None


def spawn(*command: str | Path, output: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """Start one of PostgreSQL's programs as the server's user, away from our terminal."""
    user = server_user()
    return subprocess.Popen(
        [str(binaries() / command[0]), *map(str, command[1:])],
        env={k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_", "LANG"))},
        cwd="/",
        user=user,
        group="nogroup" if user else None,
        extra_groups=[] if user else None,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(*command: str | Path, timeout: float = 60.0) -> str:
    """Run one of PostgreSQL's programs; return what it printed."""
    with spawn(*command, output=subprocess.PIPE) as process:
        output = process.communicate(timeout=timeout)[0].decode()
    assert process.returncode == 0, f"{command[0]} failed: {output}"
    return output


class Server:
    """A PostgreSQL server in a directory of its own, on a socket there and on TCP 127.0.0.1.

    *template* is a data directory to copy, or copies of one; without it a new one is made.
    *options* are configuration parameters.
    """

    def __init__(self, template: Path | Copies | None = None, **options: object) -> None:
        self.directory = template.take() if isinstance(template, Copies) else _directory()
        self.data = self.directory / "data"
        self.log = self.directory / "log"
        self.port = free_port()
        self.options = {**_SETTINGS, "unix_socket_directories": self.directory, **options}
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen: set[int] = set()
        if template is None:
            run("initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "-E", "UTF8",
                "--no-locale", "--no-sync", "--wal-segsize=1")  # fmt: skip
            (self.data / "pg_hba.conf").write_text(_HBA)
        elif isinstance(template, Path):
            assert _copy(template, self.directory).wait(60) == 0

    @property
    def conninfo(self) -> str:
        """The superuser's connection string, over TCP."""
        return self.conninfo_for()

    @property
    def url(self) -> str:
        """The same as a URL."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

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

    @property
    def version(self) -> int:
        """Its major version."""
        return int((self.data / "PG_VERSION").read_text())

    # Its life

    def start(self) -> None:
        """Start, and wait until it accepts connections, or will not before it is promoted."""
        settings = [f"--{name}={value}" for name, value in self.options.items()]
        with self.log.open("ab") as log:
            self._process = spawn("postgres", "-D", self.data, "-p", str(self.port), *settings,
                                  output=log)  # fmt: skip
        _report(self._process.pid, self.directory)
        until(lambda: self._status() in {"ready", "standby"} or not self.is_running(), 30.0)
        assert self.is_running(), self.log.read_text(errors="replace")[-2000:]

    def _status(self) -> str | None:
        """What the postmaster says of itself, in the last line of its file."""
        with suppress(OSError, IndexError):
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            return lines[7].strip() if int(lines[0]) == self.postmaster_pid else None
        return None

    def stop(self, mode: str = "fast") -> None:
        """Stop, in pg_ctl's words: smart, fast or immediate."""
        os.kill(self.postmaster_pid, _MODES[mode])
        self._collect()

    def restart(self, mode: str = "fast") -> None:
        """Stop and start again."""
        self.stop(mode)
        self.start()

    def reload(self) -> None:
        """Read the configuration again."""
        os.kill(self.postmaster_pid, signal.SIGHUP)

    def demote(self) -> None:
        """Make a standby of it, at its next start; one that follows nobody."""
        signal_file = self.data / "standby.signal"
        signal_file.touch()
        if user := server_user():
            shutil.chown(signal_file, user)

    def promote(self) -> None:
        """Make a primary of a standby."""
        run("pg_ctl", "-D", self.data, "-w", "-t", "30", "promote")

    def kill_postmaster(self) -> None:
        """SIGKILL the postmaster alone, and wait until its children have noticed and gone."""
        children = _children(self.postmaster_pid)
        os.kill(self.postmaster_pid, signal.SIGKILL)
        self._collect()
        until(lambda: not any(map(_alive, children)), 30.0)

    def lose_power(self) -> None:
        """SIGKILL all its processes at once."""
        kill_tree(self.postmaster_pid)
        self._collect()

    def _collect(self) -> None:
        assert self._process is not None
        self._process.wait(30.0)
        _report(0, self.directory)

    @property
    def postmaster_pid(self) -> int:
        """The pid of the postmaster."""
        assert self._process is not None
        return self._process.pid

    def is_running(self) -> bool:
        """Whether there is a postmaster."""
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """Stop at once and remove everything."""
        self.thaw()
        if self._process is not None:
            if not self.is_running() and self._process.returncode == -signal.SIGKILL:
                self.start()  # it removes the shared memory of the one that was killed
            if self.is_running():
                self.stop("immediate")
        shutil.rmtree(self.directory, ignore_errors=True)

    # Its processes

    def freeze(self, pids: Iterable[int]) -> None:
        """SIGSTOP these processes of the server, and wait until they have stopped."""
        for pid in pids:
            self._frozen.add(pid)
            os.kill(pid, signal.SIGSTOP)
            until(lambda pid=pid: _state(pid) in {"T", "t", None})  # type: ignore[misc]

    def thaw(self) -> None:
        """SIGCONT whatever is frozen."""
        for pid in self._frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._frozen.clear()

    def backends(self, application_name: str | None = None) -> list[int]:
        """Return the pids of the client backends, this question's own left out."""
        rows = self.execute(
            "select pid from pg_stat_activity where backend_type = 'client backend'"
            " and pid <> pg_backend_pid() and (%s::text is null or application_name = %s)",
            application_name,
            application_name,
        )
        return [pid for (pid,) in rows]

    def execute(self, statement: str, *params: object) -> list[tuple[Any, ...]]:
        """Run a statement as the superuser, outside any pool; waits out a crash recovery."""
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


class Copies:
    """Copies of a data directory. The next is made while the last is in use: copying one takes
    longer than all else that starting a server takes.
    """

    def __init__(self, template: Path) -> None:
        self._template = template
        self._next = self._begin()

    def _begin(self) -> tuple[Path, subprocess.Popen[bytes]]:
        directory = _directory()
        return directory, _copy(self._template, directory)

    def take(self) -> Path:
        """Return a directory with a copy in `data` that is the caller's."""
        directory, copying = self._next
        assert copying.wait(60) == 0
        self._next = self._begin()
        return directory

    def close(self) -> None:
        """Remove what nobody took."""
        directory, copying = self._next
        copying.wait(60)
        shutil.rmtree(directory)


def _copy(template: Path, directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["cp", "-a", template, directory / "data"])


@cache
def _reaper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _REAPER], stdin=subprocess.PIPE, start_new_session=True
    )


def _report(pid: int, directory: Path) -> None:
    """Tell the reaper what to end and to remove should this process be killed."""
    pipe = _reaper().stdin
    assert pipe is not None
    pipe.write(f"{pid} {directory}\n".encode())
    pipe.flush()


def dismiss_reaper() -> None:
    """Let the reaper do its work, which is nothing when all is closed."""
    if _reaper.cache_info().currsize:
        _reaper().communicate(timeout=10)
        _reaper.cache_clear()


def _processes() -> dict[int, tuple[int, str]]:
    """The parent and the state of every process; a slim container has no ps."""
    if not Path("/proc/self").exists():
        command = ["/bin/ps", "-A", "-o", "pid=,ppid=,state="]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in said.splitlines()]
        return {int(pid): (int(parent), state[:1]) for pid, parent, state in rows}
    found = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):  # noqa: PTH208  # a glob looks at each
        with suppress(OSError):
            # The name, in parentheses, may hold anything.
            stat = Path("/proc", name, "stat").read_text()
            state, parent = stat.rpartition(")")[2].split()[:2]
            found[int(name)] = (int(parent), state)
    return found


def _state(pid: int) -> str | None:
    return _processes().get(pid, (0, None))[1]


def _alive(pid: int) -> bool:
    """Whether that process runs; a zombie does not."""
    return _state(pid) not in {None, "Z", "X"}


def kill_tree(pid: int) -> None:
    """SIGKILL a postmaster and its children at once, and wait until the children have gone."""
    os.kill(pid, signal.SIGSTOP)  # it starts no more of them
    children = _children(pid)
    for each in (*children, pid):
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    until(lambda: not any(map(_alive, children)), 30.0)


def _children(pid: int) -> list[int]:
    return [child for child, (parent, _) in _processes().items() if parent == pid]
