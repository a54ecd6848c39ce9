"""The pool on a server that is well: drop-in behaviour, checkouts, fetches, transactions."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
import pytest
from psycopg import Connection, IsolationLevel
from psycopg.rows import dict_row, tuple_row
from psycopg.types.string import TextLoader
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

import dbpool
from dbpool import ConfigError, DatabaseUnavailable, Pool, PoolExhausted, Settings

from .postgres import Server, until


@pytest.fixture
def pool(dsn: str) -> Iterator[Pool]:
    with Pool(dsn, max_size=4, timeout=5) as pool:
        yield pool


def in_thread(fn: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Start *fn* in a thread; the list gets what it returned or raised."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(fn())
        except BaseException as ex:  # noqa: BLE001  # whatever it is, the test looks at it
            outcome.append(ex)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


# Opening and closing


def test_is_a_connection_pool(pool: Pool) -> None:
    assert isinstance(pool, ConnectionPool)


def test_opens_itself_on_first_use(dsn: str) -> None:
    pool: Pool = Pool(dsn)
    try:
        assert pool.closed
        assert pool.state == "starting"
        assert pool.fetch_value("select 1") == 1
        assert not pool.closed
        assert pool.state == "up"
    finally:
        pool.close()


def test_open_false_insists_on_open(dsn: str) -> None:
    pool: Pool = Pool(dsn, open=False)
    with pytest.raises(PoolClosed, match="not open yet"):
        pool.getconn()
    pool.open(wait=True, timeout=10)
    assert pool.fetch_value("select 1") == 1
    pool.close()


def test_open_true_opens_now(dsn: str) -> None:
    with Pool(dsn, open=True) as pool:
        assert not pool.closed
        until(lambda: pool.stats().idle == 1)


def test_wait_waits_for_min_size(dsn: str) -> None:
    with Pool(dsn, min_size=3) as pool:
        pool.wait(timeout=10)
        assert pool.stats().idle == 3


@pytest.mark.parametrize("used", [True, False])
def test_a_closed_pool_never_opens_itself_again(dsn: str, used: bool) -> None:
    pool: Pool = Pool(dsn)
    if used:
        pool.fetch_value("select 1")
    pool.close()
    assert pool.state == "stopped"
    with pytest.raises(PoolClosed):
        pool.fetch_value("select 1")
    with pytest.raises(PoolClosed):
        pool.open()


def test_close_fails_waiters_and_closes_what_is_out_on_return(dsn: str) -> None:
    pool: Pool = Pool(dsn, max_size=1)
    conn = pool.getconn()
    thread, outcome = in_thread(pool.getconn)
    until(lambda: pool.stats().waiting == 1)
    pool.close()
    thread.join(5)
    assert isinstance(outcome[0], PoolClosed)
    assert not conn.closed
    pool.putconn(conn)
    assert conn.closed
    stats = pool.stats()
    assert (stats.size, stats.active, stats.idle, stats.connecting, stats.waiting) == (0,) * 5


@pytest.mark.parametrize("changed", [False, True])
def test_a_closed_pool_closes_what_comes_back(pool: Pool, changed: bool) -> None:
    with pool.connection() as conn:
        if changed:
            conn.row_factory = dict_row  # type: ignore[assignment]
        conn.execute("select 1")
        pool.close()
    assert conn.closed
    assert pool.stats().active == 0


class Guarded(set[Any]):
    """The slots of a pool that may be changed by who holds its lock alone."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool._slots)
        self.lock: Any = pool._lock

    def add(self, slot: Any) -> None:
        assert self.lock._is_owned()
        super().add(slot)

    def discard(self, slot: Any) -> None:
        assert self.lock._is_owned()
        super().discard(slot)

    def difference_update(self, *slots: Any) -> None:
        assert self.lock._is_owned()
        super().difference_update(*slots)


@pytest.mark.parametrize("reset", [None, lambda conn: conn.execute("reset all") and conn.commit()])
def test_the_books_are_changed_under_the_lock_alone(
    dsn: str, reset: Callable[[Any], Any] | None
) -> None:
    pool: Pool = Pool(dsn, max_size=6, reset=reset)
    with pool.connection():
        pool._slots = Guarded(pool)
    fit, changed, broken, lost, late, late_changed = (pool.getconn() for _ in range(6))
    changed.prepare_threshold = late_changed.prepare_threshold = 7
    broken.close()
    for conn in (fit, changed, broken):
        pool.putconn(conn)
    del lost
    gc.collect()
    pool.patrol(monotonic())
    until(lambda: pool.stats().active == 2)
    pool.close()
    pool.putconn(late)
    pool.putconn(late_changed)
    assert late.closed
    assert late_changed.closed
    assert not pool._slots


