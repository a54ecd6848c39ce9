"""Who holds a connection, since when and from where: slots, their reports, the watchdog.

A slot is what a pool remembers of one connection. It outlives the connection object, so that
a connection which its holder lost can be told and replaced.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePath
from time import monotonic
from types import CodeType, FrameType
from typing import Any, Protocol

from dbpool._secrets import printable
from dbpool._threads import run_in_thread
from dbpool.metrics import HolderSnapshot as Holder

__all__ = [
    "Holder", "Owner", "Slot", "Who", "application_files", "caller", "frames_of", "grouped", "here",
    "report",
    "stack_of", "unwatch", "watch",
]  # fmt: skip

logger = logging.getLogger("dbpool")

_LISTED = 20  # holders in one report
_FRAMES = 5  # of the application's, in a line of the log
_DEEPEST = 100  # frames that are looked at
_FILES = 4096  # file names that are remembered

# Whose code a source file is. What runs in our own files, or as a script beside the interpreter,
# says as little about the holder as what runs in Python's.
_APPLICATION, _PACKAGE, _PYTHON = 0, 1, 2
_OWN = f"{Path(__file__).parent}{os.sep}"
_STANDARD = ("<frozen ", *(f"{Path(x).parent}{os.sep}" for x in (os.__file__, sys.executable)))

# Code in these files is the application's: a checkout compares its caller's with them alone.
application_files: set[str] = set()


class Owner:
    """Who answers for a connection on its way: it is lost once this is gone."""


class Who:
    """A thread as a holder, and what it serves: kept up by the web framework's adapter.

    Not by its ident: the next thread may be given the same.
    """

    __slots__ = ("endpoint", "thread")

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.endpoint: str | None = None

    def named(self) -> str:
        """Return the thread's name; an ended one can be asked no more."""
        return self.thread.name if self.thread.is_alive() else f"{self.thread.name} (ended)"


class _Here(threading.local):
    def __init__(self) -> None:
        self.who = Who()


here = _Here()  # `here.who` is the calling thread


@dataclass(slots=True, eq=False, repr=False)
class Slot:
    """What a pool remembers of one connection; all times are monotonic.

    `owner` is None while it is idle. Else it refers to who answers for it: a `Lease`, the step
    of a caller or of a worker, or the connection itself, which a user got by `getconn`. `since`
    is 0 while nobody holds it: idle, or on its way.
    """

    fd: int
    standby: bytes | None
    readable: Callable[[float], object]
    manners: tuple[object, ...]  # the attributes a user may change, as they were at first
    adapters: Any = None  # the connection's adapters as they were at first
    reset_message: bytes = b""  # what resets the session, if that is wanted
    has_stock_blocks: bool = False  # whether blocks begin and end by psycopg's own methods
    has_stock_class: bool = False  # the same of the class that a tracer's wrapper stands for
    has_stock_cursors: bool = False  # whether nobody else sees a cursor made or run
    ref: weakref.ref[Any] | None = None
    owner: weakref.ref[Any] | None = None
    is_reaped: bool = False  # taken from its holder, whose return of it then does nothing
    read_write: bool = False  # whether the conninfo asked for a server that can write
    prefers_standby: bool = False
    expires_at: float = 0.0
    idle_since: float = 0.0
    since: float = 0.0
    wait: float = 0.0
    who: Who | None = None
    code: CodeType | None = None
    lasti: int = 0
    cursor: Any = None  # kept from one `fetch_*` to the next
    reported: bool = False

    def watch(self, conn: Any, lost: Callable[[weakref.ref[Any]], None]) -> None:
        """Have *lost* called when *conn* is collected; made in C, it cannot be interrupted."""
        self.ref = self.owner = weakref.ref(conn, lost)

    @property
    def is_open(self) -> bool:
        """Whether `fd` is still the connection's: closed, it may be anything's."""
        conn = None if self.ref is None else self.ref()
        return conn is not None and not conn.closed

    def where(self) -> str:
        """Where the holder asked for it, as `app/views.py:41 list_orders`."""
        return "unknown" if self.code is None else _where(self.code, self.lasti)


