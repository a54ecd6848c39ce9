"""The events of a pool, and their delivery to listeners.

Each pool calls its listeners in one thread of its own, so that none delays a checkout. Without
listeners no event is built.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from traceback import extract_tb
from typing import TYPE_CHECKING, Any, dataclass_transform

from dbpool._secrets import conceal
from dbpool._threads import run_in_thread
from dbpool.errors import ConfigError

if TYPE_CHECKING:
    from dbpool.metrics import HolderSnapshot

logger = logging.getLogger("dbpool")


# Neither frozen nor with slots: frozen doubles the cost of an event, and both together would make up
# half of the time that this import takes.
@dataclass_transform()
@dataclass
class Event:
    """Something that happened in the pool called `pool`; all durations are in seconds.

    Its subclasses are dataclasses too.
    """

    pool: str

    def __init_subclass__(cls) -> None:
        dataclass(cls)


class Opened(Event):
    """The pool opened."""


class Closed(Event):
    """The pool closed."""


class Connected(Event):
    """A connection was made; it took `seconds`."""

    seconds: float


class ConnectFailed(Event):
    """An attempt to connect failed after `seconds`; `kind` is a `dbpool.errors.FailureKind`."""

    seconds: float
    error: str
    kind: str


class CheckedOut(Event):
    """A caller acquired a connection after waiting for `wait` seconds."""

    wait: float


class CheckedIn(Event):
    """A caller returned a connection after using it for `use` seconds."""

    use: float


class Discarded(Event):
    """The pool closed a connection; `reason` is one of `dbpool.metrics.REASONS`."""

    reason: str


class WaitTimedOut(Event):
    """A caller got no connection in time; it waited for `seconds`."""

    seconds: float


class SlowAcquire(Event):
    """A caller has waited for `seconds`, longer than `slow_acquire`, and still waits."""

    seconds: float


class Rejected(Event):
    """A caller was rejected: open breaker, full queue, or the pool closed while it waited."""


class HeldLong(Event):
    """A connection has been held for longer than `leak_after`; `stack` shows its holder now."""

    holder: HolderSnapshot
    stack: str


class ReturnedLate(Event):
    """A connection held for too long came back after `seconds`; it was checked out at `where`."""

    seconds: float
    where: str


class Leaked(Event):
    """A connection was forgotten: garbage-collected, or taken back when its request ended."""

    holder: HolderSnapshot


class Retried(Event):
    """A transaction failed in attempt number `attempt`, and runs again after `delay` seconds."""

    attempt: int
    error: str
    delay: float


class CircuitOpened(Event):
    """The database is unavailable: callers are rejected instead of waiting."""

    error: str
    kind: str


class CircuitClosed(Event):
    """The database is back, `seconds` after the first failure."""

    seconds: float


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def name_of(event: Event) -> str:
    """Return the event's name in snake case: `checked_out` for `CheckedOut`."""
    return _snake_case(type(event).__name__)


class Listener:
    """A base class for listeners: define a method for each event that you want to receive.

    Name it after the event: `def checked_out(self, event): ...`. If it raises, the error is logged
    and nothing else happens. If it hangs, only the pool's later events are delayed.
    """

    def __call__(self, event: Event) -> None:
        """Pass the event to the method named after it, if there is one."""
        getattr(self, name_of(event), lambda _: None)(event)


class LoggingListener(Listener):
    """Logs every event on logger `dbpool`, with its fields also in the extra key `dbpool`."""

    def __init__(self, level: int = logging.INFO) -> None:
        self._level = level

    def __call__(self, event: Event) -> None:
        """Log the event."""
        name, fields = name_of(event), asdict(event)
        words = [name]
        for key, value in fields.items():
            if key not in ("pool", "stack"):  # the line begins with the pool; a stack is too long
                words += [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value!r}"]
        extra = {"dbpool": {"event": name, **fields}}
        logger.log(self._level, "pool %r: %s", event.pool, " ".join(words), extra=extra)


def validate_listeners(listeners: Iterable[Any]) -> tuple[Callable[[Any], object], ...]:
    """Return the listeners; raise `ConfigError` for one that would never hear an event."""
    if not isinstance(given := conceal(listeners), Iterable):
        raise ConfigError("listeners must be a list")
    found = tuple(given)
    for listener in found:
        if problem := _problem_of(listener):
            raise ConfigError(f"the listener {_named(listener)} {problem}")
    return found


def _named(listener: Any) -> str:
    """Return a listener's name; its `repr` may show what it was made with."""
    return getattr(listener, "__qualname__", f"of type {type(listener).__qualname__}")


