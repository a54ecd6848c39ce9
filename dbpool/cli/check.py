"""`check`: connect to every database, and report the result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from dbpool.cli._configured import configured, warnings_printed
from dbpool.cli._output import line
from dbpool.cli._probe import probe
from dbpool.databases import Databases
from dbpool.errors import ConfigError
from dbpool.health import Health
from dbpool.settings import Settings, unknown_variables
from dbpool.settings._parsing import did_you_mean
from dbpool.settings._sources import Dotenv
from dbpool.settings.app import AppSettings

HELP = "connect to each database, and report its state and the settings in effect"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="report as JSON")
    parser.add_argument("--strict", action="store_true", help="fail on unknown variables too")


def run(arguments: argparse.Namespace) -> int:
    databases, dotenv = configured()
    unknown = unknown_variables(dotenv=dotenv)
    error = _error_beside(databases, dotenv)
    reports = {name: probe(settings) for name, settings in databases.items()}
    ok = all(report["ok"] for report in reports.values())
    ok = ok and error is None and not (arguments.strict and unknown)
    notes = [f"unknown variable {key}{did_you_mean(near)}" for key, near in unknown]
    if arguments.json:
        found = {"ok": ok, "error": error, "unknown": notes, "databases": reports}
        print(json.dumps(found, indent=2))
    else:
        for name, report in reports.items():
            print(_as_text(name, report))
        if error is not None:
            print(f"error: {error}")
        for note in notes:
            print(f"{'error' if arguments.strict else 'warning'}: {note}")
    return 0 if ok else 1


def _error_beside(databases: Mapping[str, Settings], dotenv: Dotenv) -> str | None:
    """Return what is wrong with the application's settings other than those of its databases."""
    try:
        with warnings_printed():
            Health(Databases(databases), AppSettings.from_env(dotenv=dotenv).required)
    except ConfigError as ex:
        return str(ex)
    return None


def _as_text(name: str, report: Mapping[str, Any]) -> str:
    lines = [f"{name}: {'ok' if report['ok'] else 'failed'}"]
    shown = ("error", "kind", "warning", "host", "port", "database", "user", "server_version")
    found = [key for key in (*shown, "tls", "connect_seconds") if key in report]
    lines += [f"  {key.replace('_', ' ')}: {line(report[key])}" for key in found]
    lines += [
        f"  {key} = {value}"
        for key, value in report["settings"].items()
        if value not in (None, "") and key != "name"
    ]
    return "\n".join(lines)
