"""Decides when a finding is logged: when it begins, grows worse, and after 1, 10 and 60 minutes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from dbpool.diagnosis import Finding, Severity

_REMINDERS: Final = (60.0, 600.0, 3600.0)  # seconds after the beginning
_ENDS_AFTER: Final = 60.0  # seconds without the finding
_MAX_EPISODES: Final = 256


@dataclass
class _Episode:
    began: float
    seen: float
    severity: Severity
    count: int = 0
    reminded: int = 0


class Episodes:
    """Which findings to log now. Times are monotonic."""

    def __init__(self) -> None:
        self._open: dict[str, _Episode] = {}

    def due(self, findings: Iterable[Finding], now: float) -> list[tuple[Finding, int]]:
        """Return the findings to log, each with how often it was seen; that is 1 when it begins.

        One that becomes worse than it was ever logged is logged again.

        A finding of severity `ok` is never logged.
        """
        self._open = {
            key: episode
            for key, episode in self._open.items()
            if 0 <= now - episode.seen <= _ENDS_AFTER
        }
        found = []
        for finding in findings:
            if finding.severity is Severity.OK or len(self._open) >= _MAX_EPISODES:
                continue
            episode = self._open.setdefault(finding.id, _Episode(now, now, finding.severity))
            episode.seen, episode.count = now, episode.count + 1
            is_worse = finding.severity.rank > episode.severity.rank
            if is_worse:
                episode.severity = finding.severity
            if episode.count == 1 or is_worse or self._remind(episode, now):
                found.append((finding, episode.count))
        return found

    @staticmethod
    def _remind(episode: _Episode, now: float) -> bool:
        """Return whether another reminder is due, and count it."""
        passed = sum(now - episode.began >= seconds for seconds in _REMINDERS)
        is_due, episode.reminded = passed > episode.reminded, max(passed, episode.reminded)
        return is_due
