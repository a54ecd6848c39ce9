"""Counts what happens at many requests, so that one line in a minute says so."""

from __future__ import annotations

import math
from time import monotonic
from typing import Final

_INTERVAL: Final = 60.0  # seconds between two lines about one subject
_MAX_SUBJECTS: Final = 256  # that are remembered


class RateLimit:
    """Says when a line is due about a subject, and how often it came up since the last one."""

    def __init__(self) -> None:
        self._counts: dict[object, tuple[float, int]] = {}  # when it was logged, how often since

    def count(self, subject: object) -> int:
        """Count it; return how often it came up since it was logged, 0 if no line is due."""
        # Without a lock, which a fork could leave locked: at worst there is a line too many.
        now = monotonic()
        logged, count = self._counts.get(subject, (-math.inf, 0))
        is_due = now - logged >= _INTERVAL
        if len(self._counts) >= _MAX_SUBJECTS:
            self._counts.clear()
        self._counts[subject] = (now, 0) if is_due else (logged, count + 1)
        return count + 1 if is_due else 0


def times(count: int) -> str:
    """Return the end of a line about what came up *count* times."""
    return f" ({count} times since it was last logged)" if count > 1 else ""
