"""Holders: the line of code that is named, forgotten connections, and long holds."""

from __future__ import annotations

import functools
import gc
import logging
import textwrap
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from dbpool import Pool, holders
from dbpool.diagnosis.endpoints import UsageCounter
from dbpool.events import Discarded, HeldLong, Leaked, ReturnedLate
from tests.fake import FakeServer
from tests.postgres import until
from tests.scripts import python
from tests.threads import Task

from .test_hot_path import calls_of

ROOT = Path(__file__).resolve().parent.parent


def load(path: Path, source: str) -> types.ModuleType:
    """A module compiled under the file name *path*."""
    module = types.ModuleType(path.stem)
    exec(compile(textwrap.dedent(source), str(path), "exec"), module.__dict__)
    return module


@pytest.fixture
def library(tmp_path: Path) -> types.ModuleType:
    """An installed package that calls the pool, as SQLAlchemy does."""
    return load(
        tmp_path / "site-packages" / "orm" / "base.py",
        """
        def connect(creator):
            return (lambda: creator())()

        def call(fn):
            return fn()
        """,
    )


def test_the_first_frame_outside_installed_packages_is_named(
    fake: FakeServer, library: types.ModuleType
) -> None:
    with fake.pool() as pool:
        conn = library.call(lambda: library.connect(pool.getconn))
        (holder,) = pool.holders()
        pool.putconn(conn)
    assert "tests/test_holders.py:" in holder.where
    assert "<lambda>" in holder.where


def test_an_installed_application_is_named_behind_sqlalchemy(
    fake: FakeServer, tmp_path: Path
) -> None:
    packages = tmp_path / "site-packages"
    orm = load(packages / "sqlalchemy" / "base.py", "def connect(creator): return creator()")
    app = load(
        packages / "shop" / "views.py",
        """
        def view(connect, pool, held):
            conn = connect(pool.getconn)
            held.extend(pool.holders())
            pool.putconn(conn)
        """,
    )
    held: list[Any] = []
    with fake.pool() as pool:
        thread = threading.Thread(target=app.view, args=(orm.connect, pool, held))
        thread.start()
        thread.join(10)
    assert held[0].where == "shop/views.py:3 view"


@pytest.mark.parametrize("names", [{}, {"__name__": "orm", "__file__": "/x/site-packages/orm.py"}])
def test_generated_code_is_never_named(fake: FakeServer, names: dict[str, str]) -> None:
    """Libraries such as SQLAlchemy and attrs generate code."""
    scope: dict[str, Any] = dict(names)
    exec(compile("def call(fn): return fn()", "<orm generated call>", "exec"), scope)
    with fake.pool() as pool:
        conn = scope["call"](pool.getconn)
        (holder,) = pool.holders()
        pool.putconn(conn)
    assert holder.where.endswith("test_generated_code_is_never_named")


def test_a_script_without_a_file_is_named() -> None:
    source = """
from tests.fake import FakeServer
def lend():
    with FakeServer().pool() as pool, pool.connection():
        print(pool.holders()[0].where)
lend()
"""
    done = python("-c", source, check=True)
    assert done.stdout.strip() == "<string>:4 lend"


def test_the_line_that_called_the_standard_library_is_named(fake: FakeServer) -> None:
    with fake.pool() as pool, ExitStack() as stack:
        stack.enter_context(pool.connection())
        (holder,) = pool.holders()
    assert holder.where.endswith("test_the_line_that_called_the_standard_library_is_named")


def test_an_installed_application_is_named_at_its_own_call(
    fake: FakeServer, tmp_path: Path
) -> None:
    app = load(
        tmp_path / "site-packages" / "shop" / "views.py",
        """
        def view(pool, held):
            with pool.connection():
                held.extend(pool.holders())
        """,
    )
    held: list[Any] = []
    with fake.pool() as pool:
        # In a thread, so that no frame of these tests is on the stack.
        thread = threading.Thread(target=app.view, args=(pool, held))
        thread.start()
        thread.join(10)
    assert held[0].where == "shop/views.py:3 view"


