"""What the pools of one process share: its watchdog, the lock of its log, and surviving a fork."""

from __future__ import annotations

import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

from dbpool._threads import run_in_thread
from dbpool.holders import ConnectionRecord

logger = logging.getLogger("dbpool")

_FORK_TIMEOUT = 1.0  # seconds that a fork waits for our threads to finish a line of the log

# Of this process, open or not; by id, since a list of what a WeakSet holds is not made at once.
pools: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
on_new_pool: list[Callable[[Any], None]] = []  # called with each new pool, set by a server's hooks


def list_pools(known: weakref.WeakValueDictionary[int, Any] = pools) -> list[Any]:
    """Return these pools, by default all of this process; others may come and go meanwhile."""
    return [pool for each in known.valuerefs() if (pool := each()) is not None]


class _ProcessState:
    """What a forked child must not inherit: it gets one of its own.

    Above all the watchdog, the one daemon thread that maintains all the open pools of a process; it
    ends with the last.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        # Held by our own threads while they log. A fork waits for it, and for listeners to return:
        # the buffer of standard error has a lock that nobody would ever release in the child.
        self.log_lock = threading.RLock()
        # A signal handler, or a garbage collection inside, may open or close a pool.
        self._lock = threading.RLock()
        self._pools: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def watch(self, pool: Any) -> None:
        """Have *pool* maintained from now on, until it is collected or `unwatch`ed."""
        with self._lock:
            self._pools[id(pool)] = pool
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="dbpool-watchdog", daemon=True)
            run_in_thread(thread.start)
        self._wakes.put(None)

    def unwatch(self, pool: Any) -> None:
        """Maintain *pool* no more."""
        with self._lock:
            self._pools.pop(id(pool), None)
        self._wakes.put(None)

    def _run(self) -> None:
        me = threading.current_thread()
        with self._lock:
            if self._thread is not None:  # another was quicker
                return
            self._thread = me
        while self._thread is me and (pause := self._maintain_all()):
            with suppress(queue.Empty):
                self._wakes.get(timeout=pause)

    def _maintain_all(self) -> float:
        """Maintain every pool; return the seconds until the next time, 0 to end the thread."""
        with self._lock:
            open_pools = list_pools(self._pools)
            if not open_pools:
                self._thread = None
                return 0.0
        now = monotonic()
        for pool in open_pools:
            try:
                pool.maintain(now)
            except BaseException:  # SystemExit of a log handler, say
                logger.exception("maintaining %r failed", pool)
        return float(min(pool.maintenance_interval for pool in open_pools))


process = _ProcessState()


def register(pool: Any) -> None:
    """Remember a pool that is new."""
    pools[id(pool)] = pool
    for callback in on_new_pool:
        callback(pool)


def close_all(timeout: float = 2.0) -> None:
    """Close every open pool of this process, within *timeout* seconds altogether."""
    deadline = monotonic() + timeout
    for pool in list_pools():
        pool.close(timeout=max(0.0, deadline - monotonic()))


def detach_inherited_sockets(records: list[ConnectionRecord]) -> None:
    """Replace the sockets of inherited connections by a directory, which cannot be written to.

    Whatever this process does with them, close them included, the sessions stay the parent's.
    """
    fds = [record.fd for record in records if record.fd >= 0 and record.is_open]
    for record in records:
        record.fd, record.is_reported = -1, True  # keeps it off the hot path if it is returned
    if not fds:
        return
    try:
        root = os.open("/", os.O_RDONLY | os.O_CLOEXEC)  # /dev/null may be missing in a chroot
    except OSError:  # the process has no descriptor left: one of the inherited makes room
        os.close(fds[0])
        root = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
    for fd in fds:
        if fd != root:
            os.dup2(root, fd, inheritable=False)
    if root not in fds:
        os.close(root)


def _before_fork() -> None:
    deadline = monotonic() + _FORK_TIMEOUT
    locks = [process.log_lock, *(pool.listeners.call_lock for pool in list_pools())]
    _forking.held = [x for x in locks if x.acquire(timeout=max(0.0, deadline - monotonic()))]


def _after_fork_in_parent() -> None:
    for lock in _forking.held:
        lock.release()


def _after_fork_in_child() -> None:
    global process  # noqa: PLW0603  # its locks and its thread are the parent's
    for pool in list_pools():
        pool.after_fork()
    process = _ProcessState()  # last: other threads wait for it in `notice_fork`


def notice_fork() -> None:
    """Do what the hooks below would have done, in a server that forks without calling them."""
    with _noticing.setdefault(os.getpid(), threading.RLock()):  # one thread does it for all
        if process.pid != os.getpid():
            _after_fork_in_child()


_noticing: dict[int, Any] = {}  # by pid
_forking = threading.local()  # `held`: the locks that a forking thread holds meanwhile

os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)
