"""Waiting for sockets, on systems with and without `poll`."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest

from dbpool import Pool
from dbpool.liveness import PingTimeout, closed_by_peer, ping, poller


@pytest.fixture(params=["poll", "select"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "select":
        monkeypatch.delattr(select, "poll")
    return str(request.param)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    sock, peer = socket.socketpair()
    with sock, peer:
        yield sock, peer


def test_a_socket_with_data_or_closed_by_its_peer_is_readable(
    system: str, pair: tuple[socket.socket, socket.socket]
) -> None:
    sock, peer = pair
    readable = poller(sock.fileno())
    assert not readable(0)
    assert not readable(1)
    peer.send(b"x")
    assert readable(0)
    sock.recv(1)
    assert not readable(0)
    peer.close()
    assert readable(0)


def test_a_socket_with_room_in_its_buffer_is_writable(
    system: str, pair: tuple[socket.socket, socket.socket]
) -> None:
    sock, _ = pair
    writable = poller(sock.fileno(), events=4)
    assert writable(0)
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            sock.send(b"x" * 65536)
    assert not writable(0)


def test_closed_by_peer_finds_closed_sockets_only_with_poll(
    system: str, pair: tuple[socket.socket, socket.socket]
) -> None:
    sock, peer = pair
    other, its_peer = socket.socketpair()
    with other, its_peer:
        peer.close()
        found = closed_by_peer([sock.fileno(), other.fileno()])
    assert found == ({sock.fileno()} if system == "poll" else set())


def test_a_ping_and_a_checkout_need_no_poll(system: str, dsn: str) -> None:
    with Pool(dsn, ping_after=0.0) as pool:
        for _ in range(3):
            assert pool.fetch_value("select 1") == 1
        with pool.connection() as conn:
            ping(conn, 1.0)
            with pytest.raises(PingTimeout):
                ping(conn, 0.0)
            conn.close()
