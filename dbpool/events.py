"""What a pool tells its listeners: the events, and how they are delivered.

The pool builds no event when nobody listens, and never calls a listener under a lock.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbpool.metrics import HolderSnapshot

logger = logging.getLogger("dbpool")


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened in the pool of that name."""

    pool: str


@dataclass(frozen=True, slots=True)
class Opened(Event):
    """The pool opened."""


@dataclass(frozen=True, slots=True)
class Closed(Event):
    """The pool closed."""


@dataclass(frozen=True, slots=True)
class Connected(Event):
    """A connection was made, in that many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class ConnectFailed(Event):
    """An attempt to connect failed after that many seconds."""

    seconds: float
    error: str
    kind: str


@dataclass(frozen=True, slots=True)
class CheckedOut(Event):
    """A connection was handed out after a wait of that many seconds."""

    wait: float


@dataclass(frozen=True, slots=True)
class CheckedIn(Event):
    """A connection came back after it was used for that many seconds."""

    use: float


@dataclass(frozen=True, slots=True)
class Discarded(Event):
    """A connection was given up: dead, expired, broken, idle or collected."""

    reason: str


@dataclass(frozen=True, slots=True)
class WaitTimedOut(Event):
    """A caller got no connection in that many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Rejected(Event):
    """A caller was refused without waiting: open breaker, or too many waiters."""


@dataclass(frozen=True, slots=True)
class Leaked(Event):
    """A connection has been held for too long; `stack` is where its holder is now."""

    holder: HolderSnapshot
    stack: str


@dataclass(frozen=True, slots=True)
class ReturnedLate(Event):
    """A connection told as `Leaked` came back; `where` is where it was checked out."""

    seconds: float
    where: str


@dataclass(frozen=True, slots=True)
class Retried(Event):
    """A transaction is run again after that many attempts and a pause of `delay` seconds."""

    attempt: int
    error: str
    delay: float


@dataclass(frozen=True, slots=True)
class CircuitOpened(Event):
    """The database is unavailable: nobody waits for it any more."""

    error: str
    kind: str


@dataclass(frozen=True, slots=True)
class CircuitClosed(Event):
    """The database is back after that many seconds."""

    seconds: float


def name_of(event: Event) -> str:
    """Return the event's name as a method has it: `checked_out` for `CheckedOut`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()


class Listener:
    """A base for listeners: define the methods of the events you want to hear.

    A method is named after its event, `def checked_out(self, event): ...`. One that raises
    an `Exception` is logged and breaks nothing; `SystemExit` and its like pass through.
    """

    def __call__(self, event: Event) -> None:
        """Pass the event to the method named after it, if there is one."""
        method = getattr(self, name_of(event), None)
        if method is not None:
            method(event)


class LoggingListener(Listener):
    """Logs every event on logger `dbpool`, with its fields in the extra key `dbpool`."""

    def __init__(self, level: int = logging.INFO) -> None:
        self._level = level

    def __call__(self, event: Event) -> None:
        """Log the event."""
        name = name_of(event)
        fields = {"event": name, **asdict(event)}
        logger.log(self._level, "pool %r: %s", event.pool, name, extra={"dbpool": fields})


class Emitter:
    """Calls the listeners of one pool, one after the other, in their order."""

    def __init__(self, listeners: Iterable[Callable[[Any], object]] = ()) -> None:
        self._listeners = tuple(listeners)
        self._complained: set[tuple[int, str]] = set()
        self.active = bool(self._listeners)

    def emit(self, event: Event) -> None:
        """Tell every listener. One that raises is logged, once for each kind of event."""
        for listener in self._listeners:
            try:
                listener(event)
            except Exception as ex:  # noqa: BLE001  # a listener never breaks a checkout
                self._complain(listener, event, ex)

    def _complain(self, listener: object, event: Event, ex: Exception) -> None:
        key = (id(listener), type(event).__name__)
        if key not in self._complained:
            self._complained.add(key)
            logger.error("a listener failed on %s: %r", name_of(event), listener, exc_info=ex)
