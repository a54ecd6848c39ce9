"""Threads for tests: each is joined with a deadline, and its error is raised or returned."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from .waiting import until

JOIN_SECONDS = 30.0


class Task:
    """A call in a thread of its own, started at once."""

    def __init__(self, fn: Callable[..., Any], *args: Any, name: str = "task") -> None:
        self._fn, self._args = fn, args
        self._value: Any = None
        self._error: BaseException | None = None
        self.began = time.monotonic()
        self.ended = 0.0
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._fn(*self._args)
        except BaseException as ex:  # noqa: BLE001  # the test checks it
            self._error = ex
        self.ended = time.monotonic()

    def _join(self, seconds: float) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "a thread is stuck"

    @property
    def is_running(self) -> bool:
        """Whether the call has not ended."""
        return self._thread.is_alive()

    def result(self, seconds: float = JOIN_SECONDS) -> Any:
        """Return what the call returned, or raise what it raised."""
        self._join(seconds)
        if self._error is not None:
            raise self._error
        return self._value

    def error(self, seconds: float = JOIN_SECONDS) -> BaseException:
        """Return what the call raised."""
        self._join(seconds)
        assert self._error is not None, f"it returned {self._value!r}"
        return self._error

    def outcome(self, seconds: float = JOIN_SECONDS) -> Any:
        """Return what the call returned or raised."""
        self._join(seconds)
        return self._value if self._error is None else self._error

    @property
    def seconds(self) -> float:
        """How long the call took."""
        self._join(JOIN_SECONDS)
        return self.ended - self.began


def run_in_threads(
    number: int, fn: Callable[..., Any], *args: Any, seconds: float = 600.0
) -> list[Any]:
    """Call *fn* in that many threads at once; return what they returned, or raise."""
    tasks = [Task(fn, *args) for _ in range(number)]
    return [task.result(seconds) for task in tasks]


class Load:
    """Threads that call *fn* over and over until stopped."""

    def __init__(self, fn: Callable[[], Any], threads: int = 6) -> None:
        self.calls = 0
        self.errors: list[BaseException] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._fn = fn
        self._tasks = [Task(self._work) for _ in range(threads)]

    def _work(self) -> None:
        while not self._stop.wait(0.001):  # without a pause some kernels starve all other threads
            try:
                self._fn()
            except Exception as ex:  # noqa: BLE001  # the test checks it
                _forget_frames(ex)
                with self._lock:
                    self.errors.append(ex)
            with self._lock:
                self.calls += 1

    def await_calls(self, more: int = 50) -> None:
        """Wait until that many more calls were made."""
        wanted = self.calls + more
        until(lambda: self.calls >= wanted, 30.0)

    def stop(self) -> None:
        """Let every thread end its call."""
        self._stop.set()
        for task in self._tasks:
            task.result()


def _forget_frames(ex: BaseException | None) -> None:
    """Clear the frames of a traceback, which may hold connections."""
    while ex is not None:
        ex.__traceback__ = None
        ex = ex.__cause__ or ex.__context__
