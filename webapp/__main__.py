"""`python -m webapp`: the application under gunicorn, with a PostgreSQL of its own if needed.

With `--reload` gunicorn is started again whenever a source has changed. This process does not
become gunicorn: it stays the parent of all that it starts, so that they end when it ends. It binds
the port itself, so that it can report at once that a port is in use, and passes the listening
socket to gunicorn.
"""

from __future__ import annotations

import errno
import http.client
import ipaddress
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from dbpool.embedded import EmbeddedError, Interrupted
from dbpool.embedded._programs import binaries
from webapp import ROOT, dotenv
from webapp.embedded import Server, home, server
from webapp.environment import set_number
from webapp.reload import Sources

if TYPE_CHECKING:
    from dbpool.settings.app import AppSettings

TICK_SECONDS = 0.1
# If a former process was killed, its gunicorn needs up to a second to notice that and end.
BIND_SECONDS = 2.0
# gunicorn.conf.py gives requests two seconds to end; then gunicorn itself shuts down.
GUNICORN_SECONDS = 2.3


class Refused(Exception):
    """The application cannot be served; the message is one line for the user."""


class Stop:
    """Whether a signal asked to stop. Loops that wait check it: nothing is interrupted midway."""

    def __init__(self) -> None:
        self.requested = False
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Under nohup, SIGHUP stays ignored.
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._request)

    def __call__(self) -> bool:
        return self.requested

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True


def main() -> int:
    """Run until a signal or the end of gunicorn; return the exit code."""
    if sys.argv[1:] not in ([], ["--reload"]):
        print("usage: python -m webapp [--reload]", file=sys.stderr)
        return 2
    stop = Stop()
    sources = Sources(ROOT) if sys.argv[1:] else None
    os.chdir(ROOT)  # where gunicorn works and .env is looked for
    _set_up_logging()
    try:
        set_number("WEB_CONCURRENCY")
        with _listening(stop) as listener, _database(listener, stop) as embedded:
            settings = _prepare()
            return _serve(listener, embedded, settings, stop, sources)
    except Interrupted:
        return 0
    except (Refused, EmbeddedError) as exc:
        print(f"webapp: {exc}", file=sys.stderr)
        return 1


def _set_up_logging() -> None:
    logging.basicConfig(
        format="[%(asctime)s] [%(process)d] [%(levelname)s] %(name)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S %z",
    )
    # main() reports errors of this process in one line; the workers have logging of their own.
    for name in ("dbpool", "psycopg"):
        logging.getLogger(name).addHandler(logging.NullHandler())
        logging.getLogger(name).propagate = False


# -- the port --------------------------------------------------------------------------------


@contextmanager
def _listening(stop: Stop) -> Iterator[socket.socket]:
    host, port = os.environ.get("WEBAPP_HOST") or "127.0.0.1", _port()
    deadline = time.monotonic() + BIND_SECONDS
    while True:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = socket.create_server(address[:2], family=family, backlog=2048)
            break
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or time.monotonic() > deadline or stop():
                raise Refused(_why_not_bound(exc, host, port)) from None
            time.sleep(TICK_SECONDS)
    with listener:
        yield listener


def _port() -> int:
    given = os.environ.get("PORT") or "8000"
    if not re.fullmatch("[0-9]{1,5}", given) or int(given) > 65535:
        raise Refused(f"PORT must be a number up to 65535, not {given[:20]!r}")
    return int(given)


def _why_not_bound(exc: OSError, host: str, port: int) -> str:
    if exc.errno == errno.EADDRINUSE:
        return f"port {port} is in use; another one: make run PORT={port % 65535 + 1}"
    return f"cannot listen on {host}, port {port}: {exc.strerror}"


# -- the database ----------------------------------------------------------------------------


@contextmanager
def _database(listener: socket.socket, stop: Stop) -> Iterator[Server | None]:
    """Leave DATABASE_URL set, to the user's database or to an embedded server."""
    from dotenv import dotenv_values

    path = dotenv()
    configured = {**(dotenv_values(path) if path else {}), **os.environ}
    if configured.get("DATABASE_URL") or configured.get("DATABASE_URL_FILE"):
        yield None
        return
    _require_loopback(listener)
    with server(home(ROOT), stop) as embedded:
        for name in [name for name in os.environ if name.startswith("PG")]:
            del os.environ[name]
        os.environ["DATABASE_URL"] = embedded.conninfo
        # Only these settings of a .env apply: its PG variables are meant for another server.
        pool_settings = {
            key: value for key, value in configured.items() if key.startswith("DBPOOL_")
        }
        os.environ.update({key: value for key, value in pool_settings.items() if value})
        os.environ["DBPOOL_DOTENV"] = "off"
        closed = any(map(configured.get, ("DBPOOL_DETAILS", "DBPOOL_TOKEN", "DBPOOL_TOKEN_FILE")))
        if not closed:
            os.environ["DBPOOL_DETAILS"] = "always"
        os.environ.setdefault("WEBAPP_HOSTS", ",".join(_local_names(listener)))
        yield embedded


