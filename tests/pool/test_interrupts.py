"""A signal handler raises at any point: within a second the pool has lost nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from psycopg.pq import TransactionStatus

from dbpool import Pool, PoolClosed, PoolError
from tests.fake import FakeConnection
from tests.interrupts import Interrupt, every_point, interrupted
from tests.postgres import until
from tests.threads import Task

Action = Callable[[Pool], object]

SECOND = 1.0
SLACK = 0.5  # seconds that a busy machine may add

# Python can only report an exception that is raised while it closes a generator.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


# The watchdog runs four times in `leak_after`, and at least twice a second.
def make(**options: Any) -> Pool:
    defaults = {"min_size": 1, "max_size": 2, "timeout": 5.0, "leak_after": 0.4} | options
    return Pool(connection_class=FakeConnection, kwargs={"host": "nowhere"}, **defaults)


def is_idle(pool: Pool) -> bool:
    stats = pool.stats()
    return (stats.active, stats.connecting, stats.waiting) == (
        0,
        0,
        0,
    ) and stats.idle == stats.size <= stats.max_size


def assert_whole(pool: Pool) -> None:
    """Within a second nothing is out or in transit, and the pool can lend max_size connections."""
    until(lambda: is_idle(pool), SECOND + SLACK)
    conns = [pool.getconn(timeout=SECOND + SLACK) for _ in range(pool.max_size)]
    assert len(set(map(id, conns))) == pool.max_size
    assert (pool.stats().active, pool.stats().size) == (pool.max_size, pool.max_size)
    for conn in conns:
        conn.execute("select 1")
        pool.putconn(conn)
    until(lambda: is_idle(pool), SECOND + SLACK)


def sweep(
    action: Action, prepare: Action = lambda pool: None, *, new_pool: bool = False, **options: Any
) -> int:
    """Interrupt *action* at every point; return how many there are."""
    pools = [make(**options)]

    def attempt() -> None:
        action(pools[-1])

    prepare(pools[-1])
    points = 0
    try:
        for points in every_point(attempt):  # noqa: B007  # used after the loop
            assert_whole(pools[-1])
            if new_pool:
                pools[-1].close()
                pools.append(make(**options))
            prepare(pools[-1])
    finally:
        for pool in pools:
            pool.close()
    return points


def block(pool: Pool) -> None:
    with pool.connection() as conn:
        conn.execute("select 1")


def get_and_put(pool: Pool) -> None:
    conn = pool.getconn()
    pool.putconn(conn)


def nested(pool: Pool) -> None:
    with pool.connection(), pool.connection():
        pass


def change_settings(pool: Pool) -> None:
    with pool.connection() as conn:
        conn.prepare_threshold = 7


def break_connection(pool: Pool) -> None:
    with pool.connection() as conn:
        conn.pgconn.finish()


def hang_up(pool: Pool) -> None:
    """Close every connection from the server's side."""
    conns = [pool.getconn() for _ in range(pool.max_size)]
    for conn in conns:
        pool.putconn(conn)
    for conn in conns:
        conn.pgconn.hang_up()  # type: ignore[attr-defined]


def hold_for(seconds: float) -> Action:
    """Check out all connections, and return them in another thread after that time."""

    def hold(pool: Pool) -> None:
        conns = [pool.getconn() for _ in range(pool.max_size)]

        def return_all() -> None:
            time.sleep(seconds)
            for conn in conns:
                pool.putconn(conn)
            conns.clear()

        threading.Thread(target=return_all).start()

    return hold


def fail(pool: Pool) -> None:
    with suppress(ZeroDivisionError), pool.connection() as conn:
        conn.pgconn.transaction_status = TransactionStatus.INTRANS  # type: ignore[misc]
        raise ZeroDivisionError


def time_out(pool: Pool) -> None:
    with pytest.raises(PoolError):
        pool.getconn(timeout=0.001)


def resize(pool: Pool) -> None:
    pool.resize(2, 2)
    pool.resize(0, 1)
    pool.resize(1, 2)


QUICK: list[Any] = [
    pytest.param(block, {}, id="connection"),
    pytest.param(get_and_put, {}, id="getconn and putconn"),
    pytest.param(change_settings, {}, id="a connection whose settings are restored"),
    pytest.param(break_connection, {}, id="a connection that breaks"),
    pytest.param(fail, {}, id="a transaction that fails"),
    pytest.param(block, {"reset": lambda conn: None}, id="with a reset"),
    pytest.param(block, {"check": lambda conn: None}, id="with a check"),
    pytest.param(lambda pool: pool.fetch_all("select 1"), {}, id="fetch_all"),
    pytest.param(lambda pool: pool.fetch_one("select 1"), {}, id="fetch_one"),
    pytest.param(lambda pool: pool.fetch_value("select 1"), {}, id="fetch_value"),
    pytest.param(lambda pool: pool.execute("select 1"), {}, id="execute"),
    pytest.param(lambda pool: pool.run(lambda conn: None), {}, id="run", marks=pytest.mark.slow),
    pytest.param(lambda pool: pool.check(), {}, id="check"),
    pytest.param(lambda pool: pool.drain(), {}, id="drain"),
    pytest.param(lambda pool: pool.stats(), {}, id="stats"),
    pytest.param(lambda pool: pool.pop_stats(), {}, id="pop_stats"),
    pytest.param(lambda pool: pool.wait(2.0), {}, id="wait"),
]


