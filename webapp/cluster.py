"""`python -m webapp.cluster`: the application with a primary, a standby and PgBouncer, to try out.

Its database `default` is the primary behind PgBouncer in transaction mode, `replica` the standby.
All run on this machine, on Unix sockets in a temporary folder that is removed at the end.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import psycopg

from dbpool.embedded import Cluster, EmbeddedError, Interrupted
from dbpool.embedded._programs import account_of, binaries, server_user, spawn
from webapp import ROOT
from webapp.__main__ import TICK_SECONDS, Refused, Stop, _listening

PRIMARY, STANDBY, BOUNCER = 5432, 5433, 6432  # the ports in the names of their sockets
SETTINGS = {"listen_addresses": "", "max_connections": 60, "shared_buffers": "32MB"}
BACKUP_SECONDS = 30.0
WEB_SECONDS = 5.0
BOUNCER_SECONDS = 2.0

BOUNCER_CONFIG = """\
[databases]
webapp = host={sockets} port={primary}
[pgbouncer]
listen_addr =
listen_port = {port}
unix_socket_dir = {sockets}
unix_socket_mode = 0700
auth_type = trust
auth_file = {folder}/bouncer.users
stats_users = webapp
pool_mode = transaction
default_pool_size = 10
logfile = {folder}/bouncer.log
pidfile = {folder}/bouncer.pid
"""

# Ends everything if this process is killed: then its standard input ends. $1 is the application.
JANITOR = """
read -r _
kill "$1"
for file in "$0"/bouncer.pid "$0"/*/postmaster.pid; do kill -QUIT "$(head -n 1 "$file")"; done
sleep 2
rm -rf "$0"
"""


def main() -> int:
    """Run until a signal or the end of the application; return the exit code."""
    stop = Stop()
    # A shell has its background jobs ignore it. PgBouncer would inherit that, and outlive a kill.
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    try:
        with _listening(stop):
            pass  # a port in use is reported at once; the application binds it itself
        with ExitStack() as stack:
            folder = stack.enter_context(_folder())
            primary = stack.enter_context(_primary(folder, stop))
            standby = stack.enter_context(_standby(folder, stop))
            bouncer = Bouncer(folder)
            stack.callback(bouncer.end)
            bouncer.start()
            web = stack.enter_context(_application(folder))
            stack.enter_context(_janitor(folder, web))
            _announce(folder)
            while not stop() and web.poll() is None:
                for server, port in ((primary, PRIMARY), (standby, STANDBY)):
                    if server.has_crashed:
                        server.serve({**SETTINGS, "port": port})
                bouncer.start()
                time.sleep(TICK_SECONDS)
            return 0 if stop() else web.returncode or 1
    except Interrupted:
        return 0
    except (Refused, EmbeddedError) as exc:
        sys.exit(f"webapp: {exc}")


@contextmanager
def _folder() -> Iterator[Path]:
    """Make a folder that the servers' user owns; its path is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="dbpool-cluster-", dir="/tmp"))
    try:
        os.chown(folder, *account_of(server_user()))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _primary(folder: Path, stop: Callable[[], bool]) -> Iterator[Cluster]:
    primary = Cluster(folder / "primary", folder / "run", stop)
    primary.make("--auth-local=trust", "--auth-host=reject", "--no-sync")
    try:
        primary.serve({**SETTINGS, "port": PRIMARY})
        with psycopg.connect(
            _url(folder, PRIMARY, "postgres", "postgres"), autocommit=True
        ) as conn:
            conn.execute("create role webapp login")
            conn.execute("create role standby login replication")
            conn.execute("create database webapp owner webapp")
        yield primary
    finally:
        primary.end()


@contextmanager
def _standby(folder: Path, stop: Callable[[], bool]) -> Iterator[Cluster]:
    """Copy the primary, and start a server that follows it, without a slot.

    With a slot, the primary would keep all WAL while the standby is stopped.
    """
    data, log = folder / "standby", folder / "backup.log"
    source = ["-h", folder / "run", "-p", PRIMARY, "-U", "standby"]
    command = [
        binaries() / "pg_basebackup",
        "-D",
        data,
        *source,
        "-R",
        "-X",
        "stream",
        "-c",
        "fast",
    ]
    with log.open("wb") as output:
        backup = spawn([*command, "--no-sync"], output, account_of(server_user()))
    deadline = time.monotonic() + BACKUP_SECONDS
    while backup.poll() is None:
        if stop() or time.monotonic() > deadline:
            backup.kill()
        time.sleep(0.01)
    if stop():
        raise Interrupted
    if backup.returncode:
        raise EmbeddedError(f"cannot make the standby: {log.read_text().strip()}")
    standby = Cluster(data, folder / "run", stop)
    try:
        standby.serve({**SETTINGS, "port": STANDBY})
        yield standby
    finally:
        standby.end()


class Bouncer:
    """PgBouncer, Debian's for example."""

    def __init__(self, folder: Path) -> None:
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
        if (program := shutil.which("pgbouncer", path=path)) is None:
            raise EmbeddedError("pgbouncer is missing: apt-get install pgbouncer")
        self._folder, self._program = folder, program
        self._process: subprocess.Popen[bytes] | None = None
        sockets = folder / "run"
        config = BOUNCER_CONFIG.format(
            sockets=sockets, primary=PRIMARY, port=BOUNCER, folder=folder
        )
        self._config = self._write("bouncer.ini", config)
        self._write("bouncer.users", '"webapp" ""\n')

    def _write(self, name: str, text: str) -> Path:
        path = self._folder / name
        path.write_text(text)
        os.chown(path, *account_of(server_user()))
        return path

    def start(self) -> None:
        """Start it unless it runs, and wait until it listens."""
        if self._process is not None and self._process.poll() is None:
            return
        for stale in ("bouncer.pid", f"run/.s.PGSQL.{BOUNCER}"):  # of a PgBouncer that was killed
            (self._folder / stale).unlink(missing_ok=True)
        account = account_of(server_user())
        with (self._folder / "bouncer.out").open("wb") as output:
            self._process = spawn([self._program, self._config], output, account)
        deadline = time.monotonic() + BOUNCER_SECONDS
        while not (self._folder / "run" / f".s.PGSQL.{BOUNCER}").exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                lines = (self._folder / "bouncer.out").read_text().strip().splitlines()
                reason = lines[-1] if lines else "it gave no reason"
                raise EmbeddedError(f"pgbouncer did not start: {reason}")
            time.sleep(0.01)

    def end(self) -> None:
        """Stop it at once."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(BOUNCER_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


@contextmanager
def _application(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "DATABASE_URL"))}
    environ = {
        **inherited,
        "DATABASE_URL": _url(folder, BOUNCER),
        "DBPOOL_POOLER": "transaction",
        "DBPOOL_DATABASES": "replica",
        "DBPOOL_REPLICA_URL": _url(folder, STANDBY),
        "DBPOOL_REPLICA_POOLER": "none",
        "DBPOOL_DOTENV": "off",
        "WEBAPP_HOST": "127.0.0.1",
        "WEBAPP_HOSTS": "localhost,127.0.0.1",
    }
    if not any(
        inherited.get(name) for name in ("DBPOOL_DETAILS", "DBPOOL_TOKEN", "DBPOOL_TOKEN_FILE")
    ):
        environ["DBPOOL_DETAILS"] = "always"
    web = subprocess.Popen(
        [sys.executable, "-m", "webapp"],
        cwd=ROOT,
        env=environ,
        start_new_session=True,  # Ctrl-C in the terminal reaches only this process
    )
    try:
        yield web
    finally:
        web.terminate()
        try:
            web.wait(WEB_SECONDS)
        except subprocess.TimeoutExpired:
            web.kill()
            web.wait()


@contextmanager
def _janitor(folder: Path, web: subprocess.Popen[bytes]) -> Iterator[None]:
    janitor = subprocess.Popen(
        ["/bin/sh", "-c", JANITOR, str(folder), str(web.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        janitor.kill()
        with suppress(OSError):
            janitor.communicate()


def _announce(folder: Path) -> None:
    lines = [
        "A primary and a standby that follows it, on Unix sockets. Ctrl-C stops them.",
        f"  {_url(folder, BOUNCER)}  PgBouncer, the database default",
        f"  {_url(folder, PRIMARY)}  the primary behind it",
        f"  {_url(folder, STANDBY)}  the standby, the database replica",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _url(folder: Path, port: int, user: str = "webapp", database: str = "webapp") -> str:
    sockets = quote(str(folder / "run"), safe="")
    return f"postgresql://{user}@/{database}?host={sockets}&port={port}&sslmode=disable"


if __name__ == "__main__":
    sys.exit(main())