@lru_cache(maxsize=1024)
def _where(code: CodeType, lasti: int) -> str:
    position = next(islice(code.co_positions(), lasti // 2, None), (None,))
    where = f"{_shortened(code)}:{position[0] or code.co_firstlineno} {code.co_name}"
    return printable(where)


def _shortened(code: CodeType) -> str:
    return "/".join(PurePath(code.co_filename).parts[-2:])


def report(slots: Iterable[Slot], now: float) -> tuple[Holder, ...]:
    """Describe who holds *slots*, longest first, at most 20."""
    held = sorted((slot for slot in slots if slot.since), key=lambda slot: slot.since)[:_LISTED]
    return tuple(
        Holder(
            thread=printable(slot.who.named()),
            seconds=now - slot.since,
            where=slot.where(),
            endpoint=slot.who.endpoint and printable(slot.who.endpoint),
        )
        for slot in held
        if slot.who is not None
    )


def grouped(held: Iterable[Holder]) -> str:
    """Return on one line who holds connections, those of one place together; five at most."""
    places: dict[str, list[Holder]] = {}
    for holder in held:
        places.setdefault(holder.where, []).append(holder)
    return "; ".join(
        f"{first.thread}{f' and {len(others)} more' if others else ''} {first.seconds:.1f} s at {where}"
        for where, (first, *others) in list(places.items())[:5]
    )


def caller(frame: FrameType) -> FrameType:
    """Return the first frame from *frame* outwards that is the application's.

    Where all code is installed, the first of a package; where all is Python's, *frame* itself.
    """
    found, origin, outer = frame, _PYTHON, frame
    for _ in range(_DEEPEST):
        here = _origin(_file_of(outer))
        if here < origin:
            found, origin = outer, here
        if origin == _APPLICATION or outer.f_back is None:
            break
        outer = outer.f_back
    if found is frame and origin == _APPLICATION and not frame.f_code.co_filename.startswith("<"):
        if len(application_files) >= _FILES:
            application_files.clear()
        application_files.add(frame.f_code.co_filename)
    return found


def _file_of(frame: FrameType) -> str:
    """Where the code of a frame is from; generated code is of the module whose names it uses."""
    name, module = frame.f_code.co_filename, frame.f_globals
    if not name.startswith("<") or module.get("__name__") == "__main__":
        return name
    return str(module.get("__file__", "<frozen "))


@lru_cache(maxsize=_FILES)
def _origin(filename: str) -> int:
    """Whose code a source file is: the application's, an installed package's, or Python's."""
    # SQLAlchemy says as little of who asked, where the application is installed beside it.
    if filename.startswith(_OWN) or f"-packages{os.sep}sqlalchemy{os.sep}" in filename:
        return _PYTHON
    if not {"site-packages", "dist-packages"}.isdisjoint(PurePath(filename).parts):
        return _PACKAGE
    return _PYTHON if filename.startswith(_STANDARD) else _APPLICATION


def _frame_of(thread: threading.Thread) -> FrameType | None:
    return sys._current_frames().get(thread.ident or 0) if thread.is_alive() else None


def stack_of(thread: threading.Thread) -> str:
    """Return where that thread is now, "" if it has ended."""
    frame = _frame_of(thread)
    return "" if frame is None else "".join(traceback.format_stack(frame))


def frames_of(thread: threading.Thread) -> str:
    """Return on one line which frames of the application that thread runs, innermost first."""
    frame = _frame_of(thread)
    if frame is None:
        return "(its thread has ended)"
    stack = list(islice(traceback.walk_stack(frame), _DEEPEST))
    own = [pair for pair in stack if _origin(_file_of(pair[0])) == _APPLICATION] or stack[:1]
    lines = (f"{_shortened(f.f_code)}:{n} in {f.f_code.co_name}" for f, n in own[:_FRAMES])
    return printable(", ".join(lines))


class Watched(Protocol):
    """What the watchdog asks of a pool."""

    def patrol(self, now: float) -> None:
        """Report leaks, replace what was lost."""

    @property
    def patrol_every(self) -> float:
        """Seconds between two patrols."""


class _Watchdog:
    """One daemon thread for all the pools of a process; it ends with the last of them."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pools: weakref.WeakSet[Any] = weakref.WeakSet()
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def watch(self, pool: Watched) -> None:
        with self._lock:
            self._pools.add(pool)
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="dbpool-watchdog", daemon=True)
            run_in_thread(thread.start)
        self._wakes.put(None)

    def unwatch(self, pool: object) -> None:
        with self._lock:
            self._pools.discard(pool)
        self._wakes.put(None)

    def _run(self) -> None:
        me = threading.current_thread()
        with self._lock:
            if self._thread is not None:  # another was quicker
                return
            self._thread = me
        while self._thread is me and (pause := self._patrol()):
            with contextlib.suppress(queue.Empty):
                self._wakes.get(timeout=pause)

    def _patrol(self) -> float:
        """Patrol every pool; return the seconds until the next time, 0 to end the thread."""
        with self._lock:
            pools: list[Watched] = list(self._pools)
            if not pools:
                self._thread = None
                return 0.0
        now = monotonic()
        for pool in pools:
            try:
                pool.patrol(now)
            except Exception:
                logger.exception("patrolling %r failed", pool)
        return min(pool.patrol_every for pool in pools)


_watchdog = _Watchdog()


def watch(pool: Watched) -> None:
    """Have *pool* patrolled from now on, until it is collected or `unwatch`ed."""
    global _watchdog  # noqa: PLW0603  # a fork leaves a new process with a dead one
    if _watchdog._pid != os.getpid():  # its thread and its lock stayed in the parent
        _watchdog = _Watchdog()
    _watchdog.watch(pool)


def unwatch(pool: object) -> None:
    """Patrol *pool* no more."""
    if _watchdog._pid == os.getpid():
        _watchdog.unwatch(pool)