@pytest.mark.parametrize(
    "script",
    [
        "atexit.register(pool.execute, 'select 1')",
        "_thread.start_new_thread(run, (pool.execute, 'select 1'))",
        "_thread.start_new_thread(pool.execute, ('select 1',))",
        "_thread.start_new_thread(pool.fetch_value, ('select 1',))",
        "_thread.start_new_thread(pool.fetch_one, ('select 1',))",
        "_thread.start_new_thread(pool.fetch_all, ('select 1',))",
        "_thread.start_new_thread(pool.run, (methodcaller('execute', 'select 1'),))",
        "_thread.start_new_thread(partial(pool.run, methodcaller('execute', 'select 1')), ())",
        "_thread.start_new_thread(pool.getconn, ())",
        "_thread.start_new_thread(pool.connection().__enter__, ())",
    ],
)
def test_a_checkout_without_a_python_caller_works(dsn: str, script: str) -> None:
    """A call from C has no frame to name."""
    source = f"""
import _thread, atexit, sys, time
from functools import partial
from operator import methodcaller
import dbpool

def run(fn, *args):
    fn(*args)

def report(error):
    print("FAILED", error.exc_value, flush=True)

sys.unraisablehook = report
pool = dbpool.Pool({dsn!r}, min_size=1, open=True)
pool.wait()
atexit.register(lambda: print("checkouts", pool.stats().counters.checkouts, flush=True))
{script}
deadline = time.monotonic() + 10
while "_thread.start" in {script!r} and time.monotonic() < deadline:
    if pool.stats().counters.checkouts:
        break
    time.sleep(0.01)
"""
    done = python("-c", source)
    output = done.stdout + done.stderr
    assert "Error" not in output
    assert "FAILED" not in output
    assert "checkouts" in output
    assert "checkouts 0" not in output
    assert done.returncode == 0


def test_a_thread_that_runs_a_method_of_the_pool_is_a_holder(fake: FakeServer) -> None:
    with fake.pool() as pool, ThreadPoolExecutor(1) as threads:
        conn = threads.submit(functools.partial(pool.getconn, timeout=5)).result()
        (holder,) = pool.holders()
        pool.putconn(conn)
    assert "thread.py:" in holder.where


def test_a_direct_caller_causes_no_walk_of_the_stack(fake: FakeServer) -> None:
    """A deep stack makes no more calls than a shallow one."""

    def check_out(pool: Pool[Any], depth: int) -> None:
        if depth:
            check_out(pool, depth - 1)
        else:
            with pool.connection():
                pass

    with fake.pool() as pool:
        check_out(pool, 0)
        shallow, deep = (calls_of(lambda n=n: check_out(pool, n)) for n in (0, 50))  # type: ignore[misc]
    assert deep["call"] - shallow["call"] == 50
    assert deep["c_call"] == shallow["c_call"]


# Forgotten connections and long holds


def forget(pool: Pool[Any]) -> None:
    pool.getconn()


def test_a_forgotten_connection_is_a_leak(fake: FakeServer) -> None:
    received: list[Any] = []
    with fake.pool(max_size=5, leak_after=0.2, listeners=[received.append]) as pool:
        for _ in range(5):
            forget(pool)
        gc.collect()
        until(lambda: pool.stats().counters.leaks == 5)
        until(lambda: sum(isinstance(event, Leaked) for event in received) == 5)
        counters = pool.stats().counters
        assert (counters.held_long, counters.returned_late) == (0, 0)
        assert counters.discarded["collected"] == 5
    leaked = [event for event in received if isinstance(event, Leaked)]
    assert all("forget" in event.holder.where for event in leaked)
    assert sum(isinstance(event, Discarded) for event in received) == 5


def test_many_connections_forgotten_at_once_send_an_event_each(fake: FakeServer) -> None:
    received: list[Any] = []
    with fake.pool(max_size=30, listeners=[received.append]) as pool:
        conns = [pool.getconn() for _ in range(30)]
        assert len(pool.return_held(0.0)) == 30
        conns = [pool.getconn() for _ in range(25)]
        del conns
        gc.collect()
        until(lambda: pool.stats().counters.leaks == 55)
        until(lambda: sum(isinstance(event, Leaked) for event in received) == 55)


def test_a_connection_that_is_taken_back_is_a_leak(fake: FakeServer) -> None:
    received: list[Any] = []
    with fake.pool(listeners=[received.append]) as pool:
        conn = pool.getconn()
        (holder,) = pool.return_held(0.0)
        assert conn.closed
        assert pool.stats().counters.leaks == 1
    (leaked,) = [event for event in received if isinstance(event, Leaked)]
    assert leaked.holder == holder


