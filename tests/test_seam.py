"""The seam to psycopg_pool and psycopg: what is overridden or touched must still be there.

A failure here after an upgrade says which assumption to look at again.
"""

from __future__ import annotations

import inspect
import re
from collections import deque
from typing import Any

import psycopg
import psycopg_pool
import pytest
from psycopg.adapt import PyFormat
from psycopg_pool import ConnectionPool
from psycopg_pool.pool import AddConnection, MaintenanceTask, ReturnConnection

from dbpool import Pool
from dbpool._parts import manners, remember

OVERRIDDEN = {
    "__init__": "self, conninfo, connection_class, kwargs, min_size, max_size, open, configure,"
    " check, reset, name, close_returns, timeout, max_waiting, max_lifetime, max_idle,"
    " reconnect_timeout, reconnect_failed, num_workers",
    "__del__": "self",
    "_add_connection": "self, attempt, growing",
    "_add_to_pool": "self, conn",
    "_resolve_conninfo": "self",
    "_return_connection": "self, conn, from_getconn",
    "_shrink_pool": "self",
    "_start_initial_tasks": "self",
    "_start_workers": "self",
    "check": "self",
    "close": "self, timeout",
    "connection": "self, timeout",
    "drain": "self",
    "get_stats": "self",
    "getconn": "self, timeout",
    "pop_stats": "self",
    "putconn": "self, conn",
    "resize": "self, min_size, max_size",
    "wait": "self, timeout",
}
CALLED = {
    "_check_open_getconn": "self",
    "_check_pool_putconn": "self, conn",
    "_check_size": "self, min_size, max_size",
    "_close_connection": "self, conn",
    "_get_measures": "self",
    "_reset_connection": "self, conn",
    "_resolve_kwargs": "self",
    "_set_connection_expiry_date": "self, conn",
    "_signal_stop_worker": "self",
    "_open": "self",
    "reconnect_failed": "self",
    "run_task": "self, task",
    "schedule_task": "self, task, delay",
}
# Methods of the parent that ours never reach, since what calls them is overridden.
REPLACED = {
    "_check_connection",
    "_connect",
    "_get_ready_connection",
    "_getconn_unchecked",
    "_getconn_with_check_loop",
    "_maybe_close_connection",
    "_maybe_grow_pool",
    "_putconn",
}
INHERITED = {
    "__enter__",
    "__exit__",
    "__repr__",
    "_check_open",
    "_jitter",
    "check_connection",
    "closed",
    "max_size",
    "min_size",
    "open",
    "worker",
}


def _parameters(function: Any) -> str:
    return ", ".join(inspect.signature(function).parameters)


@pytest.mark.parametrize(("name", "parameters"), sorted((OVERRIDDEN | CALLED).items()))
def test_the_parents_methods_take_what_they_took(name: str, parameters: str) -> None:
    assert _parameters(getattr(ConnectionPool, name)) == parameters


def test_every_method_of_the_parent_is_accounted_for() -> None:
    """A new one may be a new path around what is overridden."""
    theirs = {
        name
        for cls in ConnectionPool.__mro__[:-1]
        if cls.__module__.startswith("psycopg_pool")
        for name, value in vars(cls).items()
        if callable(value) or isinstance(value, (property, classmethod, staticmethod))
    }
    known = OVERRIDDEN.keys() | CALLED.keys() | REPLACED | INHERITED
    ignored = {"__orig_bases__", "__parameters__", "__class_getitem__"}
    assert theirs - known - ignored == set()


def test_what_is_overridden_is_ours() -> None:
    for name in OVERRIDDEN:
        assert getattr(Pool, name) is not getattr(ConnectionPool, name), name


def test_the_parents_state_is_as_assumed() -> None:
    pool: ConnectionPool = ConnectionPool("", open=False, min_size=2)
    assert isinstance(pool._pool, deque)
    assert isinstance(pool._waiting, deque)
    assert (pool._nconns, pool._min_size, pool._max_size) == (2, 2, 2)
    assert pool._workers == []
    assert pool._sched_runner is None
    assert (pool._closed, pool._opened) == (True, False)
    assert (pool._check, pool._configure, pool._reset) == (None, None, None)


def test_the_parents_tasks_call_what_is_overridden() -> None:
    assert "pool._add_connection(self.attempt, growing=self.growing)" in inspect.getsource(
        AddConnection._run
    )
    assert "pool._return_connection(self.conn, from_getconn=self.from_getconn)" in (
        inspect.getsource(ReturnConnection._run)
    )
    assert "pool.closed" in inspect.getsource(MaintenanceTask.run)