def _problem_of(listener: Any) -> str | None:
    """Return why *listener* would never receive an event, None if it can."""
    if isinstance(listener, type):
        return f"is a class: pass an instance, {listener.__name__}()"
    cls = type(listener)
    if not isinstance(listener, Listener) or cls.__call__ is not Listener.__call__:
        return None if _takes_event(listener) else "cannot be called with an event"
    from difflib import get_close_matches

    names = {_snake_case(event.__name__) for event in Event.__subclasses__()}
    for name in sorted({*dir(cls)} - {*dir(Listener)}):
        takes_event = _takes_event(getattr(listener, name, None))
        if name in names and not takes_event:
            return f"has a method {name!r} that cannot be called with an event"
        # A helper may have any name that does not resemble that of an event.
        nearest = get_close_matches(_snake_case(name), names, 1, cutoff=0.8)
        if takes_event and nearest and name not in names and not name.startswith("_"):
            return f"has a method {name!r}; did you mean {nearest[0]!r}? If not, prefix it with _"
    can_hear = any(hasattr(listener, name) for name in names)
    return None if can_hear else "has no method named after an event"


def _takes_event(function: Any) -> bool:
    """Whether *function* can be called with an event, and runs when it is."""
    from inspect import signature

    try:
        signature(function).bind(None)
    except (TypeError, ValueError) as ex:
        return isinstance(ex, ValueError)  # a builtin may have no signature
    return runs_when_called(function)


def runs_when_called(function: Any) -> bool:
    """Whether a call runs *function* to its end: one with `async` or `yield` only begins it."""
    from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction

    begins_only = iscoroutinefunction, isasyncgenfunction, isgeneratorfunction
    calls = function, type(function).__call__
    return callable(function) and not any(test(call) for test in begins_only for call in calls)


class Emitter:
    """Delivers the events of one pool to its listeners, in order, in a thread of its own.

    Emitting only puts the event into a queue, so a slow listener delays no caller. The thread
    starts with the first event and ends with the pool. At most `MAX_QUEUED` events are kept; further ones
    are dropped, which is logged once.
    """

    MAX_QUEUED = 10_000

    def __init__(self, listeners: Iterable[Callable[[Any], object]] = ()) -> None:
        self._listeners = validate_listeners(listeners)
        self.active = bool(self._listeners)
        self.reset()

    def reset(self) -> None:
        """Drop all events and the thread, as a new process has to."""
        self.call_lock = threading.RLock()  # held while listeners are called: a fork waits for it
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()  # None wakes the thread
        self._thread: threading.Thread | None = None
        self._is_closing = self._has_dropped = False
        self._logged: set[object] = set()

    def emit(self, event: Event) -> None:
        """Queue an event for the listeners."""
        if self._events.qsize() < self.MAX_QUEUED:
            self._events.put(event)
        else:
            self._has_dropped = True
        if self._thread is None:
            self._start()

    def close(self, timeout: float = 0.0) -> None:
        """End the thread after the last event; wait at most *timeout* seconds for that."""
        self._is_closing, thread = True, self._thread
        self._events.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="dbpool-listeners", daemon=True)
        with suppress(RuntimeError):  # out of threads, or the interpreter is ending
            run_in_thread(thread.start)

    def _run(self) -> None:
        me, call_lock = threading.current_thread(), self.call_lock
        if self._thread is not None:  # another caller started one at the same time
            return
        self._thread = me  # nothing was called since: CPython switches to no other thread
        # A listener may fork: `reset` has taken this thread's place in the child.
        while self._thread is me:
            try:
                event = self._events.get(block=not self._is_closing)
            except queue.Empty:
                self._thread = None
                if not self._events.empty():  # it came while this was still the thread
                    self._start()
                return
            with call_lock:
                if event is not None:
                    self._deliver(event)

    def _deliver(self, event: Event) -> None:
        if self._has_dropped and self._remember("dropped"):
            logger.error("pool %r: its listeners are too slow, events are dropped", event.pool)
        for listener in self._listeners:
            failure = None
            try:
                listener(event)
            except BaseException as ex:  # noqa: BLE001  # the other listeners still get the event
                failure = type(ex).__name__, extract_tb(ex.__traceback__, limit=-3)
            # Logged without the error: its text may hold where an alarm was sent, with a secret.
            if failure and self._remember((id(listener), type(event))):
                text = "a listener failed on %s: %s: %s at %s"
                logger.error(text, name_of(event), _named(listener), *failure)

    def _remember(self, problem: object) -> bool:
        """Return whether a problem is new."""
        is_first = problem not in self._logged
        self._logged.add(problem)
        return is_first
