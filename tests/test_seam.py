"""The seam to psycopg_pool and psycopg: every member that we override or use must still exist.

A failure here after an upgrade shows which assumption to check again.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.adapt import PyFormat
from psycopg_pool import ConnectionPool

from dbpool import Pool
from dbpool.pool._compatible import missing
from dbpool.pool._psycopg import remember_session_state, session_state
from dbpool.pool._seam import PoolBase

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "dbpool").rglob("*.py"))
HOT_FILE = ROOT / "dbpool" / "pool" / "_pool.py"

PUBLIC = {
    "__init__": "self, conninfo, connection_class, kwargs, min_size, max_size, open, configure,"
    " check, reset, name, close_returns, timeout, max_waiting, max_lifetime, max_idle,"
    " reconnect_timeout, reconnect_failed, num_workers",
    "__del__": "self",
    "check": "self",
    "close": "self, timeout",
    "connection": "self, timeout",
    "drain": "self",
    "get_stats": "self",
    "getconn": "self, timeout",
    "open": "self, wait, timeout",
    "pop_stats": "self",
    "putconn": "self, conn",
    "resize": "self, min_size, max_size",
    "wait": "self, timeout",
}
CALLED = {
    "_check_size": "self, min_size, max_size",
    "reconnect_failed": "self",
}
PROPERTIES = {"closed", "max_size", "min_size"}
# Methods of the parent that are never called, since all their callers are overridden.
REPLACED = {
    "_add_connection",
    "_add_to_pool",
    "_check_connection",
    "_check_open",
    "_check_open_getconn",
    "_check_pool_putconn",
    "_close_connection",
    "_connect",
    "_get_measures",
    "_get_ready_connection",
    "_getconn_unchecked",
    "_getconn_with_check_loop",
    "_jitter",
    "_maybe_close_connection",
    "_maybe_grow_pool",
    "_open",
    "_putconn",
    "_reset_connection",
    "_resolve_conninfo",
    "_resolve_kwargs",
    "_return_connection",
    "_set_connection_expiry_date",
    "_shrink_pool",
    "_signal_stop_worker",
    "_start_initial_tasks",
    "_start_workers",
    "run_task",
    "schedule_task",
    "worker",
}
INHERITED = {"__enter__", "__exit__", "check_connection"}
OVERRIDDEN_TOO = {"__repr__", "_open"}

# The protected members of psycopg_pool that are read, called or set, all in `_seam`.
PROTECTED = {"_check", "_check_size", "_configure", "_lock", "_reset"}


def _parameters(function: Any) -> str:
    return ", ".join(inspect.signature(function).parameters)


@pytest.mark.parametrize(("name", "parameters"), sorted((PUBLIC | CALLED).items()))
def test_the_parents_methods_have_the_same_parameters(name: str, parameters: str) -> None:
    assert _parameters(getattr(ConnectionPool, name)) == parameters


def test_every_method_of_the_parent_is_accounted_for() -> None:
    """A new method may be a new way around the overridden ones."""
    inherited = {
        name
        for cls in ConnectionPool.__mro__[:-1]
        if cls.__module__.startswith("psycopg_pool")
        for name, value in vars(cls).items()
        if callable(value) or isinstance(value, (property, classmethod, staticmethod))
    }
    known = PUBLIC.keys() | CALLED.keys() | PROPERTIES | REPLACED | INHERITED | OVERRIDDEN_TOO
    ignored = {"__orig_bases__", "__parameters__", "__class_getitem__"}
    assert inherited - known - ignored == set()


def test_the_listed_methods_are_overridden() -> None:
    for name in PUBLIC.keys() | PROPERTIES:
        assert getattr(Pool, name) is not getattr(ConnectionPool, name), name


def test_the_parents_public_methods_use_no_replaced_member() -> None:
    """Inherited methods reach the pool's state only through overridden methods."""
    for name in INHERITED | CALLED.keys():
        assert set(_used(ConnectionPool, name)[name]) & REPLACED == set(), name


def test_the_parents_state_is_as_assumed() -> None:
    pool: ConnectionPool = ConnectionPool("", open=False, min_size=2)
    assert pool._lock is not None
    assert (pool._check, pool._configure, pool._reset) == (None, None, None)


