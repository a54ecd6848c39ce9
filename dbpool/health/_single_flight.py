"""Calls in threads of their own: whoever asks for one that is under way shares its answer."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from time import monotonic
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Call(Generic[T]):
    """A call under way in a thread of its own, which may never return.

    `started` is on the monotonic clock; `seconds` is how long it took, None while it runs.
    """

    def __init__(self) -> None:
        self.future: Future[T] = Future()
        self.started = monotonic()
        self.seconds: float | None = None

    def wait(self, bound: float) -> bool:
        """Wait until *bound* seconds after its start, not after now; say whether it has ended."""
        return bool(wait([self.future], max(0.0, self.started + bound - monotonic())).done)

    @property
    def error(self) -> BaseException | None:
        """What an ended call raised, without its traceback; None if it returned."""
        return self.future.exception()

    @property
    def result(self) -> T:
        """What an ended call returned; raises what it raised."""
        return self.future.result()


class SingleFlight:
    """The calls under way, by key: at most one thread for each key, however many ask."""

    def __init__(self) -> None:
        # Changed by single operations only, which are atomic, so that no lock can be held
        # across a fork. The pid keeps a child from waiting for its parent's threads.
        self._calls: dict[tuple[int, Hashable], Call[Any]] = {}

    def start(self, key: Hashable, fn: Callable[[], T]) -> Call[T]:
        """Start *fn*, or join the call under way for *key*."""
        own: Call[T] = Call()
        where = (os.getpid(), key)
        call = self._calls.setdefault(where, own)
        if call is own:
            thread = threading.Thread(
                target=self._run, args=(where, own, fn), name=f"dbpool-ask-{key}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as ex:  # the system has no more threads
                self._calls.pop(where)
                own.future.set_exception(ex)
        return call

    def _run(self, where: tuple[int, Hashable], call: Call[T], fn: Callable[[], T]) -> None:
        error: BaseException | None = None
        try:
            result = fn()
        except BaseException as ex:  # noqa: BLE001  # a user's callable may raise anything
            error = ex.with_traceback(None)
        call.seconds = monotonic() - call.started
        self._calls.pop(where, None)  # before the answer is there: a later caller asks anew
        if error is not None:
            call.future.set_exception(error)
        else:
            call.future.set_result(result)
