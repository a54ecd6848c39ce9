"""What a pool tells its listeners: the events, and how they are delivered.

Listeners are called in a thread of their own, one per pool: none is ever in the way of a
checkout. No event is built when nobody listens.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from inspect import iscoroutinefunction, signature
from typing import TYPE_CHECKING, Any

from dbpool._threads import run_in_thread
from dbpool.errors import ConfigError

if TYPE_CHECKING:
    from dbpool.metrics import HolderSnapshot

logger = logging.getLogger("dbpool")

_UNTOLD = frozenset({"pool", "stack"})  # in an event's line of the log: told already, or too long


# Neither frozen nor with slots: the first doubles what an event costs, and both together are half
# of what importing this takes.
@dataclass
class Event:
    """Something happened in the pool of that name."""

    pool: str


class Opened(Event):
    """The pool opened."""


class Closed(Event):
    """The pool closed."""


@dataclass
class Connected(Event):
    """A connection was made, in that many seconds."""

    seconds: float


@dataclass
class ConnectFailed(Event):
    """An attempt to connect failed after that many seconds."""

    seconds: float
    error: str
    kind: str


@dataclass
class CheckedOut(Event):
    """A connection was handed out after a wait of that many seconds."""

    wait: float


@dataclass
class CheckedIn(Event):
    """A connection came back after it was used for that many seconds."""

    use: float


@dataclass
class Discarded(Event):
    """A connection was given up: dead, expired, broken, idle or collected."""

    reason: str


@dataclass
class WaitTimedOut(Event):
    """A caller got no connection in that many seconds."""

    seconds: float


class Rejected(Event):
    """A caller was refused: open breaker, too many waiters, or the pool closed as it waited."""


@dataclass
class HeldLong(Event):
    """A connection has been held for longer than `leak_after`; `stack` is its holder's now."""

    holder: HolderSnapshot
    stack: str


@dataclass
class ReturnedLate(Event):
    """A connection reported as `HeldLong` came back; `where` is where it was checked out."""

    seconds: float
    where: str


@dataclass
class Leaked(Event):
    """A connection was forgotten: collected while checked out, or taken back after a request."""

    holder: HolderSnapshot


@dataclass
class Retried(Event):
    """A transaction is run again after that many attempts and a pause of `delay` seconds."""

    attempt: int
    error: str
    delay: float


@dataclass
class CircuitOpened(Event):
    """The database is unavailable: nobody waits for it any more."""

    error: str
    kind: str


@dataclass
class CircuitClosed(Event):
    """The database is back, that many seconds after the first failure."""

    seconds: float


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def name_of(event: Event) -> str:
    """Return the event's name as a method has it: `checked_out` for `CheckedOut`."""
    return _snake_case(type(event).__name__)


class Listener:
    """A base for listeners: define the methods of the events you want to hear.

    A method is named after its event, `def checked_out(self, event): ...`. One that raises
    is logged and breaks nothing; one that hangs keeps the pool's later events waiting, and
    nothing else.
    """

    def __call__(self, event: Event) -> None:
        """Pass the event to the method named after it, if there is one."""
        method = getattr(self, name_of(event), None)
        if method is not None:
            method(event)


class LoggingListener(Listener):
    """Logs every event on logger `dbpool`, with its fields also in the extra key `dbpool`."""

    def __init__(self, level: int = logging.INFO) -> None:
        self._level = level

    def __call__(self, event: Event) -> None:
        """Log the event."""
        name, fields = name_of(event), asdict(event)
        told = [f"{key}={_short(value)}" for key, value in fields.items() if key not in _UNTOLD]
        text = " ".join([name, *told])
        extra = {"dbpool": {"event": name, **fields}}
        logger.log(self._level, "pool %r: %s", event.pool, text, extra=extra)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def validate_listeners(listeners: Iterable[Any]) -> tuple[Callable[[Any], object], ...]:
    """Return the listeners; raise `ConfigError` for one that would never hear an event."""
    try:
        found = tuple(listeners)
    except TypeError:
        raise ConfigError("listeners must be a list") from None
    for listener in found:
        if problem := _why_deaf(listener):
            name = getattr(listener, "__qualname__", f"of type {type(listener).__qualname__}")
            raise ConfigError(f"the listener {name} {problem}")
    return found