def test_a_long_hold_is_no_leak_and_has_a_late_return(fake: FakeServer) -> None:
    received: list[Any] = []
    with fake.pool(max_size=8, leak_after=0.1, listeners=[received.append]) as pool:
        held = [pool.getconn() for _ in range(8)]
        until(lambda: pool.stats().counters.held_long == 8)
        for conn in held:
            pool.putconn(conn)
        counters = pool.stats().counters
        assert (counters.leaks, counters.held_long, counters.returned_late) == (0, 8, 8)
        report = pool.stats().to_json()["counters"]
        assert (report["leaks"], report["held_long"]) == (0, 8)
        for kind in (HeldLong, ReturnedLate):
            until(lambda kind=kind: sum(isinstance(e, kind) for e in received) == 8)  # type: ignore[misc]
    assert not any(isinstance(event, Leaked) for event in received)


def test_long_holds_by_one_line_of_code_log_one_line(
    fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()

    def hold(pool: Pool[Any]) -> None:
        with pool.connection():
            done.wait(20)

    with (
        caplog.at_level(logging.INFO, logger="dbpool"),
        fake.pool(max_size=8, leak_after=0.5) as pool,
    ):
        pool.resize(8, 8)
        pool.wait()
        holders = [Task(hold, pool, name=f"t{n}") for n in range(8)]
        until(lambda: pool.stats().counters.held_long == 8)
        done.set()
        for holder in holders:
            holder.result()
    held = [text for text in caplog.messages if "been held" in text]
    assert len(held) == 1, "more than one line"
    assert "\n" not in held[0]
    assert "threading.py" not in held[0], "it shows frames of the standard library"
    assert "hold" in held[0]
    late_returns = [text for text in caplog.messages if "came back after" in text]
    assert len(late_returns) == 1
    assert any("8 connections returned late, from" in text for text in caplog.messages)


def test_the_metrics_have_leaks_and_long_holds(fake: FakeServer) -> None:
    from dbpool.prometheus import expose

    with fake.pool(leak_after=0.1) as pool:
        with pool.connection():
            until(lambda: pool.stats().counters.held_long)
        report = {"processes": [], "pools": {"default": pool.stats().to_json()}}
    text, _ = expose(report)
    assert 'dbpool_held_long_total{pool_name="default"} 1.0' in text.decode()
    assert 'dbpool_leaks_total{pool_name="default"} 0.0' in text.decode()


def test_a_holder_has_its_backend_pid_and_transaction_status(dsn: str) -> None:
    with Pool(dsn, max_size=2) as pool:
        with pool.connection() as conn:
            (holder,) = pool.holders()
            assert (holder.pid, holder.status) == (conn.info.backend_pid, "idle")
            conn.execute("select 1")
            assert pool.holders()[0].status == "idle in transaction"
            with suppress(psycopg.Error):
                conn.execute("select 1/0")
            assert pool.holders()[0].status == "idle in transaction (aborted)"
            conn.rollback()
            with ThreadPoolExecutor(1) as other:
                other.submit(conn.execute, "select pg_sleep(0.5)")
                until(lambda: pool.holders()[0].status == "query")
            conn.close()
            assert (pool.holders()[0].pid, pool.holders()[0].status) == (None, "unknown")


def test_a_holder_that_waits_for_a_second_connection_is_marked(dsn: str) -> None:
    with Pool(dsn, max_size=2, timeout=20) as pool, ThreadPoolExecutor(1) as other:

        def nest() -> None:
            with pool.connection(), pool.connection():
                pass

        with pool.connection():
            nesting = other.submit(nest)
            until(lambda: sorted(holder.waits for holder in pool.holders()) == [False, True])
            assert pool.stats().waiting == 1
        nesting.result(10)


def test_equal_functions_of_two_files_are_told_apart(fake: FakeServer) -> None:
    pool = fake.pool(name="shop")
    pool.count_usage(UsageCounter)
    with pool:
        held = []
        for name in ("orders", "billing"):
            views = load(Path("/srv") / name / "views.py", "def find(pool): return pool.getconn()")
            held.append(views.find(pool))
        call_sites = ["billing/views.py:1 find", "orders/views.py:1 find"]
        assert sorted(holder.where for holder in pool.holders()) == call_sites
        for conn in held:
            pool.putconn(conn)
        pool.stats()
        assert sorted(pool.usage.rows()) == call_sites


def test_a_frame_without_an_instruction_is_named_by_its_first_line() -> None:
    """Compilers such as Nuitka make such frames."""
    code = test_a_frame_without_an_instruction_is_named_by_its_first_line.__code__
    assert holders.where(code, -1).partition(":")[2].split() == [
        str(code.co_firstlineno), code.co_name
    ]  # fmt: skip
