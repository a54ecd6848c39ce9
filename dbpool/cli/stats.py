"""`stats`: print the statistics of the application that runs here, as JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import psycopg

from dbpool.cli._configured import configured
from dbpool.cli._running import collect_report, statistics_directory
from dbpool.databases import Databases
from dbpool.metrics import PoolState
from dbpool.processes import Processes
from dbpool.report import Report

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
    report = _ask_pools() if directory is None else collect_report(Path(directory), arguments.app)
    print(json.dumps(report.to_json(), indent=2))
    return 1 if any(pool.state == PoolState.DOWN for pool in report.pools.values()) else 0


def _ask_pools() -> Report:
    """Report on the pools of this process, after one connection each."""
    small = {
        name: replace(settings, min_size=0, max_size=1, leak_after=0)
        for name, settings in configured()[0].items()
    }
    with Databases(small) as databases:
        for pool in databases.values():
            try:
                pool.fetch_value("select 1")
            except psycopg.Error:
                continue  # the pool's state says so
        return Processes(databases).collect("process")
