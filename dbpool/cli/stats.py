"""`stats`: print the statistics of the application that runs here, as JSON."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg

from dbpool._secrets import safe_repr
from dbpool.cli._configured import configured
from dbpool.databases import Databases
from dbpool.errors import ConfigError
from dbpool.gunicorn import directories
from dbpool.processes import Processes
from dbpool.settings.app import AppSettings, find_dotenv

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
    directory = _directory(arguments.dir) if arguments.scope == "all" else None
    report = _of_this_process() if directory is None else _survey(Path(directory), arguments.app)
    print(json.dumps(report, indent=2))
    return 0 if all(pool["state"] != "down" for pool in report["pools"].values()) else 1


def _directory(given: str | None) -> str | Path | None:
    """Where to look: as given or set, else where the one application that runs here has it."""
    if known := given or AppSettings.from_env(dotenv=find_dotenv()).stats_dir:
        return known
    found = directories()
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise ConfigError(f"several applications run here: choose one with --dir: {names}")
    return found[0] if found else None


def _survey(directory: Path, app: str | None) -> dict[str, Any]:
    pattern, place = (
        re.compile(r"(\w+)(?:-\d+)+\.json|(.+)\.archive"),
        safe_repr(os.fspath(directory)),
    )
    matches = [pattern.fullmatch(path.name) for path in directory.glob("*")]
    apps = sorted({match[1] or match[2] for match in matches if match})
    if app is None and len(apps) > 1:
        raise ConfigError(
            f"several applications share {place}: choose one with --app {' or '.join(apps)}"
        )
    if not apps or (app is not None and app not in apps):
        raise ConfigError(f"{place} holds no statistics{f' of {app}' if app else ''}")
    report = Processes({}, directory, app or apps[0]).survey()
    if report is None:
        raise ConfigError(f"{place} is not a directory that is private to this user")
    return report


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
