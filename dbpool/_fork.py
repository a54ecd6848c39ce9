"""What pools of one process share: surviving a fork, and being closed at its end."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any

from dbpool.holders import Slot

pools: weakref.WeakSet[Any] = weakref.WeakSet()  # of this process, open or not
adapters: list[Callable[[Any], None]] = []  # what the server's hooks do to each new pool

_held = threading.local()  # `locks`: what a thread that forks holds meanwhile, see `telling`

# Held by our own threads while they log. A fork waits for it, and for listeners to return: the
# buffer of standard error has a lock that nobody would ever release in the child.
telling = threading.RLock()
_PATIENCE = 1.0  # seconds


def add(pool: Any) -> None:
    """Remember a pool that is new."""
    pools.add(pool)
    for adapt in adapters:
        adapt(pool)


def close_all(timeout: float = 2.0) -> None:
    """Close every open pool of this process, within *timeout* seconds altogether."""
    deadline = monotonic() + timeout
    for pool in list(pools):
        pool.close(timeout=max(0.0, deadline - monotonic()))


def silence(slots: list[Slot]) -> None:
    """Replace the sockets of inherited connections by /dev/null.

    Whatever this process does with them, close them included, the sessions stay the parent's.
    """
    fds = [slot.fd for slot in slots if slot.fd >= 0 and slot.is_open]
    for slot in slots:
        slot.fd, slot.reported = -1, True  # keeps it off the hot path should it be returned
    if not fds:
        return
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # the process has no descriptor left: one of theirs makes room
        os.close(fds[0])
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in fds:
        if fd != null:
            os.dup2(null, fd, inheritable=False)
    if null not in fds:
        os.close(null)


def _before_fork() -> None:
    deadline = monotonic() + _PATIENCE
    ours = list(pools)
    locks = [telling, *(pool.listeners.call_lock for pool in ours)]
    _held.locks = [x for x in locks if x.acquire(timeout=max(0.0, deadline - monotonic()))]


def _after_fork_in_parent() -> None:
    for lock in _held.locks:
        lock.release()


def _after_fork_in_child() -> None:
    global telling  # noqa: PLW0603  # its owner may not exist here
    telling = threading.RLock()
    for pool in list(pools):
        pool.after_fork()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
atexit.register(close_all, 1.0)
