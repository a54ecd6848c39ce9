"""One data directory and its server: makes, starts, watches and stops them.

The server's user may put links into its folders, and root works in them, so no link is followed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dbpool.embedded._programs import (
    Account,
    EmbeddedError,
    account_of,
    binaries,
    server_user,
    servers_in,
    spawn,
)

START_SECONDS = 30.0
# Fast, then immediate shutdown: together with gunicorn's share under five seconds.
FAST_SECONDS, IMMEDIATE_SECONDS = 2.0, 0.5
_STEPS = (
    (signal.SIGINT, FAST_SECONDS),
    (signal.SIGQUIT, IMMEDIATE_SECONDS),
    (signal.SIGKILL, IMMEDIATE_SECONDS),
)


class Interrupted(Exception):
    """The user asked to stop while the server was being made or started."""


class Cluster:
    """A data directory, in *data*, and its server, which listens in the folder *sockets*.

    *programs* is the folder of PostgreSQL's programs. Once `stopping()` is true, methods that take
    long raise `Interrupted`. Failures raise `EmbeddedError`, with one line for the user.
    """

    def __init__(
        self,
        data: Path,
        sockets: Path,
        stopping: Callable[[], bool] = lambda: False,
        programs: Path | None = None,
    ) -> None:
        self.data, self.sockets = data, sockets
        self.log = data / "server.log"
        self.pid_file = data / "postmaster.pid"
        self.account = _owner(data) or account_of(server_user())
        self._stopping = stopping
        self._programs = programs or binaries()
        self._process: subprocess.Popen[bytes] | None = None

    def make(self, *options: str) -> None:
        """Make the data directory under another name and rename it, so that it is never incomplete.

        Each attempt has a folder of its own: if a supervisor was killed, its initdb may still be
        writing to an earlier one.
        """
        for abandoned in self.data.parent.glob(f"{self.data.name}.*.new"):
            shutil.rmtree(abandoned, ignore_errors=True)
        where = {"prefix": f"{self.data.name}.", "suffix": ".new", "dir": str(self.data.parent)}
        making = Path(tempfile.mkdtemp(**where))
        self._give(making)
        command = [self._programs / "initdb", "-D", making, "-U", "postgres", "--no-locale"]
        # A file, not a pipe: initdb does not have to wait for us to read.
        with new_file(self.data.parent, "initdb.log") as output:
            process = spawn([*command, "--encoding=UTF8", *options], output, self.account)
            while process.poll() is None:
                if self._stopping():
                    # Kill the whole group: initdb's children do the writing.
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    raise Interrupted
                time.sleep(0.01)
            if process.returncode:
                output.seek(0)
                raise EmbeddedError(f"initdb failed: {_last_line(output.read())}")
        making.rename(self.data)

    def serve(self, settings: Mapping[str, object]) -> None:
        """Return once the server accepts connections; start it if it does not run.

        A standby that accepts none until it is promoted counts as ready too.
        """
        started, deadline = False, time.monotonic() + START_SECONDS
        while (status := self.status()) not in {"ready", "standby"}:
            if self._stopping():
                raise Interrupted
            if (started and status is None) or time.monotonic() > deadline:
                text = _last_line(_content(self.log))
                raise EmbeddedError(f"PostgreSQL did not start: {text} (see {self.log})")
            if status is None:
                self._start(settings)
                started = True
            time.sleep(0.005)

    def _start(self, settings: Mapping[str, object]) -> None:
        if self.pid_file.exists():  # the last one was killed
            self._end_orphans()
            self._remove_stale_locks()
        self._make_socket_folder()
        how = {"unix_socket_directories": self.sockets, **settings}
        options = [f"--{name}={value}" for name, value in how.items()]
        with new_file(self.data, self.log.name, self.account) as log:
            command = [self._programs / "postgres", "-D", self.data, *options]
            self._process = spawn(command, log, self.account)

    def end(self, steps: tuple[tuple[signal.Signals, float], ...] = _STEPS) -> None:
        """Stop the server, by a fast shutdown, then an immediate one; both keep the data.

        *steps* are signals, and the seconds to wait after each.
        """
        pid = self.pid()
        for signum, seconds in steps:
            if pid is None or not self._is_up(pid):
                return
            with suppress(ProcessLookupError):
                os.kill(pid, signum)
            deadline = time.monotonic() + seconds
            while self._is_up(pid) and time.monotonic() < deadline:
                time.sleep(0.005)

    # What runs

    def pid(self) -> int | None:
        """Return the pid of the server, even if another process started it; None if none runs."""
        if self._process is not None and self._process.poll() is None:
            return self._process.pid
        pid = self.pid_in_file()
        return pid if pid is not None and servers_in(self.data, [pid]) else None

    def pid_in_file(self) -> int | None:
        """Return the pid in the last server's pid file."""
        try:
            return int(_content(self.pid_file).split(b"\n", 1)[0])
        except (OSError, ValueError):
            return None

    @property
    def has_crashed(self) -> bool:
        """Whether the server ended without a shutdown, which would have removed its pid file."""
        return self.pid() is None and self.pid_file.exists()

    def _is_up(self, pid: int) -> bool:
        """Whether that server still runs: it removes its pid file a moment before it ends."""
        if self._process is not None and self._process.pid == pid:
            return self._process.poll() is None
        return bool(servers_in(self.data, [pid]))

    def status(self) -> str | None:
        """Return the running server's own status: starting, ready, stopping; None without one."""
        if (pid := self.pid()) is None:
            return None
        with suppress(OSError, IndexError):
            # The eighth line, which pg_ctl reads too; missing for the first few milliseconds.
            lines = _content(self.pid_file).decode().splitlines()
            return lines[7].strip() if int(lines[0]) == pid else "starting"
        return "starting"

    def _end_orphans(self) -> None:
        """End the backends of a postmaster that was killed: a new one would refuse to start."""
        deadline = time.monotonic() + FAST_SECONDS
        while orphans := servers_in(self.data):
            signum = signal.SIGQUIT if time.monotonic() < deadline else signal.SIGKILL
            for pid in orphans:
                with suppress(ProcessLookupError):
                    os.kill(pid, signum)
            time.sleep(0.05)

    # Its files

    def _remove_stale_locks(self) -> None:
        """Remove lock files whose pid now belongs to a process that is not our server.

        postgres itself removes those whose pid is free, after it has looked for its shared memory.
        """
        import psutil

        pid = self.pid_in_file()
        if pid is not None and psutil.pid_exists(pid):
            self.pid_file.unlink(missing_ok=True)
            for lock in self.sockets.glob(".s.PGSQL.*.lock"):
                lock.unlink()

    def _make_socket_folder(self) -> None:
        """Make a folder that only the server's user can use, or make an existing one so."""
        with suppress(FileExistsError):
            self.sockets.mkdir(mode=0o700)
            self._give(self.sockets)
        with suppress(OSError), _directory(self.sockets) as descriptor:
            if os.fstat(descriptor).st_uid == self.account[0]:
                os.fchmod(descriptor, 0o700)
                return
        raise EmbeddedError(f"{self.sockets} belongs to another user: remove it")

    def _give(self, folder: Path) -> None:
        with _directory(folder) as descriptor:
            os.fchown(descriptor, *self.account)


