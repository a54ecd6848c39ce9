"""Clocks that tests move, for any object that has one: `breaker.clock = ShiftedClock(-60.0)`."""

from __future__ import annotations

import time


class Clock:
    """Stands still until a test sets `now`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ShiftedClock:
    """Runs like the real clock, that many seconds ahead, or behind if negative."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return time.monotonic() + self.seconds
