"""Random faults under a mixed load: the pool's numbers stay consistent."""

from __future__ import annotations

import random
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg_pool import PoolTimeout

from dbpool import DatabaseUnavailable, Pool
from tests.pools import MakePool, assert_adds_up, assert_serves_all, await_server
from tests.postgres import Server, until
from tests.proxy import Mode, Proxy
from tests.threads import Load, Task


class Faults:
    """Faults of the server and its network. Each method repairs both before it returns."""

    def __init__(self, server: Server, proxy: Proxy, pool: Pool[Any], rng: random.Random):
        self._server, self._proxy, self._pool, self._random = server, proxy, pool, rng

    def cause_one(self) -> None:
        """Cause one fault, chosen at random."""
        names = [name for name in vars(Faults) if not name.startswith("_") and name != "cause_one"]
        getattr(self, self._random.choice(names))()

    def _wait(self) -> None:
        """Let the fault last for a few calls, or longer than the grace."""
        seconds = self._random.choice([0.0, 0.1, 0.6])
        end = time.monotonic() + seconds
        until(lambda: time.monotonic() >= end)

    def restart(self) -> None:
        self._server.stop(self._random.choice(["fast", "immediate"]))
        self._wait()
        self._server.start()

    def terminate(self) -> None:
        self._server.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where application_name like 'dbpool:%' and random() < 0.6"
        )

    def freeze(self) -> None:
        pids = self._server.backends(f"dbpool:{self._pool.name}")
        with suppress(ProcessLookupError):
            self._server.freeze(self._random.sample(pids, len(pids) // 2))
        if self._random.random() < 0.5:
            self._server.freeze([self._server.postmaster_pid])
        self._wait()
        self._server.thaw()

    def drop(self) -> None:
        self._proxy.drop(reset=self._random.random() < 0.5)

    def refuse(self) -> None:
        self._proxy.refuse()
        self._proxy.drop()
        self._wait()
        self._proxy.listen()

    def break_connects(self) -> None:
        self._proxy.mode = self._random.choice([Mode.RESET, Mode.CLOSE, Mode.SILENT])
        if self._random.random() < 0.5:
            self._proxy.drop()
        self._wait()
        self._proxy.mode = Mode.PASS
        self._proxy.drop()

    def go_silent(self) -> None:
        self._proxy.go_silent()
        self._wait()
        self._proxy.drop()

    def resize(self) -> None:
        self._pool.resize(self._random.randint(0, 3), 6)

    def drain(self) -> None:
        self._pool.drain()

    def check(self) -> None:
        self._pool.check()


class Calls:
    """The calls that make up the load."""

    def __init__(self, pool: Pool[Any]) -> None:
        self.pool = pool
        self.inserted: list[str] = []
        self._count = 0

    def __call__(self) -> None:
        self._count += 1
        if self._count % 100 == 0:
            self.forget()
        calls = [self.fetch, self.transact, self.insert, self.time_out, self.abort]
        try:
            calls[self._count % len(calls)]()
        except DatabaseUnavailable:
            time.sleep(0.001)
            raise

    def fetch(self) -> None:
        self.pool.fetch_value("select 1")

    def transact(self) -> None:
        with self.pool.connection() as conn:
            conn.execute("select 1")
            conn.execute("select 2")

    def insert(self) -> None:
        key = uuid.uuid4().hex
        self.pool.run(_insert, key, idempotent=True, timeout=60, attempts=100)
        self.inserted.append(key)

    def time_out(self) -> None:
        with suppress(PoolTimeout):
            self.pool.putconn(self.pool.getconn(timeout=0.001))

    def forget(self) -> None:
        conn = self.pool.getconn()
        conn.execute("select 1")
        del conn

    def abort(self) -> None:
        with pytest.raises(ZeroDivisionError), self.pool.connection() as conn:
            conn.execute("select 1")
            raise ZeroDivisionError


def _insert(conn: psycopg.Connection[Any], key: str) -> None:
    conn.execute("insert into t values (%s) on conflict do nothing", [key])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:<psycopg.Connection:ResourceWarning")
@pytest.mark.filterwarnings("ignore:.*Connection.__del__:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seed", range(10))
def test_numbers_stay_consistent_under_random_faults(
    own_server: Server, proxy: Proxy, make_pool: MakePool, seed: int
) -> None:
    pool = make_pool(proxy.conninfo, min_size=2, max_size=6, ping_after=0.05)
    pool.execute("create table t (id text primary key)")
    faults = Faults(own_server, proxy, pool, random.Random(seed))
    calls = Calls(pool)
    done = threading.Event()

    def check_sums() -> None:
        while not done.is_set():
            assert_adds_up(pool)
            time.sleep(0.001)

    watcher = Task(check_sums)
    load = Load(calls, threads=8)
    try:
        for _ in range(25):
            faults.cause_one()
            await_server(own_server)
            load.await_calls(20)
    finally:
        load.stop()
        done.set()
    watcher.result()
    unexpected = [e for e in load.errors if not isinstance(e, (psycopg.OperationalError,))]
    assert unexpected == []
    rows = {key for (key,) in own_server.execute("select id from t")}
    assert rows >= set(calls.inserted)
    until(lambda: not pool.breaker.is_open)
    assert_serves_all(pool)
