"""A TCP proxy between a pool and a server that can misbehave as networks do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any, TypeVar

from psycopg.conninfo import make_conninfo

from .postgres import free_port

T = TypeVar("T")

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # linger for no time: close() sends RST


class Mode(Enum):
    """What happens to a new connection."""

    PASS = "it is passed on"
    SILENT = "it is accepted, and never answered"
    RESET = "it is accepted, and reset"
    CLOSE = "it is closed once the client has sent its first message"


class Cut(Enum):
    """When a connection is cut, relative to a message of the client."""

    BEFORE = "it never reaches the server"
    DURING = "the server processes it, the client gets no answer"
    AFTER = "once the client has its answer"


class Proxy:
    """Listens on 127.0.0.1 and forwards connections to the server at *port*.

    All work is done in one thread of its own. With *tls* it speaks TLS with the client, as a
    server built with TLS does.
    """

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.target = port
        self.mode = Mode.PASS
        self.delay = 0.0  # seconds before each chunk is passed on
        self.hides_close = False  # whether clients do not see that the server closed
        self.accepted = 0
        self.translate: Callable[[bytes], bytes] | None = None  # changes what the server sends
        self._tls = tls
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._cuts: list[tuple[bytes, Cut, int]] = []
        self._listener: socket.socket | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._thread.start()
        self.port = free_port()
        self.listen()

    def conninfo_for(self, **params: object) -> str:
        """The connection string through this proxy: the superuser's, or with *params*."""
        defaults = {
            "host": "127.0.0.1",
            "port": self.port,
            "user": "postgres",
            "dbname": "postgres",
        }
        merged: dict[str, Any] = {**defaults, **params}
        return make_conninfo("", **merged)

    @property
    def conninfo(self) -> str:
        """The superuser's connection string."""
        return self.conninfo_for()

    # Faults

    def listen(self) -> None:
        """Accept connections again, on the same port."""
        self._call(self._listen())

    def refuse(self) -> None:
        """Accept no more connections; existing ones stay."""
        self._call(self._refuse())

    def drop(self, *, reset: bool = False) -> None:
        """End all connections, by FIN or by RST."""
        self._call(self._drop(reset))

    def go_silent(self) -> None:
        """From now on discard what either side sends on existing connections."""
        for link in list(self._links):
            link.silent = True

    def cut(self, pattern: bytes, when: Cut, *, messages: int = 0) -> None:
        """Cut a connection at the client's next message that contains *pattern*.

        With `Cut.DURING` the client still gets that many whole messages of the server's answer.
        """
        self._cuts.append((pattern, when, messages))

    @property
    def is_armed(self) -> bool:
        """Whether a cut is still to come."""
        return bool(self._cuts)

    @property
    def links(self) -> int:
        """The number of connections."""
        return len(self._links)

    def close(self) -> None:
        """End all connections and the thread."""
        self._call(self._refuse())
        self._call(self._drop(False))
        self._call(self._await_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    # In the proxy's thread

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self._listener.setblocking(False)
            self._loop.add_reader(self._listener, self._accept, self._listener)

    async def _refuse(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            client = listener.accept()[0]
            task = self._loop.create_task(self._connect(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, client: socket.socket) -> None:
        # asyncio's own server leaks a connection that it accepts while it is being closed.
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader, self._serve)
        await self._loop.connect_accepted_socket(lambda: protocol, client)

    async def _drop(self, reset: bool) -> None:
        for link in list(self._links):
            link.end(reset)

    async def _await_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # lets transports report that they are closed

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        link = _Link(self, reader, writer)
        self._links.add(link)
        try:
            await link.serve()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            link.end()
            self._links.discard(link)


class _Link:
    """One connection through the proxy."""

    def __init__(
        self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.silent = False
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._upstream: asyncio.StreamWriter | None = None
        self._armed: Cut | None = None
        self._messages = 0
        self._ended = asyncio.Event()
        # Nothing else holds a reference to a task that waits.
        self._task = asyncio.current_task()

    def end(self, reset: bool = False) -> None:
        """Close both sides."""
        self._ended.set()
        for writer in filter(None, (self._writer, self._upstream)):
            if reset and (raw := writer.get_extra_info("socket")) is not None:
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort() if reset else writer.close()

    async def serve(self) -> None:
        mode = self._proxy.mode
        if mode is Mode.RESET:
            self.end(reset=True)
        elif mode is Mode.SILENT:
            await self._reader.read(-1)
        elif mode is Mode.CLOSE:
            await self._reader.read(1)
        else:
            await self._forward()

    async def _forward(self) -> None:
        if self._proxy._tls is not None:
            request = await self._reader.readexactly(len(_SSL_REQUEST))
            assert request == _SSL_REQUEST
            self._writer.write(b"S")
            await self._start_tls(self._proxy._tls)
        answers, self._upstream = await asyncio.open_connection("127.0.0.1", self._proxy.target)
        sides = [
            asyncio.ensure_future(self._pump(self._reader, self._upstream, self._from_client)),
            asyncio.ensure_future(self._pump(answers, self._writer, self._from_server)),
        ]
        try:
            await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for side in sides:
                side.cancel()
            await asyncio.gather(*sides, return_exceptions=True)

    async def _start_tls(self, context: ssl.SSLContext) -> None:
        plain: Any = self._writer.transport
        try:
            await self._writer.start_tls(context)
        except AttributeError as ex:  # asyncio raises this if the client has gone
            self._writer._transport = plain  # type: ignore[attr-defined]
            raise ConnectionAbortedError from ex

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        transform: Callable[[bytes], bytes],
    ) -> None:
        while chunk := await reader.read(65536):
            if self.silent:
                continue
            if self._proxy.delay:
                await asyncio.sleep(self._proxy.delay)
            if passed := transform(chunk):
                writer.write(passed)
                await writer.drain()
            else:
                break
            if self._armed is Cut.AFTER and transform == self._from_server:
                break
        hidden = self._proxy.hides_close and transform == self._from_server
        if self.silent or hidden:  # one side has closed, and the other must not see it
            await self._ended.wait()

    def _from_client(self, chunk: bytes) -> bytes:
        for cut in self._proxy._cuts:
            pattern, when, messages = cut
            if pattern in chunk:
                self._proxy._cuts.remove(cut)
                self._armed, self._messages = when, messages
                return b"" if when is Cut.BEFORE else chunk
        return chunk

    def _from_server(self, chunk: bytes) -> bytes:
        if self._armed is Cut.DURING:
            self._armed, end = Cut.AFTER, 0
            for _ in range(self._messages):
                end += 1 + int.from_bytes(chunk[end + 1 : end + 5])
            return chunk[:end]
        translate = self._proxy.translate
        return chunk if translate is None else translate(chunk)