def new_file(folder: Path, name: str, account: Account | None = None) -> IO[bytes]:
    """Make a file in place of an old one; with *account*, it and its folder belong to that user."""
    try:
        with _directory(folder) as directory:
            if account and os.fstat(directory).st_uid != account[0]:
                raise EmbeddedError(f"{folder} has been replaced by another folder: try again")
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            descriptor = os.open(name, flags, 0o600, dir_fd=directory)
    except OSError as exc:
        raise EmbeddedError(f"cannot make {folder / name}: {exc.strerror}") from None
    if account:
        os.fchown(descriptor, *account)
    return os.fdopen(descriptor, "w+b")


@contextmanager
def _directory(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _content(path: Path) -> bytes:
    """Read a regular file. Raises OSError for a link, and for any file that reading could block on."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        return file.read()


def _owner(data: Path) -> Account | None:
    """Return the owner of the data: root serves a user's data as that user."""
    with suppress(OSError):
        found = data.lstat() if os.geteuid() == 0 else data.stat()
        return found.st_uid, found.st_gid
    return None


def _last_line(text: bytes) -> str:
    lines = [line for line in text.decode(errors="replace").splitlines() if line.strip()]
    wanted = [line for line in lines if re.search(r"FATAL|ERROR:|error:", line)] or lines
    cut = re.compile(r"^.*?(FATAL|ERROR|error): +")
    return cut.sub("", wanted[-1]).strip() if wanted else "it said nothing"
