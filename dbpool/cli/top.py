"""`top`: show what is wrong and what the pools do, in a terminal, refreshed each second."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, Final

from dbpool.cli._running import find_processes, statistics_directory
from dbpool.cli._text import as_text
from dbpool.errors import ConfigError
from dbpool.monitor import INCLUDES, Monitor
from dbpool.processes._processes import describe_access

HELP = "show what is wrong and what the pools do, and refresh it each second"

_INTERVAL: Final = 1.0  # seconds
_CLEAR: Final = "\x1b[H\x1b[J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir", help="the directory of the statistics (DBPOOL_STATS_DIR, else a search)"
    )
    parser.add_argument("--app", help="the application to choose, if several share the directory")
    parser.add_argument("--once", action="store_true", help="print it once and exit")


def run(arguments: argparse.Namespace) -> int:
    is_once = arguments.once or not sys.stdout.isatty()
    while True:
        size = get_terminal_size((100, 1000))
        shown = as_text(read_running(arguments.dir, arguments.app), size.columns)
        if is_once:
            print(shown)
            return 0
        # More lines than fit would scroll the first ones away.
        fitting = os.linesep.join(shown.splitlines()[: size.lines - 1])
        print(f"{_CLEAR}{fitting}", end="", flush=True)
        time.sleep(_INTERVAL)


def read_running(given: str | None, app: str | None) -> dict[str, Any]:
    """Return the report of the application that runs here, with findings, history and journal."""
    directory = statistics_directory(given)
    if directory is None:
        raise ConfigError(
            "no application that shares its statistics runs here: see DBPOOL_STATS_DIR"
        )
    processes = find_processes(Path(directory), app)
    report = processes.collect_others(usage=True)
    if report is None:
        problem = describe_access(Path(directory).lstat())
        raise ConfigError(f"{directory} is not a directory private to this user: {problem}")
    return Monitor({}, processes).extend(report, INCLUDES)
