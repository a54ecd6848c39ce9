"""Whole transactions, run again where that is safe: `Pool.run`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from time import monotonic, sleep
from types import FrameType
from typing import Any, TypeVar
from weakref import ref

import psycopg
from psycopg import IsolationLevel
from psycopg.errors import error_from_result
from psycopg.generators import fetch, send
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg_pool.abc import CT

from dbpool import events
from dbpool._outcomes import is_lost_unanswered
from dbpool._upkeep import Upkeep
from dbpool.errors import CommitUncertain, DatabaseMisconfigured, DatabaseUnavailable, describe
from dbpool.holders import Owner
from dbpool.liveness import Liveness, check_socket
from dbpool.retry import Budget, delays, is_conflict

T = TypeVar("T")

_IDLE, _INERROR = TransactionStatus.IDLE, TransactionStatus.INERROR


_LOOK = 0.02  # seconds between two looks whether an outage is over


class Runner(Upkeep[CT]):
    """A pool that can run a function in a transaction of its own."""

    def _clear(self) -> None:
        super()._clear()
        self._budget = Budget(2 * self.settings.max_size)

    def run(
        self,
        fn: Callable[..., T],
        *args: Any,
        attempts: int = 3,
        idempotent: bool = False,
        isolation: IsolationLevel | None = None,
        read_only: bool = False,
        timeout: float | None = None,
    ) -> T:
        """Call `fn(conn, *args)` in one transaction, and again if that may help.

        The transaction begins before *fn* is called, and is set up by *isolation* and *read_only*.
        The whole transaction is retried, at most *attempts* times in all, after a
        serialization failure or a deadlock, and after losing the connection before COMMIT
        was sent; with *idempotent* also after losing it during COMMIT, which otherwise
        raises `CommitUncertain`. Any other error is raised at once; `psycopg.Rollback` rolls
        back, and None is returned. A block of `conn.transaction()` in *fn* is a savepoint;
        commit and rollback are not its business, and psycopg refuses them. *timeout*, in
        seconds, bounds waiting for connections and retrying; given one, an outage is waited out.
        """
        deadline = None if timeout is None else monotonic() + timeout
        pauses = delays(first=0.05, cap=1.0)
        for attempt in count(1):
            step = Owner()
            owner = ref(step)
            # Not kept in a variable: a frame that holds itself holds the connection as well.
            caller = sys._getframe().f_back
            conn = self._acquire_patiently(deadline, caller or sys._getframe(), owner)
            try:
                try:
                    result = self._transact(conn, fn, args, isolation, read_only)
                except psycopg.Error as ex:
                    pause = next(pauses)
                    late = deadline is not None and monotonic() + pause >= deadline
                    if late or attempt >= attempts or not self._may_retry(ex, conn, idempotent):
                        failed: psycopg.Error = self._lost_server(ex) or ex
                        raise failed from failed.__cause__
                    # Itself it would hold this frame, and so the connection.
                    error = describe(ex, conn)
                else:
                    self._budget.refund()
                    return result
                finally:
                    self._release(conn)
            except BaseException:  # where it was given back this does nothing
                self._recover(owner)
                raise
            self._tell_retry(attempt, error, pause)
            sleep(pause)
        raise AssertionError("unreachable")

    def _acquire_patiently(self, deadline: float | None, frame: FrameType, owner: ref[Any]) -> CT:
        """Acquire; with a deadline, wait out an outage that waiting may cure."""
        if deadline is None:
            return self._acquire(None, frame, owner)
        while True:
            remaining = deadline - monotonic()
            try:
                return self._acquire(max(0.0, remaining), frame, owner)
            except DatabaseUnavailable as ex:
                if remaining <= 0.0 or isinstance(ex, DatabaseMisconfigured):
                    raise
            while self.state == "down" and (left := deadline - monotonic()) > 0.0:
                sleep(min(left, _LOOK))

    def _transact(
        self,
        conn: Any,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        isolation: IsolationLevel | None,
        read_only: bool,
    ) -> T:
        if isolation is not None:
            conn.isolation_level = isolation
        if read_only:
            conn.read_only = True
        block = self._begin(conn)
        try:
            result = fn(conn, *args)
            _check_alive(conn)
        except BaseException as ex:
            if isinstance(ex, psycopg.errors.ReadOnlySqlTransaction):
                self._moved(conn)
            if conn.pgconn.pipeline_status:  # left by what interrupted it
                conn.pgconn.finish()
            with suppress(psycopg.Error):  # what cannot be rolled back is left to the return
                block.__exit__(type(ex), ex, ex.__traceback__)
                if conn.pgconn.transaction_status != _IDLE:
                    conn.rollback()
            if isinstance(ex, psycopg.Rollback) and ex.transaction in (None, block):
                return None  # type: ignore[return-value]
            raise
        self._end(conn, block)
        return result

    def _begin(self, conn: Any) -> Any:
        """Begin before the function does: a block of its own is then a savepoint.

        Its `commit()` and `rollback()` are refused by psycopg.
        """
        is_stock = conn._slot.has_stock_blocks
        block: Any = psycopg.Transaction(conn) if is_stock else conn.transaction()
        try:
            if not conn._slot.has_stock_class and not conn.autocommit:
                conn.execute("")  # begins: the block does not end what the class is to end
            block.__enter__()
        except BaseException:
            if conn.pgconn.transaction_status != _IDLE:  # whether it began is not known
                conn.pgconn.finish()
            raise
        return block

    def _end(self, conn: Any, block: Any) -> None:
        if conn._slot.has_stock_blocks and not conn._pipeline:
            if misnested := block._pop_savepoint("commit"):
                raise misnested
            self._commit(conn)
            return
        try:
            block.__exit__(None, None, None)
            if conn.pgconn.transaction_status != _IDLE:
                conn.commit()
        except psycopg.Error as ex:
            self._check_certain(conn, ex)
            raise

    def _commit(self, conn: Any) -> None:
        """Commit as `conn.commit()` does; sending COMMIT without its three generators saves 5 us.

        Raises `CommitUncertain` if all was sent and no answer came.
        """
        if conn._num_transactions or conn._tpc or conn._pipeline:
            conn.commit()  # which says what is wrong with that
            return
        pgconn = conn.pgconn
        if conn._slot.readable(0):
            _check_alive(conn)
        with conn.lock:
            pgconn.send_query(b"COMMIT")
            if pgconn.flush():
                conn.wait(send(pgconn))
            try:
                result = conn.wait(fetch(pgconn))
            except psycopg.OperationalError as ex:
                self._check_certain(conn, ex)
                raise
            with suppress(psycopg.OperationalError):  # of what may be lost now nothing depends
                conn.wait(fetch(pgconn))
        if result.status != ExecStatus.COMMAND_OK:
            error = error_from_result(result, encoding=pgconn._encoding)
            self._check_certain(conn, error)
            raise error

    def _check_certain(self, conn: Any, error: psycopg.Error, what: str = "COMMIT") -> None:
        """Raise `CommitUncertain` if the connection was lost while *what* had no answer."""
        if is_lost_unanswered(conn, error):
            raise CommitUncertain(
                f"pool {self.name!r}: the connection was lost during {what};"
                " it may or may not have been done",
                pool=self.name,
                snapshot=self.stats(),
            ) from error

    def _may_retry(self, ex: psycopg.Error, conn: Any, idempotent: bool) -> bool:
        if is_conflict(ex):
            return True
        lost = idempotent if isinstance(ex, CommitUncertain) else conn.closed
        return bool(lost) and self._budget.draw()

    def _tell_retry(self, attempt: int, error: str, pause: float) -> None:
        with self._lock:
            self._metrics.retries += 1
        if self.listeners.active:
            self.listeners.emit(events.Retried(self.name, attempt, error, pause))


def _check_alive(conn: Any) -> None:
    """Raise if COMMIT would do nothing, or what the server said last if it is known to be gone."""
    if conn.pgconn.transaction_status == _INERROR:
        raise psycopg.errors.InFailedSqlTransaction(
            "the transaction is in error, nothing was committed"
        )
    fatal_errors: list[psycopg.Error] = []
    if check_socket(conn, conn._slot.readable, fatal_errors) is Liveness.DEAD:
        conn.pgconn.finish()
        fatal_errors.append(psycopg.OperationalError("the connection was lost before COMMIT"))
        raise fatal_errors[0]