def _private_names(path: Path, *holders: str) -> set[str]:
    """The protected names that a file uses of objects named *holders*, `getattr` included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in holders:
            found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            holder, name = node.args[:2]
            if ast.unparse(holder) in holders and isinstance(name, ast.Constant):
                found.add(str(name.value))
    return {name for name in found if re.fullmatch(r"_[a-z]\w*", name)}


def test_psycopg_pools_protected_members_are_used_only_in_the_seam() -> None:
    parent = PROTECTED | vars(ConnectionPool("", open=False)).keys() | set(dir(ConnectionPool))
    own_names = {"_open", "_threads"} | vars(PoolBase).keys() - vars(ConnectionPool).keys()
    pool = {
        path.name: names
        for path in FILES
        if (names := _private_names(path, "pool", "p") & parent - own_names)
    }
    assert pool == {}
    assert _private_names(HOT_FILE, "self") & parent - own_names == set()
    seam = HOT_FILE.with_name("_seam.py")
    assert _private_names(seam, "self", "cls") & parent - own_names == PROTECTED


def test_psycopgs_protected_members_are_used_only_in_the_seam_and_hot_lines() -> None:
    touched = {
        path.name: names - {"_record"}
        for path in FILES
        if (names := _private_names(path, "conn", "cursor", "pgconn", "block")) - {"_record"}
    }
    assert touched.pop("_psycopg.py")
    assert touched.pop("_pipelining.py")
    assert touched == {"_pool.py": {"_pool"}}, "set in acquire, cleared in release"
    hot = [line.strip() for line in HOT_FILE.read_text().splitlines() if "conn._pool" in line]
    assert hot == ["conn._pool = self", "record.since, record.owner, conn._pool = 0.0, None, None"]


def test_all_needed_members_exist() -> None:
    assert list(missing()) == []


@pytest.mark.parametrize(
    ("removal", "named"),
    [
        (
            "del psycopg_pool.base.BasePool._check_size",
            "ConnectionPool._check_size(min_size,max_size)",
        ),
        (
            "del psycopg._cursor_base.BaseCursor._convert_query",
            "Cursor._convert_query(query,params)",
        ),
        ("del psycopg_pool.sched.Scheduler", "psycopg_pool.sched.Scheduler"),
        (
            "psycopg.Cursor._execute_send = lambda self, other: None",
            "Cursor._execute_send(query)",
        ),
    ],
)
def test_a_version_is_rejected_only_for_a_missing_member(removal: str, named: str) -> None:
    script = (
        "import psycopg, psycopg_pool, psycopg_pool.base, psycopg_pool.sched\n"
        "psycopg.__version__ = psycopg_pool.__version__ = '9.9'\n"
        f"{removal}\nfrom dbpool import Pool\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert f"psycopg 9.9 and psycopg_pool 9.9: {named}" in done.stderr


def test_a_newer_version_is_accepted_if_nothing_is_missing() -> None:
    script = (
        "import psycopg, psycopg_pool\n"
        "psycopg.__version__ = psycopg_pool.__version__ = '9.9'\nfrom dbpool import Pool\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_connections_have_the_attributes_that_are_restored(dsn: str) -> None:
    with psycopg.connect(dsn) as conn:
        assert conn.adapters is conn._adapters
        remember_session_state(conn)
        assert len(session_state(conn)) == 17
        assert conn._begin_statement == b""
        assert conn._notifies_backlog is not None
        assert session_state(conn)[0] is False


def test_registering_an_adapter_or_a_type_is_noticed(dsn: str) -> None:
    class Loader(psycopg.adapt.Loader):
        def load(self, data: Any) -> bytes:
            return bytes(data)

    with psycopg.connect(dsn) as conn:
        state: Any = remember_session_state(conn)[0]
        assert session_state(conn) == state
        conn.adapters.register_loader("int4", Loader)
        assert session_state(conn)[13] == state[13] + 1
        conn.adapters.register_dumper(set, conn.adapters.get_dumper(str, PyFormat.AUTO))
        assert session_state(conn)[13] == state[13] + 2
        conn.adapters.types.add(psycopg.types.TypeInfo("mine", 99_999, 99_998))
        assert session_state(conn)[14] != state[14]


def test_psycopg_commits_as_the_short_cut_does() -> None:
    """A new attribute may be a new case that the short cut must leave to psycopg."""
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


def test_psycopg_sends_statements_by_a_method_that_the_cached_cursor_overrides() -> None:
    sending = inspect.getsource(psycopg.Cursor._maybe_prepare_gen)
    assert set(re.findall(r"self\.(_\w*send\w*)\(", sending)) == {
        "_execute_send", "_send_prepare", "_send_query_prepared",
    }  # fmt: skip


def test_psycopg_executes_as_the_pipelining_cursor_does() -> None:
    """A new attribute may be a new step that our cursor must take too."""
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
    """The attributes of `self` that each of these methods uses."""
    return {
        name: set(re.findall(r"\bself\.(\w+)", inspect.getsource(getattr(cls, name))))
        for name in names
    }


def test_a_cursor_has_only_attributes_that_the_cached_one_clears() -> None:
    """A new attribute may be a new object that a cached cursor must release."""
    forgotten = {"_conn", "_pgconn", "_tx", "_query", "_last_query", "_results", "pgresult"}
    not_cleared = {"_adapters", "_closed", "_execmany_returning", "_iresult", "_make_row", "_pos"}
    not_cleared |= {"_row_factory", "_rowcount", "_statusmessage", "arraysize", "format"}
    slots = {name for cls in psycopg.Cursor.__mro__ for name in getattr(cls, "__slots__", ())}
    assert slots - {"__weakref__"} - not_cleared == forgotten
