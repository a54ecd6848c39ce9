"""A small HTTP server for the door: at most sixteen connections at once, five seconds for each."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from pathlib import Path
from socketserver import BaseServer, ThreadingMixIn, UnixStreamServer
from time import monotonic
from typing import Any, Final

from dbpool._secrets import conceal, safe_repr
from dbpool._sign_in import MAX_BODY, UNMEASURED, SecretBytes
from dbpool.door._pages import Response, json_answer
from dbpool.door._views import Views, takes_form
from dbpool.errors import ConfigError

logger = logging.getLogger("dbpool")

_ADDRESS: Final = re.compile(
    r"(?:\[(?P<ipv6>[0-9a-fA-F:.]+(?:%\w+)?)\]|(?P<host>[\w.-]*)):(?P<port>[0-9]{1,5})", re.ASCII
)
_MAX_PATH: Final = 107  # bytes of a path of a socket, which ends with a NUL
_MAX_CONNECTIONS: Final = 16
_CONNECTION_TIMEOUT: Final = 5.0  # for a connection
_TICK_INTERVAL: Final = 1.0
_RETRY_INTERVAL: Final = 1.0  # seconds between two attempts to have the port


def parse_address(text: str) -> tuple[str, int] | str:
    """Return host and port, or the path of a unix socket; raise `ConfigError` for anything else."""
    text = text.strip()
    if text.startswith(("unix:", "/")) and (path := text.removeprefix("unix:")):
        if len(os.fsencode(path)) > _MAX_PATH:
            raise ConfigError(
                f"the path of a Unix socket (DBPOOL_SERVE) has at most {_MAX_PATH} bytes"
            )
        return path
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found["port"]) > 65535:
        raise ConfigError(
            "the address (DBPOOL_SERVE) must be such as 127.0.0.1:8900, or the path of a Unix socket"
        )
    return found["ipv6"] or found["host"] or "127.0.0.1", int(found["port"])


def is_private(address: tuple[str, int] | str) -> bool:
    """Whether only this machine can reach the address."""
    if isinstance(address, str):
        return True
    with suppress(ValueError):
        return ip_address(address[0]).is_loopback
    return address[0].lower() == "localhost"


class _Handler(BaseHTTPRequestHandler):
    server: _HTTP
    server_version = "dbpool"
    sys_version = ""
    timeout = _CONNECTION_TIMEOUT

    def do_GET(self) -> None:
        self._answer(self.server.views.respond)

    do_HEAD = do_GET  # noqa: N815  # http.server's name for it

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        is_short = re.fullmatch("[0-9]{1,9}", length) and int(length) <= MAX_BODY
        if not is_short and takes_form(self.path):
            self._send(json_answer(413, error=UNMEASURED))
            return
        form = SecretBytes(self.rfile.read(int(length)) if is_short else b"")
        self._answer(lambda path, headers: self.server.views.submit(path, headers, form))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server refuses like all else; nothing of the request is quoted."""
        self._send(json_answer(code, error=HTTPStatus(code).phrase))

    def _answer(self, respond: Callable[[str, dict[str, str]], Response]) -> None:
        headers = {name.lower(): conceal(value) for name, value in self.headers.items()}
        try:
            answer = respond(self.path, headers)
        except Exception as ex:  # noqa: BLE001  # the next request must still be answered
            logger.warning("door: a view failed: %s", type(ex).__name__)
            answer = json_answer(500, error="this view failed")
        self._send(answer)

    def _send(self, answer: Response) -> None:
        self.send_response(answer.status)
        for name, value in answer.all_headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the parent's name
        """Log no requests: probes come every few seconds."""


class _HTTP(ThreadingMixIn, UnixStreamServer):
    """An HTTP server on a socket that already listens, with a limit on its connections."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket, views: Views) -> None:
        BaseServer.__init__(self, listener.getsockname(), _Handler)
        self.socket = listener
        self.views = views
        self._free = threading.BoundedSemaphore(_MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        timer = threading.Timer(_CONNECTION_TIMEOUT, _shut_down, (request,))
        timer.daemon = True
        timer.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log nothing about clients that hang up."""


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class Door:
    """Serves the views on an address until `stop`.

    If the address is taken, it is tried again each second, after one warning.
    """

    def __init__(self, address: tuple[str, int] | str, views: Views) -> None:
        self._address = address
        self._views = views
        self._stop = threading.Event()
        self._http: _HTTP | None = None
        self._path: tuple[Path, int] | None = None  # our own socket, and its inode

    @property
    def address(self) -> Any:
        """The address on which it listens, None as long as it does not."""
        return None if self._http is None else self._http.server_address

    def run(self, on_listening: Callable[[], object] = lambda: None) -> None:
        """Serve; returns after `stop`. *on_listening* is called once it has the address."""
        if (listener := self._listen()) is None:
            return
        self._http = _HTTP(listener, self._views)
        on_listening()
        ticking = threading.Thread(None, self._tick, "dbpool-door", daemon=True)
        ticking.start()
        try:
            if not self._stop.is_set():  # from now on `stop` sees the server
                self._http.serve_forever(poll_interval=0.1)
        finally:
            self._http.server_close()
            self._remove()
            ticking.join(_CONNECTION_TIMEOUT)
            self._views.close()

    def stop(self) -> None:
        """End `run`, from another thread."""
        self._stop.set()
        if self._http is not None:
            self._http.shutdown()

    def _tick(self) -> None:
        while not self._stop.wait(_TICK_INTERVAL):
            self._views.tick()

    def _listen(self) -> socket.socket | None:
        is_logged = False
        while not self._stop.is_set():
            try:
                return self._bound()
            except OSError as ex:
                if not is_logged:
                    is_logged = True
                    text = "door: cannot listen on %s yet: %s"
                    logger.warning(text, _shown(self._address), ex.strerror)
            self._stop.wait(_RETRY_INTERVAL)
        return None

    def _bound(self) -> socket.socket:
        if isinstance(self._address, tuple):
            family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
            return socket.create_server(self._address, family=family, backlog=_MAX_CONNECTIONS)
        path = Path(self._address)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._free_path(path)
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(_MAX_CONNECTIONS)
            self._path = path, path.stat().st_ino
        except OSError:
            listener.close()
            raise
        return listener

    @staticmethod
    def _free_path(path: Path) -> None:
        """Remove a socket that a dead process left; raise if somebody listens on it."""
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(1.0)
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()
                    return
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    def _remove(self) -> None:
        if self._path is not None:
            path, inode = self._path
            with suppress(OSError):
                if path.stat().st_ino == inode:
                    path.unlink()


def _shown(address: tuple[str, int] | str) -> str:
    if isinstance(address, str):
        return safe_repr(address)
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def wait_until(condition: Any, seconds: float, stop: threading.Event) -> None:
    """Wait until *condition* holds or *seconds* have passed."""
    deadline = monotonic() + seconds
    while not condition() and monotonic() < deadline and not stop.wait(_TICK_INTERVAL):
        pass
