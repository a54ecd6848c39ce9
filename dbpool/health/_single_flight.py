"""Calls in threads of their own; a second caller shares the result of the call under way."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from time import monotonic
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Call(Generic[T]):
    """A call in a thread of its own, which may never return.

    `started` is on the monotonic clock; `seconds` is how long it took, None while it runs.
    """

    def __init__(self) -> None:
        self.future: Future[T] = Future()
        self.started = monotonic()
        self.seconds: float | None = None

    def wait(self, timeout: float) -> bool:
        """Wait until *timeout* seconds after the call's start; return whether it has ended."""
        return bool(wait([self.future], max(0.0, self.started + timeout - monotonic())).done)

    @property
    def error(self) -> BaseException | None:
        """The exception of a call that has ended, without its traceback; None if it returned."""
        return self.future.exception()

    @property
    def result(self) -> T:
        """The result of a call that has ended; raises what the call raised."""
        return self.future.result()


class SingleFlight:
    """The calls under way by key: at most one thread for each key, however many callers ask."""

    def __init__(self) -> None:
        # Only atomic operations change it, since a lock could be held across a fork. The pid is in
        # the key, so that a child does not wait for threads of its parent.
        self._calls: dict[tuple[int, Hashable], Call[Any]] = {}

    def start(self, key: Hashable, fn: Callable[[], T]) -> Call[T]:
        """Start *fn*, or join the call under way for *key*."""
        own: Call[T] = Call()
        own_key = (os.getpid(), key)
        call = self._calls.setdefault(own_key, own)
        if call is own:
            thread = threading.Thread(
                target=self._run, args=(own_key, own, fn), name=f"dbpool-ask-{key}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as ex:  # the system has no more threads
                self._calls.pop(own_key)
                own.future.set_exception(ex)
        return call

    def _run(self, own_key: tuple[int, Hashable], call: Call[T], fn: Callable[[], T]) -> None:
        error: BaseException | None = None
        try:
            result = fn()
        except BaseException as ex:  # noqa: BLE001  # a user's callable may raise anything
            error = ex.with_traceback(None)
        call.seconds = monotonic() - call.started
        self._calls.pop(own_key, None)  # before the result is set: a later caller asks again
        if error is not None:
            call.future.set_exception(error)
        else:
            call.future.set_result(result)
