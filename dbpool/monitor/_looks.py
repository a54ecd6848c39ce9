"""What a process notices when it looks: that it stood still, and which pools nobody uses."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from dbpool.metrics import Snapshot

_STALL: Final = 15.0  # seconds that a pause between two looks is remembered
_UNUSED: Final = 5.0  # seconds after which a pool that nobody uses is pinged


class Pauses:
    """The pauses between looks. Times are monotonic."""

    def __init__(self) -> None:
        self._known: list[tuple[float, float]] = []  # when a look was, and how long after the last

    def look(self, now: float) -> float:
        """Take the time of the next look; return the longest recent pause, in seconds."""
        before = self._known[-1][0] if self._known else now
        self._known = [each for each in self._known if now - each[0] <= _STALL]
        self._known.append((now, now - before))
        return max(pause for _, pause in self._known)


class Pings:
    """Pings pools that nobody uses, so that an outage of their server is noticed too."""

    def __init__(self) -> None:
        self._used: dict[str, tuple[int, float]] = {}  # checkouts, and when there last was one

    def look(self, pools: Mapping[str, Any], stats: Mapping[str, Snapshot], now: float) -> None:
        """Ping pools that were unused for five seconds; *now* is monotonic."""
        for name, each in stats.items():
            checkouts, at = self._used.get(name, (-1, now))
            is_unused = each.state == "up" and each.idle > 0 and each.active == 0
            if each.counters.checkouts != checkouts:
                self._used[name] = each.counters.checkouts, now
            elif is_unused and now - at >= _UNUSED:
                self._used[name] = checkouts, now
                with suppress(Exception):  # the pool says so itself
                    pools[name].check()
