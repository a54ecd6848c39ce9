"""Is this connection alive? A look that costs no round trip, and a ping that cannot hang.

Works on libpq primitives alone, so that every wait in here has a deadline.
"""

from __future__ import annotations

import enum
import logging
import os
import select
import socket
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
from psycopg import Connection
from psycopg.errors import Diagnostic, error_from_result
from psycopg.pq import ConnStatus, ExecStatus, PollingStatus, TransactionStatus
from psycopg.pq.abc import PGcancelConn, PGconn, PGresult

logger = logging.getLogger("dbpool")

_OK = ConnStatus.OK
_MAX_READS = 8  # in one look, of some 16 kB each


class Liveness(enum.Enum):
    """What `check_socket` found out about a connection."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"  # what the server sent proves nothing: only a ping can tell


class PingTimeout(psycopg.OperationalError):
    """The server did not answer a ping in time."""


def poller(fd: int, events: int = 1) -> Callable[[float], object]:
    """Return a callable that waits that many *milliseconds* until *fd* can be read.

    Its answer is true if there is something to read, end of file included. Made once for a
    connection: registering costs more than polling. *events* is `select.POLLIN` (1), or
    `select.POLLOUT` (4) to wait until *fd* can be written.
    """
    if hasattr(select, "poll"):
        poller = select.poll()
        poller.register(fd, events)
        return poller.poll

    def wait(milliseconds: float) -> bool:
        fds = ([fd], []) if events == 1 else ([], [fd])
        return any(select.select(*fds, [], milliseconds / 1000.0))

    return wait


def closed_by_peer(fds: Iterable[int]) -> set[int]:
    """Return those of *fds* whose peer has closed, in one system call.

    Best effort: empty where the system has no `poll`, and only what is closed both ways
    where `poll` does not tell a half-closed socket.
    """
    if not hasattr(select, "poll"):
        return set()
    poller = select.poll()
    for fd in fds:
        poller.register(fd, getattr(select, "POLLRDHUP", 0))
    return {fd for fd, _ in poller.poll(0)}


def file_limit_error() -> str | None:
    """What the system says where this process may open no more files, None if it may."""
    try:
        with ExitStack() as spare:
            for _ in range(4):  # as many as connecting may need at once
                spare.enter_context(Path(os.devnull).open())
    except OSError as ex:
        return ex.strerror
    return None


def is_active(conn: Connection[Any] | None) -> bool:
    """Whether *conn* waits for the answer to a statement."""
    return conn is not None and conn.pgconn.transaction_status == TransactionStatus.ACTIVE


def is_retransmitting(fd: int) -> bool:
    """Whether TCP sends again what the peer of *fd* has not acknowledged. Linux alone can tell."""
    try:
        with socket.socket(fileno=os.dup(fd)) as copy:
            # Retransmits, unanswered probes, and back-off.
            return any(copy.getsockopt(socket.IPPROTO_TCP, getattr(socket, "TCP_INFO", -1), 5)[2:5])
    except OSError:
        return False


def check_socket(
    conn: Connection[Any],
    readable: Callable[[float], object],
    fatal_errors: list[psycopg.Error] | None = None,
) -> Liveness:
    """Read what an idle connection's server has said meanwhile, without asking it.

    What it died of, if it said so, is added to *fatal_errors*. Reads until the socket is quiet, but
    no more than some times: a server may send notices faster than they are read. A FATAL is the
    end, also where the end of file is not there yet: after `pg_terminate_backend` it may come half
    a millisecond later.
    """
    if not readable(0):
        return Liveness.ALIVE if conn.pgconn.status == _OK else Liveness.DEAD
    fatal = [] if fatal_errors is None else fatal_errors

    def collect_fatal(notice: Diagnostic) -> None:  # the notice is empty once this returns
        if notice.severity_nonlocalized in ("FATAL", "PANIC"):
            fatal.append(_notice_error(notice))

    conn.add_notice_handler(collect_fatal)
    try:
        for _ in range(_MAX_READS):
            conn.pgconn.consume_input()
            conn.pgconn.is_busy()  # parses what was read; notices go to the handler
            if conn.pgconn.status != _OK or fatal:
                return Liveness.DEAD
            if not readable(0):
                break
    except psycopg.OperationalError:
        return Liveness.DEAD
    finally:
        conn.remove_notice_handler(collect_fatal)
    _deliver_notifies(conn.pgconn)
    return Liveness.UNKNOWN


def _deliver_notifies(pgconn: PGconn) -> None:
    """Pass on the notifications that libpq has read: nothing else would before more arrives."""
    while pgconn.notify_handler is not None and (notify := pgconn.notifies()) is not None:
        try:
            pgconn.notify_handler(notify)
        except Exception as ex:  # noqa: BLE001  # a handler of the user's may raise anything
            logger.warning("a notify handler failed: %s", type(ex).__name__)


def _notice_error(notice: Diagnostic) -> psycopg.Error:
    try:
        cls: type[psycopg.Error] = psycopg.errors.lookup(notice.sqlstate or "")
    except KeyError:
        cls = psycopg.OperationalError
    return cls(notice.message_primary or "")


def ping(conn: Connection[Any], timeout: float) -> None:
    """Make one round trip with an empty query, outside any transaction, in *timeout* seconds.

    Raise `PingTimeout` if no answer came, another `psycopg.Error` if the connection is dead
    or the server answers with an error; after either it is good for closing only.
    """
    answer = run_query(conn, b"", timeout)
    if answer.status != ExecStatus.EMPTY_QUERY:
        raise error_from_result(answer, encoding=conn.info.encoding)


def run_query(conn: Connection[Any], query: bytes, timeout: float) -> PGresult:
    """Send one *query* and return its first result, or its error; for the rest see `ping`."""
    deadline = monotonic() + timeout
    pgconn = conn.pgconn
    pgconn.send_query(query)
    while pgconn.flush():
        _wait_ready(poller(pgconn.socket, events=4), deadline)
    answer = None
    try:
        while (result := _next_result(pgconn, deadline)) is not None:
            if answer is None or result.status == ExecStatus.FATAL_ERROR:
                answer = result
    except psycopg.OperationalError:  # what it said before it hung up tells more
        if answer is None or answer.status != ExecStatus.FATAL_ERROR:
            raise
    _deliver_notifies(pgconn)
    if answer is None:
        raise psycopg.OperationalError("the server gave no answer")
    return answer


def cancel(request: PGcancelConn, timeout: float) -> None:
    """Send a cancel request and wait until the server has taken it, *timeout* seconds at most."""
    deadline = monotonic() + timeout
    request.start()
    while (status := request.poll()) not in (PollingStatus.OK, PollingStatus.FAILED):
        _wait_ready(poller(request.socket, 1 if status == PollingStatus.READING else 4), deadline)


def _next_result(pgconn: PGconn, deadline: float) -> PGresult | None:
    """Return the next result, None when there are no more; never waits beyond *deadline*."""
    readable = poller(pgconn.socket)
    while pgconn.is_busy():
        _wait_ready(readable, deadline)
        pgconn.consume_input()
    return pgconn.get_result()


def _wait_ready(ready: Callable[[float], object], deadline: float) -> None:
    remaining = deadline - monotonic()
    if remaining <= 0 or not ready(remaining * 1000.0):
        raise PingTimeout("the server did not answer a ping in time")
