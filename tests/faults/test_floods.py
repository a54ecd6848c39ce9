"""A server that sends notices without end, and notifications to idle connections."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest

from dbpool import Pool
from tests.pools import SLACK
from tests.postgres import Server, until
from tests.sockets import Relay


def notice(text: bytes) -> bytes:
    """A NoticeResponse of PostgreSQL's protocol."""
    fields = b"SNOTICE\0VNOTICE\0C00000\0M" + text + b"\0\0"
    return b"N" + (len(fields) + 4).to_bytes(4, "big") + fields


class FloodingRelay(Relay):
    """Sends its clients notices without end."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self._stop = threading.Event()

    def flood(self) -> None:
        """From now on send notices without end to all present clients."""
        # Clients that have gone are left out: the pool connects once more to ask the server.
        flooded = [client for client in self.clients if not select.select([client], [], [], 0)[0]]
        for client in flooded:
            self.start(self._flood, client, notice(b"x" * 80) * 100)
        until(lambda: not select.select([], flooded, [], 0)[1])

    def _flood(self, client: socket.socket, chunk: bytes) -> None:
        with suppress(OSError):
            while not self._stop.is_set():
                self.send(client, chunk)

    def close(self) -> None:
        self._stop.set()
        super().close()


@pytest.fixture
def flooding_relay(server: Server) -> Iterator[FloodingRelay]:
    flooding_relay = FloodingRelay(server.port)
    yield flooding_relay
    flooding_relay.close()


@pytest.mark.parametrize("ping_after", [0.0, 30.0])
@pytest.mark.parametrize("is_answered", [True, False])
def test_timeouts_hold_while_the_server_floods_notices(
    server: Server, flooding_relay: FloodingRelay, ping_after: float, is_answered: bool
) -> None:
    with Pool(
        server.conninfo_for(port=flooding_relay.port),
        min_size=3,
        timeout=1.0,
        ping_timeout=0.5,
        ping_after=ping_after,
    ) as pool:
        pool.wait()
        conns = [pool.getconn() for _ in range(3)]
        if is_answered:  # users' handlers are slow, and nothing bounds them
            conns[0].add_notice_handler(lambda notice: None)
        for conn in conns:
            pool.putconn(conn)
        flooding_relay.flood()
        began = time.monotonic()
        with suppress(psycopg.OperationalError):
            pool.putconn(pool.getconn())
        assert time.monotonic() - began < 1.0 + SLACK
        began = time.monotonic()
        pool.check()
        assert time.monotonic() - began < 3 * 0.5 + SLACK


def listening(pool: Pool[Any]) -> Any:
    conn = pool.getconn()
    conn.autocommit = True
    conn.execute("listen news")
    conn.autocommit = False
    return conn


def announce(dsn: str, conn: Any) -> None:
    with psycopg.connect(dsn, autocommit=True) as other:
        other.execute("notify news, 'extra'")
    assert select.select([conn.fileno()], [], [], 10)[0], "no notification arrived"


@pytest.mark.parametrize("ping_after", [0.0, 30.0])
def test_the_next_holder_gets_notifications_sent_while_idle(dsn: str, ping_after: float) -> None:
    with Pool(dsn, max_size=1, ping_after=ping_after) as pool:
        conn = listening(pool)
        pool.putconn(conn)
        announce(dsn, conn)
        with pool.connection() as same:
            assert same is conn
            assert [n.payload for n in same.notifies(timeout=0)] == ["extra"]
            assert [n.payload for n in same.notifies(timeout=0)] == [], "it came twice"


def test_a_notify_handler_that_raises_gets_what_the_socket_check_reads(dsn: str) -> None:
    received: list[str] = []

    def receive(notify: psycopg.Notify) -> None:
        received.append(notify.payload)
        raise ValueError("not today")

    with Pool(dsn, max_size=1, configure=lambda conn: conn.add_notify_handler(receive)) as pool:
        conn = listening(pool)
        pool.putconn(conn)
        announce(dsn, conn)
        with pool.connection() as same:
            assert same is conn
            assert received == ["extra"]
        assert pool.stats().idle == 1


def test_notifications_that_check_reads_are_kept(dsn: str) -> None:
    with Pool(dsn, max_size=1) as pool:
        conn = listening(pool)
        pool.putconn(conn)
        announce(dsn, conn)
        pool.check()
        with pool.connection() as same:
            assert [n.payload for n in same.notifies(timeout=0)] == ["extra"]


def test_many_notifications_are_kept_complete_and_in_order(dsn: str) -> None:
    with Pool(dsn, max_size=1) as pool:
        conn = listening(pool)
        pool.putconn(conn)
        with psycopg.connect(dsn) as other:
            for number in range(2000):
                other.execute("select pg_notify('news', %s)", [f"{number} {'x' * 500}"])
        assert select.select([conn.fileno()], [], [], 10)[0]
        received: list[int] = []
        while len(received) < 2000:
            with pool.connection() as same:
                received += [int(n.payload.split()[0]) for n in same.notifies(timeout=0.5)]
        assert received == list(range(2000))
