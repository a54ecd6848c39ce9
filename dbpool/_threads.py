"""How a caller's thread has something done that no exception may come between.

A signal handler may raise between any two steps of the main thread. A lock that is entered by
`with lock:` itself is safe from that; Python's Event, Condition and Queue are not.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from typing import Final

_START_SECONDS: Final = 1.0  # a thread that was started runs by then


def run_in_thread(fn: Callable[[], object]) -> None:
    """Call *fn* in a thread of its own, wait until it is done, and raise what it raises.

    So are threads started: `Thread.start` waits on an Event, and interrupted in there it may
    leave the new thread waiting for a lock.
    """
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
    except RuntimeError:  # there is no thread to be had
        raise
    except BaseException:
        # The call may have been interrupted before or after it started the thread. Once that
        # runs, nobody goes on beside what is half done.
        if starting.acquire(timeout=_START_SECONDS):
            with running:
                raise
        raise
    if errors:
        raise errors[0]