def _why_deaf(listener: Any) -> str | None:
    """Why a listener would never hear an event, None if it may."""
    cls = type(listener)
    if isinstance(listener, type):
        return f"is a class: pass an instance, {listener.__name__}()"
    if not isinstance(listener, Listener) or cls.__call__ is not Listener.__call__:
        return None if _takes_event(listener) else "cannot be called with an event"
    names = {_snake_case(event.__name__) for event in Event.__subclasses__()}
    for name in sorted(set(dir(cls)) - set(dir(Listener))):
        takes_event = _takes_event(getattr(cls, name, None) and getattr(listener, name))
        nearest = get_close_matches(_snake_case(name).removeprefix("on_"), names, 1, cutoff=0.8)
        if name in names and not takes_event:
            return f"has a method {name!r} that cannot be called with an event"
        # A helper may be called anything that looks like no event.
        if takes_event and nearest and name not in names and not name.startswith("_"):
            return f"has a method {name!r}: is that {nearest[0]!r}? Else begin its name with _"
    heard = any(hasattr(listener, name) for name in names)
    return None if heard else "has no method named after an event"


def _takes_event(function: Any) -> bool:
    """Whether *function* can be called with an event, and runs when it is."""
    try:
        signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # a builtin may have no signature
        return True
    return not iscoroutinefunction(function) and not iscoroutinefunction(type(function).__call__)


class Emitter:
    """Delivers the events of one pool to its listeners, in order, in a thread of its own.

    Telling costs the pool an entry in a queue: however slow a listener is, nobody waits for it.
    The thread begins with the first event and ends with the pool. At most 10,000 events are
    kept; what comes beyond them is dropped, and that is told once.
    """

    MAX_QUEUED = 10_000

    def __init__(self, listeners: Iterable[Callable[[Any], object]] = ()) -> None:
        self._listeners = validate_listeners(listeners)
        self.active = bool(self._listeners)
        self.reset()

    def reset(self) -> None:
        """Start from nothing, as in a new process."""
        self.call_lock = threading.RLock()  # held while listeners are called: a fork waits for it
        self._lock = threading.Lock()
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()  # None wakes the thread
        self._thread: threading.Thread | None = None
        self._ends = self._is_overrun = self._is_overrun_told = False
        self._complained: set[tuple[int, str]] = set()

    def emit(self, event: Event) -> None:
        """Have every listener told."""
        if self._events.qsize() < self.MAX_QUEUED:
            self._events.put(event)
        else:
            self._is_overrun = True
        if self._thread is None:
            self._start()

    def close(self, timeout: float = 0.0) -> None:
        """End the thread once all is told; wait for that for *timeout* seconds."""
        self._ends, thread = True, self._thread
        self._events.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="dbpool-listeners", daemon=True)
        with suppress(RuntimeError):  # out of threads, or the interpreter is ending
            run_in_thread(thread.start)

    def _run(self) -> None:
        me, call_lock = threading.current_thread(), self.call_lock
        with self._lock:
            if self._thread is not None:  # another was quicker
                return
            self._thread = me
        # A listener may fork: its child has this thread, but it is nobody's there.
        while self._thread is me:
            try:
                event = self._events.get(block=not self._ends)
            except queue.Empty:
                self._thread = None
                if not self._events.empty():  # it came just now, and found a thread
                    self._start()
                return
            with call_lock:
                if event is not None:
                    self._tell(event)

    def _tell(self, event: Event) -> None:
        if self._is_overrun and not self._is_overrun_told:
            self._is_overrun_told = True
            logger.error("pool %r: its listeners are too slow, events are dropped", event.pool)
        for listener in self._listeners:
            try:
                listener(event)
            except BaseException as ex:  # noqa: BLE001  # the others are to hear of it all the same
                self._complain(listener, event, ex)

    def _complain(self, listener: object, event: Event, ex: BaseException) -> None:
        """Log that a listener failed, once for each kind of event."""
        key = (id(listener), type(event).__name__)
        if key not in self._complained:
            self._complained.add(key)
            logger.error("a listener failed on %s: %r", name_of(event), listener, exc_info=ex)
