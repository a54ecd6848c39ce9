"""Calls made in threads side by side; who asks for one that is under way shares its answer."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from time import monotonic
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Flight(Generic[T]):
    """A call under way in a thread of its own, which may never come back."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._landed = threading.Event()
        self.started = monotonic()
        self.answer: T | None = None
        self.error: BaseException | None = None
        self.seconds: float | None = None

    def wait(self, bound: float) -> bool:
        """Wait until *bound* seconds after its start, not after now; say whether it landed."""
        return self._landed.wait(max(0.0, self.started + bound - monotonic()))

    def fly(self) -> None:
        """Make the call, and keep what it returns or raises."""
        try:
            self.answer = self._call()
        except BaseException as ex:  # noqa: BLE001  # a user's callable may raise anything
            self.error = ex.with_traceback(None)
        self.seconds = monotonic() - self.started

    def land(self) -> None:
        """Let those who wait go on."""
        self._landed.set()


class Flights:
    """What is under way, by key: at most one thread for each, however many ask."""

    def __init__(self) -> None:
        # Changed by single operations only, which are atomic, so that no lock can be held
        # across a fork. The pid keeps a child from waiting for its parent's threads.
        self._under_way: dict[tuple[int, Hashable], Flight[Any]] = {}

    def start(self, key: Hashable, call: Callable[[], T]) -> Flight[T]:
        """Start *call*, or join the one under way for *key*."""
        own = Flight(call)
        where = (os.getpid(), key)
        flight = self._under_way.setdefault(where, own)
        if flight is own:
            thread = threading.Thread(
                target=self._run, args=(where, own), name=f"dbpool-ask-{key}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as ex:  # the system has no more threads
                own.error = ex
                self._end(where, own)
        return flight

    def _run(self, where: tuple[int, Hashable], flight: Flight[Any]) -> None:
        flight.fly()
        self._end(where, flight)

    def _end(self, where: tuple[int, Hashable], flight: Flight[Any]) -> None:
        self._under_way.pop(where, None)  # before it lands: who comes now asks anew
        flight.land()
