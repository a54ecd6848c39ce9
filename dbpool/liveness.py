"""Whether a connection is alive: a check without a round trip, and a ping that cannot hang.

It uses only libpq's primitives, so that every wait has a deadline.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import select
import socket
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from time import monotonic
from typing import Any

import psycopg
from psycopg import Connection
from psycopg.errors import Diagnostic, error_from_result
from psycopg.pq import ConnStatus, ExecStatus, PollingStatus, TransactionStatus
from psycopg.pq.abc import PGcancelConn, PGconn, PGresult

logger = logging.getLogger("dbpool")

Poll = Callable[[float], object]  # of one descriptor, with a time in milliseconds
_OK = ConnStatus.OK
_MAX_READS = 8  # in one check, of about 16 kB each
_READ, _WRITE = 1, 4  # POLLIN and POLLOUT, also where the system has no `poll`


class Liveness(enum.Enum):
    """What `check_socket` finds out about a connection."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"  # the server sent something that proves nothing: only a ping can tell


class PingTimeout(psycopg.OperationalError):
    """The server did not answer a ping in time."""


def poller(fd: int, events: int = _READ) -> Poll:
    """Return a function that waits at most that many *milliseconds* until *fd* can be read.

    The function returns a true value if there is data or end of file. Make one per connection:
    registering costs more than polling. *events* is `select.POLLIN` (1), or `select.POLLOUT` (4)
    to wait until *fd* can be written.
    """
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(fd, events)
        return poll.poll
    fds = ([fd], []) if events == _READ else ([], [fd])
    return lambda milliseconds: any(select.select(*fds, [], milliseconds / 1000.0))


def closed_by_peer(fds: Iterable[int]) -> set[int]:
    """Return those of *fds* that the peer has closed, with one system call.

    This is a best effort: without `poll` it returns none. If the system's `poll` does not report
    half-closed sockets, it returns only those closed in both directions.
    """
    if not hasattr(select, "poll"):
        return set()
    poll = select.poll()
    for fd in fds:
        poll.register(fd, getattr(select, "POLLRDHUP", 0))
    return {fd for fd, _ in poll.poll(0)}


def file_limit_error() -> str | None:
    """Return the system's message if this process may open no more files, else None."""
    try:
        with ExitStack() as spare:
            for _ in range(4):  # a connect may need as many at once
                spare.callback(os.close, os.open("/", os.O_RDONLY))  # there in a chroot too
    except OSError as ex:
        return ex.strerror if ex.errno in (errno.EMFILE, errno.ENFILE) else None
    return None


def is_active(conn: Connection[Any] | None) -> bool:
    """Whether *conn* waits for the answer to a statement."""
    return conn is not None and conn.pgconn.transaction_status == TransactionStatus.ACTIVE


def is_retransmitting(fd: int) -> bool:
    """Whether TCP retransmits data that the peer of *fd* has not acknowledged; Linux only."""
    try:
        with socket.socket(fileno=os.dup(fd)) as copy:
            # Retransmits, unanswered probes, and back-off.
            return any(copy.getsockopt(socket.IPPROTO_TCP, getattr(socket, "TCP_INFO", -1), 5)[2:5])
    except OSError:
        return False


def check_socket(
    conn: Connection[Any], readable: Poll, fatal_errors: list[psycopg.Error] | None = None
) -> Liveness:
    """Read what the server has sent on an idle connection, without sending it anything.

    FATAL messages are appended to *fatal_errors*. The socket is read until it is quiet, but at most
    `_MAX_READS` times, since a server may send notices faster than they are read. After a FATAL the
    connection counts as dead: end of file may come half a millisecond later, as after
    `pg_terminate_backend`.
    """
    if not readable(0):
        return Liveness.ALIVE if conn.pgconn.status == _OK else Liveness.DEAD
    fatal = [] if fatal_errors is None else fatal_errors

    def collect_fatal(notice: Diagnostic) -> None:  # its fields are valid only during this call
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
    """Pass on notifications that libpq has read; psycopg would do so only when more data comes."""
    while pgconn.notify_handler is not None and (notify := pgconn.notifies()) is not None:
        try:
            pgconn.notify_handler(notify)
        except Exception as ex:  # noqa: BLE001  # a user's handler may raise anything
            logger.warning("a notify handler failed: %s", type(ex).__name__)


def _notice_error(notice: Diagnostic) -> psycopg.Error:
    text = notice.message_primary or ""
    with suppress(KeyError):
        return psycopg.errors.lookup(notice.sqlstate or "")(text)
    return psycopg.OperationalError(text)


def ping(conn: Connection[Any], timeout: float) -> None:
    """Make one round trip with an empty query, outside any transaction, in *timeout* seconds.

    Raise `PingTimeout` if no answer comes, another `psycopg.Error` if the connection is dead or the
    server answers with an error. After either error the connection can only be closed.
    """
    answer = run_query(conn, b"", timeout)
    if answer.status != ExecStatus.EMPTY_QUERY:
        raise error_from_result(answer, encoding=conn.info.encoding)


def run_query(conn: Connection[Any], query: bytes, timeout: float) -> PGresult:
    """Send one *query* and return its first result, or its error; *timeout* is as in `ping`."""
    deadline, pgconn = monotonic() + timeout, conn.pgconn
    pgconn.send_query(query)
    while pgconn.flush():
        _wait_ready(poller(pgconn.socket, _WRITE), deadline)
    answer = None
    try:
        while (result := _next_result(pgconn, deadline)) is not None:
            if answer is None or result.status == ExecStatus.FATAL_ERROR:
                answer = result
    except psycopg.OperationalError:  # the server's own error says more than the lost connection
        if answer is None or answer.status != ExecStatus.FATAL_ERROR:
            raise
    _deliver_notifies(pgconn)
    if answer is None:
        raise psycopg.OperationalError("the server gave no answer")
    return answer


def notice_loss(conn: Connection[Any]) -> None:
    """Have libpq notice a loss that psycopg noticed alone: `poll` may report it before any data.

    What the server sent before the loss is read first: no more of it can come.
    """
    if is_active(conn):
        with suppress(psycopg.OperationalError):
            conn.pgconn.consume_input()
            while closed_by_peer([conn.pgconn.socket]):
                conn.pgconn.consume_input()


def cancel(request: PGcancelConn, timeout: float) -> None:
    """Send a cancel request and wait at most *timeout* seconds until the server has read it."""
    deadline = monotonic() + timeout
    request.start()
    while (status := request.poll()) not in (PollingStatus.OK, PollingStatus.FAILED):
        events = _READ if status == PollingStatus.READING else _WRITE
        _wait_ready(poller(request.socket, events), deadline)


def _next_result(pgconn: PGconn, deadline: float) -> PGresult | None:
    """Return the next result, None after the last; never waits beyond *deadline*."""
    readable = poller(pgconn.socket)
    while pgconn.is_busy():
        _wait_ready(readable, deadline)
        pgconn.consume_input()
    return pgconn.get_result()


def _wait_ready(ready: Poll, deadline: float) -> None:
    if (remaining := deadline - monotonic()) <= 0 or not ready(min(remaining, 1e6) * 1000.0):
        raise PingTimeout("the server did not answer a ping in time")
