"""Raise at each point at which CPython may run a signal handler, one after the other."""

from __future__ import annotations

import dis
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import psycopg_pool

import dbpool

_FOLDERS = tuple(str(Path(package.__path__[0])) for package in (dbpool, psycopg_pool))

# CPython looks for signals when a function begins, when a loop goes back, and after a call. What
# a `with` statement enters may wait, and can then be interrupted before it is entered.
_CALLS = {"CALL", "CALL_FUNCTION_EX", "CALL_KW"}
_BEFORE = {"JUMP_BACKWARD", "BEFORE_WITH"}


class Interrupt(BaseException):
    """Stands for what a signal handler raises."""


@cache
def _steps(code: CodeType) -> dict[int, tuple[str, int | None]]:
    """The name of each instruction of *code*, and the handler that would catch its exception."""
    table = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]
    handlers = {
        offset: entry.target for entry in table for offset in range(entry.start, entry.end, 2)
    }
    return {x.offset: (x.opname, handlers.get(x.offset)) for x in dis.get_instructions(code)}


class _Points:
    def __init__(self, fatal: int, call: Callable[[], object]) -> None:
        self._remaining = fatal
        self._call = call
        # CPython 3.11 may call a trace function after it was removed.
        self._trace_functions: list[Any] = []

    def reach(self) -> None:
        self._remaining -= 1
        if self._remaining == 0:
            sys.settrace(None)
            self._call()

    @property
    def is_reached(self) -> bool:
        return self._remaining <= 0

    def trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_FOLDERS):
            return None
        steps = _steps(frame.f_code)
        called: int | None = -1  # the handler around the call just made, -1 without one

        def step(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal called
            if event == "opcode":
                name, handler = steps[frame.f_lasti]
                # CPython looks for signals while it still is at the call. If the handler has
                # changed since, as after the last call of a `with` block, it is too late.
                is_point = called == handler or name in _BEFORE
                called = handler if name in _CALLS else -1
                if is_point:
                    self.reach()
            return step

        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        self._trace_functions.append(step)
        self.reach()
        return step


def interrupt() -> None:
    """Raise as a signal handler does."""
    raise Interrupt


@contextmanager
def interrupted(point: int, call: Callable[[], object] = interrupt) -> Iterator[_Points]:
    """Raise, or *call*, at the pool's point number *point* in this block, counted from 1."""
    points, before = _Points(point, call), sys.gettrace()
    trace = points.trace
    sys.settrace(trace)
    try:
        yield points
    finally:
        sys.settrace(before)


@contextmanager
def alarm(seconds: float, raising: type[BaseException]) -> Iterator[None]:
    """Raise in the main thread after that time, at whatever point it is."""

    def on_alarm(number: int, frame: object) -> None:
        raise raising

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def every_point(action: Callable[[], object]) -> Iterator[int]:
    """Call *action* and interrupt it, at one point after the other, until it ends undisturbed.

    Yields after each time.
    """
    point = 0
    is_reached = True
    while is_reached:
        point += 1
        with suppress(Interrupt), interrupted(point) as points:
            action()
        is_reached = points.is_reached
        yield point
