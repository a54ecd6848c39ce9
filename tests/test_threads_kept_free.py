"""Threads kept free for views without a database: the gain under a lock, and the cost.

If `max_size` and `max_waiting` together are fewer than gunicorn's threads, later callers are
rejected at once, and the remaining threads can answer.
"""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest

from .gunicorn_site import Site
from .threads import Task

THREADS = 8
CONF = f"workers, threads, worker_class = 1, {THREADS}, 'gthread'\n"
BOUND = {"DBPOOL_MAX_SIZE": "4", "DBPOOL_MAX_WAITING": "2"}
CLIENTS = 20


def status_of(site: Site, path: str, timeout: float) -> int:
    """The status of the answer, 0 if there was none in time."""
    try:
        url = f"http://127.0.0.1:{site.port}{path}"
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@contextmanager
def clients(site: Site, path: str) -> Iterator[Counter[int]]:
    """Request *path* repeatedly, and count the answers by their status."""
    counts: Counter[int] = Counter()
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            status = status_of(site, path, 20.0)
            counts[status] += 1
            done.wait(0.1 if status == 503 else 0.0)  # a rejected client waits a little

    tasks = [Task(ask) for _ in range(CLIENTS)]
    try:
        yield counts
    finally:
        done.set()
        for task in tasks:
            task.result(30)


def liveness(site: Site, seconds: float) -> list[float]:
    """The duration of each answer of the liveness view, 1 s if there was none in that time."""
    taken, began = [], time.monotonic()
    while time.monotonic() < began + seconds:
        started = time.monotonic()
        is_live = status_of(site, "/db/health/live", 1.0) == 200
        taken.append(time.monotonic() - started if is_live else 1.0)
        time.sleep(0.2)
    return taken


@pytest.mark.slow
@pytest.mark.parametrize("is_bound", [True, False], ids=["bound", "not bound"])
def test_under_a_lock_liveness_answers_only_if_threads_are_kept_free(
    make_site: Callable[..., Site], dsn: str, is_bound: bool
) -> None:
    more = BOUND if is_bound else {"DBPOOL_MAX_SIZE": "4"}
    site = make_site(more=CONF, DBPOOL_STATEMENT_TIMEOUT="0", **more)
    with psycopg.connect(dsn, autocommit=True) as lock:
        lock.execute("select pg_advisory_lock(1)")
        with clients(site, "/lock"):
            time.sleep(1.0)  # until all clients are waiting
            taken = liveness(site, 8.0)
            lock.execute("select pg_advisory_unlock_all()")
    if is_bound:
        assert max(taken) < 1.0
    else:
        assert max(taken) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("is_bound", [True, False], ids=["bound", "not bound"])
def test_without_a_lock_keeping_threads_free_rejects_more_callers(
    make_site: Callable[..., Site], is_bound: bool
) -> None:
    site = make_site(more=CONF, **(BOUND if is_bound else {"DBPOOL_MAX_SIZE": "4"}))
    with clients(site, "/many") as counts:
        time.sleep(5.0)
    assert counts[200]
    assert bool(counts[503]) is is_bound
