"""A cursor that begins a transaction and runs its first statement in one round trip.

Part of the one place that touches protected members of psycopg, see `_supply`.
"""

from __future__ import annotations

from typing import Any

from psycopg import Cursor
from psycopg._preparing import Prepare
from psycopg.abc import Params, PQGen, Query
from psycopg.adapt import Transformer
from psycopg.generators import execute
from psycopg.pq import TransactionStatus
from psycopg.rows import Row


class PipeliningCursor(Cursor[Row]):
    """Sends BEGIN together with the statement that needs it, as PostgreSQL's JDBC driver does.

    That is one with parameters, which goes by the extended protocol anyway. One without may be
    several in one, and one that is about to be prepared may fail at that: before those BEGIN is
    sent by itself. Written out, as psycopg's `Pipeline` costs what a trip on one host does.
    """

    __slots__ = ()

    def _execute_gen(self, query: Query, params: Params | None = None, **how: Any) -> PQGen[None]:
        conn = self._conn
        is_idle = self._pgconn.transaction_status == TransactionStatus.IDLE
        if params and is_idle and not (conn._autocommit or conn._pipeline or self._closed):
            self._reset()
            self._tx = Transformer(self)
            try:
                pgq = self._convert_query(query, params)
            except Exception:
                yield from conn._start_query()  # psycopg begins before it finds that out
                raise
            prep, name = self._get_prepared(pgq, how.get("prepare"))
            if pgq.params and prep is not Prepare.SHOULD:
                yield from self._begin_with_gen(pgq, name, how.get("binary"))
                if (key := conn._prepared.maybe_add_to_cache(pgq, prep, name)) is not None:
                    conn._prepared.validate(key, prep, name, self._results)
                self._last_query = query
                yield from conn._prepared.maintain_gen(conn)
                return
        yield from super()._execute_gen(query, params, **how)

    def _begin_with_gen(self, pgq: Any, name: bytes, binary: bool | None) -> PQGen[None]:
        pgconn = self._pgconn
        pgconn.enter_pipeline_mode()
        pgconn.send_query_params(self._conn._get_tx_start_command(), None)
        if name:
            self._send_query_prepared(name, pgq, binary=binary)
        else:
            self._execute_send(pgq, binary=binary)
        pgconn.pipeline_sync()
        answers: list[Any] = []
        try:
            while len(answers) < 3:  # of BEGIN, of the statement, of the end of the pipeline
                answers.append((yield from execute(pgconn)))
            pgconn.exit_pipeline_mode()
        finally:  # what the server said last is told, and not the end of file after it
            for answer in answers[:2]:
                self._check_results(answer)
        self._set_results(answers[1])
