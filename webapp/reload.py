"""Finds the sources that changed, for `python -m webapp --reload`, which then restarts gunicorn.

All of gunicorn is started again, not only its workers, as its own --reload does: the master has
loaded gunicorn.conf.py and dbpool's hooks, and it ends if a module that is being edited cannot be
imported. The files are polled, because in a virtual machine no events arrive for changes that are
made on the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDERS = ("dbpool", "webapp")
KINDS = frozenset({".py", ".html", ".css", ".js", ".svg", ".txt"})
INTERVAL_SECONDS = 0.25

Times = dict[Path, tuple[int, int]]


class Sources:
    """The files below a checkout that make up the running application."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._clock = clock
        self._scanned_at = clock()
        self._running = self._last = self._scan()

    def changed(self) -> list[Path]:
        """Return the files that differ from what runs, once they have stopped changing.

        A checkout of another branch writes for a while. Scans at most every INTERVAL_SECONDS, and
        returns nothing in between.
        """
        if self._clock() - self._scanned_at < INTERVAL_SECONDS:
            return []
        self._scanned_at = self._clock()
        before, self._last = self._last, self._scan()
        if self._last != before or self._last == self._running:
            return []
        different = self._last.items() ^ self._running.items()
        self._running = self._last
        return sorted({path.relative_to(self._root) for path, _ in different})

    def _scan(self) -> Times:
        return dict(self._files())

    def _files(self) -> Iterator[tuple[Path, tuple[int, int]]]:
        for folder in FOLDERS:
            for path in (self._root / folder).rglob("*"):
                if path.suffix in KINDS and not path.name.startswith("."):
                    try:
                        stat = path.stat()
                    except OSError:  # it has just been removed
                        continue
                    yield path, (stat.st_mtime_ns, stat.st_size)
