"""Records of connections, and their holders: who holds a connection, since when, from which line.

A record is what a pool remembers of one connection. It outlives the connection object, so that
the pool can report and replace a connection that its holder lost.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePath
from types import CodeType, FrameType
from typing import Any, Final

from dbpool._secrets import printable

_MAX_LOGGED = 5  # frames of the application's
_MAX_DEPTH = 100  # frames of a stack that are examined
_MAX_FILES = 4096  # file names that are remembered

# Whose code a source file is. Our own files, and scripts beside the interpreter, count as Python's:
# they say nothing about the holder.
_APPLICATION, _PACKAGE, _PYTHON = 0, 1, 2
_OWN = f"{Path(__file__).parent}{os.sep}"
_STANDARD = ("<frozen ", *(f"{Path(x).parent}{os.sep}" for x in (os.__file__, sys.executable) if x))

# Files known to be the application's: a checkout compares its caller's file only with these.
application_files: set[str] = set()


class Owner:
    """One step of a thread that has a connection in transit.

    Only the thread's frames refer to it: once it is collected, nobody will complete the step.
    """


NOBODY: Final[weakref.ref[Any]] = weakref.ref(Owner())  # refers to an owner that is gone


class ThreadInfo:
    """A thread that holds connections, and the endpoint it serves, set by a framework's adapter.

    It is not identified by its ident, which a later thread may get again.
    """

    __slots__ = ("__weakref__", "endpoint", "thread")

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.endpoint: str | None = None

    def name(self) -> str:
        """Return the thread's name, and whether it has ended."""
        return self.thread.name if self.thread.is_alive() else f"{self.thread.name} (ended)"


class _Current(threading.local):
    def __init__(self) -> None:
        self.thread = ThreadInfo()


current = _Current()  # `current.thread` is the `ThreadInfo` of the calling thread


@dataclass(slots=True, eq=False, repr=False)
class ConnectionRecord:
    """What a pool remembers of one connection; all times are monotonic seconds.

    `owner` is None while the connection is idle. Otherwise it refers to what has the connection: a
    `Lease`, a step of a caller or of a worker, or the connection itself if a user got it by
    `getconn`. `since` is 0 while nobody holds the connection: it is idle, or in transit.
    """

    fd: int
    standby: bytes | None  # whether the server was one when the connection was made
    readable: Callable[[float], object]  # whether `fd` is, within that many milliseconds
    session_state: tuple[object, ...]  # the attributes a user may change, as set up
    adapters: Any = None  # the connection's adapters as set up, to begin from again
    backend_pid: int | None = None
    reset_message: bytes = b""  # resets the session, if that is wanted
    has_stock_blocks: bool = False  # whether blocks begin and end by psycopg's own methods
    has_stock_class: bool = False  # the same, of the class that a tracer has wrapped
    has_stock_cursors: bool = False  # whether only psycopg's own code makes and runs cursors
    is_reaped: bool = False  # taken from its holder, whose return of it then does nothing
    is_reported: bool = False  # as held for too long
    read_write: bool = False  # whether the conninfo asked for a server that can write
    prefers_standby: bool = False
    ref: weakref.ref[Any] = NOBODY  # to the connection, until it is collected or forgotten
    owner: weakref.ref[Any] | None = None
    created_at: float = 0.0
    expires_at: float = 0.0
    idle_since: float = 0.0
    since: float = 0.0
    wait: float = 0.0  # seconds that its holder's checkout took
    thread: ThreadInfo | None = None
    endpoint: str | None = None  # which the thread served when it checked out
    code: CodeType | None = None
    lasti: int = 0  # with `code`: where the holder checked it out
    cursor: Any = None  # kept from one `fetch_*` to the next

    def expires_soon(self, now: float) -> bool:
        """Whether it expires within five seconds, and within the last quarter of its lifetime."""
        return now >= self.expires_at - min(5.0, (self.expires_at - self.created_at) / 4.0)

    @property
    def is_open(self) -> bool:
        """Whether `fd` is still the connection's; after a close the number may be used again."""
        return (conn := self.ref()) is not None and not conn.closed

    def where(self) -> str:
        """Return where the connection was checked out, as `app/views.py:41 list_orders`."""
        return where(self.code, self.lasti, self.code.co_filename) if self.code else "unknown"


@lru_cache(maxsize=1024)
def where(code: CodeType, lasti: int, filename: str = "") -> str:
    """Name a line of code, as `app/views.py:41 list_orders`.

    *filename* is that of *code*, for the cache: the codes of equal functions in two files are equal.
    """
    # A compiler such as Nuitka makes frames that are at no instruction: -1.
    position = next(islice(code.co_positions(), max(lasti, 0) // 2, None), (None,))
    return printable(f"{_shortened(code)}:{position[0] or code.co_firstlineno} {code.co_name}")


def _shortened(code: CodeType) -> str:
    return "/".join(PurePath(code.co_filename).parts[-2:])


def caller(frame: FrameType) -> FrameType:
    """Return the first frame from *frame* outwards that is the application's.

    If all code is installed, return the first frame of a package; if all is Python's, *frame*.
    """
    found, origin, outer = frame, _PYTHON, frame
    for _ in range(_MAX_DEPTH):
        if (whose := _origin(_file_of(outer))) < origin:
            found, origin = outer, whose
        if origin == _APPLICATION or outer.f_back is None:
            break
        outer = outer.f_back
    if found is frame and origin == _APPLICATION and not frame.f_code.co_filename.startswith("<"):
        if len(application_files) >= _MAX_FILES:
            application_files.clear()
        application_files.add(frame.f_code.co_filename)
    return found


def _file_of(frame: FrameType) -> str:
    """Return the file of a frame's code; for generated code, that of the module that it belongs to."""
    name, module = frame.f_code.co_filename, frame.f_globals
    is_file = not name.startswith("<") or module.get("__name__") == "__main__"
    return name if is_file else str(module.get("__file__", "<frozen "))


@lru_cache(maxsize=_MAX_FILES)
def _origin(filename: str) -> int:
    """Return whose code a source file is: the application's, a package's, or Python's."""
    # An application may be installed beside SQLAlchemy, whose frames say nothing about the holder.
    if filename.startswith(_OWN) or f"-packages{os.sep}sqlalchemy{os.sep}" in filename:
        return _PYTHON
    if not {"site-packages", "dist-packages"}.isdisjoint(PurePath(filename).parts):
        return _PACKAGE
    return _PYTHON if filename.startswith(_STANDARD) else _APPLICATION


def _frame_of(thread: threading.Thread) -> FrameType | None:
    return sys._current_frames().get(thread.ident or 0) if thread.is_alive() else None


def stack_of(thread: threading.Thread) -> str:
    """Return the stack of that thread, "" if it has ended."""
    return "".join(traceback.format_stack(frame)) if (frame := _frame_of(thread)) else ""


def frames_of(thread: threading.Thread) -> str:
    """Return the frames of the application in that thread's stack, on one line, innermost first."""
    if (frame := _frame_of(thread)) is None:
        return "no line: its thread has ended"
    stack = list(islice(traceback.walk_stack(frame), _MAX_DEPTH))
    own = [pair for pair in stack if _origin(_file_of(pair[0])) == _APPLICATION] or stack[:1]
    lines = (f"{_shortened(f.f_code)}:{n} in {f.f_code.co_name}" for f, n in own[:_MAX_LOGGED])
    return printable(", ".join(lines))
