"""`stats`: print the statistics of the application that runs here, as JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg

from dbpool.cli._configured import configured
from dbpool.cli._running import statistics_directory, survey
from dbpool.databases import Databases
from dbpool.processes import Processes

HELP = "print the statistics of the application that runs here, as JSON"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", help="where they meet (DBPOOL_STATS_DIR, else it is looked for)")
    parser.add_argument(
        "--scope",
        choices=["all", "process"],
        default="all",
        help="process: make one connection and report on that",
    )
    parser.add_argument("--app", help="which application, if several share the directory")


def run(arguments: argparse.Namespace) -> int:
    directory = statistics_directory(arguments.dir) if arguments.scope == "all" else None
    report = _of_this_process() if directory is None else survey(Path(directory), arguments.app)
    print(json.dumps(report, indent=2))
    return 0 if all(pool["state"] != "down" for pool in report["pools"].values()) else 1


def _of_this_process() -> dict[str, Any]:
    """What a pool says after one connection: where no application runs, that is all there is."""
    small = {
        name: replace(settings, min_size=0, max_size=1, leak_after=0)
        for name, settings in configured()[0].items()
    }
    with Databases(small) as databases:
        for pool in databases.values():
            try:
                pool.fetch_value("select 1")
            except psycopg.Error:
                continue  # its state says so
        return Processes(databases).report("process")