def _local_names(listener: socket.socket) -> list[str]:
    """Return the names of this machine that no website can point to it."""
    host = listener.getsockname()[0]
    return ["localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host]


def _require_loopback(listener: socket.socket) -> None:
    host = listener.getsockname()[0]
    if not ipaddress.ip_address(host).is_loopback:
        raise Refused(f"the embedded demo shows everything, so it is not served on {host}")


def _prepare() -> AppSettings:
    """Try the settings and the database, so that an error is reported here, in one line."""
    import psycopg

    from dbpool import ConfigError
    from webapp import create_app, schema

    try:
        settings: AppSettings = create_app().extensions["dbpool"].settings
        schema.create_configured()
    except ConfigError as exc:
        raise Refused(str(exc)) from None
    except psycopg.Error as exc:
        raise Refused(f"cannot use the database: {' '.join(str(exc).split())}") from None
    return settings


# -- gunicorn --------------------------------------------------------------------------------


def _serve(
    listener: socket.socket,
    embedded: Server | None,
    settings: AppSettings,
    stop: Stop,
    sources: Sources | None,
) -> int:
    host, port = listener.getsockname()[:2]
    process = _start_gunicorn(listener)
    if sources is None:
        # While our copy is open, clients wait when gunicorn has ended, instead of being refused.
        # That is right only during a reload.
        listener.close()
    try:
        is_announced = False
        # If a changed source is broken, gunicorn ends; the next change starts it again.
        while not stop() and (process.poll() is None or sources is not None):
            if sources is not None and (changed := sources.changed()):
                print(f"webapp: reloading, changed: {_file_names(changed)}", flush=True)
                _end(process)
                process = _start_gunicorn(listener)
            if not is_announced and _answers(host, port):
                _announce(host, port, embedded, settings)
                is_announced = True
            if embedded is not None:
                embedded.revive()
            time.sleep(TICK_SECONDS)
    finally:
        _end(process)
    if not stop():
        raise Refused(f"gunicorn ended by itself: {_describe_exit(process.returncode)}")
    return 0


def _start_gunicorn(listener: socket.socket) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gunicorn", "--config", "webapp/gunicorn.conf.py"]
    command += ["--bind", f"fd://{listener.fileno()}", "--log-level", "warning"]
    return subprocess.Popen(
        [*command, "webapp:create_app()"],
        env={**os.environ, "WEBAPP_SUPERVISOR": str(os.getpid())},
        pass_fds=[listener.fileno()],
        start_new_session=True,  # Ctrl-C in the terminal reaches only this process
    )


def _file_names(changed: list[Path]) -> str:
    """Name at most three of the files: a checkout of another branch changes many."""
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(map(str, changed[:3])) + more


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GUNICORN_SECONDS)
    if process.poll() != 0:
        # If the master was killed, its workers live on for up to a second, and hold the port.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=0.2)
    try:
        connection.request("GET", "/db/health/live")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _announce(host: str, port: int, embedded: Server | None, settings: AppSettings) -> None:
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    url = os.environ.get("WEBAPP_URL") or url  # where a container's port is published
    database = f"PostgreSQL in {embedded.data}" if embedded else _configured_by()
    lines = [
        f"Serving from {database}. Ctrl-C stops it.",
        f"  {url}/notes            the sample API",
        f"  {url}/db/health/ready  readiness",
    ]
    views = [
        f"  {url}/db/              the live page of the pools",
        f"  {url}/db/stats         the numbers of all workers",
    ]
    if settings.details == "always":
        lines += views
    elif settings.token:
        lines += views
        lines.append("  The last two need the token: a browser gets a form that asks for it,")
        lines.append('  curl sends it with -H "Authorization: Bearer $DBPOOL_TOKEN".')
    else:
        lines.append(f"  {url}/db/ is closed: set DBPOOL_TOKEN, and sign in with it")
    if embedded:
        psql = "psql" if shutil.which("psql") else str(binaries() / "psql")
        lines.append(f"  {shlex.join([psql, embedded.conninfo])}")
    print("\n".join(lines), flush=True)


def _configured_by() -> str:
    names = ("DATABASE_URL", "DATABASE_URL_FILE")
    if name := next(filter(os.environ.get, names), None):
        return f"the database of {name}"
    return f"the database of {dotenv()}"


def _describe_exit(returncode: int) -> str:
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return f"exit code {returncode}"


if __name__ == "__main__":
    sys.exit(main())
