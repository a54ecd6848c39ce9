"""Finds out which endpoints, or lines of code outside of requests, forgot connections recently."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from dbpool.diagnosis import Watch
from dbpool.diagnosis.endpoints import Rows, forgotten


class Forgotten:
    """Compares the use of pools by endpoint with what it was before connections were forgotten."""

    def __init__(self) -> None:
        self._before: Mapping[str, Rows] | None = None
        self._is_over = True

    def look(
        self, watches: Mapping[str, Watch], usage: Callable[[], Mapping[str, Rows]]
    ) -> dict[str, Watch]:
        """Return the watches, with who forgot connections; *usage*, not cheap, reads the use."""
        if not any(watch.forgotten for watch in watches.values()):
            if self._before is None or not self._is_over:
                self._before, self._is_over = usage(), True
            return dict(watches)
        self._is_over, before, after = False, self._before or {}, usage()
        return {
            name: replace(watch, forgotten_by=forgotten(after.get(name, {}), before.get(name, {})))
            for name, watch in watches.items()
        }
