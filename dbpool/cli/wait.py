"""`wait`: try until every database serves."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from shutil import get_terminal_size
from time import monotonic
from typing import Final

from dbpool.cli._configured import configured, seconds
from dbpool.cli._output import fail, line
from dbpool.cli._probe import probe
from dbpool.settings import Settings

HELP = "wait until every database is up"
_PAUSE: Final = 0.5  # seconds between two attempts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=60.0,
        metavar="TIME",
        help="how long to wait (default: 60s)",
    )


def run(arguments: argparse.Namespace) -> int:
    progress = _Progress()
    deadline = monotonic() + arguments.timeout
    for name, settings in configured()[0].items():
        error = _wait_for(settings, deadline, progress)
        progress.clear()
        if error is not None:
            return fail(f"{name} does not serve: {error}")
    return 0


def _wait_for(settings: Settings, deadline: float, progress: _Progress) -> str | None:
    """Try until the database serves, whatever the error is; return why it does not in time."""
    while True:
        left = deadline - monotonic()
        report = probe(replace(settings, timeout=max(0.1, min(5.0, left))))
        if report["ok"]:
            return None
        error = str(report["error"])
        if monotonic() + _PAUSE >= deadline:
            return error
        progress.show(f"waiting for {settings.name}: {error}")
        time.sleep(_PAUSE)


class _Progress:
    """One line on a terminal that is written anew; nothing elsewhere."""

    def __init__(self) -> None:
        self._started = monotonic()
        self._is_terminal = sys.stderr.isatty()

    def show(self, text: str) -> None:
        self._write(
            f"{monotonic() - self._started:3.0f} s  {line(text)}"[: get_terminal_size().columns - 1]
        )

    def clear(self) -> None:
        self._write("")

    def _write(self, text: str) -> None:
        if self._is_terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
