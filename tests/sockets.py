"""Listeners on 127.0.0.1: one calls a function for each connection, one relays to a server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .threads import Task


@contextmanager
def answering(handle: Callable[[socket.socket], object]) -> Iterator[int]:
    """Call *handle* with each connection, one after the other, and close it; yields the port."""

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer, suppress(OSError):
                peer.settimeout(5)
                handle(peer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = Task(serve, name="answering")
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            serving.result(10)


class Relay:
    """Relays bytes between clients and a server, over sockets that a test may manipulate.

    Each socket has a lock for sending, so that a test can send messages without splitting others.
    """

    def __init__(self, server_port: int, port: int = 0) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.clients: list[socket.socket] = []
        self._servers: list[socket.socket] = []
        self._locks: dict[socket.socket, threading.Lock] = {}
        self._tasks: list[Task] = []
        self.start(self._accept)

    def start(self, fn: Callable[..., None], *args: Any) -> None:
        """Run *fn* in a thread; it ends when `close` closes its socket."""
        self._tasks.append(Task(fn, *args, name="relay"))

    def send(self, target: socket.socket, data: bytes) -> None:
        """Send all of *data*, without interleaving."""
        with self._locks[target]:
            target.sendall(data)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._locks |= {client: threading.Lock(), server: threading.Lock()}
                self.clients.append(client)
                self._servers.append(server)
                self.start(self._forward, client, server)
                self.start(self._forward, server, client)

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self.send(target, data)
            target.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cut all connections, and end the threads."""
        for each in (self._listener, *self.clients, *self._servers):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for task in self._tasks:
            task.result(10)