def test_an_open_pool_that_is_collected_leaves_no_thread_behind(dsn: str) -> None:
    before = set(threading.enumerate())
    pool: Pool = Pool(dsn, name="forgotten")
    pool.fetch_value("select 1")
    del pool
    gc.collect()
    until(lambda: set(threading.enumerate()) <= before)


def test_one_thread_watches_over_all_pools(dsn: str) -> None:
    with Pool(dsn, name="one") as one, Pool(dsn, name="two") as two:
        one.open()
        two.open()
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("dbpool-watchdog") == 1


# Options


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_sise"):
        Pool("host=localhost", max_sise=3)  # type: ignore[call-arg]


def test_the_parents_name_is_taken(dsn: str) -> None:
    with Pool(dsn, name=None) as pool:
        assert pool.fetch_value("select 1") == 1


def test_a_class_may_want_its_conninfo_by_position(dsn: str) -> None:
    class Strict(Connection[Any]):
        @classmethod
        def connect(cls, conninfo: str, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().connect(conninfo, **kwargs)

    with Pool(dsn, connection_class=Strict) as pool:
        assert pool.fetch_value("select 1") == 1


def test_min_size_alone_implies_a_max_size(dsn: str) -> None:
    assert Pool(dsn, min_size=20).max_size == 20
    assert Pool(dsn, min_size=2).max_size == 10
    assert Pool(dsn, min_size=2, max_size=None).max_size == 2


def test_settings_and_keywords_combine(dsn: str) -> None:
    pool: Pool = Pool(settings=Settings(conninfo=dsn, max_size=3), timeout=1.5)
    assert (pool.max_size, pool.timeout) == (3, 1.5)
    assert pool.fetch_value("select 1") == 1
    pool.close()


def test_conninfo_and_kwargs_may_be_callables(dsn: str) -> None:
    with Pool(lambda: dsn, kwargs=lambda: {"autocommit": True}) as pool:
        with pool.connection() as conn:
            assert conn.autocommit


def test_configure_reset_and_check_are_called(dsn: str) -> None:
    calls: list[str] = []
    with Pool(
        dsn,
        max_size=1,
        configure=lambda conn: calls.append("configure"),
        check=lambda conn: calls.append("check"),
        reset=lambda conn: calls.append("reset"),
    ) as pool:
        for _ in range(2):
            with pool.connection():
                pass
    assert calls[:3] == ["configure", "check", "reset"]
    assert calls.count("check") == 2


def test_a_connection_that_fails_the_users_check_is_replaced(dsn: str) -> None:
    refused: list[int] = []

    def check(conn: Connection[Any]) -> None:
        if not refused:
            refused.append(conn.info.backend_pid)
            raise psycopg.OperationalError("I don't like it")

    with Pool(dsn, max_size=1, check=check) as pool:
        assert pool.fetch_value("select pg_backend_pid()") != refused[0]
        assert pool.stats().counters.discarded["dead"] == 1


def test_the_parents_own_check_costs_no_round_trip(dsn: str) -> None:
    with Pool(dsn, max_size=1, check=ConnectionPool.check_connection) as pool:
        assert pool.fetch_value("select 1") == 1


def test_a_check_that_always_fails_is_no_storm_of_connects(dsn: str) -> None:
    def check(conn: Connection[Any]) -> None:
        raise psycopg.OperationalError("never")

    with Pool(dsn, max_size=1, check=check) as pool:
        with pytest.raises(PoolTimeout):
            pool.getconn(timeout=0.6)
        assert pool.stats().counters.connects <= 5


def test_a_check_that_is_interrupted_loses_no_connection(dsn: str) -> None:
    def check(conn: Connection[Any]) -> None:
        conn.execute("select 1")
        raise KeyboardInterrupt

    with Pool(dsn, max_size=1, check=check) as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.getconn()
        stats = pool.stats()
        assert (stats.size, stats.idle, stats.active) == (1, 1, 0)
        assert pool._pool[0].info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_a_connection_left_in_transaction_by_configure_is_refused(dsn: str) -> None:
    def configure(conn: Connection[Any]) -> None:
        conn.execute("select 1")

    with Pool(dsn, configure=configure, timeout=1, outage_grace=0.1) as pool:
        with pytest.raises(DatabaseUnavailable) as caught:
            pool.getconn()
    assert "configure" in str(caught.value)


def test_close_returns_gives_back_instead_of_closing(dsn: str) -> None:
    with Pool(dsn, max_size=1, close_returns=True) as pool:
        conn = pool.getconn()
        conn.close()
        assert not conn.closed
        assert pool.stats().idle == 1


def test_server_side_timeouts_are_set_without_asking_the_user(dsn: str) -> None:
    with Pool(dsn, statement_timeout=7) as pool:
        assert pool.fetch_value("show statement_timeout") == "7s"
        assert pool.fetch_value("show idle_in_transaction_session_timeout") == "1min"
        assert pool.fetch_value("show application_name") == "dbpool:default"


# Checkouts


def test_commits_on_success_and_rolls_back_on_error(pool: Pool) -> None:
    pool.execute("create table t (id int)")
    with pool.connection() as conn:
        conn.execute("insert into t values (1)")
    with pytest.raises(ZeroDivisionError), pool.connection() as conn:
        conn.execute("insert into t values (2)")
        raise ZeroDivisionError
    assert pool.fetch_all("select id from t") == [(1,)]


def test_hands_out_the_connection_used_last(dsn: str) -> None:
    with Pool(dsn, min_size=3, max_size=3) as pool:
        pool.wait()
        pids = {pool.fetch_value("select pg_backend_pid()") for _ in range(10)}
    assert len(pids) == 1


def test_waiters_are_served_in_order(dsn: str) -> None:
    with Pool(dsn, max_size=1, timeout=10) as pool:
        served: list[int] = []
        conn = pool.getconn()
        threads = []
        for n in range(5):

            def take(n: int = n) -> None:
                with pool.connection():
                    served.append(n)

            threads.append(in_thread(take)[0])
            until(partial(lambda n: pool.stats().waiting == n + 1, n))
        pool.putconn(conn)
        for thread in threads:
            thread.join(10)
    assert served == [0, 1, 2, 3, 4]


def test_grows_for_waiters_and_shrinks_when_idle(dsn: str) -> None:
    with Pool(dsn, max_size=4, max_idle=0.2, leak_after=0.2) as pool:
        conns = [pool.getconn() for _ in range(4)]
        assert pool.stats().size == 4
        for conn in conns:
            pool.putconn(conn)
        until(lambda: pool.stats().size == 1)
        assert pool.stats().counters.discarded["idle"] == 3


def test_grows_for_every_one_who_waits_and_gives_nothing_back(dsn: str) -> None:
    with Pool(dsn, max_size=6, timeout=20) as pool:
        started = monotonic()
        out = [in_thread(pool.getconn) for _ in range(6)]
        for thread, _ in out:
            thread.join(20)
        assert pool.stats().active == 6
        assert monotonic() - started < 3.0, "it grew by patrols, one in a second"
        for _, outcome in out:
            pool.putconn(outcome[0])


def test_a_connection_past_its_lifetime_is_not_handed_out(dsn: str) -> None:
    with Pool(dsn, max_size=1, max_lifetime=0.2) as pool:
        pid = pool.fetch_value("select pg_backend_pid()")
        until(lambda: pool.fetch_value("select pg_backend_pid()") != pid)
        assert pool.stats().counters.discarded["expired"] >= 1


def test_exhaustion_names_the_holder_and_its_line(dsn: str) -> None:
    with Pool(dsn, max_size=1) as pool:
        with pool.connection():
            thread, outcome = in_thread(lambda: pool.getconn(timeout=0.05))
            thread.join(5)
    error = outcome[0]
    assert isinstance(error, PoolExhausted)
    assert isinstance(error, PoolTimeout)
    assert "1 of 1 checked out" in str(error)
    assert "test_exhaustion_names_the_holder_and_its_line" in str(error)
    assert "nested" not in str(error)
    assert error.pool == "default"
    assert error.snapshot is not None
    assert error.snapshot.active == 1


def test_exhaustion_tells_a_nested_checkout(dsn: str) -> None:
    with Pool(dsn, max_size=1) as pool, pool.connection():
        with pytest.raises(PoolExhausted, match=r"holds 1, .* hold 2 at once .* n \* 1 \+ 1"):
            pool.getconn(timeout=0.05)


def test_a_timed_out_waiter_no_longer_counts(dsn: str) -> None:
    with Pool(dsn, max_size=1, max_waiting=1) as pool:
        conn = pool.getconn()
        for _ in range(3):
            with pytest.raises(PoolExhausted):
                pool.getconn(timeout=0.02)
        thread, outcome = in_thread(lambda: pool.getconn(timeout=10))
        until(lambda: pool.stats().waiting == 1)
        with pytest.raises(TooManyRequests):
            pool.getconn()
        pool.putconn(conn)
        thread.join(10)
        pool.putconn(outcome[0])
        assert pool.stats().counters.timeouts == 3
        assert pool.stats().counters.rejected == 1


def test_timeout_zero_still_gets_an_idle_connection(pool: Pool) -> None:
    pool.wait()
    pool.putconn(pool.getconn(timeout=0))


def test_timeout_zero_costs_no_connection_that_was_idle_for_long(dsn: str) -> None:
    with Pool(dsn, min_size=3, max_size=3, ping_after=0) as pool:
        pool.wait()
        with pool.connection(timeout=0):
            pass
        assert pool.stats().idle == 3


@pytest.mark.parametrize("foreign", [True, False])
def test_what_is_not_out_cannot_be_returned(pool: Pool, dsn: str, foreign: bool) -> None:
    pool.wait()
    conn = psycopg.connect(dsn) if foreign else pool.getconn()
    if not foreign:
        pool.putconn(conn)
    with pytest.raises(ValueError, match="can't return connection"):
        pool.putconn(conn)
    assert pool.stats().idle == pool.stats().size
    if foreign:
        conn.close()


def test_what_was_returned_inside_its_block_is_not_returned_again(pool: Pool) -> None:
    with pytest.raises(ValueError, match="not out"), pool.connection() as conn:
        pool.putconn(conn)
    stats = pool.stats()
    assert (stats.size, stats.idle, stats.active, stats.counters.checkouts) == (1, 1, 0, 1)
    assert pool.fetch_value("select 1") == 1


def test_a_collected_connection_frees_its_slot(dsn: str) -> None:
    with Pool(dsn, max_size=1) as pool:
        pool.getconn()
        gc.collect()
        assert pool.fetch_value("select 1") == 1
        counters = pool.stats().counters
        assert counters.discarded["collected"] == 1
        assert counters.checkouts == 2


def test_a_log_handler_may_use_the_pool(dsn: str) -> None:
    inside, go = threading.Event(), threading.Event()

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg == "mine":
                inside.set()
                go.wait(10)
                own.stats()

    handler, logger = Counting(), logging.getLogger("dbpool")
    logger.addHandler(handler)
    try:
        with Pool(dsn, max_size=1) as own:
            logging_one, _ = in_thread(lambda: logger.error("mine"))
            assert inside.wait(10)
            own.getconn()
            gc.collect()
            patrolling, _ = in_thread(lambda: own.patrol(monotonic()))
            patrolling.join(0.2)  # it may have something to log
            go.set()
            logging_one.join(10)
            assert not logging_one.is_alive()
            patrolling.join(10)
    finally:
        logger.removeHandler(handler)


def test_what_is_held_long_is_reported_once_with_the_holders_stack(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    def held() -> list[str]:
        return [r.message for r in caplog.records if "has been held" in r.message]

    with Pool(dsn, leak_after=0.1) as pool:
        conn = pool.getconn()
        until(held)
        assert "test_what_is_held_long_is_reported_once" in held()[0]
        assert "in until" in held()[0]
        pool.putconn(conn)
        assert "came back after" in caplog.messages[-1]
        counters = pool.stats().counters
        assert (counters.leaks, counters.held_long, counters.returned_late) == (0, 1, 1)
    assert len(held()) == 1
    extras = [vars(record)["dbpool"] for record in caplog.records if "dbpool" in vars(record)]
    assert [extra["event"] for extra in extras] == ["held_long", "returned_late"]
    assert extras[0]["pool"] == "default"
    assert extras[0]["holder"]["thread"] == "MainThread"


# What a user changed


def test_manners_are_put_back(pool: Pool) -> None:
    with pool.connection() as conn:
        conn.autocommit = True
        conn.row_factory = dict_row  # type: ignore[assignment]
        conn.isolation_level = IsolationLevel.SERIALIZABLE
        conn.read_only = True
        conn.deferrable = True
        conn.prepare_threshold = None
        conn.prepared_max = 3
        conn.execute("select 1")
    with pool.connection() as again:
        assert again is conn
        assert again.autocommit is False
        assert again.row_factory is tuple_row
        assert again.isolation_level is None
        assert again.read_only is None
        assert again.deferrable is None
        assert (again.prepare_threshold, again.prepared_max) == (5, 100)
        assert again.execute("show transaction_isolation").fetchone() == ("read committed",)


@pytest.mark.parametrize("statement", ["select 1", "select 1/0"])
def test_an_open_transaction_is_rolled_back_on_return(pool: Pool, statement: str) -> None:
    conn = pool.getconn()
    try:
        conn.execute(statement)
    except psycopg.Error:
        pass
    pool.putconn(conn)
    assert pool.getconn() is conn
    assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    pool.putconn(conn)


def test_a_connection_returned_closed_is_replaced(pool: Pool) -> None:
    with pool.connection() as conn:
        conn.close()
    assert pool.fetch_value("select 1") == 1
    assert pool.stats().counters.discarded["broken"] == 1


def test_a_connection_returned_in_copy_is_replaced(pool: Pool) -> None:
    pool.execute("create table t (id int)")
    conn = pool.getconn()
    copying = conn.cursor().copy("copy t from stdin")
    copying.__enter__()
    pool.putconn(conn)
    assert conn.closed
    assert pool.fetch_value("select 1") == 1


# One statement


def test_a_connection_returned_in_a_pipeline_is_replaced(pool: Pool) -> None:
    conn = pool.getconn()
    pipeline = conn.pipeline()
    pipeline.__enter__()
    pool.putconn(conn)
    assert conn.closed
    assert pool.fetch_value("select 1") == 1


def test_a_connection_returned_in_a_two_phase_commit_is_replaced(
    make_server: Callable[..., Server],
) -> None:
    with Pool(make_server(max_prepared_transactions=2).conninfo, max_size=1) as pool:
        conn = pool.getconn()
        conn.tpc_begin(conn.xid(1, "a", "b"))
        conn.execute("select 1")
        conn.tpc_prepare()
        pool.putconn(conn)
        assert conn.closed
        with pool.connection() as other:
            (prepared,) = other.tpc_recover()
            other.tpc_rollback(prepared)


def test_a_check_may_leave_its_transaction_open(dsn: str) -> None:
    def check(conn: Connection[Any]) -> None:
        conn.execute("select 1")

    with Pool(dsn, max_size=1, check=check) as pool:
        pool.execute("create table t (id int)")
        assert pool.execute("insert into t values (1)") == 1
        assert pool.fetch_value("insert into t values (2) returning id") == 2
        pool.run(lambda conn: conn.execute("insert into t values (3)"))
        assert pool.run(lambda conn: conn.read_only, read_only=True) is True
        with pool.connection() as conn:
            conn.execute("insert into t values (4)")
        assert pool.fetch_all("select id from t") == [(1,), (2,), (3,), (4,)]


class Shouting(psycopg.Cursor[Any]):
    """A cursor class with its own idea of a result."""

    def fetchone(self) -> Any:
        row: Any = super().fetchone()
        return (row[0].upper(),)

    def fetchall(self) -> list[Any]:
        return [(text.upper(),) for (text,) in super().fetchall()]


def test_fetches_ask_the_connections_cursor_class(dsn: str) -> None:
    with Pool(dsn, kwargs={"cursor_factory": Shouting}) as pool:
        assert pool.fetch_value("select 'a'") == "A"
        assert pool.fetch_one("select 'a'") == ("A",)
        assert pool.fetch_all("select 'a'") == [("A",)]


def test_fetches(pool: Pool) -> None:
    assert pool.fetch_all("select * from generate_series(1, %s) as n", [3]) == [(1,), (2,), (3,)]
    assert pool.fetch_one("select 1 as a, 2 as b", row_factory=dict_row) == {"a": 1, "b": 2}
    assert pool.fetch_one("select 1 where false") is None
    assert pool.fetch_value("select %(x)s::text", {"x": "y"}) == "y"
    assert pool.fetch_value("select 1 where false") is None
    pool.execute("create table t (id int)")
    assert pool.execute("insert into t select generate_series(1, 5)") == 5
    assert pool.fetch_value("select count(*) from t") == 5


def test_a_single_statement_takes_one_round_trip(dsn: str, tmp_path: Path) -> None:
    with Pool(dsn, max_size=1) as pool, (tmp_path / "trace").open("w+") as trace:
        with pool.connection() as conn:
            conn.pgconn.trace(trace.fileno())
        assert pool.fetch_value("select %s::int", [1]) == 1
        conn.pgconn.untrace()
        trace.seek(0)
        answers = [line for line in trace if "ReadyForQuery" in line]
        assert len(answers) == 1


class Loud(TextLoader):
    def load(self, data: Any) -> str:
        return str(super().load(data)).upper()


def test_a_single_statement_leaves_nothing_behind(dsn: str) -> None:
    with Pool(dsn, max_size=1) as pool:
        row = pool.fetch_one("select %s::text as a", ["secret"], row_factory=dict_row)
        assert row == {"a": "secret"}
        with pytest.raises(psycopg.errors.DivisionByZero):
            pool.fetch_value("select 1/%s", [0])
        kept = pool._pool[0]._slot.cursor
        names = ("_conn", "_pgconn", "_tx", "_query", "_last_query", "_results", "pgresult")
        assert {name: getattr(kept, name) for name in names} == dict.fromkeys(names)
        assert pool.fetch_value("select 2") == 2
        assert pool._pool[0]._slot.cursor is kept


def test_what_a_holder_registers_is_gone_with_it_and_what_configure_registers_stays(
    dsn: str,
) -> None:
    def configure(conn: Connection[Any]) -> None:
        conn.adapters.register_loader("varchar", Loud)

    def told(conn: Connection[Any]) -> list[Any]:
        query = "select 'a'::text, 'b'::varchar, 'c'::name"
        return list(conn.execute(query).fetchone() or ())

    with Pool(dsn, max_size=1, configure=configure) as pool:
        for name in ("text", "varchar", "name"):
            assert list(pool.fetch_one("select 'a'::text, 'b'::varchar") or ()) == ["a", "B"]
            with pool.connection() as conn:
                conn.adapters.register_loader(name, TextLoader if name == "varchar" else Loud)
                assert told(conn) == [
                    "A" if name == "text" else "a",
                    "b" if name == "varchar" else "B",
                    "C" if name == "name" else "c",
                ]
            conn = pool.getconn()
            assert told(conn) == ["a", "B", "c"]
            pool.putconn(conn)  # in a transaction, to be rolled back


def test_a_row_factory_of_the_users_has_a_cursor_of_its_own(dsn: str) -> None:
    seen: list[psycopg.Cursor[Any]] = []

    def spy(cursor: psycopg.Cursor[Any]) -> Any:
        seen.append(cursor)
        return tuple_row(cursor)

    with Pool(dsn, max_size=1) as pool:
        pool.fetch_one("select 1")
        pool.fetch_one("select 2", row_factory=spy)
        assert pool.fetch_one("select 3") == (3,)
    assert seen[0].fetchone() is None
    assert isinstance(seen[0], psycopg.Cursor)
    assert seen[0].connection is not None  # the one that is kept has let go of it


@pytest.mark.parametrize(("name", "expected"), [("check", "aAa"), ("reset", "aaa")])
def test_a_single_statement_adapts_as_a_check_wants_it_until_the_connection_is_back(
    dsn: str, name: str, expected: str
) -> None:
    calls: list[Connection[Any]] = []

    def callback(conn: Connection[Any]) -> None:
        if len(calls) == 1:
            conn.adapters.register_loader("text", Loud)
        calls.append(conn)

    options: Any = {name: callback}
    with Pool(dsn, max_size=1, **options) as pool:
        seen = [pool.fetch_value("select 'a'::text") for _ in range(3)]
    assert "".join(seen) == expected


def test_a_failing_statement_leaves_the_connection_fit(pool: Pool) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        pool.fetch_one("select 1/0")
    with pytest.raises(psycopg.errors.UndefinedTable):
        pool.execute("insert into nowhere values (1)")
    assert pool.fetch_value("select 1") == 1
    assert pool.stats().counters.connects == 1


def test_a_statement_obeys_the_set_up_of_the_connection(dsn: str) -> None:
    def configure(conn: Connection[Any]) -> None:
        conn.read_only = True

    with Pool(dsn, configure=configure) as pool:
        assert pool.fetch_value("show transaction_read_only") == "on"
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            pool.execute("create table t (id int)")


# Whole transactions


def test_run_commits_and_returns_the_result(pool: Pool) -> None:
    pool.execute("create table t (id int)")

    def insert(conn: Connection[Any], value: int) -> int:
        return conn.execute("insert into t values (%s)", [value]).rowcount

    assert pool.run(insert, 7) == 1
    assert pool.fetch_all("select * from t") == [(7,)]


def test_run_sets_isolation_and_read_only_for_its_transaction_alone(pool: Pool) -> None:
    def show(conn: Connection[Any]) -> Any:
        return conn.execute(
            "select current_setting('transaction_isolation'),"
            " current_setting('transaction_read_only')"
        ).fetchone()

    serializable = IsolationLevel.SERIALIZABLE
    assert pool.run(show, isolation=serializable, read_only=True) == ("serializable", "on")
    assert pool.run(show) == ("read committed", "off")


def test_run_makes_a_transaction_where_autocommit_is_the_rule(dsn: str) -> None:
    with Pool(dsn, kwargs={"autocommit": True}) as pool:
        pool.execute("create table t (id int)")

        def fail(conn: Connection[Any]) -> None:
            conn.execute("insert into t values (1)")
            raise LookupError

        with pytest.raises(LookupError):
            pool.run(fail)
        assert pool.fetch_all("select * from t") == []
        with pool.connection() as conn:
            assert conn.autocommit


def test_run_raises_instead_of_committing_nothing(pool: Pool) -> None:
    def swallow(conn: Connection[Any]) -> None:
        try:
            conn.execute("select 1/0")
        except psycopg.Error:
            pass

    with pytest.raises(psycopg.errors.InFailedSqlTransaction):
        pool.run(swallow)
    assert pool.fetch_value("select 1") == 1


def test_run_retries_a_serialization_failure(pool: Pool) -> None:
    pool.execute("create table t (id int primary key, n int)")
    pool.execute("insert into t values (1, 0)")
    tries: list[int] = []

    def increment(conn: Connection[Any]) -> None:
        tries.append(1)
        (n,) = conn.execute("select n from t where id = 1").fetchone() or (0,)
        if len(tries) == 1:
            pool.execute("update t set n = n + 10 where id = 1")
        conn.execute("update t set n = %s where id = 1", [n + 1])

    pool.run(increment, isolation=IsolationLevel.REPEATABLE_READ)
    assert len(tries) == 2
    assert pool.fetch_value("select n from t") == 11
    assert pool.stats().counters.retries == 1


def test_run_gives_up_after_its_attempts(pool: Pool) -> None:
    tries: list[int] = []

    def fail(conn: Connection[Any]) -> None:
        tries.append(1)
        conn.execute("do $$ begin raise sqlstate '40001'; end $$")

    with pytest.raises(psycopg.errors.SerializationFailure):
        pool.run(fail, attempts=2)
    assert len(tries) == 2


def test_run_retries_no_other_error(pool: Pool) -> None:
    tries: list[int] = []

    def fail(conn: Connection[Any]) -> None:
        tries.append(1)
        conn.execute("select 1/0")

    with pytest.raises(psycopg.errors.DivisionByZero):
        pool.run(fail)
    assert len(tries) == 1


# Upkeep


def test_drain_replaces_idle_and_returned_connections(dsn: str) -> None:
    with Pool(dsn, min_size=2, max_size=2) as pool:
        pool.wait()
        out = pool.getconn()
        (idle,) = pool._pool
        pool.drain()
        assert idle.closed
        pool.putconn(out)
        assert out.closed
        assert pool.fetch_value("select 1") == 1


def test_resize_grows_and_shrinks(dsn: str) -> None:
    with Pool(dsn, min_size=1, max_size=4) as pool:
        pool.resize(3, 4)
        until(lambda: pool.stats().idle == 3)
        pool.resize(1, 1)
        until(lambda: pool.stats().size == 1)
        assert pool.fetch_value("select 1") == 1


def test_resize_is_kept_while_connections_are_made(make_server: Callable[..., Server]) -> None:
    with Pool(make_server().conninfo, min_size=1, max_size=20) as pool:
        pool.wait()
        pool.resize(20, 20)
        pool.resize(1, 2)
        until(lambda: pool.stats().connecting == 0)
        for _ in range(3):
            assert pool.fetch_value("select 1") == 1
        conns = [pool.getconn(), pool.getconn()]
        with pytest.raises(PoolExhausted):
            pool.getconn(timeout=0.05)
        for conn in conns:
            pool.putconn(conn)


def test_resize_takes_what_is_out_when_it_returns(pool: Pool) -> None:
    out = [pool.getconn() for _ in range(4)]
    pool.resize(1, 2)
    for conn in out:
        pool.putconn(conn)
    until(lambda: pool.stats().size == 2)
    assert sum(conn.closed for conn in out) == 2


def test_check_pings_the_idle(dsn: str) -> None:
    with Pool(dsn, min_size=3, max_size=3) as pool:
        pool.wait()
        pool._pool[0].pgconn.finish()
        pool.check()
        until(lambda: pool.stats().idle == 3)
        assert pool.stats().counters.discarded["dead"] == 1


def test_get_stats_has_the_parents_keys_and_pop_stats_resets(pool: Pool) -> None:
    for _ in range(3):
        with pool.connection():
            pass
    stats = pool.get_stats()
    assert stats["requests_num"] == 3
    assert stats["connections_num"] == 1
    assert stats["pool_min"] == 1
    assert stats["pool_max"] == 4
    assert stats["pool_size"] == 1
    assert stats["pool_available"] == 1
    assert stats["requests_waiting"] == 0
    assert pool.pop_stats()["requests_num"] == 3
    assert pool.get_stats()["requests_num"] == 0
    assert pool.get_stats()["pool_size"] == 1


def test_counts_add_up_and_are_exact_under_threads(dsn: str) -> None:
    with Pool(dsn, max_size=4, timeout=30) as pool:
        wrong: list[Any] = []
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.0005):
                stats = pool.stats()
                total = stats.active + stats.idle + stats.connecting
                if total != stats.size or min(stats.active, stats.idle, stats.connecting) < 0:
                    wrong.append(stats)

        def work() -> None:
            for _ in range(500):
                with pool.connection():
                    pass

        watcher = in_thread(watch)[0]
        threads = [in_thread(work)[0] for _ in range(16)]
        for thread in threads:
            thread.join(60)
        done.set()
        watcher.join(10)
        assert not wrong
        stats = pool.stats()
        assert stats.counters.checkouts == stats.wait.count == stats.use.count == 8000


def test_repr_tells_the_state_and_no_secret(dsn: str) -> None:
    pool: Pool = Pool(dsn + " password=hunter2", name="main")
    assert repr(pool) == "<dbpool.Pool 'main' starting size=0 idle=0>"
    pool.fetch_value("select 1")
    assert repr(pool) == "<dbpool.Pool 'main' up size=1 idle=1>"
    assert "hunter2" not in repr(pool.settings)
    pool.close()
    assert repr(pool) == "<dbpool.Pool 'main' stopped size=0 idle=0>"


def test_public_names_are_importable() -> None:
    for name in dbpool.__all__:
        assert getattr(dbpool, name)


def test_a_leak_is_told_of_the_thread_that_left_it_not_of_its_successor(pool: Pool) -> None:
    def leak() -> Any:
        return pool.getconn()

    threads: list[threading.Thread] = []
    held: list[Any] = []
    culprit = threading.Thread(target=lambda: held.append(leak()), name="culprit")
    culprit.start()
    culprit.join()
    done = threading.Event()
    for number in range(20):  # one of them gets the culprit's ident
        threads.append(threading.Thread(target=done.wait, name=f"innocent-{number}"))
        threads[-1].start()
    assert [holder.thread for holder in pool.holders()] == ["culprit (ended)"]
    done.set()
    for thread in threads:
        thread.join()
    pool.putconn(held.pop())


def test_resizing_may_be_what_a_wait_is_for(dsn: str) -> None:
    with Pool(dsn, min_size=1, max_size=9) as pool:
        pool.wait(10)
        pool._min_size = 9  # more than it has, and none begun: nothing else would end the wait
        waiter = threading.Thread(target=pool.wait, args=(20.0,))
        waiter.start()
        pool.resize(1, 9)
        waiter.join(10.0)
        assert not waiter.is_alive()
        assert not pool.closed


def test_a_class_that_refuses_to_be_entered_keeps_no_slot(dsn: str) -> None:
    class Refusing(Connection[Any]):
        def __enter__(self) -> Any:
            raise RuntimeError("not now")

    with Pool(dsn, max_size=1, connection_class=Refusing) as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError) as caught, pool.connection(timeout=5):
                raise AssertionError("it was entered")
            assert pool.stats().active == 0, caught


def test_waiters_of_a_pool_that_closes_are_counted(dsn: str) -> None:
    pool = Pool(dsn, max_size=1)
    conn = pool.getconn()
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            pool.getconn()
        except PoolClosed as ex:
            errors.append(ex)

    waiter = threading.Thread(target=wait)
    waiter.start()
    until(lambda: pool.stats().waiting == 1)
    pool.close()
    waiter.join()
    assert len(errors) == 1
    assert pool.stats().counters.rejected == 1
    assert pool.get_stats()["requests_errors"] == 1
    pool.putconn(conn)


def test_the_time_waited_in_vain_is_counted_as_the_parent_does(dsn: str) -> None:
    with Pool(dsn, max_size=1) as pool, pool.connection():
        before = pool.get_stats()["requests_wait_ms"]
        with pytest.raises(PoolExhausted):
            pool.getconn(timeout=0.2)
        assert pool.get_stats()["requests_wait_ms"] >= before + 200