@pytest.mark.parametrize(("action", "options"), QUICK)
def test_an_interrupted_call_loses_no_connection(action: Action, options: dict[str, Any]) -> None:
    assert sweep(action, **options) > 1


def test_resize_repairs_a_resize_that_was_interrupted() -> None:
    def restore(pool: Pool) -> None:
        pool.resize(1, 2)

    pool = make()
    for _ in every_point(lambda: resize(pool)):
        restore(pool)
        assert_whole(pool)
    pool.close()


def test_the_watchdog_finishes_a_close_that_was_interrupted() -> None:
    for point, pool in _closing():
        until(lambda: not _threads(pool), SECOND + SLACK)  # noqa: B023  # at once
        assert pool.stats().size == 0, point


def _closing() -> Iterator[tuple[int, Pool]]:
    pools: list[Pool] = []

    def add_pool() -> None:
        pools.append(make(name=f"closing{len(pools)}"))
        pools[-1].wait()

    add_pool()
    for point in every_point(lambda: pools[-1].close()):  # noqa: PLW0108  # a new pool each time
        if pools[-1].state == "stopped":
            yield point, pools[-1]
        else:
            pools[-1].close()
        add_pool()
    pools[-1].close()


def _threads(pool: Pool) -> list[str]:
    return [x.name for x in threading.enumerate() if x.name.startswith(f"{pool.name}-")]


@pytest.mark.slow
def test_an_interrupted_first_use_loses_no_connection() -> None:
    assert sweep(nested, new_pool=True) > 100


def test_a_pool_opens_after_an_opening_that_was_interrupted() -> None:
    assert sweep(lambda pool: pool.open(), new_pool=True) > 20


@pytest.mark.slow
def test_an_interrupted_caller_who_meets_dead_connections_loses_none() -> None:
    assert sweep(block, hang_up) > 50


@pytest.mark.slow
def test_an_interrupted_waiter_loses_no_connection() -> None:
    assert sweep(block, hold_for(0.02)) > 20


@pytest.mark.slow
def test_a_caller_interrupted_at_its_timeout_loses_no_connection() -> None:
    assert sweep(time_out, hold_for(0.1)) > 50


def test_the_pool_grows_although_a_connect_task_was_never_queued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = make(min_size=0)
    pool.open()
    jobs: list[Any] = []

    def put(job: Any) -> None:
        jobs.append(job)
        if len(jobs) == 1:
            raise Interrupt
        pool._threads.jobs.put(job)

    monkeypatch.setattr(pool._store, "jobs", SimpleNamespace(put=put))
    with pytest.raises(Interrupt):
        pool.getconn()
    assert_whole(pool)
    pool.close()


def test_an_interrupted_thread_leaves_no_lock_behind() -> None:
    """Other threads go on using the pool while one thread is interrupted again and again."""
    pool, stop, calls = make(max_size=4), threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            with pool.connection(timeout=SECOND + SLACK):
                calls.append(1)
            time.sleep(0.001)

    others = [Task(work) for _ in range(3)]
    for _ in every_point(lambda: block(pool)):
        before = len(calls)
        until(lambda: len(calls) > before)  # noqa: B023  # at once
    stop.set()
    for other in others:
        other.result(5.0)
    assert_whole(pool)
    pool.close()


@pytest.mark.parametrize(
    "action",
    [
        lambda pool: pool.open(),
        pytest.param(block, marks=pytest.mark.slow),  # takes a minute
        lambda pool: pool.close(),
    ],
)
def test_a_signal_handler_may_close_the_pool_at_any_point(action: Action) -> None:
    """As a handler for SIGTERM does."""

    def attempt(point: int) -> bool:
        pool = make()
        with suppress(PoolClosed), interrupted(point, pool.close) as points:
            action(pool)
        pool.close()
        return points.is_reached

    point = 1
    while Task(attempt, point).result(10.0):
        point += 1
    assert point >= 10


def test_an_interrupted_return_leaves_no_read_only_transaction(dsn: str) -> None:
    def use(pool: Pool) -> None:
        with pool.connection() as conn:
            conn.read_only = True
            conn.execute("select 1")

    with Pool(dsn, max_size=1) as pool:
        for _ in every_point(lambda: use(pool)):
            with pool.connection() as conn:
                assert conn.execute("show transaction_read_only").fetchone() == ("off",)