def test_connections_have_the_attributes_that_are_put_back(dsn: str) -> None:
    with psycopg.connect(dsn) as conn:
        assert conn.adapters is conn._adapters
        remember(conn)
        assert len(manners(conn)) == 16
        assert conn._begin_statement == b""
        assert conn._notifies_backlog is not None
        assert manners(conn)[0] is False


def test_what_registers_an_adapter_or_a_type_is_noticed(dsn: str) -> None:
    class Loader(psycopg.adapt.Loader):
        def load(self, data: Any) -> bytes:
            return bytes(data)

    with psycopg.connect(dsn) as conn:
        state: Any = remember(conn)[0]
        assert manners(conn) == state
        conn.adapters.register_loader("int4", Loader)
        assert manners(conn)[13] == state[13] + 1
        conn.adapters.register_dumper(set, conn.adapters.get_dumper(str, PyFormat.AUTO))
        assert manners(conn)[13] == state[13] + 2
        conn.adapters.types.add(psycopg.types.TypeInfo("mine", 99_999, 99_998))
        assert manners(conn)[14] != state[14]


def test_psycopg_commits_as_the_short_cut_does() -> None:
    """Another attribute may be another case that the short cut has to leave to psycopg."""
    assert "with self.lock:\n            self.wait(self._commit_gen())" in inspect.getsource(
        psycopg.Connection.commit
    )
    assert _used(psycopg.Connection, "_commit_gen", "_exec_command") == {
        "_commit_gen": {"_num_transactions", "_tpc", "pgconn", "_exec_command", "_pipeline"},
        "_exec_command": {"_check_connection_ok", "pgconn", "_pipeline"},
    }


def test_psycopg_ends_a_transaction_block_as_run_does() -> None:
    assert _used(psycopg.Transaction.__mro__[1], "_commit_gen", "_get_commit_commands") == {
        "_commit_gen": {"_pop_savepoint", "status", "Status", "_conn", "_get_commit_commands"},
        "_get_commit_commands": {"_savepoint_name", "_outer_transaction", "_conn"},
    }


def test_psycopg_sends_a_statement_where_the_kept_cursor_sees_it() -> None:
    sending = inspect.getsource(psycopg.Cursor._maybe_prepare_gen)
    assert set(re.findall(r"self\.(_\w*send\w*)\(", sending)) == {
        "_execute_send", "_send_prepare", "_send_query_prepared",
    }  # fmt: skip


def test_psycopg_executes_as_the_pipelining_cursor_does() -> None:
    """Another attribute may be another step that it has to take too."""
    assert _used(psycopg.Cursor, "_execute_gen", "_start_query", "_maybe_prepare_gen") == {
        "_execute_gen": {
            "_start_query", "_convert_query", "_maybe_prepare_gen", "_conn", "_last_query",
        },
        "_start_query": {"closed", "_reset", "_last_query", "_tx", "_conn"},
        "_maybe_prepare_gen": {
            "_get_prepared", "_execute_send", "_send_prepare", "_conn", "_pgconn", "_encoding",
            "_send_query_prepared", "_check_results", "_set_results",
        },
    }  # fmt: skip
    assert _used(psycopg.Connection, "_start_query", "_get_tx_start_command") == {
        "_start_query": {
            "_autocommit", "pgconn", "_exec_command", "_get_tx_start_command", "_pipeline",
        },
        "_get_tx_start_command": {"_begin_statement", "isolation_level", "read_only", "deferrable"},
    }  # fmt: skip


def _used(cls: type, *names: str) -> dict[str, set[str]]:
    """What of itself each of those methods uses."""
    return {
        name: set(re.findall(r"\bself\.(\w+)", inspect.getsource(getattr(cls, name))))
        for name in names
    }


def test_a_cursor_holds_what_the_kept_one_lets_go_of() -> None:
    """Another attribute may be another thing that a kept cursor has to forget."""
    forgotten = {"_conn", "_pgconn", "_tx", "_query", "_last_query", "_results", "pgresult"}
    harmless = {"_adapters", "_closed", "_execmany_returning", "_iresult", "_make_row", "_pos"}
    harmless |= {"_row_factory", "_rowcount", "_statusmessage", "arraysize", "format"}
    slots = {name for cls in psycopg.Cursor.__mro__ for name in getattr(cls, "__slots__", ())}
    assert slots - {"__weakref__"} - harmless == forgotten


def test_the_versions_are_those_that_were_looked_at() -> None:
    assert psycopg_pool.__version__.startswith("3.3.")
    assert psycopg.__version__.startswith("3.3.")
