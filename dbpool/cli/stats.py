"""`stats`: print the statistics of the application that runs here, as JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import psycopg

from dbpool.cli._configured import configured, pool_options
from dbpool.cli._running import statistics_directory
from dbpool.cli._text import as_text
from dbpool.cli.top import read_running
from dbpool.databases import Databases
from dbpool.diagnosis import Scene, diagnose
from dbpool.metrics import PoolState
from dbpool.monitor import INCLUDES
from dbpool.processes import Processes
from dbpool.report import Report

HELP = "print the statistics of the application that runs here, as JSON or as text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir", help="the directory of the statistics (DBPOOL_STATS_DIR, else a search)"
    )
    parser.add_argument(
        "--scope",
        choices=["all", "process"],
        default="all",
        help="all (default), or process: connect and report only on that",
    )
    parser.add_argument("--app", help="the application to choose, if several share the directory")
    parser.add_argument(
        "--human", action="store_true", help="print text instead of JSON: what `top` shows, once"
    )


def run(arguments: argparse.Namespace) -> int:
    is_of_all = arguments.scope == "all"
    if is_of_all and (arguments.app or statistics_directory(arguments.dir)):
        report = read_running(arguments.dir, arguments.app)
        if not arguments.human:
            report = {key: each for key, each in report.items() if key not in INCLUDES}
    else:
        report = _ask_pools().to_json()
        report["findings"] = [each.to_json() for each in diagnose(Scene.read(report))]
    print(as_text(report) if arguments.human else json.dumps(report, indent=2))
    is_down = any(pool["state"] == PoolState.DOWN for pool in report["pools"].values())
    return 1 if is_down else 0


def _ask_pools() -> Report:
    """Report on the pools of this process, after one connection each."""
    small = {
        name: replace(settings, min_size=0, max_size=1, leak_after=0)
        for name, settings in configured()[0].items()
    }
    with Databases(small, **pool_options()) as databases:
        for pool in databases.values():
            try:
                pool.fetch_value("select 1")
            except psycopg.Error:
                continue  # the pool's state shows it
        return Processes(databases).collect("process")
