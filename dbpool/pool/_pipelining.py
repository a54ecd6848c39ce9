"""A cursor that begins a transaction and runs its first statement in one round trip.

Part of the one place that touches protected members of psycopg, see `_psycopg`.
"""

from __future__ import annotations

from typing import Any, Final, Self

import psycopg
from psycopg import Cursor
from psycopg._preparing import Prepare
from psycopg.abc import Params, PQGen, Query
from psycopg.adapt import Transformer
from psycopg.generators import execute
from psycopg.pq import TransactionStatus
from psycopg.rows import Row

_MAX_PARAMS: Final = 65535  # parameters that the protocol can count


class PipeliningCursor(Cursor[Row]):
    """Sends BEGIN together with the statement that needs it, as PostgreSQL's JDBC driver does.

    That is one with parameters, which goes by the extended protocol anyway. One without may be
    several in one, and one that is about to be prepared may fail at that: before those BEGIN is
    sent by itself. Written out, as psycopg's `Pipeline` costs what a trip on one host does.
    """

    _is_midway = False  # whether libpq is in pipeline mode

    def execute(self, *args: Any, **how: Any) -> Self:
        """Execute a statement, as psycopg's cursors do."""
        try:
            return super().execute(*args, **how)
        except BaseException:
            # What interrupted the wait has left answers that the next one would take for its own.
            if self._is_midway:
                if (pool := getattr(self._conn, "_pool", None)) is not None:
                    pool._store.bag.cancel_later(self._conn)
                self._pgconn.finish()
            raise

    def _execute_gen(self, query: Query, params: Params | None = None, **how: Any) -> PQGen[None]:
        conn, pgq = self._conn, None
        is_idle = self._pgconn.transaction_status == TransactionStatus.IDLE and not self._closed
        if params is not None and is_idle and not (conn._autocommit or conn._pipeline):
            pgq = self._converted(query, params)
        if pgq is not None and 0 < len(pgq.params or ()) <= _MAX_PARAMS:
            prep, name = self._get_prepared(pgq, how.get("prepare"))
            if prep is not Prepare.SHOULD:
                yield from self._begin_with_gen(pgq, prep, name, how.get("binary"))
                self._last_query = query
                yield from conn._prepared.maintain_gen(conn)
                return
        yield from super()._execute_gen(query, params, **how)

    def _converted(self, query: Query, params: Params) -> Any:
        """The query with its parameters, None if psycopg has something to say about them."""
        self._last_query = None
        self._tx = Transformer(self)
        try:
            return self._convert_query(query, params)
        except Exception:  # noqa: BLE001  # an adapter of the user's may raise anything
            return None

    def _begin_with_gen(self, pgq: Any, prep: Prepare, name: bytes, binary: Any) -> PQGen[None]:
        conn, pgconn = self._conn, self._pgconn
        begin, lost = conn._get_tx_start_command(), None
        answers: list[Any] = []
        self._reset()
        self._is_midway = True
        pgconn.enter_pipeline_mode()
        pgconn.send_query_params(begin, None)
        if name:
            self._send_query_prepared(name, pgq, binary=binary)
        else:
            self._execute_send(pgq, binary=binary)
        pgconn.pipeline_sync()
        try:
            while len(answers) < 3:  # of BEGIN, of the statement, of the end of the pipeline
                answers.append((yield from execute(pgconn)))
            pgconn.exit_pipeline_mode()
            self._is_midway = False
        except psycopg.OperationalError as ex:
            lost = ex.with_traceback(None)
        if not lost and (key := conn._prepared.maybe_add_to_cache(pgq, prep, name)) is not None:
            conn._prepared.validate(key, prep, name, answers[1])
        for answer in answers[:2]:
            self._check_results(answer)  # what the server said last comes before what it died of
        if lost:
            raise lost
        self._set_results(answers[1])
