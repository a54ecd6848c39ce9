"""Models of concurrent use of a pool, explored by frontrun: `python -m tests.models NAME`.

They run in a process of their own, as frontrun replaces locks and queues. There is no server, and
no thread but the model's: connections are fake, and one thread plays the pool's worker.
"""

from __future__ import annotations

import argparse
import logging
import queue
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import frontrun
from psycopg_pool import PoolClosed

from dbpool import Pool, PoolError
from tests.fake import FakeConnection


class State:
    """A pool with all its connections made, and what the threads saw."""

    def __init__(self, size: int, *, made: bool = True, is_locked: bool = True) -> None:
        self.tasks: queue.Queue[Any] = queue.Queue()
        self.held: set[int] = set()  # by id: each may be held only once
        self.violations: list[str] = []
        self.outcomes: list[str] = []
        self.pool: Any = Pool(
            connection_class=FakeConnection, kwargs={"host": "nowhere"}, min_size=0, max_size=size
        )
        vars(self.pool._store)["jobs"] = self.tasks
        seams = {"start": lambda pool: None, "run_later": lambda job, delay: None}
        vars(self.pool._threads).update(seams)
        self.pool._open()
        if made:
            self.pool.resize(size, size)
            self.tasks.put(None)
            self.work()
        if not is_locked:  # shows that a model finds the races without a lock
            vars(self.pool._store)["lock"] = nullcontext()

    def work(self) -> None:
        """Do a worker's tasks until stopped."""
        while (job := self.tasks.get()) is not None:
            job(self.pool)

    def acquire(self, timeout: float | None = None) -> Any:
        conn = self.pool.getconn(timeout)
        if id(conn) in self.held:
            self.violations.append("two have the same connection")
        if conn.closed:
            self.violations.append("a closed connection was handed out")
        self.held.add(id(conn))
        return conn

    def release(self, conn: Any) -> None:
        self.held.discard(id(conn))
        self.pool.putconn(conn)

    def use(self) -> None:
        self.release(self.acquire())
        self.outcomes.append("served")

    def is_settled(self, idle: int) -> bool:
        stats = self.pool.stats()
        sizes = (stats.active, stats.idle, stats.connecting, stats.waiting)
        return not self.violations and sizes == (0, idle, 0, 0)


Threads = list[Callable[[State], object]]
Model = tuple[Callable[[bool], State], Threads, Callable[[State], bool]]


def checkout() -> Model:
    """Three threads use two connections."""
    return (
        lambda is_locked: State(2, is_locked=is_locked),
        [State.use] * 3,
        lambda state: len(state.outcomes) == 3 and state.is_settled(2),
    )


def hand_over() -> Model:
    """Two threads use one connection twice each: one of them waits for the other."""

    def use(state: State) -> None:
        state.use()
        state.use()

    return (
        lambda is_locked: State(1, is_locked=is_locked),
        [use, use],
        lambda state: len(state.outcomes) == 4 and state.is_settled(1),
    )


def time_out() -> Model:
    """One thread times out while another returns the connection."""

    def time_out_or_release(state: State) -> None:
        try:
            conn = state.acquire(timeout=0.0)
        except PoolError:
            state.outcomes.append("refused")
        else:
            state.release(conn)

    return (
        lambda is_locked: State(1, is_locked=is_locked),
        [State.use, time_out_or_release],
        lambda state: state.is_settled(1),
    )


def close() -> Model:
    """The pool is closed while two threads use it."""

    def use(state: State) -> None:
        try:
            state.use()
        except PoolClosed:
            state.outcomes.append("refused")

    def is_closed(state: State) -> bool:
        pool = state.pool
        nothing = (
            not pool._store.bag.idle and not pool._store.bag.to_close and not pool._store.waiting
        )
        return nothing and not state.violations and len(state.outcomes) == 2

    return (
        lambda is_locked: State(1, is_locked=is_locked),
        [use, use, lambda state: state.pool.close(0.0)],
        is_closed,
    )


def growth() -> Model:
    """Three threads want the only connection, which is not made yet."""

    def ask(state: State) -> None:
        try:
            state.acquire(timeout=0.0)
        except PoolError:
            state.outcomes.append("refused")

    def has_grown_once(state: State) -> bool:
        connecting = state.pool.stats().connecting
        state.tasks.put(None)
        state.work()
        return len(state.outcomes) == 3 and connecting == 1 and state.is_settled(1)

    return lambda is_locked: State(1, made=False, is_locked=is_locked), [ask] * 3, has_grown_once


MODELS = {model.__name__: model for model in (checkout, hand_over, time_out, close, growth)}


def explore(name: str, schedules: int, *, is_locked: bool = True, seed: int = 1) -> Any:
    """Run the model in up to that many schedules, until one fails."""
    make, threads, invariant = MODELS[name]()
    return frontrun.explore(
        setup=lambda: make(is_locked),
        workers=threads,
        invariant=invariant,
        strategy="random",
        max_attempts=schedules,
        max_ops=150_000,  # more than a schedule needs: one in which all wait in turn is long
        timeout_per_run=60.0,
        seed=seed,
        detect_io=False,
        reproduce_on_failure=0,
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("schedules", type=int)
    parser.add_argument("--unlocked", action="store_true")
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)
    result = explore(chosen.name, chosen.schedules, is_locked=not chosen.unlocked)
    if not result.property_holds:
        print(result.explanation)  # noqa: T201  # this is a command
    return 0 if result.property_holds else 1


if __name__ == "__main__":
    sys.exit(main())
