"""Views of a test's session: a holder gets one in place of the pooled connection."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import psycopg
from psycopg.errors import InFailedSqlTransaction
from psycopg.pq import PipelineStatus, TransactionStatus

from dbpool.testing._session import Level, Session

_IN_ERROR: Final = "the transaction is in error, nothing was committed"
_NO_END: Final = "{} is forbidden within a block of transaction() or run(), which ends by itself"


class View:
    """A mixin for connections over a test's session, as a holder gets them."""

    _test: Session
    _levels: list[Level]
    _is_used = False  # whether its transaction would have begun
    _is_single = False
    _is_over = False
    _is_autocommit = False
    pooled: Any = None
    give_back: Callable[[Any], None] | None = None

    def __del__(self) -> None:
        self._test.forgotten.extend(self._levels)

    @property
    def adapters(self) -> Any:
        """The adapters that `configure` has set up."""
        return self._test.main.adapters

    @property
    def closed(self) -> bool:
        """Whether it was returned, or the test is over."""
        return self._is_over or self._test.is_over or bool(super().closed)  # type: ignore[misc]

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        """Exchange messages with the server; psycopg holds the lock."""
        if self.closed:
            raise psycopg.OperationalError("the connection is closed")
        level = self._levels[-1] if self._levels else None
        if level is not None and level.is_failed:
            raise InFailedSqlTransaction("current transaction is aborted, commands are ignored")
        own = None if self._is_autocommit and len(self._levels) <= 1 else level
        was_pipeline = self._is_pipeline
        try:
            with self._test.guarded(own):
                return super().wait(gen, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._count(was_pipeline)

    @property
    def _is_pipeline(self) -> bool:
        return self._test.pgconn.pipeline_status != PipelineStatus.OFF

    def _count(self, was_pipeline: bool) -> None:
        """Count an exchange that is over, and the BEGIN that would have come before it."""
        if self._test.pgconn.transaction_status == TransactionStatus.ACTIVE:
            return  # it is not over: a COPY, or a pipeline that has not sent all
        if self._is_pipeline and not was_pipeline:
            return  # a pipeline was entered, which sends nothing
        alone = self._is_single or self._is_autocommit
        self._test.trip(1 if self._is_used or alone else 2)
        self._is_used = self._is_used or not alone

    def cursor(self, name: str = "", **options: Any) -> Any:
        """Return a cursor; a server-side cursor takes a round trip more, to describe its rows."""
        self._test.trip(bool(name))
        return super().cursor(name, **options)  # type: ignore[misc]

    def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        """Execute a statement; an empty one, which only begins a transaction, is skipped."""
        if query == "":
            return self.cursor()
        return super().execute(query, *args, **kwargs)  # type: ignore[misc]

    def commit(self) -> None:
        """Keep what was done since the last commit, within the test."""
        self._restart("commit()", commit=True)

    def rollback(self) -> None:
        """Undo what was done since the last commit."""
        self._restart("rollback()", commit=False)

    def _restart(self, what: str, *, commit: bool) -> None:
        if len(self._levels) > 1:
            raise psycopg.ProgrammingError(_NO_END.format(what))
        if self._levels:
            self._test.restart(self._levels[0], commit=commit)
            self._test.trip(self._is_used)
            self._is_used = False

    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> Transaction:
        """Return a block; if it fails, only that block is undone."""
        return Transaction(self, force_rollback)

    def set_autocommit(self, value: bool) -> None:
        """Let each statement stand alone."""
        self._is_autocommit = value

    def _ignore(self, value: object) -> None:
        """Ignore a characteristic that only a new transaction could have."""

    set_isolation_level = set_read_only = set_deferrable = _ignore

    def close(self) -> None:
        """Return the connection to its pool."""
        if self.give_back is not None:
            self.give_back(self)

    def end(self, *, commit: bool) -> None:
        """End all blocks that it has begun."""
        self._is_over = True
        while self._levels:
            self._test.end(self._levels.pop(), commit=commit or self._is_autocommit)
        self._test.trip(self._is_used)
        self._is_used = False


class Transaction:
    """A block of `transaction()`, or the one around the function of `run()`."""

    def __init__(self, view: Any, force_rollback: bool = False) -> None:
        self.connection, self._force_rollback = view, force_rollback
        self._level: Level | None = None

    def __enter__(self) -> Self:
        view = self.connection
        self._was_used, view._is_used = view._is_used, True
        self._level = view._test.nest()
        view._levels.append(self._level)
        view._test.trip()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool:
        view, level = self.connection, self._level
        assert level is not None
        commit = exc is None and not self._force_rollback
        is_failed = level.is_failed or view._test.is_in_error
        view._levels.remove(level)
        view._test.end(level, commit=commit)
        view._test.trip()
        view._is_used = self._was_used
        if commit and is_failed:
            raise InFailedSqlTransaction(_IN_ERROR)
        meant: Any = exc.transaction if isinstance(exc, psycopg.Rollback) else exc
        return isinstance(exc, psycopg.Rollback) and meant in (None, self)
