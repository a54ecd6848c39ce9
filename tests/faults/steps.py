"""The steps that tests of faults share: threads, backends, and what must hold after each fault."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg

from dbpool import Pool
from tests.postgres import Server, until

# What a slow machine may add to a bound that the contract promises.
SLACK = 1.0
# Where an outage is to be told soon; elsewhere a machine that stalls is not to look like one.
GRACE = 0.3


class Task:
    """A call in a thread of its own."""

    def __init__(self, fn: Callable[..., Any], *args: Any) -> None:
        self._fn, self._args = fn, args
        self._value: Any = None
        self._error: BaseException | None = None
        self.began = time.monotonic()
        self.ended = 0.0
        self._thread = threading.Thread(target=self._run, name="task")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._fn(*self._args)
        except BaseException as ex:  # noqa: BLE001  # whatever it is, the test looks at it
            self._error = ex
        self.ended = time.monotonic()

    def _join(self, seconds: float) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "a thread is stuck"

    def result(self, seconds: float = 30.0) -> Any:
        """What it returned, or raise what it raised."""
        self._join(seconds)
        if self._error is not None:
            raise self._error
        return self._value

    def error(self, seconds: float = 30.0) -> BaseException:
        """What it raised."""
        self._join(seconds)
        assert self._error is not None, f"it returned {self._value!r}"
        return self._error

    @property
    def seconds(self) -> float:
        """How long it took."""
        self._join(30.0)
        return self.ended - self.began


class Load:
    """Threads that call *fn* over and over until stopped."""

    def __init__(self, fn: Callable[[], Any], threads: int = 6) -> None:
        self.calls = 0
        self.errors: list[BaseException] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._fn = fn
        self._tasks = [Task(self._work) for _ in range(threads)]

    def _work(self) -> None:
        while not self._stop.wait(0.001):  # without a pause some kernels starve all others
            try:
                self._fn()
            except Exception as ex:  # noqa: BLE001  # the test judges it
                _forget_frames(ex)
                with self._lock:
                    self.errors.append(ex)
            with self._lock:
                self.calls += 1

    def await_calls(self, more: int = 50) -> None:
        """Wait until that many more were made."""
        wanted = self.calls + more
        until(lambda: self.calls >= wanted, 30.0)

    def stop(self) -> None:
        """Let every thread end its call."""
        self._stop.set()
        for task in self._tasks:
            task.result()


def _forget_frames(ex: BaseException | None) -> None:
    """Let go of what the frames of a traceback hold: connections, perhaps."""
    while ex is not None:
        ex.__traceback__ = None
        ex = ex.__cause__ or ex.__context__


def fill(pool: Pool) -> list[int]:
    """Have all min_size connections made; return their backends."""
    pool.wait(timeout=20)
    until(lambda: pool.stats().connecting == 0)
    with pool._lock:
        return [conn.info.backend_pid for conn in pool._pool]


def await_up(pool: Pool, seconds: float = 1.0 + SLACK) -> None:
    """The pool finds out by itself that the server is back, within the second it promises.

    From then on a machine that stalls is not to look like another outage.
    """
    until(lambda: pool.state == "up", seconds)
    pool.breaker.grace = pool.breaker.patience = 30.0


def assert_adds_up(pool: Pool) -> None:
    """Every connection is somewhere, and only once."""
    with pool._lock:
        stats = pool.stats()
        assert stats.active + stats.idle + stats.connecting == stats.size
        assert min(stats.active, stats.idle, stats.connecting) >= 0
        assert len(pool._slots) + stats.connecting == stats.size
        idle = {conn._slot for conn in pool._pool}
        assert len(idle) == stats.idle
        assert idle <= pool._slots
        assert not any(slot.since for slot in idle)


def assert_whole(pool: Pool) -> None:
    """Nothing is out, nobody waits, and no slot was lost."""
    if pool.closed:
        return
    until(lambda: pool.stats().active == 0 and pool.stats().waiting == 0, 20.0)
    assert not any(slot.since for slot in pool._slots)
    assert_adds_up(pool)


def assert_serves_all(pool: Pool, seconds: float = 20.0) -> None:
    """The pool lends max_size connections at the same time, each of them good."""
    assert_whole(pool)
    deadline = time.monotonic() + seconds
    conns: list[Any] = []
    try:
        while len(conns) < pool.max_size:
            conns.append(pool.getconn(timeout=deadline - time.monotonic()))
        pids = {conn.execute("select pg_backend_pid()").fetchone()[0] for conn in conns}
        assert len(pids) == pool.max_size
        assert_adds_up(pool)
    finally:
        for conn in conns:
            pool.putconn(conn)
    assert_whole(pool)


def terminate(server: Server, pids: list[int]) -> None:
    """pg_terminate_backend, and wait until they have gone."""
    for pid in pids:
        server.execute("select pg_terminate_backend(%s)", pid)
    await_gone(server, pids)


def await_gone(server: Server, pids: list[int]) -> None:
    """Wait until none of these is a backend any longer."""

    def gone() -> bool:
        with suppress(psycopg.OperationalError):  # where one was killed, it is starting over
            return not set(pids) & set(server.backends())
        return False

    until(gone, 20.0)


def await_farewells(pool: Pool) -> None:
    """Wait until the servers of all its connections have said something, through a proxy too."""
    fds = [slot.fd for slot in list(pool._slots)]
    until(lambda: len(select.select(fds, [], [], 0)[0]) == len(fds))


def await_server(server: Server) -> None:
    """Wait until a server that mends itself accepts connections again."""

    def accepts() -> bool:
        with suppress(psycopg.OperationalError):
            server.execute("select 1")
            return True
        return False

    until(accepts, 30.0, pause=0.05)
