"""How a caller's thread has something done that no exception may come between.

A signal handler may raise between any two steps of the main thread. A lock that is entered by
`with lock:` itself is safe from that; Python's Event, Condition and Queue are not.
"""

from __future__ import annotations

import _thread
import queue
from collections.abc import Callable


def in_a_thread(fn: Callable[[], object]) -> None:
    """Call *fn* in a thread of its own, wait until it is done, and raise what it raises.

    So are threads started: `Thread.start` waits on an Event, and interrupted in there it may
    leave the new thread waiting for a lock.
    """
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def call() -> None:
        try:
            fn()
        except BaseException as ex:  # noqa: BLE001  # the caller raises it
            done.put(ex)
        else:
            done.put(None)

    _thread.start_new_thread(call, ())
    try:
        error = done.get()
    except BaseException:
        done.get()  # nobody goes on beside what is half done
        raise
    if error is not None:
        raise error
