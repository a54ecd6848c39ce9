"""Runs a call in a thread of its own, so that no exception can interrupt it; bounds of a wait.

A signal handler may raise between any two steps of the main thread. A plain `with lock:` is safe
from that; Python's Event, Condition and Queue are not.
"""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Callable
from typing import Final

_START_TIMEOUT: Final = 1.0  # seconds in which a thread that was started runs


def clamp_timeout(seconds: float) -> float:
    """Return a timeout that a lock takes: -1 would never end, and a very large one overflows."""
    return min(max(seconds, 0.0), threading.TIMEOUT_MAX)


def run_in_thread(fn: Callable[[], object]) -> None:
    """Call *fn* in a thread of its own, wait until it is done, and raise what it raises.

    Threads are started this way: `Thread.start` waits on an Event, and if that is interrupted, the
    new thread may wait for a lock without end.
    """
    if sys.is_finalizing():  # the thread would never run; from 3.12 on Python itself says so
        raise RuntimeError("can't create new thread at interpreter shutdown")
    errors: list[BaseException] = []
    starting, running = threading.Lock(), threading.Lock()
    starting.acquire()
    running.acquire()

    def call() -> None:
        starting.release()
        try:
            fn()
        except BaseException as ex:  # noqa: BLE001  # the caller raises it
            errors.append(ex)
        finally:
            running.release()

    try:
        _thread.start_new_thread(call, ())
        with running:
            pass
    except BaseException as ex:
        # The system has no thread left, or a signal handler raised before or after the thread was
        # started. If the thread runs, wait for it: the caller must not go on while it is working.
        if not isinstance(ex, RuntimeError) and starting.acquire(timeout=_START_TIMEOUT):
            with running:
                raise
        raise
    if errors:
        raise errors[0]
