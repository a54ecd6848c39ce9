"""How the log reports trouble: one warning for each episode, not one for each call."""

from __future__ import annotations

import logging
import socket
import struct
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ctypes import addressof, create_string_buffer
from typing import Any

import psycopg
import pytest

from dbpool import Pool
from tests.pools import (
    GRACE,
    MakePool,
    exhaustion_message,
    fill,
    lines,
    terminate,
    time_out_callers,
)
from tests.postgres import Server, until
from tests.sockets import Relay
from tests.threads import Task

from .test_saturation import MAX_CLIENTS, Clients, clients, small  # noqa: F401  # fixtures


def test_a_full_server_logs_one_warning_with_numbers(
    small: Server,  # noqa: F811
    clients: Clients,  # noqa: F811
    make_pool: MakePool,
    log: pytest.LogCaptureFixture,
) -> None:
    pool = make_pool(small.conninfo_for(user="app"), server=small, min_size=1, max_size=4)
    fill(pool)
    clients.connect(MAX_CLIENTS - 1)
    with pool.connection():
        caller = Task(time_out_callers, pool, 1, 30.0)
        until(lambda: pool.stats().counters.connect_failures >= 4)
        (warning,) = lines(log, logging.WARNING)
    caller.result(20)
    assert "no new connection (saturated)" in warning
    assert "1 of at most 4 exist, 1 waiting" in warning
    clients.disconnect()
    until(lambda: not pool.breaker.is_failing)


def test_a_changed_password_is_logged_while_old_connections_serve(
    own_server: Server, make_pool: MakePool, log: pytest.LogCaptureFixture
) -> None:
    own_server.execute("create role app login password 'right'")
    pool = make_pool(own_server.conninfo_for(user="app", password="right"), max_size=2)
    with pool.connection() as conn:
        own_server.execute("alter role app password 'new'")
        caller = Task(time_out_callers, pool, 1, 1.5)
        until(lambda: lines(log, logging.WARNING))
        assert conn.execute("select 1").fetchone() == (1,)
        own_server.execute("alter role app password 'right'")
    caller.result(20)
    assert "no new connection (password)" in lines(log, logging.WARNING)[0]
    until(lambda: not pool.breaker.is_failing)


def test_connections_replaced_after_a_restart_log_one_line(
    own_server: Server, make_pool: MakePool, log: pytest.LogCaptureFixture
) -> None:
    pool = make_pool(min_size=4, max_size=4)
    fill(pool)
    own_server.restart()
    assert pool.fetch_value("select 1") == 1
    until(lambda: "replaced" in log.text)
    logged = [line for line in lines(log, logging.INFO) if "replaced" in line]
    assert logged == ["pool 'faults': replaced 4 connections that the server closed"]
    assert not lines(log, logging.WARNING)


def test_one_replaced_connection_is_logged_in_the_singular(
    own_server: Server, make_pool: MakePool, log: pytest.LogCaptureFixture
) -> None:
    pool = make_pool(max_size=1)
    terminate(own_server, fill(pool))
    assert pool.fetch_value("select 1") == 1
    until(lambda: "replaced 1 connection that the server closed" in log.text)


# Why no connection came back


def drop_all_packets(receiver: socket.socket) -> None:
    """Let the kernel drop all packets for that socket without acknowledging them."""
    code = create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF: return 0 bytes
    receiver.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HL", 1, addressof(code)))


def detach_filter(receiver: socket.socket) -> None:
    with suppress(OSError):
        receiver.setsockopt(socket.SOL_SOCKET, 27, 0)


class SilentRelay(Relay):
    """Passes bytes on until its network goes silent."""

    def go_silent(self) -> None:
        for client in self.clients:
            with suppress(OSError):  # this client has gone
                drop_all_packets(client)

    def close(self) -> None:
        for client in self.clients:
            detach_filter(client)
        super().close()


@pytest.fixture
def relay(server: Server) -> Iterator[SilentRelay]:
    relay = SilentRelay(server.port)
    yield relay
    relay.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has TCP_INFO")
def test_exhaustion_names_a_silent_network_if_tcp_reports_one(
    server: Server, relay: SilentRelay
) -> None:
    conninfo = server.conninfo_for(port=relay.port)
    # The relay takes one connection. With these options the pool needs no second one.
    options: Any = {"statement_timeout": "server", "idle_in_transaction_timeout": "server"}
    with Pool(conninfo, max_size=1, timeout=1.0, **options) as pool:
        conn = pool.getconn()
        relay.go_silent()
        holder = Task(conn.execute, "select 1")
        until(lambda: conn.pgconn.transaction_status == psycopg.pq.TransactionStatus.ACTIVE)
        with ThreadPoolExecutor(1) as threads:
            text = threads.submit(exhaustion_message, pool).result()
        relay.close()
        assert isinstance(holder.error(10), psycopg.Error)
        pool.putconn(conn)
    assert "a silent network: 1 of 1 sockets wait for acknowledgements" in text


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has TCP_INFO")
def test_an_outage_that_begins_as_a_silent_network_has_its_full_duration(
    server: Server, relay: SilentRelay, log: pytest.LogCaptureFixture
) -> None:
    conninfo = server.conninfo_for(port=relay.port)
    with Pool(conninfo, max_size=1, timeout=1.0, outage_grace=GRACE) as pool:
        conn = pool.getconn()
        relay.go_silent()
        began = time.monotonic()
        holder = Task(conn.execute, "select 1")
        until(lambda: conn.pgconn.transaction_status == psycopg.pq.TransactionStatus.ACTIVE)
        with ThreadPoolExecutor(1) as threads:
            threads.submit(exhaustion_message, pool).result()
        relay.close()
        assert isinstance(holder.error(10), psycopg.Error)
        pool.putconn(conn)
        until(lambda: pool.state == "down")
        second_relay = SilentRelay(server.port, relay.port)
        until(lambda: "is back after" in log.text)
        seconds = float(log.text.partition("is back after ")[2].split()[0])
        pool.close()
        second_relay.close()
    assert 1.0 < seconds <= time.monotonic() - began + 0.1, "the figure is rounded"
