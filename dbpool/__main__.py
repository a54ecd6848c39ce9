"""`python -m dbpool check | wait | stats`: for shells, containers and cron."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

import psycopg

from dbpool._values import did_you_mean
from dbpool.conninfo import is_exposed
from dbpool.errors import ConfigError, PoolError
from dbpool.pool import Pool
from dbpool.settings import Settings, databases_from_env, unknown_variables

_EXPOSED = "the server is remote and sslmode is below verify-full: its identity is not checked"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0 if all is well, 1 if not. Wrong usage exits with 2."""
    logging.getLogger("dbpool").addHandler(logging.NullHandler())
    logging.getLogger("dbpool").propagate = False
    arguments = _parser().parse_args(argv)
    try:
        databases = databases_from_env(dotenv=_dotenv())
        return int(arguments.command(arguments, databases))
    except ConfigError as ex:
        print(f"dbpool: {ex}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:  # the reader had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dbpool", description="Try and watch the configured databases."
    )
    commands = parser.add_subparsers(required=True, metavar="check | wait | stats")
    check = commands.add_parser("check", help="connect, and report what was found")
    check.add_argument("--json", action="store_true", help="report as JSON")
    check.add_argument("--strict", action="store_true", help="fail on unknown variables too")
    check.set_defaults(command=_check)
    wait = commands.add_parser("wait", help="wait until every database serves")
    wait.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="give up after (60)"
    )
    wait.set_defaults(command=_wait)
    stats = commands.add_parser("stats", help="connect, and print the pools' statistics as JSON")
    stats.set_defaults(command=_stats)
    return parser


def _dotenv() -> str | None:
    from dotenv import find_dotenv

    return find_dotenv(usecwd=True) or None


def _check(arguments: argparse.Namespace, databases: dict[str, Settings]) -> int:
    unknown = unknown_variables(os.environ)
    reports = {name: _report(settings) for name, settings in databases.items()}
    ok = all(report["ok"] for report in reports.values())
    ok = ok and not (arguments.strict and unknown)
    notes = [f"unknown variable {key}{did_you_mean(near)}" for key, near in unknown]
    if arguments.json:
        print(json.dumps({"ok": ok, "unknown": notes, "databases": reports}, indent=2))
    else:
        for name, report in reports.items():
            print(_as_text(name, report))
        for note in notes:
            print(f"warning: {note}")
    return 0 if ok else 1


def _report(settings: Settings) -> dict[str, Any]:
    """Connect once as the pool would, and say what was found; no secret is in it."""
    report: dict[str, Any] = {"ok": False, "settings": settings.masked()}
    started = monotonic()
    try:
        if is_exposed(settings.connect_params(), os.environ):
            report["warning"] = _EXPOSED
        with _single(settings) as pool, pool.connection() as conn:
            report["connect_seconds"] = round(monotonic() - started, 4)
            info = conn.info
            report |= {
                "ok": True,
                "host": info.host,
                "port": info.port,
                "database": info.dbname,
                "user": info.user,
                "server_version": conn.pgconn.parameter_status(b"server_version").decode(),
                "tls": bool(conn.pgconn.ssl_in_use),
            }
    except (PoolError, ConfigError) as ex:
        report["error"] = str(ex.__cause__ or ex)
        report["kind"] = getattr(ex, "kind", "config")
    except psycopg.Error as ex:  # it served, and then broke off
        report["error"] = str(ex)
    return report


def _single(settings: Settings) -> Pool[Any]:
    """A pool of one connection that gives up soon."""
    return Pool(settings=replace(settings, min_size=0, max_size=1), leak_after=0)


def _as_text(name: str, report: dict[str, Any]) -> str:
    lines = [f"{name}: {'ok' if report['ok'] else 'failed'}"]
    shown = ("error", "kind", "warning", "host", "port", "database", "user", "server_version")
    found = [key for key in (*shown, "tls", "connect_seconds") if key in report]
    lines += [f"  {key.replace('_', ' ')}: {report[key]}" for key in found]
    lines += [
        f"  {key} = {value}"
        for key, value in report["settings"].items()
        if value not in (None, "") and key != "name"
    ]
    return "\n".join(lines)


def _wait(arguments: argparse.Namespace, databases: dict[str, Settings]) -> int:
    deadline = monotonic() + arguments.timeout
    for name, settings in databases.items():
        error = _wait_for(settings, deadline)
        if error is not None:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
    return 0


def _wait_for(settings: Settings, deadline: float) -> str | None:
    """Try again each second, whatever is wrong, until it serves; return why it does not."""
    error: str | None = "there was no time to try"
    while monotonic() < deadline:
        started = monotonic()
        report = _report(replace(settings, timeout=max(0.1, min(5.0, deadline - started))))
        error = report.get("error", "it broke off")
        if report["ok"]:
            return None
        if sys.stderr.isatty():
            print(f"waiting for {settings.name}: {error}", file=sys.stderr)
        time.sleep(max(0.0, min(started + 1.0, deadline) - monotonic()))
    return error


def _stats(arguments: argparse.Namespace, databases: dict[str, Settings]) -> int:
    statistics: dict[str, Any] = {}
    ok = True
    for name, settings in databases.items():
        with _single(settings) as pool:
            try:
                pool.fetch_value("select 1")
            except psycopg.Error:
                ok = False
            statistics[name] = pool.stats().to_json()
    print(json.dumps({"schema": 1, "time": time.time(), "pools": statistics}, indent=2))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
