"""What belongs to one process alone, and what starts with a server's worker.

A forked child must leave its parent's threads and files alone, and its locks, which may be held.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")


class PerProcess(Generic[T]):
    """Call it for the value of this process, which *make* makes at the first call."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._values: dict[int, T] = {}  # by pid

    def __call__(self) -> T:
        # setdefault() is atomic: a lock could be held at a fork, and never be released in the child.
        pid = os.getpid()
        return self._values.get(pid) or self._values.setdefault(pid, self._make())

    def known(self) -> T | None:
        """Return the value of this process, None if it was never asked for."""
        return self._values.get(os.getpid())

    def inherited(self) -> list[T]:
        """Return the values of the processes that this one was forked from."""
        return [value for pid, value in list(self._values.items()) if pid != os.getpid()]


class Startable(Protocol):
    """What has a thread in each process that uses it."""

    def start(self) -> object:
        """Start the thread, unless it runs."""


S = TypeVar("S", bound=Startable)


class Starter(Generic[S]):
    """Knows the living instances of a class; once it is started, it starts each new one too."""

    def __init__(self) -> None:
        self.is_started = False
        # By id: unlike a WeakSet's, its references are listed at once, whatever is made meanwhile.
        self._instances: WeakValueDictionary[int, S] = WeakValueDictionary()

    def __iter__(self) -> Iterator[S]:
        found = [reference() for reference in self._instances.valuerefs()]
        return (instance for instance in found if instance is not None)

    def add(self, instance: S) -> None:
        """Remember a new instance, and start it if that is due."""
        self._instances[id(instance)] = instance
        if self.is_started:
            instance.start()

    def start(self) -> None:
        """Start all instances, and from now on each new one."""
        self.is_started = True
        for instance in self:
            instance.start()
