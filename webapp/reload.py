"""Which sources changed: for `python -m webapp --reload`, which then starts gunicorn again.

The whole of gunicorn is started again, and not its workers alone, as its own --reload does: the
master has read gunicorn.conf.py and the hooks of dbpool, and it ends when a module that somebody
is editing cannot be imported. The files are polled, because no events arrive from the host's side
of a mount in a virtual machine.
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
        self._looked_at = clock()
        self._running = self._last = self._look()

    def changed(self) -> list[Path]:
        """Return what differs from what runs, once the files have stopped changing; else nothing.

        A checkout of another branch writes for a while. Looks at most every INTERVAL_SECONDS.
        """
        if self._clock() - self._looked_at < INTERVAL_SECONDS:
            return []
        self._looked_at = self._clock()
        before, self._last = self._last, self._look()
        if self._last != before or self._last == self._running:
            return []
        different = self._last.items() ^ self._running.items()
        self._running = self._last
        return sorted({path.relative_to(self._root) for path, _ in different})

    def _look(self) -> Times:
        return dict(self._files())

    def _files(self) -> Iterator[tuple[Path, tuple[int, int]]]:
        for folder in FOLDERS:
            for path in (self._root / folder).rglob("*"):
                if path.suffix in KINDS and not path.name.startswith("."):
                    try:
                        stat = path.stat()
                    except OSError:  # gone meanwhile
                        continue
                    yield path, (stat.st_mtime_ns, stat.st_size)
