"""The session of a test: one transaction, with savepoints for the transactions within it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import psycopg
from psycopg.pq import ExecStatus, PipelineStatus, TransactionStatus


class RoundTrips:
    """The number of round trips in a block, `count`: as many as the code makes outside of tests.

    What psycopg sends to prepare a statement that has run five times is not counted.
    """

    __module__ = "dbpool.testing"

    def __init__(self) -> None:
        self.count = 0

    def __repr__(self) -> str:
        return f"<RoundTrips count={self.count}>"


class Level:
    """A savepoint, for a transaction or for a block within one."""

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.is_failed = False


class Session:
    """The connection that a test uses, and its savepoints.

    Blocks of one thread nest. Another thread's block waits until they are over; a single statement
    of another thread does not wait.
    """

    def __init__(self, main: psycopg.Connection[Any], timeout: float) -> None:
        self.main, self.pgconn, self.timeout = main, main.pgconn, timeout
        self.lock = threading.Lock()  # one exchange at a time
        self.counters: set[RoundTrips] = set()
        self.is_over = False
        self.was_ended = False  # by a statement of the test's own
        self.forgotten: list[Level] = []  # by views that were garbage-collected
        self._levels: list[Level] = []
        self._owner: int | None = None  # the thread whose blocks are open
        self._released = threading.Condition()
        self._names = count(1)  # 0 is for statements that stand alone
        self._send(b"begin")

    def _send(self, command: bytes) -> None:
        result = self.pgconn.exec_(command)
        if result.status != ExecStatus.COMMAND_OK:
            raise psycopg.OperationalError(result.get_error_message())

    def trip(self, number: int = 1) -> None:
        """Count round trips."""
        for counter in self.counters:
            counter.count += number

    def begin(self) -> Level:
        """Begin a block; wait for other threads' blocks to end."""
        me = threading.get_ident()
        with self._released:
            for level in self._take_forgotten():
                self.end(level, commit=False)
            if not self._released.wait_for(lambda: self._owner in (None, me), self.timeout):
                raise TimeoutError(
                    "a block of another thread is still open: in a test that runs in one"
                    " transaction, the blocks of different threads run one after another"
                )
            self._owner = me
            return self.nest()

    def nest(self) -> Level:
        """Set a savepoint."""
        level = Level(b"dbpool_%d" % next(self._names))
        with self.lock:
            self._send(b"savepoint " + level.name)
        self._levels.append(level)
        return level

    def _take_forgotten(self) -> list[Level]:
        taken, self.forgotten = self.forgotten, []
        return taken

    def end(self, level: Level, *, commit: bool) -> None:
        """End a block; blocks that began after it go on."""
        with self._released:
            with self.lock:
                above = self._settle(level, commit)
                if not above:
                    self._send(b"release " + level.name)
            self._levels.remove(level)
            if not self._levels:
                self._owner = None
                self._released.notify_all()

    def restart(self, level: Level, *, commit: bool) -> None:
        """Begin a new transaction, as commit() and rollback() do."""
        with self._released, self.lock:
            above = self._settle(level, commit)
            if above:  # undoing one of those must not undo what is kept here
                self._levels.remove(level)
                self._levels.append(level)
            else:
                self._send(b"release " + level.name)
            self._send(b"savepoint " + level.name)
        level.is_failed = False

    def _settle(self, level: Level, commit: bool) -> list[Level]:
        """Undo what a block did unless it is kept; return the blocks that began after it."""
        above = self._levels[self._levels.index(level) + 1 :]
        if not commit or level.is_failed or self.is_in_error:
            self._send(b"rollback to " + level.name)
            for other in above:
                self._send(b"savepoint " + other.name)
        return above

    @property
    def is_in_error(self) -> bool:
        """Whether the server refuses everything until a rollback."""
        return self.pgconn.transaction_status == TransactionStatus.INERROR

    @contextmanager
    def guarded(self, level: Level | None) -> Iterator[None]:
        """After an error, undo the *level*, or without one the statement. The lock is held."""
        is_plain = self.pgconn.pipeline_status == PipelineStatus.OFF
        if level is None and is_plain:
            self._send(b"savepoint dbpool_0")
        try:
            yield
        except BaseException:
            if is_plain and self.is_in_error:
                self._send(b"rollback to " + (level.name if level else b"dbpool_0"))
                if level is not None:
                    level.is_failed = True
            raise
        finally:
            status = self.pgconn.transaction_status
            if level is None and is_plain and status == TransactionStatus.INTRANS:
                self._send(b"release dbpool_0")
            elif status == TransactionStatus.IDLE:
                self._begin_again()

    def _begin_again(self) -> None:
        """Go on after a statement, such as COMMIT, that ended the transaction of the test."""
        self.was_ended = True
        self._send(b"begin")
        for each in self._levels:
            self._send(b"savepoint " + each.name)

    def close(self) -> None:
        """Undo everything; views that are still used find their connection closed."""
        self.is_over = True
        with suppress(psycopg.Error):
            self._send(b"rollback")
