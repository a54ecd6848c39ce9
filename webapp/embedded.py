"""The sample application's PostgreSQL, which runs while any process of this checkout needs it.

This module does not depend on Flask, gunicorn or the pool.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import pwd
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.parse import quote

import psycopg

from dbpool.embedded import Cluster, EmbeddedError, Interrupted
from dbpool.embedded._cluster import FAST_SECONDS, START_SECONDS
from dbpool.embedded._programs import binaries, can, major_version, server_user, user_folder

logger = logging.getLogger("webapp")

SOCKET = ".s.PGSQL.5432"
# A socket's path has 104 bytes on macOS, 108 on Linux.
SOCKET_PATH_BYTES = 100
SETTINGS = {"port": 5432, "listen_addresses": "", "unix_socket_permissions": "0700"}


def home(checkout: Path) -> Path:
    """Return the folder for this checkout's data; log a warning if it is outside the checkout."""
    inside = checkout / ".data"
    user = server_user()
    if user and not can(user, "/bin/sh", "-c", 'cd "$1"', "sh", checkout):
        reason = f"is not accessible to user {user}"
    elif not os.access(inside, os.W_OK) and not os.access(checkout, os.W_OK):
        reason = "cannot be written"
    elif "\n" in str(checkout):
        reason = "has a line break in its path"
    else:
        return inside
    found = user_folder() / f"data-{_digest(checkout)}"
    logger.warning("%s %s: the data is in %s", checkout, reason, found)
    return found


@contextmanager
def server(home: Path, stopping: Callable[[], bool] = lambda: False) -> Iterator[Server]:
    """Keep a server running in `home`; the last process that needs it stops it.

    Raises EmbeddedError, or Interrupted once `stopping()` is true.
    """
    shared = Server(home, stopping)
    try:
        try:
            shared.join()
        except OSError as exc:  # a full disk, say
            raise EmbeddedError(f"cannot serve from {home}: {exc}") from None
        yield shared
    finally:
        shared.leave()


class Server(Cluster):
    """A server that several processes share.

    Every process that uses it has a shared lock on `users.lock`; one that gets the lock exclusively
    is the last. `server.lock` is held while the server is started or stopped, so that one process
    at a time decides about that. If a process is killed, the kernel releases both of its locks.
    """

    def __init__(self, home: Path, stopping: Callable[[], bool] = lambda: False) -> None:
        data = home / f"postgres-{major_version(binaries())}"
        super().__init__(data, _socket_folder(home), stopping)
        self.home = home
        self._users: IO[str] | None = None

    @property
    def conninfo(self) -> str:
        """The application's URL, which names everything a PG* variable could otherwise change."""
        return self._conninfo("webapp", "webapp")

    def _conninfo(self, user: str, database: str) -> str:
        folder = quote(str(self.sockets), safe="")
        return f"postgresql://{user}@/{database}?host={folder}&port=5432&sslmode=disable"

    def join(self) -> None:
        """Start to use the server; start it if it does not run."""
        self._make_home()
        with self._exclusive(START_SECONDS):
            self._users = self._open("users.lock")
            fcntl.flock(self._users, fcntl.LOCK_SH)
            if not self.data.exists():
                self.make("--auth-local=trust", "--auth-host=reject")
            self.serve(SETTINGS)
            self._make_database()

    def leave(self) -> None:
        """Stop using the server; the last process stops it."""
        if self._users is None:
            return
        # A process that holds the lock for this long is starting the server, and will stop it.
        with suppress(EmbeddedError), self._exclusive(FAST_SECONDS):
            if _lock(self._users, fcntl.LOCK_EX):
                self.end()
        self._users.close()
        self._users = None

    def revive(self) -> None:
        """Start the server again if it crashed; one that was stopped on purpose stays down."""
        if self.has_crashed:
            logger.warning("PostgreSQL ended unexpectedly: starting it again")
            with self._exclusive(START_SECONDS):
                self.serve(SETTINGS)

    def _make_home(self) -> None:
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise EmbeddedError(
                f"cannot make {self.home}: {exc.strerror}; set DATABASE_URL to use another server"
            ) from None
        for folder in (self.home, self.data):
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                owner = _name(folder.stat().st_uid)
                raise EmbeddedError(f"{folder} belongs to {owner}: remove it, or run as that user")

    def _make_database(self) -> None:
        """Make the application's role and database. Called with `server.lock` held.

        The superuser makes them; the application's role is an ordinary one. An earlier version
        stored its tables as the superuser, in database postgres: they are copied and handed over.
        """
        try:
            with self._superuser("template1") as conn:
                if not conn.execute("select from pg_roles where rolname = 'webapp'").rowcount:
                    conn.execute("create role webapp login")
                if not conn.execute("select from pg_database where datname = 'webapp'").rowcount:
                    conn.execute("create database webapp owner webapp template postgres")
            with self._superuser("webapp") as conn:
                for (table,) in conn.execute(
                    "select oid::regclass::text from pg_class where relkind = 'r' and relnamespace"
                    " = 'public'::regnamespace and relowner <> 'webapp'::regrole"
                ).fetchall():
                    conn.execute(f"alter table {table} owner to webapp")
        except psycopg.Error as exc:
            reason = " ".join(str(exc).split())
            raise EmbeddedError(f"cannot make the application's database: {reason}") from None

    def _superuser(self, database: str) -> psycopg.Connection:
        return psycopg.connect(self._conninfo("postgres", database), autocommit=True)

    def _open(self, name: str) -> IO[str]:
        # Closed to other users, who could hold the lock for ever. If root makes the file, it gives
        # it to the server's account. A file that already belongs to another user is used as it is.
        flags = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW
        try:
            descriptor = os.open(self.home / name, flags, 0o600)
        except OSError as exc:
            raise EmbeddedError(f"cannot open {self.home / name}: {exc.strerror}") from None
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            os.close(descriptor)
            raise EmbeddedError(
                f"cannot open {self.home / name}: it is a link, or not a regular file"
            )
        with suppress(PermissionError):
            os.fchmod(descriptor, 0o600)
            os.fchown(descriptor, *self.account)
        return os.fdopen(descriptor)

    @contextmanager
    def _exclusive(self, seconds: float) -> Iterator[None]:
        deadline = time.monotonic() + seconds
        with self._open("server.lock") as file:
            while not _lock(file, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise EmbeddedError(f"another process is busy with {self.data}")
                if self._users is None and self._stopping():
                    raise Interrupted
                time.sleep(0.02)
            yield


def _socket_folder(home: Path) -> Path:
    folder = home / "run"
    path = str(folder / SOCKET)
    # postgres reads a list of folders, in which commas and quotes have a meaning.
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES and re.fullmatch(r"[\w/.+@ -]+", path):
        return folder
    # Not TMPDIR, which may differ between two terminals that share the server.
    return Path(f"/tmp/dbpool-webapp-{_digest(home)}")  # noqa: S108 -- checked to be ours alone


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:12]


def _lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
